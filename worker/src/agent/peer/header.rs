//! Checks a packet's claims against each other before a byte of it is taken: lengths, shapes, types, offsets, names.
//!
//! Does not look at numbers: whether a cache fits a model is the executor's to say.

use std::collections::BTreeMap;

use protocol::limits::{KV_CHUNK_BYTES_MAX, KV_TRANSFER_BYTES_MAX, PACKET_HEADER_BYTES_MAX};
use protocol::packet::{FORMAT, METADATA_KEY, PacketHeader};
use protocol::peer::{Offer, refuse};
use serde::Deserialize;

/// Longest name of a packet.
const KEY_CHARS_MAX: usize = 64;
const METADATA: &str = "__metadata__";

/// A packet's claims do not agree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct BadOffer {
    /// One of [`refuse`].
    pub code: u16,
    /// What does not agree.
    pub text: String,
}

fn bad(text: impl Into<String>) -> BadOffer {
    BadOffer { code: refuse::BAD_HEADER, text: text.into() }
}

fn too_large(text: String) -> BadOffer {
    BadOffer { code: refuse::TOO_LARGE, text }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Tensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// Checks everything that an offer says about itself.
///
/// # Errors
/// [`BadOffer`], to be sent as a refusal.
pub fn check(offer: &Offer) -> Result<(), BadOffer> {
    check_key(&offer.key)?;
    if offer.header.len() > PACKET_HEADER_BYTES_MAX {
        return Err(too_large(format!("a header of {} bytes", offer.header.len())));
    }
    if offer.payload_bytes > KV_TRANSFER_BYTES_MAX {
        return Err(too_large(format!("{} bytes are over the limit of {KV_TRANSFER_BYTES_MAX}", offer.payload_bytes)));
    }
    let chunk = offer.chunk_bytes as usize;
    // Small chunks would make a table of hashes larger than what it describes.
    if !(4096..=KV_CHUNK_BYTES_MAX).contains(&chunk) {
        return Err(bad(format!("chunks of {chunk} bytes; 4096 to {KV_CHUNK_BYTES_MAX} are taken")));
    }
    check_safetensors(&offer.header, offer.payload_bytes)
}

/// Names of packets become names of files.
fn check_key(key: &str) -> Result<(), BadOffer> {
    let fine = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_' | '.');
    match (1..=KEY_CHARS_MAX).contains(&key.len()) && key.chars().all(fine) && !key.starts_with('.') {
        true => Ok(()),
        false => Err(bad("a packet's name is 1 to 64 of a-z, 0-9, `-`, `_`, `.`, not beginning with `.`")),
    }
}

/// Checks a safetensors header: that its tensors fill `payload_bytes` exactly, and that it says what cache they are.
///
/// # Errors
/// [`BadOffer`].
pub fn check_safetensors(header: &[u8], payload_bytes: u64) -> Result<(), BadOffer> {
    let (length, json) = header.split_first_chunk::<8>().ok_or_else(|| bad("the header has no length"))?;
    if u64::from_le_bytes(*length) != json.len() as u64 {
        return Err(bad(format!("the header claims {} bytes and has {}", u64::from_le_bytes(*length), json.len())));
    }
    let mut directory: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(json).map_err(|error| bad(format!("the header is not JSON: {error}")))?;
    let metadata = directory.remove(METADATA).ok_or_else(|| bad("the header has no metadata"))?;
    let packet = packet_header(&metadata)?;

    let mut tensors = BTreeMap::new();
    for (name, value) in directory {
        let tensor: Tensor =
            serde_json::from_value(value).map_err(|error| bad(format!("tensor `{}`: {error}", short(&name))))?;
        check_bytes(&name, &tensor)?;
        tensors.insert(name, tensor);
    }
    check_extent(&tensors, payload_bytes)?;
    check_layers(&packet, &tensors)
}

fn packet_header(metadata: &serde_json::Value) -> Result<PacketHeader, BadOffer> {
    let text = metadata
        .get(METADATA_KEY)
        .and_then(serde_json::Value::as_str)
        .ok_or_else(|| bad(format!("metadata {METADATA_KEY} is missing")))?;
    let packet: PacketHeader =
        serde_json::from_str(text).map_err(|error| bad(format!("metadata {METADATA_KEY}: {error}")))?;
    if packet.format != FORMAT {
        return Err(bad(format!("packet format {}, this build reads {FORMAT}", packet.format)));
    }
    let layers = packet.layers.len();
    if packet.rope.len() != layers || packet.sliding_window.len() != layers {
        return Err(bad("RoPE and windows must be stated once a layer"));
    }
    Ok(packet)
}

/// Shape times width is what the offsets span.
fn check_bytes(name: &str, tensor: &Tensor) -> Result<(), BadOffer> {
    let width = match tensor.dtype.as_str() {
        "F64" | "I64" | "U64" => 8u64,
        "F32" | "I32" | "U32" => 4,
        "F16" | "BF16" | "I16" | "U16" => 2,
        "I8" | "U8" | "BOOL" => 1,
        other => return Err(bad(format!("tensor `{}` has unknown type `{}`", short(name), short(other)))),
    };
    let bytes = tensor
        .shape
        .iter()
        .try_fold(width, |bytes, size| bytes.checked_mul(*size))
        .ok_or_else(|| bad(format!("the shape of tensor `{}` overflows", short(name))))?;
    let [begin, end] = tensor.data_offsets;
    match end.checked_sub(begin) == Some(bytes) {
        true => Ok(()),
        false => Err(bad(format!("tensor `{}` has {bytes} bytes by shape, {begin}..{end} by offsets", short(name)))),
    }
}

/// Tensors lie one behind the other and fill the payload.
fn check_extent(tensors: &BTreeMap<String, Tensor>, payload_bytes: u64) -> Result<(), BadOffer> {
    let mut spans: Vec<[u64; 2]> = tensors.values().map(|tensor| tensor.data_offsets).collect();
    spans.sort_unstable();
    let mut at = 0;
    for [begin, end] in spans {
        if begin != at {
            return Err(bad(format!("tensors leave a gap or overlap at byte {begin}")));
        }
        at = end;
    }
    match at == payload_bytes {
        true => Ok(()),
        false => Err(bad(format!("tensors end at byte {at} of {payload_bytes}"))),
    }
}

/// One K and one V a layer, each `[heads, tokens, width]`.
fn check_layers(packet: &PacketHeader, tensors: &BTreeMap<String, Tensor>) -> Result<(), BadOffer> {
    if tensors.len() != 2 * packet.layers.len() {
        return Err(bad(format!("{} tensors for {} layers", tensors.len(), packet.layers.len())));
    }
    let shape = [u64::from(packet.kv_heads), packet.positions.len() as u64, u64::from(packet.head_dim)];
    for layer in &packet.layers {
        for part in ["k", "v"] {
            let name = format!("layer.{layer}.{part}");
            let tensor = tensors.get(&name).ok_or_else(|| bad(format!("tensor `{name}` is missing")))?;
            if tensor.shape != shape || tensor.dtype != packet.dtype {
                let (dtype, got) = (&packet.dtype, &tensor.shape);
                return Err(bad(format!("tensor `{name}` is {} {got:?}, expected {dtype} {shape:?}", tensor.dtype)));
            }
        }
    }
    Ok(())
}

fn short(text: &str) -> String {
    text.chars().take(40).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;
    use protocol::ids::{AttemptId, Fence, Role, RunId, ShardId};
    use protocol::packet::RopeFacts;
    use serde_json::{Value, json};

    use super::*;

    fn packet(layers: u32, tokens: u32) -> PacketHeader {
        let rope = RopeFacts { base: 10_000.0, dims: 4, linear_factor: 1.0, divisors: Vec::new() };
        PacketHeader {
            format: FORMAT,
            model_fingerprint: "sha256:00".into(),
            architecture: "llama".into(),
            model_layers: layers,
            layers: (0..layers).collect(),
            kv_heads: 2,
            head_dim: 4,
            dtype: "F32".into(),
            rotated: true,
            rope: vec![rope; layers as usize],
            sliding_window: vec![None; layers as usize],
            positions: (0..i64::from(tokens)).collect(),
            token_ids: Vec::new(),
            generated: 0,
            spans: Vec::new(),
            note: String::new(),
        }
    }

    fn directory(packet: &PacketHeader) -> BTreeMap<String, Value> {
        let text = serde_json::to_string(packet).unwrap();
        let mut directory = BTreeMap::from([(METADATA.to_owned(), json!({ METADATA_KEY: text }))]);
        let bytes = 4 * 2 * packet.positions.len() as u64 * 4;
        let mut at = 0;
        for layer in &packet.layers {
            for part in ["k", "v"] {
                let shape = [2, packet.positions.len(), 4];
                let entry = json!({ "dtype": "F32", "shape": shape, "data_offsets": [at, at + bytes] });
                directory.insert(format!("layer.{layer}.{part}"), entry);
                at += bytes;
            }
        }
        directory
    }

    fn encode(directory: &BTreeMap<String, Value>) -> Vec<u8> {
        let json = serde_json::to_vec(directory).unwrap();
        [&(json.len() as u64).to_le_bytes()[..], &json].concat()
    }

    /// A packet file of `layers` layers and `tokens` tokens with a payload that differs everywhere.
    pub(crate) fn packet_file(layers: u32, tokens: u32) -> (Vec<u8>, Vec<u8>) {
        let payload = u64::from(layers) * 2 * 4 * 2 * u64::from(tokens) * 4;
        let payload = (0..payload).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
        (encode(&directory(&packet(layers, tokens))), payload)
    }

    pub(crate) fn offer(header: Vec<u8>, payload_bytes: u64, chunk_bytes: u32, root: [u8; 32]) -> Offer {
        let attempt = AttemptId { shard: ShardId { run: RunId(1), index: 0 }, fence: Fence(1) };
        let key = "fact-0".to_owned();
        Offer { transfer: 1, attempt, to: Role::Target, key, header, payload_bytes, chunk_bytes, root }
    }

    #[test]
    fn a_consistent_packet_is_taken() {
        let (header, payload) = packet_file(3, 5);
        check(&offer(header, payload.len() as u64, 1 << 20, [0; 32])).unwrap();
    }

    fn refusal(change: impl FnOnce(&mut BTreeMap<String, Value>)) -> String {
        let mut directory = directory(&packet(2, 5));
        change(&mut directory);
        check_safetensors(&encode(&directory), 2 * 2 * 160).unwrap_err().text
    }

    #[test]
    fn contradictions_are_refused_in_words() {
        type Change = fn(&mut BTreeMap<String, Value>);
        let cases: [(Change, &str); 8] = [
            (|d| d.get_mut("layer.0.k").unwrap()["shape"] = json!([2, 6, 4]), "192 bytes by shape, 0..160 by offsets"),
            (|d| d.get_mut("layer.0.k").unwrap()["shape"] = json!([u64::MAX, 5, 4]), "overflows"),
            (|d| d.get_mut("layer.0.k").unwrap()["dtype"] = json!("F33"), "unknown type `F33`"),
            (|d| d.get_mut("layer.0.k").unwrap()["data_offsets"] = json!([160, 0]), "160..0 by offsets"),
            (|d| d.get_mut("layer.0.v").unwrap()["data_offsets"] = json!([0, 160]), "gap or overlap at byte 0"),
            (|d| drop(d.remove("layer.1.v")), "tensors end at byte 480 of 640"),
            (|d| drop(d.remove(METADATA)), "no metadata"),
            (
                |d| {
                    let tensor = d.remove("layer.1.v").unwrap();
                    d.insert("layer.9.v".into(), tensor);
                },
                "tensor `layer.1.v` is missing",
            ),
        ];
        for (change, expected) in cases {
            let text = refusal(change);
            assert!(text.contains(expected), "{text}");
        }
    }

    #[test]
    fn limits_and_names_are_checked_first() {
        let (header, payload) = packet_file(1, 1);
        let good = offer(header, payload.len() as u64, 1 << 20, [0; 32]);
        for key in ["", "../x", "a/b", ".hidden", "A", &"a".repeat(65)] {
            assert_eq!(
                check(&Offer { key: key.into(), ..good.clone() }).unwrap_err().code,
                refuse::BAD_HEADER,
                "{key}"
            );
        }
        let huge = Offer { payload_bytes: KV_TRANSFER_BYTES_MAX + 1, ..good.clone() };
        assert_eq!(check(&huge).unwrap_err().code, refuse::TOO_LARGE);
        for chunk_bytes in [0, 1, 4095, (4 << 20) + 1] {
            assert!(check(&Offer { chunk_bytes, ..good.clone() }).is_err(), "{chunk_bytes}");
        }
        let mut longer = good.clone();
        longer.header[0] += 1;
        assert!(check(&longer).unwrap_err().text.contains("claims"));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn checking_a_mutated_header_never_panics(at in 0usize..2000, byte in any::<u8>(), payload in any::<u64>()) {
            let (mut header, _) = packet_file(2, 5);
            let at = at % header.len();
            header[at] = byte;
            let _ = check_safetensors(&header, payload);
            let _ = check_safetensors(&header[..at], payload);
        }
    }
}
