//! The driver on a journal in memory and a store in a temporary directory.

use std::net::SocketAddr;
use std::path::Path;

use protocol::control::{Download, Heartbeat, Output, SeatSettled, SeatWrote};
use protocol::control::{HeldSeat, Hello, SeatFinished, StartSeat, ToCoordinator, ToWorker, Usage, refusal};
use protocol::experiment::projector::{STATISTICS, TrainSpec};
use protocol::experiment::{InspectSpec, LayerSelection, ShardSpec};
use protocol::group::Group;
use protocol::hardware::{Device, DeviceKind, Telemetry};
use protocol::ids::{ArtifactHash, DeviceId, Role, RunId, ShardId, WorkerId};
use protocol::store::Store;
use protocol::store::threads::StoreThreads;
use protocol::time::UnixMillis;
use tokio::sync::mpsc;

use super::{DriverHandle, DriverParts, NewRun};
use crate::api::{ErrorCode, RunState, ShardState};
use crate::journal::JournalThread;
use crate::journal::memory::MemoryJournal;
use crate::scheduler::{Event, Settings};
use crate::sim::make;

const KEY: [u8; 32] = [3; 32];
const MODEL: &str = "smollm2-135m-instruct";

struct Bench {
    driver: DriverHandle,
    journal: MemoryJournal,
    store: Store,
    _directory: tempfile::TempDir,
}

impl Bench {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::init(&directory.path().join("store"), UnixMillis(1)).unwrap();
        let journal = MemoryJournal::new();
        let driver = started(&journal, &store).await;
        Self { driver, journal, store, _directory: directory }
    }

    /// Another driver on the same journal and store, after the first has stopped.
    async fn restart(&mut self) {
        self.driver.stop().await;
        self.driver = started(&self.journal, &self.store).await;
    }

    async fn worker(&self) -> WorkerId {
        let token = self.driver.create_token([1; 32], 60_000, 1).await.unwrap();
        self.driver.redeem(token.id, KEY, "box".to_owned()).await.unwrap()
    }

    async fn submit(&self) -> RunId {
        self.driver.submit(new_run()).await.unwrap().run
    }

    fn events(&self) -> Vec<&'static str> {
        self.journal.shared().records.iter().map(|record| record.event.kind()).collect()
    }

    async fn manifests_written(&self) {
        while self.driver.cluster().await.unwrap().manifests_pending > 0 {
            tokio::task::yield_now().await;
        }
    }
}

async fn started(journal: &MemoryJournal, store: &Store) -> DriverHandle {
    let parts = DriverParts {
        journal: JournalThread::start(Box::new(journal.clone())).unwrap(),
        settings: Settings::default(),
        store: store.clone(),
        store_threads: StoreThreads::start().unwrap(),
    };
    super::start(parts).await.unwrap().0
}

fn new_run() -> NewRun {
    let spec = InspectSpec { model: MODEL.to_owned(), layers: LayerSelection::All, texts: 2, seed: 1 };
    let specs = vec![ShardSpec::Inspect(spec)];
    NewRun {
        name: "first".into(),
        priority: 0,
        seed: 1,
        file: "a.toml".into(),
        text: "name = \"first\"".into(),
        specs,
        ..NewRun::default()
    }
}

fn observed() -> SocketAddr {
    "127.0.0.1:5000".parse().unwrap()
}

fn hello(held: Vec<HeldSeat>) -> Hello {
    Hello {
        build: "test".to_owned(),
        hostname: "box".to_owned(),
        epoch: UnixMillis(1),
        devices: vec![Device {
            id: DeviceId("cpu".to_owned()),
            kind: DeviceKind::Cpu,
            model: "Some CPU".to_owned(),
            compute_capability: None,
            memory_total_bytes: 16_000_000_000,
            memory_budget_bytes: 8_000_000_000,
            threads: 2,
            unusable: None,
            speed: None,
        }],
        models: vec![MODEL.to_owned()],
        held,
        peer_port: 7000,
        addresses: Vec::new(),
        terms: Default::default(),
        shapes: Vec::new(),
    }
}

fn heartbeat() -> ToCoordinator {
    let telemetry = Telemetry {
        device: DeviceId("cpu".to_owned()),
        memory_free_bytes: 8_000_000_000,
        memory_ours_bytes: 0,
        utilisation_percent: Some(3),
        temperature_celsius: None,
        power_milliwatts: None,
        sick: None,
    };
    Heartbeat { sequence: 1, telemetry: vec![telemetry], held: Vec::new() }.into()
}

