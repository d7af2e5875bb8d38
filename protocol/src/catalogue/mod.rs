//! What is known before anything is asked: models by name, and cards by theirs.
//!
//! - [`models`]: models that a sweep may name, and sizes of well-known ones. [`cards`]: GPUs with their figures.
//!
//! Only tables: what fits where is [`crate::memory`]'s.

pub mod cards;
pub mod models;

pub use cards::{Card, card};
pub use models::{KnownModel, KnownShape, MODELS, PackagedPart, SHAPES, model, shape, shape_names};
