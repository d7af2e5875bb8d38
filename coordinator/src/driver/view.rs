//! The scheduler's state in the API's words.
//!
//! Looks only. Costs what it shows: a run's detail is one row a shard.

use std::collections::BTreeMap;

use protocol::control::{Download, Output, SeatProgress};
use protocol::experiment::ShardSpec;
use protocol::experiment::projector::{Method, Stage};
use protocol::ids::{AttemptId, DeviceRef, Role, RunId, ShardId, TokenId, WorkerId};
use protocol::store::{Manifest, SeatRecord};

use super::DriverParts;
use super::manifests::ManifestStatus;
use super::tails::Tails;
use crate::api::{
    ApiError, ClusterInfo, DeviceReason, DeviceRow, ErrorCode, Explanation, FailureRow, OutputRow, Progress,
    RESULT_NAME, RunDetail, RunResults, RunSummary, SeatResult, SeatRow, ShardCounts, ShardResults, ShardRow, TokenRow,
    TrainingRow, WorkerRow, WorkerSeat,
};
use crate::scheduler::board::Row;
use crate::scheduler::reason::Rated;
use crate::scheduler::state::{Attempt, AttemptState, Run, Seat, Shard, Token, Worker};
use crate::scheduler::training::Training;
use crate::scheduler::{Scheduler, ShardState};

/// Waiting shards of a run whose reason is worked out for its detail; the reasons of the others are the same few.
const WAITING_EXPLAINED_MAX: usize = 32;

/// A look at everything the driver knows.
pub(super) struct View<'a> {
    pub(super) scheduler: &'a Scheduler,
    pub(super) manifests: ManifestStatus,
    pub(super) tails: &'a Tails,
}

