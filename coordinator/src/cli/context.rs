//! The command line resolved: where things are, and how to say things. Reads cluster.toml when a command first needs it.

use std::fs;
use std::path::{Path, PathBuf};

use protocol::config::ClusterConfig;

use super::client::Client;
use super::failure::Failure;
use super::output::{Document, Output};

/// What every command gets.
pub struct Context {
    /// Where words go.
    pub output: Box<dyn Output>,
    /// cluster.toml, as given.
    pub config: PathBuf,
}

/// A command's exit code.
pub type Outcome = Result<u8, Failure>;

impl Context {
    /// The cluster's settings.
    ///
    /// # Errors
    /// Exit code 2 if the file is missing or wrong.
    pub fn cluster(&self) -> Result<ClusterConfig, Failure> {
        read_config(&self.config)
    }

    /// The coordinator.
    ///
    /// # Errors
    /// As [`Context::cluster`].
    pub fn client(&self) -> Result<Client, Failure> {
        Ok(Client::new(&self.cluster()?.api_socket))
    }

    /// Shows the command's answer.
    ///
    /// # Errors
    /// If stdout cannot be written; see [`stdout_failure`].
    pub fn show(&mut self, document: &Document) -> Result<(), Failure> {
        self.output.document(document).map_err(|error| stdout_failure(&error))
    }

    /// Shows an element of a stream.
    ///
    /// # Errors
    /// As [`Context::show`].
    pub fn show_element(&mut self, document: &Document) -> Result<(), Failure> {
        self.output.element(document).map_err(|error| stdout_failure(&error))
    }
}

/// Code of the failure that is none: whoever read our output has gone.
pub const BROKEN_PIPE: &str = "broken-pipe";

/// What a failure to write to stdout means.
pub fn stdout_failure(error: &std::io::Error) -> Failure {
    match error.kind() {
        std::io::ErrorKind::BrokenPipe => {
            Failure { exit: super::exit::OK, ..Failure::failed(BROKEN_PIPE, "broken pipe") }
        }
        _ => Failure::failed("io", format!("failed to write to stdout: {error}")),
    }
}

/// Reads a cluster.toml.
///
/// # Errors
/// Exit code 2 if the file is missing or wrong.
pub fn read_config(path: &Path) -> Result<ClusterConfig, Failure> {
    let text = fs::read_to_string(path).map_err(|error| {
        Failure::usage("no-config", format!("failed to read {}: {error}", path.display()))
            .hint("make a cluster with `bonepile init`, or name its cluster.toml with --config or BONEPILE_CONFIG")
    })?;
    let absolute = std::path::absolute(path).map_err(|error| Failure::file("resolve", path, &error))?;
    let directory = absolute.parent().unwrap_or(Path::new("/"));
    ClusterConfig::parse(&path.display().to_string(), directory, &text)
        .map_err(|error| Failure::in_source("bad-config", &error, &text))
}
