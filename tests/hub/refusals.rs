//! What goes wrong at the hub's end, or on the way, or on the disk: typed, with the command or the setting that helps.

use std::fs;

use protocol::models::ModelError;
use protocol::models::hub::{HubConfig, HubError};

use crate::server::{large, sha256, small};
use crate::{Bench, ONE, TWO, part, weights};

fn hint(error: HubError) -> String {
    ModelError::from(error).hint_on_worker().unwrap()
}

#[test]
fn several_gguf_files_are_listed() {
    let bench = Bench::new();
    let files = ["m.Q4_0.gguf", "m.Q8_0.gguf"].map(|file| large(file, weights(1)));
    bench.hub.commit("o/n", "main", ONE, files.to_vec());
    let error = bench.refused("o/n");
    assert_eq!(error.to_string(), "o/n has 2 GGUF files and no safetensors: m.Q4_0.gguf, m.Q8_0.gguf");
    assert_eq!(hint(error), "name one: `bonepile-worker models pull o/n:m.Q4_0.gguf`");
    bench.pull("o/n:m.Q8_0.gguf").unwrap();
    assert!(bench.located("o/n").ends_with("m.Q8_0.gguf"));
    let error = bench.refused("o/n:m.Q8_1.gguf");
    assert_eq!(error.to_string(), "o/n has no file m.Q8_1.gguf");
    let hint = hint(error);
    assert!(hint.contains("m.Q4_0.gguf, m.Q8_0.gguf") && hint.contains("pull o/n:m.Q8_0.gguf"), "{hint}");
}

#[test]
fn a_gated_model_asks_for_a_token_and_its_terms() {
    let bench = Bench::new();
    bench.hub.commit("o/n", "main", ONE, vec![large("a.gguf", weights(1))]);
    bench.hub.state().gate = Some("hf_right".to_owned());
    let error = bench.refused("o/n");
    assert!(matches!(error, HubError::Gated { with_token: false, .. }), "{error:?}");
    assert_eq!(
        error.to_string(),
        "the hub does not give o/n to one without a token: Access to this model is restricted."
    );
    let said = hint(error);
    assert!(said.contains("HF_TOKEN") && said.contains("accept its terms"), "{said}");
    let config = HubConfig { token: Some("hf_wrong".to_owned()), ..bench.config() };
    let (outcome, _) = bench.pull_as(&config, "o/n");
    let error = outcome.unwrap_err();
    assert!(matches!(error, ModelError::Hub(HubError::Gated { with_token: true, .. })), "{error:?}");
    assert!(!error.to_string().contains("hf_wrong"));
    assert_eq!(bench.models.present(), [""; 0]);
    assert!(matches!(bench.models.locate("o/n"), Err(ModelError::Missing { .. })));
}

