//! Exit codes of `bonepile`: stable, one meaning each.

/// Done. Also when whoever reads our output stops reading.
pub const OK: u8 = 0;
/// The work was not done: a run failed, a store has findings, a file could not be written.
pub const FAILED: u8 = 1;
/// The command line, `cluster.toml` or a sweep is wrong, or names something that is not there. Nothing was changed.
pub const USAGE: u8 = 2;
/// The coordinator does not answer.
pub const UNREACHABLE: u8 = 3;
/// Done in part: some shards of the run committed, others failed.
pub const PARTIAL: u8 = 4;
/// The journal is damaged or was written by a newer build. Nothing was changed.
pub const JOURNAL: u8 = 5;
