//! The agent's decisions as a value: no async, no clock, no I/O.
//!
//! Call order: [`Agent::handle`] with what happened, then [`Agent::poll_effect`] until it is empty; when
//! [`Agent::next_deadline`] has come, [`Agent::handle`] with [`Input::Deadline`]. Time comes with every input and must not
//! go backwards. Questions ([`Agent::held`], [`Agent::offer`]) change nothing.
//!
//! A seat goes starting → running → keeping → publishing → published, or to failed from any of these; the last two are
//! repeated to the coordinator until it settles them. Removing a seat never waits for its executor: the executor is told to
//! stop, killed after a bound, and the seat's files go when it has let go of them.

mod executors;
mod io;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use protocol::control::{
    CancelSeat, Failure, FailureKind, HeldSeat, SeatFailed, SeatFinished, SeatProgress, SeatSettled, StartSeat,
    ToWorker, Usage,
};
use protocol::exec::{self, FromExecutor, PacketFile, ToExecutor};
use protocol::ids::{DeviceId, Role, WorkerId};
use protocol::time::UnixMillis;

use self::executors::{Executors, Gone};
pub use self::io::{Effect, ExecutorId, Input, OfferVerdict, SeatId};

/// How long an executor may take to stop an attempt before it is killed, milliseconds.
pub const STOP_GRACE_MS: u64 = 10_000;
/// An outcome that the coordinator has not settled is said again after so long on the same connection, milliseconds.
pub const REPEAT_OUTCOME_MS: u64 = 10_000;
/// Attempts remembered after their end, so that a late packet is refused rather than kept waiting.
const ENDED_REMEMBERED_MAX: usize = 256;

/// What the agent decides with.
#[derive(Debug)]
pub struct Agent {
    worker: WorkerId,
    devices: BTreeSet<DeviceId>,
    seats: BTreeMap<SeatId, Seat>,
    executors: Executors,
    /// Ended here, oldest first.
    ended: VecDeque<SeatId>,
    connected: bool,
    effects: VecDeque<Effect>,
}

#[derive(Debug)]
struct Seat {
    /// What the coordinator asked for; `None` for a seat found in the outbox at start, which only waits to be handed in.
    start: Option<StartSeat>,
    phase: Phase,
    progress: SeatProgress,
    started_at: UnixMillis,
    packet_bytes: u64,
    /// Packets on their way to other seats.
    sending: BTreeSet<String>,
    /// Packets for this seat that came before its executor ran.
    arrived: Vec<PacketFile>,
}

#[derive(Debug)]
enum Phase {
    /// Waits for its executor to be up.
    Starting { executor: ExecutorId },
    /// The executor works.
    Running { executor: ExecutorId },
    /// The executor is done and works for others; packets are still on their way.
    Sending { finished: exec::Finished, build: String },
    /// The outputs go into the outbox.
    Keeping,
    /// On disk here, on their way to the store.
    Publishing,
    /// In the store; the coordinator may not know yet.
    Published { finished: SeatFinished, said_at: Option<UnixMillis> },
    /// Failed; the coordinator may not know yet.
    Failed { failure: Failure, said_at: Option<UnixMillis> },
}

impl Phase {
    fn executor(&self) -> Option<ExecutorId> {
        match self {
            Self::Starting { executor } | Self::Running { executor } => Some(*executor),
            Self::Sending { .. } | Self::Keeping | Self::Publishing | Self::Published { .. } | Self::Failed { .. } => {
                None
            }
        }
    }
}

