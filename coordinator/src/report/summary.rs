//! From the results of a run to the rows of tables and plots.
//!
//! Does not know how rows are shown: `page.rs` and the command line do.

use std::collections::BTreeMap;

use protocol::experiment::{Condition, LayerSelection, ShardSpec, Spread, TransferSpec};
use protocol::results::{LayerProfile, ModelFacts, ShardResult, TransferItem, TransferResult};
use serde::{Deserialize, Serialize};

use super::projector::{self, EvaluationSummary, TrainingSummary};
use super::stats::{Mean, Proportion};
use crate::api::{RunResults, SeatResult, ShardResults};

/// Largest difference of a logit that is rounding and nothing else, for an injected cache at its own positions in f32.
pub const ROUNDING_LOGIT_MAX: f64 = 1e-4;

/// What a run measured, by kind.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Summary {
    /// One entry a committed shard of kind `inspect`.
    pub inspections: Vec<Inspection>,
    /// Shards of kind `transfer` that asked the same of the same model, taken together.
    pub transfers: Vec<Transfer>,
    /// Trainings of projectors.
    #[serde(default)]
    pub trainings: Vec<TrainingSummary>,
    /// Evaluations of projectors.
    #[serde(default)]
    pub evaluations: Vec<EvaluationSummary>,
    /// Results that could not be read: shard, seat and why.
    pub unreadable: Vec<String>,
}

/// A shard of kind `inspect`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Inspection {
    /// The shard.
    pub shard: String,
    /// The model.
    pub model: ModelFacts,
    /// Layers asked for.
    pub layers: LayerSelection,
    /// Number of texts prefilled.
    pub texts: u32,
    /// Tokens in all texts.
    pub tokens: u64,
    /// Bytes a token, measured.
    pub bytes_per_token_measured: f64,
    /// Bytes a token, by the formula.
    pub bytes_per_token_formula: u64,
    /// Largest difference of a logit after saving and loading.
    pub reload_logit_max_abs: f64,
    /// Largest difference of a cached value between two computations.
    pub recompute_max_abs: f64,
    /// Mean over the layers: length of a key, of a value; effective rank (entropy) of keys, of values. `None` of no layers.
    pub means: Option<LayerMeans>,
    /// The layers.
    pub profile: Vec<LayerProfile>,
}

/// Means over the layers of an inspection.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LayerMeans {
    /// Norm of keys.
    pub key_norm: f64,
    /// Norm of values.
    pub value_norm: f64,
    /// Effective rank of keys (entropy).
    pub key_rank: f64,
    /// Effective rank of values (entropy).
    pub value_rank: f64,
    /// Norm of the first key over the median of the others.
    pub key_sink: f64,
}

/// Shards of kind `transfer` of the same model, seats, seed and answer length.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Transfer {
    /// The model.
    pub model: ModelFacts,
    /// Where the seats were to sit.
    pub spread: Spread,
    /// Seed of facts and noise.
    pub seed: u64,
    /// Shards taken together.
    pub shards: u32,
    /// Different facts.
    pub facts: u32,
    /// Candidate answers of the constrained choice.
    pub candidates: u32,
    /// Shards whose two seats sat on different workers: their caches crossed the network.
    pub across_workers: u32,
    /// Packets that the sources sent.
    pub packets: u32,
    /// Their bytes.
    pub packet_bytes: u64,
    /// One row a condition, in the order of the sweep.
    pub conditions: Vec<ConditionRow>,
    /// What was generated for the first facts, under every condition.
    pub samples: Vec<TransferItem>,
}

/// All items under one condition.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ConditionRow {
    /// As a sweep writes it.
    pub condition: String,
    /// The generated text names the right answer.
    pub exact: Proportion,
    /// The right answer is the most probable candidate.
    pub choice: Proportion,
    /// The answer of the packet's own subject is the most probable candidate; `None` where it is the right answer anyway.
    pub packet_choice: Option<Proportion>,
    /// Mean probability of the right answer among the candidates.
    pub p_answer: f64,
    /// KL(oracle ‖ condition), nats. `None` if not one is finite.
    pub kl: Option<Mean>,
    /// Largest difference of a logit to the oracle's, over all items.
    pub logit_max_abs: f64,
    /// Answers that ended before they began.
    pub stalled: u32,
}

