//! The agent's decisions, one situation a test.

use protocol::control::{Output, SeatAddress, StartSeat, ToCoordinator};
use protocol::experiment::{CommandSpec, InspectSpec, LayerSelection, NoOpSpec, ShardSpec};
use protocol::ids::{ArtifactHash, AttemptId, Fence, RunId, ShardId};

use super::*;

const NOW: UnixMillis = UnixMillis(1_000_000);
const OTHER_KEY: [u8; 32] = [2; 32];

fn attempt(fence: u64) -> AttemptId {
    AttemptId { shard: ShardId { run: RunId(1), index: 0 }, fence: Fence(fence) }
}

fn seat(fence: u64, role: Role) -> SeatId {
    SeatId { attempt: attempt(fence), role }
}

fn cpu() -> DeviceId {
    DeviceId("cpu".into())
}

fn address(role: Role, worker: u64) -> SeatAddress {
    SeatAddress { role, worker: WorkerId(worker), spki_sha256: [worker as u8; 32], addresses: Vec::new() }
}

fn start(fence: u64, role: Role, seats: Vec<SeatAddress>) -> Input {
    start_in(0, fence, role, seats)
}

fn start_in(lane: u32, fence: u64, role: Role, seats: Vec<SeatAddress>) -> Input {
    let spec = InspectSpec { model: "m".into(), layers: LayerSelection::All, texts: 1, seed: 0 };
    start_of(lane, fence, role, seats, ShardSpec::Inspect(spec))
}

fn start_of(lane: u32, fence: u64, role: Role, seats: Vec<SeatAddress>, spec: ShardSpec) -> Input {
    Input::Coordinator(ToWorker::StartSeat(StartSeat {
        attempt: attempt(fence),
        role,
        device: cpu(),
        reserved_bytes: 1,
        lane,
        spec,
        seats,
        inputs: Vec::new(),
    }))
}

fn no_op(fence: u64) -> Input {
    start_of(0, fence, Role::Main, vec![], ShardSpec::NoOp(NoOpSpec { index: 0 }))
}

fn command(lane: u32, fence: u64) -> Input {
    let spec = CommandSpec {
        argv: vec!["true".into()],
        env: vec![],
        files: vec![],
        memory_bytes: 0,
        threads: 1,
        collect: vec![],
        timeout_ms: 0,
        retries: 0,
        class: "true".into(),
        work: 1,
    };
    start_of(lane, fence, Role::Main, vec![], ShardSpec::Command(Box::new(spec)))
}

fn command_ended(fence: u64, outputs: &[&str]) -> Input {
    let outputs = outputs.iter().map(|name| ((*name).to_owned(), (*name).to_owned())).collect();
    let ended = exec::Finished { attempt: attempt(fence), outputs, memory_peak_bytes: 7, models: vec![], waited_ms: 0 };
    Input::CommandEnded { seat: seat(fence, Role::Main), wall_ms: 5, ended: Ok(ended) }
}

fn command_failed(fence: u64, kind: FailureKind) -> Input {
    Input::CommandEnded { seat: seat(fence, Role::Main), wall_ms: 5, ended: Err(Failure::new(kind, "so")) }
}

fn records_kept(fences: &[u64]) -> Input {
    Input::RecordsKept { seats: fences.iter().map(|fence| seat(*fence, Role::Main)).collect() }
}

fn finished(fence: u64) -> FromExecutor {
    let attempt = attempt(fence);
    let outputs = vec![("result.json".into(), "p".into())];
    FromExecutor::Finished(exec::Finished { attempt, outputs, memory_peak_bytes: 7, models: Vec::new(), waited_ms: 0 })
}

fn published(fence: u64, role: Role) -> SeatFinished {
    SeatFinished {
        attempt: attempt(fence),
        role,
        outputs: vec![Output { name: "result.json".into(), hash: ArtifactHash([0; 32]), bytes: 1 }],
        usage: Usage::default(),
        models: Vec::new(),
        build: String::new(),
    }
}

fn record(fence: u64) -> SeatFinished {
    SeatFinished { outputs: vec![], ..published(fence, Role::Main) }
}

fn cancel(fence: u64) -> Input {
    Input::Coordinator(ToWorker::CancelSeat(CancelSeat { attempt: attempt(fence), reason: String::new() }))
}

