//! `model show`: what a file holds and what running it takes.
//!
//! Memory is computed from sizes by [`Footprint`], not measured; `model bench` measures.

use std::collections::BTreeMap;
use std::io::Write;

use serde_json::json;

use super::args::{ShowArgs, ToolError, megabytes, print_json};
use crate::model::footprint::Pass;
use crate::model::{CachePrecision, Footprint, LoadOptions, Model, Plan, Precision, StoredBytes, tensors};

/// Ways to hold a model that memory is shown for: name, weights, running caches.
const WAYS: [(&str, Precision, CachePrecision); 3] = [
    ("stored, kv f16", Precision::Stored, CachePrecision::F16),
    ("stored, kv f32", Precision::Stored, CachePrecision::F32),
    ("f32, kv f32", Precision::F32, CachePrecision::F32),
];

/// Prints the model's facts.
///
/// # Errors
/// If the file is not there or not a model that this build runs, or has no positions for `--context`.
pub fn show(args: &ShowArgs) -> Result<(), ToolError> {
    let (path, expected_fingerprint) = args.model.locate()?;
    let tensors = tensors(&path)?;
    let precision = Precision::Stored;
    let model = Model::load(&path, &LoadOptions { expected_fingerprint, precision, ..LoadOptions::default() })?;
    let config = model.config();
    if args.context == 0 || args.context > config.context_length {
        let (asked, most) = (args.context, config.context_length);
        return Err(ToolError::Request(format!("a context of {asked} tokens: this model has 1 to {most}")));
    }
    let threads = args.model.threads.unwrap_or_else(rayon::current_num_threads).max(1);
    let stored = StoredBytes::of(&model)?;
    let footprints = WAYS.map(|(name, precision, cache)| {
        let plan = Plan { precision, cache, tokens: args.context, sequences: 1, threads };
        (name, Footprint::new(config, model.vocabulary(), stored, &plan))
    });
    let mut kinds: BTreeMap<String, (usize, u64, u64)> = BTreeMap::new();
    for tensor in tensors.values() {
        let entry = kinds.entry(format!("{:?}", tensor.dtype)).or_default();
        entry.0 += 1;
        entry.1 += tensor.shape.iter().product::<usize>() as u64;
        entry.2 += tensor.bytes as u64;
    }
    let parameters: u64 = kinds.values().map(|kind| kind.1).sum();
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
        "memory": {
            "context_tokens": args.context,
            "threads": threads,
            "ways": footprints.iter().map(way).collect::<Vec<_>>(),
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
    memory(&mut out, args.context, threads, &footprints)?;
    if args.tensors {
        for (name, tensor) in &tensors {
            writeln!(out, "{name}  {:?} {:?}  {}", tensor.dtype, tensor.shape, megabytes(tensor.bytes as u64))?;
        }
    }
    Ok(())
}

/// One way to hold the model, as JSON.
fn way((name, footprint): &(&str, Footprint)) -> serde_json::Value {
    let pass = |pass: &Pass| {
        json!({
            "tokens": pass.tokens,
            "activations": pass.activations,
            "scores": pass.scores,
            "logits": pass.logits,
            "peak": pass.peak(),
        })
    };
    json!({
        "way": name,
        "weights": footprint.weights,
        "tokenizer": footprint.tokenizer,
        "threads": footprint.threads,
        "context": footprint.context,
        "prefill": pass(&footprint.prefill),
        "decode": pass(&footprint.decode),
        "peak": footprint.peak(),
    })
}

/// A table of phases, a column a way.
fn memory(
    out: &mut impl Write,
    tokens: usize,
    threads: usize,
    footprints: &[(&str, Footprint)],
) -> std::io::Result<()> {
    type Phase = (&'static str, fn(&Footprint) -> u64);
    const PHASES: [Phase; 11] = [
        ("weights", |footprint| footprint.weights),
        ("tokenizer", |footprint| footprint.tokenizer),
        ("threads", |footprint| footprint.threads),
        ("keys and values", |footprint| footprint.context),
        ("prefill: activations", |footprint| footprint.prefill.activations),
        ("prefill: scores", |footprint| footprint.prefill.scores),
        ("prefill: logits", |footprint| footprint.prefill.logits),
        ("decode: activations", |footprint| footprint.decode.activations),
        ("decode: scores", |footprint| footprint.decode.scores),
        ("decode: logits", |footprint| footprint.decode.logits),
        ("the most at once", Footprint::peak),
    ];
    let pass = footprints.first().map_or(0, |(_, footprint)| footprint.prefill.tokens);
    writeln!(out, "{:<16} one sequence of {tokens} tokens, passes of {pass}, {threads} threads", "memory")?;
    let names: String = footprints.iter().map(|(name, _)| format!("{name:>16}")).collect();
    writeln!(out, "  {:<22}{names}", "")?;
    for (phase, bytes) in PHASES {
        let cells: String =
            footprints.iter().map(|(_, footprint)| format!("{:>16}", megabytes(bytes(footprint)))).collect();
        writeln!(out, "  {phase:<22}{cells}")?;
    }
    Ok(())
}
