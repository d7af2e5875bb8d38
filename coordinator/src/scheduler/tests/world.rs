//! A small cluster in memory: the scheduler, a journal, workers and connections that lose what a fault makes them lose.
//!
//! Workers here keep the worker's side of the protocol: they do not start a seat that they hold, repeat an outcome until it
//! is settled, keep finished outcomes over a crash, and drop what is cancelled. Nothing here is random: the caller's steps
//! decide.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr};

use protocol::control::{
    CancelSeat, Failure, FailureKind, Heartbeat, HeldSeat, Hello, SeatFailed, SeatFinished, SeatProgress, SeatSettled,
    StartSeat, ToWorker,
};
use protocol::experiment::projector::ProjectorRef;
use protocol::experiment::{ShardSpec, Spread};
use protocol::hardware::Telemetry;
use protocol::ids::{AttemptId, DeviceId, Role, RunId, WorkerId};
use protocol::time::UnixMillis;

use super::lab::{
    GB, GEMMA, SMOL, cpu, finished, fuser, inspect, made, new_run, new_trainings, recovered, ridge, training, transfer,
};
use crate::scheduler::input::Connected;
use crate::scheduler::{Effect, Event, Input, NewRun, Record, Scheduler, ShardState};

const WORKERS: usize = 3;
/// Runs in a history: few, so that they meet their fates.
const RUNS_MAX: usize = 4;

/// What the driver did, for a second run that must give the same events.
#[derive(Debug, Clone)]
pub(super) enum Done {
    Gave(UnixMillis, Input),
    /// Killed and replayed; `lost`: killed after this input, before its events were durable.
    Restarted {
        at: UnixMillis,
        lost: Option<Input>,
    },
}

pub(super) struct World {
    pub(super) scheduler: Scheduler,
    pub(super) now: UnixMillis,
    pub(super) journal: Vec<Record>,
    pub(super) script: Vec<Done>,
    pub(super) workers: BTreeMap<WorkerId, VirtualWorker>,
    sessions: u64,
}

#[derive(Debug)]
pub(super) struct VirtualWorker {
    key: [u8; 32],
    epoch: u64,
    /// The session, if it is connected as far as the worker knows.
    session: Option<u64>,
    old_session: u64,
    inbox: VecDeque<ToWorker>,
    running: BTreeMap<(AttemptId, Role), StartSeat>,
    outbox: BTreeMap<(AttemptId, Role), Outcome>,
    budget: u64,
    free: u64,
    /// A model that it says it has but does not.
    lacks: Option<&'static str>,
    pub(super) revoked: bool,
}

#[derive(Debug, Clone)]
enum Outcome {
    Finished(SeatFinished),
    Failed(SeatFailed),
}

impl World {
    pub(super) fn new() -> Self {
        let now = UnixMillis(1_000_000);
        let mut scheduler = Scheduler::new();
        scheduler.start(now);
        let mut world =
            Self { scheduler, now, journal: Vec::new(), script: Vec::new(), workers: BTreeMap::new(), sessions: 0 };
        world.give(Input::CreateToken { secret_hash: [1; 32], ttl_ms: 1_000_000, uses: 9 });
        for number in 1..=WORKERS {
            let worker = WorkerId(number as u64);
            let key = [u8::try_from(number).unwrap(); 32];
            let hostname = format!("box-{number}");
            world.give(Input::RedeemToken { token: protocol::ids::TokenId(1), spki_sha256: key, hostname });
            let body = VirtualWorker {
                key,
                epoch: 1,
                session: None,
                old_session: 0,
                inbox: VecDeque::new(),
                running: BTreeMap::new(),
                outbox: BTreeMap::new(),
                budget: 4 * GB,
                free: 8 * GB,
                lacks: None,
                revoked: false,
            };
            world.workers.insert(worker, body);
        }
        world
    }

