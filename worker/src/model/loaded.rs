//! A loaded model: identity, settings, tokenizer, weights; and how sequences run through it.

mod tracked;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Device;
use protocol::memory::executor::{self, pass_tokens, piece_tokens};

use super::config::{ConfigError, ModelConfig, family_of};
use super::context::{CachePrecision, Context, LayerBuffers, SliceBuffers, TensorBuffers};
use super::decoder::{Decoder, Logits, Observer, Segment};
use super::error::ModelError;
use super::gguf::{Gguf, GgufError, TensorInfo};
use super::hf::Checkpoint;
use super::hf::config::Settings;
use super::names::Part;
use super::place::{Compute, Place};
use super::tokenizer::{BuildError, Tokenizer};
use super::weights::{Precision, Source, WeightError, Weights};
use crate::cache::{CacheLayout, KvCache};

/// Tokens that one pass takes at most; longer texts run in pieces.
pub const PASS_TOKENS_MAX: usize = executor::PASS_TOKENS_MAX as usize;

/// How a model is loaded.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// The file must have this fingerprint, `sha256:` and 64 hex digits. None: any file is taken.
    pub expected_fingerprint: Option<String>,
    /// How projections are held and multiplied.
    pub precision: Precision,
    /// Load without the tokenizer, for a program that deals in ids only: Gemma's takes 70 MB and seconds.
    pub ids_only: bool,
    /// How running sequences hold keys and values; with [`Precision::F32`] and on cards always as computed.
    pub cache: CachePrecision,
    /// Where it computes; everything but the embedding lies there then.
    pub place: Place,
}

/// One sequence of a batch: its context, and the tokens that go on after it.
#[derive(Debug)]
pub struct BatchItem<'a> {
    /// What the sequence has seen.
    pub context: &'a mut Context,
    /// What comes next, at consecutive positions.
    pub tokens: &'a [u32],
}

/// What enters a run of some layers.
#[derive(Debug, Clone, Copy)]
pub enum Input<'a> {
    /// Ids, for a run that begins at the first layer.
    Tokens(&'a [u32]),
    /// The residual stream behind the layer before, `[T, C]`, for any other.
    Hidden(&'a [f32]),
}

/// What a run of some layers gives.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// The residual stream behind the last layer run, `[T, C]`: the next run's input.
    Hidden(Vec<f32>),
    /// Behind the model's last layer: the logits asked for, a row a token, `[vocabulary]` each.
    Logits(Vec<Vec<f32>>),
}

/// A model that can run. Immutable, so threads may share it; run one at a time, for all its work is parallel already.
#[derive(Debug)]
pub struct Model {
    path: PathBuf,
    config: ModelConfig,
    /// None: loaded for ids only.
    tokenizer: Option<Tokenizer>,
    decoder: Decoder,
    layout: Arc<CacheLayout>,
    pass_tokens: usize,
    precision: Precision,
    cache: CachePrecision,
    compute: Compute,
}

/// What loading puts together; last, bytes of the tensors as stored.
type Parts = (ModelConfig, Decoder, Option<Tokenizer>, u64);

impl Model {
    /// Loads a GGUF file, or a directory in Hugging Face's layout. With [`Precision::F32`] weights become f32, except
    /// embedding and head, which stay as stored and are dequantised where they are used: SmolLM2-135M takes about 0.45 GB,
    /// Gemma 3 270M about 0.6 GB. With [`Precision::Stored`] everything takes what it takes in the file.
    ///
    /// # Errors
    /// [`ModelError::CorruptModel`] for another file than expected; otherwise what is wrong with the file, by name.
    pub fn load(path: &Path, options: &LoadOptions) -> Result<Self, ModelError> {
        let compute = options.place.open()?;
        let fingerprint = fingerprint(path)?;
        if let Some(expected) = options.expected_fingerprint.as_ref().filter(|expected| **expected != fingerprint) {
            let (path, expected) = (path.to_path_buf(), expected.clone());
            return Err(ModelError::CorruptModel { path, expected, got: fingerprint });
        }
        let (config, decoder, tokenizer, weight_bytes) = if path.is_dir() {
            Self::load_directory(path, options, &compute)?
        } else {
            Self::load_gguf(path, options, &compute)?
        };
        let layout = Arc::new(CacheLayout::new(&config, fingerprint));
        let (precision, cache) = (options.precision, options.cache);
        let pass_tokens = pass_tokens(weight_bytes, config.activation_bytes_per_token() as u64) as usize;
        Ok(Self {
            path: path.to_path_buf(),
            config,
            tokenizer,
            decoder,
            layout,
            pass_tokens,
            precision,
            cache,
            compute,
        })
    }