/// Publishes a result and says that the seat is done.
fn finished(start: &StartSeat, store: &Store) -> ToCoordinator {
    let (hash, bytes) = store.publish_bytes(b"{}").unwrap();
    SeatFinished {
        attempt: start.attempt,
        role: start.role,
        outputs: vec![protocol::control::Output { name: "result.json".to_owned(), hash, bytes }],
        usage: Usage::default(),
        models: Vec::new(),
        build: "test".to_owned(),
    }
    .into()
}

async fn next_start(outbox: &mut mpsc::Receiver<ToWorker>) -> StartSeat {
    loop {
        if let ToWorker::StartSeat(start) = outbox.recv().await.expect("the session is open") {
            return start;
        }
    }
}

async fn next_settled(outbox: &mut mpsc::Receiver<ToWorker>) -> SeatSettled {
    loop {
        if let ToWorker::SeatSettled(settled) = outbox.recv().await.expect("the session is open") {
            return settled;
        }
    }
}

fn manifest_is_there(bench: &Bench, run: RunId) -> bool {
    let shard = protocol::ids::ShardId { run, index: 0 };
    Path::exists(&bench.store.manifest_path(shard))
}

#[tokio::test]
async fn a_shard_goes_from_submission_to_manifest() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let (outbox, mut messages) = mpsc::channel(16);
    let welcome = bench.driver.connected(worker, 1, hello(Vec::new()), observed(), KEY, outbox).await.unwrap();
    assert_eq!(welcome.store_uuid, bench.store.uuid());
    bench.driver.message(worker, 1, heartbeat()).await.unwrap();
    let run = bench.submit().await;
    let start = next_start(&mut messages).await;
    assert_eq!(bench.driver.run(run).await.unwrap().shards[0].state, ShardState::Running);

    bench.driver.message(worker, 1, finished(&start, &bench.store)).await.unwrap();
    assert!(next_settled(&mut messages).await.counted);
    bench.manifests_written().await;
    let manifests = bench.store.read_manifests(run).unwrap();
    assert_eq!((manifests[0].fence, manifests[0].seats[0].device_model.as_str()), (start.attempt.fence, "Some CPU"));
    let summary = bench.driver.run(run).await.unwrap().summary;
    assert_eq!((summary.state, summary.done_per_mille, summary.note.as_str()), (RunState::Complete, 1000, ""));
    assert!(bench.events().ends_with(&["AttemptPlaced", "SeatCompleted", "ShardCommitted", "RunFinished"]));
}

#[tokio::test]
async fn what_was_answered_survives_a_restart_and_missing_manifests_are_written() {
    let mut bench = Bench::new().await;
    let worker = bench.worker().await;
    let (outbox, mut messages) = mpsc::channel(16);
    bench.driver.connected(worker, 1, hello(Vec::new()), observed(), KEY, outbox).await.unwrap();
    bench.driver.message(worker, 1, heartbeat()).await.unwrap();
    let run = bench.submit().await;
    let start = next_start(&mut messages).await;
    bench.restart().await;
    assert!(messages.recv().await.is_none(), "the session ended with the old driver");

    // The worker comes back with what it finished meanwhile.
    let held = HeldSeat { attempt: start.attempt, role: start.role, progress: Default::default() };
    let (outbox, mut messages) = mpsc::channel(16);
    bench.driver.connected(worker, 1, hello(vec![held]), observed(), KEY, outbox).await.unwrap();
    bench.driver.message(worker, 1, finished(&start, &bench.store)).await.unwrap();
    assert!(next_settled(&mut messages).await.counted);
    bench.manifests_written().await;
    let placed = bench.events().iter().filter(|kind| **kind == "AttemptPlaced").count();
    assert_eq!(placed, 1, "nothing ran twice");

    std::fs::remove_file(bench.store.manifest_path(start.attempt.shard)).unwrap();
    bench.restart().await;
    bench.manifests_written().await;
    assert!(manifest_is_there(&bench, run));
}

