//! Models as directories in Hugging Face's layout.
//!
//! - [`checkpoint`]: which files belong to the model, and where in them tensors lie; `header`: the header of safetensors,
//!   read without trusting it.
//! - `config`: what `config.json` says.
//! - `json`: typed access to both; `tokenizer`: `tokenizer.json` and the files around it.
//!
//! Does not download anything.

pub mod checkpoint;
pub(crate) mod config;
mod header;
mod json;
mod tokenizer;

pub use checkpoint::{Checkpoint, CheckpointError};
