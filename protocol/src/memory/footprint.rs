//! The sum of a phase's parts.

use serde::Serialize;

use super::executor::{Path, Run, captured, tokenizer};
use super::phase::{Capture, Inference, Phase};
use super::quantisation::Quantisation;
use super::shape::ModelShape;
use super::sum;
use super::training::{Training, adapter_parameters, step};

/// What an executor takes before it has a model, bytes: its code as far as it is touched, its heap.
const PROCESS_BYTES: u64 = 16_000_000;
/// What CUDA takes on a card for a process before it has a tensor, bytes: 250 to 450 MB by card and driver, and the workspace of
/// cuBLAS.
pub const CUDA_CONTEXT_BYTES: u64 = 400_000_000;
/// Pages that are free but not given back, in a processor's memory: 1 / 50 of the rest.
const CPU_RESERVE_SHARE: u64 = 50;
/// Holes between tensors, on a card: 1 / 20 of the rest.
const CUDA_RESERVE_SHARE: u64 = 20;

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// An executor on a processor; its whole process counts.
    Cpu {
        /// Compute threads.
        threads: u32,
    },
    /// A card; what lies on it counts.
    Cuda {
        /// What CUDA takes there, bytes.
        context_bytes: u64,
    },
}

/// Bytes by part; the sum is the peak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Footprint {
    /// Weights of frozen models.
    pub weights: u64,
    /// What is trained: a projector, adapters, or all weights.
    pub trained: u64,
    /// Gradients of that.
    pub gradients: u64,
    /// Moments of that.
    pub optimiser: u64,
    /// Keys and values of running sequences, with the room they have to grow.
    pub keys_values: u64,
    /// Caches taken out and kept.
    pub captured: u64,
    /// The residual stream, and what layers make of it, attention scores included.
    pub activations: u64,
    /// Logits; in inference only as far as they take more than activations, which are gone by then.
    pub logits: u64,
    /// Text to ids and back.
    pub tokenizer: u64,
    /// The process and what its threads keep, or what CUDA takes.
    pub runtime: u64,
    /// Memory that is held but not used.
    pub reserve: u64,
}

impl Backend {
    /// A card of which nothing more is known.
    pub const CARD: Self = Self::Cuda { context_bytes: CUDA_CONTEXT_BYTES };
}

