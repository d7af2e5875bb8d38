//! One large cluster without faults: what a decision costs, and how the cost grows with the queue.
//!
//! Nothing is checked here; the journal is counted and dropped. Time is measured by the caller's clock.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use protocol::control::{Terms, ToWorker};
use protocol::hardware::DeviceKind;
use protocol::ids::{AttemptId, DeviceId, Role, WorkerId};
use protocol::limits::{HEARTBEAT_INTERVAL_MS, SHARDS_PER_RUN_MAX};
use protocol::time::UnixMillis;

use super::make::{self, EPOCH_MS};
use super::queue::Queue;
use super::rng::{Rng, Stream};
use super::scenario::{BoxPlan, DevicePlan, GB, RunPlan};
use crate::scheduler::{Answer, Effect, Event, Input, Scheduler};

/// Devices of a box.
pub const DEVICES_PER_BOX: usize = 8;
/// Most inputs handled before events are taken, as the driver's.
const BATCH_MAX: usize = 256;
/// A shard takes this long, milliseconds, least and most.
const SHARD_MS: (u64, u64) = (20_000, 40_000);

/// How large, and how far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Shards of the whole run; of a sample: shards that still wait behind those that run when it ends.
    pub shards: usize,
    /// Devices in all.
    pub devices: usize,
    /// A sample: stop after so many placements once the cluster is full. `None`: go on until every shard is over.
    pub placements: Option<usize>,
    /// Stop after this much time inside the scheduler.
    pub busy_max: Duration,
}

/// What was measured.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Measured {
    /// Shards queued at the beginning.
    pub shards: usize,
    /// Workers.
    pub workers: usize,
    /// Devices.
    pub devices: usize,
    /// Placements in all.
    pub placements: u64,
    /// Commits.
    pub commits: u64,
    /// Inputs.
    pub inputs: u64,
    /// Time inside the scheduler from the first run's submission on.
    pub busy: Duration,
    /// Placements after the first shard was over: the cluster is full.
    pub steady_placements: u64,
    /// Time inside the scheduler after that, signs of life included.
    pub steady_busy: Duration,
    /// Signs of life after that.
    pub steady_beats: u64,
    /// Time inside the scheduler for them.
    pub steady_beats_busy: Duration,
    /// Virtual time, milliseconds.
    pub virtual_ms: u64,
    /// Stopped by [`Size::busy_max`].
    pub cut_short: bool,
}

impl Measured {
    /// Placements a second of the scheduler's time.
    pub fn decisions_per_second(&self) -> u64 {
        per_second(self.placements, self.busy)
    }

    /// Nanoseconds a placement once the cluster is full, everything included.
    pub fn decision_ns(&self) -> u64 {
        nanoseconds_each(self.steady_busy, self.steady_placements)
    }

    /// Nanoseconds a sign of life once the cluster is full.
    pub fn beat_ns(&self) -> u64 {
        nanoseconds_each(self.steady_beats_busy, self.steady_beats)
    }
}

fn nanoseconds_each(time: Duration, count: u64) -> u64 {
    u64::try_from(time.as_nanos() / u128::from(count.max(1))).unwrap_or(u64::MAX)
}

fn per_second(count: u64, time: Duration) -> u64 {
    let rate = u128::from(count) * 1_000_000_000 / time.as_nanos().max(1);
    u64::try_from(rate).unwrap_or(u64::MAX)
}

#[derive(Debug, Clone, Copy)]
enum Happening {
    Beat(usize),
    Finished(usize, AttemptId, Role),
}

/// Runs a cluster of this size; `clock` tells the time that this thread has computed.
///
/// # Panics
/// If the scheduler refuses what it must take.
pub fn run(size: Size, clock: &dyn Fn() -> Duration) -> Measured {
    let mut plant = Plant::new(size, clock);
    plant.join();
    plant.submit();
    plant.work();
    plant.measured
}

struct Plant<'a> {
    size: Size,
    clock: &'a dyn Fn() -> Duration,
    scheduler: Scheduler,
    now_ms: u64,
    queue: Queue<Happening>,
    boxes: Vec<BoxPlan>,
    held: Vec<BTreeSet<(AttemptId, Role)>>,
    by_id: BTreeMap<WorkerId, usize>,
    /// When the lanes of the devices are free.
    lanes: BTreeMap<(usize, DeviceId, u32), u64>,
    rng: Rng,
    submitted: u64,
    /// The first shard is over.
    full: bool,
    measured: Measured,
}

impl<'a> Plant<'a> {
    fn new(size: Size, clock: &'a dyn Fn() -> Duration) -> Self {
        let workers = size.devices.div_ceil(DEVICES_PER_BOX).max(1);
        let mut scheduler = Scheduler::new();
        scheduler.start(UnixMillis(EPOCH_MS));
        let devices = |at: usize| DEVICES_PER_BOX.min(size.devices - at * DEVICES_PER_BOX);
        let measured = Measured { shards: size.shards, workers, devices: size.devices, ..Measured::default() };
        Self {
            size,
            clock,
            scheduler,
            now_ms: 0,
            queue: Queue::default(),
            boxes: (0..workers).map(|at| plan(at, devices(at))).collect(),
            held: vec![BTreeSet::new(); workers],
            by_id: BTreeMap::new(),
            lanes: BTreeMap::new(),
            rng: Rng::new(size.shards as u64, Stream::Work),
            submitted: 0,
            full: false,
            measured,
        }
    }

