//! Trying a straggler again elsewhere at a run's tail: the first attempt to finish counts, the other is cancelled.
//!
//! A replica of a training that is far behind is such a tail: those who are done with their share of the round try it again,
//! so that a box that stalls does not hold up the others for longer. Only where nothing of the run waits any more, an idle device is expected to overtake, and the work has no effects beside
//! its artifacts: a researcher's program may not be run twice at once unasked.

use protocol::experiment::ShardSpec;
use protocol::ids::AttemptId;

use super::machine::Scheduler;
use super::placement::Round;
use super::state::AttemptState;
use super::throughput::Basis;
use super::timer::Timer;
use super::view::View;

/// Shortest expected time of an attempt that is watched, milliseconds: below, it ends before anyone could overtake it.
const WATCHED_MS: u64 = 5_000;
/// How often the expected time must pass before an attempt is a straggler, in percent.
const STRAGGLER_PERCENT: u64 = 200;

impl Scheduler {
    /// Sets the time at which an attempt will be a straggler.
    pub(super) fn watch_straggler(&mut self, id: AttemptId, expected_ms: u64) {
        let watched = self
            .state
            .shard(id.shard)
            .is_some_and(|shard| !matches!(shard.spec, ShardSpec::Command(_) | ShardSpec::NoOp(_)));
        if watched && expected_ms >= WATCHED_MS {
            self.live.timers.set(Timer::Straggler(id), self.now.plus_ms(expected_ms * STRAGGLER_PERCENT / 100));
        }
    }

    /// An attempt takes much longer than expected.
    pub(super) fn try_elsewhere(&mut self, id: AttemptId) {
        let Some(shard) = self.state.shard(id.shard) else { return };
        let Some(attempt) = self.state.attempt(id).filter(|attempt| attempt.state == AttemptState::Open) else {
            return;
        };
        if shard.open_attempts().count() != 1 {
            return;
        }
        let elapsed_ms = self.now.since_ms(attempt.placed_at);
        // Asked again when half as much more has passed.
        self.live.timers.set(Timer::Straggler(id), self.now.plus_ms(elapsed_ms / 2 + 1));
        let tail = self.state.runs.get(&id.shard.run).is_some_and(|run| run.waiting.is_empty());
        if !tail {
            return;
        }
        let view = View { state: &self.state, live: &self.live, now: self.now };
        let placement =
            Round::beside(view, id.shard, |expected| expected.basis == Basis::Measured && expected.ms < elapsed_ms);
        if let Some(placement) = placement {
            self.live.timers.stop(Timer::Straggler(id));
            self.place(placement, true);
        }
    }
}
