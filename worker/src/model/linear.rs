//! A linear layer: y = x Wᵀ + b.
//!
//! The one place that multiplies with weights, so that faster paths and adapters have one place to go. Weights are either
//! f32 or as the file stores them; activations and results are f32 always.

use candle_core::{Device, Result, Tensor};

use super::quant::{Kernel, QuantMatrix};

/// A projection with weight `[outputs, inputs]`.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
}

#[derive(Debug, Clone)]
enum Weight {
    /// f32, the reference.
    Dense(Tensor),
    /// As stored; a fraction of the memory.
    Stored { matrix: QuantMatrix, kernel: Kernel },
}

impl Linear {
    /// From a weight `[outputs, inputs]` and a bias `[outputs]`, both f32.
    pub(crate) fn dense(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight: Weight::Dense(weight), bias }
    }

    /// From a weight `[outputs, inputs]` as stored and a bias `[outputs]` in f32.
    pub(crate) fn stored(matrix: QuantMatrix, kernel: Kernel, bias: Option<Tensor>) -> Self {
        Self { weight: Weight::Stored { matrix, kernel }, bias }
    }

    /// `[T, inputs]` to `[T, outputs]`.
    ///
    /// # Errors
    /// Only if the widths do not match.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = match &self.weight {
            Weight::Dense(weight) => x.matmul(&weight.t()?)?,
            Weight::Stored { matrix, kernel } => product(x, matrix, *kernel)?,
        };
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

/// `x Wᵀ` for `x` `[T, inputs]` and a stored `W` `[outputs, inputs]`.
pub(super) fn product(x: &Tensor, matrix: &QuantMatrix, kernel: Kernel) -> Result<Tensor> {
    let (count, width) = x.dims2()?;
    if width != matrix.cols() {
        candle_core::bail!("{:?} times {matrix:?}", x.shape());
    }
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    let candle_core::Storage::Cpu(storage) = &*storage else {
        candle_core::bail!("stored weights are multiplied on the CPU");
    };
    let values = &storage.as_slice::<f32>()?[layout.start_offset()..][..count * width];
    let mut y = vec![0f32; count * matrix.rows()];
    matrix.matmul(values, &mut y, kernel);
    Tensor::from_vec(y, (count, matrix.rows()), &Device::Cpu)
}
