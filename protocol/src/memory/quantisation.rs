//! Bytes of weights by how they are held. Blocks as in ggml's `ggml-common.h`, and as bitsandbytes stores NF4 (arXiv
//! 2305.14314, section 3).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::shape::ModelShape;
use super::{product, sum};

/// How weights are held while a model is in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantisation {
    /// 4 bytes. What executors of today compute with; on processors embedding and head stay as the file has them.
    F32,
    /// 2 bytes.
    F16,
    /// 2 bytes.
    Bf16,
    /// As the model's own file has it; 2 bytes where the file is not known.
    Stored,
    /// 34 bytes for 32.
    Q8_0,
    /// 210 bytes for 256.
    Q6K,
    /// 176 bytes for 256; embedding as the rest, head in q6_k.
    Q5K,
    /// 144 bytes for 256, and q6_k for the head and for half of what makes values and of the MLP's way down.
    Q4KM,
    /// 20 bytes for 32; head in q6_k.
    Q4_1,
    /// 18 bytes for 32; head in q6_k.
    Q4_0,
    /// 4 bits, an 8-bit scale for 64 and a 4-byte scale for 16384: bitsandbytes with double quantisation. Embedding and head
    /// in 2 bytes.
    Nf4,
}

/// A block: so many bytes for so many weights.
#[derive(Debug, Clone, Copy)]
struct Block {
    bytes: u64,
    weights: u64,
}

const Q6_K: Block = Block { bytes: 210, weights: 256 };
const Q4_K: Block = Block { bytes: 144, weights: 256 };
const HALF: Block = Block { bytes: 2, weights: 1 };

impl Block {
    fn of(self, weights: u64) -> u64 {
        product(&[weights, self.bytes]).div_ceil(self.weights)
    }
}

impl Quantisation {
    /// Every one, from the most bytes to the fewest.
    pub const ALL: [Self; 11] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Stored,
        Self::Q8_0,
        Self::Q6K,
        Self::Q5K,
        Self::Q4KM,
        Self::Q4_1,
        Self::Q4_0,
        Self::Nf4,
    ];

    /// Bytes of all weights of a model.
    pub fn bytes(self, shape: &ModelShape) -> u64 {
        if let (Self::Stored, Some(stored)) = (self, shape.stored) {
            return stored.all;
        }
        let norm = match self {
            Self::Bf16 | Self::F16 | Self::Nf4 => 2,
            _ => 4,
        };
        sum(&[self.projection_bytes(shape), self.table_bytes(shape), norm * shape.norms()])
    }

    /// The next way that takes fewer bytes; `None` where there is none.
    pub fn smaller(self) -> Option<Self> {
        match self {
            Self::F32 => Some(Self::F16),
            Self::F16 | Self::Bf16 => Some(Self::Q8_0),
            Self::Q8_0 => Some(Self::Q6K),
            Self::Q6K => Some(Self::Q5K),
            Self::Q5K => Some(Self::Q4KM),
            Self::Q4KM | Self::Q4_1 => Some(Self::Q4_0),
            Self::Stored | Self::Q4_0 | Self::Nf4 => None,
        }
    }

    /// Whether products are those of the reference, with keys and values in f32.
    pub(super) fn is_f32(self) -> bool {
        self == Self::F32
    }

    fn projection_bytes(self, shape: &ModelShape) -> u64 {
        match self {
            Self::Q4KM => {
                let (hidden, layers) = (u64::from(shape.hidden), u64::from(shape.layers));
                let large = (hidden * shape.kv_width()).saturating_add(hidden * u64::from(shape.ffn));
                let large = product(&[(0..layers).filter(|layer| has_more_bits(*layer, layers)).count() as u64, large]);
                sum(&[Q6_K.of(large), Q4_K.of(shape.projections().saturating_sub(large))])
            }
            other => other.block().of(shape.projections()),
        }
    }

    fn table_bytes(self, shape: &ModelShape) -> u64 {
        let (embedding, head) = match self {
            Self::Nf4 => (HALF, HALF),
            Self::Q4KM | Self::Q5K | Self::Q4_1 | Self::Q4_0 => (self.block(), Q6_K),
            other => (other.block(), other.block()),
        };
        let table = shape.embedding();
        if shape.tied { head.of(table) } else { sum(&[embedding.of(table), head.of(table)]) }
    }

    fn block(self) -> Block {
        let (bytes, weights) = match self {
            Self::F32 => (4, 1),
            Self::F16 | Self::Bf16 | Self::Stored => return HALF,
            Self::Q8_0 => (34, 32),
            Self::Q6K => return Q6_K,
            Self::Q5K => (176, 256),
            Self::Q4KM => return Q4_K,
            Self::Q4_1 => (20, 32),
            Self::Q4_0 => (18, 32),
            // 16384 / 2 + 16384 / 64 + 4.
            Self::Nf4 => (8452, 16_384),
        };
        Block { bytes, weights }
    }
}

/// llama.cpp's choice of layers that get more bits: the first and the last eighth, and every third between.
fn has_more_bits(layer: u64, layers: u64) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

impl fmt::Display for Quantisation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Stored => "stored",
            Self::Q8_0 => "q8_0",
            Self::Q6K => "q6_k",
            Self::Q5K => "q5_k",
            Self::Q4KM => "q4_k_m",
            Self::Q4_1 => "q4_1",
            Self::Q4_0 => "q4_0",
            Self::Nf4 => "nf4",
        })
    }
}

impl FromStr for Quantisation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = || Self::ALL.map(|one| one.to_string()).join(", ");
        let named = Self::ALL.into_iter().find(|one| one.to_string() == text);
        named.ok_or_else(|| format!("`{text}` is not one of {}", known()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::shape;

    #[test]
    fn files_of_others_have_the_length_that_is_computed() {
        // Bytes of tensors in published files: Q4_K_M, Q8_0 and Q4_0 of Llama 3.1 8B, safetensors of Llama 2 7B.
        for (model, quantisation, bytes) in [
            ("llama-3.1-8b", Quantisation::Q4KM, 4_912_900_000_u64),
            ("llama-3.1-8b", Quantisation::Q8_0, 8_533_000_000),
            ("llama-3.1-8b", Quantisation::Q4_0, 4_653_000_000),
            ("llama-2-7b", Quantisation::F16, 13_476_800_000),
        ] {
            let ours = quantisation.bytes(shape(model).unwrap());
            let far = ours.abs_diff(bytes) * 1000 / bytes;
            assert!(far < 5, "{model} in {quantisation}: {ours} computed, {bytes} published");
        }
    }

    #[test]
    fn names_read_back_and_smaller_is_smaller() {
        let shape = shape("llama-3.1-8b").unwrap();
        for one in Quantisation::ALL {
            assert_eq!(one.to_string().parse(), Ok(one));
            if let Some(smaller) = one.smaller() {
                assert!(smaller.bytes(shape) < one.bytes(shape), "{one}");
            }
        }
        assert!("q3".parse::<Quantisation>().unwrap_err().starts_with("`q3` is not one of f32, f16,"));
    }
}
