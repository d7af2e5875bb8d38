//! From the results of a run to what its projectors' trainings and evaluations came to.
//!
//! Tiers stay apart: a projector that reads places it was trained on has shown nothing about others. Does not know how rows
//! are shown.

use std::collections::BTreeMap;

use protocol::experiment::ShardSpec;
use protocol::experiment::projector::{EvalSpec, Method, Projected, Stage, Tier, TrainSpec};
use protocol::results::{
    EvalItem, EvalResult, LayerFit, LayerGate, ModelFacts, RidgeResult, RoundResult, ShardResult, StepRow, StepsResult,
    Validation,
};
use serde::{Deserialize, Serialize};

use super::stats::{Mean, Proportion};
use crate::api::{RunResults, ShardResults};

/// One training, all its committed parts together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainingSummary {
    /// `ridge`, `fuser of width 64`.
    pub method: String,
    /// The source's name.
    pub source: String,
    /// The target's name.
    pub target: String,
    /// Samples of all epochs.
    pub samples: u64,
    /// Samples whose shard has committed.
    pub counted: u64,
    /// Trained numbers; 0 while nothing has told.
    pub parameters: u64,
    /// Ridge: how well each layer is predicted.
    pub ridge: Option<RidgeResult>,
    /// Fuser: rounds of which anything has committed.
    pub rounds: Vec<RoundSummary>,
    /// Gates after the newest steps, by layer.
    pub gates: Vec<LayerGate>,
    /// The models of the target seats.
    pub models: Vec<ModelFacts>,
}

/// One round of a fuser's training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RoundSummary {
    /// From 0.
    pub round: u32,
    /// Each replica's steps, by replica.
    pub replicas: Vec<ReplicaSummary>,
    /// The weights that it began with, on samples that no step sees.
    pub validation: Option<Validation>,
    /// Its outer step.
    pub outer: Option<RoundResult>,
}

/// A replica's local steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReplicaSummary {
    /// From 0.
    pub replica: u32,
    /// Where its target sat.
    pub device: String,
    /// Samples stepped over.
    pub samples: u32,
    /// The steps.
    pub steps: Vec<StepRow>,
    /// Gates after the last of them.
    pub gates: Vec<LayerGate>,
    /// From its start to its result, milliseconds.
    pub wall_ms: u64,
    /// Time in steps, milliseconds.
    pub compute_ms: f64,
    /// Time waiting for the source's caches, milliseconds.
    pub waited_ms: f64,
    /// Bytes of its delta.
    pub delta_bytes: u64,
}

/// One projector's evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvaluationSummary {
    /// The source.
    pub source: ModelFacts,
    /// The target.
    pub target: ModelFacts,
    /// `ridge`, `fuser`.
    pub method: String,
    /// Trained numbers of the projector.
    pub parameters: u64,
    /// What each tier came to.
    pub tiers: Vec<TierSummary>,
}

/// One tier of an evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TierSummary {
    /// The tier.
    pub tier: Tier,
    /// Different facts.
    pub facts: u32,
    /// Candidate answers of the constrained choice.
    pub candidates: u32,
    /// One row a condition, in the order of the sweep.
    pub conditions: Vec<EvaluationRow>,
    /// Mean R² over shards, a target layer a row.
    pub layers: Vec<LayerFit>,
}

/// All items of a tier under one condition.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvaluationRow {
    /// What the target was given.
    pub condition: Projected,
    /// The right answer is the most probable candidate: the identity test.
    pub choice: Proportion,
    /// The completion names the injected answer.
    pub injected: Proportion,
    /// The question prompt's answer ends before it begins.
    pub stalled: Proportion,
    /// The answer of the cache's own subject is chosen; `None` where it is the right answer anyway.
    pub packet_choice: Option<Proportion>,
    /// KL(native ‖ condition), nats. `None` if not one is finite.
    pub kl: Option<Mean>,
    /// From the source's text to the target's first logit, milliseconds, mean.
    pub latency_ms: f64,
    /// Bytes from source to target, mean.
    pub bytes: f64,
}

impl TrainingSummary {
    /// Every optimiser step in the order of samples.
    pub fn steps(&self) -> Vec<StepRow> {
        let replicas = self.rounds.iter().flat_map(|round| &round.replicas);
        let mut steps: Vec<StepRow> = replicas.flat_map(|replica| replica.steps.iter().copied()).collect();
        steps.sort_by_key(|row| (row.sample, row.step));
        steps
    }

    /// Samples that lay behind the weights with which each round began, and their losses.
    pub fn validations(&self) -> Vec<(u64, Validation)> {
        let mut counted = 0;
        let mut all = Vec::new();
        for round in &self.rounds {
            all.extend(round.validation.map(|validation| (counted, validation)));
            counted += round.replicas.iter().map(|replica| u64::from(replica.samples)).sum::<u64>();
        }
        all
    }

    /// The newest loss: the mean over the last round's replicas of their last step.
    pub fn newest_loss(&self) -> Option<f64> {
        let last = self.rounds.iter().rev().find(|round| !round.replicas.is_empty())?;
        let losses: Vec<f64> = last.replicas.iter().filter_map(|replica| Some(replica.steps.last()?.loss)).collect();
        (!losses.is_empty()).then(|| losses.iter().sum::<f64>() / losses.len() as f64)
    }

