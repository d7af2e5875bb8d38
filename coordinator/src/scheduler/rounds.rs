//! When a training's next round opens, what its shards do, and who is in it.
//!
//! Ridge: shards of statistics over equal ranges, then one solution. A fuser: local steps of replicas and an outer step, in turn,
//! until every sample is counted (Quorum-round DiLoCo, arXiv 2311.08105; local steps by speed, 2401.09135). A replica's steps
//! follow the measured speed of the devices that it is meant for, so that unequal ones end together. Devices that come or go
//! are in the next round or not.

use protocol::control::Output;
use protocol::experiment::ShardSpec;
use protocol::experiment::projector::{
    DELTA, FuserRecipe, Method, PROJECTOR, START, STATISTICS, Samples, Shares, Stage, TrainSpec,
};
use protocol::group::Require;
use protocol::hardware::DeviceKind;
use protocol::ids::{Role, RunId};

use super::estimate::projector::fuser;
use super::event::Event;
use super::machine::Scheduler;
use super::placement::Round;
use super::request::Request;
use super::state::{Run, State};
use super::training::{OpenedRound, Training, output_of};
use super::view::{View, World};

/// Widths of a fuser that are chosen from, widest first.
pub const WIDTHS: [u32; 5] = [1024, 512, 256, 128, 64];
/// Width where no device is there to choose by.
const WIDTH_UNKNOWN: u32 = 256;
/// Widest that is chosen for processors: what is wider would fit, but not end.
const WIDTH_ON_PROCESSORS_MAX: u32 = 128;
/// Most local steps between two outer steps.
const LOCAL_STEPS_MAX: u64 = 256;

/// A replica's part of the first round, for asking what one would need.
const FIRST_STEP: Stage = Stage::Steps { round: 0, replica: 0, samples: Samples { first: 0, count: 1 }, start: None };

/// What a training does next.
enum Next {
    Open(Vec<TrainSpec>),
    End,
}

impl Scheduler {
    /// Opens the rounds of a run that can be opened, and ends the trainings of which everything has committed.
    pub(super) fn advance_trainings(&mut self, id: RunId) {
        loop {
            let Some(run) = self.state.runs.get(&id) else { return };
            let due = |training: &Training| training.is_due() && run.is_ready(training.group as usize);
            let Some(at) = run.trainings.iter().position(due).filter(|_| !run.state.is_terminal()) else { return };
            let training = u32::try_from(at).unwrap_or(u32::MAX);
            let view = View { state: &self.state, live: &self.live, now: self.now };
            let event = match next(view, run, training) {
                Next::Open(specs) => {
                    let specs = specs.into_iter().map(|spec| ShardSpec::ProjectorTrain(Box::new(spec))).collect();
                    Event::RoundOpened { run: id, training, specs }
                }
                Next::End => Event::TrainingEnded { run: id, training },
            };
            self.emit(event);
        }
    }
}

fn next(view: View<'_>, run: &Run, number: u32) -> Next {
    let training = &run.trainings[number as usize];
    let newest = run.newest_round(number).map(|round| (round, stage_of(run, round)));
    match (&training.spec.method, newest) {
        (Method::Ridge(_), None) => Next::Open(statistics(&training.spec)),
        (Method::Ridge(_), Some((round, Some(Stage::Statistics(_))))) => {
            let parts = round.indices().map(|index| output_of(run, index, Role::Target, STATISTICS)).collect();
            Next::Open(vec![training.spec.at(Stage::Solve { parts })])
        }
        (Method::Fuser(_), Some((round, Some(Stage::Steps { .. })))) => Next::Open(vec![outer(run, training, round)]),
        (Method::Fuser(recipe), _) if training.assigned < training.spec.samples() => {
            Next::Open(steps(view, run, training, recipe))
        }
        _ => Next::End,
    }
}

/// What the shards of a round do, as its first says.
fn stage_of<'a>(run: &'a Run, round: &OpenedRound) -> Option<&'a Stage> {
    match &run.shards.get(round.first as usize)?.spec {
        ShardSpec::ProjectorTrain(spec) => Some(&spec.stage),
        _ => None,
    }
}

/// Equal ranges; sums are the same however many there are.
fn statistics(spec: &TrainSpec) -> Vec<TrainSpec> {
    let Stage::Whole { shards } = spec.stage else { return Vec::new() };
    let (samples, shards) = (spec.corpus.samples, u64::from(shards.clamp(1, spec.corpus.samples.max(1))));
    let edge = |shard: u64| u64::from(samples) * shard / shards;
    let range = |shard| range(edge(shard), edge(shard + 1) - edge(shard));
    (0..shards).map(|shard| spec.at(Stage::Statistics(range(shard)))).collect()
}