    /// One step of a history; `kind` and `pick` are any numbers.
    pub(super) fn step(&mut self, kind: u8, pick: u8) {
        let worker = WorkerId(u64::from(pick) % WORKERS as u64 + 1);
        let high = pick / 16;
        match kind % 32 {
            0 => self.connect(worker),
            1 => self.disconnect(worker, true),
            // The connection is lost, but the coordinator does not notice.
            2 => self.disconnect(worker, false),
            3 => self.crash(worker),
            4 => self.deliver(worker),
            5..=11 => self.work(worker, None),
            12 | 13 => self.work(worker, Some(failure(high))),
            14 => self.resend(worker),
            15 => self.say_on_old_session(worker),
            16 => self.beat(worker),
            17..=22 => self.be_well(worker),
            23 | 24 => self.pass_ms(u64::from(pick) * 20),
            25 => self.pass_ms(u64::from(pick) * 300),
            26 if self.scheduler.state().runs.len() < RUNS_MAX => {
                self.give(Input::Submit(drawn(i32::from(high % 3), pick)));
            }
            26 | 27 => self.order(pick, worker),
            28 => self.restart_coordinator(None),
            // Killed between deciding and making it durable.
            29 => self.restart_coordinator(Some(Input::Submit(drawn(0, pick)))),
            _ => self.spoil(worker, high),
        }
    }

    /// A moment without faults on one worker.
    fn be_well(&mut self, worker: WorkerId) {
        if self.workers[&worker].session.is_none() {
            self.connect(worker);
        }
        self.beat(worker);
        while !self.workers[&worker].inbox.is_empty() {
            self.deliver(worker);
        }
        self.beat(worker);
    }

    /// What people do, now and then.
    fn order(&mut self, pick: u8, worker: WorkerId) {
        let run = RunId(u64::from(pick % 4) + 1);
        match pick / 4 % 8 {
            0 => self.give(Input::CancelRun { run, reason: "a test".to_owned() }),
            1 | 2 => self.give(Input::RetryRun(run)),
            3 | 4 => self.give(Input::SetDrain { worker, on: true }),
            5 | 6 => self.give(Input::SetDrain { worker, on: false }),
            // Two workers must stay, or nothing with two roles can end.
            _ => {
                let last = WorkerId(WORKERS as u64);
                self.workers.get_mut(&last).unwrap().revoked = true;
                self.give(Input::RevokeWorker(last));
            }
        }
    }

    fn spoil(&mut self, worker: WorkerId, how: u8) {
        let body = self.workers.get_mut(&worker).unwrap();
        match how % 4 {
            0 => body.lacks = Some(SMOL),
            1 => body.lacks = None,
            2 => body.free = GB * u64::from(how) / 4,
            _ => {
                // A smaller budget needs another process.
                body.budget = if body.budget == 4 * GB { 2 * GB } else { 4 * GB };
                self.crash(worker);
            }
        }
    }

    pub(super) fn give(&mut self, input: Input) {
        self.script.push(Done::Gave(self.now, input.clone()));
        let _ = self.scheduler.handle(self.now, input);
        let first_new = self.journal.len();
        self.journal.extend(self.scheduler.take_events());
        self.check_commits(first_new);
        while let Some(effect) = self.scheduler.poll_effect() {
            self.route(effect);
        }
    }

    /// Invariant 2, from the journal alone: no shard commits twice.
    fn check_commits(&self, first_new: usize) {
        for record in &self.journal[first_new..] {
            if let Event::ShardCommitted { attempt } = &record.event {
                let commits = self.journal.iter().filter(|other| {
                    matches!(&other.event, Event::ShardCommitted { attempt: other } if other.shard == attempt.shard)
                });
                assert_eq!(commits.count(), 1, "{} committed twice", attempt.shard);
            }
        }
    }

    fn route(&mut self, effect: Effect) {
        match effect {
            Effect::Send { worker, session, message } => {
                // Invariant 6: what a worker is told is in the journal.
                if let ToWorker::StartSeat(start) = &message {
                    let placed = self.journal.iter().any(|record| {
                        matches!(&record.event, Event::AttemptPlaced(placed) if placed.attempt == start.attempt)
                    });
                    assert!(placed, "{} starts without being journaled", start.attempt);
                }
                let body = self.workers.get_mut(&worker).unwrap();
                if body.session == Some(session) {
                    body.inbox.push_back(message);
                }
            }
            Effect::Close { worker, session } => {
                if self.workers[&worker].session == Some(session) {
                    self.disconnect(worker, true);
                }
            }
            Effect::WriteManifest { .. } => {}
        }
    }

    pub(super) fn restart_coordinator(&mut self, lost: Option<Input>) {
        self.script.push(Done::Restarted { at: self.now, lost: lost.clone() });
        if let Some(input) = lost {
            let _ = self.scheduler.handle(self.now, input);
        }
        self.scheduler = recovered(&self.journal, self.now);
        for body in self.workers.values_mut() {
            body.lose_connection();
        }
    }

    pub(super) fn pass_ms(&mut self, ms: u64) {
        self.now = self.now.plus_ms(ms);
        self.give(Input::Tick);
    }

