//! What was pulled from Hugging Face's hub: files by repository and commit, and the record that says what they must be.
//!
//! ```text
//! hub/ORG/NAME/pulled.json     every pull, oldest first: commit, revisions that led to it, files with their SHA-256
//! hub/ORG/NAME/COMMIT/…        the files, under the names they have on the hub
//! hub/.parts/…                 what a pull that was cut short has brought so far
//! ```
//!
//! A model is here once the record names it: the record is written last. A record that cannot be read counts as none, which
//! costs another pull and never a wrong model. Does not download.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
#[cfg(feature = "hub")]
use std::fs::File;
#[cfg(feature = "hub")]
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{ModelError, Presence, check_file, layout};
use crate::model_name::{HubName, is_commit, is_plain_path};

/// Directory of everything from the hub, below the models directory.
pub(super) const HUB: &str = "hub";
/// What a pull that was cut short has brought so far, below [`HUB`]. No organisation's name begins with a dot.
#[cfg(feature = "hub")]
pub(super) const PARTS: &str = ".parts";
/// Name of a repository's record.
const RECORD: &str = "pulled.json";
/// Version of the record: another one counts as none.
const FORMAT: u32 = 1;

/// Everything that was pulled from one repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    format: u32,
    /// Oldest first; each commit and file once.
    pulls: Vec<Pull>,
}

/// One model that was pulled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Pull {
    /// Where the repository stood.
    pub(super) commit: String,
    /// Branches and tags that led to this commit when it was pulled; each leads to one commit only.
    pub(super) revisions: BTreeSet<String>,
    /// The GGUF file, if that is the model; else it is the directory.
    pub(super) file: Option<String>,
    /// Whether it is what the hub's name means if no file is named: there, not here, where that is the newest pull.
    pub(super) unnamed: bool,
    /// Every file it is made of, by its path in the repository.
    pub(super) files: BTreeMap<String, Content>,
}

/// What a file must hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Content {
    /// Length.
    pub(super) bytes: u64,
    /// SHA-256, hex.
    pub(super) sha256: String,
}

/// A model from the hub that is on this box, or was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubModel {
    /// Its name with the commit: `ORG/NAME@COMMIT`, with `:FILE` for a GGUF file.
    pub name: HubName,
    /// Branches and tags that led to it.
    pub revisions: Vec<String>,
    /// The GGUF file, or the directory.
    pub path: PathBuf,
    /// Length of all its files, bytes.
    pub bytes: u64,
    /// `sha256:…` of the file, or over the directory's files: what a result made with it names.
    pub fingerprint: String,
    directory: PathBuf,
    contents: BTreeMap<String, Content>,
}

impl HubModel {
    /// What lies in its place, by the lengths of its files.
    pub fn presence(&self) -> Presence {
        let mut presence = Presence::Present;
        for (path, content) in self.files() {
            match fs::metadata(path) {
                Ok(file) if file.is_file() && file.len() == content.bytes => {}
                Ok(file) if file.is_file() => presence = Presence::WrongLength(file.len()),
                _ => return Presence::Missing,
            }
        }
        presence
    }

    /// Where it is, if it is whole by the lengths of its files.
    ///
    /// # Errors
    /// [`ModelError::Missing`], [`ModelError::Corrupt`] with the file.
    pub(super) fn located(&self) -> Result<PathBuf, ModelError> {
        for (path, content) in self.files() {
            match fs::metadata(&path) {
                Ok(file) if file.is_file() && file.len() == content.bytes => {}
                Ok(file) if file.is_file() => {
                    let (expected, got) = (format!("{} bytes", content.bytes), format!("{} bytes", file.len()));
                    return Err(ModelError::Corrupt { path, expected, got });
                }
                _ => return Err(ModelError::Missing { name: self.name.to_string(), path }),
            }
        }
        Ok(self.path.clone())
    }

