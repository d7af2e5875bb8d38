//! Seats of projectors' training and evaluation: which procedure each is, what it reads and what it leaves behind.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use protocol::control::Output;
use protocol::experiment::projector::{
    BASE, DELTA, EvalSpec, PROJECTOR, SHUFFLED, START, STATISTICS, Stage, TrainSpec, stored_file,
};
use protocol::ids::Role;
use protocol::results::ShardResult;

use super::desk::{Desk, Emitted, on_disk};
use crate::cache::KvCache;
use crate::experiment::projector::eval::{score, send_facts};
use crate::experiment::projector::rounds::{Corpora, Start, outer, send_caches, steps};
use crate::experiment::projector::train::{make_caches, solve, statistics};
use crate::experiment::{ExperimentError, model_facts};
use crate::model::Model;
use crate::projector::corpus::Corpus;
use crate::projector::fuser::Delta;
use crate::projector::ridge::statistics::Statistics;
use crate::projector::{Projector, ProjectorError};

/// What a seat made: its result, and files by the names of artifacts.
pub(super) struct Made {
    pub(super) result: ShardResult,
    pub(super) files: Vec<(String, PathBuf)>,
}

/// A seat of a training.
pub(super) fn train<W: Write>(
    desk: &Desk<'_, W>,
    model: Option<&Model>,
    spec: &TrainSpec,
    role: Role,
) -> Result<Made, ExperimentError> {
    match (&spec.stage, role, model) {
        (Stage::Statistics(samples), Role::Source, Some(model)) => {
            let corpus = corpus(desk, spec)?;
            sent(desk, model, &spec.source, |emit| {
                make_caches(model, &corpus, samples, emit, &mut desk.watch()).map(drop)
            })
        }
        (Stage::Statistics(samples), Role::Target, Some(model)) => {
            let corpus = corpus(desk, spec)?;
            let mut fetch = |key: &str| desk.fetch_foreign(key);
            let (sums, result) = statistics(model, spec, &corpus, samples, &mut fetch, &mut desk.watch())?;
            let path = desk.place(STATISTICS);
            sums.save(&path)?;
            Ok(Made { result: ShardResult::ProjectorStatistics(result), files: vec![(STATISTICS.to_owned(), path)] })
        }
        (Stage::Solve { parts }, Role::Main, None) => {
            let names = (0..parts.len()).map(|index| format!("{index}-{STATISTICS}"));
            let mut sum: Option<Statistics> = None;
            // Two at a time are in memory; the order is the spec's, by first sample.
            for (done, name) in (0u32..).zip(names) {
                desk.progress(done, 0, "adding up")?;
                let part = Statistics::load(needed(desk, &name)?)?;
                sum = Some(Statistics::merge(sum.into_iter().chain([part]).collect())?);
            }
            desk.progress(0, 0, "solving")?;
            let sum = sum.ok_or_else(|| ExperimentError::BadSpec { what: "a solution of no parts".to_owned() })?;
            let solved = solve(&sum, spec)?;
            let files = [(PROJECTOR, solved.projector), (SHUFFLED, solved.shuffled)].map(|(name, projector)| {
                let path = desk.place(name);
                projector.save(&path).map(|_| (name.to_owned(), path))
            });
            let files = files.into_iter().collect::<Result<_, _>>()?;
            Ok(Made { result: ShardResult::ProjectorRidge(solved.result), files })
        }
        (Stage::Steps { .. }, Role::Source, Some(model)) => {
            let corpora = Corpora::open(spec, &|name| find(desk, name))?;
            sent(desk, model, &spec.source, |emit| {
                send_caches(model, spec, &corpora, emit, &mut desk.watch()).map(drop)
            })
        }
        (Stage::Steps { .. }, Role::Target, Some(model)) => {
            let corpora = Corpora::open(spec, &|name| find(desk, name))?;
            let weights = Weights::read(desk)?;
            let mut fetch = |key: &str| desk.fetch_foreign(key);
            let begun = Instant::now();
            let clock = || begun.elapsed().as_secs_f64() * 1e3;
            let (delta, result) = steps(model, spec, &corpora, weights.start(), &mut fetch, &clock, &mut desk.watch())?;
            let path = desk.place(DELTA);
            std::fs::write(&path, delta.to_bytes()).map_err(|error| on_disk(DELTA, &path, &error))?;
            Ok(Made { result: ShardResult::ProjectorSteps(result), files: vec![(DELTA.to_owned(), path)] })
        }
        (Stage::Outer { deltas, .. }, Role::Main, None) => {
            desk.progress(0, 0, "outer step")?;
            let read = |(index, (_, samples)): (usize, &(Output, u32))| {
                let path = needed(desk, &format!("{index}-{DELTA}"))?;
                let bytes = std::fs::read(path).map_err(|error| on_disk(DELTA, path, &error))?;
                let delta = Delta::from_bytes(&bytes).map_err(ProjectorError::from)?;
                Ok::<_, ExperimentError>((delta, *samples))
            };
            let deltas = deltas.iter().enumerate().map(read).collect::<Result<Vec<_>, _>>()?;
            let (projector, result) = outer(spec, Weights::read(desk)?.start(), &deltas)?;
            let path = desk.place(PROJECTOR);
            projector.save(&path)?;
            let start = desk.place(START);
            projector.save_start(&start)?;
            let files = vec![(PROJECTOR.to_owned(), path), (START.to_owned(), start)];
            Ok(Made { result: ShardResult::ProjectorRound(result), files })
        }
        (stage, role, _) => {
            let what = format!("no seat {role} of a training is at stage {stage:?}");
            Err(ExperimentError::BadSpec { what })
        }
    }
}

