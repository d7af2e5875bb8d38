//! Inputs about seats' outcomes: finished, failed, lost; and what follows for attempt, shard and run.
//!
//! Workers repeat an outcome until it is settled, so everything here answers the same to the same message, however often.

use std::collections::BTreeSet;

use protocol::control::{CancelSeat, Failure, FailureKind, Output, Retry, SeatFailed, SeatFinished, SeatSettled};
use protocol::experiment::ShardSpec;
use protocol::ids::{AttemptId, Role, RunId, ShardId, WorkerId};
use protocol::limits::clean_text;

use super::event::{Event, SeatCompleted};
use super::input::Effect;
use super::machine::Scheduler;
use super::state::{Attempt, AttemptState, Shard};
use super::status::{RunState, ShardState};

/// Retries of a shard that do not count as tries, before they do: two workers that never reach each other must not keep a
/// gang going round for ever.
pub const FREE_RETRIES_MAX: u32 = 16;
/// Wait before the second try of a shard, milliseconds; doubles with each further failure. Gives a box time to recover, and
/// keeps a failure that takes no time from spinning.
pub const RETRY_BACKOFF_MS: u64 = 500;
/// Most doublings of [`RETRY_BACKOFF_MS`]: 32 seconds.
pub const RETRY_BACKOFF_DOUBLINGS_MAX: u32 = 6;

impl Scheduler {
    pub(super) fn seat_finished(&mut self, worker: WorkerId, session: u64, finished: SeatFinished) {
        let (attempt, role) = (finished.attempt, finished.role);
        if !self.heard(worker, session) {
            return;
        }
        let counted = match self.standing(worker, attempt, role) {
            Standing::Awaited => {
                self.complete(finished);
                true
            }
            Standing::Lapsed => {
                self.emit(Event::AttemptResumed { attempt });
                self.complete(finished);
                true
            }
            Standing::Known => true,
            Standing::Fenced => false,
        };
        self.send(worker, SeatSettled { attempt, role, counted });
    }

    pub(super) fn seat_failed(&mut self, worker: WorkerId, session: u64, failed: &SeatFailed) {
        let (attempt, role) = (failed.attempt, failed.role);
        if !self.heard(worker, session) {
            return;
        }
        // A failure of an attempt that is over changes nothing; one whose seat is done already was said too late.
        let counted = matches!(self.standing(worker, attempt, role), Standing::Awaited);
        if counted {
            let failure = Failure {
                kind: failed.failure.kind,
                message: clean_text(&failed.failure.message),
                hint: clean_text(&failed.failure.hint),
            };
            self.note_kernel(attempt, role, &failure);
            self.fail_attempt(attempt, role, failure, false);
            self.quarantine_if_due(attempt, role);
        }
        self.send(worker, SeatSettled { attempt, role, counted });
    }

    /// The lease of a seat ran out: its worker has been silent about it.
    pub(super) fn lease_expired(&mut self, attempt: AttemptId, role: Role) {
        let Some(seat) = self.state.attempt(attempt).and_then(|body| body.seat(role)) else { return };
        let seconds = self.state.settings.lease_ttl_ms / 1000;
        let message = format!("nothing was heard of it from {} for {seconds} s", seat.device.worker);
        let failure = Failure::new(FailureKind::LeaseExpired, message).hint("is the box up and its network well?");
        // A worker that is away is not told to drop it: if it comes back before the shard is placed again, the work still
        // counts. One that is here must drop it before anything else is placed on its device.
        let here = self.live.connected(seat.device.worker).is_some();
        self.fail_attempt(attempt, role, failure, here);
    }

    /// Ends an open attempt without a result, frees its devices and sends its shard where it belongs. `tell`: cancel the
    /// failed seat at its worker too, which has not said itself that it is over.
    pub(super) fn fail_attempt(&mut self, id: AttemptId, role: Role, failure: Failure, tell: bool) {
        let Some(attempt) = self.state.attempt(id).filter(|attempt| attempt.state == AttemptState::Open) else {
            return;
        };
        let kind = failure.kind;
        let reason = format!("seat {role} failed: {kind}");
        let failed_worker = attempt.seat(role).map(|seat| seat.device.worker);
        let mut told: Vec<_> =
            attempt.unfinished().filter(|seat| tell || seat.role != role).map(|seat| seat.device.worker).collect();
        told.dedup();
        self.emit(Event::AttemptFailed { attempt: id, role, failure });
        for worker in told {
            self.send(worker, CancelSeat { attempt: id, reason: reason.clone() });
        }
        if let Some(worker) = failed_worker.filter(|_| kind == FailureKind::ModelMissing) {
            self.note_missing_models(worker, id.shard, role);
        }
        self.send_shard_on(id.shard, kind);
        self.unsettled = true;
    }

