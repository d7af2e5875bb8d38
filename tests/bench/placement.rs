//! `make bench-placement`: what a throughput table is worth for placement, on a published table of measured throughputs.
//!
//! Recipe: 26 single-GPU job classes of Gavel's table (`tests/data/gavel`), 150 jobs at once, each of a class drawn evenly and
//! of a length drawn log-uniformly from 0.1 to 3 hours on a P100, 20 seeds, three mixes of K80, P100 and V100. Ratios are
//! makespan (and mean completion) of first-idle over the policy, mean over seeds; above 1 is better than first-idle.

#![expect(clippy::print_stdout, reason = "a benchmark speaks on stdout")]

use coordinator::forecast::replay::{Job, Kind, Knowledge, Noise, Outcome, Scenario, Throughputs};
use coordinator::scheduler::Policy;

const SEEDS: u64 = 20;
const JOBS: usize = 150;
const MIXES: [[u32; 3]; 3] = [[4, 4, 4], [6, 2, 1], [1, 2, 6]];
const MODELS: [&str; 3] = ["k80", "p100", "v100"];
const GB: u64 = 1_000_000_000;

struct Contender {
    name: &'static str,
    policy: Policy,
    knowledge: Knowledge,
}

const CONTENDERS: [Contender; 5] = [
    Contender { name: "fastest-idle", policy: Policy::FastestIdle, knowledge: Knowledge::Cold },
    Contender { name: "speed-factor", policy: Policy::SpeedFactor, knowledge: Knowledge::Cold },
    Contender { name: "table-known", policy: Policy::EarliestFinish, knowledge: Knowledge::Known },
    Contender { name: "table-noisy-0.4", policy: Policy::EarliestFinish, knowledge: Knowledge::Noisy(0.4) },
    Contender { name: "table-cold", policy: Policy::EarliestFinish, knowledge: Knowledge::Cold },
];

fn main() {
    let throughputs = throughputs();
    assert_eq!(throughputs.len(), 26, "the table has the recipe's classes");
    let mut bars = Vec::new();
    println!(
        "{:10} {:16} {:>9} {:>11} {:>9} {:>12} {:>12}",
        "mix", "policy", "makespan", "completion", "of bound", "worst seed", "best seed"
    );
    for mix in MIXES {
        let name = mix.map(|count| count.to_string()).join(":");
        let scenarios: Vec<Scenario> = (0..SEEDS).map(|seed| scenario(&throughputs, mix, seed)).collect();
        let run = |policy, knowledge| -> Vec<Outcome> {
            scenarios.iter().zip(0..).map(|(scenario, seed)| scenario.replay(policy, knowledge, seed)).collect()
        };
        let first_idle = run(Policy::FirstIdle, Knowledge::Cold);
        let bound = mean(first_idle.iter().map(|outcome| outcome.makespan_s / outcome.bound_s));
        println!("{name:10} {:16} {:>8.3}x {:>10.3}x {bound:>8.3}x", "first-idle", 1.0, 1.0);
        for contender in &CONTENDERS {
            let outcomes = run(contender.policy, contender.knowledge);
            assert!(outcomes.iter().all(|outcome| outcome.finished == JOBS), "every job ends");
            let ratios: Vec<f64> = first_idle.iter().zip(&outcomes).map(|(a, b)| a.makespan_s / b.makespan_s).collect();
            let completion =
                mean(first_idle.iter().zip(&outcomes).map(|(a, b)| a.completion_mean_s / b.completion_mean_s));
            let bound = mean(outcomes.iter().map(|outcome| outcome.makespan_s / outcome.bound_s));
            let makespan = mean(ratios.iter().copied());
            let by_ratio = |a: &(usize, &f64), b: &(usize, &f64)| a.1.total_cmp(b.1);
            let worst = ratios.iter().enumerate().min_by(by_ratio).map_or((0, 0.0), |(seed, ratio)| (seed, *ratio));
            let best = ratios.iter().enumerate().max_by(by_ratio).map_or((0, 0.0), |(seed, ratio)| (seed, *ratio));
            println!(
                "{name:10} {:16} {makespan:>8.3}x {completion:>10.3}x {bound:>8.3}x {:>6.2}x (#{}) {:>6.2}x (#{})",
                contender.name, worst.1, worst.0, best.1, best.0
            );
            bars.push((name.clone(), contender.name, makespan));
        }
    }
    memory();
    println!();
    let value = |mix: &str, contender: &str| {
        bars.iter().find(|(known, name, _)| known == mix && *name == contender).map_or(0.0, |bar| bar.2)
    };
    for (mix, known, cold) in [("4:4:4", 1.65, 1.45), ("6:2:1", 1.50, 1.36), ("1:2:6", 1.52, 1.36)] {
        println!("bar table-known-{mix} {:.3} >= {known}", value(mix, "table-known"));
        println!("bar table-cold-{mix} {:.3} >= {cold}", value(mix, "table-cold"));
        let factor = value(mix, "speed-factor");
        println!("bar table-cold-over-speed-factor-{mix} {:.3} >= 1.0", value(mix, "table-cold") / factor);
        println!("bar table-noisy-over-speed-factor-{mix} {:.3} >= 1.0", value(mix, "table-noisy-0.4") / factor);
    }
}

