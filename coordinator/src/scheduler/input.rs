//! What goes into the scheduler and what comes out besides events: inputs, answers, rejections, effects.
//!
//! Only data; the meaning of each input is in `machine.rs` and the files it calls.

use std::net::IpAddr;

use protocol::control::{Heartbeat, Hello, SeatFailed, SeatFinished, ToWorker};
use protocol::experiment::ShardSpec;
use protocol::group::Group;
use protocol::ids::{AttemptId, DeviceRef, RunId, TokenId, WorkerId};

use super::event::Settings;
use super::status::RunState;

/// Something happened or is wanted.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// The operator's settings, at every start.
    Configure(Settings),
    /// Time has passed: fires what is due. The driver gives it when [`super::Scheduler::next_deadline`] comes, after every
    /// message that is already there.
    Tick,
    /// Make a join token of which only the secret's SHA-256 is known. Answer: [`Answer::Token`].
    CreateToken {
        /// SHA-256 of the secret.
        secret_hash: [u8; 32],
        /// Life, milliseconds.
        ttl_ms: u64,
        /// Boxes that may join with it, 1 or more.
        uses: u32,
    },
    /// Withdraw a join token.
    RevokeToken(TokenId),
    /// A box proved that it has a token's secret. Answer: [`Answer::Worker`].
    RedeemToken {
        /// The token.
        token: TokenId,
        /// SHA-256 of the box's public key.
        spki_sha256: [u8; 32],
        /// Host name, for people.
        hostname: String,
    },
    /// A worker's session began.
    Connected(Box<Connected>),
    /// A worker's session ended.
    Disconnected {
        /// The worker.
        worker: WorkerId,
        /// Its session.
        session: u64,
    },
    /// A worker's sign of life.
    Heartbeat {
        /// The worker.
        worker: WorkerId,
        /// Its session.
        session: u64,
        /// What it said.
        heartbeat: Heartbeat,
    },
    /// A worker finished a seat.
    SeatFinished {
        /// The worker.
        worker: WorkerId,
        /// Its session.
        session: u64,
        /// What it said.
        finished: SeatFinished,
    },
    /// A seat failed on its worker.
    SeatFailed {
        /// The worker.
        worker: WorkerId,
        /// Its session.
        session: u64,
        /// What it said.
        failed: SeatFailed,
    },
    /// Accept a run. Answer: [`Answer::Run`].
    Submit(NewRun),
    /// End what is left of a run.
    CancelRun {
        /// The run.
        run: RunId,
        /// Why, for people.
        reason: String,
    },
    /// Try a run's failed shards again. Answer: [`Answer::Reopened`].
    RetryRun(RunId),
    /// Give a worker no new work, or work again.
    SetDrain {
        /// The worker.
        worker: WorkerId,
        /// `true`: no new work.
        on: bool,
    },
    /// Refuse a worker's certificate from now on.
    RevokeWorker(WorkerId),
    /// End a device's quarantine.
    ReleaseDevice(DeviceRef),
    /// Take over throughput that was measured elsewhere: class, device model, microseconds a unit, samples.
    TeachThroughput(Vec<(String, String, u64, u32)>),
}

/// A worker's session began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connected {
    /// The worker, as its certificate says.
    pub worker: WorkerId,
    /// Larger than every earlier session's of this worker since the coordinator started.
    pub session: u64,
    /// SHA-256 of the public key in its certificate.
    pub spki_sha256: [u8; 32],
    /// Its greeting.
    pub hello: Hello,
    /// Where its connection comes from.
    pub observed: IpAddr,
}

/// A sweep, parsed and expanded, to be accepted as a run.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct NewRun {
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
    /// Name of the file as submitted.
    pub file: String,
    /// The file's text.
    pub text: String,
    /// Its experiments; none: one that asks for nothing.
    pub groups: Vec<Group>,
    /// What each shard does; at least one, at most [`protocol::limits::SHARDS_PER_RUN_MAX`].
    pub specs: Vec<ShardSpec>,
}

/// What an input that was taken gives back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Nothing to say.
    Done,
    /// The token made.
    Token(TokenId),
    /// Who the box is.
    Worker(WorkerId),
    /// The run accepted.
    Run(RunId),
    /// Number of shards that wait again.
    Reopened(u32),
}

/// Why an input changed nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// No such token.
    #[error("no token {0}")]
    TokenUnknown(TokenId),
    /// The token's time has passed.
    #[error("token {0} has expired")]
    TokenExpired(TokenId),
    /// The token was used as often as it may be.
    #[error("token {0} was used")]
    TokenUsed(TokenId),
    /// The token was withdrawn.
    #[error("token {0} was revoked")]
    TokenRevoked(TokenId),
    /// A token for nobody.
    #[error("a token needs at least one use and a life")]
    TokenUseless,
    /// No such worker, or another key than its own.
    #[error("no worker {0} with this key")]
    WorkerUnknown(WorkerId),
    /// The worker's certificate was revoked.
    #[error("worker {0} was revoked")]
    WorkerRevoked(WorkerId),
    /// An older session than the one that is open.
    #[error("session {session} of worker {worker} is not its newest")]
    SessionOld {
        /// The worker.
        worker: WorkerId,
        /// The session.
        session: u64,
    },
    /// More devices than a worker may have, or one twice.
    #[error("{count} devices, some twice or more than {}", protocol::limits::DEVICES_PER_WORKER_MAX)]
    Devices {
        /// Devices reported.
        count: usize,
    },
    /// No such run.
    #[error("no run {0}")]
    RunUnknown(RunId),
    /// The device is not in quarantine.
    #[error("device {0} is not in quarantine")]
    NotQuarantined(DeviceRef),
    /// The run is not in a state that allows this.
    #[error("run {run} is {state}")]
    RunOver {
        /// The run.
        run: RunId,
        /// Where it stands.
        state: RunState,
    },
    /// Nothing of the run has failed.
    #[error("run {0} has no failed shards")]
    NothingFailed(RunId),
    /// A run without shards or with too many.
    #[error("{count} shards are not 1 to {}", protocol::limits::SHARDS_PER_RUN_MAX)]
    ShardCount {
        /// Shards given.
        count: usize,
    },
}

/// What the driver must do, once the events before it are durable.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Send a message on a worker's session. If that session is over: drop it; the next greeting sorts things out.
    Send {
        /// The worker.
        worker: WorkerId,
        /// Its session.
        session: u64,
        /// What to say.
        message: ToWorker,
    },
    /// Close a session: the worker is not to be talked to any more.
    Close {
        /// The worker.
        worker: WorkerId,
        /// Its session.
        session: u64,
    },
    /// Write the manifest of a committed shard. It can be rebuilt from the journal at any time, so nothing is lost if this
    /// is late.
    WriteManifest {
        /// The attempt that committed.
        attempt: AttemptId,
    },
}
