//! Storage types and their blocks: sizes, and the way back to f32.
//!
//! Layouts as in ggml: a block of 32 values has an f16 scale (and an f16 minimum in the `_1` types); a super-block of 256 has
//! 6-bit or 8-bit scales of its sub-blocks on top. Formulas stand at each function.

use std::fmt;

use half::{bf16, f16};

/// How a matrix is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QuantKind {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// 16-bit floats with the exponent of f32.
    Bf16,
    /// 4 bits, scale.
    Q4_0,
    /// 4 bits, scale and minimum.
    Q4_1,
    /// 5 bits, scale.
    Q5_0,
    /// 5 bits, scale and minimum.
    Q5_1,
    /// 8 bits, scale.
    Q8_0,
    /// 2 bits, super-block, scales and minima of 4 bits.
    Q2K,
    /// 3 bits, super-block, scales of 6 bits.
    Q3K,
    /// 4 bits, super-block, scales and minima of 6 bits.
    Q4K,
    /// 5 bits, super-block, scales and minima of 6 bits.
    Q5K,
    /// 6 bits, super-block, scales of 8 bits.
    Q6K,
}

impl fmt::Display for QuantKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2K => "Q2_K",
            Self::Q3K => "Q3_K",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        })
    }
}

impl QuantKind {
    /// Values a block.
    pub const fn block_values(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Bytes of a row of `cols` values.
    pub const fn row_bytes(self, cols: usize) -> usize {
        cols / self.block_values() * self.block_bytes()
    }
}

/// The f16 at byte `at`, as f32.
#[inline(always)]
pub(super) fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Scale and minimum of sub-block `j` (0–7) of a Q4_K or Q5_K super-block, 6 bits each, from its 12 packed bytes.
#[inline(always)]
pub(super) fn scale_min(j: usize, packed: &[u8]) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        ((packed[j + 4] & 15) | (packed[j - 4] >> 6 << 4), (packed[j + 4] >> 4) | (packed[j] >> 6 << 4))
    }
}

/// Writes stored rows of `width` values as f32.
pub(super) fn dequantize<'a>(kind: QuantKind, rows: impl Iterator<Item = &'a [u8]>, width: usize, out: &mut [f32]) {
    pulp::Arch::new().dispatch(Rows { kind, rows, width, out });
}

struct Rows<'b, I> {
    kind: QuantKind,
    rows: I,
    width: usize,
    out: &'b mut [f32],
}

impl<'a, I: Iterator<Item = &'a [u8]>> pulp::WithSimd for Rows<'_, I> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        for (row, out) in self.rows.zip(self.out.chunks_exact_mut(self.width)) {
            dequantize_plain(self.kind, row, out);
        }
    }
}

/// Runs the last argument for each block of a row and the values it holds. Sizes are known when this is compiled, so that loops
/// over a block become vector code without remainders; not a function of a closure, as that might be compiled apart from its
/// caller, without the caller's vector instructions.
macro_rules! blocks {
    ($bytes:literal, $values:literal, $row:expr, $output:expr, |$block:ident, $out:ident| $decode:expr) => {{
        let (blocks, values) = ($row.as_chunks::<$bytes>().0, $output.as_chunks_mut::<$values>().0);
        for (block, $out) in blocks.iter().zip(values) {
            // A copy of its own is not what is written to, as far as the compiler can see.
            let $block = &{ *block };
            $decode;
        }
    }};
}

/// The same as plain loops, to be compiled for whatever the processor has.
#[inline(always)]
fn dequantize_plain(kind: QuantKind, row: &[u8], out: &mut [f32]) {
    match kind {
        QuantKind::F32 => blocks!(4, 1, row, out, |block, out| out[0] = f32::from_le_bytes(*block)),
        QuantKind::F16 => blocks!(2, 1, row, out, |block, out| out[0] = half_at(block, 0)),
        QuantKind::Bf16 => blocks!(2, 1, row, out, |block, out| out[0] = bf16::from_le_bytes(*block).to_f32()),
        QuantKind::Q4_0 => {
            blocks!(18, 32, row, out, |block, out| nibbles(half_at(block, 0), -8.0, 0.0, &block[2..18], out));
        }
        QuantKind::Q4_1 => {
            blocks!(20, 32, row, out, |block, out| {
                nibbles(half_at(block, 0), 0.0, half_at(block, 2), &block[4..20], out);
            });
        }
        QuantKind::Q5_0 => blocks!(22, 32, row, out, |block, out| {
            five(half_at(block, 0), -16.0, 0.0, &block[2..6], &block[6..22], out);
        }),
        QuantKind::Q5_1 => blocks!(24, 32, row, out, |block, out| {
            five(half_at(block, 0), 0.0, half_at(block, 2), &block[4..8], &block[8..24], out);
        }),
        QuantKind::Q8_0 => blocks!(34, 32, row, out, |block, out| {
            let scale = half_at(block, 0);
            for (out, byte) in out.iter_mut().zip(&block[2..34]) {
                *out = scale * f32::from(byte.cast_signed());
            }
        }),
        QuantKind::Q2K => blocks!(84, 256, row, out, |block, out| q2k(block, out)),
        QuantKind::Q3K => blocks!(110, 256, row, out, |block, out| q3k(block, out)),
        QuantKind::Q4K => blocks!(144, 256, row, out, |block, out| q4k(block, out)),
        QuantKind::Q5K => blocks!(176, 256, row, out, |block, out| q5k(block, out)),
        QuantKind::Q6K => blocks!(210, 256, row, out, |block, out| q6k(block, out)),
    }
}

