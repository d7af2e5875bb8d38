//! The scheduler: a value that takes inputs and gives events and effects.
//!
//! Pure: no async, no clock, no randomness, no I/O, no hash maps, no float in a key. Does not know QUIC, HTTP or SQLite: the
//! driver does. Start reading at [`Scheduler`].
//!
//! Layout:
//! - [`Scheduler`] (`machine.rs`), with what each input leads to in `sessions.rs`, `outcomes.rs` and `orders.rs`.
//! - [`input`]: inputs, answers, rejections, effects. [`event`]: what is journaled.
//! - [`state`] and its one `apply` (`apply.rs`); [`live`] for what is not journaled; [`timer`]: the deadlines.
//! - [`queue`] (who waits, by [`request`]) and [`board`] (devices and what holds them): indices of the state.
//! - [`training`]: trainings as rounds of shards; `rounds.rs` decides when the next one opens and who is in it.
//! - [`throughput`] and [`learned`]: what finished work teaches. [`estimate`]: memory before that.
//! - [`view`] rates a device for a seat, [`placement`] chooses ([`assign`] for few shards, [`prices`] for many), `stragglers.rs`
//!   tries the slow ones again elsewhere; [`reason`] and [`explain`] word it.
//! - [`invariants`]: what must hold after every input.

mod apply;
pub mod assign;
pub mod board;
pub mod estimate;
pub mod event;
pub mod explain;
pub mod input;
pub mod invariants;
pub mod learned;
pub mod live;
mod machine;
pub mod octaves;
mod orders;
mod outcomes;
pub mod placement;
pub mod prices;
pub mod queue;
pub mod reason;
pub mod request;
pub mod rounds;
mod sessions;
pub mod state;
mod status;
mod stragglers;
pub mod throughput;
pub mod timer;
pub mod training;
pub mod view;

#[cfg(test)]
mod tests;

pub use apply::IllegalTransition;
pub use event::{Event, Policy, Record, Settings};
pub use input::{Answer, Effect, Input, NewRun, Rejection};
pub use machine::Scheduler;
pub use outcomes::{FREE_RETRIES_MAX, RETRY_BACKOFF_DOUBLINGS_MAX, RETRY_BACKOFF_MS};
pub use sessions::RESEND_AFTER_MS;
pub use state::State;
pub use status::{RunState, ShardState, TokenState, Verdict, WorkerState};
