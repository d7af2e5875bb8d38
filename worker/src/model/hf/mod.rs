//! Models as directories in Hugging Face's layout.
//!
//! - [`checkpoint`]: which files belong to the model, and its safetensors, read without trusting them.
//! - `config`: what `config.json` says.
//! - `json`: typed access to both; `tokenizer`: `tokenizer.json` and the files around it.
//!
//! Does not download anything.

pub mod checkpoint;
pub(crate) mod config;
mod json;
mod tokenizer;

pub use checkpoint::{Checkpoint, CheckpointError};
