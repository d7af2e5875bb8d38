//! Draws from a seed. Separate streams for separate things, so that a change in one leaves the draws of the others as they
//! were.

/// What a stream of draws is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// The cluster: boxes, cards, work.
    Cluster,
    /// What goes wrong, and when.
    Faults,
    /// Latency, duplicates, late messages.
    Wire,
    /// What workers do: how long exactly, which failure.
    Work,
    /// The journal's disk.
    Disk,
    /// Trainings of runs.
    Trainings,
}

/// A deterministic source of numbers.
#[derive(Debug, Clone)]
pub struct Rng(fastrand::Rng);

impl Rng {
    /// The stream of a seed.
    pub fn new(seed: u64, stream: Stream) -> Self {
        // Neighbouring seeds must not give neighbouring states: one round of splitmix64.
        let mut mixed = seed.wrapping_mul(8).wrapping_add(stream as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self(fastrand::Rng::with_seed(mixed ^ (mixed >> 31)))
    }

    /// A number from `low` to `high`, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        self.0.u64(low..=high.max(low))
    }

    /// An index below `count`, which is at least 1.
    pub fn index(&mut self, count: usize) -> usize {
        self.0.usize(0..count.max(1))
    }

    /// `true` in `permille` of 1000 cases.
    pub fn chance(&mut self, permille: u64) -> bool {
        self.0.u64(0..1000) < permille
    }

    /// One of `choices`.
    ///
    /// # Panics
    /// If there is none.
    pub fn pick<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.index(choices.len())]
    }
}
