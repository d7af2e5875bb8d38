//! What is drawn from a seed before the first step: the cluster, the work, the faults, and what is true about them.
//!
//! A scenario can also be made by hand ([`Scenario::quiet`]): a cluster without faults, for predictions.

use std::collections::BTreeMap;
use std::fmt;

use protocol::control::Terms;
use protocol::experiment::projector::{ProjectorRef, TrainSpec};
use protocol::experiment::{ShardSpec, Spread};
use protocol::hardware::{DeviceKind, Speed};
use protocol::ids::DeviceId;

use crate::scheduler::Settings;
use crate::scheduler::event::Policy;

use super::fault::{self, Fault, Order};
use super::make::{self, LARGE_MODEL, PATH_MODEL, SMALL_MODEL};
use super::rng::{Rng, Stream};
use super::sabotage::Sabotage;
use super::truth::Truth;

/// Decimal gigabyte.
pub const GB: u64 = 1_000_000_000;
/// Boxes with a processor large enough for any seat, never revoked, never gone for good: with them every shard can end.
pub const ANCHORS: usize = 2;
/// Product name, memory in GB, compute capability times ten, and how many times faster than a processor.
const CARDS: [(&str, u64, u16, u64); 5] = [
    ("NVIDIA GeForce GTX 1080", 8, 61, 6),
    ("NVIDIA GeForce GTX 1660 SUPER", 6, 75, 8),
    ("NVIDIA GeForce RTX 3090", 24, 86, 30),
    ("NVIDIA GeForce GTX 1050 Ti", 4, 61, 3),
    ("NVIDIA GeForce GTX 1080 Ti", 11, 61, 9),
];
const PROCESSORS: [(&str, u64); 2] = [("Old CPU", 1), ("Newer CPU", 2)];

/// Everything about a history but its draws on the way.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// Where the rest comes from.
    pub seed: u64,
    /// The operator's settings.
    pub settings: Settings,
    /// The boxes; which becomes which worker is found out.
    pub boxes: Vec<BoxPlan>,
    /// Runs by the time of their submission.
    pub runs: Vec<RunPlan>,
    /// What is true.
    pub truth: Truth,
    /// The wires.
    pub wire: WirePlan,
    /// Time that the journal's disk takes for a batch, milliseconds, least and most.
    pub disk_ms: (u64, u64),
    /// Faults by time.
    pub faults: Vec<(u64, Fault)>,
    /// What people order beside runs, by time.
    pub orders: Vec<(u64, Order)>,
    /// Boxes (by index) that are gone for good when the faults end.
    pub gone: Vec<usize>,
    /// How long anything may go wrong, milliseconds.
    pub safety_ms: u64,
    /// How long everything may take after that until every shard is over, milliseconds.
    pub liveness_ms: u64,
    /// Every check at every step; without, only what is needed to predict: a large cluster costs less.
    pub checked: bool,
    /// What is broken on purpose.
    pub sabotage: Option<Sabotage>,
}

/// A box.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BoxPlan {
    /// Its devices.
    pub devices: Vec<DevicePlan>,
    /// Models on it, paths among them.
    pub models: Vec<String>,
    /// What its operator says of it.
    pub terms: Terms,
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DevicePlan {
    /// Its id.
    pub id: DeviceId,
    /// What computes.
    pub kind: DeviceKind,
    /// Product name.
    pub model: String,
    /// Compute capability times ten; 0 for processors.
    pub capability: u16,
    /// All memory, bytes.
    pub total_bytes: u64,
    /// Memory that may be used, bytes.
    pub budget_bytes: u64,
    /// What a short benchmark measured.
    pub speed: Option<Speed>,
}

