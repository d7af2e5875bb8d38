//! Finished seats without outputs: one log for all of them, so that a seat costs a few bytes and a share of a sync.
//!
//! The log is a sequence of entries: 8 bytes of BLAKE3 over a frame of the protocol, then that frame. `SeatFinished` opens a
//! seat, `SeatSettled` closes it. A thread takes whatever waits, writes it at once, syncs once, and then answers for all of
//! it. What a crash cut short was never answered for, so that a torn tail is dropped. When no seat is open the log is
//! emptied; when most of it is settled it is written anew.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use protocol::control::{Failure, FailureKind, SeatFinished, SeatSettled, ToCoordinator, ToWorker};
use protocol::frame::{HEADER_BYTES, Header, Messages};
use tokio::sync::mpsc;

use super::{OutboxError, at};
use crate::agent::core::{Input, SeatId};
use crate::agent::way::chain;

const NAME: &str = "records.log";
/// Bytes of an entry before its frame.
const CHECKSUM_BYTES: usize = 8;
/// Entries that share a sync at most: a slow disk is asked once for all that wait, and none of them waits for long.
const BATCH_MAX: usize = 4096;
/// Time between two syncs where there is always something to sync: a seat alone is synced at once, hundreds share a sync.
const SYNC_EVERY: Duration = Duration::from_millis(5);
/// The log is written anew when it is this long and less than half of it is open, bytes.
const REWRITE_BYTES: u64 = 4 << 20;

/// The log, written by a thread of its own. The thread ends with the last handle.
#[derive(Debug, Clone)]
pub struct Records {
    jobs: Sender<Job>,
}

#[derive(Debug)]
enum Job {
    Keep(Box<SeatFinished>),
    Forget(SeatId),
}

impl Records {
    /// Opens the log in the outbox's directory `root`: a handle, and the seats that are open in it.
    ///
    /// # Errors
    /// [`OutboxError::File`].
    pub fn open(root: &Path, inputs: mpsc::Sender<Input>) -> Result<(Self, Vec<SeatFinished>), OutboxError> {
        let (log, open) = Log::open(root)?;
        let (jobs, waiting) = channel();
        let path = log.path.clone();
        std::thread::Builder::new()
            .name("outbox".to_owned())
            .spawn(move || write(log, &waiting, &inputs))
            .map_err(at("start a thread for", &path))?;
        Ok((Self { jobs }, open))
    }

    /// Keeps a finished seat; answered by [`Input::RecordsKept`] or [`Input::NotKept`].
    pub fn keep(&self, finished: Box<SeatFinished>) {
        self.tell(Job::Keep(finished));
    }

    /// Forgets a seat.
    pub fn forget(&self, seat: SeatId) {
        self.tell(Job::Forget(seat));
    }

    fn tell(&self, job: Job) {
        // The thread ends only with the last handle, or by a bug that its own panic has told.
        let _ = self.jobs.send(job);
    }
}

/// The thread: group commit.
fn write(mut log: Log, waiting: &Receiver<Job>, inputs: &mpsc::Sender<Input>) {
    let mut synced: Option<Instant> = None;
    while let Ok(first) = waiting.recv() {
        if let Some(early) = synced.and_then(|synced| SYNC_EVERY.checked_sub(synced.elapsed())) {
            std::thread::sleep(early);
        }
        let jobs = std::iter::once(first).chain(waiting.try_iter()).take(BATCH_MAX);
        let mut kept = Vec::new();
        let mut entries = Vec::new();
        for job in jobs {
            match job {
                Job::Keep(finished) => {
                    kept.push(SeatId { attempt: finished.attempt, role: finished.role });
                    entries.push(Entry::Finished(*finished));
                }
                Job::Forget(seat) => entries.push(Entry::Settled(seat)),
            }
        }
        let written = log.append(entries);
        if !kept.is_empty() {
            synced = Some(Instant::now());
        }
        // The loop that listens ends only with the process.
        let someone_listens = match written {
            Ok(()) => kept.is_empty() || inputs.blocking_send(Input::RecordsKept { seats: kept }).is_ok(),
            Err(error) => kept.into_iter().all(|seat| {
                let failure = Failure::new(FailureKind::LocalDisk, chain(&error));
                inputs.blocking_send(Input::NotKept { seat, failure }).is_ok()
            }),
        };
        if !someone_listens {
            return;
        }
    }
}

