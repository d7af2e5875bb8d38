//! Results that look like real ones, for tests, with host names and texts that would rather be markup.

use protocol::experiment::projector::{EvalSpec, Projected, ProjectorRef, Samples, Stage, Tier, TrainSpec};
use protocol::experiment::{Condition, InspectSpec, LayerSelection, ShardSpec, Spread, TransferSpec};
use protocol::ids::{ArtifactHash, DeviceId, DeviceRef, Role, RunId, ShardId, WorkerId};
use protocol::results::{
    EffectiveRank, EvalItem, EvalResult, InspectResult, LayerFit, LayerGate, LayerProfile, ModelFacts, RidgeResult,
    RoundResult, ShardResult, StatisticsResult, StepRow, StepsResult, TensorStats, TransferItem, TransferResult,
    TransferSourceResult, Validation,
};
use protocol::time::UnixMillis;

use crate::api::{
    ClusterInfo, OutputRow, Progress, RunDetail, RunResults, RunState, RunSummary, SeatResult, SeatRow, ShardCounts,
    ShardResults, ShardRow, ShardState,
};
use crate::sim::make;

pub(crate) const HOSTILE: &str = "<script>alert('x')</script>\u{1b}[31m\"&";
const NAMES: [&str; 8] = ["Paris", "Oslo", "Rome", "Cairo", "Lima", "Delhi", "Tokyo", "Quito"];

fn model(name: &str, layers: u32, kv_heads: u32, head_dim: u32) -> ModelFacts {
    ModelFacts {
        name: name.to_owned(),
        fingerprint: format!("sha256:{}", ArtifactHash::of(name.as_bytes())),
        architecture: if layers == 18 { "gemma3" } else { "llama" }.to_owned(),
        layers,
        kv_heads,
        head_dim,
    }
}

fn stats(layer: u32, layers: u32, scale: f64) -> TensorStats {
    let depth = f64::from(layer + 1) / f64::from(layers);
    TensorStats {
        norm_mean: scale * (1.0 + 2.0 * depth + (f64::from(layer) * 1.7).sin() * 0.3),
        norm_sd: scale * 0.2,
        sink_ratio: 0.2 + depth,
        mean: 0.01,
        sd: 0.9,
        kurtosis: 4.0 * depth,
        rank: EffectiveRank {
            tokens: 24,
            energy_90: 9.0,
            entropy: 21.0 - 8.0 * depth,
            participation: 5.0,
            stable: 3.0,
        },
    }
}

fn inspect(model: ModelFacts, layers: LayerSelection) -> ShardResult {
    let reported = |layer: &u32| match layers {
        LayerSelection::All => true,
        LayerSelection::Full => model.layers != 18 || layer % 6 == 5,
        LayerSelection::Sliding => model.layers == 18 && layer % 6 != 5,
    };
    let profile: Vec<LayerProfile> = (0..model.layers)
        .filter(reported)
        .map(|layer| LayerProfile {
            layer,
            sliding_window: (model.layers == 18 && layer % 6 != 5).then_some(512),
            shape: [model.kv_heads, 26, model.head_dim],
            key: stats(layer, model.layers, 14.0),
            value: stats(layer, model.layers, 3.0),
        })
        .collect();
    let formula = 2 * profile.len() as u64 * u64::from(model.kv_heads * model.head_dim) * 4;
    ShardResult::Inspect(InspectResult {
        texts: 16,
        tokens: 412,
        bytes_per_token_measured: formula as f64,
        bytes_per_token_formula: formula,
        reload_logit_max_abs: 0.0,
        recompute_max_abs: 0.0,
        profile,
        model,
    })
}

