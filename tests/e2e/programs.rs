//! Programs of researchers through a whole cluster: plan, run, logs, artifacts, failures, and kills in the middle.

use std::fs;

use serde_json::Value;

use crate::cluster::{Cluster, both, rows};

const EXAMPLE: &str = include_str!("../../examples/command.toml");

fn cluster(flags: &[&str]) -> Cluster {
    let mut cluster = Cluster::init();
    cluster.serve();
    cluster.worker_flags = [flags, &["--no-measure"]].concat().into_iter().map(str::to_owned).collect();
    cluster.add_worker();
    cluster.wait("the worker", || (cluster.online_workers() == 1).then_some(()));
    cluster
}

fn ends(cluster: &Cluster, run: &str) -> Value {
    cluster.wait("the run to end", || {
        let detail = cluster.json(&["runs", run, "--json"]);
        (detail["summary"]["state"] != "running").then_some(detail)
    })
}

#[test]
fn the_example_is_planned_run_and_shown() {
    let cluster = cluster(&["--allow-commands"]);
    let sweep = cluster.path("command.toml");
    fs::write(&sweep, EXAMPLE).unwrap();
    let plan = cluster.json(&["plan", sweep.to_str().unwrap(), "--json"]);
    assert_eq!(plan["shards"].as_array().unwrap().len(), 7, "{plan}");
    assert!(plan["makespan_ms"].as_u64().is_some_and(|ms| ms > 0), "{plan}");
    assert_eq!(plan["shards"][0]["seats"][0]["device"], "w1/cpu", "{plan}");

    let run = cluster.submit(EXAMPLE);
    let detail = ends(&cluster, &run);
    assert_eq!(detail["summary"]["state"], "complete", "{detail}\n{}", cluster.logs());
    assert!(cluster.ok(&["logs", &format!("{run}.1")]).contains("seed 2 on cpu"));
    let outputs = rows(&detail["shards"][0], "outputs");
    assert!(outputs.iter().any(|output| output["name"] == "out.json"), "{detail}");
    let table = cluster.json(&["workers", "--throughput", "--json"]);
    assert!(rows(&table, "").iter().any(|row| row["class"] == "command/python3" && row["samples"] == 6), "{table}");
}

#[test]
fn nothing_runs_where_the_operator_did_not_allow_it() {
    let cluster = cluster(&[]);
    let sweep = cluster.path("command.toml");
    fs::write(&sweep, EXAMPLE).unwrap();
    let plan = cluster.bonepile(&["plan", sweep.to_str().unwrap()]);
    assert_eq!(plan.status.code(), Some(4), "{}", both(&plan));
    let run = cluster.submit(EXAMPLE);
    let said = cluster.ok(&["explain", &format!("{run}.0")]);
    assert!(said.contains("cannot run as things are") && said.contains("--allow-commands"), "{said}");
}

#[test]
fn a_program_that_fails_says_how_and_what_waits_for_it_fails_too() {
    let cluster = cluster(&["--allow-commands"]);
    let run = cluster.submit(
        "name = \"fail\"\n[[experiment]]\nname = \"a\"\nkind = \"command\"\nargv = [\"sh\", \"-c\", \"echo oops >&2; exit 3\"]\n\
         [[experiment]]\nafter = [\"a\"]\nkind = \"no-op\"\n",
    );
    assert_eq!(ends(&cluster, &run)["summary"]["state"], "failed");
    let said = cluster.ok(&["explain", &format!("{run}.0")]);
    assert!(said.contains("exit code 3") && said.contains("oops"), "{said}");
    assert!(cluster.ok(&["explain", &format!("{run}.1")]).contains("an experiment that it waits for has failed"));
}

#[test]
fn every_program_runs_though_coordinator_and_worker_are_killed() {
    const COUNT: usize = 600;
    let mut cluster = cluster(&["--allow-commands"]);
    let ran = cluster.path("ran.txt");
    let numbers: Vec<String> = (0..COUNT).map(|number| number.to_string()).collect();
    let run = cluster.submit(&format!(
        "name = \"many\"\n[[experiment]]\nkind = \"command\"\nargv = [\"sh\", \"-c\", \"echo {{n}} >> {}; sleep 0.01\"]\n\
         retries = 3\n[experiment.matrix]\nn = [{}]\n",
        ran.display(),
        numbers.join(", ")
    ));
    let lines = || fs::read_to_string(&ran).map_or(0, |text| text.lines().count());
    cluster.wait("some to have run", || (lines() > COUNT / 6).then_some(()));
    cluster.kill_coordinator();
    cluster.kill_worker(0);
    // The coordinator is back first and finds nobody.
    cluster.serve();
    cluster.start_worker(0);
    let detail = ends(&cluster, &run);
    assert_eq!(detail["summary"]["state"], "complete", "{}", cluster.logs());
    let text = fs::read_to_string(&ran).unwrap();
    let mut seen: Vec<&str> = text.lines().collect();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), COUNT, "every program ran at least once");
}
