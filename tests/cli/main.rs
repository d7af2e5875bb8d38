//! The program `bonepile` from outside: exit codes, what goes to which stream, errors for people and for programs.
//!
//! Needs no coordinator: clusters of processes are tested elsewhere.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../hub/server.rs"]
mod server;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::server::{TestHub, large, noise, sha256};

struct Bench {
    directory: tempfile::TempDir,
    /// Where the hub is; nobody answers there unless a test says so.
    hub: String,
}

struct Said {
    code: i32,
    out: String,
    err: String,
}

impl Bench {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap(), hub: "http://127.0.0.1:1".to_owned() }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bonepile"));
        command.args(arguments).current_dir(self.path()).env_remove("BONEPILE_CONFIG");
        command.env("BONEPILE_MODELS", self.path().join("models")).stdin(Stdio::null());
        command.env("HF_ENDPOINT", &self.hub).env("HF_HOME", self.path().join("hf"));
        command.env_remove("HF_TOKEN").env_remove("HF_TOKEN_PATH");
        command
    }

    fn run(&self, arguments: &[&str]) -> Said {
        let Output { status, stdout, stderr } = self.command(arguments).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap().replace(&self.path().display().to_string(), "DIR");
        Said { code: status.code().expect("not killed"), out: text(stdout), err: text(stderr) }
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path().join(name), text).unwrap();
    }
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn a_cluster_is_made_once_and_asked_in_vain_while_nobody_serves_it() {
    let bench = Bench::new();
    let made = bench.run(&["init", "c", "--name", "lab", "--json"]);
    assert_eq!((made.code, made.err.as_str()), (0, "next: bonepile serve --config DIR/c/cluster.toml\n"));
    assert_eq!(json(&made.out)["store"], "DIR/c/store");

    let again = bench.run(&["init", "c"]);
    assert_eq!(again.code, 2);
    assert!(again.err.starts_with("error: DIR/c/cluster.toml exists already\nhint: "), "{}", again.err);

    let asked = bench.run(&["runs", "--config", "c/cluster.toml"]);
    assert_eq!((asked.code, asked.out.as_str()), (3, ""));
    assert!(asked.err.contains("DIR/c/state/api.sock") && asked.err.contains("hint: start it with"), "{}", asked.err);
    let asked = bench.run(&["runs", "--config", "c/cluster.toml", "--json"]);
    assert_eq!((asked.code, asked.err.as_str()), (3, ""), "the error is the document");
    assert_eq!(json(&asked.out)["error"]["code"], "unreachable");
}

#[test]
fn a_missing_or_wrong_cluster_toml_is_a_usage_error_with_its_place() {
    let bench = Bench::new();
    let missing = bench.run(&["workers"]);
    assert_eq!(missing.code, 2);
    assert!(
        missing.err.contains("failed to read cluster.toml") && missing.err.contains("bonepile init"),
        "{}",
        missing.err
    );
    bench.write("cluster.toml", "[cluster]\nname = \"lab\"\n[coordinator]\nlisten = \"4717\"\n");
    let wrong = bench.run(&["workers"]);
    assert_eq!(wrong.code, 2);
    assert_eq!(
        wrong.err,
        "error: cluster.toml:4:10: key \"coordinator.listen\": `4717` is not an address with a port\n\
         \u{20} |\n4 | listen = \"4717\"\n\u{20} |          ^\n\
         hint: for example \"0.0.0.0:4717\" or \"[::]:4717\"\n"
    );
}

#[test]
fn a_broken_sweep_is_refused_before_anyone_is_asked() {
    let bench = Bench::new();
    bench.run(&["init", ".", "--name", "lab"]);
    bench.write("s.toml", "name = \"x\"\n[[experiment]]\nkind = \"inspekt\"\nmodel = \"gemma-3-270m\"\n");
    let refused = bench.run(&["submit", "s.toml"]);
    assert_eq!((refused.code, refused.out.as_str()), (2, ""));
    assert_eq!(
        refused.err,
        "error: s.toml:3:8: key \"experiment.kind\": unknown kind `inspekt`; expected one of inspect, transfer, command, no-op, \
         projector-train, projector-eval\n\
         \u{20} |\n3 | kind = \"inspekt\"\n\u{20} |        ^\n\
         hint: did you mean `inspect`?\n"
    );
    let refused = json(&bench.run(&["submit", "s.toml", "--json"]).out);
    assert_eq!(refused["error"]["code"], "bad-sweep");
    assert_eq!(refused["error"]["hint"], "did you mean `inspect`?");
    assert_eq!(bench.run(&["submit", "no-such.toml"]).code, 2);
}

#[test]
fn fsck_says_clean_or_what_is_wrong() {
    let bench = Bench::new();
    bench.run(&["init", ".", "--name", "lab"]);
    let clean = bench.run(&["store", "fsck"]);
    assert!(clean.code == 0 && clean.out.ends_with("clean\n"), "{}", clean.out);
    bench.write("store/blobs/ab/notes", "x");
    let found = bench.run(&["store", "fsck", "store", "--json"]);
    assert_eq!(found.code, 1);
    assert_eq!(json(&found.out)["findings"][0]["kind"], "stray");
    assert!(bench.run(&["store", "fsck"]).out.ends_with("1 findings\n"));
    let none = bench.run(&["store", "fsck", "nowhere"]);
    assert_eq!(none.code, 1);
    assert!(none.err.contains("no store at nowhere") && none.err.contains("hint: mount it"), "{}", none.err);
}