fn item(fact: u32, condition: Condition) -> TransferItem {
    let answer = NAMES[fact as usize % 8].to_owned();
    let other = NAMES[(fact as usize + 1) % 8].to_owned();
    let wobble = f64::from(fact % 5) * 0.2;
    let (right, kl, logit) = match condition {
        Condition::Text => (true, 0.0, 0.0),
        Condition::Injected => (true, 1e-12, 2.2e-5),
        Condition::Rerotated(_) => (true, 3e-7 * (1.0 + wobble), 6e-4),
        Condition::Shifted(_) => (fact.is_multiple_of(3), 0.9 + wobble, 6.0),
        Condition::NoContext | Condition::MatchedNoise => (fact % 8 == 1, 3.2 + wobble, 11.0),
        Condition::OtherSubject => (false, 5.0 + wobble, 14.0),
        _ => (fact.is_multiple_of(4), 1.6 + wobble, 9.0),
    };
    let foreign = condition == Condition::OtherSubject;
    TransferItem {
        fact,
        condition,
        context: format!("The courier Mira {fact} left the parcel in {answer}."),
        question: format!("Where did the courier Mira {fact} leave the parcel?"),
        packet_answer: if foreign { other.clone() } else { answer.clone() },
        choice: if right { answer.clone() } else { other.clone() },
        p_answer: if right { 0.97 } else { 0.02 },
        exact: right,
        kl,
        logit_max_abs: logit,
        stalled: condition == Condition::Naive && fact.is_multiple_of(2),
        generated: match fact {
            1 => HOSTILE.to_owned(),
            2 => "=HYPERLINK(\"x\")".to_owned(),
            _ if right => format!(" {answer}."),
            _ => format!(" {other}, I think."),
        },
        answer,
    }
}

fn seat(role: Role, worker: u64, result: ShardResult) -> SeatResult {
    SeatResult {
        role,
        device: DeviceRef { worker: WorkerId(worker), device: DeviceId("cpu".to_owned()) },
        device_model: HOSTILE.to_owned(),
        build: "0.1.0".to_owned(),
        wall_ms: 8_200,
        memory_peak_bytes: 1_300_000_000,
        packet_bytes: if role == Role::Main { 0 } else { 9_900_000 },
        result: Some(result),
        unreadable: None,
        outputs: vec![OutputRow { role, name: "result.json".to_owned(), hash: ArtifactHash::of(b"r"), bytes: 1 }],
    }
}

pub(crate) fn transfer(id: ShardId, first_fact: u32, facts: u32) -> ShardResults {
    let smollm = model("smollm2-135m-instruct", 30, 3, 64);
    let conditions = Condition::DEFAULT.to_vec();
    let items = (first_fact..first_fact + facts)
        .flat_map(|fact| conditions.iter().map(move |condition| item(fact, *condition)));
    let target =
        TransferResult { model: smollm.clone(), candidates: NAMES.map(str::to_owned).to_vec(), items: items.collect() };
    let source =
        TransferSourceResult { model: smollm, packets: facts, bytes: 9_900_000, tokens: 215, compute_ms: 900.0 };
    let spec = TransferSpec {
        model: "smollm2-135m-instruct".to_owned(),
        first_fact,
        facts,
        conditions,
        answer_tokens: 8,
        spread: Spread::Workers,
        seed: 42,
    };
    ShardResults {
        id,
        spec: ShardSpec::Transfer(spec),
        seats: vec![
            seat(Role::Source, 1, ShardResult::TransferSource(source)),
            seat(Role::Target, 2, ShardResult::Transfer(target)),
        ],
    }
}

/// A run of three inspections and two transfers.
pub(crate) fn results() -> RunResults {
    let run = RunId(7);
    let id = |index| ShardId { run, index };
    let inspection = |index, facts: ModelFacts, layers| ShardResults {
        id: id(index),
        spec: ShardSpec::Inspect(InspectSpec { model: facts.name.clone(), layers, texts: 16, seed: 42 }),
        seats: vec![seat(Role::Main, 1, inspect(facts, layers))],
    };
    let shards = vec![
        inspection(0, model("smollm2-135m-instruct", 30, 3, 64), LayerSelection::All),
        inspection(1, model("gemma-3-270m", 18, 1, 256), LayerSelection::Sliding),
        inspection(2, model("gemma-3-270m", 18, 1, 256), LayerSelection::Full),
        transfer(id(3), 0, 8),
        transfer(id(4), 8, 8),
    ];
    let summary = RunSummary {
        id: run,
        name: HOSTILE.to_owned(),
        state: RunState::Complete,
        shards: ShardCounts { committed: 5, ..ShardCounts::default() },
        done_per_mille: 1000,
        submitted_at_ms: UnixMillis(1_798_761_500_000),
        finished_at_ms: Some(UnixMillis(1_798_761_599_000)),
        note: String::new(),
    };
    RunResults { summary, shards }
}

