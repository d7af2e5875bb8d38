//! A thread that owns the journal: a disk that is slow to sync must not hold up the async threads.
//!
//! Calls are answered in the order they are made. Does not batch: the driver does, since it knows what waits.

use std::sync::mpsc;

use tokio::sync::oneshot;

use super::{Header, Journal, JournalError};
use crate::scheduler::Record;

/// The journal, from async code.
#[derive(Debug)]
pub struct JournalThread {
    header: Header,
    calls: mpsc::Sender<Call>,
}

enum Call {
    Append(Vec<Record>, oneshot::Sender<Result<(), JournalError>>),
    ReadAll(oneshot::Sender<Result<Vec<Record>, JournalError>>),
    Probe(oneshot::Sender<Result<(), JournalError>>),
    Close(oneshot::Sender<()>),
}

impl JournalThread {
    /// Moves `journal` to a thread of its own, which ends with this value.
    ///
    /// # Errors
    /// If the system has no thread left.
    pub fn start(journal: Box<dyn Journal>) -> std::io::Result<Self> {
        let (calls, queue) = mpsc::channel();
        let header = journal.header().clone();
        std::thread::Builder::new().name("journal".to_owned()).spawn(move || work(journal, &queue))?;
        Ok(Self { header, calls })
    }

    /// What the journal says about itself.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// [`Journal::append`].
    ///
    /// # Errors
    /// As there.
    pub async fn append(&self, batch: Vec<Record>) -> Result<(), JournalError> {
        self.call(|reply| Call::Append(batch, reply)).await
    }

    /// Every record.
    ///
    /// # Errors
    /// As [`Journal::read_from`].
    pub async fn read_all(&self) -> Result<Vec<Record>, JournalError> {
        self.call(Call::ReadAll).await
    }

    /// [`Journal::probe`].
    ///
    /// # Errors
    /// As there.
    pub async fn probe(&self) -> Result<(), JournalError> {
        self.call(Call::Probe).await
    }

    /// Closes the journal; returns when its lock is free.
    pub async fn close(self) {
        let (reply, answer) = oneshot::channel();
        if self.calls.send(Call::Close(reply)).is_ok() {
            let _ = answer.await;
        }
    }

    async fn call<T>(
        &self,
        call: impl FnOnce(oneshot::Sender<Result<T, JournalError>>) -> Call,
    ) -> Result<T, JournalError> {
        let (reply, answer) = oneshot::channel();
        self.calls.send(call(reply)).map_err(|_| JournalError::ThreadGone)?;
        answer.await.map_err(|_| JournalError::ThreadGone)?
    }
}

fn work(mut journal: Box<dyn Journal>, queue: &mpsc::Receiver<Call>) {
    while let Ok(call) = queue.recv() {
        // Who asked may be gone; what was done stays done.
        match call {
            Call::Append(batch, reply) => drop(reply.send(journal.append(&batch))),
            Call::Probe(reply) => drop(reply.send(journal.probe())),
            Call::Close(reply) => {
                drop(journal);
                let _ = reply.send(());
                return;
            }
            Call::ReadAll(reply) => {
                let mut records = Vec::new();
                let read = journal.read_from(1, &mut |record| records.push(record));
                drop(reply.send(read.map(|()| records)));
            }
        }
    }
}
