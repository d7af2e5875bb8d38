//! Reproducible pseudo-random numbers: the same seed gives the same bytes on every machine and in every version.
//!
//! SplitMix64 (Steele, Lea, Flood 2014): small, and good enough for noise and for drawing names. Never for secrets.

/// A stream of numbers fixed by its seed.
#[derive(Debug, Clone)]
pub struct Random {
    state: u64,
}

impl Random {
    /// The stream of that seed and purpose: streams of different purposes do not depend on each other.
    pub fn new(seed: u64, purpose: &str) -> Self {
        let digest = blake3::hash(purpose.as_bytes());
        let first = digest.as_bytes().first_chunk().expect("a digest has 32 bytes");
        Self { state: seed ^ u64::from_le_bytes(*first) }
    }

    /// 64 uniform bits.
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `limit`, which must not be 0. The bias of the remainder is below 2^-32 for the limits used here.
    pub fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.bits() % limit as u64).expect("less than a usize")
    }

    /// A number above 0 and at most 1.
    pub fn unit(&mut self) -> f64 {
        ((self.bits() >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }

    /// A normal number of mean 0 and variance 1 (Box and Muller 1958).
    pub fn normal(&mut self) -> f64 {
        (-2.0 * self.unit().ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_fixed_and_normal_numbers_are_normal() {
        let mut a = Random::new(7, "test");
        let mut b = Random::new(7, "test");
        assert_eq!(a.bits(), b.bits());
        assert_ne!(Random::new(7, "other").bits(), Random::new(7, "test").bits());
        let values: Vec<f64> = (0..20_000).map(|_| a.normal()).collect();
        let mean = values.iter().sum::<f64>() / 20_000.0;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / 20_000.0;
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
    }
}
