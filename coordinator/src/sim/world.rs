//! The loop: takes what happens next from the queue until faults are over and every shard with them.
//!
//! Here are the world itself, and what people and workers do; the coordinator's turns are in `turns.rs`, links in `wire.rs`,
//! faults in `trouble.rs`.

use std::collections::{BTreeMap, VecDeque};

use protocol::ids::{Role, RunId, TokenId, WorkerId};
use protocol::limits::HEARTBEAT_INTERVAL_MS;

use super::check::Violation;
use super::fault::Stage;
use super::make;
use super::process::{Asker, Process};
use super::queue::Queue;
use super::rng::{Rng, Stream};
use super::run::Tally;
use super::scenario::Scenario;
use super::wire::{Down, Link, SessionKey, Up};
use super::worker::{Deed, Mate, SeatKey, VirtualWorker};
use crate::scheduler::{Input, RunState, State};

/// Lines of the trace that are kept for a failure.
pub const TRACE_LINES: usize = 30;
/// Most things that may happen in a history: more means that time does not move on.
const STEPS_MAX: u64 = 5_000_000;
/// Who submits and hears nothing tries again after this long, milliseconds.
const ASK_AGAIN_MS: u64 = 8_000;
/// After the faults, workers greet anew this often, milliseconds: what was found missing counts as missing until then.
const GREET_AGAIN_MS: u64 = 300_000;

/// Something that will happen. `at` is the index of a box.
#[derive(Debug, Clone)]
pub(super) enum Happening {
    Join(usize),
    Submit(usize),
    Order(usize),
    Undrain(WorkerId),
    Fault(usize),
    Heal,
    GreetAgain,
    WorkerUp(usize),
    CoordinatorUp,
    Wake(u64),
    JournalDone(u64),
    Dial(usize),
    Up {
        at: usize,
        key: SessionKey,
        message: Up,
    },
    Down {
        at: usize,
        key: SessionKey,
        message: Down,
    },
    /// The coordinator notices that a session is over.
    Noticed {
        at: usize,
        key: SessionKey,
    },
    /// The worker does.
    Missed {
        at: usize,
        key: SessionKey,
    },
    Unwelcome {
        at: usize,
        key: SessionKey,
    },
    Beat {
        at: usize,
        key: SessionKey,
    },
    /// A worker's lane has become free.
    Begin(usize),
    SeatEnds {
        at: usize,
        seat: SeatKey,
        token: u64,
    },
}

/// A history on its way.
#[derive(Debug)]
pub struct World {
    pub(super) scenario: Scenario,
    pub(super) process: Process,
    pub(super) workers: Vec<VirtualWorker>,
    pub(super) links: Vec<Link>,
    pub(super) queue: Queue<Happening>,
    pub(super) now_ms: u64,
    pub(super) wire_rng: Rng,
    pub(super) work_rng: Rng,
    pub(super) disk_rng: Rng,
    pub(super) sessions: u64,
    pub(super) wake_at: Option<u64>,
    /// The coordinator dies when it next comes to this point.
    pub(super) armed: Option<(Stage, u64)>,
    pub(super) slow_journal_ms: u64,
    pub(super) healed: bool,
    pub(super) token: Option<TokenId>,
    pub(super) by_id: BTreeMap<WorkerId, usize>,
    pub(super) submitted: Vec<Option<RunId>>,
    /// Counts of what happened.
    pub tally: Tally,
    pub(super) trace: Option<VecDeque<String>>,
    /// Print trace lines as they come.
    whole_trace: bool,
}

impl World {
    /// The beginning of a scenario; `traced`: keep the last lines of what happens, or all of them.
    pub fn new(scenario: Scenario, traced: Option<bool>) -> Self {
        let seed = scenario.seed;
        let workers = scenario.boxes.iter().enumerate().map(|(at, plan)| VirtualWorker::new(at, plan.clone()));
        let mut world = Self {
            process: Process::new(scenario.settings.clone(), scenario.sabotage, scenario.checked),
            workers: workers.collect(),
            links: vec![Link::default(); scenario.boxes.len()],
            queue: Queue::default(),
            now_ms: 0,
            wire_rng: Rng::new(seed, Stream::Wire),
            work_rng: Rng::new(seed, Stream::Work),
            disk_rng: Rng::new(seed, Stream::Disk),
            sessions: 0,
            wake_at: None,
            armed: None,
            slow_journal_ms: 0,
            healed: false,
            token: None,
            by_id: BTreeMap::new(),
            submitted: vec![None; scenario.runs.len()],
            tally: Tally::default(),
            trace: traced.map(|_| VecDeque::new()),
            whole_trace: traced == Some(true),
            scenario,
        };
        world.fill_queue();
        world
    }