    /// Gates that are open, and gates.
    pub fn gates_open(&self) -> (usize, usize) {
        (gates_open(&self.gates), 2 * self.gates.len())
    }

    /// Bytes that went between replicas and outer steps: deltas up, f32 weights down. Beside it what an all-reduce of f32
    /// gradients would have moved, 8 bytes a parameter, a replica and a step.
    pub fn bytes_sent(&self) -> (u64, u64) {
        let replicas = || self.rounds.iter().flat_map(|round| &round.replicas);
        let up: u64 = replicas().map(|replica| replica.delta_bytes).sum();
        let down = 4 * self.parameters * replicas().count() as u64;
        let steps: u64 = replicas().map(|replica| replica.steps.len() as u64).sum();
        (up + down, 8 * self.parameters * steps)
    }
}

impl EvaluationSummary {
    /// The tier of this name.
    pub fn tier(&self, tier: Tier) -> Option<&TierSummary> {
        self.tiers.iter().find(|summary| summary.tier == tier)
    }
}

impl TierSummary {
    /// The row of a condition.
    pub fn row(&self, condition: Projected) -> Option<&EvaluationRow> {
        self.conditions.iter().find(|row| row.condition == condition)
    }

    /// Share of right choices of who guesses.
    pub fn chance(&self) -> f64 {
        1.0 / f64::from(self.candidates.max(1))
    }

    /// Whether the projected cache beats `control` with separate 95 % intervals; `None` if one of them was not asked for.
    pub fn beats(&self, control: Projected) -> Option<bool> {
        let (own, control) = (self.row(Projected::Projected)?, self.row(control)?);
        Some(own.choice.low > control.choice.high)
    }
}

/// Gates that are open in use.
pub fn gates_open(gates: &[LayerGate]) -> usize {
    gates.iter().flat_map(|gate| [gate.key, gate.value]).filter(|logit| *logit > 0.0).count()
}

/// Every training of a run, in the order of its shards.
pub(super) fn trainings(results: &RunResults) -> Vec<TrainingSummary> {
    let mut found: Vec<(TrainSpec, TrainingSummary)> = Vec::new();
    for shard in &results.shards {
        let ShardSpec::ProjectorTrain(spec) = &shard.spec else { continue };
        // Parts of one training differ in their stage alone.
        let whole = spec.at(Stage::Whole { shards: 0 });
        let at = found.iter().position(|(known, _)| *known == whole).unwrap_or_else(|| {
            let summary = empty(spec);
            found.push((whole, summary));
            found.len() - 1
        });
        take_part(&mut found[at].1, spec, shard);
    }
    found.into_iter().map(|(_, summary)| summary).collect()
}

fn empty(spec: &TrainSpec) -> TrainingSummary {
    let method = match &spec.method {
        Method::Ridge(_) => "ridge".to_owned(),
        Method::Fuser(recipe) => format!("fuser of width {}", recipe.hidden),
    };
    TrainingSummary {
        method,
        source: spec.source.clone(),
        target: spec.target.clone(),
        samples: spec.samples(),
        counted: 0,
        parameters: 0,
        ridge: None,
        rounds: Vec::new(),
        gates: Vec::new(),
        models: Vec::new(),
    }
}

fn take_part(summary: &mut TrainingSummary, spec: &TrainSpec, shard: &ShardResults) {
    summary.counted += spec.stage.samples().map_or(0, |samples| u64::from(samples.count));
    for seat in &shard.seats {
        match &seat.result {
            Some(ShardResult::ProjectorStatistics(result)) => note_model(summary, &result.target),
            Some(ShardResult::ProjectorRidge(result)) => {
                summary.parameters = result.parameters;
                summary.ridge = Some(result.clone());
            }
            Some(ShardResult::ProjectorSteps(result)) => {
                note_model(summary, &result.target);
                summary.parameters = result.parameters;
                summary.gates.clone_from(&result.gates);
                let round = round_mut(&mut summary.rounds, result.round);
                round.validation = round.validation.or(result.validation);
                round.replicas.push(replica(result, seat.device.to_string(), seat.wall_ms));
                round.replicas.sort_by_key(|replica| replica.replica);
            }
            Some(ShardResult::ProjectorRound(result)) => {
                round_mut(&mut summary.rounds, result.round).outer = Some(result.clone());
            }
            _ => {}
        }
    }
}

fn note_model(summary: &mut TrainingSummary, model: &ModelFacts) {
    if !summary.models.contains(model) {
        summary.models.push(model.clone());
    }
}

fn replica(result: &StepsResult, device: String, wall_ms: u64) -> ReplicaSummary {
    ReplicaSummary {
        replica: result.replica,
        device,
        samples: result.samples,
        steps: result.steps.clone(),
        gates: result.gates.clone(),
        wall_ms,
        compute_ms: result.compute_ms,
        waited_ms: result.waited_ms,
        delta_bytes: result.delta_bytes,
    }
}

