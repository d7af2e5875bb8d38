//! Checks by reading the source: the scheduler stays pure, and the journal's table in the docs stays whole.
//!
//! Deliberately simple: a word that must not stand in a file, a word that must.

use std::path::{Path, PathBuf};

use super::lab::Lab;

/// What would let the world in, or make two replays differ.
const BANNED: [&str; 15] = [
    "tokio",
    "rand::",
    "use ring",
    "HashMap",
    "HashSet",
    "std::time",
    "SystemTime",
    "Instant",
    "std::fs",
    "std::io",
    "std::env",
    "std::thread",
    "async fn",
    "f32",
    "f64",
];

fn sources(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> =
        entries.filter(|path| path.extension().is_some_and(|extension| extension == "rs")).collect();
    files.sort();
    files
}

#[test]
fn the_scheduler_stays_pure() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/scheduler");
    let files = sources(&directory);
    assert!(files.len() > 10, "looked in the wrong place: {files:?}");
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        for (number, line) in (1..).zip(text.lines()) {
            let code = line.split("//").next().unwrap_or_default();
            for banned in BANNED {
                assert!(!code.contains(banned), "{}:{number} has `{banned}`: {line}", file.display());
            }
        }
    }
}

#[test]
fn every_event_is_in_the_docs() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let docs = std::fs::read_to_string(root.join("docs/journal.md")).unwrap();
    let source = std::fs::read_to_string(root.join("coordinator/src/scheduler/event.rs")).unwrap();
    let (_, kinds) = source.split_once("pub fn kind(&self)").unwrap();
    let (kinds, _) = kinds.split_once("/// What the operator set").unwrap();
    let kinds: Vec<_> = kinds.split('"').skip(1).step_by(2).collect();
    assert!(kinds.len() > 20, "{kinds:?}");
    for kind in kinds {
        assert!(docs.contains(&format!("| `{kind}` |")), "docs/journal.md has no row for {kind}");
    }
}

/// The form on disk is a promise to later builds: this line must read, as it stands, for ever.
#[test]
fn an_events_form_does_not_drift() {
    let mut lab = Lab::new();
    lab.join();
    let body = serde_json::to_string(&lab.journal[0].event).unwrap();
    let hash = "09".repeat(32);
    let expected = format!(r#"{{"TokenCreated":{{"token":1,"secret_hash":"{hash}","expires_at":1060000,"uses":1}}}}"#);
    assert_eq!(body, expected);
}
