//! The journaled state: what a replay of the events gives back, byte for byte.
//!
//! Plain data and questions about it. Changes only through [`State::apply`] (in `apply.rs`). What is soft (sessions,
//! telemetry, progress, leases) is not here but in [`super::live`].

use std::collections::{BTreeMap, BTreeSet};

use protocol::catalogue;
use protocol::control::{Failure, FailureKind, Output, Terms, Usage};
use protocol::experiment::ShardSpec;
use protocol::group::Group;
use protocol::hardware::{Device, DeviceKind};
use protocol::ids::{AttemptId, DeviceRef, Fence, Role, RunId, ShardId, TokenId, WorkerId};
use protocol::memory::ModelShape;
use protocol::model_name::is_path;
use protocol::time::UnixMillis;
use serde::{Deserialize, Serialize};

use super::event::{Report, Settings, hex32};
use super::learned::{self, Peak};
use super::reason::Rated;
use super::status::{RunState, ShardState, TokenState};
use super::throughput::Table;
use super::training::{OpenedRound, Training};

/// Everything that must survive a restart.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct State {
    /// Sequence number of the newest event applied, 0 if none.
    pub seq: u64,
    /// When the newest event was decided.
    pub at: UnixMillis,
    /// What the operator set.
    pub settings: Settings,
    /// Fencing numbers given out: the newest is this one.
    pub fences: u64,
    /// Join tokens.
    pub tokens: BTreeMap<TokenId, Token>,
    /// Workers, revoked ones too.
    pub workers: BTreeMap<WorkerId, Worker>,
    /// Runs, finished ones too.
    pub runs: BTreeMap<RunId, Run>,
    /// The throughput table.
    pub table: Table,
    /// The same by device instead of device model, for classes whose work is shared out by it: local steps of a training. Two boxes
    /// with one processor differ in clock, memory and what else they do.
    pub paces: Table,
    /// Memory that work classes were seen to take, by seat class.
    pub peaks: BTreeMap<String, Peak>,
    /// Bytes that a unit of work sends from seat to seat, by work class, as the last gang said.
    pub packets: BTreeMap<String, u64>,
    /// (class, device model, build) for which a kernel was found missing.
    pub kernels_missing: BTreeSet<(String, String, String)>,
    /// Devices whose last attempts failed.
    pub records: BTreeMap<String, learned::DeviceRecord>,
}

/// A join token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// SHA-256 of its secret.
    #[serde(with = "hex32")]
    pub secret_hash: [u8; 32],
    /// When it was made.
    pub created_at: UnixMillis,
    /// When it stops working.
    pub expires_at: UnixMillis,
    /// Boxes that may join with it.
    pub uses: u32,
    /// Withdrawn.
    pub revoked: bool,
    /// Who joined with it.
    pub workers: Vec<WorkerId>,
}

impl Token {
    /// Where it stands at `now`.
    pub fn state(&self, now: UnixMillis) -> TokenState {
        if self.revoked {
            TokenState::Revoked
        } else if now >= self.expires_at {
            TokenState::Expired
        } else if self.workers.len() >= self.uses as usize {
            TokenState::Used
        } else {
            TokenState::Open
        }
    }
}

/// A worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Worker {
    /// Host name, as of joining or of its newest report.
    pub hostname: String,
    /// SHA-256 of its public key.
    #[serde(with = "hex32")]
    pub spki_sha256: [u8; 32],
    /// When it joined.
    pub joined_at: UnixMillis,
    /// Its certificate is refused.
    pub revoked: bool,
    /// It gets no new work.
    pub draining: bool,
    /// What it said when it last greeted; `None` if it never did.
    pub report: Option<Report>,
    /// Models that it reported but did not have.
    pub missing_models: BTreeSet<String>,
}

impl Worker {
    /// Its devices by its newest report.
    pub fn devices(&self) -> &[Device] {
        self.report.as_ref().map_or(&[], |report| &report.devices)
    }