/// Local steps for each replica of the next round.
fn steps(view: View<'_>, run: &Run, training: &Training, recipe: &FuserRecipe) -> Vec<TrainSpec> {
    let Stage::Whole { shards } = training.spec.stage else { return Vec::new() };
    let require = run.groups[training.group as usize].require.clone();
    // Replicas that may not run at once would wait for each other.
    let most = if run.running_max == 0 { shards } else { shards.min(run.running_max) };
    let mut spec = training.spec.clone();
    if recipe.hidden == 0 {
        spec = with_width(&spec, width(view, &spec, &require));
    }
    let start = made(training, START);
    let round = training.rounds / 2;
    let at = |replica, samples| {
        let stage = Stage::Steps { round, replica, samples, start: start.clone() };
        spec.at(stage)
    };
    let samples = range(0, u64::from(recipe.local_steps) * u64::from(recipe.batch));
    let typical = Stage::Steps { round, replica: 0, samples, start: None };
    let request = request(view.state, &spec.at(typical), require);
    let times = unit_times(view, &request, most as usize);
    let steps = match recipe.shares {
        Shares::Speed => local_steps(&times, recipe.local_steps),
        Shares::Equal => vec![recipe.local_steps.into(); times.len()],
    };
    let left = spec.samples() - training.assigned;
    let mut first = training.assigned;
    let mut specs = Vec::new();
    for (replica, count) in (0u32..).zip(shares(&steps, recipe.batch, left)) {
        specs.push(at(replica, range(first, count)));
        first += count;
    }
    specs
}

/// The outer step after a round of local steps.
fn outer(run: &Run, training: &Training, round: &OpenedRound) -> TrainSpec {
    let mut deltas = Vec::new();
    for index in round.indices() {
        let ShardSpec::ProjectorTrain(spec) = &run.shards[index as usize].spec else { continue };
        let Stage::Steps { samples, .. } = &spec.stage else { continue };
        deltas.push((output_of(run, index, Role::Target, DELTA), samples.count));
    }
    let (counted, round) = (training.assigned, training.rounds / 2);
    let of_round: u64 = deltas.iter().map(|(_, samples)| u64::from(*samples)).sum();
    let further = (training.spec.samples() - counted).div_ceil(of_round.max(1));
    let rounds = round.saturating_add(1).saturating_add(u32::try_from(further).unwrap_or(u32::MAX));
    training.spec.at(Stage::Outer { round, counted, rounds, start: made(training, PROJECTOR), deltas })
}

/// What the newest outer step made by that name.
fn made(training: &Training, name: &str) -> Option<Output> {
    training.outputs.iter().find(|output| output.name == name).cloned()
}

/// Microseconds a sample of each replica that could step now, fastest first; a replica is as fast as its slower seat. One at
/// least: it waits for its devices like any shard.
fn unit_times(view: View<'_>, request: &Request, most: usize) -> Vec<u64> {
    let rehearsed = Round::rehearsed(view, request, most);
    let slower = |seats: &Vec<_>| {
        let unit = |(row, role): &(_, Role)| view.unit(&request.seat_class(*role), view.row(*row)).unit_us;
        seats.iter().map(unit).max().unwrap_or(1).max(1)
    };
    let mut times: Vec<u64> = rehearsed.iter().map(slower).collect();
    times.sort_unstable();
    if times.is_empty() { vec![1] } else { times }
}

/// H_i = floor(H · v_i / v_p90), 256 at most: optimiser steps of each replica, from microseconds a sample, fastest first. One that
/// is too slow for a single step is no replica.
fn local_steps(unit_us: &[u64], typical: u32) -> Vec<u64> {
    let fast = unit_us.get(unit_us.len() / 10).copied().unwrap_or(1);
    let steps = |us: &u64| (u64::from(typical.max(1)).saturating_mul(fast) / us).min(LOCAL_STEPS_MAX);
    unit_us.iter().map(steps).filter(|steps| *steps > 0).collect()
}

/// Samples of each replica: whole batches, or what is left in the same proportion.
fn shares(steps: &[u64], batch: u32, left: u64) -> Vec<u64> {
    let batch = u64::from(batch.max(1));
    let all: u64 = steps.iter().sum();
    let cut = all.saturating_mul(batch) > left;
    let mut rest = left;
    let share = |steps: &u64| {
        let wanted = match cut {
            true => (left * steps).div_ceil(all).div_ceil(batch) * batch,
            false => steps * batch,
        };
        let share = wanted.min(rest);
        rest -= share;
        share
    };
    steps.iter().map(share).filter(|share| *share > 0).collect()
}

