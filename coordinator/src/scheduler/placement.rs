//! Which devices a shard gets: those with which it is expected to end earliest, which may mean waiting for a fast one.
//!
//! A round looks at those who share the cluster in turn: gangs whole or not at all, then single seats. Few shards are planned
//! one by one ([`super::assign`]), many by classes and prices ([`super::prices`]). Looks only: the machine turns what comes out
//! into events. Every placement carries its reasons.

use std::collections::{BTreeMap, BTreeSet};

use protocol::hardware::DeviceKind;
use protocol::ids::{AttemptId, DeviceRef, Fence, Role, RunId, ShardId};
use protocol::time::UnixMillis;

use super::assign::{self, Job, NEVER};
use super::board::{Occupant, Row, RowId};
use super::event::{PlacedSeat, Policy};
use super::prices::{Load, dearness, prices};
use super::queue::{Pool, PoolKey, RequestId};
use super::reason::{Rated, Reason};
use super::request::{Request, SeatNeed};
use super::view::{Expected, Slot, View, World};

/// Reasons kept with a placement: enough to see the pattern, without a large cluster filling the journal.
pub const REASONS_PER_PLACEMENT_MAX: usize = 16;
/// A shard expected to take less than this gets no reasons but its own device: looking at the others would take longer.
const REASONS_WORTH_MS: u64 = 1_000;
/// With more devices than this only those chosen get a reason: some of the others, picked by chance, would tell nobody anything.
const REASONED_DEVICES_MAX: usize = 128;
/// Shards of a pool that are planned one by one.
const PLANNED_MAX: usize = 512;
/// Steps of a plan (shards × requests × devices) that are worth it.
const PLAN_STEPS_MAX: usize = 600_000;
/// Longest life of an order of requests, milliseconds: what can run where changes without a word, too.
const RANKING_MS: u64 = 10_000;
/// Shards that take less than this are not planned one by one, milliseconds.
const BRIEF_MS: u64 = 50;
/// Improvements of a plan.
const MOVES_MAX: usize = 300;
/// Columns that one device has in a plan at most.
const COLUMNS_PER_DEVICE_MAX: usize = 8;
/// A class goes to a device model on which it is dearer by less than this, thousandths.
const DEARNESS_MAX: u64 = 1_600;

/// A decision: these devices for this shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// The shard with the fencing number that it gets; numbers follow on those in the state, in the order of the round.
    pub attempt: AttemptId,
    /// Who pays for it.
    pub pool: PoolKey,
    /// What it is worth, reference milliseconds.
    pub reference_ms: u64,
    /// Its seats.
    pub seats: Vec<PlacedSeat>,
    /// Why these.
    pub reasons: Vec<Rated>,
}

/// What was planned for a pool before and is still a good plan.
pub type Plans = BTreeMap<PoolKey, BTreeMap<(RowId, usize), Vec<RequestId>>>;

/// Orders of requests by device model, while much waits.
#[derive(Debug, Clone, Default)]
pub struct Ranking {
    at: UnixMillis,
    version: u64,
    fleet: u64,
    shards: usize,
    requests: Vec<RequestId>,
    by_kind: Vec<Vec<RequestId>>,
}

/// Which devices a round looks at.
#[derive(Debug, Clone)]
pub enum Scope {
    /// Every one that may have room: something new waits.
    All,
    /// Those about which something changed.
    Rows(BTreeSet<RowId>),
}

/// A round in progress.
pub struct Round<'a> {
    view: View<'a>,
    scope: &'a Scope,
    /// Rows with what this round put on them.
    overlay: BTreeMap<RowId, Row>,
    /// Rows that wait for a gang, and until when: what is over by then may run there.
    held: BTreeMap<RowId, UnixMillis>,
    /// Shards of each run that this round starts.
    started: BTreeMap<RunId, u32>,
    /// Where to look for the next shard of a request.
    cursors: BTreeMap<RequestId, ShardId>,
    placements: Vec<Placement>,
}

