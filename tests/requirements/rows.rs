//! Rows that hold. Where a table names no batch, length or kind of optimiser, the row says with which it holds.

use protocol::catalogue::{card, shape};
use protocol::memory::{
    AdapterTraining, Backend, Inference, ModelShape, Optimiser, Phase, ProjectorKind, ProjectorTraining, Quantisation,
    Training, estimate,
};

/// A range that a table gives, GB.
pub(crate) struct Range(pub(crate) f64, pub(crate) f64);

/// A figure written with a `~`, or without a range: as much to either side.
pub(crate) const ABOUT: f64 = 0.15;

pub(crate) fn about(gigabytes: f64) -> Range {
    Range(gigabytes * (1.0 - ABOUT), gigabytes * (1.0 + ABOUT))
}

pub(crate) fn gigabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

pub(crate) fn inference(model: &str, held: Quantisation, tokens: u32) -> u64 {
    estimate(shape(model).unwrap(), held, Phase::Inference(Inference::of(tokens).halves()), Backend::CARD).peak()
}

/// Adapters of this rank, with the layers' inputs kept and the rest computed again.
pub(crate) fn lora(model: &str, held: Quantisation, rank: u32, [batch, tokens]: [u32; 2]) -> u64 {
    let training = Training { batch, prefix: 0, tokens, checkpointing: true, optimiser: Optimiser::AdamW };
    let phase = Phase::Adapter(AdapterTraining { rank, training });
    estimate(shape(model).unwrap(), held, phase, Backend::CARD).peak()
}

pub(crate) fn full(model: &ModelShape, optimiser: Optimiser, [batch, tokens]: [u32; 2], checkpointing: bool) -> u64 {
    let phase = Phase::Full(Training { batch, prefix: 0, tokens, checkpointing, optimiser });
    estimate(model, Quantisation::Bf16, phase, Backend::CARD).peak()
}

/// C2C's fuser from one model's cache into another's, on one text of 256 tokens.
pub(crate) fn fuser(source: (&str, Quantisation), target: &str, optimiser: Optimiser) -> u64 {
    let training = Training { batch: 1, prefix: 0, tokens: 256, checkpointing: false, optimiser };
    let projector = ProjectorTraining {
        source: shape(source.0).unwrap(),
        source_held: Some(source.1),
        projector: ProjectorKind::C2C,
        training,
    };
    estimate(shape(target).unwrap(), Quantisation::Bf16, Phase::Projector(projector), Backend::CARD).peak()
}

/// A decoder as the calculator of the vram page has it: heads of d / heads, an MLP of 8 d², one table.
pub(crate) fn calculated(vocabulary: u32, d: u32, heads: u32, layers: u32) -> ModelShape {
    ModelShape::new([layers, d, heads, heads, d / heads, d * 8 / 3], vocabulary, true, 2048)
}

/// What a probe takes: vectors of the residual stream and one matrix, on a card.
fn probe() -> u64 {
    let vectors = 100_000 * 3584 * 4;
    vectors + Backend::CARD.context_bytes()
}

trait Context {
    fn context_bytes(self) -> u64;
}

impl Context for Backend {
    fn context_bytes(self) -> u64 {
        match self {
            Self::Cuda { context_bytes } => context_bytes,
            Self::Cpu { .. } => 0,
        }
    }
}

