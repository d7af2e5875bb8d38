//! Logarithms to base two in whole numbers: the same on every machine, unlike a library's floats.

use serde::{Deserialize, Serialize};

/// Steps of [`Octaves`] in one octave, a factor of two.
const STEPS: i64 = 1024;

/// A ratio or a positive quantity on a logarithmic scale, in 1/1024 of an octave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Octaves(pub i32);

impl Octaves {
    /// Of a quantity; zero counts as one. Off by less than a thousandth of the quantity.
    pub fn of(value: u64) -> Self {
        let value = value.max(1);
        let whole = i64::from(value.ilog2());
        // The fraction above the power of two, in 1/65536.
        let fraction = i64::try_from((u128::from(value) << 16 >> whole) & 0xffff).unwrap_or(0);
        Self(clamp(whole * STEPS + ((log_of_fraction(fraction) * STEPS) >> 16)))
    }

    /// The quantity back, at least one.
    pub fn value(self) -> u64 {
        let (whole, rest) = (i64::from(self.0).div_euclid(STEPS), i64::from(self.0).rem_euclid(STEPS));
        // 2^x for x in 0..1 by inverting the interpolation above.
        let fraction = exp_of_fraction(rest * 65536 / STEPS);
        let scaled = u128::from(u64::try_from(65536 + fraction).unwrap_or(65536));
        match u32::try_from(whole) {
            Ok(whole) if whole < 63 => u64::try_from((scaled << whole) >> 16).unwrap_or(u64::MAX).max(1),
            Ok(_) => u64::MAX,
            Err(_) => 1,
        }
    }

    /// `amount` times this ratio.
    pub fn scale(self, amount: u64) -> u64 {
        (Self::of(amount) + self).value()
    }
}

impl std::ops::Add for Octaves {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl std::ops::Sub for Octaves {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

fn clamp(value: i64) -> i32 {
    i32::try_from(value).unwrap_or(if value < 0 { i32::MIN } else { i32::MAX })
}

/// log2(1 + x) for x in 0..1, both in 1/65536: x + c·x·(1 - x)·(1 + d·(1/2 - x)), fitted, off by less than 0.0012.
fn log_of_fraction(x: i64) -> i64 {
    let bend = (x * (65536 - x)) >> 16;
    let tilt = 65536 + ((15_000 * (32768 - x)) >> 15);
    x + ((((22_400 * bend) >> 16) * tilt) >> 16)
}

/// The inverse of [`log_of_fraction`], by two steps of a secant.
fn exp_of_fraction(y: i64) -> i64 {
    let mut x = y - ((22_400 * ((y * (65536 - y)) >> 16)) >> 16);
    for _ in 0..4 {
        let error = log_of_fraction(x) - y;
        x -= error * 3 / 4;
    }
    x.clamp(0, 65535)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantity_comes_back_to_a_fifth_of_a_percent() {
        for value in (1..4000).chain([123_456_789, 1 << 40, (1 << 50) + 12_345]) {
            let back = Octaves::of(value).value();
            let off = back.abs_diff(value);
            assert!(off <= 1 + value / 400, "{value} became {back}");
        }
        assert_eq!(Octaves::of(0), Octaves::of(1));
    }

    #[test]
    fn ratios_multiply() {
        let ratio = Octaves::of(3_000) - Octaves::of(1_000);
        assert!(ratio.scale(7_000).abs_diff(21_000) <= 60);
        assert!((Octaves(0) - ratio).scale(21_000).abs_diff(7_000) <= 60);
    }
}