impl<'a> Round<'a> {
    /// Places what one pool can have now: the first in order that can have anything.
    pub fn run(
        view: View<'a>,
        scope: &'a Scope,
        plans: &mut Plans,
        rankings: &mut BTreeMap<PoolKey, Ranking>,
    ) -> Vec<Placement> {
        let mut round = Self::new(view, scope);
        let order = view.live.queue.order();
        for (at, key) in order.iter().enumerate() {
            let rivals = order.iter().enumerate().any(|(other, rival)| other != at && rival.priority == key.priority);
            // Those who share take turns, one shard each.
            let limit = if rivals { 1 } else { usize::MAX };
            let Some(pool) = view.live.queue.pool(key) else { continue };
            round.place_gangs(key, pool, limit);
            match view.state.settings.policy {
                Policy::FirstIdle | Policy::FastestIdle => round.first_come(key, pool, limit),
                Policy::SpeedFactor | Policy::EarliestFinish if round.is_small(pool) => {
                    round.planned(key, pool, limit, plans);
                }
                Policy::SpeedFactor | Policy::EarliestFinish => {
                    round.priced(key, pool, limit, rankings.entry(key.clone()).or_default());
                }
            }
            if !round.placements.is_empty() {
                break;
            }
        }
        round.placements
    }

    /// A second attempt of a running shard on devices that have nothing to do, where `overtakes` holds of the seat that takes
    /// longest: the fastest.
    pub fn beside(view: View<'a>, shard: ShardId, overtakes: impl Fn(Expected) -> bool) -> Option<Placement> {
        let run = view.state.runs.get(&shard.run)?;
        let body = run.shards.get(shard.index as usize)?;
        let request = Request::of(view.state, run, shard.index, body);
        let mut round = Self::new(view, &Scope::All);
        let taken: Vec<_> = body.open_attempts().flat_map(|attempt| &attempt.seats).map(|seat| &seat.device).collect();
        let is_idle = |row: &Row| row.lanes.is_empty() && !taken.contains(&&row.device);
        let fits = match request.is_gang() {
            true => {
                let busy = view.live.board.rows().filter(|(_, row)| !is_idle(row));
                round.held.extend(busy.map(|(id, _)| (id, view.now)));
                round.gang(&request, World::Now)?
            }
            false => {
                let idle = view.live.board.rows().filter(|(_, row)| is_idle(row));
                let fits = idle.filter_map(|(id, _)| Some((id, round.fit(id, &request)?)));
                let fits = fits.filter(|(_, fit)| overtakes(fit.expected));
                vec![fits.min_by_key(|(id, fit)| (fit.expected.ms, *id))?]
            }
        };
        let longest = fits.iter().map(|(_, fit)| fit.expected).max_by_key(|expected| expected.ms)?;
        if !overtakes(longest) {
            return None;
        }
        let key = PoolKey { priority: std::cmp::Reverse(run.priority), account: run.account.clone() };
        round.take(&key, shard, &request, &fits);
        round.placements.pop()
    }

    /// Devices, by seat, that shards with this request would get if as many as can, `most` at most, were placed now.
    pub fn rehearsed(view: View<'a>, request: &Request, most: usize) -> Vec<Vec<(RowId, Role)>> {
        let mut round = Self::new(view, &Scope::All);
        let mut gangs = Vec::new();
        while gangs.len() < most {
            let Some(fits) = round.gang(request, World::Now) else { break };
            let attempt = AttemptId { shard: ShardId { run: RunId(0), index: 0 }, fence: Fence(0) };
            fits.iter().for_each(|(id, fit)| round.occupy(*id, fit, attempt));
            gangs.push(fits.iter().map(|(id, fit)| (*id, fit.seat.role)).collect());
        }
        gangs
    }

    /// Whether all of a request fits at once in `world`, with every place allowed.
    pub fn could_place(view: View<'a>, request: &Request, world: World) -> bool {
        Self::new(view, &Scope::All).could(request, world)
    }

    /// The device that a request is planned to wait for.
    pub fn awaited(view: View<'a>, request: &Request) -> Option<DeviceRef> {
        let mut planned = view.live.plans.values().flatten();
        let waits = |ids: &Vec<RequestId>| ids.iter().any(|id| view.live.queue.request(*id) == request);
        let (key, _) = planned.find(|(_, ids)| waits(ids))?;
        let row = view.row(key.0);
        // Behind its own kind, not for something faster, if nothing else would do.
        let elsewhere = view.live.board.rows().any(|(id, row)| {
            let seat = request.seats.first();
            id != key.0
                && seat.is_some_and(|seat| matches!(view.rate(row, request, seat, World::Now), Reason::Fits { .. }))
        });
        elsewhere.then(|| row.device.clone())
    }