fn round_mut(rounds: &mut Vec<RoundSummary>, number: u32) -> &mut RoundSummary {
    let at = rounds.partition_point(|round| round.round < number);
    if rounds.get(at).is_none_or(|round| round.round != number) {
        let (replicas, validation, outer) = (Vec::new(), None, None);
        rounds.insert(at, RoundSummary { round: number, replicas, validation, outer });
    }
    &mut rounds[at]
}

/// Every evaluation of a run, in the order of its shards.
pub(super) fn evaluations(results: &RunResults) -> Vec<EvaluationSummary> {
    let mut groups: Vec<Group<'_>> = Vec::new();
    for shard in &results.shards {
        let ShardSpec::ProjectorEval(spec) = &shard.spec else { continue };
        let result = shard.seats.iter().find_map(|seat| match &seat.result {
            Some(ShardResult::ProjectorEval(result)) => Some(&**result),
            _ => None,
        });
        let Some(result) = result else { continue };
        let same = |group: &Group<'_>| {
            let asked =
                |spec: &EvalSpec| (spec.projector.clone(), spec.shuffled.clone(), spec.seed, spec.answer_tokens);
            (&group.result.source, &group.result.target) == (&result.source, &result.target)
                && asked(group.spec) == asked(spec)
        };
        let at = groups.iter().position(same).unwrap_or_else(|| {
            groups.push(Group { spec, result, tiers: BTreeMap::new() });
            groups.len() - 1
        });
        groups[at].tiers.entry(spec.tier).or_default().push(result);
    }
    groups.into_iter().map(Group::finish).collect()
}

struct Group<'a> {
    spec: &'a EvalSpec,
    result: &'a EvalResult,
    tiers: BTreeMap<Tier, Vec<&'a EvalResult>>,
}

impl Group<'_> {
    fn finish(self) -> EvaluationSummary {
        let seed = self.spec.seed;
        EvaluationSummary {
            source: self.result.source.clone(),
            target: self.result.target.clone(),
            method: self.result.method.clone(),
            parameters: self.result.parameters,
            tiers: self.tiers.iter().map(|(tier, results)| tier_summary(*tier, results, seed)).collect(),
        }
    }
}

fn tier_summary(tier: Tier, results: &[&EvalResult], seed: u64) -> TierSummary {
    // By condition and fact: two shards that ask the same of the same fact are one item.
    let mut items: BTreeMap<(Projected, u32), &EvalItem> = BTreeMap::new();
    let mut order = Vec::new();
    for item in results.iter().flat_map(|result| &result.items) {
        if !order.contains(&item.condition) {
            order.push(item.condition);
        }
        items.entry((item.condition, item.fact)).or_insert(item);
    }
    let mut facts: Vec<u32> = items.keys().map(|(_, fact)| *fact).collect();
    facts.sort_unstable();
    facts.dedup();
    let row = |condition: &Projected| {
        let of: Vec<&EvalItem> = items.range((*condition, 0)..=(*condition, u32::MAX)).map(|(_, item)| *item).collect();
        evaluation_row(*condition, &of, seed)
    };
    TierSummary {
        tier,
        facts: u32::try_from(facts.len()).unwrap_or(u32::MAX),
        candidates: results.first().map_or(0, |result| u32::try_from(result.candidates.len()).unwrap_or(u32::MAX)),
        conditions: order.iter().map(row).collect(),
        layers: mean_fits(results),
    }
}

fn evaluation_row(condition: Projected, items: &[&EvalItem], seed: u64) -> EvaluationRow {
    let kl: Vec<f64> = items.iter().map(|item| item.kl).filter(|kl| kl.is_finite()).collect();
    let foreign = items.iter().any(|item| item.packet_answer != item.answer);
    let mean = |of: fn(&EvalItem) -> f64| items.iter().map(|item| of(item)).sum::<f64>() / items.len().max(1) as f64;
    EvaluationRow {
        condition,
        choice: Proportion::of(items, |item| item.choice == item.answer),
        injected: Proportion::of(items, |item| item.injected),
        stalled: Proportion::of(items, |item| item.stalled),
        packet_choice: foreign.then(|| Proportion::of(items, |item| item.choice == item.packet_answer)),
        kl: Mean::of(&kl, seed),
        latency_ms: mean(|item| item.latency_ms),
        bytes: mean(|item| item.bytes as f64),
    }
}

fn mean_fits(results: &[&EvalResult]) -> Vec<LayerFit> {
    let mut layers: BTreeMap<u32, (LayerFit, f64)> = BTreeMap::new();
    for fit in results.iter().flat_map(|result| &result.layers) {
        let sum = layers.entry(fit.layer).or_insert_with(|| {
            let zero = LayerFit { r2_key: 0.0, r2_value: 0.0, ..fit.clone() };
            (zero, 0.0)
        });
        sum.0.r2_key += fit.r2_key;
        sum.0.r2_value += fit.r2_value;
        sum.1 += 1.0;
    }
    let mean =
        |(fit, count): (LayerFit, f64)| LayerFit { r2_key: fit.r2_key / count, r2_value: fit.r2_value / count, ..fit };
    layers.into_values().map(mean).collect()
}
