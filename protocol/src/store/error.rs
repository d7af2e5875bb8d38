//! What can go wrong with the store, by what an operator would do about it.
//!
//! Does not retry: the store does, for the errors after which nothing is known.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::ids::{ArtifactHash, Fence};

/// What the store was doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Making a file.
    Create,
    /// Making a directory.
    CreateDirectory,
    /// Writing a file.
    Write,
    /// Syncing a file.
    Sync,
    /// Syncing a directory.
    SyncDirectory,
    /// Linking a temporary file to its name.
    Link,
    /// Removing a temporary file.
    Remove,
    /// Opening a file to read.
    Open,
    /// Reading a file of the store.
    Read,
    /// Reading the file that is to be published.
    ReadSource,
    /// Listing a directory.
    List,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Create => "create",
            Self::CreateDirectory => "create directory",
            Self::Write => "write",
            Self::Sync => "sync",
            Self::SyncDirectory => "sync directory",
            Self::Link => "link",
            Self::Remove => "remove",
            Self::Open => "open",
            Self::Read => "read",
            Self::ReadSource => "read the source of",
            Self::List => "list",
        })
    }
}

/// Why the store did not do what it was asked. Nothing half-written can be seen after any of these.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No space, or a quota is used up (ENOSPC, EDQUOT).
    #[error("the store is full: {operation} {}", path.display())]
    Full {
        /// What was being done.
        operation: Operation,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Not writable for this process (EROFS, EACCES, EPERM).
    #[error("the store cannot be written: {operation} {}", path.display())]
    ReadOnly {
        /// What was being done.
        operation: Operation,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// There is no store: no directory, or no sentinel in it.
    #[error("no store at {}: the file {} is missing", path.display(), super::SENTINEL)]
    NotMounted {
        /// Where it should be.
        path: PathBuf,
    },
    /// Another store than the cluster's.
    #[error("{} is another store: expected {expected}, got {got}", path.display())]
    WrongStore {
        /// Where it is.
        path: PathBuf,
        /// UUID of the cluster's store.
        expected: String,
        /// UUID found.
        got: String,
    },
    /// A layout that this build does not know.
    #[error("the store at {} has layout {got}; this build knows layout {supported}", path.display())]
    Layout {
        /// Where it is.
        path: PathBuf,
        /// Its layout.
        got: u32,
        /// Ours.
        supported: u32,
    },
    /// A file is not what its name says.
    #[error("{} is corrupt: expected {expected}, got {got}", path.display())]
    Corrupt {
        /// Which file.
        path: PathBuf,
        /// What its name promises.
        expected: String,
        /// What it is.
        got: String,
    },
    /// No artifact of this name.
    #[error("artifact {name} is not in the store")]
    Missing {
        /// Its name.
        name: ArtifactHash,
        /// Where it would be.
        path: PathBuf,
    },
    /// A manifest does not read.
    #[error("manifest {} does not read: {detail}", path.display())]
    BadManifest {
        /// Which file.
        path: PathBuf,
        /// What the parser says.
        detail: String,
    },
    /// The shard has a manifest of another attempt: two attempts were committed, or two clusters share the store.
    #[error("manifest {} is of attempt {there}, not {given}", path.display())]
    ManifestOfAnotherAttempt {
        /// Which file.
        path: PathBuf,
        /// The attempt on record.
        there: Fence,
        /// The attempt that came now.
        given: Fence,
    },
    /// A new store needs a directory of its own.
    #[error("cannot make a store at {}: it has `{entry}` in it", path.display())]
    NotEmpty {
        /// The directory.
        path: PathBuf,
        /// Something that lies in it.
        entry: String,
    },
    /// Not a plain file name.
    #[error("`{name}` is not a plain file name")]
    BadName {
        /// What was given.
        name: String,
    },
    /// Anything else that the system answered.
    #[error("failed to {operation} {}", path.display())]
    Io {
        /// What was being done.
        operation: Operation,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl StoreError {
    /// Sorts an answer of the system into its class.
    pub(super) fn at(operation: Operation, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| {
            // What is read to be published lies elsewhere: its disk being full or read-only says nothing about the store.
            if operation == Operation::ReadSource {
                return Self::Io { operation, path, source };
            }
            match Errno::from_io_error(&source) {
                Some(Errno::NOSPC | Errno::DQUOT) => Self::Full { operation, path, source },
                Some(Errno::ROFS | Errno::ACCESS | Errno::PERM) => Self::ReadOnly { operation, path, source },
                _ => Self::Io { operation, path, source },
            }
        }
    }

    /// The server's trouble left it unknown what was written (EIO, ETIMEDOUT, ESTALE): write all of it again.
    pub fn outcome_unknown(&self) -> bool {
        matches!(self, Self::Io { operation, source, .. } if *operation != Operation::ReadSource
            && matches!(Errno::from_io_error(source), Some(Errno::IO | Errno::TIMEDOUT | Errno::STALE)))
    }

    /// Something that passes by itself or by an operator's hand, while the results wait: full, read-only, not mounted, in
    /// trouble. `false`: the store or the request is wrong.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Full { .. } | Self::ReadOnly { .. } | Self::NotMounted { .. } => true,
            Self::Io { operation, .. } => *operation != Operation::ReadSource,
            _ => false,
        }
    }

    pub(super) fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// What an operator could do.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Full { .. } => {
                "free space or raise the quota; finished results wait on the workers and are handed in then".to_owned()
            }
            Self::ReadOnly { path, .. } => format!(
                "this process runs as uid {} gid {}: check the mount (`mount | grep …`), the export's squash options and the owner \
                 of {}",
                rustix::process::geteuid().as_raw(),
                rustix::process::getegid().as_raw(),
                path.parent().unwrap_or(path).display()
            ),
            Self::NotMounted { .. } => "mount it, or make a new one with `bonepile init`".to_owned(),
            Self::WrongStore { .. } => "mount the cluster's own store there, or correct the path in cluster.toml".to_owned(),
            Self::Layout { .. } => "use a build of bonepile that knows this layout".to_owned(),
            Self::Corrupt { .. } | Self::BadManifest { .. } => {
                "`bonepile store fsck` lists everything damaged; move the file to the store's trash/ and retry the shard".to_owned()
            }
            Self::Missing { .. } => "`bonepile store fsck` lists what manifests name and the store lacks".to_owned(),
            Self::ManifestOfAnotherAttempt { .. } => "each cluster needs a store of its own".to_owned(),
            Self::NotEmpty { .. } => "name a directory that is empty or does not exist".to_owned(),
            Self::BadName { .. } => return None,
            Self::Io { source, .. } => match Errno::from_io_error(source) {
                Some(Errno::IO | Errno::TIMEDOUT | Errno::STALE) => "the file server answers with errors: look at its log".to_owned(),
                _ => return None,
            },
        })
    }
}
