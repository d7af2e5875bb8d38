//! Measuring what a projector carries: kind `projector-eval`.

use serde::{Deserialize, Serialize};

use super::{Need, PROJECTOR, ProjectorRef, SHUFFLED};
use crate::experiment::Spread;
use crate::ids::Role;

/// What one shard of kind `projector-eval` does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalSpec {
    /// Name of the model whose caches come in.
    pub source: String,
    /// Name of the model that continues with them.
    pub target: String,
    /// What is measured.
    pub projector: ProjectorRef,
    /// The same trained on shuffled pairs; a ridge projector brings its own.
    pub shuffled: Option<ProjectorRef>,
    /// How hard the facts are for it.
    pub tier: Tier,
    /// Index of the first fact.
    pub first_fact: u32,
    /// Number of facts, 2 or more: another subject's cache comes from the same shard.
    pub facts: u32,
    /// Conditions scored, in this order; the native cache is always computed.
    pub conditions: Vec<Projected>,
    /// Longest answer generated, tokens, 1–64.
    pub answer_tokens: u32,
    /// Where the two seats sit.
    pub spread: Spread,
    /// Seed of the facts.
    pub seed: u64,
}

/// How hard a fact is for a projector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tier {
    /// A person that training has not seen, in a place that it has.
    Seen,
    /// A person and a place that training has not seen.
    Unseen,
    /// Two persons in one sentence, in different places that training has seen; one is asked for.
    Binding,
}

impl Tier {
    /// Every tier.
    pub const ALL: [Self; 3] = [Self::Seen, Self::Unseen, Self::Binding];
}

impl std::fmt::Display for Tier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Seen => "seen",
            Self::Unseen => "unseen",
            Self::Binding => "binding",
        })
    }
}

/// What the target is given before it reads the question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Projected {
    /// Its own cache of the text: the oracle.
    Native,
    /// Nothing.
    NoContext,
    /// The source's cache as it is, cut or padded to shape.
    RawCopy,
    /// The source's cache through the projector.
    Projected,
    /// Another subject's cache through the projector.
    Mismatched,
    /// The source's cache through the projector that was trained on shuffled pairs.
    Shuffled,
    /// What the source wrote when asked to pass on what it read.
    TextRelay,
}

impl Projected {
    /// Every condition.
    pub const ALL: [Self; 7] = [
        Self::Native,
        Self::NoContext,
        Self::RawCopy,
        Self::Projected,
        Self::Mismatched,
        Self::Shuffled,
        Self::TextRelay,
    ];
}

impl std::fmt::Display for Projected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Native => "native",
            Self::NoContext => "no-context",
            Self::RawCopy => "raw-copy",
            Self::Projected => "projected",
            Self::Mismatched => "mismatched",
            Self::Shuffled => "shuffled",
            Self::TextRelay => "text-relay",
        })
    }
}

impl std::str::FromStr for Projected {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|condition| condition.to_string() == text).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(ToString::to_string).collect();
            format!("unknown condition `{text}`; expected one of {}", names.join(", "))
        })
    }
}

impl std::str::FromStr for Tier {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|tier| tier.to_string() == text)
            .ok_or_else(|| format!("unknown tier `{text}`; expected one of seen, unseen, binding"))
    }
}

impl EvalSpec {
    pub(in crate::experiment) fn models(&self, role: Role) -> Vec<&str> {
        match role {
            Role::Source => vec![&self.source],
            Role::Target => vec![&self.target],
            Role::Main => Vec::new(),
        }
    }

    pub(in crate::experiment) fn needs(&self) -> Vec<Need> {
        let control = match &self.shuffled {
            Some(own) => Some(own.need(SHUFFLED, PROJECTOR, false)),
            None => match &self.projector {
                ProjectorRef::Trained(_) => Some(self.projector.need(SHUFFLED, SHUFFLED, true)),
                ProjectorRef::Artifact(_) => None,
            },
        };
        [self.projector.need(PROJECTOR, PROJECTOR, false)].into_iter().chain(control).collect()
    }

    pub(in crate::experiment) fn summary(&self) -> String {
        let Self { source, target, tier, first_fact, facts, .. } = self;
        format!("projector-eval {source} -> {target} {tier} facts={first_fact}..{}", first_fact + facts)
    }

    pub(in crate::experiment) fn work_class(&self) -> String {
        format!("projector-eval/{}/{}/conditions={}", self.source, self.target, self.conditions.len())
    }
}
