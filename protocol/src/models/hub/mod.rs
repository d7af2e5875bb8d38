//! Models from Hugging Face's hub: asked for by name, brought file by file, checked, put below `hub/` in the models directory.
//!
//! A name leads to a commit, the commit to a list of files with digests. Files are brought into `hub/.parts`, checked, moved
//! to `hub/ORG/NAME/COMMIT/`, and named in the record last. Whatever is cut short leaves parts that the next pull goes on with.
//!
//! Blocks for as long as it takes. Does not decide which models are needed.

mod client;
mod config;
mod error;
mod fetch;
mod plan;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use self::client::{Client, MAIN, Refusal};
pub use self::config::HubConfig;
pub use self::error::HubError;
use self::fetch::{Fetch, part_name};
use self::plan::{Listing, Plan, Wanted};
use super::pulled::{self, Content, HUB, HubModel, PARTS, Pull, Record};
use super::{ModelError, ModelsDir, check_file, layout};
use crate::model_name::{HubName, is_commit};

/// Tries of the first request before the hub counts as unreachable.
const LISTING_TRIES: u32 = 3;

/// What a pull from the hub is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HubEvent<'a> {
    /// The hub has answered: this is what is brought.
    Found {
        /// The commit that the revision leads to.
        commit: &'a str,
        /// The licence that the hub names, as in `apache-2.0`.
        licence: Option<&'a str>,
        /// Files in all; where weights are in shards, those besides.
        files: usize,
    },
    /// The model is here and whole: nothing to do.
    Present,
    /// File `index` of `count` is here.
    Kept {
        /// From 1.
        index: usize,
        /// Files in all.
        count: usize,
        /// Its path in the repository.
        file: &'a str,
    },
    /// File `index` of `count` is being fetched.
    Fetching {
        /// From 1.
        index: usize,
        /// Files in all.
        count: usize,
        /// Its path in the repository.
        file: &'a str,
        /// Bytes here so far.
        bytes: u64,
        /// Bytes in all, where that is known.
        total: Option<u64>,
    },
    /// A connection ended too early; another is made.
    Again {
        /// The file.
        file: &'a str,
        /// What happened.
        why: &'a str,
    },
}

impl ModelsDir {
    /// Brings a model from the hub if it is not here whole. A whole commit's name asks nobody if it is. Tells `progress` what
    /// happens. Another pull into the same directory waits.
    ///
    /// # Errors
    /// [`ModelError::Hub`], [`ModelError::Corrupt`], [`ModelError::Io`]. What came so far is kept and used by the next pull.
    pub fn pull_hub(
        &self,
        hub: &HubConfig,
        name: &HubName,
        progress: &mut dyn FnMut(HubEvent<'_>),
    ) -> Result<HubModel, ModelError> {
        let parts = self.root.join(HUB).join(PARTS);
        fs::create_dir_all(&parts).map_err(ModelError::io("create", &parts))?;
        let _lock = lock(&parts)?;
        if let Some(commit) = name.revision.as_deref().filter(|revision| is_commit(revision))
            && let Some(model) = pulled::find_as_the_hub(&self.root, name, commit)
            && model.verify().is_ok()
        {
            progress(HubEvent::Present);
            return Ok(model);
        }
        let client = Client::new(hub)?;
        let listing = listing(&client, name)?;
        let commit = listing.commit(&name.repository())?;
        let directory = pulled::repository(&self.root, name);
        let job = Job { models: self, client, name, listing: &listing, commit, directory: &directory, parts: &parts };
        job.run(progress)
    }
}

/// One pull, once the hub has told what there is.
struct Job<'a> {
    models: &'a ModelsDir,
    client: Client,
    name: &'a HubName,
    listing: &'a Listing,
    commit: &'a str,
    /// The repository's.
    directory: &'a Path,
    parts: &'a Path,
}

