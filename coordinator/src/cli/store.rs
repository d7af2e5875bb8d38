//! `bonepile store fsck`: reads the whole store and says what is wrong. Works without a coordinator.

use std::fmt::Write;

use protocol::limits::clean_text;
use protocol::store::{FsckReport, Store};

use super::args::StoreCommand;
use super::context::{Context, Outcome};
use super::exit;
use super::output::Document;
use super::text::bytes;
use crate::clock::now;

/// Runs the command.
///
/// # Errors
/// What keeps it from looking; findings are no error, but exit code 1.
pub fn run(context: &mut Context, command: &StoreCommand) -> Outcome {
    let StoreCommand::Fsck { path } = command;
    let path = match path {
        Some(path) => path.clone(),
        None => context.cluster()?.store_path,
    };
    let report = Store::open(&path, None)?.fsck(now())?;
    context.show(&Document::new(&report, text(&report)))?;
    Ok(if report.is_clean() { exit::OK } else { exit::FAILED })
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
