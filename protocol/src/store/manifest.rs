//! A shard's manifest: ties its artifacts to the exact spec, seed, models, code and devices that made them.
//!
//! Written once, at commit, by the coordinator; read by reports, by fsck and by people.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::control::{Output, Usage};
use crate::experiment::ShardSpec;
use crate::hardware::DeviceKind;
use crate::ids::{DeviceId, Fence, Role, ShardId, WorkerId};
use crate::time::UnixMillis;

/// The JSON in `manifests/<run>/<shard>.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`Manifest::FORMAT`].
    pub format: u32,
    /// The shard.
    pub shard: ShardId,
    /// Name of the sweep, as the researcher wrote it.
    pub sweep: String,
    /// What was to be done.
    pub spec: ShardSpec,
    /// Seed of everything random in it; also in the spec.
    pub seed: u64,
    /// The attempt that counts.
    pub fence: Fence,
    /// [`crate::BUILD`] of the coordinator that committed it.
    pub coordinator_build: String,
    /// Who computed, one entry a seat.
    pub seats: Vec<SeatRecord>,
    /// Artifacts that it used, by the names under which it knew them; of one that a person named the length is 0: not known.
    #[serde(default)]
    pub inputs: Vec<Output>,
    /// When the attempt started.
    pub started: UnixMillis,
    /// When its last seat was finished.
    pub finished: UnixMillis,
}

/// What one seat of the attempt was and made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SeatRecord {
    /// The seat.
    pub role: Role,
    /// Its worker.
    pub worker: WorkerId,
    /// The worker's host name, cleaned.
    pub hostname: String,
    /// Its device there.
    pub device: DeviceId,
    /// What computes on the device.
    pub device_kind: DeviceKind,
    /// Product name of the device.
    pub device_model: String,
    /// [`crate::BUILD`] of the executor.
    pub executor_build: String,
    /// `sha256:…` of each model used, by its name in the spec.
    pub models: BTreeMap<String, String>,
    /// What it made.
    pub outputs: Vec<Output>,
    /// What it took.
    pub usage: Usage,
}

impl Manifest {
    /// Version of the file's form.
    pub const FORMAT: u32 = 1;

    /// Every artifact that was made.
    pub fn outputs(&self) -> impl Iterator<Item = &Output> {
        self.seats.iter().flat_map(|seat| &seat.outputs)
    }
}
