//! What must hold, seen from outside the scheduler: from the journal's records, from the effects that leave, from what runs
//! on virtual devices. The invariants of one state are [`crate::scheduler::invariants`]'; here are those of histories.

use std::collections::{BTreeMap, BTreeSet};

use protocol::control::{SeatSettled, ToWorker};
use protocol::ids::{AttemptId, Role, RunId, ShardId, WorkerId};

use super::trainings::Trainings;
use crate::scheduler::invariants::Broken;
use crate::scheduler::{Effect, Event, Record, State};

/// Names of the checks of this module and of its siblings, with what they mean.
pub const CHECKS: [(&str, &str); 15] = [
    ("one_commit_a_shard", "the journal has at most one commit of a shard, of an attempt that is open (invariant 2)"),
    ("only_its_worker_completes_a_seat", "a seat completes only if the worker that it was placed on said so (2)"),
    (
        "what_was_acknowledged_stays",
        "what a worker or a person was told is done is in the journal after any restart (1)",
    ),
    ("a_device_runs_within_its_budget", "what runs at once on a virtual device fits the budget it reported (3)"),
    ("replay_gives_the_live_state", "the durable records, replayed, give the state that decided them (5)"),
    ("a_record_reads_as_written", "a record's text reads as the record (5)"),
    ("the_journal_replays", "the durable records follow on each other (5)"),
    ("no_effect_before_its_event", "what leaves is in the journal already (6)"),
    ("every_sample_counts_once", "the ranges of a training's committed shards cover its samples, none twice (2)"),
    ("inputs_exist", "what a seat is to use was made by a seat whose outcome is in the journal (8)"),
    ("a_refused_input_changes_nothing", "a rejection decides no event"),
    ("same_inputs_give_the_same_events", "a second scheduler with the same inputs writes the same journal (9)"),
    ("a_seed_repeats", "the same seed gives the same history"),
    ("every_shard_ends", "once faults end, every shard reaches a terminal state in bounded time (1)"),
    ("nothing_panics", "neither the scheduler nor its assertions give up"),
];

/// Something does not hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` does not hold: {detail}")]
pub struct Violation {
    /// One of [`CHECKS`], or the name of one of the scheduler's invariants.
    pub name: &'static str,
    /// What was found.
    pub detail: String,
}

impl Violation {
    /// A violation.
    pub fn new(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, detail: detail.into() }
    }
}

impl From<Broken> for Violation {
    fn from(broken: Broken) -> Self {
        Self { name: broken.name, detail: broken.detail }
    }
}

/// What the journal says, and what the world was told.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    placed: BTreeMap<AttemptId, Vec<(Role, WorkerId)>>,
    completed: BTreeSet<(AttemptId, Role)>,
    failed: BTreeSet<(AttemptId, Role)>,
    /// Attempts that failed and were not resumed.
    ended: BTreeSet<AttemptId>,
    committed: BTreeMap<ShardId, AttemptId>,
    accepted: BTreeSet<RunId>,
    trainings: Trainings,
    told: Told,
}

/// What cannot be taken back.
#[derive(Debug, Clone, Default)]
struct Told {
    acknowledged: BTreeSet<(AttemptId, Role)>,
    manifests: BTreeSet<AttemptId>,
    accepted: BTreeSet<RunId>,
    /// What workers said that they finished.
    finished: BTreeSet<(WorkerId, AttemptId, Role)>,
}