fn settled(fence: u64, role: Role) -> Input {
    Input::Coordinator(ToWorker::SeatSettled(SeatSettled { attempt: attempt(fence), role, counted: true }))
}

fn lent(commands: bool) -> Lent {
    Lent { devices: [cpu()].into(), executors: [cpu()].into(), commands }
}

/// An agent of `w1` and the names of what it wants done.
struct Bench(Agent);

impl Bench {
    fn new() -> Self {
        Self(Agent::new(WorkerId(1), lent(true), HandedOn::default()))
    }

    fn connected() -> Self {
        let mut bench = Self::new();
        assert_eq!(bench.after(Input::Connected), [""; 0]);
        bench
    }

    fn after(&mut self, input: Input) -> Vec<String> {
        self.after_at(NOW, input)
    }

    fn after_at(&mut self, now: UnixMillis, input: Input) -> Vec<String> {
        self.0.handle(now, input);
        std::iter::from_fn(|| self.0.poll_effect()).map(|effect| brief(&effect)).collect()
    }

    fn running(&mut self, fence: u64, role: Role, seats: Vec<SeatAddress>) -> ExecutorId {
        let effects = self.after(start(fence, role, seats));
        let executor = ExecutorId(self.0.executors_last());
        if effects.first().is_some_and(|first| first.starts_with("launch")) {
            self.after(Input::ExecutorReady { executor, build: "b".into() });
        }
        executor
    }
}

impl Agent {
    fn executors_last(&self) -> u64 {
        self.executors.last_number()
    }
}

fn brief(effect: &Effect) -> String {
    match effect {
        Effect::Say { message: ToCoordinator::SeatFinished(said) } => format!("say finished {}", said.attempt.fence),
        Effect::Say { message: ToCoordinator::SeatFailed(said) } => {
            format!("say failed {} {}", said.attempt.fence, said.failure.kind)
        }
        Effect::Say { message } => format!("say {message:?}"),
        Effect::Launch { executor, .. } => format!("launch {executor}"),
        Effect::Gather { seat, inputs } => format!("gather {} for {seat}", inputs.len()),
        Effect::Run { executor, start, .. } => format!("run {} on {executor}", start.attempt.fence),
        Effect::Tell { executor, message: ToExecutor::StopSeat(_) } => format!("stop {executor}"),
        Effect::Tell { executor, message: ToExecutor::PacketArrived(packet) } => {
            format!("packet {} to {executor}", packet.key)
        }
        Effect::Tell { executor, message: ToExecutor::PacketSent(packet) } => {
            format!("sent {} of {executor}", packet.key)
        }
        Effect::Tell { message, .. } => format!("tell {message:?}"),
        Effect::Kill { executor } => format!("kill {executor}"),
        Effect::RunCommand { start, behind: None } => format!("command {}", start.attempt.fence),
        Effect::RunCommand { start, behind: Some(before) } => {
            format!("command {} behind {}", start.attempt.fence, before.attempt.fence)
        }
        Effect::StopCommand { seat } => format!("stop {seat}"),
        Effect::KeepRecord { finished } => format!("record {}", finished.attempt.fence),
        Effect::ForgetRecord { seat } => format!("forget {seat}"),
        Effect::Keep { seat, usage, .. } => format!("keep {seat} {} ms", usage.wall_ms),
        Effect::Publish { seat } => format!("publish {seat}"),
        Effect::SendPacket { to, key, .. } => format!("send {key} to {}", to.worker),
        Effect::HandOver { to, key, .. } => format!("hand {key} to {to}"),
        Effect::StopTransfers { seat } => format!("stop transfers {seat}"),
        Effect::Discard { seat } => format!("discard {seat}"),
    }
}

