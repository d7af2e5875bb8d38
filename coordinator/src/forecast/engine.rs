//! Virtual workers around a copy of the scheduler: they start what they are told to start, lane by lane, and end it after a
//! time that the caller knows.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use protocol::control::{Failure, FailureKind, SeatFailed, SeatFinished, StartSeat, ToWorker, Usage};
use protocol::ids::{AttemptId, DeviceId, DeviceRef, Role, WorkerId};
use protocol::time::UnixMillis;

use crate::scheduler::{Answer, Effect, Input, Rejection, Scheduler};

/// What a seat really does, as far as the forecast is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Truth {
    /// How long it takes, milliseconds.
    pub wall_ms: u64,
    /// The most memory that it takes, bytes.
    pub peak_bytes: u64,
}

/// A seat on a device, from start to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// The attempt.
    pub attempt: AttemptId,
    /// Which seat.
    pub role: Role,
    /// Where.
    pub device: DeviceRef,
    /// When it began to run there.
    pub started_at: UnixMillis,
    /// When it ended.
    pub ended_at: UnixMillis,
    /// How.
    pub failure: Option<FailureKind>,
}

/// Tells for a seat and the model of its device what it does.
type Known<'a> = Box<dyn FnMut(&StartSeat, &str) -> Truth + 'a>;

/// A forecast in progress.
pub struct Engine<'a> {
    /// The scheduler, ahead of its time.
    pub scheduler: Scheduler,
    /// Virtual time.
    pub now: UnixMillis,
    /// What ran.
    pub spans: Vec<Span>,
    /// Seats whose device had less memory than they took together.
    pub overcommits: u32,
    truth: Known<'a>,
    lanes: BTreeMap<(WorkerId, DeviceId, u32), VecDeque<Seat>>,
    ends: BTreeSet<(UnixMillis, AttemptId, Role)>,
    running: BTreeMap<(AttemptId, Role), Running>,
}

#[derive(Debug, Clone)]
struct Seat {
    start: StartSeat,
    worker: WorkerId,
}

#[derive(Debug, Clone)]
struct Running {
    seat: Seat,
    started_at: UnixMillis,
    ends_at: UnixMillis,
    truth: Truth,
}

impl<'a> Engine<'a> {
    /// Runs `scheduler` ahead; `truth` tells for a seat and the model of its device what it does. What is running already is
    /// taken to end when it is expected to.
    pub fn new(scheduler: Scheduler, truth: impl FnMut(&StartSeat, &str) -> Truth + 'a) -> Self {
        let now = scheduler.now();
        let mut engine = Self {
            scheduler: scheduler.forecast(),
            now,
            spans: Vec::new(),
            overcommits: 0,
            truth: Box::new(truth),
            lanes: BTreeMap::new(),
            ends: BTreeSet::new(),
            running: BTreeMap::new(),
        };
        let open: Vec<_> = engine
            .scheduler
            .state()
            .open_attempts()
            .flat_map(|(id, _, attempt)| attempt.unfinished().map(move |seat| (id, seat.clone(), attempt.placed_at)))
            .collect();
        for (attempt, seat, placed_at) in open {
            let spec = engine.scheduler.state().shard(attempt.shard).map(|shard| shard.spec.clone());
            let Some(spec) = spec else { continue };
            let (role, device, worker) = (seat.role, seat.device.device.clone(), seat.device.worker);
            let (reserved_bytes, lane) = (seat.reserved_bytes, seat.lane);
            let start =
                StartSeat { attempt, role, device, reserved_bytes, lane, spec, seats: Vec::new(), inputs: Vec::new() };
            // Something is left to do, however late it is.
            let left = seat.expected_ms.saturating_sub(now.since_ms(placed_at)).max(seat.expected_ms / 10).max(1);
            let truth = Truth { wall_ms: left, peak_bytes: 0 };
            engine
                .lanes
                .entry((worker, start.device.clone(), lane))
                .or_default()
                .push_back(Seat { start: start.clone(), worker });
            engine.begin_with(Seat { start, worker }, truth);
        }
        engine
    }

    /// Gives the scheduler an input now.
    ///
    /// # Errors
    /// If it is refused.
    pub fn give(&mut self, input: Input) -> Result<Answer, Rejection> {
        let answer = self.scheduler.handle(self.now, input);
        let _ = self.scheduler.take_events();
        while let Some(effect) = self.scheduler.poll_effect() {
            match effect {
                Effect::Send { worker, message: ToWorker::StartSeat(start), .. } => self.told(worker, start),
                Effect::Send { worker, message: ToWorker::CancelSeat(cancel), .. } => {
                    self.drop_attempt(worker, cancel.attempt);
                }
                _ => {}
            }
        }
        answer
    }

    /// When something happens next.
    pub fn next_at(&self) -> Option<UnixMillis> {
        let end = self.ends.first().map(|(at, _, _)| *at);
        [end, self.scheduler.next_deadline()].into_iter().flatten().min()
    }

    /// Lets the next thing happen; `false` if nothing will.
    pub fn step(&mut self) -> bool {
        let Some(at) = self.next_at() else { return false };
        self.now = self.now.max(at);
        match self.ends.first().copied().filter(|(end, _, _)| *end <= self.now) {
            Some((end, attempt, role)) => {
                self.ends.remove(&(end, attempt, role));
                self.end(attempt, role, None);
            }
            None => drop(self.give(Input::Tick)),
        }
        true
    }

