//! Ways through a model that must agree with one plain run: batches, parts of the layers, what observers see, caches of halves.
//!
//! Every family as a tiny model, and both real models where they are; each held both ways. With weights as stored, a pass of
//! fewer rows than [`PREFILL_ROWS_MIN`] rounds activations to 8 bits, so only passes on one side of it compare.

use std::collections::BTreeMap;

use candle_core::Tensor;
use worker::cache::KvCache;
use worker::experiment::facts::Fact;
use worker::model::loaded::PASS_TOKENS_MAX;
use worker::model::quant::PREFILL_ROWS_MIN;
use worker::model::{
    BatchItem, CachePrecision, Context, Input, LoadOptions, Logits, Model, ModelError, Output, Precision, Tap, argmax,
};

use crate::reference::{GEMMA3, SMOLLM2, load_real};
use crate::stored::kl;
use crate::tiny::{FAMILIES, Tiny, WINDOW};

/// Relative L2 between two exact computations of the same numbers, many times what they measure.
const EXACT: f64 = 2e-5;
/// The same where noise passes many layers.
const EXACT_REAL: f64 = 1e-4;
/// Steps of one token behind a prefill.
const STEPS: usize = 3;

fn options(precision: Precision, cache: CachePrecision) -> LoadOptions {
    LoadOptions { precision, cache, ..LoadOptions::default() }
}

/// Every tiny model in both precisions.
fn each_tiny(mut check: impl FnMut(&str, &Model, Precision)) {
    for family in FAMILIES {
        for precision in [Precision::F32, Precision::Stored] {
            let model = Tiny::new(family).load_with(&options(precision, CachePrecision::F32)).unwrap();
            check(&format!("{family}, {precision:?}"), &model, precision);
        }
    }
}

/// A real model in both precisions, if it is there.
fn each_real((name, json): (&str, &str), mut check: impl FnMut(&str, &Model, Precision)) {
    let Some((exact, _turn)) = load_real((name, json)) else { return };
    check(&format!("{name}, F32"), &exact, Precision::F32);
    let path = exact.path().to_path_buf();
    drop(exact);
    let stored = Model::load(&path, &options(Precision::Stored, CachePrecision::F32)).unwrap();
    check(&format!("{name}, Stored"), &stored, Precision::Stored);
}

/// Ids without a pattern, other ones for each `salt`.
fn ids(model: &Model, salt: usize, count: usize) -> Vec<u32> {
    let size = model.tokenizer().size().min(40_000);
    (0..count).map(|i| u32::try_from((i * 7919 + salt * 577 + 11) % size).unwrap()).collect()
}

fn deviation(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(x, y)| f64::from(x - y).powi(2)).sum();
    let size: f64 = b.iter().map(|y| f64::from(*y).powi(2)).sum();
    (difference / size.max(f64::MIN_POSITIVE)).sqrt()
}

fn cache_deviation(a: &KvCache, b: &KvCache) -> f64 {
    assert_eq!((a.positions(), a.tokens()), (b.positions(), b.tokens()));
    let layers = a.layers().zip(b.layers());
    layers.map(|((_, a), (_, b))| deviation(&a.k, &b.k).max(deviation(&a.v, &b.v))).fold(0.0, f64::max)
}

fn batch(model: &Model, contexts: &mut [Context], tokens: &[Vec<u32>]) -> Result<Vec<Vec<f32>>, ModelError> {
    let pairs = contexts.iter_mut().zip(tokens);
    let mut items: Vec<_> = pairs.map(|(context, tokens)| BatchItem { context, tokens }).collect();
    model.forward_batch(&mut items)
}