#[test]
fn a_seat_goes_from_start_to_settled_and_its_executor_stays_warm() {
    let mut bench = Bench::connected();
    assert_eq!(bench.after(start(1, Role::Main, vec![])), ["launch x1"]);
    let executor = ExecutorId(1);
    assert_eq!(bench.after(Input::ExecutorReady { executor, build: "b".into() }), ["run f1 on x1"]);
    let later = NOW.plus_ms(250);
    let effects = bench.after_at(later, Input::Executor { executor, message: finished(1) });
    assert_eq!(effects, ["keep r1.0#f1 main 250 ms"]);
    assert_eq!(bench.after(Input::Kept { seat: seat(1, Role::Main) }), ["publish r1.0#f1 main"]);
    let published = Input::Published { seat: seat(1, Role::Main), finished: published(1, Role::Main) };
    assert_eq!(bench.after(published), ["say finished f1"]);
    assert_eq!(bench.0.held().len(), 1);
    assert_eq!(bench.after(settled(1, Role::Main)), ["stop transfers r1.0#f1 main", "discard r1.0#f1 main"]);
    assert!(bench.0.held().is_empty());
    assert_eq!(bench.after(start(2, Role::Main, vec![])), ["run f2 on x1"]);
}

#[test]
fn outcomes_are_repeated_over_reconnects_and_after_a_while_until_settled() {
    let mut bench = Bench::new();
    bench.running(1, Role::Main, vec![]);
    let executor = ExecutorId(1);
    bench.after(Input::Executor { executor, message: finished(1) });
    bench.after(Input::Kept { seat: seat(1, Role::Main) });
    let published = Input::Published { seat: seat(1, Role::Main), finished: published(1, Role::Main) };
    assert_eq!(bench.after(published), [""; 0], "nobody to say it to");
    assert_eq!(bench.0.next_deadline(), None);
    assert_eq!(bench.after(Input::Connected), ["say finished f1"]);
    bench.after(Input::Disconnected);
    assert_eq!(bench.after(Input::Connected), ["say finished f1"]);
    assert_eq!(bench.0.next_deadline(), Some(NOW.plus_ms(REPEAT_OUTCOME_MS)));
    assert_eq!(bench.after_at(NOW.plus_ms(REPEAT_OUTCOME_MS), Input::Deadline), ["say finished f1"]);
}

#[test]
fn what_an_earlier_process_finished_is_published_and_handed_in() {
    let outbox = HandedOn { seats: vec![seat(4, Role::Main)], records: vec![record(5)] };
    let mut bench = Bench(Agent::new(WorkerId(1), lent(false), outbox));
    assert_eq!(bench.0.held()[0].attempt, attempt(4));
    assert_eq!(bench.after(Input::Connected), ["publish r1.0#f4 main", "say finished f5"]);
    let published = Input::Published { seat: seat(4, Role::Main), finished: published(4, Role::Main) };
    assert_eq!(bench.after(published), ["say finished f4"]);
    let forgotten = ["forget r1.0#f5 main", "stop transfers r1.0#f5 main", "discard r1.0#f5 main"];
    assert_eq!(bench.after(settled(5, Role::Main)), forgotten);
}

#[test]
fn a_lost_executor_fails_its_seat_and_the_next_seat_gets_a_new_one() {
    let mut bench = Bench::connected();
    let executor = bench.running(1, Role::Main, vec![]);
    let effects = bench.after(Input::ExecutorExited { executor, detail: "killed by signal 9".into() });
    assert_eq!(effects, ["stop transfers r1.0#f1 main", "discard r1.0#f1 main", "say failed f1 executor lost"]);
    assert_eq!(bench.after(start(2, Role::Main, vec![])), ["launch x2"]);
    // One that does not even start is told the same way.
    let effects = bench.after(Input::ExecutorExited { executor: ExecutorId(2), detail: "no such file".into() });
    assert_eq!(effects.last().unwrap(), "say failed f2 executor lost");
}

#[test]
fn a_cancelled_seat_stops_and_its_files_go_when_the_executor_lets_go() {
    let mut bench = Bench::connected();
    let executor = bench.running(1, Role::Main, vec![]);
    assert_eq!(bench.after(cancel(1)), ["stop transfers r1.0#f1 main", "stop x1"]);
    assert!(bench.0.held().is_empty(), "its lease is not renewed");
    assert_eq!(bench.after(start_in(1, 2, Role::Main, vec![])), ["launch x2"], "x1 is not free yet");
    assert_eq!(bench.after(start(3, Role::Main, vec![])), [""; 0], "nor is its lane");
    let effects = bench.after(Input::Executor { executor, message: finished(1) });
    assert_eq!(effects, ["discard r1.0#f1 main", "run f3 on x1"]);
}

