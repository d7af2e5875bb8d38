//! The conversation of worker and coordinator on ALPN `bonepile/1`, and the short one of joining on `bonepile-join/1`.
//!
//! The worker opens one bidirectional stream, sends [`Hello`], gets [`Welcome`]; then each side sends what it has to say.
//! Finished seats are repeated until [`SeatSettled`] answers them, over reconnects and restarts of either side. Artifacts of
//! a worker without the store's mount go over further bidirectional streams: one [`Upload`], then the bytes, then one
//! [`UploadAnswer`]. Only data here.

use serde::{Deserialize, Serialize};

use crate::experiment::ShardSpec;
use crate::frame::messages;
use crate::hardware::{Device, Telemetry};
use crate::ids::{ArtifactHash, AttemptId, DeviceId, Role, TokenId, WorkerId};
use crate::limits::{CONTROL_FRAME_BYTES_MAX, JOIN_FRAME_BYTES_MAX};
use crate::memory::ModelShape;
use crate::time::UnixMillis;

/// ALPN of the control conversation.
pub const ALPN_CONTROL: &[u8] = b"bonepile/1";
/// ALPN of joining: no client certificate.
pub const ALPN_JOIN: &[u8] = b"bonepile-join/1";
/// ALPN of worker to worker.
pub const ALPN_PEER: &[u8] = b"bonepile-peer/1";

messages! {
    /// What a worker says.
    pub enum ToCoordinator, max = CONTROL_FRAME_BYTES_MAX, {
        /// First on every connection.
        0x0101 Hello(Hello),
        /// Every [`crate::limits::HEARTBEAT_INTERVAL_MS`].
        0x0102 Heartbeat(Heartbeat),
        /// A seat's part is done and published.
        0x0103 SeatFinished(SeatFinished),
        /// A seat's part failed.
        0x0104 SeatFailed(SeatFailed),
        /// First on an upload stream.
        0x0105 Upload(Upload),
        /// What a running seat's program has written.
        0x0106 SeatWrote(SeatWrote),
        /// First on a stream for bytes of the store.
        0x0107 Download(Download),
    }
}

messages! {
    /// What the coordinator says.
    pub enum ToWorker, max = CONTROL_FRAME_BYTES_MAX, {
        /// Answer to [`Hello`].
        0x0201 Welcome(Welcome),
        /// Answer to [`Heartbeat`].
        0x0202 HeartbeatAck(HeartbeatAck),
        /// Work for a seat.
        0x0203 StartSeat(StartSeat),
        /// The attempt is over for this worker: stop it if it runs, drop what it made.
        0x0204 CancelSeat(CancelSeat),
        /// The coordinator has a seat's outcome in its journal, or needs it no more.
        0x0205 SeatSettled(SeatSettled),
        /// A message was not understood or not allowed.
        0x0206 Refused(Refused),
        /// Answer on an upload stream.
        0x0207 UploadAnswer(UploadAnswer),
        /// Answer to [`Download`]; the bytes follow.
        0x0208 DownloadAnswer(DownloadAnswer),
    }
}

messages! {
    /// What a box says to join.
    pub enum ToAuthority, max = JOIN_FRAME_BYTES_MAX, {
        /// The only message.
        0x0301 Join(Join),
    }
}

messages! {
    /// What the authority answers.
    pub enum FromAuthority, max = JOIN_FRAME_BYTES_MAX, {
        /// Welcome to the cluster.
        0x0381 Joined(Joined),
        /// Not with this token.
        0x0382 JoinRefused(Refused),
    }
}

/// A worker's greeting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`crate::BUILD`] of the worker.
    pub build: String,
    /// Host name, for people.
    pub hostname: String,
    /// Start of the worker's process: tells a reconnect from a restart.
    pub epoch: UnixMillis,
    /// Its devices.
    pub devices: Vec<Device>,
    /// Names by which models are found on this box, but for paths ([`crate::model_name`]).
    pub models: Vec<String>,
    /// Attempts it runs or has finished and not yet settled.
    pub held: Vec<HeldSeat>,
    /// Port of its UDP endpoint, where peers find it.
    pub peer_port: u16,
    /// Addresses of its interfaces (text, no port), nearest first, beside the one that the coordinator sees.
    pub addresses: Vec<String>,
    /// What its operator says of it.
    pub terms: Terms,
    /// Sizes of those of `models` that are not in the catalogue, as far as their headers could be read, by name;
    /// [`crate::limits::MODEL_SHAPES_MAX`] at most.
    pub shapes: Vec<(String, ModelShape)>,
}

/// A worker's terms, as its operator set them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Terms {
    /// Labels `name=value`, sorted, no name twice.
    pub labels: Vec<String>,
    /// What an hour of it costs beside electricity, millionths of a US dollar.
    pub price_microusd_per_hour: u64,
    /// Programs of researchers (kind `command`) may run here.
    pub commands: bool,
    /// Seats that may be sent ahead to each device, to wait there for the one before: no wait for the coordinator between
    /// short shards.
    pub ahead: u32,
}

