//! One look at the cluster for a decision: devices against requests, in reasons and in milliseconds.
//!
//! Changes nothing. Placement, `explain` and `plan` all look through this, so that they cannot disagree.

use protocol::catalogue;
use protocol::hardware::{Device, DeviceKind, Telemetry};
use protocol::ids::{AttemptId, Role};
use protocol::time::UnixMillis;

use super::board::{AHEAD_MS, Row, RowId, SHARE_AFTER_MS, SHARE_BELOW_PERCENT};
use super::event::{Policy, WHOLE};
use super::live::Live;
use super::reason::Reason;
use super::request::{MEGABYTE, Request, SeatNeed, link_class};
use super::state::{Seat, State, Worker};
use super::status::WorkerState;
use super::throughput::{Basis, Estimate, Prior};

/// Rate at which a model is read from a box's disk when it is not warm, bytes a second: an old SATA disk's.
const LOAD_BYTES_PER_SECOND: u64 = 150_000_000;
/// What a link carries before a packet went over it, bytes a second: gigabit Ethernet.
const LINK_BYTES_PER_SECOND: u64 = 117_000_000;
/// Size of a model whose file nobody described, bytes.
const MODEL_BYTES_UNKNOWN: u64 = 1_000_000_000;
/// Products of f32 matrices on the card that shares are counted in, a GTX 1080, millions of operations a second.
pub const REFERENCE_MFLOPS: u64 = 8_900_000;
/// What a processor's thread is taken to do before it was measured, millions of operations a second.
const THREAD_MFLOPS: u64 = 20_000;
/// Name of the reference card in the throughput table.
pub const REFERENCE_MODEL: &str = "NVIDIA GeForce GTX 1080";

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

/// The cluster at a moment.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// What is journaled.
    pub state: &'a State,
    /// What is not.
    pub live: &'a Live,
    /// The moment.
    pub now: UnixMillis,
}

/// Where on a device a seat would go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// The lane.
    pub lane: u32,
    /// It waits there for another seat.
    pub behind: bool,
}

impl<'a> View<'a> {
    /// Memory to set aside for a seat, bytes: the model's figure, corrected by what its class was seen to take.
    pub fn need_bytes(&self, request: &Request, seat: &SeatNeed) -> u64 {
        self.state.peaks.get(&request.seat_class(seat.role)).map_or(seat.bytes, |peak| peak.correct(seat.bytes))
    }

    /// Memory that a further lane may have on a device, bytes. What our own executors hold counts as free: it is either
    /// reserved, or kept warm and given up when needed. What others hold does not.
    pub fn free_bytes(&self, row: &Row, world: World) -> u64 {
        let budget = row.body.memory_budget_bytes;
        let observed = self
            .telemetry(row)
            .map_or(0, |telemetry| telemetry.memory_free_bytes.saturating_add(telemetry.memory_ours_bytes).min(budget));
        match world {
            World::Someday => budget,
            World::Idle => observed,
            World::Now => observed.saturating_sub(row.reserved_bytes()),
        }
    }

    /// Whether and why a seat would do on a device.
    pub fn rate(&self, row: &Row, request: &Request, seat: &SeatNeed, world: World) -> Reason {
        let bytes = self.need_bytes(request, seat);
        self.rate_bytes(row, request, seat, bytes, world)
    }

    /// The same for another amount of memory.
    pub fn rate_bytes(&self, row: &Row, request: &Request, seat: &SeatNeed, bytes: u64, world: World) -> Reason {
        if let Some(reason) = self.never(row, request, seat, bytes) {
            return reason;
        }
        if world != World::Someday
            && let Some(reason) = self.not_now(row, seat, bytes, world)
        {
            return reason;
        }
        Reason::Fits { free_bytes: self.free_bytes(row, world) }
    }

