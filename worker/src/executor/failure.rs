//! Errors as failures: the type decides whether and where a shard is tried again, the text is for people.

use std::error::Error;
use std::io::ErrorKind;

use protocol::control::{Failure, FailureKind};

use super::inbox::Stopped;
use super::wire::WireError;
use crate::experiment::ExperimentError;
use crate::model::ModelError;
use crate::model::gguf::GgufError;
use crate::projector::ProjectorError;
use crate::projector::corpus::CorpusError;

impl From<Stopped> for ExperimentError {
    fn from(_: Stopped) -> Self {
        Self::Stopped
    }
}

impl From<WireError> for ExperimentError {
    /// An agent that cannot be told anything is gone.
    fn from(_: WireError) -> Self {
        Self::Stopped
    }
}

/// A failure of the type that `error` calls for, with the whole chain of causes as its text.
pub fn failure(error: &ExperimentError) -> Failure {
    let failure = Failure::new(kind(error), chain(error));
    match error {
        ExperimentError::Model(ModelError::CorruptModel { .. }) => {
            failure.hint("remove the file and get it again with `bonepile models pull`")
        }
        ExperimentError::Model(ModelError::Io { .. }) => failure.hint("get the model with `bonepile models pull`"),
        _ => failure,
    }
}

/// An error and its causes: `a: b: c`.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

fn kind(error: &ExperimentError) -> FailureKind {
    match error {
        ExperimentError::BadSpec { .. } | ExperimentError::Candidates { .. } => FailureKind::BadSpec,
        ExperimentError::Model(error) => model_kind(error),
        ExperimentError::Cache(_) => FailureKind::Internal,
        ExperimentError::PacketRefused { .. } => FailureKind::PacketRefused,
        ExperimentError::Packet { .. } => FailureKind::LocalDisk,
        ExperimentError::Corpus(CorpusError::Io { .. }) => FailureKind::LocalDisk,
        ExperimentError::Corpus(_) => FailureKind::BadSpec,
        ExperimentError::Projector(error) => match error {
            ProjectorError::Layers { .. } | ProjectorError::Parts { .. } | ProjectorError::Ridge { .. } => {
                FailureKind::BadSpec
            }
            ProjectorError::Io { .. } => FailureKind::LocalDisk,
            ProjectorError::Model(error) => model_kind(error),
            _ => FailureKind::Internal,
        },
        ExperimentError::Stopped => FailureKind::Cancelled,
    }
}

fn model_kind(error: &ModelError) -> FailureKind {
    match error {
        ModelError::Io { source, .. } if source.kind() == ErrorKind::NotFound => FailureKind::ModelMissing,
        ModelError::Gguf { source: GgufError::TensorType { .. } | GgufError::Version { .. }, .. } => {
            FailureKind::Unsupported
        }
        ModelError::CorruptModel { .. }
        | ModelError::Gguf { .. }
        | ModelError::Checkpoint { .. }
        | ModelError::Io { .. }
        | ModelError::NotFinite { .. }
        | ModelError::MissingTensor { .. }
        | ModelError::TensorShape { .. } => FailureKind::ModelCorrupt,
        ModelError::Place { .. }
        | ModelError::UnknownArchitecture { .. }
        | ModelError::Unsupported { .. }
        | ModelError::UnknownKey { .. }
        | ModelError::UnusedTensors { .. }
        | ModelError::UnknownTokenizer { .. }
        | ModelError::NoChatTemplate => FailureKind::Unsupported,
        ModelError::ContextLength { .. } => FailureKind::BadSpec,
        _ => FailureKind::Internal,
    }
}
