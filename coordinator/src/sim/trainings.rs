//! The ledger of samples, from the journal's records alone: what a training gave out, what was counted, what it used.

use std::collections::{BTreeMap, BTreeSet};

use protocol::control::StartSeat;
use protocol::experiment::ShardSpec;
use protocol::experiment::projector::Samples;
use protocol::ids::{ArtifactHash, RunId, ShardId};

use super::check::Violation;
use crate::scheduler::Event;

/// What the journal says of trainings.
#[derive(Debug, Clone, Default)]
pub(super) struct Trainings {
    /// Samples in all, by run and place.
    totals: BTreeMap<(RunId, u32), u64>,
    /// Shards of each run so far.
    shards: BTreeMap<RunId, u32>,
    /// Shards that go over samples.
    ranges: BTreeMap<ShardId, (u32, Samples)>,
    /// Those of them that committed.
    counted: BTreeSet<ShardId>,
    /// Everything that a seat ever made.
    made: BTreeSet<ArtifactHash>,
}

impl Trainings {
    /// A record is durable.
    pub(super) fn durable(&mut self, event: &Event) -> Result<(), Violation> {
        match event {
            Event::RunAccepted(accepted) => {
                self.shards.insert(accepted.run, u32::try_from(accepted.specs.len()).unwrap_or(u32::MAX));
                let trainings = accepted.groups.iter().flat_map(|group| &group.trainings);
                for (number, training) in (0u32..).zip(trainings) {
                    self.totals.insert((accepted.run, number), training.samples());
                }
            }
            Event::RoundOpened { run, training, specs } => {
                let next = self.shards.entry(*run).or_default();
                for spec in specs {
                    let index = *next;
                    *next += 1;
                    if let ShardSpec::ProjectorTrain(spec) = spec
                        && let Some(samples) = spec.stage.samples()
                    {
                        self.ranges.insert(ShardId { run: *run, index }, (*training, samples));
                    }
                }
            }
            Event::SeatCompleted(done) => self.made.extend(done.outputs.iter().map(|output| output.hash)),
            Event::ShardCommitted { attempt } if self.ranges.contains_key(&attempt.shard) => {
                self.counted.insert(attempt.shard);
            }
            Event::TrainingEnded { run, training } => return self.is_whole(*run, *training),
            _ => {}
        }
        Ok(())
    }

    /// What a seat is to use was made, and is known to be.
    pub(super) fn starts(&self, start: &StartSeat) -> Result<(), Violation> {
        match start.inputs.iter().find(|input| !self.made.contains(&input.hash)) {
            None => Ok(()),
            Some(input) => {
                let detail = format!("{} is to use {}, which nobody made", start.attempt, input.name);
                Err(Violation::new("inputs_exist", detail))
            }
        }
    }

    /// Ranges that were counted follow on each other from the first sample to the last.
    fn is_whole(&self, run: RunId, training: u32) -> Result<(), Violation> {
        let of = |shard: &&ShardId| shard.run == run && self.ranges[*shard].0 == training;
        let mut ranges: Vec<_> = self.counted.iter().filter(of).map(|shard| self.ranges[shard].1).collect();
        ranges.sort_by_key(|samples| samples.first);
        let mut next = 0;
        for samples in &ranges {
            if samples.first != next {
                let detail = format!("training {training} of {run} counted {samples:?} where {next} was next");
                return Err(Violation::new("every_sample_counts_once", detail));
            }
            next = samples.end();
        }
        let total = self.totals.get(&(run, training)).copied();
        if total == Some(next) {
            return Ok(());
        }
        let detail = format!("training {training} of {run} ended with {next} samples counted of {total:?}");
        Err(Violation::new("every_sample_counts_once", detail))
    }
}
