//! Packet files for tests: safetensors with a header that agrees with itself, and numbers that differ everywhere.

use std::path::Path;

use protocol::packet::{FORMAT, METADATA_KEY, PacketHeader, RopeFacts};
use serde_json::{Map, json};

/// Writes a packet of one layer with about `bytes` of payload; returns the file's content.
pub(crate) fn write_packet(path: &Path, bytes: usize) -> Vec<u8> {
    let (heads, width) = (2usize, 64usize);
    let tokens = bytes / (2 * heads * width * 4);
    let part = heads * tokens * width * 4;
    let header = PacketHeader {
        format: FORMAT,
        model_fingerprint: "sha256:00".into(),
        architecture: "llama".into(),
        model_layers: 1,
        layers: vec![0],
        kv_heads: 2,
        head_dim: 64,
        dtype: "F32".into(),
        rotated: true,
        rope: vec![RopeFacts { base: 10_000.0, dims: 64, linear_factor: 1.0, divisors: Vec::new() }],
        sliding_window: vec![None],
        positions: (0..tokens as i64).collect(),
        token_ids: Vec::new(),
        generated: 0,
        spans: Vec::new(),
        note: String::new(),
    };
    let mut directory = Map::new();
    directory.insert("__metadata__".into(), json!({ METADATA_KEY: serde_json::to_string(&header).unwrap() }));
    for (index, name) in ["layer.0.k", "layer.0.v"].into_iter().enumerate() {
        let span = [index * part, (index + 1) * part];
        directory.insert(name.into(), json!({ "dtype": "F32", "shape": [heads, tokens, width], "data_offsets": span }));
    }
    let directory = serde_json::to_vec(&directory).unwrap();
    let mut content = (directory.len() as u64).to_le_bytes().to_vec();
    content.extend_from_slice(&directory);
    content.extend((0..2 * part as u64).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8));
    std::fs::write(path, &content).unwrap();
    content
}