#[test]
fn an_executor_that_does_not_stop_is_killed_once_after_a_bound() {
    let mut bench = Bench::connected();
    let executor = bench.running(1, Role::Main, vec![]);
    bench.after(cancel(1));
    let deadline = NOW.plus_ms(STOP_GRACE_MS);
    assert_eq!(bench.0.next_deadline(), Some(deadline));
    assert_eq!(bench.after_at(deadline, Input::Deadline), ["kill x1"]);
    assert_eq!(bench.0.next_deadline(), None);
    let exited = Input::ExecutorExited { executor, detail: "killed".into() };
    assert_eq!(bench.after(exited), ["discard r1.0#f1 main"]);
}

#[test]
fn cancelling_before_the_executor_is_up_keeps_it_for_the_next() {
    let mut bench = Bench::connected();
    assert_eq!(bench.after(start(1, Role::Main, vec![])), ["launch x1"]);
    assert_eq!(bench.after(cancel(1)), ["stop transfers r1.0#f1 main", "discard r1.0#f1 main"]);
    assert_eq!(bench.after(start(2, Role::Main, vec![])), [""; 0]);
    assert_eq!(bench.after(Input::ExecutorReady { executor: ExecutorId(1), build: "b".into() }), ["run f2 on x1"]);
}

#[test]
fn a_source_is_done_when_its_packets_have_arrived() {
    let mut bench = Bench::connected();
    let seats = vec![address(Role::Source, 1), address(Role::Target, 2)];
    let executor = bench.running(1, Role::Source, seats);
    let packet = PacketFile { attempt: attempt(1), key: "fact-0".into(), path: "p".into() };
    let effects = bench.after(Input::Executor { executor, message: FromExecutor::PacketReady(packet) });
    assert_eq!(effects, ["send fact-0 to w2"]);
    assert_eq!(bench.after(Input::Executor { executor, message: finished(1) }), [""; 0]);
    assert!(bench.0.held()[0].progress.note.contains("1 packets on their way"));
    let sent = Input::PacketSent { seat: seat(1, Role::Source), key: "fact-0".into(), bytes: 10, bytes_per_second: 0 };
    assert_eq!(bench.after(sent), ["keep r1.0#f1 source 0 ms"]);
}

#[test]
fn a_packet_that_cannot_be_sent_fails_its_source() {
    let mut bench = Bench::connected();
    let executor = bench.running(1, Role::Source, vec![address(Role::Source, 1), address(Role::Target, 2)]);
    let packet = PacketFile { attempt: attempt(1), key: "fact-0".into(), path: "p".into() };
    bench.after(Input::Executor { executor, message: FromExecutor::PacketReady(packet) });
    let failure = Failure::new(FailureKind::PeerLost, "w2 does not answer");
    let effects = bench.after(Input::PacketNotSent { seat: seat(1, Role::Source), key: "fact-0".into(), failure });
    assert_eq!(effects, ["stop transfers r1.0#f1 source", "stop x1", "say failed f1 peer lost"]);
}

#[test]
fn two_seats_of_an_attempt_on_one_worker_have_an_executor_each_and_hand_packets_over() {
    let mut bench = Bench::connected();
    let seats = vec![address(Role::Source, 1), address(Role::Target, 1)];
    let source = bench.running(1, Role::Source, seats.clone());
    let target = bench.running(1, Role::Target, seats);
    assert_ne!(source, target);
    let packet = PacketFile { attempt: attempt(1), key: "fact-0".into(), path: "p".into() };
    let effects = bench.after(Input::Executor { executor: source, message: FromExecutor::PacketReady(packet) });
    assert_eq!(effects, ["hand fact-0 to r1.0#f1 target"]);
    let arrived =
        Input::PacketArrived { seat: seat(1, Role::Target), key: "fact-0".into(), path: "q".into(), bytes: 10 };
    assert_eq!(bench.after(arrived), ["packet fact-0 to x2"]);
    // Both done: one warm executor is enough for the device.
    let sent = Input::PacketSent { seat: seat(1, Role::Source), key: "fact-0".into(), bytes: 10, bytes_per_second: 0 };
    bench.after(sent);
    bench.after(Input::Executor { executor: source, message: finished(1) });
    let effects = bench.after(Input::Executor { executor: target, message: finished(1) });
    assert_eq!(effects, ["kill x1", "keep r1.0#f1 target 0 ms"]);
}

