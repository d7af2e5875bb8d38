//! `bonepile results` and `bonepile report`: what a run measured, as tables and as a page in the store.
//!
//! Counts and intervals are [`crate::report`]'s.

use std::fmt::Write;
use std::path::PathBuf;

use protocol::limits::clean_text;
use protocol::store::Store;
use serde_json::json;

use super::args::OneRun;
use super::client::Client;
use super::context::{Context, Outcome};
use super::exit;
use super::failure::Failure;
use super::output::Document;
use super::projectors::{evaluation_text, training_text};
use super::table::{Style, Table, Tone};
use super::text::bytes;
use crate::api::{ClusterInfo, RunDetail, RunResults, RunSummary, route};
use crate::report::stats::Proportion;
use crate::report::summary::{ConditionRow, Inspection, Summary, Transfer};
use crate::report::tensorboard::event_files;
use crate::report::{ReportInput, exponent, figure, render};

/// `results`.
///
/// # Errors
/// As [`super::client::Client`]'s.
pub async fn results(context: &mut Context, args: &OneRun) -> Outcome {
    let results: RunResults = context.client()?.get(&route::results(args.run)).await?;
    let summary = Summary::of(&results);
    let style = context.output.style();
    let text = format!("{}{}{}", overview(&summary, style), layer_tables(&summary, style), problems(&summary));
    let data = json!({ "results": results, "summary": summary });
    context.show(&Document::new(&data, text))?;
    note_what_is_missing(context, &results.summary);
    Ok(if summary.unreadable.is_empty() { exit_code(&results.summary) } else { exit::PARTIAL })
}

/// `report`.
///
/// # Errors
/// As [`super::client::Client`]'s; the store's.
pub async fn report(context: &mut Context, args: &OneRun) -> Outcome {
    let client = context.client()?;
    let Written { page, events, results } = write_report(&client, args.run).await?;
    let shown = page.display();
    context.show(&Document::new(&json!({ "report": page, "tensorboard": events }), format!("{shown}\n")))?;
    if let Some(events) = events {
        context.output.note(&format!("its trainings for TensorBoard: tensorboard --logdir {}", events.display()));
    }
    note_what_is_missing(context, &results.summary);
    Ok(exit_code(&results.summary))
}

/// What was written of a run.
#[derive(Debug)]
pub struct Written {
    /// The page.
    pub page: PathBuf,
    /// The folder with event files, if anything was trained.
    pub events: Option<PathBuf>,
    /// What they were made from.
    pub results: RunResults,
}

/// Renders the report of a run and puts it into the store; returns where it is.
///
/// # Errors
/// As [`report`].
pub async fn write_report(client: &Client, run: protocol::ids::RunId) -> Result<Written, Failure> {
    let results: RunResults = client.get(&route::results(run)).await?;
    let detail: RunDetail = client.get(&route::run(run)).await?;
    let cluster: ClusterInfo = client.get(route::CLUSTER).await?;
    let page = render(&ReportInput { results: &results, run: &detail, cluster: &cluster })?;
    let store = Store::open(cluster.store_path.as_ref(), None)?;
    let page = store.write_report(run, "report.html", page.as_bytes())?;
    let files = event_files(&results, &detail);
    let events = match files.is_empty() {
        true => None,
        false => Some(store.write_report_folder(run, "tensorboard", &files)?),
    };
    Ok(Written { page, events, results })
}

/// Results of a run with shards missing are results in part.
fn exit_code(run: &RunSummary) -> u8 {
    let all = run.shards.total();
    match run.shards.committed {
        committed if committed == all => exit::OK,
        0 => exit::FAILED,
        _ => exit::PARTIAL,
    }
}

fn note_what_is_missing(context: &mut Context, run: &RunSummary) {
    let (committed, all) = (run.shards.committed, run.shards.total());
    if committed < all {
        context.output.note(&format!("{} is {}: {committed} of {all} shards are in these results", run.id, run.state));
    }
}

/// One table of inspections, one of conditions for each transfer, and what they mean.
pub fn overview(summary: &Summary, style: Style) -> String {
    let mut text = inspection_table(&summary.inspections, style);
    for transfer in &summary.transfers {
        if !text.is_empty() {
            text.push('\n');
        }
        text.push_str(&transfer_text(transfer, style));
    }
    let trainings = summary.trainings.iter().map(|training| training_text(training, style));
    for more in trainings.chain(summary.evaluations.iter().map(|evaluation| evaluation_text(evaluation, style))) {
        if !text.is_empty() {
            text.push('\n');
        }
        text.push_str(&more);
    }
    text
}

