//! `model show`: what a file holds and what running it takes.
//!
//! Memory is computed from sizes, not measured; `model bench` measures.

use std::collections::BTreeMap;
use std::io::Write;

use serde_json::json;

use super::args::{ShowArgs, ToolError, megabytes, print_json};
use crate::model::{LoadOptions, Model, tensors};

/// Prints the model's facts.
///
/// # Errors
/// If the file is not there or not a model that this build runs.
pub fn show(args: &ShowArgs) -> Result<(), ToolError> {
    let (path, expected_fingerprint) = args.model.locate()?;
    let tensors = tensors(&path)?;
    let precision = crate::model::Precision::Stored;
    let model = Model::load(&path, &LoadOptions { expected_fingerprint, precision, ..LoadOptions::default() })?;
    let config = model.config();
    let mut kinds: BTreeMap<String, (usize, u64, u64)> = BTreeMap::new();
    for tensor in tensors.values() {
        let entry = kinds.entry(format!("{:?}", tensor.dtype)).or_default();
        entry.0 += 1;
        entry.1 += tensor.shape.iter().product::<usize>() as u64;
        entry.2 += tensor.bytes as u64;
    }
    let parameters: u64 = kinds.values().map(|kind| kind.1).sum();
    let stored_bytes: u64 = kinds.values().map(|kind| kind.2).sum();
    let windows: Vec<_> = config.layers.iter().map(|layer| layer.window).collect();
    let facts = json!({
        "file": path.display().to_string(),
        "fingerprint": model.fingerprint(),
        "architecture": config.family.architecture,
        "layers": config.layers.len(),
        "sliding_layers": windows.iter().filter(|window| window.is_some()).count(),
        "sliding_window": windows.iter().flatten().next(),
        "hidden": config.hidden,
        "mlp": config.mlp,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocabulary": model.tokenizer().size(),
        "context_length": config.context_length,
        "parameters": parameters,
        "chat_template": model.tokenizer().template().is_some(),
        "cache_bytes_per_token_f32": config.kv_bytes_per_token(),
        "tensor_types": kinds.iter().map(|(kind, (count, values, bytes))| {
            json!({ "type": kind, "tensors": count, "values": values, "bytes": bytes })
        }).collect::<Vec<_>>(),
        "memory_bytes": {
            "weights_stored": stored_bytes,
            "weights_f32": 4 * parameters,
            "cache_1000_tokens_f32": 1000 * config.kv_bytes_per_token(),
            "prefill_512_scores_f32": 4 * config.heads * 512 * 512,
            "logits_one_position_f32": 4 * model.tokenizer().size(),
        },
    });
    if args.json {
        return print_json(&facts);
    }
    let mut out = std::io::stdout().lock();
    let line = |key: &str| facts[key].as_str().map_or_else(|| facts[key].to_string(), ToOwned::to_owned);
    for key in ["file", "fingerprint", "architecture", "parameters", "vocabulary", "context_length", "chat_template"] {
        writeln!(out, "{key:<16} {}", line(key))?;
    }
    writeln!(
        out,
        "{:<16} {} layers, hidden {}, MLP {}, {} heads, {} KV heads of {}",
        "shape",
        config.layers.len(),
        config.hidden,
        config.mlp,
        config.heads,
        config.kv_heads,
        config.head_dim
    )?;
    if let Some(window) = facts["sliding_window"].as_u64() {
        writeln!(out, "{:<16} {window} positions in {} layers", "sliding window", line("sliding_layers"))?;
    }
    let cache = config.kv_bytes_per_token();
    writeln!(out, "{:<16} {cache} bytes a token in f32, {} in f16", "cache", cache / 2)?;
    for (kind, (count, values, bytes)) in &kinds {
        writeln!(out, "{:<16} {count} of {kind}, {values} values, {}", "tensors", megabytes(*bytes))?;
    }
    for (phase, bytes) in facts["memory_bytes"].as_object().into_iter().flatten() {
        writeln!(out, "{:<16} {phase}: {}", "memory", megabytes(bytes.as_u64().unwrap_or(0)))?;
    }
    if args.tensors {
        for (name, tensor) in &tensors {
            writeln!(out, "{name}  {:?} {:?}  {}", tensor.dtype, tensor.shape, megabytes(tensor.bytes as u64))?;
        }
    }
    Ok(())
}
