//! What is true about work and cards, and unknown to the scheduler: how long a work class takes on a device model, and how
//! much memory a model really wants.

use std::collections::BTreeMap;

use protocol::experiment::ShardSpec;
use protocol::ids::Role;

/// The table of truths.
#[derive(Debug, Clone, Default)]
pub struct Truth {
    /// Milliseconds of a seat, by work class and device model.
    pub durations_ms: BTreeMap<(String, String), u64>,
    /// Milliseconds of a seat that the table does not have.
    pub otherwise_ms: u64,
    /// Peak memory of a seat, bytes, by model.
    pub peaks_bytes: BTreeMap<String, u64>,
}

impl Truth {
    /// How long a seat of `spec` takes on a healthy device of this model, milliseconds, at least 1.
    pub fn duration_ms(&self, spec: &ShardSpec, device_model: &str) -> u64 {
        let known = self.durations_ms.get(&(spec.work_class(), device_model.to_owned()));
        known.copied().unwrap_or(self.otherwise_ms).max(1)
    }

    /// What a seat of `spec` takes of its device's memory, bytes.
    pub fn peak_bytes(&self, spec: &ShardSpec, role: Role) -> u64 {
        match spec {
            ShardSpec::Command(command) => command.memory_bytes,
            _ => spec.models_of(role).iter().filter_map(|model| self.peaks_bytes.get(*model)).sum(),
        }
    }
}
