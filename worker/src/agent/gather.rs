//! Bringing artifacts that a seat needs to where its executor can read them, checked against their names on the way. What was
//! brought lately is kept, so that a worker that takes part in every round brings what stays the same once.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use protocol::control::{Download, DownloadAnswer, Failure, FailureKind, Output, ToCoordinator, ToWorker};
use protocol::ids::ArtifactHash;
use protocol::quic::{FrameReader, Received, write_frame};
use protocol::store::Store;
use quinn::{Connection, RecvStream};
use tokio::io::AsyncWriteExt;
use tokio::sync::Mutex as Turn;

use super::backoff::{Backoff, random};
use super::core::SeatId;
use super::way::{NotYet, ToStore, Way, chain};

/// A store that cannot be used for so long fails the seat: another worker may have a better way to it.
const PATIENCE: Duration = Duration::from_secs(120);
const RETRY: (Duration, Duration, Duration) =
    (Duration::from_millis(100), Duration::from_millis(500), Duration::from_secs(10));
/// The coordinator may take this long to answer: it reads from its own store meanwhile.
const ANSWER: Duration = Duration::from_secs(60);
/// Artifacts kept for the seats that follow, bytes in all.
const SHELF_BYTES_MAX: u64 = 4 << 30;
/// Bytes moved at once.
const PIECE_BYTES: usize = 1 << 20;

/// Artifacts that were brought, for the seats that follow: a round's weights, the base of a projector.
#[derive(Debug, Clone)]
pub(super) struct Gatherer {
    /// The way to the store.
    pub(super) store: ToStore,
    /// Where artifacts lie by their hash; each is complete and checked.
    pub(super) shelf: PathBuf,
    /// Artifacts on their way: both seats of a pair may ask for one at the same time, and it comes once.
    pub(super) coming: Arc<Mutex<BTreeMap<ArtifactHash, Arc<Turn<()>>>>>,
}

impl Gatherer {
    /// Brings `inputs` into `directory` and says where each lies: (name, path).
    ///
    /// # Errors
    /// `InputMissing` if the store does not have one or cannot be used for two minutes; `LocalDisk`.
    pub(super) async fn gather(
        &self,
        seat: SeatId,
        inputs: Vec<Output>,
        directory: PathBuf,
    ) -> Result<Vec<(String, String)>, Failure> {
        for made in [&directory, &self.shelf] {
            protocol::private_file::create_dir(made).map_err(|error| disk(made, &error))?;
        }
        let mut places = Vec::with_capacity(inputs.len());
        for input in inputs {
            if input.name.is_empty() || !input.name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c)) {
                return Err(Failure::new(FailureKind::BadSpec, format!("`{}` is no name for an input", input.name)));
            }
            let path = directory.join(&input.name);
            let shelved = self.shelf.join(input.hash.to_string());
            let turn = self.turn(input.hash);
            let mine = turn.lock().await;
            if std::fs::hard_link(&shelved, &path).is_err() {
                bring(&self.store, seat, &input, &path).await?;
                let bytes = std::fs::metadata(&path).map_or(input.bytes, |file| file.len());
                shelve(&self.shelf, &shelved, &path, bytes);
            }
            drop(mine);
            places.push((input.name, path.to_string_lossy().into_owned()));
        }
        Ok(places)
    }

    /// Whose turn it is to bring an artifact.
    fn turn(&self, hash: ArtifactHash) -> Arc<Turn<()>> {
        let mut coming = self.coming.lock().unwrap_or_else(PoisonError::into_inner);
        coming.retain(|_, turn| Arc::strong_count(turn) > 1);
        Arc::clone(coming.entry(hash).or_default())
    }
}

fn disk(path: &Path, error: &io::Error) -> Failure {
    Failure::new(FailureKind::LocalDisk, format!("could not write below {}: {error}", path.display()))
}

/// Keeps what was brought for the next seat, and lets the oldest go. What cannot be kept is brought again.
fn shelve(shelf: &Path, place: &Path, path: &Path, bytes: u64) {
    let entries = || {
        let entries = std::fs::read_dir(shelf)?.flatten();
        let facts = entries.filter_map(|entry| {
            let facts = entry.metadata().ok()?;
            Some((facts.modified().ok()?, facts.len(), entry.path()))
        });
        io::Result::Ok(facts.collect::<Vec<_>>())
    };
    let Ok(mut kept) = entries() else { return };
    kept.sort();
    let mut total = kept.iter().map(|(_, length, _)| length).sum::<u64>().saturating_add(bytes);
    for (_, length, oldest) in kept {
        if total <= SHELF_BYTES_MAX {
            break;
        }
        if std::fs::remove_file(oldest).is_ok() {
            total -= length;
        }
    }
    if total <= SHELF_BYTES_MAX
        && let Err(error) = std::fs::hard_link(path, place)
    {
        tracing::debug!(path = %place.display(), "not kept: {error}");
    }
}

