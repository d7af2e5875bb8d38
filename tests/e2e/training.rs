//! Trainings in rounds with real models: `kill -9` of every role in the middle, and every sample counted once all the same.

use std::collections::BTreeMap;
use std::ops::Range;

use serde_json::Value;

use crate::cluster::{Cluster, models_present, rows, sigkill};

/// A narrow fuser, three rounds of two replicas; shares are equal, so that who steps on what does not depend on the machine's
/// mood. Without a base the source's caches alone tell it where people live.
const SWEEP: &str = r#"
name = "rounds"
seed = 5

[[experiment]]
kind = "projector-train"
source = "gemma-3-270m"
target = "smollm2-135m-instruct"
method = "fuser"
samples = 24
batch = 2
local_steps = 2
shares = "equal"
replicas = 2
hidden = 16
dropout = 0.0
validate = 2
spread = "any"
"#;

/// Results of local steps and of outer steps, by round and replica.
struct Training {
    steps: BTreeMap<(u64, u64), (Value, Range<u64>)>,
    rounds: BTreeMap<u64, Value>,
}

impl Training {
    /// Reads what a complete run left in the store.
    fn of(cluster: &Cluster, run: &str) -> Self {
        let (mut steps, mut rounds) = (BTreeMap::new(), BTreeMap::new());
        let results = cluster.json(&["results", run, "--json"]);
        for shard in rows(&results["results"], "shards") {
            for result in rows(shard, "seats").iter().map(|seat| &seat["result"]) {
                if let Some(found) = result.get("projector-steps") {
                    let key = (found["round"].as_u64().unwrap(), found["replica"].as_u64().unwrap());
                    let samples = &shard["spec"]["projector-train"]["stage"]["steps"]["samples"];
                    let (first, count) = (samples["first"].as_u64().unwrap(), samples["count"].as_u64().unwrap());
                    let range = first..first + count;
                    assert!(steps.insert(key, (found.clone(), range)).is_none(), "{key:?} counts twice");
                }
                if let Some(found) = result.get("projector-round") {
                    rounds.insert(found["round"].as_u64().unwrap(), found.clone());
                }
            }
        }
        Self { steps, rounds }
    }

    /// Every place of the corpus was stepped on once.
    fn counts_every_sample_once(&self, samples: u64) {
        let mut places: Vec<u64> = self.steps.values().flat_map(|(_, range)| range.clone()).collect();
        places.sort_unstable();
        assert_eq!(places, (0..samples).collect::<Vec<_>>());
        let counted = self.rounds.values().last().map(|round| round["counted"].as_u64().unwrap());
        assert_eq!(counted, Some(samples));
    }

    /// Mean loss of the last round's steps, nats.
    fn last_loss(&self) -> f64 {
        let last = self.steps.keys().map(|(round, _)| *round).max().unwrap();
        let losses: Vec<f64> = self
            .steps
            .iter()
            .filter(|((round, _), _)| *round == last)
            .flat_map(|(_, (found, _))| rows(found, "steps").iter().map(|step| step["loss"].as_f64().unwrap()))
            .collect();
        losses.iter().sum::<f64>() / losses.len() as f64
    }
}

fn complete(cluster: &Cluster, run: &str) -> Training {
    let last = cluster.wait("the training to end", || {
        let detail = cluster.json(&["runs", run, "--json"]);
        (detail["summary"]["state"] != "running").then_some(detail)
    });
    assert_eq!(last["summary"]["state"], "complete", "{last:#}\n{}", cluster.logs());
    let training = Training::of(cluster, run);
    training.counts_every_sample_once(24);
    training
}

/// Waits until local steps of a round after `round` are under way on worker `w1`.
fn stepping(cluster: &Cluster, run: &str, round: u64) {
    cluster.wait("a replica to step", || {
        let detail = cluster.json(&["runs", run, "--json"]);
        let steps = |shard: &&Value| {
            let what = shard["summary"].as_str().expect("a shard says what it is");
            shard["state"] == "running"
                && (round..round + 3).any(|round| what.contains(&format!("round {round} replica")))
                && rows(shard, "seats").iter().any(|seat| seat["progress"]["done"].as_u64() > Some(0))
        };
        rows(&detail, "shards").iter().find(steps).map(|_| ())
    });
}

#[test]
fn a_training_outlives_every_kill_and_counts_each_sample_once() {
    if !models_present() {
        return;
    }
    let mut cluster = Cluster::with_workers(2);
    let undisturbed = cluster.submit(SWEEP);
    let undisturbed = complete(&cluster, &undisturbed);

    let run = cluster.submit(SWEEP);
    // An executor of one box: a source or a target, whichever is at hand.
    stepping(&cluster, &run, 0);
    cluster.executors(0).into_iter().take(1).for_each(sigkill);
    // The coordinator.
    stepping(&cluster, &run, 0);
    cluster.kill_coordinator();
    cluster.serve();
    // A whole box, with whatever it does.
    stepping(&cluster, &run, 1);
    cluster.kill_worker(1);
    cluster.start_worker(1);
    let disturbed = complete(&cluster, &run);

    let (calm, hurt) = (undisturbed.last_loss(), disturbed.last_loss());
    assert!((calm - hurt).abs() < 0.25 * calm, "final loss {hurt} after kills, {calm} without");
    let same_shares = undisturbed.steps.keys().eq(disturbed.steps.keys())
        && undisturbed.steps.iter().all(|(key, (_, range))| disturbed.steps[key].1 == *range);
    if same_shares {
        let weights = |training: &Training| training.rounds.values().last().unwrap()["weights"].clone();
        assert_eq!(weights(&undisturbed), weights(&disturbed), "the same shares make the same weights");
    }
}
