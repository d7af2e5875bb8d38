//! What was said of ended seats and is not settled yet: said once, again on the next connection, again after a while.

use std::collections::VecDeque;

use protocol::control::{SeatFailed, SeatFinished};
use protocol::time::UnixMillis;

use super::io::{Effect, SeatId};
use super::seat::Phase;
use super::{Agent, REPEAT_OUTCOME_MS};

/// Outcomes said on this connection, oldest first. Settled ones are dropped when they come to the front.
#[derive(Debug, Default)]
pub(super) struct Said(VecDeque<(UnixMillis, SeatId)>);

impl Agent {
    /// A new connection: whoever is there has heard nothing yet.
    pub(super) fn say_all_outcomes(&mut self, now: UnixMillis) {
        self.said.0.clear();
        let ended: Vec<_> = self.seats.iter().filter(|(_, seat)| seat.phase.is_over()).map(|(id, _)| *id).collect();
        for id in ended {
            self.say_outcome(now, id);
        }
    }

    /// Says how a seat ended, if it has and someone listens.
    pub(super) fn say_outcome(&mut self, now: UnixMillis, id: SeatId) {
        if !self.connected {
            return;
        }
        let Some(seat) = self.seats.get_mut(&id) else { return };
        let (message, said_at) = match &mut seat.phase {
            Phase::Published { finished, said_at, .. } => (SeatFinished::clone(finished).into(), said_at),
            Phase::Failed { failure, said_at } => {
                (SeatFailed { attempt: id.attempt, role: id.role, failure: failure.clone() }.into(), said_at)
            }
            _ => return,
        };
        *said_at = Some(now);
        self.said.0.push_back((now, id));
        self.effects.push_back(Effect::Say { message });
    }

    /// Says again what nobody has settled for a while.
    pub(super) fn repeat_outcomes(&mut self, now: UnixMillis) {
        while let Some((said, id)) = self.said.0.front().copied()
            && now.since_ms(said) >= REPEAT_OUTCOME_MS
        {
            self.said.0.pop_front();
            if self.is_unsettled(said, id) {
                self.say_outcome(now, id);
            }
        }
    }

    /// When the oldest of them is due again.
    pub(super) fn next_repeat(&self) -> Option<UnixMillis> {
        let (said, _) = self.said.0.front().filter(|_| self.connected)?;
        Some(said.plus_ms(REPEAT_OUTCOME_MS))
    }

    /// Drops settled ones from the front, so that the oldest is one that matters.
    pub(super) fn drop_settled(&mut self) {
        while let Some((said, id)) = self.said.0.front().copied()
            && !self.is_unsettled(said, id)
        {
            self.said.0.pop_front();
        }
    }

    fn is_unsettled(&self, said: UnixMillis, id: SeatId) -> bool {
        self.seats.get(&id).is_some_and(|seat| seat.phase.said_at() == Some(said))
    }
}
