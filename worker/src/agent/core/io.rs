//! What goes into the agent's decisions and what comes out. Only data.

use protocol::control::{Failure, Output, SeatAddress, SeatFinished, StartSeat, ToCoordinator, ToWorker, Usage};
use protocol::exec::{self, FromExecutor, ToExecutor};
use protocol::ids::{AttemptId, DeviceId, Role};

/// A seat of an attempt on this worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SeatId {
    /// The attempt.
    pub attempt: AttemptId,
    /// The seat.
    pub role: Role,
}

impl std::fmt::Display for SeatId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.attempt, self.role)
    }
}

impl SeatId {
    /// A name for its directories: `r12.3-f40-source`.
    pub fn directory_name(&self) -> String {
        format!("{}-{}-{}", self.attempt.shard, self.attempt.fence, self.role)
    }

    /// Reads [`Self::directory_name`] back.
    pub fn from_directory_name(name: &str) -> Option<Self> {
        let mut parts = name.splitn(3, '-');
        let (shard, fence) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        let role = parts.next()?;
        let role = [Role::Main, Role::Source, Role::Target].into_iter().find(|known| known.to_string() == role)?;
        Some(Self { attempt: AttemptId { shard, fence }, role })
    }
}

/// An executor process of this agent, counted from 1; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ExecutorId(pub u64);

impl std::fmt::Display for ExecutorId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "x{}", self.0)
    }
}

/// Something happened.
#[derive(Debug)]
pub enum Input {
    /// The coordinator has welcomed this worker.
    Connected,
    /// The coordinator's connection is gone.
    Disconnected,
    /// The coordinator said something.
    Coordinator(ToWorker),
    /// An executor is up.
    ExecutorReady {
        /// Which.
        executor: ExecutorId,
        /// What it was built from.
        build: String,
    },
    /// An executor said something.
    Executor {
        /// Which.
        executor: ExecutorId,
        /// What.
        message: FromExecutor,
    },
    /// An executor's process is gone, or could not be started.
    ExecutorExited {
        /// Which.
        executor: ExecutorId,
        /// How it ended, with its last words.
        detail: String,
    },
    /// A program is over, with every process that it left behind. If it made files they lie below the seat's directory;
    /// else, and if it failed, the directory is gone.
    CommandEnded {
        /// Which.
        seat: SeatId,
        /// How long it ran, milliseconds.
        wall_ms: u64,
        /// What it made, or how it failed.
        ended: Result<exec::Finished, Failure>,
    },
    /// Everything that a seat needs is below its directory: (name, path).
    Gathered {
        /// Which.
        seat: SeatId,
        /// By the names of the order.
        inputs: Vec<(String, String)>,
    },
    /// A seat's part could not begin: its directory, an artifact, or a model.
    CouldNotStart {
        /// Which.
        seat: SeatId,
        /// Why.
        failure: Failure,
    },
    /// A finished seat is in the outbox.
    Kept {
        /// Which.
        seat: SeatId,
    },
    /// Finished seats without outputs are in the outbox.
    RecordsKept {
        /// Which.
        seats: Vec<SeatId>,
    },
    /// A finished seat could not be put into the outbox.
    NotKept {
        /// Which.
        seat: SeatId,
        /// Why.
        failure: Failure,
    },
    /// The store does not take a finished seat yet.
    PublishDelayed {
        /// Which.
        seat: SeatId,
        /// Why, for people.
        note: String,
    },
    /// A finished seat is in the store.
    Published {
        /// Which.
        seat: SeatId,
        /// What to tell the coordinator.
        finished: SeatFinished,
    },
    /// The other worker has a packet.
    PacketSent {
        /// The seat that made it.
        seat: SeatId,
        /// Its name.
        key: String,
        /// Its length.
        bytes: u64,
        /// How fast it went to another worker; 0 if it stayed here or was too short to tell.
        bytes_per_second: u64,
    },
    /// The other worker will not have a packet.
    PacketNotSent {
        /// The seat that made it.
        seat: SeatId,
        /// Its name.
        key: String,
        /// Why.
        failure: Failure,
    },
    /// A packet is whole and checked, below the seat's directory.
    PacketArrived {
        /// The seat it is for.
        seat: SeatId,
        /// Its name.
        key: String,
        /// Where it lies.
        path: String,
        /// Its length.
        bytes: u64,
    },
    /// [`super::Agent::next_deadline`] has come.
    Deadline,
}

