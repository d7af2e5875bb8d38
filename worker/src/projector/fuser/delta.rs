//! What a replica's local steps changed, in 8 bits a weight, and as a file.
//!
//! The pseudo-gradient g = W_start - W_end (DiLoCo, arXiv 2311.08105) is cut into blocks of 256, each with one factor: its
//! largest number over 127; rounding is half to even. Unquantised, end weights are sent as they are, so that nothing is rounded
//! on the way. What rounding loses is not fed back into a later round: replicas keep nothing from round to round, a round's
//! shards run wherever there is room. Does not average.

use std::collections::HashMap;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use super::outer::OuterError;
use crate::projector::file::Manifest;

/// Weights that share a factor.
pub const BLOCK: usize = 256;
/// Key of the metadata in a file's header.
const METADATA_KEY: &str = "bonepile";
/// Name and version of the file's layout.
const FORMAT: &str = "bonepile-delta/1";

/// What a replica sends.
#[derive(Debug, Clone, PartialEq)]
pub struct Delta {
    /// Where it belongs.
    pub header: DeltaHeader,
    /// Its numbers.
    pub values: DeltaValues,
}

/// Where a delta belongs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeltaHeader {
    /// Round, from 0.
    pub round: u32,
    /// Place among the round's replicas.
    pub replica: u32,
    /// BLAKE3 of the weights that its steps started from, as [`weights_hash`] gives it.
    pub start: String,
    /// Between which models and on what it was trained, for an outer step that has no weights to start from.
    pub training: Option<Manifest>,
}

/// The numbers of a delta.
#[derive(Debug, Clone, PartialEq)]
pub enum DeltaValues {
    /// The weights after the last step.
    End(Vec<f32>),
    /// g in 8 bits.
    Quantised {
        /// Rounded g over the block's factor, -127 to 127.
        values: Vec<i8>,
        /// A factor a block, the last of which may be shorter.
        factors: Vec<f32>,
    },
}

impl Delta {
    /// Of steps from `start` to `end`.
    ///
    /// # Panics
    /// If the two differ in length.
    pub fn new(round: u32, replica: u32, start: &[f32], end: &[f32], quantise: bool) -> Self {
        assert_eq!(start.len(), end.len(), "steps keep the number of weights");
        let values = if quantise { quantised(start, end) } else { DeltaValues::End(end.to_vec()) };
        Self { header: DeltaHeader { round, replica, start: weights_hash(start), training: None }, values }
    }

    /// The same with what it was trained on.
    #[must_use]
    pub fn with_training(mut self, training: Manifest) -> Self {
        self.header.training = Some(training);
        self
    }

    /// Weights that it is about.
    pub fn len(&self) -> usize {
        match &self.values {
            DeltaValues::End(weights) => weights.len(),
            DeltaValues::Quantised { values, .. } => values.len(),
        }
    }

    /// True without weights.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// True if every number is one.
    pub fn is_finite(&self) -> bool {
        match &self.values {
            DeltaValues::End(weights) => weights.iter().all(|weight| weight.is_finite()),
            DeltaValues::Quantised { factors, .. } => factors.iter().all(|factor| factor.is_finite()),
        }
    }

    /// The weights that the replica ended with, as far as the delta tells: one number at `index`, from what it `start`ed with.
    pub(super) fn end(&self, index: usize, start: f32) -> f64 {
        match &self.values {
            DeltaValues::End(weights) => f64::from(weights[index]),
            DeltaValues::Quantised { values, factors } => {
                f64::from(start) - f64::from(factors[index / BLOCK]) * f64::from(values[index])
            }
        }
    }

    /// As a safetensors file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let floats = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
        let tensors = match &self.values {
            DeltaValues::End(weights) => vec![("weights", Dtype::F32, weights.len(), floats(weights))],
            DeltaValues::Quantised { values, factors } => vec![
                ("values", Dtype::I8, values.len(), values.iter().map(|value| value.cast_unsigned()).collect()),
                ("factors", Dtype::F32, factors.len(), floats(factors)),
            ],
        };
        let views = tensors.iter().map(|(name, dtype, count, bytes)| {
            (*name, TensorView::new(*dtype, vec![*count], bytes).expect("bytes are as many as the shape says"))
        });
        let stated = serde_json::json!({ "format": FORMAT, "delta": self.header }).to_string();
        let metadata = HashMap::from([(METADATA_KEY.to_owned(), stated)]);
        safetensors::serialize(views, Some(metadata)).expect("a delta's tensors can be written")
    }

    /// Reads what [`Delta::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`OuterError::File`] for anything else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, OuterError> {
        let wrong = |what: String| OuterError::File { what };
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| wrong(error.to_string()))?;
        let stated = metadata.metadata().as_ref().and_then(|metadata| metadata.get(METADATA_KEY));
        let stated = stated.ok_or_else(|| wrong("no header of a delta".to_owned()))?;
        let stated: Stated = serde_json::from_str(stated).map_err(|error| wrong(error.to_string()))?;
        if stated.format != FORMAT {
            return Err(wrong(format!("it is a {}, expected a {FORMAT}", stated.format)));
        }
        let file = SafeTensors::deserialize(bytes).map_err(|error| wrong(error.to_string()))?;
        let tensor = |name: &str, dtype: Dtype| match file.tensor(name) {
            Ok(view) if view.dtype() == dtype => Ok(view.data().to_vec()),
            Ok(view) => Err(wrong(format!("{name} is {:?}, expected {dtype:?}", view.dtype()))),
            Err(error) => Err(wrong(error.to_string())),
        };
        let floats =
            |bytes: Vec<u8>| bytes.as_chunks().0.iter().map(|word| f32::from_le_bytes(*word)).collect::<Vec<_>>();
        let values = match file.names().contains(&"weights") {
            true => DeltaValues::End(floats(tensor("weights", Dtype::F32)?)),
            false => {
                let values: Vec<i8> = tensor("values", Dtype::I8)?.into_iter().map(u8::cast_signed).collect();
                let factors = floats(tensor("factors", Dtype::F32)?);
                if factors.len() != values.len().div_ceil(BLOCK) {
                    return Err(wrong(format!("{} factors for {} values", factors.len(), values.len())));
                }
                DeltaValues::Quantised { values, factors }
            }
        };
        Ok(Self { header: stated.delta, values })
    }
}

