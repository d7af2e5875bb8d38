//! Caches in few bits: what a smaller packet costs in the model's answers.
//!
//! Keys are packed before RoPE, because there a channel keeps its size from token to token. A packed cache is a value of its
//! own with a measured size; unpacking gives a cache that any model of the layout takes. The axes are KIVI's (arXiv
//! 2402.02750): keys share a scale along tokens, where their few large channels stay apart, values along channels. With one
//! scale for all channels of a head and token, int8 cost Gemma 3 270M a KL of 4.8e-4 on facts, with these axes 6.7e-6.
//! KIVI's window of recent tokens in full precision is left out. Nothing is computed on packed numbers.

use std::collections::BTreeMap;
use std::sync::Arc;

use half::f16;

use super::error::CacheError;
use super::layout::CacheLayout;
use super::value::{KvCache, LayerKv};

/// Numbers that share scale and offset; the last group of a row may be shorter.
const GROUP: usize = 32;

/// How many bits a number takes. In both, keys share scale and offset (f16 each) over 32 tokens of a channel, values over
/// 32 channels of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// 8 bits.
    Int8,
    /// 4 bits.
    Int4,
}

/// A cache in few bits.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedCache {
    /// The cache without numbers.
    frame: KvCache,
    packing: Packing,
    layers: BTreeMap<usize, [PackedTensor; 2]>,
}

/// Rows of numbers: codes from 0, and for each group the number that code 0 stands for and the step between codes.
#[derive(Debug, Clone, PartialEq)]
struct PackedTensor {
    codes: Vec<u8>,
    scales: Vec<[f16; 2]>,
}

/// How one tensor's numbers lie when they are packed.
#[derive(Debug, Clone, Copy)]
struct Shape {
    /// Numbers in a row; groups do not cross rows.
    row: usize,
    bits: u32,
}

impl Shape {
    /// Bytes that the codes of a group take.
    fn bytes(self, numbers: usize) -> usize {
        if self.bits == 8 { numbers } else { numbers.div_ceil(2) }
    }
}

impl KvCache {
    /// The cache in few bits.
    ///
    /// # Errors
    /// [`CacheError::NotFinite`] if a scale is beyond f16, or a number is NaN.
    pub fn pack(&self, packing: Packing) -> Result<PackedCache, CacheError> {
        let mut layers = BTreeMap::new();
        for index in self.layers.keys().copied() {
            let keys = transposed(&self.plain_keys(index), self.len(), self.layout.head_dim);
            let [key_shape, value_shape] = shapes(packing, &self.layout, self.len());
            let keys = pack(&keys, key_shape).ok_or(CacheError::NotFinite { layer: index, part: "keys" })?;
            let values = pack(&self.layers[&index].v, value_shape)
                .ok_or(CacheError::NotFinite { layer: index, part: "values" })?;
            layers.insert(index, [keys, values]);
        }
        Ok(PackedCache { frame: self.frame(), packing, layers })
    }

    /// Everything but the numbers.
    fn frame(&self) -> Self {
        Self {
            layout: Arc::clone(&self.layout),
            layers: BTreeMap::new(),
            positions: self.positions.clone(),
            tokens: self.tokens.clone(),
            generated: self.generated,
            rotated: self.rotated,
            spans: self.spans.clone(),
            note: self.note.clone(),
        }
    }
}

impl PackedCache {
    /// The cache again, as near as the bits allow, rotated as it was.
    #[must_use]
    pub fn unpack(&self) -> KvCache {
        let (layout, columns) = (&self.frame.layout, self.frame.len());
        let [key_shape, value_shape] = shapes(self.packing, layout, columns);
        let unpack_layer = |index: usize, [keys, values]: &[PackedTensor; 2]| {
            let keys = unpack(keys, key_shape, layout.layer_len(columns));
            let mut k = transposed(&keys, layout.head_dim, columns);
            if self.frame.rotated {
                layout.layers[index].rope.rotate(&mut k, &self.frame.positions);
            }
            LayerKv { k, v: unpack(values, value_shape, layout.layer_len(columns)) }
        };
        let layers = self.layers.iter().map(|(index, parts)| (*index, unpack_layer(*index, parts))).collect();
        KvCache { layers, ..self.frame.frame() }
    }

    /// How it is packed.
    pub fn packing(&self) -> Packing {
        self.packing
    }

    /// Bytes of codes, scales and offsets; positions and token ids are not counted, as in [`KvCache::bytes_per_token`].
    pub fn bytes(&self) -> usize {
        let of = |tensor: &PackedTensor| tensor.codes.len() + size_of_val(tensor.scales.as_slice());
        self.layers.values().flatten().map(of).sum()
    }
}

/// How keys and values lie.
fn shapes(packing: Packing, layout: &CacheLayout, columns: usize) -> [Shape; 2] {
    let bits = match packing {
        Packing::Int8 => 8,
        Packing::Int4 => 4,
    };
    // A row of keys is a channel, a row of values a token; a cache without columns has neither.
    [columns.max(1), layout.head_dim].map(|row| Shape { row, bits })
}

