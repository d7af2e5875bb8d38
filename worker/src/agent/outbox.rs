//! Finished seats on local disk, until the store has their outputs and the coordinator has their outcome.
//!
//! A seat's directory appears whole: files are synced, then its record, then the directory is renamed to its name. A worker
//! killed at any moment finds its finished seats again. Seats without outputs share a log, [`records`]. All calls here block;
//! they belong on a blocking thread.

pub mod records;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use protocol::control::{Output, SeatFinished, Usage};
use protocol::exec;
use protocol::ids::ArtifactHash;

use super::core::SeatId;

const RECORD: &str = "record.json";
const TEMPORARY: &str = ".tmp-";
const DAMAGED: &str = ".damaged-";

/// The outbox could not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum OutboxError {
    /// The disk did not do its part.
    #[error("could not {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// An executor names a file that is not its own.
    #[error("output {name} at {} is not below the seat's directory", path.display())]
    Outside {
        /// Its name.
        name: String,
        /// Where it is said to lie.
        path: PathBuf,
    },
    /// A record does not read.
    #[error("{} is damaged: {detail}", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What the parser says.
        detail: String,
    },
}

fn at<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> OutboxError + use<'a> {
    move |source| OutboxError::File { action, path: path.to_owned(), source }
}

/// The directory of finished seats.
#[derive(Debug, Clone)]
pub struct Outbox {
    root: PathBuf,
}

impl Outbox {
    /// Opens the outbox, removes what was cut short, and names the seats that it holds.
    ///
    /// # Errors
    /// [`OutboxError::File`]. A damaged seat is set aside and told in the log, as its work must be done again.
    pub fn open(root: &Path) -> Result<(Self, Vec<SeatId>), OutboxError> {
        protocol::private_file::create_dir(root).map_err(at("make", root))?;
        let outbox = Self { root: root.to_owned() };
        let mut seats = Vec::new();
        for entry in fs::read_dir(root).map_err(at("list", root))? {
            let path = entry.map_err(at("list", root))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with(TEMPORARY) {
                fs::remove_dir_all(&path).map_err(at("remove", &path))?;
            } else if let Some(seat) = SeatId::from_directory_name(&name) {
                match outbox.record(seat) {
                    Ok(_) => seats.push(seat),
                    Err(error) => {
                        tracing::error!(%seat, "a finished seat cannot be read and is set aside: {error}");
                        let aside = root.join(format!("{DAMAGED}{name}"));
                        fs::rename(&path, &aside).map_err(at("rename", &path))?;
                    }
                }
            }
        }
        seats.sort();
        Ok((outbox, seats))
    }

    /// Takes a finished seat's outputs out of its working directory. On failure they are wherever they were or in a
    /// temporary place that the next start removes; the seat has failed then.
    ///
    /// # Errors
    /// [`OutboxError::File`], [`OutboxError::Outside`].
    pub fn keep(
        &self,
        seat: SeatId,
        work: &Path,
        finished: &exec::Finished,
        usage: Usage,
        build: String,
    ) -> Result<(), OutboxError> {
        let temporary = self.root.join(format!("{TEMPORARY}{}", seat.directory_name()));
        if temporary.exists() {
            fs::remove_dir_all(&temporary).map_err(at("remove", &temporary))?;
        }
        protocol::private_file::create_dir(&temporary).map_err(at("make", &temporary))?;
        let work = fs::canonicalize(work).map_err(at("resolve", work))?;
        let mut outputs = Vec::new();
        for (index, (name, path)) in finished.outputs.iter().enumerate() {
            let source = fs::canonicalize(path).map_err(at("find output", Path::new(path)))?;
            if !source.starts_with(&work) {
                return Err(OutboxError::Outside { name: name.clone(), path: source });
            }
            let kept = temporary.join(index.to_string());
            fs::rename(&source, &kept).map_err(at("move", &source))?;
            let (hash, bytes) = hash_and_sync(&kept).map_err(at("sync", &kept))?;
            outputs.push(Output { name: name.clone(), hash, bytes });
        }
        let record = SeatFinished {
            attempt: seat.attempt,
            role: seat.role,
            outputs,
            usage,
            models: finished.models.clone(),
            build,
        };
        let path = temporary.join(RECORD);
        let text = serde_json::to_vec_pretty(&record).expect("a record is plain data");
        protocol::private_file::write(&path, &text).map_err(at("write", &path))?;
        let place = self.directory(seat);
        fs::rename(&temporary, &place).map_err(at("rename", &temporary))?;
        File::open(&self.root).and_then(|directory| directory.sync_all()).map_err(at("sync", &self.root))
    }