    /// Whether it has the model, as far as known. What lies at a path of its box is known to nobody before it is tried.
    pub fn has_model(&self, model: &str) -> bool {
        let reported = self.report.as_ref().is_some_and(|report| report.models.iter().any(|known| known == model));
        (reported || is_path(model)) && !self.missing_models.contains(model)
    }
}

/// A run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// The sweep's name.
    pub name: String,
    /// Higher goes first.
    pub priority: i32,
    /// The sweep's seed.
    pub seed: u64,
    /// Whose share of the cluster it takes; empty: everybody's.
    pub account: String,
    /// Most of its shards that may run at once; 0: no limit.
    pub running_max: u32,
    /// Its experiments, at least one.
    pub groups: Vec<Group>,
    /// Name of the file as submitted.
    pub file: String,
    /// The file's text.
    pub text: String,
    /// When it was accepted.
    pub submitted_at: UnixMillis,
    /// Where it stands.
    pub state: RunState,
    /// When it ended.
    pub finished_at: Option<UnixMillis>,
    /// Why it was cancelled; empty if it was not.
    pub cancel_reason: String,
    /// Its shards by index.
    pub shards: Vec<Shard>,
    /// Indices of the shards that wait, so that a placement pass need not look at the others.
    pub waiting: BTreeSet<u32>,
    /// Indices of the shards with an open attempt.
    pub running: BTreeSet<u32>,
    /// Shards of each experiment that have not committed, and trainings that have not ended.
    pub uncommitted: Vec<u32>,
    /// Its trainings, in the order of its experiments.
    pub trainings: Vec<Training>,
    /// What was opened of them, in that order: their shards lie behind those of the sweep.
    pub rounds: Vec<OpenedRound>,
}

/// A shard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Shard {
    /// What it does.
    pub spec: ShardSpec,
    /// Where it stands.
    pub state: ShardState,
    /// Failed attempts that count, since it was accepted or reopened.
    pub tries: u32,
    /// Failed attempts that do not count, since then.
    pub free_retries: u32,
    /// Not to be placed before.
    pub not_before: UnixMillis,
    /// Attempts before this one do not tell devices to avoid: the shard was reopened since.
    pub reopened_at_attempt: u32,
    /// Its attempts, oldest first.
    pub attempts: Vec<Attempt>,
}

/// One try of a shard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attempt {
    /// The number that fences older tries.
    pub fence: Fence,
    /// When it was placed.
    pub placed_at: UnixMillis,
    /// When it ended.
    pub ended_at: Option<UnixMillis>,
    /// Where it stands.
    pub state: AttemptState,
    /// Its seats, in the order of the spec's roles.
    pub seats: Vec<Seat>,
    /// Why these devices.
    pub reasons: Vec<Rated>,
}

/// Where an attempt stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AttemptState {
    /// Its seats hold their devices.
    Open,
    /// The shard's result is its result.
    Committed,
    /// It ended without a result.
    Failed {
        /// The seat at which it failed.
        role: Role,
        /// Why.
        failure: Failure,
    },
    /// Its run was cancelled.
    Cancelled,
    /// Another attempt of the shard committed first.
    Superseded,
}

/// A seat of an attempt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Seat {
    /// The seat.
    pub role: Role,
    /// Its device.
    pub device: DeviceRef,
    /// The device's product name when it was placed: the device may be gone when someone asks.
    pub device_model: String,
    /// What computes on the device.
    pub device_kind: DeviceKind,
    /// Memory set aside there, bytes.
    pub reserved_bytes: u64,
    /// Seats of one device in one lane run one after another.
    #[serde(default)]
    pub lane: u32,
    /// How long it was expected to take, milliseconds; 0: not known.
    #[serde(default)]
    pub expected_ms: u64,
    /// Share of the device's time that it takes, thousandths.
    #[serde(default = "super::event::whole")]
    pub load: u16,
    /// Its process is over, its outcome is still to come: the device is free.
    pub freed: bool,
    /// What it made, once that is known.
    pub outcome: Option<Outcome>,
}

