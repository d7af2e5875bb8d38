//! `docs/protocol.md` and the source say the same: every number is in the registry, and neither changes without the other.

use std::fs;
use std::path::PathBuf;

use protocol::control::close;
use protocol::frame::{HEADER_BYTES, Header};

use crate::samples::all;

const SOURCES: [&str; 4] = ["frame.rs", "control.rs", "peer.rs", "exec.rs"];
const LOCK: &str = "<!-- source: ";

fn manifest() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn docs() -> (PathBuf, String) {
    let path = manifest().join("../docs/protocol.md");
    let text = fs::read_to_string(&path).unwrap();
    (path, text)
}

/// Of the source without its tests.
fn source_hash() -> String {
    let mut hasher = blake3::Hasher::new();
    for name in SOURCES {
        let text = fs::read_to_string(manifest().join("src").join(name)).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        hasher.update(code.as_bytes());
    }
    hasher.finalize().to_hex()[..32].to_owned()
}

#[test]
fn the_source_has_not_changed_without_the_docs() {
    let (path, mut text) = docs();
    let lock = format!("{LOCK}{} -->", source_hash());
    if std::env::var_os("BONEPILE_BLESS").is_some() {
        let begin = text.find(LOCK).expect("the docs have a lock");
        let end = begin + text[begin..].find("-->").unwrap() + 3;
        text.replace_range(begin..end, &lock);
        fs::write(path, &text).unwrap();
    }
    assert!(
        text.contains(&lock),
        "protocol/src/{{{}}} changed: read docs/protocol.md again, then set its lock to `{lock}`",
        SOURCES.join(",")
    );
}

#[test]
fn every_message_is_in_the_registry() {
    let (_, text) = docs();
    for sample in all() {
        let header = Header::parse(*sample.frame.first_chunk::<HEADER_BYTES>().unwrap(), 1 << 20).unwrap();
        let variant = sample.value.split('(').next().unwrap();
        let row = format!("| `{:#06x}` | `{variant}` |", header.kind);
        assert!(text.contains(&row), "{}: no row `{row}`", sample.name);
    }
}

#[test]
fn every_close_code_is_in_the_registry() {
    let (_, text) = docs();
    let known = (1u32..).take_while(|code| close::name(u64::from(*code)) != "unknown code");
    let mut count = 0;
    for code in known {
        let name = close::name(u64::from(code));
        let row = format!("| {code} | {name} |");
        assert!(text.contains(&row), "no row `{row}`");
        count += 1;
    }
    assert!(count >= 9);
}
