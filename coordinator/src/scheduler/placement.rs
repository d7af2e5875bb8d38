//! Which devices a shard gets. First policy: what fits in free memory, most free first, roles apart when asked, gangs whole
//! or not at all; every device gets a reason.
//!
//! Looks only: a pass works on a copy of the reservations and returns placements; the machine turns them into events.
//! Waiting shards are taken by priority, then run, then index; a shard that does not fit does not hold back those behind it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use protocol::control::FailureKind;
use protocol::experiment::Spread;
use protocol::hardware::{Device, DeviceKind, Telemetry};
use protocol::ids::{AttemptId, DeviceRef, Fence, Role, ShardId, WorkerId};
use protocol::time::UnixMillis;

use super::estimate::seat_bytes;
use super::event::PlacedSeat;
use super::live::Live;
use super::reason::{Rated, Reason};
use super::state::{AttemptState, Shard, State, Worker};
use super::status::WorkerState;

/// Attempts at a time on a box's processor. Two would share its cores and finish no earlier. The seats of one attempt may
/// share it where their shard's spread allows.
pub const ATTEMPTS_PER_CPU_MAX: usize = 1;
/// Attempts at a time on a GPU, if their memory fits: beyond this they only take turns.
pub const ATTEMPTS_PER_GPU_MAX: usize = 8;
/// Reasons kept with a placement: enough to see the pattern, without a large cluster filling the journal.
pub const REASONS_PER_PLACEMENT_MAX: usize = 64;

/// A decision: these devices for this shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// The shard with the fencing number that it gets; numbers follow on those in the state, in the order of the pass.
    pub attempt: AttemptId,
    /// Its seats.
    pub seats: Vec<PlacedSeat>,
    /// Why these.
    pub reasons: Vec<Rated>,
}

/// Places what can be placed at `now`. Costs one look at each waiting shard while any device has room, and one rating of
/// each device for every different need among them.
pub fn pass(state: &State, live: &Live, now: UnixMillis) -> Vec<Placement> {
    let mut runs: Vec<_> = state.runs.iter().filter(|(_, run)| !run.waiting.is_empty()).collect();
    if runs.is_empty() {
        return Vec::new();
    }
    runs.sort_by_key(|(id, run)| (Reverse(run.priority), **id));
    let mut board = Board::survey(state, live, now);
    let mut hopeless = BTreeSet::new();
    let mut placements = Vec::new();
    for (run, body) in runs {
        for index in &body.waiting {
            if !board.any_room() {
                return placements;
            }
            let shard = &body.shards[*index as usize];
            if shard.not_before > now {
                continue;
            }
            let need = Need::of(ShardId { run: *run, index: *index }, shard);
            if hopeless.contains(&need) {
                continue;
            }
            let next = Fence(state.fences + 1 + placements.len() as u64);
            match board.place(&need, next) {
                Some(placement) => placements.push(placement),
                None => drop(hopeless.insert(need)),
            }
        }
    }
    placements
}

/// What a shard asks for. Ordered without the shard's id, so that equal needs are tried once in a pass.
#[derive(Debug, Clone)]
pub struct Need<'a> {
    /// Whose need it is.
    pub shard: ShardId,
    /// Seats and their memory, in the order of the spec's roles.
    pub seats: Vec<(Role, u64)>,
    /// Models that each seat's worker must have.
    pub models: Vec<&'a str>,
    /// Where the seats may sit relative to each other.
    pub spread: Spread,
    /// Where the shard failed, and with which attempt: other places go first.
    pub avoid: BTreeMap<Place, AttemptId>,
}

/// A place to avoid.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// One device: the failure was the device's or its executor's.
    Device(DeviceRef),
    /// The whole worker: the failure was the box's.
    Worker(WorkerId),
}

impl<'a> Need<'a> {
    /// What `shard` asks for.
    pub fn of(id: ShardId, shard: &'a Shard) -> Self {
        let roles = shard.spec.roles();
        let mut avoid = BTreeMap::new();
        for attempt in shard.attempts.iter().skip(shard.reopened_at_attempt as usize) {
            let AttemptState::Failed { role, failure } = &attempt.state else { continue };
            let Some(seat) = attempt.seat(*role) else { continue };
            let place = match failure.kind {
                FailureKind::ExecutorLost | FailureKind::OutOfMemory => Place::Device(seat.device.clone()),
                FailureKind::PeerLost => continue,
                _ => Place::Worker(seat.device.worker),
            };
            avoid.insert(place, AttemptId { shard: id, fence: attempt.fence });
        }
        Self {
            shard: id,
            seats: roles.iter().map(|role| (*role, seat_bytes(&shard.spec, *role))).collect(),
            models: shard.spec.models(),
            spread: shard.spec.spread(),
            avoid,
        }
    }

    /// Memory of the largest seat, bytes.
    pub fn bytes_max(&self) -> u64 {
        self.seats.iter().map(|(_, bytes)| *bytes).max().unwrap_or(0)
    }

