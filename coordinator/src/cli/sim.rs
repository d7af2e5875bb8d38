//! `bonepile sim`: the scheduler under simulated faults, seed by seed on every core; or one large cluster without faults.
//! Works without a coordinator.
//!
//! What is simulated and checked is [`crate::sim`]'s; here are threads, files and clocks.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::json;

use super::args::Sim;
use super::context::{Context, Outcome};
use super::exit;
use super::failure::Failure;
use super::output::Document;
use super::text::bytes;
use crate::sim::scale::{self, Measured, Size};
use crate::sim::{Failed, Tally, run_seed, traced};

/// Most that a decision may cost with the full queue, as a multiple of what it costs with a tenth of it.
const GROWTH_MAX: f64 = 1.6;
/// Placements over which the cost of one is measured.
const SAMPLE: usize = 20_000;

/// Runs the command.
///
/// # Errors
/// If a file or stdout cannot be written; what does not hold is no error, but exit code 1.
pub fn run(context: &mut Context, args: &Sim) -> Outcome {
    match (args.seed, args.shards) {
        (Some(seed), _) => one_seed(context, args, seed),
        (None, Some(shards)) => large(context, args, shards),
        (None, None) => many_seeds(context, args),
    }
}

fn one_seed(context: &mut Context, args: &Sim, seed: u64) -> Outcome {
    if args.trace {
        let (lines, verdict) = traced(seed, args.sabotage);
        let held = verdict.is_ok();
        let last = verdict.map_or_else(|broken| format!("invariant {broken}"), |tally| summary(&tally, Duration::ZERO));
        let text = format!("{}\n{last}\n", lines.join("\n"));
        context.show(&Document::new(&json!({ "seed": seed, "held": held, "trace": lines }), text))?;
        return Ok(if held { exit::OK } else { exit::FAILED });
    }
    let began = Instant::now();
    let verdict = run_seed(seed, args.sabotage);
    report(context, args, verdict, began.elapsed())
}

fn many_seeds(context: &mut Context, args: &Sim) -> Outcome {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let jobs = args.jobs.unwrap_or(cores).max(1);
    let (next, stop) = (AtomicU64::new(args.from), AtomicBool::new(false));
    let end = args.from.saturating_add(args.seeds);
    let (send, receive) = mpsc::channel();
    let began = Instant::now();
    let verdict = std::thread::scope(|scope| {
        for _ in 0..jobs {
            let (send, next, stop) = (send.clone(), &next, &stop);
            scope.spawn(move || {
                let mut sum = Tally::default();
                while !stop.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        break;
                    }
                    match run_seed(seed, args.sabotage) {
                        Ok(tally) => sum.add(&tally),
                        Err(failed) => {
                            stop.store(true, Ordering::Relaxed);
                            let _ = send.send(Err(failed));
                        }
                    }
                }
                let _ = send.send(Ok(sum));
            });
        }
        drop(send);
        collected(receive)
    });
    report(context, args, verdict, began.elapsed())
}

/// The sum of what held, or the failure with the smallest seed.
fn collected(receive: mpsc::Receiver<Result<Tally, Box<Failed>>>) -> Result<Tally, Box<Failed>> {
    let mut sum = Tally::default();
    let mut failures: Vec<Box<Failed>> = Vec::new();
    for verdict in receive {
        match verdict {
            Ok(tally) => sum.add(&tally),
            Err(failed) => failures.push(failed),
        }
    }
    failures.into_iter().min_by_key(|failed| failed.seed).map_or(Ok(sum), Err)
}

fn report(context: &mut Context, args: &Sim, verdict: Result<Tally, Box<Failed>>, wall: Duration) -> Outcome {
    match verdict {
        Ok(tally) => {
            let data = json!({
                "held": true, "seeds": tally.seeds, "steps": tally.steps, "inputs": tally.inputs,
                "events": tally.events, "faults": tally.faults, "restarts": tally.restarts,
                "shards": tally.shards, "virtual_ms": tally.virtual_ms,
                "wall_ms": u64::try_from(wall.as_millis()).unwrap_or(u64::MAX),
            });
            context.show(&Document::new(&data, format!("{}\n", summary(&tally, wall))))?;
            Ok(exit::OK)
        }
        Err(failed) => {
            if let Some(path) = &args.keep {
                keep(path, &failed)?;
            }
            let data = json!({
                "held": false, "seed": failed.seed, "invariant": failed.violation.name,
                "detail": failed.violation.detail, "parameters": failed.scenario, "trace": failed.trace,
                "command": failed.command(),
            });
            context.show(&Document::new(&data, format!("{failed}\n")))?;
            Ok(exit::FAILED)
        }
    }
}

