//! How far a run is and how long it will take, from what the coordinator tells. Pure: no clock, no terminal.
//!
//! A remaining time is told only when every kind of shard that is left has been seen at work; before that nobody knows it.

use std::collections::BTreeMap;

use protocol::ids::{ArtifactHash, ShardId};
use protocol::time::UnixMillis;

use crate::api::{RunDetail, ShardRow, ShardState, TrainingRow};

/// A running shard tells how long its kind takes once this share of its steps is done.
const SHARE_TOLD: f64 = 0.2;

/// Where a run stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Standing {
    /// Steps done, of all shards.
    pub steps_done: u64,
    /// Steps of all shards; those not yet told are taken from shards of the same kind.
    pub steps_total: u64,
    /// `false` while a shard's steps are known neither from itself nor from its kind: the total is then a lower bound.
    pub total_known: bool,
    /// Share of the work done, 0 to 1: the mean over shards, a running one counts with its steps.
    pub share: f64,
    /// Shards that ended.
    pub shards_ended: usize,
    /// Shards in all.
    pub shards: usize,
    /// Time left, milliseconds; `None` while it cannot be told.
    pub left_ms: Option<u64>,
}

/// Remembers how many steps shards have: the coordinator tells it only while they run.
#[derive(Debug, Default)]
pub struct Tracker {
    of_shard: BTreeMap<ShardId, u64>,
    of_kind: BTreeMap<String, u64>,
}

impl Tracker {
    /// Where `run` stands at `now`.
    pub fn look(&mut self, run: &RunDetail, now: UnixMillis) -> Standing {
        for shard in run.shards.iter().filter(|shard| shard.state == ShardState::Running) {
            let totals = shard.seats.iter().map(|seat| u64::from(seat.progress.total));
            // A seat that has not told its steps yet would make the sum too small.
            if totals.clone().all(|total| total > 0) && !shard.seats.is_empty() {
                let sum = totals.sum();
                self.of_shard.insert(shard.id, sum);
                self.of_kind.insert(kind(shard).to_owned(), sum);
            }
        }
        let to_come = match run.summary.state.is_terminal() {
            true => 0,
            false => run.trainings.iter().map(|training| training.shards_to_come as usize).sum(),
        };
        let mut standing = Standing {
            steps_done: 0,
            steps_total: 0,
            total_known: to_come == 0,
            share: 0.0,
            shards_ended: 0,
            shards: run.shards.len() + to_come,
            // How long rounds that are not there yet take is known to nobody.
            left_ms: Kinds::of(run, now).left_ms(run, now).filter(|_| to_come == 0),
        };
        for shard in &run.shards {
            let total = self.of_shard.get(&shard.id).or_else(|| self.of_kind.get(kind(shard))).copied();
            standing.total_known &= total.is_some();
            let total = total.unwrap_or(0);
            let ended = shard.state.is_terminal();
            let done = match shard.state {
                ShardState::Running => shard.seats.iter().map(|seat| u64::from(seat.progress.done)).sum(),
                _ if ended => total,
                _ => 0,
            };
            standing.steps_done += done.min(total);
            standing.steps_total += total;
            standing.shards_ended += usize::from(ended);
            standing.share += if ended { 1.0 } else { share(shard) };
        }
        standing.share /= standing.shards.max(1) as f64;
        standing
    }
}

/// What has been seen of each kind of shard.
struct Kinds<'a> {
    /// Mean time of a shard, milliseconds.
    times: BTreeMap<&'a str, f64>,
    /// Shards that were at work at once, on average.
    at_once: f64,
}

impl<'a> Kinds<'a> {
    fn of(run: &'a RunDetail, now: UnixMillis) -> Self {
        let mut seen: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
        let mut guesses: BTreeMap<&str, f64> = BTreeMap::new();
        let mut busy_ms = 0.0;
        for shard in &run.shards {
            let Some(time_ms) = time_ms(shard, now) else { continue };
            busy_ms += time_ms;
            match shard.state {
                ShardState::Committed => {
                    let (sum, count) = seen.entry(kind(shard)).or_default();
                    *sum += time_ms;
                    *count += 1.0;
                }
                ShardState::Running if share(shard) >= SHARE_TOLD => {
                    guesses.insert(kind(shard), time_ms / share(shard));
                }
                _ => {}
            }
        }
        let mut times = guesses;
        times.extend(seen.into_iter().map(|(kind, (sum, count))| (kind, sum / count)));
        let first = run.shards.iter().filter_map(|shard| shard.placed_at_ms).min();
        let elapsed_ms = first.map_or(0.0, |first| now.since_ms(first) as f64);
        let at_once = if elapsed_ms > 0.0 { (busy_ms / elapsed_ms).max(1.0) } else { 1.0 };
        Self { times, at_once }
    }