    fn avoids(&self, device: &DeviceRef) -> Option<AttemptId> {
        let by_device = self.avoid.get(&Place::Device(device.clone()));
        by_device.or_else(|| self.avoid.get(&Place::Worker(device.worker))).copied()
    }
}

impl PartialEq for Need<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Need<'_> {}

impl PartialOrd for Need<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Need<'_> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let spread = (self.spread as u8).cmp(&(other.spread as u8));
        let sizes = self.seats.cmp(&other.seats).then_with(|| self.models.cmp(&other.models));
        sizes.then(spread).then_with(|| self.avoid.keys().cmp(other.avoid.keys()))
    }
}

/// Which world a device is rated in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum World {
    /// As it is.
    Now,
    /// As it would be if nothing of ours ran.
    Idle,
    /// As it would be if everything that waiting can change were well.
    Someday,
}

/// Every device of the cluster with what matters for placement.
#[derive(Debug)]
pub struct Board<'a> {
    rows: Vec<Row<'a>>,
}

/// One device.
#[derive(Debug)]
struct Row<'a> {
    device: DeviceRef,
    body: &'a Device,
    worker: &'a Worker,
    worker_state: WorkerState,
    heard_at: UnixMillis,
    telemetry: Option<&'a Telemetry>,
    reserved_bytes: u64,
    attempts: BTreeSet<AttemptId>,
}

impl<'a> Board<'a> {
    /// Looks at every device, in the order of [`DeviceRef`].
    pub fn survey(state: &'a State, live: &'a Live, now: UnixMillis) -> Self {
        let mut rows = Vec::new();
        for (id, worker) in &state.workers {
            let session = live.sessions.get(id);
            for body in worker.devices() {
                rows.push(Row {
                    device: DeviceRef { worker: *id, device: body.id.clone() },
                    body,
                    worker,
                    worker_state: live.worker_state(state, *id, now),
                    heard_at: session.map_or(UnixMillis(0), |session| session.heard_at),
                    telemetry: session.and_then(|session| session.telemetry.get(&body.id)),
                    reserved_bytes: 0,
                    attempts: BTreeSet::new(),
                });
            }
        }
        let mut board = Self { rows };
        for (attempt, _, body) in state.open_attempts() {
            for seat in body.seats.iter().filter(|seat| !seat.freed && seat.outcome.is_none()) {
                board.reserve(&seat.device, attempt, seat.reserved_bytes);
            }
        }
        board
    }

    /// Whether a further attempt might start anywhere.
    pub fn any_room(&self) -> bool {
        self.rows.iter().any(|row| row.worker_state == WorkerState::Online && row.has_slot())
    }

    /// Bytes set aside on a device.
    pub fn reserved_bytes(&self, device: &DeviceRef) -> u64 {
        self.find(device).map_or(0, |at| self.rows[at].reserved_bytes)
    }

    /// Whether a resumed attempt's seat would still fit where it was.
    pub fn has_room_for(&self, device: &DeviceRef, bytes: u64) -> bool {
        self.find(device).is_some_and(|at| {
            let row = &self.rows[at];
            row.has_slot()
                && row.body.unusable.is_none()
                && row.reserved_bytes.saturating_add(bytes) <= row.body.memory_budget_bytes
        })
    }

