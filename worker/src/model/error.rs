//! What can go wrong while a model is loaded, tokenises or runs.

use std::path::PathBuf;

use super::gguf::GgufError;
use super::hf::CheckpointError;
use super::quant::QuantError;

/// A model could not be loaded or run. Fragments follow "failed to load" or "failed to run".
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The file is not GGUF, is truncated, or lacks something.
    #[error("{}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        #[source]
        source: GgufError,
    },
    /// A file of a model's directory does not hold what it should.
    #[error("{}", path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        #[source]
        source: CheckpointError,
    },
    /// The file could not be read.
    #[error("read {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not the one that was asked for.
    #[error("{}: corrupt model: expected {expected}, got {got}", path.display())]
    CorruptModel {
        /// The file.
        path: PathBuf,
        /// The fingerprint wanted.
        expected: String,
        /// The fingerprint of the file as it is.
        got: String,
    },
    /// The device cannot be had, or not in these numbers.
    #[error("{place}: {why}")]
    Place {
        /// Device and numbers asked for.
        place: String,
        /// Why not.
        why: String,
    },
    /// A tensor is encoded in a way that weights are not.
    #[error("tensor {name} is stored as {dtype}, which is not a type of weights that we read")]
    StoredType {
        /// Its name.
        name: String,
        /// The type.
        dtype: String,
    },
    /// A matrix's rows do not divide into blocks.
    #[error("tensor {name}")]
    StoredShape {
        /// Its name.
        name: String,
        /// What does not fit.
        #[source]
        source: QuantError,
    },
    /// No family of that name.
    #[error("unknown architecture {name}; known are {known}")]
    UnknownArchitecture {
        /// `general.architecture` of a GGUF file, `model_type` of a directory.
        name: String,
        /// The ones we know.
        known: String,
    },
    /// A metadata value that cannot be right, or asks for something we do not compute.
    #[error("key {key} is {value}: {why}")]
    Unsupported {
        /// Its full name.
        key: String,
        /// What it holds.
        value: String,
        /// Why that does not do.
        why: &'static str,
    },
    /// A key below the architecture's name that we do not know: it may change the result.
    #[error("key {key} is not known here and may change what the model computes")]
    UnknownKey {
        /// Its full name.
        key: String,
    },
    /// A tensor that the family needs is not in the file.
    #[error("tensor {name} is missing")]
    MissingTensor {
        /// Its name.
        name: String,
    },
    /// A tensor of another shape than the metadata says.
    #[error("tensor {name} has shape {got:?}, expected {expected:?}")]
    TensorShape {
        /// Its name.
        name: String,
        /// By the metadata.
        expected: Vec<usize>,
        /// In the file.
        got: Vec<usize>,
    },
    /// Tensors that the family does not use: the model is not what the metadata says.
    #[error("{count} tensors are not used by this architecture, first {first}")]
    UnusedTensors {
        /// How many.
        count: usize,
        /// The first by name.
        first: String,
    },
    /// A tensor holds NaN or infinity.
    #[error("tensor {name} holds values that are not finite")]
    NotFinite {
        /// Its name.
        name: String,
    },
    /// The file's tokenizer is of a kind that we cannot rebuild exactly.
    #[error("unknown tokenizer: {key} is {value}; known are {known}")]
    UnknownTokenizer {
        /// The metadata key.
        key: &'static str,
        /// What it holds.
        value: String,
        /// What would do.
        known: &'static str,
    },
    /// The tokenizer could not be built or failed on a text.
    #[error("tokenizer: {what}")]
    Tokenizer {
        /// What the library says.
        what: String,
    },
    /// The model has no chat template: it is a base model.
    #[error("the model has no chat template: it completes text, it does not chat")]
    NoChatTemplate,
    /// The chat template could not be rendered.
    #[error("render the chat template")]
    ChatTemplate(#[source] minijinja::Error),
    /// A token id outside the vocabulary.
    #[error("token id {id} is outside the vocabulary of {vocabulary}")]
    TokenRange {
        /// The id.
        id: u32,
        /// How many tokens there are.
        vocabulary: usize,
    },
    /// A position beyond what the model was made for.
    #[error("position {position} is beyond the context length of {context}")]
    ContextLength {
        /// The first position that does not fit.
        position: i64,
        /// The model's context length.
        context: usize,
    },
    /// Tokens and positions do not pair up, or there is nothing to run.
    #[error("{tokens} tokens with {positions} positions")]
    Input {
        /// Tokens given.
        tokens: usize,
        /// Positions given.
        positions: usize,
    },
    /// Layers that the model does not have.
    #[error("layers {start}..{end} of a model with {count}")]
    Layers {
        /// The first asked for.
        start: usize,
        /// The one after the last.
        end: usize,
        /// How many there are.
        count: usize,
    },
    /// A context of some layers was run as if it held others: tokens enter at layer 0, hidden states at any other, and only a
    /// context of all layers goes from tokens to logits at once.
    #[error("a context of layers {}..{} cannot be run this way", layers.start, layers.end)]
    Part {
        /// The layers it holds.
        layers: std::ops::Range<usize>,
    },
    /// A context that another model started, or this one before it was loaded again.
    #[error("the context was started by another model")]
    Foreign,
    /// Hidden states of another shape than positions and model ask for.
    #[error("{got} numbers of hidden states, expected {expected}")]
    Hidden {
        /// Positions times width.
        expected: usize,
        /// Given.
        got: usize,
    },
    /// Logits of another length than the vocabulary.
    #[error("{got} logits, expected {expected}")]
    Logits {
        /// The vocabulary.
        expected: usize,
        /// Given.
        got: usize,
    },
    /// A cache could not be injected.
    #[error("inject a cache")]
    Cache(#[from] crate::cache::CacheError),
    /// The tensor library failed: a bug, or memory ran out.
    #[error("tensor operation")]
    Tensor(#[from] candle_core::Error),
}
