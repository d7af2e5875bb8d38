//! Pairs of seats that share devices with other pairs: as many sources to a target, or targets to a source, as their speeds ask
//! for.

use std::cmp::Reverse;

use protocol::experiment::Spread;

use super::super::board::{Row, RowId};
use super::super::event::WHOLE;
use super::super::reason::Reason;
use super::super::request::{Request, SeatNeed};
use super::super::view::{Expected, Slot, World};
use super::{Fit, Round};

/// Devices of a role that are looked at.
const PLACES_MAX: usize = 16;

impl Round<'_> {
    /// Rows for two seats of which it is measured how long each works by itself. The one that waits for the other takes only part of
    /// its device; what is left is for further pairs. The pair that ends earliest; of equal ones that which takes the fewest
    /// free devices, and of these the slowest that do not hold it up.
    pub(super) fn paired(&self, request: &Request, rows: &[RowId], world: World) -> Option<Vec<(RowId, Fit)>> {
        let &[first, second] = &request.seats[..] else { return None };
        if !self.view.knows_paces(request) {
            return None;
        }
        let places = |seat: SeatNeed| {
            let least = SeatNeed { load: 1, ..seat };
            let fits =
                |id: &&RowId| matches!(self.view.rate(self.row(**id), request, &least, world), Reason::Fits { .. });
            let place = |id: &RowId| (self.view.expected(self.row(*id), request, seat.role), *id);
            let mut places: Vec<_> = rows.iter().filter(fits).map(place).collect();
            places.sort_unstable_by_key(|(expected, id)| (expected.ms, *id));
            places.truncate(PLACES_MAX);
            places
        };
        let (firsts, seconds) = (places(first), places(second));
        let pairs = firsts.iter().flat_map(|one| seconds.iter().map(move |other| [*one, *other]));
        let pair = |[(one, id), (other, other_id)]: [(Expected, RowId); 2]| {
            let (row, other_row) = (self.row(id), self.row(other_id));
            let apart = match request.spread {
                Spread::Any | Spread::Devices => id != other_id,
                Spread::Workers => row.device.worker != other_row.device.worker,
            };
            if !apart {
                return None;
            }
            let way_ms = self.view.transfer_ms(request, row, other_row);
            let work_us = one.work_us.max(other.work_us).max(way_ms.saturating_mul(1000)).max(1);
            let ms = one.ms.max(other.ms).max(way_ms);
            let fit = |row: &Row, seat: SeatNeed, expected: Expected| {
                let load = expected.work_us.saturating_mul(u64::from(WHOLE)).div_ceil(work_us);
                let seat = SeatNeed { load: u16::try_from(load).unwrap_or(WHOLE).clamp(1, WHOLE), ..seat };
                let fits = matches!(self.view.rate(row, request, &seat, world), Reason::Fits { .. });
                let bytes = self.view.need_bytes(request, &seat);
                let slot = Slot { lane: row.new_lane(), behind: false };
                fits.then_some(Fit { seat, bytes, expected: Expected { ms, ..expected }, slot })
            };
            let fits = [(id, fit(row, first, one)?), (other_id, fit(other_row, second, other)?)];
            let free = [row, other_row].into_iter().filter(|row| row.lanes.is_empty()).count();
            Some(((ms, free, Reverse(one.ms.saturating_add(other.ms)), id, other_id), fits))
        };
        let best = pairs.filter_map(pair).min_by_key(|(key, _)| *key)?;
        Some(best.1.to_vec())
    }
}