/// What a seat made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Its artifacts.
    pub outputs: Vec<Output>,
    /// What it took.
    pub usage: Usage,
    /// `sha256:…` of each model used, by its name in the spec.
    pub models: Vec<(String, String)>,
    /// Build of the executor.
    pub build: String,
    /// When it was journaled.
    pub at: UnixMillis,
}

impl State {
    /// The shard of this id.
    pub fn shard(&self, id: ShardId) -> Option<&Shard> {
        self.runs.get(&id.run)?.shards.get(id.index as usize)
    }

    /// The attempt of this id.
    pub fn attempt(&self, id: AttemptId) -> Option<&Attempt> {
        self.shard(id.shard)?.attempts.iter().find(|attempt| attempt.fence == id.fence)
    }

    /// Every open attempt, by shard.
    pub fn open_attempts(&self) -> impl Iterator<Item = (AttemptId, &Shard, &Attempt)> {
        self.runs
            .iter()
            .flat_map(|(run, body)| {
                body.running.iter().filter_map(move |index| {
                    let shard = body.shards.get(*index as usize)?;
                    let id = ShardId { run: *run, index: *index };
                    Some(
                        shard
                            .open_attempts()
                            .map(move |attempt| (AttemptId { shard: id, fence: attempt.fence }, shard, attempt)),
                    )
                })
            })
            .flatten()
    }

    /// Every seat of an open attempt whose outcome is not known, by attempt.
    pub fn unfinished_seats(&self) -> impl Iterator<Item = (AttemptId, &Seat)> {
        self.open_attempts().flat_map(|(id, _, attempt)| attempt.unfinished().map(move |seat| (id, seat)))
    }

    /// A device by its newest report.
    pub fn device(&self, device: &DeviceRef) -> Option<&Device> {
        self.workers.get(&device.worker)?.devices().iter().find(|known| known.id == device.device)
    }

    /// The worker with this key.
    pub fn worker_by_key(&self, spki_sha256: &[u8; 32]) -> Option<WorkerId> {
        self.workers.iter().find(|(_, worker)| worker.spki_sha256 == *spki_sha256).map(|(id, _)| *id)
    }
}

impl Worker {
    /// What its operator says of it, if it ever greeted.
    pub fn terms(&self) -> Option<&Terms> {
        self.report.as_ref().map(|report| &report.terms)
    }
}

/// What was learned.
impl State {
    /// Whether a build was found to have no kernel for a device model, for a class of work.
    pub fn lacks_kernel(&self, class: &str, device_model: &str, build: &str) -> bool {
        !self.kernels_missing.is_empty()
            && self.kernels_missing.contains(&(class.to_owned(), device_model.to_owned(), build.to_owned()))
    }

    /// The sizes of a model: the catalogue's, else what a worker that has it says.
    pub fn shape(&self, model: &str) -> Option<&ModelShape> {
        let reports = self.workers.values().filter_map(|worker| worker.report.as_ref());
        let told = || reports.flat_map(|report| &report.shapes).find(|(name, _)| name == model).map(|(_, shape)| shape);
        catalogue::shape(model).or_else(told)
    }

    /// Until when a device gets nothing.
    pub fn quarantined_until(&self, device: &DeviceRef) -> Option<UnixMillis> {
        if self.records.is_empty() {
            return None;
        }
        self.records.get(&device.to_string())?.quarantined_until
    }
}

impl Run {
    /// The experiment that a shard belongs to.
    pub fn group_of(&self, index: u32) -> Option<&Group> {
        self.groups.get(self.group_index(index)?)
    }

