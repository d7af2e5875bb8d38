//! Real programs, started and ended by a runner of their own.

use std::time::Duration;

use protocol::ids::{AttemptId, Fence, Role, RunId, ShardId};

use super::*;

const CPU: &str = "cpu";

struct Bench {
    directory: tempfile::TempDir,
    runner: Runner,
    heard: mpsc::Receiver<Input>,
    wrote: mpsc::Receiver<SeatWrote>,
}

impl Bench {
    fn new() -> Self {
        Self::with_output_max(OUTPUT_BYTES_MAX)
    }

    fn with_output_max(output_bytes_max: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (inputs, heard) = mpsc::channel(64);
        let (pieces, wrote) = mpsc::channel(64);
        let runner = Runner::start(RunnerParts {
            work: directory.path().to_owned(),
            devices: [(DeviceId(CPU.into()), DeviceKind::Cpu), (DeviceId("GPU-1".into()), DeviceKind::Cuda)].into(),
            inputs,
            wrote: pieces,
            pids: Pids::default(),
            warden: None,
            output_bytes_max,
        });
        Self { directory, runner: runner.unwrap(), heard, wrote }
    }

    async fn ended(&mut self) -> Result<Finished, Failure> {
        let Some(Input::CommandEnded { ended, .. }) = self.heard.recv().await else { panic!("an end") };
        ended
    }

    async fn run(&mut self, spec: CommandSpec) -> Result<Finished, Failure> {
        self.runner.run(start(CPU, spec), None);
        self.ended().await
    }

    async fn shell(&mut self, text: &str) -> Result<Finished, Failure> {
        self.run(shell(text)).await
    }

    /// Nothing of the seat is left.
    fn is_empty(&self) -> bool {
        std::fs::read_dir(self.directory.path())
            .unwrap()
            .all(|place| std::fs::read_dir(place.unwrap().path()).unwrap().next().is_none())
    }
}

fn seat() -> SeatId {
    let attempt = AttemptId { shard: ShardId { run: RunId(1), index: 2 }, fence: Fence(3) };
    SeatId { attempt, role: Role::Main }
}

fn start(device: &str, spec: CommandSpec) -> Box<StartSeat> {
    Box::new(StartSeat {
        attempt: seat().attempt,
        role: Role::Main,
        device: DeviceId(device.into()),
        reserved_bytes: 5_000_000,
        lane: 0,
        spec: ShardSpec::Command(Box::new(spec)),
        seats: Vec::new(),
        inputs: Vec::new(),
    })
}

fn shell(text: &str) -> CommandSpec {
    CommandSpec {
        argv: vec!["sh".into(), "-c".into(), text.into()],
        env: Vec::new(),
        files: Vec::new(),
        memory_bytes: 0,
        threads: 3,
        collect: Vec::new(),
        timeout_ms: 0,
        retries: 0,
        class: "sh".into(),
        work: 1,
    }
}

fn text_of(finished: &Finished, name: &str) -> String {
    let (_, path) = finished.outputs.iter().find(|(output, _)| output == name).expect(name);
    std::fs::read_to_string(path).unwrap()
}

fn is_alive(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
}

#[tokio::test]
async fn a_silent_program_leaves_nothing_and_its_memory_is_known() {
    let mut bench = Bench::new();
    let finished = bench.shell("exit 0").await.unwrap();
    assert!(finished.outputs.is_empty() && finished.memory_peak_bytes > 0 && bench.is_empty());
}

#[tokio::test]
async fn output_and_collected_files_become_outputs() {
    let mut bench = Bench::new();
    let mut spec = shell("cat in/put.txt; echo error >&2; mkdir out; echo 1 >out/a.json; echo 2 >out/b.txt; ./go");
    spec.files = vec![
        (
            "in/put.txt".into(),
            "text
"
            .into(),
        ),
        (
            "go".into(),
            "#!/bin/sh
echo gone
"
            .into(),
        ),
    ];
    spec.collect = vec!["out/*.json".into()];
    let finished = bench.run(spec).await.unwrap();
    let names: Vec<_> = finished.outputs.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, [OUTPUT_NAME, "out/a.json"]);
    assert_eq!(
        text_of(&finished, OUTPUT_NAME),
        "text
error
gone
"
    );
}

#[tokio::test]
async fn a_program_knows_its_place_and_nothing_of_the_agents() {
    let mut bench = Bench::new();
    let mut spec = shell("env | sort");
    spec.env = vec![("BONEPILE_PARAM_LR".into(), "0.1".into())];
    let finished = bench.run(spec.clone()).await.unwrap();
    let text = text_of(&finished, OUTPUT_NAME);
    for line in [
        "BONEPILE_ATTEMPT=r1.2#f3",
        "BONEPILE_DEVICE=cpu",
        "BONEPILE_MEMORY_BYTES=5000000",
        "BONEPILE_PARAM_LR=0.1",
        "BONEPILE_RUN=r1",
        "BONEPILE_SHARD=r1.2",
        "CUDA_VISIBLE_DEVICES=",
        "OMP_NUM_THREADS=3",
    ] {
        assert!(text.lines().any(|have| have == line), "no {line} in {text}");
    }
    assert!(!text.contains("CARGO"), "{text}");
    std::fs::remove_dir_all(bench.directory.path().join(seat().directory_name())).unwrap();
    bench.runner.run(start("GPU-1", spec), None);
    let text = text_of(&bench.ended().await.unwrap(), OUTPUT_NAME);
    assert!(
        text.contains(
            "CUDA_VISIBLE_DEVICES=GPU-1
"
        ) && !text.contains("OMP_NUM_THREADS"),
        "{text}"
    );
}

