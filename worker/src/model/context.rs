//! The growing keys and values of one running sequence.
//!
//! Internal to a run: buffers with room to grow, written in place. A cache that is looked at, edited or sent is a
//! [`KvCache`](crate::cache::KvCache), copied out of here, so nothing taken out can change later.

use candle_core::{DType, Device, Result, Tensor};

/// Room is made for this many columns at least.
const ROOM_MIN: usize = 64;

/// One sequence in a model: what it has seen so far.
#[derive(Debug)]
pub struct Context {
    pub(crate) layers: Vec<LayerBuffers>,
    pub(crate) positions: Vec<i64>,
    /// Ids of all columns; None from the moment a cache of unknown text came in.
    pub(crate) tokens: Option<Vec<u32>>,
}

/// K (rotated) and V of one layer, `[H_kv, room, D]` f32, of which the first columns are in use.
#[derive(Debug)]
pub(crate) struct LayerBuffers {
    k: Tensor,
    v: Tensor,
    used: usize,
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

    /// The position after the last column's: where text goes on without a gap.
    pub fn next_position(&self) -> i64 {
        self.positions.last().map_or(0, |last| last + 1)
    }
}

impl LayerBuffers {
    pub(crate) fn new(kv_heads: usize, head_dim: usize) -> Result<Self> {
        let zeros = || Tensor::zeros((kv_heads, ROOM_MIN, head_dim), DType::F32, &Device::Cpu);
        Ok(Self { k: zeros()?, v: zeros()?, used: 0 })
    }

    /// Appends columns `[H_kv, T, D]`, both contiguous.
    pub(crate) fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<()> {
        let added = k.dim(1)?;
        let needed = self.used + added;
        if needed > self.k.dim(1)? {
            let room = needed.max(2 * self.used).next_multiple_of(ROOM_MIN);
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

fn grown(buffer: &Tensor, used: usize, room: usize) -> Result<Tensor> {
    let (kv_heads, _, head_dim) = buffer.dims3()?;
    let larger = Tensor::zeros((kv_heads, room, head_dim), buffer.dtype(), buffer.device())?;
    if used > 0 {
        larger.slice_set(&buffer.narrow(1, 0, used)?.contiguous()?, 1, 0)?;
    }
    Ok(larger)
}
