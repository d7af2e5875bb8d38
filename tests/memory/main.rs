//! What things cost in memory, measured with an allocator that counts. One binary, because the allocator is its own.
//!
//! - `allocator`: the count.
//! - `headers`: model files that lie about sizes cost an error, never a panic and never memory.
//! - `caches`: operations on long caches hold at most a layer beyond what goes in and comes out.
//! - `peaks`: real models and real executors take what the memory model says.
//! - `tiny`: tiny models, shared with the tests of the model layer.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests panic, and say on stderr what they measure")]

mod allocator;
mod caches;
mod headers;
mod peaks;
#[path = "../model/tiny.rs"]
#[allow(dead_code, reason = "the tests of the model layer use more of it")]
mod tiny;
