//! A box with its devices that keeps the worker's side of the protocol, as the real agent does: it does not start a seat that
//! it holds, says an outcome on every connection and again until it is settled, keeps finished results over a crash, and
//! drops what is cancelled.
//!
//! Sans-IO: takes messages and moments, gives what it says and when it wants to be woken. Knows no wire.

use std::collections::BTreeMap;

use protocol::control::{FailureKind, HeldSeat, Hello, SeatFailed, SeatFinished, StartSeat, ToCoordinator, ToWorker};
use protocol::experiment::ShardSpec;
use protocol::hardware::Telemetry;
use protocol::ids::{AttemptId, Role, WorkerId};

use super::check::Violation;
use super::make;
use super::rng::Rng;
use super::scenario::{BoxPlan, GB};
use super::truth::Truth;

/// An outcome that is not settled is said again after this long, milliseconds; as the agent's.
pub const REPEAT_OUTCOME_MS: u64 = 10_000;
/// How long a seat waits for the other one, milliseconds.
pub const MATE_PATIENCE_MS: u64 = 60_000;
/// A slow card is slower by this factor.
pub const SLOW_FACTOR: u64 = 20;

/// A seat of an attempt.
pub type SeatKey = (AttemptId, Role);

/// What a worker does on its own account.
#[derive(Debug, Clone, PartialEq)]
pub enum Deed {
    /// Say this on the session.
    Say(Box<ToCoordinator>),
    /// Call [`VirtualWorker::seat_ends`] then.
    WakeAt {
        /// For this seat.
        seat: SeatKey,
        /// With this number.
        token: u64,
        /// Virtual time.
        at_ms: u64,
    },
}

/// Whether the other seat of a pair has been there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mate {
    /// There is no other, or it was.
    Ready,
    /// Not yet, or it cannot be reached.
    Absent,
}

/// What is wrong with a device, each until a moment of virtual time.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ailments {
    /// It works slower.
    pub slow_until: u64,
    /// It says what is not so.
    pub lying_until: u64,
    /// It answers no more.
    pub sick_until: u64,
    /// Others have memory on it.
    pub foreign_until: u64,
    /// How much, bytes.
    pub foreign_bytes: u64,
}

/// A box.
#[derive(Debug, Clone)]
pub struct VirtualWorker {
    /// Index of the box.
    pub index: usize,
    /// Its id, once it has joined.
    pub id: Option<WorkerId>,
    /// What it has; budgets as they are now.
    pub plan: BoxPlan,
    /// Counts its processes.
    pub epoch: u64,
    /// Its process runs.
    pub up: bool,
    /// Its devices' troubles.
    pub ailments: Vec<Ailments>,
    /// Models that it reports but does not have, each until a moment.
    pub lost_models: BTreeMap<&'static str, u64>,
    /// Its operator has installed a build that has kernels for every card.
    pub has_new_build: bool,
    /// Nothing can be published until then.
    pub disk_full_until: u64,
    seats: BTreeMap<SeatKey, Seat>,
    tokens: u64,
    beats: u64,
}

#[derive(Debug, Clone)]
struct Seat {
    token: u64,
    phase: Phase,
}

#[derive(Debug, Clone)]
enum Phase {
    /// Another seat of its lane runs.
    Waiting(Box<StartSeat>),
    /// It has a device's memory.
    Running(Box<Running>),
    /// Its result is made but cannot be published; in memory only.
    Unpublished(SeatFinished),
    Finished {
        finished: SeatFinished,
        said_ms: Option<u64>,
    },
    Failed {
        failed: SeatFailed,
        said_ms: Option<u64>,
    },
}

#[derive(Debug, Clone)]
struct Running {
    start: StartSeat,
    device: usize,
    peak_bytes: u64,
    began_ms: u64,
    fails: Option<FailureKind>,
}

impl VirtualWorker {
    /// A box that is up and has not joined.
    pub fn new(index: usize, plan: BoxPlan) -> Self {
        Self {
            index,
            id: None,
            ailments: vec![Ailments::default(); plan.devices.len()],
            plan,
            epoch: 1,
            up: true,
            lost_models: BTreeMap::new(),
            has_new_build: false,
            disk_full_until: 0,
            seats: BTreeMap::new(),
            tokens: 0,
            beats: 0,
        }
    }

