//! The scheduler: a value that takes inputs and gives events and effects.
//!
//! Pure: no async, no clock, no randomness, no I/O, no hash maps, no float in a key. Does not know QUIC, HTTP or SQLite: the
//! driver does. Start reading at [`Scheduler`].
//!
//! Layout:
//! - [`Scheduler`] (`machine.rs`), with what each input leads to in `sessions.rs`, `outcomes.rs` and `orders.rs`.
//! - [`input`]: inputs, answers, rejections, effects. [`event`]: what is journaled.
//! - [`state`] and its one `apply` (`apply.rs`); [`live`] for what is not journaled; [`timer`]: the deadlines.
//! - [`estimate`], [`placement`], [`reason`], [`explain`]: which devices, and why.
//! - [`invariants`]: what must hold after every input.

mod apply;
pub mod estimate;
pub mod event;
pub mod explain;
pub mod input;
pub mod invariants;
pub mod live;
mod machine;
mod orders;
mod outcomes;
pub mod placement;
pub mod reason;
mod sessions;
pub mod state;
mod status;
pub mod timer;

#[cfg(test)]
mod tests;

pub use apply::IllegalTransition;
pub use event::{Event, Record, Settings};
pub use input::{Answer, Effect, Input, NewRun, Rejection};
pub use machine::Scheduler;
pub use outcomes::{FREE_RETRIES_MAX, RETRY_BACKOFF_DOUBLINGS_MAX, RETRY_BACKOFF_MS};
pub use sessions::RESEND_AFTER_MS;
pub use state::State;
pub use status::{RunState, ShardState, TokenState, Verdict, WorkerState};
