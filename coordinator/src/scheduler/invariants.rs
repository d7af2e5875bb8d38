//! What must hold after every input, each with its name and its number in `docs/architecture.md`.
//!
//! Checked after each [`super::Scheduler::handle`] in debug builds and in the property tests. Invariants 5, 6 and 9 are about
//! histories, not about one state: the property tests check them. Costs a look at every shard.

use std::collections::BTreeMap;

use protocol::experiment::ShardSpec;
use protocol::experiment::projector::Samples;
use protocol::ids::{AttemptId, DeviceRef, RunId, ShardId};

use super::live::Live;
use super::state::{AttemptState, Run, Shard, State};
use super::status::{RunState, ShardState};
use super::timer::Timer;
use super::training::OpenedRound;

/// An invariant does not hold: a bug in the scheduler.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invariant `{name}` is broken: {detail}")]
pub struct Broken {
    /// The function that found it.
    pub name: &'static str,
    /// What it found.
    pub detail: String,
}

/// Checks all of them.
///
/// # Errors
/// The first that does not hold.
pub fn check(state: &State, live: &Live) -> Result<(), Broken> {
    every_shard_is_in_one_state(state)?;
    at_most_one_attempt_commits(state)?;
    reservations_fit(state)?;
    every_sample_is_given_out_once(state)?;
    every_open_seat_has_a_lease(state, live)
}

/// Invariant 1: every accepted shard is in exactly one state, its attempts say the same, and a run is over when its shards
/// are.
pub fn every_shard_is_in_one_state(state: &State) -> Result<(), Broken> {
    let broken = |detail| Broken { name: "every_shard_is_in_one_state", detail };
    for (id, run) in &state.runs {
        for (index, shard) in (0u32..).zip(&run.shards) {
            let newest = shard.newest().map(|attempt| &attempt.state);
            let has = |wanted: AttemptState| shard.attempts.iter().any(|attempt| attempt.state == wanted);
            let open = shard.open_attempts().count();
            let agrees = match shard.state {
                ShardState::Waiting | ShardState::Failed | ShardState::Cancelled => {
                    open == 0 && !has(AttemptState::Committed)
                }
                ShardState::Running => (1..=2).contains(&open) && !has(AttemptState::Committed),
                ShardState::Committed => open == 0 && has(AttemptState::Committed),
            };
            let listed = (run.waiting.contains(&index), run.running.contains(&index));
            if !agrees || listed != (shard.state == ShardState::Waiting, shard.state == ShardState::Running) {
                let shard_id = ShardId { run: *id, index };
                return Err(broken(format!(
                    "{shard_id} is {}, newest attempt {newest:?}, listed {listed:?}",
                    shard.state
                )));
            }
        }
        if let Some(detail) = run_disagrees(*id, run) {
            return Err(broken(detail));
        }
    }
    Ok(())
}

/// Invariant 2: fencing numbers grow, at most one attempt of a shard has committed, and none is open beside it.
pub fn at_most_one_attempt_commits(state: &State) -> Result<(), Broken> {
    let broken = |detail| Broken { name: "at_most_one_attempt_commits", detail };
    let shards = state
        .runs
        .iter()
        .flat_map(|(run, body)| (0u32..).zip(&body.shards).map(|(index, shard)| (ShardId { run: *run, index }, shard)));
    for (id, shard) in shards {
        let committed = shard.attempts.iter().filter(|attempt| attempt.state == AttemptState::Committed).count();
        let beside = committed > 0 && shard.open_attempt().is_some();
        let growing = shard.attempts.windows(2).all(|pair| pair[0].fence < pair[1].fence);
        if !growing || committed > 1 || beside || shard.newest().is_some_and(|newest| newest.fence.0 > state.fences) {
            return Err(broken(format!("attempts of {id}: {:?}", shard.attempts)));
        }
    }
    Ok(())
}

