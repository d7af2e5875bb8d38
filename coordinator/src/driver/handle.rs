//! What net and HTTP hold of the driver: every question and every order, answered once it is durable.
//!
//! Does not decide and does not keep anything: a handle is the sending end of the driver's bounded queue.

use std::net::SocketAddr;

use protocol::control::{Download, Hello, Output, Refused, ToCoordinator, ToWorker, Welcome, close, refusal};
use protocol::ids::{AttemptId, DeviceRef, RunId, ShardId, TokenId, WorkerId};
use protocol::store::Manifest;
use protocol::time::UnixMillis;
use tokio::sync::{mpsc, oneshot};

use crate::api::{
    ApiError, ClusterInfo, ErrorCode, Explanation, RetryAnswer, RunDetail, RunResults, RunSummary, ShardLog,
    SubmitAnswer, TokenRow, TokenState, WorkerRow,
};

use crate::scheduler::Scheduler;

pub use crate::scheduler::NewRun;

/// Inputs that wait for the driver at most; a full queue makes senders wait (back-pressure up to each worker's stream).
pub const COMMANDS_QUEUED_MAX: usize = 1024;

/// The driver's loop has ended: the coordinator stops, or its journal cannot be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the coordinator is stopping")]
pub struct Gone;

impl From<Gone> for ApiError {
    fn from(gone: Gone) -> Self {
        Self::new(ErrorCode::Stopping, gone.to_string()).hint("try again once it is back")
    }
}

impl From<Gone> for Refused {
    fn from(gone: Gone) -> Self {
        Self { code: refusal::UNAVAILABLE, text: gone.to_string() }
    }
}

/// What net needs to check a join token's proof.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenRecord {
    /// SHA-256 of the secret.
    pub secret_hash: [u8; 32],
    /// Where it stands now.
    pub state: TokenState,
    /// When it stops working.
    pub expires_at: UnixMillis,
}

/// One input of the driver. Replies come once the events they depend on are durable; a dropped reply means [`Gone`].
#[derive(Debug)]
#[expect(
    missing_docs,
    reason = "each variant is the method of the same name on DriverHandle, its fields the arguments"
)]
pub enum Command {
    Connected {
        worker: WorkerId,
        session: u64,
        hello: Hello,
        observed: SocketAddr,
        spki_sha256: [u8; 32],
        outbox: mpsc::Sender<ToWorker>,
        reply: oneshot::Sender<Result<Welcome, Refused>>,
    },
    Message {
        worker: WorkerId,
        session: u64,
        message: ToCoordinator,
    },
    Disconnected {
        worker: WorkerId,
        session: u64,
    },
    Token {
        id: TokenId,
        reply: oneshot::Sender<Result<Option<TokenRecord>, Refused>>,
    },
    Redeem {
        id: TokenId,
        spki_sha256: [u8; 32],
        hostname: String,
        reply: oneshot::Sender<Result<WorkerId, Refused>>,
    },
    Admissible {
        worker: WorkerId,
        spki_sha256: [u8; 32],
        reply: oneshot::Sender<Result<(), u32>>,
    },
    Submit {
        run: NewRun,
        reply: oneshot::Sender<Result<SubmitAnswer, ApiError>>,
    },
    Runs {
        reply: oneshot::Sender<Result<Vec<RunSummary>, ApiError>>,
    },
    Run {
        run: RunId,
        reply: oneshot::Sender<Result<RunDetail, ApiError>>,
    },
    Results {
        run: RunId,
        reply: oneshot::Sender<Result<RunResults, ApiError>>,
    },
    Manifest {
        attempt: AttemptId,
        reply: oneshot::Sender<Result<Option<Manifest>, ApiError>>,
    },
    Input {
        worker: WorkerId,
        download: Download,
        reply: oneshot::Sender<Result<Option<Output>, ApiError>>,
    },
    Stop {
        reply: oneshot::Sender<()>,
    },
    Explain {
        shard: ShardId,
        reply: oneshot::Sender<Result<Explanation, ApiError>>,
    },
    Log {
        shard: ShardId,
        offset: u64,
        reply: oneshot::Sender<Result<ShardLog, ApiError>>,
    },
    Cancel {
        run: RunId,
        reason: String,
        reply: oneshot::Sender<Result<RunSummary, ApiError>>,
    },
    Retry {
        run: RunId,
        reply: oneshot::Sender<Result<RetryAnswer, ApiError>>,
    },
    Workers {
        reply: oneshot::Sender<Result<Vec<WorkerRow>, ApiError>>,
    },
    Drain {
        worker: WorkerId,
        on: bool,
        reply: oneshot::Sender<Result<WorkerRow, ApiError>>,
    },
    RevokeWorker {
        worker: WorkerId,
        reply: oneshot::Sender<Result<WorkerRow, ApiError>>,
    },
    CreateToken {
        secret_hash: [u8; 32],
        ttl_ms: u64,
        uses: u32,
        reply: oneshot::Sender<Result<TokenRow, ApiError>>,
    },
    Tokens {
        reply: oneshot::Sender<Result<Vec<TokenRow>, ApiError>>,
    },
    RevokeToken {
        id: TokenId,
        reply: oneshot::Sender<Result<TokenRow, ApiError>>,
    },
    /// [`DriverHandle::snapshot`].
    Snapshot {
        /// The copy.
        reply: oneshot::Sender<Result<Box<Scheduler>, ApiError>>,
    },
    /// [`DriverHandle::release`].
    Release {
        /// The device.
        device: DeviceRef,
        /// Done.
        reply: oneshot::Sender<Result<(), ApiError>>,
    },
    /// [`DriverHandle::cluster`].
    Cluster {
        reply: oneshot::Sender<Result<ClusterInfo, ApiError>>,
    },
}

