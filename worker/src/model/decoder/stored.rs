//! The decoder on plain slices: inference on the CPU with weights as stored.
//!
//! The same computation as on tensors, in loops that a team of threads shares out with no hand-over worth naming, and with no
//! more memory than a pass needs: attention scores exist for one head and [`QUERY_ROWS`] queries at a time.

use std::ops::Range;

use candle_core::{Device, Result, Tensor};
use protocol::memory::executor::QUERY_ROWS;

use super::{
    Activation, Attention, Block, Decoder, LayerConfig, Logits, ModelConfig, Norm, Observer, Passed, Segment, Tap, ids,
    scored,
};
use crate::model::context::{Element, LayerBuffers, SliceBuffers};
use crate::model::linear::Linear;
use crate::model::matrix::{Output, View, multiply};
use crate::model::quant::{Kernel, Operand, products};
use crate::model::team::{team, with_scratch};
use crate::model::vector;

/// Columns of keys or values that are widened to f32 at a time where one query looks at them.
const WIDENED_COLUMNS: usize = 16;

/// What the layers of one pass share.
struct Pass<'a, 'b, 'c> {
    kernel: Kernel,
    places: Vec<Place>,
    turns: Vec<Turns>,
    /// Which of `turns` each layer has.
    turns_of: Vec<usize>,
    observer: Option<&'a mut Observer<'b>>,
    config: &'c ModelConfig,
}

/// Where one sequence's new rows lie, and what they may see.
struct Place {
    rows: Range<usize>,
    /// Columns held before the pass.
    before: usize,
    /// Of the columns held and the new ones.
    positions: Vec<i64>,
    /// True if no position is larger than a later one.
    ascending: bool,
}

/// The rotations of all new rows in layers of one setting, `[T, D/2]` each.
struct Turns {
    layer: LayerConfig,
    cosines: Vec<f32>,
    sines: Vec<f32>,
}

/// Activations of one pass, all `[T, width]`.
struct Activations {
    normed: Vec<f32>,
    branch: Vec<f32>,
    /// Attention's and the MLP's in turn: they are never needed together.
    inner: Vec<f32>,
}

impl Decoder {
    pub(super) fn forward_stored(
        &self,
        config: &ModelConfig,
        segments: &mut [Segment<'_>],
        hidden: Option<&[f32]>,
        logits: Logits,
        observer: Option<&mut Observer<'_>>,
    ) -> Result<Passed> {
        let mut x = match hidden {
            Some(hidden) => hidden.to_vec(),
            None => {
                let mut x = self.embedding.rows_of(&ids(segments))?;
                #[expect(clippy::cast_possible_truncation, reason = "it came from an f32")]
                let scale = self.embedding_scale as f32;
                x.iter_mut().for_each(|x| *x *= scale);
                x
            }
        };
        let width = config.hidden;
        let layers = segments[0].context.layers();
        {
            let mut pass = Pass::new(config, self.embedding.kernel(), segments, observer);
            let mut activations = Activations::new(config, x.len() / width);
            for index in layers.clone() {
                self.blocks[index].run(&mut x, index, segments, &mut pass, &mut activations)?;
                pass.show(Tap::Residual, index, || Tensor::from_slice(&x, (x.len() / width, width), &Device::Cpu))?;
            }
        }
        if layers.end < self.blocks.len() {
            return Ok(Passed { hidden: Some(x), logits: Vec::new() });
        }
        let rows = scored(segments, logits);
        let mut wanted = vec![0.0; rows.len() * width];
        for (row, out) in rows.iter().zip(wanted.chunks_mut(width)) {
            vector::rms_norm(&x[*row as usize * width..][..width], &self.norm.values, self.norm.epsilon, out);
        }
        drop(x);
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        let scores = |rows: &[f32]| {
            let mut scores = vec![0.0; rows.len() / width * head.rows()];
            products(&Operand::new(rows, width, head.kernel()), [(head.matrix(), &mut scores[..])]);
            scores
        };
        // The usual case without another copy of a row as long as the vocabulary.
        let logits = match rows.len() {
            0 => Vec::new(),
            1 => vec![scores(&wanted)],
            _ => scores(&wanted).chunks(head.rows()).map(<[f32]>::to_vec).collect(),
        };
        Ok(Passed { hidden: None, logits })
    }
}

impl Activations {
    fn new(config: &ModelConfig, rows: usize) -> Self {
        let zeros = |width: usize| vec![0.0; rows * width];
        let attention = 2 * (config.heads + config.kv_heads) * config.head_dim;
        Self { normed: zeros(config.hidden), branch: zeros(config.hidden), inner: zeros(attention.max(2 * config.mlp)) }
    }

