//! What trainings and evaluations of projectors came to, as tables for `bonepile results`.

use std::fmt::Write;

use protocol::experiment::projector::Projected;
use protocol::limits::clean_text;

use super::table::{Style, Table, Tone};
use super::text::{bytes, duration_ms};
use crate::report::projector::{EvaluationRow, EvaluationSummary, TierSummary, TrainingSummary};
use crate::report::stats::Proportion;
use crate::report::{exponent, figure};

/// Rounds listed; of more the last are.
const ROUNDS_SHOWN_MAX: usize = 12;

/// A training: its rounds, or its layers.
pub(super) fn training_text(training: &TrainingSummary, style: Style) -> String {
    let mut text = format!(
        "training {}, {} -> {}: {} of {} samples, {:.1} M numbers\n",
        training.method,
        clean_text(&training.source),
        clean_text(&training.target),
        training.counted,
        training.samples,
        training.parameters as f64 / 1e6,
    );
    if let Some(ridge) = &training.ridge {
        let mut table = Table::new(style, &[">layer", "from", ">R2 keys", ">R2 values", ">lambda K", ">lambda V"]);
        for fit in &ridge.layers {
            table.plain([
                fit.layer.to_string(),
                fit.sources.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
                format!("{:.3}", fit.r2_key),
                format!("{:.3}", fit.r2_value),
                figure(fit.lambda_key),
                figure(fit.lambda_value),
            ]);
        }
        text += &table.render();
    }
    if !training.rounds.is_empty() {
        text += &rounds(training, style);
        let (open, gates) = training.gates_open();
        let (sent, all_reduce) = training.bytes_sent();
        let _ = write!(text, "{open} of {gates} gates open");
        if sent > 0 {
            let times = all_reduce as f64 / sent as f64;
            let _ = write!(text, "; {} exchanged, {times:.0} times less than f32 gradients each step", bytes(sent));
        }
        text.push('\n');
    }
    text
}

fn rounds(training: &TrainingSummary, style: Style) -> String {
    const COLUMNS: [&str; 8] =
        [">round", ">replicas", ">samples", ">loss", ">matched", ">mismatched", ">first", ">last"];
    let mut table = Table::new(style, &COLUMNS);
    let hidden = training.rounds.len().saturating_sub(ROUNDS_SHOWN_MAX);
    for round in training.rounds.iter().skip(hidden) {
        let losses: Vec<f64> = round.replicas.iter().filter_map(|replica| Some(replica.steps.last()?.loss)).collect();
        let walls = || round.replicas.iter().map(|replica| replica.wall_ms);
        let or = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        table.plain([
            round.round.to_string(),
            round.replicas.len().to_string(),
            round.replicas.iter().map(|replica| replica.samples).sum::<u32>().to_string(),
            or((!losses.is_empty()).then(|| figure(losses.iter().sum::<f64>() / losses.len() as f64))),
            or(round.validation.map(|validation| figure(validation.matched))),
            or(round.validation.map(|validation| figure(validation.mismatched))),
            or(walls().min().map(duration_ms)),
            or(walls().max().map(duration_ms)),
        ]);
    }
    let more = if hidden > 0 { format!("{hidden} rounds before these (--json has all)\n") } else { String::new() };
    format!("{more}{}", table.render())
}

/// An evaluation: a table a tier.
pub(super) fn evaluation_text(evaluation: &EvaluationSummary, style: Style) -> String {
    let (source, target) = (clean_text(&evaluation.source.name), clean_text(&evaluation.target.name));
    let mut text = String::new();
    for tier in &evaluation.tiers {
        let _ = writeln!(
            text,
            "projected {source} -> {target} ({}), {}: {} facts, {} candidates, chance {:.3}",
            clean_text(&evaluation.method),
            tier.tier,
            tier.facts,
            tier.candidates,
            tier.chance(),
        );
        const COLUMNS: [&str; 9] =
            ["condition", ">choice", "95 %", ">injected", ">stalled", ">KL nats", "95 %", ">bytes", ">ms"];
        let mut table = Table::new(style, &COLUMNS);
        for row in &tier.conditions {
            table.row(cells(row));
        }
        text += &table.render();
        text += &verdicts(tier);
    }
    text
}

fn verdicts(tier: &TierSummary) -> String {
    let mut text = String::new();
    for control in [Projected::Shuffled, Projected::Mismatched] {
        let line = match tier.beats(control) {
            Some(true) => format!("{}: projected lies above {control}, intervals apart\n", tier.tier),
            Some(false) => format!("{}: projected is NOT above {control}: the intervals meet\n", tier.tier),
            None => String::new(),
        };
        text += &line;
    }
    text
}

fn cells(row: &EvaluationRow) -> [(String, Option<Tone>); 9] {
    let soft = |text: String| (text, Some(Tone::Soft));
    let count = |share: &Proportion| (format!("{}/{}", share.hits, share.items), None);
    let interval = |share: &Proportion| format!("{:.0}..{:.0} %", share.low * 100.0, share.high * 100.0);
    [
        (row.condition.to_string(), None),
        count(&row.choice),
        soft(interval(&row.choice)),
        count(&row.injected),
        count(&row.stalled),
        (row.kl.map_or("-".to_owned(), |kl| exponent(kl.mean)), None),
        soft(row.kl.map_or("-".to_owned(), |kl| format!("{}..{}", exponent(kl.low), exponent(kl.high)))),
        (if row.bytes > 0.0 { bytes(row.bytes.round() as u64) } else { "-".to_owned() }, None),
        (figure(row.latency_ms), None),
    ]
}