    /// Whether a device will ever do, memory in use aside.
    pub fn never(&self, row: &Row, request: &Request, seat: &SeatNeed, bytes: u64) -> Option<Reason> {
        let worker = self.state.workers.get(&row.device.worker)?;
        if worker.revoked {
            return Some(Reason::Revoked);
        }
        if row.gone {
            return Some(Reason::Offline);
        }
        if let Some(why) = &row.body.unusable {
            return Some(Reason::Unusable { why: why.clone() });
        }
        if let Some(model) = request.models_of(seat.role).iter().find(|model| !worker.has_model(model)) {
            return Some(Reason::ModelAbsent { model: model.clone() });
        }
        if let Some(reason) = self.unwanted(worker, &row.body, request) {
            return Some(reason);
        }
        let budget_bytes = row.body.memory_budget_bytes;
        (bytes > budget_bytes).then_some(Reason::BudgetTooSmall { need_bytes: bytes, budget_bytes })
    }

    /// What the experiment asks of its devices.
    fn unwanted(&self, worker: &Worker, body: &Device, request: &Request) -> Option<Reason> {
        let (require, terms) = (&request.require, worker.terms());
        if request.command && !terms.is_some_and(|terms| terms.commands) {
            return Some(Reason::CommandsForbidden);
        }
        if let Some(label) =
            require.labels.iter().find(|label| !terms.is_some_and(|terms| terms.labels.contains(label)))
        {
            return Some(Reason::LabelAbsent { label: label.clone() });
        }
        let other_kind = require.device.is_some_and(|kind| kind != body.kind);
        let other_model =
            require.model.as_ref().is_some_and(|model| !body.model.to_lowercase().contains(model.as_str()));
        if other_kind || other_model {
            let wanted = require.model.clone().or_else(|| require.device.map(|kind| kind.to_string()));
            return Some(Reason::OtherDevice { wanted: wanted.unwrap_or_default() });
        }
        if let Some(least) = require.capability.filter(|least| body.compute_capability.is_none_or(|has| has < *least)) {
            return Some(Reason::CapabilityLow { least: least.to_string() });
        }
        if let Some(dtype) = require.dtype.filter(|dtype| !dtype.works_on(body.compute_capability)) {
            return Some(Reason::DtypeAbsent { dtype: dtype.to_string() });
        }
        let price = terms.map_or(0, |terms| terms.price_microusd_per_hour);
        if let Some(max) = require.price_max_microusd_per_hour.filter(|max| price > *max) {
            return Some(Reason::PriceHigh { price_microusd_per_hour: price, max_microusd_per_hour: max });
        }
        let build = worker.report.as_ref().map(|report| report.build.as_str()).unwrap_or_default();
        self.state.lacks_kernel(&request.class, &body.model, build).then_some(Reason::NoKernel)
    }

    fn not_now(&self, row: &Row, seat: &SeatNeed, bytes: u64, world: World) -> Option<Reason> {
        let worker = row.device.worker;
        match self.live.worker_state(self.state, worker, self.now) {
            WorkerState::Lost | WorkerState::Revoked => return Some(Reason::Offline),
            WorkerState::Suspect => {
                let since = self.live.sessions.get(&worker).map_or(UnixMillis(0), |session| session.heard_at);
                return Some(Reason::Silent { since });
            }
            WorkerState::Draining => return Some(Reason::Draining),
            WorkerState::Online => {}
        }
        if let Some(until) = self.state.quarantined_until(&row.device).filter(|until| *until > self.now) {
            return Some(Reason::Quarantined { until });
        }
        let Some(telemetry) = self.telemetry(row) else { return Some(Reason::NotMeasured) };
        if let Some(what) = &telemetry.sick {
            return Some(Reason::Sick { what: what.clone() });
        }
        if world == World::Now
            && (!row.has_slot(seat.threads, seat.load, None) || self.is_saturated(row, telemetry, seat.load))
        {
            let first = row.lanes.values().filter_map(|lane| lane.seats.first()).map(|seat| seat.attempt).min();
            return first.map(|attempt| Reason::Busy { attempt });
        }
        let free_bytes = self.free_bytes(row, world);
        (bytes > free_bytes).then_some(Reason::MemoryShort { need_bytes: bytes, free_bytes })
    }

    /// Whether nothing at all can be put on a device now, not even behind what it has: no need to look at any request.
    pub fn is_closed(&self, row: &Row) -> bool {
        let Some(telemetry) = self.telemetry(row) else { return true };
        let busy = !row.has_slot(Some(1), WHOLE, None) || self.is_saturated(row, telemetry, WHOLE);
        busy && row.lanes.values().all(|lane| lane.until.since_ms(self.now) >= AHEAD_MS)
    }

