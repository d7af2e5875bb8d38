//! How our executors run a pass, as far as memory depends on it. The worker computes with these very figures.
//!
//! Follows what the paths hold at their fullest moment, so whoever changes a path's buffers changes this file;
//! `tests/memory` holds it against an allocator that counts, and against the kernel's count of real executors.

use super::phase::{Element, Inference};
use super::shape::ModelShape;
use super::{product, sum};

/// Tokens that one pass takes at most; longer texts run in pieces. More would not be faster: from here on nearly all time is
/// products.
pub const PASS_TOKENS_MAX: u64 = 512;
/// Fewer than these would dequantise weights too often.
pub const PASS_TOKENS_MIN: u64 = 128;
/// Between the two, activations of a pass take this part of what the stored weights do: 1 / 20.
const PASS_SHARE: u64 = 20;
/// Rows of stored weights that a thread dequantises at a time: 64 x 2048 f32 are half of a small core's second-level cache.
pub const TILE_ROWS: usize = 64;
/// Queries of one head that a task takes: scores of 64 x 1024 columns are as much.
pub const QUERY_ROWS: usize = 64;
/// Room for keys and values is made for this many columns at least.
pub const ROOM_MIN: usize = 64;
/// What a token of the vocabulary takes in a tokenizer, both ways round, and its merge: 228 bytes measured with Gemma's, 126
/// with SmolLM2's.
const TOKENIZER_BYTES_PER_TOKEN: u64 = 230;
/// Memory that a thread keeps for products to pack operands into: 0.7 to 1.05 MB measured; it follows the processor's caches.
const PACKING_BYTES_PER_THREAD: u64 = 1 << 20;
const F32: u64 = 4;

/// Bytes of activations that a pass on slices holds for each of its tokens: the residual stream, its normed copy and a branch,
/// and the inner part of attention or of the MLP, whichever is wider. `[C, (H + J) D, F]` in that order.
pub const fn activation_bytes_per_token(hidden: u64, attention: u64, mlp: u64) -> u64 {
    let inner = if attention > mlp { attention } else { mlp };
    (3 * hidden + 2 * inner) * F32
}

/// Tokens that a pass takes at most, in a model with so many bytes of stored weights.
pub fn pass_tokens(stored_bytes: u64, activation_bytes_per_token: u64) -> u64 {
    (stored_bytes / PASS_SHARE / activation_bytes_per_token.max(1)).clamp(PASS_TOKENS_MIN, PASS_TOKENS_MAX)
}

/// Tokens of each pass but the last, for `all` tokens and `most` a pass: pieces are about equal, for a short one at the end
/// would run as a decode does, with activations rounded to 8 bits.
pub fn piece_tokens(all: usize, most: usize) -> usize {
    all.div_ceil(all.div_ceil(most.max(1)).max(1)).max(1)
}

/// Columns that buffers of tensors have room for when `held` must become `needed`.
pub fn tensor_room(held: usize, needed: usize) -> usize {
    needed.max(2 * held).next_multiple_of(ROOM_MIN)
}

/// The same for slices: an eighth of what is held more at least, so that a long text is not moved at every token.
pub fn slice_room(held: usize, needed: usize) -> usize {
    needed.max(held + held / 8).next_multiple_of(ROOM_MIN)
}

/// A path through the decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    /// Plain slices and weights as stored, on processors.
    Slices,
    /// Tensors: the f32 reference on processors, and everything on cards.
    Tensors,
}

/// Letters as in the module's page.
pub(super) struct Run<'a> {
    pub(super) shape: &'a ModelShape,
    pub(super) path: Path,
    pub(super) inference: Inference,
    pub(super) threads: u64,
}