    fn left_ms(&self, run: &RunDetail, now: UnixMillis) -> Option<u64> {
        let mut sum = 0.0;
        let mut longest: f64 = 0.0;
        for shard in run.shards.iter().filter(|shard| !shard.state.is_terminal()) {
            let whole = *self.times.get(kind(shard))?;
            let left = match shard.state {
                ShardState::Running if share(shard) > 0.0 => whole * (1.0 - share(shard)),
                ShardState::Running => (whole - time_ms(shard, now).unwrap_or(0.0)).max(0.0),
                _ => whole,
            };
            sum += left;
            longest = longest.max(left);
        }
        // Never less than the longest shard left, however many are at work.
        Some((sum / self.at_once).max(longest) as u64)
    }
}

/// Kind and model: the first two words of the summary.
fn kind(shard: &ShardRow) -> &str {
    let summary = &shard.summary;
    let end = summary.match_indices(' ').nth(1).map_or(summary.len(), |(at, _)| at);
    &summary[..end]
}

fn share(shard: &ShardRow) -> f64 {
    match shard.progress.total {
        0 => 0.0,
        total => f64::from(shard.progress.done.min(total)) / f64::from(total),
    }
}

/// How long the newest attempt took, or takes so far.
fn time_ms(shard: &ShardRow, now: UnixMillis) -> Option<f64> {
    let end = match shard.state {
        ShardState::Running => now,
        ShardState::Committed => shard.finished_at_ms?,
        _ => return None,
    };
    Some(end.since_ms(shard.placed_at_ms?) as f64)
}

/// What changed since the last look: one line for each shard that moved.
#[derive(Debug, Default)]
pub struct Changes {
    known: BTreeMap<String, (ShardState, u32)>,
    /// The newest steps of each training.
    newest: BTreeMap<usize, ArtifactHash>,
}

impl Changes {
    /// Lines for trainings with newer numbers, and for shards that were placed, ended or placed again, in order.
    pub fn since_last(&mut self, run: &RunDetail) -> Vec<String> {
        let mut lines = Vec::new();
        for shard in &run.shards {
            let now = (shard.state, shard.attempts);
            let before = self.known.insert(shard.id.to_string(), now);
            if before == Some(now) || before.is_none() && shard.state == ShardState::Waiting {
                continue;
            }
            lines.extend(line(shard));
        }
        for (number, training) in run.trainings.iter().enumerate() {
            let Some(newest) = training.newest.as_ref().filter(|_| training.loss.is_some()) else { continue };
            if self.newest.insert(number, newest.hash) != Some(newest.hash) {
                lines.push(training_line(training));
            }
        }
        lines
    }
}

/// How far a training is, in its newest numbers.
pub fn training_line(training: &TrainingRow) -> String {
    let name = if training.experiment.is_empty() { &training.what } else { &training.experiment };
    let loss = training.loss.map_or(String::new(), |loss| format!(", loss {loss:.3}"));
    let gates = training.gates_open.map_or(String::new(), |(open, all)| format!(", {open}/{all} gates open"));
    let text = format!("{name}: {} of {} samples{loss}{gates}", training.counted, training.samples);
    protocol::limits::clean_text(&text).replace('\n', " ")
}

