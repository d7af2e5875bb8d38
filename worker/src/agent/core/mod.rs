//! The agent's decisions as a value: no async, no clock, no I/O.
//!
//! Call order: [`Agent::handle`] with what happened, then [`Agent::poll_effect`] until it is empty; when
//! [`Agent::next_deadline`] has come, [`Agent::handle`] with [`Input::Deadline`]. Time comes with every input and must not
//! go backwards. Questions ([`Agent::held`], [`Agent::offer`]) change nothing.
//!
//! A seat goes waiting → starting → running → keeping → publishing → published, or to failed from any of these; the last
//! two are repeated to the coordinator until it settles them. Removing a seat never waits for its executor: the executor is
//! told to stop, killed after a bound, and the seat's files go when it has let go of them. A seat sent ahead waits in its
//! lane, and starts in the same call of [`Agent::handle`] in which the one before lets go of the device.
//!
//! Executors do most kinds. A program of a researcher (kind `command`) is the agent's own child; a no-op is done here. What
//! made no files is kept as one record in the outbox's log and is published by being kept.
//!
//! Layout: `start.rs` takes seats in and begins them, `lanes.rs` says whose turn it is, `executors.rs` who works for whom,
//! `outcomes.rs` repeats what is not settled.

mod executors;
mod io;
mod lanes;
mod outcomes;
mod seat;
mod start;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use protocol::control::{
    CancelSeat, Failure, FailureKind, HeldSeat, SeatFinished, SeatProgress, SeatSettled, ToWorker, Usage,
};
use protocol::exec::{self, FromExecutor, PacketFile, ToExecutor};
use protocol::ids::{DeviceId, Role, WorkerId};
use protocol::time::UnixMillis;

use self::executors::{Executors, Gone};
pub use self::io::{Effect, ExecutorId, Input, OfferVerdict, SeatId};
use self::lanes::{LaneId, Lanes};
use self::outcomes::Said;
use self::seat::{Outgoing, Phase, Seat, Way, Work};

/// How long an executor may take to stop an attempt before it is killed, milliseconds.
pub const STOP_GRACE_MS: u64 = 10_000;
/// An outcome that the coordinator has not settled is said again after so long on the same connection, milliseconds.
pub const REPEAT_OUTCOME_MS: u64 = 10_000;
/// Packets of a seat that may be under way beyond the oldest one that has not arrived: they overtake each other by less.
const SENT_AHEAD_MAX: usize = 4;
/// Packets that may lie here unread for one seat before its peer must wait. More than [`SENT_AHEAD_MAX`], so that the one that
/// the seat waits for always finds a place.
const UNREAD_MAX: usize = 12;
/// Held seats of which every one is told with a note: with notes of usual length they take a tenth of a heartbeat.
const NOTES_MAX: usize = 1_000;
/// Attempts remembered after their end, so that a late packet is refused rather than kept waiting.
const ENDED_REMEMBERED_MAX: usize = 256;

/// What this worker lends.
#[derive(Debug, Clone, Default)]
pub struct Lent {
    /// Every device of the box.
    pub devices: BTreeSet<DeviceId>,
    /// Those for which there is an executor.
    pub executors: BTreeSet<DeviceId>,
    /// The operator lets programs of researchers run.
    pub commands: bool,
}

/// Finished seats that an earlier process left in the outbox.
#[derive(Debug, Clone, Default)]
pub struct HandedOn {
    /// With outputs that may not be in the store.
    pub seats: Vec<SeatId>,
    /// Without outputs.
    pub records: Vec<SeatFinished>,
}

/// What the agent decides with.
#[derive(Debug)]
pub struct Agent {
    worker: WorkerId,
    lent: Lent,
    seats: BTreeMap<SeatId, Seat>,
    lanes: Lanes,
    /// Lanes in which someone may go on; empty between calls.
    moved: Vec<LaneId>,
    executors: Executors,
    said: Said,
    /// Seats with packets that ended here, oldest first.
    ended: VecDeque<SeatId>,
    connected: bool,
    effects: VecDeque<Effect>,
}

