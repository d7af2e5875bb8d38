//! What a training step holds: what is trained, its gradients and moments, and the activations that wait for the way back.
//!
//! On processors as our decoder keeps them with gradients (f32, scores materialised; measured by `model bench --step`). On
//! cards as PyTorch does with 16-bit activations and fused attention, for that is what the tables that we compare with ran.
//! Sources: activations after arXiv 2205.05198 (section 4.1) for a gated MLP; moments after 1711.05101 and 2110.02861; LoRA
//! 2106.09685; the fuser 2510.03215.

use super::footprint::Backend;
use super::phase::Element;
use super::quantisation::Quantisation;
use super::shape::ModelShape;
use super::{product, sum};

/// A step's size and how it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Training {
    /// B: sequences of a step.
    pub batch: u32,
    /// P: columns of a cache that each stands behind.
    pub prefix: u32,
    /// T: tokens of each.
    pub tokens: u32,
    /// Only each layer's input is kept; the rest is computed again on the way back.
    pub checkpointing: bool,
    /// What moves the weights.
    pub optimiser: Optimiser,
}

/// What moves weights, and what it keeps for each: bytes of the weight, of its gradient, of its moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Optimiser {
    /// AdamW, all in f32: 4 + 4 + 8.
    AdamW,
    /// AdamW, all in 16 bits: 2 + 2 + 4.
    AdamWHalf,
    /// AdamW with 8-bit moments, weights and gradients in 16: 2 + 2 + 2.
    AdamW8Bit,
    /// Plain descent in f32: 4 + 4 + 0.
    Sgd,
}

/// Adapters of rank r on all seven projections of each layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdapterTraining {
    /// r.
    pub rank: u32,
    /// The step.
    pub training: Training,
}

/// A projector from one model's cache into another's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProjectorTraining<'a> {
    /// The model whose caches come in, frozen.
    pub source: &'a ModelShape,
    /// How its weights are held. `None`: it runs elsewhere, or its caches are on disk.
    pub source_held: Option<Quantisation>,
    /// What is trained.
    pub projector: ProjectorKind,
    /// The step.
    pub training: Training,
}

/// What maps keys and values, one map for each layer of the receiving model and each of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProjectorKind {
    /// One matrix.
    Linear,
    /// Two matrices over a narrow middle.
    LowRank {
        /// r.
        rank: u32,
    },
    /// C2C's fuser: both caches in, gated residual out.
    Fuser {
        /// Width.
        hidden: u32,
        /// Width of the inner layers.
        inner: u32,
        /// Layers, 3 or more.
        depth: u32,
    },
}

impl ProjectorKind {
    /// C2C's published size.
    pub const C2C: Self = Self::Fuser { hidden: 1024, inner: 1024, depth: 3 };

    /// Weights: into the caches of `target` from those of `source`.
    pub fn parameters(self, source: &ModelShape, target: &ModelShape) -> u64 {
        let (from, to) = (source.kv_width(), target.kv_width());
        let each = match self {
            Self::Linear => product(&[from + 1, to]),
            Self::LowRank { rank } => product(&[rank.into(), from + to]),
            Self::Fuser { hidden, inner, depth } => {
                let (h, i) = (u64::from(hidden), u64::from(inner));
                let deep = u64::from(depth.saturating_sub(2));
                // In; one block; the gate's block and head; the deeper blocks; out; the gate's scalar.
                let blocks = product(&[1 + deep, h + 2 * h * i]);
                sum(&[
                    (from + to + 1) * h,
                    blocks,
                    h + 2 * h * h,
                    (h + 1) * u64::from(target.kv_heads),
                    (h + 1) * to,
                    1,
                ])
            }
        };
        product(&[2, target.layers.into(), each])
    }

    /// Numbers that wait for the way back, for each token.
    fn activations(self, source: &ModelShape, target: &ModelShape) -> u64 {
        let (from, to) = (source.kv_width(), target.kv_width());
        let each = match self {
            Self::Linear => from + to,
            Self::LowRank { rank } => from + to + u64::from(rank),
            Self::Fuser { hidden, inner, depth } => {
                let (h, i) = (u64::from(hidden), u64::from(inner));
                sum(&[from + 3 * to, h, product(&[depth.into(), 2 * h + 2 * i])])
            }
        };
        product(&[2, target.layers.into(), each])
    }

    /// The same, narrower by half; `None` where there is nothing left to narrow.
    pub fn narrower(self) -> Option<Self> {
        const NARROWEST: u32 = 64;
        match self {
            Self::Fuser { hidden, inner, depth } if hidden > NARROWEST => {
                Some(Self::Fuser { hidden: hidden / 2, inner: (inner / 2).max(NARROWEST), depth })
            }
            Self::LowRank { rank } if rank > 8 => Some(Self::LowRank { rank: rank / 2 }),
            _ => None,
        }
    }
}