/// Something to do. Whoever does it answers with an input where one is named.
#[derive(Debug)]
pub enum Effect {
    /// Tell the coordinator, if it is there.
    Say {
        /// What.
        message: ToCoordinator,
    },
    /// Start an executor process; answered by `ExecutorReady` or `ExecutorExited`.
    Launch {
        /// Its number.
        executor: ExecutorId,
        /// Its device.
        device: DeviceId,
    },
    /// Bring artifacts of the store to where the seat's executor can read them; answered by `Gathered` or `CouldNotStart`.
    Gather {
        /// Which.
        seat: SeatId,
        /// What it needs.
        inputs: Vec<Output>,
    },
    /// Make the seat's directory, find its models, tell the executor; on failure `CouldNotStart`.
    Run {
        /// The executor, up and free.
        executor: ExecutorId,
        /// What the coordinator asked for.
        start: Box<StartSeat>,
        /// What was gathered for it: (name, path).
        inputs: Vec<(String, String)>,
    },
    /// Tell an executor.
    Tell {
        /// Which.
        executor: ExecutorId,
        /// What.
        message: ToExecutor,
    },
    /// End an executor process; answered by `ExecutorExited`.
    Kill {
        /// Which.
        executor: ExecutorId,
    },
    /// Run a researcher's program in the seat's directory, at once or behind another; answered by `CommandEnded`, whatever comes.
    RunCommand {
        /// What the coordinator asked for, of kind `command`.
        start: Box<StartSeat>,
        /// Not before the program of this seat has ended.
        behind: Option<SeatId>,
    },
    /// Stop a program: politely, then not; answered by its `CommandEnded`.
    StopCommand {
        /// Which.
        seat: SeatId,
    },
    /// Put a finished seat without outputs into the outbox; answered by `RecordsKept` or `NotKept`.
    KeepRecord {
        /// What to tell the coordinator.
        finished: Box<SeatFinished>,
    },
    /// A finished seat without outputs needs no keeping any more.
    ForgetRecord {
        /// Which.
        seat: SeatId,
    },
    /// Put a finished seat's outputs into the outbox; answered by `Kept` or `NotKept`.
    Keep {
        /// Which.
        seat: SeatId,
        /// What its executor said.
        finished: Box<exec::Finished>,
        /// What it took.
        usage: Usage,
        /// What its executor was built from.
        build: String,
    },
    /// Bring a seat of the outbox into the store; answered by `PublishDelayed` and `Published`.
    Publish {
        /// Which.
        seat: SeatId,
    },
    /// Send a packet; answered by `PacketSent` or `PacketNotSent`.
    SendPacket {
        /// The seat that made it.
        from: SeatId,
        /// Whom it is for.
        to: SeatAddress,
        /// Its name.
        key: String,
        /// Where it lies.
        path: String,
    },
    /// Give a packet to another seat of this worker; answered by `PacketSent` and `PacketArrived`, or `PacketNotSent`.
    HandOver {
        /// The seat that made it.
        from: SeatId,
        /// The seat it is for, which may not have started yet.
        to: SeatId,
        /// Its name.
        key: String,
        /// Where it lies.
        path: String,
    },
    /// Give up what is on its way from or to a seat, and its publication.
    StopTransfers {
        /// Which.
        seat: SeatId,
    },
    /// Remove every file of a seat, the outbox's too.
    Discard {
        /// Which.
        seat: SeatId,
    },
}

/// What to say to a worker that offers a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OfferVerdict {
    /// It may come.
    Take,
    /// As many have come as may lie here unread.
    Full,
    /// The attempt's start has not reached this worker yet.
    NotYet,
    /// That worker has no seat in the attempt.
    NotTheSeat,
    /// The attempt is over here.
    Over,
}

#[cfg(test)]
mod tests {
    use protocol::ids::{Fence, RunId, ShardId};

    use super::*;

    #[test]
    fn seats_round_trip_through_directory_names() {
        let attempt = AttemptId { shard: ShardId { run: RunId(12), index: 3 }, fence: Fence(40) };
        let seat = SeatId { attempt, role: Role::Source };
        assert_eq!(seat.directory_name(), "r12.3-f40-source");
        assert_eq!(SeatId::from_directory_name("r12.3-f40-source"), Some(seat));
        for bad in ["", "r12.3", "r12.3-f40", "r12.3-f40-boss", ".tmp-r12.3-f40-main", "r12.3-f40-main-2"] {
            assert_eq!(SeatId::from_directory_name(bad), None, "{bad}");
        }
    }
}
