//! The one way the state changes, for live operation and for replay: one event at a time, each checked against the state.
//!
//! Decides nothing: an event that does not fit the state is an error that names both, and the state is left as it was.

use protocol::control::{FailureKind, Retry};
use protocol::experiment::ShardSpec;
use protocol::group::Group;
use protocol::ids::{AttemptId, Role, RunId, ShardId, TokenId, WorkerId};
use protocol::model_name::is_path;

use super::event::{AttemptPlaced, Event, PlacedSeat, Record, Report, RunAccepted, SeatCompleted, TokenCreated};
use super::request::{MEGABYTE, link_class, seat_class};
use super::state::{Attempt, AttemptState, Outcome, Run, Seat, Shard, State, Token, Worker};
use super::status::{RunState, ShardState};
use super::training;

/// An event does not fit the state: the journal is damaged, or this build has a bug.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("event {seq} ({kind}) does not fit the state: {detail}")]
pub struct IllegalTransition {
    /// Sequence number of the event.
    pub seq: u64,
    /// Its [`Event::kind`].
    pub kind: &'static str,
    /// What was found instead of what it needs.
    pub detail: String,
}

/// Why an event does not fit; [`State::apply`] adds which event.
type Misfit = String;

impl State {
    /// Applies one event.
    ///
    /// # Errors
    /// If the event does not follow from the state: a gap in the numbers, an unknown subject, a subject in another state.
    pub fn apply(&mut self, record: &Record) -> Result<(), IllegalTransition> {
        let misfit = |detail| IllegalTransition { seq: record.seq, kind: record.event.kind(), detail };
        if record.seq != self.seq + 1 {
            return Err(misfit(format!("event {} was expected next", self.seq + 1)));
        }
        if record.at < self.at {
            return Err(misfit(format!("its time {} lies before {}", record.at.0, self.at.0)));
        }
        self.change(record).map_err(misfit)?;
        self.seq = record.seq;
        self.at = record.at;
        Ok(())
    }

    fn change(&mut self, record: &Record) -> Result<(), Misfit> {
        match &record.event {
            Event::SettingsChanged(settings) => {
                self.settings.clone_from(settings);
                Ok(())
            }
            Event::TokenCreated(created) => self.token_created(created, record),
            Event::TokenRevoked { token } => self.token_mut(*token).map(|token| token.revoked = true),
            Event::TokenRedeemed { token, worker, spki_sha256 } => self.token_redeemed(*token, *worker, spki_sha256),
            Event::WorkerRegistered { worker, hostname, spki_sha256 } => {
                self.worker_registered(*worker, hostname, *spki_sha256, record)
            }
            Event::DevicesReported { worker, report } => self.devices_reported(*worker, report),
            Event::ModelFoundMissing { worker, model } => {
                self.worker_mut(*worker)?.missing_models.insert(model.clone());
                Ok(())
            }
            Event::KernelFoundMissing { class, device_model, build } => {
                self.kernels_missing.insert((class.clone(), device_model.clone(), build.clone()));
                Ok(())
            }
            Event::DeviceQuarantined { device, until, why } => {
                let known = self.records.entry(device.to_string()).or_default();
                known.failed.clear();
                known.quarantined_until = Some(*until);
                known.quarantines = known.quarantines.saturating_add(1);
                known.why.clone_from(why);
                Ok(())
            }
            Event::DeviceReleased { device } => {
                self.records.remove(&device.to_string());
                Ok(())
            }
            Event::ThroughputTaught { rows } => {
                for (class, model, unit_us, samples) in rows {
                    self.table.teach(class, model, *unit_us, *samples);
                }
                Ok(())
            }
            Event::DrainStarted { worker } => self.worker_mut(*worker).map(|worker| worker.draining = true),
            Event::DrainEnded { worker } => self.worker_mut(*worker).map(|worker| worker.draining = false),
            Event::WorkerRevoked { worker } => self.worker_mut(*worker).map(|worker| worker.revoked = true),
            Event::RunAccepted(accepted) => self.run_accepted(accepted, record),
            Event::RoundOpened { run, training, specs } => self.round_opened(*run, *training, specs, record),
            Event::TrainingEnded { run, training } => self.run_mut(*run)?.training_ended(*training),
            Event::AttemptPlaced(placed) => self.attempt_placed(placed, record),
            Event::SeatFreed { attempt, role } => self.seat_freed(*attempt, *role),
            Event::SeatCompleted(completed) => self.seat_completed(completed, record),
            Event::ShardCommitted { attempt } => self.shard_committed(*attempt, record),
            Event::AttemptFailed { attempt, role, failure } => {
                self.learn_from_failure(*attempt, *role, failure.kind);
                let state = AttemptState::Failed { role: *role, failure: failure.clone() };
                self.attempt_failed(*attempt, state, self.retry_after(attempt.shard, failure.kind), record)
            }
            Event::AttemptResumed { attempt } => self.attempt_resumed(*attempt),
            Event::ShardRequeued { shard, not_before } => {
                self.between_attempts(*shard)?.not_before = *not_before;
                self.set_state(*shard, ShardState::Waiting)
            }
            Event::ShardFailed { shard } => {
                self.between_attempts(*shard)?;
                self.set_state(*shard, ShardState::Failed)
            }
            Event::ShardReopened { shard } => self.shard_reopened(*shard),
            Event::RunFinished { run, state } => self.run_finished(*run, *state, record),
            Event::RunCancelled { run, reason } => self.run_cancelled(*run, reason, record),
        }
    }