/// Results that could not be read, one line each.
pub fn problems(summary: &Summary) -> String {
    summary
        .unreadable
        .iter()
        .map(|problem| format!("unreadable: {}\n", clean_text(problem).replace('\n', " ")))
        .collect()
}

fn inspection_table(inspections: &[Inspection], style: Style) -> String {
    const COLUMNS: [&str; 13] = [
        "inspect",
        "layers",
        ">count",
        ">tokens",
        ">B/token",
        ">formula",
        ">reload",
        ">recompute",
        ">|K|",
        ">|V|",
        ">rank K",
        ">rank V",
        ">sink K",
    ];
    let mut table = Table::new(style, &COLUMNS);
    for one in inspections {
        let exact = (one.bytes_per_token_measured - one.bytes_per_token_formula as f64).abs() < 0.5;
        let bit_exact = |value: f64| (exponent(value), Some(if value == 0.0 { Tone::Good } else { Tone::Bad }));
        let mean = |value: fn(&crate::report::summary::LayerMeans) -> f64| {
            (one.means.as_ref().map_or("-".to_owned(), |means| figure(value(means))), None)
        };
        table.row([
            (one.model.name.clone(), None),
            (one.layers.to_string(), None),
            (one.profile.len().to_string(), None),
            (one.tokens.to_string(), None),
            (format!("{:.0}", one.bytes_per_token_measured), None),
            (one.bytes_per_token_formula.to_string(), Some(if exact { Tone::Good } else { Tone::Bad })),
            bit_exact(one.reload_logit_max_abs),
            bit_exact(one.recompute_max_abs),
            mean(|means| means.key_norm),
            mean(|means| means.value_norm),
            mean(|means| means.key_rank),
            mean(|means| means.value_rank),
            mean(|means| means.key_sink),
        ]);
    }
    table.render()
}

fn transfer_text(transfer: &Transfer, style: Style) -> String {
    let mut text = format!(
        "transfer {}: {} facts, {} candidates, {} caches sent ({}), {} of {} shards across workers\n",
        clean_text(&transfer.model.name),
        transfer.facts,
        transfer.candidates,
        transfer.packets,
        bytes(transfer.packet_bytes),
        transfer.across_workers,
        transfer.shards,
    );
    const COLUMNS: [&str; 9] =
        ["condition", ">exact", "95 %", ">choice", "95 %", ">KL nats", "95 %", ">max |dlogit|", ">stalled"];
    let mut table = Table::new(style, &COLUMNS);
    for row in &transfer.conditions {
        table.row(condition_cells(row));
    }
    text.push_str(&table.render());
    for row in &transfer.conditions {
        if let Some(packet) = &row.packet_choice {
            let of = format!("{}/{}", packet.hits, packet.items);
            writeln!(text, "{}: the choice follows the packet in {of} ({})", row.condition, interval(packet))
                .expect("writing to a String cannot fail");
        }
    }
    if let Some(equal) = transfer.injected_equals_text() {
        let verdict = if equal {
            "injected equals text to float rounding: caches travel whole"
        } else {
            "injected DIFFERS from text: no other row means anything until that is explained"
        };
        writeln!(text, "{verdict}").expect("writing to a String cannot fail");
    }
    text
}

fn condition_cells(row: &ConditionRow) -> [(String, Option<Tone>); 9] {
    let soft = |text: String| (text, Some(Tone::Soft));
    [
        (row.condition.clone(), None),
        (format!("{}/{}", row.exact.hits, row.exact.items), None),
        soft(interval(&row.exact)),
        (format!("{}/{}", row.choice.hits, row.choice.items), None),
        soft(interval(&row.choice)),
        (row.kl.map_or("-".to_owned(), |kl| exponent(kl.mean)), None),
        soft(row.kl.map_or("-".to_owned(), |kl| format!("{}..{}", exponent(kl.low), exponent(kl.high)))),
        (exponent(row.logit_max_abs), None),
        (row.stalled.to_string(), None),
    ]
}

fn interval(share: &Proportion) -> String {
    format!("{:.0}..{:.0} %", share.low * 100.0, share.high * 100.0)
}

