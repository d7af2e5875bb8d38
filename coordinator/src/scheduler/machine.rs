//! The scheduler itself: what each input leads to, and the order in which events and effects come out.
//!
//! Inputs about workers' sessions are in `sessions.rs`, about seats' outcomes in `outcomes.rs`, orders of people in
//! `orders.rs`; here are the frame around them and the placing of what waits.

use std::collections::VecDeque;

use protocol::control::{SeatAddress, StartSeat, ToWorker};
use protocol::ids::{AttemptId, Role, WorkerId};
use protocol::time::UnixMillis;

use super::apply::IllegalTransition;
use super::event::{AttemptPlaced, Event, Record};
use super::input::{Answer, Effect, Input, Rejection};
use super::live::Live;
use super::placement::{Placement, Round, Scope};
use super::queue::PoolKey;
use super::state::State;
use super::timer::Timer;
use super::view::View;

/// Decides which shard runs where, and what becomes of it.
///
/// A value without I/O. The driver calls, in this order:
/// 1. once: [`Scheduler::new`], then [`replay`](Self::replay) for every record of the journal, then
///    [`start`](Self::start);
/// 2. for each thing that happens: [`handle`](Self::handle);
/// 3. after one or several of them: [`take_events`](Self::take_events), and append these to the journal. Only when they are
///    durable:
/// 4. [`poll_effect`](Self::poll_effect) until it gives `None`, and answer who asked;
/// 5. [`next_deadline`](Self::next_deadline): by then at the latest `handle` with [`Input::Tick`].
///
/// If the journal cannot be written, the value is ahead of it and must be dropped, its events and effects with it: a new one
/// replayed from the journal knows only what is durable.
///
/// [`state`](Self::state) and [`live`](Self::live) may be read at any time.
#[derive(Debug, Clone, Default)]
pub struct Scheduler {
    pub(super) state: State,
    pub(super) live: Live,
    pub(super) now: UnixMillis,
    events: Vec<Record>,
    effects: VecDeque<Effect>,
    /// Something changed that may let a waiting shard start.
    pub(super) unsettled: bool,
}

impl Scheduler {
    /// An empty cluster.
    pub fn new() -> Self {
        Self::default()
    }

    /// Applies a record of the journal; only before [`Self::start`].
    ///
    /// # Errors
    /// If the record does not follow on those before it: the journal is damaged.
    pub fn replay(&mut self, record: &Record) -> Result<(), IllegalTransition> {
        self.state.apply(record)
    }

    /// Begins to live: every open attempt gets one fresh lease in which its worker must greet and say that it holds it.
    pub fn start(&mut self, now: UnixMillis) {
        self.now = now.max(self.state.at);
        self.live = Live::after_start(&self.state, self.now);
        self.unsettled = true;
    }

    /// Makes this value a forecast of itself: workers do not speak in it, and their silence means nothing. What it decides is
    /// never carried out.
    #[must_use]
    pub fn forecast(mut self) -> Self {
        self.live.is_forecast = true;
        self.state.settings.lease_ttl_ms = u64::MAX / 4;
        for (attempt, role) in self.live.seats.keys().copied().collect::<Vec<_>>() {
            self.renew_lease(attempt, role);
        }
        self
    }

    /// Takes an input. Time does not go back: an earlier `now` than before counts as the same.
    ///
    /// # Errors
    /// If the input is refused; then it changed nothing.
    pub fn handle(&mut self, now: UnixMillis, input: Input) -> Result<Answer, Rejection> {
        self.now = now.max(self.now);
        let answer = self.decide(input);
        if std::mem::take(&mut self.unsettled) {
            self.place_waiting();
        }
        #[cfg(debug_assertions)]
        if let Err(broken) = super::invariants::check(&self.state, &self.live) {
            panic!("{broken}");
        }
        answer
    }

    /// Everything decided since the last call, in order. Must be durable before an effect is polled.
    #[must_use]
    pub fn take_events(&mut self) -> Vec<Record> {
        std::mem::take(&mut self.events)
    }

