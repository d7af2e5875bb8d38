//! The simulator's tests: kept seeds and fresh ones hold, sabotage is caught by name, a seed repeats, the source stays pure.

use std::path::Path;
use std::time::Duration;

use protocol::hardware::DeviceKind;
use protocol::ids::DeviceId;

use super::make::{self, SMALL_MODEL};
use super::run::{Tally, run_seed, traced};
use super::sabotage::Sabotage;
use super::scale::{self, Size};
use super::scenario::{BoxPlan, DevicePlan, GB, RunPlan, Scenario};
use super::truth::Truth;
use super::world::World;
use crate::scheduler::{RunState, ShardState};

/// Seeds of an ordinary test run beside the kept ones.
const FRESH_SEEDS: u64 = 200;
/// Seeds within which every sabotage must be caught.
const SABOTAGE_SEEDS: u64 = 300;

fn kept_seeds() -> Vec<u64> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/seeds/scheduler.txt");
    let text = std::fs::read_to_string(path).unwrap();
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    lines.filter(|line| !line.is_empty()).map(|line| line.parse().unwrap()).collect()
}

fn all_hold(seeds: impl Iterator<Item = u64>) -> Tally {
    let mut sum = Tally::default();
    for seed in seeds {
        match run_seed(seed, None) {
            Ok(tally) => sum.add(&tally),
            Err(failed) => panic!("{failed}"),
        }
    }
    sum
}

#[test]
fn kept_seeds_hold() {
    let seeds = kept_seeds();
    assert!(!seeds.is_empty());
    all_hold(seeds.into_iter());
}

#[test]
fn fresh_seeds_hold_and_reach_the_corners() {
    let tally = all_hold(1..=FRESH_SEEDS);
    let least = FRESH_SEEDS / 50;
    for kind in [
        "ShardCommitted",
        "AttemptFailed",
        "AttemptResumed",
        "SeatFreed",
        "ShardFailed",
        "ShardReopened",
        "RoundOpened",
        "TrainingEnded",
    ] {
        assert!(tally.events_of(kind) >= least, "{kind} is hardly ever reached: {tally:?}");
    }
    assert!(tally.faults.len() >= 14 && tally.faults.values().all(|count| *count >= least), "{tally:?}");
    assert!(tally.restarts >= least && tally.duplicates >= least && tally.late >= least, "{tally:?}");
}

#[test]
fn every_sabotage_is_caught_by_its_check() {
    for sabotage in Sabotage::ALL {
        let caught = (1..=SABOTAGE_SEEDS).find_map(|seed| run_seed(seed, Some(sabotage)).err());
        let failed = caught.unwrap_or_else(|| panic!("{sabotage:?} is never caught"));
        assert_eq!(failed.violation.name, sabotage.breaks(), "{failed}");
        assert!(failed.command().contains(&format!("--seed {}", failed.seed)));
        assert!(!failed.trace.is_empty());
    }
}

#[test]
fn a_seed_gives_the_same_history_each_time() {
    for seed in [3, 5, 8] {
        assert_eq!(traced(seed, None), traced(seed, None));
    }
}

/// A prediction: four shards of ten seconds each, one after another on one processor, in about forty seconds.
#[test]
fn a_quiet_cluster_takes_the_time_that_its_work_takes() {
    let cpu = DevicePlan {
        id: DeviceId("cpu".to_owned()),
        kind: DeviceKind::Cpu,
        model: "Old CPU".to_owned(),
        capability: 0,
        total_bytes: 8 * GB,
        budget_bytes: 4 * GB,
        speed: None,
    };
    let boxes = vec![BoxPlan { devices: vec![cpu], models: vec![SMALL_MODEL.to_owned()], terms: Default::default() }];
    let specs = (0..4).map(|seed| make::inspect(SMALL_MODEL, seed)).collect();
    let run = RunPlan {
        at_ms: 3_000,
        priority: 0,
        account: String::new(),
        running_max: 0,
        specs,
        trainings: Vec::new(),
        after_trainings: false,
    };
    let truth = Truth { otherwise_ms: 10_000, ..Truth::default() };
    let mut world = World::new(Scenario::quiet(1, boxes, vec![run], truth, 3_600_000), None);
    world.play().unwrap();
    assert!((38_000..48_000).contains(&world.now_ms()), "{} ms", world.now_ms());
    let run = world.state().runs.values().next().unwrap();
    assert_eq!((run.state, run.count(ShardState::Committed)), (RunState::Complete, 4));
}

#[test]
fn a_large_cluster_ends_its_work() {
    let size = Size { shards: 300, devices: 40, placements: None, busy_max: Duration::MAX };
    let measured = scale::run(size, &|| Duration::ZERO);
    assert_eq!((measured.commits, measured.placements, measured.workers), (300, 300, 5));
}

/// What would let the world in, or make two runs of a seed differ.
const BANNED: [&str; 10] = [
    "tokio",
    "HashMap",
    "HashSet",
    "SystemTime",
    "Instant::",
    "std::fs",
    "std::io",
    "std::env",
    "std::thread",
    "async fn",
];

#[test]
fn the_simulator_stays_pure() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/sim");
    let files = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let files: Vec<_> = files.filter(|path| !path.ends_with("tests.rs")).collect();
    assert!(files.len() > 10);
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        for (number, line) in (1..).zip(text.lines()) {
            let code = line.split("//").next().unwrap_or_default();
            for banned in BANNED {
                assert!(!code.contains(banned), "{}:{number} has `{banned}`", file.display());
            }
        }
    }
}
