//! Takes tensors out of a GGUF file by name, in the canonical layout, and notices the ones nobody took.
//!
//! Vectors come out as f32, tables of rows as stored, projections as [`Precision`] says. This is the one place that knows
//! file formats; a loader of safetensors would offer the same methods. Does not know which names a family has.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{Device, Tensor};

use super::error::ModelError;
use super::gguf::{Gguf, GgufError, TensorInfo};
use super::linear::Linear;
use super::quant::{Kernel, QuantKind, QuantMatrix};
use super::table::RowTable;

/// How projections are held and multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// Dequantised to f32 when loaded: the referee of the other.
    #[default]
    F32,
    /// As stored. Many tokens at once: dequantised by tiles, exact up to f32 rounding. Few tokens: activations rounded to 8
    /// bits a block of 32, as llama.cpp does it.
    Stored,
}

/// Tensors of one open file.
#[derive(Debug)]
pub(crate) struct Weights<'a> {
    gguf: &'a Gguf,
    precision: Precision,
    kernel: Kernel,
    used: BTreeSet<String>,
}

/// A weight could not be taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WeightError {
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl<'a> Weights<'a> {
    pub(crate) fn new(gguf: &'a Gguf, precision: Precision) -> Self {
        let kernel = match precision {
            Precision::F32 => Kernel::Exact,
            Precision::Stored => Kernel::best(),
        };
        Self { gguf, precision, kernel, used: BTreeSet::new() }
    }

    /// True if the file holds a tensor of that name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.gguf.tensors.contains_key(name)
    }

    /// A vector `[n]`, as numbers; `n` from the file where `expected` is None.
    pub(crate) fn vector(&mut self, name: &str, expected: Option<usize>) -> Result<Vec<f32>, WeightError> {
        let info = self.info(name)?;
        let length = expected.unwrap_or_else(|| info.shape.iter().product());
        self.shape(name, info, &[length])?;
        Ok(self.dequantise(name, info)?.to_vec1()?)
    }

    /// A vector `[n]`, as a tensor.
    pub(crate) fn norm(&mut self, name: &str, size: usize) -> Result<Tensor, WeightError> {
        Ok(Tensor::from_vec(self.vector(name, Some(size))?, size, &Device::Cpu)?)
    }

    /// A projection `[outputs, inputs]` named `{name}.weight`, with `{name}.bias` if wanted.
    ///
    /// `permuted_head`: rows are stored for rotation of adjacent pairs in heads of that size, and are put back to halves.
    pub(crate) fn linear(
        &mut self,
        name: &str,
        [outputs, inputs]: [usize; 2],
        bias: bool,
        permuted_head: Option<usize>,
    ) -> Result<Linear, WeightError> {
        let weight_name = format!("{name}.weight");
        let info = self.info(&weight_name)?;
        self.shape(&weight_name, info, &[outputs, inputs])?;
        let order = permuted_head.map(|head_dim| halves_order(outputs, head_dim));
        let bias = match bias {
            false => None,
            true => {
                let mut values = self.vector(&format!("{name}.bias"), Some(outputs))?;
                if let Some(order) = &order {
                    values = order.iter().map(|row| values[*row]).collect();
                }
                Some(Tensor::from_vec(values, outputs, &Device::Cpu)?)
            }
        };
        if self.precision == Precision::Stored {
            let matrix = self.stored(&weight_name, info)?;
            let matrix = order.map_or(matrix.clone(), |order| matrix.with_row_order(&order));
            return Ok(Linear::stored(matrix, self.kernel, bias));
        }
        let mut weight = self.dequantise(&weight_name, info)?;
        if let Some(order) = order {
            let order: Vec<_> = order.into_iter().map(|row| row as u32).collect();
            weight = weight.index_select(&Tensor::new(order, &Device::Cpu)?, 0)?;
        }
        Ok(Linear::dense(weight, bias))
    }

    /// A table `[rows, width]` that stays as stored; rows from the file.
    pub(crate) fn table(&mut self, name: &str, width: usize) -> Result<RowTable, WeightError> {
        let info = self.info(name)?;
        let rows = info.shape.first().copied().unwrap_or(0);
        self.shape(name, info, &[rows, width])?;
        Ok(RowTable::new(self.stored(name, info)?, self.kernel))
    }

    /// Refuses a file with tensors that nothing asked for: it is not the model its metadata claims.
    pub(crate) fn finish(self) -> Result<(), WeightError> {
        let mut unused = self.gguf.tensors.keys().filter(|name| !self.used.contains(*name));
        match unused.next() {
            None => Ok(()),
            Some(first) => {
                let count = 1 + unused.count();
                Err(ModelError::UnusedTensors { count, first: first.clone() }.into())
            }
        }
    }

    fn info(&mut self, name: &str) -> Result<&'a TensorInfo, WeightError> {
        let info = self.gguf.tensors.get(name).ok_or_else(|| ModelError::MissingTensor { name: name.to_owned() })?;
        self.used.insert(name.to_owned());
        Ok(info)
    }

    fn shape(&self, name: &str, info: &TensorInfo, expected: &[usize]) -> Result<(), WeightError> {
        if info.shape == expected {
            return Ok(());
        }
        let (expected, got) = (expected.to_vec(), info.shape.clone());
        Err(ModelError::TensorShape { name: name.to_owned(), expected, got }.into())
    }

    /// A matrix as it lies in the file.
    fn stored(&self, name: &str, info: &TensorInfo) -> Result<QuantMatrix, WeightError> {
        let &[rows, cols] = info.shape.as_slice() else { unreachable!("callers have checked the shape") };
        let bytes = self.gguf.bytes_of(info)?;
        let range = 0..bytes.len();
        let kind = kind(info.dtype)
            .ok_or_else(|| ModelError::StoredType { name: name.to_owned(), dtype: format!("{:?}", info.dtype) })?;
        let matrix = QuantMatrix::new(kind, rows, cols, Arc::new(bytes), range)
            .map_err(|source| ModelError::StoredShape { name: name.to_owned(), source })?;
        if matrix.is_finite() { Ok(matrix) } else { Err(ModelError::NotFinite { name: name.to_owned() }.into()) }
    }

    fn dequantise(&self, name: &str, info: &TensorInfo) -> Result<Tensor, WeightError> {
        let bytes = self.gguf.bytes_of(info)?;
        let tensor = quantised(&bytes, info.dtype, &info.shape)?.dequantize(&Device::Cpu)?;
        // A sum is finite exactly if all terms are, short of an overflow that no model's weights come near.
        if tensor.sum_all()?.to_scalar::<f32>()?.is_finite() {
            Ok(tensor)
        } else {
            Err(ModelError::NotFinite { name: name.to_owned() }.into())
        }
    }
}

