//! What can be wrong with a cache or a packet. Fragments follow "failed to use the cache".

use std::path::PathBuf;

/// A cache or packet was refused. Nothing has been injected.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The cache was made by another model, or by another quantisation of the same.
    #[error("made by model {got}, not by {expected}")]
    Fingerprint {
        /// The model at hand.
        expected: String,
        /// The one that made the cache.
        got: String,
    },
    /// A size or setting differs from the model's.
    #[error("{what} is {got}, the model has {expected}")]
    Layout {
        /// Which.
        what: String,
        /// In the model.
        expected: String,
        /// In the cache.
        got: String,
    },
    /// The cache lacks a layer that is needed.
    #[error("layer {layer} is missing")]
    MissingLayer {
        /// Index from 0.
        layer: usize,
    },
    /// Parts of a cache do not have the same number of columns, or a selection reaches beyond it.
    #[error("{what}: expected {expected}, got {got}")]
    Shape {
        /// Which part.
        what: String,
        /// What it should be.
        expected: usize,
        /// What it is.
        got: usize,
    },
    /// Two caches to be joined differ in this.
    #[error("the caches differ in {what}")]
    Mismatch {
        /// In what.
        what: &'static str,
    },
    /// A value is NaN or infinite.
    #[error("layer {layer} holds a value that is not finite in its {part}")]
    NotFinite {
        /// Index from 0.
        layer: usize,
        /// `keys` or `values`.
        part: &'static str,
    },
    /// The bytes are not a packet.
    #[error("not a cache packet: {what}")]
    Packet {
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
    /// An eigenvalue computation did not converge.
    #[error("the eigenvalues of layer {layer} did not converge")]
    Eigenvalues {
        /// Index from 0.
        layer: usize,
    },
}
