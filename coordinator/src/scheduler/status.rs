//! The words for where a run, shard, worker or token stands: one spelling in state, API, tables and JSON.
//!
//! Does not decide anything: [`super::state`] does.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! states {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum $name {
            $($(#[$vdoc])* $variant,)*
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(match self {
                    $(Self::$variant => $word,)*
                })
            }
        }
    };
}

states!(
    /// Where a run stands.
    RunState {
        /// Shards are waiting or running.
        Running = "running",
        /// Every shard committed.
        Complete = "complete",
        /// Every shard ended and at least one failed.
        Failed = "failed",
        /// Someone cancelled it; what had committed stays.
        Cancelled = "cancelled",
    }
);

states!(
    /// Where a shard stands. The last three are terminal; a shard reaches exactly one of them (`retry` reopens a failed one).
    ShardState {
        /// Not placed, or to be placed again.
        Waiting = "waiting",
        /// An attempt is open on its devices.
        Running = "running",
        /// Its result is in the journal and never lost.
        Committed = "committed",
        /// Out of tries, or failed in a way that is the same everywhere.
        Failed = "failed",
        /// Its run was cancelled before it committed.
        Cancelled = "cancelled",
    }
);

states!(
    /// Where a worker stands. Only `Online` gets new work.
    WorkerState {
        /// Connected and heard of.
        Online = "online",
        /// Connected or just gone, not heard of for [`protocol::limits::SUSPECT_AFTER_MS`].
        Suspect = "suspect",
        /// Not heard of for [`protocol::limits::LEASE_TTL_MS`], or not since the coordinator started.
        Lost = "lost",
        /// Connected, finishes what it has, gets nothing new.
        Draining = "draining",
        /// Its certificate is no longer accepted.
        Revoked = "revoked",
    }
);

states!(
    /// Where a join token stands.
    TokenState {
        /// A box may join with it.
        Open = "open",
        /// Used as often as it may be.
        Used = "used",
        /// Its time has passed.
        Expired = "expired",
        /// Withdrawn.
        Revoked = "revoked",
    }
);

states!(
    /// Whether a seat fits on a device.
    Verdict {
        /// A seat was put there.
        Chosen = "chosen",
        /// It would do.
        Fits = "fits",
        /// Not as things are, but waiting may help.
        NotNow = "not now",
        /// Waiting will not help: someone must change something.
        Never = "never",
    }
);

impl RunState {
    /// Whether the run is over (a `retry` may still reopen it).
    pub fn is_terminal(self) -> bool {
        self != Self::Running
    }
}

impl ShardState {
    /// Every state, in the order of tables.
    pub const ALL: [Self; 5] = [Self::Waiting, Self::Running, Self::Committed, Self::Failed, Self::Cancelled];

    /// Whether the shard is over (a `retry` may still reopen a failed one).
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Committed | Self::Failed | Self::Cancelled)
    }
}