#[tokio::test]
async fn failures_are_told_apart() {
    let mut bench = Bench::new();
    for (text, kind, message) in [
        (
            "echo so; exit 3",
            FailureKind::CommandFailed,
            "the program ended with exit code 3; its last words:
so",
        ),
        ("kill -SEGV $$", FailureKind::CommandFailed, "the program was killed by SIGSEGV"),
        (
            "echo MemoryError; exit 1",
            FailureKind::OutOfMemory,
            "exit code 1; its last words:
MemoryError",
        ),
    ] {
        let failure = bench.shell(text).await.unwrap_err();
        assert_eq!(failure.kind, kind, "{failure}");
        assert!(failure.message.contains(message), "{failure}");
        assert!(bench.is_empty(), "{text}");
    }
    let mut nothing = shell("");
    nothing.argv = vec!["no-such-program".into()];
    let failure = bench.run(nothing).await.unwrap_err();
    assert_eq!(failure.message, "could not start `no-such-program` on this worker: not on the `PATH`");
    let mut outside = shell("true");
    outside.files = vec![("../outside".into(), String::new())];
    assert_eq!(bench.run(outside).await.unwrap_err().kind, FailureKind::BadSpec);
    assert!(bench.is_empty());
}

#[tokio::test]
async fn a_program_out_of_time_ends_with_all_that_it_started() {
    let mut bench = Bench::new();
    let pids = bench.directory.path().with_extension("pids");
    let mut spec = shell(&format!("sleep 1000 & echo $! >{}; sleep 1000", pids.display()));
    spec.timeout_ms = 300;
    let failure = bench.run(spec).await.unwrap_err();
    assert_eq!(failure.kind, FailureKind::TimedOut, "{failure}");
    let pid = std::fs::read_to_string(&pids).unwrap();
    std::fs::remove_file(&pids).unwrap();
    while is_alive(pid.trim()) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(bench.is_empty());
}

#[tokio::test]
async fn a_program_that_ends_takes_its_children_along() {
    let mut bench = Bench::new();
    let finished = bench.shell("sleep 1000 & echo $!").await.unwrap();
    let pid = text_of(&finished, OUTPUT_NAME);
    while is_alive(pid.trim()) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_stopped_program_is_over_and_what_it_wrote_was_told() {
    let mut bench = Bench::new();
    bench.runner.run(start(CPU, shell("echo begun; sleep 1000")), None);
    let piece = bench.wrote.recv().await.unwrap();
    assert_eq!(
        (piece.offset, piece.bytes.as_slice()),
        (
            0,
            &b"begun
"[..]
        )
    );
    bench.runner.stop(seat());
    assert_eq!(bench.ended().await.unwrap_err().kind, FailureKind::Cancelled);
    assert!(bench.is_empty());
}

#[tokio::test]
async fn a_program_behind_another_starts_when_that_has_ended() {
    let mut bench = Bench::new();
    let order = bench.directory.path().with_extension("order");
    let mut next = start(CPU, shell(&format!("echo 2 >>{}", order.display())));
    next.attempt.fence = Fence(4);
    bench.runner.run(start(CPU, shell(&format!("sleep 0.2; echo 1 >>{}; exit 1", order.display()))), None);
    bench.runner.run(next, Some(seat()));
    assert_eq!(bench.ended().await.unwrap_err().kind, FailureKind::CommandFailed);
    bench.ended().await.unwrap();
    assert_eq!(std::fs::read_to_string(&order).unwrap(), "1\n2\n");
    std::fs::remove_file(order).unwrap();
}

#[tokio::test]
async fn whoever_is_stopped_in_line_does_not_let_the_next_one_go_early() {
    let mut bench = Bench::new();
    let order = bench.directory.path().with_extension("line");
    let in_line = |fence, text: &str| {
        let mut order = start(CPU, shell(text));
        order.attempt.fence = Fence(fence);
        order
    };
    bench.runner.run(in_line(3, &format!("sleep 0.3; echo 1 >>{}", order.display())), None);
    bench.runner.run(in_line(4, "exit 1"), Some(seat()));
    let mut second = seat();
    second.attempt.fence = Fence(4);
    bench.runner.stop(second);
    assert_eq!(bench.ended().await.unwrap_err().kind, FailureKind::Cancelled);
    bench.runner.run(in_line(5, &format!("echo 2 >>{}", order.display())), Some(seat()));
    bench.ended().await.unwrap();
    bench.ended().await.unwrap();
    assert_eq!(std::fs::read_to_string(&order).unwrap(), "1\n2\n");
    std::fs::remove_file(order).unwrap();
}

#[tokio::test]
async fn a_flood_is_cut() {
    let mut bench = Bench::with_output_max(1000);
    let finished = bench.shell("yes | head -c 1000000").await.unwrap();
    let text = text_of(&finished, OUTPUT_NAME);
    assert!(text.len() < 1100 && text.contains("[bonepile: cut here after 1000 bytes; 999000 more"), "{text}");
}