#[derive(Debug)]
enum Entry {
    Finished(SeatFinished),
    Settled(SeatId),
}

impl Entry {
    fn frame(&self) -> Vec<u8> {
        let frame = match self {
            Self::Finished(finished) => ToCoordinator::from(finished.clone()).to_frame(),
            Self::Settled(seat) => {
                ToWorker::from(SeatSettled { attempt: seat.attempt, role: seat.role, counted: true }).to_frame()
            }
        };
        frame.expect("an outcome without outputs fits a frame")
    }
}

/// The file and what is open in it. All calls block.
#[derive(Debug)]
struct Log {
    root: PathBuf,
    path: PathBuf,
    /// Made when the first seat is kept.
    file: Option<File>,
    length: u64,
    /// Entries of seats that are not settled.
    open: BTreeMap<SeatId, Vec<u8>>,
    open_bytes: u64,
}

impl Log {
    fn open(root: &Path) -> Result<(Self, Vec<SeatFinished>), OutboxError> {
        let path = root.join(NAME);
        let mut log = Self { root: root.to_owned(), path, file: None, length: 0, open: BTreeMap::new(), open_bytes: 0 };
        let bytes = match fs::read(&log.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((log, Vec::new())),
            Err(error) => return Err(at("read", &log.path)(error)),
        };
        let mut finished = BTreeMap::new();
        let mut rest = bytes.as_slice();
        while let Some((entry, after)) = read(rest) {
            match entry {
                Entry::Finished(seat) => {
                    let id = SeatId { attempt: seat.attempt, role: seat.role };
                    log.note_open(id, rest[..rest.len() - after.len()].to_vec());
                    finished.insert(id, seat);
                }
                Entry::Settled(id) => {
                    log.note_settled(id);
                    finished.remove(&id);
                }
            }
            rest = after;
        }
        if !rest.is_empty() {
            let (path, bytes) = (log.path.display(), rest.len());
            tracing::warn!("dropped the last {bytes} bytes of {path}: they were being written when the worker ended");
        }
        log.write_anew()?;
        Ok((log, finished.into_values().collect()))
    }

    /// Writes entries and syncs them if one of them is worth it. On failure the file ends where it did before.
    fn append(&mut self, entries: Vec<Entry>) -> Result<(), OutboxError> {
        let mut bytes = Vec::new();
        let mut sync = false;
        let mut opened = Vec::new();
        let mut settled = Vec::new();
        for entry in entries {
            let begin = bytes.len();
            let frame = entry.frame();
            bytes.extend_from_slice(&checksum(&frame));
            bytes.extend_from_slice(&frame);
            match entry {
                Entry::Finished(seat) => {
                    let id = SeatId { attempt: seat.attempt, role: seat.role };
                    opened.push((id, bytes[begin..].to_vec()));
                    sync = true;
                }
                Entry::Settled(id) => settled.push(id),
            }
        }
        self.write(&bytes, sync)?;
        opened.into_iter().for_each(|(id, entry)| self.note_open(id, entry));
        settled.into_iter().for_each(|id| self.note_settled(id));
        self.shorten();
        Ok(())
    }

    fn write(&mut self, bytes: &[u8], sync: bool) -> Result<(), OutboxError> {
        if self.file.is_none() {
            let file = fs::OpenOptions::new().append(true).create(true).mode(0o600).open(&self.path);
            self.file = Some(file.map_err(at("make", &self.path))?);
            sync_directory(&self.root)?;
        }
        let Some(file) = &mut self.file else { return Ok(()) };
        let written = file.write_all(bytes).and_then(|()| if sync { file.sync_data() } else { Ok(()) });
        if let Err(error) = written {
            // Whatever arrived in part must not stand before what comes next.
            let _ = file.set_len(self.length);
            return Err(at("write", &self.path)(error));
        }
        self.length += bytes.len() as u64;
        Ok(())
    }