fn throughputs() -> Throughputs {
    let text = include_str!("../data/gavel/throughputs.json");
    coordinator::forecast::formats::throughputs("throughputs.json", text).expect("the committed table reads")
}

fn scenario(throughputs: &Throughputs, mix: [u32; 3], seed: u64) -> Scenario {
    let mut draw = Noise(seed.wrapping_mul(7919).wrapping_add(1));
    let classes: Vec<&String> = throughputs.keys().collect();
    let jobs = (0..JOBS).map(|_| {
        let class = classes[usize::try_from(draw.whole() % classes.len() as u64).unwrap_or(0)].clone();
        let hours = (0.1f64.ln() + draw.unit() * (3.0f64.ln() - 0.1f64.ln())).exp();
        job(class, hours * 3600.0, GB, GB)
    });
    let kinds =
        MODELS.iter().zip(mix).map(|(model, count)| Kind { model: (*model).to_owned(), count, memory_bytes: GB });
    Scenario {
        throughputs: throughputs.clone(),
        reference: "p100".to_owned(),
        jobs: jobs.collect(),
        kinds: kinds.collect(),
    }
}

fn job(class: String, reference_s: f64, memory_bytes: u64, peak_bytes: u64) -> Job {
    Job { class, reference_s, arrival_s: 0.0, account: String::new(), priority: 0, memory_bytes, peak_bytes }
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0u32), |(sum, count), value| (sum + value, count + 1));
    sum / f64::from(count.max(1))
}

/// The same for memory: jobs of 1 to 20 GB on cards of 6, 8 and 24 GB, placed by bytes, and by fractions of a card as
/// schedulers that count GPUs are used (`num_gpus=0.25`): the fraction is of a 24 GB card, where it was tried out.
fn memory() {
    println!();
    println!(
        "memory: 150 jobs of 1 to 20 GB (log-uniform) on 4 cards of 6 GB, 4 of 8 GB and 2 of 24 GB, {SEEDS} seeds"
    );
    let (mut bytes, mut fractions) = ((0, 0, 0.0), (0, 0, 0.0));
    for seed in 0..SEEDS {
        let by_bytes = memory_scenario(seed, false).replay(Policy::EarliestFinish, Knowledge::Cold, seed);
        let by_fraction = memory_scenario(seed, true).replay(Policy::FirstIdle, Knowledge::Cold, seed);
        for (sum, outcome) in [(&mut bytes, by_bytes), (&mut fractions, by_fraction)] {
            sum.0 += outcome.overcommits;
            sum.1 += outcome.finished;
            sum.2 += outcome.makespan_s / SEEDS as f64;
        }
    }
    println!("  by bytes:     {} starts out of memory, {} jobs done, makespan {:.0} s", bytes.0, bytes.1, bytes.2);
    println!(
        "  by fractions: {} starts out of memory, {} jobs done, makespan {:.0} s",
        fractions.0, fractions.1, fractions.2
    );
    println!("bar memory-overcommits {} <= 0", bytes.0);
    println!("bar memory-requeues-less-than-fractions {} >= 1", u8::from(bytes.0 < fractions.0));
}

fn memory_scenario(seed: u64, fractions: bool) -> Scenario {
    let mut draw = Noise(seed + 1000);
    let models = [("6gb", 4, 6 * GB, 1.0), ("8gb", 4, 8 * GB, 1.5), ("24gb", 2, 24 * GB, 4.0)];
    let row = models.iter().map(|(model, _, _, speed)| ((*model).to_owned(), *speed)).collect();
    let kinds = models.iter().map(|(model, count, memory, _)| Kind {
        model: (*model).to_owned(),
        count: *count,
        memory_bytes: *memory,
    });
    let jobs = (0..JOBS).map(|_| {
        let gigabytes = (draw.unit() * 20.0f64.ln()).exp();
        let seconds = (60.0f64.ln() + draw.unit() * 60.0f64.ln()).exp();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "1 to 20 GB")]
        let peak = (gigabytes * 1e9) as u64;
        // A fraction of a card is the same fraction of every card: on the smallest it must still be one.
        let declared = if fractions { peak / 4 } else { peak };
        job("job".to_owned(), seconds, declared, peak)
    });
    let jobs = jobs.collect();
    let throughputs = [("job".to_owned(), row)].into();
    Scenario { throughputs, reference: "6gb".to_owned(), kinds: kinds.collect(), jobs }
}
