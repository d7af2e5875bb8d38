//! C2C's fuser (arXiv 2510.03215): a small network a layer that corrects a target's cache by what a source's says.
//!
//! Layout:
//! - [`shape`]: sizes, and where each parameter lies in one flat vector; [`net`]: the function; [`noise`]: what is random in it.
//! - [`step`]: loss through the frozen target, and its gradient; [`optimiser`]: AdamW, learning rates, clipping.
//! - [`delta`]: what a replica's steps changed; [`outer`]: the next round's weights from it.
//! - [`trained`]: the fuser as a projector, and its file. [`example`]: from a corpus's sample to what a step takes.

pub mod delta;
pub mod example;
pub mod net;
pub mod noise;
pub mod optimiser;
pub mod outer;
pub mod shape;
pub mod step;
pub mod trained;

pub use delta::{Delta, weights_hash};
pub use net::{Mode, Net, initial};
pub use noise::Noise;
pub use optimiser::{AdamW, Rates};
pub use outer::{OuterError, OuterRate, OuterStep, outer_step};
pub use shape::FuserShape;
pub use step::{Example, Gradient, Prefix, StepOptions, Suffix, gradient, gradient_under, loss};
pub use trained::{Fuser, FuserFacts};
