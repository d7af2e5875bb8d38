//! The results store: a directory, on NFS in a cluster, of immutable files named by their content.
//!
//! ```text
//! <root>/.bonepile-store               sentinel: {store_uuid, layout, created}
//! <root>/blobs/ab/<64 hex>             artifacts, named by BLAKE3; the 256 directories are made by `init`, never later
//! <root>/blobs/ab/.tmp-<writer>-<nonce>
//! <root>/manifests/<run>/<shard>.json  what made which artifacts; written last, so what a manifest names exists
//! <root>/reports/<run>/…               pages for people
//! <root>/trash/                        what an operator takes out
//! ```
//!
//! One writer a file; no append, no lock, no database; a name never changes its content. A file is written under a temporary
//! name, synced, linked to its name (which refuses to overwrite), and its directory synced: what can be seen is complete.
//! After a failed sync a file is never synced again: everything is written anew from the source.
//!
//! Does not collect garbage, does not queue: a hard mount may hang in any of these calls, so callers keep them off their
//! network threads. Nobody else opens files below the root for writing.

mod disk;
mod error;
mod fsck;
mod manifest;
#[cfg(test)]
mod tests;
#[cfg(feature = "quic")]
pub mod threads;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};

pub use self::disk::{Disk, DiskFile, RealDisk};
pub use self::error::{Operation, StoreError};
pub use self::fsck::{Finding, FindingKind, FsckReport};
pub use self::manifest::{Manifest, SeatRecord};
use crate::ids::{ArtifactHash, RunId, ShardId, hex};
use crate::time::UnixMillis;

/// Name of the file that tells a store from an empty mount point.
pub const SENTINEL: &str = ".bonepile-store";
/// Version of the layout that this build reads and writes.
pub const LAYOUT: u32 = 1;
/// Tries of one publication when the server answers with an error after which nothing is known.
const PUBLISH_TRIES: u32 = 3;
/// Bytes moved at once while copying and hashing: large enough for an NFS `wsize`, small enough for any box.
const COPY_BYTES: usize = 1 << 20;
/// Longest blob that is hashed again when its name is already taken, bytes; for a longer one its length is compared.
const RECHECK_BYTES_MAX: u64 = 16 << 20;

/// What the sentinel file holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sentinel {
    /// Random, made by [`Store::init`]: the store's identity wherever it is mounted.
    pub store_uuid: String,
    /// [`LAYOUT`] of the build that made it.
    pub layout: u32,
    /// When it was made.
    pub created: UnixMillis,
}

/// An opened store. Cheap to clone; calls block, and may be made from several threads.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
    uuid: String,
    writer: String,
    disk: Arc<dyn Disk>,
}

impl Store {
    /// Makes an empty store at `root`, a directory that does not exist yet or is empty, and opens it.
    ///
    /// # Errors
    /// [`StoreError::NotEmpty`] if something lies there, a store included.
    pub fn init(root: &Path, created: UnixMillis) -> Result<Self, StoreError> {
        Self::init_on(&(Arc::new(RealDisk) as Arc<dyn Disk>), root, created)
    }

    /// [`Store::init`] on a given disk.
    pub fn init_on(disk: &Arc<dyn Disk>, root: &Path, created: UnixMillis) -> Result<Self, StoreError> {
        let at = |operation, path: &Path| StoreError::at(operation, path);
        disk.create_dir_all(root).map_err(at(Operation::CreateDirectory, root))?;
        let entries = disk.list(root).map_err(at(Operation::List, root))?;
        if let Some(entry) = entries.first() {
            return Err(StoreError::NotEmpty { path: root.to_owned(), entry: entry.clone() });
        }
        for top in ["blobs", "manifests", "reports", "trash"] {
            let path = root.join(top);
            disk.create_dir_all(&path).map_err(at(Operation::CreateDirectory, &path))?;
        }
        for prefix in 0..=u8::MAX {
            let path = root.join("blobs").join(hex(&[prefix]));
            disk.create_dir_all(&path).map_err(at(Operation::CreateDirectory, &path))?;
        }
        let blobs = root.join("blobs");
        disk.sync_dir(&blobs).map_err(at(Operation::SyncDirectory, &blobs))?;

        // Last, so that a store cut short while it was made is not taken for one.
        let sentinel = Sentinel { store_uuid: random_uuid(), layout: LAYOUT, created };
        let store = Self {
            root: root.to_owned(),
            uuid: sentinel.store_uuid.clone(),
            writer: default_writer(),
            disk: disk.clone(),
        };
        let text = serde_json::to_vec_pretty(&sentinel).expect("a sentinel is plain data");
        store.place(&root.join(SENTINEL), &mut text.as_slice(), None)?;
        Ok(store)
    }

