//! The page's sections about projectors: values and plots for `projector.html`.

use minijinja::{Value, context};
use protocol::experiment::projector::{Projected, Tier};
use protocol::limits::clean_text;
use protocol::results::{LayerFit, LayerGate};

use super::page::{exponent, figure, of_mean, of_share, share};
use super::plots::{self, Axis, Curve, FIRST, PlotError, RowPoint, SECOND};
use super::projector::{EvaluationRow, EvaluationSummary, RoundSummary, TierSummary, TrainingSummary};
use super::summary::Summary;
use crate::cli::text::{bytes, duration_ms};

/// KL below this is drawn as zero.
const KL_FLOOR: f64 = 1e-6;

/// What is shown of trainings.
pub(super) fn trainings(summary: &Summary) -> Result<Vec<Value>, PlotError> {
    summary.trainings.iter().map(training).collect()
}

/// What is shown of evaluations.
pub(super) fn evaluations(summary: &Summary) -> Result<Vec<Value>, PlotError> {
    summary.evaluations.iter().map(evaluation).collect()
}

fn training(training: &TrainingSummary) -> Result<Value, PlotError> {
    let name = clean_text(&format!("{} {} {}", training.method, training.source, training.target));
    let fits = training.ridge.as_ref().map_or(&[][..], |ridge| &ridge.layers);
    let (sent, all_reduce) = training.bytes_sent();
    let (open, gates) = training.gates_open();
    Ok(context! {
        method => training.method.clone(),
        source => clean_text(&training.source),
        target => clean_text(&training.target),
        samples => training.samples,
        counted => training.counted,
        parameters => figure(training.parameters as f64 / 1e6),
        rows => training.ridge.as_ref().map(|ridge| ridge.rows),
        fits => fits.iter().map(fit_row).collect::<Vec<_>>(),
        fit_svg => if fits.is_empty() { None } else { Some(fit_plot(&name, fits)?) },
        loss_svg => loss_plot(&name, training)?,
        validation_svg => validation_plot(&name, training)?,
        gate_svg => if training.gates.is_empty() { None } else { Some(gate_plot(&name, &training.gates)?) },
        gates_open => open,
        gates,
        loss => training.newest_loss().map(figure),
        rounds => training.rounds.iter().map(round_row).collect::<Vec<_>>(),
        sent => (sent > 0).then(|| bytes(sent)),
        all_reduce => bytes(all_reduce),
        fewer => (sent > 0).then(|| figure(all_reduce as f64 / sent as f64)),
    })
}

fn round_row(round: &RoundSummary) -> Value {
    let walls = || round.replicas.iter().map(|replica| replica.wall_ms);
    let losses: Vec<f64> = round.replicas.iter().filter_map(|replica| Some(replica.steps.last()?.loss)).collect();
    let waited: f64 = round.replicas.iter().map(|replica| replica.waited_ms).sum();
    let computed: f64 = round.replicas.iter().map(|replica| replica.compute_ms).sum();
    let seats = round.replicas.iter().map(|replica| format!("{} ({})", replica.device, replica.samples));
    context! {
        round => round.round,
        replicas => clean_text(&seats.collect::<Vec<_>>().join(", ")),
        loss => (!losses.is_empty()).then(|| figure(losses.iter().sum::<f64>() / losses.len() as f64)),
        matched => round.validation.map(|validation| figure(validation.matched)),
        mismatched => round.validation.map(|validation| figure(validation.mismatched)),
        first => walls().min().map(duration_ms),
        last => walls().max().map(duration_ms),
        waited => (computed > 0.0).then(|| format!("{:.0} %", 100.0 * waited / (waited + computed))),
        delta_norm => round.outer.as_ref().map(|outer| figure(outer.delta_norm)),
        outer => round.outer.as_ref().map(|outer| format!("{} / {}", outer.learning_rate, outer.momentum)),
        delta_bytes => round.outer.as_ref().map(|outer| bytes(outer.delta_bytes)),
    }
}

fn fit_row(fit: &LayerFit) -> Value {
    context! {
        layer => fit.layer,
        sources => fit.sources.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
        lambda_key => fit.lambda_key,
        lambda_value => fit.lambda_value,
        r2_key => format!("{:.3}", fit.r2_key),
        r2_value => format!("{:.3}", fit.r2_value),
    }
}

fn pair(first: Vec<(f64, f64)>, second: Vec<(f64, f64)>) -> [Curve; 2] {
    let curve = |points, colour| Curve { points, colour, marks: true };
    [curve(first, FIRST), curve(second, SECOND)]
}

fn fit_plot(name: &str, fits: &[LayerFit]) -> Result<String, PlotError> {
    let of = |value: fn(&LayerFit) -> f64| fits.iter().map(|fit| (f64::from(fit.layer), value(fit))).collect();
    plots::curves(name, "target layer", "R²", &pair(of(|fit| fit.r2_key), of(|fit| fit.r2_value)))
}

fn gate_plot(name: &str, gates: &[LayerGate]) -> Result<String, PlotError> {
    let of = |value: fn(&LayerGate) -> f64| gates.iter().map(|gate| (f64::from(gate.layer), value(gate))).collect();
    plots::curves(name, "target layer", "gate's logit", &pair(of(|gate| gate.key), of(|gate| gate.value)))
}

