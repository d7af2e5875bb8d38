//! Golden frames: what is written today is what was written then, and what was written then is read today.

use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;
use protocol::frame::{HEADER_BYTES, Header};
use protocol::ids::{hex, unhex};
use protocol::peer::ChunkHeader;

use crate::samples::{Sample, all};

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/v1")
}

/// A golden file: the value as a comment, then hex, 32 bytes a line.
fn text(value: &str, bytes: &[u8]) -> String {
    let lines: Vec<_> = bytes.chunks(32).map(hex).collect();
    format!("# {value}\n{}\n", lines.join("\n"))
}

fn bytes(text: &str) -> Vec<u8> {
    let digits: String = text.lines().filter(|line| !line.starts_with('#')).collect();
    unhex(&digits).unwrap()
}

fn check(name: &str, value: &str, frame: &[u8]) {
    let path = directory().join(format!("{name}.hex"));
    let today = text(value, frame);
    if std::env::var_os("BONEPILE_BLESS").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, &today).unwrap();
    }
    let golden = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(golden, today, "{name}: the wire has changed");
}

#[test]
fn every_message_is_written_as_it_ever_was() {
    for Sample { name, frame, value, .. } in all() {
        check(&name, &value, &frame);
    }
    let header = ChunkHeader { transfer: 5, index: 2, payload_bytes: 902_848, offset: 2 << 20, hash: [0x44; 32] };
    check("peer/chunk-header", &format!("{header:?}"), &header.to_bytes());
}

#[test]
fn what_was_written_then_is_read_today() {
    for Sample { name, value, decode, .. } in all() {
        let golden = bytes(&fs::read_to_string(directory().join(format!("{name}.hex"))).unwrap());
        let (header, body) = golden.split_first_chunk::<HEADER_BYTES>().unwrap();
        let header = Header::parse(*header, 1 << 20).unwrap();
        assert_eq!(header.len, body.len(), "{name}");
        assert_eq!(decode(header, body).unwrap(), value, "{name}");
    }
    let golden = bytes(&fs::read_to_string(directory().join("peer/chunk-header.hex")).unwrap());
    let header = ChunkHeader::parse(golden.first_chunk().unwrap()).unwrap();
    assert_eq!((header.transfer, header.index, header.offset), (5, 2, 2 << 20));
}

#[test]
fn every_golden_file_has_its_message() {
    let mut known: Vec<String> = all().into_iter().map(|sample| sample.name).collect();
    known.push("peer/chunk-header".into());
    for conversation in fs::read_dir(directory()).unwrap() {
        let conversation = conversation.unwrap();
        for file in fs::read_dir(conversation.path()).unwrap() {
            let file = file.unwrap().file_name().into_string().unwrap();
            let name = format!("{}/{}", conversation.file_name().to_str().unwrap(), file.trim_end_matches(".hex"));
            assert!(known.contains(&name), "{name} is nobody's");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 5_000, ..ProptestConfig::default() })]

    /// A good frame with a few bytes changed, or its end cut off, decodes or is refused; nothing else happens. Five thousand
    /// cases on each message.
    #[test]
    fn mutated_frames_never_panic(changes in prop::collection::vec((any::<u16>(), any::<u8>()), 1..4), cut in any::<u16>()) {
        for Sample { mut frame, decode, .. } in all() {
            for (at, byte) in &changes {
                let at = usize::from(*at) % frame.len();
                frame[at] = *byte;
            }
            let kept = HEADER_BYTES + usize::from(cut) % (frame.len() - HEADER_BYTES + 1);
            let (header, body) = frame[..kept].split_first_chunk::<HEADER_BYTES>().unwrap();
            if let Ok(header) = Header::parse(*header, 1 << 20) {
                let _ = decode(header, body);
            }
        }
    }
}
