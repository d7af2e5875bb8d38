//! The growing keys and values of one running sequence.
//!
//! Internal to a run: buffers with room to grow, written in place. A cache that is looked at, edited or sent is a
//! [`KvCache`](crate::cache::KvCache), copied out of here, so nothing taken out can change later.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use half::f16;
use protocol::memory::executor::{ROOM_MIN, slice_room, tensor_room};

use super::place::Compute;
use super::vector;
use crate::cache::{CacheLayout, LayerKv};

/// One sequence in a model, or in some of its layers: what it has seen so far.
#[derive(Debug)]
pub struct Context {
    /// The model's own, so that a context of another model, or of the same file loaded again, is told apart.
    pub(crate) layout: Arc<CacheLayout>,
    /// The index of the first layer held.
    pub(crate) first_layer: usize,
    pub(crate) layers: Vec<LayerBuffers>,
    pub(crate) positions: Vec<i64>,
    /// Ids of all columns; None from the moment a cache of unknown text came in.
    pub(crate) tokens: Option<Vec<u32>>,
}

/// A moment in a context's life.
#[derive(Debug)]
pub(crate) struct Mark {
    columns: usize,
    tokens: Option<Vec<u32>>,
}

/// How a context holds the numbers of its keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CachePrecision {
    /// As computed: a cache taken out and put back gives the same bits.
    #[default]
    F32,
    /// Rounded to halves: half the memory, a relative error of 2^-11 in each number. As stored weights only.
    F16,
}

/// K (rotated) and V of one layer.
#[derive(Debug)]
pub(crate) enum LayerBuffers {
    /// For the path on tensors.
    Tensors(TensorBuffers),
    /// For the path on slices.
    F32(SliceBuffers<f32>),
    /// The same, rounded.
    F16(SliceBuffers<f16>),
}

/// `[H_kv, room, D]` in what the place holds, of which the first columns are in use.
#[derive(Debug)]
pub(crate) struct TensorBuffers {
    k: Tensor,
    v: Tensor,
    used: usize,
}

/// `[S, D]` for each of the H_kv heads.
#[derive(Debug)]
pub(crate) struct SliceBuffers<T> {
    k: Vec<Vec<T>>,
    v: Vec<Vec<T>>,
    head_dim: usize,
}

/// A number that keys and values are held in.
pub(crate) trait Element: Copy + Send + Sync + std::fmt::Debug + 'static {
    /// f32 of these numbers: themselves, or written to `room`, which is as long at least.
    fn widen<'a>(numbers: &'a [Self], room: &'a mut [f32]) -> &'a [f32];

    /// Adds numbers, rounded, to the end of `to`.
    fn append(numbers: &[f32], to: &mut Vec<Self>);
}

impl Element for f32 {
    fn widen<'a>(numbers: &'a [Self], _: &'a mut [f32]) -> &'a [f32] {
        numbers
    }

    fn append(numbers: &[f32], to: &mut Vec<Self>) {
        to.extend_from_slice(numbers);
    }
}

impl Element for f16 {
    fn widen<'a>(numbers: &'a [Self], room: &'a mut [f32]) -> &'a [f32] {
        let room = &mut room[..numbers.len()];
        vector::widen(numbers, room);
        room
    }

    fn append(numbers: &[f32], to: &mut Vec<Self>) {
        let start = to.len();
        to.resize(start + numbers.len(), Self::ZERO);
        vector::narrow(numbers, &mut to[start..]);
    }
}

impl Context {
    /// Number of columns held.
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// True before the first token.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// Positions of the columns held, in column order.
    pub fn positions(&self) -> &[i64] {
        &self.positions
    }

    /// Layers of the model that this context holds and a pass over it runs.
    pub fn layers(&self) -> Range<usize> {
        self.first_layer..self.first_layer + self.layers.len()
    }

    /// The position after the last column's: where text goes on without a gap.
    pub fn next_position(&self) -> i64 {
        self.positions.last().map_or(0, |last| last + 1)
    }

    /// What [`Context::rewind`] needs to undo whatever is added from now on.
    pub(crate) fn mark(&self) -> Mark {
        Mark { columns: self.positions.len(), tokens: self.tokens.clone() }
    }

    /// Forgets what was added since `mark`, also by a pass that failed in the middle.
    pub(crate) fn rewind(&mut self, mark: Mark) {
        self.layers.iter_mut().for_each(|layer| layer.truncate(mark.columns));
        self.positions.truncate(mark.columns);
        self.tokens = mark.tokens;
    }

    /// Bytes that keys and values take, with the room they have to grow.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(LayerBuffers::bytes).sum()
    }
}

impl LayerBuffers {
    /// Appends columns `[H_kv, T, D]` of f32.
    pub(crate) fn append(&mut self, kv: &LayerKv, kv_heads: usize, columns: usize) -> Result<()> {
        let head_len = kv.k.len() / kv_heads;
        match self {
            Self::Tensors(buffers) => {
                let shape = (kv_heads, columns, head_len / columns);
                let tensor = |values: &[f32]| buffers.held(values, shape);
                let (k, v) = (tensor(&kv.k)?, tensor(&kv.v)?);
                buffers.append(&k, &v)
            }
            Self::F32(buffers) => {
                buffers.append(
                    columns,
                    |head| &kv.k[head * head_len..][..head_len],
                    |head| &kv.v[head * head_len..][..head_len],
                );
                Ok(())
            }
            Self::F16(buffers) => {
                buffers.append(
                    columns,
                    |head| &kv.k[head * head_len..][..head_len],
                    |head| &kv.v[head * head_len..][..head_len],
                );
                Ok(())
            }
        }
    }

