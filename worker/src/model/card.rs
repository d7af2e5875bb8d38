//! Frozen weights on a card: held there, multiplied there.
//!
//! The same code runs on the processor for tests. Dense weights are held as the place says; stored ones stay in their blocks
//! for candle's quantised kernels, which round activations to 8 bits as the processor's do. Does not read files.

use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{DType, Module, Result, Tensor};

use super::place::Compute;
use super::quant::{QuantKind, QuantMatrix};
use super::weights::Precision;

/// Numbers that a tile of a weight holds at most: 128 MiB of f32. Only tables of big vocabularies have more than one tile; what
/// is widened for a moment, here or there, is a tile.
const TILE_NUMBERS: usize = 32 << 20;

/// A weight `[outputs, inputs]`, frozen.
#[derive(Debug, Clone)]
pub(crate) struct CardMatrix {
    /// Rows after each other.
    tiles: Vec<Tile>,
    inputs: usize,
    compute: Compute,
}

#[derive(Debug, Clone)]
enum Tile {
    /// `[rows, inputs]` in the place's elements.
    Dense(Tensor),
    Quantised(Arc<QTensor>),
}

impl CardMatrix {
    /// Brings a weight to the device: dequantised for [`Precision::F32`], as stored otherwise, where candle has products of
    /// that type.
    pub(crate) fn new(matrix: &QuantMatrix, precision: Precision, compute: &Compute) -> Result<Self> {
        Self::tiled(matrix, precision, compute, TILE_NUMBERS)
    }

    fn tiled(matrix: &QuantMatrix, precision: Precision, compute: &Compute, numbers: usize) -> Result<Self> {
        let inputs = matrix.cols();
        let step = (numbers / inputs).max(1);
        // candle takes two blocks of 32 at a time; only tiny models have rows of one.
        let whole = inputs.is_multiple_of(2 * 32);
        let kept = block_type(matrix.kind()).filter(|_| whole && precision == Precision::Stored);
        let tiles = (0..matrix.rows()).step_by(step).map(|first| {
            let rows = first..(first + step).min(matrix.rows());
            let shape = (rows.len(), inputs);
            Ok(match kept {
                Some(dtype) => {
                    let storage = QStorage::from_data(matrix.row_bytes(rows).into(), compute.device(), dtype)?;
                    Tile::Quantised(Arc::new(QTensor::new(storage, shape)?))
                }
                None => {
                    let mut values = vec![0.0_f32; rows.len() * inputs];
                    matrix.dequantize_rows(rows, &mut values);
                    Tile::Dense(compute.held(&compute.tensor(&values, shape)?)?)
                }
            })
        });
        Ok(Self { tiles: tiles.collect::<Result<_>>()?, inputs, compute: compute.clone() })
    }

    /// `x Wᵀ`, `[T, outputs]`, of `x` `[T, inputs]`, both f32.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.contiguous()?;
        self.beside_each_other(|tile| match tile {
            Tile::Dense(weight) => self.compute.matmul(&x, &weight.t()?),
            Tile::Quantised(weight) => QMatMul::from_arc(Arc::clone(weight))?.forward(&x),
        })
    }

    /// The same without rounding activations to 8 bits.
    pub(crate) fn exact(&self, x: &Tensor) -> Result<Tensor> {
        self.beside_each_other(|tile| self.compute.matmul(x, &self.dense(tile)?.t()?))
    }

    /// `y W`, `[T, inputs]`, of `y` `[T, outputs]`: in f32 whatever the weight is held in, as a gradient's small numbers
    /// would be lost in halves.
    pub(crate) fn transposed(&self, y: &Tensor) -> Result<Tensor> {
        let mut sum: Option<Tensor> = None;
        let mut first = 0;
        for tile in &self.tiles {
            let weight = self.dense(tile)?.to_dtype(DType::F32)?;
            let rows = weight.dim(0)?;
            let part = y.narrow(1, first, rows)?.contiguous()?.matmul(&weight)?;
            sum = Some(sum.map_or(Ok(part.clone()), |sum| sum + part)?);
            first += rows;
        }
        match sum {
            Some(sum) => Ok(sum),
            None => Tensor::zeros((y.dim(0)?, self.inputs), DType::F32, self.compute.device()),
        }
    }

    fn beside_each_other(&self, product: impl Fn(&Tile) -> Result<Tensor>) -> Result<Tensor> {
        let parts = self.tiles.iter().map(product).collect::<Result<Vec<_>>>()?;
        match parts.as_slice() {
            [part] => Ok(part.clone()),
            parts => Tensor::cat(parts, 1),
        }
    }

    fn dense(&self, tile: &Tile) -> Result<Tensor> {
        match tile {
            Tile::Dense(weight) => Ok(weight.clone()),
            Tile::Quantised(weight) => weight.dequantize(self.compute.device()),
        }
    }
}

