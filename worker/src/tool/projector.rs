//! `projector …`: a whole training, or an evaluation, in one process that holds both models. JSON on stdout, progress on stderr.
//!
//! The same procedures as the cluster's shards, with caches handed over in memory.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Args, Subcommand};
use protocol::experiment::Spread;
use protocol::experiment::projector::{
    Corpus as CorpusSpec, CorpusText, Couriers, EvalSpec, LayerMap, Method, Projected, ProjectorRef, RidgeRecipe,
    Samples, Stage, Tier, TrainSpec,
};
use serde_json::json;

use super::args::{KvArg, ModelArgs, PrecisionArg, ToolError, print_json};
use crate::cache::KvCache;
use crate::experiment::ExperimentError;
use crate::experiment::projector::eval::{score, send_facts};
use crate::experiment::projector::train::{make_caches, solve, statistics};
use crate::model::Model;
use crate::projector::Projector;
use crate::projector::corpus::{Corpus, places};
use crate::projector::ridge::statistics::Statistics;
use crate::support::ElementType;

/// Steps between two lines on stderr.
const SAID_EACH: u32 = 16;

/// `projector …`.
#[derive(Debug, Subcommand)]
pub enum ProjectorCommand {
    /// Train a ridge projector on made-up sentences or on files, and its control on shuffled pairs.
    Train(Box<TrainArgs>),
    /// Train a fuser by gradient descent through the target, from a ridge projector or from nothing.
    Fuse(Box<super::fuser::FuseArgs>),
    /// Measure what a projector carries, under every condition.
    Eval(Box<EvalArgs>),
}

/// The two models.
#[derive(Debug, Args)]
pub struct PairArgs {
    /// The model whose caches come in: a file, a directory, or a name as in sweeps.
    #[arg(long, value_name = "MODEL")]
    pub source: String,
    /// The model that continues with them.
    #[arg(long, value_name = "MODEL")]
    pub target: String,
    /// Models directory [default: `$BONEPILE_MODELS`, else the user's cache].
    #[arg(long, value_name = "DIR")]
    pub models: Option<PathBuf>,
    /// How weights are held and multiplied.
    #[arg(long, value_enum, default_value_t = PrecisionArg::Stored)]
    pub precision: PrecisionArg,
    /// Compute threads [default: all cores].
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Seed of sentences and their order; of facts.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// What both models read.
#[derive(Debug, Args)]
pub struct CorpusArgs {
    /// Files to read instead of made-up sentences: .txt, .jsonl.
    #[arg(long, value_name = "FILE")]
    pub text: Vec<PathBuf>,
    /// Different places in made-up sentences.
    #[arg(long, default_value_t = 32, value_name = "N")]
    pub values: u32,
    /// Different persons in them.
    #[arg(long, default_value_t = 96, value_name = "N")]
    pub names: u32,
    /// Different wordings of them.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub wordings: u32,
    /// Percentage of sentences with two persons.
    #[arg(long, default_value_t = 0, value_name = "P")]
    pub pairs: u32,
}

/// `projector train`.
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// Which models.
    #[command(flatten)]
    pub pair: PairArgs,
    /// Samples.
    #[arg(long, default_value_t = 256, value_name = "N")]
    pub samples: u32,
    /// What both read.
    #[command(flatten)]
    pub corpus: CorpusArgs,
    /// Source layers for each target layer: `last-aligned`, or how many nearest by relative depth.
    #[arg(long, default_value = "1", value_name = "MAP")]
    pub layers: String,
    /// Regularisations to choose among.
    #[arg(long, value_delimiter = ',', default_values_t = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0])]
    pub lambdas: Vec<f64>,
    /// Percentage of groups held out to choose by.
    #[arg(long, default_value_t = 20, value_name = "P")]
    pub held_out: u32,
    /// Shards that the sums are made in, to be added up.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub shards: u32,
    /// Where the projector goes.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Where its control goes, trained on shuffled pairs.
    #[arg(long, value_name = "FILE")]
    pub shuffled: Option<PathBuf>,
}

