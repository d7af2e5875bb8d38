//! Why a shard is where it is, in one sentence and device by device: the same look that placement takes, put into words.
//!
//! Decides nothing and changes nothing.

use std::collections::BTreeSet;

use protocol::control::FailureKind;
use protocol::experiment::Spread;
use protocol::ids::{AttemptId, ShardId, WorkerId};
use protocol::model_name::ModelName;

use super::machine::Scheduler;
use super::placement::{Board, Need, World};
use super::reason::{Bytes, Rated, Reason};
use super::state::{Attempt, AttemptState, Shard};
use super::status::{ShardState, Verdict};

/// Devices named in a sentence; the rest are counted.
const DEVICES_NAMED_MAX: usize = 4;

/// Why a shard is where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explained {
    /// Where it is.
    pub state: ShardState,
    /// Why, in one sentence.
    pub sentence: String,
    /// By device: for a shard that was placed as it was decided then, for one that waits as it is now.
    pub devices: Vec<Rated>,
}

impl Scheduler {
    /// Explains a shard; `None` if there is no such shard. Costs a rating of each device.
    pub fn explain(&self, id: ShardId) -> Option<Explained> {
        let shard = self.state.shard(id)?;
        let decided = || shard.newest().map(|attempt| attempt.reasons.clone()).unwrap_or_default();
        let (sentence, devices) = match shard.state {
            ShardState::Waiting => self.waiting(id, shard),
            ShardState::Running => (self.running(id, shard), decided()),
            ShardState::Committed => (committed(id, shard), decided()),
            ShardState::Failed => (failed(shard), decided()),
            ShardState::Cancelled => {
                let reason = self.state.runs.get(&id.run).map(|run| run.cancel_reason.as_str()).unwrap_or_default();
                (format!("cancelled with its run: {reason}"), decided())
            }
        };
        Some(Explained { state: shard.state, sentence, devices })
    }

    fn running(&self, id: ShardId, shard: &Shard) -> String {
        let Some(attempt) = shard.open_attempt() else { return String::new() };
        let mut sentence = format!("runs as {}: {}", attempt_id(id, attempt), seats_in_words(attempt));
        let silent: BTreeSet<WorkerId> = attempt
            .unfinished()
            .map(|seat| seat.device.worker)
            .filter(|worker| self.live.connected(*worker).is_none())
            .collect();
        if !silent.is_empty() {
            let names: Vec<_> = silent.iter().map(ToString::to_string).collect();
            sentence += &format!("; {} not connected, its lease still runs", names.join(", "));
        }
        sentence
    }

    fn waiting(&self, id: ShardId, shard: &Shard) -> (String, Vec<Rated>) {
        let board = Board::survey(&self.state, &self.live, self.now);
        let need = Need::of(id, shard);
        let devices = board.rate(&need, World::Now);
        let wants = need_in_words(&need);
        if devices.is_empty() {
            let sentence = format!(
                "waits: {wants}; no worker has connected yet: make a token with `bonepile token create`, then \
                 `bonepile-worker join` on a box"
            );
            return (sentence, devices);
        }
        let mut sentence = if !board.could_place(&need, World::Someday) {
            format!("cannot run as things are: {wants}; {}; {}", qualifying(&devices), change(&need, &devices))
        } else if shard.not_before > self.now {
            let seconds = shard.not_before.since_ms(self.now).div_ceil(1000);
            format!("waits: tries again in {seconds} s, after a pause because it just failed")
        } else if board.could_place(&need, World::Now) {
            "waits: may start at once, is next to be placed".to_owned()
        } else {
            format!("waits: {wants}; {}; {}", qualifying(&devices), soon(&devices))
        };
        if let Some((fence, failure, _)) = shard.last_failure() {
            sentence += &format!(" (last try {}: {failure})", AttemptId { shard: id, fence });
        }
        (sentence, devices)
    }
}

fn committed(id: ShardId, shard: &Shard) -> String {
    match shard.committed_attempt() {
        Some(attempt) => format!("committed by {}: {}", attempt_id(id, attempt), seats_in_words(attempt)),
        None => String::new(),
    }
}

fn failed(shard: &Shard) -> String {
    let tries = shard.attempts.iter().filter(|attempt| matches!(attempt.state, AttemptState::Failed { .. })).count();
    let Some((_, failure, _)) = shard.last_failure() else { return "failed".to_owned() };
    let times = if tries == 1 { "1 try".to_owned() } else { format!("{tries} tries") };
    let hint = if failure.hint.is_empty() { String::new() } else { format!("; {}", failure.hint) };
    let again = match failure.kind {
        FailureKind::BadSpec | FailureKind::Unsupported => "",
        _ => "; `bonepile retry` tries it again",
    };
    format!("failed after {times}: {failure}{hint}{again}")
}