/// Answers and questions.
impl Agent {
    /// The agent of `worker` with the usable `devices`, holding the finished seats that its outbox has.
    pub fn new(
        worker: WorkerId,
        devices: impl IntoIterator<Item = DeviceId>,
        outbox: impl IntoIterator<Item = SeatId>,
    ) -> Self {
        let mut agent = Self {
            worker,
            devices: devices.into_iter().collect(),
            seats: BTreeMap::new(),
            executors: Executors::default(),
            ended: VecDeque::new(),
            connected: false,
            effects: VecDeque::new(),
        };
        for seat in outbox {
            let found = Seat {
                start: None,
                phase: Phase::Publishing,
                progress: SeatProgress { done: 1, total: 1, note: "finished before a restart".to_owned() },
                started_at: UnixMillis(0),
                packet_bytes: 0,
                sending: BTreeSet::new(),
                arrived: Vec::new(),
            };
            agent.seats.insert(seat, found);
            agent.effects.push_back(Effect::Publish { seat });
        }
        agent
    }

    /// The next thing to do.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// When [`Input::Deadline`] is due, if nothing happens before.
    pub fn next_deadline(&self) -> Option<UnixMillis> {
        let outcome = |seat: &Seat| match &seat.phase {
            Phase::Published { said_at, .. } | Phase::Failed { said_at, .. } if self.connected => {
                said_at.map(|said| said.plus_ms(REPEAT_OUTCOME_MS))
            }
            _ => None,
        };
        self.seats.values().filter_map(outcome).chain(self.executors.next_kill()).min()
    }

    /// What this worker holds, for greetings and heartbeats: it renews the leases.
    pub fn held(&self) -> Vec<HeldSeat> {
        let held = |(id, seat): (&SeatId, &Seat)| HeldSeat {
            attempt: id.attempt,
            role: id.role,
            progress: seat.progress.clone(),
        };
        self.seats.iter().map(held).collect()
    }

    /// Whether a packet for `to` from the worker with this key may come.
    pub fn offer(&self, to: SeatId, peer_spki_sha256: &[u8; 32]) -> OfferVerdict {
        let Some(seat) = self.seats.get(&to) else {
            return match self.ended.contains(&to) {
                true => OfferVerdict::Over,
                false => OfferVerdict::NotYet,
            };
        };
        match (&seat.phase, &seat.start) {
            (Phase::Starting { .. } | Phase::Running { .. }, Some(start)) => {
                let sits = |other: &protocol::control::SeatAddress| {
                    other.role != to.role && other.spki_sha256 == *peer_spki_sha256
                };
                match start.seats.iter().any(sits) {
                    true => OfferVerdict::Take,
                    false => OfferVerdict::NotTheSeat,
                }
            }
            _ => OfferVerdict::Over,
        }
    }
}

/// What happened.
impl Agent {
    /// Takes one input in.
    pub fn handle(&mut self, now: UnixMillis, input: Input) {
        match input {
            Input::Connected => {
                self.connected = true;
                for seat in self.seats.values_mut() {
                    if let Phase::Published { said_at, .. } | Phase::Failed { said_at, .. } = &mut seat.phase {
                        *said_at = None;
                    }
                }
                self.say_outcomes(now);
            }
            Input::Disconnected => self.connected = false,
            Input::Coordinator(message) => self.on_coordinator(now, message),
            Input::ExecutorReady { executor, build } => {
                self.executors.note_build(executor, build);
                self.on_ready(now, executor);
            }
            Input::Executor { executor, message } => self.on_executor(now, executor, message),
            Input::ExecutorExited { executor, detail } => self.on_exit(now, executor, &detail),
            Input::CouldNotStart { seat, failure } => {
                // Its executor was told nothing, so there is nothing to stop.
                let executor = self.seats.get(&seat).and_then(|seat| seat.phase.executor());
                executor.into_iter().for_each(|executor| self.free(executor));
                self.fail(now, seat, failure);
            }
            Input::Kept { seat } => self.on_kept(seat),
            Input::NotKept { seat, failure } => match self.seats.contains_key(&seat) {
                true => self.fail(now, seat, failure),
                false => self.effects.push_back(Effect::Discard { seat }),
            },
            Input::PublishDelayed { seat, note } => {
                if let Some(seat) = self.seats.get_mut(&seat) {
                    seat.progress.note = note;
                }
            }
            Input::Published { seat, finished } => self.on_published(now, seat, finished),
            Input::PacketSent { seat, key, bytes } => self.on_packet_sent(now, seat, &key, bytes),
            Input::PacketNotSent { seat, key: _, failure } => self.fail(now, seat, failure),
            Input::PacketArrived { seat, key, path, bytes } => self.on_packet_arrived(seat, key, path, bytes),
            Input::Deadline => {
                self.say_outcomes(now);
                for executor in self.executors.take_overdue(now) {
                    self.effects.push_back(Effect::Kill { executor });
                }
            }
        }
    }

