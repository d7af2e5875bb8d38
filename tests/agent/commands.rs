//! What the commands say and how they end.

use std::process::{Command, Output};

use protocol::identity::{JoinToken, Secret};
use protocol::ids::TokenId;

struct Bench(tempfile::TempDir);

impl Bench {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn run(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let Output { status, stdout, stderr } = Command::new(env!("CARGO_BIN_EXE_bonepile-worker"))
            .args(arguments)
            .env("BONEPILE_WORKER_STATE", self.0.path().join("state"))
            .env("BONEPILE_MODELS", self.0.path().join("models"))
            .env("BONEPILE_NVML", "/nonexistent")
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
