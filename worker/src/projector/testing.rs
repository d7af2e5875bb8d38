//! Small made-up layouts and caches for tests of this module and its children.

use std::sync::Arc;

use crate::cache::{CacheLayout, KvCache, LayerKv, Span};
use crate::model::config::LayerConfig;
use crate::model::rope::{Rope, RopeScaling};
use crate::random::Random;

/// Two heads of four, `layers` deep.
pub(crate) fn layout(name: &str, layers: usize) -> CacheLayout {
    let layer = LayerConfig { rope: Rope::new(1e4, RopeScaling::None, 4), window: None };
    CacheLayout {
        fingerprint: format!("sha256:{name}"),
        architecture: "llama",
        layers: vec![layer; layers],
        kv_heads: 2,
        head_dim: 4,
    }
}

/// Normal numbers, un-rotated; one token a byte of the text.
pub(crate) fn cache(layout: &Arc<CacheLayout>, columns: usize, seed: u64) -> KvCache {
    let mut random = Random::new(seed, "testing cache");
    let mut fill = || (0..layout.layer_len(columns)).map(|_| random.normal() as f32).collect::<Vec<_>>();
    let layers: Vec<_> = (0..layout.layers.len()).map(|layer| (layer, LayerKv { k: fill(), v: fill() })).collect();
    let positions = (0..columns as i64).collect();
    KvCache::new(Arc::clone(layout), layers, positions, None, false).unwrap().with_spans(spans(columns)).unwrap()
}

/// One token a byte.
pub(crate) fn spans(columns: usize) -> Vec<Span> {
    (0..u32::try_from(columns).unwrap()).map(|at| (at, at + 1)).collect()
}