    /// Opens the store at `root`; with `expected_uuid`, only if it is that one.
    ///
    /// # Errors
    /// [`StoreError::NotMounted`] without a sentinel, [`StoreError::WrongStore`], [`StoreError::Layout`].
    pub fn open(root: &Path, expected_uuid: Option<&str>) -> Result<Self, StoreError> {
        Self::open_on(Arc::new(RealDisk), root, expected_uuid)
    }

    /// [`Store::open`] on a given disk.
    pub fn open_on(disk: Arc<dyn Disk>, root: &Path, expected_uuid: Option<&str>) -> Result<Self, StoreError> {
        let sentinel = read_sentinel(disk.as_ref(), root)?;
        if let Some(expected) = expected_uuid.filter(|expected| *expected != sentinel.store_uuid) {
            return Err(StoreError::WrongStore {
                path: root.to_owned(),
                expected: expected.to_owned(),
                got: sentinel.store_uuid,
            });
        }
        Ok(Self { root: root.to_owned(), uuid: sentinel.store_uuid, writer: default_writer(), disk })
    }

    /// The same store, with `writer` (a worker's id) in the names of temporary files.
    #[must_use]
    pub fn with_writer(mut self, writer: impl Into<String>) -> Self {
        self.writer = writer.into();
        self
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Its identity, as in the sentinel.
    pub fn uuid(&self) -> &str {
        &self.uuid
    }

    /// Reads the sentinel again: is this still the store that was opened? Every publication asks first, because an unmounted
    /// mount point takes writes, too.
    ///
    /// # Errors
    /// [`StoreError::NotMounted`], [`StoreError::WrongStore`], [`StoreError::Layout`], [`StoreError::Io`].
    pub fn check(&self) -> Result<(), StoreError> {
        Self::open_on(self.disk.clone(), &self.root, Some(&self.uuid)).map(drop)
    }

    /// Where the artifact `hash` is, or would be.
    pub fn blob_path(&self, hash: &ArtifactHash) -> PathBuf {
        let name = hash.to_string();
        self.root.join("blobs").join(&name[..2]).join(name)
    }

    /// Publishes the bytes of the file at `source`; returns their name and length. Reads the file twice: for its name, then for
    /// the copy, which must have that name.
    ///
    /// # Errors
    /// Those of the class that the errno belongs to; whatever comes, no incomplete artifact can be seen and `source` is as it was.
    pub fn publish_file(&self, source: &Path) -> Result<(ArtifactHash, u64), StoreError> {
        let at = || StoreError::at(Operation::ReadSource, source);
        let mut file = File::open(source).map_err(at())?;
        let (hash, bytes) = hash_of(&mut file).map_err(at())?;
        self.publish_with(hash, bytes, || {
            let mut file = file.try_clone().map_err(at())?;
            file.seek(SeekFrom::Start(0)).map_err(at())?;
            Ok(file)
        })?;
        Ok((hash, bytes))
    }

    /// Publishes `bytes`; returns their name and length.
    ///
    /// # Errors
    /// As [`Store::publish_file`].
    pub fn publish_bytes(&self, bytes: &[u8]) -> Result<(ArtifactHash, u64), StoreError> {
        let hash = ArtifactHash::of(bytes);
        let len = bytes.len() as u64;
        self.publish_with(hash, len, || Ok(bytes))?;
        Ok((hash, len))
    }

    /// Whether the artifact `hash` is there, by opening it.
    ///
    /// # Errors
    /// [`StoreError::Io`] and its kin; an absent artifact is `Ok(false)`.
    pub fn contains(&self, hash: &ArtifactHash) -> Result<bool, StoreError> {
        let path = self.blob_path(hash);
        match self.disk.open(&path) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(StoreError::at(Operation::Open, &path)(error)),
        }
    }

    /// Opens the artifact `hash` after reading it whole and finding that it matches its name; the file stands at its start.
    ///
    /// # Errors
    /// [`StoreError::Missing`], [`StoreError::Corrupt`].
    pub fn open_verified(&self, hash: &ArtifactHash) -> Result<File, StoreError> {
        let path = self.blob_path(hash);
        let mut file = self.open_blob(hash, &path)?;
        let (got, _) = hash_of(&mut file).map_err(StoreError::at(Operation::Read, &path))?;
        self.expect_hash(&path, *hash, got)?;
        file.seek(SeekFrom::Start(0)).map_err(StoreError::at(Operation::Read, &path))?;
        Ok(file)
    }

