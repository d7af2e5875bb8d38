//! Threads on which the store is used from async code: few, plain, with a bounded queue and a deadline at the caller.
//!
//! A hard-mounted NFS server that is gone blocks whoever asks it, for ever. So no store call runs on tokio's pools, and a
//! caller gets its answer or [`Stalled`] in bounded time. The threads are never joined: a hung one must not hold up an exit.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

/// Threads of one pool.
const THREADS: usize = 4;
/// Calls that wait for a thread; further ones are turned away as stalled.
const QUEUE: usize = 16;
/// How long a caller waits for one call.
pub const STORE_DEADLINE: Duration = Duration::from_secs(30);

type Call = Box<dyn FnOnce() + Send>;

/// The store does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the store does not answer; is its server up and its mount alive?")]
pub struct Stalled;

/// A pool for calls of a [`super::Store`]. Cheap to clone.
#[derive(Debug, Clone)]
pub struct StoreThreads {
    calls: SyncSender<Call>,
    deadline: Duration,
}

impl StoreThreads {
    /// Starts the threads. They end with the last clone.
    ///
    /// # Errors
    /// If the system has no threads left.
    pub fn start() -> std::io::Result<Self> {
        Self::start_with_deadline(STORE_DEADLINE)
    }

    /// [`Self::start`] with another deadline.
    ///
    /// # Errors
    /// If the system has no threads left.
    pub fn start_with_deadline(deadline: Duration) -> std::io::Result<Self> {
        let (calls, queue) = sync_channel(QUEUE);
        let queue = Arc::new(Mutex::new(queue));
        for number in 0..THREADS {
            let queue = Arc::clone(&queue);
            std::thread::Builder::new().name(format!("store-{number}")).spawn(move || work(&queue))?;
        }
        Ok(Self { calls, deadline })
    }

    /// Runs `call` on a thread of the pool.
    ///
    /// # Errors
    /// [`Stalled`] if every thread is stuck and the queue full, or if no answer comes before the deadline; the call may
    /// still happen later.
    pub async fn run<T: Send + 'static>(&self, call: impl FnOnce() -> T + Send + 'static) -> Result<T, Stalled> {
        let (reply, answer) = oneshot::channel();
        let call = Box::new(move || {
            // Nobody waits any more if the deadline has passed; the outcome is found again by name.
            let _ = reply.send(call());
        });
        self.calls.try_send(call).map_err(|_| Stalled)?;
        match tokio::time::timeout(self.deadline, answer).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(_)) | Err(_) => Err(Stalled),
        }
    }
}

fn work(queue: &Mutex<Receiver<Call>>) {
    loop {
        // The lock is held while waiting: exactly one idle thread waits for the next call.
        let call = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        match call {
            Ok(call) => call(),
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stuck_store_stalls_callers_and_never_hangs_them() {
        let threads = StoreThreads::start_with_deadline(Duration::from_millis(20)).unwrap();
        let (release, gate) = sync_channel::<()>(0);
        let gate = Arc::new(Mutex::new(gate));
        for _ in 0..THREADS + QUEUE {
            let gate = Arc::clone(&gate);
            let stuck = threads.run(move || {
                let _ = gate.lock().map(|gate| gate.recv());
            });
            assert_eq!(stuck.await, Err(Stalled));
        }
        assert_eq!(threads.run(|| 1).await, Err(Stalled), "the queue is full");
        drop(release);
        let patient = StoreThreads { deadline: Duration::from_secs(10), ..threads };
        loop {
            // A level, not an edge: the queue empties as the stuck calls end.
            match patient.run(|| 2).await {
                Ok(two) => break assert_eq!(two, 2),
                Err(Stalled) => tokio::task::yield_now().await,
            }
        }
    }
}
