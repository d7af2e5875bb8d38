//! What the scheduler decided, as past participles: the journal's content and the only way the state changes.
//!
//! Events are facts and are applied as they stand: nothing is decided here or in `apply.rs`. `docs/journal.md` has the
//! table. Additive: a variant is never renamed; a new field has a `#[serde(default)]`.

use std::collections::BTreeMap;

use protocol::control::{Failure, Output, Terms, Usage};
use protocol::experiment::ShardSpec;
use protocol::group::Group;
use protocol::hardware::Device;
use protocol::ids::{AttemptId, DeviceRef, Role, RunId, ShardId, TokenId, WorkerId};
use protocol::memory::ModelShape;
use protocol::time::UnixMillis;
use serde::{Deserialize, Serialize};

use super::reason::Rated;
use super::status::RunState;

/// One row of the journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Counts from 1 without gaps over the life of the journal.
    pub seq: u64,
    /// The `now` of the input that led to it; never goes back.
    pub at: UnixMillis,
    /// What was decided.
    pub event: Event,
}

/// What was decided.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// The operator's settings differ from those of the last start.
    SettingsChanged(Settings),
    /// A join token was made.
    TokenCreated(TokenCreated),
    /// A join token was withdrawn.
    TokenRevoked {
        /// The token.
        token: TokenId,
    },
    /// A box used a token. Follows [`Event::WorkerRegistered`] if its key was new.
    TokenRedeemed {
        /// The token.
        token: TokenId,
        /// Who the box is from now on.
        worker: WorkerId,
        /// SHA-256 of its public key.
        #[serde(with = "hex32")]
        spki_sha256: [u8; 32],
    },
    /// A box became a worker.
    WorkerRegistered {
        /// Its id.
        worker: WorkerId,
        /// Host name, for people.
        hostname: String,
        /// SHA-256 of its public key.
        #[serde(with = "hex32")]
        spki_sha256: [u8; 32],
    },
    /// A worker greeted with something new: process, devices or models.
    DevicesReported {
        /// The worker.
        worker: WorkerId,
        /// All of it.
        report: Report,
    },
    /// An attempt failed because a worker does not have a model it reported. Forgotten with its next report.
    ModelFoundMissing {
        /// The worker.
        worker: WorkerId,
        /// Catalogue name.
        model: String,
    },
    /// An attempt failed because a worker's build has no kernel for a device model, for a class of work.
    KernelFoundMissing {
        /// Work class.
        class: String,
        /// The device's product name.
        device_model: String,
        /// The worker's build.
        build: String,
    },
    /// A device failed too often in a row, or said that it is sick: it gets nothing for a while.
    DeviceQuarantined {
        /// The device.
        device: DeviceRef,
        /// Until when.
        until: UnixMillis,
        /// Why, for people.
        why: String,
    },
    /// A device's quarantine was ended by hand.
    DeviceReleased {
        /// The device.
        device: DeviceRef,
    },
    /// Someone taught the throughput table what was measured elsewhere.
    ThroughputTaught {
        /// Rows: class, device model, microseconds a unit, samples that stand behind it.
        rows: Vec<(String, String, u64, u32)>,
    },
    /// A worker gets no new work.
    DrainStarted {
        /// The worker.
        worker: WorkerId,
    },
    /// A worker gets new work again.
    DrainEnded {
        /// The worker.
        worker: WorkerId,
    },
    /// A worker's certificate is refused for good.
    WorkerRevoked {
        /// The worker.
        worker: WorkerId,
    },
    /// A sweep became a run; every shard waits.
    RunAccepted(RunAccepted),
    /// A training goes on: further shards, behind all that its run has, wait.
    RoundOpened {
        /// The run.
        run: RunId,
        /// Which of its trainings.
        training: u32,
        /// What each shard does.
        specs: Vec<ShardSpec>,
    },
    /// Everything of a training has committed.
    TrainingEnded {
        /// The run.
        run: RunId,
        /// Which of its trainings.
        training: u32,
    },
    /// A shard was given devices. Its attempt is open and fences all older ones.
    AttemptPlaced(AttemptPlaced),
    /// A seat's process is over but its outcome is still in its worker's outbox: the device is free again.
    SeatFreed {
        /// The attempt.
        attempt: AttemptId,
        /// The seat.
        role: Role,
    },
    /// A seat's part is done and in the store.
    SeatCompleted(SeatCompleted),
    /// Every seat of the attempt is done: the shard's result is final.
    ShardCommitted {
        /// The attempt whose result it is.
        attempt: AttemptId,
    },
    /// An attempt ended without a result. [`Event::ShardRequeued`] or [`Event::ShardFailed`] follows in the same batch.
    AttemptFailed {
        /// The attempt.
        attempt: AttemptId,
        /// The seat at which it failed.
        role: Role,
        /// Why.
        failure: Failure,
    },
    /// An attempt given up as lost was found alive before its shard was placed again: it is open once more.
    AttemptResumed {
        /// The attempt.
        attempt: AttemptId,
    },
    /// A shard waits again after a failed attempt.
    ShardRequeued {
        /// The shard.
        shard: ShardId,
        /// Not to be placed before.
        not_before: UnixMillis,
    },
    /// A shard is out of tries, or failed in a way that is the same everywhere.
    ShardFailed {
        /// The shard.
        shard: ShardId,
    },
    /// Someone wants a failed shard tried again, with a fresh count of tries.
    ShardReopened {
        /// The shard.
        shard: ShardId,
    },
    /// Every shard of a run is over.
    RunFinished {
        /// The run.
        run: RunId,
        /// [`RunState::Complete`] or [`RunState::Failed`].
        state: RunState,
    },
    /// Someone ended a run: what had not committed is cancelled.
    RunCancelled {
        /// The run.
        run: RunId,
        /// Why, for people.
        reason: String,
    },
}

