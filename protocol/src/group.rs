//! What an `[[experiment]]` of a sweep asks of the cluster beside its computation: order, devices, limits.

use serde::{Deserialize, Serialize};

use crate::experiment::projector::TrainSpec;
use crate::hardware::{ComputeCapability, DeviceKind};

/// The shards of one `[[experiment]]`, which lie one behind the other in their run.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Group {
    /// Its name in the sweep; empty if it has none.
    pub name: String,
    /// Index of its first shard.
    pub first: u32,
    /// Number of its shards.
    pub count: u32,
    /// Groups (by index, all earlier) whose shards must have committed before one of this group is placed.
    pub after: Vec<u32>,
    /// What its devices must be.
    pub require: Require,
    /// Trainings of which the scheduler makes rounds, one a cell of the matrix; their stage is
    /// [`crate::experiment::projector::Stage::Whole`]. An experiment has either these or shards.
    #[serde(default)]
    pub trainings: Vec<TrainSpec>,
}

impl Group {
    /// What must be over before those that wait for it may start: its shards and its trainings.
    pub fn parts(&self) -> u32 {
        self.count.saturating_add(u32::try_from(self.trainings.len()).unwrap_or(u32::MAX))
    }
}

/// What a device must be to be given a seat. The default asks for nothing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Require {
    /// Labels `name=value` that its worker must have.
    pub labels: Vec<String>,
    /// Labels `name=value` whose workers go first where the time is about the same.
    pub prefer: Vec<String>,
    /// What must compute there.
    pub device: Option<DeviceKind>,
    /// Product name or a part of it, lower case: `gtx 1080`.
    pub model: Option<String>,
    /// Least compute capability; only GPUs have one.
    pub capability: Option<ComputeCapability>,
    /// A number format that its arithmetic must have.
    pub dtype: Option<Dtype>,
    /// Most that an hour of its worker may cost, millionths of a US dollar.
    pub price_max_microusd_per_hour: Option<u64>,
}

/// Number formats that old cards lack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dtype {
    /// Everywhere.
    F32,
    /// Half precision at a useful rate: compute capability 6.0, or 7.0 and later (6.1 has it at a 64th of the f32 rate).
    F16,
    /// Brain floats: compute capability 8.0 and later.
    Bf16,
}

impl Dtype {
    /// Whether a device computes in it at a useful rate; a processor does in f32 only.
    pub fn works_on(self, capability: Option<ComputeCapability>) -> bool {
        let at_least = |major| capability.is_some_and(|capability| capability.major >= major);
        let pascal_p100 = capability == Some(ComputeCapability { major: 6, minor: 0 });
        match self {
            Self::F32 => true,
            Self::F16 => pascal_p100 || at_least(7),
            Self::Bf16 => at_least(8),
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}

/// Whether `text` is a label: `name=value`, each 1–64 of letters, digits and `-_./`.
pub fn is_label(text: &str) -> bool {
    let word = |word: &str| {
        (1..=64).contains(&word.len()) && word.chars().all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c))
    };
    text.split_once('=').is_some_and(|(name, value)| word(name) && word(value))
}