/// Prefill of `lengths` and some steps, all at once and each alone; the worst deviation of a logit row, and of a cache.
///
/// Steps on stored weights round to 8 bits what differs by f32 rounding here, and a value may fall to the other side; so they
/// are held against steps that stand on the very same cache, and must give the very same bits.
fn batch_against_alone(place: &str, model: &Model, precision: Precision, lengths: &[usize], limit: f64) -> (f64, f64) {
    let (mut rows, mut caches) = (0_f64, 0_f64);
    let mut tokens: Vec<_> = lengths.iter().enumerate().map(|(salt, length)| ids(model, salt, *length)).collect();
    let mut together: Vec<_> = lengths.iter().map(|_| model.start().unwrap()).collect();
    let mut alone: Vec<_> = lengths.iter().map(|_| model.start().unwrap()).collect();
    for step in 0..=STEPS {
        let same_bits = step > 0 && precision == Precision::Stored;
        if same_bits {
            let copy = |context: &Context| model.inject(&model.extract(context).unwrap()).unwrap();
            alone = together.iter().map(copy).collect();
        }
        let got = batch(model, &mut together, &tokens).unwrap();
        for (sequence, (got, context)) in got.iter().zip(&mut alone).enumerate() {
            let place = format!("{place} sequence {sequence} step {step}");
            let want = model.prefill(context, &tokens[sequence]).unwrap();
            let (a, b) = (model.extract(&together[sequence]).unwrap(), model.extract(context).unwrap());
            if same_bits {
                assert!(*got == want && a == b, "{place}: other bits");
                continue;
            }
            let (row, cache) = (deviation(got, &want), cache_deviation(&a, &b));
            assert!(row <= limit && cache <= limit, "{place}: logits {row:.1e}, cache {cache:.1e}");
            (rows, caches) = (rows.max(row), caches.max(cache));
        }
        tokens = got.iter().map(|logits| vec![argmax(logits)]).collect();
    }
    (rows, caches)
}

#[test]
fn a_ragged_batch_is_each_sequence_alone() {
    const { assert!(5 < PREFILL_ROWS_MIN) };
    let mut worst = (0_f64, 0_f64);
    each_tiny(|place, model, precision| {
        // The last batch is cut by passes, in the middle of a sequence.
        for lengths in [&[8, 40, 13, 23, 9][..], &[300, 8, 500, 20], &[PASS_TOKENS_MAX, 1 + PASS_TOKENS_MAX]] {
            let (rows, caches) = batch_against_alone(place, model, precision, lengths, EXACT);
            worst = (worst.0.max(rows), worst.1.max(caches));
        }
    });
    eprintln!("tiny models, batch against alone: worst logits {:.1e}, worst K or V {:.1e}", worst.0, worst.1);
}

fn real_batches(real: (&str, &str)) {
    each_real(real, |place, model, precision| {
        for lengths in [&[8, 40, 13, 23][..], &[300, 230, 10]] {
            let (rows, caches) = batch_against_alone(place, model, precision, lengths, EXACT_REAL);
            eprintln!(
                "{place}, batch of {lengths:?} against alone: worst logits {rows:.1e}, worst K or V {caches:.1e}"
            );
        }
    });
}

#[test]
fn smollm2_runs_batches() {
    real_batches(SMOLLM2);
}

#[test]
fn gemma3_runs_batches() {
    real_batches(GEMMA3);
}

#[test]
fn a_step_of_many_sequences_is_exact() {
    for family in FAMILIES {
        let [exact, stored] = [Precision::F32, Precision::Stored]
            .map(|precision| Tiny::new(family).load_with(&options(precision, CachePrecision::F32)).unwrap());
        let prompts: Vec<_> = (0..PREFILL_ROWS_MIN).map(|salt| ids(&exact, salt, 1 + 3 * salt)).collect();
        let mut contexts =
            [&exact, &stored].map(|model| prompts.iter().map(|_| model.start().unwrap()).collect::<Vec<_>>());
        let mut tokens = prompts;
        for step in 0..=STEPS {
            let want = batch(&exact, &mut contexts[0], &tokens).unwrap();
            let got = batch(&stored, &mut contexts[1], &tokens).unwrap();
            let worst = got.iter().zip(&want).map(|(got, want)| deviation(got, want)).fold(0.0, f64::max);
            assert!(worst <= EXACT, "{family} step {step}: {worst:.1e}");
            tokens = want.iter().map(|logits| vec![argmax(logits)]).collect();
        }
    }
}

