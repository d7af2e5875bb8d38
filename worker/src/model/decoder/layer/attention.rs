//! Attention of new rows to a prefix and to each other, there and back: a task a head of a sequence.
//!
//! Keys and values are read where they lie, the prefix's and the new ones after each other. Does not project or rotate.

use super::super::Attention;
use super::{Kept, Layer, Sequence};
use crate::model::matrix::{Output, View};
use crate::model::team::{team, with_scratch};
use crate::model::vector;

/// What one head of one sequence sees.
struct Head<'a> {
    attention: &'a Attention,
    sequence: &'a Sequence,
    head: usize,
}

/// Keys or values of the prefix `[P, D]` and of the new rows `[T, D]` of one sequence.
#[derive(Clone, Copy)]
struct Columns<'a> {
    prefix: Option<View<'a>>,
    new: View<'a>,
}

impl Layer {
    /// A task's sequence and head.
    fn head(&self, task: usize) -> (usize, Head<'_>) {
        let attention = &self.block.attention;
        let (index, head) = (task / attention.heads, task % attention.heads);
        (index, Head { attention, sequence: &self.shared.sequences[index], head })
    }

    /// softmax(scale q kᵀ + mask) v, `[T, H * D]`, of `q` in that shape and new K and V `[T, H_kv * D]`; and what is kept of
    /// it, `[T, P + T]` of each head of each sequence.
    pub(super) fn attend(&self, q: &[f32], new: [&[f32]; 2], prefix: [&[f32]; 2]) -> (Vec<f32>, Vec<Vec<f32>>) {
        let a = &self.block.attention;
        let mut mixed = vec![0.0; q.len()];
        let mut kept = vec![Vec::new(); a.heads * self.shared.sequences.len()];
        let output = Output::new(&mut mixed, a.heads * a.head_dim);
        team().chunks(&mut kept, 1, |task, kept| {
            let (index, head) = self.head(task);
            let [k, v] = [0, 1].map(|side| head.columns(prefix[side], new[side]));
            let (rows, columns) = (head.sequence.rows.len(), head.sequence.columns());
            let mut shares = vec![0.0; rows * columns];
            k.scores(&mut shares, head.scale(), head.queries(q));
            let mask = self.turns().masks[index].as_ref();
            for (row, shares) in shares.chunks_mut(columns).enumerate() {
                if let Some(mask) = mask {
                    vector::add(shares, &mask[row * columns..][..columns]);
                }
                vector::softmax(shares);
            }
            // SAFETY: this head of these rows is this task's alone.
            #[expect(unsafe_code, reason = "tasks write parts of their own")]
            unsafe {
                v.mix(&output, (head.sequence.rows.start, head.head * a.head_dim), &shares);
            }
            kept[0] = shares;
        });
        (mixed, kept)
    }

    /// The gradients of q, of new K and V, and of the prefix's, from that of what came out.
    pub(super) fn attend_back(&self, kept: &Kept, prefix: [&[f32]; 2], dy: &[f32]) -> ([Vec<f32>; 3], [Vec<f32>; 2]) {
        let a = &self.block.attention;
        let (width, stride) = (a.head_dim, a.heads * a.head_dim);
        let (q, new) = (&kept.turned[0], [&kept.turned[1][..], &kept.v]);
        // Heads that share keys and values add to the same numbers, so each has its own first: [T, H * D] and [ΣP, H * D].
        let before = prefix[0].len() / (a.kv_heads * width);
        let zeros = |rows: usize| vec![0.0; rows * stride];
        let tokens = q.len() / stride;
        let (mut d_q, mut d_new, mut d_prefix) =
            (zeros(tokens), [zeros(tokens), zeros(tokens)], [zeros(before), zeros(before)]);
        {
            let q_output = Output::new(&mut d_q, stride);
            let new_outputs = d_new.each_mut().map(|values| Output::new(values, stride));
            let prefix_outputs = d_prefix.each_mut().map(|values| Output::new(values, stride));
            team().each(kept.probabilities.len(), |task| {
                let (_, head) = self.head(task);
                let [k, v] = [0, 1].map(|side| head.columns(prefix[side], new[side]));
                let (rows, columns) = (head.sequence.rows.len(), head.sequence.columns());
                let (shares, at) = (&kept.probabilities[task], head.head * width);
                let (q, dy) = (head.queries(q), head.queries(dy));
                with_scratch(rows * columns, |scores| {
                    v.scores(scores, 1.0, dy);
                    for (scores, shares) in scores.chunks_mut(columns).zip(shares.chunks(columns)) {
                        vector::softmax_backward(scores, shares, head.scale());
                    }
                    // SAFETY: this head of these rows and columns is this task's alone.
                    #[expect(unsafe_code, reason = "tasks write parts of their own")]
                    unsafe {
                        k.mix(&q_output, (head.sequence.rows.start, at), scores);
                        for (side, shares, rows_of) in [(0, &*scores, q), (1, &shares[..], dy)] {
                            let shares = View::new(shares, [rows, columns], columns).transposed();
                            let (first, prefix) = (head.sequence.rows.start, head.sequence.prefix.clone());
                            let new = shares.part(prefix.len()..columns);
                            new_outputs[side].multiply((first, at), false, 1.0, new, rows_of);
                            if !prefix.is_empty() {
                                let before = shares.part(0..prefix.len());
                                prefix_outputs[side].multiply((prefix.start, at), false, 1.0, before, rows_of);
                            }
                        }
                    }
                });
            });
        }
        let [d_k, d_v] = d_new.map(|rows| grouped(&rows, a));
        let prefix = d_prefix.map(|rows| turned(&grouped(&rows, a), a.kv_heads, width));
        ([d_q, d_k, d_v], prefix)
    }
}

