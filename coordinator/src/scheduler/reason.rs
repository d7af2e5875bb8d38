//! Why a device would do for a seat, or not: typed for decisions, worded for people.
//!
//! Does not look at any state: [`super::placement`] picks the reason.

use std::fmt;

use protocol::ids::{AttemptId, DeviceRef};
use protocol::time::UnixMillis;
use serde::{Deserialize, Serialize};

use super::status::Verdict;

/// A device with the reason it got.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rated {
    /// The device.
    pub device: DeviceRef,
    /// Why it was taken or not.
    pub reason: Reason,
}

/// Why a device would do for a seat, or not. Displays as a fragment that fits behind the device's name and a colon.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Reason {
    /// A seat was put there: it had the most free memory of what fits.
    Chosen {
        /// Free for bonepile before, bytes.
        free_bytes: u64,
    },
    /// It would do.
    Fits {
        /// Free for bonepile, bytes.
        free_bytes: u64,
    },
    /// The worker's certificate was revoked.
    Revoked,
    /// Nothing can run there.
    Unusable {
        /// Why, from its worker.
        why: String,
    },
    /// The worker does not have a model.
    ModelAbsent {
        /// As the spec names it.
        model: String,
    },
    /// Even empty it has too little memory for bonepile.
    BudgetTooSmall {
        /// Needed, bytes.
        need_bytes: u64,
        /// The operator's budget, bytes.
        budget_bytes: u64,
    },
    /// The worker is not connected.
    Offline,
    /// The worker has not been heard of for a while.
    Silent {
        /// Since when.
        since: UnixMillis,
    },
    /// The worker is being drained.
    Draining,
    /// The device answers no more.
    Sick {
        /// The driver's words.
        what: String,
    },
    /// The worker has not yet told how much memory is free.
    NotMeasured,
    /// As many attempts as fit by count run there.
    Busy {
        /// One of them.
        attempt: AttemptId,
    },
    /// Too much of its memory is in use, by bonepile or by others.
    MemoryShort {
        /// Needed, bytes.
        need_bytes: u64,
        /// Free for bonepile, bytes.
        free_bytes: u64,
    },
    /// The shard failed there and another device may do.
    FailedHere {
        /// The attempt that failed.
        attempt: AttemptId,
    },
}

impl Reason {
    /// Whether waiting may help.
    pub fn verdict(&self) -> Verdict {
        match self {
            Self::Chosen { .. } => Verdict::Chosen,
            Self::Fits { .. } => Verdict::Fits,
            Self::Revoked | Self::Unusable { .. } | Self::ModelAbsent { .. } | Self::BudgetTooSmall { .. } => {
                Verdict::Never
            }
            Self::Offline
            | Self::Silent { .. }
            | Self::Draining
            | Self::Sick { .. }
            | Self::NotMeasured
            | Self::Busy { .. }
            | Self::MemoryShort { .. }
            | Self::FailedHere { .. } => Verdict::NotNow,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chosen { free_bytes } => write!(f, "chosen, had {} free", Bytes(*free_bytes)),
            Self::Fits { free_bytes } => write!(f, "fits, {} free", Bytes(*free_bytes)),
            Self::Revoked => f.write_str("its worker's certificate was revoked"),
            Self::Unusable { why } => write!(f, "not usable: {why}"),
            Self::ModelAbsent { model } => write!(f, "its worker lacks the model {model}"),
            Self::BudgetTooSmall { need_bytes, budget_bytes } => {
                write!(f, "its budget of {} is less than {}", Bytes(*budget_bytes), Bytes(*need_bytes))
            }
            Self::Offline => f.write_str("its worker is not connected"),
            Self::Silent { .. } => f.write_str("its worker is silent"),
            Self::Draining => f.write_str("its worker is draining"),
            Self::Sick { what } => write!(f, "sick: {what}"),
            Self::NotMeasured => f.write_str("its worker has not yet told how much memory is free"),
            Self::Busy { attempt } => write!(f, "busy with {attempt}"),
            Self::MemoryShort { need_bytes, free_bytes } => {
                write!(f, "{} free, {} needed", Bytes(*free_bytes), Bytes(*need_bytes))
            }
            Self::FailedHere { attempt } => write!(f, "{attempt} failed there, another device goes first"),
        }
    }
}

/// Bytes for people: `1.3 GB`, `250 MB`, decimal as in vendors' figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            1_000_000_000.. => write!(f, "{}.{} GB", self.0 / 1_000_000_000, self.0 / 100_000_000 % 10),
            1_000_000.. => write!(f, "{} MB", self.0 / 1_000_000),
            _ => write!(f, "{} kB", self.0 / 1_000),
        }
    }
}
