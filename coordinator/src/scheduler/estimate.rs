//! How much memory a seat needs, before anything was measured.
//!
//! First version: the catalogue's figure for the model and a margin. Does not learn from finished shards yet.

use protocol::catalogue;
use protocol::experiment::ShardSpec;
use protocol::ids::Role;

/// Memory beside the model and its cache, bytes: activations of a prefill chunk, packets being written or read.
pub const WORKING_MARGIN_BYTES: u64 = 128_000_000;
/// What a model that is not in the catalogue is taken to need, bytes: too much rather than too little, since an estimate that
/// is too small ends in the kernel's out-of-memory killer.
pub const UNKNOWN_MODEL_BYTES: u64 = 4_000_000_000;

/// Memory to set aside for a seat, bytes.
pub fn seat_bytes(spec: &ShardSpec, _role: Role) -> u64 {
    match spec {
        ShardSpec::Command(spec) => return spec.memory_bytes,
        ShardSpec::NoOp(_) => return 0,
        ShardSpec::Inspect(_) | ShardSpec::Transfer(_) => {}
    }
    let resident = |name: &&str| catalogue::model(name).map_or(UNKNOWN_MODEL_BYTES, |model| model.resident_bytes);
    spec.models().iter().map(resident).fold(WORKING_MARGIN_BYTES, u64::saturating_add)
}