    fn load_gguf(path: &Path, options: &LoadOptions, compute: &Compute) -> Result<Parts, ModelError> {
        let in_file = |source: GgufError| ModelError::Gguf { path: path.to_path_buf(), source };
        let wrong = |error: ConfigError| match error {
            ConfigError::Gguf(source) => in_file(source),
            ConfigError::Model(error) => error,
        };
        let taken = |error: WeightError| match error {
            WeightError::Gguf(source) => in_file(source),
            WeightError::Model(error) => error,
            WeightError::Tensor(error) => error.into(),
        };
        let mut gguf = Gguf::open(path).map_err(in_file)?;
        let family = family_of(&gguf.metadata).map_err(wrong)?;
        let divisors =
            Weights::new(Source::Gguf(&gguf), family, options.precision, compute).rope_divisors().map_err(taken)?;
        let config = ModelConfig::from_metadata(&gguf.metadata, divisors).map_err(wrong)?;
        // Before the weights, which then take the place of the vocabulary's text and of what was built from it.
        let metadata = std::mem::take(&mut gguf.metadata);
        let tokens = metadata.texts("tokenizer.ggml.tokens").map_err(in_file)?.map_or(0, <[String]>::len);
        let tokenizer = match options.ids_only {
            true => None,
            false => Some(Tokenizer::from_metadata(&metadata).map_err(|error| match error {
                BuildError::Gguf(source) => in_file(source),
                BuildError::Model(error) => error,
            })?),
        };
        drop(metadata);
        let mut weights = Weights::new(Source::Gguf(&gguf), family, options.precision, compute);
        // Known already; asked for again as one of the tensors that are used.
        weights.rope_divisors().map_err(taken)?;
        let name = weights.name(Part::Embedding, "weight");
        let decoder = Decoder::load(&config, weights).map_err(taken)?;
        if tokens != decoder.vocabulary() {
            let (expected, got) = (vec![tokens, config.hidden], vec![decoder.vocabulary(), config.hidden]);
            return Err(ModelError::TensorShape { name, expected, got });
        }
        let bytes = gguf.tensors.values().map(|tensor| tensor.bytes as u64).sum();
        Ok((config, decoder, tokenizer, bytes))
    }

    fn load_directory(path: &Path, options: &LoadOptions, compute: &Compute) -> Result<Parts, ModelError> {
        let checkpoint = Checkpoint::open(path)?;
        let settings = Settings::read(&checkpoint)?;
        let tokenizer = match options.ids_only {
            true => None,
            false => Some(Tokenizer::from_checkpoint(&checkpoint, &settings)?),
        };
        let source = Source::Checkpoint { files: &checkpoint, tied: settings.tied };
        let weights = Weights::new(source, settings.config.family, options.precision, compute);
        let name = weights.name(Part::Embedding, "weight");
        let decoder = Decoder::load(&settings.config, weights).map_err(|error| match error {
            WeightError::Gguf(_) => unreachable!("no GGUF file is open"),
            WeightError::Model(error) => error,
            WeightError::Tensor(error) => error.into(),
        })?;
        // Embeddings are often padded to a round number of rows; a token without a row cannot be run.
        let rows = tokenizer.as_ref().map_or(0, Tokenizer::size).max(settings.vocabulary);
        if rows != decoder.vocabulary() {
            let (expected, got) =
                (vec![rows, settings.config.hidden], vec![decoder.vocabulary(), settings.config.hidden]);
            return Err(ModelError::TensorShape { name, expected, got });
        }
        let bytes = checkpoint.tensors().map(|(_, tensor)| tensor.bytes as u64).sum();
        Ok((settings.config, decoder, tokenizer, bytes))
    }

