//! What the scheduler knows but does not journal: sessions, telemetry, progress, leases.
//!
//! Lost at a restart, and rebuilt from the workers' greetings: each open attempt gets one fresh lease in which its worker
//! must say that it still holds it. Follows the events; decides nothing.

use std::collections::BTreeMap;

use protocol::control::SeatProgress;
use protocol::hardware::Telemetry;
use protocol::ids::{AttemptId, DeviceId, Role, ShardId, WorkerId};
use protocol::limits::SUSPECT_AFTER_MS;
use protocol::time::UnixMillis;

use super::event::Event;
use super::state::{Attempt, State};
use super::status::WorkerState;
use super::timer::{Timer, Timers};

/// The soft state.
#[derive(Debug, Clone, Default)]
pub struct Live {
    /// The newest session of each worker heard of since the start, also if it is over.
    pub sessions: BTreeMap<WorkerId, Session>,
    /// Every unfinished seat of an open attempt.
    pub seats: BTreeMap<(AttemptId, Role), LiveSeat>,
    /// The deadlines.
    pub timers: Timers,
}

/// A worker's session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// Its number.
    pub number: u64,
    /// It has not ended.
    pub connected: bool,
    /// When its worker last said anything.
    pub heard_at: UnixMillis,
    /// Socket addresses of the worker's endpoint for peers, best first.
    pub addresses: Vec<String>,
    /// What the worker last said about each device; empty before its first heartbeat.
    pub telemetry: BTreeMap<DeviceId, Telemetry>,
}

/// What is known of a seat that is being worked on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LiveSeat {
    /// How far, as its worker last said.
    pub progress: SeatProgress,
    /// When its start was last sent; `None` if not since the coordinator started.
    pub sent_at: Option<UnixMillis>,
}

impl Live {
    /// As after a start at `now`: nobody has been heard of, every unfinished seat has one fresh lease.
    pub fn after_start(state: &State, now: UnixMillis) -> Self {
        let mut live = Self::default();
        for (attempt, seat) in state.unfinished_seats() {
            live.open_seat(attempt, seat.role, now.plus_ms(state.settings.lease_ttl_ms));
        }
        for (run, body) in &state.runs {
            for index in &body.waiting {
                let not_before = body.shards[*index as usize].not_before;
                if not_before > now {
                    live.timers.set(Timer::Retry(ShardId { run: *run, index: *index }), not_before);
                }
            }
        }
        live
    }

    /// Keeps up with an event that was just applied to `state`.
    pub(super) fn follow(&mut self, event: &Event, state: &State, now: UnixMillis) {
        let lease = now.plus_ms(state.settings.lease_ttl_ms);
        match event {
            Event::AttemptPlaced(placed) => {
                self.timers.stop(Timer::Retry(placed.attempt.shard));
                for seat in &placed.seats {
                    self.open_seat(placed.attempt, seat.role, lease);
                }
            }
            Event::AttemptResumed { attempt } => {
                self.timers.stop(Timer::Retry(attempt.shard));
                let seats = state.attempt(*attempt).into_iter().flat_map(Attempt::unfinished);
                for role in seats.map(|seat| seat.role).collect::<Vec<_>>() {
                    self.open_seat(*attempt, role, lease);
                }
            }
            Event::SeatCompleted(completed) => self.close_seat(completed.attempt, completed.role),
            Event::AttemptFailed { attempt, .. } | Event::ShardCommitted { attempt } => self.close_attempt(*attempt),
            Event::ShardRequeued { shard, not_before } if *not_before > now => {
                self.timers.set(Timer::Retry(*shard), *not_before);
            }
            Event::RunCancelled { run, .. } => {
                let first = ShardId { run: *run, index: 0 };
                let of_run = |shard: ShardId| shard.run == *run;
                let over: Vec<_> =
                    self.seats.keys().map(|(attempt, _)| *attempt).filter(|attempt| of_run(attempt.shard)).collect();
                over.into_iter().for_each(|attempt| self.close_attempt(attempt));
                let retries: Vec<_> = self.timers.iter().filter(|timer| *timer >= Timer::Retry(first)).collect();
                for timer in retries {
                    if matches!(timer, Timer::Retry(shard) if of_run(shard)) {
                        self.timers.stop(timer);
                    }
                }
            }
            _ => {}
        }
    }

    /// The worker's session if it is connected.
    pub fn connected(&self, worker: WorkerId) -> Option<&Session> {
        self.sessions.get(&worker).filter(|session| session.connected)
    }

    /// Where a worker stands at `now`.
    pub fn worker_state(&self, state: &State, worker: WorkerId, now: UnixMillis) -> WorkerState {
        let Some(body) = state.workers.get(&worker) else { return WorkerState::Lost };
        if body.revoked {
            return WorkerState::Revoked;
        }
        let Some(session) = self.sessions.get(&worker) else { return WorkerState::Lost };
        let silent_ms = now.since_ms(session.heard_at);
        if silent_ms >= state.settings.lease_ttl_ms {
            WorkerState::Lost
        } else if !session.connected || silent_ms >= SUSPECT_AFTER_MS {
            WorkerState::Suspect
        } else if body.draining {
            WorkerState::Draining
        } else {
            WorkerState::Online
        }
    }

    fn open_seat(&mut self, attempt: AttemptId, role: Role, lease_until: UnixMillis) {
        self.seats.insert((attempt, role), LiveSeat::default());
        self.timers.set(Timer::Lease(attempt, role), lease_until);
    }

    fn close_seat(&mut self, attempt: AttemptId, role: Role) {
        self.seats.remove(&(attempt, role));
        self.timers.stop(Timer::Lease(attempt, role));
    }

    fn close_attempt(&mut self, attempt: AttemptId) {
        for role in [Role::Main, Role::Source, Role::Target] {
            self.close_seat(attempt, role);
        }
    }
}
