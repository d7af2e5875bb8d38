//! Training by rounds: replicas take optimiser steps from the same weights, each on samples of its own, and one outer step makes
//! the next weights.
//!
//! A shard of steps keeps nothing for a later round, so any device can take any shard: moments start from zero each round, behind
//! a warm-up of [`WARMUP_STEPS`], and what 8 bits lose of a delta is lost. Noise and learning rates go by a sample's place in the
//! corpus, not by who steps; so the weights behind a round are a function of the spec and of how its samples were shared out.
//! The source's seat sends its cache of each sample; replica 0 also gets some that no step sees, and validates the weights that
//! the round starts from.

use half::f16;
use protocol::experiment::projector::{
    Corpus as CorpusSpec, FuserRecipe, Loss, Method, Pairs, Samples, Stage, TrainSpec,
};
use protocol::ids::ArtifactHash;
use protocol::results::{LayerGate, RoundResult, StepRow, StepsResult, Validation};

use super::train::{make_caches, sample_key};
use crate::cache::{CacheLayout, KvCache};
use crate::experiment::transfer::{Emit, Fetch, Sent};
use crate::experiment::{ExperimentError, Progress, model_facts};
use crate::model::Model;
use crate::projector::align::layers;
use crate::projector::corpus::{Corpus, CorpusError, Sample};
use crate::projector::file::{Manifest, Side};
use crate::projector::fuser::example::{Continuation, prefix};
use crate::projector::fuser::optimiser::{clip, temperature};
use crate::projector::fuser::shape::Parameter;
use crate::projector::fuser::{
    AdamW, Delta, Example, Fuser, Net, OuterRate, Prefix, Rates, StepOptions, gradient, loss, outer_step,
};
use crate::projector::reading::Reading;
use crate::projector::{FUSER, Projector, ProjectorError};

/// Steps at the start of each round that are shorter, while moments are few: the first a third of the rate, the second two.
pub const WARMUP_STEPS: u32 = 2;

/// What a shard of steps reads.
#[derive(Debug)]
pub struct Corpora {
    /// Samples to step over.
    pub training: Corpus,
    /// Samples that no step sees, the first behind those of the epoch; `None` if there are no more, or this replica need not.
    pub validation: Option<Corpus>,
}

/// Where a shard of steps starts from.
#[derive(Debug, Clone, Copy, Default)]
pub struct Start<'a> {
    /// What the round before made.
    pub previous: Option<&'a Projector>,
    /// In the first round: what the fuser refines.
    pub base: Option<&'a Projector>,
}

/// What a shard of steps is told.
#[derive(Debug, Clone, Copy)]
struct Told<'a> {
    recipe: &'a FuserRecipe,
    round: u32,
    replica: u32,
    samples: Samples,
}

impl Corpora {
    /// Opens what a shard of steps reads; `find` as in [`Corpus::open`].
    ///
    /// # Errors
    /// What is wrong with the corpus; [`ExperimentError::BadSpec`] for a spec of another stage.
    pub fn open(spec: &TrainSpec, find: &dyn Fn(&str) -> Option<std::path::PathBuf>) -> Result<Self, ExperimentError> {
        let told = told(spec)?;
        let training = Corpus::open(&spec.corpus, spec.seed, find)?;
        let more = spec.corpus.samples.saturating_add(told.recipe.validate);
        let longer = CorpusSpec { samples: more, ..spec.corpus.clone() };
        let validation = match told.replica == 0 && told.recipe.validate > 0 {
            true => match Corpus::open(&longer, spec.seed, find) {
                Ok(corpus) => Some(corpus),
                // Files may hold what is stepped over and no more.
                Err(CorpusError::Spec { .. }) => None,
                Err(error) => return Err(error.into()),
            },
            false => None,
        };
        Ok(Self { training, validation })
    }

    /// Samples to validate on, by the names of their packets.
    fn validation(&self) -> Result<Vec<(String, Sample)>, ExperimentError> {
        let Some(corpus) = &self.validation else { return Ok(Vec::new()) };
        let ids = self.training.len()..corpus.len();
        ids.map(|id| Ok((format!("validation-{id}"), corpus.sample(id)?))).collect()
    }
}

