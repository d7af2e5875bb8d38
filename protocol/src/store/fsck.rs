//! Checks a whole store: artifacts against their names, manifests against artifacts, leftovers, missing directories.
//!
//! Does not repair: the report says what is wrong and an operator decides.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Manifest, Operation, Store, StoreError, hash_of};
use crate::ids::{ArtifactHash, RunId, hex};
use crate::time::UnixMillis;

/// A temporary file older than this belongs to no writer at work, milliseconds: 48 h, longer than any wait for a full store.
const TEMPORARY_AGE_MS: u64 = 48 * 3_600_000;

/// What `fsck` found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsckReport {
    /// Where the store is.
    pub path: String,
    /// Which one it is.
    pub store_uuid: String,
    /// Artifacts read.
    pub blobs: u64,
    /// Their bytes.
    pub blob_bytes: u64,
    /// Manifests read.
    pub manifests: u64,
    /// Artifacts that manifests name, counted once each.
    pub referenced: u64,
    /// Artifacts that no manifest names: of attempts under way, or lost. Not a finding.
    pub unreferenced: u64,
    /// Temporary files young enough to belong to a writer at work. Not a finding.
    pub temporaries: u64,
    /// What is wrong, by path.
    pub findings: Vec<Finding>,
}

/// One thing wrong.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Finding {
    /// The file or directory, below the root.
    pub path: String,
    /// What is wrong with it.
    pub kind: FindingKind,
    /// Expected and got, in words.
    pub detail: String,
}

/// Types of finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FindingKind {
    /// An artifact does not match its name.
    CorruptBlob,
    /// It cannot be read.
    Unreadable,
    /// A manifest names an artifact that is not there.
    MissingBlob,
    /// A manifest and an artifact disagree on its length.
    WrongLength,
    /// A manifest does not read, or lies under another shard's name.
    BadManifest,
    /// A directory of the layout is missing.
    MissingDirectory,
    /// A temporary file that nobody can be writing any more.
    OldTemporary,
    /// A file that the layout does not know.
    Stray,
}

impl FsckReport {
    /// Nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.findings.is_empty()
    }
}

pub(super) fn run(store: &Store, now: UnixMillis) -> Result<FsckReport, StoreError> {
    store.check()?;
    let mut walk = Walk {
        store,
        now,
        blobs: BTreeMap::new(),
        report: FsckReport {
            path: store.root.display().to_string(),
            store_uuid: store.uuid.clone(),
            blobs: 0,
            blob_bytes: 0,
            manifests: 0,
            referenced: 0,
            unreferenced: 0,
            temporaries: 0,
            findings: Vec::new(),
        },
    };
    walk.root()?;
    for prefix in 0..=u8::MAX {
        walk.blob_directory(&format!("blobs/{}", hex(&[prefix])))?;
    }
    walk.manifests()?;
    let mut report = walk.report;
    report.unreferenced = walk.blobs.values().filter(|blob| !blob.referenced).count() as u64;
    report.referenced = report.blobs - report.unreferenced;
    report.findings.sort();
    Ok(report)
}

struct Blob {
    bytes: u64,
    referenced: bool,
}

struct Walk<'a> {
    store: &'a Store,
    now: UnixMillis,
    blobs: BTreeMap<ArtifactHash, Blob>,
    report: FsckReport,
}