/// A run.
#[derive(Debug, Clone)]
pub struct RunPlan {
    /// When it is submitted, milliseconds.
    pub at_ms: u64,
    /// Its priority.
    pub priority: i32,
    /// Whose share it takes.
    pub account: String,
    /// Most of its shards that may run at once; 0: no limit.
    pub running_max: u32,
    /// Its shards.
    pub specs: Vec<ShardSpec>,
    /// Its trainings, one after another.
    pub trainings: Vec<TrainSpec>,
    /// The shards wait for the trainings.
    pub after_trainings: bool,
}

/// How wires behave.
#[derive(Debug, Clone, Copy)]
pub struct WirePlan {
    /// One way, milliseconds, least and most.
    pub latency_ms: (u64, u64),
    /// A side that hears nothing for this long gives a session up, milliseconds; less than a lease's life.
    pub idle_ms: u64,
    /// Messages that arrive twice, of 1000.
    pub duplicate_permille: u64,
    /// Outcomes that arrive once more much later, of 1000.
    pub late_permille: u64,
}

impl Scenario {
    /// Draws everything from `seed`.
    pub fn draw(seed: u64) -> Self {
        let rng = &mut Rng::new(seed, Stream::Cluster);
        let lease_ttl_ms = rng.between(8, 30) * 1000;
        let safety_ms = rng.between(40, 200) * 1000;
        // In a crowded cluster shards wait for devices; in others devices wait for shards.
        let crowded = rng.chance(400);
        let boxes =
            (0..rng.between(2, if crowded { 3 } else { 6 }) as usize).map(|index| draw_box(rng, index, crowded));
        let boxes: Vec<_> = boxes.collect();
        let truth = draw_truth(rng, if crowded { 4 } else { 1 });
        let mut runs = draw_runs(rng, safety_ms);
        let wire = WirePlan {
            latency_ms: *rng.pick(&[(0, 1), (1, 5), (5, 60), (1, 900)]),
            idle_ms: lease_ttl_ms * 2 / 3,
            duplicate_permille: *rng.pick(&[0, 10, 100]),
            late_permille: *rng.pick(&[0, 50, 300]),
        };
        let disk_ms = *rng.pick(&[(0, 0), (1, 8), (1, 40), (5, 1500)]);
        let settings = make::settings(lease_ttl_ms, rng.between(2, 5) as u32, draw_policy(rng));
        draw_trainings(&mut Rng::new(seed, Stream::Trainings), &mut runs);
        let rng = &mut Rng::new(seed, Stream::Faults);
        let faults = fault::draw(rng, &boxes, safety_ms, lease_ttl_ms);
        let orders = fault::draw_orders(rng, boxes.len(), runs.len(), safety_ms);
        let gone = (ANCHORS..boxes.len()).filter(|_| rng.chance(250)).collect();
        Self {
            seed,
            settings,
            boxes,
            runs,
            truth,
            wire,
            disk_ms,
            faults,
            orders,
            gone,
            safety_ms,
            liveness_ms: 4 * 3_600_000,
            checked: true,
            sabotage: None,
        }
    }

    /// A cluster without faults and checks in which `runs` must end within `liveness_ms`.
    pub fn quiet(seed: u64, boxes: Vec<BoxPlan>, runs: Vec<RunPlan>, truth: Truth, liveness_ms: u64) -> Self {
        Self {
            seed,
            settings: Settings::default(),
            boxes,
            runs,
            truth,
            wire: WirePlan { latency_ms: (1, 1), idle_ms: 20_000, duplicate_permille: 0, late_permille: 0 },
            disk_ms: (1, 1),
            faults: Vec::new(),
            orders: Vec::new(),
            gone: Vec::new(),
            safety_ms: 0,
            liveness_ms,
            checked: false,
            sabotage: None,
        }
    }

    /// Shards of all runs.
    pub fn shards(&self) -> usize {
        self.runs.iter().map(|run| run.specs.len()).sum()
    }
}

