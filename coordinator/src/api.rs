//! The HTTP API's requests and answers, shared by the server and the command line, and its routes.
//!
//! Ids travel as people write them (`r12`, `r12.3`, `w1`, `t2`), times as milliseconds since 1970, sizes as bytes. Additive:
//! a field is never renamed or given another meaning. Only data: [`crate::http`] serves it.

use protocol::error::SourceError;
use protocol::experiment::ShardSpec;
use protocol::ids::{ArtifactHash, DeviceId, DeviceRef, Role, RunId, ShardId, TokenId, WorkerId};
use protocol::results::ShardResult;
use protocol::time::UnixMillis;
use serde::{Deserialize, Serialize};

pub mod plan;

pub use crate::scheduler::{RunState, ShardState, TokenState, Verdict, WorkerState};

/// Paths, version included. Served over the cluster's unix socket.
pub mod route {
    use protocol::ids::{DeviceRef, RunId, ShardId, TokenId, WorkerId};

    /// `GET`: [`super::ClusterInfo`].
    pub const CLUSTER: &str = "/v1/cluster";
    /// `POST` [`super::SubmitRequest`]: [`super::SubmitAnswer`]. `GET`: `Vec<`[`super::RunSummary`]`>`, newest first.
    pub const RUNS: &str = "/v1/runs";
    /// `GET`: `Vec<`[`super::WorkerRow`]`>`.
    pub const WORKERS: &str = "/v1/workers";
    /// `POST` [`super::TokenRequest`]: [`super::TokenCreated`]. `GET`: `Vec<`[`super::TokenRow`]`>`.
    pub const TOKENS: &str = "/v1/tokens";

    /// `POST` [`super::plan::PlanRequest`]: [`super::plan::PlanAnswer`]. Changes nothing.
    pub const PLAN: &str = "/v1/plan";
    /// `GET`: `Vec<`[`super::plan::ThroughputRow`]`>`.
    pub const THROUGHPUT: &str = "/v1/throughput";

    /// `POST`, no body: ends the device's quarantine.
    pub fn release(device: &DeviceRef) -> String {
        format!("/v1/devices/{}/{}/release", device.worker, device.device)
    }

    /// `GET`: [`super::RunDetail`].
    pub fn run(run: RunId) -> String {
        format!("{RUNS}/{run}")
    }

    /// `GET`: [`super::RunResults`].
    pub fn results(run: RunId) -> String {
        format!("{RUNS}/{run}/results")
    }

    /// `POST` [`super::CancelRequest`]: [`super::RunSummary`].
    pub fn cancel(run: RunId) -> String {
        format!("{RUNS}/{run}/cancel")
    }

    /// `POST`, no body: [`super::RetryAnswer`]. Reopens the run's failed shards.
    pub fn retry(run: RunId) -> String {
        format!("{RUNS}/{run}/retry")
    }

    /// `GET`: [`super::Explanation`].
    pub fn explain(shard: ShardId) -> String {
        format!("/v1/shards/{shard}/explain")
    }

    /// `GET`: [`super::ShardLog`], what its program wrote from byte `offset` on.
    pub fn log(shard: ShardId, offset: u64) -> String {
        format!("/v1/shards/{shard}/log?offset={offset}")
    }

    /// `POST`, no body: [`super::WorkerRow`]. The worker finishes what it has and gets nothing new.
    pub fn drain(worker: WorkerId) -> String {
        format!("{WORKERS}/{worker}/drain")
    }

    /// `POST`, no body: [`super::WorkerRow`].
    pub fn undrain(worker: WorkerId) -> String {
        format!("{WORKERS}/{worker}/undrain")
    }

    /// `POST`, no body: [`super::WorkerRow`]. Its certificate is refused from now on; its work is placed elsewhere.
    pub fn revoke_worker(worker: WorkerId) -> String {
        format!("{WORKERS}/{worker}/revoke")
    }

    /// `POST`, no body: [`super::TokenRow`].
    pub fn revoke_token(token: TokenId) -> String {
        format!("{TOKENS}/{token}/revoke")
    }
}

/// A sweep to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubmitRequest {
    /// Name of the file as the user gave it, for messages.
    pub file: String,
    /// The file's text, at most [`protocol::limits::SWEEP_BYTES_MAX`] bytes.
    pub text: String,
}

/// The sweep was accepted: it is in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubmitAnswer {
    /// The run it became.
    #[serde(with = "text")]
    pub run: RunId,
    /// Its shards, `0..shards`.
    pub shards: u32,
}

