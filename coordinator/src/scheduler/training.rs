//! Trainings of a run as far as they have come: part of the state, changed by `apply.rs` alone.
//!
//! A training is rounds of ordinary shards, which lie in its run behind those of the sweep: placement, leases, retries and
//! fencing know nothing of it. When the next round opens, and who is in it, is decided in `rounds.rs`. The ledger of samples is
//! the specs of the shards: each range is given out once, and counts when its shard commits.

use std::ops::Range;

use protocol::control::Output;
use protocol::experiment::ShardSpec;
use protocol::experiment::projector::{Method, Need, Needed, Stage, TrainSpec};
use protocol::group::Group;
use protocol::ids::{ArtifactHash, Role};
use serde::{Deserialize, Serialize};

use super::state::{Run, Shard};
use super::status::ShardState;

/// A training of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Training {
    /// The experiment that it belongs to, by place.
    pub group: u32,
    /// What is trained. Its stage is [`Stage::Whole`]; a width that the scheduler chose stands here from the first round on.
    pub spec: TrainSpec,
    /// Rounds opened.
    pub rounds: u32,
    /// Samples given out to opened rounds: the next range begins here.
    pub assigned: u64,
    /// Shards of the newest round that have not committed.
    pub left: u32,
    /// Everything of it has committed.
    pub ended: bool,
    /// What its newest solution or outer step made.
    pub outputs: Vec<Output>,
}

/// A round that was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenedRound {
    /// Which of the run's trainings.
    pub training: u32,
    /// Index of its first shard.
    pub first: u32,
    /// Number of its shards.
    pub count: u32,
}

impl OpenedRound {
    /// Its shards.
    pub fn indices(&self) -> Range<u32> {
        self.first..self.first.saturating_add(self.count)
    }
}

impl Training {
    /// Whether its next round can be opened, its experiment's turn given.
    pub fn is_due(&self) -> bool {
        !self.ended && self.left == 0
    }
}

/// The trainings of all experiments, in order.
pub(super) fn of_groups(groups: &[Group]) -> Result<Vec<Training>, String> {
    let mut trainings = Vec::new();
    for (group, body) in (0u32..).zip(groups) {
        for spec in &body.trainings {
            if !matches!(spec.stage, Stage::Whole { .. }) {
                return Err(format!("experiment {group} has part of a training"));
            }
            let (rounds, assigned, left) = (0, 0, 0);
            let outputs = Vec::new();
            trainings.push(Training { group, spec: spec.clone(), rounds, assigned, left, ended: false, outputs });
        }
    }
    Ok(trainings)
}

/// The artifact of this name that a committed shard's seat made. One that it should have made and did not has a name that no
/// artifact has: who needs it will say that it is missing.
pub(super) fn output_of(run: &Run, index: u32, role: Role, name: &str) -> Output {
    let attempt = run.shards.get(index as usize).and_then(|shard| shard.committed_attempt());
    let outcome = attempt.and_then(|attempt| attempt.seat(role)).and_then(|seat| seat.outcome.as_ref());
    let found = outcome.and_then(|outcome| outcome.outputs.iter().find(|output| output.name == name));
    found.cloned().unwrap_or_else(|| nothing(name))
}

/// Whether a shard is a replica's local steps.
pub(super) fn is_step(spec: &ShardSpec) -> bool {
    matches!(spec, ShardSpec::ProjectorTrain(spec) if matches!(spec.stage, Stage::Steps { .. }))
}

fn stage(shard: &Shard) -> Option<&Stage> {
    match &shard.spec {
        ShardSpec::ProjectorTrain(spec) => Some(&spec.stage),
        _ => None,
    }
}

fn nothing(name: &str) -> Output {
    Output { name: name.to_owned(), hash: ArtifactHash([0; 32]), bytes: 0 }
}

/// Questions about trainings.
impl Run {
    /// The training that a shard is part of, if it was opened for one.
    pub fn training_of(&self, index: u32) -> Option<&Training> {
        self.trainings.get(self.round_of(index)?.training as usize)
    }

    /// The newest round of a training.
    pub fn newest_round(&self, training: u32) -> Option<&OpenedRound> {
        self.rounds.iter().rev().find(|round| round.training == training)
    }

    /// Trainings of an experiment that have not ended.
    pub fn open_trainings(&self, group: u32) -> usize {
        self.trainings.iter().filter(|training| training.group == group && !training.ended).count()
    }

    /// Artifacts that a shard needs, by the names under which it knows them.
    pub fn inputs(&self, spec: &ShardSpec) -> Vec<Output> {
        self.found(spec.needs())
    }

    /// Those that one of its seats reads.
    pub fn inputs_of(&self, spec: &ShardSpec, role: Role) -> Vec<Output> {
        self.found(spec.needs_of(role))
    }

    fn found(&self, needs: Vec<Need>) -> Vec<Output> {
        let found = |what: &Needed| match what {
            Needed::Artifact(artifact) => Some(artifact.clone()),
            Needed::Trained { training, output, optional } => {
                let made = self.trainings.get(*training as usize).map(|training| &training.outputs);
                let artifact = made.into_iter().flatten().find(|made| made.name == *output).cloned();
                artifact.or_else(|| (!optional).then(|| nothing(output)))
            }
        };
        let named = |need: Need| found(&need.what).map(|artifact| Output { name: need.name, ..artifact });
        needs.into_iter().filter_map(named).collect()
    }

