//! What a pull brings, where it puts it, what it asks for, and how it goes on after a cut.

use std::fs;

use protocol::models::hub::HubConfig;
use protocol::models::{ModelError, Presence};

use crate::server::{TestFile, large, noise, sha256, small};
use crate::{Bench, ONE, TWO, fetches, part, weights};

fn directory(seed: u64) -> Vec<TestFile> {
    vec![
        small("README.md", "# a model"),
        small("config.json", r#"{"model_type":"llama"}"#),
        small("tokenizer.json", "{}"),
        small("tokenizer_config.json", r#"{"x":1}"#),
        large("model.safetensors", weights(seed)),
        large("pytorch_model.bin", noise(1000, 9)),
    ]
}

#[test]
fn a_gguf_file_is_brought_checked_and_found_by_every_name() {
    let bench = Bench::new();
    bench.hub.commit("o/n", "main", ONE, vec![small("README.md", "x"), large("q/a b#1.gguf", weights(1))]);
    let (outcome, events) = bench.pull_as(&bench.config(), "o/n");
    let model = outcome.unwrap();
    assert_eq!(events, ["found 1 apache-2.0", "1/1 q/a b#1.gguf"]);
    assert_eq!(model.path, bench.models.root().join(format!("hub/o/n/{ONE}/q/a b#1.gguf")));
    assert_eq!(fs::read(&model.path).unwrap(), weights(1));
    assert_eq!(model.fingerprint, format!("sha256:{}", sha256(&weights(1))));
    assert_eq!(model.name.to_string(), format!("o/n@{ONE}:q/a b#1.gguf"));
    assert_eq!(bench.leftovers(), [""; 0]);

    let names = bench.models.answers_to();
    let mut expected = Vec::new();
    for revision in ["", "@main", &format!("@{ONE}")] {
        expected.extend(["", ":q/a b#1.gguf"].map(|file| format!("o/n{revision}{file}")));
    }
    expected.sort();
    assert_eq!(names, expected);
    for name in &names {
        let (path, fingerprint) = bench.models.locate(name).unwrap();
        assert_eq!((&path, fingerprint.as_ref()), (&model.path, Some(&model.fingerprint)), "{name}");
    }
    assert_eq!(bench.models.present(), [model.name.to_string()]);
    assert!(matches!(bench.models.locate("o/n:other.gguf"), Err(ModelError::Missing { .. })));

    bench.hub.take_requests();
    let (outcome, events) = bench.pull_as(&bench.config(), "o/n");
    assert_eq!((outcome.unwrap(), events), (model, vec!["present".to_owned()]));
    assert_eq!(bench.hub.take_requests().len(), 1, "only where main leads is asked again");
}

#[test]
fn a_directory_is_what_the_executor_reads_and_no_more() {
    let bench = Bench::new();
    bench.hub.commit("o/n", "main", ONE, directory(1));
    let model = bench.pull("o/n").unwrap();
    assert_eq!(model.path, bench.models.root().join("hub/o/n").join(ONE));
    let mut files: Vec<_> =
        fs::read_dir(&model.path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    files.sort();
    assert_eq!(files, ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]);
    assert!(!bench.hub.take_requests().iter().any(|request| request.target.contains("pytorch")));
    // As `sha256sum config.json … | sha256sum` would have it.
    let list: String = directory(1)
        .iter()
        .filter(|file| files.contains(&file.path))
        .map(|file| (file.path.clone(), sha256(&file.content)))
        .collect::<std::collections::BTreeMap<_, _>>()
        .iter()
        .map(|(path, digest)| format!("{digest}  {path}\n"))
        .collect();
    assert_eq!(model.fingerprint, format!("sha256:{}", sha256(list.as_bytes())));
    let verified = bench.models.verify_named("o/n").unwrap();
    assert_eq!((verified.path, &verified.fingerprint), (model.path.clone(), &model.fingerprint));
    // The same directory by its path has the same fingerprint.
    let by_path = bench.models.verify_named(model.path.to_str().unwrap()).unwrap();
    assert_eq!(by_path.fingerprint, model.fingerprint);
    assert_eq!(bench.models.locate(model.path.to_str().unwrap()).unwrap(), (model.path, None));
}

#[test]
fn an_index_names_the_shards_that_are_brought() {
    let bench = Bench::new();
    let index = r#"{"metadata":{},"weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors","c":"m-1.safetensors"}}"#;
    let mut files = directory(1);
    files.retain(|file| file.path != "model.safetensors");
    files.extend([
        small("model.safetensors.index.json", index),
        large("m-1.safetensors", weights(2)),
        large("m-2.safetensors", weights(3)),
        large("m-3.safetensors", weights(4)),
    ]);
    bench.hub.commit("o/n", "main", ONE, files.clone());
    let model = bench.pull("o/n").unwrap();
    assert_eq!(fs::read(model.path.join("m-2.safetensors")).unwrap(), weights(3));
    assert!(model.path.join("model.safetensors.index.json").is_file());
    assert!(!model.path.join("m-3.safetensors").exists());
    assert_eq!(bench.models.verify_named(model.path.to_str().unwrap()).unwrap().fingerprint, model.fingerprint);

    files.retain(|file| file.path != "m-2.safetensors");
    bench.hub.commit("o/lacks", "main", ONE, files.clone());
    let said = bench.refused("o/lacks").to_string();
    assert!(said.contains("names m-2.safetensors, which is not there"), "{said}");
    files.retain(|file| file.path != "model.safetensors.index.json");
    files.push(small("model.safetensors.index.json", r#"{"weight_map":{"a":"../../x"}}"#));
    bench.hub.commit("o/evil", "main", ONE, files);
    let said = bench.refused("o/evil").to_string();
    assert!(said.contains("no plain file name"), "{said}");
}

#[test]
fn the_token_goes_to_the_hub_and_to_nobody_else() {
    let bench = Bench::new();
    bench.hub.commit("o/n", "main", ONE, vec![large("a.gguf", weights(1))]);
    bench.hub.state().gate = Some("hf_right".to_owned());
    let config = HubConfig { token: Some("hf_right".to_owned()), ..bench.config() };
    bench.pull_as(&config, "o/n").0.unwrap();
    let requests = bench.hub.take_requests();
    let (store, hub): (Vec<_>, Vec<_>) = requests.iter().partition(|request| request.to_store);
    assert_eq!((hub.len(), store.len()), (2, 1), "a listing, a redirect, the file");
    assert!(hub.iter().all(|request| request.header("authorization") == Some("Bearer hf_right")), "{hub:?}");
    assert!(store.iter().all(|request| request.header("authorization").is_none()), "{store:?}");
}

#[test]
fn a_cut_file_goes_on_where_it_was_cut() {
    let bench = Bench::new();
    bench.hub.commit("o/n", "main", ONE, vec![large("a.gguf", weights(1))]);
    bench.hub.state().cuts = vec![7_000, 100_000];
    let (outcome, events) = bench.pull_as(&bench.config(), "o/n");
    assert_eq!(fs::read(outcome.unwrap().path).unwrap(), weights(1));
    let ranges: Vec<_> = fetches(&bench.hub).into_iter().map(|fetch| fetch.1).collect();
    assert_eq!(ranges, [None, Some("bytes=100000-".to_owned()), Some("bytes=107000-".to_owned())]);
    assert_eq!(
        events,
        ["found 1 apache-2.0", "1/1 a.gguf", "again a.gguf", "1/1 a.gguf", "again a.gguf", "1/1 a.gguf"]
    );
}

#[test]
fn the_next_pull_goes_on_with_what_came() {
    let bench = Bench::new();
    bench.hub.commit("o/n", "main", ONE, directory(1));
    bench.hub.state().dead_store = true;
    let said = bench.refused("o/n").to_string();
    assert!(said.contains("does not answer"), "{said}");
    assert!(matches!(bench.models.locate("o/n"), Err(ModelError::Missing { .. })), "half a model is none");
    bench.hub.state().dead_store = false;
    bench.hub.take_requests();
    let model = bench.pull("o/n").unwrap();
    assert_eq!(fs::read(model.path.join("model.safetensors")).unwrap(), weights(1));
    let asked: Vec<_> = bench.hub.take_requests().into_iter().map(|request| request.target).collect();
    assert_eq!(asked.len(), 3, "a listing, a redirect, the weights: {asked:?}");
}

#[test]
fn a_pull_that_was_killed_leaves_a_part_that_the_next_one_uses() {
    let bench = Bench::new();
    bench.hub.commit("o/n", "main", ONE, vec![large("a.gguf", weights(1))]);
    let parts = bench.models.root().join("hub/.parts");
    fs::create_dir_all(&parts).unwrap();
    let half = parts.join(part(&weights(1), "a.gguf"));
    fs::write(&half, &weights(1)[..5_000]).unwrap();
    bench.pull("o/n").unwrap();
    assert_eq!(fetches(&bench.hub), [("a.gguf".to_owned(), Some("bytes=5000-".to_owned()))]);

    // One that was killed when all had come asks for nothing more, and the same content serves another commit.
    bench.hub.commit("o/n", "main", TWO, vec![large("a.gguf", weights(2))]);
    fs::write(parts.join(part(&weights(2), "a.gguf")), weights(2)).unwrap();
    let model = bench.pull("o/n").unwrap();
    assert_eq!(fs::read(model.path).unwrap(), weights(2));
    assert_eq!(fetches(&bench.hub), []);
    assert_eq!(bench.leftovers(), [""; 0]);
}

#[test]
fn a_server_without_ranges_is_taken_from_the_beginning() {
    let bench = Bench::new();
    bench.hub.commit("o/n", "main", ONE, vec![large("a.gguf", weights(1))]);
    bench.hub.state().cuts = vec![100_000];
    bench.hub.state().ignore_ranges = true;
    assert_eq!(fs::read(bench.pull("o/n").unwrap().path).unwrap(), weights(1));
}

#[test]
fn a_hub_that_tells_no_digests_in_its_listing_tells_them_on_the_way() {
    let bench = Bench::new();
    let mut file = large("a.gguf", weights(1));
    bench.hub.commit("o/n", "main", ONE, vec![file.clone()]);
    bench.hub.state().terse = true;
    bench.hub.state().cuts = vec![100_000];
    assert_eq!(fs::read(bench.pull("o/n").unwrap().path).unwrap(), weights(1));
    file.claimed_sha256 = Some("0".repeat(64));
    bench.hub.commit("o/n", "main", TWO, vec![file]);
    assert!(matches!(bench.pull("o/n"), Err(ModelError::Corrupt { .. })));
}

#[test]
fn revisions_lead_to_commits_and_the_newest_pull_is_meant() {
    let bench = Bench::new();
    let file = |seed| vec![large("a.gguf", weights(seed))];
    bench.hub.commit("o/n", "main", ONE, file(1));
    let one = bench.pull("o/n").unwrap().path;
    bench.hub.commit("o/n", "main", TWO, file(2));
    bench.hub.commit("o/n", "refs/pr/1", ONE, file(1));
    assert_eq!(bench.located("o/n"), one, "nothing new was pulled");
    let two = bench.pull("o/n").unwrap().path;
    assert_ne!(one, two);
    let commit = |commit: &str| format!("o/n@{commit}");
    for (name, path) in [("o/n", &two), ("o/n@main", &two), (&commit(ONE), &one), (&commit(TWO), &two)] {
        assert_eq!(bench.located(name), *path, "{name}");
    }
    bench.hub.take_requests();
    assert_eq!(bench.pull("o/n@refs/pr/1").unwrap().path, one);
    let asked = bench.hub.take_requests();
    assert_eq!(asked[0].target, "/api/models/o/n/revision/refs%2Fpr%2F1?blobs=true");
    assert_eq!(asked.len(), 1, "its files are here");
    assert_eq!(
        (bench.located("o/n"), bench.located("o/n@main"), bench.located("o/n@refs/pr/1")),
        (one.clone(), two, one)
    );
}

#[test]
fn a_whole_commit_that_is_here_needs_no_hub() {
    let bench = Bench::new();
    bench.hub.commit("o/n", "main", ONE, vec![large("a.gguf", weights(1))]);
    let name = format!("o/n@{ONE}");
    let pulled = bench.pull(&name).unwrap();
    assert_eq!(pulled.revisions, [""; 0], "no branch was asked for");
    bench.hub.take_requests();
    let nowhere = HubConfig { retry_wait: std::time::Duration::ZERO, ..HubConfig::at("http://127.0.0.1:1") };
    assert_eq!(bench.pull_as(&nowhere, &name).0.unwrap(), pulled);
    assert!(bench.pull_as(&nowhere, "o/n").0.is_err());
}

#[test]
fn a_directory_and_a_file_of_one_commit_are_two_models() {
    let bench = Bench::new();
    let mut files = directory(1);
    files.push(large("a.gguf", weights(2)));
    bench.hub.commit("o/n", "main", ONE, files);
    let of_file = bench.pull("o/n:a.gguf").unwrap();
    let of_directory = bench.pull(&format!("o/n@{ONE}")).unwrap();
    assert!(of_directory.path.is_dir() && of_file.path.is_file());
    assert_eq!(bench.located("o/n"), of_directory.path, "the newest pull");
    assert_eq!(bench.pull("o/n:a.gguf").unwrap(), of_file);
    assert_eq!(bench.located("o/n"), of_file.path);
    let again = bench.pull("o/n").unwrap();
    assert_eq!((&again.path, &again.fingerprint), (&of_directory.path, &of_directory.fingerprint));
    assert_eq!(bench.models.verify_named("o/n").unwrap().fingerprint, again.fingerprint);
    assert_eq!(bench.models.from_hub().len(), 2);
}

#[test]
fn damage_is_found_and_repaired() {
    let bench = Bench::new();
    bench.hub.commit("o/n", "main", ONE, directory(1));
    let model = bench.pull("o/n").unwrap();
    let file = model.path.join("model.safetensors");
    let mut content = weights(1);
    content[1000] ^= 1;
    fs::write(&file, &content).unwrap();
    assert_eq!(model.presence(), Presence::Present, "lengths say nothing about bits");
    let error = bench.models.verify_named("o/n").unwrap_err();
    assert!(matches!(&error, ModelError::Corrupt { path, .. } if *path == file), "{error}");
    fs::write(&file, "short").unwrap();
    assert!(matches!(bench.models.locate("o/n"), Err(ModelError::Corrupt { .. })));
    assert_eq!(bench.models.answers_to(), [""; 0]);
    let (outcome, events) = bench.pull_as(&bench.config(), "o/n");
    outcome.unwrap();
    assert_eq!(fs::read(&file).unwrap(), weights(1));
    assert!(events.contains(&"kept config.json".to_owned()), "{events:?}");
    fs::remove_file(&file).unwrap();
    let error = bench.models.locate("o/n").unwrap_err();
    assert!(matches!(error, ModelError::Missing { .. }), "{error}");
    assert!(error.hint().unwrap().starts_with("bring it with `bonepile models pull o/n"), "{:?}", error.hint());
}

#[test]
fn a_record_that_leads_elsewhere_counts_as_none() {
    let bench = Bench::new();
    bench.hub.commit("o/n", "main", ONE, vec![large("a.gguf", weights(1))]);
    bench.pull("o/n").unwrap();
    let record = bench.models.root().join("hub/o/n/pulled.json");
    let text = fs::read_to_string(&record).unwrap();
    fs::write(bench.directory.path().join("secret.gguf"), weights(1)).unwrap();
    for evil in [text.replace("a.gguf", "../../../../../secret.gguf"), text.replace(ONE, ".."), "{".to_owned()] {
        fs::write(&record, evil).unwrap();
        assert!(matches!(bench.models.locate("o/n"), Err(ModelError::Missing { .. })));
        assert_eq!(bench.models.answers_to(), [""; 0]);
    }
    bench.pull("o/n").unwrap();
    bench.located("o/n");
}