#[test]
fn packets_that_come_before_the_executor_wait_for_it() {
    let mut bench = Bench::connected();
    bench.after(start(1, Role::Target, vec![address(Role::Source, 2), address(Role::Target, 1)]));
    let arrived =
        Input::PacketArrived { seat: seat(1, Role::Target), key: "fact-0".into(), path: "q".into(), bytes: 10 };
    assert_eq!(bench.after(arrived), [""; 0]);
    let effects = bench.after(Input::ExecutorReady { executor: ExecutorId(1), build: "b".into() });
    assert_eq!(effects, ["run f1 on x1", "packet fact-0 to x1"]);
}

#[test]
fn offers_are_taken_from_the_other_seat_only() {
    let mut bench = Bench::connected();
    let target = seat(1, Role::Target);
    assert_eq!(bench.0.offer(target, &OTHER_KEY), OfferVerdict::NotYet);
    bench.running(1, Role::Target, vec![address(Role::Source, 2), address(Role::Target, 1)]);
    assert_eq!(bench.0.offer(target, &OTHER_KEY), OfferVerdict::Take);
    assert_eq!(bench.0.offer(target, &[3; 32]), OfferVerdict::NotTheSeat);
    assert_eq!(bench.0.offer(target, &[1; 32]), OfferVerdict::NotTheSeat, "not even its own");
    bench.after(cancel(1));
    assert_eq!(bench.0.offer(target, &OTHER_KEY), OfferVerdict::Over);
}

#[test]
fn a_seat_that_cannot_start_fails_and_leaves_its_executor_free() {
    let mut bench = Bench::connected();
    bench.running(1, Role::Main, vec![]);
    let failure = Failure::new(FailureKind::ModelMissing, "no file");
    let effects = bench.after(Input::CouldNotStart { seat: seat(1, Role::Main), failure });
    assert_eq!(effects, ["stop transfers r1.0#f1 main", "discard r1.0#f1 main", "say failed f1 model missing"]);
    assert_eq!(bench.after(start(2, Role::Main, vec![])), ["run f2 on x1"]);
}

#[test]
fn a_start_said_twice_starts_once_and_an_unknown_device_is_refused() {
    let mut bench = Bench::connected();
    assert_eq!(bench.after(start(1, Role::Main, vec![])), ["launch x1"]);
    assert_eq!(bench.after(start(1, Role::Main, vec![])), [""; 0]);
    let Input::Coordinator(ToWorker::StartSeat(mut elsewhere)) = start(2, Role::Main, vec![]) else { unreachable!() };
    elsewhere.device = DeviceId("GPU-1".into());
    let effects = bench.after(Input::Coordinator(ToWorker::StartSeat(elsewhere)));
    assert_eq!(effects, ["say failed f2 unsupported"]);
}

#[test]
fn settling_while_outputs_are_being_kept_discards_them_afterwards() {
    let mut bench = Bench::connected();
    let executor = bench.running(1, Role::Main, vec![]);
    bench.after(Input::Executor { executor, message: finished(1) });
    assert_eq!(bench.after(settled(1, Role::Main)), ["stop transfers r1.0#f1 main"]);
    assert_eq!(bench.after(Input::Kept { seat: seat(1, Role::Main) }), ["discard r1.0#f1 main"]);
}

#[test]
fn a_full_store_is_a_note_and_nothing_else() {
    let mut bench = Bench::connected();
    let executor = bench.running(1, Role::Main, vec![]);
    bench.after(Input::Executor { executor, message: finished(1) });
    bench.after(Input::Kept { seat: seat(1, Role::Main) });
    let note = "waiting for the store: it is full".to_owned();
    assert_eq!(bench.after(Input::PublishDelayed { seat: seat(1, Role::Main), note: note.clone() }), [""; 0]);
    assert_eq!(bench.0.held()[0].progress.note, note);
}

