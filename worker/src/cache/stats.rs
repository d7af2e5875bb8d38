//! Summary statistics of one layer's keys and values.
//!
//! Keys are looked at before RoPE, because rotation smears their spectrum; norms and ranks leave the first token out,
//! because its norm (the attention sink) dominates. Ranks grow with the number of tokens: compare equal numbers only.

use faer::{Mat, Side};
use protocol::results::{EffectiveRank, TensorStats};

use super::error::CacheError;
use super::value::KvCache;

/// Share of the spectrum's energy that the seed project's rank counts up to.
const ENERGY_SHARE: f64 = 0.9;

/// Statistics of a layer's keys (before RoPE) and values.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerStats {
    /// Index from 0.
    pub layer: usize,
    /// Of the keys.
    pub key: TensorStats,
    /// Of the values.
    pub value: TensorStats,
}

impl KvCache {
    /// Statistics of each layer held. Ranks use the first `rank_tokens` tokens after the sink.
    ///
    /// # Errors
    /// [`CacheError::Shape`] if the cache has no more than `rank_tokens` columns, or `rank_tokens` is 0.
    pub fn stats(&self, rank_tokens: usize) -> Result<Vec<LayerStats>, CacheError> {
        if rank_tokens == 0 || self.len() <= rank_tokens {
            let what = "columns needed for statistics".to_owned();
            return Err(CacheError::Shape { what, expected: rank_tokens.max(1) + 1, got: self.len() });
        }
        let (tokens, width) = (self.len(), self.layout.head_dim);
        // One layer's keys are un-rotated at a time: a long cache is never held twice.
        self.layers()
            .map(|(layer, kv)| {
                let key = View { values: &self.plain_keys(layer), tokens, width }.stats(layer, rank_tokens)?;
                let value = View { values: &kv.v, tokens, width }.stats(layer, rank_tokens)?;
                Ok(LayerStats { layer, key, value })
            })
            .collect()
    }
}

/// One tensor `[H, T, D]`.
struct View<'a> {
    values: &'a [f32],
    tokens: usize,
    width: usize,
}

impl View<'_> {
    fn stats(&self, layer: usize, rank_tokens: usize) -> Result<TensorStats, CacheError> {
        let norms: Vec<f64> = self.values.chunks_exact(self.width).map(norm).collect();
        let after_sink: Vec<f64> =
            norms.iter().enumerate().filter(|(row, _)| row % self.tokens != 0).map(|(_, norm)| *norm).collect();
        let sinks: Vec<f64> = norms.iter().step_by(self.tokens).copied().collect();
        let (norm_mean, norm_sd, _) = moments(&after_sink.iter().copied());
        let (mean, sd, kurtosis) = moments(&self.values.iter().copied().map(f64::from));
        Ok(TensorStats {
            norm_mean,
            norm_sd,
            sink_ratio: ratio(moments(&sinks.into_iter()).0, median(after_sink)),
            mean,
            sd,
            kurtosis,
            rank: effective_rank(&self.gram(rank_tokens), rank_tokens).ok_or(CacheError::Eigenvalues { layer })?,
        })
    }

    /// A A^T, `[N, N]`, for A `[N, H * D]` of the N tokens after the first: same nonzero eigenvalues as A^T A.
    fn gram(&self, tokens: usize) -> Mat<f64> {
        let heads = self.values.len() / (self.tokens * self.width);
        let row = |head: usize, token: usize| {
            let start = (head * self.tokens + token + 1) * self.width;
            &self.values[start..start + self.width]
        };
        Mat::from_fn(tokens, tokens, |a, b| {
            let products = (0..heads).flat_map(|head| row(head, a).iter().zip(row(head, b)));
            products.map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
        })
    }
}

