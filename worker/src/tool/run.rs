//! `model run`: prompts through one model, one or a batch.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use candle_core::{Device, Tensor};
use serde_json::json;

use super::args::{RunArgs, ToolError, print_json};
use crate::cache::KvCache;
use crate::model::{
    BatchItem, Context, End, Generated, Logits, Message, Model, ModelError, Sampler, Sampling, Sequence, Tap,
};

/// Logits shown.
const TOP: usize = 5;
/// Prompts of one run at most: each holds its own cache, and logits of the whole vocabulary.
const PROMPTS_MAX: usize = 256;

/// What a run measured.
struct Timing {
    load_s: f64,
    injected: usize,
    prefill_tokens: usize,
    prefill_s: f64,
    decode_tokens: usize,
    decode_s: f64,
}

/// The largest logits at the end of a prompt: id, its text, logit.
type Top = Vec<(u32, String, f32)>;

/// Runs the prompts and prints what came of them.
///
/// # Errors
/// If the request, the model, a prompt or the cache does not do.
pub fn run(args: &RunArgs) -> Result<(), ToolError> {
    // Whatever can be wrong with the request is said before a model is loaded.
    let texts = texts(args)?;
    let count = if args.ids.is_some() { 1 } else { texts.len() };
    let mut samplers = samplers(args, count)?;
    if args.save.is_some() && count != 1 {
        return Err(ToolError::Request(format!("--save takes one prompt, not {count}")));
    }
    let started = Instant::now();
    let model = args.model.load()?;
    let load_s = started.elapsed().as_secs_f64();
    let mut contexts = contexts(args, &model, count)?;
    let injected = contexts[0].len();
    let prompts = match &args.ids {
        Some(ids) => vec![check_prompt(ids.clone())?],
        None => texts.iter().map(|text| prompt(args, &model, text, injected == 0)).collect::<Result<_, _>>()?,
    };

    let started = Instant::now();
    let (logits, taps) = match &mut contexts[..] {
        [context] => {
            let (logits, taps) = prefill(&model, context, &prompts[0], args.save.is_some())?;
            (vec![logits], taps)
        }
        contexts => {
            let pairs = contexts.iter_mut().zip(&prompts);
            let mut items: Vec<_> = pairs.map(|(context, tokens)| BatchItem { context, tokens }).collect();
            (model.forward_batch(&mut items)?, Taps::new())
        }
    };
    let prefill_s = started.elapsed().as_secs_f64();
    if let Some(path) = &args.save {
        save(&model, &contexts[0], &taps, &logits[0], path)?;
    }
    let tops = logits.iter().map(|logits| top_logits(&model, logits)).collect::<Result<Vec<_>, _>>()?;
    let started = Instant::now();
    let sequences = contexts.iter_mut().zip(logits).zip(&mut samplers);
    let mut sequences: Vec<_> = sequences
        .map(|((context, logits), sampler)| Sequence { context, logits, sampler, count: args.tokens })
        .collect();
    let written = model.generate_batch(&mut sequences)?;
    let timing = Timing {
        load_s,
        injected,
        prefill_tokens: prompts.iter().map(Vec::len).sum(),
        prefill_s,
        decode_tokens: written.iter().map(|written| written.tokens.len()).sum(),
        decode_s: started.elapsed().as_secs_f64(),
    };
    if args.json {
        return print_json(&document(&model, &prompts, &written, &tops, &timing)?);
    }
    print(&model, &written, &tops, &timing)
}

/// The prompts as typed, or as the file has them.
fn texts(args: &RunArgs) -> Result<Vec<String>, ToolError> {
    let texts = match &args.batch {
        None => args.text.clone(),
        Some(path) => {
            let text =
                std::fs::read_to_string(path).map_err(|source| ToolError::Prompts { path: path.clone(), source })?;
            let lines: Vec<_> = text.lines().filter(|line| !line.is_empty()).map(ToOwned::to_owned).collect();
            if lines.is_empty() {
                return Err(ToolError::Request(format!("{} has no prompts", path.display())));
            }
            lines
        }
    };
    match texts.len() {
        count if count > PROMPTS_MAX => {
            Err(ToolError::Request(format!("{count} prompts: a run takes {PROMPTS_MAX} at most")))
        }
        _ => Ok(texts),
    }
}

/// A sampler for each prompt, each with its own seed.
fn samplers(args: &RunArgs, count: usize) -> Result<Vec<Sampler>, ToolError> {
    let settings = |seed| Sampling { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed };
    let seeds = (0..count as u64).map(|index| args.seed.wrapping_add(index));
    Ok(seeds.map(|seed| Sampler::new(settings(seed))).collect::<Result<_, _>>()?)
}

