//! What a seat's procedure works with, besides models: packets from and to the other seat, inputs, files that it makes.

use std::cell::Cell;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use protocol::control::SeatProgress;
use protocol::exec::{PacketFile, PacketKey, Progressed, RunSeat};
use protocol::ids::AttemptId;
use protocol::results::ShardResult;

use super::inbox::Inbox;
use super::wire::Outbox;
use crate::cache::{CacheError, CacheLayout, KvCache};
use crate::experiment::ExperimentError;

/// Name of every seat's result within its shard.
const RESULT: &str = "result.json";
/// Packets that may wait for their way to the other seat before the one that makes them waits too.
const UNSENT_MAX: u64 = 8;

/// A seat's desk.
pub(super) struct Desk<'a, W> {
    order: &'a RunSeat,
    directory: PathBuf,
    inbox: &'a Inbox,
    outbox: &'a Outbox<W>,
    waited: Cell<Duration>,
}

/// What went to the other seat.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Emitted {
    pub(super) packets: u32,
    pub(super) bytes: u64,
    pub(super) tokens: u64,
    /// Time spent in writing, and in waiting for room.
    pub(super) elsewhere: Duration,
}

impl<'a, W: Write> Desk<'a, W> {
    pub(super) fn new(order: &'a RunSeat, inbox: &'a Inbox, outbox: &'a Outbox<W>) -> Self {
        let waited = Cell::new(Duration::ZERO);
        Self { order, directory: PathBuf::from(&order.directory), inbox, outbox, waited }
    }

    /// Time spent in waiting for the other seat.
    pub(super) fn waited(&self) -> Duration {
        self.waited.get()
    }

    /// Does what may wait for the other seat.
    fn waiting<T>(&self, wait: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let answer = wait();
        self.waited.set(self.waited.get() + begun.elapsed());
        answer
    }

    fn attempt(&self) -> AttemptId {
        self.order.attempt
    }

    /// Says how far the seat is; an error if it should stop.
    pub(super) fn progress(&self, done: u32, total: u32, note: &str) -> Result<(), ExperimentError> {
        self.inbox.check(self.attempt())?;
        let progress = SeatProgress { done, total, note: note.to_owned() };
        self.outbox.say(Progressed { attempt: self.attempt(), progress })?;
        Ok(())
    }

    /// The same as a callback for procedures.
    pub(super) fn watch(&self) -> impl FnMut(u32, u32, &str) -> Result<(), ExperimentError> {
        |done, total, note| self.progress(done, total, note)
    }

    /// Sends a cache to the other seat, once there is room for it on the way.
    pub(super) fn emit(&self, emitted: &mut Emitted, key: &str, cache: &KvCache) -> Result<(), ExperimentError> {
        let computed = Instant::now();
        self.waiting(|| self.inbox.wait_for_room(self.attempt(), emitted.packets.into(), UNSENT_MAX))?;
        let directory = self.directory.join("packets");
        std::fs::create_dir_all(&directory).map_err(|error| on_disk("packets", &directory, &error))?;
        let path = directory.join(format!("{key}.safetensors"));
        emitted.bytes += cache.save(&path).map_err(|error| match error {
            CacheError::Io { source, .. } => on_disk(key, &path, &source),
            error => error.into(),
        })?;
        let (name, path) = (key.to_owned(), path.to_string_lossy().into_owned());
        self.outbox.say(PacketFile { attempt: self.attempt(), key: name, path })?;
        emitted.packets += 1;
        emitted.tokens += cache.len() as u64;
        emitted.elsewhere += computed.elapsed();
        Ok(())
    }

    /// Waits for a packet of a model of this layout and takes it; one that does not fit is refused here, before any use.
    pub(super) fn fetch(&self, layout: &Arc<CacheLayout>, key: &str) -> Result<KvCache, ExperimentError> {
        let path = PathBuf::from(self.waiting(|| self.inbox.packet(self.attempt(), key))?);
        let cache = KvCache::load(&path, layout).map_err(|source| match source {
            CacheError::Io { source, .. } => on_disk(key, &path, &source),
            source => ExperimentError::PacketRefused { key: key.to_owned(), source },
        })?;
        self.used(key, &path)?;
        Ok(cache)
    }

    /// The same for a packet of another model, whose layout it says itself.
    pub(super) fn fetch_foreign(&self, key: &str) -> Result<KvCache, ExperimentError> {
        let path = PathBuf::from(self.waiting(|| self.inbox.packet(self.attempt(), key))?);
        let cache = KvCache::load_foreign(&path).map_err(|source| match source {
            CacheError::Io { source, .. } => on_disk(key, &path, &source),
            source => ExperimentError::PacketRefused { key: key.to_owned(), source },
        })?;
        self.used(key, &path)?;
        Ok(cache)
    }

    /// A packet is in memory: its file makes room for the next.
    fn used(&self, key: &str, path: &Path) -> Result<(), ExperimentError> {
        std::fs::remove_file(path).map_err(|error| on_disk(key, path, &error))?;
        self.outbox.say(PacketKey { attempt: self.attempt(), key: key.to_owned() })?;
        Ok(())
    }

    /// Where an artifact lies that the spec needs; `None` if the order does not have it.
    pub(super) fn input(&self, name: &str) -> Option<&Path> {
        self.order.inputs.iter().find(|(known, _)| known == name).map(|(_, path)| Path::new(path))
    }

    /// Where a file goes that becomes an artifact.
    pub(super) fn place(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Writes the seat's result: (name, path).
    pub(super) fn write_result(&self, result: &ShardResult) -> Result<(String, String), ExperimentError> {
        let path = self.place(RESULT);
        let json = serde_json::to_vec_pretty(result).expect("results are plain data with string keys");
        std::fs::write(&path, json).map_err(|error| on_disk(RESULT, &path, &error))?;
        Ok((RESULT.to_owned(), path.to_string_lossy().into_owned()))
    }
}

pub(super) fn on_disk(key: &str, path: &Path, error: &std::io::Error) -> ExperimentError {
    ExperimentError::Packet { key: key.to_owned(), what: format!("{}: {error}", path.display()) }
}