#[derive(Deserialize)]
struct Stated {
    format: String,
    delta: DeltaHeader,
}

/// [`weights_digest`] in hex.
pub fn weights_hash(weights: &[f32]) -> String {
    blake3::Hash::from_bytes(weights_digest(weights)).to_hex().to_string()
}

/// BLAKE3 of weights as little-endian f32.
pub fn weights_digest(weights: &[f32]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = Vec::with_capacity(BLOCK * 64 * size_of::<f32>());
    for block in weights.chunks(BLOCK * 64) {
        buffer.clear();
        buffer.extend(block.iter().flat_map(|weight| weight.to_le_bytes()));
        hasher.update(&buffer);
    }
    *hasher.finalize().as_bytes()
}

/// g in 8 bits. A block whose largest number is not finite gets a factor that is not, so that it is noticed.
fn quantised(start: &[f32], end: &[f32]) -> DeltaValues {
    let (mut values, mut factors) = (Vec::with_capacity(start.len()), Vec::with_capacity(start.len() / BLOCK + 1));
    for (start, end) in start.chunks(BLOCK).zip(end.chunks(BLOCK)) {
        let g: Vec<f32> = start.iter().zip(end).map(|(start, end)| start - end).collect();
        let largest = g.iter().fold(0.0_f32, |largest, g| if g.is_finite() { largest.max(g.abs()) } else { f32::NAN });
        let finite = g.iter().all(|g| g.is_finite());
        let factor = if finite { largest / 127.0 } else { f32::NAN };
        let inverse = if factor > 0.0 { 1.0 / factor } else { 0.0 };
        #[expect(clippy::cast_possible_truncation, reason = "at most 127 in size")]
        values.extend(g.iter().map(|g| (g * inverse).round_ties_even() as i8));
        factors.push(factor);
    }
    DeltaValues::Quantised { values, factors }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(salt: usize) -> Vec<f32> {
        (0..1000).map(|i| ((i * 7 + salt * 13) as f32 * 0.61).sin()).collect()
    }

    #[test]
    fn a_block_is_as_exact_as_its_largest_number() {
        let (start, end) = (weights(0), weights(1));
        let delta = Delta::new(0, 0, &start, &end, true);
        for (block, (starts, ends)) in start.chunks(BLOCK).zip(end.chunks(BLOCK)).enumerate() {
            let largest = starts.iter().zip(ends).fold(0.0_f32, |largest, (a, b)| largest.max((a - b).abs()));
            for (place, (start, end)) in starts.iter().zip(ends).enumerate() {
                let got = delta.end(block * BLOCK + place, *start);
                assert!((got - f64::from(*end)).abs() <= f64::from(largest) / 253.9, "{got} {end}");
            }
        }
        let DeltaValues::Quantised { values, factors } = &delta.values else { panic!("it was to be quantised") };
        assert_eq!((values.len(), factors.len()), (1000, 4));
        assert!(values.iter().any(|value| value.abs() == 127));
    }

    #[test]
    fn halves_are_rounded_to_even() {
        // The block's factor is 1, so g is rounded as it is.
        let end: Vec<f32> = [127.0_f32, 0.5, 1.5, 2.5, -0.5, -1.5].iter().map(|g| -g).collect();
        let delta = Delta::new(0, 0, &[0.0; 6], &end, true);
        let DeltaValues::Quantised { values, .. } = &delta.values else { panic!("it was to be quantised") };
        assert_eq!(values.as_slice(), [127, 0, 2, 2, 0, -2]);
    }

    #[test]
    fn files_come_back_and_damage_is_noticed() {
        for quantise in [false, true] {
            let delta = Delta::new(3, 1, &weights(0), &weights(1), quantise);
            let bytes = delta.to_bytes();
            assert_eq!(Delta::from_bytes(&bytes).unwrap(), delta);
            assert!(bytes.len() < if quantise { 1500 } else { 4500 });
            for cut in [0, 7, 100, bytes.len() - 1] {
                assert!(Delta::from_bytes(&bytes[..cut]).is_err());
            }
        }
        assert!(Delta::from_bytes(b"not a delta").is_err());
    }

    #[test]
    fn numbers_that_are_none_show() {
        for quantise in [false, true] {
            let mut end = weights(1);
            assert!(Delta::new(0, 0, &weights(0), &end, quantise).is_finite());
            end[300] = f32::INFINITY;
            assert!(!Delta::new(0, 0, &weights(0), &end, quantise).is_finite());
            end[300] = f32::NAN;
            assert!(!Delta::new(0, 0, &weights(0), &end, quantise).is_finite());
        }
    }
}
