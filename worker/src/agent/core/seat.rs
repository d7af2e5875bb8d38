//! A seat as the agent keeps it: how far it is and who does it. Only data.

use std::collections::VecDeque;

use protocol::control::{Failure, SeatFinished, SeatProgress, StartSeat};
use protocol::exec::{self, PacketFile};
use protocol::experiment::ShardSpec;
use protocol::ids::{Role, WorkerId};
use protocol::time::UnixMillis;

use super::io::ExecutorId;

#[derive(Debug)]
pub(super) struct Seat {
    /// What the coordinator asked for; `None` for a seat found in the outbox at start, which only waits to be handed in, and
    /// for one whose program runs.
    pub(super) start: Option<StartSeat>,
    pub(super) work: Work,
    pub(super) phase: Phase,
    pub(super) progress: SeatProgress,
    pub(super) started_at: UnixMillis,
    pub(super) packet_bytes: u64,
    pub(super) link_bytes_per_second: u64,
    /// Packets for other seats that have not arrived there, oldest first, and some behind them that have.
    pub(super) outgoing: VecDeque<Outgoing>,
    /// Packets for this seat that came before its executor ran.
    pub(super) arrived: Vec<PacketFile>,
    /// Packets for this seat that its executor has not read.
    pub(super) unread: usize,
    /// Artifacts that it needs, once they are here: (name, path).
    pub(super) inputs: Vec<(String, String)>,
}

/// A packet on its way.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub(super) packet: PacketFile,
    pub(super) state: Way,
}

/// How far a packet is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Waits,
    Goes,
    Arrived,
}

impl Seat {
    pub(super) fn new(start: Option<StartSeat>, phase: Phase, now: UnixMillis) -> Self {
        let work = match start.as_ref().map(|start| &start.spec) {
            Some(ShardSpec::Command(_)) => Work::Command,
            Some(ShardSpec::NoOp(_)) => Work::Nothing,
            Some(
                ShardSpec::Inspect(_)
                | ShardSpec::Transfer(_)
                | ShardSpec::ProjectorTrain(_)
                | ShardSpec::ProjectorEval(_),
            )
            | None => Work::Executor,
        };
        Self {
            start,
            work,
            phase,
            progress: SeatProgress::default(),
            started_at: now,
            packet_bytes: 0,
            link_bytes_per_second: 0,
            outgoing: VecDeque::new(),
            arrived: Vec::new(),
            unread: 0,
            inputs: Vec::new(),
        }
    }

    /// Models that the seat needs, and those that all seats of its attempt on this worker need.
    pub(super) fn models(&self, worker: WorkerId, role: Role) -> (Vec<String>, Vec<String>) {
        let Some(start) = &self.start else { return Default::default() };
        let of = |role| start.spec.models_of(role).into_iter().map(str::to_owned);
        let here = start.seats.iter().filter(|seat| seat.worker == worker).flat_map(|seat| of(seat.role)).collect();
        (of(role).collect(), here)
    }

    pub(super) fn note(mut self, note: &str) -> Self {
        note.clone_into(&mut self.progress.note);
        self
    }
}

/// Who does a seat's part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    /// An executor, which may leave files and packets behind.
    Executor,
    /// A program, whose files are its runner's business until it is over.
    Command,
    /// Nobody: it is done at once.
    Nothing,
}

#[derive(Debug)]
pub(super) enum Phase {
    /// Waits for its turn on the device.
    Waiting,
    /// Has the device; the artifacts that it needs are on their way here.
    Gathering,
    /// Waits for its executor to be up.
    Starting { executor: ExecutorId },
    /// The executor works.
    Running { executor: ExecutorId },
    /// The researcher's program works.
    Commanding,
    /// The executor is done and works for others; packets are still on their way.
    Sending { finished: exec::Finished, build: String, since: UnixMillis },
    /// The outputs go into the outbox.
    Keeping,
    /// Made no outputs; that it is done goes into the outbox.
    KeepingRecord { finished: Box<SeatFinished> },
    /// On disk here, on their way to the store.
    Publishing,
    /// In the store; the coordinator may not know yet.
    Published { finished: Box<SeatFinished>, said_at: Option<UnixMillis> },
    /// Failed; the coordinator may not know yet.
    Failed { failure: Failure, said_at: Option<UnixMillis> },
}

impl Phase {
    pub(super) fn executor(&self) -> Option<ExecutorId> {
        match self {
            Self::Starting { executor } | Self::Running { executor } => Some(*executor),
            _ => None,
        }
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self, Self::Published { .. } | Self::Failed { .. })
    }

    /// When its outcome was said last on this connection.
    pub(super) fn said_at(&self) -> Option<UnixMillis> {
        match self {
            Self::Published { said_at, .. } | Self::Failed { said_at, .. } => *said_at,
            _ => None,
        }
    }

    /// Kept as a record in the outbox's log rather than as a directory.
    pub(super) fn is_record(&self) -> bool {
        matches!(self, Self::Published { finished, .. } if finished.outputs.is_empty())
    }
}