    /// A copy of all columns, `[H_kv, S, D]` f32.
    pub(crate) fn copy(&self) -> Result<LayerKv> {
        match self {
            Self::Tensors(buffers) => {
                let (k, v) = buffers.views()?;
                let copy = |tensor: &Tensor| tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
                Ok(LayerKv { k: copy(&k)?, v: copy(&v)? })
            }
            Self::F32(buffers) => Ok(LayerKv { k: buffers.k.concat(), v: buffers.v.concat() }),
            Self::F16(buffers) => {
                let widened = |heads: &[Vec<f16>]| {
                    let mut all = vec![0.0; heads.iter().map(Vec::len).sum()];
                    let mut rest = all.as_mut_slice();
                    for head in heads {
                        let (room, more) = rest.split_at_mut(head.len());
                        vector::widen(head, room);
                        rest = more;
                    }
                    all
                };
                Ok(LayerKv { k: widened(&buffers.k), v: widened(&buffers.v) })
            }
        }
    }

    /// Drops all columns but the first `columns`.
    fn truncate(&mut self, columns: usize) {
        match self {
            Self::Tensors(buffers) => buffers.used = buffers.used.min(columns),
            Self::F32(buffers) => buffers.truncate(columns),
            Self::F16(buffers) => buffers.truncate(columns),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Tensors(buffers) => 2 * buffers.k.elem_count() * buffers.k.dtype().size_in_bytes(),
            Self::F32(buffers) => buffers.bytes(),
            Self::F16(buffers) => buffers.bytes(),
        }
    }
}

impl TensorBuffers {
    pub(crate) fn new(kv_heads: usize, head_dim: usize, compute: &Compute) -> Result<Self> {
        let zeros = || Tensor::zeros((kv_heads, ROOM_MIN, head_dim), compute.dtype(), compute.device());
        Ok(Self { k: zeros()?, v: zeros()?, used: 0 })
    }

    /// f32 numbers as these buffers hold them.
    fn held(&self, values: &[f32], shape: (usize, usize, usize)) -> Result<Tensor> {
        Tensor::from_slice(values, shape, self.k.device())?.to_dtype(self.k.dtype())
    }

    /// Appends columns `[H_kv, T, D]`, both contiguous; they are rounded to what the buffers hold.
    pub(crate) fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<()> {
        let (k, v) = (&k.to_dtype(self.k.dtype())?, &v.to_dtype(self.v.dtype())?);
        let added = k.dim(1)?;
        let needed = self.used + added;
        if needed > self.k.dim(1)? {
            let room = tensor_room(self.used, needed);
            self.k = grown(&self.k, self.used, room)?;
            self.v = grown(&self.v, self.used, room)?;
        }
        self.k.slice_set(k, 1, self.used)?;
        self.v.slice_set(v, 1, self.used)?;
        self.used = needed;
        Ok(())
    }

    /// Views of the columns in use, `[H_kv, S, D]`; valid until the next append.
    pub(crate) fn views(&self) -> Result<(Tensor, Tensor)> {
        Ok((self.k.narrow(1, 0, self.used)?, self.v.narrow(1, 0, self.used)?))
    }
}

impl<T: Element> SliceBuffers<T> {
    pub(crate) fn new(kv_heads: usize, head_dim: usize) -> Self {
        Self { k: vec![Vec::new(); kv_heads], v: vec![Vec::new(); kv_heads], head_dim }
    }

    /// Keys and values of one head, `[S, D]` each.
    pub(crate) fn head(&self, head: usize) -> (&[T], &[T]) {
        (&self.k[head], &self.v[head])
    }

    /// Appends to each head the rows, `[T, D]`, that `k` and `v` give for it.
    pub(crate) fn append<'a>(
        &mut self,
        columns: usize,
        k: impl Fn(usize) -> &'a [f32],
        v: impl Fn(usize) -> &'a [f32],
    ) {
        self.make_room(columns);
        for (head, (keys, values)) in self.k.iter_mut().zip(&mut self.v).enumerate() {
            T::append(k(head), keys);
            T::append(v(head), values);
        }
    }

    /// Appends rows `[T, H_kv * D]`: what projections give.
    pub(crate) fn append_rows(&mut self, k: &[f32], v: &[f32]) {
        let width = self.k.len() * self.head_dim;
        self.make_room(k.len() / width);
        for (k, v) in k.chunks(width).zip(v.chunks(width)) {
            let heads = self.k.iter_mut().zip(&mut self.v);
            for ((k, v), (keys, values)) in k.chunks(self.head_dim).zip(v.chunks(self.head_dim)).zip(heads) {
                T::append(k, keys);
                T::append(v, values);
            }
        }
    }

    /// Makes room for more columns.
    fn make_room(&mut self, columns: usize) {
        for numbers in self.k.iter_mut().chain(&mut self.v) {
            let (held, needed) = (numbers.len() / self.head_dim, numbers.len() / self.head_dim + columns);
            if numbers.capacity() < needed * self.head_dim {
                let room = slice_room(held, needed);
                numbers.reserve_exact((room - held) * self.head_dim);
            }
        }
    }

    fn truncate(&mut self, columns: usize) {
        let numbers = columns * self.head_dim;
        self.k.iter_mut().chain(&mut self.v).for_each(|head| head.truncate(numbers));
    }

    fn bytes(&self) -> usize {
        self.k.iter().chain(&self.v).map(|numbers| numbers.capacity() * size_of::<T>()).sum()
    }
}

fn grown(buffer: &Tensor, used: usize, room: usize) -> Result<Tensor> {
    let (kv_heads, _, head_dim) = buffer.dims3()?;
    let larger = Tensor::zeros((kv_heads, room, head_dim), buffer.dtype(), buffer.device())?;
    if used > 0 {
        larger.slice_set(&buffer.narrow(1, 0, used)?.contiguous()?, 1, 0)?;
    }
    Ok(larger)
}
