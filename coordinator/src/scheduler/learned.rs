//! What finished and failed attempts teach beside speed: memory peaks, missing kernels, devices that fail.
//!
//! Part of the journaled state; changes only with its events.

use std::collections::BTreeSet;

use protocol::ids::ShardId;
use protocol::time::UnixMillis;
use serde::{Deserialize, Serialize};

/// Failures of different shards in a row that put a device into quarantine.
pub const QUARANTINE_AFTER: usize = 3;
/// First quarantine of a device, milliseconds; doubles with each further one.
pub const QUARANTINE_MS: u64 = 600_000;
/// Most doublings of [`QUARANTINE_MS`]: over ten hours.
const QUARANTINE_DOUBLINGS_MAX: u32 = 6;

/// What a work class was seen to take of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Peak {
    /// Finished seats.
    pub samples: u32,
    /// The most that one took, bytes.
    pub max_bytes: u64,
    /// More than what was not enough, bytes.
    pub floor_bytes: u64,
}

impl Peak {
    /// Takes a finished seat in.
    pub fn saw(&mut self, peak_bytes: u64) {
        self.samples = self.samples.saturating_add(1);
        self.max_bytes = self.max_bytes.max(peak_bytes);
    }

    /// What was set aside was not enough: the next try gets a quarter more.
    pub fn overflowed(&mut self, reserved_bytes: u64) {
        self.floor_bytes = self.floor_bytes.max(reserved_bytes.saturating_add(reserved_bytes / 4));
    }

    /// An estimate as far as it was not refuted.
    pub fn correct(&self, estimate_bytes: u64) -> u64 {
        // What stayed within the estimate says nothing against it.
        let seen = if self.max_bytes > estimate_bytes { self.max_bytes.saturating_add(self.max_bytes / 20) } else { 0 };
        estimate_bytes.max(seen).max(self.floor_bytes)
    }
}

/// How a device's last attempts went.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DeviceRecord {
    /// Shards that failed there since one last succeeded.
    pub failed: BTreeSet<ShardId>,
    /// Until when it gets nothing.
    pub quarantined_until: Option<UnixMillis>,
    /// Quarantines since one last succeeded.
    pub quarantines: u32,
    /// Why the last.
    pub why: String,
}

impl DeviceRecord {
    /// Whether it is time for a quarantine.
    pub fn is_due(&self) -> bool {
        self.failed.len() >= QUARANTINE_AFTER
    }

    /// How long the next quarantine lasts, milliseconds.
    pub fn next_ms(&self) -> u64 {
        QUARANTINE_MS << self.quarantines.min(QUARANTINE_DOUBLINGS_MAX)
    }
}
