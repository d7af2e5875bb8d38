//! The order of an epoch: a permutation fixed by seed and epoch.

use crate::random::Random;

/// Permutations of one corpus; the last one used is kept.
#[derive(Debug)]
pub(super) struct Order {
    seed: u64,
    samples: u64,
    /// Epoch and its permutation.
    current: Option<(u64, Vec<u64>)>,
}

impl Order {
    pub(super) fn new(seed: u64, samples: u64) -> Self {
        Self { seed, samples, current: None }
    }

    /// The sample at `place`, counted over epochs.
    pub(super) fn id(&mut self, place: u64) -> u64 {
        let (epoch, place) = (place / self.samples, place % self.samples);
        if self.current.as_ref().is_none_or(|(current, _)| *current != epoch) {
            self.current = Some((epoch, self.permutation(epoch)));
        }
        let (_, permutation) = self.current.as_ref().expect("set above");
        permutation[usize::try_from(place).expect("less than the samples")]
    }

    /// Fisher and Yates.
    fn permutation(&self, epoch: u64) -> Vec<u64> {
        let mut random = Random::new(self.seed, &format!("corpus epoch {epoch}"));
        let mut ids: Vec<u64> = (0..self.samples).collect();
        for last in (1..ids.len()).rev() {
            ids.swap(last, random.below(last + 1));
        }
        ids
    }
}