/// `projector eval`.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// Which models.
    #[command(flatten)]
    pub pair: PairArgs,
    /// The projector.
    #[arg(long, value_name = "FILE")]
    pub projector: PathBuf,
    /// Its control.
    #[arg(long, value_name = "FILE")]
    pub shuffled: Option<PathBuf>,
    /// `seen`, `unseen`, `binding`; given several times, several [default: all].
    #[arg(long)]
    pub tier: Vec<Tier>,
    /// Facts of each tier.
    #[arg(long, default_value_t = 32, value_name = "N")]
    pub facts: u32,
    /// Conditions [default: all that there are projectors for].
    #[arg(long, value_delimiter = ',')]
    pub conditions: Vec<Projected>,
    /// Longest answer, tokens.
    #[arg(long, default_value_t = 4, value_name = "N")]
    pub answer_tokens: u32,
}

impl ProjectorCommand {
    /// Does it; says on stderr what went wrong.
    pub fn run_to_exit(&self) -> ExitCode {
        let done = match self {
            Self::Train(args) => train(args),
            Self::Fuse(args) => super::fuser::fuse(args),
            Self::Eval(args) => eval(args),
        };
        super::exit_code(done)
    }
}

impl PairArgs {
    /// Source and target.
    pub(super) fn load(&self) -> Result<(Model, Model), ToolError> {
        let load = |name: &String, threads| {
            let args = ModelArgs {
                model: name.clone(),
                models: self.models.clone(),
                precision: self.precision,
                kv: KvArg::F32,
                threads,
                device: None,
                elements: ElementType::F32,
            };
            args.load()
        };
        Ok((load(&self.source, self.threads)?, load(&self.target, None)?))
    }
}

impl CorpusArgs {
    /// So many samples of it, as specs have it.
    pub(super) fn spec(&self, samples: u32) -> std::io::Result<CorpusSpec> {
        let text = match self.text.is_empty() {
            true => CorpusText::Couriers(Couriers {
                values: self.values,
                names: self.names,
                wordings: self.wordings,
                pairs_percent: self.pairs,
            }),
            false => {
                let whole = |path: &PathBuf| Ok(std::path::absolute(path)?.to_string_lossy().into_owned());
                CorpusText::Files(self.text.iter().map(whole).collect::<std::io::Result<_>>()?)
            }
        };
        Ok(CorpusSpec { text, samples })
    }
}

impl TrainArgs {
    fn spec(&self) -> Result<TrainSpec, ToolError> {
        let layers = match self.layers.as_str() {
            "last-aligned" => LayerMap::LastAligned,
            count => LayerMap::Proportional(
                count
                    .parse()
                    .map_err(|_| ToolError::Request(format!("--layers {count}: expected last-aligned or a number")))?,
            ),
        };
        Ok(TrainSpec {
            source: self.pair.source.clone(),
            target: self.pair.target.clone(),
            corpus: self.corpus.spec(self.samples)?,
            layers,
            method: Method::Ridge(RidgeRecipe { lambdas: self.lambdas.clone(), held_out_percent: self.held_out }),
            stage: Stage::Whole { shards: self.shards },
            spread: Spread::Any,
            seed: self.pair.seed,
        })
    }
}