    /// What to tell the coordinator once the outputs are in the store.
    ///
    /// # Errors
    /// [`OutboxError::File`], [`OutboxError::Damaged`].
    pub fn record(&self, seat: SeatId) -> Result<SeatFinished, OutboxError> {
        let path = self.directory(seat).join(RECORD);
        let text = fs::read(&path).map_err(at("read", &path))?;
        serde_json::from_slice(&text).map_err(|error| OutboxError::Damaged { path, detail: error.to_string() })
    }

    /// Where output `index` of a seat lies.
    pub fn file(&self, seat: SeatId, index: usize) -> PathBuf {
        self.directory(seat).join(index.to_string())
    }

    /// Forgets a seat; one that is not here is no error.
    ///
    /// # Errors
    /// [`OutboxError::File`].
    pub fn discard(&self, seat: SeatId) -> Result<(), OutboxError> {
        let place = self.directory(seat);
        // Renamed first: a seat half removed would look damaged at the next start.
        let going = self.root.join(format!("{TEMPORARY}{}", seat.directory_name()));
        match fs::rename(&place, &going) {
            Ok(()) => fs::remove_dir_all(&going).map_err(at("remove", &going)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(at("rename", &place)(error)),
        }
    }

    fn directory(&self, seat: SeatId) -> PathBuf {
        self.root.join(seat.directory_name())
    }
}

fn hash_and_sync(path: &Path) -> io::Result<(ArtifactHash, u64)> {
    let mut file = File::open(path)?;
    let mut hasher = blake3::Hasher::new();
    let bytes = io::copy(&mut file, &mut hasher)?;
    file.sync_all()?;
    Ok((ArtifactHash(*hasher.finalize().as_bytes()), bytes))
}

#[cfg(test)]
mod tests {
    use protocol::ids::{AttemptId, Fence, Role, RunId, ShardId};

    use super::*;

    struct Bench {
        root: tempfile::TempDir,
    }

    impl Bench {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            fs::create_dir(root.path().join("work")).unwrap();
            Self { root }
        }

        fn open(&self) -> (Outbox, Vec<SeatId>) {
            Outbox::open(&self.root.path().join("outbox")).unwrap()
        }

        fn work(&self) -> PathBuf {
            self.root.path().join("work")
        }

        fn finished(&self, text: &str) -> exec::Finished {
            let path = self.work().join("result.json");
            fs::write(&path, text).unwrap();
            let outputs = vec![("result.json".to_owned(), path.to_string_lossy().into_owned())];
            exec::Finished { attempt: seat().attempt, outputs, memory_peak_bytes: 5, models: Vec::new(), waited_ms: 0 }
        }
    }

    fn seat() -> SeatId {
        let attempt = AttemptId { shard: ShardId { run: RunId(1), index: 2 }, fence: Fence(3) };
        SeatId { attempt, role: Role::Main }
    }

    #[test]
    fn a_kept_seat_is_found_again_and_discarded_once() {
        let bench = Bench::new();
        let (outbox, seats) = bench.open();
        assert!(seats.is_empty());
        outbox.keep(seat(), &bench.work(), &bench.finished("{}"), Usage::default(), "b".into()).unwrap();
        let (outbox, seats) = bench.open();
        assert_eq!(seats, [seat()]);
        let record = outbox.record(seat()).unwrap();
        assert_eq!((record.outputs[0].hash, record.outputs[0].bytes), (ArtifactHash::of(b"{}"), 2));
        assert_eq!(fs::read(outbox.file(seat(), 0)).unwrap(), b"{}");
        outbox.discard(seat()).unwrap();
        outbox.discard(seat()).unwrap();
        assert!(bench.open().1.is_empty());
    }

    #[test]
    fn what_was_cut_short_or_damaged_is_not_handed_in() {
        let bench = Bench::new();
        let (outbox, _) = bench.open();
        outbox.keep(seat(), &bench.work(), &bench.finished("{}"), Usage::default(), "b".into()).unwrap();
        fs::write(outbox.directory(seat()).join(RECORD), "{").unwrap();
        let half = SeatId { role: Role::Target, ..seat() };
        fs::create_dir(outbox.root.join(format!("{TEMPORARY}{}", half.directory_name()))).unwrap();
        assert!(bench.open().1.is_empty());
        let left: Vec<_> = fs::read_dir(&outbox.root).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, [".damaged-r1.2-f3-main"]);
    }

    #[test]
    fn an_output_elsewhere_is_refused() {
        let bench = Bench::new();
        let (outbox, _) = bench.open();
        let mut finished = bench.finished("{}");
        finished.outputs[0].1 = "/etc/hostname".into();
        let refused = outbox.keep(seat(), &bench.work(), &finished, Usage::default(), "b".into());
        assert!(matches!(refused, Err(OutboxError::Outside { .. } | OutboxError::File { .. })), "{refused:?}");
        assert!(bench.open().1.is_empty());
    }
}