/// The four ranks of a Gram matrix; None if its eigenvalues do not converge. Definitions: [`EffectiveRank`].
fn effective_rank(gram: &Mat<f64>, tokens: usize) -> Option<EffectiveRank> {
    let mut energies: Vec<f64> = gram.self_adjoint_eigenvalues(Side::Lower).ok()?;
    energies.iter_mut().for_each(|energy| *energy = energy.max(0.0));
    energies.sort_by(|a, b| b.total_cmp(a));
    let total: f64 = energies.iter().sum();
    let tokens = u32::try_from(tokens).ok()?;
    if total == 0.0 {
        return Some(EffectiveRank { tokens, energy_90: 0.0, entropy: 0.0, participation: 0.0, stable: 0.0 });
    }
    let mut held = 0.0;
    let below = energies.iter().take_while(|energy| {
        held += **energy;
        held < ENERGY_SHARE * total
    });
    let energy_90 = below.count() as f64 + 1.0;
    let singular: Vec<f64> = energies.iter().map(|energy| energy.sqrt()).collect();
    let sum: f64 = singular.iter().sum();
    let entropy: f64 = singular.iter().map(|s| s / sum).filter(|p| *p > 0.0).map(|p| -p * p.ln()).sum();
    let squares: f64 = energies.iter().map(|energy| energy * energy).sum();
    Some(EffectiveRank {
        tokens,
        energy_90,
        entropy: entropy.exp(),
        participation: total * total / squares,
        stable: total / energies[0],
    })
}

fn norm(vector: &[f32]) -> f64 {
    vector.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt()
}

/// Mean, standard deviation (population), excess kurtosis; 0 where a constant has none.
fn moments(values: &(impl Iterator<Item = f64> + Clone)) -> (f64, f64, f64) {
    let count = values.clone().count().max(1) as f64;
    let mean = values.clone().sum::<f64>() / count;
    let central = |power: i32| values.clone().map(|value| (value - mean).powi(power)).sum::<f64>() / count;
    let variance = central(2);
    let kurtosis = if variance > 0.0 { central(4) / (variance * variance) - 3.0 } else { 0.0 };
    (mean, variance.sqrt(), kurtosis)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { f64::midpoint(values[middle - 1], values[middle]) }
}

/// a / b, and 0 where b is 0: a result file has no place for infinity.
fn ratio(a: f64, b: f64) -> f64 {
    if b > 0.0 { a / b } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::value::tests::sample;

    fn rank_of(singular: &[f64]) -> EffectiveRank {
        let size = singular.len();
        let gram = Mat::from_fn(size, size, |a, b| if a == b { singular[a] * singular[a] } else { 0.0 });
        effective_rank(&gram, size).unwrap()
    }

    #[test]
    fn equal_directions_have_full_rank_and_one_direction_has_one() {
        let full = rank_of(&[2.0, 2.0, 2.0, 2.0]);
        for rank in [full.energy_90, full.entropy, full.participation, full.stable] {
            assert!((rank - 4.0).abs() < 1e-9, "{full:?}");
        }
        let one = rank_of(&[3.0, 0.0, 0.0, 0.0]);
        for rank in [one.energy_90, one.entropy, one.participation, one.stable] {
            assert!((rank - 1.0).abs() < 1e-9, "{one:?}");
        }
    }

    #[test]
    fn ranks_follow_their_formulas() {
        let rank = rank_of(&[2.0, 1.0, 1.0]);
        assert!((rank.energy_90 - 3.0).abs() < 1e-9);
        assert!((rank.entropy - (0.5 * 2.0_f64.ln() + 0.5 * 4.0_f64.ln()).exp()).abs() < 1e-9);
        assert!((rank.participation - 36.0 / 18.0).abs() < 1e-9);
        assert!((rank.stable - 6.0 / 4.0).abs() < 1e-9);
    }

    #[test]
    fn statistics_do_not_depend_on_where_a_cache_stands() {
        let cache = sample(12);
        let (here, there) = (cache.stats(8).unwrap(), cache.rebase(500).stats(8).unwrap());
        assert!((here[1].key.rank.entropy - there[1].key.rank.entropy).abs() < 1e-4);
        assert!((here[0].key.norm_mean - there[0].key.norm_mean).abs() < 1e-5);
        assert_eq!(here[0].value, there[0].value);
        assert!(matches!(cache.stats(12), Err(CacheError::Shape { expected: 13, got: 12, .. })));
    }
}