async fn bring(store: &ToStore, seat: SeatId, input: &Output, path: &Path) -> Result<(), Failure> {
    let (floor, first, longest) = RETRY;
    let mut backoff = Backoff::new(floor, first, longest);
    let started = tokio::time::Instant::now();
    loop {
        let error = match try_bring(store, seat, input, path).await {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        if started.elapsed() > PATIENCE {
            let text = format!("{} ({}) could not be had: {error}", input.name, input.hash);
            return Err(Failure::new(FailureKind::InputMissing, text));
        }
        tokio::time::sleep(backoff.next_wait(random())).await;
    }
}

async fn try_bring(store: &ToStore, seat: SeatId, input: &Output, path: &Path) -> Result<(), NotYet> {
    match store.way().await? {
        Way::Mount(mounted) => {
            let (hash, path) = (input.hash, path.to_owned());
            match store.threads.run(move || copy(&mounted, hash, &path)).await {
                Ok(result) => result,
                Err(stalled) => Err(NotYet(stalled.to_string())),
            }
        }
        Way::Coordinator(connection) => download(&connection, seat, input, path).await,
    }
}

/// From the mount, read once: what is hashed is what is written.
fn copy(store: &Store, hash: ArtifactHash, path: &Path) -> Result<(), NotYet> {
    let failed = |error: &dyn std::error::Error| NotYet(chain(error));
    let source = store.blob_path(&hash);
    let mut from = File::open(&source).map_err(|error| NotYet(format!("{}: {error}", source.display())))?;
    let mut to = File::create(path).map_err(|error| failed(&error))?;
    let (mut hasher, mut piece) = (blake3::Hasher::new(), vec![0; PIECE_BYTES]);
    loop {
        let length = from.read(&mut piece).map_err(|error| failed(&error))?;
        if length == 0 {
            break;
        }
        hasher.update(&piece[..length]);
        to.write_all(&piece[..length]).map_err(|error| failed(&error))?;
    }
    named(hash, &hasher)
}

async fn download(connection: &Connection, seat: SeatId, input: &Output, path: &Path) -> Result<(), NotYet> {
    let broken = |error: &dyn std::error::Error| NotYet(format!("the download broke off: {}", chain(error)));
    let (mut send, receive) = connection.open_bi().await.map_err(|error| broken(&error))?;
    let question = Download { attempt: seat.attempt, hash: input.hash };
    write_frame(&mut send, &ToCoordinator::from(question)).await.map_err(|error| broken(&error))?;
    let _ = send.finish();
    let mut reader = FrameReader::<ToWorker>::new(receive);
    let answer = tokio::time::timeout(ANSWER, reader.next()).await;
    let bytes = match answer.map_err(|_| NotYet("the coordinator does not answer a download".to_owned()))? {
        Ok(Some(Received::Message(ToWorker::DownloadAnswer(DownloadAnswer { refused: None, bytes })))) => bytes,
        Ok(Some(Received::Message(ToWorker::DownloadAnswer(DownloadAnswer { refused: Some(why), .. })))) => {
            return Err(NotYet(protocol::limits::clean_text(&why)));
        }
        Ok(_) => return Err(NotYet("the coordinator answered a download with something else".to_owned())),
        Err(error) => return Err(broken(&error)),
    };
    let hasher = write_down(reader.into_stream(), bytes, path).await.map_err(|error| broken(&error))?;
    named(input.hash, &hasher)
}

/// Writes what comes, up to one piece more than announced.
async fn write_down(mut stream: RecvStream, announced: u64, path: &Path) -> io::Result<blake3::Hasher> {
    let mut file = tokio::fs::File::create(path).await?;
    let (mut hasher, mut bytes) = (blake3::Hasher::new(), 0);
    while let Some(chunk) = stream.read_chunk(PIECE_BYTES, true).await? {
        hasher.update(&chunk.bytes);
        file.write_all(&chunk.bytes).await?;
        bytes += chunk.bytes.len() as u64;
        if bytes > announced {
            break;
        }
    }
    file.flush().await?;
    Ok(hasher)
}

fn named(hash: ArtifactHash, hasher: &blake3::Hasher) -> Result<(), NotYet> {
    let found = ArtifactHash(*hasher.finalize().as_bytes());
    match found == hash {
        true => Ok(()),
        false => Err(NotYet(format!("the bytes of {hash} are those of {found}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_goes_when_the_shelf_is_full() {
        let directory = tempfile::tempdir().unwrap();
        let shelf = directory.path().join("shelf");
        std::fs::create_dir(&shelf).unwrap();
        let file = directory.path().join("brought");
        for (name, bytes) in [("a", 10), ("b", 10), ("c", SHELF_BYTES_MAX - 15), ("d", SHELF_BYTES_MAX + 1)] {
            std::fs::write(&file, [0; 10]).unwrap();
            shelve(&shelf, &shelf.join(name), &file, bytes);
            std::fs::remove_file(&file).unwrap();
            let mut left: Vec<_> =
                std::fs::read_dir(&shelf).unwrap().flatten().map(|entry| entry.file_name()).collect();
            left.sort();
            let expected: &[&str] = match name {
                "a" => &["a"],
                "b" => &["a", "b"],
                "c" => &["b", "c"],
                _ => &[],
            };
            assert_eq!(left, expected, "{name}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
