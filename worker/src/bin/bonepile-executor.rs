//! The executor's binary: a child process of the agent, speaking frames on stdin and stdout; or one model by hand.

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use worker::executor::{failure::chain, serve};
use worker::support::BuildSupport;
use worker::tool::measure::measure;
use worker::tool::{ModelCommand, ProjectorCommand};

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
    /// A projector between two models by hand, without a cluster.
    #[command(subcommand)]
    Projector(ProjectorCommand),
    /// What this build's device does with f32 products and with its memory; takes about a second.
    Measure {
        /// One JSON document.
        #[arg(long)]
        json: bool,
    },
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
        Some(Command::Projector(command)) => return command.run_to_exit(),
        Some(Command::Support { json }) => return say(&BuildSupport::this(), &BuildSupport::this().to_string(), json),
        Some(Command::Measure { json }) => return measured(cli.threads, json),
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

fn measured(threads: Option<usize>, json: bool) -> ExitCode {
    let threads = threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get));
    match measure(threads) {
        Ok(speed) => {
            let (products, bytes) = (speed.f32_mflops as f64 / 1e3, speed.memory_bytes_per_second as f64 / 1e9);
            say(&speed, &format!("{products:.1} GFLOP/s in f32, {bytes:.1} GB/s of memory"), json)
        }
        Err(error) => {
            tracing::error!(error = chain(&error), "could not measure");
            ExitCode::FAILURE
        }
    }
}

/// Prints on stdout; a reader that goes away is no failure of ours, but what it wanted did not arrive.
fn say(data: &impl serde::Serialize, text: &str, json: bool) -> ExitCode {
    let text = if json { serde_json::to_string(data).expect("plain data") } else { text.to_owned() };
    match writeln!(std::io::stdout(), "{text}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
