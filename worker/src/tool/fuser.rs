//! `projector fuse`: a fuser trained in one process that holds both models, round by round as the cluster does it with one
//! replica. JSON on stdout, a line a round on stderr.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use protocol::experiment::Spread;
use protocol::experiment::projector::{
    FuserRecipe, LayerMap, Loss, Method, Pairs, Precision, ProjectorRef, Regime, Samples, Schedule, Stage, TrainSpec,
};
use serde::de::DeserializeOwned;
use serde_json::json;

use super::args::{ToolError, print_json};
use super::projector::{CorpusArgs, PairArgs};
use crate::cache::KvCache;
use crate::experiment::ExperimentError;
use crate::experiment::projector::rounds::{Corpora, Start, outer, send_caches, steps};
use crate::model::Model;
use crate::projector::Projector;

/// `projector fuse`.
#[derive(Debug, Args)]
pub struct FuseArgs {
    /// Which models.
    #[command(flatten)]
    pub pair: PairArgs,
    /// The ridge projector to refine [default: none, from the target's neutral cache].
    #[arg(long, value_name = "FILE")]
    pub base: Option<PathBuf>,
    /// Go on from this fuser instead, for as many rounds as are left.
    #[arg(long, value_name = "FILE")]
    pub resume: Option<PathBuf>,
    /// Samples of an epoch.
    #[arg(long, default_value_t = 512, value_name = "N")]
    pub samples: u32,
    /// Passes over them.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub epochs: u32,
    /// What both read.
    #[command(flatten)]
    pub corpus: CorpusArgs,
    /// Nearest source layers for each target layer.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub layers: u32,
    /// Hidden width.
    #[arg(long, default_value_t = 128, value_name = "H")]
    pub hidden: u32,
    /// Layers, 3 or more.
    #[arg(long, default_value_t = 3, value_name = "M")]
    pub depth: u32,
    /// `next-token` or `distil`.
    #[arg(long, default_value = "distil", value_parser = named::<Loss>)]
    pub loss: Loss,
    /// `unaware` or `aware`.
    #[arg(long, default_value = "unaware", value_parser = named::<Regime>)]
    pub regime: Regime,
    /// Train the control on shuffled pairs.
    #[arg(long)]
    pub control: bool,
    /// Samples of an optimiser step.
    #[arg(long, default_value_t = 8, value_name = "N")]
    pub batch: u32,
    /// Samples whose activations are held at a time.
    #[arg(long, default_value_t = 8, value_name = "N")]
    pub micro_batch: u32,
    /// Largest learning rate.
    #[arg(long, default_value_t = 1e-3)]
    pub rate: f64,
    /// Share of the steps that it takes to get there.
    #[arg(long, default_value_t = 0.1)]
    pub warmup: f64,
    /// `constant`, `linear` or `cosine`.
    #[arg(long, default_value = "linear", value_parser = named::<Schedule>)]
    pub schedule: Schedule,
    /// Probability that a number is dropped.
    #[arg(long, default_value_t = 0.1)]
    pub dropout: f64,
    /// Logit that gates start from.
    #[arg(long, default_value_t = 1.0)]
    pub gate: f64,
    /// Temperature of the gates at the end.
    #[arg(long, default_value_t = 0.05)]
    pub temperature_end: f64,
    /// `f32`, `bf16` or `f16`: format of the fuser's products.
    #[arg(long, default_value = "f32", value_parser = named::<Precision>)]
    pub products: Precision,
    /// Compute activations again on the way back.
    #[arg(long)]
    pub checkpointing: bool,
    /// Optimiser steps of a round.
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub local_steps: u32,
    /// Round deltas to 8 bits.
    #[arg(long)]
    pub quantise: bool,
    /// Samples to validate on before each round.
    #[arg(long, default_value_t = 16, value_name = "N")]
    pub validate: u32,
    /// Where the projector goes.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
}

/// A value as specs spell it.
fn named<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_value(text.into()).map_err(|error| error.to_string())
}

impl FuseArgs {
    fn recipe(&self) -> FuserRecipe {
        FuserRecipe {
            regime: self.regime,
            hidden: self.hidden,
            depth: self.depth,
            // It is at hand already.
            base: self.base.as_ref().map(|_| ProjectorRef::Trained(0)),
            pairs: if self.control { Pairs::Shuffled } else { Pairs::Matched },
            loss: self.loss,
            epochs: self.epochs,
            batch: self.batch,
            micro_batch: self.micro_batch,
            learning_rate: self.rate,
            warmup: self.warmup,
            schedule: self.schedule,
            weight_decay: 0.01,
            clip: 1.0,
            dropout: self.dropout,
            gate_start: self.gate,
            temperature_end: self.temperature_end,
            precision: self.products,
            checkpointing: self.checkpointing,
            local_steps: self.local_steps,
            shares: protocol::experiment::projector::Shares::Speed,
            quantise: self.quantise,
            outer: None,
            validate: self.validate,
        }
    }