impl Event {
    /// The variant's name, as in the journal's `kind` column.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::SettingsChanged(_) => "SettingsChanged",
            Self::TokenCreated(_) => "TokenCreated",
            Self::TokenRevoked { .. } => "TokenRevoked",
            Self::TokenRedeemed { .. } => "TokenRedeemed",
            Self::WorkerRegistered { .. } => "WorkerRegistered",
            Self::DevicesReported { .. } => "DevicesReported",
            Self::ModelFoundMissing { .. } => "ModelFoundMissing",
            Self::KernelFoundMissing { .. } => "KernelFoundMissing",
            Self::DeviceQuarantined { .. } => "DeviceQuarantined",
            Self::DeviceReleased { .. } => "DeviceReleased",
            Self::ThroughputTaught { .. } => "ThroughputTaught",
            Self::DrainStarted { .. } => "DrainStarted",
            Self::DrainEnded { .. } => "DrainEnded",
            Self::WorkerRevoked { .. } => "WorkerRevoked",
            Self::RunAccepted(_) => "RunAccepted",
            Self::RoundOpened { .. } => "RoundOpened",
            Self::TrainingEnded { .. } => "TrainingEnded",
            Self::AttemptPlaced(_) => "AttemptPlaced",
            Self::SeatFreed { .. } => "SeatFreed",
            Self::SeatCompleted(_) => "SeatCompleted",
            Self::ShardCommitted { .. } => "ShardCommitted",
            Self::AttemptFailed { .. } => "AttemptFailed",
            Self::AttemptResumed { .. } => "AttemptResumed",
            Self::ShardRequeued { .. } => "ShardRequeued",
            Self::ShardFailed { .. } => "ShardFailed",
            Self::ShardReopened { .. } => "ShardReopened",
            Self::RunFinished { .. } => "RunFinished",
            Self::RunCancelled { .. } => "RunCancelled",
        }
    }
}

/// What the operator set about scheduling.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// An attempt whose worker is silent for this long is given up, milliseconds.
    pub lease_ttl_ms: u64,
    /// Tries of a shard before it fails for good.
    pub attempts_max: u32,
    /// How devices are chosen.
    #[serde(default)]
    pub policy: Policy,
    /// Shares of accounts; 1 for those that are not named.
    #[serde(default)]
    pub weights: BTreeMap<String, u32>,
}

/// How devices are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Earliest predicted finish, by the throughput table.
    #[default]
    EarliestFinish,
    /// The same with one speed a device model, for comparison.
    SpeedFactor,
    /// The first device that is idle, for comparison: what counting GPUs comes to.
    FirstIdle,
    /// The fastest device that is idle, by one speed a device model, for comparison.
    FastestIdle,
}

impl Policy {
    /// Every policy.
    pub const ALL: [Self; 4] = [Self::EarliestFinish, Self::SpeedFactor, Self::FirstIdle, Self::FastestIdle];
}

