//! `plan`, `simulate`, `release` and `workers --throughput`: what would be, and what it stands on.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use protocol::catalogue;
use protocol::sweep::Sweep;

use super::args::{PlanArgs, Release, SimulateArgs};
use super::context::{Context, Outcome};
use super::exit;
use super::failure::Failure;
use super::output::Document;
use super::table::{Style, Table, Tone};
use super::text::{bytes, duration_ms};
use crate::api::plan::{PlanAnswer, PlanFuser, PlanRequest, PlanShard, ThroughputRow};
use crate::api::route;
use crate::forecast::formats::{self, FormatError};
use crate::forecast::replay::{Knowledge, Outcome as Replayed, Scenario};
use crate::scheduler::Policy;

/// Shards that a plan lists one by one; of more the first are shown.
const SHARDS_SHOWN_MAX: usize = 40;

/// `plan`.
///
/// # Errors
/// Exit code 2 with the line in question if the sweep is wrong; 4 if some of it would never run.
pub async fn plan(context: &mut Context, args: &PlanArgs) -> Outcome {
    let (file, text) = sweep(&args.sweep)?;
    let request = PlanRequest { file, text, ..PlanRequest::default() };
    let answer: PlanAnswer = context.client()?.post(route::PLAN, &request).await?;
    let text = plan_text(&answer, args.usd_per_kwh, context.output.style());
    context.show(&Document::new(&answer, text))?;
    Ok(if answer.shards.iter().any(|shard| shard.seats.is_empty()) { exit::PARTIAL } else { exit::OK })
}

/// `simulate`.
///
/// # Errors
/// Exit code 2 if a file is wrong, with its line.
pub async fn simulate(context: &mut Context, args: &SimulateArgs) -> Outcome {
    match (&args.throughputs, &args.trace, &args.devices) {
        (Some(throughputs), Some(trace), Some(devices)) => replay(context, args, throughputs, trace, devices),
        _ => {
            let (file, text) = match &args.sweep {
                Some(path) => sweep(path)?,
                None => (String::new(), String::new()),
            };
            let request = PlanRequest {
                file,
                text,
                add: args.add.clone(),
                remove: args.remove.iter().map(ToString::to_string).collect(),
            };
            let answer: PlanAnswer = context.client()?.post(route::PLAN, &request).await?;
            let text = plan_text(&answer, args.usd_per_kwh, context.output.style());
            context.show(&Document::new(&answer, text))?;
            Ok(exit::OK)
        }
    }
}

/// `workers --throughput`.
///
/// # Errors
/// As [`super::client::Client`]'s.
pub async fn throughput(context: &mut Context) -> Outcome {
    let rows: Vec<ThroughputRow> = context.client()?.get(route::THROUGHPUT).await?;
    let mut table = Table::new(context.output.style(), &["class", "device", ">units/s", ">spread", ">samples"]);
    for row in &rows {
        table.row([
            (row.class.clone(), None),
            (row.device_model.clone(), None),
            (format!("{:.4}", row.units_per_second), None),
            (format!("x{:.2}", row.spread), None),
            (row.samples.to_string(), None),
        ]);
    }
    let text = table.render();
    context.show(&Document::new(&rows, text))?;
    if rows.is_empty() {
        context
            .output
            .note("nothing has finished yet: times are guessed from the devices' benchmarks and the catalogue");
    }
    Ok(exit::OK)
}

/// `release`.
///
/// # Errors
/// As [`super::client::Client`]'s.
pub async fn release(context: &mut Context, args: &Release) -> Outcome {
    let () = context.client()?.order(&route::release(&args.device)).await?;
    context.output.note(&format!("{} gets work again", args.device));
    Ok(exit::OK)
}

fn sweep(path: &Path) -> Result<(String, String), Failure> {
    let text = fs::read_to_string(path)
        .map_err(|error| Failure { exit: exit::USAGE, ..Failure::file("read", path, &error) })?;
    let file = path.display().to_string();
    Sweep::parse(&file, &text).map_err(|error| Failure::in_source("bad-sweep", &error, &text))?;
    Ok((file, text))
}

