//! `bonepile fit`: which models and experiments fit which cards, by the memory model. Asks the coordinator only for what is
//! present.
//!
//! Layout: [`plan`]: what is done, and the smallest change that makes it fit. Here: what was asked, and tables.

pub mod plan;

use protocol::catalogue::{self, Card, cards::CARDS};
use protocol::memory::{Backend, ModelShape, Optimiser, ProjectorKind};
use serde_json::{Value, json};

use self::plan::{Place, Plan, Verdict, Work};
use super::args::{Fit, FitPhase};
use super::context::{Context, Outcome};
use super::exit;
use super::failure::Failure;
use super::output::Document;
use super::table::{Style, Table, Tone};
use super::text::bytes;
use crate::api::{DeviceRow, WorkerRow, route};

/// Cards that old boxes have.
const USUAL: [&str; 4] = ["gtx-1660-super", "gtx-1080", "rtx-3060", "rtx-3090"];
/// Compute threads of a processor, which its row does not say; each keeps 1 to 2 MB.
const THREADS: u32 = 4;

/// A line of the answer: a model and what is done with it, on one place.
struct Line<'a> {
    model: &'a str,
    phase: FitPhase,
    place: &'a Place,
    plan: Plan<'a>,
    verdict: Verdict,
}

/// Runs the command.
///
/// # Errors
/// Exit code 2 for a card or model that the catalogue does not know; with `--present` as [`super::client::Client`]'s.
pub async fn run(context: &mut Context, args: &Fit) -> Outcome {
    let places = match args.present {
        true => present(&context.client()?.get::<Vec<WorkerRow>>(route::WORKERS).await?),
        false => chosen(&args.cards)?,
    };
    let style = context.output.style();
    let document = answer(args, &places, style)?;
    context.show(&document)?;
    if places.is_empty() {
        context.output.note("no device is present; `bonepile fit --cards all` looks at the catalogue");
    }
    Ok(exit::OK)
}

fn answer(args: &Fit, places: &[Place], style: Style) -> Result<Document, Failure> {
    let models = models(&args.model)?;
    let source = args.source.as_deref().map(sizes).transpose()?;
    let phases = match args.phase.as_slice() {
        [] => &[FitPhase::Inference, FitPhase::Capture, FitPhase::Projector, FitPhase::Lora, FitPhase::Full],
        phases => phases,
    };
    let mut lines = Vec::new();
    for (model, shape) in &models {
        for phase in phases {
            let plan = Plan { shape, held: args.weights, tokens: args.tokens, work: work(args, *phase, shape, source) };
            let line = |place| Line { model, phase: *phase, place, plan, verdict: plan.verdict(place) };
            lines.extend(places.iter().map(line));
        }
    }
    let json: Vec<Value> = lines.iter().map(Line::json).collect();
    let text = if models.len() == 1 { detailed(&lines, style) } else { matrix(&lines, places, style) };
    Ok(Document::new(&json, text))
}

fn work<'a>(args: &Fit, phase: FitPhase, shape: &'a ModelShape, source: Option<&'a ModelShape>) -> Work<'a> {
    match phase {
        FitPhase::Inference => Work::Inference,
        FitPhase::Capture => Work::Capture,
        FitPhase::Projector => {
            let kind = ProjectorKind::Fuser { hidden: args.width, inner: args.width, depth: 3 };
            Work::Projector { source: source.unwrap_or(shape), kind }
        }
        FitPhase::Lora => Work::Lora { rank: args.rank },
        FitPhase::Full => Work::Full { optimiser: Optimiser::AdamW },
    }
}

fn models(names: &[String]) -> Result<Vec<(&str, &'static ModelShape)>, Failure> {
    if names.is_empty() {
        let known = catalogue::shape_names().filter_map(|name| Some((name, catalogue::shape(name)?)));
        return Ok(known.collect());
    }
    names.iter().map(|name| Ok((name.as_str(), sizes(name)?))).collect()
}

fn sizes(name: &str) -> Result<&'static ModelShape, Failure> {
    catalogue::shape(name).ok_or_else(|| {
        let known: Vec<_> = catalogue::shape_names().collect();
        Failure::usage("unknown-model", format!("no model of the catalogue is called `{name}`"))
            .hint(format!("it has {}", known.join(", ")))
    })
}

fn chosen(names: &[String]) -> Result<Vec<Place>, Failure> {
    if names.iter().any(|name| name == "all") {
        return Ok(CARDS.iter().map(place).collect());
    }
    let usual = USUAL.map(str::to_owned);
    let names = if names.is_empty() { &usual[..] } else { names };
    let find = |name: &String| match catalogue::card(name) {
        Some(card) => Ok(place(card)),
        None => {
            let known: Vec<_> = CARDS.iter().map(|card| card.short).collect();
            Err(Failure::usage("unknown-card", format!("no card of the catalogue is called `{name}`"))
                .hint(format!("it has {}", known.join(", "))))
        }
    };
    names.iter().map(find).collect()
}

