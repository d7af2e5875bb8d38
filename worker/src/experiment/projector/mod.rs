//! Training projectors and measuring what they carry.
//!
//! Layout:
//! - [`train`]: caches of samples from the source's seat, sums at the target's, the solution.
//! - [`facts`]: what is asked in each tier.

pub mod facts;
pub mod train;
