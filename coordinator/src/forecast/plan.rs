//! A sweep on the cluster as it is, before it is submitted: where each shard would go, when, and what it would cost.

use std::collections::BTreeMap;

use protocol::control::StartSeat;
use protocol::experiment::projector::Method;
use protocol::hardware::{Device, DeviceKind};
use protocol::ids::{DeviceId, DeviceRef, Role, RunId, ShardId, WorkerId};
use protocol::time::UnixMillis;

use super::engine::{Engine, Truth};
use super::replay::{Noise, introduce};
use crate::scheduler::live::Live;
use crate::scheduler::reason::Rated;
use crate::scheduler::request::seat_class;
use crate::scheduler::rounds::{self, Width};
use crate::scheduler::state::Run;
use crate::scheduler::throughput::{Basis, Estimate, Prior, Table};
use crate::scheduler::training::Training;
use crate::scheduler::view::View;
use crate::scheduler::{Answer, Input, NewRun, Scheduler};

/// Most forecasts drawn for the spread of a plan's time: enough for the tenths at either end.
const DRAWS_MAX: u64 = 20;
/// Shards in all forecasts of a plan: those of a large sweep are drawn less often, so that who asks need not wait for minutes.
const DRAWN_SHARDS: u64 = 40_000;
/// Longest time that a forecast looks ahead, milliseconds: a year.
const HORIZON_MS: u64 = 365 * 24 * 3600 * 1000;
/// Draw of a device that says nothing of its power, watts.
const GPU_WATTS: f64 = 200.0;
/// Draw of a processor with its box, watts.
const CPU_WATTS: f64 = 90.0;

/// What would be done with a sweep.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Its shards, by index.
    pub shards: Vec<PlannedShard>,
    /// Its fusers.
    pub fusers: Vec<PlannedFuser>,
    /// From now to its last end, milliseconds, if everything takes as long as expected; `None` if not all of it would end.
    pub makespan_ms: Option<u64>,
    /// The same in a tenth and in nine tenths of the forecasts.
    pub makespan_spread_ms: Option<(u64, u64)>,
    /// Time on devices, milliseconds in all.
    pub device_ms: u64,
    /// What the workers' operators ask for that time, US dollars.
    pub price_usd: f64,
    /// Electricity for that time, kilowatt-hours.
    pub energy_kwh: f64,
}

/// What would be done with a shard.
#[derive(Debug, Clone)]
pub struct PlannedShard {
    /// What it does.
    pub summary: String,
    /// Its seats: role, device, when it would start and end (milliseconds from now), memory set aside.
    pub seats: Vec<PlannedSeat>,
    /// What the prediction stands on.
    pub basis: Option<Basis>,
    /// Why these devices, or by device why none.
    pub reasons: Vec<Rated>,
    /// In one sentence, where it would not start.
    pub sentence: String,
}

/// A fuser that would be trained.
#[derive(Debug, Clone)]
pub struct PlannedFuser {
    /// Its experiment's name.
    pub experiment: String,
    /// From which model into which.
    pub pair: String,
    /// Width that it would have.
    pub hidden: u32,
    /// What it and others would cost, widest first.
    pub widths: Vec<Width>,
}

/// A seat of a plan.
#[derive(Debug, Clone)]
pub struct PlannedSeat {
    /// Which.
    pub role: Role,
    /// Where.
    pub device: DeviceRef,
    /// Its product name.
    pub model: String,
    /// When it would start, milliseconds from now.
    pub start_ms: u64,
    /// When it would end.
    pub end_ms: u64,
    /// Memory set aside, bytes.
    pub bytes: u64,
}

/// A device that is not there, for "what if".
#[derive(Debug, Clone)]
pub struct Extra {
    /// The device as its worker would report it.
    pub device: Device,
    /// Models that its worker would have: those of every other worker.
    pub models: Vec<String>,
}