    /// The bytes of the artifact `hash`, which match its name.
    ///
    /// # Errors
    /// [`StoreError::Missing`], [`StoreError::Corrupt`].
    pub fn read_verified(&self, hash: &ArtifactHash) -> Result<Vec<u8>, StoreError> {
        let path = self.blob_path(hash);
        let mut bytes = Vec::new();
        let mut file = self.open_blob(hash, &path)?;
        file.read_to_end(&mut bytes).map_err(StoreError::at(Operation::Read, &path))?;
        self.expect_hash(&path, *hash, ArtifactHash::of(&bytes))?;
        Ok(bytes)
    }

    /// Where the manifest of `shard` is, or would be.
    pub fn manifest_path(&self, shard: ShardId) -> PathBuf {
        self.manifests_dir(shard.run).join(format!("{shard}.json"))
    }

    /// Writes a shard's manifest; `false` if the manifest of the same attempt is already there, which then stands.
    ///
    /// # Errors
    /// [`StoreError::ManifestOfAnotherAttempt`]; else as [`Store::publish_bytes`].
    pub fn write_manifest(&self, manifest: &Manifest) -> Result<bool, StoreError> {
        self.check()?;
        let path = self.manifest_path(manifest.shard);
        let directory = self.manifests_dir(manifest.shard.run);
        self.make_dir(&directory)?;
        let mut text = serde_json::to_vec_pretty(manifest).expect("a manifest is plain data");
        text.push(b'\n');
        if self.retrying(|| self.place(&path, &mut text.as_slice(), None))? {
            return Ok(true);
        }
        let there = self.read_manifest(&path)?;
        if there.fence == manifest.fence {
            return Ok(false);
        }
        Err(StoreError::ManifestOfAnotherAttempt { path, there: there.fence, given: manifest.fence })
    }

    /// The manifests of `run`, by shard. A run without any has none.
    ///
    /// # Errors
    /// [`StoreError::BadManifest`] if one does not read.
    pub fn read_manifests(&self, run: RunId) -> Result<Vec<Manifest>, StoreError> {
        self.check()?;
        let directory = self.manifests_dir(run);
        let names = match self.disk.list(&directory) {
            Ok(names) => names,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(StoreError::at(Operation::List, &directory)(error)),
        };
        let mut manifests = names
            .iter()
            .filter(|name| name.ends_with(".json") && !name.starts_with('.'))
            .map(|name| self.read_manifest(&directory.join(name)))
            .collect::<Result<Vec<_>, _>>()?;
        manifests.sort_by_key(|manifest| manifest.shard);
        Ok(manifests)
    }

    /// Writes a page for people and returns where it is. A name never changes its content: where `report.html` holds other bytes
    /// already, the new page becomes `report-2.html`, and so on.
    ///
    /// # Errors
    /// [`StoreError::BadName`] unless `name` is a plain file name; else as [`Store::publish_bytes`].
    pub fn write_report(&self, run: RunId, name: &str, bytes: &[u8]) -> Result<PathBuf, StoreError> {
        if name.is_empty() || name.starts_with('.') || name.contains(['/', '\\', '\0']) {
            return Err(StoreError::BadName { name: name.to_owned() });
        }
        self.check()?;
        let directory = self.root.join("reports").join(run.to_string());
        self.make_dir(&directory)?;
        let (stem, extension) = name.rsplit_once('.').map_or((name, ""), |(stem, _)| (stem, &name[stem.len()..]));
        let mut version = 1;
        loop {
            let path = match version {
                1 => directory.join(name),
                _ => directory.join(format!("{stem}-{version}{extension}")),
            };
            if self.retrying(|| self.place(&path, &mut { bytes }, None))? {
                return Ok(path);
            }
            let mut there = Vec::new();
            let mut file = self.disk.open(&path).map_err(StoreError::at(Operation::Open, &path))?;
            file.read_to_end(&mut there).map_err(StoreError::at(Operation::Read, &path))?;
            if there == bytes {
                return Ok(path);
            }
            version += 1;
        }
    }

