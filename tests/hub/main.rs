//! Models from a hub, against a small one on loopback: what is brought, what is asked, what is said when it goes wrong.
//!
//! No test leaves this machine, and none reads or changes the process's environment.

#![allow(clippy::unwrap_used, reason = "tests panic")]

mod pulling;
mod refusals;
mod server;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use protocol::models::hub::{HubConfig, HubError, HubEvent};
use protocol::models::{HubModel, ModelError, ModelsDir};

use crate::server::{TestHub, noise, sha256};

/// Names of commits.
const ONE: &str = "1111111111111111111111111111111111111111";
const TWO: &str = "2222222222222222222222222222222222222222";

/// A hub and a models directory.
struct Bench {
    hub: TestHub,
    directory: tempfile::TempDir,
    models: ModelsDir,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let models = ModelsDir::at(directory.path().join("models"));
        Self { hub: TestHub::start(), directory, models }
    }

    fn config(&self) -> HubConfig {
        HubConfig { retry_wait: Duration::ZERO, ..HubConfig::at(&self.hub.endpoint()) }
    }

    fn pull(&self, name: &str) -> Result<HubModel, ModelError> {
        self.pull_as(&self.config(), name).0
    }

    /// Also tells what was told on the way, a line a file.
    fn pull_as(&self, config: &HubConfig, name: &str) -> (Result<HubModel, ModelError>, Vec<String>) {
        let mut events: Vec<String> = Vec::new();
        let outcome = self.models.pull_hub(config, &name.parse().unwrap(), &mut |event| {
            let text = match event {
                HubEvent::Found { licence, files, .. } => format!("found {files} {}", licence.unwrap_or("-")),
                HubEvent::Present => "present".to_owned(),
                HubEvent::Kept { file, .. } => format!("kept {file}"),
                HubEvent::Fetching { index, count, file, .. } => format!("{index}/{count} {file}"),
                HubEvent::Again { file, .. } => format!("again {file}"),
            };
            if events.last() != Some(&text) {
                events.push(text);
            }
        });
        (outcome, events)
    }

    fn refused(&self, name: &str) -> HubError {
        match self.pull(name) {
            Err(ModelError::Hub(error)) => error,
            other => panic!("{other:?}"),
        }
    }

    fn located(&self, name: &str) -> PathBuf {
        self.models.locate(name).unwrap_or_else(|error| panic!("{name}: {error}")).0
    }

    /// Where part files and damaged ones lie, by name.
    fn leftovers(&self) -> Vec<String> {
        let entries = fs::read_dir(self.models.root().join("hub/.parts")).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name != ".lock");
        names.sort();
        names
    }
}

/// Requests for a file's bytes: the address's last part and the range.
fn fetches(hub: &TestHub) -> Vec<(String, Option<String>)> {
    let requests = hub.take_requests().into_iter().filter(|request| request.to_store);
    requests
        .map(|request| {
            let file = request.target.rsplit('/').next().unwrap_or_default().to_owned();
            (file, request.header("range").map(str::to_owned))
        })
        .collect()
}

/// Name of the part file of `content` that is to become `path`.
fn part(content: &[u8], path: &str) -> String {
    format!("{}-{}.part", sha256(content), &sha256(path.as_bytes())[..8])
}

/// Weights of a model that nobody runs.
fn weights(seed: u64) -> Vec<u8> {
    noise(300_000, seed)
}
