//! Inputs about workers' sessions: greetings, heartbeats, ends, and what a worker says it holds.
//!
//! A worker's list of held seats is compared with the journal each time it speaks: that is the whole of re-adoption after a
//! restart of either side.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use protocol::control::{
    CancelSeat, Failure, FailureKind, Heartbeat, HeldSeat, Hello, SeatProgress, SeatSettled, Terms,
};
use protocol::group::is_label;
use protocol::hardware::{Device, Telemetry};
use protocol::ids::{AttemptId, DeviceRef, Role, WorkerId};
use protocol::limits::{
    DEVICES_PER_WORKER_MAX, HEARTBEAT_INTERVAL_MS, LABELS_MAX, MODEL_SHAPES_MAX, SEATS_AHEAD_MAX, SUSPECT_AFTER_MS,
    clean_text,
};

use super::board::Row;
use super::event::{Event, Report};
use super::input::{Answer, Connected, Effect, Rejection};
use super::live::Session;
use super::machine::Scheduler;
use super::state::AttemptState;
use super::timer::Timer;
use super::view::View;

/// A start that a worker has not taken up by then is sent again, milliseconds: a heartbeat that crossed it on the way says
/// nothing.
pub const RESEND_AFTER_MS: u64 = 2 * HEARTBEAT_INTERVAL_MS;

/// On what occasion a worker says what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Occasion {
    /// The greeting of a new process: nothing runs there yet, what it holds was finished by the old one.
    Restarted,
    /// The greeting of a process that was there before: messages to its old session may be lost.
    Reconnected,
    /// A heartbeat.
    Heartbeat,
}

/// What the journal says about a seat that a worker holds.
enum Held {
    /// The worker should go on, or hand in what it has.
    Ours,
    /// It was given up as lost, but may be open again.
    Lapsed,
    /// Its outcome is in the journal; whether it counted.
    Settled { counted: bool },
    /// It is over, or never was.
    Over,
}

impl Scheduler {
    pub(super) fn connected(&mut self, connected: Connected) -> Result<Answer, Rejection> {
        let Connected { worker, session, spki_sha256, hello, observed } = connected;
        let known = self.state.workers.get(&worker).filter(|known| known.spki_sha256 == spki_sha256);
        let known = known.ok_or(Rejection::WorkerUnknown(worker))?;
        if known.revoked {
            return Err(Rejection::WorkerRevoked(worker));
        }
        let before = self.live.sessions.get(&worker).map(|session| (session.number, session.connected));
        if before.is_some_and(|(newest, _)| newest >= session) {
            return Err(Rejection::SessionOld { worker, session });
        }
        let addresses = peer_addresses(observed, &hello);
        let held = hello.held.clone();
        let report = report(hello)?;
        let same = known.report.as_ref().is_some_and(|old| old.epoch == report.epoch);
        let occasion = if same { Occasion::Reconnected } else { Occasion::Restarted };
        if known.report.as_ref() != Some(&report) || !known.missing_models.is_empty() {
            self.emit(Event::DevicesReported { worker, report });
        }
        if let Some((number, true)) = before {
            self.effect(Effect::Close { worker, session: number });
        }
        let telemetry = BTreeMap::new();
        let session = Session { number: session, connected: true, heard_at: self.now, addresses, telemetry };
        self.live.sessions.insert(worker, session);
        self.live.fleet_version += 1;
        self.reconcile(worker, &held, occasion);
        self.drop_what_no_longer_fits(worker);
        self.unsettled = true;
        Ok(Answer::Done)
    }

    pub(super) fn disconnected(&mut self, worker: WorkerId, number: u64) {
        if let Some(session) = self.live.sessions.get_mut(&worker).filter(|session| session.number == number) {
            session.connected = false;
        }
    }

    pub(super) fn heartbeat(&mut self, worker: WorkerId, session: u64, heartbeat: Heartbeat) {
        let now = self.now;
        let Some(known) = self.session_mut(worker, session) else { return };
        // Back in service, or for the first time known to be.
        let back = known.telemetry.is_empty() || now.since_ms(known.heard_at) >= SUSPECT_AFTER_MS;
        known.heard_at = now;
        let telemetry = heartbeat.telemetry.into_iter().take(DEVICES_PER_WORKER_MAX).map(clean_telemetry);
        known.telemetry = telemetry.map(|telemetry| (telemetry.device.clone(), telemetry)).collect();
        self.live.fleet_version += u64::from(back);
        self.live.board.touch(worker);
        self.reconcile(worker, &heartbeat.held, Occasion::Heartbeat);
        self.unsettled = true;
    }

