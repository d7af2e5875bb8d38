//! What a heap would have done with a trace: the scheduler under a policy, with what it knows at the start, against the bound.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use protocol::control::{Heartbeat, Hello, StartSeat, Terms};
use protocol::experiment::{CommandSpec, ShardSpec};
use protocol::hardware::{Device, DeviceKind, Speed, Telemetry};
use protocol::ids::{DeviceId, RunId, ShardId, WorkerId};
use protocol::time::UnixMillis;
use serde::Serialize;

use super::bound;
use super::engine::{Engine, Truth};
use crate::scheduler::input::Connected;
use crate::scheduler::view::REFERENCE_MFLOPS;
use crate::scheduler::{Answer, Input, NewRun, Policy, Scheduler, Settings};

/// Measured throughputs: units of work a second, by class and device model.
pub type Throughputs = BTreeMap<String, BTreeMap<String, f64>>;

/// A job of a trace.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// Class, a row of the throughputs.
    pub class: String,
    /// Seconds that it takes on the reference model.
    pub reference_s: f64,
    /// When it comes, seconds.
    pub arrival_s: f64,
    /// Whose it is.
    pub account: String,
    /// Higher goes first.
    pub priority: i32,
    /// Memory that its owner declares, bytes.
    pub memory_bytes: u64,
    /// Memory that it really takes, bytes.
    pub peak_bytes: u64,
}

/// Devices of one model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kind {
    /// As in the throughputs.
    pub model: String,
    /// How many.
    pub count: u32,
    /// Memory of each, bytes.
    pub memory_bytes: u64,
}

/// What the scheduler knows of the throughputs when it starts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Knowledge {
    /// All of them.
    Known,
    /// All of them with a log-normal error of this standard deviation, drawn from the seed.
    Noisy(f64),
    /// One speed a device model, as a benchmark at join gives it; the rest is learned from what finishes.
    Cold,
}

/// Everything about a replay but policy and knowledge.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// True throughputs.
    pub throughputs: Throughputs,
    /// The model in whose seconds work is counted.
    pub reference: String,
    /// The heap.
    pub kinds: Vec<Kind>,
    /// The jobs.
    pub jobs: Vec<Job>,
}

/// What came of a replay. Times are seconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// From the first arrival to the last end.
    pub makespan_s: f64,
    /// Mean time from arrival to end.
    pub completion_mean_s: f64,
    /// The 95th of a hundred.
    pub completion_p95_s: f64,
    /// Share of time for which the devices of each model worked, 0 to 1.
    pub utilisation: BTreeMap<String, f64>,
    /// What no schedule can beat; for jobs that come later it is the bound of all at once.
    pub bound_s: f64,
    /// Jobs that ended.
    pub finished: usize,
    /// Starts that found too little memory.
    pub overcommits: u32,
}

impl Scenario {
    /// Seconds of a job on a device model; `None` if the throughputs do not have it or say that it cannot run there.
    pub fn seconds(&self, job: &Job, model: &str) -> Option<f64> {
        let row = self.throughputs.get(&job.class)?;
        let (here, reference) = (*row.get(model)?, *row.get(&self.reference)?);
        (here > 0.0 && reference > 0.0).then(|| job.reference_s * reference / here)
    }

    /// Geometric mean over classes of a model's speed against the reference: the one number that a benchmark at join gives.
    pub fn speed(&self, model: &str) -> f64 {
        let ratio = |row: &BTreeMap<String, f64>| Some(*row.get(model)? / *row.get(&self.reference)?);
        let logs: Vec<f64> =
            self.throughputs.values().filter_map(ratio).filter(|ratio| *ratio > 0.0).map(f64::ln).collect();
        if logs.is_empty() { 1.0 } else { (logs.iter().sum::<f64>() / logs.len() as f64).exp() }
    }

