//! The executor's binary: a child process of the agent, speaking frames on stdin and stdout; or one model by hand.

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use worker::executor::{failure::chain, serve};
use worker::support::BuildSupport;
use worker::tool::ModelCommand;

/// Computes shards for an agent. Started by `bonepile-worker`; without a subcommand not meant for a terminal.
#[derive(Debug, Parser)]
#[command(version = protocol::BUILD)]
struct Cli {
    /// Compute threads [default: all cores].
    #[arg(long, env = "BONEPILE_THREADS", value_name = "N")]
    threads: Option<usize>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// One model by hand, without a cluster.
    #[command(subcommand)]
    Model(Box<ModelCommand>),
    /// What this build can compute on: devices, and what their kernels were compiled for.
    Support {
        /// One JSON document.
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    leave_the_cores_to_the_team();
    let cli = Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    match cli.command {
        Some(Command::Model(command)) => return command.run_to_exit(),
        Some(Command::Support { json }) => return say(&BuildSupport::this(), json),
        None => {}
    }
    match serve(cli.threads, std::io::stdin(), std::io::stdout()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = chain(&error), "the executor ends");
            ExitCode::FAILURE
        }
    }
}

/// candle's own pool pins its threads and spins without giving way: beside the team's, on the same cores, both crawl. Its
/// elementwise loops stay on the thread that calls them, unless the environment says otherwise.
#[expect(unsafe_code, reason = "candle takes this number from the environment only")]
fn leave_the_cores_to_the_team() {
    const THREADS: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(THREADS).is_none() {
        // SAFETY: first in main: this process has no other thread yet.
        unsafe { std::env::set_var(THREADS, "1") };
    }
}

/// Prints on stdout; a reader that goes away is no failure of ours, but what it wanted did not arrive.
fn say(support: &BuildSupport, json: bool) -> ExitCode {
    let text = if json { serde_json::to_string(support).expect("plain data") } else { support.to_string() };
    match writeln!(std::io::stdout(), "{text}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