/// Types that candle has quantised products for, on cards as on the processor.
fn block_type(kind: QuantKind) -> Option<GgmlDType> {
    match kind {
        QuantKind::F32 | QuantKind::F16 | QuantKind::Bf16 => None,
        QuantKind::Q4_0 => Some(GgmlDType::Q4_0),
        QuantKind::Q4_1 => Some(GgmlDType::Q4_1),
        QuantKind::Q5_0 => Some(GgmlDType::Q5_0),
        QuantKind::Q5_1 => Some(GgmlDType::Q5_1),
        QuantKind::Q8_0 => Some(GgmlDType::Q8_0),
        QuantKind::Q2K => Some(GgmlDType::Q2K),
        QuantKind::Q3K => Some(GgmlDType::Q3K),
        QuantKind::Q4K => Some(GgmlDType::Q4K),
        QuantKind::Q5K => Some(GgmlDType::Q5K),
        QuantKind::Q6K => Some(GgmlDType::Q6K),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::place::{DeviceChoice, Place};
    use crate::random::Random;
    use crate::support::ElementType;

    fn numbers(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn normal(shape: (usize, usize), purpose: &str, compute: &Compute) -> Tensor {
        let mut random = Random::new(7, purpose);
        let values: Vec<f32> = (0..shape.0 * shape.1).map(|_| random.normal() as f32).collect();
        compute.tensor(&values, shape).unwrap()
    }

    #[test]
    fn tiles_make_one_product_there_and_back() {
        let compute = Place { device: DeviceChoice::CpuAsCard, elements: ElementType::F32 }.open().unwrap();
        let (rows, cols) = (70, 64);
        let weight = normal((rows, cols), "weight", &compute);
        let (x, y) = (normal((3, cols), "x", &compute), normal((3, rows), "y", &compute));
        let blocks = QTensor::quantize(&weight, GgmlDType::Q8_0).unwrap();
        let stored = Arc::new(blocks.data().unwrap().into_owned());
        let range = 0..stored.len();
        let stored = QuantMatrix::new(QuantKind::Q8_0, rows, cols, stored, range).unwrap();
        let dense = blocks.dequantize(compute.device()).unwrap();
        let (wanted, back) = (x.matmul(&dense.t().unwrap()).unwrap(), y.matmul(&dense).unwrap());
        for precision in [Precision::F32, Precision::Stored] {
            for numbers_a_tile in [TILE_NUMBERS, 16 * cols, 1] {
                let card = CardMatrix::tiled(&stored, precision, &compute, numbers_a_tile).unwrap();
                let close = |a: &Tensor, b: &Tensor, limit: f32| {
                    assert_eq!(a.dims(), b.dims());
                    let far = numbers(a).iter().zip(numbers(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(far < limit, "{precision:?} in tiles of {numbers_a_tile}: {far}");
                };
                // Quantised products round activations to 8 bits.
                close(&card.forward(&x).unwrap(), &wanted, if precision == Precision::F32 { 1e-4 } else { 0.3 });
                close(&card.exact(&x).unwrap(), &wanted, 1e-4);
                close(&card.transposed(&y).unwrap(), &back, 1e-4);
            }
        }
    }
}
