//! Real models take what `model show` computes for them; skipped where their files are absent.

use std::path::PathBuf;

use worker::model::team::team;
use worker::model::{CachePrecision, Footprint, LoadOptions, Model, Plan, Precision, StoredBytes};

use crate::allocator::{Usage, measure};

const SMOLLM2: &str = "smollm2-135m-instruct";
const GEMMA3: &str = "gemma-3-270m";

/// A model of the catalogue, if it was brought.
fn model_file(name: &str) -> Option<PathBuf> {
    let directory = protocol::models::ModelsDir::from_env().ok()?;
    match directory.locate(name) {
        Ok((path, _)) => Some(path),
        Err(error) => {
            eprintln!("SKIPPED: {name}: {error}");
            None
        }
    }
}

/// Two passes of Gemma, more of SmolLM2.
const TOKENS: usize = 600;

/// A prefill whose context and logits are kept.
fn prefill(model: &Model) -> Usage {
    let ids: Vec<u32> = (0..TOKENS).map(|i| u32::try_from((1000 + i * 7919) % 40_000).unwrap()).collect();
    let work = || {
        let mut context = model.start().unwrap();
        let logits = model.prefill(&mut context, &ids).unwrap();
        (context, logits)
    };
    measure(work).1
}

fn near(place: &str, computed: u64, measured: usize) {
    let ratio = computed as f64 / measured as f64;
    let megabytes = |bytes: f64| bytes / 1e6;
    let (computed, measured) = (megabytes(computed as f64), megabytes(measured as f64));
    eprintln!("{place}: {measured:.2} MB measured, {computed:.2} MB computed, {ratio:.3}");
    assert!((0.9..=1.1).contains(&ratio), "{place}: {ratio}");
}

fn check(name: &str) {
    let Some(path) = model_file(name) else { return };
    let threads = team().size();
    for (precision, cache) in [
        (Precision::Stored, CachePrecision::F32),
        (Precision::Stored, CachePrecision::F16),
        (Precision::F32, CachePrecision::F32),
    ] {
        let place = format!("{name}, {precision:?}, caches {cache:?}");
        let options = LoadOptions { precision, cache, ids_only: true, ..LoadOptions::default() };
        let (model, loaded) = measure(|| Model::load(&path, &options).unwrap());
        let plan = Plan { precision, cache, tokens: TOKENS, sequences: 1, threads };
        let stored = StoredBytes::of(&model).unwrap();
        let footprint = Footprint::new(model.config(), model.vocabulary(), stored, &plan);
        near(&format!("{place}, weights"), footprint.weights, loaded.kept);
        // What threads keep is taken the first time, and is not part of the sum.
        if precision == Precision::Stored && cache == CachePrecision::F32 {
            let first = prefill(&model).peak;
            let all = (footprint.threads + footprint.context + footprint.prefill.peak()) as f64;
            eprintln!("{place}, the first time: {:.2} MB measured, {:.2} MB computed", first as f64 / 1e6, all / 1e6);
            assert!(all >= 0.9 * first as f64, "{place}: {all} computed for {first}");
        }
        let usage = prefill(&model);
        near(&format!("{place}, context and pass"), footprint.context + footprint.prefill.peak(), usage.peak);
        let logits = (model.vocabulary() * size_of::<f32>()) as u64;
        near(&format!("{place}, context"), footprint.context + logits, usage.kept);
    }
    let load = |ids_only| {
        Model::load(&path, &LoadOptions { precision: Precision::Stored, ids_only, ..LoadOptions::default() })
    };
    let (model, with) = measure(|| load(false).unwrap());
    let vocabulary = model.vocabulary();
    drop(model);
    let (_model, without) = measure(|| load(true).unwrap());
    let tokenizer = with.kept - without.kept;
    eprintln!("{name}: tokenizer {:.1} MB, {} bytes a token", tokenizer as f64 / 1e6, tokenizer / vocabulary);
    assert!(tokenizer <= 260 * vocabulary, "more than what is computed for it");
}

#[test]
fn smollm2_takes_what_is_computed() {
    check(SMOLLM2);
}

#[test]
fn gemma3_takes_what_is_computed() {
    check(GEMMA3);
}
