//! What must hold in every family, on tiny random models: one computation however it is cut, caches that are values.

use candle_core::Tensor;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;
use worker::cache::{CacheError, KvCache, Matched, Part};
use worker::model::{Logits, Model, ModelError, Tap};

use crate::tiny::{FAMILIES, Tiny, WINDOW};

/// Longer than the window, so that a wrong mask shows.
const LENGTH: usize = 40;

fn models() -> impl Iterator<Item = (String, Model)> {
    let scaled = |factor: bool| {
        let mut tiny = Tiny::new("llama");
        if factor {
            tiny.set("llama.rope.scaling.type", Value::String("linear".into()));
            tiny.set("llama.rope.scaling.factor", Value::F32(4.0));
        } else {
            tiny.tensor("rope_freqs.weight", vec![1.0, 1.0, 2.5, 8.0], &[4], GgmlDType::F32);
        }
        tiny.load().unwrap()
    };
    let plain = FAMILIES.into_iter().map(|family| (family.to_owned(), Tiny::new(family).load().unwrap()));
    plain.chain([("llama, linear".to_owned(), scaled(true)), ("llama, divisors".to_owned(), scaled(false))])
}

fn ids(model: &Model) -> Vec<u32> {
    (0..LENGTH).map(|i| u32::try_from((i * 37 + 11) % model.tokenizer().size()).unwrap()).collect()
}

fn close(place: &str, a: &[f32], b: &[f32], limit: f64) {
    assert_eq!(a.len(), b.len(), "{place}");
    let difference: f64 = a.iter().zip(b).map(|(x, y)| f64::from(x - y).powi(2)).sum();
    let size: f64 = b.iter().map(|y| f64::from(*y).powi(2)).sum();
    let deviation = (difference / size).sqrt();
    assert!(deviation <= limit, "{place}: relative deviation {deviation:.2e}, limit {limit:.0e}");
}

fn same_cache(place: &str, a: &KvCache, b: &KvCache, limit: f64) {
    assert_eq!(a.positions(), b.positions(), "{place}");
    for ((layer, x), (_, y)) in a.layers().zip(b.layers()) {
        close(&format!("{place}: K of layer {layer}"), &x.k, &y.k, limit);
        close(&format!("{place}: V of layer {layer}"), &x.v, &y.v, limit);
    }
}

#[test]
fn pieces_and_single_steps_give_what_the_whole_gives() {
    for (family, model) in models() {
        let ids = ids(&model);
        let positions: Vec<i64> = (0..LENGTH as i64).collect();
        let mut whole = model.start().unwrap();
        let rows = model.forward(&mut whole, &ids, &positions, Logits::All, None).unwrap();
        assert_eq!(rows.len(), LENGTH);
        for pieces in [1, 7, 39] {
            let place = format!("{family}, pieces of {pieces}");
            let mut context = model.start().unwrap();
            for (piece, expected) in ids.chunks(pieces).zip(rows.chunks(pieces)) {
                let logits = model.prefill(&mut context, piece).unwrap();
                close(&place, &logits, expected.last().unwrap(), 1e-5);
            }
            same_cache(&place, &model.extract(&context).unwrap(), &model.extract(&whole).unwrap(), 1e-5);
        }
    }
}

#[test]
fn an_injected_cache_continues_bit_for_bit() {
    for (family, model) in models() {
        let ids = ids(&model);
        let mut context = model.start().unwrap();
        model.prefill(&mut context, &ids[..20]).unwrap();
        let cache = model.extract(&context).unwrap();
        let copy = cache.clone();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("packet.safetensors");
        cache.save(&path).unwrap();
        let here = model.prefill(&mut context, &ids[20..]).unwrap();
        assert_eq!(cache, copy, "{family}: what was taken out does not change");
        let loaded = KvCache::load(&path, model.layout()).unwrap();
        assert_eq!(loaded, cache, "{family}");
        assert_eq!(loaded.tokens(), Some(&ids[..20]));
        let there = model.prefill(&mut model.inject(&loaded).unwrap(), &ids[20..]).unwrap();
        assert_eq!(here, there, "{family}: logits after a packet");
        assert_eq!(cache.bytes_per_token(), model.config().kv_bytes_per_token());
    }
}

#[test]
fn a_moved_cache_is_the_one_computed_there() {
    for (family, model) in models() {
        let ids = ids(&model);
        let mut context = model.start().unwrap();
        model.prefill(&mut context, &ids[..20]).unwrap();
        let cache = model.extract(&context).unwrap();
        for delta in [16, 128, 1024] {
            let place = format!("{family}, moved by {delta}");
            let mut there = model.start().unwrap();
            model.prefill_at(&mut there, &ids[..20], delta).unwrap();
            same_cache(&place, &cache.rebase(delta), &model.extract(&there).unwrap(), 2e-5);
            let expected = model.prefill(&mut there, &ids[20..]).unwrap();
            for moved in [cache.rebase(delta), cache.unrotated().rebase(delta)] {
                let logits = model.prefill(&mut model.inject(&moved).unwrap(), &ids[20..]).unwrap();
                close(&place, &logits, &expected, 1e-4);
            }
        }
    }
}

