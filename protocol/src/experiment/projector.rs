//! Projectors: training one from the caches of two models, and measuring what it carries.
//!
//! A training is more than one shard: [`TrainSpec::stage`] says which part a shard is. A ridge projector is sums over samples,
//! which any shards make in any order, and one solution. A fuser is trained in rounds: replicas step from the same weights on
//! samples of their own, and one outer step makes the next weights. The scheduler opens one round when the one before has
//! committed, so a shard's inputs are artifacts that exist, named by content.

mod eval;
mod recipe;

use serde::{Deserialize, Serialize};

use super::{ShardSpec, Spread};
use crate::control::Output;
use crate::ids::Role;

pub use eval::{EvalSpec, Projected, Tier};
pub use recipe::{FuserRecipe, Loss, Method, Pairs, Precision, Regime, RidgeRecipe, Schedule, Shares};

/// Name of the trained projector among a shard's artifacts, and among the inputs of a shard that uses it.
pub const PROJECTOR: &str = "projector.safetensors";
/// The same for the control that was trained on shuffled pairs.
pub const SHUFFLED: &str = "shuffled.safetensors";
/// Name of what the next round's replicas start from: a fuser's weights alone.
pub const START: &str = "start.safetensors";
/// Name of a ridge shard's sums.
pub const STATISTICS: &str = "statistics.safetensors";
/// Name of what a replica's local steps changed.
pub const DELTA: &str = "delta.safetensors";

/// What one shard of kind `projector-train` does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainSpec {
    /// Name of the model whose caches come in ([`crate::model_name`]).
    pub source: String,
    /// Name of the model that continues with them.
    pub target: String,
    /// What both read.
    pub corpus: Corpus,
    /// Which layers of the source each layer of the target is made from.
    pub layers: LayerMap,
    /// What is trained, and how.
    pub method: Method,
    /// Which part of the training this shard is.
    pub stage: Stage,
    /// Where source and target sit.
    pub spread: Spread,
    /// Seed of the corpus, of the order of its samples, and of weights.
    pub seed: u64,
}

/// Which part of a training a shard is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// The whole training, as a sweep asks for it: no shard does this, the scheduler makes rounds of it.
    Whole {
        /// Shards of statistics, or replicas of a round at most.
        shards: u32,
    },
    /// Ridge: sums over samples; seats source and target; makes [`STATISTICS`].
    Statistics(Samples),
    /// Ridge: adds the parts up in the order of their samples and solves; makes [`PROJECTOR`] and [`SHUFFLED`].
    Solve {
        /// Statistics, by first sample.
        parts: Vec<Output>,
    },
    /// Fuser: local steps of one replica; seats source and target; makes [`DELTA`].
    Steps {
        /// Round, from 0.
        round: u32,
        /// Place among the round's replicas, from 0.
        replica: u32,
        /// What it steps over.
        samples: Samples,
        /// The weights that the round starts from, a [`START`]; `None`: those of the recipe.
        start: Option<Output>,
    },
    /// Fuser: the outer step of a round; makes [`PROJECTOR`], which is also the checkpoint, and [`START`] for the next round.
    Outer {
        /// Round, from 0.
        round: u32,
        /// Samples of all rounds up to this one.
        counted: u64,
        /// Rounds that are expected in all, by which the outer step's size is chosen.
        rounds: u32,
        /// The checkpoint before this round, a [`PROJECTOR`].
        start: Option<Output>,
        /// What each replica's steps changed, by replica, with the samples that stand behind it.
        deltas: Vec<(Output, u32)>,
    },
}

/// A range in the order of a corpus, which is another permutation in each epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Samples {
    /// First place, counted over epochs: `epoch * samples of the corpus + place in the epoch`.
    pub first: u64,
    /// Places.
    pub count: u32,
}

/// What both models read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Corpus {
    /// Where it comes from.
    pub text: CorpusText,
    /// Samples of an epoch, 1 or more. Files with fewer are an error, with more are cut.
    pub samples: u32,
}

/// Where a corpus comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CorpusText {
    /// Sentences that the project makes up about people and where they live, and a question about each.
    Couriers(Couriers),
    /// Files of text: `.txt` in paragraphs, `.jsonl` with a `text` or with `messages` a line. Absolute paths on the boxes, or
    /// files of the store as `bonepile store put` names them ([`stored_file`]).
    Files(Vec<String>),
}