    fn token_created(&mut self, created: &TokenCreated, record: &Record) -> Result<(), Misfit> {
        if self.tokens.last_key_value().is_some_and(|(last, _)| *last >= created.token) {
            return Err(format!("token {} is not newer than every other", created.token));
        }
        let token = Token {
            secret_hash: created.secret_hash,
            created_at: record.at,
            expires_at: created.expires_at,
            uses: created.uses,
            revoked: false,
            workers: Vec::new(),
        };
        self.tokens.insert(created.token, token);
        Ok(())
    }

    fn token_redeemed(&mut self, token: TokenId, worker: WorkerId, key: &[u8; 32]) -> Result<(), Misfit> {
        if self.worker_mut(worker)?.spki_sha256 != *key {
            return Err(format!("worker {worker} has another key"));
        }
        let body = self.token_mut(token)?;
        if body.revoked || body.workers.len() >= body.uses as usize {
            return Err(format!("token {token} is revoked or used up"));
        }
        body.workers.push(worker);
        Ok(())
    }

    fn worker_registered(
        &mut self,
        id: WorkerId,
        hostname: &str,
        spki_sha256: [u8; 32],
        record: &Record,
    ) -> Result<(), Misfit> {
        if self.workers.last_key_value().is_some_and(|(last, _)| *last >= id) {
            return Err(format!("worker {id} is not newer than every other"));
        }
        if let Some(other) = self.worker_by_key(&spki_sha256) {
            return Err(format!("worker {other} has the same key"));
        }
        let worker = Worker {
            hostname: hostname.to_owned(),
            spki_sha256,
            joined_at: record.at,
            revoked: false,
            draining: false,
            report: None,
            missing_models: Default::default(),
        };
        self.workers.insert(id, worker);
        Ok(())
    }

    fn devices_reported(&mut self, id: WorkerId, report: &Report) -> Result<(), Misfit> {
        let worker = self.worker_mut(id)?;
        worker.hostname.clone_from(&report.hostname);
        worker.missing_models.clear();
        worker.report = Some(report.clone());
        Ok(())
    }

