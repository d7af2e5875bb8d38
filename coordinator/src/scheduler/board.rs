//! Every device with what holds it: lanes of seats, memory, threads. Follows the journal seat by seat.
//!
//! A lane is a place on a device where seats run one after another: its memory is that of its largest seat. Seats sent ahead
//! wait in a lane, so that a short one starts the moment the one before it is over, without asking here.

use std::collections::{BTreeMap, BTreeSet};

use protocol::hardware::{Device, DeviceKind};
use protocol::ids::{AttemptId, DeviceRef, Role, WorkerId};
use protocol::time::UnixMillis;

use super::event::WHOLE;
use super::state::State;

/// Lanes of a GPU at a time, if their memory fits: beyond this they only take turns.
pub const LANES_PER_GPU_MAX: usize = 8;
/// A card takes another shard only when those on it have run for so long, milliseconds: before, nobody can tell what they
/// leave of it.
pub const SHARE_AFTER_MS: u64 = 10_000;
/// A card busier than this takes no further shard, percent.
pub const SHARE_BELOW_PERCENT: u32 = 50;
/// Work that may wait in a lane behind what runs, milliseconds: enough to bridge the way to the coordinator and back, little
/// enough to be given elsewhere in time.
pub const AHEAD_MS: u64 = 1_000;

/// Number of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct RowId(pub u32);

/// Number of a device model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct KindId(pub u32);

/// One device.
#[derive(Debug, Clone)]
pub struct Row {
    /// Which.
    pub device: DeviceRef,
    /// As its worker last reported it.
    pub body: Device,
    /// Its model's number.
    pub kind: KindId,
    /// Its worker does not report it any more.
    pub gone: bool,
    /// What holds it.
    pub lanes: BTreeMap<u32, Lane>,
}

/// Seats that run one after another.
#[derive(Debug, Clone, Default)]
pub struct Lane {
    /// Oldest first; the first runs.
    pub seats: Vec<Occupant>,
    /// When the last is expected to end.
    pub until: UnixMillis,
    /// The most threads that one of its seats takes of a processor; `None`: all.
    threads: Option<u32>,
}

/// A seat in a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Occupant {
    /// Its attempt.
    pub attempt: AttemptId,
    /// Which seat.
    pub role: Role,
    /// Memory set aside, bytes.
    pub bytes: u64,
    /// Threads of a processor; `None`: all.
    pub threads: Option<u32>,
    /// Share of the device's time, or of those threads', thousandths.
    pub load: u16,
    /// How long it is expected to take, milliseconds.
    pub expected_ms: u64,
    /// When it was placed.
    pub since: UnixMillis,
}

/// All devices.
#[derive(Debug, Clone, Default)]
pub struct Board {
    rows: Vec<Row>,
    index: BTreeMap<DeviceRef, RowId>,
    by_worker: BTreeMap<WorkerId, Vec<RowId>>,
    kinds: Vec<String>,
    seats: BTreeMap<(AttemptId, Role), (RowId, u32)>,
    /// Rows to look at in the next pass: something about them changed.
    dirty: BTreeSet<RowId>,
}

impl Board {
    /// As a replayed state has it at `now`.
    pub fn of(state: &State, now: UnixMillis) -> Self {
        let mut board = Self::default();
        for worker in state.workers.keys() {
            board.refresh(state, *worker);
        }
        for (attempt, shard, body) in state.open_attempts() {
            for seat in body.seats.iter().filter(|seat| !seat.freed && seat.outcome.is_none()) {
                let occupant = Occupant {
                    attempt,
                    role: seat.role,
                    bytes: seat.reserved_bytes,
                    threads: shard.spec.threads(),
                    load: seat.load,
                    expected_ms: seat.expected_ms.saturating_sub(now.since_ms(body.placed_at)),
                    since: body.placed_at,
                };
                board.occupy(&seat.device, seat.lane, occupant, now);
            }
        }
        board
    }

