//! Whose turn it is on a device. Seats of one lane hold it one after another, in the order of their fencing numbers; lanes
//! know nothing of each other.
//!
//! A seat holds its lane until whatever works for it has let go of the device, which may be after the seat itself is gone.
//! Seats of one attempt share a lane: they wait for each other's packets, so neither could wait for the other's end.
//!
//! A program may be on deck: handed to its runner while the program before it runs, so that it starts without a question.

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
    on_deck: Option<SeatId>,
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

    /// Who would be on deck, and behind whom: the first that waits, if one seat holds the lane and nobody is on deck yet.
    pub(super) fn may_be_on_deck(&self, lane: &LaneId) -> Option<(SeatId, SeatId)> {
        let lane = self.all.get(lane).filter(|lane| lane.on_deck.is_none() && lane.holding.len() == 1)?;
        let (_, seat) = lane.waiting.first()?;
        Some((*seat, *lane.holding.first()?))
    }

    /// A seat that waits is on deck from now on: the lane is its when the one before leaves.
    pub(super) fn put_on_deck(&mut self, seat: SeatId) {
        if let Some(lane) = self.of.get(&seat).and_then(|lane| self.all.get_mut(lane)) {
            lane.waiting.remove(&(seat.attempt.fence, seat));
            lane.on_deck = Some(seat);
        }
    }

    /// A seat holds or waits no longer: the lane in which others may go on now.
    pub(super) fn leave(&mut self, seat: SeatId) -> Option<LaneId> {
        let id = self.of.remove(&seat)?;
        let lane = self.all.get_mut(&id)?;
        lane.holding.remove(&seat);
        lane.waiting.remove(&(seat.attempt.fence, seat));
        lane.on_deck.take_if(|on_deck| *on_deck == seat);
        if lane.holding.is_empty() {
            lane.holding.extend(lane.on_deck.take());
        }
        if lane.holding.is_empty() && lane.waiting.is_empty() {
            self.all.remove(&id);
            return None;
        }
        Some(id)
    }

    /// For whom a seat waits; `None` if it does not.
    pub(super) fn before(&self, seat: SeatId) -> Option<SeatId> {
        let lane = self.all.get(self.of.get(&seat)?)?;
        if lane.holding.contains(&seat) {
            return None;
        }
        let ahead = lane.waiting.range(..(seat.attempt.fence, seat)).next_back().map(|(_, ahead)| *ahead);
        let on_deck = lane.on_deck.filter(|on_deck| *on_deck != seat);
        ahead.or(on_deck).or_else(|| lane.holding.first().copied())
    }
}
