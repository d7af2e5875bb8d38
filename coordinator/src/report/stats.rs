//! The few statistics that tables and reports state: a proportion with Wilson's interval, a mean with a bootstrap interval.
//!
//! The unit is the item (a fact), never a token or a repeated greedy run. Does not test hypotheses.

use serde::{Deserialize, Serialize};

/// Standard normal quantile of a two-sided 95 % interval.
const Z_95: f64 = 1.959_963_984_540_054;
/// Resamples of a bootstrap: the third digit of an interval's ends no longer moves.
const RESAMPLES: usize = 10_000;

/// A share of items with Wilson's 95 % score interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Proportion {
    /// Items that have it.
    pub hits: u32,
    /// All items.
    pub items: u32,
    /// Lower end, 0 to 1.
    pub low: f64,
    /// Upper end, 0 to 1.
    pub high: f64,
}

impl Proportion {
    /// `hits` of `items`; of no items, everything is possible.
    pub fn new(hits: u32, items: u32) -> Self {
        if items == 0 {
            return Self { hits, items, low: 0.0, high: 1.0 };
        }
        let n = f64::from(items);
        let p = f64::from(hits) / n;
        let z2 = Z_95 * Z_95;
        let centre = (p + z2 / (2.0 * n)) / (1.0 + z2 / n);
        let half = Z_95 / (1.0 + z2 / n) * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt();
        // At the ends the formula gives 0 and 1 but for rounding.
        let low = if hits == 0 { 0.0 } else { centre - half };
        let high = if hits == items { 1.0 } else { centre + half };
        Self { hits, items, low, high }
    }

    /// Counts the items of which `has` is true.
    pub fn of<T>(items: impl IntoIterator<Item = T>, has: impl Fn(&T) -> bool) -> Self {
        let (hits, all) = items.into_iter().fold((0, 0), |(hits, all), item| (hits + u32::from(has(&item)), all + 1));
        Self::new(hits, all)
    }

    /// The share itself, 0 to 1; of no items, 0.
    pub fn share(&self) -> f64 {
        if self.items == 0 { 0.0 } else { f64::from(self.hits) / f64::from(self.items) }
    }
}

/// A mean over items with a percentile-bootstrap 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Mean {
    /// The mean.
    pub mean: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
    /// Items.
    pub items: u32,
}

impl Mean {
    /// The mean of `values`, all finite; resampled items are chosen from `seed`, so that the same results give the same
    /// interval. `None` of no values.
    pub fn of(values: &[f64], seed: u64) -> Option<Self> {
        if values.is_empty() {
            return None;
        }
        let n = values.len();
        let count = n as f64;
        let mean = values.iter().sum::<f64>() / count;
        let mut random = SplitMix(seed);
        let mut means: Vec<f64> =
            (0..RESAMPLES).map(|_| (0..n).map(|_| values[random.below(n)]).sum::<f64>() / count).collect();
        means.sort_by(f64::total_cmp);
        let at = |share: f64| means[((RESAMPLES - 1) as f64 * share).round() as usize];
        Some(Self { mean, low: at(0.025), high: at(0.975), items: u32::try_from(n).unwrap_or(u32::MAX) })
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): enough for resampling, and the same everywhere.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform below `n` up to 2^-64 · n.
    fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64, tolerance: f64) {
        assert!((a - b).abs() <= tolerance, "{a} is not {b}");
    }

    #[test]
    fn wilson_as_in_the_literature() {
        // Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29, score intervals without correction.
        for (hits, items, low, high) in
            [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]
        {
            let p = Proportion::new(hits, items);
            close(p.low, low, 5e-5);
            close(p.high, high, 5e-5);
        }
        let all = Proportion::new(20, 20);
        close(all.low, 1.0 - 0.1611, 5e-5);
        close(all.high, 1.0, 0.0);
        assert_eq!(Proportion::new(0, 0).share(), 0.0);
    }

    #[test]
    fn bootstrap_of_a_mean_has_the_width_that_theory_gives() {
        // 400 values of variance 1/12: the standard error is sqrt(1/12/400) = 0.01443.
        let values: Vec<f64> = (0..400).map(|i| (f64::from(i) + 0.5) / 400.0).collect();
        let mean = Mean::of(&values, 7).unwrap();
        close(mean.mean, 0.5, 1e-12);
        close(mean.high - mean.low, 2.0 * Z_95 * 0.014_43, 2e-3);
        close((mean.high + mean.low) / 2.0, 0.5, 2e-3);
        assert_eq!(Mean::of(&values, 7), Mean::of(&values, 7));
        assert_ne!(Mean::of(&values, 7), Mean::of(&values, 8));
    }

    #[test]
    fn one_value_has_no_width_and_none_has_no_mean() {
        assert_eq!(Mean::of(&[2.5], 1), Some(Mean { mean: 2.5, low: 2.5, high: 2.5, items: 1 }));
        assert_eq!(Mean::of(&[], 1), None);
    }
}
