//! The header of a safetensors file: which tensors it holds and where, read without trusting it.
//!
//! The format's own library keeps every number of a header as a value of its own before it looks at it, which costs up to 40
//! times the header; this reader takes it entry by entry. Each size is held against the file's length before it is used.
//!
//! Format: <https://github.com/huggingface/safetensors#format>.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use candle_core::quantized::GgmlDType;
use safetensors::Dtype;
use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::super::error::ModelError;
use super::super::gguf::TensorInfo;
use super::checkpoint::{CheckpointError, refused};

/// A header longer than this is refused, as by the format's own library.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// More axes than any weight has.
const AXES_MAX: usize = 8;
/// The entry that is no tensor: what the file's author had to say.
const METADATA: &str = "__metadata__";

/// The tensors of the file at `path`, by name.
///
/// # Errors
/// [`ModelError::Io`], [`ModelError::Checkpoint`]; [`ModelError::StoredType`] for a type that is not F32, F16 or BF16.
pub(super) fn header(path: &Path) -> Result<Vec<(String, TensorInfo)>, ModelError> {
    let failed = |source| ModelError::Io { path: path.to_path_buf(), source };
    let mut file = File::open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    let mut size = [0; 8];
    if length < 8 {
        return Err(refused(path, CheckpointError::Length { need: 8, got: length }));
    }
    file.read_exact(&mut size).map_err(failed)?;
    let size = u64::from_le_bytes(size);
    if size > HEADER_BYTES_MAX || size > length - 8 {
        let need = size.saturating_add(8);
        return Err(refused(path, CheckpointError::Length { need, got: length }));
    }
    let mut text = vec![0; usize::try_from(size).expect("at most HEADER_BYTES_MAX")];
    file.read_exact(&mut text).map_err(failed)?;
    let wrong = |what: String| refused(path, CheckpointError::Header { what });
    let Entries(mut entries) = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
    drop(text);
    let start = 8 + size;
    let end = check(&mut entries).map_err(wrong)?;
    if start.saturating_add(end) != length {
        return Err(refused(path, CheckpointError::Length { need: start.saturating_add(end), got: length }));
    }
    entries.into_iter().map(|(name, entry)| entry.place(name, start)).collect()
}

/// Sorts entries by name, and checks that their bytes follow each other from 0 without a hole and fit their shapes. Returns
/// where the last ends.
fn check(entries: &mut [(String, Entry)]) -> Result<u64, String> {
    entries.sort_unstable_by_key(|(_, entry)| entry.offsets);
    let mut at = 0;
    for (name, entry) in entries.iter() {
        let (begin, end) = entry.offsets;
        if begin != at || end < begin {
            return Err(format!("tensor {name} takes bytes {begin} to {end}, expected from {at} on"));
        }
        let elements = entry.shape.iter().try_fold(1_u64, |product, axis| product.checked_mul(*axis as u64));
        let bytes =
            elements.and_then(|elements| elements.checked_mul(entry.dtype.bitsize() as u64)).map(|bits| bits / 8);
        if bytes != Some(end - begin) {
            return Err(format!(
                "tensor {name} has shape {:?}, which does not take {} bytes",
                entry.shape,
                end - begin
            ));
        }
        at = end;
    }
    entries.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
    match entries.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        None => Ok(at),
        Some(pair) => Err(format!("tensor {} occurs twice", pair[0].0)),
    }
}

/// The header's object, but for its metadata.
struct Entries(Vec<(String, Entry)>);

#[derive(serde::Deserialize)]
struct Entry {
    dtype: Dtype,
    #[serde(deserialize_with = "axes")]
    shape: Vec<usize>,
    #[serde(rename = "data_offsets")]
    offsets: (u64, u64),
}

impl Entry {
    fn place(self, name: String, start: u64) -> Result<(String, TensorInfo), ModelError> {
        let dtype = match self.dtype {
            Dtype::F32 => GgmlDType::F32,
            Dtype::F16 => GgmlDType::F16,
            Dtype::BF16 => GgmlDType::BF16,
            other => return Err(ModelError::StoredType { name, dtype: format!("{other:?}") }),
        };
        let (begin, end) = self.offsets;
        let bytes = usize::try_from(end - begin).expect("the file is as long, and its length fits");
        Ok((name, TensorInfo { shape: self.shape, dtype, offset: start + begin, bytes }))
    }
}

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

/// A shape, as long as weights have one.
fn axes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<usize>, D::Error> {
    struct Axes;
    impl<'de> Visitor<'de> for Axes {
        type Value = Vec<usize>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a shape")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<usize>, A::Error> {
            let mut shape = Vec::new();
            while let Some(axis) = list.next_element()? {
                if shape.len() == AXES_MAX {
                    return Err(A::Error::custom(format!("a tensor has more than {AXES_MAX} axes")));
                }
                shape.push(axis);
            }
            Ok(shape)
        }
    }
    deserializer.deserialize_seq(Axes)
}
