//! The scheduler: a value that takes inputs and gives events and effects.
//!
//! Pure: no async, no clock, no randomness, no I/O, no hash maps. Does not know QUIC, HTTP or SQLite: the driver does.

mod status;

pub use status::{RunState, ShardState, TokenState, WorkerState};
