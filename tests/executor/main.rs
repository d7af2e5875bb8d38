//! The executor as a process: orders in, packets and results out, failures by type. On a tiny random model.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests panic")]

#[path = "../model/tiny.rs"]
#[allow(dead_code, reason = "shared with the tests of the model layer")]
mod tiny;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use protocol::control::FailureKind;
use protocol::exec::{Finished, FromExecutor, ModelFile, PacketFile, RunSeat, StopSeat, ToExecutor};
use protocol::experiment::{Condition, InspectSpec, LayerSelection, ShardSpec, Spread, TransferSpec};
use protocol::frame::Messages;
use protocol::ids::{AttemptId, Fence, Role, RunId, ShardId};
use protocol::results::ShardResult;
use worker::executor::wire::receive;

/// An executor under test; killed if a test ends early.
struct Executor {
    child: Child,
    stdout: ChildStdout,
}

impl Executor {
    fn start() -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_bonepile-executor"))
            .args(["--threads", "1"])
            .env("RUST_LOG", "warn")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = child.stdout.take().unwrap();
        let mut executor = Self { child, stdout };
        let FromExecutor::Ready(ready) = executor.hear() else { panic!("the first word is Ready") };
        assert_eq!((ready.backend.as_str(), ready.threads), ("cpu", 1));
        executor
    }

    fn tell(&mut self, message: impl Into<ToExecutor>) {
        use std::io::Write;
        let frame = message.into().to_frame().unwrap();
        self.child.stdin.as_mut().unwrap().write_all(&frame).unwrap();
    }

    fn hear(&mut self) -> FromExecutor {
        receive(&mut self.stdout).unwrap().expect("the executor lives")
    }

    /// What comes until the seat is over: packets by name, notes, and the last word.
    fn hear_out(&mut self) -> (BTreeMap<String, String>, Vec<String>, FromExecutor) {
        let (mut packets, mut notes) = (BTreeMap::new(), Vec::new());
        loop {
            match self.hear() {
                FromExecutor::Progressed(progressed) => notes.push(progressed.progress.note),
                FromExecutor::PacketReady(packet) => {
                    assert!(Path::new(&packet.path).is_file());
                    packets.insert(packet.key, packet.path);
                }
                FromExecutor::PacketUsed(_) => {}
                last => return (packets, notes, last),
            }
        }
    }

    fn finished(&mut self) -> Finished {
        match self.hear_out().2 {
            FromExecutor::Finished(finished) => finished,
            other => panic!("{other:?}"),
        }
    }

    fn failed(&mut self) -> FailureKind {
        match self.hear_out().2 {
            FromExecutor::Failed(failed) => failed.failure.kind,
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Executor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A directory with a model in it, and orders about it.
struct Bench {
    directory: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        tiny::Tiny::new("llama").write(&directory.path().join("tiny.gguf"));
        Self { directory }
    }

    fn order(&self, fence: u64, role: Role, spec: ShardSpec) -> RunSeat {
        let directory = self.directory.path().join(format!("{fence}-{role}"));
        std::fs::create_dir_all(&directory).unwrap();
        RunSeat {
            attempt: attempt(fence),
            role,
            spec,
            directory: directory.to_str().unwrap().to_owned(),
            models: vec![ModelFile {
                name: "tiny".to_owned(),
                path: self.directory.path().join("tiny.gguf").to_str().unwrap().to_owned(),
                fingerprint: None,
            }],
            inputs: Vec::new(),
        }
    }
}

fn attempt(fence: u64) -> AttemptId {
    AttemptId { shard: ShardId { run: RunId(1), index: 0 }, fence: Fence(fence) }
}

fn inspect() -> ShardSpec {
    ShardSpec::Inspect(InspectSpec { model: "tiny".to_owned(), layers: LayerSelection::All, texts: 2, seed: 1 })
}

fn transfer() -> ShardSpec {
    ShardSpec::Transfer(TransferSpec {
        model: "tiny".to_owned(),
        first_fact: 0,
        facts: 2,
        conditions: Condition::DEFAULT.to_vec(),
        answer_tokens: 4,
        spread: Spread::Any,
        seed: 1,
    })
}

fn result_of(finished: &Finished) -> ShardResult {
    let [(name, path)] = finished.outputs.as_slice() else { panic!("{finished:?}") };
    assert_eq!(name, "result.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn a_seat_runs_and_the_next_one_finds_the_model_warm() {
    let bench = Bench::new();
    let mut executor = Executor::start();
    executor.tell(bench.order(1, Role::Main, inspect()));
    let first = executor.finished();
    let ShardResult::Inspect(result) = result_of(&first) else { panic!() };
    assert_eq!(result.bytes_per_token_measured, result.bytes_per_token_formula as f64);
    assert!(first.memory_peak_bytes > 1 << 20);
    assert_eq!(first.models, [("tiny".to_owned(), result.model.fingerprint.clone())]);
    // Without its file, only the model in memory can serve.
    std::fs::remove_file(bench.directory.path().join("tiny.gguf")).unwrap();
    executor.tell(bench.order(2, Role::Main, inspect()));
    let second = executor.finished();
    assert_eq!(result_of(&second), ShardResult::Inspect(result));
}

#[test]
fn source_and_target_work_through_packets() {
    let bench = Bench::new();
    let (mut source, mut target) = (Executor::start(), Executor::start());
    source.tell(bench.order(1, Role::Source, transfer()));
    target.tell(bench.order(1, Role::Target, transfer()));
    let (packets, _, last) = source.hear_out();
    let FromExecutor::Finished(sent) = last else { panic!("{last:?}") };
    let ShardResult::TransferSource(sent) = result_of(&sent) else { panic!() };
    assert_eq!((sent.packets, packets.len()), (4, 4));
    for (key, path) in packets {
        target.tell(PacketFile { attempt: attempt(1), key, path });
    }
    let ShardResult::Transfer(result) = result_of(&target.finished()) else { panic!() };
    assert_eq!(result.items.len(), 2 * Condition::DEFAULT.len());
    let injected = result.items.iter().filter(|item| item.condition == Condition::Injected);
    assert!(injected.map(|item| item.logit_max_abs).all(|difference| difference == 0.0));
}

#[test]
fn a_packet_that_does_not_fit_is_refused() {
    let bench = Bench::new();
    let mut target = Executor::start();
    target.tell(bench.order(1, Role::Target, transfer()));
    let path = bench.directory.path().join("bad.safetensors");
    std::fs::write(&path, b"not a packet").unwrap();
    let path = path.to_str().unwrap().to_owned();
    target.tell(PacketFile { attempt: attempt(1), key: "fact-0".to_owned(), path });
    assert_eq!(target.failed(), FailureKind::PacketRefused);
}

#[test]
fn a_stopped_seat_says_so_and_the_next_one_runs() {
    let bench = Bench::new();
    let mut target = Executor::start();
    // It waits for a packet that never comes.
    target.tell(bench.order(1, Role::Target, transfer()));
    target.tell(bench.order(2, Role::Main, inspect()));
    target.tell(StopSeat { attempt: attempt(1) });
    assert_eq!(target.failed(), FailureKind::Cancelled);
    assert_eq!(target.finished().attempt, attempt(2));
    // A stop for an attempt that is over changes nothing for a later one.
    target.tell(StopSeat { attempt: attempt(2) });
    target.tell(bench.order(2, Role::Main, inspect()));
    target.finished();
}

#[test]
fn failures_have_their_type() {
    let bench = Bench::new();
    let mut executor = Executor::start();
    let mut missing = bench.order(1, Role::Main, inspect());
    missing.models[0].path.push_str(".absent");
    executor.tell(missing);
    assert_eq!(executor.failed(), FailureKind::ModelMissing);
    let mut unnamed = bench.order(2, Role::Main, inspect());
    unnamed.models.clear();
    executor.tell(unnamed);
    assert_eq!(executor.failed(), FailureKind::ModelMissing);
    let mut other = bench.order(3, Role::Main, inspect());
    other.models[0].fingerprint = Some(format!("sha256:{}", "0".repeat(64)));
    executor.tell(other);
    assert_eq!(executor.failed(), FailureKind::ModelCorrupt);
    executor.tell(bench.order(4, Role::Main, transfer()));
    assert_eq!(executor.failed(), FailureKind::BadSpec);
    let mut nowhere = bench.order(5, Role::Source, transfer());
    nowhere.directory = bench.directory.path().join("tiny.gguf").to_str().unwrap().to_owned();
    executor.tell(nowhere);
    assert_eq!(executor.failed(), FailureKind::LocalDisk);
    executor.tell(bench.order(6, Role::Main, inspect()));
    executor.finished();
}

#[test]
fn without_its_agent_it_ends() {
    let bench = Bench::new();
    let mut target = Executor::start();
    target.tell(bench.order(1, Role::Target, transfer()));
    drop(target.child.stdin.take());
    assert!(target.child.wait().unwrap().success());
}
