//! A scheduler on a bench: a virtual clock, a journal in memory, recorded effects, and short words for inputs.
//!
//! Every call takes the events into the journal before it looks at effects, as the driver does.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use protocol::control::{
    Failure, FailureKind, Heartbeat, HeldSeat, Hello, Output, SeatFailed, SeatFinished, SeatProgress, SeatSettled,
    StartSeat, ToWorker, Usage,
};
use protocol::experiment::projector::TrainSpec;
use protocol::experiment::{Condition, InspectSpec, LayerSelection, ShardSpec, Spread, TransferSpec};
use protocol::group::Group;
use protocol::hardware::{Device, DeviceKind, Telemetry};
use protocol::ids::{ArtifactHash, AttemptId, DeviceId, Role, RunId, ShardId, WorkerId};
use protocol::time::UnixMillis;

use crate::scheduler::input::Connected;
use crate::scheduler::state::State;
use crate::scheduler::{Answer, Effect, Event, Input, NewRun, Record, Rejection, Scheduler, ShardState};
pub(super) use crate::sim::make::{fuser, made, ridge, training};

pub(super) const SMOL: &str = "smollm2-135m-instruct";
pub(super) const GEMMA: &str = "gemma-3-270m";
pub(super) const GB: u64 = 1_000_000_000;

pub(super) struct Lab {
    pub(super) scheduler: Scheduler,
    pub(super) now: UnixMillis,
    pub(super) journal: Vec<Record>,
    /// Effects of the newest input.
    pub(super) effects: Vec<Effect>,
    pub(super) boxes: BTreeMap<WorkerId, Played>,
    keys: u8,
    /// What a seat says that it took, milliseconds.
    pub(super) wall_ms: u64,
    /// Of which a seat waits for the other one.
    pub(super) waited_ms: BTreeMap<Role, u64>,
}

/// A worker as the lab plays it.
#[derive(Debug, Clone)]
pub(super) struct Played {
    pub(super) key: [u8; 32],
    pub(super) session: u64,
    pub(super) epoch: u64,
    pub(super) budget: u64,
    pub(super) free: u64,
    pub(super) models: Vec<String>,
    pub(super) shapes: Vec<(String, protocol::memory::ModelShape)>,
    pub(super) held: Vec<HeldSeat>,
    /// Product name of its device.
    pub(super) device: String,
}

impl Lab {
    pub(super) fn new() -> Self {
        let mut scheduler = Scheduler::new();
        scheduler.start(UnixMillis(1_000_000));
        Self {
            scheduler,
            now: UnixMillis(1_000_000),
            journal: Vec::new(),
            effects: Vec::new(),
            boxes: BTreeMap::new(),
            keys: 0,
            wall_ms: 5,
            waited_ms: BTreeMap::new(),
        }
    }

    pub(super) fn give(&mut self, input: Input) -> Result<Answer, Rejection> {
        let answer = self.scheduler.handle(self.now, input);
        self.journal.extend(self.scheduler.take_events());
        self.effects.clear();
        while let Some(effect) = self.scheduler.poll_effect() {
            self.effects.push(effect);
        }
        answer
    }

    /// A box joins: token, key, id.
    pub(super) fn join(&mut self) -> WorkerId {
        self.keys += 1;
        let key = [self.keys; 32];
        let Ok(Answer::Token(token)) = self.give(Input::CreateToken { secret_hash: [9; 32], ttl_ms: 60_000, uses: 1 })
        else {
            panic!("no token")
        };
        let hostname = format!("box-{}", self.keys);
        let Ok(Answer::Worker(worker)) = self.give(Input::RedeemToken { token, spki_sha256: key, hostname }) else {
            panic!("not redeemed")
        };
        let models = vec![SMOL.to_owned(), GEMMA.to_owned()];
        let body = Played {
            key,
            session: 0,
            epoch: 1,
            budget: 4 * GB,
            free: 8 * GB,
            models,
            shapes: Vec::new(),
            held: Vec::new(),
            device: "Some CPU".to_owned(),
        };
        self.boxes.insert(worker, body);
        worker
    }

    /// A box joins, greets and sends its first heartbeat.
    pub(super) fn online(&mut self) -> WorkerId {
        let worker = self.join();
        self.connect(worker).unwrap();
        self.beat(worker);
        worker
    }

    pub(super) fn connect(&mut self, worker: WorkerId) -> Result<Answer, Rejection> {
        let body = self.boxes.get_mut(&worker).unwrap();
        body.session += 1;
        let body = body.clone();
        let hello = Hello {
            build: "test".to_owned(),
            hostname: format!("box-{worker}"),
            epoch: UnixMillis(body.epoch),
            devices: vec![Device { model: body.device, ..cpu(body.budget) }],
            models: body.models,
            held: body.held,
            peer_port: 7000,
            addresses: vec!["10.0.0.7".to_owned()],
            terms: Default::default(),
            shapes: body.shapes,
        };
        let observed = IpAddr::V4(Ipv4Addr::new(192, 168, 0, u8::try_from(worker.0).unwrap()));
        let connected = Connected { worker, session: body.session, spki_sha256: body.key, hello, observed };
        self.give(Input::Connected(Box::new(connected)))
    }

