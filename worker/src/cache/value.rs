//! [`KvCache`]: keys, values and positions, with the operations that only move numbers about.
//!
//! Canonical layout everywhere: `[H_kv, T, D]` row-major f32, RoPE pairs (i, i + D/2).

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::error::CacheError;
use super::layout::CacheLayout;

/// Keys and values of one layer, each `[H_kv, T, D]`.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerKv {
    /// Keys.
    pub k: Vec<f32>,
    /// Values.
    pub v: Vec<f32>,
}

/// One of the two halves of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// K.
    Keys,
    /// V.
    Values,
}

/// What a model remembers of some text, as a value.
///
/// Holds some or all layers of its model; all layers have the same columns. Column order says what came before what;
/// positions say how keys are rotated.
#[derive(Debug, Clone, PartialEq)]
pub struct KvCache {
    pub(super) layout: Arc<CacheLayout>,
    pub(super) layers: BTreeMap<usize, LayerKv>,
    pub(super) positions: Vec<i64>,
    pub(super) tokens: Option<Vec<u32>>,
    pub(super) generated: usize,
    pub(super) rotated: bool,
    pub(super) spans: Option<Vec<Span>>,
    pub(super) note: String,
}

/// Where a token stands in its text: [begin, end) in bytes; equal for tokens that are no text, such as BOS.
pub type Span = (u32, u32);

impl KvCache {
    /// Puts a cache together. `rotated` says whether keys carry the rotation of their positions.
    ///
    /// # Errors
    /// [`CacheError::Shape`] if a layer, or the token ids, do not have one entry a position.
    pub fn new(
        layout: Arc<CacheLayout>,
        layers: impl IntoIterator<Item = (usize, LayerKv)>,
        positions: Vec<i64>,
        tokens: Option<Vec<u32>>,
        rotated: bool,
    ) -> Result<Self, CacheError> {
        let layers: BTreeMap<usize, LayerKv> = layers.into_iter().collect();
        let expected = layout.layer_len(positions.len());
        for (index, layer) in &layers {
            let shape = |what, got| CacheError::Shape { what: format!("{what} of layer {index}"), expected, got };
            if *index >= layout.layers.len() {
                let (what, expected) = ("a layer's index".to_owned(), layout.layers.len() - 1);
                return Err(CacheError::Shape { what, expected, got: *index });
            }
            if layer.k.len() != expected {
                return Err(shape("keys", layer.k.len()));
            }
            if layer.v.len() != expected {
                return Err(shape("values", layer.v.len()));
            }
        }
        if let Some(tokens) = tokens.as_ref().filter(|tokens| tokens.len() != positions.len()) {
            let (what, expected) = ("token ids".to_owned(), positions.len());
            return Err(CacheError::Shape { what, expected, got: tokens.len() });
        }
        Ok(Self { layout, layers, positions, tokens, generated: 0, rotated, spans: None, note: String::new() })
    }

    /// Number of columns, T.
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// True without columns.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// Which model it belongs to and how that model's layers rotate.
    pub fn layout(&self) -> &Arc<CacheLayout> {
        &self.layout
    }

    /// Layers held, by index.
    pub fn layers(&self) -> impl Iterator<Item = (usize, &LayerKv)> {
        self.layers.iter().map(|(index, layer)| (*index, layer))
    }

    /// One layer, if it is held.
    pub fn layer(&self, index: usize) -> Option<&LayerKv> {
        self.layers.get(&index)
    }

    /// The position of each column.
    pub fn positions(&self) -> &[i64] {
        &self.positions
    }

    /// The token of each column, where known: noise and mixtures have none.
    pub fn tokens(&self) -> Option<&[u32]> {
        self.tokens.as_deref()
    }

    /// True if keys carry the rotation of their positions.
    pub fn is_rotated(&self) -> bool {
        self.rotated
    }

    /// How many of the last columns the model wrote itself.
    pub fn generated(&self) -> usize {
        self.generated
    }

    /// The same cache, its last `count` columns marked as generated.
    #[must_use]
    pub fn with_generated(mut self, count: usize) -> Self {
        self.generated = count.min(self.len());
        self
    }

    /// Where each column's token stands in the text, where known.
    pub fn spans(&self) -> Option<&[Span]> {
        self.spans.as_deref()
    }

    /// The same cache, its columns' places in the text known.
    ///
    /// # Errors
    /// [`CacheError::Shape`] unless there is one a column.
    pub fn with_spans(mut self, spans: Vec<Span>) -> Result<Self, CacheError> {
        if spans.len() != self.len() {
            let what = "spans".to_owned();
            return Err(CacheError::Shape { what, expected: self.len(), got: spans.len() });
        }
        self.spans = Some(spans);
        Ok(self)
    }

    /// What the source says about it, in a form that both sides know; mostly empty.
    pub fn note(&self) -> &str {
        &self.note
    }

    /// The same cache with that said about it.
    #[must_use]
    pub fn with_note(mut self, note: String) -> Self {
        self.note = note;
        self
    }

