//! What experiments measure: the JSON in the results store. Field names are the columns of tables and reports.
//!
//! Every number states its unit in its name or its doc. Additive: a field is never renamed or given another meaning.

use serde::{Deserialize, Serialize};

use crate::experiment::Condition;

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
