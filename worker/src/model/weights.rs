//! Takes a model's weights out of its file, in the canonical layout, and notices the ones nobody took.
//!
//! One interface, two sources: GGUF, and directories in Hugging Face's layout. Vectors come out as f32, tables of rows as
//! stored, projections as [`Precision`] says. What the two kinds of file do differently ends here: names, the order of rows
//! in q and k, norms that leave out their 1. Does not know which weights a family has.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{Device, Tensor};

use super::card::CardMatrix;
use super::error::ModelError;
use super::family::Family;
use super::gguf::{Gguf, GgufError, TensorInfo};
use super::hf::Checkpoint;
use super::linear::Linear;
use super::names::{Naming, Part};
use super::place::Compute;
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

/// Where weights lie.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Source<'a> {
    Gguf(&'a Gguf),
    /// `tied`: the directory's settings say that the head is the embedding.
    Checkpoint {
        files: &'a Checkpoint,
        tied: bool,
    },
}

/// Weights of one open model.
#[derive(Debug)]
pub(crate) struct Weights<'a> {
    source: Source<'a>,
    family: Family,
    precision: Precision,
    compute: Compute,
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
    pub(crate) fn new(source: Source<'a>, family: Family, precision: Precision, compute: &Compute) -> Self {
        let kernel = match precision {
            Precision::F32 => Kernel::Exact,
            Precision::Stored => Kernel::best(),
        };
        Self { source, family, precision, compute: compute.clone(), kernel, used: BTreeSet::new() }
    }

    /// What RoPE's frequencies are divided by, `[n]`, where the file holds that.
    pub(crate) fn rope_divisors(&mut self) -> Result<Option<Vec<f32>>, WeightError> {
        let name = self.name(Part::RopeDivisors, "weight");
        match self.source.tensor(&name).map(|info| info.shape.iter().product()) {
            Some(length) => self.vector(&name, length).map(Some),
            None => Ok(None),
        }
    }

    /// The factors of an RMS norm, `[n]`.
    pub(crate) fn norm(&mut self, part: Part, size: usize) -> Result<Vec<f32>, WeightError> {
        let mut values = self.vector(&self.name(part, "weight"), size)?;
        if let Source::Checkpoint { .. } = self.source {
            values.iter_mut().for_each(|value| *value += self.family.norm_offset);
        }
        Ok(values)
    }

    /// How projections are held.
    pub(crate) fn precision(&self) -> Precision {
        self.precision
    }

    /// Where they go.
    pub(crate) fn compute(&self) -> &Compute {
        &self.compute
    }

    /// A projection `[outputs, inputs]`, with its bias if wanted.
    ///
    /// `head_dim`: the projection makes rotated heads of that size; their rows come out in halves.
    pub(crate) fn linear(
        &mut self,
        part: Part,
        [outputs, inputs]: [usize; 2],
        bias: bool,
        head_dim: Option<usize>,
    ) -> Result<Linear, WeightError> {
        let name = self.name(part, "weight");
        let info = self.take(&name)?;
        check_shape(&name, &info, &[outputs, inputs])?;
        let permuted = matches!(self.source, Source::Gguf(_)) && self.family.permuted;
        let order = head_dim.filter(|_| permuted).map(|head_dim| halves_order(outputs, head_dim));
        let bias = match bias {
            false => Vec::new(),
            true => {
                let mut values = self.vector(&self.name(part, "bias"), outputs)?;
                if let Some(order) = &order {
                    values = order.iter().map(|row| values[*row]).collect();
                }
                values
            }
        };
        if self.precision == Precision::Stored || self.compute.is_card() {
            let matrix = self.stored(&name, &info)?;
            let matrix = order.map_or(matrix.clone(), |order| matrix.with_row_order(&order));
            if self.compute.is_card() {
                let matrix = CardMatrix::new(&matrix, self.precision, &self.compute)?;
                return Ok(Linear::card(matrix, bias, &self.compute)?);
            }
            return Ok(Linear::stored(matrix, self.kernel, bias)?);
        }
        let mut weight = self.dequantise(&name, &info)?;
        if let Some(order) = order {
            let order: Vec<_> = order.into_iter().map(|row| row as u32).collect();
            weight = weight.index_select(&Tensor::new(order, &Device::Cpu)?, 0)?;
        }
        Ok(Linear::dense(weight, bias)?)
    }

    /// The embedding `[vocabulary, width]`, as stored; the number of rows from the file.
    pub(crate) fn embedding(&mut self, width: usize) -> Result<RowTable, WeightError> {
        let name = self.name(Part::Embedding, "weight");
        self.table(&name, width)
    }

    /// The output head `[vocabulary, width]`, as stored; `None` if it is the embedding.
    pub(crate) fn head(&mut self, width: usize) -> Result<Option<RowTable>, WeightError> {
        let name = self.name(Part::Head, "weight");
        match (self.source, self.source.tensor(&name)) {
            (Source::Gguf(_) | Source::Checkpoint { tied: true, .. }, None) => Ok(None),
            (Source::Checkpoint { tied: true, .. }, Some(info)) => {
                self.used.insert(name.clone());
                let embedding_name = self.name(Part::Embedding, "weight");
                let embedding = self.take(&embedding_name)?;
                if self.bytes_of(&name, &info)? == self.bytes_of(&embedding_name, &embedding)? {
                    return Ok(None);
                }
                let (key, value) = ("tie_word_embeddings".to_owned(), "true".to_owned());
                Err(ModelError::Unsupported { key, value, why: "the file has a head that is not the embedding" }.into())
            }
            _ => self.table(&name, width).map(Some),
        }
    }

    /// Refuses a file with tensors that nothing asked for: it is not the model its settings claim.
    pub(crate) fn finish(self) -> Result<(), WeightError> {
        let names: Vec<&str> = match self.source {
            Source::Gguf(gguf) => gguf.tensors.keys().map(String::as_str).collect(),
            Source::Checkpoint { files, .. } => files.tensors().map(|(name, _)| name).collect(),
        };
        let mut unused = names.into_iter().filter(|name| !self.used.contains(*name));
        match unused.next() {
            None => Ok(()),
            Some(first) => {
                let (count, first) = (1 + unused.count(), first.to_owned());
                Err(ModelError::UnusedTensors { count, first }.into())
            }
        }
    }

    /// A part's tensor as the file calls it.
    pub(crate) fn name(&self, part: Part, kind: &str) -> String {
        let naming = match self.source {
            Source::Gguf(_) => Naming::Gguf,
            Source::Checkpoint { .. } => Naming::HuggingFace,
        };
        format!("{}.{kind}", part.name(naming, &self.family))
    }

    fn vector(&mut self, name: &str, length: usize) -> Result<Vec<f32>, WeightError> {
        let info = self.take(name)?;
        check_shape(name, &info, &[length])?;
        Ok(self.dequantise(name, &info)?.to_vec1()?)
    }

    fn table(&mut self, name: &str, width: usize) -> Result<RowTable, WeightError> {
        let info = self.take(name)?;
        let rows = info.shape.first().copied().unwrap_or(0);
        check_shape(name, &info, &[rows, width])?;
        Ok(RowTable::new(self.stored(name, &info)?, self.kernel))
    }

    fn take(&mut self, name: &str) -> Result<TensorInfo, WeightError> {
        let info = self.source.tensor(name).ok_or_else(|| ModelError::MissingTensor { name: name.to_owned() })?;
        self.used.insert(name.to_owned());
        Ok(info)
    }

    fn bytes_of(&self, name: &str, info: &TensorInfo) -> Result<Vec<u8>, WeightError> {
        match self.source {
            Source::Gguf(gguf) => Ok(gguf.bytes_of(info)?),
            Source::Checkpoint { files, .. } => Ok(files.bytes_of(name)?),
        }
    }

    /// A matrix as it lies in the file.
    fn stored(&self, name: &str, info: &TensorInfo) -> Result<QuantMatrix, WeightError> {
        let &[rows, cols] = info.shape.as_slice() else { unreachable!("callers have checked the shape") };
        let bytes = self.bytes_of(name, info)?;
        let range = 0..bytes.len();
        let kind = kind(info.dtype)
            .ok_or_else(|| ModelError::StoredType { name: name.to_owned(), dtype: format!("{:?}", info.dtype) })?;
        let matrix = QuantMatrix::new(kind, rows, cols, Arc::new(bytes), range)
            .map_err(|source| ModelError::StoredShape { name: name.to_owned(), source })?;
        if matrix.is_finite() { Ok(matrix) } else { Err(ModelError::NotFinite { name: name.to_owned() }.into()) }
    }

    fn dequantise(&self, name: &str, info: &TensorInfo) -> Result<Tensor, WeightError> {
        let bytes = self.bytes_of(name, info)?;
        let tensor = quantised(&bytes, info.dtype, &info.shape)?.dequantize(&Device::Cpu)?;
        // A sum is finite exactly if all terms are, short of an overflow that no model's weights come near.
        if tensor.sum_all()?.to_scalar::<f32>()?.is_finite() {
            Ok(tensor)
        } else {
            Err(ModelError::NotFinite { name: name.to_owned() }.into())
        }
    }
}

impl Source<'_> {
    fn tensor(&self, name: &str) -> Option<TensorInfo> {
        match self {
            Self::Gguf(gguf) => gguf.tensors.get(name).cloned(),
            Self::Checkpoint { files, .. } => files.tensor(name).cloned(),
        }
    }
}

fn check_shape(name: &str, info: &TensorInfo, expected: &[usize]) -> Result<(), WeightError> {
    if info.shape == expected {
        return Ok(());
    }
    let (expected, got) = (expected.to_vec(), info.shape.clone());
    Err(ModelError::TensorShape { name: name.to_owned(), expected, got }.into())
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