    /// Samples of a training that count: those of its committed shards.
    pub fn samples_counted(&self, training: u32) -> u64 {
        let committed =
            |index: u32| self.shards.get(index as usize).filter(|shard| shard.state == ShardState::Committed);
        let rounds = self.rounds.iter().filter(|round| round.training == training);
        let samples = rounds.flat_map(OpenedRound::indices).filter_map(|index| stage(committed(index)?)?.samples());
        samples.map(|samples| u64::from(samples.count)).sum()
    }

    /// Shards that a training will still open, if its rounds go on as the newest did; before the first, as if one replica did
    /// all of it.
    pub fn shards_to_come(&self, number: u32) -> u32 {
        let Some(training) = self.trainings.get(number as usize).filter(|training| !training.ended) else { return 0 };
        let recipe = match (&training.spec.method, &training.spec.stage, training.rounds) {
            (Method::Ridge(_), Stage::Whole { shards }, 0) => return shards.min(&training.spec.corpus.samples) + 1,
            (Method::Ridge(_), _, rounds) => return u32::from(rounds == 1),
            (Method::Fuser(recipe), ..) => recipe,
        };
        let samples = |round: &OpenedRound| -> u64 {
            let shards = round.indices().filter_map(|index| stage(self.shards.get(index as usize)?)?.samples());
            shards.map(|samples| u64::from(samples.count)).sum()
        };
        let stepped = self.rounds.iter().rev().filter(|round| round.training == number);
        let newest = stepped.map(|round| (u64::from(round.count), samples(round))).find(|(_, samples)| *samples > 0);
        let typical = u64::from(recipe.batch.max(1)) * u64::from(recipe.local_steps.max(1));
        let (replicas, of_round) = newest.unwrap_or((1, typical));
        let rounds = training.spec.samples().saturating_sub(training.assigned).div_ceil(of_round);
        let outer = u64::from(training.rounds % 2);
        u32::try_from(rounds.saturating_mul(replicas + 1).saturating_add(outer)).unwrap_or(u32::MAX)
    }

    fn round_of(&self, index: u32) -> Option<&OpenedRound> {
        let at = self.rounds.partition_point(|round| round.first <= index);
        self.rounds.get(at.checked_sub(1)?)
    }
}

/// Changes, for `apply.rs`.
impl Run {
    /// Takes a round in; gives the indices that its shards have.
    pub(super) fn round_opened(&mut self, number: u32, specs: &[ShardSpec]) -> Result<Range<u32>, String> {
        let first = u32::try_from(self.shards.len()).map_err(|_| "too many shards")?;
        let count = u32::try_from(specs.len()).ok().filter(|count| *count > 0).ok_or("a round of no shards")?;
        let training = self.trainings.get_mut(number as usize).ok_or_else(|| format!("no training {number}"))?;
        if !training.is_due() {
            return Err(format!("training {number} is not ready for another round"));
        }
        let (mut assigned, mut method) = (training.assigned, &training.spec.method);
        for spec in specs {
            let ShardSpec::ProjectorTrain(spec) = spec else { return Err("a round of another kind".to_owned()) };
            if let Some(samples) = spec.stage.samples() {
                if samples.first != assigned {
                    return Err(format!("samples {} do not follow on {assigned}", samples.first));
                }
                assigned = samples.end();
            }
            method = &spec.method;
        }
        if assigned > training.spec.samples() {
            return Err(format!("{assigned} samples are more than training {number} has"));
        }
        training.spec.method = method.clone();
        training.assigned = assigned;
        training.rounds += 1;
        training.left = count;
        if let Some(left) = self.uncommitted.get_mut(training.group as usize) {
            *left = left.saturating_add(count);
        }
        let round = OpenedRound { training: number, first, count };
        self.rounds.push(round);
        Ok(round.indices())
    }

    /// A shard has committed: if it is of a training, that is one step further.
    pub(super) fn note_training(&mut self, index: u32) {
        let Some(round) = self.round_of(index).copied() else { return };
        let shard = self.shards.get(index as usize);
        let made = shard.and_then(|shard| match &shard.spec {
            ShardSpec::ProjectorTrain(spec) if matches!(spec.stage, Stage::Solve { .. } | Stage::Outer { .. }) => {
                shard.committed_attempt()?.seat(Role::Main)?.outcome.as_ref().map(|outcome| outcome.outputs.clone())
            }
            _ => None,
        });
        let Some(training) = self.trainings.get_mut(round.training as usize) else { return };
        training.left = training.left.saturating_sub(1);
        if let Some(made) = made {
            training.outputs = made;
        }
    }

    pub(super) fn training_ended(&mut self, number: u32) -> Result<(), String> {
        let training = self.trainings.get_mut(number as usize).ok_or_else(|| format!("no training {number}"))?;
        if !training.is_due() {
            return Err(format!("training {number} is not at its end"));
        }
        training.ended = true;
        if let Some(left) = self.uncommitted.get_mut(training.group as usize) {
            *left = left.saturating_sub(1);
        }
        Ok(())
    }
}
