//! Rows of the tables that do not hold, each with the reason; the test asserts that they do not, so that the list cannot grow old.

use protocol::catalogue::{card, shape};
use protocol::memory::{Optimiser, Quantisation};

use crate::rows::{Range, about, calculated, full, fuser, gigabytes, inference, lora};

struct Wrong {
    /// Page, row and figure.
    seed: &'static str,
    theirs: Range,
    /// What it is, GB.
    ours: f64,
    /// The arithmetic.
    why: &'static str,
}

fn wrong(seed: &'static str, theirs: Range, bytes: u64, why: &'static str) -> Wrong {
    Wrong { seed, theirs, ours: gigabytes(bytes), why }
}

/// The rows.
fn rows() -> Vec<Wrong> {
    use Optimiser::{AdamW, AdamW8Bit, AdamWHalf};
    use Quantisation::{Bf16, Nf4};
    let qwen7 = shape("qwen2.5-7b").unwrap();
    let nib = calculated(15_000, 512, 8, 6);
    let lab = calculated(50_000, 1024, 16, 12);
    vec![
        wrong(
            "vram: weights = V d + layers x heads x d²",
            Range(0.0, 0.0),
            2 * calculated(15_000, 512, 8, 6).parameters(),
            "heads share d, they do not multiply it: a layer has 4 d² in attention and 8 d² in the MLP whatever the number \
             of heads; 15K, 512, 8, 6 has 7.7M + 6 x 12 x 512² = 26.6M weights, not 7.7M + 6 x 8 x 512² = 20.3M",
        ),
        wrong(
            "vram: 1K, 128, 4, 2: 0.08GB",
            about(0.08),
            full(&calculated(1000, 128, 4, 2), AdamW, [1, 128], false),
            "0.5M weights x 16 bytes = 8 MB, but CUDA takes 0.25 to 0.45 GB on a card before the first tensor",
        ),
        wrong(
            "vram: doubling heads, 1.7x",
            about(1.7),
            full(&calculated(50_000, 1024, 32, 12), AdamW, [4, 512], false) * 1_000_000_000
                / full(&lab, AdamW, [4, 512], false),
            "with d fixed, twice the heads are half as wide: the same weights, 1.0x (the figure is a ratio)",
        ),
        wrong(
            "vram: startup, 5K, 256, 8, 4: 4-6GB",
            Range(4.0, 6.0),
            full(&calculated(5000, 256, 8, 4), AdamW, [8, 512], false),
            "4.4M weights x 16 bytes = 0.07 GB; 8 x 512 tokens add 0.4 GB, CUDA 0.4 GB",
        ),
        wrong(
            "vram: nib, 15K, 512, 8, 6: 12-16GB",
            Range(12.0, 16.0),
            full(&nib, AdamW, [9, 512], false),
            "the same page gives 2.2 GB and ~9 GB for the same model; 2.2 GB holds with 9 x 512 tokens a step",
        ),
        wrong(
            "vram: nib, training, ~9GB",
            about(9.0),
            full(&nib, AdamW, [9, 512], false),
            "see the row above: 26.6M weights x 16 bytes = 0.43 GB, the rest is the batch",
        ),
        wrong(
            "vram: nib, inference, ~3GB",
            about(3.0),
            nib.parameters() * 4 + 400_000_000 + 512 * nib.kv_numbers_per_token() * 4,
            "26.6M x 4 bytes = 0.11 GB, CUDA 0.4 GB, a cache of 512 tokens 13 MB",
        ),
        wrong(
            "vram: startup, inference, ~1GB, training, ~3GB",
            about(3.0),
            full(&calculated(5000, 256, 4, 4), AdamW, [8, 512], false),
            "4.4M weights: 0.07 GB with gradients and moments; CUDA's 0.4 GB is most of it",
        ),
        wrong(
            "vram: research, 50K, 1024, 16, 12: inference ~18GB",
            about(18.0),
            lab.parameters() * 4 + 400_000_000 + 2048 * lab.kv_numbers_per_token() * 4,
            "202M x 4 bytes = 0.8 GB; the cache of 2048 tokens is 0.2 GB",
        ),
        wrong(
            "vram: research, 50K, 1024, 16, 12: training ~55GB, 32-80GB",
            Range(32.0, 80.0),
            full(&lab, AdamW, [4, 512], false),
            "the same page's calculator says 5.5 GB, which holds with 4 x 512 tokens: 202M x 16 bytes = 3.2 GB",
        ),
        wrong(
            "decision: 13B quantised, 18-24GB, borderline on 16GB",
            Range(18.0, 24.0),
            lora("llama-2-13b", Nf4, 16, [4, 512]),
            "12.7G weights x 0.516 bytes = 6.5 GB and 0.7 GB of tables in 16 bits: even QLoRA with 4 x 512 fits 16 GB",
        ),
        wrong(
            "decision: 16GB cannot hold 13B quantised",
            Range(16.6, 99.0),
            inference("llama-2-13b", Quantisation::Q6K, 4096),
            "13.0G weights x 0.82 bytes = 10.7 GB, a cache of 4096 tokens in halves 3.4 GB",
        ),
        wrong(
            "decision: A100 40GB, full fine-tune of 7B",
            Range(0.0, card("a100-40gb").unwrap().usable_bytes() as f64 / 1e9),
            full(qwen7, AdamW8Bit, [1, 512], true),
            "7.6G weights x (2 + 2 + 2) bytes = 45.7 GB even with 8-bit moments; its own row above says 40-60 GB",
        ),
        wrong(
            "decision: full precision training takes 4x 16GB",
            Range(0.0, 64.0),
            full(qwen7, AdamW, [1, 512], true),
            "7.6G weights x 16 bytes = 122 GB with AdamW in f32",
        ),
        wrong(
            "decision: RTX 5090 (24GB)",
            Range(0.0, 26.0),
            card("rtx-5090").unwrap().memory_bytes,
            "the card has 32 GB",
        ),
        wrong(
            "decision: 2048 tokens and more, memory quadratic in length",
            about(4.0),
            (lora("qwen2.5-7b", Nf4, 16, [1, 4096]) - lora("qwen2.5-7b", Nf4, 16, [1, 64])) * 1_000_000_000
                / (lora("qwen2.5-7b", Nf4, 16, [1, 2048]) - lora("qwen2.5-7b", Nf4, 16, [1, 64])),
            "with fused attention no scores are kept: twice the tokens add twice the memory, not four times (a ratio)",
        ),
        wrong(
            "road map: the three pairs by one recipe, 9, 16, 40GB: the second",
            about(16.0),
            fuser(("qwen3-4b", Bf16), "qwen2.5-3b", AdamW),
            "as the first row is reached, with 16-bit models and f32 states: 566M x 16 = 9.1 GB, 4.0G x 2 + 3.1G x 2 = 14.2 GB",
        ),
        wrong(
            "road map: the three pairs by one recipe: the third",
            about(40.0),
            fuser(("qwen3-32b", Bf16), "qwen2.5-7b", AdamW),
            "32.8G x 2 = 65.5 GB for the source alone; 40 GB needs it in 4 bits",
        ),
        wrong(
            "road map: the three pairs by one recipe: the first as the others",
            about(9.0),
            fuser(("qwen3-0.6b", Nf4), "qwen2.5-0.5b", AdamWHalf),
            "365M x 8 = 2.9 GB, models 1.5 GB: with the recipe of the other two it takes two thirds of 9 GB",
        ),
        wrong(
            "costs: Llama-1B to Mistral-7B on a 4090, as published",
            Range(0.0, 25.2),
            fuser(("llama-3.2-1b", Bf16), "mistral-7b", AdamW),
            "the fuser has 32 x 2 x 9.0M = 0.58G weights x 16 = 9.2 GB, models 7.2G x 2 + 1.2G x 2 = 17 GB; in 16 bits it fits",
        ),
    ]
}

#[test]
fn rows_that_are_wrong_are_wrong() {
    eprintln!("| row | ours, GB | why |");
    eprintln!("|---|---:|---|");
    let mut right = Vec::new();
    for Wrong { seed, theirs: Range(least, most), ours, why } in rows() {
        eprintln!("| {seed} | {ours:.2} | {why} |");
        if (least..=most).contains(&ours) {
            right.push(format!("{seed}: {ours:.2} GB is within {least:.2} to {most:.2}"));
        }
    }
    assert!(right.is_empty(), "{right:#?}");
}
