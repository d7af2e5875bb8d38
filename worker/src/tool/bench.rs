//! `model bench`: rates of prefill and decode, and the process's peak memory, as one JSON line.
//!
//! Prints no verdict: `make bench-model` sets these figures beside another program's in the same run.

use std::path::Path;
use std::time::Instant;

use candle_core::Var;
use serde_json::json;

use super::args::{BenchArgs, ToolError, print_json};
use crate::model::{Adapters, Model, ModelError, TrackedCache, argmax, next_token_loss, tensors};

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
    let (mut steps, mut loss) = (Vec::new(), 0.0);
    for _ in 0..if args.step > 0 { args.runs.max(1) } else { 0 } {
        let (seconds, value) = step(&model, args)?;
        steps.push(seconds);
        loss = value;
    }
    print_json(&json!({
        "step_s": if steps.is_empty() { None } else { Some(median(&mut steps)) },
        "step_loss": loss,
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

/// Seconds and loss of one training step: the prefix's keys and values are what is trained.
fn step(model: &Model, args: &BenchArgs) -> Result<(f64, f32), ToolError> {
    let ids = |start: usize, count: usize| -> Vec<u32> {
        (start..start + count).map(|i| ((1000 + i * 7919) % model.vocabulary().min(40_000)) as u32).collect()
    };
    let mut context = model.start()?;
    model.prefill(&mut context, &ids(0, args.prefix.max(1)))?;
    let mut cache = TrackedCache::new(&model.extract(&context)?)?;
    let mut variables = Vec::new();
    for (k, v) in &mut cache.layers {
        for tensor in [k, v] {
            let variable = Var::from_tensor(tensor).map_err(ModelError::from)?;
            *tensor = variable.as_tensor().clone();
            variables.push(variable);
        }
    }
    let tokens = ids(args.prefix, args.step + 1);
    let positions: Vec<i64> = (context.next_position()..).take(args.step).collect();
    let started = Instant::now();
    let logits = model.forward_tracked(&cache, &Adapters::new(), &tokens[..args.step], &positions, 0..args.step)?;
    let loss = next_token_loss(&logits, &tokens[1..])?;
    let gradients = loss.backward().map_err(ModelError::from)?;
    let seconds = started.elapsed().as_secs_f64();
    if variables.iter().any(|variable| gradients.get(variable).is_none()) {
        return Err(ToolError::Request("a key or value has no gradient".to_owned()));
    }
    Ok((seconds, loss.to_scalar().map_err(ModelError::from)?))
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
