//! `model show`: what a file holds and what running it takes.
//!
//! Memory is computed from sizes by the memory model ([`protocol::memory`]), not measured; `model bench` measures.

use std::collections::BTreeMap;
use std::io::Write;

use protocol::memory::{Backend, Element, Footprint, Inference, Phase, Quantisation, estimate};
use serde_json::json;

use super::args::{ShapeArgs, ShowArgs, ToolError, megabytes, print_json};
use crate::model::shape::shape;
use crate::model::{LoadOptions, Model, Precision, tensors};

/// Ways to hold a model that memory is shown for: name, weights, running caches.
const WAYS: [(&str, Quantisation, Element); 3] = [
    ("stored, kv f16", Quantisation::Stored, Element::Half),
    ("stored, kv f32", Quantisation::Stored, Element::F32),
    ("f32, kv f32", Quantisation::F32, Element::F32),
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
    let footprints = computed(&path, args.context, threads)?;
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

/// Prints a model's shape: the agent asks for it, and tells the coordinator.
///
/// # Errors
/// If the file is not there or not a model that this build runs.
pub fn shape_of(args: &ShapeArgs) -> Result<(), ToolError> {
    let shape = shape(&args.path)?;
    let value = serde_json::to_value(&shape).expect("plain data");
    if args.json {
        return print_json(&value);
    }
    let mut out = std::io::stdout().lock();
    for (name, value) in value.as_object().into_iter().flatten() {
        writeln!(out, "{name:<16} {value}")?;
    }
    Ok(())
}

/// One sequence of `tokens` tokens, for each of [`WAYS`].
fn computed(
    path: &std::path::Path,
    tokens: usize,
    threads: usize,
) -> Result<Vec<(&'static str, Footprint)>, ToolError> {
    let shape = shape(path)?;
    let number = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
    let way = |(name, held, cache): (&'static str, Quantisation, Element)| {
        let inference = Inference { cache, ..Inference::of(number(tokens)) };
        let backend = Backend::Cpu { threads: number(threads) };
        (name, estimate(&shape, held, Phase::Inference(inference), backend))
    };
    Ok(WAYS.map(way).to_vec())
}

/// One way to hold the model, as JSON.
fn way((name, footprint): &(&str, Footprint)) -> serde_json::Value {
    json!({ "way": name, "parts": footprint, "peak": footprint.peak() })
}

/// A table of parts, a column a way.
fn memory(
    out: &mut impl Write,
    tokens: usize,
    threads: usize,
    footprints: &[(&str, Footprint)],
) -> std::io::Result<()> {
    writeln!(out, "{:<16} one sequence of {tokens} tokens, {threads} threads", "memory")?;
    let names: String = footprints.iter().map(|(name, _)| format!("{name:>16}")).collect();
    writeln!(out, "  {:<22}{names}", "")?;
    let mut row = |name: &str, bytes: &dyn Fn(&Footprint) -> u64| {
        let cells: String =
            footprints.iter().map(|(_, footprint)| format!("{:>16}", megabytes(bytes(footprint)))).collect();
        writeln!(out, "  {name:<22}{cells}")
    };
    for (place, (name, _)) in Footprint::default().parts().into_iter().enumerate() {
        let bytes = |footprint: &Footprint| footprint.parts()[place].1;
        if footprints.iter().any(|(_, footprint)| bytes(footprint) > 0) {
            row(name, &bytes)?;
        }
    }
    row("the most at once", &Footprint::peak)
}
