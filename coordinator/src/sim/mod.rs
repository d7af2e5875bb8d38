//! The simulator: the real scheduler among virtual workers, a virtual clock, network and disk, with faults drawn from a seed.
//!
//! Pure like the scheduler: no clock, no threads, no I/O, no hash maps; a seed gives the same history on every machine. Who
//! runs seeds on cores, keeps failing ones and measures time is the caller (`cli/sim.rs`). `docs/simulator.md` says what is
//! simulated and what is checked.
//!
//! Layout, in the order of a history:
//! - [`scenario`]: everything drawn before the first step, from [`rng`]; [`fault`]: what goes wrong and when; [`truth`]: what
//!   is true about work and cards and unknown to the scheduler.
//! - [`world`]: the loop over [`queue`]; its parts in `process.rs` and `turns.rs` (the coordinator's process), `wire.rs`
//!   (links and sessions), `trouble.rs` (faults, orders, healing) and `trace.rs`.
//! - [`worker`]: a box that keeps the worker's side of the protocol; [`disk`]: the journal's disk.
//! - [`check`]: what must hold, each with its name; [`sabotage`]: breaking it on purpose.
//! - [`run`]: one seed from its number to its verdict. [`scale`]: one large cluster without faults.
//! - [`make`]: every message and device in one place.

pub mod check;
pub mod disk;
pub mod fault;
pub mod make;
mod process;
pub mod queue;
pub mod rng;
pub mod run;
pub mod sabotage;
pub mod scale;
pub mod scenario;
mod trace;
mod trainings;
mod trouble;
pub mod truth;
mod turns;
mod wire;
pub mod worker;
pub mod world;

#[cfg(test)]
mod tests;

pub use check::Violation;
pub use run::{Failed, Tally, run_seed, traced};
pub use sabotage::Sabotage;
pub use scenario::Scenario;
pub use world::World;