    /// Its greeting.
    pub fn hello(&self) -> Hello {
        let build = if self.has_new_build { "simulated, new" } else { "simulated" };
        Hello { build: build.to_owned(), ..make::hello(self.index, self.epoch, &self.plan, self.held()) }
    }

    /// Seats that it runs or whose outcome is not settled.
    pub fn held(&self) -> Vec<HeldSeat> {
        self.seats.keys().map(|(attempt, role)| make::held(*attempt, *role)).collect()
    }

    /// Whether it has begun with the seat.
    pub fn has_begun(&self, seat: SeatKey) -> bool {
        self.seats.get(&seat).is_some_and(|seat| !matches!(seat.phase, Phase::Waiting(_)))
    }

    /// The coordinator welcomed it: every outcome is said.
    pub fn welcomed(&mut self, now_ms: u64) -> Vec<Deed> {
        for seat in self.seats.values_mut() {
            if let Phase::Finished { said_ms, .. } | Phase::Failed { said_ms, .. } = &mut seat.phase {
                *said_ms = None;
            }
        }
        self.beats = 0;
        self.say_outcomes(now_ms)
    }

    /// A message arrives.
    ///
    /// # Errors
    /// If a device was promised twice.
    pub fn take(
        &mut self,
        now_ms: u64,
        message: ToWorker,
        truth: &Truth,
        rng: &mut Rng,
    ) -> Result<Vec<Deed>, Violation> {
        match message {
            ToWorker::StartSeat(start) => return self.start(now_ms, start, truth, rng),
            ToWorker::CancelSeat(cancel) => self.seats.retain(|(attempt, _), _| *attempt != cancel.attempt),
            ToWorker::SeatSettled(settled) => drop(self.seats.remove(&(settled.attempt, settled.role))),
            _ => {}
        }
        Ok(Vec::new())
    }

    /// Its sign of life, with outcomes that were not settled for a while.
    pub fn beat(&mut self, now_ms: u64) -> Vec<Deed> {
        self.beats += 1;
        let telemetry = (0..self.plan.devices.len()).map(|device| self.telemetry(now_ms, device)).collect();
        let heartbeat = make::heartbeat(self.beats, telemetry, self.held());
        let mut deeds = vec![say(heartbeat)];
        deeds.extend(self.say_outcomes(now_ms));
        deeds
    }

    /// A moment that [`Deed::WakeAt`] asked for.
    pub fn seat_ends(&mut self, now_ms: u64, key: SeatKey, token: u64, mate: Mate) -> Vec<Deed> {
        let wake = |at_ms| vec![Deed::WakeAt { seat: key, token, at_ms }];
        let full = now_ms < self.disk_full_until;
        let Some(seat) = self.seats.get_mut(&key).filter(|seat| seat.token == token) else { return Vec::new() };
        match &seat.phase {
            Phase::Running(running) => {
                let waited_ms = now_ms - running.began_ms;
                let fails = match (running.fails, mate) {
                    (None, Mate::Absent) if waited_ms < MATE_PATIENCE_MS => return wake(now_ms + 1_000),
                    (None, Mate::Absent) => Some(FailureKind::PeerLost),
                    (fails, _) => fails,
                };
                match fails {
                    Some(kind) => return self.fail(now_ms, key, kind),
                    None => {
                        let mut finished = make::finished(key.0, key.1, waited_ms, running.peak_bytes, 0);
                        finished.outputs.extend(make::made(&running.start.spec, key.0, key.1));
                        seat.phase = Phase::Unpublished(finished);
                    }
                }
                self.seat_ends(now_ms, key, token, mate)
            }
            Phase::Unpublished(_) if full => wake(now_ms + 1_000),
            Phase::Unpublished(finished) => {
                seat.phase = Phase::Finished { finished: finished.clone(), said_ms: None };
                self.say_outcomes(now_ms)
            }
            Phase::Waiting(_) | Phase::Finished { .. } | Phase::Failed { .. } => Vec::new(),
        }
    }

    /// `kill -9`: what ran is lost with what was only in memory; published results are remembered.
    pub fn crash(&mut self) {
        self.up = false;
        self.epoch += 1;
        self.seats.retain(|_, seat| matches!(seat.phase, Phase::Finished { .. }));
    }

