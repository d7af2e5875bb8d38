//! Tests of the model layer, one binary.
//!
//! - `reference`: the two real models against independently computed numbers; skipped where the files are absent.
//! - `full`: the same in full, every path; run by `make check-reference`.
//! - `stored`: weights as stored against the f32 path, on both real models.
//! - `families`: every family on tiny random models written by `tiny`: prefill, caches, moves, packets.
//! - `passes`: batches, parts of a model, taps and caches of halves, on tiny models and on both real ones.
//! - `bits`: packed caches on both real models; skipped where the files are absent.
//! - `card`: what runs on cards, here on the processor.
//! - `checkpoints`: tiny models written by `transformers`, directories and GGUF; directories that lie or are cut.
//! - `gradients`: through frozen models, against PyTorch and finite differences.
//! - `fuser`: optimiser steps of a projector through a frozen model, against PyTorch's.
//! - `rounds`: a fuser's training on tiny models, cut, resumed and shared out.
//! - `damage`: files that lie, are cut or are garbage.
//! - `text`: tokenizers and chat templates; `tokens`: their ids against llama.cpp's, for 200 strings.
//! - `writing`: samplers with seeds, many sequences that write at once, and the tool that runs them.
//! - `experiments`: the procedures, on tiny models and on the real ones.
//! - `projectors`: the same of projectors between two models.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "tests panic, and say on stderr what they skip and measure"
)]

mod bits;
mod card;
mod checkpoints;
mod damage;
mod experiments;
mod families;
mod full;
mod fuser;
mod gradients;
mod passes;
mod projectors;
mod reference;
mod rounds;
mod stored;
mod text;
mod tiny;
mod tokens;
mod writing;

/// What `card` checks: here the processor, doing what a card would do.
fn card() -> Option<worker::model::DeviceChoice> {
    Some(worker::model::DeviceChoice::CpuAsCard)
}
