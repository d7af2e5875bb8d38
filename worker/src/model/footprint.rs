//! What a model takes in memory, phase by phase, from its sizes: nothing is loaded or measured.
//!
//! Follows what the two paths hold at their fullest moment, so whoever changes a path's buffers changes this file;
//! `tests/memory/footprint.rs` holds it against an allocator that counts. Counts
//! neither the program itself nor what a card holds.

use super::config::ModelConfig;
use super::context::{CachePrecision, slice_room, tensor_room};
use super::decoder::QUERY_ROWS;
use super::error::ModelError;
use super::loaded::{Model, pass_tokens, piece_tokens, tensors};
use super::quant::TILE_ROWS;
use super::weights::Precision;

/// What a token of the vocabulary takes in a tokenizer, both ways round, and its merge: 228 measured with Gemma's, 126 with
/// SmolLM2's.
const TOKENIZER_BYTES_PER_TOKEN: u64 = 230;
/// Memory that a thread keeps for products to pack operands into: 0.7 to 1.05 MB measured; it follows the processor's caches.
const PACKING_BYTES_PER_THREAD: u64 = 1 << 20;
const F32: u64 = size_of::<f32>() as u64;

/// Bytes of a model's weights as stored, which only its file knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredBytes {
    /// All tensors.
    pub all: u64,
    /// Embedding and head, which stay as stored on both paths.
    pub tables: u64,
}

/// What is to be run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// Path and weights.
    pub precision: Precision,
    /// Keys and values, on the path for stored weights.
    pub cache: CachePrecision,
    /// Tokens that each sequence holds at the end.
    pub tokens: usize,
    /// Sequences held at once.
    pub sequences: usize,
    /// Threads that compute.
    pub threads: usize,
}

/// Bytes by phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footprint {
    /// Weights, for as long as the model is loaded.
    pub weights: u64,
    /// Tokenizer, likewise; about.
    pub tokenizer: u64,
    /// Memory that threads keep once they have computed.
    pub threads: u64,
    /// Keys and values of all sequences, with the room they have to grow.
    pub context: u64,
    /// The largest pass of the prompt of one sequence.
    pub prefill: Pass,
    /// A step of all sequences.
    pub decode: Pass,
}

/// What exists only while a pass runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// New tokens that run at once.
    pub tokens: usize,
    /// The residual stream and what a layer makes of it.
    pub activations: u64,
    /// Attention scores and masks. With stored weights only what threads pack: their scores are in the memory they keep.
    pub scores: u64,
    /// Logits. They exist when the others do not any more.
    pub logits: u64,
}

impl StoredBytes {
    /// Those of a model that is loaded.
    ///
    /// # Errors
    /// [`ModelError`] if its file is gone.
    pub fn of(model: &Model) -> Result<Self, ModelError> {
        let all = tensors(model.path())?.values().map(|tensor| tensor.bytes as u64).sum();
        Ok(Self { all, tables: model.table_bytes() })
    }
}

impl Pass {
    /// The most at any moment.
    pub fn peak(&self) -> u64 {
        (self.activations + self.scores).max(self.logits)
    }
}

impl Footprint {
    /// What `plan` takes with a model of these settings, vocabulary and weights.
    pub fn new(config: &ModelConfig, vocabulary: usize, stored: StoredBytes, plan: &Plan) -> Self {
        let sizes = Sizes { config, vocabulary: vocabulary as u64, plan };
        let pass = piece_tokens(plan.tokens, pass_tokens(config, stored.all));
        Self {
            weights: match plan.precision {
                Precision::Stored => stored.all,
                Precision::F32 => stored.tables + F32 * sizes.projections(),
            },
            tokenizer: TOKENIZER_BYTES_PER_TOKEN * vocabulary as u64,
            threads: plan.threads as u64 * sizes.thread(pass),
            context: sizes.context(pass),
            prefill: sizes.pass(pass, pass, 1),
            decode: sizes.pass(plan.sequences, 1, plan.sequences),
        }
    }

    /// The most at any moment.
    pub fn peak(&self) -> u64 {
        let pass = self.prefill.peak().max(self.decode.peak());
        self.weights + self.tokenizer + self.threads + self.context + pass
    }
}

