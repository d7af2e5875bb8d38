//! Weights as a GGUF file stores them, and the two products a decoder needs with them.
//!
//! - few rows of activations (decode): activations are rounded to 8 bits a block of 32 and multiplied with the stored blocks
//!   (`dot`, SIMD chosen at run time); reads every weight byte once, so it is bound by memory.
//! - many rows (prefill): tiles of weights are dequantised to f32 and multiplied by `gemm`; exact up to f32 rounding.
//!
//! Block layouts are those of ggml (`ggml-common.h` of llama.cpp). Does not read files and knows no architecture.

mod block;
mod dot;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use block::QuantKind;
pub use dot::{Activations, Kernel};

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use protocol::memory::executor::TILE_ROWS;

use super::matrix::{Output, View};
use super::team::{team, with_scratch};

/// Rows of weights given to a thread at a time in a decode, at least: a multiple of what kernels take at once.
const DECODE_ROWS_MIN: usize = 32;
/// From this many rows of activations on, dequantising a tile once is cheaper than reading 8-bit blocks again for each row.
pub const PREFILL_ROWS_MIN: usize = 8;

/// Bytes that are not a matrix of the claimed shape.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuantError {
    /// A row is not a whole number of blocks.
    #[error("rows of {cols} values do not divide into blocks of {block} ({kind})")]
    Columns {
        /// Storage type.
        kind: QuantKind,
        /// Values a row.
        cols: usize,
        /// Values a block.
        block: usize,
    },
    /// The length does not fit the shape.
    #[error("a {rows} x {cols} matrix of {kind} has {expected} bytes, not {got}")]
    Length {
        /// Storage type.
        kind: QuantKind,
        /// Rows.
        rows: usize,
        /// Values a row.
        cols: usize,
        /// Bytes that it should have.
        expected: usize,
        /// Bytes that there are.
        got: usize,
    },
}

/// Storage that a matrix may share with a mapped file.
pub trait Storage: AsRef<[u8]> + Send + Sync {}

impl<T: AsRef<[u8]> + Send + Sync> Storage for T {}

/// A weight matrix `[rows, cols]`, row-major, in its stored blocks. Cheap to clone.
#[derive(Clone)]
pub struct QuantMatrix {
    kind: QuantKind,
    rows: usize,
    cols: usize,
    storage: Arc<dyn Storage>,
    range: Range<usize>,
}

impl std::fmt::Debug for QuantMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "QuantMatrix({} [{}, {}])", self.kind, self.rows, self.cols)
    }
}

/// Activations `[T, cols]` on their way into products: as they are and, where a kernel asks for it, rounded to 8 bits.
#[derive(Debug)]
pub struct Operand<'a> {
    x: &'a [f32],
    cols: usize,
    kernel: Kernel,
    /// One a token; empty if products take `x` as it is.
    rounded: Vec<Activations>,
}

impl<'a> Operand<'a> {
    /// Activations for matrices with `cols` values a row.
    ///
    /// # Panics
    /// If `x` is not a whole number of rows.
    pub fn new(x: &'a [f32], cols: usize, kernel: Kernel) -> Self {
        let tokens = x.len() / cols;
        assert_eq!(x.len(), tokens * cols, "x must be [T, cols]");
        // Activations come in blocks of 32; only tiny models have rows that do not.
        let exact = kernel == Kernel::Exact || tokens >= PREFILL_ROWS_MIN || !cols.is_multiple_of(dot::BLOCK);
        let rounded = if exact { Vec::new() } else { x.chunks(cols).map(Activations::quantize).collect() };
        Self { x, cols, kernel, rounded }
    }

    fn tokens(&self) -> usize {
        self.x.len() / self.cols
    }
}

/// `y = x · Wᵀ` for matrices that meet the same activations, in one loop of the team: `y` is `[T, rows]` each.
///
/// # Panics
/// If a matrix or a `y` has another shape.
#[expect(unsafe_code, reason = "tasks write columns of their own")]
pub fn products<const N: usize>(x: &Operand<'_>, targets: [(&QuantMatrix, &mut [f32]); N]) {
    let targets = targets.map(|(matrix, y)| {
        assert_eq!(matrix.cols, x.cols, "x must be [T, cols]");
        assert_eq!(y.len(), x.tokens() * matrix.rows, "y must be [T, rows]");
        let rows = matrix.piece_rows(x);
        (matrix, Output::new(y, matrix.rows), rows, matrix.rows.div_ceil(rows))
    });
    let count = targets.iter().map(|(.., pieces)| pieces).sum();
    team().each(count, |mut piece| {
        for (matrix, y, rows, pieces) in &targets {
            if piece < *pieces {
                // SAFETY: pieces do not overlap, and each is one task's.
                unsafe { matrix.multiply(piece * rows..((piece + 1) * rows).min(matrix.rows), x, y) };
                return;
            }
            piece -= pieces;
        }
    });
}

impl QuantMatrix {
    /// A matrix in the bytes `range` of `storage`.
    ///
    /// # Errors
    /// If the shape does not fit the type or the length.
    pub fn new(
        kind: QuantKind,
        rows: usize,
        cols: usize,
        storage: Arc<dyn Storage>,
        range: Range<usize>,
    ) -> Result<Self, QuantError> {
        if !cols.is_multiple_of(kind.block_values()) {
            return Err(QuantError::Columns { kind, cols, block: kind.block_values() });
        }
        let expected = rows.saturating_mul(kind.row_bytes(cols));
        let got = (*storage).as_ref().get(range.clone()).map_or(0, <[u8]>::len);
        if got != expected {
            return Err(QuantError::Length { kind, rows, cols, expected, got });
        }
        Ok(Self { kind, rows, cols, storage, range })
    }

