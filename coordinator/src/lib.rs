//! bonepile: the coordinator crate.
