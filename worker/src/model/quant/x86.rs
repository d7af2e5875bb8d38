//! Products of stored blocks with 8-bit activations on x86-64: one text, compiled for AVX2 and for AVX-512 VNNI.
//!
//! The two differ in how 32 products of u8 and i8 are summed in fours, and in how five-bit types get their top bit. Both
//! add in i32 within a block and in f32 over blocks, eight lanes wide; so their results are equal to each other up to f32
//! rounding, and to the scalar kernel's. Signed weights go through |w| · sign(x, w).
//!
//! Every function here needs the features of its module; [`super::dot::Kernel::best`] has looked for them.

#![expect(unsafe_code, reason = "SIMD loads take pointers; bounds are those of exact chunks")]

/// AVX2 with FMA and F16C: any x86-64 card host since 2013.
pub(super) mod avx2 {
    super::kernels!("avx2,fma,f16c");

    /// Sums of four neighbouring products u8 · i8. |w| ≤ 128 and |x| ≤ 127, so pairs stay below 2^15.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn dot_u8_i8(w: __m256i, x: __m256i) -> __m256i {
        _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1))
    }

    /// 16 in every byte whose bit is set.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn sixteen_where(bits: u32) -> __m256i {
        let spread = _mm256_set_epi64x(0x0303_0303_0303_0303, 0x0202_0202_0202_0202, 0x0101_0101_0101_0101, 0);
        let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(bits.cast_signed()), spread);
        let select = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64.cast_signed());
        let hit = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, select), select);
        _mm256_and_si256(hit, _mm256_set1_epi8(16))
    }
}

/// AVX-512 VNNI on 256-bit registers: Ice Lake, Zen 4 and later.
pub(super) mod vnni {
    super::kernels!("avx512vnni,avx512vl,avx512bw,avx2,fma,f16c");

    /// Sums of four neighbouring products u8 · i8.
    #[inline]
    #[target_feature(enable = "avx512vnni,avx512vl,avx512bw,avx2,fma,f16c")]
    fn dot_u8_i8(w: __m256i, x: __m256i) -> __m256i {
        _mm256_dpbusd_epi32(_mm256_setzero_si256(), w, x)
    }

    /// 16 in every byte whose bit is set.
    #[inline]
    #[target_feature(enable = "avx512vnni,avx512vl,avx512bw,avx2,fma,f16c")]
    fn sixteen_where(bits: u32) -> __m256i {
        _mm256_maskz_set1_epi8(bits, 16)
    }
}

/// Bytes a block of the types with 32 values; each is another, so they serve as the type's name.
const Q4_0: usize = 18;
const Q4_1: usize = 20;
const Q5_0: usize = 22;
const Q5_1: usize = 24;
const Q8_0: usize = 34;
/// How many groups of rows are fetched ahead.
const AHEAD: usize = 1;

