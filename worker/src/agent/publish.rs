//! Bringing finished seats into the results store, through its mount or through the coordinator.
//!
//! Tries until it works or the seat is nobody's business any more; what is wrong meanwhile is told as a note. Nothing is
//! removed here. Store calls run on the store's own threads, never on the network's.

use std::path::PathBuf;
use std::time::Duration;

use protocol::control::{Output, SeatFinished, ToCoordinator, ToWorker, Upload, UploadAnswer};
use protocol::quic::{FrameReader, Received, write_frame};
use protocol::store::Store;
use quinn::Connection;
use tokio::io::AsyncReadExt;
use tokio::sync::{Mutex, mpsc};

use super::backoff::{Backoff, random};
use super::core::{Input, SeatId};
use super::outbox::Outbox;
use super::way::{NotYet, ToStore, Way, blocking, chain};

/// Waits between tries, from a blink to what an operator who fixes a mount will put up with.
const RETRY: (Duration, Duration, Duration) =
    (Duration::from_millis(200), Duration::from_secs(1), Duration::from_secs(30));
/// The coordinator may take this long to answer an upload: it writes to its own store meanwhile.
const UPLOAD_ANSWER: Duration = Duration::from_secs(60);
/// Bytes read from disk at once for an upload.
const READ_BYTES: usize = 256 << 10;

/// Publishes.
#[derive(Debug)]
pub struct Publisher {
    store: ToStore,
    outbox: Outbox,
    /// One publication at a time: a store in trouble is not asked by everyone at once.
    turn: Mutex<()>,
}

impl Publisher {
    /// A publisher for the seats of `outbox`.
    pub fn new(store: ToStore, outbox: Outbox) -> Self {
        Self { store, outbox, turn: Mutex::new(()) }
    }

    /// Publishes a seat, however long it takes, and says so. Ends early only by being dropped.
    pub async fn publish(&self, seat: SeatId, inputs: &mpsc::Sender<Input>) {
        let (floor, first, longest) = RETRY;
        let mut backoff = Backoff::new(floor, first, longest);
        let mut link = self.store.link.clone();
        let mut last_note = String::new();
        loop {
            link.borrow_and_update();
            let error = match self.try_publish(seat).await {
                Ok(finished) => {
                    // The loop that listens ends only with the process.
                    let _ = inputs.send(Input::Published { seat, finished }).await;
                    return;
                }
                Err(error) => error,
            };
            let note = format!("waiting for the store: {error}");
            if note != last_note {
                tracing::warn!(%seat, "{note}");
                last_note.clone_from(&note);
                let _ = inputs.send(Input::PublishDelayed { seat, note }).await;
            }
            let wait = backoff.next_wait(random());
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                // A new connection is a reason to try at once.
                Ok(()) = link.changed() => {}
            }
        }
    }

    async fn try_publish(&self, seat: SeatId) -> Result<SeatFinished, NotYet> {
        let _turn = self.turn.lock().await;
        let outbox = self.outbox.clone();
        let finished = blocking(move || outbox.record(seat)).await?.map_err(|error| NotYet(chain(&error)))?;
        let way = self.store.way().await?;
        for (index, output) in finished.outputs.iter().enumerate() {
            let path = self.outbox.file(seat, index);
            match &way {
                Way::Mount(store) => self.through_mount(store, path, output).await?,
                Way::Coordinator(connection) => upload(connection, seat, path, output).await?,
            }
        }
        Ok(finished)
    }

    async fn through_mount(&self, store: &Store, path: PathBuf, output: &Output) -> Result<(), NotYet> {
        let store = store.clone();
        match self.store.threads.run(move || store.publish_file(&path)).await {
            Ok(Ok((hash, _))) if hash == output.hash => Ok(()),
            Ok(Ok((hash, _))) => {
                Err(NotYet(format!("{} has changed on disk: {} became {hash}", output.name, output.hash)))
            }
            Ok(Err(error)) => Err(NotYet(chain(&error))),
            Err(stalled) => Err(NotYet(stalled.to_string())),
        }
    }
}

async fn upload(connection: &Connection, seat: SeatId, path: PathBuf, output: &Output) -> Result<(), NotYet> {
    let broken = |error: &dyn std::error::Error| NotYet(format!("the upload broke off: {}", chain(error)));
    let (mut send, receive) = connection.open_bi().await.map_err(|error| broken(&error))?;
    let header = Upload { attempt: seat.attempt, hash: output.hash, bytes: output.bytes };
    write_frame(&mut send, &ToCoordinator::from(header)).await.map_err(|error| broken(&error))?;
    let mut file = tokio::fs::File::open(&path).await.map_err(|error| broken(&error))?;
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let length = file.read(&mut buffer).await.map_err(|error| broken(&error))?;
        // A coordinator that reads no further has an answer that says why.
        if length == 0 || send.write_all(&buffer[..length]).await.is_err() {
            break;
        }
    }
    let _ = send.finish();
    let mut reader = FrameReader::<ToWorker>::new(receive);
    let answer = tokio::time::timeout(UPLOAD_ANSWER, reader.next()).await;
    match answer.map_err(|_| NotYet("the coordinator does not answer an upload".to_owned()))? {
        Ok(Some(Received::Message(ToWorker::UploadAnswer(UploadAnswer { refused: None })))) => Ok(()),
        Ok(Some(Received::Message(ToWorker::UploadAnswer(UploadAnswer { refused: Some(why) })))) => {
            Err(NotYet(protocol::limits::clean_text(&why)))
        }
        Ok(_) => Err(NotYet("the coordinator answered an upload with something else".to_owned())),
        Err(error) => Err(broken(&error)),
    }
}