    /// Whether a card has no time to spare for a further seat that takes `load` thousandths of it, as far as known.
    fn is_saturated(&self, row: &Row, telemetry: &Telemetry, load: u16) -> bool {
        if load < WHOLE && row.load().saturating_add(load) <= WHOLE {
            return false;
        }
        let shared = row.body.kind == DeviceKind::Cuda && !row.lanes.is_empty();
        let seats = || row.lanes.values().flat_map(|lane| &lane.seats);
        let new = || seats().any(|seat| self.now.since_ms(seat.since) < SHARE_AFTER_MS);
        shared && (new() || telemetry.utilisation_percent.is_none_or(|percent| percent > SHARE_BELOW_PERCENT))
    }

    /// Where on a device a seat of `bytes` that takes `expected_ms` would go now: a lane of its own, or behind short work.
    pub fn slot(&self, row: &Row, request: &Request, seat: &SeatNeed, bytes: u64, expected: Expected) -> Option<Slot> {
        match self.rate_bytes(row, request, seat, bytes, World::Now) {
            Reason::Fits { .. } => Some(Slot { lane: row.new_lane(), behind: false }),
            Reason::Busy { .. } => self.behind(row, request, bytes, expected),
            _ => None,
        }
    }

    /// A lane whose work is so short that waiting in it costs less than the way to the coordinator and back.
    fn behind(&self, row: &Row, request: &Request, bytes: u64, expected: Expected) -> Option<Slot> {
        let ahead = self.state.workers.get(&row.device.worker)?.terms()?.ahead as usize;
        if expected.basis != Basis::Measured || request.is_gang() || row.ahead() >= ahead {
            return None;
        }
        let (number, lane) = row.lanes.iter().min_by_key(|(_, lane)| (lane.until, lane.seats.len()))?;
        let short = lane.until.since_ms(self.now).saturating_add(expected.ms) <= AHEAD_MS;
        let alone = lane.seats.iter().all(|seat| seat.role == Role::Main);
        let growth = bytes.saturating_sub(lane.bytes());
        let fits = growth <= self.free_bytes(row, World::Now);
        (short && alone && fits).then_some(Slot { lane: *number, behind: true })
    }

    /// How long a seat is expected to take on a device, its model's way from the disk included.
    pub fn expected(&self, row: &Row, request: &Request, role: Role) -> Expected {
        let estimate = self.unit(&request.seat_class(role), row);
        let us = estimate.unit_us.saturating_mul(u64::from(request.units));
        let cold = request.models_of(role).iter().filter(|model| !self.live.is_warm(&row.device, model));
        let load_ms = cold.map(|model| load_ms(model)).sum::<u64>();
        let ms = us.div_ceil(1000).saturating_add(load_ms);
        Expected { ms, work_us: us, spread: estimate.spread, basis: estimate.basis }
    }

    /// How long a gang's packets are on their way from one device to another, milliseconds: by the size that its class was seen
    /// to send and the link's measured rate.
    pub fn transfer_ms(&self, request: &Request, from: &Row, to: &Row) -> u64 {
        let (from, to) = (from.device.worker, to.device.worker);
        let Some(bytes) = self.state.packets.get(&request.class).filter(|_| from != to) else { return 0 };
        let prior = |_: &str| Prior { unit_us: MEGABYTE * 1_000_000 / LINK_BYTES_PER_SECOND };
        let us = self.live.times.predict(&self.state.table, &link_class(from), &to.to_string(), prior).unit_us;
        bytes.saturating_mul(u64::from(request.units)) / 1000 * us / MEGABYTE
    }

    /// Time for a unit of work of a class on a device.
    pub fn unit(&self, class: &str, row: &Row) -> Estimate {
        let prior = |model: &str| Prior { unit_us: self.live.prior_us(class, model) };
        if self.state.settings.policy == Policy::SpeedFactor {
            return Estimate { unit_us: prior(&row.body.model).unit_us, spread: 1024, basis: Basis::Prior };
        }
        if self.state.paces.knows(class)
            && let Some(cell) = self.state.paces.cell(class, &row.device.to_string())
        {
            return cell.estimate();
        }
        self.live.times.predict(&self.state.table, class, &row.body.model, prior)
    }