fn line(shard: &ShardRow) -> Option<String> {
    let places: Vec<String> =
        shard.seats.iter().map(|seat| format!("{} on {}/{}", seat.role, seat.worker, seat.device)).collect();
    let failure =
        || shard.failure.as_ref().map_or(String::new(), |failure| format!(": {}: {}", failure.kind, failure.message));
    let text = match shard.state {
        ShardState::Running => format!("{} {}: {}", shard.id, shard.summary, places.join(", ")),
        ShardState::Committed => format!("{} {}: committed", shard.id, shard.summary),
        ShardState::Failed => format!("{} {}: failed{}", shard.id, shard.summary, failure()),
        ShardState::Cancelled => format!("{} {}: cancelled", shard.id, shard.summary),
        ShardState::Waiting if shard.failure.is_some() => {
            format!("{} {}: waits to be tried again{}", shard.id, shard.summary, failure())
        }
        ShardState::Waiting => return None,
    };
    Some(protocol::limits::clean_text(&text).replace('\n', " "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Progress, SeatRow};
    use crate::report::fixture;

    /// Summary, state, steps done and in all, when placed and finished.
    type Row<'a> = (&'a str, ShardState, u32, u32, Option<u64>, Option<u64>);

    fn run(shards: &[Row<'_>]) -> RunDetail {
        let mut run = fixture::detail(&fixture::results());
        let template = run.shards[0].clone();
        let seat = template.seats[0].clone();
        run.shards = (0..)
            .zip(shards)
            .map(|(index, (summary, state, done, total, placed, finished))| {
                let steps = Progress { done: *done, total: *total, note: String::new() };
                // The coordinator tells a shard's own progress in thousandths, and steps only while it runs.
                let thousandths = if *state == ShardState::Committed { 1000 } else { done * 1000 / total.max(&1) };
                let running = *state == ShardState::Running;
                ShardRow {
                    id: format!("r7.{index}").parse().unwrap(),
                    summary: (*summary).to_owned(),
                    state: *state,
                    seats: if running { vec![SeatRow { progress: steps, ..seat.clone() }] } else { Vec::new() },
                    progress: Progress { done: thousandths, total: 1000, note: String::new() },
                    placed_at_ms: placed.map(UnixMillis),
                    finished_at_ms: finished.map(UnixMillis),
                    ..template.clone()
                }
            })
            .collect();
        run
    }

    const A: &str = "inspect a layers=all";
    const A2: &str = "inspect a layers=full";
    const B: &str = "transfer b facts=0..4";

    #[test]
    fn nothing_is_told_that_is_not_known() {
        use ShardState::*;
        let mut tracker = Tracker::default();
        let start = run(&[(A, Waiting, 0, 0, None, None), (B, Waiting, 0, 0, None, None)]);
        let standing = tracker.look(&start, UnixMillis(1000));
        assert_eq!((standing.share, standing.total_known, standing.left_ms), (0.0, false, None));

        // One of two kinds was seen: the other's steps and time are unknown, so the run's are.
        let b = (B, Waiting, 0, 0, None, None);
        tracker.look(&run(&[(A, Running, 3, 10, Some(0), None), b, (A2, Waiting, 0, 0, None, None)]), UnixMillis(9));
        let later = run(&[(A, Committed, 0, 0, Some(0), Some(4000)), b, (A2, Waiting, 0, 0, None, None)]);
        let standing = tracker.look(&later, UnixMillis(4000));
        assert_eq!((standing.steps_done, standing.steps_total, standing.total_known), (10, 20, false));
        assert_eq!(standing.left_ms, None);
    }

    #[test]
    fn time_left_comes_from_shards_of_the_same_kind_and_from_how_many_work_at_once() {
        use ShardState::*;
        let run = run(&[
            (A, Committed, 0, 0, Some(0), Some(4000)),
            (A2, Committed, 0, 0, Some(0), Some(4000)),
            (A, Waiting, 0, 0, None, None),
            (A, Waiting, 0, 0, None, None),
            (A2, Waiting, 0, 0, None, None),
            (A2, Waiting, 0, 0, None, None),
        ]);
        let standing = Tracker::default().look(&run, UnixMillis(4000));
        assert_eq!(standing.left_ms, Some(8000));
        assert!((standing.share - 1.0 / 3.0).abs() < 1e-12);
    }

    #[test]
    fn a_running_shard_counts_with_its_steps_and_speaks_for_its_kind_once_it_has_moved() {
        use ShardState::*;
        let mut tracker = Tracker::default();
        let at = |done| run(&[(B, Running, done, 10, Some(0), None), (B, Waiting, 0, 0, None, None)]);
        assert_eq!(tracker.look(&at(1), UnixMillis(1000)).left_ms, None);
        let standing = tracker.look(&at(5), UnixMillis(5000));
        assert_eq!((standing.steps_done, standing.steps_total, standing.total_known), (5, 20, true));
        assert_eq!(standing.left_ms, Some(15_000));
        assert!((standing.share - 0.25).abs() < 1e-12);
        let ended = run(&[(B, Committed, 0, 0, Some(0), Some(9)), (B, Failed, 2, 10, Some(0), Some(9))]);
        let standing = tracker.look(&ended, UnixMillis(10));
        assert_eq!((standing.share, standing.left_ms, standing.shards_ended), (1.0, Some(0), 2));
        assert_eq!((standing.steps_done, standing.steps_total), (20, 20));
    }

    #[test]
    fn each_move_of_a_shard_is_one_line() {
        use ShardState::*;
        let mut changes = Changes::default();
        let at = |state| run(&[(A, state, 0, 0, None, None)]);
        assert!(changes.since_last(&at(Waiting)).is_empty());
        assert_eq!(changes.since_last(&at(Running)), ["r7.0 inspect a layers=all: main on w1/cpu"]);
        assert!(changes.since_last(&at(Running)).is_empty());
        assert_eq!(changes.since_last(&at(Committed)), ["r7.0 inspect a layers=all: committed"]);
    }

    #[test]
    fn a_training_tells_its_newest_numbers_once_and_counts_what_is_to_come() {
        let mut run = run(&[("steps", ShardState::Committed, 4, 4, Some(0), Some(1000))]);
        run.summary.state = crate::api::RunState::Running;
        let hash = ArtifactHash::of(b"one");
        let newest = crate::api::OutputRow { role: protocol::ids::Role::Target, name: String::new(), hash, bytes: 1 };
        run.trainings = vec![TrainingRow {
            experiment: "bridge".to_owned(),
            what: "fuser".to_owned(),
            counted: 64,
            samples: 256,
            shards_to_come: 3,
            ended: false,
            newest: Some(newest),
            loss: Some(2.125),
            gates_open: Some((30, 36)),
        }];
        let mut changes = Changes::default();
        assert!(
            changes.since_last(&run).contains(&"bridge: 64 of 256 samples, loss 2.125, 30/36 gates open".to_owned())
        );
        assert!(changes.since_last(&run).is_empty());
        let standing = Tracker::default().look(&run, UnixMillis(2000));
        assert_eq!((standing.shards, standing.share, standing.left_ms), (4, 0.25, None));
    }
}
