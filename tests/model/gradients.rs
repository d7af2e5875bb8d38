//! Gradients through frozen models: against PyTorch's on tiny models of every family, against finite differences for
//! adapters, and quantised weights against the same weights dequantised.

use candle_core::{Device, Tensor, Var};
use candle_nn::loss::cross_entropy;
use worker::cache::KvCache;
use worker::model::{
    Adapter, Adapters, Keep, Logits, Model, ModelError, Precision, Projection, TrackedCache, TrackedSegment,
    next_token_loss,
};
use worker::random::Random;

use crate::checkpoints::{NAMES, deviation, models, numbers, reference};
use crate::reference::{SMOLLM2, load_real};
use crate::tiny::{FAMILIES, Tiny};

/// Between PyTorch's gradients and ours, relative to the norm of a tensor.
const GRADIENT_NOISE_MAX: f64 = 1e-4;

/// A prefix whose tensors are all variables.
struct Leaves {
    cache: TrackedCache,
    variables: Vec<(Var, Var)>,
}

impl Leaves {
    fn new(cache: &KvCache) -> Self {
        let mut cache = TrackedCache::new(cache).unwrap();
        let variable = |tensor: &Tensor| Var::from_tensor(tensor).unwrap();
        let variables: Vec<_> = cache.layers.iter().map(|(k, v)| (variable(k), variable(v))).collect();
        cache.layers = variables.iter().map(|(k, v)| (k.as_tensor().clone(), v.as_tensor().clone())).collect();
        Self { cache, variables }
    }
}

/// Cache of the first `split` tokens.
fn prefix(model: &Model, ids: &[u32]) -> KvCache {
    let mut context = model.start().unwrap();
    model.prefill(&mut context, ids).unwrap();
    model.extract(&context).unwrap()
}

/// Mean cross-entropy of the next token, over all tokens but the last.
fn loss(model: &Model, cache: &TrackedCache, adapters: &Adapters, ids: &[u32]) -> Tensor {
    let start = cache.positions.last().map_or(0, |last| last + 1);
    let positions: Vec<i64> = (start..).take(ids.len()).collect();
    let logits = model.forward_tracked(cache, adapters, ids, &positions, 0..ids.len() - 1).unwrap();
    cross_entropy(&logits, &Tensor::new(&ids[1..], &Device::Cpu).unwrap()).unwrap()
}

#[test]
fn a_caches_gradients_are_those_of_pytorch() {
    let mut worst = 0_f64;
    for name in NAMES {
        let (reference, expected) = reference(name);
        for (place, model) in models(name) {
            let cache = prefix(&model, &reference.ids[..reference.split]);
            let leaves = Leaves::new(&cache);
            let loss = loss(&model, &leaves.cache, &Adapters::new(), &reference.ids[reference.split..]);
            let error = deviation(&[loss.to_scalar().unwrap()], &numbers(&expected["loss"]));
            assert!(error < 1e-5, "{place}: the loss deviates by {error:.1e}");
            let gradients = loss.backward().unwrap();
            for (layer, (k, v)) in leaves.variables.iter().enumerate() {
                for (what, variable) in [("k", k), ("v", v)] {
                    let gradient = numbers(gradients.get(variable).expect("there is a gradient"));
                    let expected = numbers(&expected[&format!("grad_{what}.{layer}")]);
                    assert!(gradient.iter().any(|value| value.abs() > 1e-6), "{place}: zero");
                    let error = deviation(&gradient, &expected);
                    worst = worst.max(error);
                    assert!(error < GRADIENT_NOISE_MAX, "{place}: {what} of layer {layer} deviates by {error:.1e}");
                }
            }
        }
    }
    eprintln!("gradients of caches: worst deviation {worst:.1e}");
}

#[test]
fn keys_before_rope_get_their_gradient_through_the_rotation() {
    for name in NAMES {
        let (reference, _) = reference(name);
        let (place, model) = models(name).remove(0);
        let cache = prefix(&model, &reference.ids[..reference.split]);
        let (rotated, plain) = (Leaves::new(&cache), Leaves::new(&cache.unrotated()));
        let rest = &reference.ids[reference.split..];
        let of = |leaves: &Leaves| loss(&model, &leaves.cache, &Adapters::new(), rest).backward().unwrap();
        let (gradients, plain_gradients) = (of(&rotated), of(&plain));
        for (layer, (a, b)) in rotated.variables.iter().zip(&plain.variables).enumerate() {
            // The gradient turns with the keys, so a cache of gradients is un-rotated like a cache of keys.
            let mut back = numbers(gradients.get(&a.0).unwrap());
            let angles: Vec<i64> = cache.positions().iter().map(|position| -position).collect();
            model.config().layers[layer].rope.rotate(&mut back, &angles);
            let error = deviation(&numbers(plain_gradients.get(&b.0).unwrap()), &back);
            assert!(error < 1e-5, "{place}: layer {layer} deviates by {error:.1e}");
        }
    }
}