    /// Ends what runs on a device.
    pub fn fail_device(&mut self, now_ms: u64, device: usize) -> Vec<Deed> {
        let on = |phase: &Phase| matches!(phase, Phase::Running(running) if running.device == device);
        let keys: Vec<_> = self.seats.iter().filter(|(_, seat)| on(&seat.phase)).map(|(key, _)| *key).collect();
        keys.into_iter().flat_map(|key| self.fail(now_ms, key, FailureKind::ExecutorLost)).collect()
    }

    /// Ends one seat that runs, if there is any.
    pub fn fail_one(&mut self, now_ms: u64, kind: FailureKind) -> Vec<Deed> {
        let running = self.seats.iter().find(|(_, seat)| matches!(seat.phase, Phase::Running(_)));
        let key = running.map(|(key, _)| *key);
        key.map_or_else(Vec::new, |key| self.fail(now_ms, key, kind))
    }

    /// Everything is well again.
    pub fn heal(&mut self) {
        self.ailments.fill(Ailments::default());
        self.lost_models.clear();
        self.has_new_build = true;
        self.disk_full_until = 0;
    }

    /// Whether any of its devices lies.
    pub fn lies(&self, now_ms: u64) -> bool {
        self.ailments.iter().any(|ailments| now_ms < ailments.lying_until)
    }

    fn start(&mut self, now_ms: u64, start: StartSeat, truth: &Truth, rng: &mut Rng) -> Result<Vec<Deed>, Violation> {
        let key = (start.attempt, start.role);
        if self.seats.contains_key(&key) {
            return Ok(Vec::new());
        }
        self.tokens += 1;
        let token = self.tokens;
        if !self.plan.devices.iter().any(|device| device.id == start.device) {
            let failed = make::failed(key.0, key.1, FailureKind::Unsupported);
            self.seats.insert(key, Seat { token, phase: Phase::Failed { failed, said_ms: None } });
            return Ok(self.say_outcomes(now_ms));
        }
        self.seats.insert(key, Seat { token, phase: Phase::Waiting(Box::new(start)) });
        self.begin_waiting(now_ms, truth, rng)
    }

    /// Whether a seat waits whose lane is free.
    pub fn may_begin(&self) -> bool {
        self.next_seat().is_some()
    }

    /// Begins every seat whose lane is free.
    ///
    /// # Errors
    /// If a device was promised twice.
    pub fn begin_waiting(&mut self, now_ms: u64, truth: &Truth, rng: &mut Rng) -> Result<Vec<Deed>, Violation> {
        let mut deeds = Vec::new();
        while let Some((key, token, start)) = self.next_seat() {
            let device = self.plan.devices.iter().position(|device| device.id == start.device).unwrap_or(0);
            self.check_budget(device, &start)?;
            let peak_bytes = truth.peak_bytes(&start.spec, start.role);
            let fails = self.fate(now_ms, &start, device, peak_bytes);
            let model = &self.plan.devices[device].model;
            let healthy_ms = truth.duration_ms(&start.spec, model) * rng.between(90, 110) / 100;
            let slow = if now_ms < self.ailments[device].slow_until { SLOW_FACTOR } else { 1 };
            let takes_ms = if fails.is_some() { healthy_ms.min(200) } else { healthy_ms * slow };
            let running = Running { start, device, peak_bytes, began_ms: now_ms, fails };
            self.seats.insert(key, Seat { token, phase: Phase::Running(Box::new(running)) });
            deeds.push(Deed::WakeAt { seat: key, token, at_ms: now_ms + takes_ms.max(1) });
        }
        Ok(deeds)
    }

    /// Of the seats whose lane is free, the one with the lowest fencing number.
    fn next_seat(&self) -> Option<(SeatKey, u64, StartSeat)> {
        let busy = |start: &StartSeat| {
            self.seats.values().any(|seat| match &seat.phase {
                Phase::Running(running) => (&running.start.device, running.start.lane) == (&start.device, start.lane),
                _ => false,
            })
        };
        let waiting = self.seats.iter().filter_map(|(key, seat)| match &seat.phase {
            Phase::Waiting(start) if !busy(start) => Some((key, seat.token, start)),
            _ => None,
        });
        let next = waiting.min_by_key(|(key, ..)| (key.0.fence, key.1));
        next.map(|(key, token, start)| (*key, token, (**start).clone()))
    }