    /// `normed`, `branch`, and parts of the inner memory with these widths.
    fn parts<const N: usize>(&mut self, widths: [usize; N], rows: usize) -> (&[f32], &mut [f32], [&mut [f32]; N]) {
        let mut rest = self.inner.as_mut_slice();
        let parts = widths.map(|width| {
            let (part, more) = std::mem::take(&mut rest).split_at_mut(width * rows);
            rest = more;
            part
        });
        (&self.normed, &mut self.branch, parts)
    }
}

impl<'a, 'b, 'c> Pass<'a, 'b, 'c> {
    fn new(
        config: &'c ModelConfig,
        kernel: Kernel,
        segments: &[Segment<'_>],
        observer: Option<&'a mut Observer<'b>>,
    ) -> Self {
        let mut end = 0;
        let places = segments.iter().map(|segment| {
            let rows = end..end + segment.positions.len();
            end = rows.end;
            let positions = [&segment.context.positions, segment.positions].concat();
            let ascending = positions.is_sorted();
            Place { rows, before: segment.context.positions.len(), positions, ascending }
        });
        let places = places.collect();
        let new: Vec<i64> = segments.iter().flat_map(|segment| segment.positions).copied().collect();
        let mut turns: Vec<Turns> = Vec::new();
        let mut turns_of = Vec::with_capacity(config.layers.len());
        for layer in &config.layers {
            let known = turns.iter().position(|turns| turns.layer == *layer);
            turns_of.push(known.unwrap_or(turns.len()));
            if known.is_none() {
                let (cosines, sines) = layer.rope.table(&new);
                turns.push(Turns { layer: layer.clone(), cosines, sines });
            }
        }
        Self { kernel, places, turns, turns_of, observer, config }
    }

    fn turns(&self, layer: usize) -> &Turns {
        &self.turns[self.turns_of[layer]]
    }

    /// Shows a tensor that is only made if there is an observer.
    fn show(&mut self, tap: Tap, layer: usize, tensor: impl FnOnce() -> Result<Tensor>) -> Result<()> {
        match &mut self.observer {
            Some(observer) => observer(tap, layer, &tensor()?),
            None => Ok(()),
        }
    }

    /// Shows rows `[T, H_kv * D]` as `[H_kv, T, D]`.
    fn show_heads(&mut self, tap: Tap, layer: usize, rows: &[f32]) -> Result<()> {
        let (heads, width) = (self.config.kv_heads, self.config.head_dim);
        self.show(tap, layer, || {
            let shape = (rows.len() / (heads * width), heads, width);
            Tensor::from_slice(rows, shape, &Device::Cpu)?.transpose(0, 1)?.contiguous()
        })
    }
}

impl Place {
    /// The first column that a query at `position` may see, as far as that is known without looking at each.
    fn first_column(&self, window: Option<usize>, position: i64) -> usize {
        match window {
            Some(window) if self.ascending => {
                self.positions.partition_point(|other| position.saturating_sub(*other) >= window as i64)
            }
            _ => 0,
        }
    }