/// Why a run is cancelled.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CancelRequest {
    /// For the journal and the workers' logs.
    pub reason: String,
}

/// What a retry reopened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetryAnswer {
    /// The run.
    #[serde(with = "text")]
    pub run: RunId,
    /// Failed shards that wait again.
    pub shards: u32,
}

/// A run in one line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunSummary {
    /// Its id.
    #[serde(with = "text")]
    pub id: RunId,
    /// The sweep's name.
    pub name: String,
    /// Where it stands.
    pub state: RunState,
    /// Shards by state.
    pub shards: ShardCounts,
    /// Parts done of all shards' steps, per mille: running shards count with their progress.
    pub done_per_mille: u32,
    /// When it was accepted.
    pub submitted_at_ms: UnixMillis,
    /// When it ended.
    pub finished_at_ms: Option<UnixMillis>,
    /// What a person should know: why nothing moves, what cannot be written. Empty if nothing.
    pub note: String,
}

/// Shards by state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ShardCounts {
    /// Not placed.
    pub waiting: u32,
    /// An attempt is open.
    pub running: u32,
    /// Done.
    pub committed: u32,
    /// Failed for good.
    pub failed: u32,
    /// Cancelled.
    pub cancelled: u32,
}

impl ShardCounts {
    /// All shards.
    pub fn total(&self) -> u32 {
        self.waiting + self.running + self.committed + self.failed + self.cancelled
    }
}

/// Name of the artifact that holds what a seat measured.
pub const RESULT_NAME: &str = "result.json";

/// A run with every shard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunDetail {
    /// The run in one line.
    pub summary: RunSummary,
    /// Name of the sweep's file as submitted.
    pub file: String,
    /// The sweep's text as submitted.
    pub sweep: String,
    /// The shards by index.
    pub shards: Vec<ShardRow>,
    /// Its trainings.
    #[serde(default)]
    pub trainings: Vec<TrainingRow>,
}

/// A training as far as it has come.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainingRow {
    /// Its experiment's name; empty if it has none.
    pub experiment: String,
    /// `ridge smollm2-135m-instruct -> gemma-3-270m`.
    pub what: String,
    /// Samples that shards went over which have committed.
    pub counted: u64,
    /// Samples of all epochs.
    pub samples: u64,
    /// Shards that are expected beside those that there are.
    pub shards_to_come: u32,
    /// Everything of it has committed.
    pub ended: bool,
    /// The newest committed result of a replica's steps.
    pub newest: Option<OutputRow>,
    /// Loss of the last of those steps, nats.
    pub loss: Option<f64>,
    /// Gates that were open after it, and gates.
    pub gates_open: Option<(u32, u32)>,
}

/// A shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardRow {
    /// Its id.
    #[serde(with = "text")]
    pub id: ShardId,
    /// Kind, model and what tells it from its siblings.
    pub summary: String,
    /// Where it stands.
    pub state: ShardState,
    /// Attempts made so far, the open one included.
    pub attempts: u32,
    /// Seats of the open or the committed attempt.
    pub seats: Vec<SeatRow>,
    /// Progress of all seats together, in thousandths.
    pub progress: Progress,
    /// Why it waits, in one sentence; `None` unless it waits, and beyond the first shards that do.
    pub waiting: Option<String>,
    /// The newest failure, also of a shard that was placed again since.
    pub failure: Option<FailureRow>,
    /// What it made; empty unless committed.
    pub outputs: Vec<OutputRow>,
    /// When the newest attempt was placed.
    pub placed_at_ms: Option<UnixMillis>,
    /// When it ended.
    pub finished_at_ms: Option<UnixMillis>,
}

/// A seat of an attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeatRow {
    /// The seat.
    pub role: Role,
    /// Its worker.
    #[serde(with = "text")]
    pub worker: WorkerId,
    /// The worker's host name.
    pub hostname: String,
    /// Its device there.
    pub device: DeviceId,
    /// Memory set aside, bytes.
    pub reserved_bytes: u64,
    /// Its outcome is in the journal.
    pub finished: bool,
    /// How far.
    pub progress: Progress,
}

/// How far something is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Progress {
    /// Steps done.
    pub done: u32,
    /// Steps in all; 0 if not known yet.
    pub total: u32,
    /// What it is doing; empty if nothing was said.
    pub note: String,
}