    /// Bytes that K and V of one column take over the layers held, as f32.
    pub fn bytes_per_token(&self) -> usize {
        self.layers.len() * 2 * self.layout.layer_len(1) * size_of::<f32>()
    }

    /// The columns at these indices, in this order; any may occur twice.
    ///
    /// # Errors
    /// [`CacheError::Shape`] for an index beyond the last column.
    pub fn select_tokens(&self, columns: &[usize]) -> Result<Self, CacheError> {
        if let Some(column) = columns.iter().find(|column| **column >= self.len()) {
            let what = "a column beyond the cache".to_owned();
            return Err(CacheError::Shape { what, expected: self.len(), got: *column });
        }
        let width = self.layout.head_dim;
        let pick = |values: &[f32]| {
            let mut picked = Vec::with_capacity(self.layout.layer_len(columns.len()));
            for head in values.chunks_exact((self.len() * width).max(1)) {
                for column in columns {
                    picked.extend_from_slice(&head[column * width..(column + 1) * width]);
                }
            }
            picked
        };
        let layers =
            self.layers.iter().map(|(index, layer)| (*index, LayerKv { k: pick(&layer.k), v: pick(&layer.v) }));
        Ok(Self {
            layout: Arc::clone(&self.layout),
            layers: layers.collect(),
            positions: columns.iter().map(|column| self.positions[*column]).collect(),
            tokens: self.tokens.as_ref().map(|tokens| columns.iter().map(|column| tokens[*column]).collect()),
            generated: columns.iter().filter(|column| **column >= self.len() - self.generated).count(),
            rotated: self.rotated,
            spans: self.spans.as_ref().map(|spans| columns.iter().map(|column| spans[*column]).collect()),
            note: self.note.clone(),
        })
    }

    /// The columns of a range.
    ///
    /// # Errors
    /// As [`KvCache::select_tokens`].
    pub fn slice_tokens(&self, range: std::ops::Range<usize>) -> Result<Self, CacheError> {
        self.select_tokens(&range.collect::<Vec<_>>())
    }

    /// Only these layers.
    ///
    /// # Errors
    /// [`CacheError::MissingLayer`] if one is not held.
    pub fn select_layers(&self, wanted: &[usize]) -> Result<Self, CacheError> {
        let take = |index: &usize| match self.layers.get(index) {
            Some(layer) => Ok((*index, layer.clone())),
            None => Err(CacheError::MissingLayer { layer: *index }),
        };
        let layers = wanted.iter().map(take).collect::<Result<_, _>>()?;
        Ok(Self { layers, ..self.clone() })
    }

    /// These columns, then those of `other`. Positions stay as they are in both.
    ///
    /// # Errors
    /// [`CacheError::Mismatch`] unless both are caches of one model with the same layers, both rotated or both not.
    pub fn concat(&self, other: &Self) -> Result<Self, CacheError> {
        self.same_kind(other)?;
        let width = self.layout.head_dim;
        let join = |a: &[f32], b: &[f32]| {
            let mut joined = Vec::with_capacity(a.len() + b.len());
            for head in 0..self.layout.kv_heads {
                joined.extend_from_slice(&a[head * self.len() * width..(head + 1) * self.len() * width]);
                joined.extend_from_slice(&b[head * other.len() * width..(head + 1) * other.len() * width]);
            }
            joined
        };
        let layers = self
            .layers
            .iter()
            .zip(other.layers.values())
            .map(|((index, a), b)| (*index, LayerKv { k: join(&a.k, &b.k), v: join(&a.v, &b.v) }));
        Ok(Self {
            layout: Arc::clone(&self.layout),
            layers: layers.collect(),
            positions: [self.positions.as_slice(), &other.positions].concat(),
            tokens: self.tokens.as_ref().zip(other.tokens.as_ref()).map(|(a, b)| [a.as_slice(), b].concat()),
            generated: if other.generated == other.len() { self.generated + other.len() } else { other.generated },
            rotated: self.rotated,
            // Places in two texts.
            spans: None,
            note: String::new(),
        })
    }

    /// This cache with the keys, or the values, of `other`, which must have the same columns at the same positions.
    ///
    /// # Errors
    /// [`CacheError::Mismatch`] if they do not correspond.
    pub fn replace(&self, part: Part, other: &Self) -> Result<Self, CacheError> {
        self.same_columns(other)?;
        let mut replaced = self.clone();
        for (mine, theirs) in replaced.layers.values_mut().zip(other.layers.values()) {
            match part {
                Part::Keys => mine.k.clone_from(&theirs.k),
                Part::Values => mine.v.clone_from(&theirs.v),
            }
        }
        if self.tokens != other.tokens {
            replaced.tokens = None;
        }
        Ok(replaced)
    }

