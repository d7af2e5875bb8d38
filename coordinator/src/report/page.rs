//! The report's page: puts summary, plots and data into the template.
//!
//! Every text that comes from a worker or a model is cleaned of control characters here and escaped by the template. The page
//! loads nothing: no script, no font, no picture from elsewhere.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use minijinja::{AutoEscape, Environment, Value, context};
use protocol::experiment::Condition;
use protocol::limits::clean_text;

use super::plots::{self, Axis, Interval, LayerPoint, PlotError, RowPoint};
use super::stats::{Mean, Proportion};
use super::summary::{ConditionRow, ROUNDING_LOGIT_MAX, Summary, Transfer};
use super::{csv, projector_page};
use crate::api::{ClusterInfo, RunDetail, RunResults};
use crate::cli::text::{bytes, duration_ms, moment};

/// KL below this is drawn as zero: four orders above the noise of f32 and four below what a person would call a difference.
const KL_FLOOR: f64 = 1e-8;

/// All that a report says.
#[derive(Debug, Clone, Copy)]
pub struct ReportInput<'a> {
    /// What was measured.
    pub results: &'a RunResults,
    /// The run with its sweep and shards.
    pub run: &'a RunDetail,
    /// The cluster.
    pub cluster: &'a ClusterInfo,
}