impl Job<'_> {
    fn run(&self, progress: &mut dyn FnMut(HubEvent<'_>)) -> Result<HubModel, ModelError> {
        let plan = self.listing.plan(self.name)?;
        let file = match &plan {
            Plan::Gguf(file) => Some(file.path.clone()),
            Plan::Whole(_) | Plan::Sharded { .. } => None,
        };
        let find = || pulled::find_exact(&self.models.root, self.name, self.commit, file.as_deref());
        let here = find().filter(|model| model.verify().is_ok());
        let files = match here {
            Some(model) => {
                progress(HubEvent::Present);
                model.contents()
            }
            None => {
                let (commit, licence) = (self.commit, self.listing.licence());
                progress(HubEvent::Found { commit, licence, files: plan.len() });
                self.bring_all(plan, progress)?
            }
        };
        let revision = self.name.revision.as_deref().unwrap_or(MAIN);
        let revisions = Some(revision).filter(|revision| !is_commit(revision)).map(str::to_owned);
        let mut record = Record::read(self.directory);
        let revisions: BTreeSet<String> = revisions.into_iter().collect();
        let (commit, unnamed) = (self.commit.to_owned(), self.name.file.is_none());
        record.note(Pull { commit, revisions, file: file.clone(), unnamed, files });
        record.write(self.directory)?;
        find().ok_or_else(|| ModelError::Missing { name: self.name.to_string(), path: self.directory.to_owned() })
    }

    /// Brings every file of the plan, then puts all in their places.
    fn bring_all(
        &self,
        plan: Plan,
        progress: &mut dyn FnMut(HubEvent<'_>),
    ) -> Result<BTreeMap<String, Content>, ModelError> {
        let mut brought = Vec::new();
        let wanted = match plan {
            Plan::Gguf(file) => vec![file],
            Plan::Whole(files) => files,
            Plan::Sharded { index, others } => {
                // Which files hold the weights is written in the index.
                let (path, content) = self.bring(&index, (1, 1), progress)?;
                let text = fs::read(&path).map_err(ModelError::io("read", &path))?;
                let names = layout::shards(&text).map_err(|what| {
                    let what = format!("{} {what}", index.path);
                    HubError::NoModel { repository: self.name.repository(), what }
                })?;
                brought.push((index.path, path, content));
                let mut files = others;
                files.extend(self.listing.shards(self.name, names.iter())?);
                files
            }
        };
        self.check_room(&wanted)?;
        for (index, file) in (1..).zip(&wanted) {
            let (path, content) = self.bring(file, (index, wanted.len()), progress)?;
            brought.push((file.path.clone(), path, content));
        }
        // What makes a directory a model comes last.
        brought.sort_by_key(|(path, _, _)| path == layout::CONFIG);
        let directory = self.directory.join(self.commit);
        for (path, part, _) in &brought {
            place(part, &directory.join(path))?;
        }
        Ok(brought.into_iter().map(|(path, _, content)| (path, content)).collect())
    }

    /// Where a file lies now, checked: in its place from an earlier pull, or as a part.
    fn bring(
        &self,
        file: &Wanted,
        place: (usize, usize),
        progress: &mut dyn FnMut(HubEvent<'_>),
    ) -> Result<(PathBuf, Content), ModelError> {
        let (index, count) = place;
        let old = Record::read(self.directory).content(self.commit, &file.path);
        let path = self.directory.join(self.commit).join(&file.path);
        if let Some(content) = old.filter(|_| path.is_file())
            && check_file(&path, &content.sha256)?.is_none()
        {
            progress(HubEvent::Kept { index, count, file: &file.path });
            return Ok((path, content));
        }
        let (client, name, commit, parts) = (&self.client, self.name, self.commit, self.parts);
        Fetch { client, name, commit, file, place, parts }.run(progress)
    }

    /// Refuses at once what would fill the disk hours later.
    fn check_room(&self, files: &[Wanted]) -> Result<(), ModelError> {
        let total: u64 = files.iter().filter_map(|file| file.bytes).sum();
        let here: u64 = files.iter().map(|file| self.here(file)).sum();
        let need = total.saturating_sub(here);
        let Ok(disk) = rustix::fs::statvfs(self.parts) else { return Ok(()) };
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        match need > free {
            true => Err(HubError::NoRoom { path: self.models.root.display().to_string(), free, need }.into()),
            false => Ok(()),
        }
    }

    fn here(&self, file: &Wanted) -> u64 {
        let length = |path: PathBuf| fs::metadata(path).map_or(0, |file| file.len());
        let part = length(self.parts.join(part_name(self.name, self.commit, file)));
        part.max(length(self.directory.join(self.commit).join(&file.path)))
    }
}

/// The hub's list, with some patience.
fn listing(client: &Client, name: &HubName) -> Result<Listing, HubError> {
    let mut tries = 1;
    loop {
        match client.listing(name) {
            Ok(listing) => return Ok(listing),
            Err(Refusal::Final(error)) => return Err(error),
            Err(Refusal::Busy(error)) if tries == LISTING_TRIES => return Err(error),
            Err(Refusal::Network(detail)) if tries == LISTING_TRIES => {
                return Err(HubError::Unreachable { endpoint: client.config().endpoint.clone(), detail });
            }
            Err(Refusal::Busy(_) | Refusal::Network(_)) => {}
        }
        std::thread::sleep(client.config().retry_wait * (1 << (tries - 1)));
        tries += 1;
    }
}

/// Moves a checked file to its place, unless it lies there already.
fn place(from: &Path, to: &Path) -> Result<(), ModelError> {
    if from == to {
        return Ok(());
    }
    let directory = to.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(directory).map_err(ModelError::io("create", directory))?;
    fs::rename(from, to).map_err(ModelError::io("rename", from))?;
    File::open(directory).and_then(|file| file.sync_all()).map_err(ModelError::io("sync", directory))
}

/// Held until it is dropped; another process waits here.
fn lock(parts: &Path) -> Result<File, ModelError> {
    let path = parts.join(".lock");
    let file = File::create(&path).map_err(ModelError::io("create", &path))?;
    file.lock().map_err(ModelError::io("lock", &path))?;
    Ok(file)
}