    /// Takes a worker's newest report in.
    pub fn refresh(&mut self, state: &State, worker: WorkerId) {
        let devices = state.workers.get(&worker).map_or(&[][..], |worker| worker.devices());
        for row in self.by_worker.get(&worker).cloned().unwrap_or_default() {
            self.rows[row.0 as usize].gone = true;
        }
        for body in devices {
            let device = DeviceRef { worker, device: body.id.clone() };
            let kind = self.kind(&body.model);
            match self.index.get(&device) {
                Some(row) => {
                    let row = &mut self.rows[row.0 as usize];
                    (row.body, row.kind, row.gone) = (body.clone(), kind, false);
                }
                None => {
                    let id = RowId(u32::try_from(self.rows.len()).unwrap_or(u32::MAX));
                    self.rows.push(Row {
                        device: device.clone(),
                        body: body.clone(),
                        kind,
                        gone: false,
                        lanes: BTreeMap::new(),
                    });
                    self.index.insert(device, id);
                    self.by_worker.entry(worker).or_default().push(id);
                }
            }
        }
        self.touch(worker);
    }

    /// Something about a worker's devices changed.
    pub fn touch(&mut self, worker: WorkerId) {
        for row in self.by_worker.get(&worker).into_iter().flatten() {
            self.dirty.insert(*row);
        }
    }

    /// Every device is to be looked at again.
    pub fn touch_all(&mut self) {
        let all = (0..self.rows.len()).map(|row| RowId(u32::try_from(row).unwrap_or(u32::MAX)));
        self.dirty.extend(all);
    }

    /// Puts a seat into a lane; one that is there stays.
    pub fn occupy(&mut self, device: &DeviceRef, lane: u32, seat: Occupant, now: UnixMillis) {
        let Some(row) = self.index.get(device).copied() else { return };
        if self.seats.insert((seat.attempt, seat.role), (row, lane)).is_some() {
            return;
        }
        let lane = self.rows[row.0 as usize].lanes.entry(lane).or_default();
        lane.until = lane.until.max(now).plus_ms(seat.expected_ms);
        lane.push(seat);
    }

    /// Takes a seat out of its lane.
    pub fn vacate(&mut self, attempt: AttemptId, role: Role, now: UnixMillis) {
        let Some((row, number)) = self.seats.remove(&(attempt, role)) else { return };
        let body = &mut self.rows[row.0 as usize];
        if let Some(lane) = body.lanes.get_mut(&number) {
            lane.seats.retain(|seat| (seat.attempt, seat.role) != (attempt, role));
            lane.until = now.plus_ms(lane.seats.iter().map(|seat| seat.expected_ms).sum());
            match lane.seats.is_empty() {
                true => drop(body.lanes.remove(&number)),
                false => lane.threads = lane.seats.iter().map(|seat| seat.threads).fold(Some(0), most),
            }
        }
        self.dirty.insert(row);
    }

    /// Takes every seat of an attempt out.
    pub fn vacate_attempt(&mut self, attempt: AttemptId, now: UnixMillis) {
        for role in [Role::Main, Role::Source, Role::Target] {
            self.vacate(attempt, role, now);
        }
    }

    /// A row.
    pub fn row(&self, id: RowId) -> &Row {
        &self.rows[id.0 as usize]
    }

    /// Every row that is still reported, in the order of joining.
    pub fn rows(&self) -> impl Iterator<Item = (RowId, &Row)> {
        (0u32..).map(RowId).zip(&self.rows).filter(|(_, row)| !row.gone)
    }

    /// Number of rows, those of devices that are gone too.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The row of a device.
    pub fn find(&self, device: &DeviceRef) -> Option<&Row> {
        self.index.get(device).map(|row| self.row(*row))
    }

    /// Rows changed since the last call.
    pub fn take_dirty(&mut self) -> BTreeSet<RowId> {
        std::mem::take(&mut self.dirty)
    }

    /// A device model's name.
    pub fn kind_name(&self, kind: KindId) -> &str {
        &self.kinds[kind.0 as usize]
    }

    /// Number of device models seen.
    pub fn kinds(&self) -> usize {
        self.kinds.len()
    }

    fn kind(&mut self, model: &str) -> KindId {
        let at = self.kinds.iter().position(|known| known == model).unwrap_or_else(|| {
            self.kinds.push(model.to_owned());
            self.kinds.len() - 1
        });
        KindId(u32::try_from(at).unwrap_or(u32::MAX))
    }
}