/// Asks and orders the driver. Cheap to clone; when the last one is dropped the driver ends.
#[derive(Debug, Clone)]
pub struct DriverHandle {
    commands: mpsc::Sender<Command>,
}

impl DriverHandle {
    /// A handle and the queue it feeds, for [`super`] and for tests of what holds a handle.
    pub fn channel() -> (Self, mpsc::Receiver<Command>) {
        let (commands, queue) = mpsc::channel(COMMANDS_QUEUED_MAX);
        (Self { commands }, queue)
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Gone> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| Gone)?;
        answer.await.map_err(|_| Gone)
    }
}

/// For net.
impl DriverHandle {
    /// A worker's session begins: its certificate is checked and its first message was `hello`.
    ///
    /// `session` is larger than any session number handed in before for this worker; it fences messages of older
    /// connections. `observed` is where the connection comes from. The driver sends through `outbox` without waiting: if it
    /// is full, or a newer session begins, or the worker is revoked, the driver drops it, and net closes the connection
    /// (with [`Self::admissible`]'s code if that refuses now).
    ///
    /// # Errors
    /// With a code of [`refusal`]; net sends it and closes.
    pub async fn connected(
        &self,
        worker: WorkerId,
        session: u64,
        hello: Hello,
        observed: SocketAddr,
        spki_sha256: [u8; 32],
        outbox: mpsc::Sender<ToWorker>,
    ) -> Result<Welcome, Refused> {
        self.ask(|reply| Command::Connected { worker, session, hello, observed, spki_sha256, outbox, reply }).await?
    }

    /// A message of a session that began. Waits only while the driver's queue is full.
    ///
    /// # Errors
    /// [`Gone`]: close the connection with [`close::RESTARTING`].
    pub async fn message(&self, worker: WorkerId, session: u64, message: ToCoordinator) -> Result<(), Gone> {
        self.commands.send(Command::Message { worker, session, message }).await.map_err(|_| Gone)
    }

    /// The session's connection is closed. Of an older session: changes nothing.
    pub async fn disconnected(&self, worker: WorkerId, session: u64) {
        // If the driver is gone it has no use for the news.
        let _ = self.commands.send(Command::Disconnected { worker, session }).await;
    }

    /// What is needed to check the proof of a box that joins. `None`: no such token.
    ///
    /// # Errors
    /// `UNAVAILABLE` of [`refusal`].
    pub async fn token(&self, id: TokenId) -> Result<Option<TokenRecord>, Refused> {
        self.ask(|reply| Command::Token { id, reply }).await?
    }

    /// Uses a token whose proof was checked: names the worker, in the journal before this returns. The same key with the
    /// same token again, before the token expires, gets the same worker: an answer may be lost on the way.
    ///
    /// # Errors
    /// `TOKEN_UNKNOWN`, `TOKEN_EXPIRED`, `TOKEN_USED`, `TOKEN_REVOKED`, `UNAVAILABLE` of [`refusal`].
    pub async fn redeem(&self, id: TokenId, spki_sha256: [u8; 32], hostname: String) -> Result<WorkerId, Refused> {
        self.ask(|reply| Command::Redeem { id, spki_sha256, hostname, reply }).await?
    }

    /// Whether a worker with this key may have a connection.
    ///
    /// # Errors
    /// The code of [`close`] to close with: `REVOKED`; `ROLE` if the journal does not know it; `RESTARTING`.
    pub async fn admissible(&self, worker: WorkerId, spki_sha256: [u8; 32]) -> Result<(), u32> {
        self.ask(|reply| Command::Admissible { worker, spki_sha256, reply }).await.unwrap_or(Err(close::RESTARTING))
    }
}

/// For whoever runs the driver.
impl DriverHandle {
    /// Ends the loop after what is in its queue; returns when it has let go of the journal.
    pub async fn stop(&self) {
        // Already gone is as good.
        let _ = self.ask(|reply| Command::Stop { reply }).await;
    }

    /// A handle that does not keep the driver alive.
    pub fn downgrade(&self) -> WeakDriverHandle {
        WeakDriverHandle { commands: self.commands.downgrade() }
    }
}

/// A handle that does not keep the driver alive.
#[derive(Debug, Clone)]
pub struct WeakDriverHandle {
    commands: mpsc::WeakSender<Command>,
}

