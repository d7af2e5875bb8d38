//! The model layer: a decoder whose KV cache is a value that can be taken out, edited, moved and injected.
//!
//! Does not know experiments, packets on the wire or devices of a cluster. Two paths on the CPU: f32, the referee, and weights
//! as stored, which is faster and takes a fraction of the memory. Cards run the referee's path, with either kind of weights.
//!
//! Layout:
//! - [`gguf`], [`hf`]: the two kinds of file, read without trusting them; `names`, `weights`: what a weight is called in
//!   each, and weights in the canonical layout.
//! - [`family`], [`config`], [`rope`]: what tells models apart.
//! - [`team`], `vector`, `matrix`: threads, and arithmetic on slices. [`place`], `card`: other devices than the CPU.
//! - [`quant`], `linear`, [`table`], `decoder`: the computation; [`context`]: the state of one sequence.
//! - `frozen`, `panel`, `grad`: weights without a gradient, their products in both directions, operations with a gradient,
//!   for [`Model::forward_tracked`].
//! - [`tokenizer`], [`chat`]: text to ids and back.
//! - [`loaded`]: [`Model`], which puts them together; [`sampling`], [`generate`]: letting it write.
//! - [`mod@shape`]: sizes from headers alone, for the memory model.

mod card;
pub mod chat;
pub mod config;
pub mod context;
mod decoder;
pub mod error;
pub mod family;
mod frozen;
pub mod generate;
pub mod gguf;
mod grad;
pub mod hf;
mod linear;
pub mod loaded;
mod matrix;
mod names;
mod panel;
pub mod place;
pub mod quant;
pub mod rope;
pub mod sampling;
pub mod shape;
pub mod table;
pub mod team;
pub mod tokenizer;
mod vector;
mod weights;

pub use chat::Message;
pub use config::ModelConfig;
pub use context::{CachePrecision, Context};
pub use decoder::{Adapter, Adapters, Keep, Logits, Observer, Projection, Tap, TrackedCache, TrackedSegment};
pub use error::ModelError;
pub use generate::{End, Generated, Sequence};
pub use grad::next_token_loss;
pub use loaded::{BatchItem, Input, LoadOptions, Model, Output, argmax, fingerprint, tensors};
pub use place::{DeviceChoice, Place};
pub use sampling::{Sampler, Sampling, SamplingError};
pub use tokenizer::Tokenizer;
pub use weights::Precision;
