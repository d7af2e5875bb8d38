//! The outer step: what several replicas changed becomes the next weights (DiLoCo, arXiv 2311.08105).
//!
//! g = W - Σ nᵢ Wᵢ / Σ nᵢ with nᵢ the samples of replica i, summed in f64 in the order of replicas, whatever order deltas come
//! in; m ← μ m + g; W ← W - η (g + μ m), which is Nesterov's step. Rounded once, so that one replica with η = 1 and μ = 0 gives
//! its own weights bit for bit. Does not know which replicas were to come.

use super::delta::{Delta, weights_hash};

/// Deltas cannot be made into weights. Fragments follow "failed to".
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum OuterError {
    /// The bytes are no delta.
    #[error("read a delta: {what}")]
    File {
        /// What is wrong.
        what: String,
    },
    /// A replica diverged, or its device computes wrongly.
    #[error("use the delta of replica {replica}: it holds numbers that are not finite")]
    NotFinite {
        /// Whose.
        replica: u32,
    },
    /// It was made from other weights.
    #[error("use the delta of replica {replica}: {what}")]
    Foreign {
        /// Whose.
        replica: u32,
        /// What differs.
        what: String,
    },
    /// Nothing to step by.
    #[error("step: no delta stands behind a sample")]
    Empty,
}

/// Size of an outer step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OuterRate {
    /// η.
    pub learning_rate: f64,
    /// μ.
    pub momentum: f64,
}

impl OuterRate {
    /// By the rounds that are planned: momentum needs rounds to pay off.
    pub fn planned(rounds: u32) -> Self {
        let (learning_rate, momentum) = match rounds {
            100.. => (0.7, 0.9),
            30..100 => (0.7, 0.5),
            0..30 => (1.0, 0.0),
        };
        Self { learning_rate, momentum }
    }
}

/// What an outer step gives.
#[derive(Debug, Clone, PartialEq)]
pub struct OuterStep {
    /// The next weights.
    pub weights: Vec<f32>,
    /// m, for the next round.
    pub momentum: Vec<f32>,
    /// L2 norm of g.
    pub delta_norm: f64,
}

/// Steps from `start`, with the momentum of earlier rounds, by deltas with the samples behind each.
///
/// # Errors
/// [`OuterError`]: a delta that is not finite, or was made from other weights or twice; no samples.
///
/// # Panics
/// If there is not one momentum a weight.
pub fn outer_step(
    start: &[f32],
    momentum: Option<&[f32]>,
    deltas: &[(Delta, u32)],
    rate: OuterRate,
) -> Result<OuterStep, OuterError> {
    let mut deltas: Vec<_> = deltas.iter().filter(|(_, samples)| *samples > 0).collect();
    deltas.sort_by_key(|(delta, _)| delta.header.replica);
    check(start, &deltas)?;
    let samples: f64 = deltas.iter().map(|(_, samples)| f64::from(*samples)).sum();
    if let Some(momentum) = momentum {
        assert_eq!(momentum.len(), start.len(), "one momentum a weight");
    }
    let OuterRate { learning_rate, momentum: decay } = rate;
    let mut step = OuterStep {
        weights: Vec::with_capacity(start.len()),
        momentum: Vec::with_capacity(start.len()),
        delta_norm: 0.0,
    };
    for (index, weight) in start.iter().enumerate() {
        let sum: f64 = deltas.iter().map(|(delta, samples)| f64::from(*samples) * delta.end(index, *weight)).sum();
        let (weight, mean) = (f64::from(*weight), sum / samples);
        let g = weight - mean;
        step.delta_norm += g * g;
        let m = decay * momentum.map_or(0.0, |momentum| f64::from(momentum[index])) + g;
        // W - η (g + μ m), written so that η = 1 and μ = 0 leave the mean untouched.
        let next = (1.0 - learning_rate) * weight + learning_rate * mean - learning_rate * decay * m;
        step.weights.push(next as f32);
        step.momentum.push(m as f32);
    }
    step.delta_norm = step.delta_norm.sqrt();
    Ok(step)
}

