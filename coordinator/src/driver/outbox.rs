//! The sending ends of the workers' sessions.
//!
//! Never waits for a worker: one that does not read what it is sent is let go, and its next greeting sorts things out.

use std::collections::BTreeMap;

use protocol::control::ToWorker;
use protocol::ids::WorkerId;
use tokio::sync::mpsc;

/// One entry a connected worker: its newest session.
#[derive(Debug, Default)]
pub(super) struct Outboxes {
    sessions: BTreeMap<WorkerId, (u64, mpsc::Sender<ToWorker>)>,
}

impl Outboxes {
    /// A session began; an older one of the same worker is let go.
    pub(super) fn open(&mut self, worker: WorkerId, session: u64, outbox: mpsc::Sender<ToWorker>) {
        self.sessions.insert(worker, (session, outbox));
    }

    /// Sends to the session, if it is still the worker's.
    pub(super) fn send(&mut self, worker: WorkerId, session: u64, message: ToWorker) {
        let Some((newest, outbox)) = self.sessions.get(&worker) else { return };
        if *newest == session && outbox.try_send(message).is_err() {
            tracing::warn!(%worker, session, "a worker does not read what it is sent; its session ends");
            self.sessions.remove(&worker);
        }
    }

    /// Lets the session go; nothing happens if the worker has a newer one.
    pub(super) fn close(&mut self, worker: WorkerId, session: u64) {
        if self.sessions.get(&worker).is_some_and(|(newest, _)| *newest == session) {
            self.sessions.remove(&worker);
        }
    }

    /// Lets every session go.
    pub(super) fn close_all(&mut self) {
        self.sessions.clear();
    }
}