#[test]
fn a_batch_with_one_bad_item_changes_nothing() {
    let other = Tiny::new("llama").load().unwrap();
    each_tiny(|place, model, _| {
        let fresh = || {
            let mut context = model.start().unwrap();
            model.prefill(&mut context, &ids(model, 0, 10)).unwrap();
            context
        };
        let bad = [
            ("no tokens", fresh(), vec![]),
            ("an id too large", fresh(), vec![1, 1_000_000]),
            (
                "beyond the context",
                {
                    let mut far = model.start().unwrap();
                    model.prefill_at(&mut far, &[1], 4094).unwrap();
                    far
                },
                vec![1, 1],
            ),
            ("a part", model.start_layers(0..1).unwrap(), vec![1]),
            ("another model's", other.start().unwrap(), vec![1]),
        ];
        for (what, mut last, tokens) in bad {
            let mut first = fresh();
            let (before, last_len) = (model.extract(&first).unwrap(), last.len());
            let refused = model.forward_batch(&mut [
                BatchItem { context: &mut first, tokens: &[1, 2, 3] },
                BatchItem { context: &mut last, tokens: &tokens },
            ]);
            let as_expected = match (what, refused) {
                ("no tokens", Err(ModelError::Input { tokens: 0, .. })) => true,
                ("an id too large", Err(ModelError::TokenRange { id: 1_000_000, .. })) => true,
                ("beyond the context", Err(ModelError::ContextLength { position: 4096, .. })) => true,
                ("a part", Err(ModelError::Part { layers })) => layers == (0..1),
                ("another model's", Err(ModelError::Foreign)) => true,
                _ => false,
            };
            assert!(as_expected, "{place}: {what}");
            assert_eq!(model.extract(&first).unwrap(), before, "{place}: {what}");
            assert_eq!(last.len(), last_len, "{place}: {what}");
        }
        assert!(model.forward_batch(&mut []).unwrap().is_empty(), "{place}");
    });
}

#[test]
fn an_observer_that_fails_leaves_the_context_as_it_was() {
    each_tiny(|place, model, _| {
        let tokens = ids(model, 3, PASS_TOKENS_MAX + 40);
        let (first, rest) = tokens.split_at(10);
        let mut context = model.start().unwrap();
        model.prefill(&mut context, first).unwrap();
        let before = model.extract(&context).unwrap();
        let positions: Vec<i64> = (10..).take(rest.len()).collect();
        // In the second pass, when the first is done and the first layer has taken its columns in.
        let mut shown = 0;
        let mut fail = |tap: Tap, layer: usize, _: &Tensor| {
            shown += usize::from((tap, layer) == (Tap::Residual, 0));
            if shown < 2 { Ok(()) } else { Err(candle_core::Error::Msg("enough".to_owned())) }
        };
        let refused = model.forward(&mut context, rest, &positions, Logits::Last, Some(&mut fail));
        assert!(matches!(refused, Err(ModelError::Tensor(_))), "{place}");
        assert_eq!(model.extract(&context).unwrap(), before, "{place}");
        let mut again = model.inject(&before).unwrap();
        let after = model.prefill(&mut context, rest).unwrap();
        assert_eq!(after, model.prefill(&mut again, rest).unwrap(), "{place}");
    });
}

/// Runs tokens through contexts of parts, one after the other.
fn through_parts(model: &Model, parts: &mut [Context], tokens: &[u32], positions: &[i64]) -> Vec<Vec<f32>> {
    let mut hidden = Vec::new();
    for context in parts {
        let input = if context.layers().start == 0 { Input::Tokens(tokens) } else { Input::Hidden(&hidden) };
        match model.run(context, input, positions, Logits::All, None).unwrap() {
            Output::Hidden(states) => hidden = states,
            Output::Logits(rows) => return rows,
        }
    }
    panic!("the last part ends at the last layer");
}

