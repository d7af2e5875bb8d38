//! Bringing known models to this box.
