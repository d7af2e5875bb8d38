//! Breaking the cluster on purpose, outside the scheduler: a simulator that never fails shows nothing.

/// What is broken, and by which check it must be caught.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sabotage {
    /// The disk loses everything from the first outcome on when the coordinator is killed, after it said that it was written.
    LosesWritten,
    /// Effects leave before the journal is written.
    ActsEarly,
    /// The journal writes something else than was decided.
    WritesWrong,
    /// A commit is written twice.
    CommitsTwice,
    /// An outcome of a fenced attempt is passed off as one of the open attempt.
    IgnoresFences,
    /// No lease ever runs out.
    ForgetsLeases,
    /// Reported budgets arrive four times as large.
    Overbooks,
    /// Some inputs are not what they were when they are applied again.
    Wavers,
}

impl Sabotage {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::LosesWritten,
        Self::ActsEarly,
        Self::WritesWrong,
        Self::CommitsTwice,
        Self::IgnoresFences,
        Self::ForgetsLeases,
        Self::Overbooks,
        Self::Wavers,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::LosesWritten => "loses-written",
            Self::ActsEarly => "acts-early",
            Self::WritesWrong => "writes-wrong",
            Self::CommitsTwice => "commits-twice",
            Self::IgnoresFences => "ignores-fences",
            Self::ForgetsLeases => "forgets-leases",
            Self::Overbooks => "overbooks",
            Self::Wavers => "wavers",
        }
    }

    /// The invariant that it breaks.
    pub fn breaks(self) -> &'static str {
        match self {
            Self::LosesWritten => "what_was_acknowledged_stays",
            Self::ActsEarly => "no_effect_before_its_event",
            Self::WritesWrong => "replay_gives_the_live_state",
            Self::CommitsTwice => "one_commit_a_shard",
            Self::IgnoresFences => "only_its_worker_completes_a_seat",
            Self::ForgetsLeases => "every_shard_ends",
            Self::Overbooks => "a_device_runs_within_its_budget",
            Self::Wavers => "same_inputs_give_the_same_events",
        }
    }
}

impl std::str::FromStr for Sabotage {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let names = || Self::ALL.map(Self::name).join(", ");
        Self::ALL.into_iter().find(|known| known.name() == text).ok_or_else(|| format!("expected one of {}", names()))
    }
}
