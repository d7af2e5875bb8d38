//! End-to-end tests: real processes, real models, real signals.
//!
//! One binary, so that it links once. Tests that need the real models say so and return where they are absent.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests panic, and say on stderr what they skip")]

mod cluster;
mod faults;
mod kill;
mod programs;
mod refusals;
#[path = "../hub/server.rs"]
mod server;
mod sources;
mod training;