impl WeakDriverHandle {
    /// The handle, unless the driver is gone.
    pub fn upgrade(&self) -> Option<DriverHandle> {
        self.commands.upgrade().map(|commands| DriverHandle { commands })
    }
}

/// For HTTP. Each answers with what the API says, [`ErrorCode::Stopping`] included.
impl DriverHandle {
    /// Accepts a run, whole.
    pub async fn submit(&self, run: NewRun) -> Result<SubmitAnswer, ApiError> {
        self.ask(|reply| Command::Submit { run, reply }).await?
    }

    /// Every run, newest first.
    pub async fn runs(&self) -> Result<Vec<RunSummary>, ApiError> {
        self.ask(|reply| Command::Runs { reply }).await?
    }

    /// One run with its shards.
    pub async fn run(&self, run: RunId) -> Result<RunDetail, ApiError> {
        self.ask(|reply| Command::Run { run, reply }).await?
    }

    /// Why a shard is where it is.
    pub async fn explain(&self, shard: ShardId) -> Result<Explanation, ApiError> {
        self.ask(|reply| Command::Explain { shard, reply }).await?
    }

    /// What a shard's program has written from byte `offset` on, while it runs; of one that is over, where its output lies:
    /// the text is left for who reads the store.
    pub async fn log(&self, shard: ShardId, offset: u64) -> Result<ShardLog, ApiError> {
        self.ask(|reply| Command::Log { shard, offset, reply }).await?
    }

    /// Ends what is left of a run.
    pub async fn cancel(&self, run: RunId, reason: String) -> Result<RunSummary, ApiError> {
        self.ask(|reply| Command::Cancel { run, reason, reply }).await?
    }

    /// Reopens a run's failed shards, with a fresh count of tries.
    pub async fn retry(&self, run: RunId) -> Result<RetryAnswer, ApiError> {
        self.ask(|reply| Command::Retry { run, reply }).await?
    }

    /// What a run's committed shards made, by index; `result` is left for who reads the store.
    pub async fn results(&self, run: RunId) -> Result<RunResults, ApiError> {
        self.ask(|reply| Command::Results { run, reply }).await?
    }

    /// The artifact that a worker asks for, if a seat that it holds needs it.
    pub async fn input(&self, worker: WorkerId, download: Download) -> Result<Option<Output>, ApiError> {
        self.ask(|reply| Command::Input { worker, download, reply }).await?
    }

    /// The manifest of a committed attempt; `None` if it is not one.
    pub async fn manifest(&self, attempt: AttemptId) -> Result<Option<Manifest>, ApiError> {
        self.ask(|reply| Command::Manifest { attempt, reply }).await?
    }

    /// Every worker that ever joined.
    pub async fn workers(&self) -> Result<Vec<WorkerRow>, ApiError> {
        self.ask(|reply| Command::Workers { reply }).await?
    }

    /// No new work for a worker.
    pub async fn drain(&self, worker: WorkerId) -> Result<WorkerRow, ApiError> {
        self.ask(|reply| Command::Drain { worker, on: true, reply }).await?
    }

    /// New work for a worker again.
    pub async fn undrain(&self, worker: WorkerId) -> Result<WorkerRow, ApiError> {
        self.ask(|reply| Command::Drain { worker, on: false, reply }).await?
    }

    /// Refuses a worker's certificate from now on.
    pub async fn revoke_worker(&self, worker: WorkerId) -> Result<WorkerRow, ApiError> {
        self.ask(|reply| Command::RevokeWorker { worker, reply }).await?
    }

    /// Makes a token of which the journal keeps only the secret's SHA-256. `ttl_ms` from now; `uses` 1 or more.
    pub async fn create_token(&self, secret_hash: [u8; 32], ttl_ms: u64, uses: u32) -> Result<TokenRow, ApiError> {
        self.ask(|reply| Command::CreateToken { secret_hash, ttl_ms, uses, reply }).await?
    }

    /// Every token, newest first.
    pub async fn tokens(&self) -> Result<Vec<TokenRow>, ApiError> {
        self.ask(|reply| Command::Tokens { reply }).await?
    }

    /// Withdraws a token; boxes that joined with it stay.
    pub async fn revoke_token(&self, id: TokenId) -> Result<TokenRow, ApiError> {
        self.ask(|reply| Command::RevokeToken { id, reply }).await?
    }

    /// A copy of the scheduler, to be asked what it would do.
    pub async fn snapshot(&self) -> Result<Box<Scheduler>, ApiError> {
        self.ask(|reply| Command::Snapshot { reply }).await?
    }

    /// Ends a device's quarantine.
    pub async fn release(&self, device: DeviceRef) -> Result<(), ApiError> {
        self.ask(|reply| Command::Release { device, reply }).await?
    }

    /// The cluster in one page; `listen` is left empty for who opened the port.
    pub async fn cluster(&self) -> Result<ClusterInfo, ApiError> {
        self.ask(|reply| Command::Cluster { reply }).await?
    }
}
