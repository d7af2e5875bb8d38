//! The file of a projector, and of sums that one is solved from: safetensors with a manifest in its metadata.
//!
//! One format for all methods. The manifest is JSON under [`METADATA_KEY`] and says what the numbers are for: which two models,
//! trained how, on what. A digest over names, shapes and numbers is part of it, so a file that is cut, damaged or put together
//! from two is refused, by name. Written and read tensor by tensor, so that a file is not in memory twice.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use half::f16;
use safetensors::tensor::Metadata;
use safetensors::{Dtype, View};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::error::ProjectorError;
use crate::cache::CacheLayout;

/// Key of the manifest in the safetensors metadata.
pub const METADATA_KEY: &str = "bonepile.projector";
/// Version of the format.
pub const FORMAT: u32 = 1;
/// A longer directory is refused.
const DIRECTORY_BYTES_MAX: u64 = 100_000_000;

/// What a projector says about itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// `ridge`, `fuser`.
    pub method: String,
    /// Whose caches come in.
    pub source: Side,
    /// Whose caches go out.
    pub target: Side,
    /// Source layers of each target layer, ascending.
    pub layers: Vec<Vec<usize>>,
    /// What it was trained on: [`super::corpus::Corpus::hash`].
    pub corpus: String,
    /// How, as in the spec: method and pairs.
    pub recipe: serde_json::Value,
    /// Samples behind it, each epoch counted.
    pub samples: u64,
}

/// One of the two models, as far as a projector depends on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Side {
    /// `sha256:…` of its weights.
    pub fingerprint: String,
    /// `llama`, `gemma3`, ….
    pub architecture: String,
    /// Layers.
    pub layers: usize,
    /// H_kv.
    pub kv_heads: usize,
    /// D.
    pub head_dim: usize,
}

impl Side {
    /// Of the model with this layout.
    pub fn of(layout: &CacheLayout) -> Self {
        Self {
            fingerprint: layout.fingerprint.clone(),
            architecture: layout.architecture.to_owned(),
            layers: layout.layers.len(),
            kv_heads: layout.kv_heads,
            head_dim: layout.head_dim,
        }
    }

    /// Numbers of one token's keys, or values, in a layer.
    pub fn width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Refuses another model.
    ///
    /// # Errors
    /// [`ProjectorError::Fingerprint`], [`ProjectorError::Layout`].
    pub fn accept(&self, side: &'static str, layout: &CacheLayout) -> Result<(), ProjectorError> {
        if self.fingerprint != layout.fingerprint {
            let (expected, got) = (self.fingerprint.clone(), layout.fingerprint.clone());
            return Err(ProjectorError::Fingerprint { side, expected, got });
        }
        let other = Self::of(layout);
        for (what, expected, got) in [
            ("the number of layers", self.layers, other.layers),
            ("the number of heads", self.kv_heads, other.kv_heads),
            ("the head dimension", self.head_dim, other.head_dim),
        ] {
            if expected != got {
                return Err(ProjectorError::Layout { side, what, expected, got });
            }
        }
        Ok(())
    }
}

impl Manifest {
    /// Refuses caches of other models than the two it was made for.
    ///
    /// # Errors
    /// As [`Side::accept`].
    pub fn accept(&self, source: &CacheLayout, target: &CacheLayout) -> Result<(), ProjectorError> {
        self.source.accept("source", source)?;
        self.target.accept("target", target)
    }

    /// Refuses a manifest that contradicts itself.
    pub(super) fn check(&self) -> Result<(), ProjectorError> {
        let wrong = |what: String| Err(ProjectorError::File { kind: KIND, what });
        if self.layers.len() != self.target.layers {
            return wrong(format!("{} lists of layers for {} target layers", self.layers.len(), self.target.layers));
        }
        let fine = |list: &Vec<usize>| {
            !list.is_empty() && list.is_sorted_by(|a, b| a < b) && list.iter().all(|layer| *layer < self.source.layers)
        };
        match self.layers.iter().position(|list| !fine(list)) {
            Some(layer) => wrong(format!("source layers of target layer {layer} are {:?}", self.layers[layer])),
            None => Ok(()),
        }
    }
}