    /// The bound of all jobs at once, seconds.
    pub fn bound_s(&self) -> f64 {
        let fits = |job: &Job, kind: &Kind| job.memory_bytes <= kind.memory_bytes;
        let time = |job: &Job, kind: &Kind| {
            let seconds = self.seconds(job, &kind.model).filter(|_| fits(job, kind));
            seconds.map_or(f64::INFINITY, |seconds| seconds * 1000.0)
        };
        let times: Vec<Vec<f64>> =
            self.jobs.iter().map(|job| self.kinds.iter().map(|kind| time(job, kind)).collect()).collect();
        let counts: Vec<u32> = self.kinds.iter().map(|kind| kind.count).collect();
        bound::makespan_ms(&times, &counts) / 1000.0
    }

    /// Replays the trace.
    pub fn replay(&self, policy: Policy, knowledge: Knowledge, seed: u64) -> Outcome {
        let mut job_of: BTreeMap<ShardId, usize> = BTreeMap::new();
        let mut arrivals: BTreeMap<u64, BTreeMap<(String, i32), Vec<usize>>> = BTreeMap::new();
        for (index, job) in self.jobs.iter().enumerate() {
            let key = (job.account.clone(), job.priority);
            arrivals.entry(millis(job.arrival_s)).or_default().entry(key).or_default().push(index);
        }
        // Runs are numbered as they are submitted.
        let mut run = 0;
        for indices in arrivals.values().flat_map(BTreeMap::values) {
            run += 1;
            for (index, job) in (0u32..).zip(indices) {
                job_of.insert(ShardId { run: RunId(run), index }, *job);
            }
        }
        let truth = |start: &StartSeat, model: &str| {
            let job = &self.jobs[job_of[&start.attempt.shard]];
            let wall_ms = millis(self.seconds(job, model).unwrap_or(f64::from(u32::MAX)));
            Truth { wall_ms, peak_bytes: job.peak_bytes }
        };
        let mut engine = Engine::new(self.cluster(policy), truth);
        self.introduce(&mut engine);
        self.teach(&mut engine, knowledge, seed);
        let start = engine.now;
        for (at_ms, runs) in arrivals {
            let at = start.plus_ms(at_ms);
            engine.run(at);
            engine.now = engine.now.max(at);
            for ((account, priority), indices) in runs {
                let specs = indices.iter().map(|index| self.spec(&self.jobs[*index])).collect();
                let new = NewRun { name: "trace".to_owned(), account, priority, specs, ..NewRun::default() };
                let accepted = engine.give(Input::Submit(new));
                debug_assert!(matches!(accepted, Ok(Answer::Run(_))), "{accepted:?}");
            }
        }
        engine.run(UnixMillis(u64::MAX));
        self.outcome(&engine, start, &job_of)
    }

    fn outcome(&self, engine: &Engine<'_>, start: UnixMillis, job_of: &BTreeMap<ShardId, usize>) -> Outcome {
        let done: Vec<_> = engine.spans.iter().filter(|span| span.failure.is_none()).collect();
        let end = done.iter().map(|span| span.ended_at).max().unwrap_or(start);
        let mut completions: Vec<f64> = done
            .iter()
            .map(|span| seconds(span.ended_at.since_ms(start)) - self.jobs[job_of[&span.attempt.shard]].arrival_s)
            .collect();
        completions.sort_by(f64::total_cmp);
        let makespan_s = seconds(end.since_ms(start));
        let mut utilisation = BTreeMap::new();
        for kind in &self.kinds {
            let of_kind = |device: &str| device.rsplit_once('-').is_some_and(|(model, _)| model == kind.model);
            let busy: u64 = engine
                .spans
                .iter()
                .filter(|span| of_kind(&span.device.device.0))
                .map(|span| span.ended_at.since_ms(span.started_at))
                .sum();
            let share = seconds(busy) / (makespan_s * f64::from(kind.count)).max(f64::MIN_POSITIVE);
            utilisation.insert(kind.model.clone(), share);
        }
        Outcome {
            makespan_s,
            completion_mean_s: completions.iter().sum::<f64>() / completions.len().max(1) as f64,
            completion_p95_s: completions.get(completions.len() * 95 / 100).copied().unwrap_or(0.0),
            utilisation,
            bound_s: self.bound_s(),
            finished: done.len(),
            overcommits: engine.overcommits,
        }
    }

