//! The researcher's questions and orders: submit, runs, explain, cancel, retry.
//!
//! Only words: the coordinator decides.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use protocol::limits::clean_text;
use protocol::sweep::Sweep;
use protocol::time::UnixMillis;

use super::args::{Cancel, OneRun, OneShard, Runs, Submit};
use super::client::Client;
use super::context::{Context, Outcome};
use super::exit;
use super::failure::Failure;
use super::output::Document;
use super::table::{Style, Table, Tone};
use super::text::{duration_ms, relative};
use super::watch;
use crate::api::{
    CancelRequest, Explanation, Progress, RetryAnswer, RunDetail, RunState, RunSummary, ShardRow, ShardState,
    SubmitAnswer, SubmitRequest, Verdict, route,
};
use crate::clock::now;

/// `submit`.
///
/// # Errors
/// Exit code 2 with the line in question if the sweep is refused, then nothing was accepted.
pub async fn submit(context: &mut Context, args: &Submit) -> Outcome {
    let client = context.client()?;
    let text = fs::read_to_string(&args.sweep)
        .map_err(|error| Failure { exit: exit::USAGE, ..Failure::file("read", &args.sweep, &error) })?;
    let answer = submit_text(&client, &args.sweep.display().to_string(), &text).await?;
    let document = Document::new(&answer, format!("{}\n", answer.run));
    let next = format!("{} shards accepted; follow with: bonepile watch {}", answer.shards, answer.run);
    if !args.watch {
        context.show(&document)?;
        context.output.note(&next);
        return Ok(exit::OK);
    }
    context.show_element(&document)?;
    let detail = watch::follow(context, &client, answer.run).await?;
    watch::finish(context, &detail)
}

/// Checks a sweep here, for a complaint even if the coordinator is away, and hands it over.
///
/// # Errors
/// As [`submit`].
pub async fn submit_text(client: &Client, file: &str, text: &str) -> Result<SubmitAnswer, Failure> {
    Sweep::parse(file, text).map_err(|error| Failure::in_source("bad-sweep", &error, text))?;
    // The journal keeps the name of the file, not where it lay on this box.
    let name = Path::new(file).file_name().map_or(file.to_owned(), |name| name.to_string_lossy().into_owned());
    client.submit(route::RUNS, &SubmitRequest { file: name, text: text.to_owned() }, text).await
}

/// `runs`.
///
/// # Errors
/// As [`super::client::Client`]'s.
pub async fn runs(context: &mut Context, args: &Runs) -> Outcome {
    let client = context.client()?;
    if let Some(run) = args.run {
        let detail: RunDetail = client.get(&route::run(run)).await?;
        let text = detail_text(&detail, context.output.style(), now());
        context.show(&Document::new(&detail, text))?;
        return Ok(exit::OK);
    }
    let runs: Vec<RunSummary> = client.get(route::RUNS).await?;
    let text = run_table(&runs, context.output.style(), now());
    context.show(&Document::new(&runs, text))?;
    if runs.is_empty() {
        context.output.note("no runs; submit one with `bonepile submit SWEEP`");
    }
    Ok(exit::OK)
}

/// `cancel`.
///
/// # Errors
/// As [`super::client::Client`]'s.
pub async fn cancel(context: &mut Context, args: &Cancel) -> Outcome {
    let request = CancelRequest { reason: args.reason.clone() };
    let run: RunSummary = context.client()?.post(&route::cancel(args.run), &request).await?;
    let text = run_table(std::slice::from_ref(&run), context.output.style(), now());
    context.show(&Document::new(&run, text))?;
    Ok(exit::OK)
}

/// `retry`.
///
/// # Errors
/// As [`super::client::Client`]'s.
pub async fn retry(context: &mut Context, args: &OneRun) -> Outcome {
    let answer: RetryAnswer = context.client()?.order(&route::retry(args.run)).await?;
    context.show(&Document::new(&answer, format!("{} shards of {} wait again\n", answer.shards, answer.run)))?;
    Ok(exit::OK)
}