/// A report could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// A plot could not be drawn.
    #[error(transparent)]
    Plot(#[from] PlotError),
    /// The template is wrong: a bug.
    #[error("failed to render the report's template: {0:#}")]
    Template(#[from] minijinja::Error),
    /// The data could not be written as JSON: a bug.
    #[error("failed to write the report's data: {0}")]
    Data(#[from] serde_json::Error),
}

/// Renders the page.
///
/// # Errors
/// Only for bugs: everything goes to memory, and hostile texts are data.
pub fn render(input: &ReportInput<'_>) -> Result<String, ReportError> {
    let summary = Summary::of(input.results);
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.add_template("projector.html", include_str!("projector.html"))?;
    environment.add_template("page.html", include_str!("page.html"))?;
    let json = serde_json::to_string_pretty(input.results)?;
    let page = environment.get_template("page.html")?.render(context! {
        run => run_facts(input),
        models => models(&summary),
        devices => devices(input),
        shards => shards(input),
        inspections => inspections(&summary),
        profiles => profiles(&summary)?,
        transfers => transfers(&summary)?,
        trainings => projector_page::trainings(&summary)?,
        evaluations => projector_page::evaluations(&summary)?,
        unreadable => cleaned(&summary.unreadable),
        sweep => clean_text(&input.run.sweep),
        sweep_file => clean_text(&input.run.file),
        json_base64 => STANDARD.encode(&json),
        csv_base64 => STANDARD.encode(csv::transfers(input.results)),
        evaluation_csv_base64 => STANDARD.encode(csv::evaluations(input.results)),
    })?;
    Ok(page)
}

fn cleaned(texts: &[String]) -> Vec<String> {
    texts.iter().map(|text| clean_text(text)).collect()
}

fn run_facts(input: &ReportInput<'_>) -> Value {
    let summary = &input.results.summary;
    let took = summary.finished_at_ms.map(|end| duration_ms(end.since_ms(summary.submitted_at_ms)));
    let counts = &summary.shards;
    context! {
        id => summary.id.to_string(),
        name => clean_text(&summary.name),
        state => summary.state.to_string(),
        committed => counts.committed,
        total => counts.total(),
        complete => counts.committed == counts.total(),
        submitted => moment(summary.submitted_at_ms),
        finished => summary.finished_at_ms.map(moment),
        took => took,
        cluster => clean_text(&input.cluster.name),
        coordinator_build => clean_text(&input.cluster.build),
        executor_builds => executor_builds(input),
    }
}

fn executor_builds(input: &ReportInput<'_>) -> String {
    let seats = input.results.shards.iter().flat_map(|shard| &shard.seats);
    let mut builds: Vec<String> = seats.map(|seat| clean_text(&seat.build)).collect();
    builds.sort();
    builds.dedup();
    builds.join(", ")
}

fn models(summary: &Summary) -> Vec<Value> {
    summary
        .models()
        .values()
        .map(|model| {
            context! {
                name => clean_text(&model.name),
                fingerprint => clean_text(&model.fingerprint),
                architecture => clean_text(&model.architecture),
                layers => model.layers,
                kv_heads => model.kv_heads,
                head_dim => model.head_dim,
            }
        })
        .collect()
}

fn devices(input: &ReportInput<'_>) -> Vec<Value> {
    let hostnames: BTreeMap<_, _> = input
        .run
        .shards
        .iter()
        .flat_map(|shard| &shard.seats)
        .map(|seat| (seat.worker, clean_text(&seat.hostname)))
        .collect();
    let mut devices: BTreeMap<String, (String, String, u32, u64)> = BTreeMap::new();
    for seat in input.results.shards.iter().flat_map(|shard| &shard.seats) {
        let hostname = hostnames.get(&seat.device.worker).cloned().unwrap_or_default();
        let model = clean_text(&seat.device_model);
        let device = devices.entry(clean_text(&seat.device.to_string())).or_insert((hostname, model, 0, 0));
        device.2 += 1;
        device.3 = device.3.max(seat.memory_peak_bytes);
    }
    devices
        .into_iter()
        .map(|(id, (hostname, model, seats, peak))| context! { id, hostname, model, seats, peak => bytes(peak) })
        .collect()
}

fn shards(input: &ReportInput<'_>) -> Vec<Value> {
    let results: BTreeMap<_, _> = input.results.shards.iter().map(|shard| (shard.id, shard)).collect();
    let row = |shard: &crate::api::ShardRow| {
        let seats = results.get(&shard.id).map(|shard| shard.seats.as_slice()).unwrap_or_default();
        let on: Vec<String> = seats.iter().map(|seat| clean_text(&format!("{} {}", seat.role, seat.device))).collect();
        context! {
            id => shard.id.to_string(),
            summary => clean_text(&shard.summary),
            state => shard.state.to_string(),
            attempts => shard.attempts,
            devices => on.join(", "),
            wall => seats.iter().map(|seat| seat.wall_ms).max().map(duration_ms),
            packets => seats.iter().map(|seat| seat.packet_bytes).max().filter(|sent| *sent > 0).map(bytes),
            failure => shard.failure.as_ref().map(|failure| clean_text(&format!("{}: {}", failure.kind, failure.message))),
        }
    };
    input.run.shards.iter().map(row).collect()
}

fn inspections(summary: &Summary) -> Vec<Value> {
    summary
        .inspections
        .iter()
        .map(|one| {
            let number =
                |value: fn(&super::summary::LayerMeans) -> f64| one.means.as_ref().map(|means| figure(value(means)));
            context! {
                model => clean_text(&one.model.name),
                layers => one.layers.to_string(),
                layer_count => one.profile.len(),
                texts => one.texts,
                tokens => one.tokens,
                measured => format!("{:.0}", one.bytes_per_token_measured),
                formula => one.bytes_per_token_formula,
                agrees => (one.bytes_per_token_measured - one.bytes_per_token_formula as f64).abs() < 0.5,
                reload => exponent(one.reload_logit_max_abs),
                recompute => exponent(one.recompute_max_abs),
                key_norm => number(|means| means.key_norm),
                value_norm => number(|means| means.value_norm),
                key_rank => number(|means| means.key_rank),
                value_rank => number(|means| means.value_rank),
                key_sink => number(|means| means.key_sink),
            }
        })
        .collect()
}

fn profiles(summary: &Summary) -> Result<Vec<Value>, PlotError> {
    let mut profiles = Vec::new();
    for (model, layers) in summary.profiles() {
        let name = clean_text(model);
        let points = |of: fn(&protocol::results::TensorStats) -> f64| -> Vec<LayerPoint> {
            let point = |layer: &&protocol::results::LayerProfile| LayerPoint {
                layer: layer.layer,
                sliding: layer.sliding_window.is_some(),
                key: of(&layer.key),
                value: of(&layer.value),
            };
            layers.values().map(point).collect()
        };
        let window = layers.values().find_map(|layer| layer.sliding_window);
        let full: Vec<u32> =
            layers.values().filter(|layer| layer.sliding_window.is_none()).map(|layer| layer.layer).collect();
        profiles.push(context! {
            mixed => window.is_some(),
            full,
            window,
            rank_tokens => layers.values().map(|layer| layer.key.rank.tokens).max().unwrap_or(0),
            norm_svg => plots::layer_profile(&name, "mean L2 norm", &points(|stats| stats.norm_mean))?,
            rank_svg => plots::layer_profile(&name, "effective rank", &points(|stats| stats.rank.entropy))?,
            layers => layers.values().map(|layer| layer_row(layer)).collect::<Vec<_>>(),
            model => name,
        });
    }
    Ok(profiles)
}

fn layer_row(layer: &protocol::results::LayerProfile) -> Value {
    context! {
        layer => layer.layer,
        window => layer.sliding_window.map_or("full".to_owned(), |window| window.to_string()),
        shape => layer.shape.map(|side| side.to_string()).join(" × "),
        key_norm => figure(layer.key.norm_mean),
        key_sd => figure(layer.key.norm_sd),
        key_sink => figure(layer.key.sink_ratio),
        key_rank => figure(layer.key.rank.entropy),
        key_kurtosis => figure(layer.key.kurtosis),
        value_norm => figure(layer.value.norm_mean),
        value_sd => figure(layer.value.norm_sd),
        value_sink => figure(layer.value.sink_ratio),
        value_rank => figure(layer.value.rank.entropy),
        value_kurtosis => figure(layer.value.kurtosis),
    }
}

fn transfers(summary: &Summary) -> Result<Vec<Value>, PlotError> {
    summary.transfers.iter().map(transfer).collect()
}

fn transfer(transfer: &Transfer) -> Result<Value, PlotError> {
    let name = clean_text(&transfer.model.name);
    let accuracy: Vec<RowPoint> = transfer
        .conditions
        .iter()
        .map(|row| RowPoint {
            label: row.condition.clone(),
            values: vec![Some(of_share(&row.exact)), Some(of_share(&row.choice))],
        })
        .collect();
    let kl: Vec<RowPoint> = transfer
        .conditions
        .iter()
        .filter(|row| row.condition != Condition::Text.to_string())
        .map(|row| RowPoint { label: row.condition.clone(), values: vec![row.kl.as_ref().map(of_mean)] })
        .collect();
    let equivalence = transfer.row(Condition::Injected).map(|row| {
        context! {
            logit => exponent(row.logit_max_abs),
            kl => row.kl.map(|kl| exponent(kl.mean)),
            exact => row.logit_max_abs == 0.0,
            holds => transfer.injected_equals_text(),
            limit => exponent(ROUNDING_LOGIT_MAX),
        }
    });
    let recipes = transfer.row(Condition::Injected).zip(transfer.row(Condition::Naive));
    Ok(context! {
        model => &name,
        spread => spread(transfer),
        across => transfer.across_workers,
        shards => transfer.shards,
        facts => transfer.facts,
        candidates => transfer.candidates,
        seed => transfer.seed,
        packets => transfer.packets,
        packet_bytes => bytes(transfer.packet_bytes),
        accuracy_svg => plots::rows(&name, Axis::Share, "answers right (95 % Wilson interval)", &accuracy)?,
        kl_svg => plots::rows(&name, Axis::Log { floor: KL_FLOOR }, "KL(text ‖ condition), nats (95 % bootstrap interval)", &kl)?,
        kl_floor => exponent(KL_FLOOR),
        conditions => transfer.conditions.iter().map(condition_row).collect::<Vec<_>>(),
        equivalence => equivalence,
        careful => recipes.map(|(careful, _)| condition_row(careful)),
        naive => recipes.map(|(_, naive)| condition_row(naive)),
        naive_text => transfer.row(Condition::NaiveText).map(condition_row),
        samples => samples(transfer),
    })
}

fn spread(transfer: &Transfer) -> &'static str {
    match transfer.spread {
        protocol::experiment::Spread::Any => "any devices",
        protocol::experiment::Spread::Devices => "different devices",
        protocol::experiment::Spread::Workers => "different workers",
    }
}

fn condition_row(row: &ConditionRow) -> Value {
    context! {
        condition => &row.condition,
        about => about(&row.condition),
        exact => share(&row.exact),
        choice => share(&row.choice),
        packet_choice => row.packet_choice.as_ref().map(share),
        p_answer => figure(row.p_answer),
        kl => row.kl.as_ref().map(|kl| exponent(kl.mean)),
        kl_interval => row.kl.as_ref().map(|kl| format!("{} to {}", exponent(kl.low), exponent(kl.high))),
        logit => exponent(row.logit_max_abs),
        stalled => row.stalled,
    }
}

/// What a condition means, for the table.
fn about(condition: &str) -> String {
    match condition.parse::<Condition>() {
        Ok(Condition::Text) => "the source's text itself: the oracle".to_owned(),
        Ok(Condition::NoContext) => "the question alone".to_owned(),
        Ok(Condition::Injected) => "the source's cache at its own positions".to_owned(),
        Ok(Condition::Shifted(gap)) => format!("the question {gap} positions late, keys as they were"),
        Ok(Condition::Rerotated(gap)) => format!("the question {gap} positions late, keys re-rotated"),
        Ok(Condition::MatchedNoise) => "noise with the cache's mean and deviation".to_owned(),
        Ok(Condition::OtherSubject) => "the cache of another subject".to_owned(),
        Ok(Condition::Naive) => "the seed project's recipe".to_owned(),
        Ok(Condition::NaiveText) => "the text itself, then that recipe's question".to_owned(),
        Ok(Condition::KeysOnly) => "the source's keys, values of a neutral text".to_owned(),
        Ok(Condition::ValuesOnly) => "the source's values, keys of a neutral text".to_owned(),
        Err(_) => String::new(),
    }
}

fn samples(transfer: &Transfer) -> Vec<Value> {
    let mut facts: BTreeMap<u32, (Value, Vec<Value>)> = BTreeMap::new();
    for item in &transfer.samples {
        let head = context! {
            context => clean_text(&item.context),
            question => clean_text(&item.question),
            answer => clean_text(&item.answer),
        };
        facts.entry(item.fact).or_insert((head, Vec::new())).1.push(context! {
            condition => item.condition.to_string(),
            generated => clean_text(&item.generated),
            exact => item.exact,
            stalled => item.stalled,
        });
    }
    facts.into_values().map(|(head, rows)| context! { head, rows }).collect()
}

pub(super) fn of_share(share: &Proportion) -> Interval {
    Interval { value: share.share(), low: share.low, high: share.high }
}

pub(super) fn of_mean(mean: &Mean) -> Interval {
    Interval { value: mean.mean, low: mean.low, high: mean.high }
}

pub(super) fn share(share: &Proportion) -> Value {
    context! {
        text => format!("{}/{}", share.hits, share.items),
        percent => format!("{:.0} %", share.share() * 100.0),
        interval => format!("{:.0} to {:.0} %", share.low * 100.0, share.high * 100.0),
    }
}

/// Three significant digits or so.
pub(crate) fn figure(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        large if large >= 1000.0 => format!("{value:.0}"),
        large if large >= 100.0 => format!("{value:.1}"),
        middle if middle >= 0.1 => format!("{value:.2}"),
        _ => format!("{value:.1e}"),
    }
}

/// For figures over many orders: `0`, `3.1e-6`, `0.42`, `12.3`.
pub(crate) fn exponent(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        middle if (0.01..1000.0).contains(&middle) => figure(value),
        _ => format!("{value:.1e}"),
    }
}