    fn run_accepted(&mut self, accepted: &RunAccepted, record: &Record) -> Result<(), Misfit> {
        if self.runs.last_key_value().is_some_and(|(last, _)| *last >= accepted.run) {
            return Err(format!("run {} is not newer than every other", accepted.run));
        }
        let count = u32::try_from(accepted.specs.len()).map_err(|_| "too many shards")?;
        let groups = groups(accepted, count)?;
        let trainings = training::of_groups(&groups)?;
        if count == 0 && trainings.is_empty() {
            return Err("no shards".to_owned());
        }
        let run = Run {
            name: accepted.name.clone(),
            priority: accepted.priority,
            seed: accepted.seed,
            account: accepted.account.clone(),
            running_max: accepted.running_max,
            file: accepted.file.clone(),
            text: accepted.text.clone(),
            submitted_at: record.at,
            state: RunState::Running,
            finished_at: None,
            cancel_reason: String::new(),
            shards: accepted.specs.iter().map(|spec| Shard::waiting(spec, record.at)).collect(),
            waiting: (0..count).collect(),
            running: Default::default(),
            uncommitted: groups.iter().map(Group::parts).collect(),
            groups,
            trainings,
            rounds: Vec::new(),
        };
        self.runs.insert(accepted.run, run);
        Ok(())
    }

    fn round_opened(&mut self, id: RunId, training: u32, specs: &[ShardSpec], record: &Record) -> Result<(), Misfit> {
        let run = self.run_mut(id)?;
        if run.state != RunState::Running {
            return Err(format!("run {id} is {}", run.state));
        }
        let indices = run.round_opened(training, specs)?;
        run.shards.extend(specs.iter().map(|spec| Shard::waiting(spec, record.at)));
        run.waiting.extend(indices);
        Ok(())
    }

    fn attempt_placed(&mut self, placed: &AttemptPlaced, record: &Record) -> Result<(), Misfit> {
        let id = placed.attempt;
        if id.fence.0 != self.fences + 1 {
            return Err(format!("fencing number f{} was expected", self.fences + 1));
        }
        let seat = |seat: &PlacedSeat| {
            let device = self.device(&seat.device).ok_or_else(|| format!("no device {}", seat.device))?;
            Ok::<_, Misfit>(Seat {
                role: seat.role,
                device: seat.device.clone(),
                device_model: device.model.clone(),
                device_kind: device.kind,
                reserved_bytes: seat.reserved_bytes,
                lane: seat.lane,
                expected_ms: seat.expected_ms,
                load: seat.load,
                freed: false,
                outcome: None,
            })
        };
        let seats = placed.seats.iter().map(seat).collect::<Result<Vec<_>, _>>()?;
        let shard = self.shard_mut(id.shard)?;
        match (placed.speculative, shard.open_attempts().count()) {
            (false, 0) => expect(shard, id.shard, ShardState::Waiting)?,
            (true, 1) => expect(shard, id.shard, ShardState::Running)?,
            (_, open) => return Err(format!("{} has {open} open attempts", id.shard)),
        }
        if !placed.seats.iter().map(|seat| seat.role).eq(shard.spec.roles().iter().copied()) {
            return Err(format!("seats are not those of {}", id.shard));
        }
        shard.attempts.push(Attempt {
            fence: id.fence,
            placed_at: record.at,
            ended_at: None,
            state: AttemptState::Open,
            seats,
            reasons: placed.reasons.clone(),
        });
        self.fences = id.fence.0;
        self.set_state(id.shard, ShardState::Running)
    }

    fn seat_freed(&mut self, id: AttemptId, role: Role) -> Result<(), Misfit> {
        self.open_attempt_mut(id)?;
        let seat = self.seat_mut(id, role)?;
        if seat.freed || seat.outcome.is_some() {
            return Err(format!("seat {role} of {id} holds no device"));
        }
        seat.freed = true;
        Ok(())
    }