/// All drawn parameters, one a line.
impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {}", self.seed)?;
        writeln!(
            f,
            "lease {} ms, tries {}, {}, safety {} ms, disk {:?} ms, {:?}",
            self.settings.lease_ttl_ms,
            self.settings.attempts_max,
            self.settings.policy,
            self.safety_ms,
            self.disk_ms,
            self.wire
        )?;
        for (index, body) in self.boxes.iter().enumerate() {
            let gone = if self.gone.contains(&index) { ", gone in the end" } else { "" };
            write!(f, "box {index} models {:?}, {:?}{gone}:", body.models, body.terms)?;
            for device in &body.devices {
                write!(f, " [{} {} {} of {} B]", device.id, device.model, device.budget_bytes, device.total_bytes)?;
            }
            writeln!(f)?;
        }
        for (index, run) in self.runs.iter().enumerate() {
            let mut kinds = BTreeMap::<String, usize>::new();
            for spec in &run.specs {
                *kinds.entry(format!("{} {:?}", spec.work_class(), spec.spread())).or_default() += 1;
            }
            for training in &run.trainings {
                let spec = ShardSpec::ProjectorTrain(Box::new(training.clone()));
                *kinds.entry(format!("{} {:?}", spec.summary(), spec.spread())).or_default() += 1;
            }
            writeln!(
                f,
                "submission {} at {} ms, priority {}, account {:?}, at most {}: {kinds:?}",
                index + 1,
                run.at_ms,
                run.priority,
                run.account,
                run.running_max
            )?;
        }
        writeln!(f, "peaks {:?}", self.truth.peaks_bytes)?;
        for (at_ms, fault) in &self.faults {
            writeln!(f, "{at_ms} ms {fault:?}")?;
        }
        for (at_ms, order) in &self.orders {
            writeln!(f, "{at_ms} ms {order:?}")?;
        }
        Ok(())
    }
}

fn draw_policy(rng: &mut Rng) -> Policy {
    if rng.chance(700) { Policy::default() } else { *rng.pick(&Policy::ALL) }
}

fn draw_box(rng: &mut Rng, index: usize, crowded: bool) -> BoxPlan {
    let anchor = index < ANCHORS;
    let (name, _) = *rng.pick(&PROCESSORS);
    let budget_gb = if anchor { rng.between(5, 14) } else { rng.between(1, 6) };
    let mut devices = Vec::new();
    if anchor || rng.chance(800) {
        devices.push(DevicePlan {
            id: DeviceId("cpu".to_owned()),
            kind: DeviceKind::Cpu,
            model: name.to_owned(),
            capability: 0,
            total_bytes: budget_gb * 2 * GB,
            budget_bytes: budget_gb * GB,
            speed: None,
        });
    }
    let cards_max = if crowded { 1 } else { 4 };
    let cards = rng.between(u64::from(devices.is_empty()), cards_max);
    for number in 0..cards {
        let (name, total_gb, capability, speed) = *rng.pick(&CARDS);
        devices.push(DevicePlan {
            id: DeviceId(format!("GPU-{index}-{number}")),
            kind: DeviceKind::Cuda,
            model: name.to_owned(),
            capability,
            total_bytes: total_gb * GB,
            budget_bytes: total_gb * GB - rng.between(0, 10) * GB / 10,
            speed: rng
                .chance(500)
                .then_some(Speed { f32_mflops: speed * 900_000, memory_bytes_per_second: speed * 25 * GB }),
        });
    }
    let known = [SMALL_MODEL, LARGE_MODEL, PATH_MODEL];
    let models = known.into_iter().filter(|_| anchor || rng.chance(750)).map(str::to_owned).collect();
    let terms = Terms {
        labels: vec![format!("row={}", rng.between(1, 3))],
        price_microusd_per_hour: if anchor { 0 } else { *rng.pick(&[0, 0, 200_000]) },
        commands: anchor || rng.chance(700),
        ahead: *rng.pick(&[0, 0, 2, 16]),
    };
    BoxPlan { devices, models, terms }
}

