//! bonepile's worker: the agent of a box, and the executors that run shards on its devices.
//!
//! Layout:
//! - `agent` (feature `agent`): the daemon. Async, light, no ML inside.
//! - `executor`, `experiment`, `model`, `cache`, `projector` (feature `executor`): the child process that computes.
//! - `tool` (feature `executor`): one model by hand, without a cluster.
//! - [`support`]: what a build of the executor can compute on; both sides know the type.

#[cfg(feature = "agent")]
pub mod agent;
#[cfg(feature = "executor")]
pub mod cache;
#[cfg(feature = "executor")]
pub mod executor;
#[cfg(feature = "executor")]
pub mod experiment;
#[cfg(feature = "executor")]
pub mod memory;
#[cfg(feature = "executor")]
pub mod model;
#[cfg(feature = "executor")]
#[cfg(feature = "executor")]
pub mod projector;
#[cfg(feature = "executor")]
pub mod random;
pub mod support;
#[cfg(feature = "executor")]
pub mod tool;
