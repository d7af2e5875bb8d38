//! A big table of rows that stays as stored: embeddings, and the output head.
//!
//! Gemma's 262144 x 640 table takes 178 MB as stored and 671 MB as f32, so rows are dequantised when they are looked up
//! and, for logits, in tiles that stay in the second-level cache.

use candle_core::{Device, Result, Tensor};

use super::card::CardMatrix;
use super::grad::{self, composed};
use super::linear::product;
use super::place::Compute;
use super::quant::{Kernel, QuantMatrix};
use super::weights::Precision;

/// A table `[rows, width]`, as stored in the file.
#[derive(Debug)]
pub struct RowTable {
    matrix: QuantMatrix,
    kernel: Kernel,
    /// The same rows where a card multiplies with them.
    card: Option<CardMatrix>,
}

impl RowTable {
    /// A table whose products are computed by `kernel`; with [`Kernel::Exact`] the numbers are those of the f32 table.
    pub(crate) fn new(matrix: QuantMatrix, kernel: Kernel) -> Self {
        Self { matrix, kernel, card: None }
    }

    /// The same with products on the card of `compute`, if it is one.
    pub(crate) fn on(mut self, precision: Precision, compute: &Compute) -> Result<Self> {
        if compute.is_card() {
            self.card = Some(CardMatrix::new(&self.matrix, precision, compute)?);
        }
        Ok(self)
    }

    /// Number of rows: the size of the vocabulary.
    pub fn rows(&self) -> usize {
        self.matrix.rows()
    }

    /// The rows of these ids, `[T, width]` f32.
    ///
    /// # Errors
    /// If an id is not below [`RowTable::rows`]; callers check first.
    pub fn lookup(&self, ids: &[u32]) -> Result<Tensor> {
        let values = self.rows_of(ids)?;
        Tensor::from_vec(values, (ids.len(), self.matrix.cols()), &Device::Cpu)
    }

    /// The same as a slice's worth of numbers.
    pub(crate) fn rows_of(&self, ids: &[u32]) -> Result<Vec<f32>> {
        let width = self.matrix.cols();
        let mut values = vec![0f32; ids.len() * width];
        for (id, row) in ids.iter().zip(values.chunks_mut(width)) {
            let id = *id as usize;
            if id >= self.rows() {
                candle_core::bail!("row {id} of a table of {}", self.rows());
            }
            self.matrix.dequantize_rows(id..id + 1, row);
        }
        Ok(values)
    }

    /// How its products are computed: with 8-bit activations where few tokens come, or exactly.
    pub(crate) fn kernel(&self) -> Kernel {
        self.kernel
    }

    /// The numbers.
    pub(crate) fn matrix(&self) -> &QuantMatrix {
        &self.matrix
    }

    /// Products of `x` `[T, width]` with every row: `[T, rows]` f32.
    ///
    /// # Errors
    /// Only if the width does not match.
    pub fn scores(&self, x: &Tensor) -> Result<Tensor> {
        match &self.card {
            Some(card) => card.forward(x),
            None => product(x, &self.matrix, self.kernel),
        }
    }

    /// As [`RowTable::scores`], exact, with a gradient for `x`.
    pub(crate) fn tracked_scores(&self, x: &Tensor) -> Result<Tensor> {
        match &self.card {
            Some(card) => composed::frozen(x, card),
            None => grad::frozen_stored(x, &self.matrix),
        }
    }
}