fn attempt_id(shard: ShardId, attempt: &Attempt) -> AttemptId {
    AttemptId { shard, fence: attempt.fence }
}

fn seats_in_words(attempt: &Attempt) -> String {
    let seats: Vec<_> = attempt.seats.iter().map(|seat| format!("{} on {}", seat.role, seat.device)).collect();
    seats.join(", ")
}

fn need_in_words(need: &Need<'_>) -> String {
    let places = match (need.seats.len(), need.spread) {
        (0 | 1, _) => "a device".to_owned(),
        (seats, Spread::Any) => format!("devices for {seats} seats at once"),
        (seats, Spread::Devices) => format!("{seats} devices at once"),
        (seats, Spread::Workers) => format!("{seats} workers at once"),
    };
    let each = if need.seats.len() > 1 { " each" } else { "" };
    format!("needs {}{each} on {places} with {}", Bytes(need.bytes_max()), need.models.join(" and "))
}

/// `only w1/cpu qualifies: w2/cpu: its worker lacks …`.
fn qualifying(devices: &[Rated]) -> String {
    let (fit, not): (Vec<_>, Vec<_>) = devices.iter().partition(|rated| rated.reason.verdict() == Verdict::Fits);
    let names: Vec<_> = fit.iter().take(DEVICES_NAMED_MAX).map(|rated| rated.device.to_string()).collect();
    let qualify = match fit.len() {
        0 => "no device qualifies".to_owned(),
        1 => format!("only {} qualifies", names[0]),
        more if more > DEVICES_NAMED_MAX => format!("{more} devices qualify"),
        _ => format!("only {} qualify", names.join(", ")),
    };
    let mut reasons: Vec<_> =
        not.iter().take(DEVICES_NAMED_MAX).map(|rated| format!("{}: {}", rated.device, rated.reason)).collect();
    if not.len() > DEVICES_NAMED_MAX {
        reasons.push(format!("and {} more", not.len() - DEVICES_NAMED_MAX));
    }
    if reasons.is_empty() { qualify } else { format!("{qualify} ({})", reasons.join("; ")) }
}

/// What a person would have to change, since waiting does not help.
fn change(need: &Need<'_>, devices: &[Rated]) -> String {
    let mut ways = BTreeSet::new();
    for rated in devices {
        match &rated.reason {
            Reason::ModelAbsent { model } => ways.insert(match model.parse() {
                Ok(ModelName::Known(_) | ModelName::Hub(_)) => {
                    format!("bring {model} to one more worker (`bonepile-worker models pull {model}`, then restart it)")
                }
                _ => format!("copy {model} to one more worker and restart it"),
            }),
            Reason::BudgetTooSmall { need_bytes, .. } => {
                ways.insert(format!("raise a device's budget to {}", Bytes(*need_bytes)))
            }
            _ => continue,
        };
    }
    let apart = need.spread == Spread::Workers && need.seats.len() > 1;
    ways.insert(if apart { "join another worker" } else { "join a worker that has model and memory" }.to_owned());
    if need.spread != Spread::Any && need.seats.len() > 1 {
        ways.insert(format!(
            "submit with spread = \"{}\"",
            if need.spread == Spread::Workers { "devices" } else { "any" }
        ));
    }
    format!("it can if you {}", ways.into_iter().collect::<Vec<_>>().join(" or "))
}

/// What waiting will bring.
fn soon(devices: &[Rated]) -> String {
    let has = |wanted: fn(&Reason) -> bool| devices.iter().any(|rated| wanted(&rated.reason));
    if has(|reason| matches!(reason, Reason::Busy { .. } | Reason::FailedHere { .. })) {
        "starts when a running shard ends".to_owned()
    } else if has(|reason| matches!(reason, Reason::NotMeasured)) {
        "starts with the worker's first heartbeat, if memory allows".to_owned()
    } else if has(|reason| matches!(reason, Reason::MemoryShort { .. })) {
        "starts when memory gets free".to_owned()
    } else if has(|reason| matches!(reason, Reason::Draining)) {
        "starts when a worker is undrained".to_owned()
    } else {
        "starts when a worker that qualifies is back".to_owned()
    }
}