/// Answers and questions.
impl Agent {
    /// The agent of `worker` with what its box lends, holding what its outbox has.
    pub fn new(worker: WorkerId, lent: Lent, outbox: HandedOn) -> Self {
        let mut agent = Self {
            worker,
            lent,
            seats: BTreeMap::new(),
            lanes: Lanes::default(),
            moved: Vec::new(),
            executors: Executors::default(),
            said: Said::default(),
            ended: VecDeque::new(),
            connected: false,
            effects: VecDeque::new(),
        };
        let note = "finished before a restart";
        for id in outbox.seats {
            agent.seats.insert(id, Seat::new(None, Phase::Publishing, UnixMillis(0)).note(note));
            agent.effects.push_back(Effect::Publish { seat: id });
        }
        for finished in outbox.records {
            let id = SeatId { attempt: finished.attempt, role: finished.role };
            let phase = Phase::Published { finished: Box::new(finished), said_at: None };
            agent.seats.insert(id, Seat::new(None, phase, UnixMillis(0)).note(note));
        }
        agent
    }

    /// The next thing to do.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// When [`Input::Deadline`] is due, if nothing happens before.
    pub fn next_deadline(&self) -> Option<UnixMillis> {
        self.next_repeat().into_iter().chain(self.executors.next_kill()).min()
    }

    /// What this worker holds, for greetings and heartbeats: it renews the leases. Beyond [`NOTES_MAX`] seats those that
    /// wait have no note, so that the message stays within its frame.
    pub fn held(&self) -> Vec<HeldSeat> {
        let mut held = Vec::with_capacity(self.seats.len());
        for (id, seat) in &self.seats {
            let mut progress = SeatProgress::default();
            match seat.phase {
                Phase::Waiting if held.len() >= NOTES_MAX => {}
                Phase::Waiting | Phase::Commanding => progress.note = self.lane_note(*id),
                _ => progress = seat.progress.clone(),
            }
            held.push(HeldSeat { attempt: id.attempt, role: id.role, progress });
        }
        held
    }

    fn lane_note(&self, id: SeatId) -> String {
        match self.lanes.before(id) {
            Some(before) => format!("waits for {} on its device", before.attempt),
            None => "runs".to_owned(),
        }
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
            (Phase::Waiting | Phase::Gathering | Phase::Starting { .. } | Phase::Running { .. }, Some(start)) => {
                let sits = |other: &protocol::control::SeatAddress| {
                    other.role != to.role && other.spki_sha256 == *peer_spki_sha256
                };
                match start.seats.iter().any(sits) {
                    true if seat.unread >= UNREAD_MAX => OfferVerdict::Full,
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
                self.say_all_outcomes(now);
            }
            Input::Disconnected => self.connected = false,
            Input::Coordinator(message) => self.on_coordinator(now, message),
            Input::ExecutorReady { executor, build } => {
                self.executors.note_build(executor, build);
                self.on_ready(now, executor);
            }
            Input::Executor { executor, message } => self.on_executor(now, executor, message),
            Input::ExecutorExited { executor, detail } => self.on_exit(now, executor, &detail),
            Input::CommandEnded { seat, wall_ms, ended } => self.on_command_ended(now, seat, wall_ms, ended),
            Input::Gathered { seat, inputs } => self.on_gathered(now, seat, inputs),
            Input::CouldNotStart { seat, failure } => {
                // Its executor was told nothing, so there is nothing to stop.
                let executor = self.seats.get(&seat).and_then(|seat| seat.phase.executor());
                executor.into_iter().for_each(|executor| self.free(executor, seat));
                self.leave_lane(seat);
                self.fail(now, seat, failure);
            }
            Input::Kept { seat } => self.on_kept(seat),
            Input::RecordsKept { seats } => seats.into_iter().for_each(|seat| self.on_record_kept(now, seat)),
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
            Input::PacketSent { seat, key, bytes, bytes_per_second } => {
                if let Some(seat) = self.seats.get_mut(&seat) {
                    seat.link_bytes_per_second = seat.link_bytes_per_second.max(bytes_per_second);
                }
                self.on_packet_sent(now, seat, &key, bytes);
            }
            Input::PacketNotSent { seat, key: _, failure } => self.fail(now, seat, failure),
            Input::PacketArrived { seat, key, path, bytes } => self.on_packet_arrived(seat, key, path, bytes),
            Input::Deadline => {
                self.repeat_outcomes(now);
                for executor in self.executors.take_overdue(now) {
                    self.effects.push_back(Effect::Kill { executor });
                }
            }
        }
        self.move_up(now);
        self.drop_settled();
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
            ToWorker::Welcome(_)
            | ToWorker::HeartbeatAck(_)
            | ToWorker::Refused(_)
            | ToWorker::UploadAnswer(_)
            | ToWorker::DownloadAnswer(_) => {}
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
        let inputs = std::mem::take(&mut seat.inputs);
        self.effects.push_back(Effect::Run { executor, start: Box::new(start), inputs });
        for packet in std::mem::take(&mut seat.arrived) {
            self.effects.push_back(Effect::Tell { executor, message: arrival(packet) });
        }
    }

