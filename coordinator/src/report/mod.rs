//! From a run's results to tables and to one self-contained HTML page: plots, tables, samples, data, how to reproduce.
//!
//! Reads what the API answers, nothing else; writing the page into the store is the caller's.

#[cfg(test)]
pub(crate) mod fixture;
mod page;
mod plots;
pub mod stats;
pub mod summary;
#[cfg(test)]
mod tests;

pub use self::page::{ReportError, ReportInput, render};
pub(crate) use self::page::{exponent, figure};