    fn spec(&self) -> Result<TrainSpec, ToolError> {
        Ok(TrainSpec {
            source: self.pair.source.clone(),
            target: self.pair.target.clone(),
            corpus: self.corpus.spec(self.samples)?,
            layers: LayerMap::Proportional(self.layers),
            method: Method::Fuser(Box::new(self.recipe())),
            stage: Stage::Whole { shards: 1 },
            spread: Spread::Any,
            seed: self.pair.seed,
        })
    }
}

/// Trains, round by round.
///
/// # Errors
/// If a model or file cannot be read, or the training fails.
#[expect(clippy::print_stderr, reason = "progress of a command line")]
pub fn fuse(args: &FuseArgs) -> Result<(), ToolError> {
    let spec = args.spec()?;
    let load = |path: &PathBuf| Projector::load(path).map_err(ExperimentError::from);
    let base = args.base.as_ref().map(load).transpose()?;
    let mut current = args.resume.as_ref().map(load).transpose()?;
    let (source, target) = args.pair.load()?;
    let round_samples = args.local_steps.max(1) * args.batch.max(1);
    let rounds = u32::try_from(spec.samples().div_ceil(u64::from(round_samples))).unwrap_or(u32::MAX);
    let first = current.as_ref().and_then(Projector::as_fuser).map_or(0, |fuser| fuser.facts().rounds);
    let (started, mut results) = (Instant::now(), Vec::new());
    let clock = || started.elapsed().as_secs_f64() * 1e3;
    for round in first..rounds {
        let begin = u64::from(round) * u64::from(round_samples);
        let count = u32::try_from((spec.samples() - begin).min(u64::from(round_samples))).expect("a round's samples");
        let samples = Samples { first: begin, count };
        let spec = spec.at(Stage::Steps { round, replica: 0, samples, start: None });
        let corpora = Corpora::open(&spec, &|name| Some(PathBuf::from(name)))?;
        let mut caches = sent(&source, &spec, &corpora)?;
        let mut fetch = |key: &str| {
            let what = "it was asked for twice".to_owned();
            caches.remove(key).ok_or(ExperimentError::Packet { key: key.to_owned(), what })
        };
        let start = Start { previous: current.as_ref(), base: base.as_ref() };
        let (delta, result) = steps(&target, &spec, &corpora, start, &mut fetch, &clock, &mut |_, _, _| Ok(()))?;
        let outer_stage =
            Stage::Outer { round, counted: begin + u64::from(count), rounds, start: None, deltas: Vec::new() };
        let (next, closed) = outer(&spec.at(outer_stage), start, &[(delta, count)])?;
        next.save(&args.out).map_err(ExperimentError::from)?;
        let loss =
            |rows: &[protocol::results::StepRow]| rows.iter().map(|row| row.loss).sum::<f64>() / rows.len() as f64;
        let quarter = result.steps.len().div_ceil(4);
        eprintln!(
            "round {round} of {rounds}: loss {:.4} to {:.4}, before it {:?}, {:.1} s",
            loss(&result.steps[..quarter]),
            loss(&result.steps[result.steps.len() - quarter..]),
            result.validation.map(|validation| (validation.matched, validation.mismatched)),
            result.compute_ms / 1e3,
        );
        results.push(json!({ "steps": result, "outer": closed }));
        current = Some(next);
    }
    print_json(&json!({
        "rounds": results,
        "seconds": started.elapsed().as_secs_f64(),
        "peak_bytes": crate::memory::peak_bytes(),
    }))
}

/// The source's caches of a shard, by name.
fn sent(source: &Model, spec: &TrainSpec, corpora: &Corpora) -> Result<BTreeMap<String, KvCache>, ExperimentError> {
    let mut caches = BTreeMap::new();
    let mut emit = |key: &str, cache: &KvCache| {
        caches.insert(key.to_owned(), cache.clone());
        Ok(())
    };
    send_caches(source, spec, corpora, &mut emit, &mut |_, _, _| Ok(()))?;
    Ok(caches)
}