    /// Sets the scores of hidden columns to -inf. `scores` are those of new row `row`, from column `first` on.
    fn hide(&self, window: Option<usize>, row: usize, first: usize, scores: &mut [f32]) {
        let last = self.before + row;
        let visible = (last + 1).saturating_sub(first).min(scores.len());
        scores[visible..].fill(f32::NEG_INFINITY);
        let Some(window) = window else { return };
        let position = self.positions[last];
        if self.ascending {
            let hidden = self.first_column(Some(window), position).saturating_sub(first);
            scores[..hidden].fill(f32::NEG_INFINITY);
            return;
        }
        for (score, other) in scores.iter_mut().zip(&self.positions[first..]) {
            if position.saturating_sub(*other) >= window as i64 {
                *score = f32::NEG_INFINITY;
            }
        }
    }
}

impl Block {
    /// One layer; `x` is the residual stream, `[T, C]`.
    fn run(
        &self,
        x: &mut [f32],
        index: usize,
        segments: &mut [Segment<'_>],
        pass: &mut Pass<'_, '_, '_>,
        a: &mut Activations,
    ) -> Result<()> {
        self.attention_norm.rows(x, &mut a.normed);
        self.attention.run(index, segments, pass, a)?;
        join(x, &mut a.branch, self.post_attention_norm.as_ref());
        self.mlp_norm.rows(x, &mut a.normed);
        let (gate, up, down) = (stored(&self.mlp.gate)?, stored(&self.mlp.up)?, stored(&self.mlp.down)?);
        let (width, wide) = (gate.0.cols(), gate.0.rows());
        let (normed, branch, [inner, ups]) = a.parts([wide, wide], x.len() / width);
        products(&Operand::new(normed, width, pass.kernel), [(gate.0, &mut *inner), (up.0, &mut *ups)]);
        let times = match self.mlp.activation {
            Activation::Silu => vector::silu_times,
            Activation::GeluTanh => vector::gelu_times,
        };
        team().chunks(inner, wide, |row, gate| times(gate, &ups[row * wide..][..wide]));
        products(&Operand::new(inner, wide, pass.kernel), [(down.0, branch)]);
        join(x, &mut a.branch, self.post_mlp_norm.as_ref());
        Ok(())
    }
}

/// x += branch, normed first where there is a norm; row by row.
fn join(x: &mut [f32], branch: &mut [f32], norm: Option<&Norm>) {
    if let Some(norm) = norm {
        let width = norm.values.len();
        team().chunks(branch, width, |_, row| vector::rms_norm_in_place(row, &norm.values, norm.epsilon));
    }
    vector::add(x, branch);
}

impl Norm {
    /// Each row of `x` normed into the same row of `out`.
    pub(super) fn rows(&self, x: &[f32], out: &mut [f32]) {
        let width = self.values.len();
        team().chunks(out, width, |row, out| {
            vector::rms_norm(&x[row * width..][..width], &self.values, self.epsilon, out);
        });
    }
}

/// A projection's matrix and bias.
fn stored(linear: &Linear) -> Result<(&crate::model::quant::QuantMatrix, &[f32])> {
    match linear.parts() {
        Some(parts) => Ok(parts),
        None => candle_core::bail!("f32 weights met the path of stored ones"),
    }
}

/// Adds a bias to every row.
fn add_bias(rows: &mut [f32], bias: &[f32]) {
    if !bias.is_empty() {
        rows.chunks_mut(bias.len()).for_each(|row| vector::add(row, bias));
    }
}

impl Attention {
    /// `a.normed` to `a.branch`; K (rotated) and V of the new columns go into the contexts.
    fn run(
        &self,
        index: usize,
        segments: &mut [Segment<'_>],
        pass: &mut Pass<'_, '_, '_>,
        a: &mut Activations,
    ) -> Result<()> {
        let (q, k, v) = (stored(&self.q)?, stored(&self.k)?, stored(&self.v)?);
        let (q_width, kv_width) = (q.0.rows(), k.0.rows());
        let rows = a.normed.len() / q.0.cols();
        let (normed, branch, [qs, ks, vs, mixed]) = a.parts([q_width, kv_width, kv_width, q_width], rows);
        let normed = Operand::new(normed, q.0.cols(), pass.kernel);
        products(&normed, [(q.0, &mut *qs), (k.0, &mut *ks), (v.0, &mut *vs)]);
        add_bias(qs, q.1);
        add_bias(ks, k.1);
        add_bias(vs, v.1);
        self.norm_heads(qs, self.heads, self.q_norm.as_ref());
        self.norm_heads(ks, self.kv_heads, self.k_norm.as_ref());
        pass.show_heads(Tap::KeyPlain, index, ks)?;
        self.turn_heads(qs, self.heads, pass.turns(index));
        self.turn_heads(ks, self.kv_heads, pass.turns(index));
        pass.show_heads(Tap::Key, index, ks)?;
        pass.show_heads(Tap::Value, index, vs)?;

        let window = pass.turns(index).layer.window;
        let columns = pass.places[0].positions.len();
        // All scores of a layer exist only if somebody wants to see them.
        let mut seen =
            vec![0.0; if pass.observer.is_some() { self.heads * pass.places[0].rows.len() * columns } else { 0 }];
        let shown = (!seen.is_empty()).then(|| Output::new(&mut seen, columns));
        for (segment, place) in segments.iter_mut().zip(&pass.places) {
            let rows = place.rows.start * kv_width..place.rows.end * kv_width;
            let (k, v) = (&ks[rows.clone()], &vs[rows]);
            let first = segment.context.first_layer;
            match &mut segment.context.layers[index - first] {
                LayerBuffers::F32(buffers) => buffers.append_rows(k, v),
                LayerBuffers::F16(buffers) => buffers.append_rows(k, v),
                LayerBuffers::Tensors(_) => candle_core::bail!("a context on tensors met the path on slices"),
            }
        }
        let blocks = pass.places.iter().map(|place| place.rows.len().div_ceil(QUERY_ROWS));
        let most_blocks = blocks.max().unwrap_or(0);
        let out = Output::new(mixed, q_width);
        // Later blocks see more columns, so they go first.
        team().each(pass.places.len() * self.heads * most_blocks, |task| {
            let (block, rest) =
                (most_blocks - 1 - task / (pass.places.len() * self.heads), task % (pass.places.len() * self.heads));
            let (sequence, head) = (rest / self.heads, rest % self.heads);
            let place = &pass.places[sequence];
            let queries = block * QUERY_ROWS..((block + 1) * QUERY_ROWS).min(place.rows.len());
            if queries.is_empty() {
                return;
            }
            let context = &segments[sequence].context;
            let job = Job { attention: self, place, window, head, queries, q: qs, mixed: &out, shown: shown.as_ref() };
            match &context.layers[index - context.first_layer] {
                LayerBuffers::F32(buffers) => job.run(buffers),
                LayerBuffers::F16(buffers) => job.run(buffers),
                LayerBuffers::Tensors(_) => unreachable!("refused above"),
            }
        });
        let shape = (self.heads, pass.places[0].rows.len(), columns);
        pass.show(Tap::Attention, index, || Tensor::from_vec(seen, shape, &Device::Cpu))?;
        let output = stored(&self.output)?;
        products(&Operand::new(mixed, q_width, pass.kernel), [(output.0, branch)]);
        Ok(())
    }

    fn norm_heads(&self, rows: &mut [f32], heads: usize, norm: Option<&Norm>) {
        let Some(norm) = norm else { return };
        team().chunks(rows, heads * self.head_dim, |_, row| {
            row.chunks_mut(self.head_dim).for_each(|head| vector::rms_norm_in_place(head, &norm.values, norm.epsilon));
        });
    }

    fn turn_heads(&self, rows: &mut [f32], heads: usize, turns: &Turns) {
        let half = self.head_dim / 2;
        team().chunks(rows, heads * self.head_dim, |row, values| {
            let (cosines, sines) = (&turns.cosines[row * half..][..half], &turns.sines[row * half..][..half]);
            values.chunks_mut(self.head_dim).for_each(|head| vector::rotate(head, cosines, sines));
        });
    }
}

/// Attention of some queries of one head of one sequence.
struct Job<'a> {
    attention: &'a Attention,
    place: &'a Place,
    window: Option<usize>,
    head: usize,
    /// New rows of the sequence.
    queries: Range<usize>,
    /// `[T, H * D]` of all sequences.
    q: &'a [f32],
    /// The same shape.
    mixed: &'a Output<'a>,
    /// `[H * T, S]` for an observer.
    shown: Option<&'a Output<'a>>,
}

impl Job<'_> {
    fn run<T: Element>(&self, buffers: &SliceBuffers<T>) {
        let group = self.attention.heads / self.attention.kv_heads;
        let (k, v) = buffers.head(self.head / group);
        let width = self.attention.head_dim;
        let first_query = self.place.positions[self.place.before + self.queries.start];
        let columns = self.place.first_column(self.window, first_query)..self.place.before + self.queries.end;
        let (k, v) = (&k[columns.start * width..columns.end * width], &v[columns.start * width..columns.end * width]);
        if self.queries.len() == 1 { self.one(k, v, columns) } else { self.several(k, v, columns) }
    }