/// Runs and shards.
impl View<'_> {
    pub(super) fn runs(&self) -> Vec<RunSummary> {
        self.scheduler.state().runs.iter().rev().map(|(id, run)| self.summary(*id, run)).collect()
    }

    pub(super) fn run_summary(&self, id: RunId) -> Result<RunSummary, ApiError> {
        Ok(self.summary(id, self.run(id)?))
    }

    pub(super) fn run_detail(&self, id: RunId) -> Result<RunDetail, ApiError> {
        let run = self.run(id)?;
        let explained: BTreeMap<u32, String> = run
            .waiting
            .iter()
            .take(WAITING_EXPLAINED_MAX)
            .filter_map(|index| {
                let explained = self.scheduler.explain(ShardId { run: id, index: *index })?;
                Some((*index, explained.sentence))
            })
            .collect();
        let shards = (0u32..).zip(&run.shards);
        let row = |(index, shard): (u32, &Shard)| {
            self.shard_row(ShardId { run: id, index }, shard, explained.get(&index).cloned())
        };
        Ok(RunDetail {
            summary: self.summary(id, run),
            file: run.file.clone(),
            sweep: run.text.clone(),
            shards: shards.map(row).collect(),
            trainings: (0u32..).zip(&run.trainings).map(|(number, one)| training_row(run, number, one)).collect(),
        })
    }

    pub(super) fn explanation(&self, id: ShardId) -> Result<Explanation, ApiError> {
        let unknown = || ApiError::new(ErrorCode::NotFound, format!("no shard {id}"));
        let explained = self.scheduler.explain(id).ok_or_else(unknown)?;
        let shard = self.scheduler.state().shard(id).ok_or_else(unknown)?;
        let device = |rated: Rated| DeviceReason {
            hostname: self.hostname(rated.device.worker),
            device: rated.device.to_string(),
            verdict: rated.reason.verdict(),
            reason: rated.reason.to_string(),
        };
        Ok(Explanation {
            shard: id,
            summary: shard.spec.summary(),
            state: explained.state,
            sentence: explained.sentence,
            devices: explained.devices.into_iter().map(device).collect(),
        })
    }

    pub(super) fn results(&self, id: RunId) -> Result<RunResults, ApiError> {
        let run = self.run(id)?;
        let shards = (0u32..).zip(&run.shards).filter_map(|(index, shard)| {
            let attempt = shard.committed_attempt()?;
            let seats = attempt.seats.iter().filter_map(seat_result).collect();
            Some(ShardResults { id: ShardId { run: id, index }, spec: shard.spec.clone(), seats })
        });
        Ok(RunResults { summary: self.summary(id, run), shards: shards.collect() })
    }

    pub(super) fn manifest(&self, id: AttemptId) -> Option<Manifest> {
        let state = self.scheduler.state();
        let run = state.runs.get(&id.shard.run)?;
        let shard = state.shard(id.shard)?;
        let attempt = shard.committed_attempt().filter(|attempt| attempt.fence == id.fence)?;
        let seat = |seat: &Seat| {
            let outcome = seat.outcome.as_ref()?;
            Some(SeatRecord {
                role: seat.role,
                worker: seat.device.worker,
                hostname: self.hostname(seat.device.worker),
                device: seat.device.device.clone(),
                device_kind: seat.device_kind,
                device_model: seat.device_model.clone(),
                executor_build: outcome.build.clone(),
                models: outcome.models.iter().cloned().collect(),
                outputs: outcome.outputs.clone(),
                usage: outcome.usage,
            })
        };
        Some(Manifest {
            format: Manifest::FORMAT,
            shard: id.shard,
            sweep: run.name.clone(),
            spec: shard.spec.clone(),
            seed: run.seed,
            fence: id.fence,
            coordinator_build: protocol::BUILD.to_owned(),
            seats: attempt.seats.iter().filter_map(seat).collect(),
            inputs: run.inputs(&shard.spec),
            started: attempt.placed_at,
            finished: attempt.ended_at.unwrap_or(attempt.placed_at),
        })
    }

    /// The artifact that a worker asks for, if it is an input of an open attempt in which the worker has a seat.
    pub(super) fn input(&self, worker: WorkerId, download: &Download) -> Option<Output> {
        let (state, id) = (self.scheduler.state(), download.attempt);
        let open = state.attempt(id).filter(|attempt| attempt.state == AttemptState::Open)?;
        open.seats.iter().find(|seat| seat.device.worker == worker)?;
        let inputs = state.runs.get(&id.shard.run)?.inputs(&state.shard(id.shard)?.spec);
        inputs.into_iter().find(|input| input.hash == download.hash)
    }

    fn run(&self, id: RunId) -> Result<&Run, ApiError> {
        let run = self.scheduler.state().runs.get(&id);
        run.ok_or_else(|| ApiError::new(ErrorCode::NotFound, format!("no run {id}")))
    }

    fn summary(&self, id: RunId, run: &Run) -> RunSummary {
        let mut shards = ShardCounts::default();
        for shard in &run.shards {
            let count = match shard.state {
                ShardState::Waiting => &mut shards.waiting,
                ShardState::Running => &mut shards.running,
                ShardState::Committed => &mut shards.committed,
                ShardState::Failed => &mut shards.failed,
                ShardState::Cancelled => &mut shards.cancelled,
            };
            *count += 1;
        }
        let over = u64::from(shards.committed + shards.failed + shards.cancelled) * 1000;
        let under_way: u64 = run
            .running
            .iter()
            .filter_map(|index| {
                let shard = &run.shards[*index as usize];
                let attempt = shard.open_attempt()?;
                Some(u64::from(self.per_mille(ShardId { run: id, index: *index }, attempt)))
            })
            .sum();
        let to_come: u64 = (0u32..).zip(&run.trainings).map(|(number, _)| u64::from(run.shards_to_come(number))).sum();
        let to_come = if run.state.is_terminal() { 0 } else { to_come };
        let done = (over + under_way) / (u64::from(shards.total()) + to_come).max(1);
        RunSummary {
            id,
            name: run.name.clone(),
            state: run.state,
            shards,
            done_per_mille: u32::try_from(done).unwrap_or(1000).min(1000),
            submitted_at_ms: run.submitted_at,
            finished_at_ms: run.finished_at,
            note: self.note(id, run),
        }
    }

    fn note(&self, id: RunId, run: &Run) -> String {
        let mut notes = Vec::new();
        if !run.cancel_reason.is_empty() {
            notes.push(format!("cancelled: {}", run.cancel_reason));
        }
        if run.running.is_empty()
            && let Some(index) = run.waiting.first()
            && let Some(explained) = self.scheduler.explain(ShardId { run: id, index: *index })
        {
            notes.push(explained.sentence);
        }
        if let (Some(problem), Some(pending)) = (&self.manifests.problem, self.manifests.pending.get(&id)) {
            notes.push(format!("{pending} manifests wait for the store: {problem}"));
        }
        if let Some(refused) = self.manifests.refused.get(&id) {
            notes.push(format!("a manifest cannot be written: {refused}"));
        }
        notes.join("; ")
    }

    fn shard_row(&self, id: ShardId, shard: &Shard, waiting: Option<String>) -> ShardRow {
        let shown = shard.open_attempt().or_else(|| shard.committed_attempt());
        let seats: Vec<SeatRow> = shown
            .into_iter()
            .flat_map(|attempt| attempt.seats.iter().map(move |seat| (attempt, seat)))
            .map(|(attempt, seat)| self.seat_row(AttemptId { shard: id, fence: attempt.fence }, seat))
            .collect();
        let notes: Vec<_> = seats
            .iter()
            .filter(|seat| !seat.progress.note.is_empty())
            .map(|seat| {
                if seats.len() == 1 {
                    seat.progress.note.clone()
                } else {
                    format!("{}: {}", seat.role, seat.progress.note)
                }
            })
            .collect();
        let progress = match shard.state {
            ShardState::Committed => Progress { done: 1000, total: 1000, note: String::new() },
            _ => Progress {
                done: shown.map_or(0, |attempt| self.per_mille(id, attempt)),
                total: 1000,
                note: notes.join("; "),
            },
        };
        let failure = failure_row(id, shard);
        let outputs =
            shard.committed_attempt().into_iter().flat_map(|attempt| attempt.seats.iter().flat_map(output_rows));
        ShardRow {
            id,
            summary: shard.spec.summary(),
            state: shard.state,
            attempts: u32::try_from(shard.attempts.len()).unwrap_or(u32::MAX),
            seats,
            progress,
            waiting,
            failure,
            outputs: outputs.collect(),
            placed_at_ms: shard.newest().map(|attempt| attempt.placed_at),
            finished_at_ms: shard.newest().filter(|_| shard.state.is_terminal()).and_then(|attempt| attempt.ended_at),
        }
    }

    fn seat_row(&self, attempt: AttemptId, seat: &Seat) -> SeatRow {
        SeatRow {
            role: seat.role,
            worker: seat.device.worker,
            hostname: self.hostname(seat.device.worker),
            device: seat.device.device.clone(),
            reserved_bytes: seat.reserved_bytes,
            finished: seat.outcome.is_some(),
            progress: self.progress(attempt, seat),
        }
    }

    fn progress(&self, attempt: AttemptId, seat: &Seat) -> Progress {
        match self.scheduler.live().seats.get(&(attempt, seat.role)) {
            Some(live) => {
                let SeatProgress { done, total, note } = live.progress.clone();
                Progress { done: if total > 0 { done.min(total) } else { done }, total, note }
            }
            None if seat.outcome.is_some() => Progress { done: 1, total: 1, note: String::new() },
            None => Progress::default(),
        }
    }

    /// Progress of all seats of an attempt, in thousandths; a seat that does not know its steps yet counts as not begun.
    fn per_mille(&self, shard: ShardId, attempt: &Attempt) -> u32 {
        let id = AttemptId { shard, fence: attempt.fence };
        let of_seat = |seat: &Seat| {
            let progress = self.progress(id, seat);
            if progress.total == 0 { 0 } else { u64::from(progress.done) * 1000 / u64::from(progress.total) }
        };
        let sum: u64 = attempt.seats.iter().map(of_seat).sum();
        u32::try_from(sum / attempt.seats.len().max(1) as u64).unwrap_or(1000)
    }
}