fn check(start: &[f32], deltas: &[&(Delta, u32)]) -> Result<(), OuterError> {
    if deltas.is_empty() {
        return Err(OuterError::Empty);
    }
    let hash = weights_hash(start);
    for (delta, _) in deltas {
        let replica = delta.header.replica;
        let foreign = |what: String| Err(OuterError::Foreign { replica, what });
        if delta.len() != start.len() {
            return foreign(format!("it is about {} weights, there are {}", delta.len(), start.len()));
        }
        if delta.header.start != hash {
            return foreign(format!("it starts from weights {}, the round from {hash}", delta.header.start));
        }
        if !delta.is_finite() {
            return Err(OuterError::NotFinite { replica });
        }
    }
    match deltas.windows(2).find(|pair| pair[0].0.header.replica == pair[1].0.header.replica) {
        Some(pair) => {
            Err(OuterError::Foreign { replica: pair[0].0.header.replica, what: "it is there twice".to_owned() })
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(salt: usize) -> Vec<f32> {
        (0..700).map(|i| ((i * 7 + salt * 13) as f32 * 0.61).sin()).collect()
    }

    fn delta(replica: u32, quantise: bool) -> (Delta, u32) {
        (Delta::new(0, replica, &weights(0), &weights(replica as usize + 1), quantise), 10 + 3 * replica)
    }

    #[test]
    fn one_replica_at_rate_one_gives_its_own_weights() {
        let mut end = weights(1);
        end[5] = 1e-30;
        let deltas = [(Delta::new(0, 0, &weights(0), &end, false), 7)];
        let step = outer_step(&weights(0), None, &deltas, OuterRate::planned(1)).unwrap();
        assert_eq!(step.weights, end);
        assert!(step.delta_norm > 0.0);
    }

    #[test]
    fn the_order_in_which_deltas_come_does_not_matter() {
        for quantise in [false, true] {
            let rate = OuterRate { learning_rate: 0.7, momentum: 0.9 };
            let inorder: Vec<_> = (0..4).map(|replica| delta(replica, quantise)).collect();
            let shuffled: Vec<_> = [2, 0, 3, 1].into_iter().map(|replica| delta(replica, quantise)).collect();
            let of = |deltas: &[_]| outer_step(&weights(0), Some(&weights(9)), deltas, rate).unwrap();
            assert_eq!(weights_hash(&of(&inorder).weights), weights_hash(&of(&shuffled).weights));
            assert_ne!(weights_hash(&of(&inorder).weights), weights_hash(&of(&inorder[..3]).weights));
        }
    }

    /// W = 1, replicas at 0 (3 samples) and 2 (1): g = 1 - 0.5; m = 0.9 · 2 + 0.5; W' = 1 - 0.7 (0.5 + 0.9 · 2.3).
    #[test]
    fn samples_weigh_and_momentum_is_nesterovs() {
        let deltas = [(Delta::new(0, 0, &[1.0], &[0.0], false), 3), (Delta::new(0, 1, &[1.0], &[2.0], false), 1)];
        let rate = OuterRate { learning_rate: 0.7, momentum: 0.9 };
        let step = outer_step(&[1.0], Some(&[2.0]), &deltas, rate).unwrap();
        assert!((step.momentum[0] - 2.3).abs() < 1e-6);
        assert!((step.weights[0] - (1.0 - 0.7 * (0.5 + 0.9 * 2.3))).abs() < 1e-6);
        assert!((step.delta_norm - 0.5).abs() < 1e-9);
    }

    #[test]
    fn what_does_not_belong_is_refused() {
        let rate = OuterRate::planned(50);
        let refused = |deltas: &[(Delta, u32)]| outer_step(&weights(0), None, deltas, rate).unwrap_err();
        assert_eq!(refused(&[]), OuterError::Empty);
        assert_eq!(refused(&[(delta(0, true).0, 0)]), OuterError::Empty);
        assert!(matches!(refused(&[delta(1, true), delta(1, true)]), OuterError::Foreign { replica: 1, .. }));
        let other = Delta::new(0, 2, &weights(5), &weights(6), true);
        assert!(matches!(refused(&[delta(0, true), (other, 3)]), OuterError::Foreign { replica: 2, .. }));
        let mut end = weights(1);
        end[0] = f32::NAN;
        let broken = Delta::new(0, 3, &weights(0), &end, true);
        assert_eq!(refused(&[delta(0, true), (broken, 3)]), OuterError::NotFinite { replica: 3 });
    }
}