/// A table of layers for each model.
fn layer_tables(summary: &Summary, style: Style) -> String {
    const COLUMNS: [&str; 12] = [
        ">layer",
        "window",
        "shape",
        ">|K|",
        ">sd",
        ">sink",
        ">rank K",
        ">kurtosis",
        ">|V|",
        ">sd",
        ">rank V",
        ">kurtosis",
    ];
    let mut text = String::new();
    for (model, layers) in summary.profiles() {
        let mut table = Table::new(style, &COLUMNS);
        for layer in layers.values() {
            table.plain([
                layer.layer.to_string(),
                layer.sliding_window.map_or("full".to_owned(), |window| window.to_string()),
                layer.shape.map(|side| side.to_string()).join("x"),
                figure(layer.key.norm_mean),
                figure(layer.key.norm_sd),
                figure(layer.key.sink_ratio),
                figure(layer.key.rank.entropy),
                figure(layer.key.kurtosis),
                figure(layer.value.norm_mean),
                figure(layer.value.norm_sd),
                figure(layer.value.rank.entropy),
                figure(layer.value.kurtosis),
            ]);
        }
        writeln!(text, "\nlayers of {}", clean_text(model)).expect("writing to a String cannot fail");
        text.push_str(&table.render());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::fixture;

    #[test]
    fn results_in_tables() {
        let summary = Summary::of(&fixture::results());
        insta::assert_snapshot!(overview(&summary, Style::default()), @r"
        inspect                layers   count  tokens  B/token  formula  reload  recompute    |K|   |V|  rank K  rank V  sink K
        smollm2-135m-instruct  all         30     412    46080    46080       0          0  28.44  6.09   16.87   16.87    0.72
        gemma-3-270m           sliding     15     412    30720    30720       0          0  28.12  6.03   17.00   17.00    0.70
        gemma-3-270m           full         3     412     6144     6144       0          0  32.76  7.02   15.67   15.67    0.87

        transfer smollm2-135m-instruct: 16 facts, 8 candidates, 16 caches sent (19.8 MB), 2 of 2 shards across workers
        condition       exact  95 %       choice  95 %       KL nats  95 %              max |dlogit|  stalled
        text            16/16  81..100 %   16/16  81..100 %        0  0..0                         0        0
        no-context       2/16  3..36 %      2/16  3..36 %       3.58  3.44..3.71               11.00        0
        injected        16/16  81..100 %   16/16  81..100 %  1.0e-12  1.0e-12..1.0e-12        2.2e-5        0
        shifted+128      6/16  18..61 %     6/16  18..61 %      1.27  1.14..1.41                6.00        0
        rerotated+128   16/16  81..100 %   16/16  81..100 %   4.1e-7  3.7e-7..4.5e-7          6.0e-4        0
        matched-noise    2/16  3..36 %      2/16  3..36 %       3.58  3.44..3.71               11.00        0
        other-subject    0/16  0..19 %      0/16  0..19 %       5.38  5.24..5.51               14.00        0
        naive            4/16  10..49 %     4/16  10..49 %      1.98  1.84..2.11                9.00        8
        naive-text       4/16  10..49 %     4/16  10..49 %      1.98  1.84..2.11                9.00        0
        rerotated+1024  16/16  81..100 %   16/16  81..100 %   4.1e-7  3.7e-7..4.5e-7          6.0e-4        0
        other-subject: the choice follows the packet in 16/16 (81..100 %)
        injected equals text to float rounding: caches travel whole
        ");
        let layers = layer_tables(&summary, Style::default());
        assert_eq!(layers.lines().count(), 2 * 3 + 18 + 30);
        insta::assert_snapshot!(layers.lines().take(5).collect::<Vec<_>>().join("\n"), @r"
        layers of gemma-3-270m
        layer  window  shape       |K|    sd  sink  rank K  kurtosis   |V|    sd  rank V  kurtosis
            0  512     1x26x256  15.56  2.80  0.26   20.56      0.22  3.33  0.60   20.56      0.22
            1  512     1x26x256  21.28  2.80  0.31   20.11      0.44  4.56  0.60   20.11      0.44
        ");
    }

    #[test]
    fn a_run_without_all_its_shards_has_results_in_part() {
        let mut run = fixture::results().summary;
        assert_eq!(exit_code(&run), exit::OK);
        run.shards.failed = 1;
        assert_eq!(exit_code(&run), exit::PARTIAL);
        run.shards.committed = 0;
        assert_eq!(exit_code(&run), exit::FAILED);
    }
}