/// The source's half of a shard of steps: its cache of each sample, those of validation first.
///
/// # Errors
/// What the corpora or `emit` say, or what failed in the model.
pub fn send_caches(
    model: &Model,
    spec: &TrainSpec,
    corpora: &Corpora,
    emit: &mut Emit<'_>,
    progress: &mut Progress<'_>,
) -> Result<Sent, ExperimentError> {
    let told = told(spec)?;
    let mut sent = Sent::default();
    for (key, sample) in corpora.validation()? {
        progress(0, told.samples.count, "validation")?;
        let cache = Reading::of_sample(model.tokenizer(), &sample)?.cache(model)?;
        sent.packets += 1;
        sent.tokens += cache.len() as u64;
        emit(&key, &cache)?;
    }
    let rest = make_caches(model, &corpora.training, &told.samples, emit, progress)?;
    Ok(Sent { packets: sent.packets + rest.packets, tokens: sent.tokens + rest.tokens })
}

/// The target's half: optimiser steps over the shard's samples. `fetch` gives the source's caches; `clock` is milliseconds from
/// any start, for the result's times only.
///
/// # Errors
/// [`ExperimentError::BadSpec`] for another stage or a recipe that cannot be; what the corpora or `fetch` say; what failed in
/// the model or the fuser; a start that is of another training.
pub fn steps(
    model: &Model,
    spec: &TrainSpec,
    corpora: &Corpora,
    start: Start<'_>,
    fetch: &mut Fetch<'_>,
    clock: &dyn Fn() -> f64,
    progress: &mut Progress<'_>,
) -> Result<(Delta, StepsResult), ExperimentError> {
    let told = told(spec)?;
    let mut replica = Replica { model, spec, told, corpora, fetch, clock, ahead: None, waited_ms: 0.0 };
    let begun = clock();
    let validated = replica.validation_caches()?;
    let first = match validated.first() {
        Some((_, cache)) => cache.layout().clone(),
        None => {
            let cache = replica.source(told.samples.first)?;
            let layout = cache.layout().clone();
            replica.ahead = Some(cache);
            layout
        }
    };
    let start = started(spec, told.recipe, (first.as_ref(), model.layout()), corpora.training.hash(), start)?;
    let fuser = start.as_fuser().expect("steps start from a fuser");
    let validation = replica.validate(&start, fuser, &validated)?;
    drop(validated);
    let (weights, rows) = replica.train(&start, fuser, progress)?;
    let delta = Delta::new(told.round, told.replica, fuser.weights(), &weights, told.recipe.quantise)
        .with_training(start.manifest().clone());
    let gates = weights[weights.len() - fuser.shape().maps()..].as_chunks().0.iter().enumerate();
    let gate = |(layer, [key, value]): (usize, &[f32; 2])| LayerGate {
        layer: u32::try_from(layer).expect("layers fit 32 bits"),
        key: f64::from(*key),
        value: f64::from(*value),
    };
    let result = StepsResult {
        target: model_facts(model, &spec.target),
        round: told.round,
        replica: told.replica,
        samples: told.samples.count,
        steps: rows,
        gates: gates.map(gate).collect(),
        validation,
        parameters: weights.len() as u64,
        compute_ms: clock() - begun - replica.waited_ms,
        waited_ms: replica.waited_ms,
        delta_bytes: delta.to_bytes().len() as u64,
    };
    Ok((delta, result))
}

/// The outer step of a round: the projector from which the next one starts. Deltas come in any order, each with the samples
/// behind it.
///
/// # Errors
/// [`ExperimentError::BadSpec`] for another stage; [`ProjectorError::Outer`] for deltas that cannot be used.
pub fn outer(
    spec: &TrainSpec,
    start: Start<'_>,
    deltas: &[(Delta, u32)],
) -> Result<(Projector, RoundResult), ExperimentError> {
    let bad = |what: &str| ExperimentError::BadSpec { what: what.to_owned() };
    let (Method::Fuser(recipe), Stage::Outer { round, counted, rounds, .. }) = (&spec.method, &spec.stage) else {
        return Err(bad("an outer step is a fuser's"));
    };
    let training = deltas.iter().find_map(|(delta, _)| delta.header.training.as_ref());
    let training = training.ok_or_else(|| bad("no delta says what it was trained on"))?;
    let (manifest, fuser) = match start.previous {
        Some(previous) => (previous.manifest().clone(), of_training(previous, recipe)?.clone()),
        None => (training.clone(), Fuser::start(training, recipe, start.base, spec.seed)?),
    };
    let rate = match recipe.outer {
        Some((learning_rate, momentum)) => OuterRate { learning_rate, momentum },
        None => OuterRate::planned(*rounds),
    };
    let mut step = outer_step(fuser.weights(), fuser.momentum(), deltas, rate).map_err(ProjectorError::from)?;
    if recipe.quantise {
        // What replicas start from has 16 bits; the checkpoint is the same to the bit, so that their deltas are of it.
        step.weights.iter_mut().for_each(|weight| *weight = f16::from_f32(*weight).to_f32());
    }
    let mut behind: Vec<_> = deltas.iter().map(|(delta, samples)| (delta.header.replica, *samples)).collect();
    behind.sort_unstable();
    let result = RoundResult {
        round: *round,
        samples: behind.into_iter().map(|(_, samples)| samples).collect(),
        counted: *counted,
        learning_rate: rate.learning_rate,
        momentum: rate.momentum,
        delta_norm: step.delta_norm,
        delta_bytes: deltas.iter().map(|(delta, _)| delta.to_bytes().len() as u64).sum(),
        weights: ArtifactHash(crate::projector::fuser::delta::weights_digest(&step.weights)),
    };
    let fuser = fuser.stepped(step);
    let manifest = fuser.manifest(&manifest, *counted);
    Ok((Projector::fuser(manifest, fuser)?, result))
}

