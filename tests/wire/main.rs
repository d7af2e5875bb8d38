//! The wire as bytes: every message's golden frame, the registry in the docs, and decoding of anything at all.
//!
//! A change of a golden file is a change of the protocol: v1's are fixed once v1 is out, and must decode for ever after.
//! `BONEPILE_BLESS=1` writes those that are missing or differ.

#![allow(clippy::unwrap_used, reason = "tests panic")]

mod docs;
mod golden;
mod samples;