/// Letters as in `decoder`.
struct Sizes<'a> {
    config: &'a ModelConfig,
    vocabulary: u64,
    plan: &'a Plan,
}

impl Sizes<'_> {
    fn q_width(&self) -> u64 {
        (self.config.heads * self.config.head_dim) as u64
    }

    fn kv_width(&self) -> u64 {
        (self.config.kv_heads * self.config.head_dim) as u64
    }

    /// Values of all layers' matrices.
    fn projections(&self) -> u64 {
        let (hidden, mlp) = (self.config.hidden as u64, self.config.mlp as u64);
        let layer = hidden * (2 * self.q_width() + 2 * self.kv_width()) + 3 * hidden * mlp;
        self.config.layers.len() as u64 * layer
    }

    /// Keys and values of all sequences, filled by passes of `pass` tokens.
    fn context(&self, pass: usize) -> u64 {
        let (mut held, mut room) = (0, 0);
        while held < self.plan.tokens {
            let added = pass.min(self.plan.tokens - held);
            if held + added > room {
                room = match self.plan.precision {
                    Precision::F32 => tensor_room(held, held + added),
                    Precision::Stored => slice_room(held, held + added),
                };
            }
            held += added;
        }
        let bytes = match (self.plan.precision, self.plan.cache) {
            (Precision::Stored, CachePrecision::F16) => F32 / 2,
            _ => F32,
        };
        let column = self.config.layers.len() as u64 * 2 * self.kv_width() * bytes;
        self.plan.sequences as u64 * room as u64 * column
    }

    /// What a thread keeps: a tile of weights, or the scores of a block of queries and the keys they meet.
    fn thread(&self, pass: usize) -> u64 {
        let widest = self.q_width().max(self.config.hidden as u64).max(self.config.mlp as u64);
        let columns = self.plan.tokens as u64;
        let attention = columns * (QUERY_ROWS.min(pass) + self.config.head_dim) as u64;
        PACKING_BYTES_PER_THREAD
            + F32
                * match self.plan.precision {
                    Precision::Stored => attention.max(TILE_ROWS as u64 * widest),
                    Precision::F32 => (TILE_ROWS * self.config.hidden) as u64,
                }
    }

    /// A pass of `rows` new tokens, `each` of them of one sequence, that scores `scored` of them.
    fn pass(&self, rows: usize, each: usize, scored: usize) -> Pass {
        let (hidden, mlp) = (self.config.hidden as u64, self.config.mlp as u64);
        let (q, kv) = (self.q_width(), self.kv_width());
        let (tokens, columns) = (rows as u64, self.plan.tokens as u64);
        // Layers of one setting share their rotations and masks.
        let mut settings: Vec<_> = Vec::new();
        for layer in &self.config.layers {
            if !settings.contains(&layer) {
                settings.push(layer);
            }
        }
        let settings = settings.len() as u64;
        let turns = settings * tokens * self.config.head_dim as u64;
        let (activations, scores) = match self.plan.precision {
            // Scores are in the threads' memory; each thread's products pack the values that they meet.
            Precision::Stored => {
                let activations = tokens * self.config.activation_bytes_per_token() as u64 / F32;
                (turns + activations, (self.plan.threads * self.config.head_dim) as u64 * columns)
            }
            Precision::F32 => {
                // Scores, the same masked, and their softmax; queries and keys before and after their rotation.
                let scores = each as u64 * columns * 3 * self.config.heads as u64;
                let masks = settings * tokens * columns;
                let attention = tokens * (2 * hidden + 2 * q + 3 * kv);
                let inner = tokens * (3 * hidden + 4 * mlp);
                (turns + attention.max(inner.saturating_sub(scores)), scores + masks)
            }
        };
        // Several rows are computed in one piece, then copied apart.
        let copies = if scored > 1 { 2 } else { 1 };
        Pass {
            tokens: rows,
            activations: F32 * activations,
            scores: F32 * scores,
            logits: F32 * copies * scored as u64 * self.vocabulary,
        }
    }
}