impl Ledger {
    /// A record is durable.
    ///
    /// # Errors
    /// If it must not be there.
    pub fn durable(&mut self, record: &Record) -> Result<(), Violation> {
        self.trainings.durable(&record.event)?;
        match &record.event {
            Event::RunAccepted(accepted) => drop(self.accepted.insert(accepted.run)),
            Event::AttemptPlaced(placed) => {
                let seats = placed.seats.iter().map(|seat| (seat.role, seat.device.worker)).collect();
                self.placed.insert(placed.attempt, seats);
            }
            Event::SeatCompleted(done) => {
                let (attempt, role) = (done.attempt, done.role);
                let seats = self.placed.get(&attempt).into_iter().flatten();
                let worker = seats.clone().find(|(at, _)| *at == role).map(|(_, worker)| *worker);
                if !worker.is_some_and(|worker| self.told.finished.contains(&(worker, attempt, role))) {
                    let detail = format!("{attempt} {role} is placed on {worker:?}, which never said that it finished");
                    return Err(Violation::new("only_its_worker_completes_a_seat", detail));
                }
                self.completed.insert((attempt, role));
            }
            Event::AttemptFailed { attempt, role, .. } => {
                self.failed.insert((*attempt, *role));
                self.ended.insert(*attempt);
            }
            Event::AttemptResumed { attempt } => drop(self.ended.remove(attempt)),
            Event::ShardCommitted { attempt } => {
                if let Some(other) = self.committed.insert(attempt.shard, *attempt) {
                    return Err(Violation::new("one_commit_a_shard", format!("{other} and {attempt} both committed")));
                }
                if self.ended.contains(attempt) {
                    return Err(Violation::new(
                        "one_commit_a_shard",
                        format!("{attempt} committed after it had ended"),
                    ));
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// An effect leaves the coordinator.
    ///
    /// # Errors
    /// If what it tells is not durable.
    pub fn leaves(&mut self, effect: &Effect) -> Result<(), Violation> {
        if let Effect::Send { message: ToWorker::StartSeat(start), .. } = effect {
            self.trainings.starts(start)?;
        }
        let known = match effect {
            Effect::Send { message: ToWorker::StartSeat(start), .. } => self.placed.contains_key(&start.attempt),
            Effect::Send { message: ToWorker::SeatSettled(SeatSettled { attempt, role, counted: true }), .. } => {
                let completed = self.completed.contains(&(*attempt, *role));
                if completed {
                    self.told.acknowledged.insert((*attempt, *role));
                }
                completed || self.failed.contains(&(*attempt, *role))
            }
            Effect::WriteManifest { attempt } => {
                self.told.manifests.insert(*attempt);
                self.committed.get(&attempt.shard) == Some(attempt)
            }
            _ => true,
        };
        if known { Ok(()) } else { Err(Violation::new("no_effect_before_its_event", format!("{effect:?}"))) }
    }

    /// A person was told that a run is accepted.
    ///
    /// # Errors
    /// If it is not durable.
    pub fn told_accepted(&mut self, run: RunId) -> Result<(), Violation> {
        self.told.accepted.insert(run);
        match self.accepted.contains(&run) {
            true => Ok(()),
            false => {
                Err(Violation::new("no_effect_before_its_event", format!("{run} was promised to who submitted it")))
            }
        }
    }

    /// A worker's word reaches the coordinator.
    pub fn heard(&mut self, worker: WorkerId, attempt: AttemptId, role: Role) {
        self.told.finished.insert((worker, attempt, role));
    }

    /// The coordinator starts from `records`: what the world was told must be among them.
    ///
    /// # Errors
    /// If something is not.
    pub fn restarted(&mut self, records: &[Record]) -> Result<(), Violation> {
        let mut again = Self { told: std::mem::take(&mut self.told), ..Self::default() };
        for record in records {
            again.durable(record)?;
        }
        *self = again;
        self.promises_hold()
    }

    /// Every promise against the journal.
    fn promises_hold(&self) -> Result<(), Violation> {
        let lost =
            |what: String| Violation::new("what_was_acknowledged_stays", format!("{what} is not in the journal"));
        let told = &self.told;
        if let Some((attempt, role)) = told.acknowledged.difference(&self.completed).next() {
            return Err(lost(format!("the outcome of {attempt} {role}")));
        }
        if let Some(attempt) = told.manifests.iter().find(|at| self.committed.get(&at.shard) != Some(*at)) {
            return Err(lost(format!("the commit of {attempt}")));
        }
        if let Some(run) = told.accepted.difference(&self.accepted).next() {
            return Err(lost(format!("the accepted {run}")));
        }
        Ok(())
    }

    /// Promises against the journal, commits against the state.
    ///
    /// # Errors
    /// If a commit is not the shard's state any more.
    pub fn at_the_end(&self, state: &State) -> Result<(), Violation> {
        self.promises_hold()?;
        for (shard, attempt) in &self.committed {
            let fence = state.shard(*shard).and_then(|body| body.committed_attempt()).map(|attempt| attempt.fence);
            if fence != Some(attempt.fence) {
                let detail = format!("{shard} was committed by {attempt}, the state has {fence:?}");
                return Err(Violation::new("what_was_acknowledged_stays", detail));
            }
        }
        Ok(())
    }

    /// Attempts ever placed: for who wants to lie about them.
    pub fn attempts(&self) -> impl Iterator<Item = (AttemptId, Role, WorkerId)> {
        self.placed.iter().flat_map(|(id, seats)| seats.iter().map(|(role, worker)| (*id, *role, *worker)))
    }
}
