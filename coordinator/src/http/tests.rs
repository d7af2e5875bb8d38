//! A whole coordinator on a temporary directory, asked over its socket.

use std::path::Path;

use protocol::config::ClusterConfig;
use protocol::identity::JoinToken;
use protocol::store::Store;
use protocol::time::UnixMillis;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::authority::Authority;
use crate::serve::{Coordinator, ServeError};

fn cluster(directory: &Path) -> ClusterConfig {
    let text = "[cluster]\nname = \"lab\"\n[coordinator]\nlisten = \"127.0.0.1:0\"\n";
    let config = ClusterConfig::parse("cluster.toml", directory, text).unwrap();
    Authority::create(&config.state_dir, &config.name, &[], crate::clock::system()).unwrap();
    Store::init(&config.store_path, UnixMillis(1)).unwrap();
    config
}

/// One request on a connection of its own: status and body.
async fn ask(config: &ClusterConfig, method: &str, route: &str, body: &str) -> (u16, Value) {
    let mut stream = UnixStream::connect(&config.api_socket).await.unwrap();
    let length = body.len();
    let request = format!(
        "{method} {route} HTTP/1.1\r\nhost: bonepile\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    (status, serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {body}")))
}

const SWEEP: &str = "name = \"first\"\n[[experiment]]\nkind = \"inspect\"\nmodel = \"gemma-3-270m\"\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runs_are_submitted_shown_explained_and_cancelled() {
    let directory = tempfile::tempdir().unwrap();
    let config = cluster(directory.path());
    let coordinator = Coordinator::start(&config).await.unwrap();
    let (status, info) = ask(&config, "GET", "/v1/cluster", "").await;
    assert_eq!((status, &info["name"]), (200, &json!("lab")));
    assert_eq!(info["listen"], json!(coordinator.listen().to_string()));

    let submission = json!({"file": "first.toml", "text": SWEEP}).to_string();
    let (status, answer) = ask(&config, "POST", "/v1/runs", &submission).await;
    assert_eq!((status, answer), (200, json!({"run": "r1", "shards": 1})));
    let (_, run) = ask(&config, "GET", "/v1/runs/r1", "").await;
    assert_eq!(run["sweep"], json!(SWEEP));
    let (_, explained) = ask(&config, "GET", "/v1/shards/r1.0/explain", "").await;
    let sentence = explained["sentence"].as_str().unwrap();
    assert!(sentence.contains("needs 1.6 GB on a device with gemma-3-270m"), "{sentence}");
    let (_, log) = ask(&config, "GET", "/v1/shards/r1.0/log?offset=0", "").await;
    assert_eq!((&log["note"], &log["ended"], &log["text"]), (&json!("waits to be placed"), &json!(false), &json!("")));
    for (route, refused) in [("r1.0/log?offset=-1", 400), ("r1.0/log?from=1", 400), ("r1.7/log", 404)] {
        let (status, _) = ask(&config, "GET", &format!("/v1/shards/{route}"), "").await;
        assert_eq!(status, refused, "{route}");
    }
    let (_, results) = ask(&config, "GET", "/v1/runs/r1/results", "").await;
    assert_eq!(results["shards"], json!([]));
    let (status, _) = ask(&config, "POST", "/v1/runs/r1/cancel", "{\"reason\":\"a test\"}").await;
    assert_eq!(status, 200);
    let (status, again) = ask(&config, "POST", "/v1/runs/r1/cancel", "{\"reason\":\"\"}").await;
    assert_eq!((status, &again["message"]), (409, &json!("run r1 is cancelled")));
    coordinator.stop().await;
    assert!(!config.api_socket.exists());

    let coordinator = Coordinator::start(&config).await.unwrap();
    let (_, runs) = ask(&config, "GET", "/v1/runs", "").await;
    assert_eq!((&runs[0]["state"], &runs[0]["note"]), (&json!("cancelled"), &json!("cancelled: a test")));
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_wrong_is_an_error_with_a_code() {
    let directory = tempfile::tempdir().unwrap();
    let config = cluster(directory.path());
    let coordinator = Coordinator::start(&config).await.unwrap();
    let broken = json!({"file": "first.toml", "text": SWEEP.replace("model", "modle")}).to_string();
    let (status, error) = ask(&config, "POST", "/v1/runs", &broken).await;
    assert_eq!((status, &error["code"]), (422, &json!("bad-sweep")));
    assert_eq!(error["source_error"]["file"], json!("first.toml"));
    let (_, runs) = ask(&config, "GET", "/v1/runs", "").await;
    assert_eq!(runs, json!([]), "nothing half-accepted");

    let cases = [
        ("GET", "/v1/runs/r7", "", 404, "not-found"),
        ("GET", "/v1/runs/seven", "", 400, "bad-request"),
        ("GET", "/v1/nothing", "", 404, "not-found"),
        ("POST", "/v1/cluster", "", 404, "not-found"),
        ("POST", "/v1/runs", "{", 400, "bad-request"),
        ("POST", "/v1/runs", "", 400, "bad-request"),
        ("POST", "/v1/workers/w3/drain", "", 404, "not-found"),
        ("POST", "/v1/tokens", "{\"ttl_ms\":5,\"uses\":0}", 400, "bad-request"),
    ];
    for (method, route, body, status, code) in cases {
        let (got, error) = ask(&config, method, route, body).await;
        assert_eq!((got, &error["code"]), (status, &json!(code)), "{method} {route} {body}: {error}");
    }
    let large = " ".repeat(super::BODY_BYTES_MAX + 1);
    let (status, error) = ask(&config, "POST", "/v1/runs", &large).await;
    assert_eq!((status, &error["code"]), (413, &json!("too-large")));
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_shown_once_and_its_secret_is_not_in_the_journal() {
    let directory = tempfile::tempdir().unwrap();
    let config = cluster(directory.path());
    let coordinator = Coordinator::start(&config).await.unwrap();
    let (_, created) = ask(&config, "POST", "/v1/tokens", "{\"ttl_ms\":0,\"uses\":2}").await;
    let token: JoinToken = created["token"].as_str().unwrap().parse().unwrap();
    assert_eq!(token.coordinators, [coordinator.listen().to_string()]);
    assert_eq!(token.token.to_string(), created["id"].as_str().unwrap());
    let (_, revoked) = ask(&config, "POST", "/v1/tokens/t1/revoke", "").await;
    assert_eq!(revoked["state"], json!("revoked"));
    coordinator.stop().await;
    for file in ["journal.db", "journal.db-wal"] {
        let bytes = std::fs::read(config.state_dir.join(file)).unwrap_or_default();
        let secret = protocol::ids::hex(&token.secret.0);
        let held = |needle: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
        assert!(!held(secret.as_bytes()) && !held(&token.secret.0), "{file} has the secret");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_coordinator_and_a_lost_journal_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let config = cluster(directory.path());
    let coordinator = Coordinator::start(&config).await.unwrap();
    let refused = Coordinator::start(&config).await.unwrap_err();
    assert!(refused.to_string().ends_with("is in use by another coordinator"), "{refused}");
    assert!(!refused.is_journal_damage());
    coordinator.stop().await;

    std::fs::create_dir(config.store_path.join("manifests/r1")).unwrap();
    std::fs::remove_file(config.state_dir.join("journal.db")).unwrap();
    let refused = Coordinator::start(&config).await.unwrap_err();
    assert!(matches!(refused, ServeError::JournalLost { .. }), "{refused}");

    std::fs::write(config.state_dir.join("journal.db"), vec![7; 8192]).unwrap();
    let refused = Coordinator::start(&config).await.unwrap_err();
    assert!(refused.is_journal_damage(), "{refused}");
}