    /// Whether the seat is bound to fail, by what is true here.
    fn fate(&self, now_ms: u64, start: &StartSeat, device: usize, peak_bytes: u64) -> Option<FailureKind> {
        let absent = |model: &&str| {
            let lost = self.lost_models.get(model).is_some_and(|until| now_ms < *until);
            lost || !self.plan.models.iter().any(|known| known == model)
        };
        if now_ms < self.ailments[device].sick_until {
            Some(FailureKind::ExecutorLost)
        } else if matches!(start.spec, ShardSpec::Command(_)) && !self.plan.terms.commands {
            Some(FailureKind::Forbidden)
        } else if start.spec.models_of(start.role).iter().any(absent) {
            Some(FailureKind::ModelMissing)
        } else if peak_bytes > self.free_bytes(now_ms, device) {
            Some(FailureKind::OutOfMemory)
        } else {
            None
        }
    }

    /// Invariant 3 from the device's side: what is promised to seats that run at once fits the budget.
    fn check_budget(&self, device: usize, start: &StartSeat) -> Result<(), Violation> {
        let promised: u64 = self.running(device).map(|running| running.start.reserved_bytes).sum();
        let budget = self.plan.devices[device].budget_bytes;
        if promised + start.reserved_bytes <= budget {
            return Ok(());
        }
        let others: Vec<_> = self.running(device).map(|running| running.start.attempt).collect();
        let (bytes, attempt) = (start.reserved_bytes, start.attempt);
        let detail = format!(
            "box {} {}: {attempt} is to have {bytes} B beside {others:?} with {promised} B, the budget is {budget} B",
            self.index, start.device
        );
        Err(Violation::new("a_device_runs_within_its_budget", detail))
    }

    fn running(&self, device: usize) -> impl Iterator<Item = &Running> {
        self.seats.values().filter_map(move |seat| match &seat.phase {
            Phase::Running(running) if running.device == device => Some(&**running),
            _ => None,
        })
    }

    fn free_bytes(&self, now_ms: u64, device: usize) -> u64 {
        let ailments = self.ailments[device];
        let foreign = if now_ms < ailments.foreign_until { ailments.foreign_bytes } else { 0 };
        self.plan.devices[device].total_bytes.saturating_sub(foreign).saturating_sub(self.ours_bytes(device))
    }

    fn ours_bytes(&self, device: usize) -> u64 {
        self.running(device).filter(|running| running.fails.is_none()).map(|running| running.peak_bytes).sum()
    }

    fn telemetry(&self, now_ms: u64, device: usize) -> Telemetry {
        let id = self.plan.devices[device].id.clone();
        if now_ms < self.ailments[device].lying_until {
            return make::telemetry(id, 1_000 * GB, 500 * GB, false);
        }
        let sick = now_ms < self.ailments[device].sick_until;
        make::telemetry(id, self.free_bytes(now_ms, device), self.ours_bytes(device), sick)
    }

    fn fail(&mut self, now_ms: u64, key: SeatKey, kind: FailureKind) -> Vec<Deed> {
        if let Some(seat) = self.seats.get_mut(&key) {
            seat.phase = Phase::Failed { failed: make::failed(key.0, key.1, kind), said_ms: None };
        }
        self.say_outcomes(now_ms)
    }

    fn say_outcomes(&mut self, now_ms: u64) -> Vec<Deed> {
        let mut deeds = Vec::new();
        for seat in self.seats.values_mut() {
            let (message, said_ms) = match &mut seat.phase {
                Phase::Finished { finished, said_ms } => (ToCoordinator::from(finished.clone()), said_ms),
                Phase::Failed { failed, said_ms } => (ToCoordinator::from(failed.clone()), said_ms),
                Phase::Waiting(_) | Phase::Running(_) | Phase::Unpublished(_) => continue,
            };
            if said_ms.is_none_or(|said_ms| now_ms >= said_ms + REPEAT_OUTCOME_MS) {
                *said_ms = Some(now_ms);
                deeds.push(Deed::Say(Box::new(message)));
            }
        }
        deeds
    }
}

fn say(message: impl Into<ToCoordinator>) -> Deed {
    Deed::Say(Box::new(message.into()))
}
