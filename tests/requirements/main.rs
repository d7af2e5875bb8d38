//! The memory model against the hardware tables that the project began with: each of their rows holds, or is listed as one that
//! is wrong, with the arithmetic that shows it.
//!
//! - `rows`: a row of ours for a row of theirs. `wrong`: the rows that do not hold. `names`: every card that they name.
//!
//! `cargo test --test requirements -- --nocapture` prints both tables.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests panic, and say on stderr what they compute")]

mod names;
mod rows;
mod wrong;
