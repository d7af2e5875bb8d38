//! Why an experiment stopped. Fragments follow "failed to run the experiment".

use crate::cache::CacheError;
use crate::model::ModelError;
use crate::projector::ProjectorError;
use crate::projector::corpus::CorpusError;

/// An experiment could not be finished.
#[derive(Debug, thiserror::Error)]
pub enum ExperimentError {
    /// The spec asks for something that no device could do.
    #[error("{what}")]
    BadSpec {
        /// What is wrong with it.
        what: String,
    },
    /// Two candidate answers begin with the same token in this model, so a choice between them means nothing.
    #[error("candidates {first} and {second} begin with the same token in this model")]
    Candidates {
        /// One.
        first: String,
        /// The other.
        second: String,
    },
    /// The model failed.
    #[error("run the model")]
    Model(#[from] ModelError),
    /// A cache could not be worked on.
    #[error("work on a cache")]
    Cache(#[from] CacheError),
    /// A packet from the other seat was refused; nothing of it was injected.
    #[error("packet {key} was refused")]
    PacketRefused {
        /// The packet's name.
        key: String,
        /// Why.
        #[source]
        source: CacheError,
    },
    /// A packet could not be written or read on this box.
    #[error("packet {key}: {what}")]
    Packet {
        /// The packet's name.
        key: String,
        /// What happened.
        what: String,
    },
    /// What is to be read cannot be read.
    #[error("read the corpus")]
    Corpus(#[from] CorpusError),
    /// A projector could not be trained or used.
    #[error("work with a projector")]
    Projector(#[from] ProjectorError),
    /// Whoever runs the experiment asked it to stop.
    #[error("stopped on request")]
    Stopped,
}
