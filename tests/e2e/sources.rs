//! Models from elsewhere than the catalogue, through a whole cluster: by path, and pulled from a hub by a worker's own command.
//!
//! On a tiny random model, so these run everywhere.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cluster::{Cluster, binary, both, rows};
use crate::server::{TestFile, TestHub, large, small};

/// A directory in Hugging Face's layout, with the same model as one file.
fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/reference/tiny/llama").canonicalize().unwrap()
}

/// One worker; seats of models that nobody has measured are given 4 GB.
fn cluster(models: &Path) -> Cluster {
    let mut cluster = Cluster::init();
    cluster.serve();
    let flags = ["--models", models.to_str().unwrap(), "--memory", "cpu=5GB"];
    cluster.worker_flags = flags.map(str::to_owned).to_vec();
    cluster.add_worker();
    cluster.wait("the worker", || (cluster.online_workers() == 1).then_some(()));
    cluster
}

fn sweep(model: &str) -> String {
    format!("name = \"one\"\n[[experiment]]\nkind = \"inspect\"\nmodel = \"{model}\"\ntexts = 1\n")
}

/// Submits, waits for the end, and returns the model's fingerprint as the manifest has it.
fn run(cluster: &Cluster, model: &str) -> String {
    let run = cluster.submit(&sweep(model));
    let manifest = cluster.store().join(format!("manifests/{run}/{run}.0.json"));
    cluster.wait("the run to end", || {
        let detail = cluster.json(&["runs", &run, "--json"]);
        assert!(!detail.to_string().contains("\"failure\":{"), "{detail}\n{}", cluster.logs());
        manifest.is_file().then_some(())
    });
    let manifest: serde_json::Value = serde_json::from_slice(&fs::read(manifest).unwrap()).unwrap();
    manifest["seats"][0]["models"][model].as_str().unwrap_or_else(|| panic!("{manifest}")).to_owned()
}

#[test]
fn a_sweep_may_name_a_path() {
    let models = tempfile::tempdir().unwrap();
    let cluster = cluster(models.path());
    let (directory, file) = (tiny(), tiny().join("model.gguf"));
    let of_directory = run(&cluster, directory.to_str().unwrap());
    let of_file = run(&cluster, file.to_str().unwrap());
    assert_ne!(of_directory, of_file);

    let run = cluster.submit(&sweep("/nowhere/model.gguf"));
    let said = cluster.wait("the path to be looked for", || {
        let said = cluster.ok(&["explain", &format!("{run}.0")]);
        said.contains("cannot run as things are").then_some(said)
    });
    assert!(said.contains("copy /nowhere/model.gguf to one more worker"), "{said}");
}

#[test]
fn a_sweep_may_name_a_model_of_the_hub() {
    let hub = TestHub::start();
    let files: Vec<TestFile> = fs::read_dir(tiny())
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let (name, content) = (path.file_name().unwrap().to_str().unwrap(), fs::read(&path).unwrap());
            if name.ends_with(".json") { small(name, content) } else { large(name, content) }
        })
        .collect();
    let commit = "1".repeat(40);
    hub.commit("tiny/llama", "main", &commit, files);
    let models = tempfile::tempdir().unwrap();
    let pull = |name: &str| {
        let output = Command::new(binary("bonepile-worker"))
            .args(["models", "pull", name, "--json", "--models"])
            .arg(models.path())
            .env("HF_ENDPOINT", hub.endpoint())
            .env("HF_HOME", models.path())
            .env_remove("HF_TOKEN")
            .env_remove("HF_TOKEN_PATH")
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", both(&output));
        let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        rows(&answer, "models")[0]["fingerprint"].as_str().unwrap().to_owned()
    };
    let of_directory = pull("tiny/llama");
    let of_file = pull("tiny/llama:model.gguf");
    let cluster = cluster(models.path());
    // What the pull says is what the executor finds: both have their own idea of a directory's fingerprint.
    assert_eq!(run(&cluster, "tiny/llama:model.gguf"), of_file);
    assert_eq!(run(&cluster, "tiny/llama@main"), of_file, "the newest pull is meant");
    pull("tiny/llama");
    assert_eq!(run(&cluster, &format!("tiny/llama@{commit}")), of_directory);

    let run = cluster.submit(&sweep("tiny/other"));
    let said = cluster.ok(&["explain", &format!("{run}.0")]);
    assert!(said.contains("bonepile-worker models pull tiny/other"), "{said}");
}
