//! Devices as workers report them. Units are bytes, watts, degrees Celsius, percent.
//!
//! Does not read any hardware: the worker's inventory does.

use serde::{Deserialize, Serialize};

use crate::ids::DeviceId;

/// What computes on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceKind {
    /// The box's processor and main memory.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

impl std::fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        })
    }
}

/// A GPU's compute capability: 6.1 for a GTX 1080.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ComputeCapability {
    /// Before the point.
    pub major: u16,
    /// Behind the point.
    pub minor: u16,
}

impl std::fmt::Display for ComputeCapability {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// A device as its worker reports it in the greeting: what does not change while the worker runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// GPU UUID, or `cpu`.
    pub id: DeviceId,
    /// What computes there.
    pub kind: DeviceKind,
    /// Product name: `NVIDIA GeForce GTX 1660 SUPER`, or the processor's brand.
    pub model: String,
    /// Only for GPUs.
    pub compute_capability: Option<ComputeCapability>,
    /// All memory, bytes.
    pub memory_total_bytes: u64,
    /// Memory that bonepile may use, bytes: the operator's budget, at most the total.
    pub memory_budget_bytes: u64,
    /// Compute threads of an executor here (1 or more).
    pub threads: u32,
    /// Why nothing may run here (no executor build for this card, say); `None` if it is usable.
    pub unusable: Option<String>,
    /// What a short benchmark measured here; `None` if there was none.
    #[serde(default)]
    pub speed: Option<Speed>,
}

/// What a short benchmark of a device measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Speed {
    /// Products of f32 matrices, millions of floating-point operations a second.
    pub f32_mflops: u64,
    /// Reading memory, bytes a second.
    pub memory_bytes_per_second: u64,
}

impl Speed {
    /// Products of matrices, millions of operations a second.
    pub fn mflops(self) -> u64 {
        self.f32_mflops
    }
}

/// What changes about a device, sent with each heartbeat. A field that card or driver does not support is `None`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Telemetry {
    /// Which device.
    pub device: DeviceId,
    /// Memory free for anyone, bytes, as the driver or the kernel says.
    pub memory_free_bytes: u64,
    /// Memory held by this device's executors, bytes.
    pub memory_ours_bytes: u64,
    /// How busy, 0–100.
    pub utilisation_percent: Option<u32>,
    /// Degrees Celsius.
    pub temperature_celsius: Option<u32>,
    /// Draw, milliwatts.
    pub power_milliwatts: Option<u64>,
    /// Text of the driver's error if the device answers no more.
    pub sick: Option<String>,
}