    fn new(view: View<'a>, scope: &'a Scope) -> Self {
        Self {
            view,
            scope,
            overlay: BTreeMap::new(),
            held: BTreeMap::new(),
            started: BTreeMap::new(),
            cursors: BTreeMap::new(),
            placements: Vec::new(),
        }
    }

    fn row(&self, id: RowId) -> &Row {
        self.overlay.get(&id).unwrap_or_else(|| self.view.row(id))
    }

    fn request(&self, id: RequestId) -> &'a Request {
        self.view.live.queue.request(id)
    }

    /// The oldest shard of a request that this round has not placed and whose run may have one more running.
    fn next_shard(&self, id: RequestId, shards: &BTreeSet<ShardId>) -> Option<ShardId> {
        let mut from = self.cursors.get(&id).copied().unwrap_or(ShardId { run: RunId(0), index: 0 });
        loop {
            let shard = *shards.range(from..).next()?;
            if !self.is_capped(shard.run) {
                return Some(shard);
            }
            from = ShardId { run: RunId(shard.run.0 + 1), index: 0 };
        }
    }

    /// Shards of a request up to this one are placed, or may not be.
    fn pass(&mut self, id: RequestId, shard: ShardId) {
        self.cursors.insert(id, ShardId { index: shard.index + 1, ..shard });
    }

    fn is_capped(&self, run: RunId) -> bool {
        let Some(body) = self.view.state.runs.get(&run) else { return true };
        let running = body.running.len() + self.started.get(&run).copied().unwrap_or(0) as usize;
        body.running_max > 0 && running >= body.running_max as usize
    }

    /// Rows that may take something, in the order of joining.
    fn candidates(&self) -> Vec<RowId> {
        match self.scope {
            Scope::All => self.view.live.board.rows().map(|(id, _)| id).collect(),
            Scope::Rows(rows) => rows.iter().filter(|row| !self.view.row(**row).gone).copied().collect(),
        }
    }

    /// Whether every shard of the pool is over sooner than a plan for it would be worth.
    fn is_brief(&self, pool: &Pool) -> bool {
        let Some((_, row)) = self.view.live.board.rows().find(|(_, row)| self.view.in_service(row)) else {
            return false;
        };
        pool.requests.keys().all(|id| {
            let request = self.request(*id);
            let role = request.seats.first().map(|seat| seat.role);
            role.is_some_and(|role| self.view.expected(row, request, role).ms <= BRIEF_MS)
        })
    }

    fn is_small(&self, pool: &Pool) -> bool {
        if pool.shards > PLANNED_MAX || self.is_brief(pool) {
            return false;
        }
        let devices = self.view.live.board.len();
        pool.shards.saturating_mul(pool.requests.len()).saturating_mul(devices.max(1)) <= PLAN_STEPS_MAX
    }
}