/// The same bits from every split in two, prefill in two passes and steps, and the same caches.
fn split_everywhere(place: &str, model: &Model, length: usize) {
    let count = model.config().layers.len();
    let tokens = ids(model, 1, length);
    let pieces: Vec<Vec<u32>> = [vec![tokens], (0..STEPS as u32).map(|step| vec![step + 5]).collect()].concat();
    let mut whole = model.start().unwrap();
    let mut expected = Vec::new();
    for piece in &pieces {
        let positions: Vec<i64> = (whole.next_position()..).take(piece.len()).collect();
        expected.push(model.forward(&mut whole, piece, &positions, Logits::All, None).unwrap());
    }
    let cache = model.extract(&whole).unwrap();
    let mut splits: Vec<Vec<usize>> = (1..count).map(|cut| vec![0, cut, count]).collect();
    // And every layer on its own.
    splits.push((0..=count).collect());
    for split in splits {
        let ranges: Vec<_> = split.windows(2).map(|pair| pair[0]..pair[1]).collect();
        let mut parts: Vec<_> = ranges.iter().map(|range| model.start_layers(range.clone()).unwrap()).collect();
        for (piece, expected) in pieces.iter().zip(&expected) {
            let positions: Vec<i64> = (parts[0].next_position()..).take(piece.len()).collect();
            let rows = through_parts(model, &mut parts, piece, &positions);
            assert!(rows == *expected, "{place}, split {split:?}");
        }
        for (range, context) in ranges.iter().zip(&parts) {
            let part = model.extract(context).unwrap();
            assert_eq!(part.layers().map(|(index, _)| index).collect::<Vec<_>>(), range.clone().collect::<Vec<_>>());
            assert_eq!(part.tokens().is_some(), range.start == 0, "only the first part knows the text");
            assert_eq!(part.positions(), cache.positions());
            let same = part.layers().all(|(index, layer)| Some(layer) == cache.layer(index));
            assert!(same, "{place}, split {split:?}: a cache differs");
        }
    }
}

#[test]
fn a_split_model_computes_the_same_bits() {
    each_tiny(|place, model, _| {
        split_everywhere(place, model, 20);
        split_everywhere(place, model, PASS_TOKENS_MAX + 30);
    });
}

#[test]
fn smollm2_splits_at_every_layer() {
    each_real(SMOLLM2, |place, model, _| split_everywhere(place, model, 12));
}

#[test]
fn gemma3_splits_at_every_layer() {
    each_real(GEMMA3, |place, model, _| split_everywhere(place, model, 12));
}

#[test]
fn parts_go_on_from_caches() {
    each_tiny(|place, model, _| {
        let tokens = ids(model, 2, 30);
        let mut whole = model.start().unwrap();
        model.prefill(&mut whole, &tokens[..20]).unwrap();
        let cache = model.extract(&whole).unwrap();
        let positions: Vec<i64> = (20..30).collect();
        let expected = model.forward(&mut whole, &tokens[20..], &positions, Logits::All, None).unwrap();
        // The whole cache, only a part's layers, keys not rotated yet: a part takes its own layers out of each.
        let lone = |layer: usize| cache.select_layers(&[layer]).unwrap();
        for (caches, exact) in [
            ([cache.clone(), cache.clone()], true),
            ([lone(0), lone(1)], true),
            ([cache.unrotated(), cache.unrotated()], false),
        ] {
            let mut parts = [model.start_layers(0..1).unwrap(), model.start_layers(1..2).unwrap()];
            for (part, cache) in parts.iter_mut().zip(&caches) {
                model.append(part, cache).unwrap();
                assert_eq!(part.len(), 20);
            }
            let rows = through_parts(model, &mut parts, &tokens[20..], &positions);
            if exact {
                assert!(rows == expected, "{place}");
            } else {
                let worst = rows.iter().zip(&expected).map(|(a, b)| deviation(a, b)).fold(0.0, f64::max);
                assert!(worst <= EXACT, "{place}: {worst:.1e}");
            }
        }
        let mut lower = model.start_layers(0..1).unwrap();
        let refused = model.append(&mut lower, &lone(1));
        let missing = worker::cache::CacheError::MissingLayer { layer: 0 };
        assert!(
            matches!(refused, Err(ModelError::Cache(error)) if error.to_string() == missing.to_string()),
            "{place}"
        );
        assert!(lower.is_empty());
    });
}