    /// The file or directory it came from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `sha256:` and the digest of the file, or of the directory as [`fingerprint`] computes it.
    pub fn fingerprint(&self) -> &str {
        &self.layout.fingerprint
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        self.compute.device()
    }

    /// Sizes and settings.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Text to ids and back.
    ///
    /// # Panics
    /// If the model was loaded with [`LoadOptions::ids_only`].
    pub fn tokenizer(&self) -> &Tokenizer {
        self.tokenizer.as_ref().expect("a model loaded for ids only is not asked for text")
    }

    /// Number of ids, and so of logits at each position.
    pub fn vocabulary(&self) -> usize {
        self.decoder.vocabulary()
    }

    /// What a cache must look like to fit.
    pub fn layout(&self) -> &Arc<CacheLayout> {
        &self.layout
    }

    /// A sequence that has seen nothing.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if memory runs out.
    pub fn start(&self) -> Result<Context, ModelError> {
        self.start_layers(0..self.config.layers.len())
    }

    /// The same for a run of only these layers: one part of a model that is split over devices.
    ///
    /// # Errors
    /// [`ModelError::Layers`] if the model does not have them, or there are none.
    pub fn start_layers(&self, layers: Range<usize>) -> Result<Context, ModelError> {
        let count = self.config.layers.len();
        if layers.is_empty() || layers.end > count {
            return Err(ModelError::Layers { start: layers.start, end: layers.end, count });
        }
        let (kv_heads, head_dim) = (self.config.kv_heads, self.config.head_dim);
        let buffers = || match (self.precision, self.cache) {
            (Precision::F32, _) => TensorBuffers::new(kv_heads, head_dim, &self.compute).map(LayerBuffers::Tensors),
            _ if self.compute.is_card() => {
                TensorBuffers::new(kv_heads, head_dim, &self.compute).map(LayerBuffers::Tensors)
            }
            (Precision::Stored, CachePrecision::F32) => Ok(LayerBuffers::F32(SliceBuffers::new(kv_heads, head_dim))),
            (Precision::Stored, CachePrecision::F16) => Ok(LayerBuffers::F16(SliceBuffers::new(kv_heads, head_dim))),
        };
        let first_layer = layers.start;
        let layers = layers.map(|_| buffers()).collect::<Result<_, _>>()?;
        let layout = Arc::clone(&self.layout);
        Ok(Context { layout, first_layer, layers, positions: Vec::new(), tokens: Some(Vec::new()) })
    }

    /// A sequence that has seen what `cache` holds. Keys are rotated to their positions if they are not.
    ///
    /// # Errors
    /// [`ModelError::Cache`] if the cache is another model's or lacks layers: nothing is injected then.
    pub fn inject(&self, cache: &KvCache) -> Result<Context, ModelError> {
        let mut context = self.start()?;
        self.append(&mut context, cache)?;
        Ok(context)
    }