    fn join(&mut self) {
        let uses = u32::try_from(self.boxes.len()).unwrap_or(u32::MAX);
        let made = self.ask(Input::CreateToken { secret_hash: [1; 32], ttl_ms: 3_600_000, uses });
        let Answer::Token(token) = made else { unreachable!("a made token has an id") };
        for at in 0..self.boxes.len() {
            let redeem = Input::RedeemToken { token, spki_sha256: make::key(at), hostname: make::hostname(at) };
            let Answer::Worker(worker) = self.ask(redeem) else { unreachable!("a redeemed token names a worker") };
            self.by_id.insert(worker, at);
            let hello = make::hello(at, 1, &self.boxes[at], Vec::new());
            self.ask(make::connected(worker, at, 1, hello));
            self.beat(at);
            let first_ms = self.rng.between(0, HEARTBEAT_INTERVAL_MS);
            self.queue.push(self.now_ms + first_ms, Happening::Beat(at));
        }
        self.settle();
    }

    /// Submits what shall run, or for a sample as much that enough waits behind what runs.
    fn submit(&mut self) {
        self.measured.busy = Duration::ZERO;
        let wanted = self.size.shards + self.size.placements.unwrap_or(0);
        loop {
            let running = self.size.placements.map_or(0, |_| self.measured.placements as usize);
            let left = (wanted + running).saturating_sub(self.submitted as usize);
            if left == 0 {
                break;
            }
            let count = left.min(SHARDS_PER_RUN_MAX);
            self.submitted += count as u64;
            let specs = (0u32..).take(count).map(make::no_op).collect();
            let plan = RunPlan {
                at_ms: 0,
                priority: 0,
                account: String::new(),
                running_max: 0,
                specs,
                trainings: Vec::new(),
                after_trainings: false,
            };
            self.timed(Input::Submit(make::new_run(&plan)));
            self.settle();
        }
    }

    /// Everything that happens, batch by batch.
    fn work(&mut self) {
        let mut batch = 0;
        while let Some((at_ms, happening)) = self.queue.pop() {
            if at_ms > self.now_ms || batch >= BATCH_MAX {
                self.settle();
                batch = 0;
            }
            self.now_ms = at_ms;
            self.happens(happening);
            batch += 1;
            let steady = self.measured.steady_placements;
            self.measured.cut_short = self.measured.busy > self.size.busy_max;
            let enough = self.size.placements.is_some_and(|enough| steady >= enough as u64);
            if self.measured.commits >= self.submitted || enough || self.measured.cut_short {
                break;
            }
        }
        self.settle();
        self.measured.virtual_ms = self.now_ms;
    }

    fn happens(&mut self, happening: Happening) {
        match happening {
            Happening::Beat(at) => {
                self.beat(at);
                self.queue.push(self.now_ms + HEARTBEAT_INTERVAL_MS, Happening::Beat(at));
            }
            Happening::Finished(at, attempt, role) => {
                self.full = true;
                self.held[at].remove(&(attempt, role));
                let finished = make::finished(attempt, role, SHARD_MS.0, GB, 0);
                let worker = self.worker(at);
                self.timed(Input::SeatFinished { worker, session: 1, finished });
            }
        }
    }

    fn beat(&mut self, at: usize) {
        let devices = self.boxes[at].devices.iter();
        let telemetry =
            devices.map(|device| make::telemetry(device.id.clone(), device.total_bytes, 0, false)).collect();
        let held = self.held[at].iter().map(|(attempt, role)| make::held(*attempt, *role)).collect();
        let heartbeat = make::heartbeat(1, telemetry, held);
        let worker = self.worker(at);
        let took = self.timed(Input::Heartbeat { worker, session: 1, heartbeat });
        if self.full {
            self.measured.steady_beats += 1;
            self.measured.steady_beats_busy += took;
        }
    }

    fn worker(&self, at: usize) -> WorkerId {
        // Boxes join in their order.
        WorkerId(at as u64 + 1)
    }

    fn ask(&mut self, input: Input) -> Answer {
        self.scheduler.handle(UnixMillis(EPOCH_MS + self.now_ms), input).expect("a healthy cluster's inputs are taken")
    }

    fn timed(&mut self, input: Input) -> Duration {
        let began = (self.clock)();
        self.ask(input);
        let took = (self.clock)().saturating_sub(began);
        self.measured.busy += took;
        self.measured.inputs += 1;
        if self.full {
            self.measured.steady_busy += took;
        }
        took
    }

    /// Events are counted as if written, effects carried out.
    fn settle(&mut self) {
        for record in self.scheduler.take_events() {
            match record.event {
                Event::AttemptPlaced(_) => {
                    if self.full {
                        self.measured.steady_placements += 1;
                    }
                    self.measured.placements += 1;
                }
                Event::ShardCommitted { .. } => self.measured.commits += 1,
                _ => {}
            }
        }
        while let Some(effect) = self.scheduler.poll_effect() {
            let Effect::Send { worker, message: ToWorker::StartSeat(start), .. } = effect else { continue };
            let at = self.by_id[&worker];
            self.held[at].insert((start.attempt, start.role));
            // Seats of one lane run one after another.
            let free_ms = self.lanes.entry((at, start.device, start.lane)).or_default();
            *free_ms = self.now_ms.max(*free_ms) + self.rng.between(SHARD_MS.0, SHARD_MS.1);
            self.queue.push(*free_ms, Happening::Finished(at, start.attempt, start.role));
        }
    }
}

/// A box of cards.
fn plan(at: usize, devices: usize) -> BoxPlan {
    let card = |number: usize| DevicePlan {
        id: DeviceId(format!("GPU-{at}-{number}")),
        kind: DeviceKind::Cuda,
        model: "NVIDIA GeForce GTX 1050 Ti".to_owned(),
        capability: 61,
        total_bytes: 4 * GB,
        budget_bytes: 4 * GB,
        speed: None,
    };
    BoxPlan { devices: (0..devices).map(card).collect(), models: Vec::new(), terms: Terms::default() }
}