    fn seat_completed(&mut self, completed: &SeatCompleted, record: &Record) -> Result<(), Misfit> {
        let (id, role) = (completed.attempt, completed.role);
        self.open_attempt_mut(id)?;
        let shard = self.shard_mut(id.shard)?;
        let (class, units) = (seat_class(&shard.spec.work_class(), role), shard.spec.work_units());
        let is_shared_out = training::is_step(&shard.spec);
        let seat = self.seat_mut(id, role)?;
        if seat.outcome.is_some() {
            return Err(format!("seat {role} of {id} is done already"));
        }
        let (model, device) = (seat.device_model.clone(), seat.device.clone());
        seat.outcome = Some(Outcome {
            outputs: completed.outputs.clone(),
            usage: completed.usage,
            models: completed.models.clone(),
            build: completed.build.clone(),
            at: record.at,
        });
        // Seats of a training that wait for each other say how fast each is by its own work.
        let ms = if is_shared_out { completed.usage.busy_ms() } else { completed.usage.wall_ms };
        // A clock in milliseconds says 0 for what took less than one.
        let us = (ms * 1000).max(500);
        self.table.learn(&class, &model, units, us);
        if is_shared_out {
            self.paces.learn(&class, &device.to_string(), units, us);
        }
        if completed.usage.memory_peak_bytes > 0 {
            self.peaks.entry(class).or_default().saw(completed.usage.memory_peak_bytes);
        }
        if !self.records.is_empty() {
            self.records.remove(&device.to_string());
        }
        self.learn_from_packets(completed, units);
        Ok(())
    }

    fn shard_committed(&mut self, id: AttemptId, record: &Record) -> Result<(), Misfit> {
        let attempt = self.open_attempt_mut(id)?;
        if let Some(seat) = attempt.unfinished().next() {
            return Err(format!("seat {} of {id} is not done", seat.role));
        }
        attempt.state = AttemptState::Committed;
        attempt.ended_at = Some(record.at);
        for other in self.shard_mut(id.shard)?.attempts.iter_mut().filter(|other| other.state == AttemptState::Open) {
            other.state = AttemptState::Superseded;
            other.ended_at = Some(record.at);
        }
        let run = self.run_mut(id.shard.run)?;
        if let Some(left) = run.group_index(id.shard.index).and_then(|group| run.uncommitted.get_mut(group)) {
            *left = left.saturating_sub(1);
        }
        run.note_training(id.shard.index);
        self.set_state(id.shard, ShardState::Committed)
    }

    /// What a failure means for the shard. Where a path is, is found by trying: a worker that lacks it is no failed try.
    pub(super) fn retry_after(&self, shard: ShardId, kind: FailureKind) -> Retry {
        let searched = self.shard(shard).is_some_and(|shard| shard.spec.models().into_iter().any(is_path));
        match kind {
            FailureKind::ModelMissing if searched => Retry::Free,
            other => other.retry(),
        }
    }

    fn attempt_failed(
        &mut self,
        id: AttemptId,
        state: AttemptState,
        retry: Retry,
        record: &Record,
    ) -> Result<(), Misfit> {
        let attempt = self.open_attempt_mut(id)?;
        attempt.state = state;
        attempt.ended_at = Some(record.at);
        let shard = self.shard_mut(id.shard)?;
        match retry {
            // The other attempt goes on: nothing is lost.
            _ if shard.open_attempt().is_some() => {}
            Retry::Free => shard.free_retries += 1,
            Retry::Elsewhere | Retry::Never => shard.tries += 1,
        }
        Ok(())
    }

    /// What a source's packets say about the link that they went over, and about the size of what its class sends.
    fn learn_from_packets(&mut self, completed: &SeatCompleted, units: u32) {
        let (id, usage) = (completed.attempt, completed.usage);
        let Some(shard) = self.shard(id.shard).filter(|_| completed.role == Role::Source && usage.packet_bytes > 0)
        else {
            return;
        };
        let class = shard.spec.work_class();
        let seats = self.attempt(id).map(|attempt| attempt.seats.clone()).unwrap_or_default();
        let worker = |role| seats.iter().find(|seat| seat.role == role).map(|seat| seat.device.worker);
        if let (Some(from), Some(to), 1..) = (worker(Role::Source), worker(Role::Target), usage.link_bytes_per_second) {
            let us = MEGABYTE.saturating_mul(1_000_000) / usage.link_bytes_per_second;
            self.table.learn(&link_class(from), &to.to_string(), 1, us.max(1));
        }
        self.packets.insert(class, usage.packet_bytes / u64::from(units.max(1)));
    }

