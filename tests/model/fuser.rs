//! A fuser's optimiser steps through a frozen model, against PyTorch's (`tests/reference/fuser_step.py`), and however the work
//! is cut.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use protocol::experiment::projector::Precision;
use serde::Deserialize;
use worker::model::{LoadOptions, Model};
use worker::projector::fuser::optimiser::{clip, norm};
use worker::projector::fuser::{
    AdamW, Example, FuserShape, Noise, Prefix, StepOptions, Suffix, gradient, gradient_under, initial,
};
use worker::random::Random;

use crate::checkpoints::{deviation, directory, numbers};

/// Between PyTorch's steps and ours, relative to the norm of all weights' change.
const NOISE_MAX: f64 = 1e-4;

#[derive(Deserialize)]
struct Stated {
    layers: usize,
    heads: usize,
    head_dim: usize,
    source: usize,
    hidden: usize,
    depth: usize,
    own: usize,
    temperature: f64,
    rate: f64,
    decay: f64,
    clip: f64,
    losses: Vec<f64>,
    norms: Vec<f64>,
    samples: Vec<Sample>,
}

#[derive(Deserialize)]
struct Sample {
    tokens: Vec<u32>,
    first: usize,
}

fn reference() -> (Stated, BTreeMap<String, Tensor>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/reference/fuser_step.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let stated = serde_json::from_str(&metadata.metadata().as_ref().unwrap()["step"]).unwrap();
    (stated, candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap().into_iter().collect())
}

fn target() -> Model {
    Model::load(&directory("llama"), &LoadOptions { ids_only: true, ..LoadOptions::default() }).unwrap()
}

/// All parameters named `prefix.*`, as one vector.
fn flat(shape: &FuserShape, tensors: &BTreeMap<String, Tensor>, prefix: &str) -> Vec<f32> {
    shape.parameters_in_order().iter().flat_map(|part| numbers(&tensors[&format!("{prefix}.{}", part.name)])).collect()
}

fn options(checkpointing: bool, micro_batch: usize, temperature: f64, precision: Precision) -> StepOptions {
    StepOptions { precision, checkpointing, micro_batch, dropout: 0.1, temperature, seed: 1, device: Device::Cpu }
}

#[test]
fn steps_are_those_of_pytorch() {
    let (stated, tensors) = reference();
    let Stated { layers, heads, head_dim, source, hidden, depth, .. } = stated;
    let shape = FuserShape { layers, source, heads, head_dim, hidden, depth };
    let model = target();
    let batch: Vec<Example> = stated
        .samples
        .iter()
        .enumerate()
        .map(|(index, sample)| {
            let tensor = |what: &str| tensors[&format!("sample.{index}.{what}")].clone();
            let positions = (0..tensor("base").dim(1).unwrap() as i64).collect();
            let prefix = Prefix { source: tensor("source"), base: tensor("base"), own: stated.own, positions };
            let scored = sample.first..sample.tokens.len() - 1;
            Example {
                place: index as u64,
                prefix,
                suffix: Suffix { tokens: sample.tokens.clone(), scored, teacher: None },
            }
        })
        .collect();
    let start = flat(&shape, &tensors, "start");
    for (checkpointing, micro_batch) in [(false, 2), (true, 1)] {
        let matrices = shape
            .parameters_in_order()
            .into_iter()
            .filter(worker::projector::fuser::shape::Parameter::is_matrix)
            .map(|part| part.range);
        let mut adam = AdamW::new(shape.parameters(), stated.decay, matrices.collect());
        let mut weights = start.clone();
        for step in 0..stated.losses.len() {
            let noise = |example: &Example| {
                let tensor = |what: String| tensors[&format!("noise.{step}.{}.{what}", example.place)].clone();
                let kept = (0..depth).map(|block| tensor(format!("kept.{block}"))).collect();
                Ok(Noise { gumbel: tensor("gumbel".to_owned()), kept: Some(kept) })
            };
            let options = options(checkpointing, micro_batch, stated.temperature, Precision::F32);
            let mut got = gradient_under(&model, &shape, &weights, &batch, &options, &noise).unwrap();
            assert!((got.loss - stated.losses[step]).abs() < 1e-5, "{} and {}", got.loss, stated.losses[step]);
            let error = deviation(&got.values, &flat(&shape, &tensors, &format!("gradient.{step}")));
            assert!(error < NOISE_MAX, "step {step}: the gradient deviates by {error:.1e}");
            assert!((clip(&mut got.values, stated.clip) - stated.norms[step]).abs() < 1e-4 * stated.norms[step]);
            adam.step(&mut weights, &got.values, stated.rate);
            let wanted = flat(&shape, &tensors, &format!("weights.{step}"));
            let moved = |to: &[f32]| to.iter().zip(&start).map(|(to, from)| to - from).collect::<Vec<_>>();
            let error = deviation(&moved(&weights), &moved(&wanted));
            eprintln!("step {step}: weights' change deviates by {error:.1e} from PyTorch's");
            assert!(error < NOISE_MAX, "step {step}: the weights' change deviates by {error:.1e}");
        }
    }
}