impl std::fmt::Display for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::EarliestFinish => "earliest-finish",
            Self::SpeedFactor => "speed-factor",
            Self::FirstIdle => "first-idle",
            Self::FastestIdle => "fastest-idle",
        })
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            lease_ttl_ms: protocol::limits::LEASE_TTL_MS,
            attempts_max: protocol::limits::ATTEMPTS_PER_SHARD_MAX,
            policy: Policy::default(),
            weights: BTreeMap::new(),
        }
    }
}

/// A join token was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenCreated {
    /// Its id.
    pub token: TokenId,
    /// SHA-256 of its secret.
    #[serde(with = "hex32")]
    pub secret_hash: [u8; 32],
    /// When it stops working.
    pub expires_at: UnixMillis,
    /// Boxes that may join with it.
    pub uses: u32,
}

/// What a worker says about itself in its greeting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Host name, for people.
    pub hostname: String,
    /// Its build.
    pub build: String,
    /// Start of its process: tells a reconnect from a restart.
    pub epoch: UnixMillis,
    /// Its devices, by id, no id twice; budgets at most the totals.
    pub devices: Vec<Device>,
    /// Catalogue names of its models, sorted, no name twice.
    pub models: Vec<String>,
    /// What its operator says of it.
    #[serde(default)]
    pub terms: Terms,
    /// Sizes of models that are not in the catalogue, by name, sorted, no name twice; each plausible.
    #[serde(default)]
    pub shapes: Vec<(String, ModelShape)>,
}

/// A sweep became a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunAccepted {
    /// Its id.
    pub run: RunId,
    /// The sweep's name.
    pub name: String,
    /// Higher goes first.
    pub priority: i32,
    /// The sweep's seed.
    pub seed: u64,
    /// Whose share of the cluster it takes; empty: everybody's.
    #[serde(default)]
    pub account: String,
    /// Most of its shards that may run at once; 0: no limit.
    #[serde(default)]
    pub running_max: u32,
    /// Name of the file as submitted.
    pub file: String,
    /// The file's text.
    pub text: String,
    /// Its experiments; none: one that asks for nothing.
    #[serde(default)]
    pub groups: Vec<Group>,
    /// What each shard does, by index.
    pub specs: Vec<ShardSpec>,
}

/// A shard was given devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttemptPlaced {
    /// The attempt.
    pub attempt: AttemptId,
    /// Its seats, in the order of the spec's roles.
    pub seats: Vec<PlacedSeat>,
    /// It runs beside an older attempt that takes longer than expected: the first to finish counts.
    #[serde(default)]
    pub speculative: bool,
    /// Why these devices and not others, at most [`super::placement::REASONS_PER_PLACEMENT_MAX`] of them.
    pub reasons: Vec<Rated>,
}

/// A seat with its device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacedSeat {
    /// The seat.
    pub role: Role,
    /// Its device.
    pub device: DeviceRef,
    /// Memory set aside there, bytes.
    pub reserved_bytes: u64,
    /// Seats of one device in one lane run one after another.
    #[serde(default)]
    pub lane: u32,
    /// How long it is expected to take, milliseconds; 0: not known.
    #[serde(default)]
    pub expected_ms: u64,
    /// Share of the device's time that it takes, thousandths.
    #[serde(default = "whole")]
    pub load: u16,
}

/// A seat that has its device for itself.
pub const WHOLE: u16 = 1000;

pub(super) const fn whole() -> u16 {
    WHOLE
}

/// A seat's part is done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeatCompleted {
    /// The attempt.
    pub attempt: AttemptId,
    /// The seat.
    pub role: Role,
    /// What it made.
    pub outputs: Vec<Output>,
    /// What it took.
    pub usage: Usage,
    /// `sha256:…` of each model used, by its name in the spec.
    pub models: Vec<(String, String)>,
    /// Build of the executor.
    pub build: String,
}

/// 32 bytes as 64 hex digits.
pub(super) mod hex32 {
    use protocol::ids::{hex, unhex};
    use serde::{Deserialize, Deserializer, Serializer};

    pub(in crate::scheduler) fn serialize<S: Serializer>(bytes: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex(bytes))
    }

    pub(in crate::scheduler) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 32], D::Error> {
        unhex(&String::deserialize(deserializer)?)
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or_else(|| serde::de::Error::custom("expected 64 lower-case hex digits"))
    }
}