fn place(card: &Card) -> Place {
    Place { name: card.short.to_owned(), backend: Backend::CARD, usable_bytes: card.usable_bytes() }
}

/// The devices of all workers, with the budgets that their operators set.
fn present(workers: &[WorkerRow]) -> Vec<Place> {
    let place = |worker: &WorkerRow, device: &DeviceRow| Place {
        name: format!("{}/{}", worker.id, device_name(device)),
        backend: match device.compute_capability {
            Some(_) => Backend::CARD,
            None => Backend::Cpu { threads: THREADS },
        },
        usable_bytes: device.memory_budget_bytes,
    };
    workers.iter().flat_map(|worker| worker.devices.iter().map(move |device| place(worker, device))).collect()
}

fn device_name(device: &DeviceRow) -> String {
    match (catalogue::card(&device.model), &device.compute_capability) {
        (Some(card), _) => card.short.to_owned(),
        (None, Some(_)) => device.model.clone(),
        (None, None) => device.id.to_string(),
    }
}

impl Line<'_> {
    fn need(&self) -> u64 {
        self.plan.footprint(self.place.backend).peak()
    }

    fn json(&self) -> Value {
        let (verdict, change, changed) = match &self.verdict {
            Verdict::Fits => ("fits", None, None),
            Verdict::Changed { change, need_bytes } => ("change", Some(change.as_str()), Some(*need_bytes)),
            Verdict::Split { change, need_bytes } => ("split", Some(change.as_str()), Some(*need_bytes)),
            Verdict::No => ("no", None, None),
        };
        json!({
            "model": self.model,
            "phase": phase_name(self.phase),
            "device": self.place.name,
            "weights": self.plan.held.to_string(),
            "tokens": self.plan.tokens,
            "need_bytes": self.need(),
            "usable_bytes": self.place.usable_bytes,
            "verdict": verdict,
            "change": change,
            "changed_need_bytes": changed,
            "parts": self.plan.footprint(self.place.backend),
        })
    }

    fn words(&self) -> (String, Option<Tone>) {
        match &self.verdict {
            Verdict::Fits => ("fits".to_owned(), Some(Tone::Good)),
            Verdict::Changed { change, .. } => (change.clone(), Some(Tone::Busy)),
            Verdict::Split { change, .. } if change.is_empty() => ("two".to_owned(), Some(Tone::Busy)),
            Verdict::Split { change, .. } => (format!("two, {change}"), Some(Tone::Busy)),
            Verdict::No => ("no".to_owned(), Some(Tone::Bad)),
        }
    }
}

fn phase_name(phase: FitPhase) -> &'static str {
    match phase {
        FitPhase::Inference => "inference",
        FitPhase::Capture => "capture",
        FitPhase::Projector => "projector",
        FitPhase::Lora => "lora",
        FitPhase::Full => "full",
    }
}