/// Appends a failing seed to the kept ones.
fn keep(path: &Path, failed: &Failed) -> Result<(), Failure> {
    let wrong = |error| Failure::file("append to", path, &error);
    let mut file = OpenOptions::new().create(true).append(true).open(path).map_err(wrong)?;
    writeln!(file, "{} # {}", failed.seed, failed.violation.name).map_err(wrong)
}

fn summary(tally: &Tally, wall: Duration) -> String {
    let list = |counts: &BTreeMap<&'static str, u64>| {
        counts.iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
    };
    let mut text = String::new();
    let hours = tally.virtual_ms / 3_600_000;
    let lines = [
        format!("seeds      {}, every invariant held", tally.seeds),
        format!("steps      {} ({} inputs of the scheduler), {hours} h of virtual time", tally.steps, tally.inputs),
        format!("events     {}: {}", tally.events_total(), list(&tally.events)),
        format!("faults     {}", list(&tally.faults)),
        format!(
            "wires      {} messages twice, {} outcomes once more and late; {} kills of the coordinator",
            tally.duplicates, tally.late, tally.restarts
        ),
        format!("shards     {}, {} committed", tally.shards, tally.events_of("ShardCommitted")),
    ];
    for line in lines {
        writeln!(text, "{line}").expect("writing to a String cannot fail");
    }
    write!(text, "wall       {:.1} s", wall.as_secs_f64()).expect("writing to a String cannot fail");
    text
}

/// The cost of a decision with a hundredth, a tenth and all of the queue; then all of it to the end.
fn large(context: &mut Context, args: &Sim, shards: usize) -> Outcome {
    let busy_max = Duration::from_secs(args.seconds);
    let mut samples = Vec::new();
    for part in [100, 10, 1] {
        // At least this many shards wait while it is measured.
        let queued = (shards / part).max(1);
        let sample = SAMPLE.min(queued).max(1);
        let size = Size { shards: queued, devices: args.devices, placements: Some(sample), busy_max };
        let measured = scale::run(size, &computed);
        context.output.note(&sample_line(queued, &measured));
        samples.push((queued, measured));
    }
    let whole = scale::run(Size { shards, devices: args.devices, placements: None, busy_max }, &computed);
    let growth = samples[2].1.decision_ns() as f64 / samples[1].1.decision_ns().max(1) as f64;
    let peak_bytes = peak_resident_bytes();
    let mut text: String = samples.iter().map(|(queued, sample)| sample_line(*queued, sample) + "\n").collect();
    let cut =
        if whole.cut_short { format!(", cut short after {} s in the scheduler", args.seconds) } else { String::new() };
    let lines = [
        format!("cluster    {} devices of {} workers, {} shards{cut}", whole.devices, whole.workers, whole.shards),
        format!(
            "decisions  {} in {:.1} s inside the scheduler ({} inputs, {:.0} s of virtual time), {} committed",
            whole.placements,
            whole.busy.as_secs_f64(),
            whole.inputs,
            whole.virtual_ms as f64 / 1000.0,
            whole.commits
        ),
        format!("bench scale-decisions-per-second {}", whole.decisions_per_second()),
        format!("bench scale-peak-resident-bytes {peak_bytes} ({})", bytes(peak_bytes)),
        format!("bar decision-cost-growth {growth:.2} <= {GROWTH_MAX}"),
    ];
    for line in lines {
        writeln!(text, "{line}").expect("writing to a String cannot fail");
    }
    let data = json!({
        "shards": whole.shards, "devices": whole.devices, "placements": whole.placements, "commits": whole.commits,
        "decisions_per_second": whole.decisions_per_second(), "peak_resident_bytes": peak_bytes,
        "cut_short": whole.cut_short, "decision_cost_growth": growth,
        "samples": samples.iter().map(|(queued, at)| json!({ "queued": queued, "decision_ns": at.decision_ns() })).collect::<Vec<_>>(),
    });
    context.show(&Document::new(&data, text))?;
    let done = !whole.cut_short && whole.commits == whole.shards as u64;
    Ok(if done { exit::OK } else { exit::FAILED })
}

fn sample_line(queued: usize, measured: &Measured) -> String {
    let cut = if measured.cut_short { ", cut short" } else { "" };
    format!(
        "bench decision-us-at-{queued} {:.2} (over {} placements, {:.2} a sign of life{cut})",
        measured.decision_ns() as f64 / 1000.0,
        measured.steady_placements,
        measured.beat_ns() as f64 / 1000.0,
    )
}

/// Time that this thread has computed: others on the machine do not count.
fn computed() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// The most memory that this process ever had, bytes; 0 if the kernel does not say.
fn peak_resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.map_or(0, |kib| kib * 1024)
}