/// A seat that a worker holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldSeat {
    /// The attempt.
    pub attempt: AttemptId,
    /// The seat.
    pub role: Role,
    /// How far.
    pub progress: SeatProgress,
}

/// How far a seat is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SeatProgress {
    /// Steps done.
    pub done: u32,
    /// Steps in all; 0 if not known yet.
    pub total: u32,
    /// What it is doing: `loading model`, `fact 3 of 8`, `waiting for the store: disk full`.
    pub note: String,
}

/// A worker's sign of life: renews the leases of what it holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Counts from 1 on each connection.
    pub sequence: u64,
    /// One entry a device.
    pub telemetry: Vec<Telemetry>,
    /// Attempts it runs or has finished and not yet settled.
    pub held: Vec<HeldSeat>,
}

/// What a running seat's program has written to its standard output and error. Best effort: the whole is an artifact later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeatWrote {
    /// The attempt.
    pub attempt: AttemptId,
    /// The seat.
    pub role: Role,
    /// Where `bytes` stand in all that it wrote.
    pub offset: u64,
    /// At most [`crate::limits::OUTPUT_PIECE_BYTES_MAX`].
    pub bytes: Vec<u8>,
}

/// A seat's part is done: its artifacts are in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeatFinished {
    /// The attempt.
    pub attempt: AttemptId,
    /// The seat.
    pub role: Role,
    /// What it made, each visible in the store before this is sent.
    pub outputs: Vec<Output>,
    /// What it took.
    pub usage: Usage,
    /// `sha256:…` of each model used, by its name in the spec.
    pub models: Vec<(String, String)>,
    /// [`crate::BUILD`] of the executor.
    pub build: String,
}

/// An artifact that a seat made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// Name within the shard: `result.json`, `caches/fact-3.safetensors`.
    pub name: String,
    /// Its content.
    pub hash: ArtifactHash,
    /// Its length.
    pub bytes: u64,
}

/// What an attempt took on its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// From start to last result, milliseconds.
    pub wall_ms: u64,
    /// Peak memory of the executor on its device, bytes.
    pub memory_peak_bytes: u64,
    /// Bytes of packets sent to or received from the other seat.
    pub packet_bytes: u64,
    /// Fastest packet sent to another worker, bytes a second; 0 if none was long enough to tell.
    #[serde(default)]
    pub link_bytes_per_second: u64,
    /// Of the wall time, what the seat waited for the other one or for its packets' way, milliseconds.
    #[serde(default)]
    pub waited_ms: u64,
}

impl Usage {
    /// Time in which the seat worked, milliseconds.
    pub const fn busy_ms(&self) -> u64 {
        self.wall_ms.saturating_sub(self.waited_ms)
    }
}

/// A seat's part failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeatFailed {
    /// The attempt.
    pub attempt: AttemptId,
    /// The seat.
    pub role: Role,
    /// What failed.
    pub failure: Failure,
}

/// Why an attempt failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{kind}: {message}")]
pub struct Failure {
    /// The type, on which the retry policy depends.
    pub kind: FailureKind,
    /// What happened, in words, with file and numbers.
    pub message: String,
    /// What a person could do; empty if nothing.
    pub hint: String,
}

impl Failure {
    /// A failure without a hint.
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: String::new() }
    }

    /// The same failure with a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }
}

/// Types of failure. An open set on the wire: a number, unknown ones kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(from = "u16", into = "u16")]
pub enum FailureKind {
    /// The executor's process ended or answered nonsense.
    ExecutorLost,
    /// The device had not enough memory.
    OutOfMemory,
    /// The box does not have a model.
    ModelMissing,
    /// A model's file is not what it should be.
    ModelCorrupt,
    /// The model or a tensor type in it is not supported by this build.
    Unsupported,
    /// The spec asks for something impossible, on any device.
    BadSpec,
    /// The other seat could not be reached, or ended the transfer.
    PeerLost,
    /// A packet did not check.
    PacketRefused,
    /// No lease was renewed in time.
    LeaseExpired,
    /// Someone asked for it.
    Cancelled,
    /// A disk of the worker (not the store) could not be written.
    LocalDisk,
    /// A bug: the message says where.
    Internal,
    /// The researcher's program ended with an exit code that is not 0, or by a signal.
    CommandFailed,
    /// The researcher's program took longer than it may.
    TimedOut,
    /// The worker's operator does not allow it.
    Forbidden,
    /// The executor's build has no kernel for the card.
    NoKernel,
    /// The card itself: a driver error, a fall off the bus, a wrong answer.
    DeviceSick,
    /// The box was told that it will be taken away.
    Preempted,
    /// An artifact that the seat needs could not be had.
    InputMissing,
    /// A number this build does not know.
    Unknown(u16),
}

