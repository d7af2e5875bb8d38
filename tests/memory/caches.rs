//! Operations on long caches hold at most a layer beyond what goes in and comes out; statistics and files not even that.

use std::sync::Arc;

use worker::cache::{CacheLayout, KvCache, LayerKv, Matched, Packing, Path};
use worker::model::config::LayerConfig;
use worker::model::rope::{Rope, RopeScaling};

use crate::allocator::{Usage, measure};

const COLUMNS: usize = 32_768;
const LAYERS: usize = 32;
const WIDTH: usize = 16;
/// Of one layer: K and V of its one head.
const LAYER_BYTES: usize = 2 * COLUMNS * WIDTH * size_of::<f32>();
const BYTES: usize = LAYERS * LAYER_BYTES;
/// Positions and token ids of one cache, and what the allocator and small buffers take.
const SMALL: usize = 1 << 20;

fn cache() -> KvCache {
    let rope = Rope::new(1e4, RopeScaling::None, WIDTH);
    let layer = LayerConfig { rope, window: None };
    let layout = CacheLayout {
        fingerprint: "sha256:00".into(),
        architecture: "llama",
        layers: vec![layer; LAYERS],
        kv_heads: 1,
        head_dim: WIDTH,
    };
    let numbers = |salt: usize| {
        let mut state = salt as u32 + 1;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..COLUMNS * WIDTH).map(|_| next()).collect()
    };
    let layers = (0..LAYERS).map(|layer| (layer, LayerKv { k: numbers(2 * layer), v: numbers(2 * layer + 1) }));
    let tokens = (0..COLUMNS as u32).collect();
    KvCache::new(Arc::new(layout), layers, (0..COLUMNS as i64).collect(), Some(tokens), true).unwrap()
}

/// Says what `usage` was, and checks that no more than `extra` was taken beyond what is kept.
fn check(what: &str, usage: Usage, extra: usize) {
    let share = |bytes: usize| 100.0 * bytes as f64 / BYTES as f64;
    let beyond = usage.peak - usage.kept.min(usage.peak);
    eprintln!("{what}: keeps {:.1} % of the cache, takes {:.1} % beyond that", share(usage.kept), share(beyond));
    assert!(beyond <= extra, "{what}: {usage:?}, at most {extra} beyond what is kept");
}

#[test]
fn statistics_of_a_long_cache_do_not_hold_it_twice() {
    let cache = cache();
    let other = cache.noise_like(Matched::Layer, 1);
    // Keys of one layer before RoPE; of two caches for drift. Well below a tenth of the cache.
    let (stats, usage) = measure(|| cache.stats(256).unwrap());
    assert_eq!(stats.len(), LAYERS);
    check("stats", usage, LAYER_BYTES + SMALL);
    assert!(usage.peak < BYTES / 10, "{usage:?}");
    // These two give a number a token, layer and half: what they keep is not small where heads are as narrow as here.
    let (_, usage) = measure(|| cache.spread());
    check("spread", usage, LAYER_BYTES + SMALL);
    let (_, usage) = measure(|| cache.drift(&other).unwrap());
    check("drift", usage, LAYER_BYTES + SMALL);
    const { assert!(LAYER_BYTES + SMALL < BYTES / 10) };
}

#[test]
fn new_caches_cost_themselves_and_a_layer() {
    let cache = cache();
    let one = BYTES + SMALL;
    let whole = |what: &str, work: &dyn Fn() -> KvCache| {
        let (made, usage) = measure(work);
        check(what, usage, LAYER_BYTES + SMALL);
        assert!(usage.kept <= one, "{what}: {usage:?}");
        made
    };
    let moved = whole("rebase", &|| cache.rebase(100));
    drop(moved);
    let plain = whole("unrotated", &|| cache.unrotated());
    drop(whole("rotated", &|| plain.rotated()));
    drop(plain);
    drop(whole("slice", &|| cache.slice_tokens(0..COLUMNS - 1).unwrap()));
    for matched in [Matched::Layer, Matched::Channel] {
        let noise = whole("noise", &|| cache.noise_like(matched, 1));
        for path in [Path::Straight, Path::Arc] {
            drop(whole("interpolate", &|| cache.interpolate(&noise, 0.3, path).unwrap()));
        }
    }
    for packing in [Packing::Int8, Packing::Int4] {
        let (packed, usage) = measure(|| cache.pack(packing).unwrap());
        check("pack", usage, LAYER_BYTES + SMALL);
        assert!(usage.kept <= packed.bytes() + SMALL, "{usage:?} for {} bytes", packed.bytes());
        drop(whole("unpack", &|| packed.unpack()));
    }
}

#[test]
fn files_pass_through_a_small_buffer() {
    let cache = cache();
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("cache.safetensors");
    let (bytes, usage) = measure(|| cache.save(&path).unwrap());
    check("save", usage, 3 * SMALL);
    assert_eq!(bytes, std::fs::metadata(&path).unwrap().len());
    let (loaded, usage) = measure(|| KvCache::load(&path, cache.layout()).unwrap());
    check("load", usage, 3 * SMALL);
    assert_eq!(loaded, cache);
}