/// Facts whose texts are shown.
const SAMPLE_FACTS: usize = 3;

impl Summary {
    /// Reads the committed shards of a run.
    pub fn of(results: &RunResults) -> Self {
        let mut summary = Self::default();
        let mut groups: Vec<Group<'_>> = Vec::new();
        for shard in &results.shards {
            for seat in &shard.seats {
                if let Some(why) = &seat.unreadable {
                    summary.unreadable.push(format!("{} {}: {why}", shard.id, seat.role));
                }
            }
            match &shard.spec {
                ShardSpec::Inspect(spec) => summary.inspections.extend(inspection(shard, spec.layers)),
                ShardSpec::Transfer(spec) => add_to_group(&mut groups, shard, spec),
                // Their results are the researcher's own files.
                ShardSpec::Command(_) | ShardSpec::NoOp(_) => {}
                // Taken together below.
                ShardSpec::ProjectorTrain(_) | ShardSpec::ProjectorEval(_) => {}
            }
        }
        summary.transfers = groups.into_iter().map(Group::finish).collect();
        summary.trainings = projector::trainings(results);
        summary.evaluations = projector::evaluations(results);
        summary
    }

    /// Every model that computed, by name.
    pub fn models(&self) -> BTreeMap<&str, &ModelFacts> {
        let inspected = self.inspections.iter().map(|inspection| &inspection.model);
        let transferred = self.transfers.iter().map(|transfer| &transfer.model);
        let trained = self.trainings.iter().flat_map(|training| &training.models);
        let evaluated = self.evaluations.iter().flat_map(|evaluation| [&evaluation.source, &evaluation.target]);
        inspected.chain(transferred).chain(trained).chain(evaluated).map(|model| (model.name.as_str(), model)).collect()
    }

    /// The layers of each model by index: of inspections of all layers first, completed by those of some.
    pub fn profiles(&self) -> BTreeMap<&str, BTreeMap<u32, &LayerProfile>> {
        let mut profiles: BTreeMap<&str, BTreeMap<u32, &LayerProfile>> = BTreeMap::new();
        let whole_first =
            |whole: bool| self.inspections.iter().filter(move |one| (one.layers == LayerSelection::All) == whole);
        for inspection in whole_first(true).chain(whole_first(false)) {
            let layers = profiles.entry(&inspection.model.name).or_default();
            for profile in &inspection.profile {
                layers.entry(profile.layer).or_insert(profile);
            }
        }
        profiles
    }
}

impl Transfer {
    /// The row of a condition.
    pub fn row(&self, condition: Condition) -> Option<&ConditionRow> {
        let name = condition.to_string();
        self.conditions.iter().find(|row| row.condition == name)
    }

    /// Whether the injected cache computes what the text computes; `None` if the sweep did not ask.
    pub fn injected_equals_text(&self) -> Option<bool> {
        self.row(Condition::Injected).map(|row| row.logit_max_abs <= ROUNDING_LOGIT_MAX)
    }
}

fn inspection(shard: &ShardResults, layers: LayerSelection) -> Option<Inspection> {
    let result = shard.seats.iter().find_map(|seat| match &seat.result {
        Some(ShardResult::Inspect(result)) => Some(result),
        _ => None,
    })?;
    let profile = &result.profile;
    let mean = |value: fn(&LayerProfile) -> f64| profile.iter().map(value).sum::<f64>() / profile.len() as f64;
    let means = (!profile.is_empty()).then(|| LayerMeans {
        key_norm: mean(|layer| layer.key.norm_mean),
        value_norm: mean(|layer| layer.value.norm_mean),
        key_rank: mean(|layer| layer.key.rank.entropy),
        value_rank: mean(|layer| layer.value.rank.entropy),
        key_sink: mean(|layer| layer.key.sink_ratio),
    });
    Some(Inspection {
        shard: shard.id.to_string(),
        model: result.model.clone(),
        layers,
        texts: result.texts,
        tokens: result.tokens,
        bytes_per_token_measured: result.bytes_per_token_measured,
        bytes_per_token_formula: result.bytes_per_token_formula,
        reload_logit_max_abs: result.reload_logit_max_abs,
        recompute_max_abs: result.recompute_max_abs,
        means,
        profile: profile.clone(),
    })
}

