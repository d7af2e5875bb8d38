//! Memory of the parts of a projector's training and evaluation.
//!
//! With d_s and d_t numbers of a layer's keys in the source and in the target, and J source layers for a target layer, a ridge
//! layer has p = 2 d_s J features and 2 d_t targets: sums are X'X (its triangle), X'Y and, for the control, X'Y of shuffled
//! pairs, in f64, once for the samples that are fitted and once for those that are held out.

use protocol::experiment::projector::{
    CorpusText, EvalSpec, FuserRecipe, LayerMap, Method, ProjectorRef, Stage, TrainSpec,
};
use protocol::ids::Role;
use protocol::memory::{
    Backend, Capture, Footprint, Inference, ModelShape, Optimiser, Phase, ProjectorKind, ProjectorTraining,
    Quantisation, Training, estimate,
};

use super::{FACT_TOKENS, NAIVE_TOKENS, QUESTION_TOKENS};

/// Tokens of a made-up sample at most: two persons, a question, an answer.
const COURIER_TOKENS: u32 = 2 * FACT_TOKENS + QUESTION_TOKENS;
/// Tokens of a sample of a file at most.
const FILE_TOKENS: u32 = 512;
/// Source layers of a target layer where a projector's own are not known.
const LAYERS_USUAL: u64 = 3;
/// Caches that wait between source and target.
const CACHES_AHEAD: u32 = 4;
/// Bytes that an outer step holds for each number: old and new weights, momentum, one delta, the sum in f64.
const OUTER_BYTES: u64 = 4 + 4 + 4 + 4 + 8;

/// What a seat of a part of a training takes.
pub(super) fn training<'a>(
    spec: &TrainSpec,
    role: Role,
    backend: Backend,
    shape: impl Fn(&str) -> Option<&'a ModelShape>,
) -> Option<Footprint> {
    let (source, target) = (shape(&spec.source)?, shape(&spec.target)?);
    let tokens = match spec.corpus.text {
        CorpusText::Couriers(_) => COURIER_TOKENS,
        CorpusText::Files(_) => FILE_TOKENS,
    };
    let pair = Pair { source, target, features: features(&spec.layers, source, target) };
    Some(match (&spec.stage, &spec.method, role) {
        (Stage::Statistics(_) | Stage::Steps { .. }, _, Role::Source) => captured(source, tokens, backend),
        (Stage::Steps { .. }, Method::Fuser(recipe), _) => pair.stepping(recipe, tokens, backend),
        (Stage::Solve { .. }, ..) => {
            // The sums, one part beside them, and what is solved for, with one layer's factors.
            let solving = pair.widest().saturating_mul(pair.widest()).saturating_mul(16);
            let kept = pair.sums().saturating_mul(2).saturating_add(pair.ridge().saturating_mul(8));
            alone(kept.saturating_add(solving), backend)
        }
        (Stage::Outer { .. }, Method::Fuser(recipe), _) => {
            alone(fuser(recipe).parameters(source, target).saturating_mul(OUTER_BYTES), backend)
        }
        _ => {
            let mut footprint = captured(target, tokens, backend);
            footprint.captured = footprint.captured.saturating_add(pair.sums());
            footprint
        }
    })
}

/// What a seat of an evaluation takes.
pub(super) fn evaluation<'a>(
    spec: &EvalSpec,
    role: Role,
    backend: Backend,
    shape: impl Fn(&str) -> Option<&'a ModelShape>,
) -> Option<Footprint> {
    let (source, target) = (shape(&spec.source)?, shape(&spec.target)?);
    let tokens = 2 * FACT_TOKENS + NAIVE_TOKENS;
    if role == Role::Source {
        return Some(captured(source, tokens, backend));
    }
    let running = Inference { sequences: 2, ..Inference::of(tokens + QUESTION_TOKENS + spec.answer_tokens) };
    let capture = Capture { running, caches: spec.facts.saturating_mul(2).saturating_add(3), cache_tokens: tokens };
    let mut footprint = estimate(target, Quantisation::F32, Phase::Capture(capture), backend);
    let usual = Pair { source, target, features: vec![2 * source.kv_width() * LAYERS_USUAL; target.layers as usize] };
    let bytes = |projector: &ProjectorRef| match projector {
        ProjectorRef::Artifact(artifact) => artifact.bytes,
        ProjectorRef::Trained(_) => usual.ridge().saturating_mul(4),
    };
    let control = spec.shuffled.as_ref().unwrap_or(&spec.projector);
    footprint.trained = bytes(&spec.projector).saturating_add(bytes(control));
    Some(footprint)
}

