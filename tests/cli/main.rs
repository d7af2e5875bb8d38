//! The program `bonepile` from outside: exit codes, what goes to which stream, errors for people and for programs.
//!
//! Needs no coordinator: clusters of processes are tested elsewhere.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

struct Bench {
    directory: tempfile::TempDir,
}

struct Said {
    code: i32,
    out: String,
    err: String,
}

impl Bench {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bonepile"));
        command.args(arguments).current_dir(self.path()).env_remove("BONEPILE_CONFIG");
        command.env("BONEPILE_MODELS", self.path().join("models")).stdin(Stdio::null());
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
        "error: s.toml:3:8: key \"experiment.kind\": unknown kind `inspekt`; expected one of inspect, transfer\n\
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
fn a_reader_that_goes_away_is_no_failure() {
    let bench = Bench::new();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = bench.command(&["models", "list"]).stdout(writer).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stderr.is_empty());
}
