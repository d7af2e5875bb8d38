//! The only loop: takes what net and HTTP hand in, asks the scheduler, makes its events durable, lets its effects out.
//!
//! One turn: everything that waits in the queue (at most [`BATCH_MAX`]) goes through the scheduler; its events go to the
//! journal in one commit; then, and only then, effects leave and answers are given. While the journal cannot be written
//! nothing is accepted and nobody is told that something was: the scheduler's value, which is ahead of the journal, is
//! dropped, every session ends, and a new one is replayed once the disk takes writes again.
//!
//! Layout: `handle.rs` is what others hold; `turn.rs` maps commands to inputs; `view.rs` words the state for the API;
//! `tails.rs` keeps what running programs wrote last; `manifests.rs` writes manifests behind the loop's back.

mod handle;
mod log;
mod manifests;
mod outbox;
mod tails;
#[cfg(test)]
mod tests;
mod turn;
mod view;

use std::time::Duration;

use protocol::store::Store;
use protocol::store::threads::StoreThreads;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use self::manifests::Manifests;
use self::outbox::Outboxes;
use self::tails::Tails;
use self::turn::Replies;
use crate::api::{ApiError, ErrorCode};
use crate::clock;
use crate::journal::{JournalError, JournalThread};
use crate::scheduler::{Effect, IllegalTransition, Input, Scheduler, Settings};

pub use handle::{COMMANDS_QUEUED_MAX, Command, DriverHandle, Gone, NewRun, TokenRecord, WeakDriverHandle};
pub(crate) use log::whole_characters;

/// Commands in one turn, and so in one commit: enough that a sync of a slow disk is shared, few enough that the first of
/// them does not wait long.
pub const BATCH_MAX: usize = 256;
/// Time between looks whether the journal can be written again.
pub const JOURNAL_PROBE_INTERVAL: Duration = Duration::from_secs(3);

/// What the driver works with.
#[derive(Debug)]
pub struct DriverParts {
    /// The journal, locked by this process.
    pub journal: JournalThread,
    /// What the operator set about scheduling.
    pub settings: Settings,
    /// Where manifests go.
    pub store: Store,
    /// On which threads.
    pub store_threads: StoreThreads,
}

/// The driver cannot start.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// The journal does not read.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The journal reads, but an event does not follow on those before it.
    #[error("the journal is damaged")]
    Replay(#[from] IllegalTransition),
}

impl DriverError {
    /// Whether the journal itself is at fault, not its surroundings: exit code 5.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Journal(error) => error.is_damage(),
            Self::Replay(_) => true,
        }
    }
}

/// Replays the journal and starts the loop. It ends with [`DriverHandle::stop`], or with the last handle.
///
/// # Errors
/// If the journal does not read or does not replay.
pub async fn start(parts: DriverParts) -> Result<(DriverHandle, JoinHandle<()>), DriverError> {
    let (handle, queue) = DriverHandle::channel();
    let manifests = Manifests::start(parts.store.clone(), parts.store_threads.clone(), handle.downgrade());
    let mut driver = Driver {
        queue,
        scheduler: Scheduler::new(),
        down: None,
        outboxes: Outboxes::default(),
        tails: Tails::default(),
        replies: Replies::default(),
        stopping: None,
        manifests,
        parts,
    };
    driver.replay().await?;
    Ok((handle, tokio::spawn(driver.run())))
}

/// The loop's own data. Nobody else has it.
struct Driver {
    queue: mpsc::Receiver<Command>,
    scheduler: Scheduler,
    /// Set while the journal cannot be written.
    down: Option<JournalDown>,
    outboxes: Outboxes,
    tails: Tails,
    replies: Replies,
    stopping: Option<oneshot::Sender<()>>,
    manifests: Manifests,
    parts: DriverParts,
}

/// The journal cannot be written: what everybody is told meanwhile.
#[derive(Debug, Clone)]
struct JournalDown {
    message: String,
    hint: Option<String>,
}

