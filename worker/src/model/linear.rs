//! A linear layer: y = x W^T + b, all f32.
//!
//! The one place that multiplies with weights, so that faster paths (weights as stored, tiles dequantised on the fly)
//! and adapters have one place to go.

use candle_core::{Result, Tensor};

/// A projection with weight `[outputs, inputs]`.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// From a weight `[outputs, inputs]` and a bias `[outputs]`, both f32.
    pub(crate) fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    /// `[T, inputs]` to `[T, outputs]`.
    ///
    /// # Errors
    /// Only if the widths do not match.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = x.matmul(&self.weight.t()?)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}