    /// Every device's reason for `need`, in the order of [`DeviceRef`].
    pub fn rate(&self, need: &Need<'_>, world: World) -> Vec<Rated> {
        let rated = |row: &Row<'_>| {
            let reason = row.rate(need, need.bytes_max(), world);
            let avoided = need.avoids(&row.device).filter(|_| matches!(reason, Reason::Fits { .. }));
            let reason = avoided.map_or(reason, |attempt| Reason::FailedHere { attempt });
            Rated { device: row.device.clone(), reason }
        };
        self.rows.iter().map(rated).collect()
    }

    /// Whether all of `need` fits at once in `world`, with every place allowed.
    pub fn could_place(&self, need: &Need<'_>, world: World) -> bool {
        self.choose(need, world, false).is_some()
    }

    fn place(&mut self, need: &Need<'_>, fence: Fence) -> Option<Placement> {
        let chosen = match self.choose(need, World::Now, true) {
            Some(chosen) => chosen,
            // A place that has not failed this shard is only busy with our own work: worth the wait.
            None if !need.avoid.is_empty() && self.choose(need, World::Idle, true).is_some() => return None,
            None => self.choose(need, World::Now, false)?,
        };
        let mut reasons = self.rate(need, World::Now);
        for at in &chosen {
            reasons[*at].reason = Reason::Chosen { free_bytes: self.rows[*at].free_bytes(World::Now) };
        }
        // Those chosen first, so that a cut takes none of them.
        reasons.sort_by_key(|rated| (!matches!(rated.reason, Reason::Chosen { .. }), rated.device.clone()));
        reasons.truncate(REASONS_PER_PLACEMENT_MAX);
        let seats: Vec<_> = need
            .seats
            .iter()
            .zip(&chosen)
            .map(|((role, bytes), at)| PlacedSeat {
                role: *role,
                device: self.rows[*at].device.clone(),
                reserved_bytes: *bytes,
                lane: 0,
            })
            .collect();
        let attempt = AttemptId { shard: need.shard, fence };
        for seat in &seats {
            self.reserve(&seat.device, attempt, seat.reserved_bytes);
        }
        Some(Placement { attempt, seats, reasons })
    }

    /// Rows for the seats of `need`, or nothing. Each seat takes the device with the most free memory of those left, ties by
    /// id. Since the seats of all kinds there are need the same memory, taking the best one by one finds a way if there is
    /// any.
    fn choose(&self, need: &Need<'_>, world: World, avoiding: bool) -> Option<Vec<usize>> {
        let mut chosen: Vec<usize> = Vec::with_capacity(need.seats.len());
        let mut taken: BTreeMap<usize, u64> = BTreeMap::new();
        for (_, bytes) in &need.seats {
            let apart = |at: usize| match need.spread {
                Spread::Any => true,
                Spread::Devices => !chosen.contains(&at),
                Spread::Workers => {
                    chosen.iter().all(|other| self.rows[*other].device.worker != self.rows[at].device.worker)
                }
            };
            let best = (0..self.rows.len())
                .filter(|at| apart(*at))
                .filter(|at| !avoiding || need.avoids(&self.rows[*at].device).is_none())
                .filter_map(|at| {
                    let mates = taken.get(&at).copied().unwrap_or(0);
                    let wanted = bytes.saturating_add(mates);
                    let fits = matches!(self.rows[at].rate(need, wanted, world), Reason::Fits { .. });
                    fits.then(|| (Reverse(self.rows[at].free_bytes(world).saturating_sub(mates)), at))
                })
                .min()?;
            *taken.entry(best.1).or_default() += bytes;
            chosen.push(best.1);
        }
        Some(chosen)
    }

    fn reserve(&mut self, device: &DeviceRef, attempt: AttemptId, bytes: u64) {
        if let Some(at) = self.find(device) {
            self.rows[at].reserved_bytes = self.rows[at].reserved_bytes.saturating_add(bytes);
            self.rows[at].attempts.insert(attempt);
        }
    }

    fn find(&self, device: &DeviceRef) -> Option<usize> {
        self.rows.binary_search_by(|row| row.device.cmp(device)).ok()
    }
}

impl Row<'_> {
    fn has_slot(&self) -> bool {
        let max = match self.body.kind {
            DeviceKind::Cpu => ATTEMPTS_PER_CPU_MAX,
            DeviceKind::Cuda => ATTEMPTS_PER_GPU_MAX,
        };
        self.attempts.len() < max
    }

    /// Memory that a further seat may have. What our own executors hold counts as free: it is either reserved below, or kept
    /// warm and given up when needed. What others hold does not.
    fn free_bytes(&self, world: World) -> u64 {
        let budget = self.body.memory_budget_bytes;
        let observed = |telemetry: &Telemetry| telemetry.memory_free_bytes.saturating_add(telemetry.memory_ours_bytes);
        match world {
            World::Someday => budget,
            World::Idle => self.telemetry.map_or(0, observed).min(budget),
            World::Now => self.telemetry.map_or(0, observed).min(budget).saturating_sub(self.reserved_bytes),
        }
    }

    fn rate(&self, need: &Need<'_>, need_bytes: u64, world: World) -> Reason {
        if let Some(reason) = self.never(need, need_bytes) {
            return reason;
        }
        if world != World::Someday
            && let Some(reason) = self.not_now(need_bytes, world)
        {
            return reason;
        }
        Reason::Fits { free_bytes: self.free_bytes(world) }
    }

    fn never(&self, need: &Need<'_>, need_bytes: u64) -> Option<Reason> {
        if self.worker.revoked {
            return Some(Reason::Revoked);
        }
        if let Some(why) = &self.body.unusable {
            return Some(Reason::Unusable { why: why.clone() });
        }
        if let Some(model) = need.models.iter().find(|model| !self.worker.has_model(model)) {
            return Some(Reason::ModelAbsent { model: (*model).to_owned() });
        }
        let budget_bytes = self.body.memory_budget_bytes;
        (need_bytes > budget_bytes).then_some(Reason::BudgetTooSmall { need_bytes, budget_bytes })
    }

    fn not_now(&self, need_bytes: u64, world: World) -> Option<Reason> {
        match self.worker_state {
            WorkerState::Lost | WorkerState::Revoked => return Some(Reason::Offline),
            WorkerState::Suspect => return Some(Reason::Silent { since: self.heard_at }),
            WorkerState::Draining => return Some(Reason::Draining),
            WorkerState::Online => {}
        }
        let Some(telemetry) = self.telemetry else { return Some(Reason::NotMeasured) };
        if let Some(what) = &telemetry.sick {
            return Some(Reason::Sick { what: what.clone() });
        }
        if world == World::Now && !self.has_slot() {
            return self.attempts.first().map(|attempt| Reason::Busy { attempt: *attempt });
        }
        let free_bytes = self.free_bytes(world);
        (need_bytes > free_bytes).then_some(Reason::MemoryShort { need_bytes, free_bytes })
    }
}
