//! An agent's life: work, crashes of everything around it, and its own.

use std::fs;
use std::time::{Duration, Instant};

use protocol::control::{
    CancelSeat, FailureKind, SeatFailed, SeatFinished, SeatSettled, ToCoordinator, ToWorker, UploadAnswer, close,
};
use protocol::experiment::ShardSpec;
use protocol::ids::{ArtifactHash, Role};
use protocol::quic::write_frame;
use protocol::store::Store;
use protocol::time::UnixMillis;

use crate::support::{
    Hub, RESULT, Session, TestAuthority, TestBox, attempt, epoch, loopback, start_seat, until, until_async, welcome,
};

struct Bench {
    authority: TestAuthority,
    store: Store,
    directory: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::init(&directory.path().join("store"), UnixMillis(0)).unwrap();
        Self { authority: TestAuthority::new(), store, directory }
    }

    fn hub(&self) -> Hub {
        self.hub_at(loopback())
    }

    fn hub_at(&self, listen: std::net::SocketAddr) -> Hub {
        let welcome = welcome(Some(&self.store), self.store.root());
        Hub::start(&self.authority.coordinator(), listen, welcome)
    }

    fn a_box(&self, id: u64, hub: &Hub) -> TestBox {
        TestBox::new(&self.authority, id, hub.address)
    }
}

fn finished(message: &ToCoordinator) -> Option<SeatFinished> {
    match message {
        ToCoordinator::SeatFinished(finished) => Some(finished.clone()),
        _ => None,
    }
}

fn failed(message: &ToCoordinator) -> Option<SeatFailed> {
    match message {
        ToCoordinator::SeatFailed(failed) => Some(failed.clone()),
        _ => None,
    }
}

