//! The memory model: what a phase of work takes on a device, before anything ran.
//!
//! [`estimate`] takes a model's [`ModelShape`], how its weights are held ([`Quantisation`]), what is to be done ([`Phase`]) and
//! where ([`Backend`]), and gives a [`Footprint`]: named parts, in bytes, whose sum is the peak. Integers only, and the same
//! input gives the same bytes on every machine, so that a scheduler may order by it. Nothing is measured here;
//! `docs/memory.md` has what was, `tests/memory/peaks.rs` and `tests/requirements` hold the model against it.
//!
//! Letters: L layers, C width of the residual stream, H query heads, J key-value heads, D head dimension, F width of the
//! MLP, V vocabulary, T tokens of a pass, S columns of cache, B sequences, r rank.
//!
//! Layout:
//! - [`shape`]: sizes of a model. [`quantisation`]: bytes of its weights.
//! - [`phase`]: what is done. [`executor`]: how our executors run a pass, in figures that they share.
//! - [`training`]: projectors, adapters, whole models. [`footprint`]: the sum.
//!
//! Does not know cards ([`crate::catalogue::cards`]) or shards (the scheduler's estimate).

pub mod executor;
pub mod footprint;
pub mod phase;
pub mod quantisation;
pub mod shape;
pub mod training;

pub use footprint::{Backend, Footprint, estimate};
pub use phase::{Capture, Element, Inference, Phase};
pub use quantisation::Quantisation;
pub use shape::{ModelShape, StoredBytes};
pub use training::{AdapterTraining, Optimiser, ProjectorKind, ProjectorTraining, Training};

/// A product that stops at the largest number instead of wrapping: a worker may report any sizes.
fn product(factors: &[u64]) -> u64 {
    factors.iter().fold(1, |all, factor| all.saturating_mul(*factor))
}

/// A sum that does the same.
fn sum(terms: &[u64]) -> u64 {
    terms.iter().fold(0, |all, term| all.saturating_add(*term))
}
