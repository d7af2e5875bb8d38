//! `bonepile store …`: reads the whole store and says what is wrong; puts files into it. Works without a coordinator.

use std::fmt::Write;
use std::path::Path;

use protocol::control::Output;
use protocol::experiment::projector::name_stored_file;
use protocol::limits::clean_text;
use protocol::store::{FsckReport, Store, StoreError};

use super::args::StoreCommand;
use super::context::{Context, Outcome};
use super::exit;
use super::output::Document;
use super::text::bytes;
use crate::clock::now;

/// Runs the command.
///
/// # Errors
/// What keeps it from looking or writing; findings are no error, but exit code 1.
pub fn run(context: &mut Context, command: &StoreCommand) -> Outcome {
    let (StoreCommand::Fsck { path } | StoreCommand::Put { store: path, .. }) = command;
    let path = match path {
        Some(path) => path.clone(),
        None => context.cluster()?.store_path,
    };
    let store = Store::open(&path, None)?;
    match command {
        StoreCommand::Fsck { .. } => {
            let report = store.fsck(now())?;
            context.show(&Document::new(&report, text(&report)))?;
            Ok(if report.is_clean() { exit::OK } else { exit::FAILED })
        }
        StoreCommand::Put { files, .. } => {
            let names = files.iter().map(|file| put(&store, file)).collect::<Result<Vec<_>, _>>()?;
            let text = names.iter().map(|name| format!("{name}\n")).collect::<String>();
            context.show(&Document::new(&names, text))?;
            Ok(exit::OK)
        }
    }
}

/// Puts a file into the store; its name for a sweep.
fn put(store: &Store, file: &Path) -> Result<String, StoreError> {
    let (hash, bytes) = store.publish_file(file)?;
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let name = file.file_name().map_or_else(String::new, |name| name.to_string_lossy().chars().map(plain).collect());
    Ok(name_stored_file(&Output { name, hash, bytes }))
}

fn text(report: &FsckReport) -> String {
    let mut text = format!(
        "store        {} ({})\nartifacts    {} ({}), {} named by manifests, {} not\nmanifests    {}\ntemporary    {}\n",
        report.path,
        report.store_uuid,
        report.blobs,
        bytes(report.blob_bytes),
        report.referenced,
        report.unreferenced,
        report.manifests,
        report.temporaries,
    );
    for finding in &report.findings {
        let kind = serde_json::to_value(finding.kind).expect("a finding's kind is plain data");
        let line = format!("{} {}: {}", kind.as_str().unwrap_or_default(), finding.path, finding.detail);
        writeln!(text, "{}", clean_text(&line).replace('\n', " ")).expect("writing to a String cannot fail");
    }
    match report.findings.len() {
        0 => text.push_str("clean\n"),
        count => writeln!(text, "{count} findings").expect("writing to a String cannot fail"),
    }
    text
}