#[test]
fn tracked_logits_are_those_of_the_plain_path() {
    for family in FAMILIES {
        let model = Tiny::new(family).load().unwrap();
        let ids: Vec<u32> = (0..24).map(|index| (index * 37 + 11) % 256).collect();
        let cache = prefix(&model, &ids[..10]);
        let positions: Vec<i64> = (10..24).collect();
        let mut context = model.inject(&cache).unwrap();
        let plain = model.forward(&mut context, &ids[10..], &positions, Logits::All, None).unwrap();
        let tracked = TrackedCache::new(&cache).unwrap();
        let logits = model.forward_tracked(&tracked, &Adapters::new(), &ids[10..], &positions, 3..14).unwrap();
        assert!(deviation(&numbers(&logits), &plain[3..].concat()) < 1e-5, "{family}");
        let mut whole = model.start().unwrap();
        let plain = model.forward(&mut whole, &ids[..10], &(0..10).collect::<Vec<_>>(), Logits::All, None).unwrap();
        let empty = TrackedCache::empty(model.config()).unwrap();
        let positions: Vec<i64> = (0..10).collect();
        let logits = model.forward_tracked(&empty, &Adapters::new(), &ids[..10], &positions, 0..10).unwrap();
        assert!(deviation(&numbers(&logits), &plain.concat()) < 1e-5, "{family}, no prefix");
    }
}

/// A tiny model with its weights held in either way.
fn both_precisions(family: &str) -> [Model; 2] {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tiny.gguf");
    Tiny::new(family).write(&path);
    [Precision::F32, Precision::Stored].map(|precision| {
        let options = worker::model::LoadOptions { precision, ..Default::default() };
        Model::load(&path, &options).unwrap()
    })
}

#[test]
fn several_sequences_at_once_are_each_what_they_are_alone() {
    // Tokens of the prefix and behind it, and which of these are scored: all, some, none.
    let lengths = [(5, 7, 0..7), (0, 4, 1..3), (9, 19, 12..19), (3, 2, 0..0)];
    let models = FAMILIES.iter().flat_map(|family| both_precisions(family).map(|model| (family, model)));
    for ((family, model), keep) in models.zip([Keep::Activations, Keep::Inputs].into_iter().cycle()) {
        let ids = |sequence: u32, count: usize| -> Vec<u32> {
            (0..count as u32).map(|index| (index * 37 + 11 + 90 * sequence) % 256).collect()
        };
        let mut sequences = Vec::new();
        for (index, (before, count, scored)) in lengths.iter().enumerate() {
            let ids = ids(index as u32, before + count + 1);
            let leaves = match before {
                0 => Leaves { cache: TrackedCache::empty(model.config()).unwrap(), variables: Vec::new() },
                // Keys that are rotated on the way in stand beside keys that are rotated already.
                9 => Leaves::new(&prefix(&model, &ids[..9]).unrotated()),
                _ => Leaves::new(&prefix(&model, &ids[..*before])),
            };
            let positions: Vec<i64> = (*before as i64..).take(*count).collect();
            let targets = ids[before + 1..][scored.clone()].to_vec();
            sequences.push((leaves, ids[*before..before + count].to_vec(), positions, scored.clone(), targets));
        }
        let segments: Vec<_> = sequences
            .iter()
            .map(|(leaves, tokens, positions, scored, _)| TrackedSegment {
                prefix: &leaves.cache,
                tokens,
                positions,
                scored: scored.clone(),
            })
            .collect();
        let logits = model.forward_tracked_batch(&segments, &Adapters::new(), keep).unwrap();
        let targets: Vec<u32> = sequences.iter().flat_map(|(.., targets)| targets).copied().collect();
        let gradients = next_token_loss(&logits, &targets).unwrap().backward().unwrap();
        let mut row = 0;
        for (leaves, tokens, positions, scored, own) in &sequences[..3] {
            let alone =
                model.forward_tracked(&leaves.cache, &Adapters::new(), tokens, positions, scored.clone()).unwrap();
            let together = numbers(&logits.narrow(0, row, own.len()).unwrap());
            row += own.len();
            assert!(deviation(&together, &numbers(&alone)) < 1e-6, "{family}");
            let gradients_alone = next_token_loss(&alone, own).unwrap().backward().unwrap();
            for variable in leaves.variables.iter().flat_map(|(k, v)| [k, v]) {
                let share = own.len() as f32 / targets.len() as f32;
                let alone: Vec<f32> =
                    numbers(gradients_alone.get(variable).unwrap()).iter().map(|g| g * share).collect();
                let error = deviation(&numbers(gradients.get(variable).unwrap()), &alone);
                assert!(error < 1e-5, "{family}: {error:.1e}");
            }
        }
        assert_eq!(row, targets.len());
    }
    let model = Tiny::new("llama").load().unwrap();
    assert!(matches!(model.forward_tracked_batch(&[], &Adapters::new(), Keep::Inputs), Err(ModelError::Input { .. })));
}

