//! The journal: every event, in order, durable before anyone sees its effect.
//!
//! Layout: [`Journal`] is what the driver needs; [`sqlite`] is the one that `bonepile serve` uses; [`thread`] keeps its calls
//! off the async threads. Does not know what events mean: [`crate::scheduler`] does. `docs/journal.md` describes the content.

pub mod sqlite;
pub mod thread;

use std::path::PathBuf;

use protocol::time::UnixMillis;

use crate::scheduler::Record;

pub use sqlite::SqliteJournal;
pub use thread::JournalThread;

/// Version of the journal that this build writes: the number of its migrations.
pub const SCHEMA: u32 = sqlite::MIGRATIONS.len() as u32;

/// What a journal says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Random, made with the journal: tells two journals of clusters with the same name apart.
    pub id: String,
    /// Name of the cluster it belongs to.
    pub cluster: String,
    /// UUID of the results store that its artifacts are in.
    pub store_uuid: String,
    /// Seed of every choice that the scheduler leaves to chance; none yet.
    pub seed: u64,
    /// When it was made.
    pub created_at: UnixMillis,
}

/// An append-only list of events. Calls block.
pub trait Journal: Send {
    /// What it says about itself.
    fn header(&self) -> &Header;

    /// Appends `batch` whole or not at all. Durable when this returns.
    ///
    /// # Errors
    /// Whatever comes, the journal is as it was, or (if the answer was lost on the way back from the disk) has all of
    /// `batch`: read it again before going on.
    fn append(&mut self, batch: &[Record]) -> Result<(), JournalError>;

    /// Hands every record from `seq` on to `each`, in order, and checks that none is missing.
    ///
    /// # Errors
    /// [`JournalError::Damaged`] at the first record that does not read; else what the disk says.
    fn read_from(&mut self, seq: u64, each: &mut dyn FnMut(Record)) -> Result<(), JournalError>;

    /// Whether it can be written again after an error, by writing something that means nothing.
    ///
    /// # Errors
    /// As [`Journal::append`].
    fn probe(&mut self) -> Result<(), JournalError>;
}

/// Why a journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Another process has it open.
    #[error("journal {} is in use by another coordinator", path.display())]
    InUse {
        /// The journal.
        path: PathBuf,
    },
    /// There is none.
    #[error("there is no journal at {}", path.display())]
    Missing {
        /// Where it should be.
        path: PathBuf,
    },
    /// A newer build wrote it.
    #[error("journal {} has schema {found}, this build knows {SCHEMA}", path.display())]
    Newer {
        /// The journal.
        path: PathBuf,
        /// Its schema.
        found: u32,
    },
    /// It is not a journal, or not whole.
    #[error("journal {} is damaged at event {seq}: {detail}", path.display())]
    Damaged {
        /// The journal.
        path: PathBuf,
        /// The first event that is wrong; 0: the file itself.
        seq: u64,
        /// What is wrong.
        detail: String,
    },
    /// It belongs to another cluster.
    #[error("journal {} belongs to cluster {found}, not to {expected}", path.display())]
    OtherCluster {
        /// The journal.
        path: PathBuf,
        /// The cluster in its header.
        found: String,
        /// The cluster in the settings.
        expected: String,
    },
    /// The file system said no.
    #[error("cannot {doing} journal {}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// The journal.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// SQLite said no: disk full, read-only, I/O error.
    #[error("cannot {doing} journal {}", path.display())]
    Sqlite {
        /// What was being done.
        doing: &'static str,
        /// The journal.
        path: PathBuf,
        /// What SQLite says.
        #[source]
        source: rusqlite::Error,
    },
    /// Its thread has ended: a bug.
    #[error("the journal's thread has ended")]
    ThreadGone,
}

impl JournalError {
    /// Whether the journal itself is at fault, not its surroundings: exit code 5.
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Newer { .. } | Self::Damaged { .. })
    }

    /// What an operator could do.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::InUse { .. } => "stop the other `bonepile serve` first",
            Self::Missing { .. } => "make the cluster with `bonepile init`",
            Self::Newer { .. } => "use the build that wrote it, or a newer one; this one changes nothing in it",
            Self::Damaged { .. } => {
                "put the newest backup of the state directory back; nothing was changed in this one"
            }
            Self::OtherCluster { .. } => "check cluster.name and coordinator.state_dir in cluster.toml",
            Self::Sqlite { source, .. } if is_full(source) => "make room on the disk of the state directory",
            Self::Io { .. } | Self::Sqlite { .. } => "check the state directory: local disk, writable for this user",
            Self::ThreadGone => return None,
        };
        Some(hint.to_owned())
    }
}

fn is_full(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull)
}

/// A journal in memory, for tests of what needs one.
#[cfg(test)]
pub(crate) mod memory {
    use super::*;

    /// Everything in memory; can be told to fail, as a full disk does.
    #[derive(Debug, Clone)]
    pub(crate) struct MemoryJournal {
        header: Header,
        shared: std::sync::Arc<std::sync::Mutex<Shared>>,
    }

    #[derive(Debug, Default)]
    pub(crate) struct Shared {
        pub(crate) records: Vec<Record>,
        pub(crate) full: bool,
    }

    impl MemoryJournal {
        pub(crate) fn new() -> Self {
            let header = Header {
                id: "memory".to_owned(),
                cluster: "test".to_owned(),
                store_uuid: "uuid".to_owned(),
                seed: 7,
                created_at: UnixMillis(0),
            };
            Self { header, shared: Default::default() }
        }

        pub(crate) fn shared(&self) -> std::sync::MutexGuard<'_, Shared> {
            self.shared.lock().unwrap()
        }
    }

    impl Journal for MemoryJournal {
        fn header(&self) -> &Header {
            &self.header
        }

        fn append(&mut self, batch: &[Record]) -> Result<(), JournalError> {
            self.probe()?;
            self.shared().records.extend_from_slice(batch);
            Ok(())
        }

        fn read_from(&mut self, seq: u64, each: &mut dyn FnMut(Record)) -> Result<(), JournalError> {
            self.shared().records.iter().filter(|record| record.seq >= seq).cloned().for_each(each);
            Ok(())
        }

        fn probe(&mut self) -> Result<(), JournalError> {
            let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
            match self.shared().full {
                true => Err(JournalError::Io { doing: "append to", path: "memory".into(), source: full }),
                false => Ok(()),
            }
        }
    }
}