/// Made-up samples of different lengths.
fn samples(shape: &FuserShape) -> Vec<Example> {
    let normal = |columns: usize, width: usize, purpose: &str| {
        let mut random = Random::new(2, purpose);
        let values: Vec<f32> = (0..shape.maps() * columns * width).map(|_| random.normal() as f32).collect();
        Tensor::from_vec(values, (shape.maps(), columns, width), &Device::Cpu).unwrap()
    };
    let one = |place: usize| {
        let columns = 3 + place;
        let (source, base) = (normal(columns, shape.source, "source"), normal(columns, shape.target(), "base"));
        let tokens = (0..4 + place as u32).map(|token| (token * 11 + 5) % 30).collect::<Vec<_>>();
        let scored = 1..tokens.len() - 1;
        let prefix = Prefix { source, base, own: place % 2, positions: (0..columns as i64).collect() };
        Example { place: place as u64, prefix, suffix: Suffix { tokens, scored, teacher: None } }
    };
    (0..4).map(one).collect()
}

#[test]
fn micro_batches_and_checkpoints_leave_gradients_as_they_are() {
    let (model, shape) = (target(), FuserShape { layers: 2, source: 6, heads: 2, head_dim: 4, hidden: 8, depth: 3 });
    let weights = initial(&shape, 3, 0.5, false);
    let of = |checkpointing, micro_batch, precision| {
        gradient(&model, &shape, &weights, &samples(&shape), &options(checkpointing, micro_batch, 0.7, precision))
            .unwrap()
    };
    let whole = of(false, 4, Precision::F32);
    assert!(norm(&whole.values) > 1e-3);
    assert_eq!(whole.values, of(true, 4, Precision::F32).values, "what is computed again is the same");
    for micro_batch in [1, 3] {
        let cut = of(true, micro_batch, Precision::F32);
        let error = deviation(&cut.values, &whole.values);
        assert!(error < 1e-5 && (cut.loss - whole.loss).abs() < 1e-6, "{error:.1e}");
    }
    for (precision, most) in [(Precision::F16, 5e-3), (Precision::Bf16, 4e-2)] {
        let error = deviation(&of(true, 2, precision).values, &whole.values);
        eprintln!("{precision:?}: the gradient deviates by {error:.1e}");
        assert!(1e-6 < error && error < most, "{precision:?}: {error:.1e}");
    }
}

/// A teacher that is sure of the next token asks for the same as the token.
#[test]
fn a_sure_teacher_is_the_next_token() {
    let (model, shape) = (target(), FuserShape { layers: 2, source: 6, heads: 2, head_dim: 4, hidden: 8, depth: 3 });
    let weights = initial(&shape, 3, 0.5, false);
    let options = options(true, 4, 0.7, Precision::F32);
    let tokens = gradient(&model, &shape, &weights, &samples(&shape), &options).unwrap();
    let mut taught = samples(&shape);
    for Example { suffix, .. } in &mut taught {
        let targets = &suffix.tokens[suffix.scored.start + 1..=suffix.scored.end];
        let mut rows = vec![0.0_f32; targets.len() * model.vocabulary()];
        targets.iter().enumerate().for_each(|(row, id)| rows[row * model.vocabulary() + *id as usize] = 1.0);
        suffix.teacher = Some(Tensor::from_vec(rows, (targets.len(), model.vocabulary()), &Device::Cpu).unwrap());
    }
    let taught = gradient(&model, &shape, &weights, &taught, &options).unwrap();
    assert!((taught.loss - tokens.loss).abs() < 1e-5);
    assert!(deviation(&taught.values, &tokens.values) < 1e-4);
}