/// The results of two trainings, ridge and a fuser of two rounds, and of an evaluation of two tiers.
pub(crate) fn projectors() -> RunResults {
    let id = |index| ShardId { run: RunId(7), index };
    let ridge = make::training(make::ridge(), 64, 1);
    let fuser = make::training(make::fuser(64, None), 96, 2);
    let part = |index, spec: &TrainSpec, stage, result| {
        let spec = spec.at(stage);
        let role = *spec.stage.roles().last().unwrap();
        ShardResults {
            id: id(index),
            spec: ShardSpec::ProjectorTrain(Box::new(spec)),
            seats: vec![seat(role, 1, result)],
        }
    };
    let samples = |first, count| Samples { first, count };
    let steps = |index, round, replica, first| {
        let stage = Stage::Steps { round, replica, samples: samples(first, 24), start: None };
        part(index, &fuser, stage, ShardResult::ProjectorSteps(steps(round, replica, first)))
    };
    let outer = |index, round| {
        let stage = Stage::Outer { round, counted: 48 + u64::from(round) * 48, rounds: 2, start: None, deltas: vec![] };
        part(index, &fuser, stage, ShardResult::ProjectorRound(outer(round)))
    };
    let mut shards = vec![
        part(0, &ridge, Stage::Statistics(samples(0, 64)), ShardResult::ProjectorStatistics(statistics())),
        part(1, &ridge, Stage::Solve { parts: Vec::new() }, ShardResult::ProjectorRidge(solution())),
        steps(2, 0, 0, 0),
        steps(3, 0, 1, 24),
        outer(4, 0),
        steps(5, 1, 0, 48),
        steps(6, 1, 1, 72),
        outer(7, 1),
    ];
    shards.extend([(8, Tier::Seen, 0), (9, Tier::Seen, 16), (10, Tier::Binding, 0)].map(|(index, tier, first)| {
        let spec = evaluation(tier, first);
        let result = ShardResult::ProjectorEval(Box::new(evaluated(&spec)));
        let seats = vec![seat(Role::Target, 2, result)];
        ShardResults { id: id(index), spec: ShardSpec::ProjectorEval(Box::new(spec)), seats }
    }));
    let committed = u32::try_from(shards.len()).unwrap();
    let summary = RunSummary { shards: ShardCounts { committed, ..ShardCounts::default() }, ..results().summary };
    RunResults { summary, shards }
}

fn gemma() -> ModelFacts {
    model("gemma-3-270m", 18, 1, 256)
}

fn statistics() -> StatisticsResult {
    StatisticsResult { target: gemma(), samples: 64, rows: 1_900, rows_held_out: 380 }
}

fn fits(level: f64) -> Vec<LayerFit> {
    let fit = |layer: u32| LayerFit {
        layer,
        sources: vec![layer, layer + 1],
        lambda_key: 100.0,
        lambda_value: 1_000.0,
        r2_key: level - f64::from(layer) * 0.01,
        r2_value: level - 0.2,
    };
    (0..18).map(fit).collect()
}

fn solution() -> RidgeResult {
    let (source, target) = ("sha256:aa".to_owned(), "sha256:bb".to_owned());
    RidgeResult { source, target, rows: 1_900, parameters: 10_600_000, layers: fits(0.9) }
}

fn steps(round: u32, replica: u32, first: u64) -> StepsResult {
    let row = |step: u64| {
        let sample = first + 4 * (step + 1);
        let loss = 3.0 - 0.02 * sample as f64;
        let step = u64::from(round) * 6 + step;
        StepRow { step, sample, loss, learning_rate: 1e-3, gradient_norm: 0.8, temperature: 0.5 }
    };
    let gate = |layer: u32| LayerGate { layer, key: 1.0 - f64::from(layer) * 0.1, value: 0.5 };
    StepsResult {
        target: gemma(),
        round,
        replica,
        samples: 24,
        steps: (0..6).map(row).collect(),
        gates: (0..18).map(gate).collect(),
        validation: (replica == 0).then(|| {
            let matched = 3.0 - f64::from(round);
            Validation { samples: 16, matched, mismatched: 3.1 }
        }),
        parameters: 1_000_000,
        compute_ms: 900.0,
        waited_ms: 100.0,
        delta_bytes: 1_015_625,
    }
}