/// The note of the only seat held, as soon as it contains `text`.
async fn note(session: &mut Session, text: &str) -> String {
    session
        .hear(|message| match message {
            ToCoordinator::Heartbeat(beat) => {
                beat.held.first().map(|held| held.progress.note.clone()).filter(|note| note.contains(text))
            }
            _ => None,
        })
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seat_is_run_published_repeated_and_settled() {
    let bench = Bench::new();
    let mut hub = bench.hub();
    let mut a_box = bench.a_box(1, &hub);
    a_box.finishing_executor(1, Role::Main, "");
    a_box.start(&["--memory", "100MB"]);
    let mut session = hub.session().await;
    let device = &session.hello.devices[0];
    assert_eq!((device.id.0.as_str(), device.memory_budget_bytes, device.threads), ("cpu", 100_000_000, 1));
    assert_eq!(device.unusable, None);
    assert_eq!(session.hello.models, [crate::support::MODEL]);
    assert_eq!(session.hello.shapes, [(crate::support::MODEL.to_owned(), crate::support::shape())]);

    session.say(start_seat(1, Role::Main)).await;
    let done = session.hear(finished).await;
    assert_eq!((done.attempt, done.role, done.build.as_str()), (attempt(1), Role::Main, "executor-build"));
    assert_eq!(done.outputs[0].hash, ArtifactHash::of(RESULT.as_bytes()));
    assert_eq!(bench.store.read_verified(&done.outputs[0].hash).unwrap(), RESULT.as_bytes());

    // Not settled: said again, on the same connection and on the next.
    assert_eq!(session.hear(finished).await, done);
    session.connection.close(quinn::VarInt::from_u32(close::RESTARTING), b"");
    let mut session = hub.session().await;
    assert_eq!(session.hello.held[0].attempt, attempt(1));
    assert_eq!(session.hear(finished).await, done);
    session.say(SeatSettled { attempt: attempt(1), role: Role::Main, counted: true }).await;
    let (outbox, work) = (a_box.path("state").join("outbox"), a_box.work(1, Role::Main));
    until_async(move || fs::read_dir(&outbox).unwrap().count() == 0 && !work.exists()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn work_goes_on_while_the_coordinator_is_dead_and_is_handed_in_to_the_next() {
    let bench = Bench::new();
    let mut hub = bench.hub();
    let address = hub.address;
    let mut a_box = bench.a_box(1, &hub);
    a_box.finishing_executor(1, Role::Main, "while [ ! -e \"$D/gate\" ]; do sleep 0.02; done");
    a_box.start(&[]);
    let mut session = hub.session().await;
    let first_epoch = epoch(&session);
    session.say(start_seat(1, Role::Main)).await;
    let runs = a_box.path("runs");
    until_async(move || runs.exists()).await;

    hub.kill();
    drop(session);
    fs::write(a_box.path("gate"), "").unwrap();
    let kept = a_box.path("state").join("outbox").join("r1.0-f1-main").join("record.json");
    until_async(move || kept.exists()).await;

    let begun = Instant::now();
    let mut hub = bench.hub_at(address);
    let mut session = hub.session().await;
    let away = begun.elapsed();
    eprintln!("the agent was back {away:?} after the coordinator");
    // Two seconds as a rule; the bound is for a machine that has other things to do.
    assert!(away < Duration::from_secs(10), "{away:?}");
    assert_eq!(epoch(&session), first_epoch, "the same process");
    assert_eq!(session.hello.held[0].attempt, attempt(1));
    assert_eq!(session.hear(finished).await.attempt, attempt(1));
    assert_eq!(fs::read_to_string(a_box.path("runs")).unwrap(), "run\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_finished_survives_a_missing_store_and_kill_9() {
    let bench = Bench::new();
    let mut hub = bench.hub();
    let mut a_box = bench.a_box(1, &hub);
    a_box.finishing_executor(1, Role::Main, "");
    let mount = bench.directory.path().join("mount");
    fs::create_dir(&mount).unwrap();
    let arguments = ["--store", mount.to_str().unwrap()];
    a_box.start(&arguments);
    let mut session = hub.session().await;
    session.say(start_seat(1, Role::Main)).await;
    let why = note(&mut session, "waiting for the store").await;
    assert!(why.contains("no store at"), "{why}");
    let first_epoch = epoch(&session);
    a_box.kill();
    assert_eq!(fs::read_dir(&mount).unwrap().count(), 0, "an unmounted mount point was written to");

    // Mounted at last.
    fs::remove_dir(&mount).unwrap();
    fs::rename(bench.store.root(), &mount).unwrap();
    a_box.start(&arguments);
    let mut session = hub.session().await;
    assert!(epoch(&session) > first_epoch, "another process");
    assert_eq!(session.hello.held[0].attempt, attempt(1));
    let done = session.hear(finished).await;
    let store = Store::open(&mount, Some(bench.store.uuid())).unwrap();
    assert_eq!(store.read_verified(&done.outputs[0].hash).unwrap(), RESULT.as_bytes());
    assert_eq!(fs::read_to_string(a_box.path("runs")).unwrap(), "run\n", "nothing finished is run again");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_mount_artifacts_go_through_the_coordinator_until_it_takes_them() {
    let bench = Bench::new();
    let nowhere = bench.directory.path().join("nowhere");
    let credentials = bench.authority.coordinator();
    let mut hub = Hub::start(&credentials, loopback(), welcome(Some(&bench.store), &nowhere));
    let mut a_box = bench.a_box(1, &hub);
    a_box.finishing_executor(1, Role::Main, "");
    a_box.start(&[]);
    let mut session = hub.session().await;
    session.say(start_seat(1, Role::Main)).await;

    let (upload, bytes, mut answer) = session.upload().await;
    assert_eq!((upload.hash, bytes.as_slice()), (ArtifactHash::of(RESULT.as_bytes()), RESULT.as_bytes()));
    let refused = Some("the store is full".to_owned());
    write_frame(&mut answer, &ToWorker::from(UploadAnswer { refused })).await.unwrap();
    assert_eq!(note(&mut session, "waiting").await, "waiting for the store: the store is full");
    let (again, _, mut answer) = session.upload().await;
    assert_eq!(again, upload);
    write_frame(&mut answer, &ToWorker::from(UploadAnswer { refused: None })).await.unwrap();
    assert_eq!(session.hear(finished).await.outputs[0].hash, upload.hash);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_executors_death_is_told_with_its_last_words_and_the_next_seat_gets_another() {
    let bench = Bench::new();
    let mut hub = bench.hub();
    let mut a_box = bench.a_box(1, &hub);
    a_box.executor("head -c 1 >/dev/null\necho 'CUDA error: device lost' >&2\nkill -9 $$");
    a_box.start(&[]);
    let mut session = hub.session().await;
    session.say(start_seat(1, Role::Main)).await;
    let failure = session.hear(failed).await.failure;
    assert_eq!(failure.kind, FailureKind::ExecutorLost);
    assert_eq!(failure.message, "executor x1 on cpu was killed by signal 9; its last words: CUDA error: device lost");

    a_box.finishing_executor(2, Role::Main, "");
    session.say(start_seat(2, Role::Main)).await;
    assert_eq!(session.hear(finished).await.attempt, attempt(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_from_an_executor_ends_it() {
    let bench = Bench::new();
    let mut hub = bench.hub();
    let mut a_box = bench.a_box(1, &hub);
    a_box.executor("head -c 1 >/dev/null\nprintf 'panicked at nothing in particular'\ncat >/dev/null");
    a_box.start(&[]);
    let mut session = hub.session().await;
    session.say(start_seat(1, Role::Main)).await;
    let failure = session.hear(failed).await.failure;
    assert_eq!(failure.kind, FailureKind::ExecutorLost);
    assert!(failure.message.contains("spoke nonsense: frame of"), "{}", failure.message);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_is_not_here_is_told_at_once() {
    let bench = Bench::new();
    let mut hub = bench.hub();
    let mut a_box = bench.a_box(1, &hub);
    a_box.start(&[]);
    let mut session = hub.session().await;
    fs::remove_file(a_box.path("models").join(crate::support::MODEL)).unwrap();
    session.say(start_seat(1, Role::Main)).await;
    assert_eq!(session.hear(failed).await.failure.kind, FailureKind::ModelMissing);

    let mut other = start_seat(2, Role::Main);
    let ShardSpec::Inspect(spec) = &mut other.spec else { panic!("an inspection") };
    spec.model = "Qwen/Qwen3-0.6B".to_owned();
    session.say(other).await;
    let failure = session
        .hear(|message| failed(message).filter(|failed| failed.attempt == attempt(2)).map(|failed| failed.failure))
        .await;
    assert_eq!(failure.kind, FailureKind::ModelMissing);
    assert_eq!(failure.hint, "bring it with `bonepile-worker models pull Qwen/Qwen3-0.6B`");
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_of_the_agent_leaves_no_executor() {
    let bench = Bench::new();
    let mut hub = bench.hub();
    let mut a_box = bench.a_box(1, &hub);
    a_box.executor("echo $$ >\"$D/pid\"\nexec sleep 1000");
    a_box.start(&[]);
    let mut session = hub.session().await;
    session.say(start_seat(1, Role::Main)).await;
    let pid_file = a_box.path("pid");
    let read_pid = move || fs::read_to_string(&pid_file).ok().and_then(|text| text.trim().parse::<u32>().ok());
    let waiting = read_pid.clone();
    until_async(move || waiting().is_some()).await;
    let pid = read_pid().unwrap();
    assert!(is_alive(pid));
    a_box.kill();
    until_async(move || !is_alive(pid)).await;
}

/// Running, not a zombie that its new parent has not buried.
fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_seat_is_held_no_longer_and_an_executor_that_does_not_stop_is_killed() {
    let bench = Bench::new();
    let mut hub = bench.hub();
    let mut a_box = bench.a_box(1, &hub);
    a_box.executor("echo $$ >\"$D/pid\"\nexec sleep 1000");
    a_box.start(&[]);
    let mut session = hub.session().await;
    session.say(start_seat(1, Role::Main)).await;
    let held = |message: &ToCoordinator| match message {
        ToCoordinator::Heartbeat(beat) => Some(beat.held.len()),
        _ => None,
    };
    while session.hear(held).await == 0 {}
    session.say(CancelSeat { attempt: attempt(1), reason: "test".into() }).await;
    while session.hear(held).await == 1 {}
    let pid: u32 = fs::read_to_string(a_box.path("pid")).unwrap().trim().parse().unwrap();
    let work = a_box.work(1, Role::Main);
    // Ten seconds of grace; heartbeats go on meanwhile.
    let begun = Instant::now();
    while is_alive(pid) || work.exists() {
        assert!(begun.elapsed() < Duration::from_secs(20));
        session.hear(held).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_agent_says_so_and_ends() {
    let bench = Bench::new();
    let mut hub = bench.hub();
    let mut a_box = bench.a_box(1, &hub);
    a_box.start(&[]);
    let session = hub.session().await;
    session.connection.close(quinn::VarInt::from_u32(close::REVOKED), b"by the operator");
    let (code, a_box) = tokio::task::spawn_blocking(move || (a_box.wait(), a_box)).await.unwrap();
    assert_eq!(code, Some(1));
    let log = a_box.log();
    assert!(log.contains("dismissed this worker: certificate revoked: by the operator"), "{log}");
    assert!(log.contains("hint: the operator has taken this box out of the cluster"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_agent_a_state_directory() {
    let bench = Bench::new();
    let mut hub = bench.hub();
    let mut a_box = bench.a_box(1, &hub);
    a_box.start(&[]);
    let _session = hub.session().await;
    let second = std::process::Command::new(env!("CARGO_BIN_EXE_bonepile-worker"))
        .args(["run", "--state-dir"])
        .arg(a_box.path("state"))
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(2));
    let text = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(text.contains("another agent uses"), "{text}");
    a_box.kill();
    // The lock goes with the process.
    a_box.start(&[]);
    hub.session().await;
    until(|| a_box.log().contains("connected to the coordinator"));
}
