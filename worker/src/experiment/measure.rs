//! Distances between what two runs of a model say next.

/// KL(p ‖ q) of the distributions that two rows of logits mean, nats.
pub(super) fn kl(p: &[f32], q: &[f32]) -> f64 {
    let (p, q) = (log_softmax(p), log_softmax(q));
    p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>().max(0.0)
}

/// The logarithms of the probabilities that logits mean.
pub(super) fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let shifted = || logits.iter().map(|logit| f64::from(*logit) - f64::from(largest));
    let log_sum = shifted().map(f64::exp).sum::<f64>().ln();
    shifted().map(|logit| logit - log_sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kl_is_zero_for_equal_rows_and_right_for_a_coin() {
        assert_eq!(kl(&[1.0, 2.0, -3.0], &[1.0, 2.0, -3.0]), 0.0);
        let expected = 0.5 * (0.5_f64 / 0.75).ln() + 0.5 * (0.5_f64 / 0.25).ln();
        assert!((kl(&[0.0, 0.0], &[3.0_f32.ln(), 0.0]) - expected).abs() < 1e-6);
    }
}
