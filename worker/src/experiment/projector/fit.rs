//! How near projected keys and values come to native ones: R² of each layer, over tokens that are projected.

use protocol::results::LayerFit;

use crate::cache::{CacheError, CacheLayout, KvCache, LayerKv};
use crate::projector::{KEPT, rows};

/// Sums over facts, for each layer of keys and of values.
pub(super) struct Fits {
    layers: Vec<[Fit; 2]>,
}

/// Of one tensor: what is left over, and what there was.
#[derive(Clone)]
struct Fit {
    count: f64,
    residual: f64,
    /// Σ y and Σ y², by channel.
    sums: Vec<(f64, f64)>,
}

impl Fits {
    pub(super) fn new(layout: &CacheLayout) -> Self {
        let fit = Fit { count: 0.0, residual: 0.0, sums: vec![(0.0, 0.0); layout.layer_len(1)] };
        Self { layers: layout.layers.iter().map(|_| [fit.clone(), fit.clone()]).collect() }
    }

    /// Adds two un-rotated caches of one text.
    pub(super) fn add(&mut self, native: &KvCache, projected: &KvCache) -> Result<(), CacheError> {
        let columns: Vec<usize> = (KEPT..native.len()).collect();
        let missing = |layer| CacheError::MissingLayer { layer };
        for (index, fits) in self.layers.iter_mut().enumerate() {
            let a = native.layer(index).ok_or(missing(index))?;
            let b = projected.layer(index).ok_or(missing(index))?;
            let parts: [fn(&LayerKv) -> &Vec<f32>; 2] = [|layer| &layer.k, |layer| &layer.v];
            for (fit, part) in fits.iter_mut().zip(parts) {
                let row = |cache: &KvCache, layer| {
                    rows::of_tensor(part(layer), &columns, cache.len(), cache.layout().head_dim)
                };
                fit.add(&row(native, a), &row(projected, b));
            }
        }
        Ok(())
    }

    /// R² of each layer.
    pub(super) fn finish(&self, sources: &[Vec<usize>]) -> Vec<LayerFit> {
        let number = |value: usize| u32::try_from(value).expect("layers fit 32 bits");
        let layers = self.layers.iter().zip(sources).enumerate();
        let rows = layers.map(|(layer, ([key, value], sources))| LayerFit {
            layer: number(layer),
            sources: sources.iter().map(|source| number(*source)).collect(),
            lambda_key: 0.0,
            lambda_value: 0.0,
            r2_key: key.r2(),
            r2_value: value.r2(),
        });
        rows.collect()
    }
}

impl Fit {
    fn add(&mut self, native: &[f32], projected: &[f32]) {
        let width = self.sums.len();
        self.count += (native.len() / width) as f64;
        for (a, b) in native.chunks_exact(width).zip(projected.chunks_exact(width)) {
            for ((sum, squares), (a, b)) in self.sums.iter_mut().zip(a.iter().zip(b)) {
                let (a, b) = (f64::from(*a), f64::from(*b));
                *sum += a;
                *squares += a * a;
                self.residual += (a - b) * (a - b);
            }
        }
    }

    /// 1 - residual / variance; 0 where nothing varies.
    fn r2(&self) -> f64 {
        let total: f64 = self.sums.iter().map(|(sum, squares)| squares - sum * sum / self.count).sum();
        if total > 0.0 { 1.0 - self.residual / total } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::projector::testing::{cache, layout};

    #[test]
    fn r2_is_one_for_the_same_and_below_zero_for_noise() {
        let layout = Arc::new(layout("a", 2));
        let (a, b) = (cache(&layout, 40, 1), cache(&layout, 40, 2));
        let of = |other: &KvCache| {
            let mut fits = Fits::new(&layout);
            fits.add(&a, other).unwrap();
            fits.finish(&[vec![0], vec![1]])
        };
        assert!(of(&a).iter().all(|fit| fit.r2_key == 1.0 && fit.r2_value == 1.0 && fit.sources == [fit.layer]));
        // Independent noise of the same variance leaves twice the variance.
        assert!(of(&b).iter().all(|fit| (fit.r2_key + 1.0).abs() < 0.3 && (fit.r2_value + 1.0).abs() < 0.3));
    }
}
