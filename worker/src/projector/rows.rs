//! A cache's numbers as rows of a matrix, one a token.

use crate::cache::{KvCache, LayerKv};

use super::error::ProjectorError;
use crate::cache::CacheError;

/// Numbers of one row of keys, or of values: H x D.
pub fn width(cache: &KvCache) -> usize {
    cache.layout().layer_len(1)
}

/// Rows `columns` of one tensor `[H, T, D]`, as `[columns, H x D]` row-major, heads beside each other.
pub fn of_tensor(tensor: &[f32], columns: &[usize], len: usize, head_dim: usize) -> Vec<f32> {
    let heads = tensor.len() / (len * head_dim).max(1);
    let mut rows = Vec::with_capacity(columns.len() * heads * head_dim);
    for column in columns {
        for head in 0..heads {
            let start = (head * len + column) * head_dim;
            rows.extend_from_slice(&tensor[start..start + head_dim]);
        }
    }
    rows
}

/// The opposite of [`of_tensor`] for all rows in order: `[T, H x D]` to `[H, T, D]`.
pub fn to_tensor(rows: &[f32], len: usize, head_dim: usize) -> Vec<f32> {
    let width = rows.len() / len.max(1);
    let mut tensor = Vec::with_capacity(rows.len());
    for head in 0..width / head_dim {
        for row in rows.chunks_exact(width) {
            tensor.extend_from_slice(&row[head * head_dim..(head + 1) * head_dim]);
        }
    }
    tensor
}

/// What a target layer is made from: for each of `columns`, keys and then values of each of `layers`, beside each other:
/// `[columns, layers x 2 x H x D]`. The cache must not be rotated.
///
/// # Errors
/// [`CacheError::MissingLayer`].
pub fn features(cache: &KvCache, layers: &[usize], columns: &[usize]) -> Result<Vec<f32>, ProjectorError> {
    let (width, head_dim) = (width(cache), cache.layout().head_dim);
    let total = layers.len() * 2 * width;
    let mut rows = vec![0.0; columns.len() * total];
    for (place, layer) in layers.iter().enumerate() {
        let LayerKv { k, v } = cache.layer(*layer).ok_or(CacheError::MissingLayer { layer: *layer })?;
        for (part, tensor) in [k, v].into_iter().enumerate() {
            let at = (2 * place + part) * width;
            let picked = of_tensor(tensor, columns, cache.len(), head_dim);
            for (row, picked) in rows.chunks_exact_mut(total).zip(picked.chunks_exact(width)) {
                row[at..at + width].copy_from_slice(picked);
            }
        }
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::projector::testing::{cache, layout};

    #[test]
    fn rows_are_tokens_and_come_back_as_tensors() {
        let cache = cache(&Arc::new(layout("a", 2)), 5, 1);
        let k = &cache.layer(1).unwrap().k;
        let rows = of_tensor(k, &[0, 1, 2, 3, 4], 5, 4);
        assert_eq!(&rows[8..16], [&k[4..8], &k[24..28]].concat().as_slice());
        assert_eq!(&to_tensor(&rows, 5, 4), k);
        let wide = features(&cache, &[0, 1], &[3, 3]).unwrap();
        assert_eq!(wide.len(), 2 * 32);
        assert_eq!(wide[..32], wide[32..]);
        assert_eq!(wide[16..24], of_tensor(k, &[3], 5, 4));
        assert!(features(&cache, &[2], &[0]).is_err());
    }
}