#[test]
fn seats_of_a_lane_run_one_after_another_and_lanes_side_by_side() {
    let mut bench = Bench::connected();
    assert_eq!(bench.after(command(0, 1)), ["command f1"]);
    assert_eq!(bench.after(command(0, 2)), ["command f2 behind f1"], "its runner need not ask");
    assert_eq!(bench.after(command(0, 5)), [""; 0]);
    assert_eq!(bench.after(command(0, 3)), [""; 0]);
    assert_eq!(bench.after(command(1, 4)), ["command f4"]);
    let notes: Vec<_> = bench.0.held().into_iter().map(|held| held.progress.note).collect();
    let waits = |fence: u64| format!("waits for r1.0#f{fence} on its device");
    assert_eq!(notes, ["runs".to_owned(), waits(1), waits(2), "runs".to_owned(), waits(3)]);
    let effects = bench.after(command_ended(1, &[]));
    assert_eq!(effects, ["record f1", "command f3 behind f2"], "in the order of their fences");
    let effects = bench.after(command_failed(2, FailureKind::CommandFailed));
    assert_eq!(effects, ["say failed f2 command failed", "command f5 behind f3"], "a failure holds nobody up");
}

#[test]
fn a_cancelled_seat_that_waits_is_only_removed() {
    let mut bench = Bench::connected();
    bench.after(command(0, 1));
    bench.after(command(0, 2));
    bench.after(command(0, 3));
    bench.after(command(0, 4));
    assert_eq!(bench.after(cancel(3)), [""; 0]);
    assert_eq!(bench.0.held().len(), 3);
    assert_eq!(bench.after(cancel(2)), ["stop r1.0#f2 main"], "it was on deck");
    assert_eq!(bench.after(command_failed(2, FailureKind::Cancelled)), ["command f4 behind f1"]);
    assert_eq!(bench.after(cancel(1)), ["stop r1.0#f1 main"]);
    assert_eq!(bench.0.held().len(), 1, "its lease is not renewed");
    let waiting = bench.0.held()[0].progress.note.clone();
    assert_eq!(waiting, "waits for r1.0#f1 on its device", "not before the device is free");
    assert_eq!(bench.after(command_failed(1, FailureKind::Cancelled)), [""; 0]);
    assert_eq!(bench.0.held()[0].progress.note, "runs");
}

#[test]
fn a_seat_that_waits_for_an_executor_starts_when_it_is_let_go() {
    let mut bench = Bench::connected();
    let executor = bench.running(1, Role::Main, vec![]);
    assert_eq!(bench.after(start(2, Role::Main, vec![])), [""; 0]);
    let effects = bench.after(Input::Executor { executor, message: finished(1) });
    assert_eq!(effects, ["keep r1.0#f1 main 0 ms", "run f2 on x1"]);
    bench.after(start(3, Role::Main, vec![]));
    let effects = bench.after(Input::ExecutorExited { executor, detail: "killed".into() });
    assert_eq!(effects.last().unwrap(), "launch x2");
}

#[test]
fn seats_of_one_attempt_share_a_lane() {
    let mut bench = Bench::connected();
    let seats = vec![address(Role::Source, 1), address(Role::Target, 1)];
    assert_eq!(bench.after(start(1, Role::Source, seats.clone())), ["launch x1"]);
    assert_eq!(bench.after(start(2, Role::Main, vec![])), [""; 0]);
    assert_eq!(bench.after(start(1, Role::Target, seats)), ["launch x2"]);
}

#[test]
fn no_ops_are_done_at_once_kept_together_and_forgotten_when_settled() {
    let mut bench = Bench::connected();
    assert_eq!(bench.after(no_op(1)), ["record f1"]);
    assert_eq!(bench.after(no_op(2)), ["record f2"], "the device was free again");
    assert_eq!(bench.after(records_kept(&[1, 2])), ["say finished f1", "say finished f2"]);
    assert_eq!(bench.after(settled(1, Role::Main)), ["forget r1.0#f1 main"]);
    assert_eq!(bench.0.next_deadline(), Some(NOW.plus_ms(REPEAT_OUTCOME_MS)), "the other is not settled");
    assert_eq!(bench.after(settled(2, Role::Main)), ["forget r1.0#f2 main"]);
    assert_eq!((bench.0.next_deadline(), bench.0.held()), (None, vec![]));
    bench.after(no_op(3));
    assert_eq!(bench.after(cancel(3)), [""; 0]);
    assert_eq!(bench.after(records_kept(&[3])), ["forget r1.0#f3 main"], "settled while it was being kept");
}