    fn on_coordinator(&mut self, now: UnixMillis, message: ToWorker) {
        match message {
            ToWorker::StartSeat(start) => self.on_start(now, start),
            ToWorker::CancelSeat(CancelSeat { attempt, .. }) => {
                for role in [Role::Main, Role::Source, Role::Target] {
                    self.remove(now, SeatId { attempt, role });
                }
            }
            ToWorker::SeatSettled(SeatSettled { attempt, role, .. }) => self.remove(now, SeatId { attempt, role }),
            // The session's own affairs.
            ToWorker::Welcome(_) | ToWorker::HeartbeatAck(_) | ToWorker::Refused(_) | ToWorker::UploadAnswer(_) => {}
        }
    }

    fn on_start(&mut self, now: UnixMillis, start: StartSeat) {
        let id = SeatId { attempt: start.attempt, role: start.role };
        if self.seats.contains_key(&id) {
            return; // Said twice, over a reconnect.
        }
        self.ended.retain(|ended| *ended != id);
        let device = start.device.clone();
        let known = self.devices.contains(&device);
        let mut seat = Seat {
            start: Some(start),
            phase: Phase::Publishing,
            progress: SeatProgress { note: "starting an executor".to_owned(), ..SeatProgress::default() },
            started_at: now,
            packet_bytes: 0,
            sending: BTreeSet::new(),
            arrived: Vec::new(),
        };
        if !known {
            let message = format!("this worker has no usable device {device}");
            seat.phase = Phase::Failed { failure: Failure::new(FailureKind::Unsupported, message), said_at: None };
            self.seats.insert(id, seat);
            self.say_outcomes(now);
            return;
        }
        let (executor, launch, ready) = self.executors.take(&device, id);
        seat.phase = Phase::Starting { executor };
        self.seats.insert(id, seat);
        if launch {
            self.effects.push_back(Effect::Launch { executor, device });
        }
        if ready {
            self.on_ready(now, executor);
        }
    }

    /// The executor is up: what was meant for it begins.
    fn on_ready(&mut self, now: UnixMillis, executor: ExecutorId) {
        let Some(id) = self.executors.up(executor) else { return };
        let Some(seat) = self.seats.get_mut(&id) else { return };
        seat.phase = Phase::Running { executor };
        seat.started_at = now;
        "started".clone_into(&mut seat.progress.note);
        let start = seat.start.clone().expect("a seat with an executor was started by the coordinator");
        self.effects.push_back(Effect::Run { executor, start: Box::new(start) });
        for packet in std::mem::take(&mut seat.arrived) {
            self.effects.push_back(Effect::Tell { executor, message: arrival(packet) });
        }
    }