impl std::fmt::Display for ProjectorKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Linear => f.write_str("linear"),
            Self::LowRank { rank } => write!(f, "rank {rank}"),
            Self::Fuser { hidden, .. } => write!(f, "fuser of width {hidden}"),
        }
    }
}

impl Optimiser {
    /// Bytes for each trained weight: itself, its gradient, its moments.
    pub const fn bytes(self) -> [u64; 3] {
        match self {
            Self::AdamW => [4, 4, 8],
            Self::AdamWHalf => [2, 2, 4],
            Self::AdamW8Bit => [2, 2, 2],
            Self::Sgd => [4, 4, 0],
        }
    }
}

/// Weights of adapters of rank r: r (inputs + outputs) of each projection.
pub fn adapter_parameters(shape: &ModelShape, rank: u32) -> u64 {
    let (hidden, ffn) = (u64::from(shape.hidden), u64::from(shape.ffn));
    let widths = 2 * (hidden + shape.q_width()) + 2 * (hidden + shape.kv_width()) + 3 * (hidden + ffn);
    product(&[rank.into(), shape.layers.into(), widths])
}

/// What a step of training through a model holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Step {
    pub(super) activations: u64,
    pub(super) logits: u64,
}

/// Activations and logits of a step through `shape`.
pub(super) fn step(shape: &ModelShape, training: &Training, backend: Backend) -> Step {
    let tokens = u64::from(training.batch) * u64::from(training.tokens);
    let (hidden, ffn, layers) = (u64::from(shape.hidden), u64::from(shape.ffn), u64::from(shape.layers));
    let (q, kv) = (shape.q_width(), shape.kv_width());
    let (layer, element, logit_bytes) = match backend {
        Backend::Cpu { .. } => {
            // The residual stream before and between, and branches before norms of theirs; queries and keys before and after
            // their norms, and values; probabilities; gate and up. Logits, their softmax, their gradient.
            let columns = u64::from(training.prefix) + u64::from(training.tokens);
            let probabilities = product(&[shape.heads.into(), columns]);
            (sum(&[4 * hidden, 2 * q, 3 * kv, 2 * ffn, probabilities]), Element::F32, 12)
        }
        // Norms and sums; queries and what attention gives; keys and values; gate, up, the gate's activation, the product.
        // Logits of 16 bits, the same in f32, and their gradient.
        Backend::Cuda { .. } => (sum(&[4 * hidden, 2 * q, 2 * kv, 4 * ffn]), Element::Half, 10),
    };
    let numbers = match training.checkpointing {
        true => product(&[tokens, hidden, layers]).saturating_add(product(&[tokens, layer])),
        false => product(&[tokens, layer, layers]),
    };
    Step {
        activations: product(&[numbers, element.bytes()]),
        logits: product(&[tokens, logit_bytes, shape.vocabulary.into()]),
    }
}

impl ProjectorTraining<'_> {
    /// Bytes of keys and values of both models, and of the projector's own activations.
    pub(super) fn caches(&self, target: &ModelShape, backend: Backend) -> (u64, u64) {
        let columns = match self.training.prefix {
            // A text that is its own prefix.
            0 => self.training.tokens,
            prefix => prefix,
        };
        let columns = u64::from(self.training.batch) * u64::from(columns);
        let element = match backend {
            Backend::Cpu { .. } => Element::F32,
            Backend::Cuda { .. } => Element::Half,
        };
        // The receiver's own cache, the one that comes in, and what the projector makes of them.
        let numbers = self.source.kv_numbers_per_token().saturating_add(2 * target.kv_numbers_per_token());
        let activations = self.projector.activations(self.source, target);
        (product(&[columns, numbers, element.bytes()]), product(&[columns, activations, element.bytes()]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::shape;

    #[test]
    fn published_projectors_have_the_published_size() {
        let (source, target) = (shape("qwen2.5-0.5b").unwrap(), shape("qwen3-0.6b").unwrap());
        assert_eq!(ProjectorKind::C2C.parameters(source, target), 2 * 28 * 8_533_001);
        let narrow = ProjectorKind::C2C.narrower().and_then(ProjectorKind::narrower).unwrap();
        assert_eq!(narrow.parameters(source, target) / 100_000, 534);
    }

    #[test]
    fn adapters_of_rank_16_on_llama_2_7b_are_40_million() {
        assert_eq!(adapter_parameters(shape("llama-2-7b").unwrap(), 16), 39_976_960);
    }
}
