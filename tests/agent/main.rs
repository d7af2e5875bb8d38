//! The agent as a process: joined by hand, led by a coordinator that the test scripts, with executors that are shell scripts
//! playing back real frames. Peer streams in one process over loopback. No model is computed here.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests panic, and show what a failed process said")]

mod commands;
mod life;
mod packets;
mod peers;
mod programs;
#[path = "../hub/server.rs"]
mod server;
mod support;