/// Invariant 3: the reservations on a device never exceed the memory that bonepile may use there.
pub fn reservations_fit(state: &State) -> Result<(), Broken> {
    let mut held: BTreeMap<&DeviceRef, u64> = BTreeMap::new();
    let mut lanes: BTreeMap<(&DeviceRef, u32), u64> = BTreeMap::new();
    for (_, seat) in state.unfinished_seats() {
        let most = lanes.entry((&seat.device, seat.lane)).or_default();
        *most = seat.held_bytes().max(*most);
    }
    for ((device, _), bytes) in lanes {
        let sum = held.entry(device).or_default();
        *sum = sum.saturating_add(bytes);
    }
    for (device, bytes) in held {
        let budget = state.device(device).map_or(0, |body| body.memory_budget_bytes);
        if bytes > budget {
            let detail = format!("{bytes} bytes are reserved on {device}, its budget is {budget}");
            return Err(Broken { name: "reservations_fit", detail });
        }
    }
    Ok(())
}

/// Part of invariants 1 and 2: the ranges of a training's shards follow on each other without gap or overlap, and since a shard
/// commits once, each sample counts once; one that has ended has given out all; one that can go on has a round open.
pub fn every_sample_is_given_out_once(state: &State) -> Result<(), Broken> {
    let broken = |detail| Broken { name: "every_sample_is_given_out_once", detail };
    for (id, run) in state.runs.iter().filter(|(_, run)| !run.trainings.is_empty()) {
        for (number, training) in (0u32..).zip(&run.trainings) {
            let rounds = run.rounds.iter().filter(|round| round.training == number);
            let shards: Vec<_> =
                rounds.flat_map(OpenedRound::indices).filter_map(|index| run.shards.get(index as usize)).collect();
            let mut next = 0;
            for samples in shards.iter().filter_map(|shard| samples(shard)) {
                if samples.first != next || samples.count == 0 {
                    return Err(broken(format!("training {number} of {id}: {samples:?} where {next} was next")));
                }
                next = samples.end();
            }
            let committed = shards.iter().all(|shard| shard.state == ShardState::Committed);
            let all = next == training.spec.samples() && committed;
            if next != training.assigned || training.ended && !all {
                return Err(broken(format!("training {number} of {id}: {next} samples given out, {training:?}")));
            }
            let ready = run.state == RunState::Running && run.is_ready(training.group as usize);
            if ready && training.is_due() {
                return Err(broken(format!("training {number} of {id} could go on and does not")));
            }
        }
        for (group, left) in (0u32..).zip(&run.uncommitted) {
            let here = |index: &u32| run.group_index(*index) == usize::try_from(group).ok();
            let open = |index: &u32| run.shards[*index as usize].state != ShardState::Committed;
            let count = u32::try_from(run.shards.len()).unwrap_or(u32::MAX);
            let parts = (0..count).filter(here).filter(open).count() + run.open_trainings(group);
            if *left as usize != parts {
                return Err(broken(format!("experiment {group} of {id} counts {left} open parts, has {parts}")));
            }
        }
    }
    Ok(())
}

fn samples(shard: &Shard) -> Option<Samples> {
    match &shard.spec {
        ShardSpec::ProjectorTrain(spec) => spec.stage.samples(),
        _ => None,
    }
}

/// Part of invariant 1: no seat is waited for without a deadline, so every attempt ends.
pub fn every_open_seat_has_a_lease(state: &State, live: &Live) -> Result<(), Broken> {
    let open: Vec<(AttemptId, _)> = state.unfinished_seats().map(|(attempt, seat)| (attempt, seat.role)).collect();
    let known: Vec<_> = live.seats.keys().copied().collect();
    let mut sorted = open.clone();
    sorted.sort();
    let without = open.iter().find(|(attempt, role)| live.timers.get(Timer::Lease(*attempt, *role)).is_none());
    if sorted != known || without.is_some() {
        let detail = format!("open {sorted:?}, known {known:?}, without a lease {without:?}");
        return Err(Broken { name: "every_open_seat_has_a_lease", detail });
    }
    Ok(())
}

fn run_disagrees(id: RunId, run: &Run) -> Option<String> {
    let over = run.waiting.is_empty() && run.running.is_empty();
    let failed = run.shards.iter().any(|shard| shard.state == ShardState::Failed);
    let agrees = match run.state {
        RunState::Running => !over,
        RunState::Complete => {
            let ended = run.trainings.iter().all(|training| training.ended);
            over && ended && run.shards.iter().all(|shard| shard.state == ShardState::Committed)
        }
        RunState::Failed => over && failed,
        RunState::Cancelled => over,
    };
    let ended = run.finished_at.is_some() == (run.state != RunState::Running);
    (!agrees || !ended).then(|| format!("{id} is {}, ended {:?}", run.state, run.finished_at))
}
