//! A fuser's rounds on tiny models: what is resumed is the same, replicas make one set of weights in whatever order they end, and
//! nothing but the spec decides what comes out.

use std::collections::BTreeMap;
use std::path::PathBuf;

use protocol::experiment::Spread;
use protocol::experiment::projector::{
    Corpus, CorpusText, Couriers, FuserRecipe, LayerMap, Loss, Method, Pairs, Precision, ProjectorRef, Regime,
    RidgeRecipe, Samples, Schedule, Stage, TrainSpec,
};
use protocol::results::{RoundResult, StepsResult};
use worker::cache::KvCache;
use worker::experiment::ExperimentError;
use worker::experiment::projector::rounds::{Corpora, Start, outer, send_caches, steps};
use worker::experiment::projector::train::{make_caches, solve, statistics};
use worker::model::Model;
use worker::projector::corpus::Corpus as Opened;
use worker::projector::fuser::{Delta, weights_hash};
use worker::projector::reading::Reading;
use worker::projector::{Alignment, Own, Projector};

use crate::tiny::Tiny;

const BATCH: u32 = 4;

struct Two {
    source: Model,
    target: Model,
}

fn models() -> Two {
    Two { source: Tiny::new("gemma3").load().unwrap(), target: Tiny::new("llama").load().unwrap() }
}

fn spec(change: impl FnOnce(&mut FuserRecipe)) -> TrainSpec {
    let mut recipe = FuserRecipe {
        regime: Regime::Unaware,
        hidden: 8,
        depth: 3,
        base: None,
        pairs: Pairs::Matched,
        loss: Loss::NextToken,
        epochs: 2,
        batch: BATCH,
        micro_batch: 3,
        learning_rate: 1e-2,
        warmup: 0.1,
        schedule: Schedule::Cosine,
        weight_decay: 0.01,
        clip: 1.0,
        dropout: 0.1,
        gate_start: 1.0,
        temperature_end: 0.1,
        precision: Precision::F32,
        checkpointing: true,
        local_steps: 2,
        shares: protocol::experiment::projector::Shares::Speed,
        quantise: false,
        outer: None,
        validate: 3,
    };
    change(&mut recipe);
    let couriers = Couriers { values: 8, names: 8, wordings: 1, pairs_percent: 0 };
    TrainSpec {
        source: "gemma3".to_owned(),
        target: "llama".to_owned(),
        corpus: Corpus { text: CorpusText::Couriers(couriers), samples: 12 },
        layers: LayerMap::LastAligned,
        method: Method::Fuser(Box::new(recipe)),
        stage: Stage::Whole { shards: 1 },
        spread: Spread::Any,
        seed: 3,
    }
}

/// One replica's shard, its source's caches handed over in memory.
fn shard(
    two: &Two,
    spec: &TrainSpec,
    round: u32,
    replica: u32,
    samples: Samples,
    start: Start<'_>,
) -> (Delta, StepsResult) {
    let spec = spec.at(Stage::Steps { round, replica, samples, start: None });
    let corpora = Corpora::open(&spec, &|name| Some(PathBuf::from(name))).unwrap();
    let mut sent: BTreeMap<String, KvCache> = BTreeMap::new();
    let mut emit = |key: &str, cache: &KvCache| {
        assert!(sent.insert(key.to_owned(), cache.clone()).is_none(), "{key} was sent twice");
        Ok(())
    };
    send_caches(&two.source, &spec, &corpora, &mut emit, &mut |_, _, _| Ok(())).unwrap();
    let mut fetch = |key: &str| {
        sent.remove(key).ok_or(ExperimentError::Packet { key: key.to_owned(), what: "nobody sent it".to_owned() })
    };
    let done = steps(&two.target, &spec, &corpora, start, &mut fetch, &|| 0.0, &mut |_, _, _| Ok(())).unwrap();
    assert!(sent.is_empty(), "every cache is used: {:?}", sent.keys());
    done
}

fn closed(spec: &TrainSpec, round: u32, start: Start<'_>, deltas: &[(Delta, u32)]) -> (Projector, RoundResult) {
    let counted = u64::from(round + 1) * 8;
    outer(&spec.at(Stage::Outer { round, counted, rounds: 3, start: None, deltas: Vec::new() }), start, deltas).unwrap()
}

