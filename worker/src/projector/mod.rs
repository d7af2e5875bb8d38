//! Projectors: a cache of one model as a cache of another.
//!
//! A projector takes the source's un-rotated cache of a text, the alignment of both models' tokens, and what the target has of
//! its own; it gives the target's un-rotated cache at the target's positions, which injects like any other. Does not train by
//! itself: `experiment::projector` has the procedures.
//!
//! Layout:
//! - [`align`]: tokens and layers. [`reading`]: how a model reads a sample. [`rows`]: caches as rows of matrices.
//! - [`corpus`]: what is read in training. [`mod@file`]: the format.
//! - [`ridge`]: the closed form. [`fuser`]: a network trained through the target.

pub mod align;
pub mod corpus;
pub mod error;
pub mod file;
pub mod fuser;
pub mod reading;
pub mod ridge;
pub mod rows;
#[cfg(test)]
pub(crate) mod testing;

use std::path::Path;

pub use align::Alignment;
pub use error::ProjectorError;
pub use file::Manifest;

use self::fuser::Fuser;
use self::ridge::Ridge;
use crate::cache::{KvCache, LayerKv};
use crate::model::team::team;
use crate::model::{Model, ModelError};

/// First columns that the target keeps as it computes them: an attention sink lies there.
pub const KEPT: usize = 1;
/// Method of a closed form.
pub const RIDGE: &str = "ridge";
/// Method of a network trained by gradient descent.
pub const FUSER: &str = "fuser";

/// What `task` gives for each layer, computed by all threads.
pub(crate) fn each_layer<T: Send>(count: usize, task: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let mut slots: Vec<Option<T>> = (0..count).map(|_| None).collect();
    team().chunks(&mut slots, 1, |layer, slot| slot[0] = Some(task(layer)));
    slots.into_iter().map(|slot| slot.expect("every layer was computed")).collect()
}

/// A trained projector, and what it is for.
#[derive(Debug, Clone, PartialEq)]
pub struct Projector {
    manifest: Manifest,
    method: Trained,
}

/// The numbers of each method.
#[derive(Debug, Clone, PartialEq)]
enum Trained {
    Ridge(Ridge),
    Fuser(Box<Fuser>),
}

/// What a projector needs of the target's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Own {
    /// Its cache of the first [`KEPT`] tokens.
    First,
    /// Its cache of the whole text.
    Whole,
}

impl Own {
    /// The target's own cache of a reading, as much as is needed, un-rotated.
    ///
    /// # Errors
    /// What failed in the model.
    pub fn cache(self, model: &Model, reading: &reading::Reading) -> Result<KvCache, ModelError> {
        let mut reading = reading.clone();
        if self == Self::First {
            reading.ids.truncate(KEPT);
            reading.spans.truncate(KEPT);
        }
        reading.cache(model)
    }
}

impl Projector {
    /// A ridge projector.
    ///
    /// # Errors
    /// [`ProjectorError::File`] if the manifest contradicts itself.
    pub(crate) fn ridge(manifest: Manifest, ridge: Ridge) -> Result<Self, ProjectorError> {
        manifest.check()?;
        Ok(Self { manifest, method: Trained::Ridge(ridge) })
    }

    /// A fuser.
    ///
    /// # Errors
    /// [`ProjectorError::File`] if the manifest contradicts itself.
    pub(crate) fn fuser(manifest: Manifest, fuser: Fuser) -> Result<Self, ProjectorError> {
        manifest.check()?;
        Ok(Self { manifest, method: Trained::Fuser(Box::new(fuser)) })
    }

    /// The fuser, if it is one.
    pub fn as_fuser(&self) -> Option<&Fuser> {
        match &self.method {
            Trained::Fuser(fuser) => Some(fuser),
            Trained::Ridge(_) => None,
        }
    }

    /// The ridge, if it is one.
    pub(crate) fn as_ridge(&self) -> Option<&Ridge> {
        match &self.method {
            Trained::Ridge(ridge) => Some(ridge),
            Trained::Fuser(_) => None,
        }
    }