    fn complete(&mut self, finished: SeatFinished) {
        let SeatFinished { attempt, role, outputs, usage, models, build } = finished;
        let clean = |output: Output| Output { name: clean_text(&output.name), ..output };
        self.emit(Event::SeatCompleted(SeatCompleted {
            attempt,
            role,
            outputs: outputs.into_iter().map(clean).collect(),
            usage,
            models: models.iter().map(|(name, print)| (clean_text(name), clean_text(print))).collect(),
            build: clean_text(&build),
        }));
        if self.state.attempt(attempt).is_some_and(|body| body.unfinished().next().is_none()) {
            let beside = self.open_beside(attempt);
            self.emit(Event::ShardCommitted { attempt });
            for (other, worker) in beside {
                let reason = format!("{attempt} finished first");
                self.send(worker, CancelSeat { attempt: other, reason });
            }
            // Without artifacts there is nothing in the store to tie together.
            if self.state.attempt(attempt).is_some_and(Attempt::has_outputs) {
                self.effect(Effect::WriteManifest { attempt });
            }
            self.advance_trainings(attempt.shard.run);
            self.finish_run_if_over(attempt.shard.run);
        }
        self.unsettled = true;
    }

    fn note_missing_models(&mut self, worker: WorkerId, shard: ShardId, role: Role) {
        let shard = self.state.shard(shard).into_iter();
        let models: Vec<String> = shard.flat_map(|shard| shard.spec.models_of(role)).map(str::to_owned).collect();
        for model in models {
            if self.state.workers.get(&worker).is_some_and(|known| known.has_model(&model)) {
                self.emit(Event::ModelFoundMissing { worker, model });
            }
        }
    }

    fn send_shard_on(&mut self, id: ShardId, kind: FailureKind) {
        let Some(shard) = self.state.shard(id) else { return };
        if shard.open_attempt().is_some() {
            // Another attempt of it goes on.
            return;
        }
        let said_no = matches!(kind, FailureKind::CommandFailed | FailureKind::TimedOut);
        let command_retries = match &shard.spec {
            ShardSpec::Command(spec) if said_no => spec.retries,
            _ => u32::MAX,
        };
        let out_of_tries = shard.tries > command_retries
            || shard.tries >= self.state.settings.attempts_max
            || shard.free_retries > FREE_RETRIES_MAX;
        if kind.retry() == Retry::Never || out_of_tries {
            self.emit(Event::ShardFailed { shard: id });
            self.fail_dependents(id);
            self.finish_run_if_over(id.run);
            return;
        }
        let failures = shard.tries.saturating_add(shard.free_retries).max(1);
        let wait_ms = match kind {
            // The silence was wait enough.
            FailureKind::LeaseExpired => 0,
            // The worker is known to lack the model now, and another may have it.
            FailureKind::ModelMissing if self.state.retry_after(id, kind) == Retry::Free => 0,
            _ => RETRY_BACKOFF_MS << (failures - 1).min(RETRY_BACKOFF_DOUBLINGS_MAX),
        };
        self.emit(Event::ShardRequeued { shard: id, not_before: self.now.plus_ms(wait_ms) });
    }

    /// Experiments that wait for one that will not commit will never start: their shards fail with it, and are reopened with
    /// it by `retry`.
    fn fail_dependents(&mut self, failed: ShardId) {
        let Some(run) = self.state.runs.get(&failed.run) else { return };
        let Some(group) = run.group_index(failed.index) else { return };
        let mut lost = BTreeSet::from([group]);
        let mut shards = Vec::new();
        for (number, group) in run.groups.iter().enumerate() {
            if group.after.iter().any(|earlier| lost.contains(&(*earlier as usize))) {
                lost.insert(number);
                shards.extend((group.first..group.first + group.count).filter(|index| run.waiting.contains(index)));
            }
        }
        for index in shards {
            self.emit(Event::ShardFailed { shard: ShardId { run: failed.run, index } });
        }
    }