/// Why an attempt failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailureRow {
    /// The attempt, as in `r12.3#f40`.
    pub attempt: String,
    /// Type in words: `out of memory`.
    pub kind: String,
    /// What happened.
    pub message: String,
    /// What a person could do; empty if nothing.
    pub hint: String,
    /// When it was journaled.
    pub at_ms: UnixMillis,
}

/// An artifact of a committed shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputRow {
    /// The seat that made it.
    pub role: Role,
    /// Name within the shard.
    pub name: String,
    /// Its content.
    pub hash: ArtifactHash,
    /// Its length.
    pub bytes: u64,
}

/// The committed shards of a run with what they measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunResults {
    /// The run in one line.
    pub summary: RunSummary,
    /// Committed shards by index.
    pub shards: Vec<ShardResults>,
}

/// A committed shard with what it measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ShardResults {
    /// Its id.
    #[serde(with = "text")]
    pub id: ShardId,
    /// What it was asked to do.
    pub spec: ShardSpec,
    /// One entry a seat, in the order of the spec's roles.
    pub seats: Vec<SeatResult>,
}

/// What one seat measured and on what.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SeatResult {
    /// The seat.
    pub role: Role,
    /// Where it ran.
    pub device: DeviceRef,
    /// The device's product name.
    pub device_model: String,
    /// Build of the executor.
    pub build: String,
    /// From start to last result, milliseconds.
    pub wall_ms: u64,
    /// Peak memory of the executor, bytes.
    pub memory_peak_bytes: u64,
    /// Bytes of packets sent or received.
    pub packet_bytes: u64,
    /// Its `result.json`, read from the store and checked against its name; `None` if the seat made none.
    pub result: Option<ShardResult>,
    /// Why the result could not be read although the seat made one: the store is away, the file is damaged.
    pub unreadable: Option<String>,
    /// All its artifacts.
    pub outputs: Vec<OutputRow>,
}

/// A worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerRow {
    /// Its id.
    #[serde(with = "text")]
    pub id: WorkerId,
    /// Its host name.
    pub hostname: String,
    /// Where it stands.
    pub state: WorkerState,
    /// Its build; empty if it never connected.
    pub build: String,
    /// Its devices.
    pub devices: Vec<DeviceRow>,
    /// Catalogue names of the models it has.
    pub models: Vec<String>,
    /// Seats it holds.
    pub seats: Vec<WorkerSeat>,
    /// When it was last heard of; `None` if not since the coordinator started.
    pub last_heard_at_ms: Option<UnixMillis>,
}

/// A seat that a worker holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerSeat {
    /// The shard.
    #[serde(with = "text")]
    pub shard: ShardId,
    /// The seat.
    pub role: Role,
    /// On which device.
    pub device: DeviceId,
    /// How far.
    pub progress: Progress,
}

/// A device of a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRow {
    /// Its id.
    pub id: DeviceId,
    /// Product name.
    pub model: String,
    /// Compute capability as in `6.1`; `None` for CPUs.
    pub compute_capability: Option<String>,
    /// All memory, bytes.
    pub memory_total_bytes: u64,
    /// Memory that bonepile may use, bytes.
    pub memory_budget_bytes: u64,
    /// Memory set aside for open attempts, bytes.
    pub memory_reserved_bytes: u64,
    /// Memory free for anyone as last heard, bytes.
    pub memory_free_bytes: Option<u64>,
    /// How busy, 0–100.
    pub utilisation_percent: Option<u32>,
    /// Degrees Celsius.
    pub temperature_celsius: Option<u32>,
    /// Draw, milliwatts.
    pub power_milliwatts: Option<u64>,
    /// Why nothing may run here; `None`: healthy.
    pub unhealthy: Option<String>,
}

/// Why a shard is where it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// The shard.
    #[serde(with = "text")]
    pub shard: ShardId,
    /// What it does.
    pub summary: String,
    /// Where it stands.
    pub state: ShardState,
    /// All of it in one sentence.
    pub sentence: String,
    /// One entry a device of the cluster: for a running or committed shard as it was decided, else as it is now.
    pub devices: Vec<DeviceReason>,
}

/// Why a device was taken or not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceReason {
    /// The device, as in `w1/cpu`.
    pub device: String,
    /// The worker's host name.
    pub hostname: String,
    /// Whether a seat fits there.
    pub verdict: Verdict,
    /// Why, in words.
    pub reason: String,
}