    /// The next thing to do in the world.
    ///
    /// # Panics
    /// If events have not been taken: an effect must not be seen before its event is durable.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        assert!(self.events.is_empty(), "events must be taken and made durable before effects are polled");
        self.effects.pop_front()
    }

    /// When [`Input::Tick`] is due; `None`: nothing waits for time.
    pub fn next_deadline(&self) -> Option<UnixMillis> {
        self.live.timers.next()
    }

    /// What is in the journal, and what was decided since.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// What is not in the journal.
    pub fn live(&self) -> &Live {
        &self.live
    }

    /// The `now` of the newest input.
    pub fn now(&self) -> UnixMillis {
        self.now
    }

    fn decide(&mut self, input: Input) -> Result<Answer, Rejection> {
        match input {
            Input::Configure(settings) => {
                if settings != self.state.settings {
                    self.live.board.touch_all();
                    self.emit(Event::SettingsChanged(settings));
                }
                Ok(Answer::Done)
            }
            Input::Tick => {
                self.tick();
                Ok(Answer::Done)
            }
            Input::CreateToken { secret_hash, ttl_ms, uses } => self.create_token(secret_hash, ttl_ms, uses),
            Input::RevokeToken(token) => self.revoke_token(token),
            Input::RedeemToken { token, spki_sha256, hostname } => self.redeem_token(token, spki_sha256, &hostname),
            Input::Connected(connected) => self.connected(*connected),
            Input::Disconnected { worker, session } => {
                self.disconnected(worker, session);
                Ok(Answer::Done)
            }
            Input::Heartbeat { worker, session, heartbeat } => {
                self.heartbeat(worker, session, heartbeat);
                Ok(Answer::Done)
            }
            Input::SeatFinished { worker, session, finished } => {
                self.seat_finished(worker, session, finished);
                Ok(Answer::Done)
            }
            Input::SeatFailed { worker, session, failed } => {
                self.seat_failed(worker, session, &failed);
                Ok(Answer::Done)
            }
            Input::Submit(run) => self.submit(run),
            Input::CancelRun { run, reason } => self.cancel_run(run, &reason),
            Input::RetryRun(run) => self.retry_run(run),
            Input::SetDrain { worker, on } => self.set_drain(worker, on),
            Input::RevokeWorker(worker) => self.revoke_worker(worker),
            Input::ReleaseDevice(device) => self.release_device(device),
            Input::TeachThroughput(rows) => {
                self.emit(Event::ThroughputTaught { rows });
                self.unsettled = true;
                Ok(Answer::Done)
            }
        }
    }

    fn tick(&mut self) {
        while let Some(timer) = self.live.timers.pop_due(self.now) {
            match timer {
                Timer::Lease(attempt, role) => self.lease_expired(attempt, role),
                Timer::Retry(shard) => {
                    self.live.enqueue(&self.state, shard);
                    self.unsettled = true;
                }
                Timer::Straggler(attempt) => self.try_elsewhere(attempt),
            }
        }
    }

    fn place_waiting(&mut self) {
        let fresh = self.live.queue.take_fresh();
        let changed = self.live.board.take_dirty();
        if self.live.queue.is_empty() || !fresh && changed.is_empty() {
            return;
        }
        let scope = if fresh { Scope::All } else { Scope::Rows(changed) };
        let (mut plans, mut rankings) = (std::mem::take(&mut self.live.plans), std::mem::take(&mut self.live.rankings));
        loop {
            let view = View { state: &self.state, live: &self.live, now: self.now };
            let placements = Round::run(view, &scope, &mut plans, &mut rankings);
            if placements.is_empty() {
                break;
            }
            placements.into_iter().for_each(|placement| self.place(placement, false));
        }
        // What was planned for shards that are all placed or cancelled explains nothing any more.
        let waits = |key: &PoolKey| self.live.queue.pool(key).is_some_and(|pool| pool.shards > 0);
        plans.retain(|key, _| waits(key));
        rankings.retain(|key, _| waits(key));
        self.live.plans = plans;
        self.live.rankings = rankings;
    }

    /// Gives a shard the devices that were chosen for it.
    pub(super) fn place(&mut self, placement: Placement, speculative: bool) {
        let Placement { attempt, pool, reference_ms, seats, reasons } = placement;
        let weight = self.state.settings.weights.get(&pool.account).copied().unwrap_or(1);
        self.live.queue.charge(&pool, reference_ms, weight);
        let roles: Vec<_> = seats.iter().map(|seat| seat.role).collect();
        let expected_ms = seats.iter().map(|seat| seat.expected_ms).max().unwrap_or(0);
        self.emit(Event::AttemptPlaced(AttemptPlaced { attempt, seats, speculative, reasons }));
        if !speculative {
            self.watch_straggler(attempt, expected_ms);
        }
        for role in roles {
            self.send_start(attempt, role);
        }
    }

    /// Decides an event: applies it, follows it, keeps it for the journal.
    ///
    /// # Panics
    /// If the event does not fit the state: a bug here, which must not reach the journal.
    pub(super) fn emit(&mut self, event: Event) {
        let record = Record { seq: self.state.seq + 1, at: self.now, event };
        if let Err(illegal) = self.state.apply(&record) {
            panic!("the scheduler decided an illegal event: {illegal}");
        }
        self.live.follow(&record.event, &self.state, self.now);
        self.events.push(record);
    }

    /// Queues a message for a worker if it is connected.
    pub(super) fn send(&mut self, worker: WorkerId, message: impl Into<ToWorker>) {
        if let Some(session) = self.live.connected(worker) {
            let effect = Effect::Send { worker, session: session.number, message: message.into() };
            self.effects.push_back(effect);
        }
    }

    pub(super) fn effect(&mut self, effect: Effect) {
        self.effects.push_back(effect);
    }

    /// Queues the start of a seat, unless its worker is not connected or a seat that it needs has no known address: then the
    /// next greeting or heartbeat leads here again.
    pub(super) fn send_start(&mut self, id: AttemptId, role: Role) {
        let Some(attempt) = self.state.attempt(id) else { return };
        let Some(seat) = attempt.seat(role) else { return };
        let worker = seat.device.worker;
        let mut seats = Vec::with_capacity(attempt.seats.len());
        for other in &attempt.seats {
            let address = self.live.sessions.get(&other.device.worker).map(|session| session.addresses.clone());
            if address.is_none() && other.outcome.is_none() {
                return;
            }
            let spki = self.state.workers.get(&other.device.worker).map(|worker| worker.spki_sha256);
            seats.push(SeatAddress {
                role: other.role,
                worker: other.device.worker,
                spki_sha256: spki.unwrap_or_default(),
                addresses: address.unwrap_or_default(),
            });
        }
        let Some((run, spec)) =
            self.state.runs.get(&id.shard.run).zip(self.state.shard(id.shard).map(|shard| shard.spec.clone()))
        else {
            return;
        };
        let inputs = run.inputs_of(&spec, role);
        let start = StartSeat {
            attempt: id,
            role,
            device: seat.device.device.clone(),
            reserved_bytes: seat.reserved_bytes,
            lane: seat.lane,
            spec,
            seats,
            inputs,
        };
        if self.live.connected(worker).is_none() {
            return;
        }
        if let Some(live) = self.live.seats.get_mut(&(id, role)) {
            live.sent_at = Some(self.now);
        }
        self.send(worker, start);
    }
}