    /// Seats of the shard's other open attempts, with their workers.
    fn open_beside(&self, id: AttemptId) -> Vec<(AttemptId, WorkerId)> {
        let others = self.state.shard(id.shard).into_iter().flat_map(Shard::open_attempts);
        others
            .filter(|other| other.fence != id.fence)
            .flat_map(|other| {
                let attempt = AttemptId { shard: id.shard, fence: other.fence };
                other.unfinished().map(move |seat| (attempt, seat.device.worker))
            })
            .collect()
    }

    fn note_kernel(&mut self, id: AttemptId, role: Role, failure: &Failure) {
        if failure.kind != FailureKind::NoKernel {
            return;
        }
        let Some(shard) = self.state.shard(id.shard) else { return };
        let Some(seat) = self.state.attempt(id).and_then(|attempt| attempt.seat(role)) else { return };
        let report = self.state.workers.get(&seat.device.worker).and_then(|worker| worker.report.as_ref());
        let build = report.map(|report| report.build.clone()).unwrap_or_default();
        let (class, device_model) = (shard.spec.work_class(), seat.device_model.clone());
        if !self.state.lacks_kernel(&class, &device_model, &build) {
            self.emit(Event::KernelFoundMissing { class, device_model, build });
        }
    }

    /// Takes a device out for a while on which several shards in a row failed, or that said that it is sick.
    fn quarantine_if_due(&mut self, id: AttemptId, role: Role) {
        let Some(attempt) = self.state.attempt(id) else { return };
        let AttemptState::Failed { failure, .. } = &attempt.state else { return };
        let Some(device) = attempt.seat(role).map(|seat| seat.device.clone()) else { return };
        let Some(record) = self.state.records.get(&device.to_string()) else { return };
        let sick = failure.kind == FailureKind::DeviceSick;
        if !record.failed.is_empty() && (sick || record.is_due()) {
            let why = match sick {
                true => failure.to_string(),
                false => format!("{} shards failed there in a row, the last with {failure}", record.failed.len()),
            };
            let until = self.now.plus_ms(record.next_ms());
            self.emit(Event::DeviceQuarantined { device, until, why: clean_text(&why) });
        }
    }

    fn finish_run_if_over(&mut self, id: RunId) {
        let Some(run) = self.state.runs.get(&id) else { return };
        if run.state == RunState::Running && run.waiting.is_empty() && run.running.is_empty() {
            let failed = run.shards.iter().any(|shard| shard.state == ShardState::Failed);
            let state = if failed { RunState::Failed } else { RunState::Complete };
            self.emit(Event::RunFinished { run: id, state });
        }
    }

    /// Notes a sign of life; `false` if the session is not the worker's open one.
    fn heard(&mut self, worker: WorkerId, session: u64) -> bool {
        let now = self.now;
        self.session_mut(worker, session).map(|session| session.heard_at = now).is_some()
    }

    fn standing(&self, worker: WorkerId, id: AttemptId, role: Role) -> Standing {
        let Some((shard, attempt)) = self.state.shard(id.shard).zip(self.state.attempt(id)) else {
            return Standing::Fenced;
        };
        let Some(seat) = attempt.seat(role).filter(|seat| seat.device.worker == worker) else {
            return Standing::Fenced;
        };
        match &attempt.state {
            AttemptState::Open if seat.outcome.is_none() => Standing::Awaited,
            AttemptState::Open | AttemptState::Committed => Standing::Known,
            AttemptState::Failed { .. } if shard.lapsed(id.fence, role).is_some() => Standing::Lapsed,
            AttemptState::Failed { .. } | AttemptState::Cancelled | AttemptState::Superseded => Standing::Fenced,
        }
    }
}

/// What the journal says about a seat whose outcome a worker hands in.
enum Standing {
    /// Its outcome is what we wait for.
    Awaited,
    /// It was given up as lost, but its shard was not placed since: its outcome still counts.
    Lapsed,
    /// Its outcome is in the journal.
    Known,
    /// Its outcome changes nothing.
    Fenced,
}