    /// What a failure says about memory and about the device.
    fn learn_from_failure(&mut self, id: AttemptId, role: Role, kind: FailureKind) {
        let Some(shard) = self.shard(id.shard) else { return };
        let Some(seat) = self.attempt(id).and_then(|attempt| attempt.seat(role)) else { return };
        let class = seat_class(&shard.spec.work_class(), role);
        let (device, reserved_bytes) = (seat.device.to_string(), seat.reserved_bytes);
        match kind {
            FailureKind::OutOfMemory => self.peaks.entry(class).or_default().overflowed(reserved_bytes),
            FailureKind::ExecutorLost | FailureKind::Internal | FailureKind::DeviceSick | FailureKind::NoKernel => {
                self.records.entry(device).or_default().failed.insert(id.shard);
            }
            _ => {}
        }
    }

    fn attempt_resumed(&mut self, id: AttemptId) -> Result<(), Misfit> {
        let shard = self.shard_mut(id.shard)?;
        let role = match shard.newest().map(|attempt| &attempt.state) {
            Some(AttemptState::Failed { role, .. }) => *role,
            _ => return Err(format!("{id} is not lost")),
        };
        if shard.lapsed(id.fence, role).is_none() {
            return Err(format!("{id} is not lost, or other seats of it are"));
        }
        shard.tries = shard.tries.saturating_sub(1);
        let attempt = shard.attempts.last_mut().expect("a lapsed attempt is the newest");
        attempt.state = AttemptState::Open;
        attempt.ended_at = None;
        self.set_state(id.shard, ShardState::Running)
    }

    fn shard_reopened(&mut self, id: ShardId) -> Result<(), Misfit> {
        let shard = self.shard_mut(id)?;
        expect(shard, id, ShardState::Failed)?;
        shard.tries = 0;
        shard.free_retries = 0;
        shard.reopened_at_attempt = u32::try_from(shard.attempts.len()).unwrap_or(u32::MAX);
        let run = self.run_mut(id.run)?;
        run.state = RunState::Running;
        run.finished_at = None;
        self.set_state(id, ShardState::Waiting)
    }

    fn run_finished(&mut self, id: RunId, state: RunState, record: &Record) -> Result<(), Misfit> {
        let run = self.run_mut(id)?;
        if run.state != RunState::Running || !run.waiting.is_empty() || !run.running.is_empty() {
            return Err(format!("run {id} is {} with shards that are not over, or over already", run.state));
        }
        run.state = state;
        run.finished_at = Some(record.at);
        Ok(())
    }

    fn run_cancelled(&mut self, id: RunId, reason: &str, record: &Record) -> Result<(), Misfit> {
        let run = self.run_mut(id)?;
        if run.state != RunState::Running {
            return Err(format!("run {id} is {}", run.state));
        }
        for shard in run.shards.iter_mut().filter(|shard| !shard.state.is_terminal()) {
            for attempt in shard.attempts.iter_mut().filter(|attempt| attempt.state == AttemptState::Open) {
                attempt.state = AttemptState::Cancelled;
                attempt.ended_at = Some(record.at);
            }
            shard.state = ShardState::Cancelled;
        }
        run.waiting.clear();
        run.running.clear();
        run.state = RunState::Cancelled;
        run.finished_at = Some(record.at);
        reason.clone_into(&mut run.cancel_reason);
        Ok(())
    }
}

