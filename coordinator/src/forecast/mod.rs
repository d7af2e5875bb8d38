//! Forecasts: the real scheduler run ahead in virtual time, on a copy of the cluster or on one that does not exist.
//!
//! `bonepile plan` and `simulate` and the benchmarks of placement all ask the same scheduler what it would do; only the time
//! that work takes is assumed. Pure: no clock, no I/O; a seed gives the same forecast everywhere.
//!
//! - [`engine`]: virtual workers that keep the order of their lanes. [`plan`]: a sweep on the cluster as it is.
//! - [`replay`]: a trace on devices of one's choice, by policy, from the texts that [`formats`] reads; [`bound`]: what no
//!   schedule can beat.

pub mod bound;
pub mod engine;
pub mod formats;
pub mod plan;
pub mod replay;

pub use engine::{Engine, Span};