/// The cluster as it would be without `remove` and with `add`, each a box of its own.
pub fn what_if(scheduler: &Scheduler, add: &[Extra], remove: &[WorkerId]) -> Scheduler {
    let mut scheduler = scheduler.clone();
    for worker in remove {
        let now = scheduler.now();
        let _ = scheduler.handle(now, Input::RevokeWorker(*worker));
        let _ = scheduler.take_events();
        while scheduler.poll_effect().is_some() {}
    }
    let mut engine = Engine::new(scheduler, |_, _| Truth { wall_ms: 1, peak_bytes: 0 });
    for (number, extra) in (0u32..).zip(add) {
        let worker = engine.scheduler.state().workers.last_key_value().map_or(1, |(last, _)| last.0 + 1);
        let mut key = [0xff; 32];
        key[..4].copy_from_slice(&number.to_le_bytes());
        let id = DeviceId(format!("what-if-{number}"));
        introduce(&mut engine, WorkerId(worker), key, Device { id, ..extra.device.clone() }, &extra.models);
    }
    engine.scheduler
}

/// Plans `run` on the cluster of `scheduler`, behind what waits and runs there; `None` for what waits and runs already.
pub fn plan(scheduler: &Scheduler, run: Option<&NewRun>) -> Plan {
    let (plan, expected) = forecast(scheduler, run, 0);
    // A training's shards are known only in the forecast.
    let shards = plan.shards.len() as u64 + scheduler.live().queue.len() as u64;
    let draws = (DRAWN_SHARDS / shards.max(1)).clamp(2, DRAWS_MAX);
    let mut spans: Vec<u64> = (1..=draws).filter_map(|seed| forecast(scheduler, run, seed).1).collect();
    spans.sort_unstable();
    let tenth = |tenths: usize| spans.get((spans.len() * tenths / 10).min(spans.len().saturating_sub(1))).copied();
    Plan { makespan_ms: expected, makespan_spread_ms: tenth(1).zip(tenth(9)), ..plan }
}

/// One forecast; seed 0 takes everything as expected, others draw how far each class is off on each device model.
fn forecast(scheduler: &Scheduler, run: Option<&NewRun>, seed: u64) -> (Plan, Option<u64>) {
    let table = scheduler.state().table.clone();
    let live = scheduler.live().clone();
    let mut drawn: BTreeMap<(String, String), f64> = BTreeMap::new();
    let mut noise = Noise(seed);
    let truth = move |start: &StartSeat, model: &str| {
        let class = seat_class(&start.spec.work_class(), start.role);
        let estimate = predict(&table, &live, &class, model);
        let sigma = f64::from(estimate.spread) / 1024.0 * std::f64::consts::LN_2;
        let factor = match seed {
            0 => 1.0,
            _ => *drawn.entry((class, model.to_owned())).or_insert_with(|| (sigma * noise.normal()).exp()),
        };
        let us = estimate.unit_us as f64 * f64::from(start.spec.work_units()) * factor;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates")]
        let wall_ms = (us / 1000.0).ceil() as u64;
        Truth { wall_ms: wall_ms.max(1), peak_bytes: 0 }
    };
    let mut engine = Engine::new(scheduler.clone(), truth);
    let start = engine.now;
    let id = match run {
        Some(run) => match engine.give(Input::Submit(run.clone())) {
            Ok(Answer::Run(id)) => Some(id),
            _ => None,
        },
        None => None,
    };
    let over = |engine: &Engine<'_>| {
        let of = |id: RunId| engine.scheduler.state().runs.get(&id).is_none_or(|run| run.state.is_terminal());
        match id {
            Some(id) => of(id),
            None => engine.scheduler.state().runs.values().all(|run| run.state.is_terminal()),
        }
    };
    let horizon = start.plus_ms(HORIZON_MS);
    while !over(&engine) && engine.next_at().is_some_and(|at| at <= horizon) {
        engine.step();
    }
    let done = over(&engine);
    let ends = engine.spans.iter().filter(|span| id.is_none_or(|id| span.attempt.shard.run == id));
    let last = ends.map(|span| span.ended_at.since_ms(start)).max().unwrap_or(0);
    let plan = match seed {
        0 => gather(&engine, scheduler, id, start),
        _ => Plan {
            shards: Vec::new(),
            fusers: Vec::new(),
            makespan_ms: None,
            makespan_spread_ms: None,
            device_ms: 0,
            price_usd: 0.0,
            energy_kwh: 0.0,
        },
    };
    (plan, done.then_some(last))
}

