//! The coordinator's port over loopback: joining, admission, sessions, garbage, uploads. No executor, no worker process.

#![expect(clippy::disallowed_methods, reason = "tests read the clock")]
#![allow(clippy::unwrap_used, reason = "tests panic")]

mod admission;
mod joining;
mod session;
mod support;