fn train(args: &TrainArgs) -> Result<(), ToolError> {
    let spec = args.spec()?;
    let corpus = Corpus::open_paths(&spec.corpus, spec.seed).map_err(ExperimentError::from)?;
    let (source, target) = args.pair.load()?;
    let started = Instant::now();
    let mut source_s = 0.0;
    let mut parts = Vec::new();
    for samples in shards(args.samples, args.shards) {
        let mut next = places(&samples);
        let mut fetch = |_: &str| {
            let began = Instant::now();
            let here = Samples { first: next.next().expect("samples are asked for in order"), count: 1 };
            let mut sent = None;
            let mut emit = |_: &str, cache: &KvCache| {
                sent = Some(cache.clone());
                Ok(())
            };
            make_caches(&source, &corpus, &here, &mut emit, &mut |_, _, _| Ok(()))?;
            source_s += began.elapsed().as_secs_f64();
            Ok(sent.expect("one sample is one cache"))
        };
        parts.push(statistics(&target, &spec, &corpus, &samples, &mut fetch, &mut watch("sums".to_owned()))?.0);
    }
    let sums_s = started.elapsed().as_secs_f64();
    let began = Instant::now();
    let sums = Statistics::merge(parts).map_err(ExperimentError::from)?;
    let solved = solve(&sums, &spec).map_err(ExperimentError::from)?;
    let solve_s = began.elapsed().as_secs_f64();
    let bytes = solved.projector.save(&args.out).map_err(ExperimentError::from)?;
    if let Some(path) = &args.shuffled {
        solved.shuffled.save(path).map_err(ExperimentError::from)?;
    }
    print_json(&json!({
        "result": solved.result,
        "rows_held_out": sums.rows_held_out(),
        "bytes": bytes,
        "source_s": source_s,
        "target_and_sums_s": sums_s - source_s,
        "solve_s": solve_s,
    }))
}

/// A line on stderr now and then.
fn watch(what: String) -> impl FnMut(u32, u32, &str) -> Result<(), ExperimentError> {
    let mut last = None;
    move |done, _, note| {
        if last != Some(done) && done.is_multiple_of(SAID_EACH) {
            tracing::info!("{what}: {note}");
        }
        last = Some(done);
        Ok(())
    }
}

/// Whole samples, as equal as can be.
fn shards(samples: u32, shards: u32) -> Vec<Samples> {
    let shards = shards.clamp(1, samples);
    let cut = |index: u32| u64::from(samples) * u64::from(index) / u64::from(shards);
    let range = |index: u32| {
        let count = u32::try_from(cut(index + 1) - cut(index)).expect("a part of 32 bits");
        Samples { first: cut(index), count }
    };
    (0..shards).map(range).collect()
}

fn eval(args: &EvalArgs) -> Result<(), ToolError> {
    let projector = Projector::load(&args.projector).map_err(ExperimentError::from)?;
    let shuffled = args.shuffled.as_deref().map(Projector::load).transpose().map_err(ExperimentError::from)?;
    let (source, target) = args.pair.load()?;
    let mut conditions = args.conditions.clone();
    if conditions.is_empty() {
        conditions = Projected::ALL.to_vec();
        conditions.retain(|condition| *condition != Projected::Shuffled || shuffled.is_some());
    }
    let tiers = if args.tier.is_empty() { Tier::ALL.to_vec() } else { args.tier.clone() };
    let mut results = Vec::new();
    for tier in tiers {
        let spec = EvalSpec {
            source: args.pair.source.clone(),
            target: args.pair.target.clone(),
            // It is at hand already.
            projector: ProjectorRef::Trained(0),
            shuffled: None,
            tier,
            first_fact: 0,
            facts: args.facts,
            conditions: conditions.clone(),
            answer_tokens: args.answer_tokens,
            spread: Spread::Any,
            seed: args.pair.seed,
        };
        let mut sent = std::collections::BTreeMap::new();
        let mut emit = |key: &str, cache: &KvCache| {
            sent.insert(key.to_owned(), cache.clone());
            Ok(())
        };
        send_facts(&source, &spec, &mut emit, &mut watch(format!("{tier}, source")))?;
        let mut fetch = |key: &str| {
            sent.remove(key).ok_or(ExperimentError::Packet { key: key.to_owned(), what: "asked for twice".to_owned() })
        };
        let mut said = watch(format!("{tier}, target"));
        results.push(score(&target, &spec, (&projector, shuffled.as_ref()), &mut fetch, &mut said)?);
    }
    print_json(&serde_json::to_value(results).expect("results are plain data"))
}
