//! Every message, device and order that the simulator makes, each in one place: a new field of the protocol is one line here.

use std::net::{IpAddr, Ipv4Addr};

use protocol::control::{Failure, FailureKind, Heartbeat, HeldSeat, Hello, Output, SeatFailed, SeatFinished, Usage};
use protocol::experiment::projector::{
    Corpus, CorpusText, Couriers, DELTA, FuserRecipe, LayerMap, Loss, Method, PROJECTOR, Pairs, Precision,
    ProjectorRef, Regime, RidgeRecipe, SHUFFLED, START, STATISTICS, Schedule, Stage, TrainSpec,
};
use protocol::experiment::{
    CommandSpec, Condition, InspectSpec, LayerSelection, NoOpSpec, ShardSpec, Spread, TransferSpec,
};
use protocol::group::Group;
use protocol::hardware::{ComputeCapability, Device, DeviceKind, Telemetry};
use protocol::ids::{ArtifactHash, AttemptId, DeviceId, Role, WorkerId};
use protocol::time::UnixMillis;

use super::scenario::{BoxPlan, DevicePlan, RunPlan};
use crate::scheduler::event::Policy;
use crate::scheduler::input::Connected;
use crate::scheduler::{Input, NewRun, Settings};

/// A model of the catalogue.
pub const SMALL_MODEL: &str = "smollm2-135m-instruct";
/// Another, larger one.
pub const LARGE_MODEL: &str = "gemma-3-270m";
/// A file of some boxes: nobody knows which before it is tried.
pub const PATH_MODEL: &str = "/data/own.gguf";
/// A researcher's program.
pub const PROGRAM: &str = "simulate-me";
/// Virtual time 0 on the coordinator's clock, milliseconds since 1970.
pub const EPOCH_MS: u64 = 1_700_000_000_000;

/// The public key of the box at this index.
pub fn key(index: usize) -> [u8; 32] {
    let mut key = [7; 32];
    key[..8].copy_from_slice(&(index as u64).to_le_bytes());
    key
}

/// Its host name.
pub fn hostname(index: usize) -> String {
    format!("box-{index}")
}

/// A greeting.
pub fn hello(index: usize, epoch: u64, plan: &BoxPlan, held: Vec<HeldSeat>) -> Hello {
    Hello {
        build: "simulated".to_owned(),
        hostname: hostname(index),
        epoch: UnixMillis(EPOCH_MS + epoch),
        devices: plan.devices.iter().map(device).collect(),
        models: plan.models.iter().filter(|model| !model.starts_with('/')).cloned().collect(),
        held,
        peer_port: 7000,
        addresses: Vec::new(),
        shapes: Vec::new(),
        terms: plan.terms.clone(),
    }
}

/// A session's beginning.
pub fn connected(worker: WorkerId, index: usize, session: u64, hello: Hello) -> Input {
    let [.., high, low] = worker.0.to_be_bytes();
    let observed = IpAddr::V4(Ipv4Addr::new(10, 0, high, low));
    Input::Connected(Box::new(Connected { worker, session, spki_sha256: key(index), hello, observed }))
}

/// A device as reported.
pub fn device(plan: &DevicePlan) -> Device {
    let cuda = plan.kind == DeviceKind::Cuda;
    Device {
        id: plan.id.clone(),
        kind: plan.kind,
        model: plan.model.clone(),
        compute_capability: cuda
            .then_some(ComputeCapability { major: plan.capability / 10, minor: plan.capability % 10 }),
        memory_total_bytes: plan.total_bytes,
        memory_budget_bytes: plan.budget_bytes,
        threads: 4,
        unusable: None,
        speed: plan.speed,
    }
}

/// A device's measurements.
pub fn telemetry(device: DeviceId, free_bytes: u64, ours_bytes: u64, sick: bool) -> Telemetry {
    Telemetry {
        device,
        memory_free_bytes: free_bytes,
        memory_ours_bytes: ours_bytes,
        utilisation_percent: None,
        temperature_celsius: None,
        power_milliwatts: None,
        sick: sick.then(|| "the driver answers no more".to_owned()),
    }
}

/// A sign of life.
pub fn heartbeat(sequence: u64, telemetry: Vec<Telemetry>, held: Vec<HeldSeat>) -> Heartbeat {
    Heartbeat { sequence, telemetry, held }
}

/// A seat that is held.
pub fn held(attempt: AttemptId, role: Role) -> HeldSeat {
    HeldSeat { attempt, role, progress: Default::default() }
}

/// A result; `content` tells results apart.
pub fn finished(attempt: AttemptId, role: Role, wall_ms: u64, peak_bytes: u64, content: u64) -> SeatFinished {
    let mut hash = [0; 32];
    hash[..8].copy_from_slice(&attempt.fence.0.to_le_bytes());
    hash[8] = role as u8;
    hash[9..17].copy_from_slice(&content.to_le_bytes());
    let waited_ms = if role == Role::Source { wall_ms * 2 / 3 } else { 0 };
    SeatFinished {
        attempt,
        role,
        outputs: vec![Output { name: "result.json".to_owned(), hash: ArtifactHash(hash), bytes: 10 }],
        // Sources wait for targets two thirds of the time.
        usage: Usage { wall_ms, memory_peak_bytes: peak_bytes, waited_ms, ..Usage::default() },
        models: Vec::new(),
        build: "simulated".to_owned(),
    }
}

