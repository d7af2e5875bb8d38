//! What goes wrong, drawn before the first step, so that a history's faults can be printed with its seed.

use protocol::control::FailureKind;

use super::make::{LARGE_MODEL, SMALL_MODEL};
use super::rng::Rng;
use super::scenario::{ANCHORS, BoxPlan, GB};

/// A fault. Boxes and devices by index; times in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// `kill -9` of a worker; up again after `down_ms`.
    WorkerCrash {
        /// The box.
        at: usize,
        /// How long it is down.
        down_ms: u64,
    },
    /// The operator gives a device another budget: the worker restarts with it.
    BudgetChanged {
        /// The box.
        at: usize,
        /// The device.
        device: usize,
        /// Of its budget as planned, percent.
        percent: u64,
    },
    /// A session breaks; both sides notice soon, or each when it is idle for too long.
    SessionLost {
        /// The box.
        at: usize,
        /// The coordinator notices soon.
        noticed: bool,
    },
    /// Nothing gets through between a box and the coordinator.
    Partition {
        /// The box.
        at: usize,
        /// For how long.
        ms: u64,
    },
    /// A card works 20 times slower.
    SlowCard {
        /// The box.
        at: usize,
        /// The device.
        device: usize,
        /// For how long.
        ms: u64,
    },
    /// A card says what is not so: memory that it does not have, seats that it does not hold, results of others.
    LyingCard {
        /// The box.
        at: usize,
        /// The device.
        device: usize,
        /// For how long.
        ms: u64,
    },
    /// A card answers its driver no more: what runs there fails, telemetry says so.
    SickCard {
        /// The box.
        at: usize,
        /// The device.
        device: usize,
        /// For how long.
        ms: u64,
    },
    /// Results can be made but not published.
    FullDisk {
        /// The box.
        at: usize,
        /// For how long.
        ms: u64,
    },
    /// Other people's processes take memory of a device.
    ForeignMemory {
        /// The box.
        at: usize,
        /// The device.
        device: usize,
        /// How much.
        bytes: u64,
        /// For how long.
        ms: u64,
    },
    /// A model that was reported is not there.
    ModelLost {
        /// The box.
        at: usize,
        /// The model.
        model: &'static str,
        /// For how long.
        ms: u64,
    },
    /// A seat that runs fails.
    SeatFails {
        /// The box.
        at: usize,
        /// How.
        kind: FailureKind,
    },
    /// `kill -9` of the coordinator at a point of its turn; up again after `down_ms`.
    CoordinatorKilled {
        /// Where in the turn.
        stage: Stage,
        /// How long it is down.
        down_ms: u64,
    },
    /// The journal takes this long for one batch.
    SlowJournal {
        /// How long.
        ms: u64,
    },
    /// The coordinator's clock jumps.
    ClockJump {
        /// By how much; below 0: back.
        by_ms: i64,
    },
}

/// Where in its turn the coordinator is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Between two turns: messages that are there are lost.
    Idle,
    /// It has decided but not begun to write.
    Decided,
    /// While it writes; the batch is lost.
    Torn,
    /// While it writes; the batch turns out to be durable.
    Written,
    /// When it is durable, after so many effects.
    Acting(usize),
}

/// What people order beside runs. Workers and runs by index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// Cancel a run.
    Cancel(usize),
    /// Retry a run.
    Retry(usize),
    /// Drain a worker.
    Drain(usize),
    /// Undrain a worker.
    Undrain(usize),
    /// Revoke a worker.
    Revoke(usize),
}

impl Fault {
    /// Its name, for counting.
    pub fn name(&self) -> &'static str {
        match self {
            Self::WorkerCrash { .. } => "worker crash",
            Self::BudgetChanged { .. } => "budget changed",
            Self::SessionLost { .. } => "session lost",
            Self::Partition { .. } => "partition",
            Self::SlowCard { .. } => "slow card",
            Self::LyingCard { .. } => "lying card",
            Self::SickCard { .. } => "sick card",
            Self::FullDisk { .. } => "full disk",
            Self::ForeignMemory { .. } => "foreign memory",
            Self::ModelLost { .. } => "model lost",
            Self::SeatFails { .. } => "seat fails",
            Self::CoordinatorKilled { .. } => "coordinator killed",
            Self::SlowJournal { .. } => "slow journal",
            Self::ClockJump { .. } => "clock jump",
        }
    }
}

