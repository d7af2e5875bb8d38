//! Packets under way to this worker: their files, and which chunks are here.
//!
//! A packet is known by its root, whichever connection its chunks come on. What is cut off waits ten minutes for its sender
//! to come back. Writes local disk: the methods that do belong on a blocking thread.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use protocol::ids::hex;
use protocol::peer::Offer;
use tokio::sync::watch;

use super::packet::{chunk_count, chunk_span, root};
use crate::agent::core::SeatId;

/// How long a packet without a sender is kept.
pub const KEPT_AFTER_CUT: Duration = Duration::from_secs(600);
/// Bytes of packets under way at once; a further offer waits. One packet may always come, however large.
pub const OPEN_BYTES_MAX: u64 = 32 << 30;
/// Roots of packets that have arrived, remembered for a sender that missed the ACCEPT.
const ARRIVED_MAX: usize = 4096;

/// Packets under way.
#[derive(Debug)]
pub struct Inbox {
    root: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    partial: BTreeMap<Key, Arc<Partial>>,
    /// Arrived packets, newest last.
    arrived: Vec<Key>,
}

/// A packet for a seat: the same content for another seat is another packet.
type Key = (SeatId, String, [u8; 32]);

/// What an inbox says to an offer.
#[derive(Debug)]
pub enum Place {
    /// It has a place.
    Partial(Arc<Partial>),
    /// It has arrived before.
    Arrived,
    /// Too much is under way.
    Full,
}

/// A packet of which some chunks may be here.
#[derive(Debug)]
pub struct Partial {
    key: Key,
    path: PathBuf,
    file: File,
    header: Vec<u8>,
    payload_bytes: u64,
    chunk_bytes: u32,
    chunks: Mutex<Chunks>,
    /// Chunks here, for who waits for them.
    progress: watch::Sender<u32>,
}

#[derive(Debug)]
struct Chunks {
    hashes: Vec<Option<[u8; 32]>>,
    here: u32,
    /// Transfers that use it now.
    users: u32,
    idle_since: Instant,
}

/// A chunk does not fit the packet.
#[derive(Debug, thiserror::Error)]
pub enum ChunkError {
    /// Its place is not where chunks of this packet lie.
    #[error("chunk {index} is not at byte {offset} with {bytes} bytes")]
    Place {
        /// Its number.
        index: u32,
        /// Where it says it goes.
        offset: u64,
        /// Its length.
        bytes: usize,
    },
    /// Its bytes are not what its header says.
    #[error("chunk {index} does not have its hash")]
    Corrupt {
        /// Its number.
        index: u32,
    },
    /// The disk does not take it.
    #[error("could not write a chunk")]
    Disk(#[from] io::Error),
}

/// A packet that has all its chunks does not become one.
#[derive(Debug, thiserror::Error)]
pub enum FinishError {
    /// Its content is not what was offered.
    #[error("the packet does not have the root that was offered")]
    Corrupt,
    /// The disk does not take it.
    #[error("could not keep a packet")]
    Disk(#[from] io::Error),
}

/// The data behind these locks is whole after every statement.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inbox {
    /// An inbox in the empty directory `root`.
    pub fn new(root: PathBuf) -> Self {
        Self { root, state: Mutex::default() }
    }

    /// A place for a checked offer to `to`.
    ///
    /// # Errors
    /// If the disk has no room for it.
    pub fn place(&self, to: SeatId, offer: &Offer, now: Instant) -> io::Result<Place> {
        let key = (to, offer.key.clone(), offer.root);
        let mut state = lock(&self.state);
        self.expire(&mut state, now);
        if state.arrived.contains(&key) {
            return Ok(Place::Arrived);
        }
        if let Some(partial) = state.partial.get(&key)
            && partial.header == offer.header
            && (partial.payload_bytes, partial.chunk_bytes) == (offer.payload_bytes, offer.chunk_bytes)
        {
            lock(&partial.chunks).users += 1;
            return Ok(Place::Partial(Arc::clone(partial)));
        }
        let open: u64 = state.partial.values().map(|partial| partial.payload_bytes).sum();
        if open > 0 && open.saturating_add(offer.payload_bytes) > OPEN_BYTES_MAX {
            return Ok(Place::Full);
        }
        let partial = Arc::new(self.begin(key.clone(), offer, now)?);
        state.partial.insert(key, Arc::clone(&partial));
        Ok(Place::Partial(partial))
    }

    fn begin(&self, key: Key, offer: &Offer, now: Instant) -> io::Result<Partial> {
        let name = format!("{}-{}-{}", key.0.directory_name(), key.1, &hex(&key.2)[..16]);
        let path = self.root.join(name);
        let file = File::options().create(true).truncate(true).read(true).write(true).open(&path)?;
        file.write_all_at(&offer.header, 0)?;
        file.set_len(offer.header.len() as u64 + offer.payload_bytes)?;
        let count = chunk_count(offer.payload_bytes, offer.chunk_bytes);
        let hashes = vec![None; count as usize];
        Ok(Partial {
            key,
            path,
            file,
            header: offer.header.clone(),
            payload_bytes: offer.payload_bytes,
            chunk_bytes: offer.chunk_bytes,
            chunks: Mutex::new(Chunks { hashes, here: 0, users: 1, idle_since: now }),
            progress: watch::Sender::new(0),
        })
    }

