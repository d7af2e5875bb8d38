//! Directories in which programs work. One that a program leaves as it found it is the next one's: making and removing a
//! directory waits for the disk's journal, which is busy with what is being kept, and costs more than a short program.

use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Name of a directory before its number.
const NAME: &str = "place-";
const MODE: u32 = 0o700;

/// The directories below a worker's `work`.
#[derive(Debug)]
pub struct Places {
    work: PathBuf,
    idle: Mutex<Idle>,
}

#[derive(Debug, Default)]
struct Idle {
    free: Vec<PathBuf>,
    made: u64,
}

impl Places {
    /// None yet.
    pub fn new(work: PathBuf) -> Self {
        Self { work, idle: Mutex::default() }
    }

    /// An empty directory that nobody else has.
    ///
    /// # Errors
    /// Of the system.
    pub fn take(&self) -> io::Result<PathBuf> {
        let path = {
            let mut idle = self.idle();
            if let Some(path) = idle.free.pop() {
                return Ok(path);
            }
            idle.made += 1;
            self.work.join(format!("{NAME}{}", idle.made))
        };
        std::fs::DirBuilder::new().mode(MODE).create(&path)?;
        Ok(path)
    }

    /// A program is over and nothing of it is wanted.
    pub async fn give_back(&self, path: PathBuf) {
        if is_as_new(&path).unwrap_or(false) {
            self.idle().free.push(path);
            return;
        }
        let shown = path.clone();
        match tokio::task::spawn_blocking(move || std::fs::remove_dir_all(&path)).await {
            Ok(Err(error)) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %shown.display(), "could not remove a program's directory: {error}");
            }
            _ => {}
        }
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a directory is empty and still its owner's to use.
fn is_as_new(path: &Path) -> io::Result<bool> {
    let metadata = std::fs::symlink_metadata(path)?;
    let usable = metadata.is_dir() && metadata.permissions().mode() & 0o7777 == MODE;
    Ok(usable && std::fs::read_dir(path)?.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_directory_is_used_again_only_if_it_is_as_it_was() {
        let work = tempfile::tempdir().unwrap();
        let places = Places::new(work.path().to_owned());
        let (one, two) = (places.take().unwrap(), places.take().unwrap());
        assert_ne!(one, two);
        places.give_back(one.clone()).await;
        assert_eq!(places.take().unwrap(), one);
        std::fs::create_dir(one.join("made")).unwrap();
        places.give_back(one.clone()).await;
        assert!(!one.exists());
        std::fs::set_permissions(&two, PermissionsExt::from_mode(0o777)).unwrap();
        places.give_back(two.clone()).await;
        assert!(!two.exists());
        let three = places.take().unwrap();
        assert!(three != one && three != two && is_as_new(&three).unwrap());
    }
}
