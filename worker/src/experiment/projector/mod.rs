//! Training projectors and measuring what they carry.
//!
//! Layout:
//! - [`train`]: caches of samples from the source's seat, sums at the target's, the solution.
//! - [`rounds`]: a fuser's optimiser steps and outer steps.
//! - [`facts`]: what is asked in each tier. [`eval`]: every condition, scored. `fit`: R².

pub mod eval;
pub mod facts;
mod fit;
pub mod rounds;
pub mod train;
