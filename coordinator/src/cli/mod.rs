//! The command line: arguments as typed, then resolved; each command in a file; words through one [`output::Output`].
//!
//! Decides nothing about the cluster: it asks the coordinator over its unix socket, and works on files only where no
//! coordinator is needed (`init`, `store`, `models`, `sim`).

pub mod args;
pub mod client;
pub mod context;
pub mod exit;
pub mod failure;
pub mod fit;
pub mod init;
pub mod logs;
pub mod models;
pub mod operate;
pub mod output;
pub mod planning;
pub mod progress;
mod projectors;
pub mod research;
pub mod results;
pub mod serve;
pub mod sim;
pub mod store;
pub mod table;
pub mod text;
pub mod watch;

use std::future::Future;
use std::process::ExitCode;

use clap::Parser;

use self::args::{Cli, Command};
use self::context::{BROKEN_PIPE, Context, Outcome};
use self::failure::Failure;
use self::output::{Human, Json, Output};
use crate::api::route;

/// Reads the command line, runs the command, says how it went.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let output: Box<dyn Output> =
        if cli.json { Box::new(Json { quiet: cli.quiet }) } else { Box::new(Human { quiet: cli.quiet }) };
    let mut context = Context { output, config: cli.config };
    match run(&mut context, cli.command) {
        Ok(code) => ExitCode::from(code),
        Err(failure) if failure.code == BROKEN_PIPE => ExitCode::from(exit::OK),
        Err(failure) => {
            // If not even this can be written, the code still tells.
            let _ = context.output.failure(&failure);
            ExitCode::from(failure.exit)
        }
    }
}

fn run(context: &mut Context, command: Command) -> Outcome {
    match command {
        Command::Init(args) => init::run(context, &args),
        Command::Serve => serve::run(context),
        Command::Store(command) => store::run(context, &command),
        Command::Models(command) => models::run(context, &command),
        Command::Fit(args) => wait(fit::run(context, &args)),
        Command::Sim(args) => sim::run(context, &args),
        Command::Demo(args) => wait(crate::demo::run(context, &args)),
        asking => wait(ask(context, asking)),
    }
}

/// Commands that ask the coordinator.
async fn ask(context: &mut Context, command: Command) -> Outcome {
    match command {
        Command::Token(command) => operate::token(context, &command).await,
        Command::Workers(args) if args.throughput => planning::throughput(context).await,
        Command::Workers(_) => operate::workers(context).await,
        Command::Release(args) => planning::release(context, &args).await,
        Command::Plan(args) => planning::plan(context, &args).await,
        Command::Simulate(args) => planning::simulate(context, &args).await,
        Command::Drain(args) => operate::order_worker(context, &args, route::drain).await,
        Command::Undrain(args) => operate::order_worker(context, &args, route::undrain).await,
        Command::Revoke(args) => operate::order_worker(context, &args, route::revoke_worker).await,
        Command::Submit(args) => research::submit(context, &args).await,
        Command::Runs(args) => research::runs(context, &args).await,
        Command::Watch(args) => watch::run(context, &args).await,
        Command::Explain(args) => research::explain(context, &args).await,
        Command::Logs(args) => logs::run(context, &args).await,
        Command::Results(args) => results::results(context, &args).await,
        Command::Report(args) => results::report(context, &args).await,
        Command::Cancel(args) => research::cancel(context, &args).await,
        Command::Retry(args) => research::retry(context, &args).await,
        Command::Init(_)
        | Command::Serve
        | Command::Store(_)
        | Command::Models(_)
        | Command::Fit(_)
        | Command::Sim(_)
        | Command::Demo(_) => {
            unreachable!("these do not ask the coordinator")
        }
    }
}

/// One thread is enough to ask.
fn wait(command: impl Future<Output = Outcome>) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| Failure::failed("io", format!("failed to start: {error}")))?.block_on(command)
}