impl Run<'_> {
    /// T: tokens of the largest pass of one sequence.
    pub(super) fn pass(&self) -> usize {
        let shape = self.shape;
        let stored = super::Quantisation::Stored.bytes(shape);
        let attention = shape.q_width() + shape.kv_width();
        let each = activation_bytes_per_token(shape.hidden.into(), attention, shape.ffn.into());
        let most = usize::try_from(pass_tokens(stored, each)).expect("at most 512");
        piece_tokens(self.inference.tokens.max(1) as usize, most)
    }

    /// Keys and values of all sequences, with the room that passes made for them to grow.
    pub(super) fn keys_values(&self) -> u64 {
        let (tokens, pass) = (self.inference.tokens as usize, self.pass());
        let (mut held, mut room) = (0, 0);
        while held < tokens {
            let added = pass.min(tokens - held);
            if held + added > room {
                room = match self.path {
                    Path::Tensors => tensor_room(held, held + added),
                    Path::Slices => slice_room(held, held + added),
                };
            }
            held += added;
        }
        let column = product(&[self.shape.kv_numbers_per_token(), self.inference.cache.bytes()]);
        product(&[self.inference.sequences.into(), room.max(ROOM_MIN) as u64, column])
    }

    /// What a thread of a processor keeps: a tile of weights, or the scores of a block of queries and the keys they meet.
    pub(super) fn thread(&self) -> u64 {
        let shape = self.shape;
        let widest = shape.q_width().max(shape.hidden.into()).max(shape.ffn.into());
        let tile = TILE_ROWS as u64;
        let numbers = match self.path {
            Path::Slices => {
                let block = QUERY_ROWS.min(self.pass()) as u64 + u64::from(shape.head_dim);
                product(&[self.inference.tokens.into(), block]).max(tile * widest)
            }
            Path::Tensors => tile * u64::from(shape.hidden),
        };
        PACKING_BYTES_PER_THREAD.saturating_add(F32 * numbers)
    }

    /// Activations with attention scores, and logits, of the larger of a pass of one sequence and a step of all.
    pub(super) fn working(&self) -> (u64, u64) {
        let pass = self.pass() as u64;
        let prefill = self.of(pass, pass, 1);
        let sequences = u64::from(self.inference.sequences);
        let decode = self.of(sequences, 1, sequences);
        if prefill.0.max(prefill.1) >= decode.0.max(decode.1) { prefill } else { decode }
    }

    /// `rows` new tokens, `each` of them of one sequence; `scored` of them get logits. Bytes of f32.
    fn of(&self, rows: u64, each: u64, scored: u64) -> (u64, u64) {
        let shape = self.shape;
        let (hidden, ffn) = (u64::from(shape.hidden), u64::from(shape.ffn));
        let (q, kv) = (shape.q_width(), shape.kv_width());
        let columns = u64::from(self.inference.tokens);
        let turns = product(&[shape.settings(), rows, shape.head_dim.into()]);
        let numbers = match self.path {
            // Scores are in the threads' memory; each thread's products pack the values that they meet.
            Path::Slices => {
                let tokens = rows * (activation_bytes_per_token(hidden, q + kv, ffn) / F32);
                sum(&[turns, tokens, product(&[self.threads, shape.head_dim.into(), columns])])
            }
            // Scores, the same masked, and their softmax; queries and keys before and after their rotation.
            Path::Tensors => {
                let scores = product(&[3, each, columns, shape.heads.into()]);
                let masks = product(&[shape.settings(), rows, columns]);
                let attention = rows * (2 * hidden + 2 * q + 3 * kv);
                let inner = rows * (3 * hidden + 4 * ffn);
                sum(&[turns, attention.max(inner.saturating_sub(scores)), scores, masks])
            }
        };
        // Several rows are computed in one piece, then copied apart.
        let copies = if scored > 1 { 2 } else { 1 };
        (F32.saturating_mul(numbers), product(&[F32, copies, scored, shape.vocabulary.into()]))
    }
}

/// A tokenizer in memory, about.
pub(super) fn tokenizer(shape: &ModelShape) -> u64 {
    TOKENIZER_BYTES_PER_TOKEN * u64::from(shape.vocabulary)
}

/// Caches taken out: f32, to the column.
pub(super) fn captured(shape: &ModelShape, caches: u32, tokens: u32) -> u64 {
    product(&[caches.into(), tokens.into(), shape.kv_numbers_per_token(), Element::F32.bytes()])
}
