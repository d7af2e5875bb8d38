//! How much memory a seat needs, before anything was measured: what each kind of shard does, in the memory model's words.
//!
//! Describes executors as they are: f32 weights, one model at a time, caches in the box's memory. Does not learn from finished
//! shards yet.

pub mod projector;

use protocol::catalogue;
use protocol::experiment::{InspectSpec, ShardSpec, TransferSpec};
use protocol::hardware::{Device, DeviceKind};
use protocol::ids::Role;
use protocol::memory::{Backend, Capture, Footprint, Inference, ModelShape, Phase, Quantisation, estimate};

/// What a model of unknown sizes is taken to need, bytes: too much rather than too little, since an estimate that is too small
/// ends in the kernel's out-of-memory killer.
pub const UNKNOWN_MODEL_BYTES: u64 = 4_000_000_000;
/// The memory model may be under what was measured by as much: 1 / 10.
const MARGIN_SHARE: u64 = 10;
/// Compute threads where the device is not known yet; each keeps 1 to 2 MB.
const THREADS: u32 = 16;
/// Tokens of a courier fact, at most, in tokenizers that know a word in four.
const FACT_TOKENS: u32 = 40;
/// Tokens of a question, likewise.
const QUESTION_TOKENS: u32 = 30;
/// Tokens that the source writes for condition `naive`.
const NAIVE_TOKENS: u32 = 30;

/// Memory to set aside for a seat wherever it is placed, bytes: the most of what a processor and a card need. Where the seats
/// of a gang have one model, the most of both, so that they may change places.
pub fn seat_bytes<'a>(spec: &ShardSpec, role: Role, shape: impl Fn(&str) -> Option<&'a ModelShape>) -> u64 {
    let on = |role, backend| seat_bytes_on(spec, role, backend, &shape);
    let most = |role: Role| on(role, Backend::Cpu { threads: THREADS }).max(on(role, Backend::CARD));
    match spec {
        ShardSpec::Transfer(_) => spec.roles().iter().map(|role| most(*role)).max().unwrap_or(0),
        _ => most(role),
    }
}

/// What one seat needs on a device that is known, with the models' sizes from `shape`. What a researcher's program needs is declared.
pub fn seat_bytes_on<'a>(
    spec: &ShardSpec,
    role: Role,
    backend: Backend,
    shape: &impl Fn(&str) -> Option<&'a ModelShape>,
) -> u64 {
    match spec {
        ShardSpec::Command(command) => return command.memory_bytes,
        ShardSpec::NoOp(_) => return 0,
        ShardSpec::Inspect(_) | ShardSpec::Transfer(_) | ShardSpec::ProjectorTrain(_) | ShardSpec::ProjectorEval(_) => {
        }
    }
    let need = seat_footprint(spec, role, backend, shape).map_or(UNKNOWN_MODEL_BYTES, |footprint| footprint.peak());
    need.saturating_add(need / MARGIN_SHARE)
}

/// What a seat takes, part by part; `None` if the sizes of its models are not known, or it runs none.
pub fn seat_footprint<'a>(
    spec: &ShardSpec,
    role: Role,
    backend: Backend,
    shape: impl Fn(&str) -> Option<&'a ModelShape>,
) -> Option<Footprint> {
    let known = |model: &str| catalogue::shape(model).or_else(|| shape(model));
    let (model, capture) = match spec {
        ShardSpec::ProjectorTrain(spec) => return projector::training(spec, role, backend, known),
        ShardSpec::ProjectorEval(spec) => return projector::evaluation(spec, role, backend, known),
        ShardSpec::Inspect(spec) => (&spec.model, inspected(spec)),
        ShardSpec::Transfer(spec) if role == Role::Source => (&spec.model, sent(spec)),
        ShardSpec::Transfer(spec) => (&spec.model, scored(spec)),
        ShardSpec::Command(_) | ShardSpec::NoOp(_) => return None,
    };
    Some(estimate(known(model)?, Quantisation::F32, Phase::Capture(capture), backend))
}

/// What computes on a device.
pub fn backend(device: &Device) -> Backend {
    match device.kind {
        DeviceKind::Cpu => Backend::Cpu { threads: device.threads },
        DeviceKind::Cuda => Backend::CARD,
    }
}

/// An inspection keeps the cache of each text. While one is made, the same text is computed again and goes through a packet:
/// three sequences run, and three more copies exist.
fn inspected(spec: &InspectSpec) -> Capture {
    let running = Inference { sequences: 3, ..Inference::of(FACT_TOKENS + 1) };
    Capture { running, caches: spec.texts.saturating_add(3), cache_tokens: FACT_TOKENS }
}

/// The source of a transfer holds one sequence, and its cache while it is written.
fn sent(_: &TransferSpec) -> Capture {
    let tokens = FACT_TOKENS + NAIVE_TOKENS;
    Capture { running: Inference::of(tokens), caches: 3, cache_tokens: tokens }
}

/// The target keeps every packet, two a fact, and what it makes of one; a sequence answers beside the oracle's.
fn scored(spec: &TransferSpec) -> Capture {
    let tokens = FACT_TOKENS + NAIVE_TOKENS;
    let running = Inference { sequences: 2, ..Inference::of(tokens + QUESTION_TOKENS + spec.answer_tokens) };
    Capture { running, caches: spec.facts.saturating_mul(2).saturating_add(3), cache_tokens: tokens }
}

#[cfg(test)]
mod tests {
    use protocol::experiment::LayerSelection;

    use super::*;

    fn inspect(model: &str, texts: u32) -> ShardSpec {
        ShardSpec::Inspect(InspectSpec { model: model.to_owned(), layers: LayerSelection::All, texts, seed: 0 })
    }

    #[test]
    fn a_seat_gets_what_its_model_takes_and_a_margin() {
        let smollm2 = seat_bytes(&inspect("smollm2-135m-instruct", 8), Role::Main, catalogue::shape);
        // 0.54 GB of f32 weights on a card, CUDA's 0.4 GB, caches.
        assert!((900_000_000..1_300_000_000).contains(&smollm2), "{smollm2}");
        let few = seat_bytes_on(&inspect("gemma-3-270m", 1), Role::Main, Backend::Cpu { threads: 2 }, &|_| None);
        let many = seat_bytes_on(&inspect("gemma-3-270m", 256), Role::Main, Backend::Cpu { threads: 2 }, &|_| None);
        assert!((650_000_000..900_000_000).contains(&few) && many > few + 300_000_000, "{few} {many}");
    }

    #[test]
    fn a_model_that_its_worker_described_needs_no_guess() {
        let spec = inspect("own.gguf", 1);
        assert!(seat_bytes(&spec, Role::Main, catalogue::shape) > UNKNOWN_MODEL_BYTES);
        let shape = ModelShape::new([2, 64, 4, 2, 16, 128], 1000, true, 512);
        let bytes = seat_bytes_on(&spec, Role::Main, Backend::Cpu { threads: 1 }, &|_| Some(&shape));
        assert!(bytes < 40_000_000, "{bytes}");
    }
}