    /// The session if it is the worker's open one. Messages of older ones change nothing.
    pub(super) fn session_mut(&mut self, worker: WorkerId, number: u64) -> Option<&mut Session> {
        if self.state.workers.get(&worker).is_none_or(|known| known.revoked) {
            return None;
        }
        self.live.sessions.get_mut(&worker).filter(|session| session.number == number && session.connected)
    }

    /// Compares what a worker says it holds with what the journal says it should.
    fn reconcile(&mut self, worker: WorkerId, held: &[HeldSeat], occasion: Occasion) {
        let restarted = occasion == Occasion::Restarted;
        for seat in held {
            let (attempt, role) = (seat.attempt, seat.role);
            match self.classify(worker, attempt, role) {
                Held::Ours => self.renew(attempt, role, &seat.progress, restarted),
                Held::Lapsed => self.resume(worker, attempt, role, &seat.progress, restarted),
                Held::Settled { counted } => self.send(worker, SeatSettled { attempt, role, counted }),
                Held::Over => {
                    self.send(worker, CancelSeat { attempt, reason: "the attempt is over".to_owned() });
                }
            }
        }
        let named: BTreeSet<_> = held.iter().map(|seat| (seat.attempt, seat.role)).collect();
        let holds = |attempt: AttemptId, role: Role| named.contains(&(attempt, role));
        let open = self.live.seats_of.get(&worker).into_iter().flatten();
        let freed = |attempt: AttemptId, role: Role| {
            self.state.attempt(attempt).and_then(|body| body.seat(role)).is_some_and(|seat| seat.freed)
        };
        let unheld: Vec<_> = open
            .filter(|(attempt, role)| !holds(*attempt, *role))
            .map(|(attempt, role)| (*attempt, *role, freed(*attempt, *role)))
            .collect();
        for (attempt, role, freed) in unheld {
            if restarted || freed {
                let failure = Failure::new(FailureKind::ExecutorLost, format!("worker {worker} restarted without it"));
                self.fail_attempt(attempt, role, failure, true);
            } else if occasion == Occasion::Reconnected {
                self.renew_lease(attempt, role);
                self.send_start(attempt, role);
            } else if self.resend_is_due(attempt, role) {
                self.send_start(attempt, role);
            }
        }
    }

    fn classify(&self, worker: WorkerId, id: AttemptId, role: Role) -> Held {
        let Some((shard, attempt)) = self.state.shard(id.shard).zip(self.state.attempt(id)) else { return Held::Over };
        let Some(seat) = attempt.seat(role).filter(|seat| seat.device.worker == worker) else { return Held::Over };
        match &attempt.state {
            AttemptState::Open | AttemptState::Committed if seat.outcome.is_some() => Held::Settled { counted: true },
            AttemptState::Open => Held::Ours,
            _ if seat.outcome.is_some() => Held::Settled { counted: false },
            _ if shard.lapsed(id.fence, role).is_some() => Held::Lapsed,
            _ => Held::Over,
        }
    }

    fn renew(&mut self, attempt: AttemptId, role: Role, progress: &SeatProgress, restarted: bool) {
        let freed = self.state.attempt(attempt).and_then(|body| body.seat(role)).is_some_and(|seat| seat.freed);
        if restarted && !freed {
            self.emit(Event::SeatFreed { attempt, role });
        }
        if let Some(live) = self.live.seats.get_mut(&(attempt, role)) {
            live.progress = SeatProgress { note: clean_text(&progress.note), ..*progress };
        }
        self.renew_lease(attempt, role);
    }

    pub(super) fn renew_lease(&mut self, attempt: AttemptId, role: Role) {
        let until = self.now.plus_ms(self.state.settings.lease_ttl_ms);
        self.live.timers.set(Timer::Lease(attempt, role), until);
    }