    /// Storage type.
    pub fn kind(&self) -> QuantKind {
        self.kind
    }

    /// Number of rows: outputs of a linear layer.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values a row: inputs of a linear layer.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes that the matrix takes.
    pub fn bytes(&self) -> usize {
        self.range.len()
    }

    /// The blocks of these rows.
    ///
    /// # Panics
    /// If a row does not exist.
    pub(crate) fn row_bytes(&self, rows: Range<usize>) -> &[u8] {
        let row = self.kind.row_bytes(self.cols);
        &(*self.storage).as_ref()[self.range.clone()][rows.start * row..rows.end * row]
    }

    /// True if no value is NaN or infinite.
    pub fn is_finite(&self) -> bool {
        let finite = AtomicBool::new(true);
        team().each(self.rows.div_ceil(TILE_ROWS), |tile| {
            let rows = tile * TILE_ROWS..((tile + 1) * TILE_ROWS).min(self.rows);
            with_scratch(rows.len() * self.cols, |values| {
                self.dequantize_rows(rows, values);
                if !values.iter().all(|value| value.is_finite()) {
                    finite.store(false, Ordering::Relaxed);
                }
            });
        });
        finite.into_inner()
    }

    /// The same matrix with row `order[i]` in place `i`; moves whole rows and never requantises.
    ///
    /// # Panics
    /// If `order` names a row that does not exist.
    #[must_use]
    pub fn with_row_order(&self, order: &[usize]) -> Self {
        // To the byte: collected one by one they would take up to twice their size for as long as the model is loaded.
        let mut bytes = Vec::with_capacity(order.len() * self.kind.row_bytes(self.cols));
        order.iter().for_each(|row| bytes.extend_from_slice(self.row(*row)));
        let range = 0..bytes.len();
        Self { kind: self.kind, rows: order.len(), cols: self.cols, storage: Arc::new(bytes), range }
    }

    /// Writes rows `rows` as f32 to `out`, `[rows, cols]`.
    ///
    /// # Panics
    /// If a row does not exist or `out` has another length.
    pub fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        self.dequantize_tile(rows, 0..self.cols, out);
    }

    /// Writes columns `cols`, whole blocks, of rows `rows` as f32 to `out`, `[rows, cols]`.
    ///
    /// # Panics
    /// If a row or column does not exist, `cols` cuts a block, or `out` has another length.
    pub fn dequantize_tile(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        let block = self.kind.block_values();
        assert!(cols.start.is_multiple_of(block) && cols.len().is_multiple_of(block), "blocks are whole");
        assert!(cols.end <= self.cols && rows.end <= self.rows, "the tile lies inside the matrix");
        assert_eq!(out.len(), rows.len() * cols.len(), "out must be [rows, cols]");
        let part = self.kind.row_bytes(cols.start)..self.kind.row_bytes(cols.end);
        let rows = rows.map(|row| &self.row(row)[part.clone()]);
        block::dequantize(self.kind, rows, cols.len(), out);
    }

    /// `y = x · Wᵀ` for `x: [T, cols]` and `y: [T, rows]`. Below [`PREFILL_ROWS_MIN`] rows the activations are rounded to 8
    /// bits unless `kernel` is [`Kernel::Exact`].
    ///
    /// # Panics
    /// If `x` or `y` has another length.
    pub fn matmul(&self, x: &[f32], y: &mut [f32], kernel: Kernel) {
        products(&Operand::new(x, self.cols, kernel), [(self, y)]);
    }

    /// Rows that one task takes: a tile, or enough to hide the hand-over.
    fn piece_rows(&self, x: &Operand<'_>) -> usize {
        match x.rounded.is_empty() {
            true => TILE_ROWS,
            false => self.rows.div_ceil(4 * team().size()).next_multiple_of(DECODE_ROWS_MIN),
        }
    }

    /// Columns `rows` of y.
    ///
    /// # Safety
    /// No other task writes these columns meanwhile.
    #[expect(unsafe_code, reason = "columns of a row-major matrix are not disjoint slices")]
    unsafe fn multiply(&self, rows: Range<usize>, x: &Operand<'_>, y: &Output<'_>) {
        if x.rounded.is_empty() {
            with_scratch(rows.len() * self.cols, |tile| {
                self.dequantize_rows(rows.clone(), tile);
                let weights = View::new(tile, [rows.len(), self.cols], self.cols).transposed();
                let x = View::new(x.x, [x.tokens(), self.cols], self.cols);
                // SAFETY: the caller's.
                unsafe { y.multiply((0, rows.start), false, 1.0, x, weights) };
            });
            return;
        }
        // All tokens of these rows, so that a row is read from memory once.
        let row_bytes = self.kind.row_bytes(self.cols);
        let bytes = &(*self.storage).as_ref()[self.range.clone()][rows.start * row_bytes..rows.end * row_bytes];
        for (token, activations) in x.rounded.iter().enumerate() {
            // SAFETY: the caller's.
            let y = unsafe { y.part(token, rows.clone()) };
            dot::dot_rows(x.kernel, self.kind, bytes, row_bytes, activations, y);
        }
    }

    fn row(&self, row: usize) -> &[u8] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let bytes = self.kind.row_bytes(self.cols);
        &(*self.storage).as_ref()[self.range.clone()][row * bytes..][..bytes]
    }
}

#[cfg(test)]
mod tests;
