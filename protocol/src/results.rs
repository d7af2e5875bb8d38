//! What experiments measure: the JSON in the results store. Field names are the columns of tables and reports.
//!
//! Every number states its unit in its name or its doc. Additive: a field is never renamed or given another meaning.

use serde::{Deserialize, Serialize};

use crate::experiment::Condition;
use crate::experiment::projector::{Projected, Tier};
use crate::ids::ArtifactHash;

/// What a shard's artifact `result.json` holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShardResult {
    /// Of kind `inspect`.
    Inspect(InspectResult),
    /// Of kind `transfer`, written by the target.
    Transfer(TransferResult),
    /// Of kind `transfer`, written by the source: what was sent.
    TransferSource(TransferSourceResult),
    /// Written by the source of any part of a projector's training or evaluation: what was sent.
    ProjectorSource(TransferSourceResult),
    /// Of kind `projector-train`: sums over samples.
    ProjectorStatistics(StatisticsResult),
    /// Of kind `projector-train`: a ridge projector.
    ProjectorRidge(RidgeResult),
    /// Of kind `projector-train`: local steps of a replica.
    ProjectorSteps(StepsResult),
    /// Of kind `projector-train`: the outer step of a round.
    ProjectorRound(RoundResult),
    /// Of kind `projector-eval`, written by the target.
    ProjectorEval(Box<EvalResult>),
}

/// Which model computed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelFacts {
    /// Catalogue name.
    pub name: String,
    /// `sha256:` and the digest of the weights' file.
    pub fingerprint: String,
    /// Architecture as the file names it: `llama`, `gemma3`.
    pub architecture: String,
    /// Number of layers.
    pub layers: u32,
    /// Key-value heads a layer.
    pub kv_heads: u32,
    /// Width of a head.
    pub head_dim: u32,
}

/// Cache inspection: shape and statistics.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InspectResult {
    /// The model.
    pub model: ModelFacts,
    /// Number of texts prefilled.
    pub texts: u32,
    /// Tokens in all texts.
    pub tokens: u64,
    /// Bytes of the caches' storage divided by tokens, f32, over the layers reported.
    pub bytes_per_token_measured: f64,
    /// 2 × layers × kv_heads × head_dim × 4, over the layers reported.
    pub bytes_per_token_formula: u64,
    /// Largest difference of a next-token logit after the caches were saved and loaded; 0 if the round trip is bit-exact.
    pub reload_logit_max_abs: f64,
    /// Largest difference of any cached value between two computations of the same text; 0 if bit-exact.
    pub recompute_max_abs: f64,
    /// One profile a reported layer.
    pub profile: Vec<LayerProfile>,
}

/// Statistics of one layer's keys and values, averaged over texts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerProfile {
    /// Index from 0.
    pub layer: u32,
    /// Positions that a query of this layer can see at most; `None`: all.
    pub sliding_window: Option<u32>,
    /// Shape of keys and of values, `[H, T, D]`, of the first text.
    pub shape: [u32; 3],
    /// Of the keys, before RoPE.
    pub key: TensorStats,
    /// Of the values.
    pub value: TensorStats,
}

/// Statistics of one tensor `[H, T, D]`. Norms and ranks leave the first token (the attention sink) out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TensorStats {
    /// Mean over heads and tokens of a vector's L2 norm.
    pub norm_mean: f64,
    /// Standard deviation of the same.
    pub norm_sd: f64,
    /// L2 norm of the first token's vectors over the median of the others.
    pub sink_ratio: f64,
    /// Mean of all elements.
    pub mean: f64,
    /// Standard deviation of all elements.
    pub sd: f64,
    /// Excess kurtosis of all elements.
    pub kurtosis: f64,
    /// Effective rank of the matrix `[T - 1, H × D]`, on the same number of tokens for every text.
    pub rank: EffectiveRank,
}

/// Four measures that the literature calls effective rank, of singular values s (λ = s²). All are at most min(tokens, width).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EffectiveRank {
    /// Tokens used.
    pub tokens: u32,
    /// Number of largest λ that hold 90 % of their sum.
    pub energy_90: f64,
    /// exp of the entropy of s / Σ s (Roy and Vetterli 2007).
    pub entropy: f64,
    /// (Σ λ)² / Σ λ².
    pub participation: f64,
    /// Σ λ / max λ.
    pub stable: f64,
}

/// What the source of a transfer sent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TransferSourceResult {
    /// The model.
    pub model: ModelFacts,
    /// Packets sent.
    pub packets: u32,
    /// Their bytes.
    pub bytes: u64,
    /// Tokens in them.
    pub tokens: u64,
    /// Time spent in prefill and generation, milliseconds.
    pub compute_ms: f64,
}

/// What the target of a transfer measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TransferResult {
    /// The model.
    pub model: ModelFacts,
    /// Candidate answers of the constrained choice.
    pub candidates: Vec<String>,
    /// One row a fact and condition.
    pub items: Vec<TransferItem>,
}

/// One fact under one condition.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TransferItem {
    /// Index of the fact.
    pub fact: u32,
    /// What the target was given.
    pub condition: Condition,
    /// The source's text.
    pub context: String,
    /// What the target was asked.
    pub question: String,
    /// The right answer.
    pub answer: String,
    /// The answer that the packet's own subject would give; differs from `answer` under `other-subject` only.
    pub packet_answer: String,
    /// The candidate with the largest probability.
    pub choice: String,
    /// Probability of the right answer among the candidates.
    pub p_answer: f64,
    /// The generated text names the right answer.
    pub exact: bool,
    /// KL(oracle ‖ condition) of the next-token distribution at the answer's position, nats.
    pub kl: f64,
    /// Largest difference of a logit to the oracle's.
    pub logit_max_abs: f64,
    /// The first token generated ends the text.
    pub stalled: bool,
    /// What was generated, greedy.
    pub generated: String,
}

