//! The model in memory, kept between seats.
//!
//! One at a time: memory is what old boxes lack, and sweeps come model by model. A second model would be loaded beside
//! the first only to be told that it does not fit.

use std::path::Path;

use protocol::exec::ModelFile;

use crate::model::{LoadOptions, Model, ModelError, Place};

/// The model loaded last.
#[derive(Debug, Default)]
pub struct Warm {
    model: Option<Model>,
}

impl Warm {
    /// The model of `file`, loaded unless it already is.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn model(&mut self, file: &ModelFile) -> Result<&Model, ModelError> {
        let path = Path::new(&file.path);
        let fits = |model: &Model| {
            model.path() == path && file.fingerprint.as_deref().is_none_or(|wanted| wanted == model.fingerprint())
        };
        if !self.model.as_ref().is_some_and(fits) {
            // The old one goes first, so that both never share the memory.
            self.model = None;
            let expected_fingerprint = file.fingerprint.clone();
            let options = LoadOptions { expected_fingerprint, place: Place::of_build(), ..LoadOptions::default() };
            self.model = Some(Model::load(path, &options)?);
        }
        Ok(self.model.as_ref().expect("loaded above if it was not there"))
    }
}