impl From<JournalDown> for ApiError {
    fn from(down: JournalDown) -> Self {
        Self { code: ErrorCode::JournalUnavailable, message: down.message, hint: down.hint, source_error: None }
    }
}

impl Driver {
    async fn run(mut self) {
        loop {
            let wake_at = self.wake_at();
            tokio::select! {
                command = self.queue.recv() => match command {
                    Some(command) => self.take(command),
                    None => break,
                },
                () = sleep_until(wake_at) => {}
            }
            // Messages that are there go first: a lease must not run out while its renewal waits in the queue.
            for _ in 1..BATCH_MAX {
                let Ok(command) = self.queue.try_recv() else { break };
                self.take(command);
            }
            if self.down.is_some() {
                self.try_again().await;
            } else {
                self.tick();
                self.commit().await;
            }
            if self.stopping.is_some() {
                break;
            }
        }
        let Self { stopping, parts, .. } = self;
        // The journal's lock goes before anyone hears that we stopped.
        parts.journal.close().await;
        if let Some(stopping) = stopping {
            let _ = stopping.send(());
        }
    }

    fn wake_at(&self) -> Instant {
        if self.down.is_some() {
            return Instant::now() + JOURNAL_PROBE_INTERVAL;
        }
        // Waking once a minute for nothing is cheaper than a special case, and catches jumps of the wall clock.
        let wait_ms = self.scheduler.next_deadline().map_or(60_000, |at| at.since_ms(clock::now()).min(60_000));
        Instant::now() + Duration::from_millis(wait_ms)
    }

    fn tick(&mut self) {
        let now = clock::now();
        if self.scheduler.next_deadline().is_some_and(|deadline| deadline <= now) {
            self.scheduler.handle(now, Input::Tick).expect("a tick is never refused");
        }
    }

    /// Makes the turn's events durable, then lets out what depends on them.
    async fn commit(&mut self) {
        let events = self.scheduler.take_events();
        if !events.is_empty()
            && let Err(error) = self.parts.journal.append(events).await
        {
            self.go_down(&error);
            return;
        }
        while let Some(effect) = self.scheduler.poll_effect() {
            match effect {
                Effect::Send { worker, session, message } => self.outboxes.send(worker, session, message),
                Effect::Close { worker, session } => self.outboxes.close(worker, session),
                Effect::WriteManifest { attempt } => self.manifests.write(attempt),
            }
        }
        self.replies.release();
    }

    /// Nothing of this turn happened: whoever asked is told so, and every session ends, because the scheduler that knew them
    /// is dropped.
    fn go_down(&mut self, error: &JournalError) {
        let cause = std::error::Error::source(error).map(|source| format!(": {source}")).unwrap_or_default();
        let down = JournalDown { message: format!("{error}{cause}; nothing was accepted"), hint: error.hint() };
        tracing::error!(error = %down.message, hint = down.hint, "the journal cannot be written: accepting nothing until it can");
        self.replies.refuse(&down);
        self.outboxes.close_all();
        self.tails.clear();
        self.scheduler = Scheduler::new();
        self.down = Some(down);
    }

    async fn try_again(&mut self) {
        self.replies.release();
        if let Err(error) = self.parts.journal.probe().await {
            tracing::debug!(%error, "the journal still cannot be written");
            return;
        }
        match self.replay().await {
            Ok(()) => {
                tracing::info!("the journal can be written again");
                self.down = None;
            }
            Err(error) => tracing::error!(%error, "the journal can be written again but does not read"),
        }
    }

    /// A new scheduler from the journal, as at a start.
    async fn replay(&mut self) -> Result<(), DriverError> {
        let mut scheduler = Scheduler::new();
        for record in self.parts.journal.read_all().await? {
            scheduler.replay(&record)?;
        }
        let now = clock::now();
        scheduler.start(now);
        scheduler.handle(now, Input::Configure(self.parts.settings.clone())).expect("settings are never refused");
        self.scheduler = scheduler;
        self.manifests.check_all(self.scheduler.state());
        self.parts.journal.append(self.scheduler.take_events()).await?;
        Ok(())
    }
}