/// A seat of an evaluation.
pub(super) fn evaluate<W: Write>(
    desk: &Desk<'_, W>,
    model: &Model,
    spec: &EvalSpec,
    role: Role,
) -> Result<Made, ExperimentError> {
    if role == Role::Source {
        return sent(desk, model, &spec.source, |emit| send_facts(model, spec, emit, &mut desk.watch()).map(drop));
    }
    let projector = Projector::load(needed(desk, PROJECTOR)?)?;
    let shuffled = desk.input(SHUFFLED).map(Projector::load).transpose()?;
    let mut fetch = |key: &str| desk.fetch_foreign(key);
    let result = score(model, spec, (&projector, shuffled.as_ref()), &mut fetch, &mut desk.watch())?;
    Ok(Made { result: ShardResult::ProjectorEval(Box::new(result)), files: Vec::new() })
}

/// What a round starts from, as far as there is any.
struct Weights {
    previous: Option<Projector>,
    base: Option<Projector>,
}

impl Weights {
    fn read<W: Write>(desk: &Desk<'_, W>) -> Result<Self, ExperimentError> {
        let base = desk.input(BASE).map(Projector::load).transpose()?;
        let previous = desk.input(PROJECTOR).or_else(|| desk.input(START));
        let previous = previous.map(|path| Projector::load_with(path, base.as_ref())).transpose()?;
        Ok(Self { previous, base })
    }

    fn start(&self) -> Start<'_> {
        Start { previous: self.previous.as_ref(), base: self.base.as_ref() }
    }
}

/// The source's half of anything: what `send` emits goes to the other seat.
fn sent<W: Write>(
    desk: &Desk<'_, W>,
    model: &Model,
    name: &str,
    send: impl FnOnce(&mut dyn FnMut(&str, &KvCache) -> Result<(), ExperimentError>) -> Result<(), ExperimentError>,
) -> Result<Made, ExperimentError> {
    let (mut emitted, started) = (Emitted::default(), Instant::now());
    send(&mut |key, cache| desk.emit(&mut emitted, key, cache))?;
    let result = ShardResult::ProjectorSource(emitted.result(model_facts(model, name), started));
    Ok(Made { result, files: Vec::new() })
}

/// What the training reads; files of the store are among the seat's inputs.
fn corpus<W: Write>(desk: &Desk<'_, W>, spec: &TrainSpec) -> Result<Corpus, ExperimentError> {
    Ok(Corpus::open(&spec.corpus, spec.seed, &|name| find(desk, name))?)
}

fn find<W: Write>(desk: &Desk<'_, W>, name: &str) -> Option<PathBuf> {
    match stored_file(name) {
        Some(stored) => desk.input(&stored.name).map(Path::to_path_buf),
        None => Some(PathBuf::from(name)),
    }
}

fn needed<'a, W: Write>(desk: &'a Desk<'_, W>, name: &str) -> Result<&'a Path, ExperimentError> {
    let what = || ExperimentError::BadSpec { what: format!("input {name} was not handed over") };
    desk.input(name).ok_or_else(what)
}