    /// Adds the columns of `cache` after what `context` holds, at the positions that the cache states.
    ///
    /// # Errors
    /// As [`Model::inject`]; the context is unchanged then.
    pub fn append(&self, context: &mut Context, cache: &KvCache) -> Result<(), ModelError> {
        self.check_own(context)?;
        cache.check_fits_layers(&self.layout, context.layers())?;
        if cache.is_empty() {
            return Ok(());
        }
        self.check_positions(cache.positions())?;
        let mark = context.mark();
        for (index, buffers) in context.layers().zip(&mut context.layers) {
            let layer = cache.rotated_layer(index).expect("all layers are there");
            if let Err(error) = buffers.append(&layer, self.config.kv_heads, cache.len()) {
                context.rewind(mark);
                return Err(error.into());
            }
        }
        context.positions.extend_from_slice(cache.positions());
        context.tokens = match (context.tokens.take(), cache.tokens()) {
            (Some(mut known), Some(more)) => {
                known.extend_from_slice(more);
                Some(known)
            }
            _ => None,
        };
        Ok(())
    }

    /// Copies what `context` holds out of it. Nothing that happens to the context afterwards changes the copy.
    ///
    /// # Errors
    /// [`ModelError::Foreign`]; [`ModelError::Tensor`] if memory runs out.
    pub fn extract(&self, context: &Context) -> Result<KvCache, ModelError> {
        self.check_own(context)?;
        let layers = context.layers().zip(&context.layers);
        let layers =
            layers.map(|(index, buffers)| Ok((index, buffers.copy()?))).collect::<candle_core::Result<Vec<_>>>()?;
        let (positions, tokens) = (context.positions.clone(), context.tokens.clone());
        Ok(KvCache::new(Arc::clone(&self.layout), layers, positions, tokens, true)?)
    }

