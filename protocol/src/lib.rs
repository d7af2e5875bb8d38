//! bonepile: the protocol crate.