fn plan_text(answer: &PlanAnswer, usd_per_kwh: f64, style: Style) -> String {
    let mut text = String::new();
    if !answer.shards.is_empty() {
        let mut table = Table::new(style, &[">shard", "what", "where", ">start", ">end", ">memory", "basis", "why"]);
        for shard in answer.shards.iter().take(SHARDS_SHOWN_MAX) {
            shard_rows(&mut table, shard);
        }
        text += &table.render();
        if answer.shards.len() > SHARDS_SHOWN_MAX {
            let _ = writeln!(text, "and {} more (--json has all)", answer.shards.len() - SHARDS_SHOWN_MAX);
        }
    }
    answer.fusers.iter().for_each(|fuser| text += &fuser_text(fuser, style));
    text += &nowhere(&answer.shards);
    let never = answer.shards.iter().filter(|shard| shard.seats.is_empty()).count();
    match answer.makespan_ms {
        Some(ms) => {
            let _ = write!(text, "ends in {}", duration_ms(ms));
            if let Some((low, high)) = answer.makespan_spread_ms {
                let _ = write!(text, ", between {} and {} in 8 of 10 forecasts", duration_ms(low), duration_ms(high));
            }
            let _ = writeln!(text, "; {} on devices", duration_ms(answer.device_ms));
        }
        None => {
            let _ = writeln!(text, "does not end: {never} shards would not start as things are");
        }
    }
    if let Some(ms) = answer.makespan_as_is_ms {
        let _ = writeln!(text, "with the devices that are there now: {}", duration_ms(ms));
    }
    let electricity = answer.energy_kwh * usd_per_kwh;
    let _ = writeln!(
        text,
        "costs ${:.2} for workers with a price and ${electricity:.2} of electricity ({:.2} kWh at ${usd_per_kwh:.2})",
        answer.price_usd, answer.energy_kwh
    );
    let _ = writeln!(
        text,
        "not covered: fetching models, results' way to the store, faults and what others submit meanwhile"
    );
    text
}

/// Which width a fuser would have, and what others would cost: a line each.
fn fuser_text(fuser: &PlanFuser, style: Style) -> String {
    let mut table = Table::new(style, &[">width", ">parameters", ">sent a round", ">memory", ""]);
    for width in &fuser.widths {
        let note = match (width.hidden == fuser.hidden, width.fits) {
            (true, true) => "taken",
            (true, false) => "taken, fits nowhere now",
            (false, true) => "",
            (false, false) => "fits nowhere now",
        };
        table.row([
            (width.hidden.to_string(), None),
            (format!("{:.1} M", width.parameters as f64 / 1e6), None),
            (bytes(width.delta_bytes), None),
            (bytes(width.memory_bytes), None),
            (note.to_owned(), None),
        ]);
    }
    let name = if fuser.experiment.is_empty() { String::new() } else { format!(" `{}`", fuser.experiment) };
    format!("fuser{name} {}: width {}\n{}", fuser.pair, fuser.hidden, table.render())
}

/// Why shards would not start, each reason once.
fn nowhere(shards: &[PlanShard]) -> String {
    let mut reasons: Vec<(&str, Vec<u32>)> = Vec::new();
    for shard in shards.iter().filter(|shard| shard.seats.is_empty()) {
        match reasons.iter_mut().find(|(why, _)| *why == shard.why) {
            Some((_, indices)) => indices.push(shard.index),
            None => reasons.push((&shard.why, vec![shard.index])),
        }
    }
    let line = |(why, indices): (&str, Vec<u32>)| {
        let first = indices.first().copied().unwrap_or(0);
        match indices.len() {
            1 => format!("shard {first}: {why}\n"),
            more => format!("shard {first} and {} more: {why}\n", more - 1),
        }
    };
    reasons.into_iter().map(line).collect()
}

fn shard_rows(table: &mut Table, shard: &PlanShard) {
    let head = [(shard.index.to_string(), None), (shard.summary.clone(), None)];
    let basis = (shard.basis.clone().unwrap_or_default(), None);
    if shard.seats.is_empty() {
        let empty = || (String::new(), None);
        let rest = [("nowhere".to_owned(), Some(Tone::Bad)), empty(), empty(), empty(), basis, empty()];
        table.row(head.into_iter().chain(rest));
        return;
    }
    for (index, seat) in shard.seats.iter().enumerate() {
        let first = index == 0;
        let head = if first { head.clone() } else { [(String::new(), None), (seat.role.to_string(), None)] };
        let why = if first { shard.why.clone() } else { String::new() };
        table.row(head.into_iter().chain([
            (format!("{} ({})", seat.device, seat.model), None),
            (duration_ms(seat.start_ms), None),
            (duration_ms(seat.end_ms), None),
            (bytes(seat.memory_bytes), None),
            if first { basis.clone() } else { (String::new(), None) },
            (why, None),
        ]));
    }
}