/// A row a line.
fn detailed(lines: &[Line<'_>], style: Style) -> String {
    let mut table = Table::new(style, &["model", "phase", "device", ">need", ">usable", "verdict", "with"]);
    for line in lines {
        let (verdict, with) = match &line.verdict {
            Verdict::Fits => ("fits", String::new()),
            Verdict::Changed { change, need_bytes } => ("too large", format!("{change}: {}", bytes(*need_bytes))),
            Verdict::Split { change, need_bytes } => {
                let change = if change.is_empty() { String::new() } else { format!(" and {change}") };
                ("too large", format!("two of them{change}: {} each", bytes(*need_bytes)))
            }
            Verdict::No => ("too large", "nothing that we know".to_owned()),
        };
        table.row([
            (line.model.to_owned(), None),
            (phase_name(line.phase).to_owned(), None),
            (line.place.name.clone(), None),
            (bytes(line.need()), None),
            (bytes(line.place.usable_bytes), None),
            (verdict.to_owned(), line.words().1),
            (with, None),
        ]);
    }
    table.render()
}

/// A row a model and phase, a column a place: `fits`, or the smallest change with which it does.
fn matrix(lines: &[Line<'_>], places: &[Place], style: Style) -> String {
    if places.is_empty() {
        return String::new();
    }
    let names = places.iter().map(|place| format!("{} ({})", place.name, bytes(place.usable_bytes)));
    let columns = ["model".to_owned(), "phase".to_owned(), ">need".to_owned()].into_iter().chain(names);
    let mut table = Table::new(style, &columns.collect::<Vec<_>>());
    for row in lines.chunks(places.len()) {
        let first = &row[0];
        let head =
            [(first.model.to_owned(), None), (phase_name(first.phase).to_owned(), None), (bytes(first.need()), None)];
        table.row(head.into_iter().chain(row.iter().map(Line::words)));
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::args::{Cli, Command};

    fn text(arguments: &[&str]) -> Result<Document, Failure> {
        let Command::Fit(args) = Cli::parse_from([&["bonepile", "fit"], arguments].concat()).command else { panic!() };
        answer(&args, &chosen(&args.cards)?, Style::default())
    }

    #[test]
    fn a_model_in_a_table() {
        let shown =
            text(&["--model", "qwen2.5-7b", "--cards", "gtx-1080,rtx-3090", "--phase", "inference,lora"]).unwrap();
        insta::assert_snapshot!(shown.text, @r"
        model       phase      device       need   usable  verdict    with
        qwen2.5-7b  inference  gtx-1080  16.7 GB   8.1 GB  too large  q6_k: 7.2 GB
        qwen2.5-7b  inference  rtx-3090  16.7 GB  25.2 GB  fits
        qwen2.5-7b  lora       gtx-1080  19.1 GB   8.1 GB  too large  q4_k_m: 8.1 GB
        qwen2.5-7b  lora       rtx-3090  19.1 GB  25.2 GB  fits
        ");
    }

    #[test]
    fn models_against_cards() {
        let models = "smollm2-135m-instruct,gemma-3-270m,llama-3.1-8b,llama-3.1-70b";
        let shown = text(&["--model", models]).unwrap();
        insta::assert_snapshot!(shown.text, @r"
        model                  phase          need  gtx-1660-super (5.9 GB)  gtx-1080 (8.1 GB)   rtx-3060 (12.3 GB)  rtx-3090 (25.2 GB)
        smollm2-135m-instruct  inference  750.0 MB  fits                     fits                fits                fits
        smollm2-135m-instruct  capture    830.5 MB  fits                     fits                fits                fits
        smollm2-135m-instruct  projector   11.0 GB  fuser of width 512       fuser of width 512  fits                fits
        smollm2-135m-instruct  lora         1.4 GB  fits                     fits                fits                fits
        smollm2-135m-instruct  full         3.2 GB  fits                     fits                fits                fits
        gemma-3-270m           inference    1.0 GB  fits                     fits                fits                fits
        gemma-3-270m           capture      1.1 GB  fits                     fits                fits                fits
        gemma-3-270m           projector   10.3 GB  fuser of width 256       fuser of width 512  fits                fits
        gemma-3-270m           lora         3.9 GB  fits                     fits                fits                fits
        gemma-3-270m           full         7.8 GB  8-bit moments            fits                fits                fits
        llama-3.1-8b           inference   17.7 GB  q4_0                     q6_k                q8_0                fits
        llama-3.1-8b           capture     17.9 GB  q4_k_m and 256 tokens    q6_k                q8_0                fits
        llama-3.1-8b           projector   54.3 GB  no                       no                  no                  fuser of width 512 and q5_k
        llama-3.1-8b           lora        19.8 GB  two, q5_k                q4_0                q8_0                fits
        llama-3.1-8b           full       137.1 GB  no                       no                  no                  no
        llama-3.1-70b          inference  149.4 GB  no                       no                  no                  two, q4_k_m
        llama-3.1-70b          capture    150.1 GB  no                       no                  no                  two, q4_k_m
        llama-3.1-70b          projector  359.1 GB  no                       no                  no                  no
        llama-3.1-70b          lora       155.2 GB  no                       no                  no                  no
        llama-3.1-70b          full         1.2 TB  no                       no                  no                  no
        ");
    }

    #[test]
    fn present_devices_go_by_their_operators_budgets() {
        let device = |id: &str, model: &str, capability: Option<&str>| {
            let capability = capability.map(str::to_owned);
            serde_json::json!({
                "id": id, "model": model, "compute_capability": capability, "memory_total_bytes": 8_000_000_000_u64,
                "memory_budget_bytes": 5_000_000_000_u64, "memory_reserved_bytes": 0,
            })
        };
        let devices = [device("GPU-1", "NVIDIA GeForce GTX 1080", Some("6.1")), device("cpu", "Xeon", None)];
        let worker = serde_json::json!({
            "id": "w3", "hostname": "attic", "state": "online", "build": "", "devices": devices, "models": [], "seats": [],
        });
        let places = present(&[serde_json::from_value(worker).unwrap()]);
        let names: Vec<_> =
            places.iter().map(|place| (place.name.as_str(), place.backend, place.usable_bytes)).collect();
        let cpu = Backend::Cpu { threads: THREADS };
        assert_eq!(names, [("w3/gtx-1080", Backend::CARD, 5_000_000_000), ("w3/cpu", cpu, 5_000_000_000)]);
    }

    #[test]
    fn what_the_catalogue_does_not_know_is_a_usage_error() {
        for arguments in [["--cards", "gtx-1090"], ["--model", "gpt-5"], ["--source", "gpt-5"]] {
            let failure = text(&arguments).unwrap_err();
            assert!(failure.exit == exit::USAGE && failure.hint.is_some(), "{failure:?}");
        }
    }
}