#[test]
fn caches_joined_in_a_model_are_caches_joined_as_values() {
    for (family, model) in models() {
        let ids = ids(&model);
        let cache = |part: &[u32]| {
            let mut context = model.start().unwrap();
            model.prefill(&mut context, part).unwrap();
            model.extract(&context).unwrap()
        };
        let (first, second) = (cache(&ids[..9]), cache(&ids[9..15]).rebase(9));
        let mut appended = model.inject(&first).unwrap();
        model.append(&mut appended, &second).unwrap();
        let joined = first.concat(&second).unwrap();
        assert_eq!(model.extract(&appended).unwrap(), joined, "{family}");
        assert_eq!(appended.next_position(), 15);
    }
}

#[test]
fn attention_is_causal_sums_to_one_and_keeps_to_its_window() {
    for (family, model) in models() {
        let ids = ids(&model);
        let heads = model.config().heads;
        let windows: Vec<Option<usize>> = model.config().layers.iter().map(|layer| layer.window).collect();
        assert_eq!(windows, [(family == "gemma3").then_some(WINDOW), None], "{family}");
        let mut seen = 0;
        let mut observe = |tap: Tap, layer: usize, tensor: &Tensor| {
            if tap != Tap::Attention {
                return Ok(());
            }
            seen += 1;
            assert_eq!(tensor.dims(), [heads, LENGTH, LENGTH]);
            for head in tensor.to_vec3::<f32>()? {
                for (query, row) in head.iter().enumerate() {
                    let sum: f32 = row.iter().sum();
                    assert!((sum - 1.0).abs() < 1e-5, "{family}: {sum}");
                    for (key, probability) in row.iter().enumerate() {
                        let near = windows[layer].is_none_or(|window| query < key + window);
                        assert_eq!(*probability > 0.0, key <= query && near, "{family}: {layer} {query} {key}");
                    }
                }
            }
            Ok(())
        };
        let positions: Vec<i64> = (0..LENGTH as i64).collect();
        model.forward(&mut model.start().unwrap(), &ids, &positions, Logits::None, Some(&mut observe)).unwrap();
        assert_eq!(seen, 2);
    }
}

#[test]
fn content_matters_and_noise_is_not_content() {
    for (family, model) in models() {
        let ids = ids(&model);
        let mut context = model.start().unwrap();
        model.prefill(&mut context, &ids[..20]).unwrap();
        let cache = model.extract(&context).unwrap();
        let noise = cache.noise_like(Matched::Channel, 5);
        let after = |cache: &KvCache| model.prefill(&mut model.inject(cache).unwrap(), &ids[20..21]).unwrap();
        let (own, other) = (after(&cache), after(&noise));
        assert_ne!(own, other, "{family}");
        for part in [Part::Keys, Part::Values] {
            let mixed = after(&cache.replace(part, &noise).unwrap());
            assert!(mixed != own && mixed != other, "{family}: {part:?}");
        }
    }
}

#[test]
fn nothing_that_does_not_fit_is_injected() {
    let llama = Tiny::new("llama").load().unwrap();
    let qwen = Tiny::new("qwen2").load().unwrap();
    let mut context = llama.start().unwrap();
    llama.prefill(&mut context, &ids(&llama)[..5]).unwrap();
    let cache = llama.extract(&context).unwrap();
    let refused = qwen.inject(&cache);
    assert!(matches!(refused, Err(ModelError::Cache(CacheError::Fingerprint { .. }))));
    let refused = KvCache::from_bytes(&cache.to_bytes(), qwen.layout());
    assert!(matches!(refused, Err(CacheError::Fingerprint { .. })));
    let refused = llama.inject(&cache.select_layers(&[1]).unwrap());
    assert!(matches!(refused, Err(ModelError::Cache(CacheError::MissingLayer { layer: 0 }))));
    let refused = llama.inject(&cache.rebase(1 << 20));
    assert!(matches!(refused, Err(ModelError::ContextLength { .. })));
}

#[test]
fn wrong_input_is_refused_and_leaves_the_context_alone() {
    let model = Tiny::new("qwen3").load().unwrap();
    let mut context = model.start().unwrap();
    let refused = model.prefill(&mut context, &[1, 1_000_000]);
    assert!(matches!(refused, Err(ModelError::TokenRange { id: 1_000_000, .. })));
    assert!(matches!(model.prefill(&mut context, &[]), Err(ModelError::Input { tokens: 0, .. })));
    let refused = model.prefill_at(&mut context, &[1, 1], 4095);
    assert!(matches!(refused, Err(ModelError::ContextLength { position: 4096, context: 4096 })));
    assert!(context.is_empty());
}