fn draw_truth(rng: &mut Rng, factor: u64) -> Truth {
    let otherwise_ms = rng.between(200, 12_000) * factor;
    let mut truth = Truth { otherwise_ms, ..Truth::default() };
    for spec in example_specs() {
        let base_ms = rng.between(200, 12_000) * factor;
        let models = PROCESSORS.iter().map(|(name, speed)| (*name, *speed)).chain(CARDS.map(|card| (card.0, card.3)));
        for (model, speed) in models {
            // One factor a card is wrong by up to some times: each class has its own.
            let duration_ms = base_ms * rng.between(5, 20) / 10 / speed;
            truth.durations_ms.insert((spec.work_class(), model.to_owned()), duration_ms.max(20));
        }
    }
    for model in [SMALL_MODEL, LARGE_MODEL, PATH_MODEL] {
        truth.peaks_bytes.insert(model.to_owned(), rng.between(3, 40) * GB / 10);
    }
    truth
}

fn example_specs() -> Vec<ShardSpec> {
    let of_model = |model: &str| [make::inspect(model, 0), make::transfer(model, Spread::Any, 0)];
    let others = [make::no_op(0), make::command(make::PROGRAM, 0)];
    [SMALL_MODEL, LARGE_MODEL, PATH_MODEL].into_iter().flat_map(of_model).chain(others).collect()
}

fn draw_runs(rng: &mut Rng, safety_ms: u64) -> Vec<RunPlan> {
    let mut runs: Vec<_> = (0..rng.between(1, 4)).map(|_| draw_run(rng, safety_ms)).collect();
    runs.sort_by_key(|run| run.at_ms);
    runs
}

fn draw_run(rng: &mut Rng, safety_ms: u64) -> RunPlan {
    let share_of_pairs = *rng.pick(&[0, 200, 700]);
    let specs = (0..rng.between(1, 16)).map(|seed| {
        let model = if rng.chance(60) { PATH_MODEL } else { *rng.pick(&[SMALL_MODEL, SMALL_MODEL, LARGE_MODEL]) };
        let other = rng.between(0, 9);
        match rng.chance(share_of_pairs) {
            false if other == 0 => make::no_op(seed as u32),
            false if other == 1 => make::command(make::PROGRAM, rng.between(1, 30) * GB / 10),
            true => make::transfer(model, *rng.pick(&[Spread::Any, Spread::Devices, Spread::Workers]), seed),
            false => make::inspect(model, seed),
        }
    });
    let specs = specs.collect();
    RunPlan {
        at_ms: rng.between(0, safety_ms * 3 / 4),
        priority: rng.between(0, 2) as i32,
        account: (*rng.pick(&["", "ann", "bob"])).to_owned(),
        running_max: *rng.pick(&[0, 0, 0, 3]),
        specs,
        trainings: Vec::new(),
        after_trainings: false,
    }
}

/// Trainings of a third of the runs, drawn apart so that the rest of a seed stays what it was: ridge, a fuser that refines it,
/// or one from nothing.
fn draw_trainings(rng: &mut Rng, runs: &mut [RunPlan]) {
    for run in runs {
        if !rng.chance(350) {
            continue;
        }
        run.after_trainings = rng.chance(500);
        let samples = rng.between(1, 200) as u32;
        let base = rng.chance(600).then(|| make::training(make::ridge(), samples, rng.between(1, 4) as u32));
        let width = *rng.pick(&[0, 64]);
        let refined = base.as_ref().map(|_| ProjectorRef::Trained(0));
        let fuser = make::training(make::fuser(width, refined), samples, rng.between(1, 4) as u32);
        let fuser = (base.is_none() || rng.chance(700)).then_some(fuser);
        run.trainings = base.into_iter().chain(fuser).collect();
        for training in &mut run.trainings {
            training.spread = *rng.pick(&[Spread::Any, Spread::Any, Spread::Devices, Spread::Workers]);
        }
    }
}
