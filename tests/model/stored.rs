//! Weights as stored against the f32 path, which is the referee: exact for many tokens at once, close for one at a time.

use worker::model::{LoadOptions, Logits, Model, Precision};

use crate::reference::{GEMMA3, Reference, SMOLLM2, load_real, rates};

/// Mean KL(f32 ‖ stored) over positions that 8-bit activations may cost; llama.cpp's own path costs 4e-3 to 8e-3 here.
const MEAN_KL_MAX: f64 = 1e-2;

fn distribution(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().fold(f32::NEG_INFINITY, |largest, logit| largest.max(*logit));
    let exponents: Vec<f64> = logits.iter().map(|logit| f64::from(logit - largest).exp()).collect();
    let sum: f64 = exponents.iter().sum();
    exponents.into_iter().map(|exponent| exponent / sum).collect()
}

/// KL(p ‖ q) in nats.
pub(crate) fn kl(p: &[f32], q: &[f32]) -> f64 {
    let pairs = distribution(p).into_iter().zip(distribution(q));
    pairs.filter(|(p, _)| *p > 0.0).map(|(p, q)| p * (p / q.max(1e-300)).ln()).sum()
}

pub(crate) fn all_logits(model: &Model, ids: &[u32], pass: usize) -> Vec<Vec<f32>> {
    let mut context = model.start().unwrap();
    let positions: Vec<i64> = (0..ids.len() as i64).collect();
    let pieces = ids.chunks(pass).zip(positions.chunks(pass));
    pieces
        .flat_map(|(ids, positions)| model.forward(&mut context, ids, positions, Logits::All, None).unwrap())
        .collect()
}

fn check((name, json): (&str, &str)) {
    let Some((exact, _turn)) = load_real((name, json)) else { return };
    let reference: Reference = serde_json::from_str(json).unwrap();
    let stored =
        Model::load(exact.path(), &LoadOptions { precision: Precision::Stored, ..LoadOptions::default() }).unwrap();
    let mut costs = Vec::new();
    for case in reference.cases.iter().filter(|case| case.ids.len() <= 64) {
        let want = all_logits(&exact, &case.ids, 64);
        let tiles = all_logits(&stored, &case.ids, 64);
        for (position, (want, got)) in want.iter().zip(&tiles).enumerate() {
            let worst = want.iter().zip(got).map(|(want, got)| (want - got).abs()).fold(0f32, f32::max);
            assert!(worst <= 1e-3, "{name} {} position {position}: a logit differs by {worst}", case.name);
            assert!(kl(want, got) <= 1e-6, "{name} {} position {position}", case.name);
        }
        let steps = all_logits(&stored, &case.ids, 1);
        costs.extend(want.iter().zip(&steps).map(|(want, got)| kl(want, got)));
    }
    let mean = costs.iter().sum::<f64>() / costs.len() as f64;
    let largest = costs.iter().fold(0f64, |largest, cost| largest.max(*cost));
    eprintln!(
        "{name}, stored, one token at a time: mean KL {mean:.1e}, largest {largest:.1e}, {} positions",
        costs.len()
    );
    assert!(mean <= MEAN_KL_MAX, "{name}: mean KL {mean}");
    rates(&stored, &format!("{name}, stored"));
}

#[test]
fn smollm2_stored_agrees_with_f32() {
    check(SMOLLM2);
}

#[test]
fn gemma3_stored_agrees_with_f32() {
    check(GEMMA3);
}
