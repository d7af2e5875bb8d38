//! `kill -9` in the middle of a run of real shards: the run ends complete, nothing finished runs again, no result twice.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::cluster::{Cluster, models_present, rows, sigkill};

/// Seven shards, four for one seat and three for two, each long enough to be killed in.
const SWEEP: &str = r#"
name = "kill-me"
seed = 7

[[experiment]]
kind = "inspect"
model = "smollm2-135m-instruct"
[experiment.matrix]
texts = [6, 7, 8, 9]

[[experiment]]
kind = "transfer"
model = "smollm2-135m-instruct"
facts = 6
facts_per_shard = 2
answer_tokens = 4
spread = "workers"
"#;

/// What must not change once a shard is committed: how often it was tried, and what it made.
type Finished = BTreeMap<String, (u64, Value)>;

fn shards(cluster: &Cluster, run: &str) -> Vec<Value> {
    rows(&cluster.json(&["runs", run, "--json"]), "shards").to_vec()
}

fn finished(shards: &[Value]) -> Finished {
    let committed = shards.iter().filter(|shard| shard["state"] == "committed");
    committed
        .map(|shard| {
            let attempts = shard["attempts"].as_u64().expect("a number of attempts");
            (shard["id"].as_str().expect("an id").to_owned(), (attempts, shard["outputs"].clone()))
        })
        .collect()
}

/// Waits until something is committed while something else runs on `worker` (any, if `None`).
fn mid_run(cluster: &Cluster, run: &str, worker: Option<&str>) -> Finished {
    cluster.wait("a shard done and another running", || {
        let shards = shards(cluster, run);
        let runs_there = |shard: &Value| {
            let seats = rows(shard, "seats");
            shard["state"] == "running"
                && seats.iter().any(|seat| {
                    seat["progress"]["done"].as_u64() > Some(0)
                        && seat["finished"] == false
                        && worker.is_none_or(|worker| seat["worker"] == worker)
                })
        };
        let done = finished(&shards);
        (!done.is_empty() && shards.iter().any(runs_there)).then_some(done)
    })
}

/// Waits for the end and checks that every shard is committed once, the early ones untouched, and the store sound.
fn ends_complete(cluster: &Cluster, run: &str, before: &Finished) -> Vec<Value> {
    let last = cluster.wait("the run to end", || {
        let detail = cluster.json(&["runs", run, "--json"]);
        (detail["summary"]["state"] != "running").then_some(detail)
    });
    let shards = rows(&last, "shards").to_vec();
    let after = finished(&shards);
    assert_eq!(after.len(), 7, "not every shard is committed: {last:#}\n{}", cluster.logs());
    for (shard, outcome) in before {
        assert_eq!(&after[shard], outcome, "{shard} was finished before and was run again");
    }
    let manifests = cluster.wait("every manifest", || {
        let directory = std::fs::read_dir(cluster.store().join("manifests").join(run)).ok()?;
        let names: BTreeSet<_> = directory.flatten().map(|entry| entry.file_name()).collect();
        (names.len() >= 7).then_some(names.len())
    });
    assert_eq!(manifests, 7, "a shard has two manifests");
    let fsck = cluster.bonepile(&["store", "fsck", "--json"]);
    assert!(fsck.status.success(), "{}", crate::cluster::both(&fsck));
    shards
}

#[test]
fn the_coordinator_is_killed() {
    if !models_present() {
        return;
    }
    let mut cluster = Cluster::with_workers(2);
    let run = cluster.submit(SWEEP);
    let before = mid_run(&cluster, &run, None);
    let running: Vec<_> = shards(&cluster, &run)
        .into_iter()
        .filter(|shard| shard["state"] == "running")
        .map(|shard| (shard["id"].clone(), shard["attempts"].clone()))
        .collect();
    cluster.kill_coordinator();
    cluster.serve();
    let after = ends_complete(&cluster, &run, &before);
    for (id, attempts) in running {
        let shard = after.iter().find(|shard| shard["id"] == id).expect("a shard stays in its run");
        assert_eq!(shard["attempts"], attempts, "{id} ran through the restart, and yet was tried again");
    }
}

#[test]
fn a_worker_hands_in_what_it_finished_while_no_coordinator_ran() {
    if !models_present() {
        return;
    }
    let mut cluster = Cluster::with_workers(1);
    let run = cluster.submit(&SWEEP[..SWEEP.find("[[experiment]]\nkind = \"transfer\"").unwrap()]);
    mid_run(&cluster, &run, None);
    cluster.kill_coordinator();
    cluster.wait("the worker to finish its shard alone", || (cluster.finished_on_worker(0) > 0).then_some(()));
    cluster.serve();
    let after = cluster.wait("the run to end", || {
        let shards = shards(&cluster, &run);
        (finished(&shards).len() == 4).then_some(shards)
    });
    assert!(after.iter().all(|shard| shard["attempts"] == 1), "nothing had to be tried twice: {after:#?}");
}

#[test]
fn a_worker_is_killed() {
    if !models_present() {
        return;
    }
    let mut cluster = Cluster::with_workers(2);
    let run = cluster.submit(SWEEP);
    let before = mid_run(&cluster, &run, Some("w2"));
    cluster.kill_worker(1);
    cluster.start_worker(1);
    let after = ends_complete(&cluster, &run, &before);
    assert!(
        after.iter().any(|shard| shard["attempts"].as_u64() > Some(1)),
        "the lost shard was tried again: {after:#?}"
    );
}

#[test]
fn an_executor_is_killed() {
    if !models_present() {
        return;
    }
    let mut cluster = Cluster::with_workers(2);
    let run = cluster.submit(SWEEP);
    let before = mid_run(&cluster, &run, Some("w1"));
    // One of them works; after two seats of a shard on this box another may wait for work.
    let executors = cluster.executors(0);
    assert!(!executors.is_empty(), "a shard runs there");
    executors.into_iter().for_each(sigkill);
    let after = ends_complete(&cluster, &run, &before);
    let lost = after.iter().filter(|shard| shard["failure"]["kind"] == "executor lost").count();
    assert_eq!(lost, 1, "one attempt failed, with its type: {after:#?}");
    cluster.wait("both workers online", || (cluster.online_workers() == 2).then_some(()));
    assert!(cluster.coordinator_is_alive());
}
