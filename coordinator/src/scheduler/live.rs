//! What the scheduler knows but does not journal: sessions, telemetry, progress, leases, and the indices of what is journaled.
//!
//! Lost at a restart, and rebuilt from the journal and the workers' greetings: each open attempt gets one fresh lease in which
//! its worker must say that it still holds it. Follows the events; decides nothing.

use std::collections::{BTreeMap, BTreeSet};

use protocol::control::SeatProgress;
use protocol::hardware::Telemetry;
use protocol::ids::{AttemptId, DeviceId, DeviceRef, Role, RunId, ShardId, WorkerId};
use protocol::limits::SUSPECT_AFTER_MS;
use protocol::time::UnixMillis;

use super::board::{Board, Occupant};
use super::event::{AttemptPlaced, Event};
use super::placement::{Plans, Ranking};
use super::queue::{PoolKey, Queue};
use super::request::Request;
use super::state::{Attempt, State};
use super::status::{ShardState, WorkerState};
use super::throughput::Times;
use super::timer::{Timer, Timers};
use super::training::OpenedRound;
use super::view::{REFERENCE_MFLOPS, reference_unit_us, speed_mflops};

/// How much slower than on the reference card a program is taken to be at most before it was measured.
const COMMAND_SLOWER_MAX: u64 = 10;