fn predict(table: &Table, live: &Live, class: &str, model: &str) -> Estimate {
    table.predict(class, model, |model| Prior { unit_us: live.prior_us(class, model) })
}

fn gather(engine: &Engine<'_>, before: &Scheduler, id: Option<RunId>, start: UnixMillis) -> Plan {
    let state = engine.scheduler.state();
    let mut shards = Vec::new();
    let (mut device_ms, mut price_usd, mut energy_kwh) = (0, 0.0, 0.0);
    let mut spans: BTreeMap<ShardId, Vec<_>> = BTreeMap::new();
    for span in engine.spans.iter().filter(|span| span.failure.is_none()) {
        if id.is_none_or(|id| span.attempt.shard.run == id) {
            let ms = span.ended_at.since_ms(span.started_at);
            let hours = ms as f64 / 3_600_000.0;
            let terms = state.workers.get(&span.device.worker).and_then(|worker| worker.terms());
            device_ms += ms;
            price_usd += hours * terms.map_or(0.0, |terms| terms.price_microusd_per_hour as f64 / 1e6);
            energy_kwh += hours * watts(state.device(&span.device)) / 1000.0;
        }
        spans.entry(span.attempt.shard).or_default().push(span);
    }
    for index in 0..id.and_then(|id| state.runs.get(&id)).map_or(0, |run| run.shards.len()) {
        let shard = ShardId { run: id.unwrap_or(RunId(0)), index: u32::try_from(index).unwrap_or(u32::MAX) };
        let seats: Vec<PlannedSeat> = spans
            .get(&shard)
            .into_iter()
            .flatten()
            .map(|span| PlannedSeat {
                role: span.role,
                device: span.device.clone(),
                model: state.device(&span.device).map(|body| body.model.clone()).unwrap_or_default(),
                start_ms: span.started_at.since_ms(start),
                end_ms: span.ended_at.since_ms(start),
                bytes: state
                    .attempt(span.attempt)
                    .and_then(|attempt| attempt.seat(span.role))
                    .map_or(0, |seat| seat.reserved_bytes),
            })
            .collect();
        let explained = engine.scheduler.explain(shard);
        let reasons = explained.as_ref().map(|explained| explained.devices.clone()).unwrap_or_default();
        // What finished in the forecast only seems measured.
        let basis = seats.first().and_then(|seat| {
            let class = seat_class(&state.shard(shard)?.spec.work_class(), seat.role);
            Some(predict(&before.state().table, before.live(), &class, &seat.model).basis)
        });
        let sentence = if seats.is_empty() {
            explained.map(|explained| explained.sentence).unwrap_or_default()
        } else {
            String::new()
        };
        let summary = state.shard(shard).map(|shard| shard.spec.summary()).unwrap_or_default();
        shards.push(PlannedShard { summary, seats, basis, reasons, sentence });
    }
    let fusers = id.and_then(|id| state.runs.get(&id)).map(|run| fusers(before, run)).unwrap_or_default();
    Plan { shards, fusers, makespan_ms: None, makespan_spread_ms: None, device_ms, price_usd, energy_kwh }
}

fn fusers(before: &Scheduler, run: &Run) -> Vec<PlannedFuser> {
    let view = View { state: before.state(), live: before.live(), now: before.now() };
    let fuser = |training: &Training| {
        let Method::Fuser(recipe) = &training.spec.method else { return None };
        let group = run.groups.get(training.group as usize)?;
        Some(PlannedFuser {
            experiment: group.name.clone(),
            pair: format!("{} -> {}", training.spec.source, training.spec.target),
            hidden: recipe.hidden,
            widths: rounds::widths(view, &training.spec, &group.require),
        })
    };
    run.trainings.iter().filter_map(fuser).collect()
}

fn watts(body: Option<&Device>) -> f64 {
    match body.map(|body| body.kind) {
        Some(DeviceKind::Cpu) | None => CPU_WATTS,
        Some(DeviceKind::Cuda) => GPU_WATTS,
    }
}