/// Sums over samples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StatisticsResult {
    /// The target.
    pub target: ModelFacts,
    /// Samples read.
    pub samples: u32,
    /// Target tokens that became rows of the sums.
    pub rows: u64,
    /// Those of them that were held out.
    pub rows_held_out: u64,
}

/// A ridge projector.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RidgeResult {
    /// `sha256:…` of the source's weights.
    pub source: String,
    /// `sha256:…` of the target's weights.
    pub target: String,
    /// Rows in all parts.
    pub rows: u64,
    /// Numbers in it.
    pub parameters: u64,
    /// One fit a target layer.
    pub layers: Vec<LayerFit>,
}

/// How well one layer is predicted, on samples that were held out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerFit {
    /// Target layer from 0.
    pub layer: u32,
    /// Source layers that it is made from.
    pub sources: Vec<u32>,
    /// Regularisation taken for keys; 0 where nothing was chosen.
    pub lambda_key: f64,
    /// The same for values.
    pub lambda_value: f64,
    /// 1 - residual / total variance of un-rotated keys, over all channels.
    pub r2_key: f64,
    /// The same of values.
    pub r2_value: f64,
}

/// Local steps of a replica.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepsResult {
    /// The target.
    pub target: ModelFacts,
    /// Round, from 0.
    pub round: u32,
    /// Replica, from 0.
    pub replica: u32,
    /// Samples stepped over.
    pub samples: u32,
    /// One row an optimiser step.
    pub steps: Vec<StepRow>,
    /// Gates after the last step, a layer a row.
    pub gates: Vec<LayerGate>,
    /// The weights that the round started from, on samples that no step sees.
    pub validation: Option<Validation>,
    /// Trained numbers.
    pub parameters: u64,
    /// Time in steps, without waiting for caches, milliseconds.
    pub compute_ms: f64,
    /// Time waiting for caches of the source, milliseconds.
    pub waited_ms: f64,
    /// Bytes of the delta.
    pub delta_bytes: u64,
}

/// One optimiser step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StepRow {
    /// Number over all rounds, as if each round's steps were taken by one replica, from 0.
    pub step: u64,
    /// Samples seen by all replicas of earlier rounds and by this one.
    pub sample: u64,
    /// Mean loss over the batch's scored tokens, nats.
    pub loss: f64,
    /// Learning rate.
    pub learning_rate: f64,
    /// L2 norm of the gradient before it was clipped.
    pub gradient_norm: f64,
    /// Temperature of the gates.
    pub temperature: f64,
}

/// Gates of one target layer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LayerGate {
    /// Target layer from 0.
    pub layer: u32,
    /// Logit of the keys' gate; above 0 it is open.
    pub key: f64,
    /// Logit of the values' gate.
    pub value: f64,
}

/// Losses on samples that no step sees, nats a token.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// Samples.
    pub samples: u32,
    /// With the sample's own source cache.
    pub matched: f64,
    /// With another sample's: what the text around the answer alone is worth.
    pub mismatched: f64,
}

/// The outer step of a round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RoundResult {
    /// Round, from 0.
    pub round: u32,
    /// Samples behind each delta, by replica.
    pub samples: Vec<u32>,
    /// Samples of all rounds so far.
    pub counted: u64,
    /// Outer learning rate.
    pub learning_rate: f64,
    /// Outer momentum.
    pub momentum: f64,
    /// L2 norm of the mean pseudo-gradient.
    pub delta_norm: f64,
    /// Bytes of all deltas.
    pub delta_bytes: u64,
    /// BLAKE3 of the new weights' numbers.
    pub weights: ArtifactHash,
}

/// What a projector carries.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalResult {
    /// The source.
    pub source: ModelFacts,
    /// The target.
    pub target: ModelFacts,
    /// `ridge`, `fuser`.
    pub method: String,
    /// Trained numbers of the projector.
    pub parameters: u64,
    /// How hard the facts are.
    pub tier: Tier,
    /// Candidate answers of the constrained choice.
    pub candidates: Vec<String>,
    /// One row a fact and condition.
    pub items: Vec<EvalItem>,
    /// One fit a target layer, on these facts.
    pub layers: Vec<LayerFit>,
}

/// One fact under one condition.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalItem {
    /// Index of the fact.
    pub fact: u32,
    /// What the target was given.
    pub condition: Projected,
    /// The source's text.
    pub context: String,
    /// What the target was asked.
    pub question: String,
    /// The right answer.
    pub answer: String,
    /// The answer that the cache's own subject would give; differs from `answer` under `mismatched` only.
    pub packet_answer: String,
    /// The candidate with the largest probability.
    pub choice: String,
    /// Probability of the right answer among the candidates.
    pub p_answer: f64,
    /// KL(native ‖ condition) of the next-token distribution at the answer's position, nats.
    pub kl: f64,
    /// What was generated behind the completion prompt, greedy.
    pub generated: String,
    /// The completion names the answer that was injected: `packet_answer`. Otherwise it is parametric.
    pub injected: bool,
    /// What was generated behind the question prompt, greedy.
    pub question_generated: String,
    /// The first token behind the question prompt ends the text.
    pub stalled: bool,
    /// Bytes that went from source to target for this item; 0 where nothing did.
    pub bytes: u64,
    /// From the source's text to the target's first logit, milliseconds, without the way over the link.
    pub latency_ms: f64,
}