/// `explain`.
///
/// # Errors
/// As [`super::client::Client`]'s.
pub async fn explain(context: &mut Context, args: &OneShard) -> Outcome {
    let explanation: Explanation = context.client()?.get(&route::explain(args.shard)).await?;
    let text = explanation_text(&explanation, context.output.style());
    context.show(&Document::new(&explanation, text))?;
    Ok(exit::OK)
}

fn run_table(runs: &[RunSummary], style: Style, now: UnixMillis) -> String {
    let mut table =
        Table::new(style, &["run", "state", ">done", ">shards", ">failed", "submitted", "took", "name", "note"]);
    for run in runs {
        let took = run.finished_at_ms.map(|end| duration_ms(end.since_ms(run.submitted_at_ms))).unwrap_or_default();
        let failed = (run.shards.failed > 0).then_some(Tone::Bad);
        table.row([
            (run.id.to_string(), None),
            (run.state.to_string(), Some(run_tone(run.state))),
            (format!("{} %", run.done_per_mille / 10), None),
            (format!("{}/{}", run.shards.committed, run.shards.total()), None),
            (run.shards.failed.to_string(), failed),
            (relative(run.submitted_at_ms, now), None),
            (took, None),
            (run.name.clone(), None),
            (run.note.clone(), Some(Tone::Busy)),
        ]);
    }
    table.render()
}

/// The run in one line, then its shards.
fn detail_text(detail: &RunDetail, style: Style, now: UnixMillis) -> String {
    let mut table = Table::new(style, &["shard", "state", ">tries", ">done", "on", "what", "note"]);
    for shard in &detail.shards {
        let places: Vec<String> =
            shard.seats.iter().map(|seat| format!("{}={}/{}", seat.role, seat.worker, seat.device)).collect();
        let (note, tone) = shard_note(shard);
        table.row([
            (shard.id.to_string(), None),
            (shard.state.to_string(), Some(shard_tone(shard.state))),
            (shard.attempts.to_string(), None),
            (percent(&shard.progress), None),
            (places.join(" "), None),
            (shard.summary.clone(), None),
            (note, Some(tone)),
        ]);
    }
    format!("{}\n{}", run_table(std::slice::from_ref(&detail.summary), style, now), table.render())
}

fn percent(progress: &Progress) -> String {
    match progress.total {
        0 => String::new(),
        total => format!("{} %", u64::from(progress.done) * 100 / u64::from(total)),
    }
}

/// Why it waits, what it is doing, or why it failed.
fn shard_note(shard: &ShardRow) -> (String, Tone) {
    match (&shard.waiting, &shard.failure) {
        (Some(why), _) => (why.clone(), Tone::Soft),
        (None, Some(failure)) if shard.state == ShardState::Failed => {
            (format!("{}: {}", failure.kind, failure.message), Tone::Bad)
        }
        _ if shard.state == ShardState::Running => (shard.progress.note.clone(), Tone::Soft),
        _ => (String::new(), Tone::Soft),
    }
}

fn shard_tone(state: ShardState) -> Tone {
    match state {
        ShardState::Waiting | ShardState::Cancelled => Tone::Soft,
        ShardState::Running => Tone::Busy,
        ShardState::Committed => Tone::Good,
        ShardState::Failed => Tone::Bad,
    }
}

/// What a run's state means to a reader.
pub fn run_tone(state: RunState) -> Tone {
    match state {
        RunState::Running => Tone::Busy,
        RunState::Complete => Tone::Good,
        RunState::Failed => Tone::Bad,
        RunState::Cancelled => Tone::Soft,
    }
}

fn explanation_text(explanation: &Explanation, style: Style) -> String {
    let clean = |text: &str| clean_text(text).replace('\n', " ");
    let mut text = String::new();
    writeln!(text, "{} {}: {}", explanation.shard, clean(&explanation.summary), explanation.state)
        .and_then(|()| writeln!(text, "{}", clean(&explanation.sentence)))
        .expect("writing to a String cannot fail");
    let mut table = Table::new(style, &["device", "host", "verdict", "why"]);
    for device in &explanation.devices {
        let (word, tone) = verdict(device.verdict);
        table.row([
            (device.device.clone(), None),
            (device.hostname.clone(), None),
            (word.to_owned(), Some(tone)),
            (device.reason.clone(), None),
        ]);
    }
    let table = table.render();
    if !table.is_empty() {
        text.push('\n');
        text.push_str(&table);
    }
    text
}