/// Rounds of one replica; `between` sees the projector behind each.
fn run(two: &Two, spec: &TrainSpec, between: impl Fn(Projector) -> Projector) -> (Projector, Vec<StepsResult>) {
    let (mut current, mut results): (Option<Projector>, Vec<StepsResult>) = (None, Vec::new());
    for round in 0..3 {
        let samples = Samples { first: u64::from(round) * 8, count: 8 };
        let start = Start { previous: current.as_ref(), base: None };
        let (delta, result) = shard(two, spec, round, 0, samples, start);
        results.push(result);
        let next = closed(spec, round, start, &[(delta, 8)]).0;
        current = Some(between(next));
    }
    (current.unwrap(), results)
}

fn weights(projector: &Projector) -> &[f32] {
    projector.as_fuser().unwrap().weights()
}

#[test]
fn a_training_resumed_from_its_file_goes_on_bit_for_bit() {
    let (two, spec) = (models(), spec(|recipe| recipe.quantise = true));
    let (whole, results) = run(&two, &spec, |projector| projector);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("p.safetensors");
    let (resumed, again) = run(&two, &spec, |projector| {
        projector.save(&path).unwrap();
        Projector::load(&path).unwrap()
    });
    assert_eq!(weights_hash(weights(&whole)), weights_hash(weights(&resumed)));
    assert_eq!(results, again);
    assert_eq!(whole.as_fuser().unwrap().facts().rounds, 3);
    let steps: Vec<u64> = results.iter().flat_map(|result| &result.steps).map(|row| row.step).collect();
    assert_eq!(steps, [0, 1, 2, 3, 4, 5], "steps count on over rounds");
    let validation = results[0].validation.unwrap();
    assert!(validation.samples == 3 && validation.matched > 0.0 && validation.matched != validation.mismatched);
}

#[test]
fn training_makes_the_loss_smaller() {
    let two = models();
    let spec = spec(|recipe| {
        recipe.learning_rate = 3e-2;
        recipe.dropout = 0.0;
        recipe.schedule = Schedule::Constant;
    });
    let (_, results) = run(&two, &spec, |projector| projector);
    let matched: Vec<f64> = results.iter().map(|result| result.validation.unwrap().matched).collect();
    assert!(matched[2] < matched[0] - 0.05, "{matched:?}");
}

/// With the outer rate 1 and no momentum one replica's round is its own AdamW, whether deltas are named end weights or not.
#[test]
fn one_replica_alone_is_plain_adamw() {
    let two = models();
    let spec = spec(|_| {});
    let samples = Samples { first: 0, count: 8 };
    let (delta, _) = shard(&two, &spec, 0, 0, samples, Start::default());
    let worker::projector::fuser::delta::DeltaValues::End(end) = delta.values.clone() else {
        panic!("deltas are not rounded here")
    };
    let (projector, result) = closed(&spec, 0, Start::default(), &[(delta, 8)]);
    assert_eq!(weights(&projector), end.as_slice());
    assert_eq!((result.learning_rate, result.momentum), (1.0, 0.0));
    assert_eq!(format!("{}", blake3::Hash::from_bytes(result.weights.0).to_hex()), weights_hash(&end));
}

#[test]
fn replicas_end_in_any_order() {
    let two = models();
    let spec = spec(|recipe| {
        recipe.quantise = true;
        recipe.outer = Some((0.7, 0.9));
    });
    let ranges = [(0, 4), (4, 8), (12, 4)].map(|(first, count)| Samples { first, count });
    let deltas: Vec<(Delta, u32)> = (0..)
        .zip(ranges)
        .map(|(replica, samples)| {
            let (delta, result) = shard(&two, &spec, 0, replica, samples, Start::default());
            assert_eq!(result.validation.is_some(), replica == 0, "one replica validates");
            (Delta::from_bytes(&delta.to_bytes()).unwrap(), samples.count)
        })
        .collect();
    let mut turned = deltas.clone();
    turned.rotate_left(1);
    turned.swap(0, 1);
    let (ahead, first) = closed(&spec, 0, Start::default(), &deltas);
    let (back, second) = closed(&spec, 0, Start::default(), &turned);
    assert_eq!(weights_hash(weights(&ahead)), weights_hash(weights(&back)));
    assert_eq!(first, second);
    assert_eq!(first.samples, [4, 8, 4]);
}