/// Transfers that may be counted together.
struct Group<'a> {
    spec: &'a TransferSpec,
    result: &'a TransferResult,
    shards: u32,
    across_workers: u32,
    packets: u32,
    packet_bytes: u64,
    /// By condition and fact: two shards that ask the same of the same fact are one item.
    items: BTreeMap<(Condition, u32), &'a TransferItem>,
    /// In order of first appearance.
    order: Vec<Condition>,
}

fn add_to_group<'a>(groups: &mut Vec<Group<'a>>, shard: &'a ShardResults, spec: &'a TransferSpec) {
    let target = shard.seats.iter().find_map(|seat| match &seat.result {
        Some(ShardResult::Transfer(result)) => Some(result),
        _ => None,
    });
    let Some(result) = target else { return };
    let same = |group: &Group<'_>| {
        group.result.model == result.model
            && (group.spec.spread, group.spec.seed, group.spec.answer_tokens)
                == (spec.spread, spec.seed, spec.answer_tokens)
    };
    let at = groups.iter().position(same).unwrap_or_else(|| {
        groups.push(Group::new(spec, result));
        groups.len() - 1
    });
    groups[at].add(result, &shard.seats);
}

impl<'a> Group<'a> {
    fn new(spec: &'a TransferSpec, result: &'a TransferResult) -> Self {
        Self {
            spec,
            result,
            shards: 0,
            across_workers: 0,
            packets: 0,
            packet_bytes: 0,
            items: BTreeMap::new(),
            order: Vec::new(),
        }
    }

    fn add(&mut self, result: &'a TransferResult, seats: &[SeatResult]) {
        self.shards += 1;
        let mut workers: Vec<_> = seats.iter().map(|seat| seat.device.worker).collect();
        workers.sort_unstable();
        workers.dedup();
        self.across_workers += u32::from(workers.len() > 1);
        for seat in seats {
            if let Some(ShardResult::TransferSource(source)) = &seat.result {
                self.packets += source.packets;
                self.packet_bytes += source.bytes;
            }
        }
        for item in &result.items {
            if !self.order.contains(&item.condition) {
                self.order.push(item.condition);
            }
            self.items.entry((item.condition, item.fact)).or_insert(item);
        }
    }

    fn finish(self) -> Transfer {
        let mut facts: Vec<u32> = self.items.keys().map(|(_, fact)| *fact).collect();
        facts.sort_unstable();
        facts.dedup();
        let conditions = self.order.iter().map(|condition| self.row(*condition)).collect();
        let samples = facts
            .iter()
            .take(SAMPLE_FACTS)
            .flat_map(|fact| self.order.iter().filter_map(|condition| self.items.get(&(*condition, *fact))))
            .map(|item| (*item).clone())
            .collect();
        Transfer {
            model: self.result.model.clone(),
            spread: self.spec.spread,
            seed: self.spec.seed,
            shards: self.shards,
            facts: u32::try_from(facts.len()).unwrap_or(u32::MAX),
            candidates: u32::try_from(self.result.candidates.len()).unwrap_or(u32::MAX),
            across_workers: self.across_workers,
            packets: self.packets,
            packet_bytes: self.packet_bytes,
            conditions,
            samples,
        }
    }

    fn row(&self, condition: Condition) -> ConditionRow {
        let items: Vec<&TransferItem> =
            self.items.range((condition, 0)..=(condition, u32::MAX)).map(|(_, item)| *item).collect();
        let kl: Vec<f64> = items.iter().map(|item| item.kl).filter(|kl| kl.is_finite()).collect();
        let foreign = items.iter().any(|item| item.packet_answer != item.answer);
        ConditionRow {
            condition: condition.to_string(),
            exact: Proportion::of(&items, |item| item.exact),
            choice: Proportion::of(&items, |item| item.choice == item.answer),
            packet_choice: foreign.then(|| Proportion::of(&items, |item| item.choice == item.packet_answer)),
            p_answer: items.iter().map(|item| item.p_answer).sum::<f64>() / items.len().max(1) as f64,
            kl: Mean::of(&kl, self.spec.seed),
            logit_max_abs: items.iter().map(|item| item.logit_max_abs).fold(0.0, f64::max),
            stalled: items.iter().map(|item| u32::from(item.stalled)).sum(),
        }
    }
}
