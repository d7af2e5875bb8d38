//! Noise with a cache's own statistics: the control that tells content from scale.

use super::value::{KvCache, LayerKv};
use crate::random::Random;

/// Over which numbers mean and standard deviation are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Matched {
    /// All of a layer's keys, and all of its values.
    Layer,
    /// Each channel (head and dimension) over tokens: keys have a few channels far larger than the rest.
    Channel,
}

impl KvCache {
    /// A cache of the same shape and positions whose numbers are normal noise with the mean and standard deviation of
    /// this one's, fixed by `seed`. Its text is unknown.
    #[must_use]
    pub fn noise_like(&self, matched: Matched, seed: u64) -> Self {
        let mut random = Random::new(seed, "matched noise");
        let mut noise = self.clone();
        for layer in noise.layers.values_mut() {
            *layer = LayerKv {
                k: self.noise_tensor(&layer.k, matched, &mut random),
                v: self.noise_tensor(&layer.v, matched, &mut random),
            };
        }
        noise.tokens = None;
        noise.spans = None;
        noise.generated = 0;
        noise
    }

    fn noise_tensor(&self, values: &[f32], matched: Matched, random: &mut Random) -> Vec<f32> {
        let (columns, width) = (self.len(), self.layout.head_dim);
        let channels = self.layout.kv_heads * width;
        let channel_of = |index: usize| index / (columns * width) * width + index % width;
        let moments = match matched {
            Matched::Layer => vec![moments(values.iter().copied()); channels],
            Matched::Channel => (0..channels)
                .map(|channel| {
                    let (head, inside) = (channel / width, channel % width);
                    moments((0..columns).map(|column| values[(head * columns + column) * width + inside]))
                })
                .collect(),
        };
        #[expect(clippy::cast_possible_truncation, reason = "caches are f32")]
        let draw = |index: usize| {
            let (mean, deviation) = moments[channel_of(index)];
            (mean + deviation * random.normal()) as f32
        };
        (0..values.len()).map(draw).collect()
    }
}

/// Mean and standard deviation (population).
fn moments(values: impl Iterator<Item = f32> + Clone) -> (f64, f64) {
    let count = values.clone().count().max(1) as f64;
    let mean = values.clone().map(f64::from).sum::<f64>() / count;
    let variance = values.map(|value| (f64::from(value) - mean).powi(2)).sum::<f64>() / count;
    (mean, variance.sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::value::tests::sample;

    #[test]
    fn noise_matches_moments_and_is_fixed_by_its_seed() {
        let cache = sample(4000);
        for matched in [Matched::Layer, Matched::Channel] {
            let noise = cache.noise_like(matched, 3);
            assert_eq!(noise, cache.noise_like(matched, 3));
            assert_ne!(noise, cache.noise_like(matched, 4));
            let (k, original) = (&noise.layer(0).unwrap().k, &cache.layer(0).unwrap().k);
            let ((mean, deviation), (mean0, deviation0)) =
                (moments(k.iter().copied()), moments(original.iter().copied()));
            assert!((mean - mean0).abs() < 0.03 && (deviation - deviation0).abs() < 0.03);
        }
        assert_eq!(cache.noise_like(Matched::Layer, 3).tokens(), None);
    }
}