impl Footprint {
    /// The parts by name.
    pub const fn parts(&self) -> [(&'static str, u64); 11] {
        [
            ("weights", self.weights),
            ("trained", self.trained),
            ("gradients", self.gradients),
            ("optimiser", self.optimiser),
            ("keys and values", self.keys_values),
            ("captured", self.captured),
            ("activations", self.activations),
            ("logits", self.logits),
            ("tokenizer", self.tokenizer),
            ("runtime", self.runtime),
            ("reserve", self.reserve),
        ]
    }

    /// The most at any moment, bytes.
    pub fn peak(&self) -> u64 {
        sum(&self.parts().map(|(_, bytes)| bytes))
    }
}

/// What `phase` takes with a model of this shape, held like this, there.
pub fn estimate(shape: &ModelShape, held: Quantisation, phase: Phase<'_>, backend: Backend) -> Footprint {
    let mut footprint = match phase {
        Phase::Inference(inference) => running(shape, held, inference, backend),
        Phase::Capture(Capture { running: inference, caches, cache_tokens }) => {
            let mut footprint = running(shape, held, inference, backend);
            if let Backend::Cpu { .. } = backend {
                footprint.captured = captured(shape, caches, cache_tokens);
            }
            footprint
        }
        Phase::Projector(projector) => {
            let weights = projector.projector.parameters(projector.source, shape);
            let mut footprint = trained(shape, weights, &projector.training, backend);
            let source = projector.source_held.map_or(0, |held| weight_bytes(projector.source, held, backend));
            footprint.weights = weight_bytes(shape, held, backend).saturating_add(source);
            let (caches, activations) = projector.caches(shape, backend);
            footprint.keys_values = caches;
            footprint.activations = footprint.activations.saturating_add(activations);
            footprint
        }
        Phase::Adapter(adapter) => {
            let weights = adapter_parameters(shape, adapter.rank);
            let mut footprint = trained(shape, weights, &adapter.training, backend);
            footprint.weights = weight_bytes(shape, held, backend);
            footprint
        }
        Phase::Full(training) => trained(shape, shape.parameters(), &training, backend),
    };
    let run = Run { shape, path: path(held, backend), inference: running_in(phase), threads: threads(backend) };
    match backend {
        Backend::Cpu { threads } => {
            footprint.tokenizer = tokenizer(shape);
            footprint.runtime = PROCESS_BYTES.saturating_add(u64::from(threads).saturating_mul(run.thread()));
            footprint.reserve = footprint.peak() / CPU_RESERVE_SHARE;
        }
        Backend::Cuda { context_bytes } => {
            footprint.reserve = footprint.peak() / CUDA_RESERVE_SHARE;
            footprint.runtime = context_bytes;
        }
    }
    footprint
}

fn running(shape: &ModelShape, held: Quantisation, mut inference: Inference, backend: Backend) -> Footprint {
    if held.is_f32() {
        inference.cache = super::Element::F32;
    }
    let run = Run { shape, path: path(held, backend), inference, threads: threads(backend) };
    let (activations, logits) = run.working();
    Footprint {
        weights: weight_bytes(shape, held, backend),
        keys_values: run.keys_values(),
        activations,
        logits: logits.saturating_sub(activations),
        ..Footprint::default()
    }
}

fn trained(shape: &ModelShape, weights: u64, training: &Training, backend: Backend) -> Footprint {
    let [trained, gradients, optimiser] = training.optimiser.bytes().map(|bytes| weights.saturating_mul(bytes));
    let step = step(shape, training, backend);
    let (activations, logits) = (step.activations, step.logits);
    Footprint { trained, gradients, optimiser, activations, logits, ..Footprint::default() }
}

/// On processors embedding and head stay as stored beside f32 projections; cards hold everything alike.
fn weight_bytes(shape: &ModelShape, held: Quantisation, backend: Backend) -> u64 {
    match (held, backend) {
        (Quantisation::F32, Backend::Cpu { .. }) => {
            let tables = shape.stored.map_or_else(|| 2 * shape.tables(), |stored| stored.tables);
            // Norms are held twice.
            sum(&[tables, shape.projections().saturating_mul(4), 8 * shape.norms()])
        }
        _ => held.bytes(shape),
    }
}

fn path(held: Quantisation, backend: Backend) -> Path {
    match backend {
        Backend::Cpu { .. } if !held.is_f32() => Path::Slices,
        _ => Path::Tensors,
    }
}

fn threads(backend: Backend) -> u64 {
    match backend {
        Backend::Cpu { threads } => threads.into(),
        Backend::Cuda { .. } => 0,
    }
}

/// The sequence that threads meet.
fn running_in(phase: Phase<'_>) -> Inference {
    match phase {
        Phase::Inference(inference) | Phase::Capture(Capture { running: inference, .. }) => inference,
        Phase::Projector(projector) => Inference::of(projector.training.tokens),
        Phase::Adapter(adapter) => Inference::of(adapter.training.tokens),
        Phase::Full(training) => Inference::of(training.tokens),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::shape;

    #[test]
    fn more_of_anything_takes_no_less() {
        let shape = shape("llama-3.1-8b").unwrap();
        for backend in [Backend::Cpu { threads: 2 }, Backend::CARD] {
            for held in Quantisation::ALL {
                let peak = |tokens, sequences| {
                    let inference = Inference { sequences, ..Inference::of(tokens).halves() };
                    estimate(shape, held, Phase::Inference(inference), backend).peak()
                };
                assert!(peak(64, 1) < peak(4096, 1) && peak(4096, 1) < peak(4096, 2), "{held} {backend:?}");
            }
        }
    }

    #[test]
    fn sizes_that_no_model_has_do_not_panic() {
        let huge = ModelShape::new([1024, 1 << 20, 1 << 12, 1 << 12, 1 << 10, 1 << 22], 1 << 24, false, 1 << 30);
        assert!(huge.is_plausible());
        assert!(!ModelShape { layers: 0, ..huge.clone() }.is_plausible());
        let inference = Inference { tokens: u32::MAX, sequences: u32::MAX, cache: super::super::Element::F32 };
        let capture = Capture { running: inference, caches: u32::MAX, cache_tokens: u32::MAX };
        let peak = estimate(&huge, Quantisation::F32, Phase::Capture(capture), Backend::Cpu { threads: u32::MAX });
        assert_eq!(peak.peak(), u64::MAX);
    }
}
