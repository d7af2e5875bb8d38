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

use rayon::prelude::*;

/// Rows of weights dequantised at a time in a prefill: 64 × 2048 f32 are half of a small core's L2.
const TILE_ROWS: usize = 64;
/// Rows of weights given to a thread at a time in a decode: enough work to hide the hand-over.
const DECODE_ROWS_MIN: usize = 64;
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

    /// True if no value is NaN or infinite.
    pub fn is_finite(&self) -> bool {
        (0..self.rows).into_par_iter().step_by(TILE_ROWS).all(|first| {
            let rows = first..(first + TILE_ROWS).min(self.rows);
            let mut values = vec![0f32; rows.len() * self.cols];
            self.dequantize_rows(rows, &mut values);
            values.iter().all(|value| value.is_finite())
        })
    }

    /// The same matrix with row `order[i]` in place `i`; moves whole rows and never requantises.
    ///
    /// # Panics
    /// If `order` names a row that does not exist.
    #[must_use]
    pub fn with_row_order(&self, order: &[usize]) -> Self {
        let bytes: Vec<u8> = order.iter().flat_map(|row| self.row(*row)).copied().collect();
        let range = 0..bytes.len();
        Self { kind: self.kind, rows: order.len(), cols: self.cols, storage: Arc::new(bytes), range }
    }

    /// Writes rows `rows` as f32 to `out`, `[rows, cols]`.
    ///
    /// # Panics
    /// If a row does not exist or `out` has another length.
    pub fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        assert_eq!(out.len(), rows.len() * self.cols, "out must be [rows, cols]");
        for (row, out) in rows.zip(out.chunks_mut(self.cols)) {
            block::dequantize(self.kind, self.row(row), out);
        }
    }

    /// `y = x · Wᵀ` for `x: [T, cols]` and `y: [T, rows]`, on rayon's current pool. Below [`PREFILL_ROWS_MIN`] rows the
    /// activations are rounded to 8 bits unless `kernel` is [`Kernel::Exact`].
    ///
    /// # Panics
    /// If `x` or `y` has another length.
    pub fn matmul(&self, x: &[f32], y: &mut [f32], kernel: Kernel) {
        let tokens = x.len() / self.cols;
        assert_eq!(x.len(), tokens * self.cols, "x must be [T, cols]");
        assert_eq!(y.len(), tokens * self.rows, "y must be [T, rows]");
        match kernel {
            Kernel::Exact => self.matmul_tiles(x, y, tokens),
            _ if tokens >= PREFILL_ROWS_MIN => self.matmul_tiles(x, y, tokens),
            // Activations come in blocks of 32; only tiny models have rows that do not.
            _ if !self.cols.is_multiple_of(QuantKind::Q8_0.block_values()) => self.matmul_tiles(x, y, tokens),
            _ => self.matmul_blocks(x, y, tokens, kernel),
        }
    }

    /// `x = y · W` for `y: [T, rows]` and `x: [T, cols]`: what [`QuantMatrix::matmul`] hands back to its activations as a
    /// gradient. Exact up to f32 rounding; the same bits for the same number of threads.
    ///
    /// # Panics
    /// If `x` or `y` has another length.
    pub fn matmul_transposed(&self, y: &[f32], x: &mut [f32]) {
        let tokens = y.len() / self.rows;
        assert_eq!(y.len(), tokens * self.rows, "y must be [T, rows]");
        assert_eq!(x.len(), tokens * self.cols, "x must be [T, cols]");
        let tiles = self.rows.div_ceil(TILE_ROWS);
        let share = tiles.div_ceil(rayon::current_num_threads());
        // Every thread sums up its own tiles; the sums are added in order.
        let sums: Vec<Vec<f32>> = (0..tiles)
            .into_par_iter()
            .step_by(share)
            .map(|first| {
                let mut sum = vec![0f32; x.len()];
                let mut tile = vec![0f32; TILE_ROWS * self.cols];
                for index in first..(first + share).min(tiles) {
                    let rows = index * TILE_ROWS..((index + 1) * TILE_ROWS).min(self.rows);
                    let weights = &mut tile[..rows.len() * self.cols];
                    self.dequantize_rows(rows.clone(), weights);
                    add_product(&mut sum, (y, self.rows, rows.start), weights, tokens, self.cols);
                }
                sum
            })
            .collect();
        x.fill(0.0);
        for sum in sums {
            x.iter_mut().zip(sum).for_each(|(x, sum)| *x += sum);
        }
    }

    /// Tiles of weights to f32, then `gemm`: yᵀ[tile, T] = W[tile, cols] · xᵀ[cols, T].
    fn matmul_tiles(&self, x: &[f32], y: &mut [f32], tokens: usize) {
        let out = OutputColumns::new(y, self.rows);
        let tiles = self.rows.div_ceil(TILE_ROWS);
        (0..tiles).into_par_iter().for_each_init(
            || vec![0f32; TILE_ROWS * self.cols],
            |tile, index| {
                let rows = index * TILE_ROWS..((index + 1) * TILE_ROWS).min(self.rows);
                let weights = &mut tile[..rows.len() * self.cols];
                self.dequantize_rows(rows.clone(), weights);
                out.multiply(rows, weights, x, tokens, self.cols);
            },
        );
    }

    /// Stored blocks against activations rounded to 8 bits.
    fn matmul_blocks(&self, x: &[f32], y: &mut [f32], tokens: usize, kernel: Kernel) {
        let activations: Vec<_> = x.chunks(self.cols).map(Activations::quantize).collect();
        let row_bytes = self.kind.row_bytes(self.cols);
        let bytes = &(*self.storage).as_ref()[self.range.clone()];
        if tokens == 1 {
            let chunk = self.rows.div_ceil(rayon::current_num_threads()).max(DECODE_ROWS_MIN);
            y.par_chunks_mut(chunk).zip(bytes.par_chunks(chunk * row_bytes)).for_each(|(y, rows)| {
                dot::dot_rows(kernel, self.kind, rows, row_bytes, &activations[0], y);
            });
            return;
        }
        // Each thread takes all tokens of its rows, so that a row is read from memory once.
        let rows: Vec<Vec<f32>> = bytes
            .par_chunks(DECODE_ROWS_MIN * row_bytes)
            .map(|rows| {
                let count = rows.len() / row_bytes;
                let mut out = vec![0f32; tokens * count];
                for (row, weights) in rows.chunks(row_bytes).enumerate() {
                    for (token, activation) in activations.iter().enumerate() {
                        let place = token * count + row;
                        dot::dot_rows(kernel, self.kind, weights, row_bytes, activation, &mut out[place..=place]);
                    }
                }
                out
            })
            .collect();
        let mut first = 0;
        for chunk in rows {
            let count = chunk.len() / tokens;
            for (token, values) in chunk.chunks(count).enumerate() {
                y[token * self.rows + first..][..count].copy_from_slice(values);
            }
            first += count;
        }
    }

    fn row(&self, row: usize) -> &[u8] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let bytes = self.kind.row_bytes(self.cols);
        &(*self.storage).as_ref()[self.range.clone()][row * bytes..][..bytes]
    }
}