impl Row {
    /// Bytes set aside: of each lane its largest seat.
    pub fn reserved_bytes(&self) -> u64 {
        self.lanes.values().map(Lane::bytes).fold(0, u64::saturating_add)
    }

    /// Whether another lane may be opened beside those in use, memory aside. Seats of `attempt` itself share a processor.
    pub fn has_slot(&self, threads: Option<u32>, load: u16, attempt: Option<AttemptId>) -> bool {
        match self.body.kind {
            DeviceKind::Cuda => self.lanes.len() < LANES_PER_GPU_MAX,
            DeviceKind::Cpu => {
                let all = self.body.threads.max(1);
                let of_others = self.lanes.values().filter(|lane| !lane.is_only(attempt));
                let taken = of_others.map(|lane| part(lane.threads(all), lane.load())).fold(0, u64::saturating_add);
                taken.saturating_add(part(threads.unwrap_or(all).min(all), load)) <= part(all, WHOLE)
            }
        }
    }

    /// Lanes of seats with `threads` each that can be open at once, memory aside.
    pub fn slots(&self, threads: Option<u32>) -> usize {
        match self.body.kind {
            DeviceKind::Cuda => LANES_PER_GPU_MAX,
            DeviceKind::Cpu => {
                let all = self.body.threads.max(1);
                (all / threads.unwrap_or(all).clamp(1, all)) as usize
            }
        }
    }

    /// Share of its time that is taken, thousandths; more where lanes take turns.
    pub fn load(&self) -> u16 {
        self.lanes.values().map(Lane::load).fold(0, u16::saturating_add)
    }

    /// The lowest number that no lane has.
    pub fn new_lane(&self) -> u32 {
        (0..).find(|number| !self.lanes.contains_key(number)).unwrap_or(0)
    }

    /// Seats waiting behind others.
    pub fn ahead(&self) -> usize {
        self.lanes.values().map(|lane| lane.seats.len().saturating_sub(1)).sum()
    }

    /// When a lane is expected to be free; `now` if one can be opened at once.
    pub fn ready(&self, threads: Option<u32>, now: UnixMillis) -> UnixMillis {
        if self.has_slot(threads, WHOLE, None) {
            return now;
        }
        now.plus_ms(self.lanes.values().map(|lane| lane.remaining_ms(now)).min().unwrap_or(0))
    }
}

impl Lane {
    /// How long until its last seat is expected to be over, milliseconds. What takes longer than expected is taken to need a
    /// quarter of that again.
    pub fn remaining_ms(&self, now: UnixMillis) -> u64 {
        let overdue = self.seats.first().map_or(0, |seat| {
            let elapsed = now.since_ms(seat.since);
            if elapsed > seat.expected_ms { elapsed / 4 } else { 0 }
        });
        self.until.since_ms(now).max(overdue)
    }

    /// Memory of its largest seat.
    pub fn bytes(&self) -> u64 {
        self.seats.iter().map(|seat| seat.bytes).max().unwrap_or(0)
    }

    /// Share of the device's time that its largest seat takes, thousandths.
    fn load(&self) -> u16 {
        self.seats.iter().map(|seat| seat.load).max().unwrap_or(0)
    }

    /// Puts a seat in its place.
    pub fn push(&mut self, seat: Occupant) {
        self.threads = if self.seats.is_empty() { seat.threads } else { most(self.threads, seat.threads) };
        let at = self.seats.partition_point(|other| other.attempt.fence <= seat.attempt.fence);
        self.seats.insert(at, seat);
    }

    fn threads(&self, all: u32) -> u32 {
        self.threads.unwrap_or(all).min(all)
    }

    fn is_only(&self, attempt: Option<AttemptId>) -> bool {
        attempt.is_some() && self.seats.iter().all(|seat| Some(seat.attempt) == attempt)
    }
}

/// Thousandths of a thread.
fn part(threads: u32, load: u16) -> u64 {
    u64::from(threads) * u64::from(load)
}

/// The larger of two numbers of threads, of which none means all.
fn most(one: Option<u32>, other: Option<u32>) -> Option<u32> {
    Some(one?.max(other?))
}