    fn note_open(&mut self, id: SeatId, entry: Vec<u8>) {
        self.open_bytes += entry.len() as u64;
        if let Some(before) = self.open.insert(id, entry) {
            self.open_bytes -= before.len() as u64;
        }
    }

    fn note_settled(&mut self, id: SeatId) {
        if let Some(entry) = self.open.remove(&id) {
            self.open_bytes -= entry.len() as u64;
        }
    }

    /// Gives space back. A log that stays long is no failure: what is in it counts as before.
    fn shorten(&mut self) {
        let shortened = match &self.file {
            Some(file) if self.open.is_empty() => file.set_len(0).map(|()| self.length = 0).map_err(|error| {
                let path = &self.path;
                at("shorten", path)(error)
            }),
            Some(_) if self.length > REWRITE_BYTES && self.open_bytes * 2 < self.length => self.write_anew(),
            _ => return,
        };
        if let Err(error) = shortened {
            tracing::warn!("the outbox's log stays as long as it is: {}", chain(&error));
        }
    }

    /// Puts a log with nothing but open seats into the place of the old one.
    fn write_anew(&mut self) -> Result<(), OutboxError> {
        self.file = None;
        if self.open.is_empty() {
            protocol::private_file::remove_if_present(&self.path).map_err(at("remove", &self.path))?;
            self.length = 0;
            return sync_directory(&self.root);
        }
        let bytes: Vec<u8> = self.open.values().flatten().copied().collect();
        protocol::private_file::write(&self.path, &bytes).map_err(at("write", &self.path))?;
        let file = fs::OpenOptions::new().append(true).open(&self.path).map_err(at("open", &self.path))?;
        (self.file, self.length) = (Some(file), bytes.len() as u64);
        Ok(())
    }
}

/// The first entry and what follows it; `None` if there is none, or not all of it.
fn read(bytes: &[u8]) -> Option<(Entry, &[u8])> {
    let (sum, rest) = bytes.split_first_chunk::<CHECKSUM_BYTES>()?;
    let header = *rest.first_chunk::<HEADER_BYTES>()?;
    let header = Header::parse(header, ToCoordinator::BYTES_MAX).ok()?;
    let (frame, after) = rest.split_at_checked(HEADER_BYTES + header.len)?;
    if checksum(frame) != *sum {
        return None;
    }
    let body = &frame[HEADER_BYTES..];
    if let Ok(ToCoordinator::SeatFinished(finished)) = ToCoordinator::from_body(header, body) {
        return Some((Entry::Finished(finished), after));
    }
    match ToWorker::from_body(header, body).ok()? {
        ToWorker::SeatSettled(SeatSettled { attempt, role, .. }) => {
            Some((Entry::Settled(SeatId { attempt, role }), after))
        }
        _ => None,
    }
}

fn checksum(frame: &[u8]) -> [u8; CHECKSUM_BYTES] {
    *blake3::hash(frame).as_bytes().first_chunk().expect("a hash is longer than that")
}

fn sync_directory(path: &Path) -> Result<(), OutboxError> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(at("sync", path))
}

#[cfg(test)]
mod tests {
    use protocol::control::Usage;
    use protocol::ids::{AttemptId, Fence, Role, RunId, ShardId};

    use super::*;

    fn seat(fence: u64) -> SeatId {
        let attempt = AttemptId { shard: ShardId { run: RunId(1), index: 2 }, fence: Fence(fence) };
        SeatId { attempt, role: Role::Main }
    }

    fn finished(fence: u64) -> SeatFinished {
        let usage = Usage { wall_ms: fence, ..Usage::default() };
        let SeatId { attempt, role } = seat(fence);
        SeatFinished { attempt, role, outputs: vec![], usage, models: vec![], build: "b".into() }
    }

    fn keep(log: &mut Log, fences: impl IntoIterator<Item = u64>) {
        log.append(fences.into_iter().map(|fence| Entry::Finished(finished(fence))).collect()).unwrap();
    }

