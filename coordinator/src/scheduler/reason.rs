//! Why a device would do for a seat, or not: typed for decisions, worded for people.
//!
//! Does not look at any state: [`super::placement`] picks the reason.

use std::fmt;

use protocol::ids::{AttemptId, DeviceRef};
use protocol::time::UnixMillis;
use serde::{Deserialize, Serialize};

use super::status::Verdict;
use super::throughput::Basis;

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
    /// A seat was put there: it is expected to end earliest there.
    Chosen {
        /// Free for bonepile before, bytes.
        free_bytes: u64,
        /// Expected time there, milliseconds.
        #[serde(default)]
        expected_ms: u64,
        /// How the time was predicted.
        #[serde(default)]
        basis: Option<Basis>,
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
    /// The worker's operator does not let programs of researchers run.
    CommandsForbidden,
    /// The worker lacks a label that the experiment asks for.
    LabelAbsent {
        /// `name=value`.
        label: String,
    },
    /// The experiment asks for another sort of device.
    OtherDevice {
        /// What it asks for.
        wanted: String,
    },
    /// Its compute capability is too low, or it has none.
    CapabilityLow {
        /// The least that will do.
        least: String,
    },
    /// It does not compute in a number format at a useful rate.
    DtypeAbsent {
        /// `bf16`.
        dtype: String,
    },
    /// An hour of it costs more than the experiment may pay.
    PriceHigh {
        /// Its price, millionths of a US dollar.
        price_microusd_per_hour: u64,
        /// The most allowed, millionths of a US dollar.
        max_microusd_per_hour: u64,
    },
    /// The worker's build has no kernel for this card for this class of work, as was found by trying.
    NoKernel,
    /// Several shards in a row failed there.
    Quarantined {
        /// When it gets another try.
        until: UnixMillis,
    },
    /// It would end there later than elsewhere, waiting for that included.
    Slower {
        /// Expected time there, milliseconds.
        expected_ms: u64,
    },
    /// Kept free for a shard that needs several devices at once.
    Held,
}

impl Reason {
    /// Whether waiting may help.
    pub fn verdict(&self) -> Verdict {
        match self {
            Self::Chosen { .. } => Verdict::Chosen,
            Self::Fits { .. } => Verdict::Fits,
            Self::Revoked
            | Self::Unusable { .. }
            | Self::ModelAbsent { .. }
            | Self::BudgetTooSmall { .. }
            | Self::CommandsForbidden
            | Self::LabelAbsent { .. }
            | Self::OtherDevice { .. }
            | Self::CapabilityLow { .. }
            | Self::DtypeAbsent { .. }
            | Self::PriceHigh { .. }
            | Self::NoKernel => Verdict::Never,
            Self::Offline
            | Self::Silent { .. }
            | Self::Draining
            | Self::Sick { .. }
            | Self::NotMeasured
            | Self::Busy { .. }
            | Self::MemoryShort { .. }
            | Self::Quarantined { .. }
            | Self::Slower { .. }
            | Self::Held
            | Self::FailedHere { .. } => Verdict::NotNow,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chosen { free_bytes, expected_ms, basis } => {
                write!(f, "chosen, had {} free", Bytes(*free_bytes))?;
                match basis {
                    Some(basis) => write!(f, ", {} expected ({basis})", Span(*expected_ms)),
                    None => Ok(()),
                }
            }
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
            Self::CommandsForbidden => {
                f.write_str("its operator does not allow commands (`bonepile-worker run --allow-commands`)")
            }
            Self::LabelAbsent { label } => write!(f, "its worker has no label {label}"),
            Self::OtherDevice { wanted } => write!(f, "the experiment asks for {wanted}"),
            Self::CapabilityLow { least } => write!(f, "its compute capability is below {least}"),
            Self::DtypeAbsent { dtype } => write!(f, "it does not compute in {dtype} at a useful rate"),
            Self::PriceHigh { price_microusd_per_hour, max_microusd_per_hour } => write!(
                f,
                "an hour of it costs {}, the experiment pays {}",
                Dollars(*price_microusd_per_hour),
                Dollars(*max_microusd_per_hour)
            ),
            Self::NoKernel => f.write_str("its build has no kernel for this card for such work"),
            Self::Quarantined { .. } => {
                f.write_str("in quarantine after several failures in a row (`bonepile release` ends it)")
            }
            Self::Slower { expected_ms } => {
                write!(f, "would take {} there, waiting for another ends earlier", Span(*expected_ms))
            }
            Self::Held => f.write_str("kept free for a shard that needs several devices at once"),
        }
    }
}

/// A time for people: `850 ms`, `12 s`, `3 min`, `2.5 h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span(pub u64);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0..1_000 => write!(f, "{} ms", self.0),
            1_000..120_000 => write!(f, "{} s", (self.0 + 500) / 1000),
            120_000..7_200_000 => write!(f, "{} min", (self.0 + 30_000) / 60_000),
            _ => write!(f, "{}.{} h", self.0 / 3_600_000, self.0 / 360_000 % 10),
        }
    }
}

/// Money for people, from millionths of a US dollar: `$0.35`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dollars(pub u64);

impl fmt::Display for Dollars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("$0"),
            1..10_000 => write!(f, "${}.{:06}", self.0 / 1_000_000, self.0 % 1_000_000),
            _ => write!(f, "${}.{:02}", self.0 / 1_000_000, self.0 / 10_000 % 100),
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