    pub(super) fn connect(&mut self, worker: WorkerId) {
        self.sessions += 1;
        let body = self.workers.get_mut(&worker).unwrap();
        if body.revoked {
            return;
        }
        body.lose_connection();
        body.session = Some(self.sessions);
        let number = u8::try_from(worker.0).unwrap();
        let hello = Hello {
            build: "test".to_owned(),
            hostname: format!("box-{number}"),
            epoch: UnixMillis(body.epoch),
            devices: vec![cpu(body.budget)],
            models: vec![SMOL.to_owned(), GEMMA.to_owned()],
            held: body.held(),
            peer_port: 7000,
            addresses: Vec::new(),
            terms: Default::default(),
            shapes: Vec::new(),
        };
        let (session, spki_sha256) = (self.sessions, body.key);
        let observed = IpAddr::V4(Ipv4Addr::new(10, 0, 0, number));
        self.give(Input::Connected(Box::new(Connected { worker, session, spki_sha256, hello, observed })));
    }

    fn disconnect(&mut self, worker: WorkerId, noticed: bool) {
        let body = self.workers.get_mut(&worker).unwrap();
        let Some(session) = body.session else { return };
        body.lose_connection();
        if noticed {
            self.give(Input::Disconnected { worker, session });
        }
    }

    /// `kill -9` of the worker: what ran is lost, its outbox is on disk.
    fn crash(&mut self, worker: WorkerId) {
        let body = self.workers.get_mut(&worker).unwrap();
        body.lose_connection();
        body.epoch += 1;
        body.running.clear();
    }

    /// The worker reads one message.
    fn deliver(&mut self, worker: WorkerId) {
        let body = self.workers.get_mut(&worker).unwrap();
        match body.inbox.pop_front() {
            Some(ToWorker::StartSeat(start)) => {
                let key = (start.attempt, start.role);
                if !body.outbox.contains_key(&key) {
                    body.running.entry(key).or_insert(start);
                }
            }
            Some(ToWorker::CancelSeat(CancelSeat { attempt, .. })) => {
                body.running.retain(|(held, _), _| *held != attempt);
                body.outbox.retain(|(held, _), _| *held != attempt);
            }
            Some(ToWorker::SeatSettled(SeatSettled { attempt, role, counted })) => {
                body.outbox.remove(&(attempt, role));
                let known = self.journal.iter().any(|record| match &record.event {
                    Event::SeatCompleted(done) => done.attempt == attempt && done.role == role,
                    Event::AttemptFailed { attempt: failed, role: at, .. } => *failed == attempt && *at == role,
                    _ => false,
                });
                assert!(known || !counted, "{attempt} {role} counted without being journaled");
            }
            _ => {}
        }
    }

    /// A running seat ends, well or not.
    fn work(&mut self, worker: WorkerId, failure: Option<FailureKind>) {
        let body = self.workers.get_mut(&worker).unwrap();
        let Some(((attempt, role), start)) = body.running.pop_first() else { return };
        let missing = body.lacks.is_some_and(|model| start.spec.models().contains(&model));
        let failure = if missing { Some(FailureKind::ModelMissing) } else { failure };
        let outcome = match failure {
            None => {
                let mut finished = finished(attempt, role);
                finished.outputs.extend(made(&start.spec, attempt, role));
                Outcome::Finished(finished)
            }
            Some(kind) => Outcome::Failed(SeatFailed { attempt, role, failure: Failure::new(kind, "a test") }),
        };
        body.outbox.insert((attempt, role), outcome.clone());
        if let Some(session) = body.session {
            self.say(worker, session, outcome);
        }
    }

    fn resend(&mut self, worker: WorkerId) {
        let body = &self.workers[&worker];
        let Some(session) = body.session else { return };
        for outcome in body.outbox.values().cloned().collect::<Vec<_>>() {
            self.say(worker, session, outcome);
        }
    }

    /// A message of a connection that is gone arrives late.
    fn say_on_old_session(&mut self, worker: WorkerId) {
        let body = &self.workers[&worker];
        let (session, outcome) = (body.old_session, body.outbox.values().next().cloned());
        if let Some(outcome) = outcome {
            self.say(worker, session, outcome);
        }
    }

    fn say(&mut self, worker: WorkerId, session: u64, outcome: Outcome) {
        self.give(match outcome {
            Outcome::Finished(finished) => Input::SeatFinished { worker, session, finished },
            Outcome::Failed(failed) => Input::SeatFailed { worker, session, failed },
        });
    }