/// What a type of failure means for the shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// Try again, elsewhere first; counts towards the shard's tries.
    Elsewhere,
    /// Try again without counting: nobody's fault.
    Free,
    /// The same everywhere: fail the shard now.
    Never,
}

impl FailureKind {
    const TABLE: [(u16, Self, &'static str, Retry); 19] = [
        (1, Self::ExecutorLost, "executor lost", Retry::Elsewhere),
        (2, Self::OutOfMemory, "out of memory", Retry::Elsewhere),
        (3, Self::ModelMissing, "model missing", Retry::Elsewhere),
        (4, Self::ModelCorrupt, "model corrupt", Retry::Elsewhere),
        (5, Self::Unsupported, "unsupported", Retry::Never),
        (6, Self::BadSpec, "bad spec", Retry::Never),
        (7, Self::PeerLost, "peer lost", Retry::Free),
        (8, Self::PacketRefused, "packet refused", Retry::Elsewhere),
        (9, Self::LeaseExpired, "lease expired", Retry::Elsewhere),
        (10, Self::Cancelled, "cancelled", Retry::Never),
        (11, Self::LocalDisk, "local disk", Retry::Elsewhere),
        (12, Self::Internal, "internal error", Retry::Elsewhere),
        (13, Self::CommandFailed, "command failed", Retry::Elsewhere),
        (14, Self::TimedOut, "timed out", Retry::Elsewhere),
        (15, Self::Forbidden, "forbidden", Retry::Free),
        (16, Self::NoKernel, "no kernel", Retry::Free),
        (17, Self::DeviceSick, "device sick", Retry::Free),
        (18, Self::Preempted, "preempted", Retry::Free),
        (19, Self::InputMissing, "input missing", Retry::Elsewhere),
    ];

    fn row(self) -> Option<&'static (u16, Self, &'static str, Retry)> {
        Self::TABLE.iter().find(|row| row.1 == self)
    }

    /// What it means for the shard. A type that this build does not know is tried again.
    pub fn retry(self) -> Retry {
        self.row().map_or(Retry::Elsewhere, |row| row.3)
    }
}

impl std::fmt::Display for FailureKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.row(), self) {
            (Some(row), _) => f.write_str(row.2),
            (None, Self::Unknown(code)) => write!(f, "failure {code}"),
            (None, _) => f.write_str("failure"),
        }
    }
}

impl From<u16> for FailureKind {
    fn from(code: u16) -> Self {
        Self::TABLE.iter().find(|row| row.0 == code).map_or(Self::Unknown(code), |row| row.1)
    }
}

impl From<FailureKind> for u16 {
    fn from(kind: FailureKind) -> Self {
        match kind {
            FailureKind::Unknown(code) => code,
            known => known.row().map_or(0, |row| row.0),
        }
    }
}

/// Bytes for the store follow on this stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upload {
    /// The attempt that made them.
    pub attempt: AttemptId,
    /// Their name.
    pub hash: ArtifactHash,
    /// Their number.
    pub bytes: u64,
}

/// What became of an upload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UploadAnswer {
    /// `None`: stored and checked. Otherwise why not; the worker keeps the bytes and tries again.
    pub refused: Option<String>,
}

/// A worker without the store's mount wants an artifact that a seat of its needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Download {
    /// The attempt that needs it.
    pub attempt: AttemptId,
    /// Its name.
    pub hash: ArtifactHash,
}

/// What comes of a download.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DownloadAnswer {
    /// `None`: the bytes follow on this stream. Otherwise why not.
    pub refused: Option<String>,
    /// Their number.
    pub bytes: u64,
}

/// The coordinator's answer to a greeting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// [`crate::BUILD`] of the coordinator.
    pub build: String,
    /// Name of the cluster.
    pub cluster: String,
    /// The coordinator's clock.
    pub server_time: UnixMillis,
    /// Time between heartbeats, milliseconds.
    pub heartbeat_interval_ms: u64,
    /// UUID in the store's sentinel file, by which a worker knows that a directory is this cluster's store.
    pub store_uuid: String,
    /// Where the coordinator has the store; a worker without a setting of its own tries the same path.
    pub store_path: String,
}

/// Answer to a heartbeat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeartbeatAck {
    /// The heartbeat's sequence.
    pub sequence: u64,
}

/// Work for one seat of an attempt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StartSeat {
    /// The attempt.
    pub attempt: AttemptId,
    /// The seat.
    pub role: Role,
    /// The device to use.
    pub device: DeviceId,
    /// Memory set aside there, bytes.
    pub reserved_bytes: u64,
    /// Seats of one device with the same lane run one after another, in the order of their fencing numbers.
    pub lane: u32,
    /// What to do.
    pub spec: ShardSpec,
    /// All seats of the attempt, this one too: who may send to whom.
    pub seats: Vec<SeatAddress>,
    /// Artifacts that it needs, by the names under which it knows them.
    pub inputs: Vec<Output>,
}