/// Draws the faults of a history, by time.
pub fn draw(rng: &mut Rng, boxes: &[BoxPlan], safety_ms: u64, lease_ttl_ms: u64) -> Vec<(u64, Fault)> {
    // Some histories are calm, some are stormy; each leaves some kinds of faults out, so that others are seen alone.
    let count = *rng.pick(&[3, 12, 30, 60]);
    let left_out: Vec<u64> = (0..rng.between(0, 8)).map(|_| rng.between(0, KINDS - 1)).collect();
    let mut faults = Vec::new();
    for _ in 0..count {
        let (at_ms, kind) = (rng.between(0, safety_ms), rng.between(0, KINDS - 1));
        let fault = draw_one(rng, kind, boxes, lease_ttl_ms);
        if !left_out.contains(&kind) {
            faults.push((at_ms, fault));
        }
    }
    faults.sort_by_key(|(at_ms, _)| *at_ms);
    faults
}

const KINDS: u64 = 16;

fn draw_one(rng: &mut Rng, kind: u64, boxes: &[BoxPlan], lease_ttl_ms: u64) -> Fault {
    let at = rng.index(boxes.len());
    let device = rng.index(boxes[at].devices.len());
    let ms = rng.between(200, 40_000);
    // Shorter and longer than a lease, and around it.
    let down_ms = *rng.pick(&[100, 3_000, lease_ttl_ms - 1_000, lease_ttl_ms + 1_000, 2 * lease_ttl_ms]);
    match kind {
        0 | 1 => Fault::WorkerCrash { at, down_ms },
        2 => Fault::BudgetChanged { at, device, percent: rng.between(20, 100) },
        3 => Fault::SessionLost { at, noticed: rng.chance(500) },
        4 | 5 => Fault::Partition { at, ms: down_ms },
        6 => Fault::SlowCard { at, device, ms },
        7 => Fault::LyingCard { at, device, ms },
        8 => Fault::SickCard { at, device, ms },
        9 => Fault::FullDisk { at, ms },
        10 => Fault::ForeignMemory { at, device, bytes: rng.between(5, 80) * GB / 10, ms },
        11 => Fault::ModelLost { at, model: [SMALL_MODEL, LARGE_MODEL][rng.index(2)], ms },
        12 => Fault::SeatFails { at, kind: FailureKind::from(rng.between(1, 19) as u16) },
        13 => Fault::SlowJournal { ms: rng.between(500, 6_000) },
        14 => Fault::ClockJump { by_ms: *rng.pick(&[-20_000, -2_000, 2_000, 15_000, 60_000]) },
        _ => {
            let stage = match rng.between(0, 5) {
                0 => Stage::Idle,
                1 => Stage::Decided,
                2 => Stage::Torn,
                3 => Stage::Written,
                _ => Stage::Acting(rng.index(3)),
            };
            Fault::CoordinatorKilled { stage, down_ms }
        }
    }
}

/// Draws what people order, by time.
pub fn draw_orders(rng: &mut Rng, boxes: usize, runs: usize, safety_ms: u64) -> Vec<(u64, Order)> {
    let mut orders = Vec::new();
    for _ in 0..rng.between(0, 8) {
        let (at_ms, box_index, run) = (rng.between(0, safety_ms), rng.index(boxes), rng.index(runs));
        // Late enough that something has failed.
        let retry_ms = (at_ms + safety_ms) / 2;
        let (at_ms, order) = match rng.between(0, 11) {
            0 | 1 => (at_ms, Order::Cancel(run)),
            2..=5 => (retry_ms, Order::Retry(run)),
            6..=8 => (at_ms, Order::Drain(box_index)),
            9 | 10 => (at_ms, Order::Undrain(box_index)),
            // An anchor must stay, or some shard could not end.
            _ if box_index >= ANCHORS => (at_ms, Order::Revoke(box_index)),
            _ => (at_ms, Order::Drain(box_index)),
        };
        orders.push((at_ms, order));
    }
    orders.sort_by_key(|(at_ms, _)| *at_ms);
    orders
}