/// `sum += y · W` for `sum: [tokens, cols]`, `W: [tile, cols]`, and as many columns of `y: [tokens, rows]` from `first` on.
#[expect(unsafe_code, reason = "gemm takes pointers and strides")]
fn add_product(sum: &mut [f32], (y, rows, first): (&[f32], usize, usize), weights: &[f32], tokens: usize, cols: usize) {
    let stride = |n: usize| isize::try_from(n).expect("a matrix fits the address space");
    let tile = weights.len() / cols;
    assert!(sum.len() == tokens * cols && y.len() == tokens * rows && first + tile <= rows, "shapes must match");
    // SAFETY: the assertion holds every access inside the three slices, of which only `sum` is written.
    unsafe {
        gemm::gemm(
            tokens,
            cols,
            tile,
            sum.as_mut_ptr(),
            1,
            stride(cols),
            true,
            y.as_ptr().add(first),
            1,
            stride(rows),
            weights.as_ptr(),
            1,
            stride(cols),
            1f32,
            1f32,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// An output `[T, rows]` whose columns are written by several threads, each its own.
struct OutputColumns {
    start: *mut f32,
    rows: usize,
}

// SAFETY: threads write disjoint columns (matmul_tiles gives each tile to one thread), and the slice outlives them.
#[expect(unsafe_code, reason = "columns of a row-major matrix cannot be split into disjoint slices")]
unsafe impl Sync for OutputColumns {}

impl OutputColumns {
    fn new(y: &mut [f32], rows: usize) -> Self {
        Self { start: y.as_mut_ptr(), rows }
    }

    /// Writes columns `columns` of y: `W · xᵀ` with `weights: [columns, cols]`, `x: [tokens, cols]`.
    #[expect(unsafe_code, reason = "gemm takes pointers and strides")]
    fn multiply(&self, columns: Range<usize>, weights: &[f32], x: &[f32], tokens: usize, cols: usize) {
        let stride = |n: usize| isize::try_from(n).expect("a matrix fits the address space");
        // SAFETY: weights is [columns, cols], x is [tokens, cols], y is [tokens, rows] with columns inside rows; the three do
        // not overlap, and no other thread writes these columns.
        unsafe {
            gemm::gemm(
                columns.len(),
                tokens,
                cols,
                self.start.add(columns.start),
                stride(self.rows),
                1,
                false,
                weights.as_ptr(),
                1,
                stride(cols),
                x.as_ptr(),
                stride(cols),
                1,
                0f32,
                1f32,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    }
}

#[cfg(test)]
mod tests;
