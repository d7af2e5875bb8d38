//! Experiment procedures: one file a kind, from inputs to measures.
//!
//! Pure given a model: no network, no store, all randomness from seeds in the spec, and no clock but where a result is a time. What goes in and what comes
//! out is `protocol::experiment` and `protocol::results`; who calls and where files go is the executor's.
//!
//! Layout:
//! - [`facts`]: the courier facts that all kinds read.
//! - [`inspect`]: shape and statistics of a cache.
//! - `measure`: distances between distributions.
//! - [`projector`]: training projectors between two models, and measuring them.
//! - [`transfer`]: a cache made by one model instance and injected by another, against oracle and controls.

pub mod error;
pub mod facts;
pub mod inspect;
mod measure;
pub mod projector;
pub mod transfer;

pub use error::ExperimentError;

use protocol::results::ModelFacts;

use crate::model::Model;

/// Called after each step with (steps done, steps in all, what comes next). An error stops the experiment.
pub type Progress<'a> = dyn FnMut(u32, u32, &str) -> Result<(), ExperimentError> + 'a;

/// Which model computed, for a result.
pub(crate) fn model_facts(model: &Model, name: &str) -> ModelFacts {
    let config = model.config();
    let number = |value: usize| u32::try_from(value).expect("a model's sizes fit 32 bits");
    ModelFacts {
        name: name.to_owned(),
        fingerprint: model.fingerprint().to_owned(),
        architecture: config.family.architecture.to_owned(),
        layers: number(config.layers.len()),
        kv_heads: number(config.kv_heads),
        head_dim: number(config.head_dim),
    }
}