    /// The place of a shard's experiment.
    pub fn group_index(&self, index: u32) -> Option<usize> {
        if let Some(training) = self.training_of(index) {
            return Some(training.group as usize);
        }
        let at = self.groups.partition_point(|group| group.first <= index);
        // Of several that begin there all but the last are empty.
        at.checked_sub(1)
    }

    /// Whether every experiment that this one waits for has committed.
    pub fn is_ready(&self, group: usize) -> bool {
        self.groups.get(group).is_some_and(|group| {
            group.after.iter().all(|earlier| self.uncommitted.get(*earlier as usize).is_some_and(|left| *left == 0))
        })
    }

    /// Number of shards in `state`.
    pub fn count(&self, state: ShardState) -> usize {
        match state {
            ShardState::Waiting => self.waiting.len(),
            ShardState::Running => self.running.len(),
            _ => self.shards.iter().filter(|shard| shard.state == state).count(),
        }
    }
}

impl Shard {
    /// A shard that nobody has tried.
    pub(super) fn waiting(spec: &ShardSpec, since: UnixMillis) -> Self {
        Self {
            spec: spec.clone(),
            state: ShardState::Waiting,
            tries: 0,
            free_retries: 0,
            not_before: since,
            reopened_at_attempt: 0,
            attempts: Vec::new(),
        }
    }

    /// The newest attempt.
    pub fn newest(&self) -> Option<&Attempt> {
        self.attempts.last()
    }

    /// The newest open attempt.
    pub fn open_attempt(&self) -> Option<&Attempt> {
        self.open_attempts().next_back()
    }

    /// Its open attempts, oldest first: one, or two while a straggler is tried again elsewhere.
    pub fn open_attempts(&self) -> impl DoubleEndedIterator<Item = &Attempt> {
        self.attempts.iter().filter(|attempt| attempt.state == AttemptState::Open)
    }

    /// The attempt that committed.
    pub fn committed_attempt(&self) -> Option<&Attempt> {
        self.attempts.iter().rev().find(|attempt| attempt.state == AttemptState::Committed)
    }

    /// The attempt `fence` if its worker was given up as lost but nothing was placed since, and every seat but `role` is
    /// done: what `role` finished may still commit.
    pub fn lapsed(&self, fence: Fence, role: Role) -> Option<&Attempt> {
        let attempt = self.newest().filter(|attempt| attempt.fence == fence && self.state == ShardState::Waiting)?;
        let lost = match &attempt.state {
            AttemptState::Failed { role: at, failure } => *at == role && failure.kind == FailureKind::LeaseExpired,
            _ => false,
        };
        let others_done = attempt.seats.iter().all(|seat| seat.role == role || seat.outcome.is_some());
        (lost && others_done).then_some(attempt)
    }

    /// The newest failure with the attempt's fence and the time.
    pub fn last_failure(&self) -> Option<(Fence, &Failure, UnixMillis)> {
        self.attempts.iter().rev().find_map(|attempt| match &attempt.state {
            AttemptState::Failed { failure, .. } => {
                Some((attempt.fence, failure, attempt.ended_at.unwrap_or(attempt.placed_at)))
            }
            _ => None,
        })
    }
}

impl Attempt {
    /// The seat of this role.
    pub fn seat(&self, role: Role) -> Option<&Seat> {
        self.seats.iter().find(|seat| seat.role == role)
    }

    /// Whether any seat made an artifact.
    pub fn has_outputs(&self) -> bool {
        self.seats.iter().filter_map(|seat| seat.outcome.as_ref()).any(|outcome| !outcome.outputs.is_empty())
    }

    /// Seats whose outcome is not known.
    pub fn unfinished(&self) -> impl Iterator<Item = &Seat> {
        self.seats.iter().filter(|seat| seat.outcome.is_none())
    }
}

impl Seat {
    /// Bytes it holds on its device while its attempt is open.
    pub fn held_bytes(&self) -> u64 {
        if self.freed || self.outcome.is_some() { 0 } else { self.reserved_bytes }
    }
}
