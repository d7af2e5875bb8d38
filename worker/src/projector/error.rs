//! What can be wrong with a projector, its training and its files. Fragments follow "failed to".

use std::path::PathBuf;

use crate::cache::CacheError;

/// A projector could not be trained, read or used.
#[derive(Debug, thiserror::Error)]
pub enum ProjectorError {
    /// A model failed.
    #[error("run the model")]
    Model(#[source] Box<crate::model::ModelError>),
    /// Tokens of two models cannot be matched.
    #[error("alignment: {what}")]
    Alignment {
        /// Why.
        what: String,
    },
    /// A layer map does not fit the two models.
    #[error("layer map: {what}")]
    Layers {
        /// Why.
        what: String,
    },
    /// The projector was made for another model.
    #[error("made for the {side} {expected}, not for {got}")]
    Fingerprint {
        /// `source` or `target`.
        side: &'static str,
        /// What the projector was made for.
        expected: String,
        /// The model at hand.
        got: String,
    },
    /// A size differs from the model's, though fingerprints agree.
    #[error("{what} of the {side} is {got}, the projector has {expected}")]
    Layout {
        /// `source` or `target`.
        side: &'static str,
        /// Which size.
        what: &'static str,
        /// In the projector.
        expected: usize,
        /// At hand.
        got: usize,
    },
    /// The bytes are not a file of this kind, or are damaged.
    #[error("not a {kind} file: {what}")]
    File {
        /// `projector`, `statistics`.
        kind: &'static str,
        /// What is wrong.
        what: String,
    },
    /// A file could not be read or written.
    #[error("{}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Two parts of a sum do not belong together.
    #[error("parts of statistics: {what}")]
    Parts {
        /// Why.
        what: String,
    },
    /// Nothing can be solved from these sums.
    #[error("ridge: {what}")]
    Ridge {
        /// Why.
        what: String,
    },
    /// A fuser cannot be made, stepped or used.
    #[error("fuser: {what}")]
    Fuser {
        /// Why.
        what: String,
    },
    /// Deltas cannot be made into weights.
    #[error("outer step")]
    Outer(#[from] super::fuser::OuterError),
    /// A cache could not be used.
    #[error("use a cache")]
    Cache(#[from] CacheError),
}