#[test]
fn a_lane_of_no_ops_behind_a_command_goes_through_in_one_step() {
    let mut bench = Bench::connected();
    bench.after(command(0, 1));
    (2..100).for_each(|fence| assert_eq!(bench.after(no_op(fence)), [""; 0]));
    assert_eq!(bench.after(command_ended(1, &[])).len(), 99);
}

#[test]
fn commands_with_files_go_through_the_outbox_and_others_are_records() {
    let mut bench = Bench::connected();
    bench.after(command(0, 1));
    assert_eq!(bench.after(command_ended(1, &["output.log"])), ["keep r1.0#f1 main 5 ms"]);
    assert_eq!(bench.after(Input::Kept { seat: seat(1, Role::Main) }), ["publish r1.0#f1 main"]);
    let published = Input::Published { seat: seat(1, Role::Main), finished: published(1, Role::Main) };
    assert_eq!(bench.after(published), ["say finished f1"]);
    assert_eq!(bench.after(settled(1, Role::Main)), ["stop transfers r1.0#f1 main", "discard r1.0#f1 main"]);
    bench.after(command(0, 2));
    assert_eq!(bench.after(cancel(2)), ["stop r1.0#f2 main"]);
    // It was over before it could be stopped.
    assert_eq!(bench.after(command_ended(2, &["output.log"])), ["discard r1.0#f2 main"]);
}

#[test]
fn programs_run_only_where_the_operator_lets_them_and_need_no_executor() {
    let bare = |commands| Lent { devices: [cpu()].into(), executors: BTreeSet::new(), commands };
    let mut bench = Bench(Agent::new(WorkerId(1), bare(false), HandedOn::default()));
    bench.after(Input::Connected);
    assert_eq!(bench.after(command(0, 1)), ["say failed f1 forbidden"]);
    assert_eq!(bench.after(no_op(2)), ["record f2"]);
    assert_eq!(bench.after(start(3, Role::Main, vec![])), ["say failed f3 unsupported"]);
    let mut bench = Bench(Agent::new(WorkerId(1), bare(true), HandedOn::default()));
    assert_eq!(bench.after(command(0, 1)), ["command f1"]);
}

#[test]
fn thousands_of_held_seats_fit_a_heartbeat() {
    let mut bench = Bench::connected();
    bench.after(command(0, 1));
    (2..20_000).for_each(|fence| drop(bench.after(command(0, fence))));
    let held = bench.0.held();
    assert_eq!(held.len(), 19_999);
    let heartbeat = protocol::control::Heartbeat { sequence: 1, telemetry: vec![], held };
    protocol::frame::Messages::to_frame(&ToCoordinator::from(heartbeat)).unwrap();
}

fn packet(key: &str) -> FromExecutor {
    FromExecutor::PacketReady(PacketFile { attempt: attempt(1), key: key.into(), path: "p".into() })
}

#[test]
fn packets_run_no_further_ahead_than_the_oldest_allows() {
    let mut bench = Bench::connected();
    let executor = bench.running(1, Role::Source, vec![address(Role::Source, 1), address(Role::Target, 2)]);
    let mut made =
        (0..6).flat_map(|i| bench.after(Input::Executor { executor, message: packet(&format!("p{i}")) })).count();
    assert_eq!(made, 4, "the first four are under way");
    let sent =
        |key: &str| Input::PacketSent { seat: seat(1, Role::Source), key: key.into(), bytes: 1, bytes_per_second: 0 };
    assert_eq!(bench.after(sent("p1")), ["sent p1 of x1"], "p0 has not arrived, so p4 waits");
    made += 2;
    assert_eq!(bench.after(sent("p0")), ["sent p0 of x1", "send p4 to w2", "send p5 to w2"]);
    bench.after(Input::Executor { executor, message: finished(1) });
    let last: Vec<_> = ["p2", "p3", "p4", "p5"].into_iter().flat_map(|key| bench.after(sent(key))).collect();
    assert_eq!(last, ["keep r1.0#f1 source 0 ms"]);
    assert_eq!(made, 6);
}