/// Single seats.
impl Round<'_> {
    /// As schedulers without a throughput table do: the oldest shard on the first device that is idle.
    fn first_come(&mut self, key: &PoolKey, pool: &Pool, limit: usize) {
        let mut rows = self.candidates();
        if self.view.state.settings.policy == Policy::FastestIdle {
            rows.sort_by_key(|row| std::cmp::Reverse(self.view.live.mflops(&self.view.row(*row).body.model)));
        }
        let mut shards: Vec<_> =
            pool.requests.iter().flat_map(|(id, set)| set.iter().map(move |shard| (*shard, *id))).collect();
        shards.sort_unstable();
        for (shard, id) in shards {
            let request = self.request(id);
            if request.is_gang() || self.is_capped(shard.run) {
                continue;
            }
            let place = rows.iter().copied().find_map(|row| Some((row, self.fit(row, request)?)));
            if let Some((row, fit)) = place.filter(|(_, fit)| !fit.slot.behind) {
                self.take(key, shard, request, &[(row, fit)]);
                if self.placements.len() >= limit {
                    return;
                }
            }
        }
    }

    /// Plans every shard of the pool on every device, and starts what the plan starts now.
    fn planned(&mut self, key: &PoolKey, pool: &Pool, limit: usize, plans: &mut Plans) {
        let ids: Vec<RequestId> = pool.requests.keys().copied().filter(|id| !self.request(*id).is_gang()).collect();
        if ids.is_empty() || self.candidates().is_empty() {
            return;
        }
        let columns = self.columns(&ids);
        let jobs: Vec<Job> = ids.iter().map(|id| self.job(*id, pool.requests[id].len(), &columns)).collect();
        let ready: Vec<u64> = columns.iter().map(|column| column.ready_ms).collect();
        let before = plans.remove(key).unwrap_or_default();
        let position = |id: &RequestId| ids.binary_search(id).ok();
        let before = columns
            .iter()
            .map(|column| before.get(&column.key).into_iter().flatten().filter_map(position).collect())
            .collect();
        let mut plan = assign::plan(&jobs, &ready, before, MOVES_MAX);
        for (at, column) in columns.iter().enumerate() {
            // Short ones first: results come earlier, and the table learns sooner. With one speed a card nothing is learned.
            plan[at].sort_by_key(|job| (jobs[*job].times[at], *job));
            if self.view.state.settings.policy == Policy::SpeedFactor {
                plan[at].reverse();
            }
            let mut rest = Vec::new();
            for job in std::mem::take(&mut plan[at]) {
                let open = self.placements.len() < limit;
                if !(open && self.start(key, pool, ids[job], column.key.0)) {
                    rest.push(job);
                }
            }
            plan[at] = rest;
        }
        let kept = columns.iter().zip(&plan).filter(|(_, jobs)| !jobs.is_empty());
        let kept = kept.map(|(column, jobs)| (column.key, jobs.iter().map(|job| ids[*job]).collect())).collect();
        plans.insert(key.clone(), kept);
    }

    /// Fills each device with the class that belongs there.
    fn priced(&mut self, key: &PoolKey, pool: &Pool, limit: usize, ranking: &mut Ranking) {
        self.rank(pool, ranking);
        for row in self.candidates() {
            let kind = self.view.row(row).kind.0 as usize;
            for id in ranking.by_kind.get(kind).into_iter().flatten() {
                while !self.view.is_closed(self.row(row)) && self.start(key, pool, *id, row) {
                    if self.placements.len() >= limit {
                        return;
                    }
                }
                if self.view.is_closed(self.row(row)) {
                    break;
                }
            }
        }
    }

    /// Ranks the pool's requests for each device model, if what waits or what is known has changed enough.
    fn rank(&self, pool: &Pool, ranking: &mut Ranking) {
        let ids = || pool.requests.keys().copied().filter(|id| !self.request(*id).is_gang());
        let (version, fleet) = (self.view.state.table.version(), self.view.live.fleet_version);
        let fresh = ranking.fleet == fleet && self.view.now.since_ms(ranking.at) < RANKING_MS;
        let moved = pool.shards.abs_diff(ranking.shards);
        // A rank costs a look at every device: news about times waits until some shards have been placed.
        let near = moved * 5 <= ranking.shards && (ranking.version == version || moved * 200 <= ranking.shards);
        if near && fresh && ids().eq(ranking.requests.iter().copied()) {
            return;
        }
        let kinds = self.view.live.board.kinds();
        let mut rows: Vec<Vec<&Row>> = vec![Vec::new(); kinds];
        for (_, row) in self.view.live.board.rows().filter(|(_, row)| self.view.in_service(row)) {
            rows[row.kind.0 as usize].push(row);
        }
        let devices: Vec<u64> = rows.iter().map(|rows| rows.len() as u64).collect();
        let requests: Vec<RequestId> = ids().collect();
        // Of a device model the first that would do if nothing of ours ran speaks for all; whether one will do now is asked when
        // it is its turn.
        let time = |id: &RequestId, rows: &Vec<&Row>| {
            let request = self.request(*id);
            let Some(seat) = request.seats.first() else { return NEVER };
            let fits = |row: &Row| matches!(self.view.rate(row, request, seat, World::Idle), Reason::Fits { .. });
            let row = rows.iter().find(|row| fits(row)).or(rows.first());
            row.map_or(NEVER, |row| self.view.expected(row, request, seat.role).ms.max(1))
        };
        let load = |id: &RequestId| Load {
            count: pool.requests[id].len() as u64,
            times: rows.iter().map(|rows| time(id, rows)).collect(),
        };
        let loads: Vec<Load> = requests.iter().map(load).collect();
        let prices = prices(&loads, &devices);
        // Brief work goes wherever there is room.
        let dearness_max = if self.is_brief(pool) { u64::MAX } else { DEARNESS_MAX };
        let ranked = |kind: usize| {
            let dear = |(load, id): (&Load, &RequestId)| {
                let dearness = dearness(load, &prices, kind).filter(|dearness| *dearness <= dearness_max)?;
                // What is about equally at home: the short ones first.
                Some((dearness / 50, load.times[kind], *id))
            };
            let mut order: Vec<_> = loads.iter().zip(&requests).filter_map(dear).collect();
            order.sort_unstable();
            order.into_iter().map(|(_, _, id)| id).collect()
        };
        *ranking = Ranking {
            at: self.view.now,
            version,
            fleet,
            shards: pool.shards,
            by_kind: (0..kinds).map(ranked).collect(),
            requests,
        };
    }

    /// Starts the oldest shard of a request on a row; `false` if it has no room or nobody may.
    fn start(&mut self, key: &PoolKey, pool: &Pool, id: RequestId, row: RowId) -> bool {
        let request = self.request(id);
        let Some(fit) = self.fit(row, request) else { return false };
        let Some(shard) = pool.requests.get(&id).and_then(|shards| self.next_shard(id, shards)) else { return false };
        self.take(key, shard, request, &[(row, fit)]);
        self.pass(id, shard);
        true
    }

    /// How a request with one seat would go onto a row now.
    fn fit(&self, id: RowId, request: &Request) -> Option<Fit> {
        let seat = request.seats.first()?;
        let row = self.row(id);
        if request.avoids(&row.device) && self.has_other_place(request, seat) {
            return None;
        }
        let expected = self.view.expected(row, request, seat.role);
        if self.held.get(&id).is_some_and(|until| self.view.now.plus_ms(expected.ms) > *until) {
            return None;
        }
        let bytes = self.view.need_bytes(request, seat);
        let slot = self.view.slot(row, request, seat, bytes, expected)?;
        Some(Fit { seat: *seat, bytes, expected, slot })
    }

    /// Whether a place that has not failed this request is only busy with our own work: worth the wait.
    fn has_other_place(&self, request: &Request, seat: &SeatNeed) -> bool {
        self.view.live.board.rows().any(|(_, row)| {
            !request.avoids(&row.device)
                && matches!(self.view.rate(row, request, seat, World::Idle), Reason::Fits { .. })
        })
    }

    /// Expected time of a request's first seat on a row, milliseconds; [`NEVER`] if it would not do even if idle.
    fn time(&self, row: &Row, request: &Request) -> u64 {
        let Some(seat) = request.seats.first() else { return NEVER };
        match self.view.rate(row, request, seat, World::Idle) {
            Reason::Fits { .. } => {
                let ms = self.view.expected(row, request, seat.role).ms.max(1);
                // A worker without the labels that are preferred counts as a tenth slower for each.
                ms.saturating_add(ms / 10 * self.view.unpreferred(row, request) as u64)
            }
            _ => NEVER,
        }
    }

    fn job(&self, id: RequestId, count: usize, columns: &[Column]) -> Job {
        let request = self.request(id);
        let seat = request.seats.first();
        let shy = seat.is_some_and(|seat| !request.avoid.is_empty() && self.has_other_place(request, seat));
        let mut by_row: BTreeMap<RowId, u64> = BTreeMap::new();
        let times = columns.iter().map(|column| {
            *by_row.entry(column.key.0).or_insert_with(|| {
                let row = self.row(column.key.0);
                if shy && request.avoids(&row.device) { NEVER } else { self.time(row, request) }
            })
        });
        Job { count, times: times.collect() }
    }

    /// Devices in service as columns of a plan: one for each seat that can run there at a time.
    fn columns(&self, ids: &[RequestId]) -> Vec<Column> {
        let threads = ids.iter().flat_map(|id| &self.request(*id).seats).map(|seat| seat.threads).max().unwrap_or(None);
        let fewest = ids.iter().flat_map(|id| &self.request(*id).seats).filter_map(|seat| seat.threads).min();
        let threads = fewest.or(threads);
        let now = self.view.now;
        let mut columns = Vec::new();
        for (id, row) in self.view.live.board.rows().filter(|(_, row)| self.view.in_service(row)) {
            let row = self.overlay.get(&id).unwrap_or(row);
            let mut busy: Vec<u64> = row.lanes.values().map(|lane| lane.remaining_ms(now)).collect();
            let slots = match row.body.kind {
                // Seats that share a card take turns: its column is free when all of them are done.
                DeviceKind::Cuda => {
                    busy = busy.into_iter().max().into_iter().collect();
                    1
                }
                DeviceKind::Cpu => row.slots(threads).clamp(busy.len().max(1), COLUMNS_PER_DEVICE_MAX),
            };
            busy.sort_unstable_by(|a, b| b.cmp(a));
            let ready = (0..slots).map(|slot| busy.get(slot).copied().unwrap_or(0));
            columns.extend(ready.enumerate().map(|(slot, ready_ms)| Column { key: (id, slot), ready_ms }));
        }
        columns
    }

    /// Gives a shard its devices.
    fn take(&mut self, key: &PoolKey, shard: ShardId, request: &Request, fits: &[(RowId, Fit)]) {
        let fence = Fence(self.view.state.fences + 1 + self.placements.len() as u64);
        let attempt = AttemptId { shard, fence };
        let reasons = self.reasons(request, fits);
        let mut seats = Vec::with_capacity(fits.len());
        for (id, fit) in fits {
            let device = self.row(*id).device.clone();
            let (SeatNeed { role, load, .. }, lane, expected_ms) = (fit.seat, fit.slot.lane, fit.expected.ms);
            self.occupy(*id, fit, attempt);
            seats.push(PlacedSeat { role, device, reserved_bytes: fit.bytes, lane, expected_ms, load });
        }
        *self.started.entry(shard.run).or_default() += 1;
        let reference_ms = self.view.reference_ms(request);
        self.placements.push(Placement { attempt, pool: key.clone(), reference_ms, seats, reasons });
    }

    /// Puts a seat onto a row, as far as this round is concerned.
    fn occupy(&mut self, id: RowId, fit: &Fit, attempt: AttemptId) {
        let (expected_ms, now) = (fit.expected.ms, self.view.now);
        let (SeatNeed { role, threads, load, .. }, bytes) = (fit.seat, fit.bytes);
        let row = self.overlay.entry(id).or_insert_with(|| self.view.row(id).clone());
        let body = row.lanes.entry(fit.slot.lane).or_default();
        body.until = body.until.max(now).plus_ms(expected_ms);
        body.push(Occupant { attempt, role, bytes, threads, load, expected_ms, since: now });
    }

    fn reasons(&self, request: &Request, fits: &[(RowId, Fit)]) -> Vec<Rated> {
        let chosen = fits.iter().map(|(id, fit)| {
            let row = self.row(*id);
            let free_bytes = self.view.free_bytes(row, World::Now);
            let (expected_ms, basis) = (fit.expected.ms, Some(fit.expected.basis));
            Rated { device: row.device.clone(), reason: Reason::Chosen { free_bytes, expected_ms, basis } }
        });
        let mut reasons: Vec<Rated> = chosen.collect();
        let few = self.view.live.board.len() <= REASONED_DEVICES_MAX;
        let worth = few && fits.iter().any(|(_, fit)| fit.expected.ms >= REASONS_WORTH_MS);
        if worth && let Some(seat) = request.seats.first() {
            let others = self.view.live.board.rows().filter(|(id, _)| fits.iter().all(|(taken, _)| taken != id));
            let left = REASONS_PER_PLACEMENT_MAX.saturating_sub(reasons.len());
            for (id, _) in others.take(left) {
                let row = self.row(id);
                let reason = match self.view.rate(row, request, seat, World::Now) {
                    Reason::Fits { .. } => {
                        Reason::Slower { expected_ms: self.view.expected(row, request, seat.role).ms }
                    }
                    other => other,
                };
                reasons.push(Rated { device: row.device.clone(), reason });
            }
        }
        reasons
    }
}

/// A place in a plan: one seat at a time on one device.
struct Column {
    key: (RowId, usize),
    ready_ms: u64,
}

/// How a seat goes onto a row.
#[derive(Debug, Clone, Copy)]
struct Fit {
    seat: SeatNeed,
    bytes: u64,
    expected: Expected,
    slot: Slot,
}

mod gang;
mod pair;