/// `[rows, H * D]` to `[rows, H_kv * D]`: sums over the heads that share keys and values.
fn grouped(rows: &[f32], a: &Attention) -> Vec<f32> {
    let (width, group) = (a.head_dim, a.heads / a.kv_heads);
    let mut sums = vec![0.0; rows.len() / group];
    team().chunks(&mut sums, a.kv_heads * width, |row, sums| {
        let row = &rows[row * a.heads * width..][..a.heads * width];
        for (sum, heads) in sums.chunks_mut(width).zip(row.chunks(group * width)) {
            heads.chunks(width).for_each(|head| vector::add(sum, head));
        }
    });
    sums
}

/// `[rows, heads * D]` to `[heads, rows, D]`.
fn turned(rows: &[f32], heads: usize, width: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(rows.len());
    for head in 0..heads {
        rows.chunks(heads * width).for_each(|row| out.extend_from_slice(&row[head * width..][..width]));
    }
    out
}

impl Sequence {
    /// Columns that its rows meet: P + T.
    fn columns(&self) -> usize {
        self.prefix.len() + self.rows.len()
    }
}

impl Head<'_> {
    #[expect(clippy::cast_possible_truncation, reason = "it came from an f32")]
    fn scale(&self) -> f32 {
        self.attention.scale as f32
    }

    /// This head's part of rows `[T, H * D]` of all sequences.
    fn queries<'a>(&self, rows: &'a [f32]) -> View<'a> {
        self.part(rows, self.attention.heads, self.head)
    }

    /// Keys or values that this head sees: of `prefix` `[H_kv, ΣP, D]` and of `new` `[T, H_kv * D]`.
    fn columns<'a>(&self, prefix: &'a [f32], new: &'a [f32]) -> Columns<'a> {
        let Attention { heads, kv_heads, head_dim: width, .. } = *self.attention;
        let head = self.head / (heads / kv_heads);
        let of_head = &prefix[head * prefix.len() / kv_heads..][..prefix.len() / kv_heads];
        let own = self.sequence.prefix.clone();
        let shape = [own.len(), width];
        let prefix = (!own.is_empty()).then(|| View::new(&of_head[own.start * width..], shape, width));
        Columns { prefix, new: self.part(new, kv_heads, head) }
    }

    fn part<'a>(&self, rows: &'a [f32], heads: usize, head: usize) -> View<'a> {
        let (width, own) = (self.attention.head_dim, &self.sequence.rows);
        View::new(&rows[(own.start * heads + head) * width..], [own.len(), width], heads * width)
    }
}

impl Columns<'_> {
    fn prefix_len(&self) -> usize {
        self.prefix.map_or(0, |prefix| prefix.rows)
    }

    /// `factor · rows · columnsᵀ` into `scores`, `[T, P + T]`.
    fn scores(&self, scores: &mut [f32], factor: f32, rows: View<'_>) {
        let before = self.prefix_len();
        let output = Output::new(scores, before + self.new.rows);
        // SAFETY: `output` is this function's alone.
        #[expect(unsafe_code, reason = "the product takes an output that tasks could share")]
        unsafe {
            if let Some(prefix) = self.prefix {
                output.multiply((0, 0), false, factor, rows, prefix.transposed());
            }
            output.multiply((0, before), false, factor, rows, self.new.transposed());
        }
    }

    /// `shares · columns` into `output` from row and column `at` on; `shares` is `[T, P + T]`.
    ///
    /// # Safety
    /// No other task reads or writes these numbers meanwhile.
    #[expect(unsafe_code, reason = "tasks write parts of their own")]
    unsafe fn mix(&self, output: &Output<'_>, at: (usize, usize), shares: &[f32]) {
        let before = self.prefix_len();
        let columns = before + self.new.rows;
        let shares = View::new(shares, [shares.len() / columns, columns], columns);
        // SAFETY: the caller's.
        unsafe {
            if let Some(prefix) = self.prefix {
                output.multiply(at, false, 1.0, shares.columns(0..before), prefix);
            }
            output.multiply(at, self.prefix.is_some(), 1.0, shares.columns(before..columns), self.new);
        }
    }
}
