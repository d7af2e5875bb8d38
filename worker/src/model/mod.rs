//! The model layer: a decoder whose KV cache is a value that can be taken out, edited, moved and injected.
//!
//! Does not know experiments, packets on the wire or devices of a cluster. The path here is f32 on the CPU; it stays the
//! referee of every faster one.
//!
//! Layout:
//! - [`gguf`]: the file format, read without trusting it; `weights`: tensors by name, in the canonical layout.
//! - [`family`], [`config`], [`rope`]: what tells models apart.
//! - `linear`, [`table`], `decoder`: the computation; [`context`]: the state of one sequence.
//! - [`tokenizer`], [`chat`]: text to ids and back.
//! - [`loaded`]: [`Model`], which puts them together.

pub mod chat;
pub mod config;
pub mod context;
mod decoder;
pub mod error;
pub mod family;
pub mod gguf;
mod linear;
pub mod loaded;
pub mod rope;
pub mod table;
pub mod tokenizer;
mod weights;

pub use chat::Message;
pub use config::ModelConfig;
pub use context::Context;
pub use decoder::{Logits, Observer, Tap};
pub use error::ModelError;
pub use loaded::{LoadOptions, Model, argmax, fingerprint};
pub use tokenizer::Tokenizer;
