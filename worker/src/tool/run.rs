//! `model run`: one prompt through one model.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use candle_core::{Device, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling};
use serde_json::json;

use super::args::{RunArgs, ToolError, print_json};
use crate::cache::KvCache;
use crate::model::{Context, Logits, Message, Model, ModelError, Tap, argmax};

/// Logits shown.
const TOP: usize = 5;

/// Runs the prompt and prints what came of it.
///
/// # Errors
/// If the model, the prompt or the cache does not do.
pub fn run(args: &RunArgs) -> Result<(), ToolError> {
    let started = Instant::now();
    let model = args.model.load()?;
    let load_s = started.elapsed().as_secs_f64();
    let mut context = match &args.cache {
        None => model.start()?,
        Some(path) => {
            let wrong = |source| ToolError::Cache { path: path.clone(), source };
            model.inject(&KvCache::load(path, model.layout()).map_err(wrong)?)?
        }
    };
    let ids = prompt(args, &model, context.is_empty())?;
    let injected = context.len();

    let started = Instant::now();
    let (logits, taps) = prefill(&model, &mut context, &ids, args.save.is_some())?;
    let prefill_s = started.elapsed().as_secs_f64();
    if let Some(path) = &args.save {
        save(&model, &context, &taps, &logits, path)?;
    }
    let top = top_logits(&model, &logits)?;
    let started = Instant::now();
    let generated = generate(args, &model, &mut context, logits)?;
    let decode_s = started.elapsed().as_secs_f64();
    let text = model.tokenizer().decode(&generated)?;

    let rate = |count: usize, seconds: f64| if count == 0 { 0.0 } else { count as f64 / seconds };
    let (prefill_rate, decode_rate) = (rate(ids.len(), prefill_s), rate(generated.len(), decode_s));
    if args.json {
        return print_json(&json!({
            "prompt_ids": ids,
            "injected_tokens": injected,
            "generated_ids": generated,
            "text": text,
            "top": top.iter().map(|(id, piece, logit)| json!({ "id": id, "piece": piece, "logit": logit })).collect::<Vec<_>>(),
            "load_s": load_s,
            "prefill_tokens_per_s": prefill_rate,
            "decode_tokens_per_s": decode_rate,
        }));
    }
    writeln!(std::io::stdout().lock(), "{text}")?;
    let mut log = std::io::stderr().lock();
    writeln!(log, "loaded in {load_s:.2} s; {injected} tokens injected")?;
    writeln!(log, "prefill of {} tokens: {prefill_rate:.1} tokens/s", ids.len())?;
    writeln!(log, "decode of {} tokens: {decode_rate:.1} tokens/s", generated.len())?;
    for (id, piece, logit) in top {
        writeln!(log, "{logit:>10.4}  {id:>7}  {piece:?}")?;
    }
    Ok(())
}

/// The prompt's ids; a BOS goes only before the first text of a sequence.
fn prompt(args: &RunArgs, model: &Model, first: bool) -> Result<Vec<u32>, ToolError> {
    let tokenizer = model.tokenizer();
    let ids = match (&args.ids, &args.text) {
        (Some(ids), _) => ids.clone(),
        (None, Some(text)) if args.chat => {
            tokenizer.encode_chat(&[Message { role: "user".to_owned(), content: text.clone() }], true)?
        }
        (None, Some(text)) if first => tokenizer.encode_start(text)?,
        (None, Some(text)) => tokenizer.encode(text)?,
        (None, None) => unreachable!("clap requires one of the two"),
    };
    if ids.is_empty() {
        return Err(ToolError::Request("the prompt is empty: there is nothing to continue".to_owned()));
    }
    Ok(ids)
}

type Taps = BTreeMap<String, Vec<Tensor>>;