    fn fill_queue(&mut self) {
        self.queue.push(0, Happening::CoordinatorUp);
        for at in 0..self.workers.len() {
            self.queue.push(1 + at as u64 * 10, Happening::Join(at));
        }
        for (index, run) in self.scenario.runs.iter().enumerate() {
            self.queue.push(run.at_ms, Happening::Submit(index));
        }
        for (index, (at_ms, _)) in self.scenario.orders.iter().enumerate() {
            self.queue.push(*at_ms, Happening::Order(index));
        }
        for (index, (at_ms, _)) in self.scenario.faults.iter().enumerate() {
            self.queue.push(*at_ms, Happening::Fault(index));
        }
        self.queue.push(self.scenario.safety_ms, Happening::Heal);
    }

    /// Lets everything happen until every shard is over.
    ///
    /// # Errors
    /// The first check that does not hold.
    pub fn play(&mut self) -> Result<(), Violation> {
        let end_ms = self.scenario.safety_ms + self.scenario.liveness_ms;
        while let Some((at_ms, happening)) = self.queue.pop() {
            self.now_ms = at_ms;
            self.tally.steps += 1;
            if at_ms > end_ms || self.tally.steps > STEPS_MAX {
                return Err(Violation::new("every_shard_ends", self.leftovers()));
            }
            self.happens(happening)?;
            if self.healed && self.is_over() {
                break;
            }
        }
        if !self.is_over() {
            return Err(Violation::new("every_shard_ends", self.leftovers()));
        }
        self.close()
    }

    /// Virtual time since the beginning, milliseconds.
    pub fn now_ms(&self) -> u64 {
        self.now_ms
    }

    /// What the coordinator knows.
    pub fn state(&self) -> &State {
        self.process.state()
    }

    /// The newest lines of the trace.
    pub fn trace(&self) -> impl Iterator<Item = &str> {
        self.trace.iter().flatten().map(String::as_str)
    }

    pub(super) fn say(&mut self, line: impl FnOnce() -> String) {
        let Some(trace) = &mut self.trace else { return };
        if !self.whole_trace && trace.len() >= TRACE_LINES {
            trace.pop_front();
        }
        trace.push_back(format!("{:>9} ms  {}", self.now_ms, line()));
    }

    fn happens(&mut self, happening: Happening) -> Result<(), Violation> {
        match happening {
            Happening::Join(at) => self.join(at),
            Happening::Submit(index) => self.submit(index),
            Happening::Order(index) => self.order(index),
            Happening::Undrain(worker) => self.offer(Asker::Nobody, Input::SetDrain { worker, on: false }),
            Happening::Fault(index) => self.fault(index),
            Happening::Heal => self.heal(),
            Happening::GreetAgain => {
                self.greet_again();
                self.queue.push(self.now_ms + GREET_AGAIN_MS, Happening::GreetAgain);
                Ok(())
            }
            Happening::WorkerUp(at) => {
                self.worker_up(at);
                Ok(())
            }
            Happening::CoordinatorUp => self.coordinator_up(),
            Happening::Wake(at_ms) => self.wake(at_ms),
            Happening::JournalDone(life) => self.journal_done(life),
            Happening::Dial(at) => {
                self.dial(at);
                Ok(())
            }
            Happening::Up { at, key, message } => self.arrives_up(at, key, message),
            Happening::Down { at, key, message } => self.arrives_down(at, key, message),
            Happening::Noticed { at, key } => self.noticed(at, key),
            Happening::Missed { at, key } => {
                self.missed(at, key);
                Ok(())
            }
            Happening::Unwelcome { at, key } => {
                self.unwelcome(at, key);
                Ok(())
            }
            Happening::Beat { at, key } => {
                self.beat(at, key);
                Ok(())
            }
            Happening::Begin(at) => {
                let worker = &mut self.workers[at];
                let deeds = worker.begin_waiting(self.now_ms, &self.scenario.truth, &mut self.work_rng)?;
                self.deeds(at, deeds);
                Ok(())
            }
            Happening::SeatEnds { at, seat, token } => {
                let mate = self.mate(seat);
                let deeds = self.workers[at].seat_ends(self.now_ms, seat, token, mate);
                self.deeds(at, deeds);
                Ok(())
            }
        }
    }
}

