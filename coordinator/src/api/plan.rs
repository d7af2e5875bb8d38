//! Requests and answers about what would be: plans, simulations, the throughput table.

use protocol::ids::Role;
use serde::{Deserialize, Serialize};

/// What to plan: a sweep, on the cluster as it is or with other devices.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanRequest {
    /// Name of the sweep's file; empty without one.
    #[serde(default)]
    pub file: String,
    /// The sweep's text; empty: only what waits and runs already.
    #[serde(default)]
    pub text: String,
    /// Devices to add: `gtx-1080:2` or `gtx-1080:2:8GB`.
    #[serde(default)]
    pub add: Vec<String>,
    /// Workers to take away, as in `w3`.
    #[serde(default)]
    pub remove: Vec<String>,
}

/// What would be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlanAnswer {
    /// The sweep's shards.
    pub shards: Vec<PlanShard>,
    /// Its fusers.
    #[serde(default)]
    pub fusers: Vec<PlanFuser>,
    /// From now to the last end, milliseconds; none if something would never end.
    pub makespan_ms: Option<u64>,
    /// The same in one and in nine of ten forecasts.
    pub makespan_spread_ms: Option<(u64, u64)>,
    /// The same without the devices added and with those removed; only if some are.
    pub makespan_as_is_ms: Option<u64>,
    /// Time on devices, milliseconds.
    pub device_ms: u64,
    /// What the workers' operators ask for it, US dollars.
    pub price_usd: f64,
    /// Electricity, kilowatt-hours.
    pub energy_kwh: f64,
}

/// A fuser of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanFuser {
    /// Its experiment's name; empty if it has none.
    pub experiment: String,
    /// From which model into which.
    pub pair: String,
    /// Width that it would have.
    pub hidden: u32,
    /// What it and others would cost, widest first.
    pub widths: Vec<PlanWidth>,
}

/// What a fuser of some width would cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanWidth {
    /// The width.
    pub hidden: u32,
    /// Trained numbers.
    pub parameters: u64,
    /// What a replica sends after its local steps, bytes.
    pub delta_bytes: u64,
    /// What the target's seat takes, bytes.
    pub memory_bytes: u64,
    /// It fits on the devices that are there.
    pub fits: bool,
}

/// A shard of a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlanShard {
    /// Its place in the sweep.
    pub index: u32,
    /// Kind, model and what tells it from its siblings.
    pub summary: String,
    /// Its seats; none if it would not start.
    pub seats: Vec<PlanSeat>,
    /// What its times stand on: measured, near classes, catalogue.
    pub basis: Option<String>,
    /// Why there, or why nowhere.
    pub why: String,
}

/// A seat of a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlanSeat {
    /// Which.
    pub role: Role,
    /// Where, as in `w1/cpu`.
    pub device: String,
    /// Its product name.
    pub model: String,
    /// When it would start, milliseconds from now.
    pub start_ms: u64,
    /// When it would end.
    pub end_ms: u64,
    /// Memory set aside, bytes.
    pub memory_bytes: u64,
}

/// A cell of the throughput table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ThroughputRow {
    /// Work class.
    pub class: String,
    /// Device's product name.
    pub device_model: String,
    /// Units of work a second.
    pub units_per_second: f64,
    /// How far samples lie from that, a factor: 1.5 is half as much again or two thirds, for two of three.
    pub spread: f64,
    /// Finished seats behind it.
    pub samples: u32,
}
