//! The ridge projector: one matrix a target layer, in closed form, from sums that add up.
//!
//! For target layer n, x is the concatenation of un-rotated keys and values of the source layers J(n) at the aligned token, y the
//! un-rotated keys and values of the target. With z = (x - mean x) / sd x, C = Zᵀ Z / N and B = Zᵀ (Y - mean Y) / N,
//!
//! W = (C + λ I)⁻¹ B   (Hoerl and Kennard 1970, on standardised features as in Hastie, Tibshirani and Friedman 2009, 3.4.1)
//!
//! C has ones on its diagonal, so one λ means the same whatever the model, the layer and the number of rows. λ is chosen for
//! keys and values of each layer apart, by the error on groups that were held out; W is then solved for again from all rows. The
//! target's own first token (the attention sink) is no row of the sums, and is kept as the target computes it.
//!
//! Layout:
//! - `moments`: sums over rows, which merge. [`statistics`]: those of all layers, and their file. [`solve`]: from sums to weights.

mod moments;
pub mod solve;
pub mod statistics;
#[cfg(test)]
mod tests;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::error::ProjectorError;
use super::file::{KIND, Manifest, Stored, Tensors, take_f32};
use super::rows;
use super::{Alignment, KEPT, each_layer};
use crate::cache::{KvCache, LayerKv};

/// A solved map of every target layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Ridge {
    layers: Vec<LayerMatrix>,
}

/// y = x W + b: `W` `[P, 2 H D]` row-major, keys' columns before values'.
#[derive(Debug, Clone, PartialEq)]
struct LayerMatrix {
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl Ridge {
    /// Trained numbers.
    pub fn parameters(&self) -> u64 {
        self.layers.iter().map(|layer| (layer.weight.len() + layer.bias.len()) as u64).sum()
    }

    pub(super) fn tensors(&self, manifest: &Manifest) -> Tensors {
        let width = 2 * manifest.target.width();
        let entries = self.layers.iter().enumerate().flat_map(|(index, layer)| {
            let weight = Stored::f32([layer.weight.len() / width, width], layer.weight.clone());
            let bias = Stored::f32([width], layer.bias.clone());
            [(format!("layer.{index}.weight"), weight), (format!("layer.{index}.bias"), bias)]
        });
        entries.collect()
    }

    pub(super) fn from_tensors(manifest: &Manifest, mut tensors: Tensors) -> Result<Self, ProjectorError> {
        let (width, source) = (2 * manifest.target.width(), 2 * manifest.source.width());
        let layer = |(index, list): (usize, &Vec<usize>)| {
            let shape = [list.len() * source, width];
            let weight = take_f32(&mut tensors, KIND, &format!("layer.{index}.weight"), &shape)?;
            let bias = take_f32(&mut tensors, KIND, &format!("layer.{index}.bias"), &[width])?;
            Ok(LayerMatrix { weight, bias })
        };
        let layers = manifest.layers.iter().enumerate().map(layer).collect::<Result<_, ProjectorError>>()?;
        match tensors.keys().next() {
            None => Ok(Self { layers }),
            Some(name) => Err(ProjectorError::File { kind: KIND, what: format!("tensor {name} is not a ridge's") }),
        }
    }

    /// Keys and values of every target layer; columns that the target keeps are `own`'s.
    pub(super) fn project(
        &self,
        manifest: &Manifest,
        source: &KvCache,
        alignment: &Alignment,
        own: &KvCache,
    ) -> Result<Vec<(usize, LayerKv)>, ProjectorError> {
        let layers = each_layer(self.layers.len(), |index| {
            self.layers[index].project(&manifest.layers[index], source, alignment, (own, index))
        });
        layers.into_iter().enumerate().map(|(index, layer)| Ok((index, layer?))).collect()
    }
}

impl LayerMatrix {
    fn project(
        &self,
        layers: &[usize],
        source: &KvCache,
        alignment: &Alignment,
        (own, layer): (&KvCache, usize),
    ) -> Result<LayerKv, ProjectorError> {
        let (len, both) = (alignment.len(), self.bias.len());
        let x = rows::features(source, layers, alignment.columns())?;
        let mut y = self.bias.repeat(len);
        let features = self.weight.len() / both;
        matmul(
            MatMut::from_row_major_slice_mut(&mut y, len, both),
            Accum::Add,
            MatRef::from_row_major_slice(&x, len, features),
            MatRef::from_row_major_slice(&self.weight, features, both),
            1.0,
            Par::Seq,
        );
        let head_dim = own.layout().head_dim;
        let kept = own.layer(layer).ok_or(crate::cache::CacheError::MissingLayer { layer })?;
        let half = |values: std::ops::Range<usize>, own_values: &[f32]| {
            let mut half: Vec<f32> = y.chunks_exact(both).flat_map(|row| row[values.clone()].iter().copied()).collect();
            let own_rows = rows::of_tensor(own_values, &(0..KEPT.min(len)).collect::<Vec<_>>(), own.len(), head_dim);
            half[..own_rows.len()].copy_from_slice(&own_rows);
            rows::to_tensor(&half, len, head_dim)
        };
        Ok(LayerKv { k: half(0..both / 2, &kept.k), v: half(both / 2..both, &kept.v) })
    }
}