    fn on_executor(&mut self, now: UnixMillis, executor: ExecutorId, message: FromExecutor) {
        let attempt = match &message {
            FromExecutor::Ready(_) => return, // Said by `ExecutorReady`.
            FromExecutor::Progressed(message) => message.attempt,
            FromExecutor::PacketReady(message) => message.attempt,
            FromExecutor::PacketUsed(message) => message.attempt,
            FromExecutor::Finished(message) => message.attempt,
            FromExecutor::Failed(message) => message.attempt,
        };
        let over = matches!(message, FromExecutor::Finished(_) | FromExecutor::Failed(_));
        let Some(id) = self.executors.seat_of(executor).filter(|id| id.attempt == attempt) else {
            // Of an attempt that it was told to stop: its last word frees it.
            if over && let Some(stopped) = self.executors.stopped(executor, attempt) {
                self.effects.push_back(Effect::Discard { seat: stopped });
                self.end_spare(executor, &[]);
                self.leave_lane(stopped);
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
            FromExecutor::PacketReady(packet) => {
                if let Some(seat) = self.seats.get_mut(&id) {
                    seat.outgoing.push_back(Outgoing { packet, state: Way::Waits });
                    self.send_next(now, id);
                }
            }
            FromExecutor::PacketUsed(_) => {
                if let Some(seat) = self.seats.get_mut(&id) {
                    seat.unread = seat.unread.saturating_sub(1);
                }
            }
            FromExecutor::Finished(finished) => {
                let build = self.executors.build_of(executor);
                self.free(executor, id);
                self.leave_lane(id);
                if let Some(seat) = self.seats.get_mut(&id) {
                    seat.phase = Phase::Sending { finished, build, since: now };
                    self.keep_if_sent(now, id);
                }
            }
            FromExecutor::Failed(failed) => {
                self.free(executor, id);
                self.leave_lane(id);
                self.fail(now, id, failed.failure);
            }
        }
    }

    fn on_exit(&mut self, now: UnixMillis, executor: ExecutorId, detail: &str) {
        match self.executors.gone(executor) {
            Gone::Working(seat) => {
                self.leave_lane(seat);
                self.fail(now, seat, Failure::new(FailureKind::ExecutorLost, detail));
            }
            Gone::Stopping(seat) => {
                self.leave_lane(seat);
                self.effects.push_back(Effect::Discard { seat });
            }
            Gone::Idle => {}
        }
    }

    /// Sends what may be under way: no packet runs far ahead of one before it, so that a peer whose room is bounded always
    /// has the one that it needs next.
    fn send_next(&mut self, now: UnixMillis, from: SeatId) {
        let Some(seat) = self.seats.get_mut(&from) else { return };
        let start = seat.start.as_ref().expect("a seat with an executor was started by the coordinator");
        let Some(to) = start.seats.iter().find(|other| other.role != from.role).cloned() else {
            let failure = Failure::new(FailureKind::Internal, "a packet has no seat to go to");
            self.fail(now, from, failure);
            return;
        };
        for next in seat.outgoing.iter_mut().take(SENT_AHEAD_MAX).filter(|next| next.state == Way::Waits) {
            next.state = Way::Goes;
            let (key, path) = (next.packet.key.clone(), next.packet.path.clone());
            self.effects.push_back(match to.worker == self.worker {
                true => {
                    let to = SeatId { attempt: from.attempt, role: to.role };
                    Effect::HandOver { from, to, key, path }
                }
                false => Effect::SendPacket { from, to: to.clone(), key, path },
            });
        }
    }

    fn on_packet_sent(&mut self, now: UnixMillis, from: SeatId, key: &str, bytes: u64) {
        let Some(seat) = self.seats.get_mut(&from) else { return };
        let Some(sent) = seat.outgoing.iter_mut().find(|on_way| on_way.packet.key == key) else { return };
        sent.state = Way::Arrived;
        seat.packet_bytes += bytes;
        while seat.outgoing.pop_front_if(|oldest| oldest.state == Way::Arrived).is_some() {}
        if let Phase::Running { executor } = seat.phase {
            let sent = exec::PacketKey { attempt: from.attempt, key: key.to_owned() };
            self.effects.push_back(Effect::Tell { executor, message: ToExecutor::PacketSent(sent) });
        }
        self.send_next(now, from);
        self.keep_if_sent(now, from);
    }

    fn on_packet_arrived(&mut self, to: SeatId, key: String, path: String, bytes: u64) {
        let Some(seat) = self.seats.get_mut(&to) else { return };
        seat.packet_bytes += bytes;
        seat.unread += 1;
        let packet = PacketFile { attempt: to.attempt, key, path };
        match seat.phase {
            Phase::Waiting | Phase::Gathering | Phase::Starting { .. } => seat.arrived.push(packet),
            Phase::Running { executor } => {
                self.effects.push_back(Effect::Tell { executor, message: arrival(packet) });
            }
            _ => {}
        }
    }

    /// Once the executor is done and nothing is on its way any more, the outputs go into the outbox.
    fn keep_if_sent(&mut self, now: UnixMillis, id: SeatId) {
        let Some(seat) = self.seats.get_mut(&id) else { return };
        let Phase::Sending { finished, build, since } = &seat.phase else { return };
        if !seat.outgoing.is_empty() {
            seat.progress.note = format!("{} packets on their way", seat.outgoing.len());
            return;
        }
        let usage = Usage {
            wall_ms: now.since_ms(seat.started_at),
            memory_peak_bytes: finished.memory_peak_bytes,
            packet_bytes: seat.packet_bytes,
            link_bytes_per_second: seat.link_bytes_per_second,
            waited_ms: finished.waited_ms.saturating_add(now.since_ms(*since)),
        };
        let (finished, build) = (finished.clone(), build.clone());
        "finished".clone_into(&mut seat.progress.note);
        if finished.outputs.is_empty() {
            let exec::Finished { attempt, models, .. } = finished;
            let outputs = Vec::new();
            let finished = Box::new(SeatFinished { attempt, role: id.role, outputs, usage, models, build });
            seat.phase = Phase::KeepingRecord { finished: finished.clone() };
            self.effects.push_back(Effect::KeepRecord { finished });
        } else {
            seat.phase = Phase::Keeping;
            self.effects.push_back(Effect::Keep { seat: id, finished: Box::new(finished), usage, build });
        }
    }

    /// Nothing need go into the store: what is kept is published.
    fn on_record_kept(&mut self, now: UnixMillis, id: SeatId) {
        match self.seats.get_mut(&id) {
            Some(seat) => {
                if let Phase::KeepingRecord { finished } = &seat.phase {
                    seat.phase = Phase::Published { finished: finished.clone(), said_at: None };
                    self.say_outcome(now, id);
                }
            }
            None => self.effects.push_back(Effect::ForgetRecord { seat: id }),
        }
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
            seat.phase = Phase::Published { finished: Box::new(finished), said_at: None };
            "published".clone_into(&mut seat.progress.note);
            self.say_outcome(now, id);
        }
    }

