//! What runs on a card, on the processor: the same operations on whole tensors, held against the referee.
//!
//! `tests/cuda` runs the same checks on a card where there is one.

use candle_core::{Tensor, Var};
use candle_nn::loss::cross_entropy;
use worker::cache::KvCache;
use worker::model::{
    Adapter, Adapters, DeviceChoice, LoadOptions, Logits, Model, ModelError, Place, Precision, Projection, TrackedCache,
};
use worker::random::Random;
use worker::support::ElementType;

use crate::checkpoints::{deviation, numbers};
use crate::reference::{GEMMA3, Reference, SMOLLM2, check_model, load_real, load_real_at};
use crate::stored::{all_logits, kl};
use crate::tiny::{FAMILIES, Tiny};

/// Elements, and how far logits, keys and values of a tiny model may deviate with dense weights: relative, L2. The second is
/// for gradients. Each is twice what was seen on the processor, or more.
const LIMITS: [(ElementType, f64, f64); 3] =
    [(ElementType::F32, 1e-5, 1e-4), (ElementType::F16, 1e-2, 3e-2), (ElementType::Bf16, 8e-2, 2e-1)];
/// The same with stored weights, whose products round activations to 8 bits.
const ROUNDED_MAX: f64 = 1e-1;

const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Stored];

/// Mean KL(referee ‖ halves) of a real model that rounding weights, keys and values to 11 bits may cost, nats.
const HALVES_KL_MAX: f64 = 1e-4;

fn at(family: &str, precision: Precision, place: Place) -> Model {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tiny.gguf");
    Tiny::new(family).write(&path);
    Model::load(&path, &LoadOptions { precision, place, ..LoadOptions::default() }).unwrap()
}

fn ids() -> Vec<u32> {
    (0..24).map(|index| (index * 37 + 11) % 256).collect()
}

/// Logits of every token, and the cache; after a first piece, then single tokens, then the rest.
fn run(model: &Model, pieces: &[usize]) -> (Vec<f32>, KvCache) {
    let (ids, mut context, mut logits) = (ids(), model.start().unwrap(), Vec::new());
    let mut start = 0;
    for length in pieces {
        let positions: Vec<i64> = (start as i64..).take(*length).collect();
        let piece = &ids[start..start + length];
        logits.extend(model.forward(&mut context, piece, &positions, Logits::All, None).unwrap().concat());
        start += length;
    }
    (logits, model.extract(&context).unwrap())
}

fn flat(cache: &KvCache) -> Vec<f32> {
    cache.layers().flat_map(|(_, layer)| layer.k.iter().chain(&layer.v)).copied().collect()
}

#[test]
fn a_cards_numbers_are_the_referees() {
    let Some(device) = crate::card() else { return };
    for (elements, limit, _) in LIMITS {
        for precision in PRECISIONS {
            let mut worst = 0_f64;
            for family in FAMILIES {
                let (wanted, wanted_cache) = run(&at(family, Precision::F32, Place::default()), &[24]);
                let model = at(family, precision, Place { device, elements });
                for pieces in [&[24][..], &[9, 1, 1, 1, 12]] {
                    let (logits, cache) = run(&model, pieces);
                    let far = deviation(&logits, &wanted).max(deviation(&flat(&cache), &flat(&wanted_cache)));
                    worst = worst.max(far);
                    let limit = if precision == Precision::F32 { limit } else { ROUNDED_MAX };
                    assert!(far < limit, "{family}, {precision:?} in {elements}, {pieces:?}: {far:.1e}");
                }
            }
            eprintln!("as a card, {precision:?} in {elements}: worst deviation {worst:.1e}");
        }
    }
}

#[test]
fn a_cards_cache_taken_out_and_put_back_continues_bit_for_bit() {
    let Some(device) = crate::card() else { return };
    for (elements, ..) in LIMITS {
        for family in FAMILIES {
            let model = at(family, Precision::F32, Place { device, elements });
            let mut whole = model.start().unwrap();
            model.prefill(&mut whole, &ids()[..10]).unwrap();
            let mut copy = model.inject(&model.extract(&whole).unwrap()).unwrap();
            let [a, b] = [&mut whole, &mut copy].map(|context| model.prefill(context, &ids()[10..]).unwrap());
            assert_eq!(a, b, "{family} in {elements}");
        }
    }
}

/// The loss behind a prefix of 10 tokens, and its gradient for all of the prefix and one adapter, tensor after tensor.
fn gradients(model: &Model, prefix: &KvCache, adapters: &Adapters, variables: &[Var]) -> (f32, Vec<Vec<f32>>) {
    let mut cache = TrackedCache::new(prefix).unwrap();
    let leaves: Vec<_> =
        cache.layers.iter().flat_map(|(k, v)| [k, v]).map(|tensor| Var::from_tensor(tensor).unwrap()).collect();
    cache.layers = leaves.chunks(2).map(|kv| (kv[0].as_tensor().clone(), kv[1].as_tensor().clone())).collect();
    let positions: Vec<i64> = (10..24).collect();
    let logits = model.forward_tracked(&cache, adapters, &ids()[10..], &positions, 0..13).unwrap();
    let loss = cross_entropy(&logits, &Tensor::new(&ids()[11..], logits.device()).unwrap()).unwrap();
    let gradients = loss.backward().unwrap();
    let of = |variable: &Var| numbers(gradients.get(variable).expect("there is a gradient"));
    (loss.to_scalar().unwrap(), leaves.iter().chain(variables).map(of).collect())
}