    /// Reads its files whole and compares their SHA-256.
    ///
    /// # Errors
    /// [`ModelError::Missing`], [`ModelError::Corrupt`] with the file, [`ModelError::Io`].
    pub(super) fn verify(&self) -> Result<PathBuf, ModelError> {
        let path = self.located()?;
        for (path, content) in self.files() {
            if let Some(got) = check_file(&path, &content.sha256)? {
                let (expected, got) = (format!("sha256 {}", content.sha256), format!("sha256 {got}"));
                return Err(ModelError::Corrupt { path, expected, got });
            }
        }
        Ok(path)
    }

    fn files(&self) -> impl Iterator<Item = (PathBuf, &Content)> {
        self.contents.iter().map(|(path, content)| (self.directory.join(path), content))
    }

    /// Its files by their path in the repository.
    #[cfg(feature = "hub")]
    pub(super) fn contents(&self) -> BTreeMap<String, Content> {
        self.contents.clone()
    }

    /// Every name by which [`super::ModelsDir::locate`] might find it: with and without file, with commit, with each
    /// revision, with neither.
    fn names(&self) -> Vec<HubName> {
        let mut revisions = vec![None, self.name.revision.clone()];
        revisions.extend(self.revisions.iter().cloned().map(Some));
        let files = BTreeSet::from([None, self.name.file.clone()]);
        let named = |revision: &Option<String>, file| HubName { revision: revision.clone(), file, ..self.name.clone() };
        revisions.iter().flat_map(|revision| files.iter().map(|file| named(revision, file.clone()))).collect()
    }
}

impl Pull {
    #[cfg(feature = "hub")]
    fn is(&self, other: &Self) -> bool {
        self.commit == other.commit && self.file == other.file
    }

    /// Whether it is meant by `name`, which is of the same repository.
    fn answers_to(&self, name: &HubName) -> bool {
        let revision = name.revision.as_ref();
        revision.is_none_or(|revision| *revision == self.commit || self.revisions.contains(revision))
            && (name.file.is_none() || name.file == self.file)
    }

    /// Nothing in it leads out of its directory, whoever wrote the record.
    fn is_sound(&self) -> bool {
        let listed = self.file.as_ref().is_none_or(|file| self.files.contains_key(file));
        is_commit(&self.commit) && listed && self.files.keys().all(|path| is_plain_path(path)) && !self.files.is_empty()
    }

    fn model(&self, repository: &HubName, directory: &Path) -> HubModel {
        let directory = directory.join(&self.commit);
        HubModel {
            name: HubName { file: self.file.clone(), ..repository.at(&self.commit) },
            revisions: self.revisions.iter().cloned().collect(),
            path: self.file.as_ref().map_or_else(|| directory.clone(), |file| directory.join(file)),
            bytes: self.files.values().map(|content| content.bytes).sum(),
            fingerprint: self.fingerprint(),
            contents: self.files.clone(),
            directory,
        }
    }

    fn fingerprint(&self) -> String {
        match self.file.as_ref().and_then(|file| self.files.get(file)) {
            Some(content) => format!("sha256:{}", content.sha256),
            None => layout::fingerprint(self.files.iter().map(|(path, content)| (path.as_str(), &*content.sha256))),
        }
    }
}

impl Record {
    /// Of the repository whose directory this is; empty if there is none that can be read.
    pub(super) fn read(directory: &Path) -> Self {
        let none = Self { format: FORMAT, pulls: Vec::new() };
        let Ok(text) = fs::read(directory.join(RECORD)) else { return none };
        let read: Option<Self> = serde_json::from_slice(&text).ok();
        read.filter(|record| record.format == FORMAT && record.pulls.iter().all(Pull::is_sound)).unwrap_or(none)
    }

    /// What a file of a commit must hold, by an earlier pull.
    #[cfg(feature = "hub")]
    pub(super) fn content(&self, commit: &str, path: &str) -> Option<Content> {
        self.pulls.iter().filter(|pull| pull.commit == commit).find_map(|pull| pull.files.get(path)).cloned()
    }