/// What a shard's program has written, in part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardLog {
    /// The shard.
    #[serde(with = "text")]
    pub shard: ShardId,
    /// Where it stands.
    pub state: ShardState,
    /// The newest attempt, as in `r12.3#f40`; empty if there was none. Another one's output begins again at 0.
    pub attempt: String,
    /// Where `text` begins, bytes: later than asked for if the beginning is not at hand while the program runs.
    pub offset: u64,
    /// What it wrote from there on, at most a few MB; bytes that are no UTF-8 are replaced.
    pub text: String,
    /// What to ask for next.
    pub next: u64,
    /// Nothing more will come.
    pub ended: bool,
    /// How the newest attempt failed, if it did.
    pub failure: Option<FailureRow>,
    /// What a person should know: why there is no text.
    pub note: String,
    /// The whole output as an artifact, once it is one.
    pub artifact: Option<OutputRow>,
}

/// A token to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRequest {
    /// Life, milliseconds; 0: [`protocol::limits::TOKEN_TTL_MS`].
    pub ttl_ms: u64,
    /// Boxes that may join with it, 1 or more.
    pub uses: u32,
}

/// A new token. The only time its secret is shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenCreated {
    /// The token itself, what a box joins with.
    pub token: String,
    /// Its id.
    #[serde(with = "text")]
    pub id: TokenId,
    /// When it stops working.
    pub expires_at_ms: UnixMillis,
}

/// A token without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRow {
    /// Its id.
    #[serde(with = "text")]
    pub id: TokenId,
    /// Where it stands.
    pub state: TokenState,
    /// When it was made.
    pub created_at_ms: UnixMillis,
    /// When it stops working.
    pub expires_at_ms: UnixMillis,
    /// Boxes that may join with it.
    pub uses: u32,
    /// Boxes that joined with it: ids as in `w1`.
    pub workers: Vec<String>,
}

/// The cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterInfo {
    /// Its name.
    pub name: String,
    /// Build of the coordinator.
    pub build: String,
    /// Where the coordinator has the results store.
    pub store_path: String,
    /// UDP address that workers dial.
    pub listen: String,
    /// Events in the journal.
    pub journal_events: u64,
    /// What is wrong with the store; `None`: nothing.
    pub store_problem: Option<String>,
    /// Manifests that wait for the store.
    pub manifests_pending: u32,
}

/// Why a request failed. Every answer outside 2xx has this body.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Stable, for programs.
    pub code: ErrorCode,
    /// For people: a lowercase fragment.
    pub message: String,
    /// What to try, if we can tell.
    pub hint: Option<String>,
    /// The place in the file, for [`ErrorCode::BadSweep`].
    pub source_error: Option<Box<SourceError>>,
}

/// Stable codes of failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// The sweep was refused: see `source_error`. HTTP 422.
    BadSweep,
    /// The request is not what the route takes. HTTP 400.
    BadRequest,
    /// No such run, shard, worker, token or route. HTTP 404.
    NotFound,
    /// It is there, but not in a state that allows this. HTTP 409.
    Conflict,
    /// The body is over the limit. HTTP 413.
    TooLarge,
    /// The journal cannot be written: nothing was accepted. HTTP 503.
    JournalUnavailable,
    /// The coordinator winds down: nothing was accepted. HTTP 503.
    Stopping,
    /// A bug. HTTP 500.
    Internal,
}

impl ApiError {
    /// An error without hint and source.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None, source_error: None }
    }

    /// The same error with a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl From<SourceError> for ApiError {
    fn from(error: SourceError) -> Self {
        Self {
            code: ErrorCode::BadSweep,
            message: error.to_string(),
            hint: error.hint.clone(),
            source_error: Some(Box::new(error)),
        }
    }
}

/// Ids as people write them.
mod text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<T: Display, S: Serializer>(id: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(id)
    }

    pub(super) fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_travel_as_people_write_them() {
        let json = serde_json::to_string(&SubmitAnswer { run: RunId(12), shards: 3 }).unwrap();
        assert_eq!(json, r#"{"run":"r12","shards":3}"#);
        assert_eq!(serde_json::from_str::<SubmitAnswer>(&json).unwrap().run, RunId(12));
        assert!(serde_json::from_str::<SubmitAnswer>(r#"{"run":12,"shards":3}"#).is_err());
    }

    #[test]
    fn routes_take_ids_as_people_write_them() {
        assert_eq!(route::explain("r1.2".parse().unwrap()), "/v1/shards/r1.2/explain");
        assert_eq!(route::drain(WorkerId(3)), "/v1/workers/w3/drain");
    }
}