fn loss_plot(name: &str, training: &TrainingSummary) -> Result<Option<String>, PlotError> {
    let points: Vec<_> = training.steps().iter().map(|row| (row.sample as f64, row.loss)).collect();
    if points.is_empty() {
        return Ok(None);
    }
    let marks = points.len() < 40;
    plots::curves(name, "samples", "training loss, nats", &[Curve { points, colour: FIRST, marks }]).map(Some)
}

fn validation_plot(name: &str, training: &TrainingSummary) -> Result<Option<String>, PlotError> {
    let rows = training.validations();
    if rows.is_empty() {
        return Ok(None);
    }
    let of = |value: fn(&protocol::results::Validation) -> f64| {
        rows.iter().map(|(sample, validation)| (*sample as f64, value(validation))).collect()
    };
    let both = pair(of(|validation| validation.matched), of(|validation| validation.mismatched));
    plots::curves(name, "samples", "validation loss, nats", &both).map(Some)
}

fn evaluation(evaluation: &EvaluationSummary) -> Result<Value, PlotError> {
    let tiers = evaluation.tiers.iter().map(|tier| tier_value(&evaluation.target.name, tier));
    Ok(context! {
        method => clean_text(&evaluation.method),
        source => clean_text(&evaluation.source.name),
        target => clean_text(&evaluation.target.name),
        parameters => figure(evaluation.parameters as f64 / 1e6),
        tiers => tiers.collect::<Result<Vec<_>, _>>()?,
    })
}

fn tier_value(target: &str, tier: &TierSummary) -> Result<Value, PlotError> {
    let name = clean_text(&format!("{target} {}", tier.tier));
    let accuracy: Vec<RowPoint> = tier
        .conditions
        .iter()
        .map(|row| RowPoint {
            label: row.condition.to_string(),
            values: vec![Some(of_share(&row.choice)), Some(of_share(&row.injected))],
        })
        .collect();
    let others = || tier.conditions.iter().filter(|row| row.condition != Projected::Native);
    let kl: Vec<RowPoint> = others()
        .map(|row| RowPoint { label: row.condition.to_string(), values: vec![row.kl.as_ref().map(of_mean)] })
        .collect();
    let cost = tier.row(Projected::Projected).zip(tier.row(Projected::TextRelay));
    Ok(context! {
        tier => tier.tier.to_string(),
        about => about_tier(tier.tier),
        facts => tier.facts,
        candidates => tier.candidates,
        chance => format!("{:.3}", tier.chance()),
        beats_shuffled => tier.beats(Projected::Shuffled),
        beats_mismatched => tier.beats(Projected::Mismatched),
        accuracy_svg => plots::rows(&name, Axis::Share, "answers right (95 % Wilson interval)", &accuracy)?,
        kl_svg => plots::rows(&name, Axis::Log { floor: KL_FLOOR }, "KL(native ‖ condition), nats (95 % bootstrap interval)", &kl)?,
        conditions => tier.conditions.iter().map(row_value).collect::<Vec<_>>(),
        fits => tier.layers.iter().map(fit_row).collect::<Vec<_>>(),
        fit_svg => if tier.layers.is_empty() { None } else { Some(fit_plot(&name, &tier.layers)?) },
        cost => cost.map(|(cache, text)| context! {
            cache_bytes => bytes(cache.bytes.round() as u64),
            text_bytes => bytes(text.bytes.round() as u64),
            cache_ms => figure(cache.latency_ms),
            text_ms => figure(text.latency_ms),
        }),
    })
}

fn row_value(row: &EvaluationRow) -> Value {
    context! {
        condition => row.condition.to_string(),
        about => about(row.condition),
        choice => share(&row.choice),
        injected => share(&row.injected),
        stalled => share(&row.stalled),
        packet_choice => row.packet_choice.as_ref().map(share),
        kl => row.kl.as_ref().map(|kl| exponent(kl.mean)),
        kl_interval => row.kl.as_ref().map(|kl| format!("{} to {}", exponent(kl.low), exponent(kl.high))),
        latency => figure(row.latency_ms),
        bytes => (row.bytes > 0.0).then(|| bytes(row.bytes.round() as u64)),
    }
}

fn about(condition: Projected) -> &'static str {
    match condition {
        Projected::Native => "its own cache of the text: the oracle",
        Projected::NoContext => "the question alone",
        Projected::RawCopy => "the source's cache as it is, cut or padded to shape",
        Projected::Projected => "the source's cache through the projector",
        Projected::Mismatched => "another subject's cache through the projector",
        Projected::Shuffled => "the same through a projector trained on shuffled pairs",
        Projected::TextRelay => "what the source wrote when asked to pass it on",
    }
}

fn about_tier(tier: Tier) -> &'static str {
    match tier {
        Tier::Seen => "persons that training has not seen, in places that it has",
        Tier::Unseen => "persons and places that training has not seen",
        Tier::Binding => "two persons in one sentence, in different places that training has seen; one is asked for",
    }
}