#[test]
fn parts_used_wrongly_are_refused() {
    let other = Tiny::new("llama").load().unwrap();
    each_tiny(|place, model, _| {
        let width = model.config().hidden;
        let states = vec![0.1; 3 * width];
        for layers in [0..0, 1..1, 0..3, 2..3] {
            let refused = model.start_layers(layers.clone());
            assert!(matches!(refused, Err(ModelError::Layers { count: 2, .. })), "{place} {layers:?}");
        }
        let mut lower = model.start_layers(0..1).unwrap();
        let mut upper = model.start_layers(1..2).unwrap();
        let run = |context: &mut Context, input: Input<'_>| {
            let done = model.run(context, input, &[0, 1, 2], Logits::Last, None).map(|_| ());
            assert!(context.is_empty(), "{place}");
            done.unwrap_err()
        };
        assert!(matches!(run(&mut lower, Input::Hidden(&states)), ModelError::Part { layers } if layers == (0..1)));
        assert!(matches!(run(&mut upper, Input::Tokens(&[1, 2, 3])), ModelError::Part { layers } if layers == (1..2)));
        let short = run(&mut upper, Input::Hidden(&states[1..]));
        assert!(matches!(short, ModelError::Hidden { expected, got } if expected == got + 1 && expected == 3 * width));
        let refused = run(&mut lower, Input::Tokens(&[1, 2]));
        assert!(matches!(refused, ModelError::Input { tokens: 2, positions: 3 }), "{place}");
        assert!(matches!(run(&mut other.start().unwrap(), Input::Tokens(&[1, 2, 3])), ModelError::Foreign), "{place}");
        assert!(matches!(model.prefill(&mut lower, &[1]), Err(ModelError::Part { .. })), "{place}");
        assert!(matches!(model.prefill(&mut upper, &[1]), Err(ModelError::Part { .. })), "{place}");
        let empty = model.run(&mut upper, Input::Hidden(&[]), &[], Logits::Last, None);
        assert!(matches!(empty, Err(ModelError::Hidden { expected: 0, got: 0 })), "{place}");
        assert!(matches!(other.extract(&lower), Err(ModelError::Foreign)), "{place}");
    });
}

/// Ids, and the position of the first.
type Piece = (Vec<u32>, i64);

type Seen = BTreeMap<(usize, String), Tensor>;

/// What an observer sees of the last of `pieces`.
fn seen(model: &Model, pieces: &[Piece]) -> Seen {
    let mut seen = Seen::new();
    let mut context = model.start().unwrap();
    let (last, before) = pieces.split_last().unwrap();
    for (tokens, first) in before {
        model.prefill_at(&mut context, tokens, *first).unwrap();
    }
    let mut observe = |tap: Tap, layer: usize, tensor: &Tensor| {
        let known = seen.insert((layer, format!("{tap:?}")), tensor.copy()?);
        assert!(known.is_none(), "a tap is shown once a pass");
        Ok(())
    };
    let positions: Vec<i64> = (last.1..).take(last.0.len()).collect();
    model.forward(&mut context, &last.0, &positions, Logits::None, Some(&mut observe)).unwrap();
    seen
}

