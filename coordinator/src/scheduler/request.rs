//! What a waiting shard asks for: equal requests are compared once, however many shards make them.

use std::collections::{BTreeMap, BTreeSet};

use protocol::control::FailureKind;
use protocol::experiment::{ShardSpec, Spread};
use protocol::group::Require;
use protocol::ids::{AttemptId, DeviceRef, Role, RunId, ShardId, WorkerId};

use super::estimate;
use super::event::WHOLE;
use super::state::{AttemptState, Run, Shard, State};

/// What a shard asks for. Ordered without whose it is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Request {
    /// Work class: the row of the throughput table.
    pub class: String,
    /// Units of work.
    pub units: u32,
    /// Its seats, in the order of the spec's roles.
    pub seats: Vec<SeatNeed>,
    /// Models that each seat's worker must have, in the order of the seats.
    pub models: Vec<Vec<String>>,
    /// Where the seats may sit relative to each other.
    pub spread: Spread,
    /// What its devices must be.
    pub require: Require,
    /// It runs a researcher's program, which not every operator allows.
    pub command: bool,
    /// Where it failed: other places go first.
    pub avoid: BTreeSet<Place>,
}

/// What a seat needs of its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SeatNeed {
    /// The seat.
    pub role: Role,
    /// Memory by the model of it, bytes, before what was learned.
    pub bytes: u64,
    /// Compute threads of a processor; `None`: all.
    pub threads: Option<u32>,
    /// Share of its device's time, thousandths.
    pub load: u16,
}

/// A place to avoid.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// One device: the failure was the device's or its executor's.
    Device(DeviceRef),
    /// The whole worker: the failure was the box's.
    Worker(WorkerId),
}

impl Request {
    /// What the shard asks for.
    pub fn of(state: &State, run: &Run, index: u32, shard: &Shard) -> Self {
        let require = run.group_of(index).map(|group| group.require.clone()).unwrap_or_default();
        let avoid = failures(ShardId { run: RunId(0), index }, shard).into_keys().collect();
        Self { avoid, ..Self::for_spec(state, &shard.spec, require) }
    }

    /// What a shard that nobody has tried asks for.
    pub fn for_spec(state: &State, spec: &ShardSpec, require: Require) -> Self {
        let seat = |role: &Role| SeatNeed {
            role: *role,
            bytes: estimate::seat_bytes(spec, *role, |model| state.shape(model)),
            threads: spec.threads(),
            load: WHOLE,
        };
        let models = |role: &Role| spec.models_of(*role).into_iter().map(str::to_owned).collect();
        Self {
            class: spec.work_class(),
            units: spec.work_units(),
            seats: spec.roles().iter().map(seat).collect(),
            models: spec.roles().iter().map(models).collect(),
            spread: spec.spread(),
            require,
            command: matches!(spec, ShardSpec::Command(_)),
            avoid: BTreeSet::new(),
        }
    }

    /// Whether the shard failed at this device or its worker.
    pub fn avoids(&self, device: &DeviceRef) -> bool {
        !self.avoid.is_empty()
            && (self.avoid.contains(&Place::Worker(device.worker))
                || self.avoid.contains(&Place::Device(device.clone())))
    }

    /// Models that a seat's worker must have.
    pub fn models_of(&self, role: Role) -> &[String] {
        let at = self.seats.iter().position(|seat| seat.role == role);
        at.and_then(|at| self.models.get(at)).map_or(&[], Vec::as_slice)
    }

    /// Whether several seats must start at once.
    pub fn is_gang(&self) -> bool {
        self.seats.len() > 1
    }

    /// Name of a seat's row in the throughput table and in what is learned about memory.
    pub fn seat_class(&self, role: Role) -> String {
        seat_class(&self.class, role)
    }
}

/// Name of a seat's row in the throughput table.
pub fn seat_class(class: &str, role: Role) -> String {
    match role {
        Role::Main => class.to_owned(),
        role => format!("{class}/{role}"),
    }
}

/// Unit of the throughput table's rows about links, bytes.
pub const MEGABYTE: u64 = 1_000_000;

/// Name of the throughput table's row about links from a worker; its columns are workers.
pub fn link_class(from: WorkerId) -> String {
    format!("link/{from}")
}

/// Where a shard failed and with which attempt, since it was reopened.
pub fn failures(id: ShardId, shard: &Shard) -> BTreeMap<Place, AttemptId> {
    let mut failures = BTreeMap::new();
    for attempt in shard.attempts.iter().skip(shard.reopened_at_attempt as usize) {
        let AttemptState::Failed { role, failure } = &attempt.state else { continue };
        let Some(seat) = attempt.seat(*role) else { continue };
        let place = match failure.kind {
            FailureKind::ExecutorLost
            | FailureKind::OutOfMemory
            | FailureKind::NoKernel
            | FailureKind::DeviceSick
            | FailureKind::CommandFailed
            | FailureKind::TimedOut => Place::Device(seat.device.clone()),
            FailureKind::PeerLost => continue,
            _ => Place::Worker(seat.device.worker),
        };
        failures.insert(place, AttemptId { shard: id, fence: attempt.fence });
    }
    failures
}