    /// One query: keys and values are read once, as they lie.
    fn one<T: Element>(&self, k: &[T], v: &[T], columns: Range<usize>) {
        let width = self.attention.head_dim;
        let step = WIDENED_COLUMNS * width;
        let row = self.place.rows.start + self.queries.start;
        let at = self.head * width..(self.head + 1) * width;
        let q = &self.q[row * self.attention.heads * width..][at.clone()];
        with_scratch(columns.len() + step, |scratch| {
            let (scores, room) = scratch.split_at_mut(columns.len());
            for (scores, keys) in scores.chunks_mut(WIDENED_COLUMNS).zip(k.chunks(step)) {
                for (score, key) in scores.iter_mut().zip(T::widen(keys, room).chunks(width)) {
                    *score = self.scale() * vector::dot(q, key);
                }
            }
            self.settle(self.queries.start, columns.start, scores);
            // SAFETY: this head of this row is this job's alone.
            #[expect(unsafe_code, reason = "jobs write parts of their own")]
            let out = unsafe { self.mixed.part(row, at) };
            out.fill(0.0);
            for (scores, values) in scores.chunks(WIDENED_COLUMNS).zip(v.chunks(step)) {
                for (score, value) in scores.iter().zip(T::widen(values, room).chunks(width)) {
                    vector::add_scaled(out, *score, value);
                }
            }
        });
    }