    /// What it is for.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Trained numbers.
    pub fn parameters(&self) -> u64 {
        match &self.method {
            Trained::Ridge(ridge) => ridge.parameters(),
            Trained::Fuser(fuser) => fuser.shape().parameters() as u64,
        }
    }

    /// What it needs of the target's own.
    pub fn own(&self) -> Own {
        match &self.method {
            Trained::Ridge(_) => Own::First,
            Trained::Fuser(fuser) => fuser.own(),
        }
    }

    /// The target's cache, un-rotated, one column for each of the alignment's, at positions from `own`'s first on.
    ///
    /// `source` is the source's cache of the text, `own` what [`Projector::own`] says of the target's.
    ///
    /// # Errors
    /// [`ProjectorError::Fingerprint`] and [`ProjectorError::Layout`] for caches of other models;
    /// [`ProjectorError::Alignment`] for an alignment of other caches.
    pub fn project(&self, source: &KvCache, alignment: &Alignment, own: &KvCache) -> Result<KvCache, ProjectorError> {
        self.manifest.accept(source.layout(), own.layout())?;
        let wrong = |what: String| ProjectorError::Alignment { what };
        if source.len() != alignment.source_len() {
            let (expected, got) = (alignment.source_len(), source.len());
            return Err(wrong(format!("it is for {expected} source tokens, the cache has {got}")));
        }
        if alignment.is_empty() || own.len() < KEPT {
            return Err(wrong("the target has no token of its own".to_owned()));
        }
        let (source, own) = (&source.unrotated(), &own.unrotated());
        let layers: Vec<(usize, LayerKv)> = match &self.method {
            Trained::Ridge(ridge) => ridge.project(&self.manifest, source, alignment, own)?,
            Trained::Fuser(fuser) => fuser.project(&self.manifest, source, alignment, own)?,
        };
        let positions = (own.positions()[0]..).take(alignment.len()).collect();
        Ok(KvCache::new(own.layout().clone(), layers, positions, None, false)?)
    }

    /// Writes it; returns the bytes.
    ///
    /// # Errors
    /// [`ProjectorError::Io`].
    pub fn save(&self, path: &Path) -> Result<u64, ProjectorError> {
        let tensors = match &self.method {
            Trained::Ridge(ridge) => ridge.tensors(&self.manifest),
            Trained::Fuser(fuser) => fuser.tensors(),
        };
        file::save(path, file::KIND, &self.manifest, &tensors)
    }

    /// Writes what a round's replicas start from: a fuser's weights, without the base that they have and the momentum that they
    /// do not need. Returns the bytes.
    ///
    /// # Errors
    /// [`ProjectorError::Io`]; [`ProjectorError::Fuser`] for another projector.
    pub fn save_start(&self, path: &Path) -> Result<u64, ProjectorError> {
        let fuser = self.as_fuser();
        let fuser =
            fuser.ok_or_else(|| ProjectorError::Fuser { what: "only a fuser is trained in rounds".to_owned() })?;
        file::save(path, file::KIND, &self.manifest, &fuser.tensors_to_start())
    }

    /// Reads one, of any method.
    ///
    /// # Errors
    /// [`ProjectorError::Io`], [`ProjectorError::File`].
    pub fn load(path: &Path) -> Result<Self, ProjectorError> {
        Self::load_with(path, None)
    }

    /// Reads one, or what [`Projector::save_start`] left of one that refines `base`.
    ///
    /// # Errors
    /// As [`Projector::load`].
    pub fn load_with(path: &Path, base: Option<&Projector>) -> Result<Self, ProjectorError> {
        let (manifest, tensors): (Manifest, _) = file::load(path, file::KIND)?;
        manifest.check()?;
        let method = match manifest.method.as_str() {
            RIDGE => Trained::Ridge(Ridge::from_tensors(&manifest, tensors)?),
            FUSER => Trained::Fuser(Box::new(Fuser::from_tensors(&manifest, tensors, base)?)),
            other => {
                let what = format!("method `{other}` is not known to this build");
                return Err(ProjectorError::File { kind: file::KIND, what });
            }
        };
        Ok(Self { manifest, method })
    }
}