    /// A transfer is over, one way or the other.
    pub fn release(&self, partial: &Partial, now: Instant) {
        let mut chunks = lock(&partial.chunks);
        chunks.users = chunks.users.saturating_sub(1);
        chunks.idle_since = now;
    }

    /// Turns a packet that has all its chunks into the file `place`; its root was computed anew from what is here.
    ///
    /// # Errors
    /// [`FinishError`]; a packet with the wrong root is forgotten, as nothing in it can be trusted.
    pub fn finish(&self, partial: &Partial, place: &Path) -> Result<u64, FinishError> {
        let hashes: Option<Vec<[u8; 32]>> = lock(&partial.chunks).hashes.iter().copied().collect();
        let whole = hashes.is_some_and(|hashes| root(&partial.header, hashes) == partial.key.2);
        let mut state = lock(&self.state);
        if !whole {
            state.partial.remove(&partial.key);
            // A leftover is removed with the directory at the next start.
            let _ = fs::remove_file(&partial.path);
            return Err(FinishError::Corrupt);
        }
        // Two connections may both have seen the last chunk: the first one moves the file.
        if !state.arrived.contains(&partial.key) {
            fs::rename(&partial.path, place)?;
            state.partial.remove(&partial.key);
            if state.arrived.len() >= ARRIVED_MAX {
                state.arrived.remove(0);
            }
            state.arrived.push(partial.key.clone());
        }
        Ok(partial.header.len() as u64 + partial.payload_bytes)
    }

    /// Forgets everything for a seat that is over.
    pub fn forget(&self, seat: SeatId) {
        let mut state = lock(&self.state);
        state.arrived.retain(|key| key.0 != seat);
        state.partial.retain(|key, partial| {
            let keep = key.0 != seat;
            if !keep {
                let _ = fs::remove_file(&partial.path);
            }
            keep
        });
    }

    /// Bytes of chunks that are here of packets under way.
    pub fn bytes_here(&self) -> u64 {
        let here = |partial: &Arc<Partial>| u64::from(lock(&partial.chunks).here) * u64::from(partial.chunk_bytes);
        lock(&self.state).partial.values().map(here).sum()
    }

    fn expire(&self, state: &mut State, now: Instant) {
        state.partial.retain(|_, partial| {
            let chunks = lock(&partial.chunks);
            let keep = chunks.users > 0 || now.duration_since(chunks.idle_since) < KEPT_AFTER_CUT;
            if !keep {
                let _ = fs::remove_file(&partial.path);
            }
            keep
        });
    }
}

impl Partial {
    /// Number of chunks.
    pub fn count(&self) -> u32 {
        chunk_count(self.payload_bytes, self.chunk_bytes)
    }

    /// Which chunks are here, as a GRANT says it; empty if none is.
    pub fn have(&self) -> Vec<u8> {
        let chunks = lock(&self.chunks);
        if chunks.here == 0 {
            return Vec::new();
        }
        let mut bits = vec![0; chunks.hashes.len().div_ceil(8)];
        for (index, _) in chunks.hashes.iter().enumerate().filter(|(_, hash)| hash.is_some()) {
            bits[index / 8] |= 1 << (index % 8);
        }
        bits
    }

    /// Length of chunk `index`; `None` if there is no such chunk.
    pub fn chunk_bytes_at(&self, index: u32, offset: u64) -> Option<u32> {
        let (expected, length) = chunk_span(self.payload_bytes, self.chunk_bytes, index);
        (index < self.count() && expected == offset).then_some(length)
    }

    /// Takes a chunk: checks its hash, writes it, counts it. One that is here already changes nothing.
    ///
    /// # Errors
    /// [`ChunkError`].
    pub fn put(&self, index: u32, offset: u64, hash: [u8; 32], payload: &[u8]) -> Result<(), ChunkError> {
        if self.chunk_bytes_at(index, offset).map(|bytes| bytes as usize) != Some(payload.len()) {
            return Err(ChunkError::Place { index, offset, bytes: payload.len() });
        }
        if *blake3::hash(payload).as_bytes() != hash {
            return Err(ChunkError::Corrupt { index });
        }
        if lock(&self.chunks).hashes[index as usize].is_some() {
            return Ok(());
        }
        self.file.write_all_at(payload, self.header.len() as u64 + offset)?;
        let mut chunks = lock(&self.chunks);
        if chunks.hashes[index as usize].replace(hash).is_none() {
            chunks.here += 1;
        }
        let here = chunks.here;
        drop(chunks);
        self.progress.send_replace(here);
        Ok(())
    }

