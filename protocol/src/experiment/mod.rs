//! Experiment kinds and what one shard of each is asked to do. The procedures live in the worker, the files in [`crate::sweep`].

pub mod projector;

use serde::{Deserialize, Serialize};

use self::projector::{EvalSpec, TrainSpec};
use crate::ids::Role;

/// What one shard does: the kind with its parameters, complete, so that two equal specs mean the same computation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShardSpec {
    /// Cache inspection (E1 in the literature of this project): the shape and statistics of a model's KV cache.
    Inspect(InspectSpec),
    /// Same-model cache transfer (E2): caches made by a source, injected by a target, against oracle and controls.
    Transfer(TransferSpec),
    /// Any program of the researcher's, on a placed device.
    Command(Box<CommandSpec>),
    /// Nothing: placed, started, finished and committed like any other shard, so that the machinery itself can be measured.
    NoOp(NoOpSpec),
    /// Part of the training of a projector (E4, E5).
    ProjectorTrain(Box<TrainSpec>),
    /// What a projector carries (E4).
    ProjectorEval(Box<EvalSpec>),
}

impl ShardSpec {
    /// The kind's name as written in a sweep.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Inspect(_) => "inspect",
            Self::Transfer(_) => "transfer",
            Self::Command(_) => "command",
            Self::NoOp(_) => "no-op",
            Self::ProjectorTrain(_) => "projector-train",
            Self::ProjectorEval(_) => "projector-eval",
        }
    }

    /// Names of the models that a seat must have.
    pub fn models_of(&self, role: Role) -> Vec<&str> {
        match self {
            Self::Inspect(spec) => vec![&spec.model],
            Self::Transfer(spec) => vec![&spec.model],
            Self::ProjectorTrain(spec) => spec.models(role),
            Self::ProjectorEval(spec) => spec.models(role),
            Self::Command(_) | Self::NoOp(_) => Vec::new(),
        }
    }

    /// Names of the models of all seats, each once.
    pub fn models(&self) -> Vec<&str> {
        let mut models = Vec::new();
        for model in self.roles().iter().flat_map(|role| self.models_of(*role)) {
            if !models.contains(&model) {
                models.push(model);
            }
        }
        models
    }

    /// The seats, in the order they are placed.
    pub fn roles(&self) -> &'static [Role] {
        match self {
            Self::Inspect(_) | Self::Command(_) | Self::NoOp(_) => &[Role::Main],
            Self::Transfer(_) | Self::ProjectorEval(_) => &[Role::Source, Role::Target],
            Self::ProjectorTrain(spec) => spec.stage.roles(),
        }
    }

    /// Where the seats may sit relative to each other.
    pub fn spread(&self) -> Spread {
        match self {
            Self::Inspect(_) | Self::Command(_) | Self::NoOp(_) => Spread::Any,
            Self::Transfer(spec) => spec.spread,
            Self::ProjectorTrain(spec) => spec.spread,
            Self::ProjectorEval(spec) => spec.spread,
        }
    }

    /// One line for tables: kind, model and what tells this shard from its siblings.
    pub fn summary(&self) -> String {
        match self {
            Self::Inspect(spec) => format!("inspect {} layers={}", spec.model, spec.layers),
            Self::Transfer(spec) => {
                format!("transfer {} facts={}..{}", spec.model, spec.first_fact, spec.first_fact + spec.facts)
            }
            Self::Command(spec) => format!("command {}", spec.argv.join(" ")),
            Self::NoOp(spec) => format!("no-op {}", spec.index),
            Self::ProjectorTrain(spec) => spec.summary(),
            Self::ProjectorEval(spec) => spec.summary(),
        }
    }

    /// The part of the throughput table's key that the spec decides: kind, model and phase, so that equal classes take equal
    /// time a unit of work on equal devices.
    pub fn work_class(&self) -> String {
        match self {
            Self::Inspect(spec) => format!("inspect/{}", spec.model),
            Self::Transfer(spec) => format!("transfer/{}/conditions={}", spec.model, spec.conditions.len()),
            Self::Command(spec) => format!("command/{}", spec.class),
            Self::NoOp(_) => "no-op".to_owned(),
            Self::ProjectorTrain(spec) => spec.work_class(),
            Self::ProjectorEval(spec) => spec.work_class(),
        }
    }

    /// Units of work: texts of an inspection, facts of a transfer, samples of a training, what a command declares.
    pub fn work_units(&self) -> u32 {
        match self {
            Self::Inspect(spec) => spec.texts,
            Self::Transfer(spec) => spec.facts,
            Self::Command(spec) => spec.work,
            Self::NoOp(_) => 1,
            Self::ProjectorTrain(spec) => spec.work_units(),
            Self::ProjectorEval(spec) => spec.facts,
        }
        .max(1)
    }

    /// Compute threads that a seat takes of a processor; `None`: all of them.
    pub fn threads(&self) -> Option<u32> {
        match self {
            Self::Inspect(_) | Self::Transfer(_) | Self::ProjectorTrain(_) | Self::ProjectorEval(_) => None,
            Self::Command(spec) => Some(spec.threads),
            Self::NoOp(_) => Some(1),
        }
    }
}

/// Parameters of a shard of kind `command`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandSpec {
    /// Program and arguments, parameters of the matrix put in; the program is looked up on the worker's `PATH`.
    pub argv: Vec<String>,
    /// Variables added to the environment. Parameters of the matrix are among them, as `BONEPILE_PARAM_…`.
    pub env: Vec<(String, String)>,
    /// Files written into the working directory before the start: (name, text).
    pub files: Vec<(String, String)>,
    /// Peak memory on its device that the researcher declares, bytes.
    pub memory_bytes: u64,
    /// Compute threads that it takes where it runs on a processor, 1 or more.
    pub threads: u32,
    /// Patterns of files below the working directory that become artifacts (`*` within a name, `**` over directories).
    pub collect: Vec<String>,
    /// Killed after so long, milliseconds; 0: never.
    pub timeout_ms: u64,
    /// Further tries after an exit code that is not 0: a program that says it failed usually fails again.
    pub retries: u32,
    /// What its time is compared with: its name in the throughput table.
    pub class: String,
    /// Units of work, 1 or more.
    pub work: u32,
}

