//! Caches between two caches: column by column, at equal positions.
//!
//! Rotation is linear and keeps lengths and angles, so mixing rotated keys and mixing plain keys and rotating them is the
//! same, as long as positions agree; other pairs are refused rather than guessed at.

use super::error::CacheError;
use super::value::{KvCache, LayerKv};

/// The way from one vector to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// (1 - t) a + t b, number by number.
    Straight,
    /// Each head's vector turns evenly from a's direction to b's while its length goes evenly from |a| to |b|. Vectors
    /// that are zero or point the same or opposite ways go straight.
    Arc,
}

/// Below this sine two directions count as one: the formula divides by it.
const SINE_MIN: f64 = 1e-6;

impl KvCache {
    /// The cache a share of `t` along the way from this one (0) to `other` (1); other values of `t` extrapolate. Its text
    /// is unknown unless both have the same.
    ///
    /// # Errors
    /// [`CacheError::Mismatch`] unless both are caches of one model with the same layers, positions and rotation.
    pub fn interpolate(&self, other: &Self, t: f32, path: Path) -> Result<Self, CacheError> {
        self.same_columns(other)?;
        let width = self.layout.head_dim;
        let mix = |a: &[f32], b: &[f32]| {
            let mut mixed = Vec::with_capacity(a.len());
            for (a, b) in a.chunks_exact(width).zip(b.chunks_exact(width)) {
                let [of_a, of_b] = match path {
                    Path::Straight => [1.0 - t, t],
                    Path::Arc => arc(a, b, t),
                };
                mixed.extend(a.iter().zip(b).map(|(a, b)| of_a * a + of_b * b));
            }
            mixed
        };
        let mut mixed = self.clone();
        for (mine, theirs) in mixed.layers.values_mut().zip(other.layers.values()) {
            *mine = LayerKv { k: mix(&mine.k, &theirs.k), v: mix(&mine.v, &theirs.v) };
        }
        if self.tokens != other.tokens {
            mixed.tokens = None;
        }
        mixed.generated = self.generated.min(other.generated);
        Ok(mixed)
    }
}

/// The factors of a and b at share `t` of the arc between them.
#[expect(clippy::cast_possible_truncation, reason = "caches are f32")]
fn arc(a: &[f32], b: &[f32], t: f32) -> [f32; 2] {
    let product = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    let (norm_a, norm_b) = (product(a, a).sqrt(), product(b, b).sqrt());
    let cosine = if norm_a > 0.0 && norm_b > 0.0 { product(a, b) / (norm_a * norm_b) } else { 1.0 };
    let angle = cosine.clamp(-1.0, 1.0).acos();
    if angle.sin() < SINE_MIN {
        return [1.0 - t, t];
    }
    let t = f64::from(t);
    let length = (1.0 - t) * norm_a + t * norm_b;
    let of_a = ((1.0 - t) * angle).sin() / angle.sin() * length / norm_a;
    let of_b = (t * angle).sin() / angle.sin() * length / norm_b;
    [of_a as f32, of_b as f32]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::Matched;
    use crate::cache::value::tests::sample;

    fn norms(values: &[f32]) -> Vec<f32> {
        values.chunks_exact(4).map(|row| row.iter().map(|x| x * x).sum::<f32>().sqrt()).collect()
    }

    #[test]
    fn ends_are_the_two_caches_and_the_middle_is_between() {
        let (a, b) = (sample(6), sample(6).noise_like(Matched::Layer, 1));
        for path in [Path::Straight, Path::Arc] {
            for (t, end) in [(0.0, &a), (1.0, &b)] {
                let mixed = a.interpolate(&b, t, path).unwrap();
                for ((_, x), (_, y)) in mixed.layers().zip(end.layers()) {
                    assert!(x.k.iter().zip(&y.k).chain(x.v.iter().zip(&y.v)).all(|(x, y)| (x - y).abs() < 1e-6));
                }
            }
            assert_eq!(a.interpolate(&a, 0.3, path).unwrap().tokens(), a.tokens());
            assert_eq!(a.interpolate(&b, 0.3, path).unwrap().tokens(), None);
        }
        let (straight, arc) =
            (a.interpolate(&b, 0.5, Path::Straight).unwrap(), a.interpolate(&b, 0.5, Path::Arc).unwrap());
        let of = |cache: &KvCache| norms(&cache.layer(1).unwrap().v);
        for (index, norm) in of(&arc).into_iter().enumerate() {
            assert!((norm - f32::midpoint(of(&a)[index], of(&b)[index])).abs() < 1e-5);
            assert!(of(&straight)[index] < norm + 1e-5, "a chord is shorter than its arc");
        }
    }

    #[test]
    fn mixing_and_moving_can_change_places() {
        let (a, b) = (sample(6), sample(6).noise_like(Matched::Layer, 1));
        for path in [Path::Straight, Path::Arc] {
            let late = a.interpolate(&b, 0.4, path).unwrap().rebase(100);
            let early = a.rebase(100).interpolate(&b.rebase(100), 0.4, path).unwrap();
            for ((_, x), (_, y)) in late.layers().zip(early.layers()) {
                assert!(x.k.iter().zip(&y.k).all(|(x, y)| (x - y).abs() < 1e-5));
            }
        }
        assert!(matches!(
            a.interpolate(&b.rebase(1), 0.5, Path::Straight),
            Err(CacheError::Mismatch { what: "positions" })
        ));
        assert!(matches!(a.interpolate(&b.unrotated(), 0.5, Path::Straight), Err(CacheError::Mismatch { .. })));
    }
}