struct Row {
    /// Page and row.
    seed: &'static str,
    theirs: Range,
    /// With what it holds.
    ours: (&'static str, u64),
}

fn row(seed: &'static str, theirs: Range, how: &'static str, bytes: u64) -> Row {
    Row { seed, theirs, ours: (how, bytes) }
}

fn rows() -> Vec<Row> {
    use Optimiser::{AdamW, AdamW8Bit, AdamWHalf};
    use Quantisation::{Bf16, F16, Nf4, Q4_0, Q4KM, Q6K, Q8_0};
    let tinyllama = shape("tinyllama-1.1b").unwrap();
    vec![
        // Hardware options.
        row(
            "options: 8B in 4 bits, ~5GB",
            about(5.0),
            "Llama 3.1 8B, q4_0, 512 tokens",
            inference("llama-3.1-8b", Q4_0, 512),
        ),
        row("options: it fits 6GB", Range(0.0, 5.91), "q4_k_m, 512 tokens", inference("llama-3.1-8b", Q4KM, 512)),
        row(
            "options: 13B does not fit 6GB",
            Range(5.91, 99.0),
            "Llama 2 13B, q4_0",
            inference("llama-2-13b", Q4_0, 512),
        ),
        row(
            "options: 12GB, 8B at higher precision",
            Range(6.0, 12.35),
            "q8_0, 4096 tokens",
            inference("llama-3.1-8b", Q8_0, 4096),
        ),
        row(
            "options: 12GB, parallel instances in 4 bits",
            Range(8.0, 12.35),
            "two of q4_0, 512 tokens each",
            2 * inference("llama-3.1-8b", Q4_0, 512),
        ),
        row(
            "options: 24GB, full precision 8B",
            Range(15.0, 25.2),
            "bf16, 4096 tokens",
            inference("llama-3.1-8b", Bf16, 4096),
        ),
        row(
            "options: 24GB, quantised 13B",
            Range(7.0, 25.2),
            "Llama 2 13B, q8_0, 4096 tokens",
            inference("llama-2-13b", Q8_0, 4096),
        ),
        row(
            "options: phase 4 on 24GB",
            Range(12.0, 25.2),
            "two Llama 3.1 8B in q6_k, 4096 tokens each",
            2 * inference("llama-3.1-8b", Q6K, 4096),
        ),
        row(
            "options: phase 5 on 48GB",
            Range(25.2, 51.0),
            "four Llama 3.1 8B in q8_0, 4096 tokens each",
            4 * inference("llama-3.1-8b", Q8_0, 4096),
        ),
        row(
            "options: phase 6 on 2x 24GB",
            Range(0.0, 50.4),
            "QLoRA of Llama 3.1 8B, rank 16, 4 x 2048",
            lora("llama-3.1-8b", Nf4, 16, [4, 2048]),
        ),
        // Hardware decision.
        row(
            "decision: QLoRA Qwen2.5-7B, 10-12GB",
            Range(10.0, 12.0),
            "nf4, rank 16, 4 x 512",
            lora("qwen2.5-7b", Nf4, 16, [4, 512]),
        ),
        row(
            "decision: learning rates, ~12GB each",
            about(12.0),
            "nf4, rank 16, 4 x 512",
            lora("qwen2.5-7b", Nf4, 16, [4, 512]),
        ),
        row(
            "decision: ranks, 10-14GB, least",
            Range(10.0, 14.0),
            "nf4, rank 8, 4 x 512",
            lora("qwen2.5-7b", Nf4, 8, [4, 512]),
        ),
        row(
            "decision: ranks, 10-14GB, most",
            Range(10.0, 14.0),
            "nf4, rank 64, 4 x 512",
            lora("qwen2.5-7b", Nf4, 64, [4, 512]),
        ),
        row("decision: forgetting, ~10GB", about(10.0), "q8_0, 2048 tokens", inference("qwen2.5-7b", Q8_0, 2048)),
        row("decision: attention, ~10GB", about(10.0), "q8_0, 2048 tokens", inference("qwen2.5-7b", Q8_0, 2048)),
        row(
            "decision: base against tuned, ~10GB",
            about(10.0),
            "q8_0, 1024 tokens",
            inference("qwen2.5-7b", Q8_0, 1024),
        ),
        row(
            "decision: activations, 10-12GB",
            Range(10.0, 12.0),
            "q8_0, 6144 tokens",
            inference("qwen2.5-7b", Q8_0, 6144),
        ),
        row("decision: linear probe, 1-2GB", Range(1.0, 2.0), "100000 vectors in f32", probe()),
        row("decision: 7B in 4 bits on 16GB", Range(4.0, 16.6), "nf4, 4096 tokens", inference("qwen2.5-7b", Nf4, 4096)),
        row(
            "decision: full tuning of 7B, 40-60GB",
            Range(40.0, 60.0),
            "bf16 with 8-bit AdamW, 1 x 512",
            full(shape("qwen2.5-7b").unwrap(), AdamW8Bit, [1, 512], true),
        ),
        row(
            "decision: 70B quantised, 40GB and more",
            Range(38.0, 99.0),
            "Llama 3.1 70B, nf4",
            inference("llama-3.1-70b", Nf4, 2048),
        ),
        row(
            "decision: 24GB, 13B quantised",
            Range(7.0, 25.2),
            "QLoRA of Llama 2 13B, 4 x 512",
            lora("llama-2-13b", Nf4, 16, [4, 512]),
        ),
        row(
            "decision: 40GB, 30B quantised",
            Range(17.0, 42.4),
            "Qwen2.5-32B, q8_0, 2048 tokens",
            inference("qwen2.5-32b", Q8_0, 2048),
        ),
        // Road map.
        row(
            "road map: ~0.6MB for 27 tokens",
            about(0.0006),
            "TinyLlama, f16",
            27 * tinyllama.kv_numbers_per_token() * 2,
        ),
        row(
            "road map: TinyLlama in 4 bits on 6GB",
            Range(0.0, 5.91),
            "nf4, 2048 tokens",
            inference("tinyllama-1.1b", Nf4, 2048),
        ),
        row(
            "road map: Qwen3-0.6B to Qwen2.5-0.5B, ~9GB",
            about(9.0),
            "bf16 models, fuser and AdamW in f32",
            fuser(("qwen3-0.6b", Bf16), "qwen2.5-0.5b", AdamW),
        ),
        row(
            "road map: Qwen3-4B to Qwen2.5-3B, ~16GB",
            about(16.0),
            "source in nf4, fuser and AdamW in 16 bits",
            fuser(("qwen3-4b", Nf4), "qwen2.5-3b", AdamWHalf),
        ),
        row(
            "road map: Qwen3-32B to Qwen2.5-7B, ~40GB",
            about(40.0),
            "source in nf4, fuser and AdamW in 16 bits",
            fuser(("qwen3-32b", Nf4), "qwen2.5-7b", AdamWHalf),
        ),
        row("road map: sweep at 0.6B", Range(0.0, 25.2), "Qwen3-0.6B, bf16", inference("qwen3-0.6b", Bf16, 2048)),
        row(
            "road map: sweep at 8B on 24GB",
            Range(0.0, 25.2),
            "Llama 3.1 8B, bf16",
            inference("llama-3.1-8b", Bf16, 2048),
        ),
        row(
            "road map: sweep at 32B on 24GB",
            Range(0.0, 25.2),
            "Qwen2.5-32B, q4_k_m",
            inference("qwen2.5-32b", Q4KM, 2048),
        ),
        row(
            "road map: phase 4 on 12GB",
            Range(8.0, 12.35),
            "two 8B in q4_0, 512 tokens",
            2 * inference("llama-3.1-8b", Q4_0, 512),
        ),
        row(
            "road map: 3090, 8B at full precision",
            Range(15.0, 25.2),
            "f16, 2048 tokens",
            inference("llama-3.1-8b", F16, 2048),
        ),
        row(
            "road map: 2x 4090, 70B quantised",
            Range(38.0, 50.4),
            "Llama 3.1 70B, q4_k_m",
            inference("llama-3.1-70b", Q4KM, 2048),
        ),
        // Cost proposal: each on the card it names, 24 GB.
        row(
            "costs: TinyLlama and Qwen, 3090",
            Range(0.0, 25.2),
            "fuser into Qwen2.5-0.5B",
            fuser(("tinyllama-1.1b", Bf16), "qwen2.5-0.5b", AdamW),
        ),
        row(
            "costs: Qwen-0.5B and 1.5B, 3090",
            Range(0.0, 25.2),
            "fuser into 1.5B",
            fuser(("qwen2.5-0.5b", Bf16), "qwen2.5-1.5b", AdamW),
        ),
        row(
            "costs: SmolLM to TinyLlama, 3090",
            Range(0.0, 25.2),
            "fuser",
            fuser(("smollm2-360m", Bf16), "tinyllama-1.1b", AdamW),
        ),
        row(
            "costs: Llama-1B and Mistral-7B, 4090",
            Range(0.0, 25.2),
            "fuser and AdamW in 16 bits",
            fuser(("llama-3.2-1b", Bf16), "mistral-7b", AdamWHalf),
        ),
        row("costs: Mistral-7B, 4090", Range(0.0, 25.2), "bf16, 4096 tokens", inference("mistral-7b", Bf16, 4096)),
        row("costs: Llama-3.2-3B, 3090", Range(0.0, 25.2), "bf16, 4096 tokens", inference("llama-3.2-3b", Bf16, 4096)),
        row("costs: Qwen-7B, 4090", Range(0.0, 25.2), "bf16, 4096 tokens", inference("qwen2.5-7b", Bf16, 4096)),
        row(
            "costs: 13B and more on 40GB",
            Range(25.2, 42.4),
            "Llama 2 13B, f16, 2048 tokens",
            inference("llama-2-13b", F16, 2048),
        ),
        // The calculator of the vram page: AdamW in f32, sequences of 512.
        row(
            "vram: 15K, 512, 8, 6: 2.2GB",
            about(2.2),
            "9 x 512",
            full(&calculated(15_000, 512, 8, 6), AdamW, [9, 512], false),
        ),
        row(
            "vram: 50K, 1024, 16, 12: 5.5GB",
            about(5.5),
            "4 x 512",
            full(&calculated(50_000, 1024, 16, 12), AdamW, [4, 512], false),
        ),
        row(
            "vram: 100K, 2048, 32, 24: 30.9GB",
            about(30.9),
            "4 x 512",
            full(&calculated(100_000, 2048, 32, 24), AdamW, [4, 512], false),
        ),
        row(
            "vram: learning, 1-2GB",
            Range(1.0, 2.0),
            "1K, 128, 4, 2: 64 x 512",
            full(&calculated(1000, 128, 4, 2), AdamW, [64, 512], false),
        ),
    ]
}

#[test]
fn rows_of_the_tables_hold() {
    eprintln!("| row | theirs, GB | ours, GB | with |");
    eprintln!("|---|---|---:|---|");
    let mut failed = Vec::new();
    for Row { seed, theirs: Range(least, most), ours: (how, bytes) } in rows() {
        let ours = gigabytes(bytes);
        eprintln!("| {seed} | {least:.4} to {most:.4} | {ours:.4} | {how} |");
        if !(least..=most).contains(&ours) {
            failed.push(format!("{seed}: {ours:.2} GB with {how}, theirs {least:.2} to {most:.2}"));
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn what_halves_memory_halves_it() {
    // The vram page's advice: 16 bits instead of 32, and layers' inputs only.
    let bytes = |held| inference("llama-3.1-8b", held, 512);
    let share = bytes(Quantisation::F16) * 100 / bytes(Quantisation::F32);
    assert!((48..=56).contains(&share), "{share} %");
    let model = calculated(50_000, 1024, 16, 12);
    let share =
        full(&model, Optimiser::AdamW, [16, 512], true) * 100 / full(&model, Optimiser::AdamW, [16, 512], false);
    assert!((40..=80).contains(&share), "{share} %");
    // A model of 30 GB on two cards of 16 GB.
    assert!(30_000_000_000 < 2 * card("rtx-4080").unwrap().usable_bytes());
}