/// Workers, tokens, the cluster.
impl View<'_> {
    pub(super) fn workers(&self) -> Vec<WorkerRow> {
        let workers = &self.scheduler.state().workers;
        workers.iter().map(|(id, worker)| self.worker_row(*id, worker)).collect()
    }

    pub(super) fn worker(&self, id: WorkerId) -> Result<WorkerRow, ApiError> {
        let worker = self.scheduler.state().workers.get(&id);
        let worker = worker.ok_or_else(|| ApiError::new(ErrorCode::NotFound, format!("no worker {id}")))?;
        Ok(self.worker_row(id, worker))
    }

    pub(super) fn tokens(&self) -> Vec<TokenRow> {
        self.scheduler.state().tokens.iter().rev().map(|(id, token)| token_row(*id, token)).collect()
    }

    pub(super) fn token(&self, id: TokenId) -> Result<TokenRow, ApiError> {
        let token = self.scheduler.state().tokens.get(&id);
        token
            .map(|token| token_row(id, token))
            .ok_or_else(|| ApiError::new(ErrorCode::NotFound, format!("no token {id}")))
    }

    pub(super) fn cluster(&self, parts: &DriverParts) -> ClusterInfo {
        ClusterInfo {
            name: parts.journal.header().cluster.clone(),
            build: protocol::BUILD.to_owned(),
            store_path: parts.store.root().display().to_string(),
            listen: String::new(),
            journal_events: self.scheduler.state().seq,
            store_problem: self.manifests.problem.clone(),
            manifests_pending: self.manifests.pending.values().sum(),
        }
    }

    fn worker_row(&self, id: WorkerId, worker: &Worker) -> WorkerRow {
        let live = self.scheduler.live();
        let session = live.sessions.get(&id);
        let seats = self.scheduler.state().unfinished_seats().filter(|(_, seat)| seat.device.worker == id);
        let seat = |(attempt, seat): (AttemptId, &Seat)| WorkerSeat {
            shard: attempt.shard,
            role: seat.role,
            device: seat.device.device.clone(),
            progress: self.progress(attempt, seat),
        };
        let device = |device: &protocol::hardware::Device| {
            let telemetry = session.and_then(|session| session.telemetry.get(&device.id));
            DeviceRow {
                id: device.id.clone(),
                model: device.model.clone(),
                compute_capability: device.compute_capability.map(|capability| capability.to_string()),
                memory_total_bytes: device.memory_total_bytes,
                memory_budget_bytes: device.memory_budget_bytes,
                memory_reserved_bytes: live
                    .board
                    .find(&DeviceRef { worker: id, device: device.id.clone() })
                    .map_or(0, Row::reserved_bytes),
                memory_free_bytes: telemetry.map(|telemetry| telemetry.memory_free_bytes),
                utilisation_percent: telemetry.and_then(|telemetry| telemetry.utilisation_percent),
                temperature_celsius: telemetry.and_then(|telemetry| telemetry.temperature_celsius),
                power_milliwatts: telemetry.and_then(|telemetry| telemetry.power_milliwatts),
                unhealthy: device.unusable.clone().or_else(|| telemetry.and_then(|telemetry| telemetry.sick.clone())),
            }
        };
        WorkerRow {
            id,
            hostname: worker.hostname.clone(),
            state: live.worker_state(self.scheduler.state(), id, crate::clock::now()),
            build: worker.report.as_ref().map(|report| report.build.clone()).unwrap_or_default(),
            devices: worker.devices().iter().map(device).collect(),
            models: worker
                .report
                .iter()
                .flat_map(|report| &report.models)
                .filter(|model| worker.has_model(model))
                .cloned()
                .collect(),
            seats: seats.map(seat).collect(),
            last_heard_at_ms: session.map(|session| session.heard_at),
        }
    }

    fn hostname(&self, worker: WorkerId) -> String {
        self.scheduler.state().workers.get(&worker).map(|worker| worker.hostname.clone()).unwrap_or_default()
    }
}