/// Encoded values as candle holds them.
fn quantised(bytes: &[u8], dtype: GgmlDType, shape: &[usize]) -> candle_core::Result<QTensor> {
    let storage = QStorage::from_data(Cow::Borrowed(bytes), &Device::Cpu, dtype)?;
    QTensor::new(storage, shape)
}

/// Our name of a storage type; `None` for the two that only activations have.
fn kind(dtype: GgmlDType) -> Option<QuantKind> {
    Some(match dtype {
        GgmlDType::F32 => QuantKind::F32,
        GgmlDType::F16 => QuantKind::F16,
        GgmlDType::BF16 => QuantKind::Bf16,
        GgmlDType::Q4_0 => QuantKind::Q4_0,
        GgmlDType::Q4_1 => QuantKind::Q4_1,
        GgmlDType::Q5_0 => QuantKind::Q5_0,
        GgmlDType::Q5_1 => QuantKind::Q5_1,
        GgmlDType::Q8_0 => QuantKind::Q8_0,
        GgmlDType::Q2K => QuantKind::Q2K,
        GgmlDType::Q3K => QuantKind::Q3K,
        GgmlDType::Q4K => QuantKind::Q4K,
        GgmlDType::Q5K => QuantKind::Q5K,
        GgmlDType::Q6K => QuantKind::Q6K,
        GgmlDType::Q8_1 | GgmlDType::Q8K => return None,
    })
}

/// For each row in the halves layout, the row that holds it in a file permuted for adjacent pairs:
/// `halves[h * D + j * D/2 + i] = file[h * D + 2 * i + j]`.
fn halves_order(rows: usize, head_dim: usize) -> Vec<usize> {
    let half = head_dim / 2;
    (0..rows)
        .map(|row| {
            let (head, inside) = (row / head_dim, row % head_dim);
            let (j, i) = (inside / half, inside % half);
            head * head_dim + 2 * i + j
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_come_from_adjacent_rows() {
        assert_eq!(halves_order(8, 4), [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(halves_order(6, 6), [0, 2, 4, 1, 3, 5]);
    }
}