#[test]
fn the_control_learns_from_other_pairs_and_both_regimes_and_losses_step() {
    let two = models();
    let samples = Samples { first: 0, count: 8 };
    let end = |spec: &TrainSpec| {
        let (delta, result) = shard(&two, spec, 0, 0, samples, Start::default());
        assert!(delta.is_finite() && result.steps.iter().all(|row| row.gradient_norm > 0.0));
        weights_hash(weights(&closed(spec, 0, Start::default(), &[(delta, 8)]).0))
    };
    let mut seen = vec![end(&spec(|_| {}))];
    seen.push(end(&spec(|recipe| recipe.pairs = Pairs::Shuffled)));
    seen.push(end(&spec(|recipe| recipe.regime = Regime::Aware)));
    seen.push(end(&spec(|recipe| recipe.loss = Loss::Distil)));
    seen.push(end(&spec(|recipe| recipe.precision = Precision::F16)));
    let count = seen.len();
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), count);
}

#[test]
fn weights_of_another_training_are_refused() {
    let two = models();
    let first = spec(|_| {});
    let samples = Samples { first: 0, count: 4 };
    let (delta, _) = shard(&two, &first, 0, 0, samples, Start::default());
    let made = closed(&first, 0, Start::default(), &[(delta, 4)]).0;
    let other = spec(|recipe| recipe.hidden = 4);
    let start = Start { previous: Some(&made), base: None };
    let stage = Stage::Outer { round: 1, counted: 8, rounds: 3, start: None, deltas: Vec::new() };
    let (stale, _) = shard(&two, &first, 0, 0, samples, Start::default());
    let refused = |spec: &TrainSpec| outer(&spec.at(stage.clone()), start, &[(stale.clone(), 4)]).unwrap_err();
    assert!(format!("{:?}", refused(&other)).contains("another recipe"));
    assert!(
        format!("{:?}", refused(&first)).contains("starts from weights"),
        "a delta from weights of the round before"
    );
}

/// A ridge projector between the two, from the same corpus.
fn ridge(two: &Two, spec: &TrainSpec) -> Projector {
    let recipe = RidgeRecipe { lambdas: vec![0.1], held_out_percent: 20 };
    let spec = TrainSpec { method: Method::Ridge(recipe), ..spec.clone() };
    let corpus = Opened::open_paths(&spec.corpus, spec.seed).unwrap();
    let samples = Samples { first: 0, count: 12 };
    let mut sent: BTreeMap<String, KvCache> = BTreeMap::new();
    let mut emit = |key: &str, cache: &KvCache| {
        sent.insert(key.to_owned(), cache.clone());
        Ok(())
    };
    make_caches(&two.source, &corpus, &samples, &mut emit, &mut |_, _, _| Ok(())).unwrap();
    let mut fetch = |key: &str| Ok(sent.remove(key).unwrap());
    let sums = statistics(&two.target, &spec, &corpus, &samples, &mut fetch, &mut |_, _, _| Ok(())).unwrap().0;
    solve(&sums, &spec).unwrap().projector
}

#[test]
fn a_fuser_starts_as_what_it_refines_and_its_file_holds_both() {
    let two = models();
    let trained = |learning_rate: f64| {
        let spec = spec(|recipe| {
            recipe.base = Some(ProjectorRef::Trained(0));
            recipe.learning_rate = learning_rate;
        });
        let base = ridge(&two, &spec);
        let start = Start { previous: None, base: Some(&base) };
        let (delta, _) = shard(&two, &spec, 0, 0, Samples { first: 0, count: 8 }, start);
        (base.clone(), closed(&spec, 0, start, &[(delta, 8)]).0)
    };
    let text = "Zoe is a baker who lives in Rome.";
    let read = |model: &Model| Reading::of_text(model.tokenizer(), text).unwrap();
    let source = read(&two.source).cache(&two.source).unwrap();
    let reading = read(&two.target);
    let alignment = Alignment::by_spans(&reading.spans, source.spans().unwrap()).unwrap();
    let own = Own::First.cache(&two.target, &reading).unwrap();
    let projected = |projector: &Projector| projector.project(&source, &alignment, &own).unwrap();
    let (base, still) = trained(0.0);
    assert_eq!(projected(&still), projected(&base), "without a step nothing is added");
    let (_, moved) = trained(1e-2);
    assert_ne!(projected(&moved), projected(&base));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("p.safetensors");
    moved.save(&path).unwrap();
    assert_eq!(projected(&Projector::load(&path).unwrap()), projected(&moved));
}
