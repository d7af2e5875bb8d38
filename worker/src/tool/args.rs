//! The command line of the tool, and from a model's name to its file.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::{Args, Subcommand, ValueEnum};
use protocol::models::ModelsDir;

use crate::cache::CacheError;
use crate::model::loaded::PASS_TOKENS_MAX;
use crate::model::{CachePrecision, DeviceChoice, LoadOptions, Model, ModelError, Place, Precision, SamplingError};
use crate::support::ElementType;

/// `model …`.
#[derive(Debug, Subcommand)]
pub enum ModelCommand {
    /// Show architecture, tensors, cache bytes a token and memory by phase.
    Show(ShowArgs),
    /// Print the sizes on which memory depends, from headers alone.
    Shape(ShapeArgs),
    /// Run prompts: text, timing, top logits; save or load the cache.
    Run(RunArgs),
    /// Measure prefill, decode and peak memory.
    Bench(BenchArgs),
}

/// Which model, and how it is held.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// A GGUF file, a directory with config.json, or a model's name as in sweeps.
    pub model: String,
    /// Models directory [default: `$BONEPILE_MODELS`, else the user's cache].
    #[arg(long, value_name = "DIR")]
    pub models: Option<PathBuf>,
    /// How weights are held and multiplied.
    #[arg(long, value_enum, default_value_t = PrecisionArg::Stored)]
    pub precision: PrecisionArg,
    /// How a running sequence holds keys and values.
    #[arg(long, value_enum, default_value_t = KvArg::F32)]
    pub kv: KvArg,
    /// Compute threads [default: all cores].
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// `cpu` or `cuda:0` [default: the first card, if the build is one for cards].
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<DeviceChoice>,
    /// What a card holds weights, keys and values in: f32, f16 or bf16.
    #[arg(long, value_name = "TYPE", default_value_t = ElementType::F32)]
    pub elements: ElementType,
}

/// [`Precision`] as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PrecisionArg {
    /// Dequantised to f32: the reference.
    F32,
    /// As in the file: faster, a fraction of the memory.
    Stored,
}

/// [`CachePrecision`] as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KvArg {
    /// As computed.
    F32,
    /// Rounded to halves: half the memory. With `--precision stored` only.
    F16,
}

/// `model show`.
#[derive(Debug, Args)]
pub struct ShowArgs {
    /// Which.
    #[command(flatten)]
    pub model: ModelArgs,
    /// List every tensor.
    #[arg(long)]
    pub tensors: bool,
    /// Tokens of the sequence that memory is computed for.
    #[arg(long, default_value_t = 1024, value_name = "N")]
    pub context: usize,
    /// One JSON document.
    #[arg(long)]
    pub json: bool,
}

/// `model shape`.
#[derive(Debug, Args)]
pub struct ShapeArgs {
    /// A GGUF file, or a directory with config.json.
    pub path: PathBuf,
    /// One JSON document.
    #[arg(long)]
    pub json: bool,
}

/// `model run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Which.
    #[command(flatten)]
    pub model: ModelArgs,
    /// The prompt; given several times, the prompts run as one batch.
    #[arg(long, required_unless_present_any = ["ids", "batch"], conflicts_with_all = ["ids", "batch"])]
    pub text: Vec<String>,
    /// Prompts that run as one batch: a file with one a line; empty lines are skipped.
    #[arg(long, value_name = "FILE", conflicts_with = "ids")]
    pub batch: Option<PathBuf>,
    /// The prompt as token ids.
    #[arg(long, value_delimiter = ',')]
    pub ids: Option<Vec<u32>>,
    /// Put the text into the model's chat template, as the user's turn.
    #[arg(long, conflicts_with = "ids")]
    pub chat: bool,
    /// Tokens to generate at most, of each prompt.
    #[arg(long, default_value_t = 32, value_name = "N")]
    pub tokens: usize,
    /// 0: always the likeliest token. Above: sampled.
    #[arg(long, default_value_t = 0.0, value_name = "T", allow_negative_numbers = true)]
    pub temperature: f64,
    /// Sample from this many of the likeliest tokens.
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Sample from the likeliest tokens that hold this much probability, above 0 and at most 1.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f64>,
    /// Seed of the sampling: the same seed gives the same text. The second prompt's is one more, and so on.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Save cache, hidden states and logits of the one prompt: safetensors, names in `docs/model.md`.
    #[arg(long, value_name = "FILE")]
    pub save: Option<PathBuf>,
    /// Begin from a packet: every prompt goes on after what it holds.
    #[arg(long, value_name = "FILE")]
    pub cache: Option<PathBuf>,
    /// One JSON document.
    #[arg(long)]
    pub json: bool,
}