#[tokio::test]
async fn a_journal_that_cannot_be_written_accepts_nothing_and_recovers() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let (outbox, mut messages) = mpsc::channel(16);
    bench.driver.connected(worker, 1, hello(Vec::new()), observed(), KEY, outbox).await.unwrap();
    let before = bench.journal.shared().records.len();

    bench.journal.shared().full = true;
    let refused = bench.driver.submit(new_run()).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::JournalUnavailable);
    assert!(refused.message.ends_with("nothing was accepted"), "{}", refused.message);
    assert!(messages.recv().await.is_none(), "sessions end: what they said is not known any more");
    let (outbox, _messages) = mpsc::channel(16);
    let refused = bench.driver.connected(worker, 2, hello(Vec::new()), observed(), KEY, outbox).await.unwrap_err();
    assert_eq!(refused.code, refusal::UNAVAILABLE);
    assert_eq!(bench.driver.runs().await.unwrap_err().code, ErrorCode::JournalUnavailable);
    assert_eq!(bench.journal.shared().records.len(), before);

    bench.journal.shared().full = false;
    let run = loop {
        match bench.driver.submit(new_run()).await {
            Ok(answer) => break answer.run,
            Err(error) => assert_eq!(error.code, ErrorCode::JournalUnavailable),
        }
    };
    assert_eq!(run, RunId(1), "the refused run left no trace");
    let accepted = bench.events().iter().filter(|kind| **kind == "RunAccepted").count();
    assert_eq!(accepted, 1);
}

#[tokio::test]
async fn a_store_that_is_away_delays_manifests_and_says_so() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let (outbox, mut messages) = mpsc::channel(16);
    bench.driver.connected(worker, 1, hello(Vec::new()), observed(), KEY, outbox).await.unwrap();
    bench.driver.message(worker, 1, heartbeat()).await.unwrap();
    let run = bench.submit().await;
    let start = next_start(&mut messages).await;
    let done = finished(&start, &bench.store);
    let sentinel = bench.store.root().join(protocol::store::SENTINEL);
    let aside = bench.store.root().join("aside");
    std::fs::rename(&sentinel, &aside).unwrap();
    bench.driver.message(worker, 1, done).await.unwrap();
    assert!(next_settled(&mut messages).await.counted, "the journal has it, that is what counts");
    let note = loop {
        let note = bench.driver.run(run).await.unwrap().summary.note;
        if !note.is_empty() {
            break note;
        }
    };
    assert!(note.starts_with("1 manifests wait for the store"), "{note}");
    assert!(bench.driver.cluster().await.unwrap().store_problem.is_some());
    std::fs::rename(&aside, &sentinel).unwrap();
    bench.manifests_written().await;
    assert!(manifest_is_there(&bench, run));
    assert!(bench.driver.run(run).await.unwrap().summary.note.is_empty());
}

#[tokio::test]
async fn a_worker_that_does_not_read_is_let_go() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let (outbox, mut messages) = mpsc::channel(1);
    bench.driver.connected(worker, 1, hello(Vec::new()), observed(), KEY, outbox).await.unwrap();
    for _ in 0..2 {
        // Each is answered with a settlement that does not count.
        let start = finished_elsewhere();
        bench.driver.message(worker, 1, start).await.unwrap();
    }
    bench.driver.cluster().await.unwrap();
    assert!(messages.recv().await.is_some());
    assert!(messages.recv().await.is_none(), "the second did not fit");
}

fn finished_elsewhere() -> ToCoordinator {
    SeatFinished {
        attempt: protocol::ids::AttemptId { shard: "r9.9".parse().unwrap(), fence: protocol::ids::Fence(9) },
        role: protocol::ids::Role::Main,
        outputs: Vec::new(),
        usage: Usage::default(),
        models: Vec::new(),
        build: String::new(),
    }
    .into()
}

#[tokio::test]
async fn only_the_right_key_of_a_worker_in_good_standing_is_admitted() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    assert_eq!(bench.driver.admissible(worker, KEY).await, Ok(()));
    assert_eq!(bench.driver.admissible(worker, [4; 32]).await, Err(protocol::control::close::ROLE));
    assert_eq!(bench.driver.admissible(WorkerId(9), KEY).await, Err(protocol::control::close::ROLE));
    bench.driver.revoke_worker(worker).await.unwrap();
    assert_eq!(bench.driver.admissible(worker, KEY).await, Err(protocol::control::close::REVOKED));
    let revoked = matches!(bench.journal.shared().records.last().unwrap().event, Event::WorkerRevoked { .. });
    assert!(revoked);
    bench.driver.stop().await;
    assert_eq!(bench.driver.admissible(worker, KEY).await, Err(protocol::control::close::RESTARTING));
}