/// Without adapters a layer is one operation, with them a chain of many: an adapter that adds nothing sets them side by side.
#[test]
fn a_layer_in_one_operation_is_the_chain_of_its_steps() {
    for (family, model) in FAMILIES.iter().flat_map(|family| both_precisions(family).map(|model| (family, model))) {
        let ids: Vec<u32> = (0..30).map(|index| (index * 37 + 11) % 256).collect();
        let leaves = Leaves::new(&prefix(&model, &ids[..10]));
        let [outputs, inputs] = Projection::Up.shape(model.config());
        let zeros = |rows, cols| Tensor::zeros((rows, cols), candle_core::DType::F32, &Device::Cpu).unwrap();
        let nothing = Adapter { down: zeros(1, inputs), up: zeros(outputs, 1), scale: 1.0 };
        let runs = [Adapters::new(), Adapters::from([((0, Projection::Up), nothing)])].map(|adapters| {
            let loss = loss(&model, &leaves.cache, &adapters, &ids[10..]);
            (loss.to_scalar::<f32>().unwrap(), loss.backward().unwrap())
        });
        assert!((runs[0].0 - runs[1].0).abs() < 1e-5, "{family}: {} and {}", runs[0].0, runs[1].0);
        for variable in leaves.variables.iter().flat_map(|(k, v)| [k, v]) {
            let [one, chain] = [&runs[0].1, &runs[1].1].map(|gradients| numbers(gradients.get(variable).unwrap()));
            let error = deviation(&one, &chain);
            assert!(error < 1e-5, "{family}: {error:.1e}");
        }
    }
}

#[test]
fn quantised_weights_give_the_gradients_of_their_dequantised_values() {
    for family in FAMILIES {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tiny.gguf");
        Tiny::new(family).write(&path);
        let gradients = [Precision::F32, Precision::Stored].map(|precision| {
            let options = worker::model::LoadOptions { precision, ..Default::default() };
            let model = Model::load(&path, &options).unwrap();
            // The same prefix for both: cached by the f32 path.
            let referee = Model::load(&path, &worker::model::LoadOptions::default()).unwrap();
            let leaves = Leaves::new(&prefix(&referee, &[3, 80, 7, 120, 9]));
            let loss = loss(&model, &leaves.cache, &Adapters::new(), &[33, 90, 41, 17, 64, 5, 77, 100, 12, 30]);
            let gradients = loss.backward().unwrap();
            let of = |variable: &Var| numbers(gradients.get(variable).unwrap());
            leaves.variables.iter().flat_map(|(k, v)| [of(k), of(v)]).collect::<Vec<_>>()
        });
        for (stored, dense) in gradients[1].iter().zip(&gradients[0]) {
            assert!(deviation(stored, dense) < 1e-5, "{family}: {:.1e}", deviation(stored, dense));
        }
    }
}