/// What `bonepile store put` prints for a file: `artifact:HASH:BYTES:NAME`. `None` for any other text.
pub fn stored_file(text: &str) -> Option<Output> {
    let mut parts = text.strip_prefix("artifact:")?.splitn(3, ':');
    let (hash, bytes, name) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?, parts.next()?);
    let plain = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
    plain.then(|| Output { name: name.to_owned(), hash, bytes })
}

/// The text for [`stored_file`].
pub fn name_stored_file(file: &Output) -> String {
    format!("artifact:{}:{}:{}", file.hash, file.bytes, file.name)
}

/// How broad made-up sentences are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Couriers {
    /// Different values (places) that occur, 8 or more; the eight of the evaluation's tier *seen* are always among them.
    pub values: u32,
    /// Different subjects (names) that occur, 2 or more; none of the evaluation's.
    pub names: u32,
    /// Different wordings, 1 or more; the first is the evaluation's.
    pub wordings: u32,
    /// Percentage of samples with two persons, 0–100.
    pub pairs_percent: u32,
}

/// Which layers of the source a layer of the target is made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LayerMap {
    /// The deepest from the deepest, the one before from the one before; layers that are left over in front from the first.
    LastAligned,
    /// The `n` nearest by relative depth.
    Proportional(u32),
    /// A list for each target layer, of source layers.
    Given(Vec<Vec<u32>>),
}

/// Which projector is meant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProjectorRef {
    /// What a training of the same run makes, by its place among the run's trainings.
    Trained(u32),
    /// An artifact.
    Artifact(Output),
}

/// An artifact that a shard needs before it can start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    /// By which name the shard knows it.
    pub name: String,
    /// Which it is.
    pub what: Needed,
}

/// Which artifact a shard needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Needed {
    /// This one.
    Artifact(Output),
    /// One that the last round of a training of the same run made.
    Trained {
        /// Place among the run's trainings.
        training: u32,
        /// Its name there.
        output: &'static str,
        /// Not every training makes it.
        optional: bool,
    },
}

impl ProjectorRef {
    fn need(&self, name: &str, output: &'static str, optional: bool) -> Need {
        let what = match self {
            Self::Trained(training) => Needed::Trained { training: *training, output, optional },
            Self::Artifact(artifact) => Needed::Artifact(artifact.clone()),
        };
        Need { name: name.to_owned(), what }
    }
}

impl Samples {
    /// The place behind its last.
    pub fn end(&self) -> u64 {
        self.first.saturating_add(u64::from(self.count))
    }
}

impl Stage {
    /// What it goes over, if it is one shard's share of the samples.
    pub fn samples(&self) -> Option<Samples> {
        match self {
            Self::Statistics(samples) | Self::Steps { samples, .. } => Some(*samples),
            Self::Whole { .. } | Self::Solve { .. } | Self::Outer { .. } => None,
        }
    }

    /// The seats.
    pub fn roles(&self) -> &'static [Role] {
        match self {
            Self::Statistics(_) | Self::Steps { .. } => &[Role::Source, Role::Target],
            Self::Whole { .. } | Self::Solve { .. } | Self::Outer { .. } => &[Role::Main],
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Whole { .. } => "whole",
            Self::Statistics(_) => "statistics",
            Self::Solve { .. } => "solve",
            Self::Steps { .. } => "steps",
            Self::Outer { .. } => "outer",
        }
    }
}

impl TrainSpec {
    /// The same training at another stage.
    #[must_use]
    pub fn at(&self, stage: Stage) -> Self {
        Self { stage, ..self.clone() }
    }

    /// Samples of all epochs.
    pub fn samples(&self) -> u64 {
        let epochs = match &self.method {
            Method::Ridge(_) => 1,
            Method::Fuser(recipe) => recipe.epochs,
        };
        u64::from(self.corpus.samples) * u64::from(epochs)
    }

    /// Models that a seat must have.
    pub(super) fn models(&self, role: Role) -> Vec<&str> {
        match role {
            Role::Source => vec![&self.source],
            Role::Target => vec![&self.target],
            Role::Main => Vec::new(),
        }
    }