/// Logits of the last position and, if wanted, keys before RoPE and hidden states of the prompt's tokens.
fn prefill(model: &Model, context: &mut Context, ids: &[u32], tap: bool) -> Result<(Vec<f32>, Taps), ToolError> {
    let mut taps = Taps::new();
    let mut observe = |which: Tap, layer: usize, tensor: &Tensor| {
        let name = match which {
            Tap::KeyPlain => format!("layer.{layer}.k_plain"),
            Tap::Residual => format!("layer.{layer}.hidden"),
            Tap::Key | Tap::Value | Tap::Attention => return Ok(()),
        };
        taps.entry(name).or_default().push(tensor.copy()?);
        Ok(())
    };
    let first = context.next_position();
    let positions: Vec<i64> = (first..).take(ids.len()).collect();
    let observer: Option<&mut crate::model::Observer<'_>> = if tap { Some(&mut observe) } else { None };
    let mut rows = model.forward(context, ids, &positions, Logits::Last, observer)?;
    Ok((rows.pop().expect("one row was asked for"), taps))
}

/// Writes `layer.{i}.k`, `.v` (all tokens), `.k_plain`, `.hidden` (the prompt's tokens) and `logits`.
fn save(model: &Model, context: &Context, taps: &Taps, logits: &[f32], path: &Path) -> Result<(), ToolError> {
    let wrong = |error: candle_core::Error| ToolError::Save { path: path.to_path_buf(), source: error.into() };
    let cache = model.extract(context)?;
    let mut tensors = std::collections::HashMap::new();
    for (name, pieces) in taps {
        // Long prompts run in passes; tokens are axis 1 of keys, axis 0 of hidden states.
        let axis = usize::from(name.ends_with("k_plain"));
        tensors.insert(name.clone(), Tensor::cat(pieces, axis).map_err(wrong)?);
    }
    let shape = (model.config().kv_heads, cache.len(), model.config().head_dim);
    for (index, layer) in cache.layers() {
        for (part, values) in [("k", &layer.k), ("v", &layer.v)] {
            let tensor = Tensor::from_slice(values, shape, &Device::Cpu).map_err(wrong)?;
            tensors.insert(format!("layer.{index}.{part}"), tensor);
        }
    }
    tensors.insert("logits".to_owned(), Tensor::new(logits, &Device::Cpu).map_err(wrong)?);
    let header = serde_json::to_string(&cache.header()).expect("a header is plain data");
    let metadata = std::collections::HashMap::from([(protocol::packet::METADATA_KEY.to_owned(), header)]);
    let failed =
        |error: safetensors::SafeTensorError| ToolError::Save { path: path.to_path_buf(), source: error.into() };
    safetensors::serialize_to_file(&tensors, Some(metadata), path).map_err(failed)
}

fn top_logits(model: &Model, logits: &[f32]) -> Result<Vec<(u32, String, f32)>, ModelError> {
    let mut order: Vec<u32> = (0..).take(logits.len()).collect();
    order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
    order.iter().take(TOP).map(|id| Ok((*id, model.tokenizer().decode(&[*id])?, logits[*id as usize]))).collect()
}

fn generate(args: &RunArgs, model: &Model, context: &mut Context, mut logits: Vec<f32>) -> Result<Vec<u32>, ToolError> {
    if args.temperature <= 0.0 {
        return Ok(model.generate(context, logits, args.tokens)?);
    }
    let sampling = match args.top_p {
        Some(p) => Sampling::TopP { p, temperature: args.temperature },
        None => Sampling::All { temperature: args.temperature },
    };
    let mut sampler = LogitsProcessor::from_sampling(args.seed, sampling);
    let mut generated = Vec::new();
    while generated.len() < args.tokens {
        let row = Tensor::new(logits.as_slice(), &Device::Cpu).map_err(ModelError::from)?;
        let next = sampler.sample(&row).unwrap_or_else(|_| argmax(&logits));
        if model.tokenizer().is_end(next) {
            break;
        }
        generated.push(next);
        logits = model.prefill(context, &[next])?;
    }
    Ok(generated)
}
