//! All deadlines in one table.
//!
//! Does not run them: [`super::Scheduler::next_deadline`] tells the driver when to come back with [`super::Input::Tick`].

use std::collections::{BTreeMap, BTreeSet};

use protocol::ids::{AttemptId, Role, ShardId};
use protocol::time::UnixMillis;

/// What a deadline is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Timer {
    /// When to give up a seat whose worker has been silent about it.
    Lease(AttemptId, Role),
    /// When to look at a shard again that waits after a failure.
    Retry(ShardId),
    /// When an attempt has taken so much longer than expected that another device might overtake it.
    Straggler(AttemptId),
}

/// The deadlines that are set, at most one a timer.
#[derive(Debug, Clone, Default)]
pub struct Timers {
    by_timer: BTreeMap<Timer, UnixMillis>,
    by_time: BTreeSet<(UnixMillis, Timer)>,
}

impl Timers {
    /// Sets or moves a deadline.
    pub fn set(&mut self, timer: Timer, at: UnixMillis) {
        self.stop(timer);
        self.by_timer.insert(timer, at);
        self.by_time.insert((at, timer));
    }

    /// Forgets a deadline; nothing happens if it is not set.
    pub fn stop(&mut self, timer: Timer) {
        if let Some(at) = self.by_timer.remove(&timer) {
            self.by_time.remove(&(at, timer));
        }
    }

    /// The deadline of a timer.
    pub fn get(&self, timer: Timer) -> Option<UnixMillis> {
        self.by_timer.get(&timer).copied()
    }

    /// The earliest deadline.
    pub fn next(&self) -> Option<UnixMillis> {
        self.by_time.first().map(|(at, _)| *at)
    }

    /// Takes the earliest timer out if its time has come.
    pub fn pop_due(&mut self, now: UnixMillis) -> Option<Timer> {
        let (at, timer) = *self.by_time.first().filter(|(at, _)| *at <= now)?;
        self.by_time.remove(&(at, timer));
        self.by_timer.remove(&timer);
        Some(timer)
    }

    /// Every timer that is set.
    pub fn iter(&self) -> impl Iterator<Item = Timer> {
        self.by_timer.keys().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moved_deadline_fires_once_and_in_order() {
        let shard = |text: &str| Timer::Retry(text.parse().unwrap());
        let mut timers = Timers::default();
        timers.set(shard("r1.0"), UnixMillis(10));
        timers.set(shard("r1.1"), UnixMillis(20));
        timers.set(shard("r1.0"), UnixMillis(30));
        assert_eq!(timers.next(), Some(UnixMillis(20)));
        assert_eq!(timers.pop_due(UnixMillis(19)), None);
        assert_eq!(timers.pop_due(UnixMillis(30)), Some(shard("r1.1")));
        assert_eq!(timers.pop_due(UnixMillis(30)), Some(shard("r1.0")));
        assert_eq!(timers.pop_due(UnixMillis(99)), None);
    }
}
