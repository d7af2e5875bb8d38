//! `model bench`: rates of prefill and decode, and the process's peak memory, as one JSON line.
//!
//! Prints no verdict: `make bench-model` sets these figures beside another program's in the same run.

use std::path::Path;
use std::time::Instant;

use candle_core::Var;
use serde_json::json;

use super::args::{BenchArgs, Sample, ToolError, print_json};
use crate::model::{Adapters, Keep, Model, ModelError, TrackedCache, TrackedSegment, argmax, next_token_loss, tensors};

/// Tokens from the start of one sample's text to the next one's.
const SAMPLE_STRIDE: usize = 1000;

/// Measures and prints.
///
/// # Errors
/// If the model cannot be loaded or run.
pub fn bench(args: &BenchArgs) -> Result<(), ToolError> {
    let started = Instant::now();
    let model = args.model.load_with(true)?;
    let load_s = started.elapsed().as_secs_f64();
    let ids = ids(&model, 0, args.prompt);
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
    let keep = if args.checkpointing { Keep::Inputs } else { Keep::Activations };
    for _ in 0..if args.step.is_empty() { 0 } else { args.runs.max(1) } {
        let (seconds, value) = step(&model, &args.step, keep)?;
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

/// Ids that any vocabulary has, without a pattern: `count` from `start` on.
fn ids(model: &Model, start: usize, count: usize) -> Vec<u32> {
    (start..start + count).map(|i| ((1000 + i * 7919) % model.vocabulary().min(40_000)) as u32).collect()
}

/// Seconds and loss of one training step over all samples at once: the prefixes' keys and values are what is trained.
fn step(model: &Model, samples: &[Sample], keep: Keep) -> Result<(f64, f32), ToolError> {
    let (mut caches, mut variables, mut texts) = (Vec::new(), Vec::new(), Vec::new());
    for (index, sample) in samples.iter().enumerate() {
        let text = ids(model, index * SAMPLE_STRIDE, sample.prefix + sample.tokens + 1);
        let mut context = model.start()?;
        model.prefill(&mut context, &text[..sample.prefix])?;
        let mut cache = TrackedCache::new(&model.extract(&context)?)?;
        for tensor in cache.layers.iter_mut().flat_map(|(k, v)| [k, v]) {
            let variable = Var::from_tensor(tensor).map_err(ModelError::from)?;
            *tensor = variable.as_tensor().clone();
            variables.push(variable);
        }
        let positions: Vec<i64> = (context.next_position()..).take(sample.tokens).collect();
        caches.push((cache, positions));
        texts.push(text[sample.prefix..].to_vec());
    }
    let segments: Vec<_> = caches
        .iter()
        .zip(&texts)
        .map(|((prefix, positions), text)| {
            let tokens = &text[..positions.len()];
            TrackedSegment { prefix, tokens, positions, scored: 0..tokens.len() }
        })
        .collect();
    let targets: Vec<u32> = texts.iter().flat_map(|text| &text[1..]).copied().collect();
    let started = Instant::now();
    let logits = model.forward_tracked_batch(&segments, &Adapters::new(), keep)?;
    let loss = next_token_loss(&logits, &targets)?;
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