    fn on_executor(&mut self, now: UnixMillis, executor: ExecutorId, message: FromExecutor) {
        let attempt = match &message {
            FromExecutor::Ready(_) => return, // Said by `ExecutorReady`.
            FromExecutor::Progressed(message) => message.attempt,
            FromExecutor::PacketReady(message) => message.attempt,
            FromExecutor::Finished(message) => message.attempt,
            FromExecutor::Failed(message) => message.attempt,
        };
        let over = matches!(message, FromExecutor::Finished(_) | FromExecutor::Failed(_));
        let Some(id) = self.executors.seat_of(executor).filter(|id| id.attempt == attempt) else {
            // Of an attempt that it was told to stop: its last word frees it.
            if over && let Some(stopped) = self.executors.stopped(executor, attempt) {
                self.effects.push_back(Effect::Discard { seat: stopped });
                self.end_spare(executor);
            }
            return;
        };
        match message {
            FromExecutor::Ready(_) => {}
            FromExecutor::Progressed(message) => {
                if let Some(seat) = self.seats.get_mut(&id) {
                    seat.progress = message.progress;
                }
            }
            FromExecutor::PacketReady(packet) => self.on_packet_ready(now, id, packet),
            FromExecutor::Finished(finished) => {
                let build = self.executors.build_of(executor);
                self.free(executor);
                if let Some(seat) = self.seats.get_mut(&id) {
                    seat.phase = Phase::Sending { finished, build };
                    self.keep_if_sent(now, id);
                }
            }
            FromExecutor::Failed(failed) => {
                self.free(executor);
                self.fail(now, id, failed.failure);
            }
        }
    }

    fn on_exit(&mut self, now: UnixMillis, executor: ExecutorId, detail: &str) {
        match self.executors.gone(executor) {
            Gone::Working(seat) => self.fail(now, seat, Failure::new(FailureKind::ExecutorLost, detail)),
            Gone::Stopping(seat) => self.effects.push_back(Effect::Discard { seat }),
            Gone::Idle => {}
        }
    }

    fn on_packet_ready(&mut self, now: UnixMillis, from: SeatId, packet: PacketFile) {
        let Some(seat) = self.seats.get_mut(&from) else { return };
        let start = seat.start.as_ref().expect("a seat with an executor was started by the coordinator");
        let Some(to) = start.seats.iter().find(|other| other.role != from.role).cloned() else {
            let failure = Failure::new(FailureKind::Internal, format!("packet {} has no seat to go to", packet.key));
            self.fail(now, from, failure);
            return;
        };
        seat.sending.insert(packet.key.clone());
        let here = to.worker == self.worker;
        let (key, path) = (packet.key, packet.path);
        self.effects.push_back(match here {
            true => {
                let to = SeatId { attempt: from.attempt, role: to.role };
                Effect::HandOver { from, to, key, path }
            }
            false => Effect::SendPacket { from, to, key, path },
        });
    }

    fn on_packet_sent(&mut self, now: UnixMillis, from: SeatId, key: &str, bytes: u64) {
        if let Some(seat) = self.seats.get_mut(&from)
            && seat.sending.remove(key)
        {
            seat.packet_bytes += bytes;
            self.keep_if_sent(now, from);
        }
    }

    fn on_packet_arrived(&mut self, to: SeatId, key: String, path: String, bytes: u64) {
        let Some(seat) = self.seats.get_mut(&to) else { return };
        seat.packet_bytes += bytes;
        let packet = PacketFile { attempt: to.attempt, key, path };
        match seat.phase {
            Phase::Starting { .. } => seat.arrived.push(packet),
            Phase::Running { executor } => {
                self.effects.push_back(Effect::Tell { executor, message: arrival(packet) });
            }
            _ => {}
        }
    }

    /// Once the executor is done and nothing is on its way any more, the outputs go into the outbox.
    fn keep_if_sent(&mut self, now: UnixMillis, id: SeatId) {
        let Some(seat) = self.seats.get_mut(&id) else { return };
        let Phase::Sending { finished, build } = &seat.phase else { return };
        if !seat.sending.is_empty() {
            seat.progress.note = format!("{} packets on their way", seat.sending.len());
            return;
        }
        let usage = Usage {
            wall_ms: now.since_ms(seat.started_at),
            memory_peak_bytes: finished.memory_peak_bytes,
            packet_bytes: seat.packet_bytes,
        };
        let (finished, build) = (Box::new(finished.clone()), build.clone());
        seat.phase = Phase::Keeping;
        "finished".clone_into(&mut seat.progress.note);
        self.effects.push_back(Effect::Keep { seat: id, finished, usage, build });
    }

