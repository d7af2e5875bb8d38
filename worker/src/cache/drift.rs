//! How far one cache lies from another, and how a cache's weight spreads over its tokens.
//!
//! Keys are looked at before RoPE, so caches at different positions can be compared. One layer is un-rotated at a time: a
//! long cache is never held twice.

use super::error::CacheError;
use super::value::KvCache;

/// 1 - cosine between two caches' vectors of one layer: 0 the same direction, 1 nothing in common, 2 opposite.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerDrift {
    /// Index from 0.
    pub layer: usize,
    /// Of keys: mean over heads for each column, `[T]`.
    pub key: Vec<f64>,
    /// Of values: mean over heads for each column, `[T]`.
    pub value: Vec<f64>,
}

/// How one layer's weight spreads over its tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSpread {
    /// Index from 0.
    pub layer: usize,
    /// Of keys.
    pub key: Spread,
    /// Of values.
    pub value: Spread,
}

/// Lengths of one tensor's vectors.
#[derive(Debug, Clone, PartialEq)]
pub struct Spread {
    /// L2 norm of each token's numbers over all heads, `[T]`.
    pub norms: Vec<f64>,
    /// Entropy of the tokens' shares of the squared norm, nats: ln T if all have the same, 0 if one has all.
    pub entropy: f64,
}

impl KvCache {
    /// Drift of `other` from this cache, layer by layer; column t is compared with column t.
    ///
    /// # Errors
    /// [`CacheError::Mismatch`] unless both are caches of one model with the same layers and as many columns.
    pub fn drift(&self, other: &Self) -> Result<Vec<LayerDrift>, CacheError> {
        if self.layout != other.layout {
            return Err(CacheError::Mismatch { what: "the model" });
        }
        if !self.layers.keys().eq(other.layers.keys()) {
            return Err(CacheError::Mismatch { what: "the layers held" });
        }
        if self.len() != other.len() {
            return Err(CacheError::Mismatch { what: "the number of columns" });
        }
        let layers = self.layers.iter().map(|(index, layer)| LayerDrift {
            layer: *index,
            key: self.drift_of(&self.plain_keys(*index), &other.plain_keys(*index)),
            value: self.drift_of(&layer.v, &other.layers[index].v),
        });
        Ok(layers.collect())
    }

    /// Norms of each token and their entropy, layer by layer.
    pub fn spread(&self) -> Vec<LayerSpread> {
        let layers = self.layers.iter().map(|(index, layer)| LayerSpread {
            layer: *index,
            key: self.spread_of(&self.plain_keys(*index)),
            value: self.spread_of(&layer.v),
        });
        layers.collect()
    }

    fn drift_of(&self, a: &[f32], b: &[f32]) -> Vec<f64> {
        let mut sums = vec![0.0; self.len()];
        for (row, (a, b)) in self.rows(a).zip(self.rows(b)).enumerate() {
            sums[row % self.len()] += 1.0 - cosine(a, b);
        }
        sums.iter().map(|sum| sum / self.layout.kv_heads as f64).collect()
    }

    fn spread_of(&self, values: &[f32]) -> Spread {
        let mut energies = vec![0.0; self.len()];
        for (row, vector) in self.rows(values).enumerate() {
            energies[row % self.len()] += product(vector, vector);
        }
        let total: f64 = energies.iter().sum();
        let shares = energies.iter().map(|energy| energy / total).filter(|share| *share > 0.0);
        Spread {
            entropy: shares.map(|share| -share * share.ln()).sum(),
            norms: energies.iter().map(|e| e.sqrt()).collect(),
        }
    }

    /// The vectors of each head and column.
    fn rows<'a>(&self, values: &'a [f32]) -> std::slice::ChunksExact<'a, f32> {
        values.chunks_exact(self.layout.head_dim)
    }
}

fn product(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

/// 1 for two zero vectors, which are the same; 0 if one is zero.
fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let norms = (product(a, a) * product(b, b)).sqrt();
    if norms > 0.0 {
        product(a, b) / norms
    } else if a == b {
        1.0
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::value::tests::sample;

    #[test]
    fn drift_sees_direction_and_not_position_or_length() {
        let cache = sample(7);
        let mut other = cache.rebase(300);
        for layer in other.layers.values_mut() {
            layer.k.iter_mut().for_each(|x| *x *= 3.0);
            // Column 2 of head 1 turns round.
            layer.v[(7 + 2) * 4..(7 + 3) * 4].iter_mut().for_each(|x| *x = -*x);
        }
        for layer in cache.drift(&other).unwrap() {
            assert!(layer.key.iter().all(|drift| drift.abs() < 1e-9), "{layer:?}");
            for (column, drift) in layer.value.iter().enumerate() {
                assert!((drift - if column == 2 { 1.0 } else { 0.0 }).abs() < 1e-12, "{layer:?}");
            }
        }
        let shorter = cache.slice_tokens(0..3).unwrap();
        assert!(matches!(cache.drift(&shorter), Err(CacheError::Mismatch { .. })));
    }

    #[test]
    fn entropy_runs_from_one_token_to_all() {
        let mut cache = sample(8);
        for layer in cache.layers.values_mut() {
            layer.v.fill(0.5);
            layer.k.fill(0.0);
            layer.k[4..8].fill(2.0);
        }
        for layer in cache.spread() {
            assert!((layer.value.entropy - 8_f64.ln()).abs() < 1e-12);
            assert_eq!(layer.key.entropy, 0.0);
            assert!((layer.key.norms[1] - 4.0).abs() < 1e-6 && layer.key.norms[0] == 0.0);
            assert!((layer.value.norms[3] - 2_f64.sqrt()).abs() < 1e-6);
        }
    }
}
