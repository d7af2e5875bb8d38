//! `bonepile serve`: the log's set-up and the coordinator until someone ends it.
//!
//! The log goes to stderr, a line an event, as `BONEPILE_LOG` says (default `info`).

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use super::context::{Context, Outcome};
use super::exit;
use super::failure::Failure;
use crate::serve::{self, ServeError};

/// Environment variable with the log's filter: `info`, `debug`, `coordinator::driver=trace`.
pub const LOG_VARIABLE: &str = "BONEPILE_LOG";

/// Runs the command.
///
/// # Errors
/// If the coordinator cannot start; exit code 5 if its journal is to blame.
pub fn run(context: &Context) -> Outcome {
    let config = context.cluster()?;
    let filter = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::failed("io", format!("failed to start: {error}")))?;
    let outcome = runtime.block_on(serve::run(&config));
    // A hanging store may hold a thread; the journal is closed by now.
    runtime.shutdown_background();
    outcome.map(|()| exit::OK).map_err(|error| failure(&error))
}

fn failure(error: &ServeError) -> Failure {
    let failed = match error {
        error if error.is_journal_damage() => Failure { exit: exit::JOURNAL, ..Failure::because("journal", error) },
        ServeError::Authority(_) | ServeError::OtherCluster { .. } => {
            Failure { exit: exit::USAGE, ..Failure::because("authority", error) }
        }
        _ => Failure::because("serve", error),
    };
    Failure { hint: error.hint(), ..failed }
}