    /// Chunks here, as it changes.
    pub fn progress(&self) -> watch::Receiver<u32> {
        self.progress.subscribe()
    }

    /// Its length, bytes.
    pub fn bytes(&self) -> u64 {
        self.header.len() as u64 + self.payload_bytes
    }
}

#[cfg(test)]
mod tests {
    use protocol::ids::Role;

    use super::super::header::tests::{offer, packet_file};
    use super::*;

    const CHUNK: u32 = 4096;

    struct Bench {
        directory: tempfile::TempDir,
        inbox: Inbox,
        offer: Offer,
        payload: Vec<u8>,
        to: SeatId,
    }

    impl Bench {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            fs::create_dir(directory.path().join("receiving")).unwrap();
            let inbox = Inbox::new(directory.path().join("receiving"));
            let (header, payload) = packet_file(3, 200);
            let root = root(&header, payload.chunks(CHUNK as usize).map(|chunk| *blake3::hash(chunk).as_bytes()));
            let offer = offer(header, payload.len() as u64, CHUNK, root);
            let to = SeatId { attempt: offer.attempt, role: Role::Target };
            Self { directory, inbox, offer, payload, to }
        }

        fn place(&self, now: Instant) -> Arc<Partial> {
            match self.inbox.place(self.to, &self.offer, now).unwrap() {
                Place::Partial(partial) => partial,
                other => panic!("a place was expected, not {other:?}"),
            }
        }

        fn put(&self, partial: &Partial, index: u32) {
            let (offset, length) = chunk_span(self.offer.payload_bytes, CHUNK, index);
            let chunk = &self.payload[offset as usize..][..length as usize];
            partial.put(index, offset, *blake3::hash(chunk).as_bytes(), chunk).unwrap();
        }

        fn target(&self) -> PathBuf {
            self.directory.path().join("packet")
        }
    }

    #[test]
    fn a_packet_arrives_in_any_order_and_is_what_was_offered() {
        let (bench, now) = (Bench::new(), Instant::now());
        let partial = bench.place(now);
        assert!(partial.count() > 3 && partial.have().is_empty());
        for index in (0..partial.count()).rev() {
            bench.put(&partial, index);
            bench.put(&partial, index);
        }
        let bytes = bench.inbox.finish(&partial, &bench.target()).unwrap();
        let expected = [&bench.offer.header[..], &bench.payload].concat();
        assert_eq!(fs::read(bench.target()).unwrap(), expected);
        assert_eq!(bytes, expected.len() as u64);
        assert!(matches!(bench.inbox.place(bench.to, &bench.offer, now).unwrap(), Place::Arrived));
        bench.inbox.forget(bench.to);
        assert!(matches!(bench.inbox.place(bench.to, &bench.offer, now).unwrap(), Place::Partial(_)));
    }

    #[test]
    fn after_a_cut_the_chunks_that_are_here_are_told_for_ten_minutes() {
        let (bench, now) = (Bench::new(), Instant::now());
        let partial = bench.place(now);
        bench.put(&partial, 0);
        bench.put(&partial, 2);
        bench.inbox.release(&partial, now);
        drop(partial);
        let again = bench.place(now + KEPT_AFTER_CUT - Duration::from_secs(1));
        assert_eq!(again.have()[0], 0b101);
        bench.inbox.release(&again, now);
        let late = bench.place(now + KEPT_AFTER_CUT);
        assert!(late.have().is_empty());
    }

    #[test]
    fn wrong_chunks_are_refused_and_change_nothing() {
        let (bench, now) = (Bench::new(), Instant::now());
        let partial = bench.place(now);
        let chunk = &bench.payload[..CHUNK as usize];
        let hash = *blake3::hash(chunk).as_bytes();
        assert!(matches!(partial.put(0, 0, [0; 32], chunk), Err(ChunkError::Corrupt { index: 0 })));
        assert!(matches!(partial.put(1, 0, hash, chunk), Err(ChunkError::Place { .. })));
        assert!(matches!(partial.put(u32::MAX, 0, hash, chunk), Err(ChunkError::Place { .. })));
        assert!(matches!(partial.put(0, 0, hash, &chunk[1..]), Err(ChunkError::Place { .. })));
        assert!(partial.have().is_empty());
    }

    #[test]
    fn chunks_that_check_one_by_one_but_not_together_are_all_dropped() {
        let (bench, now) = (Bench::new(), Instant::now());
        let partial = bench.place(now);
        for index in 0..partial.count() {
            let (offset, length) = chunk_span(bench.offer.payload_bytes, CHUNK, index);
            let forged = vec![7; length as usize];
            partial.put(index, offset, *blake3::hash(&forged).as_bytes(), &forged).unwrap();
        }
        assert!(matches!(bench.inbox.finish(&partial, &bench.target()), Err(FinishError::Corrupt)));
        assert!(bench.place(now).have().is_empty());
        assert!(!bench.target().exists());
    }
}