    /// Runs until nothing happens any more, or until `until`.
    pub fn run(&mut self, until: UnixMillis) {
        while self.next_at().is_some_and(|at| at <= until) {
            self.step();
        }
    }

    fn told(&mut self, worker: WorkerId, start: StartSeat) {
        let key = (worker, start.device.clone(), start.lane);
        let seat = Seat { start, worker };
        let lane = self.lanes.entry(key).or_default();
        lane.push_back(seat.clone());
        if lane.len() == 1 {
            self.begin(seat);
        }
    }

    fn begin(&mut self, seat: Seat) {
        let model = self.model(&seat);
        let truth = (self.truth)(&seat.start, &model);
        self.begin_with(seat, truth);
    }

    fn begin_with(&mut self, seat: Seat, truth: Truth) {
        let id = (seat.start.attempt, seat.start.role);
        let full = truth.peak_bytes > 0 && self.is_full(&seat, truth.peak_bytes);
        // Memory runs out while a seat starts, soon after it began.
        let wall_ms = if full { truth.wall_ms.min(5_000) } else { truth.wall_ms };
        let ends_at = self.now.plus_ms(wall_ms.max(1));
        if full {
            self.overcommits += 1;
        }
        let truth = if full { Truth { peak_bytes: 0, ..truth } } else { truth };
        self.running.insert(id, Running { seat, started_at: self.now, ends_at, truth });
        self.ends.insert((ends_at, id.0, id.1));
        if full && let Some(running) = self.running.get_mut(&id) {
            running.truth.wall_ms = 0;
        }
    }

    fn is_full(&self, seat: &Seat, peak_bytes: u64) -> bool {
        let here = |other: &&Running| other.seat.worker == seat.worker && other.seat.start.device == seat.start.device;
        let held: u64 = self.running.values().filter(here).map(|other| other.truth.peak_bytes).sum();
        let device = DeviceRef { worker: seat.worker, device: seat.start.device.clone() };
        let budget = self.scheduler.state().device(&device).map_or(0, |body| body.memory_budget_bytes);
        held.saturating_add(peak_bytes) > budget
    }

    fn model(&self, seat: &Seat) -> String {
        let device = DeviceRef { worker: seat.worker, device: seat.start.device.clone() };
        self.scheduler.state().device(&device).map(|body| body.model.clone()).unwrap_or_default()
    }

    fn end(&mut self, attempt: AttemptId, role: Role, cancelled: Option<FailureKind>) {
        let Some(running) = self.running.remove(&(attempt, role)) else { return };
        let Running { seat, started_at, ends_at, truth } = running;
        let oom = truth.wall_ms == 0;
        let failure = cancelled.or(oom.then_some(FailureKind::OutOfMemory));
        let device = DeviceRef { worker: seat.worker, device: seat.start.device.clone() };
        self.spans.push(Span { attempt, role, device, started_at, ended_at: ends_at.min(self.now), failure });
        let session = self.scheduler.live().sessions.get(&seat.worker).map_or(0, |session| session.number);
        let worker = seat.worker;
        // The next in the lane starts by itself, before anyone is asked.
        self.leave_lane(&seat);
        if cancelled.is_some() {
            return;
        }
        let input = match failure {
            None => {
                let (wall_ms, memory_peak_bytes) = (truth.wall_ms, truth.peak_bytes);
                let usage = Usage { wall_ms, memory_peak_bytes, ..Usage::default() };
                let (outputs, models, build) = (Vec::new(), Vec::new(), String::new());
                let finished = SeatFinished { attempt, role, outputs, usage, models, build };
                Input::SeatFinished { worker, session, finished }
            }
            Some(kind) => {
                let failed = SeatFailed { attempt, role, failure: Failure::new(kind, "in a forecast") };
                Input::SeatFailed { worker, session, failed }
            }
        };
        let _ = self.give(input);
    }

    fn leave_lane(&mut self, seat: &Seat) {
        let key = (seat.worker, seat.start.device.clone(), seat.start.lane);
        let Some(lane) = self.lanes.get_mut(&key) else { return };
        let first = lane
            .front()
            .is_some_and(|front| front.start.attempt == seat.start.attempt && front.start.role == seat.start.role);
        lane.retain(|other| (other.start.attempt, other.start.role) != (seat.start.attempt, seat.start.role));
        if let Some(next) = lane.front().cloned().filter(|_| first) {
            self.begin(next);
        }
    }

    fn drop_attempt(&mut self, worker: WorkerId, attempt: AttemptId) {
        for role in [Role::Main, Role::Source, Role::Target] {
            let here = self.running.get(&(attempt, role)).is_some_and(|running| running.seat.worker == worker);
            if here {
                let ends_at = self.running[&(attempt, role)].ends_at;
                self.ends.remove(&(ends_at, attempt, role));
                self.end(attempt, role, Some(FailureKind::Cancelled));
            }
        }
        for lane in self.lanes.values_mut() {
            lane.retain(|seat| seat.worker != worker || seat.start.attempt != attempt);
        }
    }
}
