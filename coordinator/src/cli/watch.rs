//! Following a run: a bar where someone watches, plain lines where not, JSON lines for programs.
//!
//! Looks at the coordinator now and then and outlives its restarts. Stopping to watch stops nothing.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use protocol::ids::RunId;
use protocol::limits::clean_text;

use super::args::OneRun;
use super::client::Client;
use super::context::{Context, Outcome};
use super::exit;
use super::failure::Failure;
use super::output::Document;
use super::progress::{Changes, Standing, Tracker, training_line};
use super::text::duration_ms;
use crate::api::{RunDetail, RunState, RunSummary, ShardState, route};
use crate::clock::now;

/// Time between looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(300);
/// A coordinator that is away this long is not restarting.
const AWAY_MAX: Duration = Duration::from_secs(60);
/// Positions of the bar.
const BAR_STEPS: u64 = 1000;

/// `watch`.
///
/// # Errors
/// As [`super::client::Client`]'s; exit code 3 once the coordinator was away for a minute.
pub async fn run(context: &mut Context, args: &OneRun) -> Outcome {
    let client = context.client()?;
    let detail = follow(context, &client, args.run).await?;
    finish(context, &detail)
}

/// Shows how the run ended; its state is the exit code.
///
/// # Errors
/// If stdout cannot be written.
pub fn finish(context: &mut Context, detail: &RunDetail) -> Outcome {
    let summary = &detail.summary;
    let took = summary.finished_at_ms.map_or(String::new(), |end| duration_ms(end.since_ms(summary.submitted_at_ms)));
    let text = format!(
        "{} {}: {} of {} shards committed in {took}\n",
        summary.id,
        summary.state,
        summary.shards.committed,
        summary.shards.total()
    );
    context.show_element(&Document::new(summary, text))?;
    let failed = detail.shards.iter().filter(|shard| shard.state == ShardState::Failed);
    for shard in failed {
        let why = shard.failure.as_ref().map_or(String::new(), |failure| {
            let hint = if failure.hint.is_empty() { String::new() } else { format!(" ({})", failure.hint) };
            format!("{}: {}{hint}", failure.kind, failure.message)
        });
        context.output.note(&clean_text(&format!("{} failed: {why}", shard.id)));
    }
    Ok(exit_code(summary))
}

/// What the end of a run means for the exit code.
pub fn exit_code(summary: &RunSummary) -> u8 {
    match summary.state {
        RunState::Complete => exit::OK,
        RunState::Failed if summary.shards.committed > 0 => exit::PARTIAL,
        RunState::Running | RunState::Failed | RunState::Cancelled => exit::FAILED,
    }
}

/// Follows the run until it ends; returns it as it was then.
///
/// # Errors
/// As [`run`].
pub async fn follow(context: &mut Context, client: &Client, run: RunId) -> Result<RunDetail, Failure> {
    follow_with(context, client, run, View::new(context, true)).await
}

/// The same with nothing on stdout, for commands that answer with something else.
///
/// # Errors
/// As [`run`].
pub async fn follow_quietly(context: &mut Context, client: &Client, run: RunId) -> Result<RunDetail, Failure> {
    follow_with(context, client, run, View::new(context, false)).await
}

async fn follow_with(context: &mut Context, client: &Client, run: RunId, mut view: View) -> Result<RunDetail, Failure> {
    let mut last: Option<RunSummary> = None;
    let mut away: Option<Instant> = None;
    loop {
        match client.get::<RunDetail>(&route::run(run)).await {
            Ok(detail) => {
                if away.take().is_some() {
                    view.say(context, "the coordinator is back");
                }
                view.update(context, &detail);
                let ended = detail.summary.state.is_terminal();
                if last.as_ref() != Some(&detail.summary) {
                    view.element(context, &detail, ended)?;
                    last = Some(detail.summary.clone());
                }
                if ended {
                    view.clear();
                    return Ok(detail);
                }
            }
            Err(failure) if failure.exit == exit::UNREACHABLE && last.is_some() => {
                let since = *away.get_or_insert_with(|| {
                    view.say(context, &format!("{}; the run goes on, waiting for it", failure.message));
                    Instant::now()
                });
                if since.elapsed() > AWAY_MAX {
                    view.clear();
                    return Err(failure);
                }
            }
            Err(failure) => {
                view.clear();
                return Err(failure);
            }
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// What the watcher sees.
struct View {
    /// JSON lines for programs go to stdout.
    elements: bool,
    bar: Option<ProgressBar>,
    changes: Changes,
    tracker: Tracker,
}

impl View {
    fn new(context: &Context, elements: bool) -> Self {
        let bar = context.output.moving().then(|| {
            // Gone from the terminal when watching ends, whatever the reason.
            let bar = ProgressBar::new(BAR_STEPS).with_finish(ProgressFinish::AndClear);
            let style = ProgressStyle::with_template("{elapsed_precise} [{bar:28}] {wide_msg}");
            bar.set_style(style.expect("the template is well-formed").progress_chars("=> "));
            bar.enable_steady_tick(Duration::from_millis(500));
            bar
        });
        Self { elements, bar, changes: Changes::default(), tracker: Tracker::default() }
    }

    fn say(&self, context: &mut Context, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| context.output.note(text)),
            None => context.output.note(text),
        }
    }

    fn update(&mut self, context: &mut Context, detail: &RunDetail) {
        for line in self.changes.since_last(detail) {
            self.say(context, &line);
        }
        let Some(bar) = &self.bar else { return };
        let standing = self.tracker.look(detail, now());
        bar.set_position((standing.share * BAR_STEPS as f64) as u64);
        bar.set_message(message(detail, &standing));
    }

    /// One line of JSON for a program; people have the lines and the bar.
    fn element(&self, context: &mut Context, detail: &RunDetail, ended: bool) -> Result<(), Failure> {
        // The last one is shown by `finish`.
        if ended || !self.elements {
            return Ok(());
        }
        context.show_element(&Document::new(&detail.summary, String::new()))
    }

    fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn message(detail: &RunDetail, standing: &Standing) -> String {
    let more = if standing.total_known { "" } else { "+" };
    let mut text = format!(
        "{}/{} shards, {}/{}{more} steps",
        standing.shards_ended, standing.shards, standing.steps_done, standing.steps_total
    );
    if let Some(left_ms) = standing.left_ms {
        text.push_str(&format!(", about {} left", duration_ms(left_ms)));
    }
    let open = detail.trainings.iter().find(|training| !training.ended && training.loss.is_some());
    if let Some(training) = open {
        text.push_str(&format!(" · {}", training_line(training)));
    }
    let note = detail.shards.iter().filter(|shard| shard.state == ShardState::Running).find_map(note_of);
    let waiting = || (!detail.summary.note.is_empty()).then(|| detail.summary.note.clone());
    if let Some(note) = note.or_else(waiting) {
        text.push_str(&clean_text(&format!(" · {note}")).replace('\n', " "));
    }
    text
}

/// What one running shard is doing, in its seats' words.
fn note_of(shard: &crate::api::ShardRow) -> Option<String> {
    let note = shard.seats.iter().rev().map(|seat| &seat.progress.note).find(|note| !note.is_empty())?;
    Some(format!("{}: {note}", shard.id))
}