    /// Opens an attempt again whose worker was given up as lost and is back, if its shard was not placed since and its
    /// device still has room.
    fn resume(&mut self, worker: WorkerId, id: AttemptId, role: Role, progress: &SeatProgress, restarted: bool) {
        let room = self.state.attempt(id).and_then(|attempt| attempt.seat(role)).is_some_and(|seat| {
            let view = View { state: &self.state, live: &self.live, now: self.now };
            let threads = self.state.shard(id.shard).and_then(|shard| shard.spec.threads());
            restarted || seat.freed || view.has_room_for(seat, threads, id)
        });
        if room {
            self.emit(Event::AttemptResumed { attempt: id });
            self.renew(id, role, progress, restarted);
        } else {
            self.send(worker, CancelSeat { attempt: id, reason: "its device was given away".to_owned() });
        }
    }

    fn resend_is_due(&self, attempt: AttemptId, role: Role) -> bool {
        let sent_at = self.live.seats.get(&(attempt, role)).and_then(|live| live.sent_at);
        sent_at.is_none_or(|sent_at| self.now.since_ms(sent_at) >= RESEND_AFTER_MS)
    }

    /// Fails what a worker's new report has no room for: a device is gone, or its budget is smaller.
    fn drop_what_no_longer_fits(&mut self, worker: WorkerId) {
        let mut devices: Vec<DeviceRef> = self
            .state
            .unfinished_seats()
            .filter(|(_, seat)| seat.device.worker == worker && seat.held_bytes() > 0)
            .map(|(_, seat)| seat.device.clone())
            .collect();
        devices.dedup();
        for device in devices {
            loop {
                let budget = self.state.device(&device).map_or(0, |body| body.memory_budget_bytes);
                let row = self.live.board.find(&device);
                let sum = row.map_or(0, Row::reserved_bytes);
                let seats = row.into_iter().flat_map(|row| row.lanes.values()).flat_map(|lane| &lane.seats);
                let newest = seats.map(|seat| (seat.attempt.fence, seat.attempt, seat.role)).max();
                let Some((_, attempt, role)) = newest.filter(|_| sum > budget) else { break };
                let failure = Failure::new(FailureKind::ExecutorLost, format!("{device} has no room for it any more"));
                self.fail_attempt(attempt, role, failure, true);
            }
        }
    }
}

/// The journaled part of a greeting, checked and cut to its limits.
fn report(hello: Hello) -> Result<Report, Rejection> {
    let count = hello.devices.len();
    let mut devices = hello.devices;
    devices.sort_by(|a, b| a.id.cmp(&b.id));
    if count > DEVICES_PER_WORKER_MAX || devices.windows(2).any(|pair| pair[0].id == pair[1].id) {
        return Err(Rejection::Devices { count });
    }
    let mut models: Vec<_> = hello.models.iter().map(|model| clean_text(model)).collect();
    models.sort();
    models.dedup();
    let mut shapes: Vec<_> = hello.shapes.into_iter().take(MODEL_SHAPES_MAX).collect();
    shapes.retain(|(name, shape)| models.binary_search(name).is_ok() && shape.is_plausible());
    shapes.sort_by(|a, b| a.0.cmp(&b.0));
    shapes.dedup_by(|a, b| a.0 == b.0);
    Ok(Report {
        hostname: clean_text(&hello.hostname),
        build: clean_text(&hello.build),
        epoch: hello.epoch,
        devices: devices.into_iter().map(clean_device).collect(),
        models,
        terms: clean_terms(hello.terms),
        shapes,
    })
}

fn clean_terms(terms: Terms) -> Terms {
    let mut labels = terms.labels;
    labels.retain(|label| is_label(label));
    labels.sort();
    labels.dedup();
    labels.truncate(LABELS_MAX);
    Terms { labels, ahead: terms.ahead.min(SEATS_AHEAD_MAX), ..terms }
}

fn clean_device(device: Device) -> Device {
    Device {
        id: device.id,
        model: clean_text(&device.model),
        memory_budget_bytes: device.memory_budget_bytes.min(device.memory_total_bytes),
        unusable: device.unusable.as_deref().map(clean_text),
        ..device
    }
}

fn clean_telemetry(telemetry: Telemetry) -> Telemetry {
    Telemetry { sick: telemetry.sick.as_deref().map(clean_text), ..telemetry }
}

/// Where peers find a worker: what the coordinator sees first, then the worker's own list.
fn peer_addresses(observed: IpAddr, hello: &Hello) -> Vec<String> {
    let own = hello.addresses.iter().filter_map(|address| address.parse().ok());
    let mut addresses = Vec::new();
    for ip in std::iter::once(observed).chain(own) {
        let address = SocketAddr::new(ip.to_canonical(), hello.peer_port).to_string();
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses
}
