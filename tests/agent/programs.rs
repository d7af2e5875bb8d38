//! No-ops and programs of researchers, many and short: sent ahead in lanes, lost to nobody.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;

use protocol::control::{
    FailureKind, SeatFailed, SeatFinished, SeatSettled, SeatWrote, StartSeat, ToCoordinator, ToWorker,
};
use protocol::experiment::{CommandSpec, NoOpSpec, ShardSpec};
use protocol::ids::{AttemptId, DeviceId, Fence, Role, RunId, ShardId};
use protocol::store::Store;
use protocol::time::UnixMillis;

use crate::support::{Hub, Session, TestAuthority, TestBox, loopback, until_async, welcome};

/// Seats sent ahead in one lane.
const AHEAD: usize = 256;

fn program(argv: &[&str]) -> ShardSpec {
    ShardSpec::Command(Box::new(CommandSpec {
        argv: argv.iter().map(|text| (*text).to_owned()).collect(),
        env: Vec::new(),
        files: Vec::new(),
        memory_bytes: 0,
        threads: 1,
        collect: Vec::new(),
        timeout_ms: 0,
        retries: 0,
        class: "test".into(),
        work: 1,
    }))
}

fn no_op(index: u32) -> ShardSpec {
    ShardSpec::NoOp(NoOpSpec { index })
}

fn start(index: u32, fence: u64, lane: u32, spec: ShardSpec) -> StartSeat {
    StartSeat {
        attempt: AttemptId { shard: ShardId { run: RunId(1), index }, fence: Fence(fence) },
        role: Role::Main,
        device: DeviceId("cpu".into()),
        reserved_bytes: 1,
        lane,
        spec,
        seats: Vec::new(),
        inputs: Vec::new(),
    }
}

/// A coordinator that sends shards ahead, lane by lane, and counts what comes back.
struct Feeder {
    lanes: Vec<VecDeque<(u32, ShardSpec)>>,
    fence: u64,
    /// What is out, by attempt: lane and shard.
    out: BTreeMap<AttemptId, (usize, u32, ShardSpec)>,
    settled: BTreeSet<u32>,
}

impl Feeder {
    fn new(lanes: Vec<VecDeque<(u32, ShardSpec)>>) -> Self {
        Self { lanes, fence: 0, out: BTreeMap::new(), settled: BTreeSet::new() }
    }

    /// Shards whose number is below the credit of their lane.
    fn orders(&mut self) -> Vec<ToWorker> {
        let mut orders = Vec::new();
        for lane in 0..self.lanes.len() {
            let mut out = self.out.values().filter(|(of, ..)| *of == lane).count();
            while out < AHEAD
                && let Some((index, spec)) = self.lanes[lane].pop_front()
            {
                self.fence += 1;
                out += 1;
                let order = start(index, self.fence, lane as u32, spec.clone());
                self.out.insert(order.attempt, (lane, index, spec));
                orders.push(order.into());
            }
        }
        orders
    }

    /// An outcome: settled, and the next of its lane sent.
    fn take(&mut self, finished: &SeatFinished) -> Vec<ToWorker> {
        let SeatFinished { attempt, role, .. } = *finished;
        let mut answers = vec![SeatSettled { attempt, role, counted: true }.into()];
        if let Some((lane, index, _)) = self.out.remove(&attempt) {
            assert!(self.settled.insert(index), "shard {index} was settled twice");
            if let Some((index, spec)) = self.lanes[lane].pop_front() {
                self.fence += 1;
                let order = start(index, self.fence, lane as u32, spec.clone());
                self.out.insert(order.attempt, (lane, index, spec));
                answers.push(order.into());
            }
        }
        answers
    }

    /// After a new greeting: what the worker does not hold any more goes out again under another number.
    fn forget_all_but(&mut self, held: &BTreeSet<AttemptId>) {
        let lost: Vec<_> = self.out.keys().filter(|attempt| !held.contains(*attempt)).copied().collect();
        for attempt in lost {
            let (lane, index, spec) = self.out.remove(&attempt).unwrap();
            self.lanes[lane].push_back((index, spec));
        }
    }

    /// Feeds a worker until `enough` shards are settled.
    async fn feed(&mut self, session: &mut Session, enough: usize) {
        let orders = self.orders();
        session.say_all(&orders).await;
        while self.settled.len() < enough {
            let finished = session.hear(outcome).await.unwrap_or_else(|failed| panic!("{failed:?}"));
            let answers = self.take(&finished);
            session.say_all(&answers).await;
        }
    }
}

fn outcome(message: &ToCoordinator) -> Option<Result<SeatFinished, SeatFailed>> {
    match message {
        ToCoordinator::SeatFinished(finished) => Some(Ok(finished.clone())),
        ToCoordinator::SeatFailed(failed) => Some(Err(failed.clone())),
        _ => None,
    }
}

