//! The memory model against what real executors take, phase by phase: the kernel's high-water mark of their processes. Skipped
//! where the models are absent.
//!
//! `cargo test --test memory -- peaks --nocapture` prints the table that `docs/memory.md` shows.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};

use protocol::catalogue::shape;
use protocol::exec::{Finished, FromExecutor, ModelFile, PacketFile, PacketKey, RunSeat, ToExecutor};
use protocol::experiment::{Condition, InspectSpec, LayerSelection, ShardSpec, Spread, TransferSpec};
use protocol::frame::Messages;
use protocol::ids::{AttemptId, Fence, Role, RunId, ShardId};
use protocol::memory::{
    Backend, Capture, Element, Inference, ModelShape, Optimiser, Phase, ProjectorKind, ProjectorTraining, Quantisation,
    Training, estimate,
};
use worker::executor::wire::receive;
use worker::model::shape::shape as read_shape;

use crate::allocator::measure;

const MODELS: [&str; 2] = ["smollm2-135m-instruct", "gemma-3-270m"];
const THREADS: u32 = 2;
const BACKEND: Backend = Backend::Cpu { threads: THREADS };

/// A line of the table.
struct Row {
    model: &'static str,
    phase: String,
    measured: u64,
    computed: u64,
}

impl Row {
    /// Thousandths by which the model is over (or under: negative) what was measured.
    fn error(&self) -> i64 {
        (i128::from(self.computed) * 1000 / i128::from(self.measured) - 1000) as i64
    }
}

/// A model of the catalogue, if it was brought.
fn model_file(name: &str) -> Option<PathBuf> {
    let directory = protocol::models::ModelsDir::from_env().ok()?;
    match directory.locate(name) {
        Ok((path, _)) => Some(path),
        Err(error) => {
            eprintln!("SKIPPED: {name}: {error}");
            None
        }
    }
}

fn executor() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bonepile-executor"));
    command.env("RUST_LOG", "warn").env("BONEPILE_THREADS", THREADS.to_string());
    command
}

/// Peak of `model bench`, which holds no tokenizer.
fn bench(model: &str, precision: &str, arguments: &[&str]) -> u64 {
    let mut command = executor();
    command.args(["model", "bench", model, "--precision", precision, "--runs", "1", "--decode", "1"]);
    let output = command.args(["--threads", &THREADS.to_string()]).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    document["peak_bytes"].as_u64().unwrap()
}

fn without_tokenizer(shape: &ModelShape, held: Quantisation, phase: Phase<'_>) -> u64 {
    let footprint = estimate(shape, held, phase, BACKEND);
    footprint.peak() - footprint.tokenizer
}

/// The lengths tried: `few` in every run of the tests, `all` for the table in docs/memory.md, which takes ten minutes a model.
fn lengths(few: &'static [u32], all: &'static [u32]) -> &'static [u32] {
    if std::env::var_os("BONEPILE_ALL_PEAKS").is_some() { all } else { few }
}

/// Reading texts of several lengths: f32, and weights as stored.
fn prefills(model: &'static str, rows: &mut Vec<Row>) {
    let shape = shape(model).unwrap();
    for (precision, held) in [("f32", Quantisation::F32), ("stored", Quantisation::Stored)] {
        for &tokens in lengths(&[64, 1024], &[64, 256, 1024, 2048]) {
            let measured = bench(model, precision, &["--prompt", &tokens.to_string()]);
            let inference = Inference { cache: Element::F32, ..Inference::of(tokens + 1) };
            let computed = without_tokenizer(shape, held, Phase::Inference(inference));
            rows.push(Row { model, phase: format!("prefill of {tokens}, {precision}"), measured, computed });
        }
    }
}

/// Steps of training keys and values that are injected: what a projector's receiver does.
fn steps(model: &'static str, rows: &mut Vec<Row>) {
    let shape = shape(model).unwrap();
    for tokens in [32, 128, 256] {
        let measured = bench(model, "f32", &["--prompt", "16", "--step", &format!("32+{tokens}")]);
        let training = Training { batch: 1, prefix: 32, tokens, checkpointing: false, optimiser: Optimiser::Sgd };
        let projector = ProjectorKind::LowRank { rank: 0 };
        let phase = ProjectorTraining { source: shape, source_held: None, projector, training };
        let computed = without_tokenizer(shape, Quantisation::F32, Phase::Projector(phase));
        rows.push(Row { model, phase: format!("training step of {tokens}, f32"), measured, computed });
    }
}

/// An executor with orders.
struct Seat {
    child: Child,
    stdin: ChildStdin,
}

fn attempt() -> AttemptId {
    AttemptId { shard: ShardId { run: RunId(1), index: 0 }, fence: Fence(1) }
}

impl Seat {
    fn start() -> Self {
        let mut child = executor().stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let stdin = child.stdin.take().unwrap();
        Self { child, stdin }
    }

    fn tell(&mut self, message: impl Into<ToExecutor>) {
        self.stdin.write_all(&message.into().to_frame().unwrap()).unwrap();
    }

