//! Why a shard is where it is, in one sentence and device by device: the same look that placement takes, put into words.
//!
//! Decides nothing and changes nothing.

use std::collections::BTreeSet;

use protocol::control::FailureKind;
use protocol::experiment::Spread;
use protocol::ids::{AttemptId, ShardId, WorkerId};
use protocol::model_name::ModelName;

use super::machine::Scheduler;
use super::placement::Round;
use super::reason::{Bytes, Rated, Reason};
use super::request::{Place, Request, failures};
use super::state::{Attempt, AttemptState, Shard};
use super::status::{ShardState, Verdict};
use super::view::{View, World};

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
        let view = View { state: &self.state, live: &self.live, now: self.now };
        let Some(run) = self.state.runs.get(&id.run) else { return (String::new(), Vec::new()) };
        let request = Request::of(&self.state, run, id.index, shard);
        let devices = self.rate_all(id, shard, &request);
        let wants = need_in_words(view, &request);
        if let Some(sentence) = self.waits_for_others(id) {
            return (sentence, devices);
        }
        if devices.is_empty() {
            let sentence = format!(
                "waits: {wants}; no worker has connected yet: make a token with `bonepile token create`, then \
                 `bonepile-worker join` on a box"
            );
            return (sentence, devices);
        }
        let mut sentence = if !Round::could_place(view, &request, World::Someday) {
            format!("cannot run as things are: {wants}; {}; {}", qualifying(&devices), change(&request, &devices))
        } else if shard.not_before > self.now {
            let seconds = shard.not_before.since_ms(self.now).div_ceil(1000);
            format!("waits: tries again in {seconds} s, after a pause because it just failed")
        } else if let Some(better) = Round::awaited(view, &request) {
            format!("waits for {better}, where it is expected to end earlier than on what is free now")
        } else if Round::could_place(view, &request, World::Now) {
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

impl Scheduler {
    /// Every device's reason for a shard, in the order of [`protocol::ids::DeviceRef`].
    fn rate_all(&self, id: ShardId, shard: &Shard, request: &Request) -> Vec<Rated> {
        let view = View { state: &self.state, live: &self.live, now: self.now };
        let failed = failures(id, shard);
        // The largest seat has it hardest.
        let Some(seat) = request.seats.iter().max_by_key(|seat| view.need_bytes(request, seat)) else {
            return Vec::new();
        };
        let rated = |row: &super::board::Row| {
            let reason = view.rate(row, request, seat, World::Now);
            let here = || {
                let at_device = failed.get(&Place::Device(row.device.clone()));
                at_device.or_else(|| failed.get(&Place::Worker(row.device.worker))).copied()
            };
            let reason = match reason {
                Reason::Fits { .. } => here().map_or(reason, |attempt| Reason::FailedHere { attempt }),
                other => other,
            };
            Rated { device: row.device.clone(), reason }
        };
        let mut devices: Vec<_> = self.live.board.rows().map(|(_, row)| rated(row)).collect();
        devices.sort_by(|a, b| a.device.cmp(&b.device));
        devices
    }

    /// Why a shard is not even asked for a device: its experiment's turn has not come, or its run has enough running.
    fn waits_for_others(&self, id: ShardId) -> Option<String> {
        let run = self.state.runs.get(&id.run)?;
        let group = run.group_of(id.index)?;
        let pending =
            group.after.iter().find(|earlier| run.uncommitted.get(**earlier as usize).is_some_and(|left| *left > 0));
        if let Some(earlier) = pending {
            let (name, left) = (&run.groups[*earlier as usize].name, run.uncommitted[*earlier as usize]);
            let open = run.open_trainings(*earlier);
            let of = match open {
                0 => format!("{left} shards have not committed"),
                1 => "a training has not ended".to_owned(),
                open => format!("{open} trainings have not ended"),
            };
            return Some(format!("waits for experiment `{name}`, of which {of}"));
        }
        let capped = run.running_max > 0 && run.running.len() >= run.running_max as usize;
        capped.then(|| format!("waits: its run may have {} shards running (running_max), and has", run.running_max))
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
    let Some((_, failure, _)) = shard.last_failure() else {
        return "failed: an experiment that it waits for has failed; `bonepile retry` tries both again".to_owned();
    };
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

fn need_in_words(view: View<'_>, request: &Request) -> String {
    let places = match (request.seats.len(), request.spread) {
        (0 | 1, _) => "a device".to_owned(),
        (seats, Spread::Any) => format!("devices for {seats} seats at once"),
        (seats, Spread::Devices) => format!("{seats} devices at once"),
        (seats, Spread::Workers) => format!("{seats} workers at once"),
    };
    let each = if request.is_gang() { " each" } else { "" };
    let bytes = request.seats.iter().map(|seat| view.need_bytes(request, seat)).max().unwrap_or(0);
    let mut models: Vec<&str> = request.models.iter().flatten().map(String::as_str).collect();
    models.sort_unstable();
    models.dedup();
    let with = if models.is_empty() { String::new() } else { format!(" with {}", models.join(" and ")) };
    format!("needs {}{each} on {places}{with}", Bytes(bytes))
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
fn change(request: &Request, devices: &[Rated]) -> String {
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
            Reason::CommandsForbidden => {
                ways.insert("let a worker run commands (`bonepile-worker run --allow-commands`)".to_owned())
            }
            Reason::LabelAbsent { label } => {
                ways.insert(format!("give a worker the label {label} (`--label {label}`)"))
            }
            Reason::PriceHigh { price_microusd_per_hour, .. } => {
                ways.insert(format!("pay {} an hour", super::reason::Dollars(*price_microusd_per_hour)))
            }
            Reason::NoKernel | Reason::Unusable { .. } => {
                ways.insert("install an executor build for the card (`make build CUDA=…`)".to_owned())
            }
            _ => continue,
        };
    }
    let apart = request.spread == Spread::Workers && request.is_gang();
    ways.insert(if apart { "join another worker" } else { "join a worker that has model and memory" }.to_owned());
    if request.spread != Spread::Any && request.is_gang() {
        ways.insert(format!(
            "submit with spread = \"{}\"",
            if request.spread == Spread::Workers { "devices" } else { "any" }
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