    fn cluster(&self, policy: Policy) -> Scheduler {
        let mut scheduler = Scheduler::new();
        scheduler.start(UnixMillis(1_000_000));
        let settings = Settings { policy, attempts_max: 100, ..Settings::default() };
        scheduler.handle(UnixMillis(1_000_000), Input::Configure(settings)).expect("settings are never refused");
        let _ = scheduler.take_events();
        scheduler
    }

    /// Every device as a box of its own, in the order of the kinds.
    fn introduce(&self, engine: &mut Engine<'_>) {
        let devices = self.kinds.iter().flat_map(|kind| (0..kind.count).map(move |number| (kind, number)));
        for (index, (kind, number)) in (1u32..).zip(devices) {
            let mut key = [0; 32];
            key[..4].copy_from_slice(&index.to_le_bytes());
            let id = DeviceId(format!("{}-{number}", kind.model));
            let mflops = self.speed(&kind.model) * REFERENCE_MFLOPS as f64;
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a speed is positive and small"
            )]
            let speed = Speed { f32_mflops: mflops as u64, memory_bytes_per_second: 0 };
            let device = Device {
                id: id.clone(),
                kind: DeviceKind::Cuda,
                model: kind.model.clone(),
                compute_capability: None,
                memory_total_bytes: kind.memory_bytes,
                memory_budget_bytes: kind.memory_bytes,
                threads: 1,
                unusable: None,
                speed: Some(speed),
            };
            introduce(engine, WorkerId(u64::from(index)), key, device, &[]);
        }
    }

    fn teach(&self, engine: &mut Engine<'_>, knowledge: Knowledge, seed: u64) {
        let mut noise = Noise(seed);
        let mut rows = Vec::new();
        for (class, row) in &self.throughputs {
            for kind in &self.kinds {
                let (Some(here), Some(reference)) = (row.get(&kind.model), row.get(&self.reference)) else { continue };
                let error = match knowledge {
                    Knowledge::Known => 1.0,
                    Knowledge::Noisy(sigma) => (sigma * noise.normal()).exp(),
                    Knowledge::Cold => continue,
                };
                let unit_us = millis(reference / here * error * 1000.0);
                rows.push((format!("command/{class}"), kind.model.clone(), unit_us, 1));
            }
        }
        if !rows.is_empty() {
            engine.give(Input::TeachThroughput(rows)).expect("teaching is never refused");
        }
    }

    fn spec(&self, job: &Job) -> ShardSpec {
        ShardSpec::Command(Box::new(CommandSpec {
            argv: vec![job.class.clone()],
            env: Vec::new(),
            files: Vec::new(),
            memory_bytes: job.memory_bytes,
            threads: 1,
            collect: Vec::new(),
            timeout_ms: 0,
            retries: 0,
            class: job.class.clone(),
            work: u32::try_from(millis(job.reference_s / 1000.0)).unwrap_or(u32::MAX).max(1),
        }))
    }
}

