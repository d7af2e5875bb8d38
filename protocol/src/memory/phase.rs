//! What is done with a model, as far as memory depends on it.

use super::training::{AdapterTraining, ProjectorTraining, Training};

/// A phase of work on one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase<'a> {
    /// Sequences are read and go on.
    Inference(Inference),
    /// The same, and caches are taken out and kept.
    Capture(Capture),
    /// A projector between two frozen models is trained; the model of the estimate is the one that receives.
    Projector(ProjectorTraining<'a>),
    /// Adapters on a frozen model are trained: LoRA, QLoRA if the weights are of 4 bits.
    Adapter(AdapterTraining),
    /// All weights are trained.
    Full(Training),
}

/// Sequences that are held at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inference {
    /// S: tokens that each of them holds at the end.
    pub tokens: u32,
    /// B.
    pub sequences: u32,
    /// What keys and values are held in. Beside f32 weights always f32.
    pub cache: Element,
}

/// Caches that are taken out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capture {
    /// What runs.
    pub running: Inference,
    /// Caches kept. They are f32 and lie in the box's memory, so a card holds none.
    pub caches: u32,
    /// Tokens of each.
    pub cache_tokens: u32,
}

/// A number of keys, values, or activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// 4 bytes.
    F32,
    /// 2 bytes, of either kind.
    Half,
}

impl Element {
    /// Of one number.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::Half => 2,
        }
    }
}

impl Inference {
    /// One sequence, f32.
    pub const fn of(tokens: u32) -> Self {
        Self { tokens, sequences: 1, cache: Element::F32 }
    }

    /// The same with keys and values in halves.
    #[must_use]
    pub const fn halves(mut self) -> Self {
        self.cache = Element::Half;
        self
    }
}
