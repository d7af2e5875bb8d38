//! A heap of unequal cards in five lines: a builder for scenarios about placement.
//!
//! Workers obey: what they are told to start they start, and they end it when the test says so.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use protocol::control::{
    Failure, FailureKind, Heartbeat, Hello, SeatFailed, SeatFinished, StartSeat, Terms, ToWorker, Usage,
};
use protocol::experiment::{CommandSpec, ShardSpec};
use protocol::group::{Group, Require};
use protocol::hardware::{ComputeCapability, Device, DeviceKind, Speed, Telemetry};
use protocol::ids::{AttemptId, DeviceId, RunId, ShardId, WorkerId};
use protocol::time::UnixMillis;

use super::lab::{GB, GEMMA, SMOL};
use crate::scheduler::input::Connected;
use crate::scheduler::{Answer, Effect, Event, Input, NewRun, Record, Scheduler, Settings, ShardState};

/// A cluster under construction and under test.
pub(super) struct Heap {
    pub(super) scheduler: Scheduler,
    pub(super) now: UnixMillis,
    pub(super) journal: Vec<Record>,
    /// What runs or waits on each worker, in the order it was told.
    pub(super) told: BTreeMap<WorkerId, Vec<StartSeat>>,
    pub(super) cancelled: Vec<AttemptId>,
    workers: BTreeMap<WorkerId, Vec<Device>>,
    terms: BTreeMap<WorkerId, Terms>,
    sessions: BTreeMap<WorkerId, u64>,
    /// Memory that others hold on each device of a worker.
    foreign: BTreeMap<WorkerId, u64>,
}

/// A card for a heap.
pub(super) fn card(model: &str, gigabytes: u64, mflops: u64) -> Device {
    Device {
        id: DeviceId(format!("GPU-{model}")),
        kind: DeviceKind::Cuda,
        model: model.to_owned(),
        compute_capability: Some(ComputeCapability { major: 6, minor: 1 }),
        memory_total_bytes: gigabytes * GB,
        memory_budget_bytes: gigabytes * GB,
        threads: 1,
        unusable: None,
        speed: Some(Speed { f32_mflops: mflops, memory_bytes_per_second: 1 }),
    }
}

/// A program that takes `seconds` on the reference card and `gigabytes` of memory.
pub(super) fn job(class: &str, seconds: u32, gigabytes: u64) -> ShardSpec {
    ShardSpec::Command(Box::new(CommandSpec {
        argv: vec![class.to_owned()],
        env: Vec::new(),
        files: Vec::new(),
        memory_bytes: gigabytes * GB,
        threads: 1,
        collect: Vec::new(),
        timeout_ms: 0,
        retries: 3,
        class: class.to_owned(),
        work: seconds,
    }))
}

/// A run of these shards.
pub(super) fn run(specs: Vec<ShardSpec>) -> NewRun {
    NewRun { name: "heap".into(), specs, ..NewRun::default() }
}

impl Heap {
    pub(super) fn new() -> Self {
        let mut scheduler = Scheduler::new();
        scheduler.start(UnixMillis(1_000_000));
        Self {
            scheduler,
            now: UnixMillis(1_000_000),
            journal: Vec::new(),
            told: BTreeMap::new(),
            cancelled: Vec::new(),
            workers: BTreeMap::new(),
            terms: BTreeMap::new(),
            sessions: BTreeMap::new(),
            foreign: BTreeMap::new(),
        }
    }

    /// One more box with these cards.
    pub(super) fn with(self, cards: &[Device]) -> Self {
        self.with_terms(cards, Terms { commands: true, ahead: 64, ..Terms::default() })
    }

    pub(super) fn with_terms(mut self, cards: &[Device], terms: Terms) -> Self {
        let number = u8::try_from(self.workers.len() + 1).unwrap();
        let key = [number; 32];
        let Ok(Answer::Token(token)) = self.give(Input::CreateToken { secret_hash: key, ttl_ms: 9_999, uses: 1 })
        else {
            panic!("no token")
        };
        let hostname = format!("box-{number}");
        self.give(Input::RedeemToken { token, spki_sha256: key, hostname }).unwrap();
        let worker = WorkerId(u64::from(number));
        self.workers.insert(worker, cards.to_vec());
        self.terms.insert(worker, terms);
        self.greet_again(worker);
        self
    }