    pub(super) fn beat(&mut self, worker: WorkerId) {
        let body = &self.workers[&worker];
        let Some(session) = body.session else { return };
        let telemetry = Telemetry {
            device: DeviceId("cpu".to_owned()),
            memory_free_bytes: body.free,
            memory_ours_bytes: 0,
            utilisation_percent: None,
            temperature_celsius: None,
            power_milliwatts: None,
            sick: None,
        };
        let heartbeat = Heartbeat { sequence: 1, telemetry: vec![telemetry], held: body.held() };
        self.give(Input::Heartbeat { worker, session, heartbeat });
    }

    /// Faults end: every worker that may is connected, healthy and works. Gives up after `rounds` of two seconds.
    pub(super) fn heal(&mut self, rounds: usize) -> bool {
        let ids: Vec<_> = self.workers.iter().filter(|(_, body)| !body.revoked).map(|(id, _)| *id).collect();
        for id in &ids {
            let body = self.workers.get_mut(id).unwrap();
            (body.free, body.lacks) = (8 * GB, None);
            if body.budget != 4 * GB {
                body.budget = 4 * GB;
                self.crash(*id);
            }
            self.connect(*id);
            self.give(Input::SetDrain { worker: *id, on: false });
        }
        for round in 0..rounds {
            if self.all_over() {
                return true;
            }
            self.pass_ms(2_000);
            if round % 50 == 0 {
                // A model that was found missing counts as missing until its worker greets again.
                ids.iter().for_each(|id| self.connect(*id));
            }
            for id in &ids {
                if self.workers[id].session.is_none() {
                    self.connect(*id);
                }
                self.beat(*id);
                while !self.workers[id].inbox.is_empty() {
                    self.deliver(*id);
                }
                self.resend(*id);
                while !self.workers[id].running.is_empty() {
                    self.work(*id, None);
                }
            }
        }
        self.all_over()
    }

    pub(super) fn all_over(&self) -> bool {
        self.scheduler.state().runs.values().all(|run| run.state.is_terminal())
    }

    pub(super) fn committed(&self) -> usize {
        let shards = self.scheduler.state().runs.values().flat_map(|run| &run.shards);
        shards.filter(|shard| shard.state == ShardState::Committed).count()
    }
}

impl VirtualWorker {
    fn lose_connection(&mut self) {
        self.old_session = self.session.take().unwrap_or(self.old_session);
        self.inbox.clear();
    }

    fn held(&self) -> Vec<HeldSeat> {
        let seat = |(attempt, role): &(AttemptId, Role)| HeldSeat {
            attempt: *attempt,
            role: *role,
            progress: SeatProgress::default(),
        };
        self.running.keys().chain(self.outbox.keys()).map(seat).collect()
    }
}

/// The same inputs again, on another scheduler: its journal.
pub(super) fn run_again(script: &[Done]) -> Vec<Record> {
    let mut scheduler = Scheduler::new();
    scheduler.start(UnixMillis(1_000_000));
    let mut journal = Vec::new();
    for done in script {
        match done {
            Done::Gave(now, input) => {
                let _ = scheduler.handle(*now, input.clone());
                journal.extend(scheduler.take_events());
                while scheduler.poll_effect().is_some() {}
            }
            Done::Restarted { at, lost } => {
                if let Some(input) = lost {
                    let _ = scheduler.handle(*at, input.clone());
                }
                scheduler = recovered(&journal, *at);
            }
        }
    }
    journal
}

/// A run; every fourth is one of trainings, of which the second refines the first.
fn drawn(priority: i32, pick: u8) -> NewRun {
    if pick % 4 != 3 {
        return new_run(priority, specs(pick));
    }
    let first = training(ridge(), 40, u32::from(pick / 128) + 1);
    let second = training(fuser(64, Some(ProjectorRef::Trained(0))), 150, 2);
    NewRun { priority, ..new_trainings(vec![first, second]) }
}

fn specs(pick: u8) -> Vec<ShardSpec> {
    let mut specs = vec![inspect(SMOL)];
    if pick & 1 != 0 {
        specs.push(transfer(Spread::Workers));
    }
    if pick & 2 != 0 {
        specs.push(transfer(Spread::Any));
    }
    if pick & 4 != 0 {
        specs.push(inspect(GEMMA));
    }
    specs
}

fn failure(pick: u8) -> FailureKind {
    FailureKind::from(u16::from(pick) % 14)
}
