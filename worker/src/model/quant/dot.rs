//! Products of stored blocks with activations rounded to 8 bits, and the choice of kernel at run time.

use super::{QuantKind, scalar};

/// How a product is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// Weights to f32, activations as they are, whatever the number of rows: the referee of the others.
    Exact,
    /// 8-bit activations, plain Rust.
    Scalar,
    /// 8-bit activations, AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// 8-bit activations, AVX-512 VNNI on 256-bit registers.
    #[cfg(target_arch = "x86_64")]
    Vnni,
}

impl Kernel {
    /// The fastest that this processor has.
    pub fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            let vnni = is_x86_feature_detected!("avx512vnni")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512bw");
            if avx2 && vnni {
                return Self::Vnni;
            }
            if avx2 {
                return Self::Avx2;
            }
        }
        Self::Scalar
    }
}

/// Values a block of activations.
pub(super) const BLOCK: usize = 32;

/// A row of activations in blocks of 32: x ≈ scale · q with |q| ≤ 127.
#[derive(Debug, Clone)]
pub struct Activations {
    /// One a value.
    pub(super) q: Vec<i8>,
    /// One a block.
    pub(super) scale: Vec<f32>,
    /// scale · Σ q, one a block: what a weight's minimum is multiplied with.
    pub(super) sum: Vec<f32>,
}

impl Activations {
    /// Rounds `x` (a multiple of 32 long) to 8 bits, ties to even, scale = max |x| / 127 a block.
    pub fn quantize(x: &[f32]) -> Self {
        let blocks = x.len() / BLOCK;
        let mut row = Self { q: vec![0; x.len()], scale: vec![0.0; blocks], sum: vec![0.0; blocks] };
        pulp::Arch::new().dispatch(|| row.fill(x));
        row
    }

    #[inline(always)]
    fn fill(&mut self, x: &[f32]) {
        for (index, (values, q)) in x.chunks_exact(BLOCK).zip(self.q.chunks_exact_mut(BLOCK)).enumerate() {
            let max = values.iter().fold(0f32, |max, value| max.max(value.abs()));
            let scale = max / 127.0;
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            let mut sum = 0i32;
            for (q, value) in q.iter_mut().zip(values) {
                // In range by the choice of scale; a NaN becomes 0 here and stays NaN in the scale.
                *q = (value * inverse).round_ties_even() as i8;
                sum += i32::from(*q);
            }
            self.scale[index] = scale;
            self.sum[index] = scale * sum as f32;
        }
    }
}

/// `y[i] = row_i · x` for every stored row in `rows`.
pub(super) fn dot_rows(kernel: Kernel, kind: QuantKind, rows: &[u8], row_bytes: usize, x: &Activations, y: &mut [f32]) {
    match kernel {
        #[cfg(target_arch = "x86_64")]
        Kernel::Vnni if super::x86::vnni::has(kind) => super::x86::vnni::dot_rows(kind, rows, row_bytes, x, y),
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx2 if super::x86::avx2::has(kind) => super::x86::avx2::dot_rows(kind, rows, row_bytes, x, y),
        _ => {
            for (y, row) in y.iter_mut().zip(rows.chunks_exact(row_bytes)) {
                *y = scalar::dot(kind, row, x);
            }
        }
    }
}