/// Where a seat of an attempt sits, and how its worker is known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeatAddress {
    /// The seat.
    pub role: Role,
    /// Its worker.
    pub worker: WorkerId,
    /// SHA-256 of the public key in its certificate: the only peer that may take this seat.
    pub spki_sha256: [u8; 32],
    /// Socket addresses to try, best first.
    pub addresses: Vec<String>,
}

/// The attempt is over for this worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CancelSeat {
    /// The attempt.
    pub attempt: AttemptId,
    /// Why, for the log.
    pub reason: String,
}

/// A seat's outcome needs no more repeating.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeatSettled {
    /// The attempt.
    pub attempt: AttemptId,
    /// The seat.
    pub role: Role,
    /// `true`: in the journal. `false`: fenced or cancelled, the outcome changes nothing.
    pub counted: bool,
}

/// Something was not understood or not allowed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{text} (code {code})")]
pub struct Refused {
    /// One of [`refusal`].
    pub code: u16,
    /// In words.
    pub text: String,
}

/// Numbers of refusals.
pub mod refusal {
    /// The message's type is not known here.
    pub const UNKNOWN_MESSAGE: u16 = 1;
    /// The message does not decode.
    pub const MALFORMED: u16 = 2;
    /// No token of this id, or its proof is wrong.
    pub const TOKEN_UNKNOWN: u16 = 10;
    /// The token's time has passed.
    pub const TOKEN_EXPIRED: u16 = 11;
    /// The token was used.
    pub const TOKEN_USED: u16 = 12;
    /// The token was withdrawn.
    pub const TOKEN_REVOKED: u16 = 13;
    /// The certificate request does not check.
    pub const BAD_REQUEST: u16 = 14;
    /// Too many tries.
    pub const RATE: u16 = 15;
    /// The coordinator is stopping or cannot write its journal: try again later.
    pub const UNAVAILABLE: u16 = 16;
    /// The greeting is over a limit of [`crate::limits`].
    pub const TOO_MUCH: u16 = 17;
    /// The journal does not know this worker, or not with this key.
    pub const WORKER_UNKNOWN: u16 = 18;
    /// The worker's certificate was revoked.
    pub const WORKER_REVOKED: u16 = 19;
}

/// Codes with which a connection is closed.
pub mod close {
    /// The other connection of the pair is kept.
    pub const DUPLICATE: u32 = 1;
    /// The certificate was revoked.
    pub const REVOKED: u32 = 2;
    /// The certificate is past its end.
    pub const EXPIRED: u32 = 3;
    /// No certificate, or one without the role that this conversation needs.
    pub const ROLE: u32 = 4;
    /// A frame did not check.
    pub const PROTOCOL: u32 = 5;
    /// The peer winds down.
    pub const DRAINING: u32 = 6;
    /// The peer restarts: dial again.
    pub const RESTARTING: u32 = 7;
    /// A limit was passed.
    pub const LIMIT: u32 = 8;
    /// The conversation is over.
    pub const DONE: u32 = 9;

    /// The code in words.
    pub fn name(code: u64) -> &'static str {
        match u32::try_from(code) {
            Ok(DUPLICATE) => "duplicate connection",
            Ok(REVOKED) => "certificate revoked",
            Ok(EXPIRED) => "certificate expired",
            Ok(ROLE) => "no certificate of this cluster with the needed role",
            Ok(PROTOCOL) => "protocol violated",
            Ok(DRAINING) => "draining",
            Ok(RESTARTING) => "restarting",
            Ok(LIMIT) => "limit passed",
            Ok(DONE) => "done",
            _ => "unknown code",
        }
    }
}

/// A box asks for a certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Join {
    /// Which token.
    pub token: TokenId,
    /// HMAC-SHA256 with the hash of the token's secret as key, over keying material exported from this very channel.
    pub proof: [u8; 32],
    /// Certificate request, DER: only its public key is used.
    pub csr: Vec<u8>,
    /// Host name, for people.
    pub hostname: String,
    /// [`crate::BUILD`] of the worker.
    pub build: String,
}

/// The authority's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joined {
    /// The worker's id from now on.
    pub worker: WorkerId,
    /// Its certificate, DER.
    pub certificate: Vec<u8>,
    /// The cluster's authority, DER.
    pub authority: Vec<u8>,
    /// Name of the cluster.
    pub cluster: String,
    /// TLS name of the coordinator.
    pub server_name: String,
    /// The coordinator's clock.
    pub server_time: UnixMillis,
}
