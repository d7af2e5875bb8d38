//! A linear layer: y = x Wᵀ + b.
//!
//! The one place that multiplies with weights, so that faster paths and adapters have one place to go. Weights are f32, as the
//! file stores them, or a card's; activations and results are f32 always.

use candle_core::{Device, Result, Storage, Tensor};

use super::card::CardMatrix;
use super::frozen::Held;
use super::grad::{self, composed};
use super::place::Compute;
use super::quant::{Kernel, QuantMatrix};
use super::team::team;
use super::vector::{self, dot};

/// Weight rows that one thread takes at a time.
const ROWS_PER_TASK: usize = 64;

/// A projection with weight `[outputs, inputs]`.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
    /// The same numbers.
    bias_values: Vec<f32>,
}

#[derive(Debug, Clone)]
enum Weight {
    /// f32, the reference.
    Dense(Tensor),
    /// As stored; a fraction of the memory.
    Stored { matrix: QuantMatrix, kernel: Kernel },
    /// On a card.
    Card(CardMatrix),
}

impl Linear {
    /// From a weight `[outputs, inputs]` and a bias `[outputs]`, both f32; an empty bias is none.
    pub(crate) fn dense(weight: Tensor, bias: Vec<f32>) -> Result<Self> {
        Self::new(Weight::Dense(weight), bias)
    }

    /// From a weight `[outputs, inputs]` as stored and a bias `[outputs]` in f32; an empty bias is none.
    pub(crate) fn stored(matrix: QuantMatrix, kernel: Kernel, bias: Vec<f32>) -> Result<Self> {
        Self::new(Weight::Stored { matrix, kernel }, bias)
    }

    /// From a weight `[outputs, inputs]` on a card and a bias `[outputs]` in f32; an empty bias is none.
    pub(crate) fn card(matrix: CardMatrix, bias: Vec<f32>, compute: &Compute) -> Result<Self> {
        let mut linear = Self::new(Weight::Card(matrix), bias)?;
        linear.bias = linear.bias.map(|bias| bias.to_device(compute.device())).transpose()?;
        Ok(linear)
    }

    fn new(weight: Weight, bias_values: Vec<f32>) -> Result<Self> {
        let bias = match bias_values.is_empty() {
            true => None,
            false => Some(Tensor::from_slice(&bias_values, bias_values.len(), &Device::Cpu)?),
        };
        Ok(Self { weight, bias, bias_values })
    }

    /// `[T, inputs]` to `[T, outputs]`.
    ///
    /// # Errors
    /// Only if the widths do not match.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = match &self.weight {
            Weight::Dense(weight) if x.dim(0)? == 1 => one_row(x, weight)?,
            Weight::Dense(weight) => x.matmul(&weight.t()?)?,
            Weight::Stored { matrix, kernel } => product(x, matrix, *kernel)?,
            Weight::Card(matrix) => matrix.forward(x)?,
        };
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

impl Linear {
    /// The weight as stored, if it is, and the bias (empty: none).
    pub(crate) fn parts(&self) -> Option<(&QuantMatrix, &[f32])> {
        match &self.weight {
            Weight::Stored { matrix, .. } => Some((matrix, &self.bias_values)),
            Weight::Dense(_) | Weight::Card(_) => None,
        }
    }

    /// The weight on the processor, as products with gradients take it.
    ///
    /// # Panics
    /// If it is on a card.
    pub(crate) fn held(&self) -> Held<'_> {
        match &self.weight {
            Weight::Dense(weight) => Held::dense(weight),
            Weight::Stored { matrix, .. } => Held::Stored(matrix),
            Weight::Card(_) => unreachable!("a card's weights are multiplied there"),
        }
    }

    /// Adds the bias to each row of `[T, outputs]`.
    pub(crate) fn add_bias(&self, rows: &mut [f32]) {
        if !self.bias_values.is_empty() {
            rows.chunks_mut(self.bias_values.len()).for_each(|row| vector::add(row, &self.bias_values));
        }
    }

    /// As [`Linear::forward`], exact on stored weights too, with a gradient for `x`.
    pub(crate) fn tracked(&self, x: &Tensor) -> Result<Tensor> {
        let y = match &self.weight {
            Weight::Dense(weight) => grad::frozen_dense(x, weight)?,
            Weight::Stored { matrix, .. } => grad::frozen_stored(x, matrix)?,
            Weight::Card(matrix) => composed::frozen(x, matrix)?,
        };
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

/// `x Wᵀ` for `x` `[1, inputs]` and `W` `[outputs, inputs]`, both f32. One row is bound by memory, so weight rows are read
/// where they lie and shared out among threads.
fn one_row(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (outputs, inputs) = weight.dims2()?;
    let x = x.flatten_all()?.to_vec1::<f32>()?;
    let (storage, layout) = weight.storage_and_layout();
    let (Storage::Cpu(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
        candle_core::bail!("f32 weights are multiplied on the CPU, rows together");
    };
    if x.len() != inputs {
        candle_core::bail!("a row of {} times {:?}", x.len(), weight.shape());
    }
    let weight = &storage.as_slice::<f32>()?[start..end];
    let mut y = vec![0.0_f32; outputs];
    team().chunks(&mut y, ROWS_PER_TASK, |task, y| {
        for (row, y) in weight[task * ROWS_PER_TASK * inputs..].chunks_exact(inputs).zip(y) {
            *y = dot(row, &x);
        }
    });
    Tensor::from_vec(y, (1, outputs), &Device::Cpu)
}

/// `x Wᵀ` for `x` `[T, inputs]` and a stored `W` `[outputs, inputs]`.
pub(super) fn product(x: &Tensor, matrix: &QuantMatrix, kernel: Kernel) -> Result<Tensor> {
    let (count, width) = x.dims2()?;
    if width != matrix.cols() {
        candle_core::bail!("{:?} times {matrix:?}", x.shape());
    }
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        candle_core::bail!("stored weights are multiplied on the CPU");
    };
    let values = &storage.as_slice::<f32>()?[layout.start_offset()..][..count * width];
    let mut y = vec![0f32; count * matrix.rows()];
    matrix.matmul(values, &mut y, kernel);
    Tensor::from_vec(y, (count, matrix.rows()), &Device::Cpu)
}