    /// Writes files for people into a folder beside a run's pages and returns where it is. Where the folder has one of them with
    /// other bytes already, all go into `name-2`, and so on: a folder is of one moment.
    ///
    /// # Errors
    /// [`StoreError::BadName`] unless `name` and the files' paths are plain; else as [`Store::publish_bytes`].
    pub fn write_report_folder(
        &self,
        run: RunId,
        name: &str,
        files: &[(String, Vec<u8>)],
    ) -> Result<PathBuf, StoreError> {
        let plain = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.contains(['\\', '\0']);
        let paths = files.iter().map(|(path, _)| path.as_str());
        if let Some(bad) = paths.chain([name]).find(|path| !path.split('/').all(plain)) {
            return Err(StoreError::BadName { name: bad.to_owned() });
        }
        self.check()?;
        let mut version = 1;
        loop {
            let name = if version == 1 { name.to_owned() } else { format!("{name}-{version}") };
            let folder = self.root.join("reports").join(run.to_string()).join(name);
            let mut others = false;
            for (path, bytes) in files {
                others |= self.holds_others(&folder.join(path), bytes)?;
            }
            if others {
                version += 1;
                continue;
            }
            for (path, bytes) in files {
                let path = folder.join(path);
                let reports = self.root.join("reports");
                let mut missing: Vec<_> = path.ancestors().skip(1).take_while(|above| **above != reports).collect();
                while let Some(directory) = missing.pop() {
                    self.make_dir(directory)?;
                }
                self.retrying(|| self.place(&path, &mut bytes.as_slice(), None))?;
            }
            return Ok(folder);
        }
    }

    /// Whether a file is there with other bytes.
    fn holds_others(&self, path: &Path, bytes: &[u8]) -> Result<bool, StoreError> {
        let mut there = Vec::new();
        match self.disk.open(path) {
            Ok(mut file) => {
                file.read_to_end(&mut there).map_err(StoreError::at(Operation::Read, path))?;
                Ok(there != bytes)
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(StoreError::at(Operation::Open, path)(error)),
        }
    }

    /// Checks everything: each artifact against its name, each manifest against the artifacts, leftovers, the sentinel. Reads
    /// the whole store. `now` tells old temporary files from those of a writer at work.
    ///
    /// # Errors
    /// Only what keeps it from looking; what is wrong with the store's content is in the report.
    pub fn fsck(&self, now: UnixMillis) -> Result<FsckReport, StoreError> {
        fsck::run(self, now)
    }

    fn manifests_dir(&self, run: RunId) -> PathBuf {
        self.root.join("manifests").join(run.to_string())
    }

    fn read_manifest(&self, path: &Path) -> Result<Manifest, StoreError> {
        let mut file = self.disk.open(path).map_err(StoreError::at(Operation::Open, path))?;
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(StoreError::at(Operation::Read, path))?;
        serde_json::from_slice(&text)
            .map_err(|error| StoreError::BadManifest { path: path.to_owned(), detail: error.to_string() })
    }

    fn open_blob(&self, hash: &ArtifactHash, path: &Path) -> Result<File, StoreError> {
        self.disk.open(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => StoreError::Missing { name: *hash, path: path.to_owned() },
            _ => StoreError::at(Operation::Open, path)(error),
        })
    }

    fn expect_hash(&self, path: &Path, expected: ArtifactHash, got: ArtifactHash) -> Result<(), StoreError> {
        if got == expected {
            return Ok(());
        }
        Err(StoreError::Corrupt { path: path.to_owned(), expected: expected.to_string(), got: got.to_string() })
    }

    fn publish_with<R: Read>(
        &self,
        hash: ArtifactHash,
        bytes: u64,
        mut source: impl FnMut() -> Result<R, StoreError>,
    ) -> Result<(), StoreError> {
        self.check()?;
        let path = self.blob_path(&hash);
        let written = self.retrying(|| self.place(&path, &mut source()?, Some(hash)))?;
        if written {
            return Ok(());
        }
        self.check_present(&path, hash, bytes)
    }

    /// The name was taken: is what lies there what was meant?
    fn check_present(&self, path: &Path, hash: ArtifactHash, bytes: u64) -> Result<(), StoreError> {
        let mut file = self.disk.open(path).map_err(StoreError::at(Operation::Open, path))?;
        let there = file.metadata().map_err(StoreError::at(Operation::Read, path))?.len();
        if there != bytes {
            let (expected, got) = (format!("{bytes} bytes"), format!("{there} bytes"));
            return Err(StoreError::Corrupt { path: path.to_owned(), expected, got });
        }
        if bytes <= RECHECK_BYTES_MAX {
            let (got, _) = hash_of(&mut file).map_err(StoreError::at(Operation::Read, path))?;
            self.expect_hash(path, hash, got)?;
        }
        Ok(())
    }