    pub(super) fn disconnect(&mut self, worker: WorkerId) {
        let session = self.boxes[&worker].session;
        self.give(Input::Disconnected { worker, session }).unwrap();
    }

    /// The box's process starts anew with what its outbox holds.
    pub(super) fn restart(&mut self, worker: WorkerId, outbox: Vec<HeldSeat>) {
        self.disconnect(worker);
        let body = self.boxes.get_mut(&worker).unwrap();
        body.epoch += 1;
        body.held = outbox;
    }

    pub(super) fn beat(&mut self, worker: WorkerId) {
        let body = &self.boxes[&worker];
        let telemetry = Telemetry {
            device: DeviceId("cpu".to_owned()),
            memory_free_bytes: body.free,
            memory_ours_bytes: 0,
            utilisation_percent: None,
            temperature_celsius: None,
            power_milliwatts: None,
            sick: None,
        };
        let heartbeat = Heartbeat { sequence: 1, telemetry: vec![telemetry], held: body.held.clone() };
        let session = body.session;
        self.give(Input::Heartbeat { worker, session, heartbeat }).unwrap();
    }

    /// The worker takes up a seat: from now on it says that it holds it.
    pub(super) fn hold(&mut self, worker: WorkerId, attempt: AttemptId, role: Role) {
        self.boxes.get_mut(&worker).unwrap().held.push(held(attempt, role));
    }

    /// From now on the worker says that it holds what was placed on it.
    pub(super) fn hold_all(&mut self, worker: WorkerId) {
        let here = |(_, seat): &(AttemptId, &crate::scheduler::state::Seat)| seat.device.worker == worker;
        let seats: Vec<_> =
            self.state().unfinished_seats().filter(here).map(|(id, seat)| held(id, seat.role)).collect();
        self.boxes.get_mut(&worker).unwrap().held = seats;
    }

    pub(super) fn drop_held(&mut self, worker: WorkerId, attempt: AttemptId) {
        self.boxes.get_mut(&worker).unwrap().held.retain(|seat| seat.attempt != attempt);
    }

    pub(super) fn finish(&mut self, worker: WorkerId, attempt: AttemptId, role: Role) -> bool {
        let session = self.boxes[&worker].session;
        let mut finished = finished(attempt, role);
        finished.usage.wall_ms = self.wall_ms;
        finished.usage.waited_ms = self.waited_ms.get(&finished.role).copied().unwrap_or(0);
        finished
            .outputs
            .extend(self.state().shard(attempt.shard).into_iter().flat_map(|shard| made(&shard.spec, attempt, role)));
        self.give(Input::SeatFinished { worker, session, finished }).unwrap();
        self.settled(worker, attempt, role)
    }

    pub(super) fn fail(&mut self, worker: WorkerId, attempt: AttemptId, role: Role, kind: FailureKind) -> bool {
        let session = self.boxes[&worker].session;
        let failed = SeatFailed { attempt, role, failure: Failure::new(kind, "as the test wants") };
        self.give(Input::SeatFailed { worker, session, failed }).unwrap();
        self.settled(worker, attempt, role)
    }

    /// What the newest effects say to the worker about the seat.
    fn settled(&self, worker: WorkerId, attempt: AttemptId, role: Role) -> bool {
        let counted = self.said(worker).into_iter().find_map(|message| match message {
            ToWorker::SeatSettled(SeatSettled { attempt: a, role: r, counted }) if *a == attempt && *r == role => {
                Some(*counted)
            }
            _ => None,
        });
        counted.expect("every outcome is settled")
    }

    /// Messages to a worker among the newest effects.
    pub(super) fn said(&self, worker: WorkerId) -> Vec<&ToWorker> {
        self.effects
            .iter()
            .filter_map(|effect| match effect {
                Effect::Send { worker: to, message, .. } if *to == worker => Some(message),
                _ => None,
            })
            .collect()
    }

    /// Starts among the newest effects.
    pub(super) fn starts(&self) -> Vec<(WorkerId, StartSeat)> {
        let start = |effect: &Effect| match effect {
            Effect::Send { worker, message: ToWorker::StartSeat(start), .. } => Some((*worker, start.clone())),
            _ => None,
        };
        self.effects.iter().filter_map(start).collect()
    }

    pub(super) fn cancelled(&self, worker: WorkerId, attempt: AttemptId) -> bool {
        self.said(worker).iter().any(|said| matches!(said, ToWorker::CancelSeat(cancel) if cancel.attempt == attempt))
    }