    pub(super) fn needs(&self) -> Vec<Need> {
        let artifact = |output: &Output, name: String| Need { name, what: Needed::Artifact(output.clone()) };
        let mut needs = match &self.stage {
            Stage::Whole { .. } | Stage::Statistics(_) => Vec::new(),
            Stage::Solve { parts } => {
                parts.iter().enumerate().map(|(i, part)| artifact(part, format!("{i}-{STATISTICS}"))).collect()
            }
            Stage::Steps { start, .. } => {
                start.iter().map(|start| artifact(start, START.to_owned())).collect::<Vec<_>>()
            }
            Stage::Outer { start, deltas, .. } => {
                let deltas = deltas.iter().enumerate();
                let deltas = deltas.map(|(i, (delta, _))| artifact(delta, format!("{i}-{DELTA}")));
                start.iter().map(|start| artifact(start, PROJECTOR.to_owned())).chain(deltas).collect()
            }
        };
        // A checkpoint holds the base; what replicas start from does not.
        let apart = matches!(&self.stage, Stage::Steps { .. } | Stage::Outer { start: None, .. });
        if let (Method::Fuser(recipe), true) = (&self.method, apart) {
            let (name, output) = match recipe.pairs {
                Pairs::Matched => (BASE, PROJECTOR),
                Pairs::Shuffled => (BASE, SHUFFLED),
            };
            needs.extend(recipe.base.as_ref().map(|base| base.need(name, output, false)));
        }
        needs.extend(self.texts());
        needs
    }

    /// Files of the store that both seats read.
    fn texts(&self) -> Vec<Need> {
        let (CorpusText::Files(files), Stage::Statistics(_) | Stage::Steps { .. }) = (&self.corpus.text, &self.stage)
        else {
            return Vec::new();
        };
        let stored = files.iter().filter_map(|file| stored_file(file));
        stored.map(|file| Need { name: file.name.clone(), what: Needed::Artifact(file) }).collect()
    }

    pub(super) fn summary(&self) -> String {
        let (source, target) = (&self.source, &self.target);
        let range = |samples: &Samples| format!("{}..{}", samples.first, samples.first + u64::from(samples.count));
        let what = match &self.stage {
            Stage::Whole { shards } => format!("{} samples in {shards}", self.samples()),
            Stage::Statistics(samples) => format!("statistics {}", range(samples)),
            Stage::Solve { parts } => format!("solve {} parts", parts.len()),
            Stage::Steps { round, replica, samples, .. } => {
                format!("round {round} replica {replica} samples {}", range(samples))
            }
            Stage::Outer { round, deltas, .. } => format!("round {round} outer step of {}", deltas.len()),
        };
        format!("projector-train {source} -> {target}: {what}")
    }

    pub(super) fn work_class(&self) -> String {
        let width = match &self.method {
            Method::Ridge(_) => "ridge".to_owned(),
            Method::Fuser(recipe) => format!("fuser={}", recipe.hidden),
        };
        format!("projector-train/{}/{}/{width}/{}", self.source, self.target, self.stage.name())
    }

    pub(super) fn work_units(&self) -> u32 {
        match &self.stage {
            Stage::Whole { .. } => 1,
            Stage::Statistics(samples) | Stage::Steps { samples, .. } => samples.count,
            Stage::Solve { .. } => 1,
            Stage::Outer { .. } => 1,
        }
    }
}

/// Name of the projector that a fuser refines, among its first round's inputs.
pub const BASE: &str = "base.safetensors";

impl ShardSpec {
    /// Artifacts that must exist before the shard can start, by the names under which it finds them.
    pub fn needs(&self) -> Vec<Need> {
        match self {
            Self::ProjectorTrain(spec) => spec.needs(),
            Self::ProjectorEval(spec) => spec.needs(),
            Self::Inspect(_) | Self::Transfer(_) | Self::Command(_) | Self::NoOp(_) => Vec::new(),
        }
    }

    /// Those that one of its seats reads: a source reads texts, and no weights of projectors.
    pub fn needs_of(&self, role: Role) -> Vec<Need> {
        match (self, role) {
            (Self::ProjectorTrain(spec), Role::Source) => spec.texts(),
            (Self::ProjectorEval(_), Role::Source) => Vec::new(),
            _ => self.needs(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::ArtifactHash;

    #[test]
    fn files_of_the_store_have_a_name_that_reads_back() {
        let file = Output { name: "corpus.jsonl".to_owned(), hash: ArtifactHash([7; 32]), bytes: 90 };
        assert_eq!(stored_file(&name_stored_file(&file)), Some(file));
        for bad in ["/data/corpus.jsonl", "artifact:07:90:x", "artifact:", "artifact:x:1:y"] {
            assert_eq!(stored_file(bad), None, "{bad}");
        }
        assert_eq!(stored_file(&format!("artifact:{}:90:../x", ArtifactHash([7; 32]))), None);
    }
}