/// `[H, rows, columns]` to `[H, columns, rows]`.
fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut turned = Vec::with_capacity(values.len());
    for head in values.chunks_exact((rows * columns).max(1)) {
        for column in 0..columns {
            turned.extend((0..rows).map(|row| head[row * columns + column]));
        }
    }
    turned
}

/// `None` if a group's scale is not a finite f16.
fn pack(values: &[f32], shape: Shape) -> Option<PackedTensor> {
    let groups = || values.chunks(shape.row).flat_map(|row| row.chunks(GROUP));
    let bytes = groups().map(|group| shape.bytes(group.len())).sum();
    let mut packed = PackedTensor { codes: Vec::with_capacity(bytes), scales: Vec::with_capacity(groups().count()) };
    let top = ((1_u32 << shape.bits) - 1) as f32;
    for group in groups() {
        let low = group.iter().fold(f32::INFINITY, |low, value| low.min(*value));
        let high = group.iter().fold(f32::NEG_INFINITY, |high, value| high.max(*value));
        // Codes are computed from what will be read back, so rounding a scale to f16 costs no more than that.
        let (offset, step) = (f16::from_f32(low), f16::from_f32((high - low) / top));
        if !offset.is_finite() || !step.is_finite() || group.iter().any(|value| value.is_nan()) {
            return None;
        }
        let inverse = if step.to_f32() > 0.0 { 1.0 / step.to_f32() } else { 0.0 };
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to the codes there are")]
        let code = |value: &f32| ((value - offset.to_f32()) * inverse).round().clamp(0.0, top) as u8;
        if shape.bits == 8 {
            packed.codes.extend(group.iter().map(code));
        } else {
            packed.codes.extend(group.chunks(2).map(|pair| code(&pair[0]) | pair.get(1).map_or(0, code) << 4));
        }
        packed.scales.push([offset, step]);
    }
    Some(packed)
}

fn unpack(packed: &PackedTensor, shape: Shape, count: usize) -> Vec<f32> {
    let mut values = vec![0_f32; count];
    let mut codes = packed.codes.as_slice();
    let groups = values.chunks_mut(shape.row).flat_map(|row| row.chunks_mut(GROUP));
    for (group, [offset, step]) in groups.zip(&packed.scales) {
        let (own, rest) = codes.split_at(shape.bytes(group.len()));
        for (index, value) in group.iter_mut().enumerate() {
            let code = if shape.bits == 8 { own[index] } else { own[index / 2] >> (4 * (index % 2)) & 15 };
            *value = offset.to_f32() + f32::from(code) * step.to_f32();
        }
        codes = rest;
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::value::tests::sample;

    fn largest_error(a: &KvCache, b: &KvCache) -> f32 {
        let pairs = a.layers().zip(b.layers());
        let errors =
            pairs.flat_map(|((_, a), (_, b))| a.k.iter().zip(&b.k).chain(a.v.iter().zip(&b.v)).collect::<Vec<_>>());
        errors.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    #[test]
    fn unpacked_numbers_are_within_half_a_step() {
        // Numbers lie in -1..1, so plain keys in -√2..√2, and rotation mixes the errors of a pair: √2 each time.
        let cache = sample(45);
        for (packing, step) in [(Packing::Int8, 2.0 / 255.0), (Packing::Int4, 2.0 / 15.0)] {
            let back = cache.pack(packing).unwrap().unpack();
            assert!(largest_error(&cache, &back) < step + 3e-3, "{packing:?}: {}", largest_error(&cache, &back));
            assert_eq!((back.positions(), back.tokens(), back.is_rotated()), (cache.positions(), cache.tokens(), true));
            let plain = cache.unrotated();
            let back = plain.pack(packing).unwrap().unpack();
            let error = largest_error(&plain, &back);
            assert!(error > step / 8.0 && error < 0.71 * step + 2e-3, "{packing:?}: {error}");
            assert!(!back.is_rotated());
        }
    }

    #[test]
    fn sizes_are_what_the_layout_says() {
        let cache = sample(45);
        // 2 layers of 2 heads; keys are 4 channels of 32 + 13 tokens, values 45 tokens of 4 channels; 4 bytes a group.
        assert_eq!(cache.pack(Packing::Int8).unwrap().bytes(), 2 * 2 * (4 * (32 + 13 + 2 * 4) + 45 * (4 + 4)));
        assert_eq!(cache.pack(Packing::Int4).unwrap().bytes(), 2 * 2 * (4 * (16 + 7 + 2 * 4) + 45 * (2 + 4)));
    }

    #[test]
    fn odd_ends_constants_and_nothing_survive() {
        for columns in [0, 1, 33] {
            let mut cache = sample(columns);
            for layer in cache.layers.values_mut() {
                layer.v.fill(0.25);
            }
            for packing in [Packing::Int8, Packing::Int4] {
                let back = cache.pack(packing).unwrap().unpack();
                assert_eq!(back.len(), columns);
                assert!(back.layers().all(|(_, layer)| layer.v.iter().all(|value| *value == 0.25)));
            }
        }
        let mut cache = sample(3);
        cache.layers.get_mut(&1).unwrap().v[5] = f32::NAN;
        let refused = cache.pack(Packing::Int4);
        assert!(matches!(refused, Err(CacheError::NotFinite { layer: 1, part: "values" })));
    }
}
