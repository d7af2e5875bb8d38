//! The product of one stored row with 8-bit activations in plain Rust: what every processor can do, and the SIMD kernels' test.

use super::QuantKind;
use super::block::dequantize;
use super::dot::{Activations, BLOCK};

/// `row · x`: each block is dequantised and multiplied with the rounded activations in f32.
pub(super) fn dot(kind: QuantKind, row: &[u8], x: &Activations) -> f32 {
    let values = kind.block_values().max(BLOCK);
    let bytes = kind.row_bytes(values);
    let mut weights = [0f32; 256];
    let mut total = 0f32;
    for (index, block) in row.chunks(bytes).enumerate() {
        let count = block.len() / kind.block_bytes() * kind.block_values();
        dequantize(kind, std::iter::once(block), count, &mut weights[..count]);
        let first = index * values / BLOCK;
        for (part, weights) in weights[..count].chunks(BLOCK).enumerate() {
            let q = &x.q[(first + part) * BLOCK..][..weights.len()];
            let sum: f32 = weights.iter().zip(q).map(|(weight, q)| weight * f32::from(*q)).sum();
            total += x.scale[first + part] * sum;
        }
    }
    total
}
