//! Routes about what would be: they take a copy of the scheduler and ask it, off the driver's thread.

use axum::Json;
use axum::extract::{Path, State};
use protocol::catalogue;
use protocol::hardware::{Device, DeviceKind, Speed};
use protocol::ids::{DeviceId, DeviceRef, WorkerId};
use protocol::sweep::Sweep;

use super::routes::{Answer, Body, Parts, new_run, parse, read};
use crate::api::plan::{PlanAnswer, PlanFuser, PlanRequest, PlanSeat, PlanShard, PlanWidth, ThroughputRow};
use crate::api::{ApiError, ErrorCode, SubmitRequest};
use crate::forecast::formats;
use crate::forecast::plan::{Extra, Plan, PlannedFuser, plan, what_if};
use crate::scheduler::Scheduler;
use crate::scheduler::reason::Reason;
use crate::scheduler::rounds::Width;

pub(super) async fn plan_route(State(parts): Parts, body: Body) -> Answer<PlanAnswer> {
    let request: PlanRequest = read(body)?;
    let scheduler = parts.driver.snapshot().await?;
    let answer = tokio::task::spawn_blocking(move || answer(&scheduler, request)).await;
    Ok(Json(answer.map_err(|error| ApiError::new(ErrorCode::Internal, error.to_string()))??))
}

pub(super) async fn throughput(State(parts): Parts) -> Answer<Vec<ThroughputRow>> {
    let scheduler = parts.driver.snapshot().await?;
    let row = |(class, model, cell): (&str, &str, &crate::scheduler::throughput::Cell)| ThroughputRow {
        class: class.to_owned(),
        device_model: model.to_owned(),
        units_per_second: 1e6 / cell.mean.value() as f64,
        spread: (f64::from(cell.spread()) / 1024.0).exp2(),
        samples: cell.samples,
    };
    Ok(Json(scheduler.state().table.cells().map(row).collect()))
}

pub(super) async fn release(State(parts): Parts, Path((worker, device)): Path<(String, String)>) -> Answer<()> {
    let device = DeviceRef { worker: parse(&worker)?, device: DeviceId(device) };
    parts.driver.release(device).await?;
    Ok(Json(()))
}

fn answer(scheduler: &Scheduler, request: PlanRequest) -> Result<PlanAnswer, ApiError> {
    let PlanRequest { file, text, add, remove } = request;
    let mut named = Vec::new();
    let run = match text.is_empty() {
        true => None,
        false => {
            let sweep = Sweep::parse(&file, &text)?;
            named.extend(sweep.models().into_iter().map(str::to_owned));
            Some(new_run(sweep, SubmitRequest { file, text }))
        }
    };
    let mut extras = Vec::new();
    for wanted in &add {
        extras.extend(extra(scheduler, wanted, &named)?);
    }
    let remove = remove.iter().map(|worker| worker.parse::<WorkerId>());
    let remove = remove.collect::<Result<Vec<_>, _>>();
    let remove = remove.map_err(|error| ApiError::new(ErrorCode::BadRequest, error.to_string()))?;
    if let Some(unknown) = remove.iter().find(|worker| !scheduler.state().workers.contains_key(worker)) {
        return Err(ApiError::new(ErrorCode::NotFound, format!("no worker {unknown}")));
    }
    let as_is = plan(scheduler, run.as_ref());
    if extras.is_empty() && remove.is_empty() {
        return Ok(worded(as_is, None));
    }
    let other = plan(&what_if(scheduler, &extras, &remove), run.as_ref());
    Ok(worded(other, as_is.makespan_ms))
}

/// Devices of `MODEL:COUNT[:MEMORY]`, with the models that any worker has and those that the sweep names: who adds a card
/// brings them.
fn extra(scheduler: &Scheduler, wanted: &str, named: &[String]) -> Result<Vec<Extra>, ApiError> {
    let bad = |message: String| ApiError::new(ErrorCode::BadRequest, message);
    let kinds = formats::devices(wanted, |model| catalogue::card(model).map(catalogue::cards::Card::usable_bytes));
    let mut models: Vec<String> = scheduler
        .state()
        .workers
        .values()
        .filter_map(|worker| worker.report.as_ref())
        .flat_map(|report| report.models.iter().cloned())
        .chain(named.iter().cloned())
        .collect();
    models.sort();
    models.dedup();
    let mut extras = Vec::new();
    for kind in kinds.map_err(|error| bad(error.to_string()))? {
        let card = catalogue::card(&kind.model)
            .ok_or_else(|| bad(format!("unknown card `{}`; `bonepile fit` lists those that are known", kind.model)))?;
        let device = Device {
            id: DeviceId(card.short.to_owned()),
            kind: DeviceKind::Cuda,
            model: card.name.to_owned(),
            compute_capability: Some(card.capability),
            memory_total_bytes: card.memory_bytes,
            memory_budget_bytes: kind.memory_bytes,
            threads: 1,
            unusable: None,
            speed: Some(Speed {
                f32_mflops: u64::from(card.f32_gflops) * 1000,
                memory_bytes_per_second: card.bandwidth_bytes_per_s,
            }),
        };
        let extra = Extra { device, models: models.clone() };
        extras.extend(std::iter::repeat_n(extra, kind.count as usize));
    }
    Ok(extras)
}

fn worded(plan: Plan, as_is: Option<u64>) -> PlanAnswer {
    let shards = plan.shards.into_iter().enumerate().map(|(index, shard)| {
        let chosen = shard.reasons.iter().find(|rated| matches!(rated.reason, Reason::Chosen { .. }));
        let others = shard.reasons.iter().filter(|rated| !matches!(rated.reason, Reason::Chosen { .. })).take(3);
        let why = match (chosen, shard.sentence.is_empty()) {
            (_, false) => shard.sentence,
            (Some(_), true) => {
                let others: Vec<_> = others.map(|rated| format!("{}: {}", rated.device, rated.reason)).collect();
                if others.is_empty() { "nothing else would do it earlier".to_owned() } else { others.join("; ") }
            }
            (None, true) => String::new(),
        };
        let seats = shard.seats.into_iter().map(|seat| PlanSeat {
            role: seat.role,
            device: seat.device.to_string(),
            model: seat.model,
            start_ms: seat.start_ms,
            end_ms: seat.end_ms,
            memory_bytes: seat.bytes,
        });
        PlanShard {
            index: u32::try_from(index).unwrap_or(u32::MAX),
            summary: shard.summary,
            seats: seats.collect(),
            basis: shard.basis.map(|basis| basis.to_string()),
            why,
        }
    });
    let width = |width: Width| PlanWidth {
        hidden: width.hidden,
        parameters: width.parameters,
        delta_bytes: width.delta_bytes,
        memory_bytes: width.memory_bytes,
        fits: width.fits,
    };
    let fuser = |fuser: PlannedFuser| PlanFuser {
        experiment: fuser.experiment,
        pair: fuser.pair,
        hidden: fuser.hidden,
        widths: fuser.widths.into_iter().map(width).collect(),
    };
    PlanAnswer {
        fusers: plan.fusers.into_iter().map(fuser).collect(),
        shards: shards.collect(),
        makespan_ms: plan.makespan_ms,
        makespan_spread_ms: plan.makespan_spread_ms,
        makespan_as_is_ms: as_is,
        device_ms: plan.device_ms,
        price_usd: plan.price_usd,
        energy_kwh: plan.energy_kwh,
    }
}