/// What steps start from: the round's weights before, or untrained ones.
fn started(
    spec: &TrainSpec,
    recipe: &FuserRecipe,
    (source, target): (&CacheLayout, &CacheLayout),
    corpus: &str,
    start: Start<'_>,
) -> Result<Projector, ExperimentError> {
    if let Some(previous) = start.previous {
        previous.manifest().accept(source, target)?;
        of_training(previous, recipe)?;
        return Ok(previous.clone());
    }
    let training = Manifest {
        method: FUSER.to_owned(),
        source: Side::of(source),
        target: Side::of(target),
        layers: layers(&spec.layers, source, target)?,
        corpus: corpus.to_owned(),
        recipe: serde_json::Value::Null,
        samples: 0,
    };
    let fuser = Fuser::start(&training, recipe, start.base, spec.seed)?;
    let manifest = fuser.manifest(&training, 0);
    Ok(Projector::fuser(manifest, fuser)?)
}

/// The fuser of a projector that this recipe made.
fn of_training<'a>(projector: &'a Projector, recipe: &FuserRecipe) -> Result<&'a Fuser, ProjectorError> {
    let wrong = |what: &str| ProjectorError::Fuser { what: what.to_owned() };
    let fuser = projector.as_fuser().ok_or_else(|| wrong("a round starts from a fuser, not from another projector"))?;
    if fuser.facts().recipe != *recipe {
        return Err(wrong("the round's weights were trained by another recipe"));
    }
    Ok(fuser)
}

fn told(spec: &TrainSpec) -> Result<Told<'_>, ExperimentError> {
    let bad = |what: &str| Err(ExperimentError::BadSpec { what: what.to_owned() });
    let (Method::Fuser(recipe), Stage::Steps { round, replica, samples, .. }) = (&spec.method, &spec.stage) else {
        return bad("steps are a fuser's");
    };
    if samples.count == 0 || recipe.batch == 0 || recipe.micro_batch == 0 {
        return bad("a round takes samples, and a batch holds some");
    }
    if !(0.0..1.0).contains(&recipe.dropout) || recipe.temperature_end <= 0.0 {
        return bad("dropout is below 1 and a temperature above 0");
    }
    Ok(Told { recipe, round: *round, replica: *replica, samples: *samples })
}

/// A shard of steps at work.
struct Replica<'a, 'f> {
    model: &'a Model,
    spec: &'a TrainSpec,
    told: Told<'a>,
    corpora: &'a Corpora,
    fetch: &'a mut Fetch<'f>,
    clock: &'a dyn Fn() -> f64,
    /// The first sample's cache, if it came before it was stepped over.
    ahead: Option<KvCache>,
    waited_ms: f64,
}

impl Replica<'_, '_> {
    fn fetch(&mut self, key: &str) -> Result<KvCache, ExperimentError> {
        let begun = (self.clock)();
        let cache = (self.fetch)(key)?;
        self.waited_ms += (self.clock)() - begun;
        Ok(cache)
    }

    fn source(&mut self, place: u64) -> Result<KvCache, ExperimentError> {
        match self.ahead.take() {
            Some(cache) => Ok(cache),
            None => self.fetch(&sample_key(place)),
        }
    }

    fn validation_caches(&mut self) -> Result<Vec<(Sample, KvCache)>, ExperimentError> {
        let samples = self.corpora.validation()?;
        samples.into_iter().map(|(key, sample)| Ok((sample, self.fetch(&key)?))).collect()
    }