    /// A seat fails; whatever works for it is told to stop.
    fn fail(&mut self, now: UnixMillis, id: SeatId, failure: Failure) {
        let Some(seat) = self.seats.get_mut(&id) else { return };
        if seat.phase.is_over() {
            return;
        }
        let executor = seat.phase.executor();
        seat.outgoing.clear();
        self.effects.push_back(Effect::StopTransfers { seat: id });
        self.let_go(now, id, executor);
        self.end_as_failed(now, id, failure);
    }

    /// A seat has failed and there is nothing left of it.
    fn end_as_failed(&mut self, now: UnixMillis, id: SeatId, failure: Failure) {
        let Some(seat) = self.seats.get_mut(&id) else { return };
        failure.message.clone_into(&mut seat.progress.note);
        seat.phase = Phase::Failed { failure, said_at: None };
        self.say_outcome(now, id);
    }

    /// A seat is nobody's business any more.
    fn remove(&mut self, now: UnixMillis, id: SeatId) {
        let Some(seat) = self.seats.remove(&id) else { return };
        if seat.phase.is_record() {
            self.effects.push_back(Effect::ForgetRecord { seat: id });
        }
        match (seat.work, &seat.phase) {
            (Work::Nothing | Work::Command, Phase::Waiting) => self.leave_lane(id),
            (Work::Nothing, _) => {}
            (Work::Command, Phase::Commanding) => self.effects.push_back(Effect::StopCommand { seat: id }),
            (Work::Command, Phase::Publishing | Phase::Published { .. }) if !seat.phase.is_record() => {
                self.effects.push_back(Effect::StopTransfers { seat: id });
                self.effects.push_back(Effect::Discard { seat: id });
            }
            (Work::Command, _) => {}
            (Work::Executor, _) => self.remove_executors(now, id, &seat),
        }
    }

