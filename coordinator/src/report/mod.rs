//! From a run's results to tables and to one self-contained HTML page: plots, tables, samples, data, how to reproduce.
//!
//! Beside the page, trainings have event files for TensorBoard. Reads what the API answers, nothing else; writing into the store
//! is the caller's.

mod csv;
#[cfg(test)]
pub(crate) mod fixture;
mod page;
mod plots;
pub mod projector;
mod projector_page;
pub mod stats;
pub mod summary;
pub mod tensorboard;
#[cfg(test)]
mod tests;

pub use self::page::{ReportError, ReportInput, render};
pub(crate) use self::page::{exponent, figure};