/// A context for each prompt, with what `--cache` holds.
fn contexts(args: &RunArgs, model: &Model, count: usize) -> Result<Vec<Context>, ToolError> {
    let Some(path) = &args.cache else {
        return Ok((0..count).map(|_| model.start()).collect::<Result<_, _>>()?);
    };
    let cache = KvCache::load(path, model.layout());
    let cache = cache.map_err(|source| ToolError::Cache { path: path.clone(), source })?;
    Ok((0..count).map(|_| model.inject(&cache)).collect::<Result<_, _>>()?)
}

/// A prompt's ids; a BOS goes only before the first text of a sequence.
fn prompt(args: &RunArgs, model: &Model, text: &str, first: bool) -> Result<Vec<u32>, ToolError> {
    let tokenizer = model.tokenizer();
    check_prompt(if args.chat {
        tokenizer.encode_chat(&[Message { role: "user".to_owned(), content: text.to_owned() }], true)?
    } else if first {
        tokenizer.encode_start(text)?
    } else {
        tokenizer.encode(text)?
    })
}

fn check_prompt(ids: Vec<u32>) -> Result<Vec<u32>, ToolError> {
    if ids.is_empty() {
        return Err(ToolError::Request("a prompt is empty: there is nothing to continue".to_owned()));
    }
    Ok(ids)
}

impl Timing {
    fn rate(count: usize, seconds: f64) -> f64 {
        if count == 0 { 0.0 } else { count as f64 / seconds }
    }

    /// Tokens per second of the prefill and of the decode, all prompts together.
    fn rates(&self) -> (f64, f64) {
        (Self::rate(self.prefill_tokens, self.prefill_s), Self::rate(self.decode_tokens, self.decode_s))
    }
}

fn end_name(end: End) -> &'static str {
    match end {
        End::Token => "token",
        End::Count => "count",
        End::Context => "context",
    }
}

fn document(
    model: &Model,
    prompts: &[Vec<u32>],
    written: &[Generated],
    tops: &[Top],
    timing: &Timing,
) -> Result<serde_json::Value, ToolError> {
    let mut entries = Vec::with_capacity(prompts.len());
    for ((ids, written), top) in prompts.iter().zip(written).zip(tops) {
        let top = top.iter().map(|(id, piece, logit)| json!({ "id": id, "piece": piece, "logit": logit }));
        entries.push(json!({
            "prompt_ids": ids,
            "generated_ids": written.tokens,
            "text": model.tokenizer().decode(&written.tokens)?,
            "end": end_name(written.end),
            "top": top.collect::<Vec<_>>(),
        }));
    }
    let (prefill, decode) = timing.rates();
    Ok(json!({
        "prompts": entries,
        "injected_tokens": timing.injected,
        "load_s": timing.load_s,
        "prefill_tokens_per_s": prefill,
        "decode_tokens_per_s": decode,
    }))
}

/// Texts on stdout, under a line with the prompt's number if there are several; the rest on stderr.
fn print(model: &Model, written: &[Generated], tops: &[Top], timing: &Timing) -> Result<(), ToolError> {
    let mut out = std::io::stdout().lock();
    for (number, written) in (1..).zip(written) {
        if tops.len() > 1 {
            writeln!(out, "==> {number} <==")?;
        }
        writeln!(out, "{}", model.tokenizer().decode(&written.tokens)?)?;
    }
    let (prefill, decode) = timing.rates();
    let mut log = std::io::stderr().lock();
    writeln!(log, "loaded in {:.2} s; {} tokens injected", timing.load_s, timing.injected)?;
    writeln!(log, "prefill of {} tokens: {prefill:.1} tokens/s", timing.prefill_tokens)?;
    writeln!(log, "decode of {} tokens: {decode:.1} tokens/s", timing.decode_tokens)?;
    for (number, top) in (1..).zip(tops) {
        if tops.len() > 1 {
            writeln!(log, "==> {number} <==")?;
        }
        for (id, piece, logit) in top {
            writeln!(log, "{logit:>10.4}  {id:>7}  {piece:?}")?;
        }
    }
    Ok(())
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

fn top_logits(model: &Model, logits: &[f32]) -> Result<Top, ModelError> {
    let mut order: Vec<u32> = (0..).take(logits.len()).collect();
    order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
    order.iter().take(TOP).map(|id| Ok((*id, model.tokenizer().decode(&[*id])?, logits[*id as usize]))).collect()
}