/// The soft state.
#[derive(Debug, Clone, Default)]
pub struct Live {
    /// The newest session of each worker heard of since the start, also if it is over.
    pub sessions: BTreeMap<WorkerId, Session>,
    /// Every unfinished seat of an open attempt.
    pub seats: BTreeMap<(AttemptId, Role), LiveSeat>,
    /// The same by worker.
    pub seats_of: BTreeMap<WorkerId, BTreeSet<(AttemptId, Role)>>,
    /// The deadlines.
    pub timers: Timers,
    /// Devices with what holds them.
    pub board: Board,
    /// Shards that may be placed.
    pub queue: Queue,
    /// Predictions since the throughput table last had news.
    pub times: Times,
    /// Grows when devices come into service or leave it, and when a device model reports another speed.
    pub fleet_version: u64,
    /// A forecast: workers do not speak, and their silence means nothing.
    pub is_forecast: bool,
    /// What was planned and is still a good plan.
    pub(super) plans: Plans,
    /// Orders of requests, while much waits.
    pub(super) rankings: BTreeMap<PoolKey, Ranking>,
    /// Device models' speed before anything was measured, millions of f32 operations a second.
    speeds: BTreeMap<String, u64>,
    /// Models that a device's executors have loaded, by lane: seats of a pair on one device have one each.
    warm: BTreeMap<DeviceRef, BTreeMap<u32, BTreeSet<String>>>,
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
        let mut live = Self { board: Board::of(state, now), ..Self::default() };
        for (attempt, seat) in state.unfinished_seats() {
            live.open_seat(attempt, seat.role, seat.device.worker, now.plus_ms(state.settings.lease_ttl_ms));
        }
        for worker in state.workers.keys() {
            live.note_speeds(state, *worker);
        }
        for (run, body) in &state.runs {
            for index in &body.waiting {
                let shard = ShardId { run: *run, index: *index };
                let not_before = body.shards[*index as usize].not_before;
                if not_before > now {
                    live.timers.set(Timer::Retry(shard), not_before);
                } else {
                    live.enqueue(state, shard);
                }
            }
        }
        live
    }

    /// Keeps up with an event that was just applied to `state`.
    pub(super) fn follow(&mut self, event: &Event, state: &State, now: UnixMillis) {
        match event {
            Event::DevicesReported { worker, .. } => {
                self.board.refresh(state, *worker);
                self.note_speeds(state, *worker);
            }
            Event::ModelFoundMissing { worker, .. }
            | Event::DrainStarted { worker }
            | Event::DrainEnded { worker }
            | Event::WorkerRevoked { worker } => {
                self.fleet_version += 1;
                self.board.touch(*worker);
            }
            Event::KernelFoundMissing { .. } | Event::ThroughputTaught { .. } => self.board.touch_all(),
            Event::DeviceQuarantined { device, .. } | Event::DeviceReleased { device } => {
                self.board.touch(device.worker);
            }
            Event::RunAccepted(accepted) => self.enqueue_ready(state, accepted.run, |_| true),
            Event::RoundOpened { run, training, .. } => self.round_opened(state, *run, *training),
            Event::TrainingEnded { run, training } => {
                let group = state.runs.get(run).and_then(|run| run.trainings.get(*training as usize));
                if let Some(group) = group.map(|training| training.group) {
                    self.enqueue_dependents(state, *run, group as usize);
                }
            }
            Event::AttemptPlaced(placed) => self.attempt_placed(placed, state, now),
            Event::AttemptResumed { attempt } => self.attempt_resumed(*attempt, state, now),
            Event::SeatFreed { attempt, role } => self.board.vacate(*attempt, *role, now),
            Event::SeatCompleted(done) => {
                self.note_warm(state, done.attempt, done.role);
                self.close_seat(state, done.attempt, done.role);
                self.board.vacate(done.attempt, done.role, now);
            }
            Event::AttemptFailed { attempt, role, .. } => {
                self.forget_warm(state, *attempt, *role);
                self.close_attempt(state, *attempt, now);
            }
            Event::ShardCommitted { attempt } => self.shard_committed(*attempt, state, now),
            Event::ShardRequeued { shard, not_before } if *not_before > now => {
                self.timers.set(Timer::Retry(*shard), *not_before);
            }
            Event::ShardRequeued { shard, .. } | Event::ShardReopened { shard } => self.enqueue(state, *shard),
            Event::ShardFailed { shard } => self.queue.remove(*shard),
            Event::RunCancelled { run, .. } => self.run_cancelled(*run, state, now),
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
        let silent_ms = if self.is_forecast { 0 } else { now.since_ms(session.heard_at) };
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

    /// Whether an executor of a device has a model loaded, as far as known.
    pub fn is_warm(&self, device: &DeviceRef, model: &str) -> bool {
        self.warm.get(device).is_some_and(|lanes| lanes.values().any(|models| models.contains(model)))
    }

    /// A device model's speed before anything was measured there, millions of f32 operations a second.
    pub fn mflops(&self, model: &str) -> u64 {
        self.speeds.get(model).copied().unwrap_or(REFERENCE_MFLOPS).max(1)
    }

    /// Microseconds that a unit of a class takes on a device model, before anything was measured.
    pub fn prior_us(&self, class: &str, model: &str) -> u64 {
        let reference_us = reference_unit_us(class);
        let us = u128::from(reference_us) * u128::from(REFERENCE_MFLOPS) / u128::from(self.mflops(model));
        let us = u64::try_from(us).unwrap_or(u64::MAX).max(1);
        // A program that somebody runs on a slow device has seldom much use for a fast one.
        if class.starts_with("command/") { us.min(reference_us * COMMAND_SLOWER_MAX) } else { us }
    }

    /// Puts a waiting shard into the queue if the experiments before its own have committed.
    pub(super) fn enqueue(&mut self, state: &State, id: ShardId) {
        let Some(run) = state.runs.get(&id.run) else { return };
        let Some(shard) = run.shards.get(id.index as usize) else { return };
        let ready = run.group_index(id.index).is_some_and(|group| run.is_ready(group));
        if shard.state == ShardState::Waiting && ready {
            let key = PoolKey { priority: std::cmp::Reverse(run.priority), account: run.account.clone() };
            self.queue.insert(key, id, Request::of(state, run, id.index, shard));
        }
    }

    fn enqueue_ready(&mut self, state: &State, id: RunId, wanted: impl Fn(u32) -> bool) {
        let Some(run) = state.runs.get(&id) else { return };
        for (number, group) in (0u32..).zip(&run.groups) {
            if !wanted(number) || !run.is_ready(number as usize) {
                continue;
            }
            for index in group.first..group.first + group.count {
                self.enqueue(state, ShardId { run: id, index });
            }
        }
    }

    fn attempt_placed(&mut self, placed: &AttemptPlaced, state: &State, now: UnixMillis) {
        let id = placed.attempt;
        self.timers.stop(Timer::Retry(id.shard));
        self.queue.remove(id.shard);
        let threads = state.shard(id.shard).and_then(|shard| shard.spec.threads());
        let lease = now.plus_ms(state.settings.lease_ttl_ms);
        for seat in &placed.seats {
            self.open_seat(id, seat.role, seat.device.worker, lease);
            let (role, bytes, expected_ms, load) = (seat.role, seat.reserved_bytes, seat.expected_ms, seat.load);
            let occupant = Occupant { attempt: id, role, bytes, threads, load, expected_ms, since: now };
            self.board.occupy(&seat.device, seat.lane, occupant, now);
        }
    }

    fn attempt_resumed(&mut self, id: AttemptId, state: &State, now: UnixMillis) {
        self.timers.stop(Timer::Retry(id.shard));
        self.queue.remove(id.shard);
        let lease = now.plus_ms(state.settings.lease_ttl_ms);
        let threads = state.shard(id.shard).and_then(|shard| shard.spec.threads());
        for seat in state.attempt(id).into_iter().flat_map(Attempt::unfinished) {
            self.open_seat(id, seat.role, seat.device.worker, lease);
            if !seat.freed {
                let (role, bytes, expected_ms, load) = (seat.role, seat.reserved_bytes, seat.expected_ms, seat.load);
                let occupant = Occupant { attempt: id, role, bytes, threads, load, expected_ms, since: now };
                self.board.occupy(&seat.device, seat.lane, occupant, now);
            }
        }
    }

    fn shard_committed(&mut self, id: AttemptId, state: &State, now: UnixMillis) {
        let attempts = state.shard(id.shard).map_or(&[][..], |shard| &shard.attempts);
        // Those that were superseded; of the others nothing is left.
        for attempt in attempts.iter().rev().take(2) {
            self.close_attempt(state, AttemptId { shard: id.shard, fence: attempt.fence }, now);
        }
        let group = state.runs.get(&id.shard.run).and_then(|run| run.group_index(id.shard.index));
        if let Some(group) = group {
            self.enqueue_dependents(state, id.shard.run, group);
        }
    }

    /// The shards of experiments that waited for this one alone, if nothing of it is left.
    fn enqueue_dependents(&mut self, state: &State, id: RunId, group: usize) {
        let Some(run) = state.runs.get(&id).filter(|run| run.uncommitted.get(group) == Some(&0)) else { return };
        let after = |number: u32| run.groups[number as usize].after.iter().any(|earlier| *earlier as usize == group);
        if run.groups.iter().any(|group| !group.after.is_empty()) {
            self.enqueue_ready(state, id, after);
        }
    }

    fn round_opened(&mut self, state: &State, id: RunId, training: u32) {
        let round = state.runs.get(&id).and_then(|run| run.newest_round(training));
        for index in round.into_iter().flat_map(OpenedRound::indices) {
            self.enqueue(state, ShardId { run: id, index });
        }
    }

    fn run_cancelled(&mut self, run: RunId, state: &State, now: UnixMillis) {
        self.queue.remove_run(run);
        let of_run = |shard: ShardId| shard.run == run;
        let over: Vec<_> =
            self.seats.keys().map(|(attempt, _)| *attempt).filter(|attempt| of_run(attempt.shard)).collect();
        over.into_iter().for_each(|attempt| self.close_attempt(state, attempt, now));
        let first = ShardId { run, index: 0 };
        let retries: Vec<_> = self.timers.iter().filter(|timer| *timer >= Timer::Retry(first)).collect();
        for timer in retries {
            if matches!(timer, Timer::Retry(shard) if of_run(shard)) {
                self.timers.stop(timer);
            }
        }
    }

    fn open_seat(&mut self, attempt: AttemptId, role: Role, worker: WorkerId, lease_until: UnixMillis) {
        self.seats.insert((attempt, role), LiveSeat::default());
        self.seats_of.entry(worker).or_default().insert((attempt, role));
        self.timers.set(Timer::Lease(attempt, role), lease_until);
    }

    fn close_seat(&mut self, state: &State, attempt: AttemptId, role: Role) {
        if self.seats.remove(&(attempt, role)).is_none() {
            return;
        }
        self.timers.stop(Timer::Lease(attempt, role));
        let worker = state.attempt(attempt).and_then(|attempt| attempt.seat(role)).map(|seat| seat.device.worker);
        if let Some(seats) = worker.and_then(|worker| self.seats_of.get_mut(&worker)) {
            seats.remove(&(attempt, role));
        }
    }

    fn close_attempt(&mut self, state: &State, attempt: AttemptId, now: UnixMillis) {
        self.timers.stop(Timer::Straggler(attempt));
        for role in [Role::Main, Role::Source, Role::Target] {
            self.close_seat(state, attempt, role);
        }
        self.board.vacate_attempt(attempt, now);
    }

    fn note_speeds(&mut self, state: &State, worker: WorkerId) {
        for body in state.workers.get(&worker).map_or(&[][..], |worker| worker.devices()) {
            let mflops = speed_mflops(body);
            if self.speeds.insert(body.model.clone(), mflops) != Some(mflops) {
                self.fleet_version += 1;
                self.times.forget();
            }
        }
    }

    fn note_warm(&mut self, state: &State, id: AttemptId, role: Role) {
        let Some(shard) = state.shard(id.shard) else { return };
        let models = shard.spec.models_of(role);
        if models.is_empty() {
            return;
        }
        if let Some(seat) = state.attempt(id).and_then(|attempt| attempt.seat(role)) {
            let warm = self.warm.entry(seat.device.clone()).or_default().entry(seat.lane).or_default();
            if models.iter().any(|model| !warm.contains(*model)) {
                *warm = models.into_iter().map(str::to_owned).collect();
            }
        }
    }

    fn forget_warm(&mut self, state: &State, id: AttemptId, role: Role) {
        if let Some(seat) = state.attempt(id).and_then(|attempt| attempt.seat(role)) {
            self.warm.remove(&seat.device);
        }
    }
}