/// The experiments of a run; one for all its shards if it names none.
fn groups(accepted: &RunAccepted, count: u32) -> Result<Vec<Group>, Misfit> {
    if accepted.groups.is_empty() {
        return Ok(vec![Group { count, ..Group::default() }]);
    }
    let mut next = 0;
    for (index, group) in (0u32..).zip(&accepted.groups) {
        if group.first != next || group.after.iter().any(|earlier| *earlier >= index) {
            return Err(format!("experiment {index} does not follow on those before it"));
        }
        next = next.checked_add(group.count).ok_or("too many shards")?;
    }
    if next != count {
        return Err(format!("experiments have {next} shards, the run has {count}"));
    }
    Ok(accepted.groups.clone())
}

/// Looking subjects up.
impl State {
    fn token_mut(&mut self, id: TokenId) -> Result<&mut Token, Misfit> {
        self.tokens.get_mut(&id).ok_or_else(|| format!("no token {id}"))
    }

    fn worker_mut(&mut self, id: WorkerId) -> Result<&mut Worker, Misfit> {
        self.workers.get_mut(&id).ok_or_else(|| format!("no worker {id}"))
    }

    fn run_mut(&mut self, id: RunId) -> Result<&mut Run, Misfit> {
        self.runs.get_mut(&id).ok_or_else(|| format!("no run {id}"))
    }

    fn shard_mut(&mut self, id: ShardId) -> Result<&mut Shard, Misfit> {
        self.run_mut(id.run)?.shards.get_mut(id.index as usize).ok_or_else(|| format!("no shard {id}"))
    }

    fn open_attempt_mut(&mut self, id: AttemptId) -> Result<&mut Attempt, Misfit> {
        let mut newest_first = self.shard_mut(id.shard)?.attempts.iter_mut().rev();
        newest_first
            .find(|attempt| attempt.fence == id.fence && attempt.state == AttemptState::Open)
            .ok_or_else(|| format!("attempt {id} is not open"))
    }

    fn seat_mut(&mut self, id: AttemptId, role: Role) -> Result<&mut Seat, Misfit> {
        let shard = self.shard_mut(id.shard)?;
        let attempt = shard.attempts.iter_mut().find(|attempt| attempt.fence == id.fence);
        attempt
            .and_then(|attempt| attempt.seats.iter_mut().find(|seat| seat.role == role))
            .ok_or_else(|| format!("no seat {role} of {id}"))
    }

    /// A shard whose newest attempt has just failed and that has not yet been sent anywhere, or that waits for an experiment
    /// that will not commit.
    fn between_attempts(&mut self, id: ShardId) -> Result<&mut Shard, Misfit> {
        let blocked =
            self.run_mut(id.run)?.group_index(id.index).is_some_and(|group| !self.runs[&id.run].is_ready(group));
        let shard = self.shard_mut(id)?;
        if blocked && shard.state == ShardState::Waiting {
            return Ok(shard);
        }
        expect(shard, id, ShardState::Running)?;
        if shard.open_attempt().is_some() {
            return Err(format!("{id} has an open attempt"));
        }
        match shard.newest().map(|attempt| &attempt.state) {
            Some(AttemptState::Failed { .. }) => Ok(shard),
            _ if shard.attempts.iter().any(|attempt| matches!(attempt.state, AttemptState::Failed { .. })) => Ok(shard),
            _ => Err(format!("no attempt of {id} has failed")),
        }
    }

    fn set_state(&mut self, id: ShardId, state: ShardState) -> Result<(), Misfit> {
        let run = self.run_mut(id.run)?;
        run.waiting.remove(&id.index);
        run.running.remove(&id.index);
        match state {
            ShardState::Waiting => drop(run.waiting.insert(id.index)),
            ShardState::Running => drop(run.running.insert(id.index)),
            ShardState::Committed | ShardState::Failed | ShardState::Cancelled => {}
        }
        self.shard_mut(id)?.state = state;
        Ok(())
    }
}

fn expect(shard: &Shard, id: ShardId, state: ShardState) -> Result<(), Misfit> {
    if shard.state == state { Ok(()) } else { Err(format!("shard {id} is {}, not {state}", shard.state)) }
}
