//! Rotary position embedding on halves: pair i is `(x[i], x[i + D/2])`.
//!
//! R(p) turns pair i by p * w_i, so R(a) R(b) = R(a + b) and R(p)^-1 = R(-p): keys can be moved to other positions
//! without the model. Angles are computed in f64 from frequencies rounded to f32, as Hugging Face's models have them;
//! sines and products are f32. Does not know which layer uses which frequencies (`config`).

/// Columns that are turned with one table of sines.
const COLUMNS: usize = 256;

/// How a layer's RoPE frequencies differ from base^(-2i/D).
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by this factor.
    Linear(f64),
    /// Each divided by its own number, `[D/2]`: what converters make of Llama 3's scaling.
    Divisors(Vec<f32>),
}

/// The rotation of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the geometric series of frequencies.
    pub base: f64,
    /// How frequencies are scaled.
    pub scaling: RopeScaling,
    /// Radians a position for each pair, `[D/2]`: the result of the two fields above.
    pub frequencies: Vec<f32>,
}

impl Rope {
    /// The rotation for heads of `head_dim` with the given base and scaling.
    pub fn new(base: f64, scaling: RopeScaling, head_dim: usize) -> Self {
        // In f32, step by step, as transformers does it: the last bit of a frequency is visible at position 700.
        #[expect(clippy::cast_possible_truncation, reason = "the reference computes in f32")]
        let plain = |pair: usize| 1.0_f32 / (base as f32).powf((2 * pair) as f32 / head_dim as f32);
        let frequencies = (0..head_dim / 2)
            .map(|pair| match &scaling {
                RopeScaling::None => plain(pair),
                #[expect(clippy::cast_possible_truncation, reason = "the reference computes in f32")]
                RopeScaling::Linear(factor) => plain(pair) / *factor as f32,
                RopeScaling::Divisors(divisors) => plain(pair) / divisors[pair],
            })
            .collect();
        Self { base, scaling, frequencies }
    }

    /// Cosines and sines at each position, both `[T, D/2]` row-major.
    pub fn table(&self, positions: &[i64]) -> (Vec<f32>, Vec<f32>) {
        let size = positions.len() * self.frequencies.len();
        let (mut cosines, mut sines) = (Vec::with_capacity(size), Vec::with_capacity(size));
        for position in positions {
            for frequency in &self.frequencies {
                let (sine, cosine) = (*position as f64 * f64::from(*frequency)).sin_cos();
                #[expect(clippy::cast_possible_truncation, reason = "angles are f64, rotation is f32")]
                {
                    cosines.push(cosine as f32);
                    sines.push(sine as f32);
                }
            }
        }
        (cosines, sines)
    }

    /// Rotates keys `[H, T, D]` in place: column t by `angles[t]` positions, which may be negative.
    ///
    /// # Panics
    /// If `keys` is not a whole number of heads of T columns.
    pub fn rotate(&self, keys: &mut [f32], angles: &[i64]) {
        let half = self.frequencies.len();
        assert_eq!(keys.len() % (angles.len().max(1) * 2 * half), 0, "keys are [H, T, D]");
        // By blocks of columns: a table for all would be as large as the keys of one head.
        for (block, angles_here) in angles.chunks(COLUMNS).enumerate() {
            let (cosines, sines) = self.table(angles_here);
            let first = block * COLUMNS * 2 * half;
            for head in keys.chunks_exact_mut((angles.len() * 2 * half).max(1)) {
                let rows = head[first..].chunks_exact_mut(2 * half).take(angles_here.len());
                for (column, row) in rows.enumerate() {
                    let (low, high) = row.split_at_mut(half);
                    for pair in 0..half {
                        let (cosine, sine) = (cosines[column * half + pair], sines[column * half + pair]);
                        let (x, y) = (low[pair], high[pair]);
                        low[pair] = x * cosine - y * sine;
                        high[pair] = y * cosine + x * sine;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotations_add_up_and_undo() {
        let rope = Rope::new(1e4, RopeScaling::None, 8);
        let start: Vec<f32> = (0..2 * 3 * 8).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut once = start.clone();
        rope.rotate(&mut once, &[5, 105, 1005]);
        let mut twice = start.clone();
        rope.rotate(&mut twice, &[5, 5, 5]);
        rope.rotate(&mut twice, &[0, 100, 1000]);
        rope.rotate(&mut twice, &[0, 0, 0]);
        let mut back = once.clone();
        rope.rotate(&mut back, &[-5, -105, -1005]);
        for i in 0..start.len() {
            assert!((once[i] - twice[i]).abs() < 1e-6 && (back[i] - start[i]).abs() < 1e-6);
        }
    }

    #[test]
    fn rotation_turns_halves_by_the_angle() {
        let rope = Rope::new(100.0, RopeScaling::Linear(2.0), 4);
        let mut keys = vec![1.0, 1.0, 0.0, 0.0];
        rope.rotate(&mut keys, &[1]);
        let expected = [0.5_f32.cos(), 0.05_f32.cos(), 0.5_f32.sin(), 0.05_f32.sin()];
        for (got, wanted) in keys.iter().zip(expected) {
            assert!((got - wanted).abs() < 1e-6, "{keys:?}");
        }
    }
}