fn seat_result(seat: &Seat) -> Option<SeatResult> {
    let outcome = seat.outcome.as_ref()?;
    Some(SeatResult {
        role: seat.role,
        device: seat.device.clone(),
        device_model: seat.device_model.clone(),
        build: outcome.build.clone(),
        wall_ms: outcome.usage.wall_ms,
        memory_peak_bytes: outcome.usage.memory_peak_bytes,
        packet_bytes: outcome.usage.packet_bytes,
        result: None,
        unreadable: None,
        outputs: output_rows(seat).collect(),
    })
}

/// The newest failure of a shard.
pub(super) fn failure_row(id: ShardId, shard: &Shard) -> Option<FailureRow> {
    shard.last_failure().map(|(fence, failure, at_ms)| FailureRow {
        attempt: AttemptId { shard: id, fence }.to_string(),
        kind: failure.kind.to_string(),
        message: failure.message.clone(),
        hint: failure.hint.clone(),
        at_ms,
    })
}

/// What a training has come to; loss and gates are left for who reads the store.
fn training_row(run: &Run, number: u32, training: &Training) -> TrainingRow {
    let spec = &training.spec;
    let method = match &spec.method {
        Method::Ridge(_) => "ridge".to_owned(),
        Method::Fuser(recipe) => format!("fuser of width {}", recipe.hidden),
    };
    let steps = |shard: &&Shard| match &shard.spec {
        ShardSpec::ProjectorTrain(spec) => matches!(spec.stage, Stage::Steps { .. }),
        _ => false,
    };
    let rounds = run.rounds.iter().filter(|round| round.training == number).rev();
    let shards = rounds.flat_map(|round| round.indices().rev()).filter_map(|index| run.shards.get(index as usize));
    let newest = shards.filter(steps).find_map(|shard| {
        let seat = shard.committed_attempt()?.seat(Role::Target)?;
        output_rows(seat).find(|output| output.name == RESULT_NAME)
    });
    TrainingRow {
        experiment: run.groups.get(training.group as usize).map(|group| group.name.clone()).unwrap_or_default(),
        what: format!("{method} {} -> {}", spec.source, spec.target),
        counted: run.samples_counted(number),
        samples: spec.samples(),
        shards_to_come: run.shards_to_come(number),
        ended: training.ended,
        newest,
        loss: None,
        gates_open: None,
    }
}

pub(super) fn output_rows(seat: &Seat) -> impl Iterator<Item = OutputRow> {
    seat.outcome.iter().flat_map(|outcome| &outcome.outputs).map(|output| OutputRow {
        role: seat.role,
        name: output.name.clone(),
        hash: output.hash,
        bytes: output.bytes,
    })
}

fn token_row(id: TokenId, token: &Token) -> TokenRow {
    TokenRow {
        id,
        state: token.state(crate::clock::now()),
        created_at_ms: token.created_at,
        expires_at_ms: token.expires_at,
        uses: token.uses,
        workers: token.workers.iter().map(ToString::to_string).collect(),
    }
}