    /// Notes a pull as the newest. A branch that has moved on leads to the new commit only.
    #[cfg(feature = "hub")]
    pub(super) fn note(&mut self, mut pull: Pull) {
        for old in self.pulls.iter_mut().filter(|old| old.commit != pull.commit) {
            old.revisions = &old.revisions - &pull.revisions;
        }
        for old in self.pulls.iter_mut().filter(|old| old.commit == pull.commit) {
            old.revisions.extend(pull.revisions.iter().cloned());
            pull.revisions.extend(old.revisions.iter().cloned());
        }
        pull.unnamed |= self.pulls.iter().any(|old| old.is(&pull) && old.unnamed);
        self.pulls.retain(|old| !old.is(&pull));
        self.pulls.push(pull);
    }

    /// Puts the record in its place, whole or not at all.
    #[cfg(feature = "hub")]
    pub(super) fn write(&self, directory: &Path) -> Result<(), ModelError> {
        let (path, fresh) = (directory.join(RECORD), directory.join(".pulled.json.new"));
        let text = serde_json::to_vec_pretty(self).expect("a record is plain data with string keys");
        let write = || {
            let mut file = File::create(&fresh)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&fresh, &path)?;
            File::open(directory)?.sync_all()
        };
        write().map_err(|source: io::Error| ModelError::Io { operation: "write", path: path.clone(), source })
    }
}

/// Where a repository's models lie, below the models directory `root`.
pub(super) fn repository(root: &Path, name: &HubName) -> PathBuf {
    root.join(HUB).join(&name.org).join(&name.name)
}

/// The newest pulled model that `name` means.
pub(super) fn find(root: &Path, name: &HubName) -> Option<HubModel> {
    find_where(root, name, |pull| pull.answers_to(name))
}

fn find_where(root: &Path, name: &HubName, wanted: impl Fn(&Pull) -> bool) -> Option<HubModel> {
    let directory = repository(root, name);
    let record = Record::read(&directory);
    record.pulls.iter().rev().find(|pull| wanted(pull)).map(|pull| pull.model(name, &directory))
}

/// The pulled model of this commit that is exactly this GGUF file, or exactly the directory.
#[cfg(feature = "hub")]
pub(super) fn find_exact(root: &Path, name: &HubName, commit: &str, file: Option<&str>) -> Option<HubModel> {
    find_where(root, name, |pull| pull.commit == commit && pull.file.as_deref() == file)
}

/// The pulled model that the hub would give for `name` at this commit, as far as that is known without asking it.
#[cfg(feature = "hub")]
pub(super) fn find_as_the_hub(root: &Path, name: &HubName, commit: &str) -> Option<HubModel> {
    find_where(root, name, |pull| match &name.file {
        Some(file) => pull.commit == commit && pull.file.as_ref() == Some(file),
        None => pull.commit == commit && pull.unnamed,
    })
}

/// Every model that was pulled, by name.
pub(super) fn all(root: &Path) -> Vec<HubModel> {
    let mut models = Vec::new();
    for org in names_in(&root.join(HUB)) {
        for name in names_in(&root.join(HUB).join(&org)) {
            let Ok(repository) = format!("{org}/{name}").parse::<HubName>() else { continue };
            let directory = self::repository(root, &repository);
            models.extend(Record::read(&directory).pulls.iter().map(|pull| pull.model(&repository, &directory)));
        }
    }
    models.sort_by(|a, b| a.name.cmp(&b.name));
    models
}

/// Every name that finds a model which is whole by the lengths of its files, sorted.
pub(super) fn names(root: &Path) -> Vec<String> {
    let candidates: BTreeSet<HubName> = all(root).iter().flat_map(HubModel::names).collect();
    let found = |name: &HubName| find(root, name).is_some_and(|model| model.presence() == Presence::Present);
    candidates.iter().filter(|name| found(name)).map(ToString::to_string).collect()
}

fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
}
