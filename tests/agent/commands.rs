//! What the commands say and how they end.

use std::process::{Command, Output};

use protocol::identity::{JoinToken, Secret};
use protocol::ids::TokenId;

use crate::server::{TestHub, large, noise, sha256};

struct Bench(tempfile::TempDir, String);

impl Bench {
    /// A box for which nobody answers in the hub's place.
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap(), "http://127.0.0.1:1".to_owned())
    }

    fn with_hub(self, hub: &TestHub) -> Self {
        Self(self.0, hub.endpoint())
    }

    fn run(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let Output { status, stdout, stderr } = Command::new(env!("CARGO_BIN_EXE_bonepile-worker"))
            .args(arguments)
            .env("BONEPILE_WORKER_STATE", self.0.path().join("state"))
            .env("BONEPILE_MODELS", self.0.path().join("models"))
            .env("BONEPILE_NVML", "/nonexistent")
            .env("HF_ENDPOINT", &self.1)
            .env("HF_HOME", self.0.path().join("hf"))
            .env_remove("HF_TOKEN")
            .env_remove("HF_TOKEN_PATH")
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (status.code(), text(stdout), text(stderr))
    }
}

fn token(coordinator: &str) -> String {
    JoinToken {
        coordinators: vec![coordinator.into()],
        cluster: "lab".into(),
        authority_spki_sha256: [1; 32],
        token: TokenId(1),
        secret: Secret([2; 32]),
    }
    .to_string()
}

#[test]
fn a_mangled_token_is_refused_with_a_hint() {
    let bench = Bench::new();
    let whole = token("127.0.0.1:1");
    let (code, stdout, stderr) = bench.run(&["join", &whole[..whole.len() - 4]]);
    assert_eq!((code, stdout.as_str()), (Some(2), ""));
    assert_eq!(
        stderr,
        "error: the token is damaged: its checksum does not fit\n\
         hint: copy the line that `bonepile token create` printed once more, whole and unbroken\n"
    );
}

#[test]
fn an_unreachable_coordinator_ends_with_3_and_one_json_document() {
    let bench = Bench::new();
    let (code, stdout, _) = bench.run(&["join", "--json", &token("no-such-host.invalid:1")]);
    assert_eq!(code, Some(3));
    let document: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(document["error"]["code"], 3);
    assert!(
        document["error"]["message"].as_str().unwrap().starts_with("no coordinator answered: no-such-host.invalid:1")
    );
    assert!(document["error"]["hint"].as_str().unwrap().contains("firewall"));
    // The key is kept: if an answer was lost on the way, the next try gets the same worker id.
    let state = std::fs::read_dir(bench.0.path().join("state")).unwrap();
    let names: Vec<_> = state.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert!(names.iter().any(|name| name.starts_with("joining-t1-")), "{names:?}");
}

#[test]
fn a_box_that_has_not_joined_says_how() {
    let bench = Bench::new();
    let (code, _, stderr) = bench.run(&["run"]);
    assert_eq!(code, Some(2));
    assert!(stderr.contains("this box has not joined a cluster"), "{stderr}");
    assert!(stderr.contains("hint: get a token with `bonepile token create`"), "{stderr}");
}

#[test]
fn the_doctor_finds_what_is_missing() {
    let bench = Bench::new();
    let (code, stdout, _) = bench.run(&["doctor", "--json", "--store", "/nonexistent"]);
    assert_eq!(code, Some(1));
    let document: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    let finding = |what: &str| {
        let findings = document["findings"].as_array().unwrap();
        findings.iter().find(|finding| finding["what"] == what).unwrap().clone()
    };
    assert_eq!(finding("identity")["verdict"], "wrong");
    assert_eq!(finding("store")["verdict"], "wrong");
    assert!(finding("store")["text"].as_str().unwrap().contains("no store at /nonexistent"));
    assert_eq!(finding("models")["verdict"], "warning");
    assert!(finding("device")["text"].as_str().unwrap().starts_with("cpu: "));
}

#[test]
fn models_are_listed_and_unknown_ones_refused() {
    let bench = Bench::new();
    let (code, stdout, _) = bench.run(&["models", "list", "--json"]);
    assert_eq!(code, Some(0));
    let document: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert!(document["models"].as_array().unwrap().iter().all(|model| model["state"] == "missing"));
    let (code, _, stderr) = bench.run(&["models", "verify", "gemma-3-270n"]);
    assert_eq!(code, Some(2));
    assert_eq!(stderr, "error: no model is called `gemma-3-270n`\nhint: did you mean `gemma-3-270m`?\n");
    let (code, _, stderr) = bench.run(&["models", "verify", "gemma-3-270m"]);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("model gemma-3-270m is not on this box"), "{stderr}");
}

#[test]
fn a_model_of_the_hub_is_pulled_listed_and_verified() {
    let hub = TestHub::start();
    let commit = "1".repeat(40);
    hub.commit("o/n", "main", &commit, vec![large("a.gguf", noise(1000, 1))]);
    let bench = Bench::new().with_hub(&hub);
    let (code, stdout, stderr) = bench.run(&["models", "pull", "o/n", "--json"]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    let document: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    let fingerprint = format!("sha256:{}", sha256(&noise(1000, 1)));
    assert_eq!(document["models"][0]["fingerprint"], fingerprint.as_str());
    let (_, stdout, _) = bench.run(&["models", "list"]);
    assert!(stdout.contains(&format!("o/n@{commit}:a.gguf")) && stdout.contains("present, from the hub"), "{stdout}");
    assert_eq!(bench.run(&["models", "verify"]).0, Some(0));
    let path = document["models"][0]["path"].as_str().unwrap();
    std::fs::write(path, noise(1000, 2)).unwrap();
    let (code, _, stderr) = bench.run(&["models", "verify"]);
    assert!(code == Some(1) && stderr.contains("is corrupt"), "{stderr}");

    let (code, _, stderr) = bench.run(&["models", "pull", "o/other"]);
    assert_eq!(code, Some(1));
    assert!(stderr.starts_with("error: the hub has no model o/other, or keeps it private\nhint: "), "{stderr}");
    let (code, _, stderr) = bench.run(&["models", "pull", "o/n:readme.md"]);
    assert_eq!(code, Some(2));
    assert!(stderr.starts_with("error: no model can be called `o/n:readme.md`: `readme.md` is no file"), "{stderr}");
}

#[test]
fn a_wrong_setting_is_a_usage_error() {
    let bench = Bench::new();
    for arguments in [&["run", "--memory", "4TB"][..], &["run", "--threads", "0"], &["run", "--listen", "here"]] {
        let (code, _, stderr) = bench.run(arguments);
        assert_eq!(code, Some(2), "{stderr}");
    }
}

#[test]
fn the_agent_builds_without_any_machine_learning() {
    let tree = Command::new(env!("CARGO"))
        .args(["tree", "--locked", "--offline", "-p", "worker", "--no-default-features", "--features", "agent"])
        .args(["-e", "normal", "--prefix", "none", "--format", "{p}"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(tree.status.success(), "{}", String::from_utf8_lossy(&tree.stderr));
    let tree = String::from_utf8(tree.stdout).unwrap();
    assert!(tree.lines().any(|line| line.starts_with("quinn ")), "this is not the tree: {tree}");
    for banned in ["candle", "tokenizers", "gemm", "faer", "cudarc", "safetensors", "rayon "] {
        let found: Vec<_> = tree.lines().filter(|line| line.starts_with(banned)).collect();
        assert!(found.is_empty(), "{found:?}");
    }
}