    fn on_kept(&mut self, id: SeatId) {
        match self.seats.get_mut(&id) {
            Some(seat) => {
                seat.phase = Phase::Publishing;
                self.effects.push_back(Effect::Publish { seat: id });
            }
            // Settled or cancelled meanwhile: what was kept goes again.
            None => self.effects.push_back(Effect::Discard { seat: id }),
        }
    }

    fn on_published(&mut self, now: UnixMillis, id: SeatId, finished: SeatFinished) {
        if let Some(seat) = self.seats.get_mut(&id) {
            seat.phase = Phase::Published { finished, said_at: None };
            "published".clone_into(&mut seat.progress.note);
            self.say_outcomes(now);
        }
    }

    /// A seat fails; whatever works for it is told to stop.
    fn fail(&mut self, now: UnixMillis, id: SeatId, failure: Failure) {
        let Some(seat) = self.seats.get_mut(&id) else { return };
        if matches!(seat.phase, Phase::Failed { .. } | Phase::Published { .. }) {
            return;
        }
        let executor = seat.phase.executor();
        failure.message.clone_into(&mut seat.progress.note);
        seat.phase = Phase::Failed { failure, said_at: None };
        seat.sending.clear();
        self.effects.push_back(Effect::StopTransfers { seat: id });
        self.let_go(now, id, executor);
        self.say_outcomes(now);
    }

    /// A seat is nobody's business any more.
    fn remove(&mut self, now: UnixMillis, id: SeatId) {
        let Some(seat) = self.seats.remove(&id) else { return };
        if self.ended.len() >= ENDED_REMEMBERED_MAX {
            self.ended.pop_front();
        }
        self.ended.push_back(id);
        self.effects.push_back(Effect::StopTransfers { seat: id });
        match seat.phase {
            // Given up when it failed, or still being moved: then they go once that is done.
            Phase::Failed { .. } | Phase::Keeping => {}
            phase => self.let_go(now, id, phase.executor()),
        }
    }

    /// Files of a seat go as soon as no executor uses them.
    fn let_go(&mut self, now: UnixMillis, id: SeatId, executor: Option<ExecutorId>) {
        let Some(executor) = executor else {
            self.effects.push_back(Effect::Discard { seat: id });
            return;
        };
        if self.executors.stop(executor, id, now.plus_ms(STOP_GRACE_MS)) {
            let message = ToExecutor::StopSeat(exec::StopSeat { attempt: id.attempt });
            self.effects.push_back(Effect::Tell { executor, message });
        } else {
            self.effects.push_back(Effect::Discard { seat: id });
        }
    }

    fn free(&mut self, executor: ExecutorId) {
        self.executors.free(executor);
        self.end_spare(executor);
    }

    /// One idle executor a device is kept warm; others give their memory back.
    fn end_spare(&mut self, freed: ExecutorId) {
        for spare in self.executors.spare_beside(freed) {
            self.effects.push_back(Effect::Kill { executor: spare });
        }
    }

    /// Says outcomes not said on this connection, and those not settled for a while.
    fn say_outcomes(&mut self, now: UnixMillis) {
        if !self.connected {
            return;
        }
        for (id, seat) in &mut self.seats {
            let (message, said_at) = match &mut seat.phase {
                Phase::Published { finished, said_at } => (finished.clone().into(), said_at),
                Phase::Failed { failure, said_at } => {
                    let failure = failure.clone();
                    (SeatFailed { attempt: id.attempt, role: id.role, failure }.into(), said_at)
                }
                _ => continue,
            };
            if said_at.is_none_or(|said| now.since_ms(said) >= REPEAT_OUTCOME_MS) {
                *said_at = Some(now);
                self.effects.push_back(Effect::Say { message });
            }
        }
    }
}

/// A packet for an executor.
fn arrival(packet: PacketFile) -> ToExecutor {
    ToExecutor::PacketArrived(packet)
}