/// Every tap of both paths; the worst relative L2 of each kind.
fn same_taps(place: &str, exact: &Model, stored: &Model, pieces: &[Piece], limit: f64) -> BTreeMap<String, f64> {
    let (want, got) = (seen(exact, pieces), seen(stored, pieces));
    assert_eq!(want.len(), 5 * exact.config().layers.len(), "{place}");
    let mut worst = BTreeMap::new();
    for (((layer, tap), want), (key, got)) in want.iter().zip(&got) {
        assert_eq!((&(*layer, tap.clone()), want.dims()), (key, got.dims()), "{place}");
        let numbers = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let (values, others) = (numbers(got), numbers(want));
        let off = deviation(&values, &others);
        assert!(off <= limit, "{place}: {tap} of layer {layer} is off by {off:.1e}");
        let largest = worst.entry(tap.clone()).or_insert(0.0);
        *largest = off.max(*largest);
        if tap == "Attention" {
            for row in values.chunks(*want.dims().last().unwrap()) {
                let sum: f32 = row.iter().sum();
                assert!((sum - 1.0).abs() <= 1e-5, "{place}: layer {layer} has a row that sums to {sum}");
            }
            // What is hidden from one is hidden from the other; what is merely unlikely may vanish in either.
            let unlike =
                values.iter().zip(&others).filter(|(a, b)| (**a == 0.0) != (**b == 0.0)).any(|(a, b)| a + b > 1e-30);
            assert!(!unlike, "{place}: masks of layer {layer} differ");
        }
    }
    worst
}

fn listed(worst: &BTreeMap<String, f64>) -> String {
    worst.iter().map(|(tap, worst)| format!("{tap} {worst:.0e}")).collect::<Vec<_>>().join(", ")
}

/// Pieces at the positions that follow, with a gap, back to the start, and far beyond again; each at least 8 tokens.
fn walks(model: &Model, window: i64) -> Vec<(&'static str, Vec<Piece>)> {
    let piece = |salt: usize, count: usize, first: i64| (ids(model, salt, count), first);
    vec![
        ("one piece", vec![piece(0, 70, 0)]),
        ("two pieces", vec![piece(0, 30, 0), piece(1, 20, 30)]),
        ("a gap", vec![piece(0, 30, 0), piece(1, 20, 30 + window / 2)]),
        ("back to the start", vec![piece(0, 20, window + 4), piece(1, 12, 0)]),
        ("and on again", vec![piece(0, 20, window + 4), piece(1, 12, 0), piece(2, 15, window + 20)]),
    ]
}

#[test]
fn observers_see_the_same_on_both_paths() {
    for family in FAMILIES {
        let [exact, stored] = [Precision::F32, Precision::Stored]
            .map(|precision| Tiny::new(family).load_with(&options(precision, CachePrecision::F32)).unwrap());
        for (what, pieces) in walks(&exact, WINDOW as i64) {
            let worst = same_taps(&format!("{family}, {what}"), &exact, &stored, &pieces, EXACT);
            eprintln!("{family}, {what}: {}", listed(&worst));
        }
    }
}

fn real_taps(real: (&str, &str)) {
    let Some((exact, _turn)) = load_real(real) else { return };
    let stored = Model::load(exact.path(), &options(Precision::Stored, CachePrecision::F32)).unwrap();
    let window = exact.config().layers.iter().find_map(|layer| layer.window).unwrap_or(64) as i64;
    let mut pieces = walks(&exact, window);
    pieces.push(("beyond the window", vec![(ids(&exact, 3, 540), 0), (ids(&exact, 4, 20), 540)]));
    for (what, pieces) in pieces {
        let worst = same_taps(&format!("{}, {what}", real.0), &exact, &stored, &pieces, EXACT_REAL);
        eprintln!("{}, {what}: {}", real.0, listed(&worst));
    }
}

#[test]
fn smollm2_shows_the_same_on_both_paths() {
    real_taps(SMOLLM2);
}

#[test]
fn gemma3_shows_the_same_on_both_paths() {
    real_taps(GEMMA3);
}

