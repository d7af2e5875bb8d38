//! A big table of rows that stays quantised: embeddings, and the output head.
//!
//! Gemma's 262144 x 640 table takes 178 MB as stored and 671 MB as f32, so rows are dequantised when they are looked up
//! and, for logits, in blocks that stay in the second-level cache. The numbers are those of the dequantised table:
//! activations are never quantised here.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use super::weights::quantised;

/// Rows dequantised at a time. 64 rows of 2048 f32 are 512 KiB.
const BLOCK_ROWS: usize = 64;

/// A table `[rows, width]`, as stored in the file.
pub struct RowTable {
    /// [`BLOCK_ROWS`] rows each, the last one shorter.
    blocks: Vec<QTensor>,
    rows: usize,
    width: usize,
}

impl RowTable {
    /// From encoded rows; `bytes` must hold exactly `rows * width` values.
    pub(crate) fn new(bytes: &[u8], dtype: GgmlDType, rows: usize, width: usize) -> Result<Self> {
        let row_bytes = width / dtype.block_size() * dtype.type_size();
        if row_bytes == 0 || bytes.len() != rows * row_bytes {
            candle_core::bail!("a table of {rows} x {width} does not have {} bytes", bytes.len());
        }
        let blocks = bytes
            .chunks(BLOCK_ROWS * row_bytes)
            .map(|chunk| quantised(chunk, dtype, &[chunk.len() / row_bytes, width]))
            .collect::<Result<_>>()?;
        Ok(Self { blocks, rows, width })
    }

    /// Number of rows: the size of the vocabulary.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The rows of these ids, `[T, width]` f32.
    ///
    /// # Errors
    /// If an id is not below [`RowTable::rows`]; callers check first.
    pub fn lookup(&self, ids: &[u32]) -> Result<Tensor> {
        let mut rows = Vec::with_capacity(ids.len());
        for id in ids {
            let Some(block) = self.blocks.get(*id as usize / BLOCK_ROWS) else {
                candle_core::bail!("row {id} of a table of {}", self.rows);
            };
            rows.push(block.dequantize(&Device::Cpu)?.narrow(0, *id as usize % BLOCK_ROWS, 1)?);
        }
        Tensor::cat(&rows, 0)
    }

    /// Products of `x` `[T, width]` with every row: `[T, rows]` f32.
    ///
    /// # Errors
    /// Only if the width does not match.
    pub fn scores(&self, x: &Tensor) -> Result<Tensor> {
        let (count, width) = x.dims2()?;
        if width != self.width {
            candle_core::bail!("a table of width {} times {:?}", self.width, x.shape());
        }
        if count == 1 {
            let x = x.flatten_all()?.to_vec1::<f32>()?;
            let blocks = self.blocks.par_iter().map(|block| block_scores(block, &x)).collect::<Result<Vec<_>>>()?;
            return Tensor::from_vec(blocks.concat(), (1, self.rows), &Device::Cpu);
        }
        let columns = x.t()?;
        let blocks = self
            .blocks
            .iter()
            .map(|block| block.dequantize(&Device::Cpu)?.matmul(&columns))
            .collect::<Result<Vec<_>>>()?;
        Tensor::cat(&blocks, 0)?.t()?.contiguous()
    }

    /// True if no value is NaN or infinite.
    pub(crate) fn is_finite(&self) -> Result<bool> {
        let finite = |block: &QTensor| -> Result<bool> {
            Ok(block.dequantize(&Device::Cpu)?.sum_all()?.to_scalar::<f32>()?.is_finite())
        };
        let all = self.blocks.par_iter().map(finite).collect::<Result<Vec<_>>>()?;
        Ok(all.into_iter().all(|block| block))
    }
}

impl std::fmt::Debug for RowTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RowTable[{}, {}]", self.rows, self.width)
    }
}

fn block_scores(block: &QTensor, x: &[f32]) -> Result<Vec<f32>> {
    let rows = block.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(rows.chunks_exact(x.len()).map(|row| dot(row, x)).collect())
}

/// Inner product with sixteen running sums, which compilers turn into vector code.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0_f32; 16];
    let (a_chunks, b_chunks) = (a.chunks_exact(16), b.chunks_exact(16));
    let tail: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for lane in 0..16 {
            sums[lane] += x[lane] * y[lane];
        }
    }
    sums.iter().sum::<f32>() + tail
}