/// What a fuser of some width would cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Width {
    /// The width.
    pub hidden: u32,
    /// Trained numbers.
    pub parameters: u64,
    /// What a replica sends after its local steps, bytes.
    pub delta_bytes: u64,
    /// What the target's seat takes, bytes.
    pub memory_bytes: u64,
    /// A replica has its place on the devices that are there, if nothing of ours ran.
    pub fits: bool,
}

/// The widths that a fuser could have, its own among them, widest first; none for a ridge projector or models of unknown sizes.
pub fn widths(view: View<'_>, spec: &TrainSpec, require: &Require) -> Vec<Width> {
    let Method::Fuser(recipe) = &spec.method else { return Vec::new() };
    let (Some(source), Some(target)) = (view.state.shape(&spec.source), view.state.shape(&spec.target)) else {
        return Vec::new();
    };
    let cost = |hidden: u32| {
        let spec = with_width(spec, hidden).at(FIRST_STEP);
        let kind = fuser(&FuserRecipe { hidden, ..(**recipe).clone() });
        let parameters = kind.parameters(source, target);
        // int8 in blocks of 256, each with an f32 scale.
        let quantised = parameters.saturating_add(parameters / 256 * 4);
        let request = request(view.state, &spec, require.clone());
        let seat = request.seats.iter().find(|seat| seat.role == Role::Target);
        Width {
            hidden,
            parameters,
            delta_bytes: if recipe.quantise { quantised } else { parameters.saturating_mul(4) },
            memory_bytes: seat.map_or(0, |seat| view.need_bytes(&request, seat)),
            fits: Round::could_place(view, &request, World::Idle),
        }
    };
    let mut all = WIDTHS.to_vec();
    all.extend((recipe.hidden > 0).then_some(recipe.hidden));
    all.sort_unstable_by(|a, b| b.cmp(a));
    all.dedup();
    all.into_iter().map(cost).collect()
}

/// The widest fuser of which one replica fits on the devices that are there, if nothing of ours ran.
fn width(view: View<'_>, spec: &TrainSpec, require: &Require) -> u32 {
    let mut present = view.live.board.rows().filter(|(_, row)| view.in_service(row)).peekable();
    if present.peek().is_none() {
        return WIDTH_UNKNOWN;
    }
    let processors = present.all(|(_, row)| row.body.kind == DeviceKind::Cpu);
    let most = if processors { WIDTH_ON_PROCESSORS_MAX } else { u32::MAX };
    let fits = |width: &u32| {
        let request = request(view.state, &with_width(spec, *width).at(FIRST_STEP), require.clone());
        Round::could_place(view, &request, World::Idle)
    };
    let narrowest = WIDTHS[WIDTHS.len() - 1];
    WIDTHS.into_iter().filter(|width| *width <= most).find(fits).unwrap_or(narrowest)
}

fn with_width(spec: &TrainSpec, hidden: u32) -> TrainSpec {
    match &spec.method {
        Method::Fuser(recipe) => {
            let recipe = FuserRecipe { hidden, ..(**recipe).clone() };
            TrainSpec { method: Method::Fuser(Box::new(recipe)), ..spec.clone() }
        }
        Method::Ridge(_) => spec.clone(),
    }
}

fn request(state: &State, spec: &TrainSpec, require: Require) -> Request {
    Request::for_spec(state, &ShardSpec::ProjectorTrain(Box::new(spec.clone())), require)
}

fn range(first: u64, count: u64) -> Samples {
    Samples { first, count: u32::try_from(count).unwrap_or(u32::MAX) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_steps_follow_speed_and_the_slowest_stay_out() {
        assert_eq!(local_steps(&[100, 200, 400, 400], 16), [16, 8, 4, 4]);
        assert_eq!(local_steps(&[100, 1700], 16), [16]);
        // Of ten one may be faster than the typical: it does more, up to the limit.
        let mut ten = vec![100; 9];
        ten.insert(0, 10);
        assert_eq!(local_steps(&ten, 16)[..2], [160, 16]);
    }

    #[test]
    fn the_last_round_is_cut_in_proportion_and_to_the_sample() {
        assert_eq!(shares(&[16, 8, 4, 4], 4, 1000), [64, 32, 16, 16]);
        assert_eq!(shares(&[16, 8, 4, 4], 4, 64), [32, 16, 8, 8]);
        assert_eq!(shares(&[16, 8, 4, 4], 4, 7), [4, 3]);
        for left in 1..300 {
            assert_eq!(shares(&[16, 8, 4, 4], 4, left).iter().sum::<u64>(), left.min(128), "{left}");
        }
    }
}