/// A failure.
pub fn failed(attempt: AttemptId, role: Role, kind: FailureKind) -> SeatFailed {
    SeatFailed { attempt, role, failure: Failure::new(kind, "as the seed wants") }
}

/// A run to submit.
pub fn new_run(plan: &RunPlan) -> NewRun {
    // Each training waits for the one before; the rest waits for all of them, or for none.
    let mut groups: Vec<Group> = Vec::new();
    for (number, training) in (0u32..).zip(&plan.trainings) {
        let after = number.checked_sub(1).into_iter().collect();
        groups.push(Group { after, trainings: vec![training.clone()], ..Group::default() });
    }
    if let Some(last) = u32::try_from(groups.len()).ok().and_then(|groups| groups.checked_sub(1)) {
        let after = if plan.after_trainings { vec![last] } else { Vec::new() };
        let count = u32::try_from(plan.specs.len()).unwrap_or(u32::MAX);
        groups.push(Group { count, after, ..Group::default() });
    }
    NewRun {
        name: "simulated".to_owned(),
        priority: plan.priority,
        seed: 1,
        account: plan.account.clone(),
        running_max: plan.running_max,
        file: "simulated.toml".to_owned(),
        text: String::new(),
        groups,
        specs: plan.specs.clone(),
    }
}

/// Settings of a cluster.
pub fn settings(lease_ttl_ms: u64, attempts_max: u32, policy: Policy) -> Settings {
    let weights = [("ann".to_owned(), 3)].into_iter().collect();
    Settings { lease_ttl_ms, attempts_max, policy, weights }
}

/// The cheapest work there is.
pub fn no_op(index: u32) -> ShardSpec {
    ShardSpec::NoOp(NoOpSpec { index })
}

/// A researcher's program that declares its memory.
pub fn command(class: &str, memory_bytes: u64) -> ShardSpec {
    ShardSpec::Command(Box::new(CommandSpec {
        argv: vec![class.to_owned()],
        env: Vec::new(),
        files: Vec::new(),
        memory_bytes,
        threads: 2,
        collect: Vec::new(),
        timeout_ms: 0,
        retries: 1,
        class: class.to_owned(),
        work: 1,
    }))
}

/// Work with one seat.
pub fn inspect(model: &str, seed: u64) -> ShardSpec {
    ShardSpec::Inspect(InspectSpec { model: model.to_owned(), layers: LayerSelection::All, texts: 4, seed })
}

/// Work with two seats.
pub fn transfer(model: &str, spread: Spread, seed: u64) -> ShardSpec {
    ShardSpec::Transfer(TransferSpec {
        model: model.to_owned(),
        first_fact: 0,
        facts: 4,
        conditions: vec![Condition::Text, Condition::Injected],
        answer_tokens: 8,
        spread,
        seed,
    })
}

/// What a seat of a training makes beside its result.
pub fn made(spec: &ShardSpec, attempt: AttemptId, role: Role) -> Vec<Output> {
    let ShardSpec::ProjectorTrain(spec) = spec else { return Vec::new() };
    let names: &[&str] = match (&spec.stage, role) {
        (Stage::Statistics(_), Role::Target) => &[STATISTICS],
        (Stage::Steps { .. }, Role::Target) => &[DELTA],
        (Stage::Solve { .. }, _) => &[PROJECTOR, SHUFFLED],
        (Stage::Outer { .. }, _) => &[PROJECTOR, START],
        _ => &[],
    };
    let output = |name: &&str| Output {
        name: (*name).to_owned(),
        hash: ArtifactHash::of(format!("{attempt} {name}").as_bytes()),
        bytes: 1000,
    };
    names.iter().map(output).collect()
}

/// A small training: `shards` of statistics, or replicas.
pub fn training(method: Method, samples: u32, shards: u32) -> TrainSpec {
    let couriers = Couriers { values: 8, names: 16, wordings: 1, pairs_percent: 0 };
    TrainSpec {
        source: SMALL_MODEL.to_owned(),
        target: LARGE_MODEL.to_owned(),
        corpus: Corpus { text: CorpusText::Couriers(couriers), samples },
        layers: LayerMap::Proportional(3),
        method,
        stage: Stage::Whole { shards },
        spread: Spread::Any,
        seed: 1,
    }
}

/// In closed form.
pub fn ridge() -> Method {
    Method::Ridge(RidgeRecipe { lambdas: vec![100.0], held_out_percent: 20 })
}

/// By steps; width 0 is left to the scheduler.
pub fn fuser(hidden: u32, base: Option<ProjectorRef>) -> Method {
    Method::Fuser(Box::new(FuserRecipe {
        regime: Regime::Unaware,
        hidden,
        depth: 3,
        base,
        pairs: Pairs::Matched,
        loss: Loss::NextToken,
        epochs: 1,
        batch: 4,
        micro_batch: 2,
        learning_rate: 1e-3,
        warmup: 0.1,
        schedule: Schedule::Linear,
        weight_decay: 0.01,
        clip: 1.0,
        dropout: 0.0,
        gate_start: 1.0,
        temperature_end: 0.05,
        precision: Precision::F32,
        checkpointing: false,
        local_steps: 16,
        shares: protocol::experiment::projector::Shares::Speed,
        quantise: true,
        outer: None,
        validate: 8,
    }))
}