    /// Refuses to be injected into a model of another layout, or with layers missing.
    ///
    /// # Errors
    /// [`CacheError::Fingerprint`], [`CacheError::Layout`], [`CacheError::MissingLayer`].
    pub fn check_fits(&self, layout: &CacheLayout) -> Result<(), CacheError> {
        self.check_fits_layers(layout, 0..layout.layers.len())
    }

    /// The same for a part of a model, which needs only these layers.
    ///
    /// # Errors
    /// As [`KvCache::check_fits`].
    pub fn check_fits_layers(&self, layout: &CacheLayout, mut layers: Range<usize>) -> Result<(), CacheError> {
        layout.accept(&self.layout)?;
        match layers.find(|layer| !self.layers.contains_key(layer)) {
            None => Ok(()),
            Some(layer) => Err(CacheError::MissingLayer { layer }),
        }
    }

    pub(super) fn same_columns(&self, other: &Self) -> Result<(), CacheError> {
        self.same_kind(other)?;
        if self.positions == other.positions { Ok(()) } else { Err(CacheError::Mismatch { what: "positions" }) }
    }

    fn same_kind(&self, other: &Self) -> Result<(), CacheError> {
        if self.layout != other.layout {
            return Err(CacheError::Mismatch { what: "the model" });
        }
        if !self.layers.keys().eq(other.layers.keys()) {
            return Err(CacheError::Mismatch { what: "the layers held" });
        }
        if self.rotated != other.rotated {
            return Err(CacheError::Mismatch { what: "the rotation of keys" });
        }
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::model::config::LayerConfig;
    use crate::model::rope::{Rope, RopeScaling};

    /// A cache of made-up numbers: 2 layers, 2 heads of 4.
    pub(crate) fn sample(columns: usize) -> KvCache {
        let rope = |base| Rope::new(base, RopeScaling::None, 4);
        let layers =
            vec![LayerConfig { rope: rope(1e4), window: None }, LayerConfig { rope: rope(1e6), window: Some(8) }];
        let layout =
            CacheLayout { fingerprint: "sha256:00".into(), architecture: "llama", layers, kv_heads: 2, head_dim: 4 };
        let fill = |salt: usize| (0..2 * columns * 4).map(|i| ((i * 7 + salt * 13) as f32 * 0.61).sin()).collect();
        let layers = (0..2).map(|layer| (layer, LayerKv { k: fill(2 * layer), v: fill(2 * layer + 1) }));
        let tokens = (0..u32::try_from(columns).unwrap()).collect();
        KvCache::new(Arc::new(layout), layers, (0..columns as i64).collect(), Some(tokens), true).unwrap()
    }

    #[test]
    fn slices_join_back() {
        let cache = sample(5);
        let spans = (0..5).map(|column| (column, column + 1)).collect();
        let placed = cache.clone().with_spans(spans).unwrap().slice_tokens(2..4).unwrap();
        assert_eq!(placed.spans(), Some([(2, 3), (3, 4)].as_slice()));
        assert!(cache.clone().with_spans(vec![(0, 1)]).is_err());
        let (head, tail) = (cache.slice_tokens(0..2).unwrap(), cache.slice_tokens(2..5).unwrap());
        assert_eq!(head.concat(&tail).unwrap(), cache);
        assert_eq!(tail.tokens(), Some([2, 3, 4].as_slice()));
        let empty = cache.slice_tokens(0..0).unwrap();
        assert!(empty.is_empty());
        assert_eq!(empty.concat(&cache).unwrap(), cache);
        assert!(matches!(cache.slice_tokens(3..6), Err(CacheError::Shape { got: 5, .. })));
    }

    #[test]
    fn layers_are_selected_and_missing_ones_noticed() {
        let cache = sample(3);
        let upper = cache.select_layers(&[1]).unwrap();
        assert_eq!(upper.bytes_per_token() * 2, cache.bytes_per_token());
        assert!(matches!(upper.check_fits(cache.layout()), Err(CacheError::MissingLayer { layer: 0 })));
        assert!(matches!(upper.select_layers(&[0]), Err(CacheError::MissingLayer { layer: 0 })));
        assert!(matches!(upper.concat(&cache), Err(CacheError::Mismatch { .. })));
    }

    #[test]
    fn parts_are_exchanged() {
        let cache = sample(3);
        let other = cache.noise_like(crate::cache::Matched::Layer, 1);
        let mixed = cache.replace(Part::Values, &other).unwrap();
        assert_eq!(mixed.layer(1).unwrap().k, cache.layer(1).unwrap().k);
        assert_eq!(mixed.layer(1).unwrap().v, other.layer(1).unwrap().v);
    }

    #[test]
    fn wrong_sizes_are_refused() {
        let cache = sample(3);
        let layers = [(0, LayerKv { k: vec![0.0; 24], v: vec![0.0; 23] })];
        let refused = KvCache::new(Arc::clone(cache.layout()), layers, vec![0, 1, 2], None, true);
        assert!(matches!(refused, Err(CacheError::Shape { expected: 24, got: 23, .. })));
    }
}