/// Parameters of a shard of kind `no-op`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NoOpSpec {
    /// Its place in the sweep.
    pub index: u32,
}

/// Where the seats of a shard may sit relative to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Spread {
    /// The scheduler chooses.
    Any,
    /// Each seat on a device of its own.
    Devices,
    /// Each seat on a worker of its own, so that caches cross the network.
    Workers,
}

/// Which layers an inspection reports. Gemma mixes layers that see a sliding window with layers that see everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LayerSelection {
    /// Every layer.
    All,
    /// Only layers with full attention.
    Full,
    /// Only layers with a sliding window.
    Sliding,
}

impl std::fmt::Display for LayerSelection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::All => "all",
            Self::Full => "full",
            Self::Sliding => "sliding",
        })
    }
}

/// Parameters of a shard of kind `inspect`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InspectSpec {
    /// Name of the model ([`crate::model_name`]).
    pub model: String,
    /// Layers reported.
    pub layers: LayerSelection,
    /// Number of courier-fact texts prefilled, 1–256.
    pub texts: u32,
    /// Seed of the texts.
    pub seed: u64,
}

/// Parameters of a shard of kind `transfer`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TransferSpec {
    /// Name of the model ([`crate::model_name`]), source and target alike.
    pub model: String,
    /// Index of the first fact.
    pub first_fact: u32,
    /// Number of facts, 2 or more: another subject's cache comes from the same shard.
    pub facts: u32,
    /// Conditions scored, in this order; the oracle is always computed.
    pub conditions: Vec<Condition>,
    /// Longest answer generated, tokens, 1–64.
    pub answer_tokens: u32,
    /// Where the two seats sit.
    pub spread: Spread,
    /// Seed of the facts and of the noise.
    pub seed: u64,
}

/// What the target is given before it reads the question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Condition {
    /// The source's text itself: the oracle everything else is measured against.
    Text,
    /// Nothing.
    NoContext,
    /// The source's cache at its own positions.
    Injected,
    /// The cache with the question `n` positions late, keys as they were.
    Shifted(u32),
    /// The same, keys re-rotated to where they now stand.
    Rerotated(u32),
    /// Noise with the cache's own per-layer mean and standard deviation.
    MatchedNoise,
    /// The cache of another subject.
    OtherSubject,
    /// The recipe of the seed's phase 2a: cache of prompt and generated tokens, BOS again in mid-sequence.
    Naive,
    /// The source's keys with the target's values of the neutral text.
    KeysOnly,
    /// The source's values with the target's keys of the neutral text.
    ValuesOnly,
    /// The source's text and then the naive recipe's question: what `naive` owes to its wording rather than to the cache.
    NaiveText,
}

impl Condition {
    /// What a sweep that names no conditions gets: all that the issue of honest transfer needs.
    pub const DEFAULT: [Self; 10] = [
        Self::Text,
        Self::NoContext,
        Self::Injected,
        Self::Shifted(128),
        Self::Rerotated(128),
        Self::MatchedNoise,
        Self::OtherSubject,
        Self::Naive,
        Self::NaiveText,
        Self::Rerotated(1024),
    ];
}

impl std::fmt::Display for Condition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Text => f.write_str("text"),
            Self::NoContext => f.write_str("no-context"),
            Self::Injected => f.write_str("injected"),
            Self::Shifted(gap) => write!(f, "shifted+{gap}"),
            Self::Rerotated(gap) => write!(f, "rerotated+{gap}"),
            Self::MatchedNoise => f.write_str("matched-noise"),
            Self::OtherSubject => f.write_str("other-subject"),
            Self::Naive => f.write_str("naive"),
            Self::KeysOnly => f.write_str("keys-only"),
            Self::ValuesOnly => f.write_str("values-only"),
            Self::NaiveText => f.write_str("naive-text"),
        }
    }
}

impl std::str::FromStr for Condition {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let gap = |digits: &str| {
            digits
                .parse::<u32>()
                .ok()
                .filter(|gap| (1..=1_000_000).contains(gap))
                .ok_or_else(|| format!("`{digits}` is not a gap in tokens (1 to 1000000)"))
        };
        match text {
            "text" => Ok(Self::Text),
            "no-context" => Ok(Self::NoContext),
            "injected" => Ok(Self::Injected),
            "matched-noise" => Ok(Self::MatchedNoise),
            "other-subject" => Ok(Self::OtherSubject),
            "naive" => Ok(Self::Naive),
            "keys-only" => Ok(Self::KeysOnly),
            "values-only" => Ok(Self::ValuesOnly),
            "naive-text" => Ok(Self::NaiveText),
            _ => match text.split_once('+') {
                Some(("shifted", digits)) => gap(digits).map(Self::Shifted),
                Some(("rerotated", digits)) => gap(digits).map(Self::Rerotated),
                _ => Err(format!("unknown condition `{text}`; expected one of {}", Self::NAMES.join(", "))),
            },
        }
    }
}

impl Condition {
    /// Every condition as a sweep writes it; `N` is a gap in tokens.
    pub const NAMES: [&'static str; 11] = [
        "text",
        "no-context",
        "injected",
        "shifted+N",
        "rerotated+N",
        "matched-noise",
        "other-subject",
        "naive",
        "keys-only",
        "values-only",
        "naive-text",
    ];
}