/// What halves cost behind each fact's text: KL(f32 caches ‖ f16 caches) of passes that are exact otherwise, and of steps,
/// where a number that falls to the other side of an 8-bit rounding costs as much as that rounding does.
fn halves((name, json): (&str, &str)) {
    /// Mean of exact passes, largest of them, mean of steps; nats.
    const LIMITS: (f64, f64, f64) = (2e-4, 1e-3, 1e-2);
    let Some((exact, _turn)) = load_real((name, json)) else { return };
    let path = exact.path().to_path_buf();
    drop(exact);
    let [single, half] = [CachePrecision::F32, CachePrecision::F16]
        .map(|cache| Model::load(&path, &options(Precision::Stored, cache)).unwrap());
    let (mut passes, mut steps) = (Vec::new(), Vec::new());
    for index in 0..8 {
        let fact = Fact::new(11, index).unwrap();
        let text = single.tokenizer().encode_start(&fact.text()).unwrap();
        let question = single.tokenizer().encode(&fact.question()).unwrap();
        let mut contexts = [single.start().unwrap(), half.start().unwrap()];
        let mut feed = |tokens: &[u32]| {
            let [a, b] = &mut contexts;
            let (a, b) = (single.prefill(a, tokens).unwrap(), half.prefill(b, tokens).unwrap());
            let costs = if tokens.len() < PREFILL_ROWS_MIN { &mut steps } else { &mut passes };
            costs.push(kl(&a, &b));
            argmax(&a)
        };
        feed(&text);
        feed(&question);
        let mut next = feed(&[&text[..], &question].concat());
        for _ in 0..4 {
            next = feed(&[next]);
        }
        let cache = half.extract(&contexts[1]).unwrap();
        assert_eq!(contexts[1].bytes() * 2, contexts[0].bytes(), "{name}: half the memory");
        let mut again = half.inject(&cache).unwrap();
        assert_eq!(half.extract(&again).unwrap(), cache, "{name}: out and in again");
        let on = half.prefill(&mut contexts[1], &[next]).unwrap();
        assert_eq!(half.prefill(&mut again, &[next]).unwrap(), on, "{name}: goes on alike");
    }
    let mean = |costs: &[f64]| costs.iter().sum::<f64>() / costs.len() as f64;
    let largest = |costs: &[f64]| costs.iter().copied().fold(0.0, f64::max);
    for (what, costs) in [("exact passes", &passes), ("steps", &steps)] {
        let (mean, largest, count) = (mean(costs), largest(costs), costs.len());
        eprintln!("{name}, caches of halves, {what}: KL mean {mean:.1e}, largest {largest:.1e}, {count} positions");
    }
    let measured = (mean(&passes), largest(&passes), mean(&steps));
    assert!(measured.0 <= LIMITS.0 && measured.1 <= LIMITS.1 && measured.2 <= LIMITS.2, "{name}: {measured:?}");
}

#[test]
fn smollm2_runs_on_halves() {
    halves(SMOLLM2);
}

#[test]
fn gemma3_runs_on_halves() {
    halves(GEMMA3);
}

#[test]
fn a_cache_of_halves_comes_back_bit_for_bit() {
    for family in FAMILIES {
        let half = Tiny::new(family).load_with(&options(Precision::Stored, CachePrecision::F16)).unwrap();
        let mut context = half.start().unwrap();
        let tokens = ids(&half, 0, 40);
        half.prefill(&mut context, &tokens[..30]).unwrap();
        let cache = half.extract(&context).unwrap();
        let mut again = half.inject(&cache).unwrap();
        assert_eq!(half.extract(&again).unwrap(), cache, "{family}");
        let (a, b) =
            (half.prefill(&mut context, &tokens[30..]).unwrap(), half.prefill(&mut again, &tokens[30..]).unwrap());
        assert_eq!(a, b, "{family}");
        // What was rounded is near what was not.
        let full = Tiny::new(family).load_with(&options(Precision::Stored, CachePrecision::F32)).unwrap();
        let mut context = full.start().unwrap();
        full.prefill(&mut context, &tokens[..30]).unwrap();
        let off = cache.layer(0).map(|layer| deviation(&layer.k, &full.extract(&context).unwrap().layer(0).unwrap().k));
        assert!(off.unwrap() <= 1.0 / 2048.0, "{family}: {off:?}");
    }
}