fn outer(round: u32) -> RoundResult {
    RoundResult {
        round,
        samples: vec![24, 24],
        counted: 48 * u64::from(round + 1),
        learning_rate: 1.0,
        momentum: 0.0,
        delta_norm: 0.4,
        delta_bytes: 2_031_250,
        weights: ArtifactHash::of(b"weights"),
    }
}

fn evaluation(tier: Tier, first_fact: u32) -> EvalSpec {
    EvalSpec {
        source: "smollm2-135m-instruct".to_owned(),
        target: "gemma-3-270m".to_owned(),
        projector: ProjectorRef::Trained(0),
        shuffled: None,
        tier,
        first_fact,
        facts: 16,
        conditions: Projected::ALL.to_vec(),
        answer_tokens: 8,
        spread: Spread::Any,
        seed: 42,
    }
}

/// On tier `seen` the projector works, on the others it guesses.
fn evaluated(spec: &EvalSpec) -> EvalResult {
    let item = |fact: u32, condition: Projected| {
        let answer = NAMES[fact as usize % 8].to_owned();
        let other = NAMES[(fact as usize + 1) % 8].to_owned();
        let right = match condition {
            Projected::Native | Projected::TextRelay => true,
            Projected::Projected => spec.tier == Tier::Seen || fact.is_multiple_of(8),
            Projected::Mismatched => false,
            Projected::NoContext | Projected::RawCopy | Projected::Shuffled => fact.is_multiple_of(8),
        };
        EvalItem {
            fact,
            condition,
            context: HOSTILE.to_owned(),
            question: "Where?".to_owned(),
            packet_answer: if condition == Projected::Mismatched { other.clone() } else { answer.clone() },
            choice: if right { answer.clone() } else { other },
            p_answer: if right { 0.9 } else { 0.1 },
            kl: if right { 0.1 + f64::from(fact % 4) * 0.01 } else { 2.5 },
            generated: HOSTILE.to_owned(),
            injected: right,
            question_generated: String::new(),
            stalled: condition == Projected::RawCopy,
            bytes: match condition {
                Projected::TextRelay => 60,
                Projected::Native | Projected::NoContext => 0,
                _ => 400_000,
            },
            latency_ms: 12.0,
            answer,
        }
    };
    let facts = spec.first_fact..spec.first_fact + spec.facts;
    EvalResult {
        source: model("smollm2-135m-instruct", 30, 3, 64),
        target: gemma(),
        method: "ridge".to_owned(),
        parameters: 10_600_000,
        tier: spec.tier,
        candidates: NAMES.map(str::to_owned).to_vec(),
        items: facts.flat_map(|fact| Projected::ALL.map(|condition| item(fact, condition))).collect(),
        layers: fits(if spec.tier == Tier::Seen { 0.8 } else { 0.1 }),
    }
}

pub(crate) fn detail(results: &RunResults) -> RunDetail {
    let row = |shard: &ShardResults| ShardRow {
        id: shard.id,
        summary: shard.spec.summary(),
        state: ShardState::Committed,
        attempts: 1,
        seats: shard
            .seats
            .iter()
            .map(|seat| SeatRow {
                role: seat.role,
                worker: seat.device.worker,
                hostname: HOSTILE.to_owned(),
                device: seat.device.device.clone(),
                reserved_bytes: 1 << 30,
                finished: true,
                progress: Progress::default(),
            })
            .collect(),
        progress: Progress { done: 8, total: 8, note: String::new() },
        waiting: None,
        failure: None,
        outputs: Vec::new(),
        placed_at_ms: Some(UnixMillis(1_798_761_501_000)),
        finished_at_ms: Some(UnixMillis(1_798_761_509_000)),
    };
    RunDetail {
        summary: results.summary.clone(),
        file: "sweep.toml".to_owned(),
        sweep: format!("name = \"{HOSTILE}\" # </pre>\n"),
        shards: results.shards.iter().map(row).collect(),
        trainings: Vec::new(),
    }
}

pub(crate) fn cluster() -> ClusterInfo {
    ClusterInfo {
        name: "lab".to_owned(),
        build: "0.1.0".to_owned(),
        store_path: "/store".to_owned(),
        listen: "[::]:4717".to_owned(),
        journal_events: 40,
        store_problem: None,
        manifests_pending: 0,
    }
}