/// The kernels of one module, in terms of its `dot_u8_i8` and `sixteen_where`.
macro_rules! kernels {
    ($features:literal) => {
        use std::arch::x86_64::*;

        use super::{AHEAD, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
        use crate::model::quant::QuantKind;
        use crate::model::quant::block::scale_min;
        use crate::model::quant::dot::Activations;

        /// Whether this module has a kernel for `kind`.
        pub(in crate::model::quant) fn has(kind: QuantKind) -> bool {
            !matches!(kind, QuantKind::F32 | QuantKind::F16 | QuantKind::Bf16 | QuantKind::Q2K | QuantKind::Q3K)
        }

        /// `y[i] = row_i · x`.
        pub(in crate::model::quant) fn dot_rows(
            kind: QuantKind,
            rows: &[u8],
            row_bytes: usize,
            x: &Activations,
            y: &mut [f32],
        ) {
            debug_assert_eq!(row_bytes, kind.row_bytes(x.q.len()));
            // SAFETY: `Kernel` values of this module are only made where the processor has the features.
            unsafe { dot_rows_simd(kind, rows, row_bytes, x, y) }
        }

        #[target_feature(enable = $features)]
        fn dot_rows_simd(kind: QuantKind, rows: &[u8], row_bytes: usize, x: &Activations, y: &mut [f32]) {
            match kind {
                QuantKind::Q4_0 => rows_of_32::<Q4_0>(rows, x, y),
                QuantKind::Q4_1 => rows_of_32::<Q4_1>(rows, x, y),
                QuantKind::Q5_0 => rows_of_32::<Q5_0>(rows, x, y),
                QuantKind::Q5_1 => rows_of_32::<Q5_1>(rows, x, y),
                QuantKind::Q8_0 => rows_of_32::<Q8_0>(rows, x, y),
                QuantKind::Q4K => rows_of_256(rows, row_bytes, y, |row| dot_4k(row, x)),
                QuantKind::Q5K => rows_of_256(rows, row_bytes, y, |row| dot_5k(row, x)),
                QuantKind::Q6K => rows_of_256(rows, row_bytes, y, |row| dot_6k(row, x)),
                QuantKind::F32 | QuantKind::F16 | QuantKind::Bf16 | QuantKind::Q2K | QuantKind::Q3K => {
                    unreachable!("`has` says no")
                }
            }
        }

        #[inline(always)]
        fn rows_of_256(rows: &[u8], row_bytes: usize, y: &mut [f32], dot: impl Fn(&[u8]) -> f32) {
            for (y, row) in y.iter_mut().zip(rows.chunks_exact(row_bytes)) {
                *y = dot(row);
            }
        }

        /// Types with blocks of 32 values; `BYTES` a block tells them apart. Four rows at a time: they share the activations,
        /// and their sums do not wait for each other.
        #[inline]
        #[target_feature(enable = $features)]
        fn rows_of_32<const BYTES: usize>(rows: &[u8], x: &Activations, y: &mut [f32]) {
            let blocks = x.scale.len();
            let (rows, _) = rows.as_chunks::<BYTES>();
            let (fours, rest) = y.as_chunks_mut::<4>();
            let (first, last) = rows.split_at(4 * blocks * fours.len());
            for (y, rows) in fours.iter_mut().zip(first.chunks_exact(4 * blocks)) {
                *y = several::<BYTES, 4>(rows, x);
            }
            for (y, row) in rest.iter_mut().zip(last.chunks_exact(blocks)) {
                [*y] = several::<BYTES, 1>(row, x);
            }
        }

        /// The products of `ROWS` rows that follow each other.
        #[inline]
        #[target_feature(enable = $features)]
        fn several<const BYTES: usize, const ROWS: usize>(rows: &[[u8; BYTES]], x: &Activations) -> [f32; ROWS] {
            let blocks = x.scale.len();
            assert!(rows.len() == ROWS * blocks && x.sum.len() == blocks && x.q.len() == 32 * blocks, "whole rows");
            let mut lanes = [_mm256_setzero_ps(); ROWS];
            let mut rest = [0f32; ROWS];
            for index in 0..blocks {
                // SAFETY: the assertion holds `index` inside each row, and inside the activations.
                let (q, scale, sum) = unsafe {
                    let q = x.q.as_ptr().add(32 * index).cast();
                    (_mm256_loadu_si256(q), *x.scale.get_unchecked(index), *x.sum.get_unchecked(index))
                };
                for row in 0..ROWS {
                    // SAFETY: as above.
                    let block = unsafe { rows.get_unchecked(row * blocks + index) };
                    // The same place in the rows to come: four streams that end every few hundred bytes are more than
                    // processors foresee.
                    _mm_prefetch::<_MM_HINT_T0>(block.as_ptr().wrapping_add(AHEAD * ROWS * blocks * BYTES).cast());
                    let d = half(block, 0);
                    let products = match BYTES {
                        Q8_0 => dot_i8_i8(load(&block[2..]), q),
                        Q5_0 | Q5_1 => {
                            let at = BYTES - 20;
                            let high = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
                            dot_u8_i8(_mm256_or_si256(nibbles(&block[BYTES - 16..]), sixteen_where(high)), q)
                        }
                        _ => dot_u8_i8(nibbles(&block[BYTES - 16..]), q),
                    };
                    lanes[row] = fused(products, d * scale, lanes[row]);
                    rest[row] += sum
                        * match BYTES {
                            Q4_0 => -8.0 * d,
                            Q5_0 => -16.0 * d,
                            Q8_0 => continue,
                            _ => half(block, 2),
                        };
                }
            }
            std::array::from_fn(|row| self::sum(lanes[row]) + rest[row])
        }

        /// x = d · sc_j · q − dmin · m_j: Q4_K.
        #[inline]
        #[target_feature(enable = $features)]
        fn dot_4k(row: &[u8], x: &Activations) -> f32 {
            let mut lanes = _mm256_setzero_ps();
            let mut rest = 0f32;
            for (index, block) in row.chunks_exact(144).enumerate() {
                let (d, dmin) = (half(block, 0), half(block, 2));
                for pair in 0..4 {
                    let bytes = load(&block[16 + 32 * pair..]);
                    let parts = [low_nibbles(bytes), low_nibbles(_mm256_srli_epi16(bytes, 4))];
                    for (part, w) in parts.into_iter().enumerate() {
                        let j = 2 * pair + part;
                        let (scale, min) = scale_min(j, &block[4..16]);
                        let products = dot_u8_i8(w, activations(x, 8 * index + j));
                        lanes = fused(products, d * f32::from(scale) * x.scale[8 * index + j], lanes);
                        rest -= dmin * f32::from(min) * x.sum[8 * index + j];
                    }
                }
            }
            sum(lanes) + rest
        }

        /// The same with a fifth bit: Q5_K.
        #[inline]
        #[target_feature(enable = $features)]
        fn dot_5k(row: &[u8], x: &Activations) -> f32 {
            let mut lanes = _mm256_setzero_ps();
            let mut rest = 0f32;
            for (index, block) in row.chunks_exact(176).enumerate() {
                let (d, dmin) = (half(block, 0), half(block, 2));
                let mut high = load(&block[16..]);
                for pair in 0..4 {
                    let bytes = load(&block[48 + 32 * pair..]);
                    let parts = [low_nibbles(bytes), low_nibbles(_mm256_srli_epi16(bytes, 4))];
                    for (part, w) in parts.into_iter().enumerate() {
                        let j = 2 * pair + part;
                        let bit = _mm256_and_si256(_mm256_slli_epi16(high, 4), _mm256_set1_epi8(16));
                        high = _mm256_srli_epi16(high, 1);
                        let (scale, min) = scale_min(j, &block[4..16]);
                        let products = dot_u8_i8(_mm256_or_si256(w, bit), activations(x, 8 * index + j));
                        lanes = fused(products, d * f32::from(scale) * x.scale[8 * index + j], lanes);
                        rest -= dmin * f32::from(min) * x.sum[8 * index + j];
                    }
                }
            }
            sum(lanes) + rest
        }

        /// x = d · sc_j · (q − 32), sub-blocks of 16: Q6_K.
        #[inline]
        #[target_feature(enable = $features)]
        fn dot_6k(row: &[u8], x: &Activations) -> f32 {
            let mut lanes = _mm256_setzero_ps();
            let two_bits = _mm256_set1_epi8(0x30);
            for (index, block) in row.chunks_exact(210).enumerate() {
                let d = half(block, 208);
                for half in 0..2 {
                    let low = [load(&block[64 * half..]), load(&block[64 * half + 32..])];
                    let high = load(&block[128 + 32 * half..]);
                    let tops =
                        [_mm256_slli_epi16(high, 4), _mm256_slli_epi16(high, 2), high, _mm256_srli_epi16(high, 2)];
                    for (quarter, top) in tops.into_iter().enumerate() {
                        let source = low[quarter % 2];
                        let bytes = if quarter < 2 { source } else { _mm256_srli_epi16(source, 4) };
                        let q = _mm256_or_si256(low_nibbles(bytes), _mm256_and_si256(top, two_bits));
                        let w = _mm256_sub_epi8(q, _mm256_set1_epi8(32));
                        let place = 8 * index + 4 * half + quarter;
                        let products = _mm256_cvtepi32_ps(dot_i8_i8(w, activations(x, place)));
                        let at = 192 + 8 * half + 2 * quarter;
                        let factor = d * x.scale[place];
                        let first = factor * f32::from(block[at].cast_signed());
                        let second = factor * f32::from(block[at + 1].cast_signed());
                        let scales = _mm256_set_m128(_mm_set1_ps(second), _mm_set1_ps(first));
                        lanes = _mm256_fmadd_ps(products, scales, lanes);
                    }
                }
            }
            sum(lanes)
        }

        /// The half at byte `at`.
        #[inline]
        #[target_feature(enable = $features)]
        fn half(block: &[u8], at: usize) -> f32 {
            let bits = u16::from_le_bytes([block[at], block[at + 1]]);
            _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))))
        }

        /// 32 bytes.
        #[inline]
        #[target_feature(enable = $features)]
        fn load(bytes: &[u8]) -> __m256i {
            let bytes: &[u8; 32] = bytes[..32].try_into().expect("32 bytes");
            // SAFETY: 32 bytes can be read, and the load needs no alignment.
            unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
        }

        /// The 32 activations of block `index`.
        #[inline]
        #[target_feature(enable = $features)]
        fn activations(x: &Activations, index: usize) -> __m256i {
            let q: &[i8; 32] = x.q[32 * index..][..32].try_into().expect("32 values");
            // SAFETY: as in `load`.
            unsafe { _mm256_loadu_si256(q.as_ptr().cast()) }
        }

        /// 16 bytes as 32 values: low nibbles first.
        #[inline]
        #[target_feature(enable = $features)]
        fn nibbles(bytes: &[u8]) -> __m256i {
            let bytes: &[u8; 16] = bytes[..16].try_into().expect("16 bytes");
            // SAFETY: 16 bytes can be read, and the load needs no alignment.
            let low = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
            low_nibbles(_mm256_set_m128i(_mm_srli_epi16(low, 4), low))
        }

        /// The low nibble of each byte.
        #[inline]
        #[target_feature(enable = $features)]
        fn low_nibbles(bytes: __m256i) -> __m256i {
            _mm256_and_si256(bytes, _mm256_set1_epi8(15))
        }

        /// Sums of four neighbouring products of signed bytes.
        #[inline]
        #[target_feature(enable = $features)]
        fn dot_i8_i8(w: __m256i, x: __m256i) -> __m256i {
            dot_u8_i8(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
        }

        /// lanes + products · scale.
        #[inline]
        #[target_feature(enable = $features)]
        fn fused(products: __m256i, scale: f32, lanes: __m256) -> __m256 {
            _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), _mm256_set1_ps(scale), lanes)
        }

        /// The sum of eight lanes, always in the same order.
        #[inline]
        #[target_feature(enable = $features)]
        fn sum(lanes: __m256) -> f32 {
            let four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    };
}
use kernels;