/// Numbers of a fuser of this recipe.
pub fn fuser(recipe: &FuserRecipe) -> ProjectorKind {
    ProjectorKind::Fuser { hidden: recipe.hidden, inner: recipe.hidden, depth: recipe.depth }
}

/// A model that reads samples, with a few caches on their way.
fn captured(shape: &ModelShape, tokens: u32, backend: Backend) -> Footprint {
    let capture = Capture { running: Inference::of(tokens), caches: CACHES_AHEAD, cache_tokens: tokens };
    estimate(shape, Quantisation::F32, Phase::Capture(capture), backend)
}

/// Numbers without a model.
fn alone(bytes: u64, backend: Backend) -> Footprint {
    let runtime = match backend {
        Backend::Cpu { .. } => PROCESS_BYTES,
        Backend::Cuda { context_bytes } => context_bytes,
    };
    Footprint { trained: bytes, runtime, ..Footprint::default() }
}

/// An executor that has read a file and computed a little, bytes.
const PROCESS_BYTES: u64 = 50_000_000;

/// Two models and, for each target layer, p.
struct Pair<'a> {
    source: &'a ModelShape,
    target: &'a ModelShape,
    features: Vec<u64>,
}

impl Pair<'_> {
    fn targets(&self) -> u64 {
        2 * self.target.kv_width()
    }

    fn widest(&self) -> u64 {
        self.features.iter().copied().max().unwrap_or(0)
    }

    /// Bytes of a part's sums.
    fn sums(&self) -> u64 {
        let layer = |p: &u64| (p / 2 + 1 + 2 * self.targets()).saturating_mul(*p).saturating_mul(16);
        self.features.iter().map(layer).fold(0, u64::saturating_add)
    }

    /// Numbers of a ridge projector.
    fn ridge(&self) -> u64 {
        let layer = |p: &u64| p.saturating_add(1).saturating_mul(self.targets());
        self.features.iter().map(layer).fold(0, u64::saturating_add)
    }

    /// The target, the fuser with gradients and moments, and the weights that the round began with.
    fn stepping(&self, recipe: &FuserRecipe, tokens: u32, backend: Backend) -> Footprint {
        let projector = fuser(recipe);
        let training = Training {
            batch: recipe.micro_batch,
            tokens,
            checkpointing: recipe.checkpointing,
            optimiser: Optimiser::AdamW,
        };
        let phase = ProjectorTraining { source: self.source, source_held: None, projector, training };
        let mut footprint = estimate(self.target, Quantisation::F32, Phase::Projector(phase), backend);
        let began = projector.parameters(self.source, self.target).saturating_mul(4);
        let base = if recipe.base.is_some() { self.ridge().saturating_mul(4) } else { 0 };
        footprint.trained = footprint.trained.saturating_add(began).saturating_add(base);
        footprint
    }
}

/// p of each target layer.
fn features(layers: &LayerMap, source: &ModelShape, target: &ModelShape) -> Vec<u64> {
    let count = |layer: usize| match layers {
        LayerMap::LastAligned => 1,
        LayerMap::Proportional(nearest) => u64::from((*nearest).min(source.layers)),
        LayerMap::Given(lists) => lists.get(layer).map_or(1, |list| list.len() as u64),
    };
    (0..target.layers as usize).map(|layer| (2 * source.kv_width()).saturating_mul(count(layer))).collect()
}

#[cfg(test)]
mod tests {
    use protocol::catalogue::shape;

    use super::*;

    #[test]
    fn sums_are_as_large_as_published() {
        let (source, target) = (shape("smollm2-135m-instruct").unwrap(), shape("gemma-3-270m").unwrap());
        let pair = Pair { source, target, features: features(&LayerMap::Proportional(3), source, target) };
        assert_eq!((pair.features.len(), pair.widest(), pair.targets()), (18, 1152, 512));
        // 5.3 MB and 4.7 MB a layer; twice, and the targets of the control beside them.
        let megabytes = pair.sums() / 1_000_000;
        assert!((520..540).contains(&megabytes), "{megabytes}");
    }
}