/// How an error names a projector's file.
pub(super) const KIND: &str = "projector";

/// A tensor of one of three widths, row-major.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// 16 bits.
    F16(Vec<f16>),
    /// 32 bits.
    F32(Vec<f32>),
    /// 64 bits.
    F64(Vec<f64>),
}

/// Shape and numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    /// Sizes of the axes.
    pub shape: Vec<usize>,
    /// As many numbers as they make.
    pub values: Values,
}

impl Stored {
    /// A tensor of 32-bit numbers.
    pub fn f32(shape: impl Into<Vec<usize>>, values: Vec<f32>) -> Self {
        Self { shape: shape.into(), values: Values::F32(values) }
    }

    /// A tensor of 16-bit numbers, each the nearest to one of `values`.
    pub fn f16(shape: impl Into<Vec<usize>>, values: &[f32]) -> Self {
        let values = values.iter().map(|value| f16::from_f32(*value)).collect();
        Self { shape: shape.into(), values: Values::F16(values) }
    }

    /// A tensor of 64-bit numbers.
    pub fn f64(shape: impl Into<Vec<usize>>, values: Vec<f64>) -> Self {
        Self { shape: shape.into(), values: Values::F64(values) }
    }
}

impl View for &Stored {
    fn dtype(&self) -> Dtype {
        match self.values {
            Values::F16(_) => Dtype::F16,
            Values::F32(_) => Dtype::F32,
            Values::F64(_) => Dtype::F64,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match &self.values {
            Values::F16(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>().into(),
            Values::F32(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>().into(),
            Values::F64(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>().into(),
        }
    }

    fn data_len(&self) -> usize {
        match &self.values {
            Values::F16(values) => size_of_val(values.as_slice()),
            Values::F32(values) => size_of_val(values.as_slice()),
            Values::F64(values) => size_of_val(values.as_slice()),
        }
    }
}

/// Tensors by name.
pub type Tensors = BTreeMap<String, Stored>;

/// What stands in the metadata: the manifest, with what makes it this file's.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope<M> {
    format: u32,
    kind: String,
    digest: String,
    manifest: M,
}

/// Writes a file of this kind; returns its length in bytes.
///
/// # Errors
/// [`ProjectorError::Io`].
pub fn save<M: Serialize>(
    path: &Path,
    kind: &'static str,
    manifest: &M,
    tensors: &Tensors,
) -> Result<u64, ProjectorError> {
    let failed = |source| ProjectorError::Io { path: path.to_path_buf(), source };
    let envelope = Envelope { format: FORMAT, kind: kind.to_owned(), digest: digest(tensors), manifest };
    let envelope = serde_json::to_string(&envelope).expect("a manifest is plain data with string keys");
    let metadata = HashMap::from([(METADATA_KEY.to_owned(), envelope)]);
    safetensors::serialize_to_file(tensors.iter(), Some(metadata), path).map_err(|error| match error {
        safetensors::SafeTensorError::IoError(source) => failed(source),
        error => ProjectorError::File { kind, what: error.to_string() },
    })?;
    Ok(std::fs::metadata(path).map_err(failed)?.len())
}

/// Reads a file of this kind whole.
///
/// # Errors
/// [`ProjectorError::Io`] if it cannot be read, [`ProjectorError::File`] for anything else that is wrong with it.
pub fn load<M: DeserializeOwned>(path: &Path, kind: &'static str) -> Result<(M, Tensors), ProjectorError> {
    let failed = |source| ProjectorError::Io { path: path.to_path_buf(), source };
    let mut file = File::open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    read(&mut file, length, kind, &failed)
}

/// BLAKE3 over names, shapes, types and numbers, in the order of names.
pub fn digest(tensors: &Tensors) -> String {
    let mut hasher = blake3::Hasher::new();
    for (name, tensor) in tensors {
        let tensor: &Stored = tensor;
        hasher.update(format!("{name}\0{:?}\0{:?}\0", tensor.shape, View::dtype(&tensor)).as_bytes());
        hasher.update(&View::data(&tensor));
    }
    format!("blake3:{}", hasher.finalize().to_hex())
}

fn read<M: DeserializeOwned>(
    file: &mut (impl Read + Seek),
    length: u64,
    kind: &'static str,
    failed: &dyn Fn(std::io::Error) -> ProjectorError,
) -> Result<(M, Tensors), ProjectorError> {
    let wrong = |what: String| ProjectorError::File { kind, what };
    let mut size = [0; 8];
    if length < 8 {
        return Err(wrong(format!("it is {length} bytes long")));
    }
    file.read_exact(&mut size).map_err(failed)?;
    let size = u64::from_le_bytes(size);
    if size > DIRECTORY_BYTES_MAX || size > length - 8 {
        return Err(wrong(format!("its directory claims {size} bytes of {length}")));
    }
    let mut text = vec![0; usize::try_from(size).expect("at most DIRECTORY_BYTES_MAX")];
    file.read_exact(&mut text).map_err(failed)?;
    // Checks that the tensors' bytes follow each other and fit their shapes.
    let directory: Metadata = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
    let need = (8 + size).saturating_add(directory.data_len() as u64);
    if need != length {
        return Err(wrong(format!("its directory asks for {need} bytes of {length}")));
    }
    let envelope = directory.metadata().as_ref().and_then(|metadata| metadata.get(METADATA_KEY));
    let envelope = envelope.ok_or_else(|| wrong(format!("metadata {METADATA_KEY} is missing")))?;
    // The manifest's fields depend on format and kind, so these come first.
    let stated: Envelope<serde_json::Value> =
        serde_json::from_str(envelope).map_err(|error| wrong(error.to_string()))?;
    if (stated.format, stated.kind.as_str()) != (FORMAT, kind) {
        return Err(wrong(format!("it is `{}` of format {}, expected format {FORMAT}", stated.kind, stated.format)));
    }
    let manifest = serde_json::from_value(stated.manifest).map_err(|error| wrong(error.to_string()))?;
    let mut tensors = Tensors::new();
    for name in directory.offset_keys() {
        let info = directory.info(&name).expect("a name of the directory");
        file.seek(SeekFrom::Start(8 + size + info.data_offsets.0 as u64)).map_err(failed)?;
        let mut bytes = vec![0; info.data_offsets.1 - info.data_offsets.0];
        file.read_exact(&mut bytes).map_err(failed)?;
        let values = values(info.dtype, &bytes)
            .ok_or_else(|| wrong(format!("tensor {name} is {:?}, or holds a number that is not finite", info.dtype)))?;
        tensors.insert(name, Stored { shape: info.shape.clone(), values });
    }
    if digest(&tensors) != stated.digest {
        return Err(wrong("its numbers are not those that were written".to_owned()));
    }
    Ok((manifest, tensors))
}

fn values(dtype: Dtype, bytes: &[u8]) -> Option<Values> {
    match dtype {
        Dtype::F16 => {
            let values: Vec<f16> = bytes.as_chunks().0.iter().map(|word| f16::from_le_bytes(*word)).collect();
            values.iter().all(|value| value.is_finite()).then_some(Values::F16(values))
        }
        Dtype::F32 => {
            let values: Vec<f32> = bytes.as_chunks().0.iter().map(|word| f32::from_le_bytes(*word)).collect();
            values.iter().all(|value| value.is_finite()).then_some(Values::F32(values))
        }
        Dtype::F64 => {
            let values: Vec<f64> = bytes.as_chunks().0.iter().map(|word| f64::from_le_bytes(*word)).collect();
            values.iter().all(|value| value.is_finite()).then_some(Values::F64(values))
        }
        _ => None,
    }
}

/// Takes a tensor of 32-bit numbers, or of 16-bit ones widened, and of this shape out of a file's.
///
/// # Errors
/// [`ProjectorError::File`] if it is not there or another.
pub fn take_f32(
    tensors: &mut Tensors,
    kind: &'static str,
    name: &str,
    shape: &[usize],
) -> Result<Vec<f32>, ProjectorError> {
    match take(tensors, kind, name, shape)? {
        Values::F32(values) => Ok(values),
        Values::F16(values) => Ok(values.into_iter().map(f16::to_f32).collect()),
        Values::F64(_) => Err(ProjectorError::File { kind, what: format!("tensor {name} is F64, expected F32") }),
    }
}

/// The same of 64-bit numbers.
///
/// # Errors
/// As [`take_f32`].
pub fn take_f64(
    tensors: &mut Tensors,
    kind: &'static str,
    name: &str,
    shape: &[usize],
) -> Result<Vec<f64>, ProjectorError> {
    match take(tensors, kind, name, shape)? {
        Values::F64(values) => Ok(values),
        Values::F16(_) | Values::F32(_) => {
            Err(ProjectorError::File { kind, what: format!("tensor {name} is narrower than F64") })
        }
    }
}

fn take(tensors: &mut Tensors, kind: &'static str, name: &str, shape: &[usize]) -> Result<Values, ProjectorError> {
    let wrong = |what: String| ProjectorError::File { kind, what };
    let tensor = tensors.remove(name).ok_or_else(|| wrong(format!("tensor {name} is missing")))?;
    if tensor.shape != shape {
        return Err(wrong(format!("tensor {name} is {:?}, expected {shape:?}", tensor.shape)));
    }
    Ok(tensor.values)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written() -> (Vec<u8>, Tensors) {
        let tensors = Tensors::from([
            ("a".to_owned(), Stored::f32([2, 3], vec![1.0, -2.0, 3.5, 0.0, 1e-20, 7.0])),
            ("b".to_owned(), Stored::f64([2], vec![0.1, 1e300])),
        ]);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("p.safetensors");
        let bytes = save(&path, KIND, &"manifest", &tensors).unwrap();
        let content = std::fs::read(&path).unwrap();
        assert_eq!(bytes, content.len() as u64);
        (content, tensors)
    }

    fn back(bytes: &[u8], kind: &'static str) -> Result<(String, Tensors), ProjectorError> {
        let failed = |source| ProjectorError::Io { path: "x".into(), source };
        read(&mut std::io::Cursor::new(bytes), bytes.len() as u64, kind, &failed)
    }

    #[test]
    fn what_is_written_comes_back() {
        let (bytes, tensors) = written();
        assert_eq!(back(&bytes, KIND).unwrap(), ("manifest".to_owned(), tensors));
        assert!(matches!(back(&bytes, "statistics"), Err(ProjectorError::File { kind: "statistics", .. })));
    }

    #[test]
    fn any_cut_and_any_flipped_byte_of_numbers_is_refused() {
        let (bytes, tensors) = written();
        for length in 0..bytes.len() {
            assert!(back(&bytes[..length], KIND).is_err(), "{length}");
        }
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            // Padding of the directory is not part of what is said.
            assert!(back(&damaged, KIND).map_or(true, |(_, got)| got == tensors), "{at}");
            if at >= bytes.len() - 40 {
                assert!(matches!(back(&damaged, KIND), Err(ProjectorError::File { .. })), "{at}");
            }
        }
    }

    #[test]
    fn tensors_are_taken_by_name_type_and_shape() {
        let (_, mut tensors) = written();
        let text = |error: ProjectorError| error.to_string();
        assert_eq!(
            text(take_f32(&mut tensors.clone(), KIND, "a", &[3, 2]).unwrap_err()),
            "not a projector file: tensor a is [2, 3], expected [3, 2]"
        );
        assert!(text(take_f32(&mut tensors.clone(), KIND, "b", &[2]).unwrap_err()).ends_with("is F64, expected F32"));
        assert!(text(take_f64(&mut tensors.clone(), KIND, "c", &[2]).unwrap_err()).ends_with("c is missing"));
        assert_eq!(take_f64(&mut tensors, KIND, "b", &[2]).unwrap(), [0.1, 1e300]);
    }
}