    /// The rest of [`Self::remove`] for a seat that may have had an executor, packets and files.
    fn remove_executors(&mut self, now: UnixMillis, id: SeatId, seat: &Seat) {
        if self.ended.len() >= ENDED_REMEMBERED_MAX {
            self.ended.pop_front();
        }
        self.ended.push_back(id);
        self.effects.push_back(Effect::StopTransfers { seat: id });
        match &seat.phase {
            // Given up when it failed, or still being moved: then they go once that is done.
            Phase::Failed { .. } | Phase::Keeping => {}
            phase => self.let_go(now, id, phase.executor()),
        }
    }

    /// Files of a seat go as soon as no executor uses them.
    fn let_go(&mut self, now: UnixMillis, id: SeatId, executor: Option<ExecutorId>) {
        let Some(executor) = executor else {
            self.leave_lane(id);
            self.effects.push_back(Effect::Discard { seat: id });
            return;
        };
        if self.executors.stop(executor, id, now.plus_ms(STOP_GRACE_MS)) {
            let message = ToExecutor::StopSeat(exec::StopSeat { attempt: id.attempt });
            self.effects.push_back(Effect::Tell { executor, message });
        } else {
            self.leave_lane(id);
            self.effects.push_back(Effect::Discard { seat: id });
        }
    }

    /// An executor has done what it could for a seat.
    fn free(&mut self, executor: ExecutorId, seat: SeatId) {
        self.executors.free(executor);
        let kept = self.seats.get(&seat).map(|body| body.models(self.worker, seat.role).1);
        self.end_spare(executor, &kept.unwrap_or_default());
    }

    /// One idle executor a device is kept warm, and one for each other seat that an attempt had there; others give their memory
    /// back, and these do when a seat of another kind begins.
    pub(super) fn end_spare(&mut self, beside: ExecutorId, kept: &[String]) {
        for spare in self.executors.spare_beside(beside, kept) {
            self.effects.push_back(Effect::Kill { executor: spare });
        }
    }
}

/// A packet for an executor.
fn arrival(packet: PacketFile) -> ToExecutor {
    ToExecutor::PacketArrived(packet)
}