/// x = scale · (q + offset) + min; low nibbles are values 0–15, high ones 16–31.
#[inline(always)]
fn nibbles(scale: f32, offset: f32, min: f32, bytes: &[u8], out: &mut [f32]) {
    let (low, high) = out.split_at_mut(16);
    for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
        *low = scale * (f32::from(byte & 15) + offset) + min;
        *high = scale * (f32::from(byte >> 4) + offset) + min;
    }
}

/// The same with a fifth bit: bit `i` of `high` belongs to value `i`.
#[inline(always)]
fn five(scale: f32, offset: f32, min: f32, high: &[u8], bytes: &[u8], out: &mut [f32]) {
    let bits = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
    for (i, byte) in bytes.iter().enumerate() {
        let low = u32::from(byte & 15) | (bits >> i & 1) << 4;
        let top = u32::from(byte >> 4) | (bits >> (i + 16) & 1) << 4;
        out[i] = scale * (low as f32 + offset) + min;
        out[i + 16] = scale * (top as f32 + offset) + min;
    }
}

/// x = d · sc_j · q − dmin · m_j for sub-block j of 16; scale in the low nibble, minimum in the high one.
#[inline(always)]
fn q2k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 80), half_at(block, 82));
    for (j, out) in out.chunks_exact_mut(16).enumerate() {
        let (half, quarter, part) = (j / 8, j % 8 / 2, j % 2);
        let (scale, min) = (d * f32::from(block[j] & 15), dmin * f32::from(block[j] >> 4));
        let bytes = &block[16 + 32 * half + 16 * part..][..16];
        for (out, byte) in out.iter_mut().zip(bytes) {
            *out = scale * f32::from(byte >> (2 * quarter) & 3) - min;
        }
    }
}

/// x = d · (sc_j − 32) · (q − 4·[mask bit unset]) for sub-block j of 16; scales of 6 bits in 12 bytes.
#[inline(always)]
fn q3k(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 108);
    let (mask, packed) = (&block[..32], &block[96..108]);
    for (j, out) in out.chunks_exact_mut(16).enumerate() {
        let (half, quarter, part) = (j / 8, j % 8 / 2, j % 2);
        let low = if j < 8 { packed[j] & 15 } else { packed[j - 8] >> 4 };
        let scale = d * (f32::from(low | (packed[8 + j % 4] >> (2 * (j / 4)) & 3) << 4) - 32.0);
        let bytes = &block[32 + 32 * half + 16 * part..][..16];
        for (i, (out, byte)) in out.iter_mut().zip(bytes).enumerate() {
            let offset = if mask[16 * part + i] >> (4 * half + quarter) & 1 == 0 { 4.0 } else { 0.0 };
            *out = scale * (f32::from(byte >> (2 * quarter) & 3) - offset);
        }
    }
}

/// x = d · sc_j · q − dmin · m_j for sub-block j of 32.
#[inline(always)]
fn q4k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (pair, out) in out.chunks_exact_mut(64).enumerate() {
        let bytes = &block[16 + 32 * pair..][..32];
        let (scale_low, min_low) = scale_min(2 * pair, &block[4..16]);
        let (scale_high, min_high) = scale_min(2 * pair + 1, &block[4..16]);
        let (low, high) = out.split_at_mut(32);
        let (d_low, m_low) = (d * f32::from(scale_low), dmin * f32::from(min_low));
        let (d_high, m_high) = (d * f32::from(scale_high), dmin * f32::from(min_high));
        for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
            *low = d_low * f32::from(byte & 15) - m_low;
            *high = d_high * f32::from(byte >> 4) - m_high;
        }
    }
}

/// The same with a fifth bit: bit j of `qh[i]` belongs to value i of sub-block j.
#[inline(always)]
fn q5k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let high_bits = &block[16..48];
    for (pair, out) in out.chunks_exact_mut(64).enumerate() {
        let bytes = &block[48 + 32 * pair..][..32];
        let (scale_low, min_low) = scale_min(2 * pair, &block[4..16]);
        let (scale_high, min_high) = scale_min(2 * pair + 1, &block[4..16]);
        let (d_low, m_low) = (d * f32::from(scale_low), dmin * f32::from(min_low));
        let (d_high, m_high) = (d * f32::from(scale_high), dmin * f32::from(min_high));
        for i in 0..32 {
            let low = (bytes[i] & 15) | (high_bits[i] >> (2 * pair) & 1) << 4;
            let high = (bytes[i] >> 4) | (high_bits[i] >> (2 * pair + 1) & 1) << 4;
            out[i] = d_low * f32::from(low) - m_low;
            out[i + 32] = d_high * f32::from(high) - m_high;
        }
    }
}

/// x = d · sc_j · (q − 32) for sub-block j of 16; four low bits in `ql`, two high bits in `qh`.
#[inline(always)]
fn q6k(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 208);
    for (half, out) in out.chunks_exact_mut(128).enumerate() {
        let ql = &block[64 * half..][..64];
        let qh = &block[128 + 32 * half..][..32];
        let scales = &block[192 + 8 * half..][..8];
        for i in 0..32 {
            let parts = [
                (ql[i] & 15) | (qh[i] & 3) << 4,
                (ql[i + 32] & 15) | (qh[i] >> 2 & 3) << 4,
                (ql[i] >> 4) | (qh[i] >> 4 & 3) << 4,
                (ql[i + 32] >> 4) | (qh[i] >> 6 & 3) << 4,
            ];
            for (quarter, q) in parts.into_iter().enumerate() {
                let scale = d * f32::from(scales[2 * quarter + i / 16].cast_signed());
                out[32 * quarter + i] = scale * (f32::from(q) - 32.0);
            }
        }
    }
}
