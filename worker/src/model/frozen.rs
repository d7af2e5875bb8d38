//! A frozen weight as products with gradients read it: f32 where it lies, or stored and dequantised tile by tile.
//!
//! Cheap views; nothing is copied and no gradient goes to a weight. Does not multiply (`panel`).

use std::ops::{Deref, Range};

use candle_core::{Layout, Result, Storage, Tensor};

use super::matrix::View;
use super::quant::QuantMatrix;
use super::team::with_scratch;

/// Keeps a weight's numbers where they are while somebody looks at them.
pub(crate) enum Held<'a> {
    Dense(Box<dyn Deref<Target = Storage> + 'a>, &'a Layout),
    Stored(&'a QuantMatrix),
}

/// A weight `[outputs, inputs]`, or some of its rows.
#[derive(Clone, Copy)]
pub(crate) enum Frozen<'a> {
    Dense(View<'a>),
    Stored { matrix: &'a QuantMatrix, first: usize, rows: usize },
}

impl<'a> Held<'a> {
    /// A dense f32 weight `[outputs, inputs]` on the CPU, rows after each other.
    pub(crate) fn dense(weight: &'a Tensor) -> Self {
        let (storage, layout) = weight.storage_and_layout();
        Self::Dense(Box::new(storage), layout)
    }

    /// The weight.
    ///
    /// # Errors
    /// If a dense one lies elsewhere or is not in order.
    pub(crate) fn frozen(&self) -> Result<Frozen<'_>> {
        match self {
            Self::Stored(matrix) => Ok(Frozen::Stored { matrix, first: 0, rows: matrix.rows() }),
            Self::Dense(storage, layout) => {
                let (outputs, inputs) = layout.shape().dims2()?;
                let (Storage::Cpu(storage), Some((start, end))) = (&***storage, layout.contiguous_offsets()) else {
                    candle_core::bail!("f32 weights are multiplied on the CPU, rows together");
                };
                Ok(Frozen::Dense(View::new(&storage.as_slice::<f32>()?[start..end], [outputs, inputs], inputs)))
            }
        }
    }
}

impl Frozen<'_> {
    pub(crate) fn outputs(&self) -> usize {
        match self {
            Self::Dense(view) => view.rows,
            Self::Stored { rows, .. } => *rows,
        }
    }

    pub(crate) fn inputs(&self) -> usize {
        match self {
            Self::Dense(view) => view.cols,
            Self::Stored { matrix, .. } => matrix.cols(),
        }
    }

    /// Some of the rows.
    #[must_use]
    pub(crate) fn part(self, rows: Range<usize>) -> Self {
        match self {
            Self::Dense(view) => Self::Dense(view.part(rows)),
            Self::Stored { matrix, first, .. } => Self::Stored { matrix, first: first + rows.start, rows: rows.len() },
        }
    }

    /// Inputs that can only be had together: tiles begin and end at multiples of it.
    pub(crate) fn block(&self) -> usize {
        match self {
            Self::Dense(_) => 1,
            Self::Stored { matrix, .. } => matrix.kind().block_values(),
        }
    }

    /// Lends a tile in f32.
    pub(crate) fn tile<R>(&self, rows: Range<usize>, cols: Range<usize>, work: impl FnOnce(View<'_>) -> R) -> R {
        match self {
            Self::Dense(view) => work(view.part(rows).columns(cols)),
            Self::Stored { matrix, first, .. } => with_scratch(rows.len() * cols.len(), |values| {
                let shape = [rows.len(), cols.len()];
                matrix.dequantize_tile(first + rows.start..first + rows.end, cols, values);
                work(View::new(values, shape, shape[1]))
            }),
        }
    }
}
