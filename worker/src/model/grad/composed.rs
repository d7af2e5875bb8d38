//! The operations of [`grad`](super) for cards, from candle's own: nothing here is a kernel of ours.
//!
//! Norm, rotation and softmax are compositions whose gradients candle derives. A product with a frozen weight has a backward
//! of its own, as candle's would compute a gradient for the weight too, and would keep a dequantised copy of each in the graph.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, D, Layout, Result, Shape, Storage, Tensor};
use candle_nn::ops::rms_norm_slow;
use candle_nn::rotary_emb::rope_slow;

use crate::model::card::CardMatrix;

/// `x Wᵀ` for `x` `[T, inputs]` and a frozen `W` `[outputs, inputs]`, exact up to rounding to what the place holds.
pub(crate) fn frozen(x: &Tensor, weight: &CardMatrix) -> Result<Tensor> {
    let x = x.contiguous()?;
    x.apply_op1(Frozen { x: x.detach(), weight: weight.clone() })
}

/// x / rms(x) * weight over the last axis, with a frozen weight.
pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<Tensor> {
    rms_norm_slow(&x.contiguous()?, &weight.detach(), epsilon)
}

/// `[H, T, D]` with column t of each head turned by the angles of row t in `cosines` and `sines`, `[T, D/2]`.
pub(super) fn rotate(x: &Tensor, cosines: &Tensor, sines: &Tensor) -> Result<Tensor> {
    rope_slow(&x.unsqueeze(0)?, cosines, sines)?.squeeze(0)
}

/// softmax(scale * x + mask) over the last axis of `x` `[H, T, S]`; `mask` is `[T, S]`.
pub(super) fn softmax(x: &Tensor, scale: f64, mask: Option<&Tensor>) -> Result<Tensor> {
    let x = (x * scale)?;
    let x = match mask {
        Some(mask) => x.broadcast_add(mask)?,
        None => x,
    };
    // Whatever is subtracted from a row, its softmax is the same: no gradient goes that way.
    let largest = x.max_keepdim(D::Minus1)?.detach();
    let powers = x.broadcast_sub(&largest)?.exp()?;
    powers.broadcast_div(&powers.sum_keepdim(D::Minus1)?)
}

struct Frozen {
    /// The operand, without its history: candle hands over storage, products want a tensor.
    x: Tensor,
    weight: CardMatrix,
}

impl CustomOp1 for Frozen {
    fn name(&self) -> &'static str {
        "frozen-card"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = self.weight.exact(&self.x)?;
        let (storage, layout) = y.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => Ok((storage.try_clone(layout)?, y.shape().clone())),
            _ => candle_core::bail!("a product on the processor lies elsewhere"),
        }
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let y = self.weight.exact(&self.x)?;
        let (storage, layout) = y.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => Ok((storage.try_clone(layout)?, y.shape().clone())),
            _ => candle_core::bail!("a product on a card lies elsewhere"),
        }
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        self.weight.transposed(gradient).map(Some)
    }
}