fn replay(context: &mut Context, args: &SimulateArgs, throughputs: &Path, trace: &Path, devices: &str) -> Outcome {
    let bad = |error: FormatError| Failure { exit: exit::USAGE, ..Failure::failed("bad-input", error.to_string()) };
    let read = |path: &Path| {
        fs::read_to_string(path).map_err(|error| Failure { exit: exit::USAGE, ..Failure::file("read", path, &error) })
    };
    let table = formats::throughputs(&throughputs.display().to_string(), &read(throughputs)?).map_err(bad)?;
    let memory = |model: &str| catalogue::card(model).map(catalogue::cards::Card::usable_bytes);
    let kinds = formats::devices(devices, memory).map_err(bad)?;
    let reference = args.reference.clone().or_else(|| kinds.first().map(|kind| kind.model.clone())).unwrap_or_default();
    if let Some(kind) = kinds.iter().find(|kind| table.values().all(|row| !row.contains_key(&kind.model))) {
        let known: std::collections::BTreeSet<_> = table.values().flat_map(|row| row.keys().cloned()).collect();
        let known: Vec<_> = known.into_iter().collect();
        let message = format!("no throughputs for device `{}`; there are some for {}", kind.model, known.join(", "));
        return Err(Failure { exit: exit::USAGE, ..Failure::failed("bad-input", message) });
    }
    let jobs = formats::trace(&trace.display().to_string(), &read(trace)?, &table, &reference).map_err(bad)?;
    let scenario = Scenario { throughputs: table, reference, kinds, jobs };
    let contenders = [
        ("first-idle", Policy::FirstIdle, Knowledge::Cold),
        ("fastest-idle", Policy::FastestIdle, Knowledge::Cold),
        ("speed-factor", Policy::SpeedFactor, Knowledge::Cold),
        ("table learned", Policy::EarliestFinish, Knowledge::Cold),
        ("table known", Policy::EarliestFinish, Knowledge::Known),
    ];
    let rows: Vec<(&str, Replayed)> =
        contenders.iter().map(|(name, policy, knowledge)| (*name, scenario.replay(*policy, *knowledge, 0))).collect();
    let mut lines = Table::new(
        context.output.style(),
        &["policy", ">makespan", ">of bound", ">mean completion", ">p95", "utilisation", ">done", ">out of memory"],
    );
    for (name, outcome) in &rows {
        let ms = |seconds: f64| {
            duration_ms(std::time::Duration::from_secs_f64(seconds.max(0.0)).as_millis().try_into().unwrap_or(u64::MAX))
        };
        let used: Vec<_> =
            outcome.utilisation.iter().map(|(model, share)| format!("{model} {:.0} %", share * 100.0)).collect();
        lines.row([
            ((*name).to_owned(), None),
            (ms(outcome.makespan_s), None),
            (format!("{:.2}x", outcome.makespan_s / outcome.bound_s.max(f64::MIN_POSITIVE)), None),
            (ms(outcome.completion_mean_s), None),
            (ms(outcome.completion_p95_s), None),
            (used.join(", "), None),
            (format!("{}/{}", outcome.finished, scenario.jobs.len()), None),
            (outcome.overcommits.to_string(), None),
        ]);
    }
    let text = lines.render();
    let data: std::collections::BTreeMap<_, _> = rows.into_iter().collect();
    context.show(&Document::new(&data, text))?;
    context.output.note("the bound is the linear relaxation with every job there at once: no schedule beats it");
    Ok(exit::OK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::plan::PlanWidth;

    #[test]
    fn a_fuser_has_a_line_a_width() {
        let width = |hidden, parameters, fits| PlanWidth {
            hidden,
            parameters,
            delta_bytes: parameters + parameters / 256 * 4,
            memory_bytes: 1_200_000_000 + parameters * 20,
            fits,
        };
        let fuser = PlanFuser {
            experiment: "refined".to_owned(),
            pair: "smollm2-135m-instruct -> gemma-3-270m".to_owned(),
            hidden: 256,
            widths: vec![
                width(1024, 270_000_000, false),
                width(512, 75_000_000, false),
                width(256, 22_800_000, true),
                width(128, 7_600_000, true),
            ],
        };
        insta::assert_snapshot!(fuser_text(&fuser, Style::default()), @r"
        fuser `refined` smollm2-135m-instruct -> gemma-3-270m: width 256
        width  parameters  sent a round  memory
         1024     270.0 M      274.2 MB  6.6 GB  fits nowhere now
          512      75.0 M       76.2 MB  2.7 GB  fits nowhere now
          256      22.8 M       23.2 MB  1.7 GB  taken
          128       7.6 M        7.7 MB  1.4 GB
        ");
    }
}