impl Walk<'_> {
    fn find(&mut self, kind: FindingKind, path: &str, detail: impl Into<String>) {
        self.report.findings.push(Finding { path: path.to_owned(), kind, detail: detail.into() });
    }

    /// Names in a directory of the layout; `None` if it is missing, which is then a finding.
    fn names(&mut self, directory: &str) -> Result<Option<Vec<String>>, StoreError> {
        let path = self.store.root.join(directory);
        match self.store.disk.list(&path) {
            Ok(names) => Ok(Some(names)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                self.find(FindingKind::MissingDirectory, directory, "made by `bonepile init`, and gone");
                Ok(None)
            }
            Err(error) => Err(StoreError::at(Operation::List, &path)(error)),
        }
    }

    fn root(&mut self) -> Result<(), StoreError> {
        const KNOWN: [&str; 5] = [super::SENTINEL, "blobs", "manifests", "reports", "trash"];
        for name in self.names("")?.unwrap_or_default() {
            if !KNOWN.contains(&name.as_str()) && !self.leftover(&name, &name) {
                self.find(FindingKind::Stray, &name, "not a part of the layout");
            }
        }
        for directory in ["reports", "trash"] {
            self.names(directory)?;
        }
        Ok(())
    }

    fn blob_directory(&mut self, directory: &str) -> Result<(), StoreError> {
        for name in self.names(directory)?.unwrap_or_default() {
            let path = format!("{directory}/{name}");
            if self.leftover(&name, &path) {
                continue;
            }
            match name.parse::<ArtifactHash>() {
                Ok(hash) if directory.ends_with(&name[..2]) => self.blob(hash, &path),
                _ => self.find(FindingKind::Stray, &path, "not the name of an artifact of this directory"),
            }
        }
        Ok(())
    }

    fn blob(&mut self, hash: ArtifactHash, path: &str) {
        let opened = self.store.disk.open(&self.store.root.join(path));
        match opened.and_then(|mut file| hash_of(&mut file)) {
            Ok((got, bytes)) => {
                self.report.blobs += 1;
                self.report.blob_bytes += bytes;
                self.blobs.insert(hash, Blob { bytes, referenced: false });
                if got != hash {
                    self.find(FindingKind::CorruptBlob, path, format!("its {bytes} bytes hash to {got}"));
                }
            }
            Err(error) => self.find(FindingKind::Unreadable, path, error.to_string()),
        }
    }

    fn manifests(&mut self) -> Result<(), StoreError> {
        for run in self.names("manifests")?.unwrap_or_default() {
            let directory = format!("manifests/{run}");
            if run.parse::<RunId>().is_err() {
                self.find(FindingKind::Stray, &directory, "not the name of a run");
                continue;
            }
            for name in self.names(&directory)?.unwrap_or_default() {
                let path = format!("{directory}/{name}");
                if !self.leftover(&name, &path) {
                    self.manifest(&name, &path);
                }
            }
        }
        Ok(())
    }

    fn manifest(&mut self, name: &str, path: &str) {
        self.report.manifests += 1;
        let mut text = Vec::new();
        let opened = self.store.disk.open(&self.store.root.join(path));
        if let Err(error) = opened.and_then(|mut file| file.read_to_end(&mut text)) {
            return self.find(FindingKind::Unreadable, path, error.to_string());
        }
        let manifest: Manifest = match serde_json::from_slice(&text) {
            Ok(manifest) => manifest,
            Err(error) => return self.find(FindingKind::BadManifest, path, error.to_string()),
        };
        if name != format!("{}.json", manifest.shard) {
            self.find(FindingKind::BadManifest, path, format!("is of shard {}", manifest.shard));
        }
        for output in manifest.outputs().chain(&manifest.inputs) {
            match self.blobs.get_mut(&output.hash) {
                Some(blob) => {
                    blob.referenced = true;
                    let bytes = blob.bytes;
                    let unknown = output.bytes == 0 && manifest.inputs.contains(output);
                    if bytes != output.bytes && !unknown {
                        let detail =
                            format!("{} {}: {} bytes here, {bytes} there", output.name, output.hash, output.bytes);
                        self.find(FindingKind::WrongLength, path, detail);
                    }
                }
                None => self.find(FindingKind::MissingBlob, path, format!("{} {}", output.name, output.hash)),
            }
        }
    }

    /// Deals with temporary files, and with those that NFS keeps for who still has them open; `false` for any other file.
    fn leftover(&mut self, name: &str, path: &str) -> bool {
        if name.starts_with(".nfs") {
            return true;
        }
        if !name.starts_with(".tmp-") {
            return false;
        }
        let age_ms = self.age_ms(&self.store.root.join(path));
        if age_ms > TEMPORARY_AGE_MS {
            let detail = format!("{} hours old: its writer is gone", age_ms / 3_600_000);
            self.find(FindingKind::OldTemporary, path, detail);
        } else {
            self.report.temporaries += 1;
        }
        true
    }

    /// 0 where it cannot be told, for a file that vanished meanwhile, say.
    fn age_ms(&self, path: &Path) -> u64 {
        let modified = self.store.disk.open(path).and_then(|file| file.metadata()?.modified());
        modified.map_or(0, |modified| self.now.since_ms(modified.into()))
    }
}
