//! The conversation of an agent and its executor, a child process, over the child's stdin and stdout.
//!
//! The executor writes files below the attempt's directory and names them; the agent publishes, sends and removes them. The
//! executor never sees the store, the network or a key. Only data here.

use serde::{Deserialize, Serialize};

use crate::control::{Failure, SeatProgress};
use crate::experiment::ShardSpec;
use crate::frame::messages;
use crate::ids::{AttemptId, Role};
use crate::limits::EXEC_FRAME_BYTES_MAX;

messages! {
    /// What the agent says.
    pub enum ToExecutor, max = EXEC_FRAME_BYTES_MAX, {
        /// Do a seat's part.
        0x0401 RunSeat(RunSeat),
        /// A packet from the other seat is whole and checked.
        0x0402 PacketArrived(PacketFile),
        /// Stop the attempt at the next step.
        0x0403 StopSeat(StopSeat),
        /// A packet of this seat has reached the other, and its file is gone.
        0x0404 PacketSent(PacketKey),
    }
}

messages! {
    /// What the executor says.
    pub enum FromExecutor, max = EXEC_FRAME_BYTES_MAX, {
        /// First: the process is up.
        0x0481 Ready(Ready),
        /// A step is done.
        0x0482 Progressed(Progressed),
        /// A packet for the other seat is written.
        0x0483 PacketReady(PacketFile),
        /// The seat's part is done.
        0x0484 Finished(Finished),
        /// The seat's part failed.
        0x0485 Failed(Failed),
        /// A packet was read and its file is not needed any more.
        0x0486 PacketUsed(PacketKey),
    }
}

/// A seat's part, for the executor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunSeat {
    /// The attempt.
    pub attempt: AttemptId,
    /// The seat.
    pub role: Role,
    /// What to do.
    pub spec: ShardSpec,
    /// Directory of this attempt and seat, empty, writable.
    pub directory: String,
    /// Models of the spec on this box.
    pub models: Vec<ModelFile>,
    /// Artifacts that it needs: (name by which the spec knows it, path).
    pub inputs: Vec<(String, String)>,
}

/// A model on this box.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelFile {
    /// As the spec names it.
    pub name: String,
    /// File or directory.
    pub path: String,
    /// `sha256:…` that it must have, where known.
    pub fingerprint: Option<String>,
}

/// A packet as a file below an attempt's directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PacketFile {
    /// The attempt.
    pub attempt: AttemptId,
    /// Name that both seats derive from the spec: `fact-3`.
    pub key: String,
    /// Where it lies.
    pub path: String,
}

/// A packet by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PacketKey {
    /// The attempt.
    pub attempt: AttemptId,
    /// Its name.
    pub key: String,
}

/// Stop an attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopSeat {
    /// The attempt.
    pub attempt: AttemptId,
}

/// The executor's greeting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// [`crate::BUILD`] of the executor.
    pub build: String,
    /// What it computes on: `cpu`, `cuda 7.5`.
    pub backend: String,
    /// Compute threads.
    pub threads: u32,
}

/// A step is done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progressed {
    /// The attempt.
    pub attempt: AttemptId,
    /// How far.
    pub progress: SeatProgress,
}

/// The seat's part is done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finished {
    /// The attempt.
    pub attempt: AttemptId,
    /// Files below the attempt's directory to publish: (name in the shard, path).
    pub outputs: Vec<(String, String)>,
    /// Peak memory of this process on its device, bytes.
    pub memory_peak_bytes: u64,
    /// `sha256:…` of each model used, by its name in the spec.
    pub models: Vec<(String, String)>,
    /// Time spent in waiting for packets, or for room for them on their way, milliseconds.
    pub waited_ms: u64,
}

/// The seat's part failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// The attempt.
    pub attempt: AttemptId,
    /// Why.
    pub failure: Failure,
}