    /// A worker greets, as after its process was started or its connection cut, and says that it is well.
    pub(super) fn greet_again(&mut self, worker: WorkerId) {
        let number = u8::try_from(worker.0).unwrap();
        let session = self.sessions.get(&worker).map_or(1, |session| session + 1);
        self.sessions.insert(worker, session);
        let hello = Hello {
            build: "test".to_owned(),
            hostname: format!("box-{number}"),
            epoch: UnixMillis(1),
            devices: self.workers[&worker].clone(),
            models: vec![SMOL.to_owned(), GEMMA.to_owned()],
            held: Vec::new(),
            peer_port: 7000,
            addresses: Vec::new(),
            terms: self.terms[&worker].clone(),
            shapes: Vec::new(),
        };
        let observed = IpAddr::V4(Ipv4Addr::new(10, 0, 0, number));
        let connected = Connected { worker, session, spki_sha256: [number; 32], hello, observed };
        self.give(Input::Connected(Box::new(connected))).unwrap();
        self.beat(worker);
    }

    /// Another process takes memory on a worker's cards.
    pub(super) fn foreign(&mut self, worker: u64, bytes: u64) {
        self.foreign.insert(WorkerId(worker), bytes);
        self.beat(WorkerId(worker));
    }

    pub(super) fn settings(mut self, settings: Settings) -> Self {
        self.give(Input::Configure(settings)).unwrap();
        self
    }

    pub(super) fn submit(&mut self, run: NewRun) -> RunId {
        match self.give(Input::Submit(run)) {
            Ok(Answer::Run(run)) => run,
            other => panic!("not accepted: {other:?}"),
        }
    }

    /// What is known of a class on a device model: seconds for one second of the reference card.
    pub(super) fn teach(&mut self, class: &str, model: &str, seconds: u64) {
        let row = (format!("command/{class}"), model.to_owned(), seconds * 1_000_000, 50);
        self.give(Input::TeachThroughput(vec![row])).unwrap();
    }

    pub(super) fn give(&mut self, input: Input) -> Result<Answer, crate::scheduler::Rejection> {
        let answer = self.scheduler.handle(self.now, input);
        self.journal.extend(self.scheduler.take_events());
        while let Some(effect) = self.scheduler.poll_effect() {
            match effect {
                Effect::Send { worker, message: ToWorker::StartSeat(start), .. } => {
                    self.told.entry(worker).or_default().push(start);
                }
                Effect::Send { message: ToWorker::CancelSeat(cancel), .. } => self.cancelled.push(cancel.attempt),
                _ => {}
            }
        }
        answer
    }

    /// Everybody says that they are there.
    pub(super) fn pass_s(&mut self, seconds: u64) {
        for _ in 0..seconds.div_ceil(2) {
            self.now = self.now.plus_ms(2_000.min(seconds * 1_000));
            self.give(Input::Tick).unwrap();
            for worker in self.workers.keys().copied().collect::<Vec<_>>() {
                self.beat(worker);
            }
        }
    }

    pub(super) fn beat(&mut self, worker: WorkerId) {
        let session = self.sessions[&worker];
        let foreign = self.foreign.get(&worker).copied().unwrap_or(0);
        let telemetry = |device: &Device| Telemetry {
            device: device.id.clone(),
            memory_free_bytes: device.memory_total_bytes.saturating_sub(foreign),
            memory_ours_bytes: 0,
            utilisation_percent: Some(20),
            temperature_celsius: None,
            power_milliwatts: None,
            sick: None,
        };
        let telemetry = self.workers[&worker].iter().map(telemetry).collect();
        let held = self.scheduler.state().unfinished_seats().filter(|(_, seat)| seat.device.worker == worker);
        let held = held.map(|(attempt, seat)| super::lab::held(attempt, seat.role)).collect();
        self.give(Input::Heartbeat { worker, session, heartbeat: Heartbeat { sequence: 1, telemetry, held } }).unwrap();
    }

