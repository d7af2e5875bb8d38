//! How a projector is trained: what is solved for or stepped over, and with which numbers.

use serde::{Deserialize, Serialize};

use super::ProjectorRef;

/// What is trained, and how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// One matrix a layer, in closed form.
    Ridge(RidgeRecipe),
    /// C2C's fuser, by gradient descent.
    Fuser(Box<FuserRecipe>),
}

/// How a ridge projector is solved for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RidgeRecipe {
    /// Regularisations tried, in units of standardised features; the best on held-out samples is taken, layer by layer.
    pub lambdas: Vec<f64>,
    /// Part of the samples' groups (an entity never lies on both sides) held out to choose by, percent, 5–50.
    pub held_out_percent: u32,
}

/// How a fuser is trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FuserRecipe {
    /// Who has read what.
    pub regime: Regime,
    /// Width h of its hidden layers.
    pub hidden: u32,
    /// Layers m, 3 or more.
    pub depth: u32,
    /// The projector whose output it refines; `None`: from the target's neutral cache.
    pub base: Option<ProjectorRef>,
    /// Trained on the pairs as they are, or as a control.
    pub pairs: Pairs,
    /// What is made small.
    pub loss: Loss,
    /// Passes over the corpus, 1 or more.
    pub epochs: u32,
    /// Samples of an optimiser step.
    pub batch: u32,
    /// Samples of a pass; gradients of several are added up to a batch.
    pub micro_batch: u32,
    /// Largest learning rate.
    pub learning_rate: f64,
    /// Share of the steps that it takes to get there, 0–1.
    pub warmup: f64,
    /// How it goes down from there.
    pub schedule: Schedule,
    /// AdamW's decay, of matrices.
    pub weight_decay: f64,
    /// Longest gradient, L2; 0: any.
    pub clip: f64,
    /// Probability that a number is dropped, 0–1.
    pub dropout: f64,
    /// Logit that gates start from; above 0 they are open in use.
    pub gate_start: f64,
    /// Temperature of the gates at the end, from 1 at the start.
    pub temperature_end: f64,
    /// Format of the fuser's products; weights, moments and sums stay f32.
    pub precision: Precision,
    /// Activations are computed again on the way back rather than kept.
    pub checkpointing: bool,
    /// Optimiser steps of a typical replica between two outer steps, 1–256.
    pub local_steps: u32,
    /// How many of them the others do.
    #[serde(default)]
    pub shares: Shares,
    /// Deltas are sent as int8 in blocks of 256; otherwise as f32.
    pub quantise: bool,
    /// Learning rate and momentum of the outer step; `None`: by the number of rounds.
    pub outer: Option<(f64, f64)>,
    /// Samples on which weights are validated at the start of each round, with the right and with another sample's cache.
    pub validate: u32,
}

/// How the steps of a round are shared out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shares {
    /// In proportion to measured speed, so that unequal devices end together.
    #[default]
    Speed,
    /// Equally, for comparison.
    Equal,
}

/// Who has read the text that the source's cache is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Regime {
    /// Only the source.
    Unaware,
    /// Both, as published.
    Aware,
}

/// Which source cache goes with which target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pairs {
    /// Those of the same sample.
    Matched,
    /// Those of another sample: the control.
    Shuffled,
}

/// What training makes small.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Loss {
    /// Cross-entropy of the continuation's tokens, as published.
    NextToken,
    /// Cross-entropy to what the target itself predicts with its native cache.
    Distil,
}

/// How the learning rate goes down after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// It does not.
    Constant,
    /// To 0 in a straight line.
    Linear,
    /// To 0 along half a cosine.
    Cosine,
}

/// Number format of a product's operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// 32 bits.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half; losses are scaled.
    F16,
}