#[tokio::test]
async fn what_a_program_writes_is_at_hand_while_it_runs_and_an_artifact_later() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let (outbox, mut sent) = mpsc::channel(64);
    bench.driver.connected(worker, 1, hello(vec![]), observed(), KEY, outbox).await.unwrap();
    bench.driver.message(worker, 1, heartbeat()).await.unwrap();
    bench.submit().await;
    let start = next_start(&mut sent).await;
    let shard = start.attempt.shard;
    assert_eq!(bench.driver.log(shard, 0).await.unwrap().note, "nothing written yet");
    let wrote = |attempt, offset, bytes: &[u8]| SeatWrote { attempt, role: start.role, offset, bytes: bytes.to_vec() };
    bench.driver.message(worker, 1, wrote(start.attempt, 0, b"step 1\n").into()).await.unwrap();
    let mut other = start.attempt;
    other.fence.0 += 1;
    bench.driver.message(worker, 1, wrote(other, 7, b"of an attempt that is none").into()).await.unwrap();
    let log = bench.driver.log(shard, 0).await.unwrap();
    assert_eq!((log.text.as_str(), log.next, log.ended), ("step 1\n", 7, false));
    assert_eq!(log.attempt, start.attempt.to_string());
    assert_eq!(bench.driver.log(shard, 7).await.unwrap().text, "");

    let (hash, bytes) = bench.store.publish_bytes(b"step 1\ndone\n").unwrap();
    let output = protocol::control::Output { name: "output.log".to_owned(), hash, bytes };
    let ToCoordinator::SeatFinished(mut done) = finished(&start, &bench.store) else { unreachable!() };
    done.outputs.push(output);
    bench.driver.message(worker, 1, done.into()).await.unwrap();
    next_settled(&mut sent).await;
    let log = bench.driver.log(shard, 7).await.unwrap();
    assert_eq!((log.state, log.ended, log.artifact.unwrap().hash), (ShardState::Committed, true, hash));
    assert_eq!(bench.driver.log(ShardId { index: 9, ..shard }, 0).await.unwrap_err().code, ErrorCode::NotFound);
}

#[tokio::test]
async fn inputs_of_open_attempts_are_served_and_named_in_manifests() {
    let bench = Bench::new().await;
    let worker = bench.worker().await;
    let (outbox, mut messages) = mpsc::channel(16);
    bench.driver.connected(worker, 1, hello(Vec::new()), observed(), KEY, outbox).await.unwrap();
    bench.driver.message(worker, 1, heartbeat()).await.unwrap();
    let pair = MODEL.to_owned();
    let training = TrainSpec { source: pair.clone(), target: pair, ..make::training(make::ridge(), 8, 1) };
    let groups = vec![Group { trainings: vec![training], ..Group::default() }];
    let answer = bench.driver.submit(NewRun { groups, specs: Vec::new(), ..new_run() }).await.unwrap();
    assert_eq!(answer.shards, 1, "the shards that there are");
    let sums = bench.store.publish_bytes(b"sums").unwrap();
    for _ in 0..2 {
        let start = next_start(&mut messages).await;
        let mut done = finished(&start, &bench.store);
        if let (ToCoordinator::SeatFinished(done), Role::Target) = (&mut done, start.role) {
            done.outputs.push(Output { name: STATISTICS.to_owned(), hash: sums.0, bytes: sums.1 });
        }
        bench.driver.message(worker, 1, done).await.unwrap();
    }
    let solve = next_start(&mut messages).await;
    assert_eq!(solve.inputs, [Output { name: format!("0-{STATISTICS}"), hash: sums.0, bytes: sums.1 }]);
    let ask = async |worker, hash| {
        let download = Download { attempt: solve.attempt, hash };
        bench.driver.input(worker, download).await.unwrap().is_some()
    };
    assert!(ask(worker, sums.0).await);
    assert!(!ask(worker, ArtifactHash::of(b"another")).await && !ask(WorkerId(9), sums.0).await);

    bench.driver.message(worker, 1, finished(&solve, &bench.store)).await.unwrap();
    while !next_settled(&mut messages).await.counted {}
    bench.manifests_written().await;
    let manifests = bench.store.read_manifests(answer.run).unwrap();
    let used: Vec<_> = manifests.iter().map(|manifest| manifest.inputs.len()).collect();
    assert_eq!(used, [0, 1]);
    assert!(!ask(worker, sums.0).await, "the attempt is over");
    let detail = bench.driver.run(answer.run).await.unwrap();
    assert!(detail.trainings[0].ended && detail.trainings[0].counted == 8);
    assert_eq!(detail.summary.state, RunState::Complete);
}