    /// Whether it is measured how long every seat of a request works by itself.
    pub fn knows_paces(&self, request: &Request) -> bool {
        request.seats.iter().all(|seat| self.state.paces.knows(&request.seat_class(seat.role)))
    }

    /// What a request is worth: its time on the reference card, milliseconds. Shares of the cluster are counted in it, so
    /// that an hour of an old card is not charged as an hour of a new one.
    pub fn reference_ms(&self, request: &Request) -> u64 {
        let prior = |model: &str| Prior { unit_us: self.live.prior_us(&request.class, model) };
        let of_seat = |seat: &SeatNeed| {
            let class = request.seat_class(seat.role);
            self.live.times.predict(&self.state.table, &class, REFERENCE_MODEL, prior).unit_us
        };
        request.seats.iter().map(of_seat).sum::<u64>().saturating_mul(u64::from(request.units)) / 1000
    }

    /// Whether a new lane can be opened for seats of the pool at any time while the worker stays as it is.
    pub fn in_service(&self, row: &Row) -> bool {
        !row.gone
            && row.body.unusable.is_none()
            && self.live.worker_state(self.state, row.device.worker, self.now) == WorkerState::Online
    }

    /// What a worker last said about a device.
    pub fn telemetry(&self, row: &Row) -> Option<&'a Telemetry> {
        self.live.sessions.get(&row.device.worker)?.telemetry.get(&row.device.device)
    }

    /// Number of preferred labels that a device's worker lacks.
    pub fn unpreferred(&self, row: &Row, request: &Request) -> usize {
        if request.require.prefer.is_empty() {
            return 0;
        }
        let terms = self.state.workers.get(&row.device.worker).and_then(Worker::terms);
        request.require.prefer.iter().filter(|label| !terms.is_some_and(|terms| terms.labels.contains(label))).count()
    }

    /// The row of a device, by number.
    pub fn row(&self, id: RowId) -> &'a Row {
        self.live.board.row(id)
    }

    /// Whether a resumed attempt's seat would still fit where it was.
    pub fn has_room_for(&self, seat: &Seat, threads: Option<u32>, attempt: AttemptId) -> bool {
        self.live.board.find(&seat.device).is_some_and(|row| {
            !row.gone
                && row.body.unusable.is_none()
                && row.has_slot(threads, seat.load, Some(attempt))
                && row.reserved_bytes().saturating_add(seat.reserved_bytes) <= row.body.memory_budget_bytes
        })
    }
}

/// A prediction for a seat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// Milliseconds, 1 or more.
    pub ms: u64,
    /// Of which the seat's own work, microseconds: without its model's way from the disk.
    pub work_us: u64,
    /// Standard deviation of its logarithm, 1/1024 octaves.
    pub spread: u32,
    /// How it came about.
    pub basis: Basis,
}

fn load_ms(model: &str) -> u64 {
    let bytes = catalogue::model(model).map_or(MODEL_BYTES_UNKNOWN, |model| model.bytes);
    bytes.saturating_mul(1000) / LOAD_BYTES_PER_SECOND
}

/// What a device does before anything of a class was measured, millions of f32 operations a second.
pub fn speed_mflops(body: &Device) -> u64 {
    match (body.speed, body.kind) {
        (Some(speed), _) => speed.mflops().max(1),
        (None, DeviceKind::Cpu) => THREAD_MFLOPS * u64::from(body.threads.max(1)),
        (None, DeviceKind::Cuda) => REFERENCE_MFLOPS,
    }
}

/// Microseconds that a unit of a class takes on the reference card, a guess until something has finished.
pub fn reference_unit_us(class: &str) -> u64 {
    let mut parts = class.split('/');
    match parts.next().unwrap_or_default() {
        "projector-train" if parts.any(|part| part == "steps") => 10_000,
        "projector-train" if class.ends_with("/solve") => 50_000,
        "projector-train" if class.ends_with("/outer") => 5_000,
        "projector-train" => 3_000,
        "projector-eval" => 20_000,
        "no-op" => 200,
        "inspect" => 1_000,
        "transfer" => 20_000,
        // `work` of a command is in seconds on the reference card.
        _ => 1_000_000,
    }
}