    /// Several queries: two matrix products with the scores between them.
    fn several<T: Element>(&self, k: &[T], v: &[T], columns: Range<usize>) {
        let (width, rows, count) = (self.attention.head_dim, self.queries.len(), columns.len());
        let stride = self.attention.heads * width;
        let start = self.place.rows.start + self.queries.start;
        let q = View::new(&self.q[start * stride + self.head * width..], [rows, width], stride);
        with_scratch(rows * count + count * width, |scratch| {
            let (scores, room) = scratch.split_at_mut(rows * count);
            let keys = View::new(T::widen(k, room), [count, width], width);
            multiply(scores, self.scale(), q, keys.transposed());
            for (query, scores) in self.queries.clone().zip(scores.chunks_mut(count)) {
                self.settle(query, columns.start, scores);
            }
            let values = View::new(T::widen(v, room), [count, width], width);
            let scores = View::new(scores, [rows, count], count);
            // SAFETY: this head of these rows is this job's alone.
            #[expect(unsafe_code, reason = "jobs write parts of their own")]
            unsafe {
                self.mixed.multiply((start, self.head * width), false, 1.0, scores, values);
            }
        });
    }

    /// Scores of one query to probabilities.
    fn settle(&self, query: usize, first: usize, scores: &mut [f32]) {
        self.place.hide(self.window, query, first, scores);
        vector::softmax(scores);
        if let Some(shown) = self.shown {
            // SAFETY: this head of this row is this job's alone.
            #[expect(unsafe_code, reason = "jobs write parts of their own")]
            let out = unsafe { shown.part(self.head * self.place.rows.len() + query, first..first + scores.len()) };
            out.copy_from_slice(scores);
        }
    }

    #[expect(clippy::cast_possible_truncation, reason = "it came from an f32")]
    fn scale(&self) -> f32 {
        self.attention.scale as f32
    }
}
