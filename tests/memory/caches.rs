//! Operations on long caches hold at most a layer beyond what goes in and comes out.