/// People and workers.
impl World {
    fn join(&mut self, at: usize) -> Result<(), Violation> {
        if self.workers[at].id.is_some() {
            return Ok(());
        }
        self.queue.push(self.now_ms + 2_000, Happening::Join(at));
        if !self.process.is_up() {
            return Ok(());
        }
        let Some(token) = self.token else {
            let uses = 1_000;
            return self.offer(Asker::Token, Input::CreateToken { secret_hash: [1; 32], ttl_ms: u64::MAX / 4, uses });
        };
        let redeem = Input::RedeemToken { token, spki_sha256: make::key(at), hostname: make::hostname(at) };
        self.offer(Asker::Box(at), redeem)
    }

    fn submit(&mut self, index: usize) -> Result<(), Violation> {
        if self.submitted[index].is_some() {
            return Ok(());
        }
        self.queue.push(self.now_ms + ASK_AGAIN_MS, Happening::Submit(index));
        let plan = &self.scenario.runs[index];
        let run = make::new_run(plan);
        if self.process.is_up() { self.offer(Asker::Submission(index), Input::Submit(run)) } else { Ok(()) }
    }

    fn beat(&mut self, at: usize, key: SessionKey) {
        if self.links[at].welcomed != Some(key) {
            return;
        }
        let mut deeds = self.workers[at].beat(self.now_ms);
        if self.workers[at].lies(self.now_ms) {
            self.add_lies(at, &mut deeds);
        }
        self.deeds(at, deeds);
        self.queue.push(self.now_ms + HEARTBEAT_INTERVAL_MS, Happening::Beat { at, key });
    }

    pub(super) fn deeds(&mut self, at: usize, deeds: Vec<Deed>) {
        for deed in deeds {
            match deed {
                Deed::Say(message) => self.say_up(at, *message),
                Deed::WakeAt { seat, token, at_ms } => {
                    self.queue.push(at_ms, Happening::SeatEnds { at, seat, token });
                }
            }
        }
        if self.workers[at].may_begin() {
            self.queue.push(self.now_ms, Happening::Begin(at));
        }
    }

    /// Whether the other seat of a pair is there, or was.
    fn mate(&self, seat: SeatKey) -> Mate {
        let other = match seat.1 {
            Role::Source => (seat.0, Role::Target),
            Role::Target => (seat.0, Role::Source),
            Role::Main => return Mate::Ready,
        };
        let attempt = self.process.state().attempt(seat.0);
        let done = attempt.and_then(|attempt| attempt.seat(other.1)).is_some_and(|seat| seat.outcome.is_some());
        let holder = self.workers.iter().position(|worker| worker.up && worker.has_begun(other));
        let reached = holder.is_some_and(|at| self.now_ms >= self.links[at].blocked_until);
        if done || reached { Mate::Ready } else { Mate::Absent }
    }

    pub(super) fn is_over(&self) -> bool {
        let durable = self.process.is_up() && !self.process.writing;
        let ended = |run: &crate::scheduler::state::Run| run.state != RunState::Running;
        durable && self.submitted.iter().all(Option::is_some) && self.process.state().runs.values().all(ended)
    }

    fn leftovers(&self) -> String {
        let runs = self.process.state().runs.iter();
        let shards =
            runs.flat_map(|(run, body)| (0u32..).zip(&body.shards).map(move |(index, shard)| (run, index, shard)));
        let left = shards.filter(|(.., shard)| !shard.state.is_terminal());
        let left: Vec<_> = left.map(|(run, index, _)| format!("{run}.{index}")).take(12).collect();
        let submitted = self.submitted.iter().flatten().count();
        format!("after {} ms {submitted} runs are accepted and {left:?} are not over", self.now_ms)
    }

    fn close(&mut self) -> Result<(), Violation> {
        let shards = self.process.state().runs.values().flat_map(|run| &run.shards);
        self.tally.shards = shards.count() as u64;
        self.tally.inputs = self.process.inputs;
        self.tally.virtual_ms = self.now_ms;
        self.process.check_history(self.now_ms)
    }
}