    /// Mean loss of the answers' tokens with each sample's own cache, and with the next one's.
    fn validate(
        &self,
        start: &Projector,
        fuser: &Fuser,
        caches: &[(Sample, KvCache)],
    ) -> Result<Option<Validation>, ExperimentError> {
        if caches.is_empty() {
            return Ok(None);
        }
        let mut examples = Vec::new();
        for (sample, source) in caches {
            examples.push(self.example(start, fuser, sample.id, sample, source, Loss::NextToken)?);
        }
        let device = self.model.device();
        let (net, _) = Net::new(*fuser.shape(), fuser.weights(), self.told.recipe.precision, device, false)
            .map_err(crate::model::ModelError::from)?;
        let mean = |examples: &[Example]| loss(self.model, &net, fuser.shape(), examples, device);
        let matched = mean(&examples)?;
        shift(&mut examples);
        let samples = u32::try_from(examples.len()).expect("samples fit 32 bits");
        Ok(Some(Validation { samples, matched, mismatched: mean(&examples)? }))
    }

    fn example(
        &self,
        start: &Projector,
        fuser: &Fuser,
        place: u64,
        sample: &Sample,
        source: &KvCache,
        loss: Loss,
    ) -> Result<Example, ExperimentError> {
        let reading = Reading::of_sample(self.model.tokenizer(), sample)?;
        let suffix = Continuation::new(self.model, sample, loss)?.suffix(self.model, &reading, loss)?;
        let prefix = prefix(self.model, fuser, start.manifest(), &reading, source)?;
        Ok(Example { place, prefix, suffix })
    }

    /// Steps over all samples; the weights behind the last.
    fn train(
        &mut self,
        start: &Projector,
        fuser: &Fuser,
        progress: &mut Progress<'_>,
    ) -> Result<(Vec<f32>, Vec<StepRow>), ExperimentError> {
        let Told { recipe, samples, .. } = self.told;
        let batch = u64::from(recipe.batch);
        let total = self.spec.samples().div_ceil(batch);
        let rates = Rates { peak: recipe.learning_rate, warmup: recipe.warmup, schedule: recipe.schedule, total };
        let shape = fuser.shape();
        let matrices = shape.parameters_in_order().into_iter().filter(Parameter::is_matrix).map(|part| part.range);
        let mut adam = AdamW::new(shape.parameters(), recipe.weight_decay, matrices.collect());
        let mut weights = fuser.weights().to_vec();
        let (mut rows, mut last) = (Vec::new(), None);
        let places = samples.first..samples.first + u64::from(samples.count);
        for (local, first) in (0_u32..).zip(places.clone().step_by(recipe.batch as usize)) {
            let done = u32::try_from(first - samples.first).expect("samples of a round fit 32 bits");
            progress(done, samples.count, &format!("step {}", local + 1))?;
            let mut examples = Vec::new();
            for place in first..(first + batch).min(places.end) {
                let (sample, source) = (self.corpora.training.at(place)?, self.source(place)?);
                examples.push(self.example(start, fuser, place, &sample, &source, recipe.loss)?);
            }
            if recipe.pairs == Pairs::Shuffled {
                last = Some(shuffle(&mut examples, last)?);
            }
            let step = first / batch;
            let options = StepOptions {
                precision: recipe.precision,
                checkpointing: recipe.checkpointing,
                micro_batch: recipe.micro_batch as usize,
                dropout: recipe.dropout,
                temperature: temperature(recipe.temperature_end, step, total),
                seed: self.spec.seed,
                device: self.model.device().clone(),
            };
            let mut gradient = gradient(self.model, shape, &weights, &examples, &options)?;
            let gradient_norm = clip(&mut gradient.values, recipe.clip);
            let warm = f64::from((local + 1).min(WARMUP_STEPS + 1)) / f64::from(WARMUP_STEPS + 1);
            let learning_rate = rates.at(step) * warm;
            adam.step(&mut weights, &gradient.values, learning_rate);
            let sample = first + examples.len() as u64;
            let (loss, temperature) = (gradient.loss, options.temperature);
            rows.push(StepRow { step, sample, loss, learning_rate, gradient_norm, temperature });
        }
        progress(samples.count, samples.count, "done")?;
        Ok((weights, rows))
    }
}

/// Gives each example the prefix of the one before, the first that of the last.
fn shift(examples: &mut [Example]) {
    for place in 1..examples.len() {
        let (before, after) = examples.split_at_mut(place);
        std::mem::swap(&mut before[place - 1].prefix, &mut after[0].prefix);
    }
}

/// The control: prefixes go to other samples of the batch. A batch of one takes the prefix of the batch before. Returns a prefix
/// for a next batch of one.
fn shuffle(examples: &mut [Example], before: Option<Prefix>) -> Result<Prefix, ExperimentError> {
    if let [only] = examples {
        let what = "a control needs batches of two samples or more".to_owned();
        let before = before.ok_or(ExperimentError::BadSpec { what })?;
        return Ok(std::mem::replace(&mut only.prefix, before));
    }
    shift(examples);
    Ok(examples[0].prefix.clone())
}