struct Bench {
    store: Store,
    hub: Hub,
    a_box: TestBox,
    _directory: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::init(&directory.path().join("store"), UnixMillis(0)).unwrap();
        let authority = TestAuthority::new();
        let hub = Hub::start(&authority.coordinator(), loopback(), welcome(Some(&store), store.root()));
        let a_box = TestBox::new(&authority, 1, hub.address);
        Self { store, hub, a_box, _directory: directory }
    }

    async fn session(&mut self, arguments: &[&str]) -> Session {
        self.a_box.start(arguments);
        self.hub.session().await
    }

    /// Nothing is left of any seat.
    async fn is_clean(&self) {
        let state = self.a_box.path("state");
        until_async(move || {
            let log = fs::metadata(state.join("outbox").join("records.log")).map_or(0, |log| log.len());
            let outbox = fs::read_dir(state.join("outbox"))
                .unwrap()
                .filter(|entry| entry.as_ref().is_ok_and(|entry| entry.file_name() != "records.log"));
            // Places in which programs work stay, empty.
            let mut work = fs::read_dir(state.join("work")).unwrap().map(|entry| entry.unwrap().path());
            log == 0 && outbox.count() == 0 && work.all(|place| fs::read_dir(place).unwrap().next().is_none())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_shards_survive_the_agents_death() {
    const NO_OPS: u32 = 2000;
    const COMMANDS: u32 = 500;
    let mut bench = Bench::new();
    let mut session = bench.session(&["--allow-commands"]).await;
    assert!(session.hello.terms.commands);
    let no_ops = (0..NO_OPS).map(|index| (index, no_op(index)));
    let commands = (NO_OPS..NO_OPS + COMMANDS).map(|index| (index, program(&["/bin/true"])));
    let (some, others): (VecDeque<_>, VecDeque<_>) = commands.partition(|(index, _)| index % 2 == 0);
    let mut feeder = Feeder::new(vec![no_ops.collect(), some, others]);
    feeder.feed(&mut session, 700).await;
    bench.a_box.kill();
    drop(session);

    let mut session = bench.session(&["--allow-commands"]).await;
    let held = session.hello.held.iter().map(|held| held.attempt).collect();
    feeder.forget_all_but(&held);
    feeder.feed(&mut session, (NO_OPS + COMMANDS) as usize).await;
    assert!(feeder.out.is_empty());
    bench.is_clean().await;
    drop(session);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_program_writes_is_told_while_it_runs_and_kept_when_it_is_over() {
    let mut bench = Bench::new();
    let mut session = bench.session(&["--allow-commands"]).await;
    let gate = bench.a_box.path("gate");
    let text = format!("echo begun; while [ ! -e {} ]; do sleep 0.02; done; echo done >out.txt", gate.display());
    let mut order = start(0, 1, 0, program(&["sh", "-c", &text]));
    let ShardSpec::Command(spec) = &mut order.spec else { unreachable!() };
    spec.collect = vec!["*.txt".into()];
    session.say(order).await;
    let wrote = |message: &ToCoordinator| match message {
        ToCoordinator::SeatWrote(wrote) => Some(wrote.clone()),
        _ => None,
    };
    let SeatWrote { offset, bytes, .. } = session.hear(wrote).await;
    assert_eq!((offset, bytes.as_slice()), (0, &b"begun\n"[..]));
    fs::write(gate, "").unwrap();
    let finished = session.hear(outcome).await.unwrap();
    let names: Vec<_> = finished.outputs.iter().map(|output| output.name.as_str()).collect();
    assert_eq!(names, ["output.log", "out.txt"]);
    assert_eq!(bench.store.read_verified(&finished.outputs[0].hash).unwrap(), b"begun\n");
    assert!(finished.usage.memory_peak_bytes > 0);
    session.say(SeatSettled { attempt: finished.attempt, role: Role::Main, counted: true }).await;
    bench.is_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_are_off_unless_the_operator_allows_them() {
    let mut bench = Bench::new();
    let mut session = bench.session(&["--label", "site=attic", "--price-usd-per-hour", "0.35", "--ahead", "7"]).await;
    let terms = &session.hello.terms;
    assert_eq!((terms.labels.as_slice(), terms.price_microusd_per_hour), (&["site=attic".to_owned()][..], 350_000));
    assert_eq!((terms.commands, terms.ahead), (false, 7));
    session.say(start(0, 1, 0, program(&["true"]))).await;
    let failed = session.hear(outcome).await.unwrap_err();
    assert_eq!(failed.failure.kind, FailureKind::Forbidden);
    assert!(failed.failure.hint.contains("--allow-commands"), "{}", failed.failure.hint);
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_of_the_agent_ends_its_programs() {
    let mut bench = Bench::new();
    let mut session = bench.session(&["--allow-commands"]).await;
    let pid = bench.a_box.path("pid");
    let text = format!("sleep 1000 & echo $! >{}; wait", pid.display());
    session.say(start(0, 1, 0, program(&["sh", "-c", &text]))).await;
    let written = move || fs::read_to_string(&pid).ok().and_then(|text| text.trim().parse::<u32>().ok());
    let waiting = written.clone();
    until_async(move || waiting().is_some()).await;
    let pid = written().unwrap();
    bench.a_box.kill();
    until_async(move || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_none_or(|rest| rest.is_empty() || rest.starts_with('Z'))
    })
    .await;
}
