//! Whose turn it is on a device. Seats of one lane hold it one after another, in the order of their fencing numbers; lanes
//! know nothing of each other.
//!
//! A seat holds its lane until whatever works for it has let go of the device, which may be after the seat itself is gone.
//! Seats of one attempt share a lane: they wait for each other's packets, so neither could wait for the other's end.

use std::collections::{BTreeMap, BTreeSet};

use protocol::ids::{DeviceId, Fence};

use super::io::SeatId;

/// A queue in front of a device.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct LaneId {
    /// The device.
    pub(super) device: DeviceId,
    /// Its number there.
    pub(super) lane: u32,
}

/// The lanes of a worker that anyone is in.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    all: BTreeMap<LaneId, Lane>,
    of: BTreeMap<SeatId, LaneId>,
}

#[derive(Debug, Default)]
struct Lane {
    holding: BTreeSet<SeatId>,
    waiting: BTreeSet<(Fence, SeatId)>,
}

impl Lanes {
    /// A seat queues up.
    pub(super) fn enter(&mut self, seat: SeatId, lane: LaneId) {
        self.all.entry(lane.clone()).or_default().waiting.insert((seat.attempt.fence, seat));
        self.of.insert(seat, lane);
    }

    /// The next seat whose turn has come; it holds the lane from now on.
    pub(super) fn next(&mut self, lane: &LaneId) -> Option<SeatId> {
        let lane = self.all.get_mut(lane)?;
        let &(fence, seat) = lane.waiting.first()?;
        if lane.holding.first().is_some_and(|holder| holder.attempt != seat.attempt) {
            return None;
        }
        lane.waiting.remove(&(fence, seat));
        lane.holding.insert(seat);
        Some(seat)
    }

    /// A seat holds or waits no longer: the lane in which others may go on now.
    pub(super) fn leave(&mut self, seat: SeatId) -> Option<LaneId> {
        let id = self.of.remove(&seat)?;
        let lane = self.all.get_mut(&id)?;
        lane.holding.remove(&seat);
        lane.waiting.remove(&(seat.attempt.fence, seat));
        if lane.holding.is_empty() && lane.waiting.is_empty() {
            self.all.remove(&id);
            return None;
        }
        Some(id)
    }

    /// For whom a waiting seat waits.
    pub(super) fn before(&self, seat: SeatId) -> Option<SeatId> {
        let lane = self.all.get(self.of.get(&seat)?)?;
        let ahead = lane.waiting.range(..(seat.attempt.fence, seat)).next_back().map(|(_, ahead)| *ahead);
        ahead.or_else(|| lane.holding.first().copied())
    }
}
