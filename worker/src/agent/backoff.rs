//! How long to wait before trying again. Pure but for its randomness, which comes in.

use std::time::Duration;

/// Full jitter between a floor and a ceiling that doubles: many workers do not knock at the same moment.
#[derive(Debug, Clone)]
pub struct Backoff {
    floor: Duration,
    first: Duration,
    longest: Duration,
    tries: u32,
}

impl Backoff {
    /// Waits from `floor` to `first` at first, to twice as much at each further try, to `longest` at most.
    pub fn new(floor: Duration, first: Duration, longest: Duration) -> Self {
        Self { floor, first, longest, tries: 0 }
    }

    /// Something went well: begin anew.
    pub fn reset(&mut self) {
        self.tries = 0;
    }

    /// The next wait; `random` is uniform over its type.
    pub fn next_wait(&mut self, random: u32) -> Duration {
        let ceiling = self.first.saturating_mul(1 << self.tries.min(16)).min(self.longest);
        self.tries = self.tries.saturating_add(1);
        let span = ceiling.saturating_sub(self.floor);
        self.floor + span.mul_f64(f64::from(random) / f64::from(u32::MAX))
    }
}

/// A uniform number from the system; half way if it has none, which only costs jitter.
pub fn random() -> u32 {
    let mut bytes = [0; 4];
    match ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut bytes) {
        Ok(()) => u32::from_le_bytes(bytes),
        Err(_) => u32::MAX / 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_longest_and_begin_anew() {
        let ms = Duration::from_millis;
        let mut backoff = Backoff::new(ms(100), ms(500), ms(3000));
        let longest: Vec<_> = (0..5).map(|_| backoff.next_wait(u32::MAX)).collect();
        assert_eq!(longest, [ms(500), ms(1000), ms(2000), ms(3000), ms(3000)]);
        assert_eq!(backoff.next_wait(0), ms(100));
        backoff.reset();
        assert_eq!(backoff.next_wait(u32::MAX), ms(500));
        for _ in 0..100 {
            assert!(backoff.next_wait(u32::MAX) <= ms(3000), "no overflow");
        }
    }
}