#[test]
fn adapters_everywhere_have_the_gradient_of_finite_differences() {
    let every = [
        Projection::Query,
        Projection::Key,
        Projection::Value,
        Projection::AttentionOutput,
        Projection::Gate,
        Projection::Up,
        Projection::Down,
    ];
    let ids = [33, 90, 41, 17, 64, 5, 77, 100];
    for family in FAMILIES {
        let model = Tiny::new(family).load().unwrap();
        let empty = TrackedCache::empty(model.config()).unwrap();
        let mut random = Random::new(3, family);
        let mut variable = |rows: usize, cols: usize| {
            let values: Vec<f32> = (0..rows * cols).map(|_| 0.2 * random.normal() as f32).collect();
            Var::from_vec(values, (rows, cols), &Device::Cpu).unwrap()
        };
        let mut variables = Vec::new();
        for projection in every {
            let [outputs, inputs] = projection.shape(model.config());
            variables.push((projection, variable(2, inputs), variable(outputs, 2)));
        }
        let adapters = || {
            let entry = |(projection, down, up): &(Projection, Var, Var)| {
                let (down, up) = (down.as_tensor().clone(), up.as_tensor().clone());
                ((0, *projection), Adapter { down, up, scale: 0.5 })
            };
            variables.iter().map(entry).collect::<Adapters>()
        };
        let gradients = loss(&model, &empty, &adapters(), &ids).backward().unwrap();
        for (projection, down, up) in &variables {
            for variable in [down, up] {
                let gradient = numbers(gradients.get(variable).expect("there is a gradient"));
                let start = variable.as_detached_tensor().copy().unwrap();
                // Along the gradient itself the loss rises by its squared norm.
                let norm = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
                assert!(norm > 1e-5, "{family} {projection:?}: zero");
                let direction = Tensor::from_vec(gradient, start.shape(), &Device::Cpu).unwrap();
                let at = |step: f64| {
                    variable.set(&(&start + (&direction * (step / norm)).unwrap()).unwrap()).unwrap();
                    f64::from(loss(&model, &empty, &adapters(), &ids).to_scalar::<f32>().unwrap())
                };
                let slope = (at(1e-2) - at(-1e-2)) / 2e-2;
                variable.set(&start).unwrap();
                assert!((slope - norm).abs() < 2e-2 * norm + 1e-4, "{family} {projection:?}: {norm} and {slope}");
            }
        }
    }
}

#[test]
fn prefixes_and_adapters_of_other_shapes_are_refused() {
    let model = Tiny::new("llama").load().unwrap();
    let run =
        |cache: &TrackedCache, adapters: &Adapters| model.forward_tracked(cache, adapters, &[1, 2], &[5, 6], 0..1);
    let empty = TrackedCache::empty(model.config()).unwrap();
    let zeros = |shape: &[usize]| Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
    let mut wrong = empty.clone();
    wrong.layers[1].0 = zeros(&[2, 3, 8]);
    let refused = run(&wrong, &Adapters::new());
    assert!(matches!(refused, Err(ModelError::TensorShape { name, .. }) if name == "keys of layer 1"));
    let mut short = empty.clone();
    short.layers.pop();
    assert!(matches!(run(&short, &Adapters::new()), Err(ModelError::Cache(_))));
    let adapter = Adapter { down: zeros(&[2, 32]), up: zeros(&[31, 2]), scale: 1.0 };
    let refused = run(&empty, &Adapters::from([((1, Projection::Query), adapter.clone())]));
    assert!(matches!(refused, Err(ModelError::TensorShape { name, .. }) if name.starts_with("up of the adapter")));
    assert!(run(&empty, &Adapters::from([((2, Projection::Query), adapter)])).is_err());
    assert!(matches!(model.forward_tracked(&empty, &Adapters::new(), &[1], &[0], 0..2), Err(ModelError::Input { .. })));
}

/// On the real model: a step down the gradient of an injected cache lowers the loss, on stored weights.
#[test]
fn smollm2_learns_a_cache_through_stored_weights() {
    let Some((model, _turn)) = load_real(SMOLLM2) else { return };
    let options = worker::model::LoadOptions { precision: Precision::Stored, ..Default::default() };
    let model = Model::load(model.path(), &options).unwrap();
    let start = prefix(&model, &model.tokenizer().encode("Somebody lives somewhere.").unwrap());
    let answer = model.tokenizer().encode(" The capital of France is Paris.").unwrap();
    let leaves = Leaves::new(&start);
    let began = std::time::Instant::now();
    let before = loss(&model, &leaves.cache, &Adapters::new(), &answer);
    let gradients = before.backward().unwrap();
    eprintln!(
        "smollm2, stored: forward and backward of {} tokens in {:.2} s",
        answer.len(),
        began.elapsed().as_secs_f64()
    );
    let mut moved = leaves.cache.clone();
    for ((k, v), (of_k, of_v)) in moved.layers.iter_mut().zip(&leaves.variables) {
        for (tensor, variable) in [(k, of_k), (v, of_v)] {
            let gradient = gradients.get(variable).expect("there is a gradient");
            *tensor = (variable.as_detached_tensor() - (gradient * 0.5).unwrap()).unwrap();
        }
    }
    let (before, after) = (before.to_scalar::<f32>().unwrap(), loss(&model, &moved, &Adapters::new(), &answer));
    let after = after.to_scalar::<f32>().unwrap();
    assert!(after < before - 0.05, "{before} to {after}");
}