    /// Runs tokens at consecutive positions after what the context holds; logits of the last one, `[vocabulary]`.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn prefill(&self, context: &mut Context, tokens: &[u32]) -> Result<Vec<f32>, ModelError> {
        self.prefill_at(context, tokens, context.next_position())
    }

    /// The same with the first token at `position`, which may leave a gap.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn prefill_at(&self, context: &mut Context, tokens: &[u32], position: i64) -> Result<Vec<f32>, ModelError> {
        let positions: Vec<i64> = (position..).take(tokens.len()).collect();
        let mut rows = self.forward(context, tokens, &positions, Logits::Last, None)?;
        Ok(rows.pop().expect("one row was asked for"))
    }

    /// Runs `tokens` at `positions` after what `context` holds, adds them to it, and returns the logits asked for, a row
    /// a token. Columns already held are seen by every new token, whatever their positions, unless a window hides them.
    ///
    /// More than [`Model::pass_tokens`] tokens run in several passes. Same tokens split alike: same bits.
    ///
    /// # Errors
    /// Ids outside the vocabulary, positions outside the context length, no tokens, another model's context; or what the
    /// observer says. The context is unchanged then.
    pub fn forward(
        &self,
        context: &mut Context,
        tokens: &[u32],
        positions: &[i64],
        logits: Logits,
        observer: Option<&mut Observer<'_>>,
    ) -> Result<Vec<Vec<f32>>, ModelError> {
        self.check_whole(context)?;
        match self.run(context, Input::Tokens(tokens), positions, logits, observer)? {
            Output::Logits(rows) => Ok(rows),
            Output::Hidden(_) => unreachable!("a whole context ends at the last layer"),
        }
    }

    /// The same for a context of some layers, from [`Model::start_layers`]: begins from tokens at the first layer, from hidden
    /// states at any other, and stops behind the context's last. Runs of all parts after each other, each with its own context,
    /// compute what one run of the whole model does, bit for bit.
    ///
    /// # Errors
    /// As [`Model::forward`]; [`ModelError::Part`] for tokens in the middle or hidden states at the start,
    /// [`ModelError::Hidden`] for hidden states of another shape.
    pub fn run(
        &self,
        context: &mut Context,
        input: Input<'_>,
        positions: &[i64],
        logits: Logits,
        observer: Option<&mut Observer<'_>>,
    ) -> Result<Output, ModelError> {
        self.check_own(context)?;
        match input {
            Input::Tokens(tokens) if context.first_layer == 0 => self.check_input(tokens, positions)?,
            Input::Hidden(hidden) if context.first_layer > 0 => self.check_hidden(hidden, positions)?,
            _ => return Err(ModelError::Part { layers: context.layers() }),
        }
        let mark = context.mark();
        let done = self.run_passes(context, input, positions, logits, observer);
        if done.is_err() {
            context.rewind(mark);
        }
        done
    }

    /// As [`Model::run`] with input that has been checked; a failure leaves the context in between.
    fn run_passes(
        &self,
        context: &mut Context,
        input: Input<'_>,
        positions: &[i64],
        logits: Logits,
        mut observer: Option<&mut Observer<'_>>,
    ) -> Result<Output, ModelError> {
        let (mut hidden, mut rows) = (Vec::new(), Vec::new());
        let (mut done, all) = (0, positions.len());
        for positions in positions.chunks(piece_tokens(all, self.pass_tokens)) {
            let part = done..done + positions.len();
            let last = part.end == all;
            let wanted = if logits == Logits::Last && !last { Logits::None } else { logits };
            let observer = observer.as_mut().map(|observer| &mut **observer as &mut Observer<'_>);
            let (tokens, states) = match input {
                Input::Tokens(tokens) => (Some(&tokens[part.clone()]), None),
                Input::Hidden(hidden) => {
                    (None, Some(&hidden[part.start * self.config.hidden..part.end * self.config.hidden]))
                }
            };
            let mut segments = [Segment { context: &mut *context, tokens, positions }];
            let passed = self.decoder.forward(&self.config, &mut segments, states, wanted, observer)?;
            rows.extend(passed.logits);
            hidden.extend(passed.hidden.unwrap_or_default());
            done = part.end;
        }
        let whole = context.layers().end == self.config.layers.len();
        Ok(if whole { Output::Logits(rows) } else { Output::Hidden(hidden) })
    }

    /// Runs several sequences at once, each at consecutive positions after what its own context holds: logits of each one's
    /// last token, `[vocabulary]`. Lengths may differ, and no padding is computed. Weights are read once for all, so a step of
    /// 8 sequences takes little longer than one of a single sequence.
    ///
    /// More than [`Model::pass_tokens`] tokens in all run in several passes.
    ///
    /// # Errors
    /// As [`Model::forward`]; all contexts are unchanged then.
    pub fn forward_batch(&self, items: &mut [BatchItem<'_>]) -> Result<Vec<Vec<f32>>, ModelError> {
        let mut places = Vec::with_capacity(items.len());
        for item in &*items {
            self.check_whole(item.context)?;
            let first = item.context.next_position();
            let positions: Vec<i64> = (first..).take(item.tokens.len()).collect();
            self.check_input(item.tokens, &positions)?;
            places.push(positions);
        }
        let marks: Vec<_> = items.iter().map(|item| item.context.mark()).collect();
        let done = self.batch_passes(items, &places);
        if done.is_err() {
            items.iter_mut().zip(marks).for_each(|(item, mark)| item.context.rewind(mark));
        }
        done
    }

    /// As [`Model::forward_batch`] with input that has been checked; a failure leaves contexts in between.
    fn batch_passes(&self, items: &mut [BatchItem<'_>], places: &[Vec<i64>]) -> Result<Vec<Vec<f32>>, ModelError> {
        let all = places.iter().map(Vec::len).sum();
        let mut logits = vec![Vec::new(); items.len()];
        let mut done = vec![0; items.len()];
        while done.iter().zip(places).any(|(done, positions)| *done < positions.len()) {
            let mut room = piece_tokens(all, self.pass_tokens);
            let (mut segments, mut members) = (Vec::new(), Vec::new());
            for (index, item) in items.iter_mut().enumerate() {
                let part = done[index]..(done[index] + room).min(item.tokens.len());
                if part.is_empty() {
                    continue;
                }
                room -= part.len();
                done[index] = part.end;
                members.push(index);
                let (tokens, positions) = (Some(&item.tokens[part.clone()]), &places[index][part]);
                segments.push(Segment { context: &mut *item.context, tokens, positions });
            }
            let passed = self.decoder.forward(&self.config, &mut segments, None, Logits::Last, None)?;
            // A sequence that is cut by a pass gets its logits again with the next one.
            members.into_iter().zip(passed.logits).for_each(|(index, row)| logits[index] = row);
        }
        Ok(logits)
    }

    fn check_input(&self, tokens: &[u32], positions: &[i64]) -> Result<(), ModelError> {
        if tokens.len() != positions.len() || tokens.is_empty() {
            return Err(ModelError::Input { tokens: tokens.len(), positions: positions.len() });
        }
        let vocabulary = self.decoder.vocabulary();
        if let Some(id) = tokens.iter().find(|id| **id as usize >= vocabulary) {
            return Err(ModelError::TokenRange { id: *id, vocabulary });
        }
        self.check_positions(positions)
    }

    fn check_own(&self, context: &Context) -> Result<(), ModelError> {
        if Arc::ptr_eq(&self.layout, &context.layout) { Ok(()) } else { Err(ModelError::Foreign) }
    }

    pub(super) fn check_whole(&self, context: &Context) -> Result<(), ModelError> {
        self.check_own(context)?;
        let layers = context.layers();
        if layers == (0..self.config.layers.len()) { Ok(()) } else { Err(ModelError::Part { layers }) }
    }

    fn check_hidden(&self, hidden: &[f32], positions: &[i64]) -> Result<(), ModelError> {
        let expected = positions.len() * self.config.hidden;
        if positions.is_empty() || hidden.len() != expected {
            return Err(ModelError::Hidden { expected, got: hidden.len() });
        }
        self.check_positions(positions)
    }

    fn check_positions(&self, positions: &[i64]) -> Result<(), ModelError> {
        let context = self.config.context_length;
        match positions.iter().find(|position| position.unsigned_abs() >= context as u64) {
            None => Ok(()),
            Some(position) => Err(ModelError::ContextLength { position: *position, context }),
        }
    }
}

/// The token with the largest logit; the first of equals.
///
/// # Panics
/// If there are no logits: a vocabulary is never empty.
pub fn argmax(logits: &[f32]) -> u32 {
    assert!(!logits.is_empty(), "a vocabulary is never empty");
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    u32::try_from(best).expect("ids are u32")
}

/// The tensors of a model's file or directory, by their names there. Reads headers only.
///
/// # Errors
/// [`ModelError`] as [`Model::load`] gives it for headers.
pub fn tensors(path: &Path) -> Result<BTreeMap<String, TensorInfo>, ModelError> {
    if path.is_dir() {
        let checkpoint = Checkpoint::open(path)?;
        return Ok(checkpoint.tensors().map(|(name, info)| (name.to_owned(), info.clone())).collect());
    }
    let gguf = Gguf::open(path).map_err(|source| ModelError::Gguf { path: path.to_path_buf(), source })?;
    Ok(gguf.tensors)
}

/// `sha256:` and the digest of a file's bytes; of a directory, as [`Checkpoint::fingerprint`] says.
///
/// # Errors
/// [`ModelError::Io`] if it cannot be read.
pub fn fingerprint(path: &Path) -> Result<String, ModelError> {
    if path.is_dir() { Checkpoint::fingerprint(path) } else { Ok(format!("sha256:{}", digest(path)?)) }
}

/// The SHA-256 of a file's bytes, in hex.
pub(super) fn digest(path: &Path) -> Result<String, ModelError> {
    let failed = |source| ModelError::Io { path: path.to_path_buf(), source };
    let mut file = File::open(path).map_err(failed)?;
    let mut digest = ring::digest::Context::new(&ring::digest::SHA256);
    let mut block = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut block).map_err(failed)?;
        if read == 0 {
            break;
        }
        digest.update(&block[..read]);
    }
    Ok(hex(digest.finish().as_ref()))
}

/// Bytes as lower-case hex.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