#[test]
fn a_seat_takes_no_more_packets_than_it_reads() {
    let mut bench = Bench::connected();
    let executor = bench.running(1, Role::Target, vec![address(Role::Source, 2), address(Role::Target, 1)]);
    let target = seat(1, Role::Target);
    for i in 0..12 {
        assert_eq!(bench.0.offer(target, &OTHER_KEY), OfferVerdict::Take);
        bench.after(Input::PacketArrived { seat: target, key: format!("p{i}"), path: "q".into(), bytes: 1 });
    }
    assert_eq!(bench.0.offer(target, &OTHER_KEY), OfferVerdict::Full);
    let used = exec::PacketKey { attempt: attempt(1), key: "p0".into() };
    bench.after(Input::Executor { executor, message: FromExecutor::PacketUsed(used) });
    assert_eq!(bench.0.offer(target, &OTHER_KEY), OfferVerdict::Take);
}

#[test]
fn what_a_seat_needs_is_brought_before_it_takes_an_executor() {
    let mut bench = Bench::connected();
    let needing = |fence| {
        let Input::Coordinator(ToWorker::StartSeat(mut start)) = start(fence, Role::Main, vec![]) else {
            unreachable!("a start")
        };
        let hash = protocol::ids::ArtifactHash([1; 32]);
        start.inputs.push(protocol::control::Output { name: "projector.safetensors".into(), hash, bytes: 3 });
        Input::Coordinator(ToWorker::StartSeat(start))
    };
    assert_eq!(bench.after(needing(1)), ["gather 1 for r1.0#f1 main"]);
    let inputs = vec![("projector.safetensors".to_owned(), "in/projector.safetensors".to_owned())];
    let gathered = Input::Gathered { seat: seat(1, Role::Main), inputs };
    assert_eq!(bench.after(gathered), ["launch x1"]);
    bench.after(cancel(1));
    assert_eq!(bench.after(Input::ExecutorReady { executor: ExecutorId(1), build: "b".into() }), [""; 0]);
    assert_eq!(bench.after(needing(2)), ["gather 1 for r1.0#f2 main"]);
    let failure = Failure::new(FailureKind::InputMissing, "not there");
    let effects = bench.after(Input::CouldNotStart { seat: seat(2, Role::Main), failure });
    assert_eq!(effects.last().unwrap(), "say failed f2 input missing");
    // The lane is free again.
    assert_eq!(bench.after(start(3, Role::Main, vec![])), ["run f3 on x1"]);
}

fn pair(fence: u64, role: Role) -> Input {
    let spec = protocol::experiment::projector::EvalSpec {
        source: "small".into(),
        target: "large".into(),
        projector: protocol::experiment::projector::ProjectorRef::Trained(0),
        shuffled: None,
        tier: protocol::experiment::projector::Tier::Seen,
        first_fact: 0,
        facts: 2,
        conditions: vec![],
        answer_tokens: 1,
        spread: protocol::experiment::Spread::Any,
        seed: 0,
    };
    let seats = vec![address(Role::Source, 1), address(Role::Target, 1)];
    start_of(0, fence, role, seats, ShardSpec::ProjectorEval(Box::new(spec)))
}

#[test]
fn seats_of_a_pair_find_their_models_warm_and_let_go_of_them_for_others() {
    let mut bench = Bench::connected();
    let ready = |executor| Input::ExecutorReady { executor: ExecutorId(executor), build: "b".into() };
    let ended = |executor, fence| Input::Executor { executor: ExecutorId(executor), message: finished(fence) };
    assert_eq!(bench.after(pair(1, Role::Source)), ["launch x1"]);
    assert_eq!(bench.after(pair(1, Role::Target)), ["launch x2"]);
    bench.after(ready(1));
    bench.after(ready(2));
    assert_eq!(bench.after(ended(1, 1)), ["keep r1.0#f1 source 0 ms"]);
    assert_eq!(bench.after(ended(2, 1)), ["keep r1.0#f1 target 0 ms"], "both stay warm");
    assert_eq!(bench.after(pair(2, Role::Target)), ["run f2 on x2"], "though x1 was free as well");
    assert_eq!(bench.after(pair(2, Role::Source)), ["run f2 on x1"]);
    bench.after(ended(1, 2));
    bench.after(ended(2, 2));
    assert_eq!(
        bench.after(start(3, Role::Main, vec![])),
        ["kill x2", "run f3 on x1"],
        "a third model has no use for them"
    );
}
