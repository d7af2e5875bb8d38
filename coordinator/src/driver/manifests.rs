//! Writes the manifests of committed shards into the store, behind the loop's back.
//!
//! A manifest can be rebuilt from the journal at any time, so a store that is full, read-only or away costs nothing but
//! time: the writer tries again with growing pauses and says so. Does not decide what is committed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use protocol::ids::{AttemptId, RunId, ShardId};
use protocol::store::threads::{Stalled, StoreThreads};
use protocol::store::{Store, StoreError};
use tokio::sync::mpsc;

use super::WeakDriverHandle;
use crate::scheduler::State;

/// Pause after the first failure; doubles up to [`PAUSE_MAX`].
const PAUSE_FIRST: Duration = Duration::from_millis(500);
/// Longest pause: an operator who has made room should not wait long for the note to go.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// The writer as the driver sees it.
#[derive(Debug)]
pub(super) struct Manifests {
    jobs: mpsc::UnboundedSender<Job>,
    status: Arc<Mutex<ManifestStatus>>,
}

/// What is not written, and why.
#[derive(Debug, Clone, Default)]
pub(super) struct ManifestStatus {
    /// Manifests that wait, by run.
    pub(super) pending: BTreeMap<RunId, u32>,
    /// What keeps them waiting; `None`: nothing.
    pub(super) problem: Option<String>,
    /// Manifests that can never be written, by run: the newest reason.
    pub(super) refused: BTreeMap<RunId, String>,
}

/// A manifest to write. The queue of these is bounded by the number of committed shards, at 24 bytes each.
#[derive(Debug, Clone, Copy)]
struct Job {
    attempt: AttemptId,
    /// It was committed before this start, so that its manifest is most likely there.
    old: bool,
}

/// Why a manifest was not written.
enum NotWritten {
    /// Waiting may help.
    Yet(String),
    /// It cannot be.
    Ever(String),
    /// The driver is gone.
    Stopped,
}

impl Manifests {
    /// Starts the writer; it ends with this value or with the driver.
    pub(super) fn start(store: Store, threads: StoreThreads, driver: WeakDriverHandle) -> Self {
        let (jobs, queue) = mpsc::unbounded_channel();
        let status = Arc::new(Mutex::new(ManifestStatus::default()));
        let writer = Writer { store: store.with_writer("coordinator"), threads, driver, status: Arc::clone(&status) };
        tokio::spawn(writer.run(queue));
        Self { jobs, status }
    }

    /// Writes the manifest of an attempt that just committed.
    pub(super) fn write(&self, attempt: AttemptId) {
        self.push(Job { attempt, old: false });
    }

    /// Writes the manifests that are missing from the store, after a start.
    pub(super) fn check_all(&self, state: &State) {
        for (run, body) in &state.runs {
            for (index, shard) in (0u32..).zip(&body.shards) {
                if let Some(attempt) = shard.committed_attempt() {
                    let shard = ShardId { run: *run, index };
                    self.push(Job { attempt: AttemptId { shard, fence: attempt.fence }, old: true });
                }
            }
        }
    }

    /// What is not written, and why.
    pub(super) fn status(&self) -> ManifestStatus {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn push(&self, job: Job) {
        if self.jobs.send(job).is_ok() {
            let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
            *status.pending.entry(job.attempt.shard.run).or_default() += 1;
        }
    }
}

struct Writer {
    store: Store,
    threads: StoreThreads,
    driver: WeakDriverHandle,
    status: Arc<Mutex<ManifestStatus>>,
}

impl Writer {
    async fn run(self, mut queue: mpsc::UnboundedReceiver<Job>) {
        while let Some(job) = queue.recv().await {
            let mut pause = PAUSE_FIRST;
            loop {
                match self.write(job).await {
                    Ok(()) => {
                        self.set_problem(None);
                        break;
                    }
                    Err(NotWritten::Yet(problem)) => {
                        self.set_problem(Some(problem));
                        tokio::time::sleep(pause).await;
                        pause = (pause * 2).min(PAUSE_MAX);
                    }
                    Err(NotWritten::Ever(problem)) => {
                        tracing::error!(attempt = %job.attempt, "a manifest cannot be written: {problem}");
                        self.status().refused.insert(job.attempt.shard.run, problem);
                        break;
                    }
                    Err(NotWritten::Stopped) => return,
                }
            }
            let mut status = self.status();
            let run = job.attempt.shard.run;
            if let Some(pending) = status.pending.get_mut(&run) {
                *pending -= 1;
                if *pending == 0 {
                    status.pending.remove(&run);
                }
            }
        }
    }

    async fn write(&self, job: Job) -> Result<(), NotWritten> {
        if job.old && self.on_store(move |store| store.manifest_path(job.attempt.shard).exists()).await? {
            return Ok(());
        }
        let driver = self.driver.upgrade().ok_or(NotWritten::Stopped)?;
        let manifest = match driver.manifest(job.attempt).await {
            Ok(Some(manifest)) => manifest,
            Ok(None) => return Err(NotWritten::Ever("the journal does not know its attempt as committed".to_owned())),
            Err(error) => return Err(NotWritten::Yet(error.message)),
        };
        drop(driver);
        let written = self.on_store(move |store| store.write_manifest(&manifest)).await?;
        written.map(drop).map_err(|error| match error.may_pass() {
            true => NotWritten::Yet(in_full(&error)),
            false => NotWritten::Ever(in_full(&error)),
        })
    }

    async fn on_store<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Store) -> T + Send + 'static,
    ) -> Result<T, NotWritten> {
        let store = self.store.clone();
        self.threads.run(move || call(&store)).await.map_err(|stalled: Stalled| NotWritten::Yet(stalled.to_string()))
    }

    fn set_problem(&self, problem: Option<String>) {
        let mut status = self.status();
        if status.problem != problem {
            match &problem {
                Some(problem) => tracing::warn!("manifests wait for the store: {problem}"),
                None => tracing::info!("the store takes manifests again"),
            }
            status.problem = problem;
        }
    }

    fn status(&self) -> std::sync::MutexGuard<'_, ManifestStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn in_full(error: &StoreError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
