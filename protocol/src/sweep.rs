//! Sweeps as users write them.
