//! `model bench`: rates of prefill and decode, and the process's peak memory, as one JSON line.
//!
//! Prints no verdict: `make bench-model` sets these figures beside another program's in the same run.

use std::path::Path;
use std::time::Instant;

use serde_json::json;

use super::args::{BenchArgs, ToolError, print_json};
use crate::model::{argmax, tensors};

/// Measures and prints.
///
/// # Errors
/// If the model cannot be loaded or run.
pub fn bench(args: &BenchArgs) -> Result<(), ToolError> {
    let started = Instant::now();
    let model = args.model.load_with(true)?;
    let load_s = started.elapsed().as_secs_f64();
    let vocabulary = model.vocabulary();
    // Ids that any vocabulary has, without a pattern.
    let ids: Vec<u32> =
        (0..args.prompt).map(|i| (1000 + i * 7919) % vocabulary.min(40_000)).map(|id| id as u32).collect();
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    for _ in 0..args.runs.max(1) {
        let mut context = model.start()?;
        let started = Instant::now();
        let mut logits = model.prefill(&mut context, &ids)?;
        prefill.push(ids.len() as f64 / started.elapsed().as_secs_f64());
        let started = Instant::now();
        for _ in 0..args.decode {
            logits = model.prefill(&mut context, &[argmax(&logits)])?;
        }
        decode.push(args.decode as f64 / started.elapsed().as_secs_f64());
    }
    print_json(&json!({
        "model": args.model.model,
        "precision": format!("{:?}", args.model.precision),
        "kv": format!("{:?}", args.model.kv),
        "threads": rayon::current_num_threads(),
        "load_s": load_s,
        "prompt_tokens": args.prompt,
        "prefill_tokens_per_s": median(&mut prefill),
        "decode_tokens_per_s": median(&mut decode),
        "peak_bytes": crate::memory::peak_bytes(),
        "file_bytes": weight_bytes(model.path())?,
    }))
}

/// Size of a model's file; of a directory, what its tensors take.
fn weight_bytes(path: &Path) -> Result<u64, ToolError> {
    if path.is_dir() {
        return Ok(tensors(path)?.values().map(|tensor| tensor.bytes as u64).sum());
    }
    Ok(std::fs::metadata(path).map_or(0, |file| file.len()))
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