#[test]
fn models_that_are_not_here_are_named_with_the_command_that_brings_them() {
    let bench = Bench::new();
    let list = bench.run(&["models", "list", "--json"]);
    let rows = json(&list.out);
    assert!(rows.as_array().unwrap().iter().all(|row| row["present"] == false), "{rows}");
    let verify = bench.run(&["models", "verify"]);
    assert!(verify.code == 1 && verify.out.contains("bonepile models pull gemma-3-270m"), "{}", verify.out);
    let unknown = bench.run(&["models", "pull", "gemma-3-270"]);
    assert_eq!(
        (unknown.code, unknown.err.as_str()),
        (2, "error: no model is called `gemma-3-270`\nhint: did you mean `gemma-3-270m`?\n")
    );
}

#[test]
fn what_fits_is_told_without_a_cluster() {
    let bench = Bench::new();
    let fit = bench.run(&["fit", "--model", "llama-3.1-8b", "--cards", "gtx-1660-super", "--phase", "inference"]);
    assert_eq!((fit.code, fit.err.as_str()), (0, ""));
    assert!(fit.out.contains("llama-3.1-8b  inference  gtx-1660-super") && fit.out.contains("q4_0:"), "{}", fit.out);
    let rows = json(&bench.run(&["fit", "--cards", "all", "--json"]).out);
    let row = &rows.as_array().unwrap()[0];
    let sum: u64 = row["parts"].as_object().unwrap().values().map(|bytes| bytes.as_u64().unwrap()).sum();
    assert_eq!((&row["verdict"], &row["need_bytes"]), (&"fits".into(), &sum.into()));
    let unknown = bench.run(&["fit", "--cards", "gtx-1090"]);
    assert_eq!(unknown.code, 2);
    assert!(
        unknown.err.starts_with("error: no card of the catalogue is called `gtx-1090`\nhint: it has"),
        "{}",
        unknown.err
    );
    let present = bench.run(&["fit", "--present"]);
    assert!(present.code == 2 && present.err.contains("cluster.toml"), "{}", present.err);
}

#[test]
fn models_of_the_hub_are_pulled_listed_and_verified() {
    let hub = TestHub::start();
    let commit = "1".repeat(40);
    let files = ["m.Q4_0.gguf", "m.Q8_0.gguf"].map(|file| large(file, noise(1000, 1)));
    hub.commit("o/n", "main", &commit, files.to_vec());
    hub.state().gate = Some("hf_kept".to_owned());
    let bench = Bench { hub: hub.endpoint(), ..Bench::new() };

    let several = bench.run(&["models", "pull", "o/n"]);
    assert_eq!(
        (several.code, several.err.as_str()),
        (
            1,
            "error: o/n has 2 GGUF files and no safetensors: m.Q4_0.gguf, m.Q8_0.gguf\n\
             hint: name one: `bonepile models pull o/n:m.Q4_0.gguf`\n"
        )
    );
    let gated = bench.run(&["models", "pull", "o/n:m.Q4_0.gguf"]);
    assert!(gated.code == 1 && gated.err.contains("HF_TOKEN"), "{}", gated.err);
    // As Hugging Face's own tools keep it.
    fs::create_dir(bench.path().join("hf")).unwrap();
    bench.write("hf/token", "hf_kept\n");
    let pulled = bench.run(&["models", "pull", "o/n:m.Q4_0.gguf"]);
    assert_eq!(pulled.code, 0, "{}", pulled.err);
    let path = format!("models/hub/o/n/{commit}/m.Q4_0.gguf");
    assert_eq!(pulled.out, format!("o/n@{commit}:m.Q4_0.gguf  DIR/{path}\n"));
    assert!(pulled.err.contains(&format!("commit {commit}, 1 files, licence: apache-2.0")), "{}", pulled.err);

    let rows = json(&bench.run(&["models", "list", "--json"]).out);
    let row = rows.as_array().unwrap().iter().find(|row| row["present"] == true).unwrap();
    assert_eq!(row["name"], format!("o/n@{commit}:m.Q4_0.gguf"));
    assert_eq!(row["revisions"], serde_json::json!(["main"]));
    assert_eq!(row["fingerprint"], format!("sha256:{}", sha256(&noise(1000, 1))));
    let list = bench.run(&["models", "list"]).out;
    assert!(list.contains("o/n@111111111111:m.Q4_0.gguf") && list.contains("from the hub, main"), "{list}");

    let whole = bench.run(&["models", "verify", "o/n@main"]);
    assert!(whole.code == 0 && whole.out.contains("whole"), "{}", whole.out);
    bench.write(&path, "x");
    let damaged = bench.run(&["models", "verify", "o/n"]);
    assert!(damaged.code == 1 && damaged.out.contains("expected 1000 bytes, got 1 bytes"), "{}", damaged.out);
    assert!(bench.run(&["models", "list"]).out.contains("damaged"));
    assert_eq!(bench.run(&["models", "pull", "o/n:m.Q4_0.gguf"]).code, 0);
    assert_eq!(bench.run(&["models", "verify", "o/n"]).code, 0);

    let file = bench.run(&["models", "pull", "own.gguf"]);
    assert!(file.code == 2 && file.err.contains("not a model that can be pulled"), "{}", file.err);
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let bench = Bench::new();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = bench.command(&["models", "list"]).stdout(writer).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stderr.is_empty());
}