/// A box that joins, greets and says that all its memory is free and its card busy enough with one shard.
pub(super) fn introduce(engine: &mut Engine<'_>, worker: WorkerId, key: [u8; 32], device: Device, models: &[String]) {
    let hostname = device.id.0.clone();
    let token = engine.give(Input::CreateToken { secret_hash: key, ttl_ms: 1, uses: 1 });
    let Ok(Answer::Token(token)) = token else { return };
    let redeemed = engine.give(Input::RedeemToken { token, spki_sha256: key, hostname: hostname.clone() });
    debug_assert_eq!(redeemed, Ok(Answer::Worker(worker)));
    let telemetry = Telemetry {
        device: device.id.clone(),
        memory_free_bytes: device.memory_budget_bytes,
        memory_ours_bytes: 0,
        utilisation_percent: Some(100),
        temperature_celsius: None,
        power_milliwatts: None,
        sick: None,
    };
    let hello = Hello {
        build: String::new(),
        hostname,
        epoch: engine.now,
        devices: vec![device],
        models: models.to_vec(),
        held: Vec::new(),
        peer_port: 0,
        addresses: Vec::new(),
        terms: Terms { commands: true, ..Terms::default() },
        shapes: Vec::new(),
    };
    let observed = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let connected = Connected { worker, session: 1, spki_sha256: key, hello, observed };
    let greeted = engine.give(Input::Connected(Box::new(connected)));
    debug_assert!(greeted.is_ok(), "{greeted:?}");
    let heartbeat = Heartbeat { sequence: 1, telemetry: vec![telemetry], held: Vec::new() };
    let _ = engine.give(Input::Heartbeat { worker, session: 1, heartbeat });
}

/// Draws that a seed fixes (SplitMix64).
#[derive(Debug, Clone)]
pub struct Noise(pub u64);

impl Noise {
    /// A whole number.
    pub fn whole(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Evenly from 0 to 1.
    pub fn unit(&mut self) -> f64 {
        (self.whole() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// From a normal distribution with mean 0 and standard deviation 1.
    pub fn normal(&mut self) -> f64 {
        let (radius, angle) = (self.unit().max(f64::MIN_POSITIVE), self.unit());
        (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
    }
}

/// Seconds as milliseconds, rounded.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates; times are not negative")]
fn millis(seconds: f64) -> u64 {
    (seconds * 1000.0).round() as u64
}

fn seconds(ms: u64) -> f64 {
    ms as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const GB: u64 = 1_000_000_000;

    fn scenario() -> Scenario {
        let row = |old: f64, new: f64| [("old".to_owned(), old), ("new".to_owned(), new)].into();
        let job = |class: &str, arrival_s| Job {
            class: class.to_owned(),
            reference_s: 600.0,
            arrival_s,
            account: String::new(),
            priority: 0,
            memory_bytes: GB,
            peak_bytes: GB,
        };
        Scenario {
            throughputs: [("a".to_owned(), row(1.0, 10.0)), ("b".to_owned(), row(1.0, 1.0))].into(),
            reference: "old".to_owned(),
            kinds: ["old", "new"].map(|model| Kind { model: model.to_owned(), count: 1, memory_bytes: GB }).into(),
            jobs: (0..10).map(|index| job(if index % 2 == 0 { "a" } else { "b" }, f64::from(index))).collect(),
        }
    }

    #[test]
    fn every_job_ends_under_every_policy_and_none_beats_the_bound() {
        let scenario = scenario();
        for policy in Policy::ALL {
            for knowledge in [Knowledge::Known, Knowledge::Noisy(0.4), Knowledge::Cold] {
                let outcome = scenario.replay(policy, knowledge, 1);
                assert_eq!((outcome.finished, outcome.overcommits), (10, 0), "{policy} {knowledge:?}");
                assert!(outcome.makespan_s >= outcome.bound_s - 10.0, "{policy} {outcome:?}");
                assert_eq!(outcome, scenario.replay(policy, knowledge, 1), "a seed gives the same replay");
            }
        }
    }

    #[test]
    fn a_known_table_sends_each_class_where_it_is_fast() {
        let scenario = scenario();
        let known = scenario.replay(Policy::EarliestFinish, Knowledge::Known, 1);
        let first = scenario.replay(Policy::FirstIdle, Knowledge::Known, 1);
        assert!(known.makespan_s < first.makespan_s, "{known:?} {first:?}");
    }
}