    /// The oldest open attempt of a shard and the model of its first device.
    pub(super) fn place(&self, run: RunId, index: u32) -> Option<(AttemptId, String)> {
        let shard = ShardId { run, index };
        let attempt = self.scheduler.state().shard(shard)?.open_attempts().next()?;
        Some((AttemptId { shard, fence: attempt.fence }, attempt.seats[0].device_model.clone()))
    }

    /// Model of the card that a shard is on; nothing if it waits.
    pub(super) fn on(&self, run: RunId, index: u32) -> String {
        self.place(run, index).map(|(_, model)| model).unwrap_or_default()
    }

    pub(super) fn finish(&mut self, attempt: AttemptId, wall_ms: u64) {
        let seats: Vec<_> =
            self.scheduler.state().attempt(attempt).unwrap().seats.iter().map(|s| (s.role, s.device.worker)).collect();
        for (role, worker) in seats {
            let finished = SeatFinished {
                attempt,
                role,
                outputs: Vec::new(),
                usage: Usage { wall_ms, ..Usage::default() },
                models: Vec::new(),
                build: "test".to_owned(),
            };
            self.give(Input::SeatFinished { worker, session: self.sessions[&worker], finished }).unwrap();
        }
    }

    /// Both seats of a gang end; the source has sent so much, so fast.
    pub(super) fn finish_sending(&mut self, attempt: AttemptId, packet_bytes: u64, link_bytes_per_second: u64) {
        let seats = self.scheduler.state().attempt(attempt).unwrap().seats.clone();
        for seat in seats {
            let (role, worker) = (seat.role, seat.device.worker);
            let usage = Usage { wall_ms: 10_000, packet_bytes, link_bytes_per_second, ..Usage::default() };
            let (outputs, models, build) = (Vec::new(), Vec::new(), String::new());
            let finished = SeatFinished { attempt, role, outputs, usage, models, build };
            self.give(Input::SeatFinished { worker, session: self.sessions[&worker], finished }).unwrap();
        }
    }

    pub(super) fn fail(&mut self, attempt: AttemptId, kind: FailureKind) {
        let seat = self.scheduler.state().attempt(attempt).unwrap().seats[0].clone();
        let failed = SeatFailed { attempt, role: seat.role, failure: Failure::new(kind, "as the test wants") };
        let worker = seat.device.worker;
        self.give(Input::SeatFailed { worker, session: self.sessions[&worker], failed }).unwrap();
    }

    /// Fails a shard's only attempt and waits out the pause.
    pub(super) fn fail_shard(&mut self, run: RunId, index: u32, kind: FailureKind) {
        let (attempt, _) = self.place(run, index).expect("it runs");
        self.fail(attempt, kind);
        self.pass_s(40);
    }

    pub(super) fn state(&self, run: RunId, index: u32) -> ShardState {
        self.scheduler.state().shard(ShardId { run, index }).unwrap().state
    }

    pub(super) fn sentence(&self, run: RunId, index: u32) -> String {
        self.scheduler.explain(ShardId { run, index }).unwrap().sentence
    }

    pub(super) fn running(&self, run: RunId) -> usize {
        self.scheduler.state().runs[&run].running.len()
    }

    pub(super) fn happened(&self, kind: &str) -> bool {
        self.journal.iter().any(|record: &Record| Event::kind(&record.event) == kind)
    }
}

/// Experiments of a run: (name, shards, after).
pub(super) fn groups(groups: &[(&str, u32, &[u32])]) -> Vec<Group> {
    let mut first = 0;
    let group = |(name, count, after): &(&str, u32, &[u32])| {
        let group = Group {
            trainings: Vec::new(),
            name: (*name).to_owned(),
            first,
            count: *count,
            after: after.to_vec(),
            require: Require::default(),
        };
        first += count;
        group
    };
    groups.iter().map(group).collect()
}