#[test]
fn a_cards_gradients_are_those_of_our_own_operations() {
    let Some(device) = crate::card() else { return };
    let mut random = Random::new(3, "adapter");
    let mut normal = |shape: (usize, usize)| {
        let values: Vec<f32> = (0..shape.0 * shape.1).map(|_| 0.2 * random.normal() as f32).collect();
        Var::from_tensor(&Tensor::from_vec(values, shape, &candle_core::Device::Cpu).unwrap()).unwrap()
    };
    for (elements, _, limit) in LIMITS {
        for precision in PRECISIONS {
            let mut worst = 0_f64;
            for family in FAMILIES {
                let referee = at(family, Precision::F32, Place::default());
                let [outputs, inputs] = Projection::Value.shape(referee.config());
                let (down, up) = (normal((2, inputs)), normal((outputs, 2)));
                let adapter = Adapter { down: down.as_tensor().clone(), up: up.as_tensor().clone(), scale: 0.5 };
                let adapters = Adapters::from([((1, Projection::Value), adapter)]);
                let mut context = referee.start().unwrap();
                referee.prefill(&mut context, &ids()[..10]).unwrap();
                let prefix = referee.extract(&context).unwrap();
                let variables = [down, up];
                let (wanted_loss, wanted) = gradients(&referee, &prefix, &adapters, &variables);
                let model = at(family, precision, Place { device, elements });
                let (loss, got) = gradients(&model, &prefix, &adapters, &variables);
                assert!(f64::from((loss - wanted_loss).abs()) < limit * f64::from(wanted_loss), "{family}: {loss}");
                for (got, wanted) in got.iter().zip(&wanted) {
                    worst = worst.max(deviation(got, wanted));
                    assert!(deviation(got, wanted) < limit, "{family}, {precision:?} in {elements}: {worst:.1e}");
                }
            }
            eprintln!("as a card, {precision:?} in {elements}: worst gradient {worst:.1e}");
        }
    }
}

#[test]
fn parts_of_a_model_run_on_a_card_too() {
    let Some(device) = crate::card() else { return };
    let model = at("gemma3", Precision::F32, Place { device, elements: ElementType::F16 });
    let (whole, _) = run(&model, &[24]);
    let positions: Vec<i64> = (0..24).collect();
    let (mut first, mut second) = (model.start_layers(0..1).unwrap(), model.start_layers(1..2).unwrap());
    let tokens = ids();
    let input = worker::model::Input::Tokens(&tokens);
    let worker::model::Output::Hidden(hidden) = model.run(&mut first, input, &positions, Logits::None, None).unwrap()
    else {
        panic!("there are more layers")
    };
    let input = worker::model::Input::Hidden(&hidden);
    let worker::model::Output::Logits(rows) = model.run(&mut second, input, &positions, Logits::All, None).unwrap()
    else {
        panic!("this was the last layer")
    };
    assert_eq!(rows.concat(), whole);
}

#[test]
fn a_place_that_cannot_be_had_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tiny.gguf");
    Tiny::new("llama").write(&path);
    let place = Place { device: DeviceChoice::Cuda(99), elements: ElementType::F32 };
    let refused = Model::load(&path, &LoadOptions { place, ..LoadOptions::default() });
    assert!(matches!(refused, Err(ModelError::Place { .. })), "{refused:?}");
}

#[test]
fn real_models_give_the_reference_numbers_on_a_card() {
    let Some(device) = crate::card() else { return };
    for model in [SMOLLM2, GEMMA3] {
        check_model(model, Place { device, elements: ElementType::F32 });
    }
}

#[test]
fn real_models_in_halves_say_almost_the_same() {
    let Some(device) = crate::card() else { return };
    for (name, json) in [SMOLLM2, GEMMA3] {
        let reference: Reference = serde_json::from_str(json).unwrap();
        let cases = || reference.cases.iter().filter(|case| case.ids.len() <= 64);
        let Some((referee, turn)) = load_real((name, json)) else { continue };
        let wanted: Vec<_> = cases().flat_map(|case| all_logits(&referee, &case.ids, 64)).collect();
        drop((referee, turn));
        let places = [
            (ElementType::F16, Precision::F32, HALVES_KL_MAX),
            (ElementType::Bf16, Precision::F32, 1e-2),
            (ElementType::F32, Precision::Stored, 1e-2),
            (ElementType::F16, Precision::Stored, 1e-2),
        ];
        for (elements, precision, limit) in places {
            let place = Place { device, elements };
            let Some((model, _turn)) = load_real_at((name, json), place, precision) else { continue };
            let got = cases().flat_map(|case| all_logits(&model, &case.ids, 64));
            let costs: Vec<f64> = wanted.iter().zip(got).map(|(want, got)| kl(want, &got)).collect();
            let mean = costs.iter().sum::<f64>() / costs.len() as f64;
            let largest = costs.iter().fold(0_f64, |largest, cost| largest.max(*cost));
            eprintln!("{name}, {place}, {precision:?}: mean KL {mean:.1e}, largest {largest:.1e}");
            assert!(mean <= limit, "{name}, {place}, {precision:?}: mean KL {mean}");
        }
    }
}