    pub(super) fn wrote_manifest(&self) -> bool {
        self.effects.iter().any(|effect| matches!(effect, Effect::WriteManifest { .. }))
    }

    pub(super) fn submit(&mut self, specs: Vec<ShardSpec>) -> RunId {
        self.submit_run(new_run(0, specs))
    }

    pub(super) fn submit_run(&mut self, run: NewRun) -> RunId {
        match self.give(Input::Submit(run)) {
            Ok(Answer::Run(run)) => run,
            other => panic!("not accepted: {other:?}"),
        }
    }

    pub(super) fn pass_ms(&mut self, ms: u64) {
        self.now = self.now.plus_ms(ms);
        self.give(Input::Tick).unwrap();
    }

    /// The coordinator dies and starts again from its journal.
    pub(super) fn kill_coordinator(&mut self) {
        self.scheduler = recovered(&self.journal, self.now);
    }

    pub(super) fn state(&self) -> &State {
        self.scheduler.state()
    }

    pub(super) fn shard_state(&self, shard: ShardId) -> ShardState {
        self.state().shard(shard).unwrap().state
    }

    /// The open attempt of a shard and where its seats are.
    pub(super) fn open(&self, shard: ShardId) -> (AttemptId, Vec<WorkerId>) {
        let attempt = self.state().shard(shard).unwrap().open_attempt().expect("the shard runs");
        (AttemptId { shard, fence: attempt.fence }, attempt.seats.iter().map(|seat| seat.device.worker).collect())
    }

    pub(super) fn commits(&self) -> usize {
        self.journal.iter().filter(|record| matches!(record.event, Event::ShardCommitted { .. })).count()
    }

    pub(super) fn sentence(&self, shard: ShardId) -> String {
        self.scheduler.explain(shard).unwrap().sentence
    }
}

pub(super) fn recovered(journal: &[Record], now: UnixMillis) -> Scheduler {
    let mut scheduler = Scheduler::new();
    for record in journal {
        scheduler.replay(record).unwrap();
    }
    scheduler.start(now);
    scheduler
}

pub(super) fn new_run(priority: i32, specs: Vec<ShardSpec>) -> NewRun {
    NewRun {
        name: "a sweep".into(),
        priority,
        seed: 42,
        file: "sweep.toml".into(),
        text: "name = 1".into(),
        specs,
        ..NewRun::default()
    }
}

pub(super) fn shard(run: RunId, index: u32) -> ShardId {
    ShardId { run, index }
}

pub(super) fn held(attempt: AttemptId, role: Role) -> HeldSeat {
    HeldSeat { attempt, role, progress: SeatProgress { done: 1, total: 8, note: "fact 1 of 8".to_owned() } }
}

pub(super) fn finished(attempt: AttemptId, role: Role) -> SeatFinished {
    let name = "result.json".to_owned();
    let hash = ArtifactHash::of(format!("{attempt} {role}").as_bytes());
    SeatFinished {
        attempt,
        role,
        outputs: vec![Output { name, hash, bytes: 10 }],
        usage: Usage { wall_ms: 5, memory_peak_bytes: GB, packet_bytes: 0, ..Usage::default() },
        models: vec![(SMOL.to_owned(), "sha256:00".to_owned())],
        build: "test".to_owned(),
    }
}

/// A run of trainings, each an experiment of its own that waits for the one before.
pub(super) fn new_trainings(trainings: Vec<TrainSpec>) -> NewRun {
    let group = |(number, training): (u32, TrainSpec)| Group {
        name: format!("training-{number}"),
        after: number.checked_sub(1).into_iter().collect(),
        trainings: vec![training],
        ..Group::default()
    };
    NewRun { groups: (0u32..).zip(trainings).map(group).collect(), ..new_run(0, Vec::new()) }
}

pub(super) fn inspect(model: &str) -> ShardSpec {
    ShardSpec::Inspect(InspectSpec { model: model.to_owned(), layers: LayerSelection::All, texts: 4, seed: 1 })
}

pub(super) fn transfer(spread: Spread) -> ShardSpec {
    ShardSpec::Transfer(TransferSpec {
        model: SMOL.to_owned(),
        first_fact: 0,
        facts: 4,
        conditions: Condition::DEFAULT.to_vec(),
        answer_tokens: 8,
        spread,
        seed: 1,
    })
}

pub(super) fn cpu(budget: u64) -> Device {
    Device {
        id: DeviceId("cpu".to_owned()),
        kind: DeviceKind::Cpu,
        model: "Some CPU".to_owned(),
        compute_capability: None,
        memory_total_bytes: 16 * GB,
        memory_budget_bytes: budget,
        threads: 2,
        unusable: None,
        speed: None,
    }
}