    /// Until the seat is over; packets go to `target`.
    fn finished(&mut self, mut target: Option<&mut Seat>) -> Finished {
        let mut stdout = self.child.stdout.take().unwrap();
        loop {
            match receive(&mut stdout).unwrap().expect("the executor lives") {
                FromExecutor::Finished(finished) => return finished,
                FromExecutor::Failed(failed) => panic!("{failed:?}"),
                FromExecutor::PacketReady(packet) => {
                    // A source waits while too many of its packets are on their way.
                    self.tell(ToExecutor::PacketSent(PacketKey { attempt: attempt(), key: packet.key.clone() }));
                    let packet = PacketFile { attempt: attempt(), key: packet.key, path: packet.path };
                    target.as_mut().unwrap().tell(packet);
                }
                _ => {}
            }
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn order(model: &str, directory: &std::path::Path, role: Role, spec: ShardSpec) -> RunSeat {
    let directory = directory.join(role.to_string());
    std::fs::create_dir_all(&directory).unwrap();
    let path = model_file(model).unwrap().to_str().unwrap().to_owned();
    let models = vec![ModelFile { name: model.to_owned(), path, fingerprint: None }];
    RunSeat {
        attempt: attempt(),
        role,
        spec,
        directory: directory.to_str().unwrap().to_owned(),
        models,
        inputs: Vec::new(),
    }
}

/// Inspections, which keep a cache of each text. Texts have 23 to 29 tokens.
fn captures(model: &'static str, rows: &mut Vec<Row>) {
    let shape = shape(model).unwrap();
    for texts in [2, 64] {
        let directory = tempfile::tempdir().unwrap();
        let mut seat = Seat::start();
        let layers = LayerSelection::All;
        let spec = ShardSpec::Inspect(InspectSpec { model: model.to_owned(), layers, texts, seed: 1 });
        seat.tell(order(model, directory.path(), Role::Main, spec));
        let measured = seat.finished(None).memory_peak_bytes;
        let running = Inference { sequences: 3, ..Inference::of(30) };
        let capture = Capture { running, caches: texts + 3, cache_tokens: 26 };
        let computed = estimate(shape, Quantisation::F32, Phase::Capture(capture), BACKEND).peak();
        rows.push(Row { model, phase: format!("inspect, {texts} texts"), measured, computed });
    }
}

/// Both seats of a transfer.
fn transfers(model: &'static str, rows: &mut Vec<Row>) {
    let shape = shape(model).unwrap();
    let facts = 6;
    let spec = ShardSpec::Transfer(TransferSpec {
        model: model.to_owned(),
        first_fact: 0,
        facts,
        conditions: Condition::DEFAULT.to_vec(),
        answer_tokens: 8,
        spread: Spread::Any,
        seed: 1,
    });
    let directory = tempfile::tempdir().unwrap();
    let (mut source, mut target) = (Seat::start(), Seat::start());
    source.tell(order(model, directory.path(), Role::Source, spec.clone()));
    target.tell(order(model, directory.path(), Role::Target, spec));
    let sent = source.finished(Some(&mut target)).memory_peak_bytes;
    let scored = target.finished(None).memory_peak_bytes;
    let computed = |sequences, tokens, caches| {
        let running = Inference { sequences, ..Inference::of(tokens) };
        let capture = Capture { running, caches, cache_tokens: 56 };
        estimate(shape, Quantisation::F32, Phase::Capture(capture), BACKEND).peak()
    };
    rows.push(Row { model, phase: "transfer, source".to_owned(), measured: sent, computed: computed(1, 56, 3) });
    let computed = computed(2, 80, 2 * facts + 3);
    rows.push(Row { model, phase: format!("transfer, target, {facts} facts"), measured: scored, computed });
}

fn print(rows: &[Row]) {
    eprintln!("| model | phase | measured, MB | computed, MB | error |");
    eprintln!("|---|---|---:|---:|---:|");
    for row in rows {
        let [measured, computed] = [row.measured, row.computed].map(|bytes| bytes as f64 / 1e6);
        let error = row.error() as f64 / 10.0;
        eprintln!("| {} | {} | {measured:.0} | {computed:.0} | {error:+.1} % |", row.model, row.phase);
    }
}

fn check(model: &'static str) {
    if model_file(model).is_none() {
        return;
    }
    let mut rows = Vec::new();
    prefills(model, &mut rows);
    captures(model, &mut rows);
    transfers(model, &mut rows);
    steps(model, &mut rows);
    print(&rows);
    let mut errors: Vec<i64> = rows.iter().map(Row::error).collect();
    let under = *errors.iter().min().unwrap();
    errors.sort_by_key(|error| error.abs());
    let median = errors[errors.len() / 2].abs();
    eprintln!("median error {:.1} %, most under {:.1} %", median as f64 / 10.0, under as f64 / 10.0);
    assert!(median <= 100, "median error of {median} thousandths");
    assert!(under >= -100, "{under} thousandths under what was measured");
}

#[test]
fn smollm2_takes_what_is_computed() {
    check(MODELS[0]);
}

#[test]
fn gemma3_takes_what_is_computed() {
    check(MODELS[1]);
}

#[test]
fn shapes_of_the_catalogue_are_those_of_the_files() {
    for model in MODELS {
        let Some(path) = model_file(model) else { continue };
        // In its turn: other tests count what this process takes.
        let (read, _) = measure(|| read_shape(&path).unwrap());
        assert_eq!(Some(&read), shape(model), "{model}");
    }
}
