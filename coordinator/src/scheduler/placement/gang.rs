//! Gangs: shards whose seats must start at once, on one device if they fit there, else on several, or not at all.

use std::collections::BTreeMap;

use protocol::experiment::Spread;

use super::super::board::{Row, RowId};
use super::super::queue::{Pool, PoolKey};
use super::super::reason::Reason;
use super::super::request::{Request, SeatNeed};
use super::super::view::{Slot, World};
use super::{Fit, Round};

impl Round<'_> {
    /// Places gangs of a pool, oldest request first. For the first that finds its devices busy they are kept free.
    pub(super) fn place_gangs(&mut self, key: &PoolKey, pool: &Pool, limit: usize) {
        let gangs = pool.requests.iter().filter(|(id, _)| self.request(**id).is_gang());
        let mut gangs: Vec<_> = gangs.collect();
        // A round's largest share is its first shard, and the first takes the fastest devices.
        gangs.sort_unstable_by_key(|(_, shards)| shards.first());
        for (id, shards) in gangs {
            let request = self.request(*id);
            while let Some(shard) = self.next_shard(*id, shards) {
                if self.placements.len() >= limit {
                    return;
                }
                let Some(fits) = self.gang(request, World::Now) else { break };
                self.take(key, shard, request, &fits);
                self.pass(*id, shard);
            }
            let left = self.next_shard(*id, shards).is_some();
            if left && self.held.is_empty() && self.placements.is_empty() {
                self.hold_for(request);
            }
        }
    }

    /// Rows for all seats, or nothing.
    pub(super) fn gang(&self, request: &Request, world: World) -> Option<Vec<(RowId, Fit)>> {
        let shy = self.gang_avoiding(request, world, true);
        match shy {
            Some(fits) => Some(fits),
            None if request.avoid.is_empty() => None,
            // A place that has not failed this shard is only busy with our own work: worth the wait.
            None if world == World::Now && self.gang_avoiding(request, World::Idle, true).is_some() => None,
            None => self.gang_avoiding(request, world, false),
        }
    }

    fn gang_avoiding(&self, request: &Request, world: World, avoiding: bool) -> Option<Vec<(RowId, Fit)>> {
        let rows: Vec<RowId> = self
            .view
            .live
            .board
            .rows()
            .filter(|(id, row)| !(self.held.contains_key(id) || avoiding && request.avoids(&row.device)))
            .map(|(id, _)| id)
            .collect();
        if request.spread == Spread::Any
            && let Some(fits) = self.together(request, &rows, world)
        {
            return Some(fits);
        }
        self.paired(request, &rows, world).or_else(|| self.apart(request, &rows, world))
    }

    /// Whether all seats of a request have a place in `world`.
    pub(super) fn could(&self, request: &Request, world: World) -> bool {
        if request.is_gang() {
            return self.gang_avoiding(request, world, false).is_some();
        }
        let Some(seat) = request.seats.first() else { return false };
        let fits = |row: &Row| matches!(self.view.rate(row, request, seat, world), Reason::Fits { .. });
        self.view.live.board.rows().any(|(_, row)| fits(row))
    }

    /// All seats on one row: where they end earliest.
    fn together(&self, request: &Request, rows: &[RowId], world: World) -> Option<Vec<(RowId, Fit)>> {
        let fits_on = |id: &RowId| {
            let row = self.row(*id);
            let bytes: u64 = request.seats.iter().map(|seat| self.view.need_bytes(request, seat)).sum();
            let fit = |seat| matches!(self.view.rate_bytes(row, request, seat, bytes, world), Reason::Fits { .. });
            let fits = request.seats.iter().all(fit);
            fits.then(|| {
                let lanes = free_lanes(row);
                request
                    .seats
                    .iter()
                    .zip(lanes)
                    .map(|(seat, lane)| (*id, self.gang_fit(row, request, seat, lane)))
                    .collect()
            })
        };
        let sum = |fits: &Vec<(RowId, Fit)>| fits.iter().map(|(_, fit)| fit.expected.ms).sum::<u64>();
        rows.iter().filter_map(fits_on).min_by_key(|fits| (sum(fits), fits.first().map(|(id, _)| *id)))
    }

    /// Each seat on the row where it ends earliest of those that are left; the one with the largest need chooses first.
    fn apart(&self, request: &Request, rows: &[RowId], world: World) -> Option<Vec<(RowId, Fit)>> {
        let mut order: Vec<usize> = (0..request.seats.len()).collect();
        order.sort_by_key(|at| std::cmp::Reverse(self.view.need_bytes(request, &request.seats[*at])));
        let mut chosen: BTreeMap<usize, (RowId, Fit)> = BTreeMap::new();
        for at in order {
            let seat = &request.seats[at];
            let free = |id: &&RowId| {
                chosen.values().all(|(other, _)| match request.spread {
                    Spread::Any | Spread::Devices => other != *id,
                    Spread::Workers => self.row(*other).device.worker != self.row(**id).device.worker,
                })
            };
            let fit = |id: &RowId| {
                let row = self.row(*id);
                let fits = matches!(self.view.rate(row, request, seat, world), Reason::Fits { .. });
                fits.then(|| (*id, self.gang_fit(row, request, seat, row.new_lane())))
            };
            // What was sent from the seats chosen so far, or will be sent to them, is on its way meanwhile.
            let fit = |id: &RowId| {
                let (id, mut fit) = fit(id)?;
                let way = |(other, _): &(RowId, Fit)| self.view.transfer_ms(request, self.row(*other), self.row(id));
                fit.expected.ms = fit.expected.ms.saturating_add(chosen.values().map(way).max().unwrap_or(0));
                Some((id, fit))
            };
            // Of equal times the one with more free memory.
            let best = rows.iter().filter(free).filter_map(fit).min_by_key(|(id, fit)| {
                let free_bytes = self.view.free_bytes(self.row(*id), world);
                (fit.expected.ms, std::cmp::Reverse(free_bytes), *id)
            })?;
            chosen.insert(at, best);
        }
        Some(chosen.into_values().collect())
    }

    fn gang_fit(&self, row: &Row, request: &Request, seat: &SeatNeed, lane: u32) -> Fit {
        let expected = self.view.expected(row, request, seat.role);
        let bytes = self.view.need_bytes(request, seat);
        Fit { seat: *seat, bytes, expected, slot: Slot { lane, behind: false } }
    }

    /// Keeps the rows that a gang would have if nothing of ours ran: single seats would take each as it gets free, for ever.
    fn hold_for(&mut self, request: &Request) {
        if let Some(fits) = self.gang(request, World::Idle) {
            let now = self.view.now;
            let free = |(id, fit): &(RowId, Fit)| self.row(*id).ready(fit.seat.threads, now);
            let start = fits.iter().map(free).max().unwrap_or(now);
            self.held.extend(fits.into_iter().map(|(id, _)| (id, start)));
        }
    }
}

/// Numbers that no lane of the row has.
fn free_lanes(row: &Row) -> impl Iterator<Item = u32> {
    (0..).filter(|number| !row.lanes.contains_key(number))
}