#[test]
fn what_is_not_there_is_told_apart() {
    let bench = Bench::new();
    bench.hub.commit("o/n", "main", ONE, vec![small("README.md", "x")]);
    let error = bench.refused("o/other");
    assert!(matches!(&error, HubError::NoRepository { repository } if repository == "o/other"), "{error:?}");
    let error = bench.refused("o/n@v2");
    assert_eq!(error.to_string(), "o/n has no branch, tag or commit `v2`");
    let error = bench.refused("o/n");
    assert!(matches!(error, HubError::NoModel { .. }), "{error:?}");
    // Without a reason the status decides; to those without a token the hub says 401 about what may not be there at all.
    bench.hub.state().refuse = Some((401, "", r#"{"error":"Invalid username or password."}"#));
    assert!(matches!(bench.refused("o/n"), HubError::NoRepository { .. }));
    let config = HubConfig { token: Some("hf_old".to_owned()), ..bench.config() };
    let error = bench.pull_as(&config, "o/n").0.unwrap_err();
    assert!(matches!(error, ModelError::Hub(HubError::BadToken)), "{error:?}");
    bench.hub.state().refuse = Some((403, "", r#"{"error":"not for you"}"#));
    assert!(bench.refused("o/n").to_string().ends_with("not for you"));
    assert_eq!(fs::read_dir(bench.models.root().join("hub")).unwrap().count(), 1, "only the place for parts");
}

#[test]
fn a_hub_in_trouble_is_asked_again_and_then_named() {
    let bench = Bench::new();
    bench.hub.state().refuse = Some((503, "", "<html>"));
    let error = bench.refused("o/n");
    assert_eq!(error.to_string(), "the hub answered 503 to o/n at main: status 503");
    assert_eq!(bench.hub.take_requests().len(), 3);
    bench.hub.state().refuse = Some((200, "", "<html>"));
    assert!(matches!(bench.refused("o/n"), HubError::Answer { .. }));
    bench.hub.state().refuse = Some((200, "", r#"{"sha":"../..","siblings":[]}"#));
    assert!(matches!(bench.refused("o/n"), HubError::Answer { .. }));
}

#[test]
fn nobody_there_is_told_with_the_settings_that_could_help() {
    let bench = Bench::new();
    // Nothing listens where something has just stopped to.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let endpoint = format!("http://127.0.0.1:{port}");
    let config = HubConfig { retry_wait: std::time::Duration::ZERO, ..HubConfig::at(&endpoint) };
    let error = bench.pull_as(&config, "o/n").0.unwrap_err();
    assert!(matches!(error, ModelError::Hub(HubError::Unreachable { .. })), "{error:?}");
    assert!(error.to_string().starts_with(&format!("the hub at {endpoint} does not answer: ")), "{error}");
    let said = error.hint().unwrap();
    assert!(said.contains("HTTPS_PROXY") && said.contains("HF_ENDPOINT") && said.contains("absolute path"), "{said}");
}

#[test]
fn a_file_that_keeps_being_cut_is_given_up_and_kept() {
    let bench = Bench::new();
    bench.hub.commit("o/n", "main", ONE, vec![large("a.gguf", weights(1))]);
    // Then connections that bring nothing, for ever.
    bench.hub.state().cuts = [vec![0; 9], vec![5_000]].concat();
    let error = bench.refused("o/n");
    assert!(matches!(&error, HubError::Cut { bytes: 5_000, .. }), "{error:?}");
    assert_eq!(hint(error), "pull again: it goes on where it was cut");
    assert_eq!(bench.leftovers(), [part(&weights(1), "a.gguf")]);
    bench.hub.state().cuts.clear();
    bench.hub.take_requests();
    bench.pull("o/n").unwrap();
    let asked = bench.hub.take_requests().into_iter().filter_map(|request| request.header("range").map(str::to_owned));
    assert_eq!(asked.collect::<std::collections::BTreeSet<_>>().into_iter().collect::<Vec<_>>(), ["bytes=5000-"]);
}

#[test]
fn a_way_to_the_store_that_has_run_out_is_asked_for_anew() {
    let bench = Bench::new();
    bench.hub.commit("o/n", "main", ONE, vec![large("a.gguf", weights(1))]);
    bench.hub.state().expired = 2;
    bench.pull("o/n").unwrap();
    let to_hub = bench.hub.take_requests().iter().filter(|request| !request.to_store).count();
    assert_eq!(to_hub, 4, "a listing, and three times the way");
    bench.hub.commit("o/n", "main", TWO, vec![large("a.gguf", weights(2))]);
    bench.hub.state().expired = usize::MAX;
    let error = bench.refused("o/n");
    assert!(matches!(error, HubError::Status { status: 403, .. }), "no word of terms and tokens: {error:?}");
}

#[test]
fn another_content_than_the_hub_named_is_put_aside() {
    let bench = Bench::new();
    let mut file = large("a.gguf", weights(1));
    file.claimed_sha256 = Some(sha256(&weights(2)));
    bench.hub.commit("o/n", "main", ONE, vec![file]);
    let Err(ModelError::Corrupt { path, expected, got }) = bench.pull("o/n") else { panic!("taken") };
    assert_eq!((expected, got), (format!("sha256 {}", sha256(&weights(2))), format!("sha256 {}", sha256(&weights(1)))));
    assert_eq!(fs::read(&path).unwrap(), weights(1));
    assert_eq!(bench.models.answers_to(), [""; 0]);
    // Small files are held against git's name of them.
    let mut files =
        vec![small("config.json", "{}"), small("tokenizer.json", "{}"), large("model.safetensors", weights(3))];
    bench.hub.commit("o/d", "main", ONE, files.clone());
    bench.pull("o/d").unwrap();
    files[1].claimed_blob = Some("0".repeat(40));
    bench.hub.commit("o/d", "main", TWO, files);
    let error = bench.pull("o/d").unwrap_err();
    assert!(matches!(&error, ModelError::Corrupt { expected, .. } if expected.starts_with("git blob 0")), "{error}");
    // What is longer than the hub said is not even taken whole.
    let mut file = large("a.gguf", weights(2));
    file.claimed_bytes = Some(10);
    bench.hub.commit("o/e", "main", ONE, vec![file]);
    let error = bench.refused("o/e");
    assert!(error.to_string().contains("longer than 10 bytes"), "{error}");
}

#[test]
fn what_would_not_fit_is_not_begun() {
    let bench = Bench::new();
    let mut file = large("a.gguf", weights(1));
    file.claimed_bytes = Some(1 << 60);
    bench.hub.commit("o/n", "main", ONE, vec![file]);
    let error = bench.refused("o/n");
    assert!(matches!(error, HubError::NoRoom { need, .. } if need == 1 << 60), "{error:?}");
    assert!(hint(error).contains("BONEPILE_MODELS"));
    assert_eq!(bench.hub.take_requests().len(), 1, "the file was not asked for");
}