    #[test]
    fn open_seats_are_found_again_and_settled_ones_are_not() {
        let root = tempfile::tempdir().unwrap();
        let (mut log, open) = Log::open(root.path()).unwrap();
        assert!(open.is_empty() && !log.path.exists(), "made when it is needed");
        keep(&mut log, 1..=3);
        log.append(vec![Entry::Settled(seat(2))]).unwrap();
        let (mut log, open) = Log::open(root.path()).unwrap();
        assert_eq!(open, [finished(1), finished(3)]);
        log.append(vec![Entry::Settled(seat(1)), Entry::Settled(seat(3)), Entry::Settled(seat(9))]).unwrap();
        assert_eq!(fs::metadata(&log.path).unwrap().len(), 0, "emptied when nothing is open");
        keep(&mut log, [4]);
        assert_eq!(Log::open(root.path()).unwrap().1, [finished(4)]);
    }

    #[test]
    fn a_tail_torn_at_any_byte_costs_only_what_it_tore() {
        let root = tempfile::tempdir().unwrap();
        let (mut log, _) = Log::open(root.path()).unwrap();
        keep(&mut log, [1]);
        let one = fs::metadata(&log.path).unwrap().len() as usize;
        keep(&mut log, [2]);
        let whole = fs::read(&log.path).unwrap();
        for cut in 0..=whole.len() {
            fs::write(&log.path, &whole[..cut]).unwrap();
            let (mut again, open) = Log::open(root.path()).unwrap();
            let expected: Vec<_> = [(one, finished(1)), (whole.len(), finished(2))]
                .into_iter()
                .filter(|(end, _)| cut >= *end)
                .map(|(_, seat)| seat)
                .collect();
            assert_eq!(open, expected, "cut at {cut}");
            keep(&mut again, [3]);
            assert_eq!(Log::open(root.path()).unwrap().1.last(), Some(&finished(3)), "cut at {cut}");
        }
        let mut flipped = whole.clone();
        flipped[one + CHECKSUM_BYTES + HEADER_BYTES + 2] ^= 1;
        fs::write(&log.path, &flipped).unwrap();
        assert_eq!(Log::open(root.path()).unwrap().1, [finished(1)]);
    }

    #[test]
    fn a_long_log_of_settled_seats_is_written_anew() {
        let root = tempfile::tempdir().unwrap();
        let (mut log, _) = Log::open(root.path()).unwrap();
        keep(&mut log, [0]);
        let mut fence = 1;
        while log.length < REWRITE_BYTES {
            let batch = fence..fence + 10_000;
            fence = batch.end;
            let entries = batch.flat_map(|fence| [Entry::Finished(finished(fence)), Entry::Settled(seat(fence))]);
            log.append(entries.collect()).unwrap();
            if log.length < 1000 {
                break;
            }
        }
        assert!(log.length < 1000, "{} bytes", log.length);
        assert_eq!(Log::open(root.path()).unwrap().1, [finished(0)]);
    }

    #[test]
    fn a_disk_that_takes_nothing_fails_the_seats_and_leaves_the_log_whole() {
        let root = tempfile::tempdir().unwrap();
        let (mut log, _) = Log::open(root.path()).unwrap();
        keep(&mut log, [1]);
        log.file = Some(fs::File::open(&log.path).unwrap());
        assert!(log.append(vec![Entry::Finished(finished(2))]).is_err());
        assert_eq!(Log::open(root.path()).unwrap().1, [finished(1)]);
    }

    #[tokio::test]
    async fn many_seats_are_answered_for_together_and_leave_nothing() {
        let root = tempfile::tempdir().unwrap();
        let (inputs, mut heard) = mpsc::channel(64);
        let (records, _) = Records::open(root.path(), inputs).unwrap();
        (0..2000).for_each(|fence| records.keep(Box::new(finished(fence))));
        let (mut kept, mut answers) = (Vec::new(), 0);
        while kept.len() < 2000 {
            let Some(Input::RecordsKept { seats }) = heard.recv().await else { panic!("an answer") };
            kept.extend(seats);
            answers += 1;
        }
        assert!(answers < 1000, "{answers} answers for 2000 seats");
        kept.into_iter().for_each(|seat| records.forget(seat));
        let path = root.path().join(NAME);
        let emptied = tokio::task::spawn_blocking(move || {
            while fs::metadata(&path).unwrap().len() > 0 {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        });
        emptied.await.unwrap();
    }
}