fn verdict(verdict: Verdict) -> (&'static str, Tone) {
    match verdict {
        Verdict::Chosen => ("chosen", Tone::Good),
        Verdict::Fits => ("fits", Tone::Soft),
        Verdict::NotNow => ("not now", Tone::Busy),
        Verdict::Never => ("never", Tone::Bad),
    }
}

#[cfg(test)]
mod tests {
    use protocol::ids::RunId;

    use super::*;
    use crate::api::{DeviceReason, ShardCounts};
    use crate::report::fixture;

    #[test]
    fn runs_in_a_table() {
        let run = |id, state, shards, finished| RunSummary {
            id: RunId(id),
            name: "first look".to_owned(),
            state,
            shards,
            done_per_mille: 456,
            submitted_at_ms: UnixMillis(1_000),
            finished_at_ms: finished,
            note: String::new(),
        };
        let counts = ShardCounts { waiting: 1, running: 1, committed: 6, failed: 1, cancelled: 0 };
        let rows = [
            run(2, RunState::Running, counts, None),
            run(
                1,
                RunState::Complete,
                ShardCounts { committed: 9, ..ShardCounts::default() },
                Some(UnixMillis(76_000)),
            ),
        ];
        insta::assert_snapshot!(run_table(&rows, Style::default(), UnixMillis(3_601_000)), @r"
        run  state     done  shards  failed  submitted   took    name        note
        r2   running   45 %     6/9       1  1h 00m ago          first look
        r1   complete  45 %     9/9       0  1h 00m ago  1m 15s  first look
        ");
    }

    #[test]
    fn a_run_with_its_shards() {
        let mut detail = fixture::detail(&fixture::results());
        detail.summary.name = "first-look".to_owned();
        detail.shards.truncate(4);
        detail.shards[1].state = ShardState::Waiting;
        detail.shards[1].waiting = Some("no device has 2.1 GiB free".to_owned());
        detail.shards[1].seats.clear();
        detail.shards[1].progress = Progress { done: 0, total: 1000, note: String::new() };
        insta::assert_snapshot!(detail_text(&detail, Style::default(), UnixMillis(1_798_761_600_000)), @r"
        run  state      done  shards  failed  submitted   took    name        note
        r7   complete  100 %     5/5       0  1m 40s ago  1m 39s  first-look

        shard  state      tries   done  on                           what                                       note
        r7.0   committed      1  100 %  main=w1/cpu                  inspect smollm2-135m-instruct layers=all
        r7.1   waiting        1    0 %                               inspect gemma-3-270m layers=sliding        no device has 2.1 GiB free
        r7.2   committed      1  100 %  main=w1/cpu                  inspect gemma-3-270m layers=full
        r7.3   committed      1  100 %  source=w1/cpu target=w2/cpu  transfer smollm2-135m-instruct facts=0..8
        ");
    }

    #[test]
    fn an_explanation_gives_every_device_its_reason() {
        let reason = |device: &str, verdict, reason: &str| DeviceReason {
            device: device.to_owned(),
            hostname: "box".to_owned(),
            verdict,
            reason: reason.to_owned(),
        };
        let explanation = Explanation {
            shard: "r1.3".parse().unwrap(),
            summary: "transfer smollm2-135m-instruct facts=0..4".to_owned(),
            state: ShardState::Waiting,
            sentence: "waits for a second worker: the seats must sit on different workers".to_owned(),
            devices: vec![
                reason("w1/cpu", Verdict::Fits, "4.1 GiB free"),
                reason("w2/cpu", Verdict::Never, "model missing"),
            ],
        };
        insta::assert_snapshot!(explanation_text(&explanation, Style::default()), @r"
        r1.3 transfer smollm2-135m-instruct facts=0..4: waiting
        waits for a second worker: the seats must sit on different workers

        device  host  verdict  why
        w1/cpu  box   fits     4.1 GiB free
        w2/cpu  box   never    model missing
        ");
    }
}