/// `model bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Which.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Tokens of the prompt.
    #[arg(long, default_value_t = 512, value_name = "N")]
    pub prompt: usize,
    /// Tokens decoded.
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub decode: usize,
    /// Also time a training step over these samples: forward behind an injected cache, next-token loss, backward to the cache.
    /// Each is PREFIX+TOKENS, tokens of the cache and behind it.
    #[arg(long, value_delimiter = ',', value_name = "PREFIX+TOKENS,...")]
    pub step: Vec<Sample>,
    /// The step computes the activations of layers again on the way back instead of holding them.
    #[arg(long, requires = "step")]
    pub checkpointing: bool,
    /// Repetitions; the median is reported.
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub runs: usize,
}

/// A sample of a training step.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// Tokens of the cache that is injected, at least 1.
    pub prefix: usize,
    /// Tokens behind it, at least 1.
    pub tokens: usize,
}

impl FromStr for Sample {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let length = |text: &str| text.parse().ok().filter(|length| (1..=PASS_TOKENS_MAX).contains(length));
        let parts = text.split_once('+').and_then(|(prefix, tokens)| Some((length(prefix)?, length(tokens)?)));
        let (prefix, tokens) = parts.ok_or_else(|| format!("`{text}` is not two numbers of tokens such as 32+16"))?;
        Ok(Self { prefix, tokens })
    }
}

/// The tool could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// The model is not there, or not as it should be.
    #[error(transparent)]
    Find(#[from] protocol::models::ModelError),
    /// The model could not be loaded or run.
    #[error("cannot load or run the model")]
    Model(#[from] ModelError),
    /// A cache does not fit or is damaged.
    #[error("cannot use the cache {}", path.display())]
    Cache {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: CacheError,
    },
    /// A tensor could not be made or written.
    #[error("cannot write {}", path.display())]
    Save {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The file of prompts could not be read.
    #[error("cannot read {}", path.display())]
    Prompts {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Temperature, top-k or top-p choose nothing.
    #[error("cannot sample with {0}")]
    Sampling(#[from] SamplingError),
    /// A procedure failed.
    #[error("cannot do the experiment")]
    Experiment(#[from] crate::experiment::ExperimentError),
    /// stdout could not be written.
    #[error("cannot write the answer")]
    Output(#[from] std::io::Error),
    /// The request makes no sense.
    #[error("{0}")]
    Request(String),
}

impl ToolError {
    /// What a person could do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Find(error) => error.hint(),
            Self::Cache { source: CacheError::Packet { .. }, .. } => {
                Some("only packets that bonepile wrote can be injected".to_owned())
            }
            _ => None,
        }
    }
}

impl ModelArgs {
    /// Where the model is, and the fingerprint that it must have, if known.
    ///
    /// # Errors
    /// [`ToolError::Find`].
    pub fn locate(&self) -> Result<(PathBuf, Option<String>), ToolError> {
        let path = Path::new(&self.model);
        // A directory counts if it is a model's: a name of the catalogue may also be that of some folder here.
        if path.is_file() || path.join("config.json").is_file() {
            return Ok((path.to_path_buf(), None));
        }
        let directory = match &self.models {
            Some(root) => ModelsDir::at(root),
            None => ModelsDir::from_env()?,
        };
        Ok(directory.locate(&self.model)?)
    }

    /// Sets the number of threads, then loads.
    ///
    /// # Errors
    /// If the model is not there or cannot be loaded.
    pub fn load(&self) -> Result<Model, ToolError> {
        self.load_with(false)
    }

    /// The same, without the tokenizer if only ids will be run.
    ///
    /// # Errors
    /// As [`ModelArgs::load`].
    pub fn load_with(&self, ids_only: bool) -> Result<Model, ToolError> {
        if let Some(threads) = self.threads {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.max(1)).build_global();
            pool.map_err(|error| ToolError::Request(format!("start {threads} threads: {error}")))?;
        }
        let (path, expected_fingerprint) = self.locate()?;
        let precision = match self.precision {
            PrecisionArg::F32 => Precision::F32,
            PrecisionArg::Stored => Precision::Stored,
        };
        let cache = match self.kv {
            KvArg::F32 => CachePrecision::F32,
            KvArg::F16 => CachePrecision::F16,
        };
        let device = self.device.unwrap_or_else(|| Place::of_build().device);
        let place = Place { device, elements: self.elements };
        Ok(Model::load(&path, &LoadOptions { expected_fingerprint, precision, ids_only, cache, place })?)
    }
}

/// One JSON document on stdout.
pub(super) fn print_json(value: &serde_json::Value) -> Result<(), ToolError> {
    let text = serde_json::to_string_pretty(value).expect("a JSON value is plain data");
    Ok(writeln!(std::io::stdout().lock(), "{text}")?)
}

/// `12.3 MB`, in powers of ten.
pub(super) fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}