    fn make_dir(&self, directory: &Path) -> Result<(), StoreError> {
        match self.disk.create_dir(directory) {
            Ok(()) => {
                let parent = directory.parent().unwrap_or(&self.root);
                self.disk.sync_dir(parent).map_err(StoreError::at(Operation::SyncDirectory, parent))
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(StoreError::at(Operation::CreateDirectory, directory)(error)),
        }
    }

    /// Server trouble leaves it unknown what was written: then everything is written again under a new temporary name.
    fn retrying<T>(&self, mut place: impl FnMut() -> Result<T, StoreError>) -> Result<T, StoreError> {
        let mut tries = 1;
        loop {
            match place() {
                Err(error) if error.outcome_unknown() && tries < PUBLISH_TRIES => {
                    self.check()?;
                    tries += 1;
                }
                done => return done,
            }
        }
    }

    /// One try: temporary file, sync, link to `path`, sync of the directory. `false` if the name was already taken.
    fn place(&self, path: &Path, source: &mut dyn Read, expected: Option<ArtifactHash>) -> Result<bool, StoreError> {
        let directory = path.parent().unwrap_or(&self.root);
        let temporary = directory.join(format!(".tmp-{}-{}", self.writer, nonce()));
        let outcome = self.fill(&temporary, source, expected).and_then(|()| match self.disk.link(&temporary, path) {
            Ok(()) => Ok(true),
            // Also what a retransmitted request answers though the first one worked: the caller looks at what is there.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(StoreError::at(Operation::Link, path)(error)),
        });
        // On a full or failing disk this may fail as well; what stays behind is invisible and fsck names it.
        let removed = self.disk.remove(&temporary).map_err(StoreError::at(Operation::Remove, &temporary));
        let fresh = outcome?;
        // The directory is synced also where the name was taken: whoever took it may not have come that far.
        self.disk.sync_dir(directory).map_err(StoreError::at(Operation::SyncDirectory, directory))?;
        match removed {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(fresh),
        }
    }

    fn fill(&self, temporary: &Path, source: &mut dyn Read, expected: Option<ArtifactHash>) -> Result<(), StoreError> {
        let at = |operation| StoreError::at(operation, temporary);
        let mut file = self.disk.create_new(temporary).map_err(at(Operation::Create))?;
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; COPY_BYTES];
        loop {
            let got = read_some(source, &mut buffer).map_err(at(Operation::ReadSource))?;
            if got == 0 {
                break;
            }
            hasher.update(&buffer[..got]);
            file.write_all(&buffer[..got]).map_err(at(Operation::Write))?;
        }
        if let Some(expected) = expected {
            let got = ArtifactHash(*hasher.finalize().as_bytes());
            self.expect_hash(temporary, expected, got)?;
        }
        file.sync_all().map_err(at(Operation::Sync))
    }
}

fn read_sentinel(disk: &dyn Disk, root: &Path) -> Result<Sentinel, StoreError> {
    let path = root.join(SENTINEL);
    let mut text = Vec::new();
    let read = disk.open(&path).and_then(|mut file| file.read_to_end(&mut text));
    match read {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(StoreError::NotMounted { path: root.to_owned() });
        }
        Err(error) => return Err(StoreError::at(Operation::Open, &path)(error)),
    }
    let sentinel: Sentinel = serde_json::from_slice(&text).map_err(|error| StoreError::Corrupt {
        path: path.clone(),
        expected: "a store's sentinel".to_owned(),
        got: error.to_string(),
    })?;
    if sentinel.layout != LAYOUT {
        return Err(StoreError::Layout { path: root.to_owned(), got: sentinel.layout, supported: LAYOUT });
    }
    Ok(sentinel)
}

/// Name and length of what is left to read.
fn hash_of(source: &mut dyn Read) -> io::Result<(ArtifactHash, u64)> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; COPY_BYTES];
    loop {
        match read_some(source, &mut buffer)? {
            0 => return Ok((ArtifactHash(*hasher.finalize().as_bytes()), hasher.count())),
            got => hasher.update(&buffer[..got]),
        };
    }
}

fn read_some(source: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match source.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

fn default_writer() -> String {
    format!("p{}", std::process::id())
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).expect("the system's random source answers");
    bytes
}

fn nonce() -> String {
    hex(&random::<8>())
}

/// A version 4 UUID.
fn random_uuid() -> String {
    let mut bytes = random::<16>();
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let text = hex(&bytes);
    format!("{}-{}-{}-{}-{}", &text[..8], &text[8..12], &text[12..16], &text[16..20], &text[20..])
}
