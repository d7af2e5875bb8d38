//! Bad input and broken surroundings: a clear error, and nothing lost.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::cluster::{Cluster, both, models_present, rows};

const INSPECT: &str =
    "name = \"one\"\n[[experiment]]\nkind = \"inspect\"\nmodel = \"smollm2-135m-instruct\"\ntexts = 2\n";

#[test]
fn a_broken_sweep_is_refused_whole() {
    let mut cluster = Cluster::init();
    cluster.serve();
    let file = cluster.path("broken.toml");
    fs::write(&file, INSPECT.replace("texts", "textes")).unwrap();
    let output = cluster.bonepile(&["submit", &file.display().to_string()]);
    assert_eq!(output.status.code(), Some(2), "{}", both(&output));
    let said = String::from_utf8(output.stderr).unwrap();
    for part in ["broken.toml:5:1", "experiment.textes", "unknown key", "did you mean `texts`?"] {
        assert!(said.contains(part), "no `{part}` in: {said}");
    }
    let json = cluster.bonepile(&["submit", &file.display().to_string(), "--json"]);
    let answer: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert!(answer["error"]["message"].as_str().is_some_and(|message| message.contains("textes")), "{answer}");
    assert!(rows(&cluster.json(&["runs", "--json"]), "runs").is_empty(), "nothing half-accepted");
    let missing = cluster.bonepile(&["submit", "no-such-file.toml"]);
    assert_eq!(missing.status.code(), Some(2), "{}", both(&missing));
}

#[test]
fn a_missing_and_a_corrupt_model_are_told_apart() {
    if !models_present() {
        return;
    }
    let mut cluster = Cluster::init();
    cluster.serve();
    let models = cluster.path("models");
    fs::create_dir(&models).unwrap();
    cluster.worker_flags = vec!["--models".to_owned(), models.display().to_string()];
    cluster.add_worker();
    cluster.wait("the worker", || (cluster.online_workers() == 1).then_some(()));

    let run = cluster.submit(INSPECT);
    let explanation = cluster.ok(&["explain", &format!("{run}.0")]);
    assert!(explanation.contains("smollm2-135m-instruct"), "{explanation}");

    // The right length, the wrong bytes: only the digest can tell.
    let length = 98_362_432;
    let file = fs::File::create(models.join("SmolLM2-135M-Instruct.Q4_1.gguf")).unwrap();
    file.set_len(length).unwrap();
    cluster.kill_worker(0);
    cluster.start_worker(0);
    let failure = cluster.wait("the corrupt file to be found", || {
        let detail = cluster.json(&["runs", &run, "--json"]);
        let failure = rows(&detail, "shards")[0]["failure"].clone();
        failure.is_object().then_some(failure)
    });
    assert_eq!(failure["kind"], "model corrupt", "{failure}");
    assert!(failure["message"].as_str().is_some_and(|message| message.contains("SmolLM2-135M")), "{failure}");
}

/// A file system of `bytes`, or `None` (said on stderr) where this user may not mount.
struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    fn mount(path: &'a Path, bytes: u64) -> Option<Self> {
        fs::create_dir_all(path).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "bonepile-test"])
            .arg(path)
            .output()
            .is_ok_and(|output| output.status.success());
        if !mounted {
            eprintln!("skipped: this user may not mount a tmpfs");
        }
        mounted.then_some(Self(path))
    }

    fn remount(&self, options: &str) {
        let status = Command::new("mount").args(["-o", &format!("remount,{options}")]).arg(self.0).status().unwrap();
        assert!(status.success());
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

/// Runs a shard onto a store that cannot be written, sees it said, mends the store, and sees the result arrive.
fn finishes_after_the_store_is_mended(
    spoil: impl Fn(&SmallDisk<'_>, &Path),
    mend: impl Fn(&SmallDisk<'_>, &Path),
    word: &str,
) {
    if !models_present() {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(place.path(), 64 << 20) else { return };
    let mut cluster = Cluster::init_with_store(&place.path().join("store"));
    cluster.serve();
    cluster.add_worker();
    cluster.wait("the worker", || (cluster.online_workers() == 1).then_some(()));
    spoil(&disk, place.path());
    let run = cluster.submit(INSPECT);
    cluster.wait("the trouble to be told", || {
        let detail = cluster.ok(&["runs", &run, "--json"]);
        detail.contains(word).then_some(())
    });
    mend(&disk, place.path());
    let detail = cluster.wait("the result", || {
        let detail = cluster.json(&["runs", &run, "--json"]);
        (detail["summary"]["state"] != "running").then_some(detail)
    });
    let shard = &rows(&detail, "shards")[0];
    assert_eq!(shard["state"], "committed", "{detail:#}");
    assert_eq!(shard["attempts"], 1, "what was computed was kept: {detail:#}");
    let fsck = cluster.bonepile(&["store", "fsck"]);
    assert!(fsck.status.success(), "{}", both(&fsck));
}

#[test]
fn a_full_disk_under_the_store_loses_nothing() {
    let filler = |root: &Path| root.join("filler");
    finishes_after_the_store_is_mended(
        |_, root| {
            // Fills what is left to the last byte; the error at the end is the aim.
            let _ = fs::write(filler(root), vec![1u8; 64 << 20]);
        },
        |_, root| fs::remove_file(filler(root)).unwrap(),
        "space",
    );
}

#[test]
fn a_read_only_store_loses_nothing() {
    finishes_after_the_store_is_mended(|disk, _| disk.remount("ro"), |disk, _| disk.remount("rw"), "Read-only");
}
