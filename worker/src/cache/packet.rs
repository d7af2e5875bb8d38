//! A cache as a safetensors file, and back: bit-exact, and refused unless it fits the model at hand.
//!
//! The header's fields are `protocol::packet`'s; this file writes and checks them against real tensors. Checks come before
//! use: sizes against the bytes there are, the model's fingerprint and settings, then every number. Tensors pass through a
//! small buffer on their way to a file and back, so a long cache is not there twice. Does not sign, compress or encrypt.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Cursor, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;

use protocol::packet::{FORMAT, METADATA_KEY, PacketHeader, RopeFacts};
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde_json::json;

use super::error::CacheError;
use super::layout::CacheLayout;
use super::value::{KvCache, LayerKv};
use crate::model::config::LayerConfig;
use crate::model::family::family;
use crate::model::rope::{Rope, RopeScaling};

/// How a packet spells the type of its numbers.
const DTYPE: &str = "F32";
/// A longer directory is refused, as by the format's own library.
const DIRECTORY_BYTES_MAX: u64 = 100_000_000;
/// Heads of a model, and their width, at most.
const SIDE_MAX: usize = 1 << 16;
/// Numbers converted at a time.
const BLOCK: usize = 16 << 10;

impl KvCache {
    /// What a receiver must know about this cache.
    pub fn header(&self) -> PacketHeader {
        let number = |value: usize| u32::try_from(value).expect("sizes of models and caches fit 32 bits");
        let held = || self.layers.keys().map(|index| &self.layout.layers[*index]);
        PacketHeader {
            format: FORMAT,
            model_fingerprint: self.layout.fingerprint.clone(),
            architecture: self.layout.architecture.to_owned(),
            model_layers: number(self.layout.layers.len()),
            layers: self.layers.keys().map(|index| number(*index)).collect(),
            kv_heads: number(self.layout.kv_heads),
            head_dim: number(self.layout.head_dim),
            dtype: DTYPE.to_owned(),
            rotated: self.rotated,
            rope: held().map(|layer| rope_facts(layer, self.layout.head_dim)).collect(),
            sliding_window: held().map(|layer| layer.window.map(number)).collect(),
            positions: self.positions.clone(),
            token_ids: self.tokens.clone().unwrap_or_default(),
            generated: number(self.generated),
            spans: self.spans.clone().unwrap_or_default(),
            note: self.note.clone(),
        }
    }

    /// The cache as the bytes of a safetensors file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.write_to(&mut bytes).expect("memory takes every byte");
        bytes
    }

    /// Writes the cache as a safetensors file, tensors in layer order, K before V. Returns the number of bytes.
    ///
    /// # Errors
    /// What `sink` says.
    pub fn write_to(&self, sink: &mut impl Write) -> std::io::Result<u64> {
        let directory = self.directory();
        sink.write_all(&(directory.len() as u64).to_le_bytes())?;
        sink.write_all(&directory)?;
        let mut buffer = Vec::with_capacity(BLOCK * size_of::<f32>());
        for values in self.layers.values().flat_map(|layer| [&layer.k, &layer.v]) {
            for block in values.chunks(BLOCK) {
                buffer.clear();
                buffer.extend(block.iter().flat_map(|value| value.to_le_bytes()));
                sink.write_all(&buffer)?;
            }
        }
        let numbers: usize = self.layers.values().map(|layer| layer.k.len() + layer.v.len()).sum();
        Ok(8 + (directory.len() + numbers * size_of::<f32>()) as u64)
    }

    /// What comes before the tensors, without its length.
    fn directory(&self) -> Vec<u8> {
        let header = serde_json::to_string(&self.header()).expect("a header is plain data with string keys");
        let mut directory = BTreeMap::from([("__metadata__".to_owned(), json!({ METADATA_KEY: header }))]);
        let tensor_bytes = self.layout.layer_len(self.len()) * size_of::<f32>();
        let shape = [self.layout.kv_heads, self.len(), self.layout.head_dim];
        let mut offset = 0;
        for index in self.layers.keys() {
            for part in ["k", "v"] {
                let entry = json!({ "dtype": DTYPE, "shape": shape, "data_offsets": [offset, offset + tensor_bytes] });
                directory.insert(format!("layer.{index}.{part}"), entry);
                offset += tensor_bytes;
            }
        }
        let mut directory = serde_json::to_vec(&directory).expect("plain data with string keys");
        // safetensors pads its directory with spaces so that tensors are aligned.
        directory.resize(directory.len().next_multiple_of(8), b' ');
        directory
    }

    /// Reads a packet made for the model of `layout`.
    ///
    /// # Errors
    /// [`CacheError::Packet`] if the bytes are not a consistent packet, [`CacheError::Fingerprint`] and
    /// [`CacheError::Layout`] if it is another model's, [`CacheError::NotFinite`] for NaN and infinities.
    pub fn from_bytes(bytes: &[u8], layout: &Arc<CacheLayout>) -> Result<Self, CacheError> {
        let failed = |source: std::io::Error| broken(source.to_string());
        Source { reader: Cursor::new(bytes), length: bytes.len() as u64, failed: &failed }.read(Some(layout))
    }

    /// Writes the packet to a file; returns its length in bytes.
    ///
    /// # Errors
    /// [`CacheError::Io`].
    pub fn save(&self, path: &Path) -> Result<u64, CacheError> {
        let write = || self.write_to(&mut File::create(path)?);
        write().map_err(|source| CacheError::Io { path: path.to_path_buf(), source })
    }

    /// Reads a packet from a file, for the model of `layout`.
    ///
    /// # Errors
    /// [`CacheError::Io`], and as [`KvCache::from_bytes`].
    pub fn load(path: &Path, layout: &Arc<CacheLayout>) -> Result<Self, CacheError> {
        Self::open(path, Some(layout))
    }

    /// Reads a packet of another model than those at hand, to be projected: what it says about that model is its layout, so
    /// it must hold every layer.
    ///
    /// # Errors
    /// [`CacheError::Io`], [`CacheError::Packet`], [`CacheError::NotFinite`].
    pub fn load_foreign(path: &Path) -> Result<Self, CacheError> {
        Self::open(path, None)
    }

    /// The same from bytes.
    ///
    /// # Errors
    /// [`CacheError::Packet`], [`CacheError::NotFinite`].
    pub fn from_foreign_bytes(bytes: &[u8]) -> Result<Self, CacheError> {
        let failed = |source: std::io::Error| broken(source.to_string());
        Source { reader: Cursor::new(bytes), length: bytes.len() as u64, failed: &failed }.read(None)
    }

    fn open(path: &Path, layout: Option<&Arc<CacheLayout>>) -> Result<Self, CacheError> {
        let failed = |source| CacheError::Io { path: path.to_path_buf(), source };
        let reader = File::open(path).map_err(failed)?;
        let length = reader.metadata().map_err(failed)?.len();
        Source { reader, length, failed: &failed }.read(layout)
    }
}

/// Where a packet is read from.
struct Source<'a, R> {
    reader: R,
    /// Bytes in all.
    length: u64,
    failed: &'a dyn Fn(std::io::Error) -> CacheError,
}

impl<R: Read + Seek> Source<'_, R> {
    /// Reads a packet of the model of `layout`; without one, of whatever model the packet says.
    fn read(mut self, layout: Option<&Arc<CacheLayout>>) -> Result<KvCache, CacheError> {
        let (directory, start) = self.directory()?;
        let header = directory.metadata().as_ref().and_then(|metadata| metadata.get(METADATA_KEY));
        let header = header.ok_or_else(|| broken(format!("metadata {METADATA_KEY} is missing")))?;
        let header: PacketHeader = serde_json::from_str(header).map_err(|error| broken(error.to_string()))?;
        let layout = match layout {
            Some(layout) => Arc::clone(layout),
            None => Arc::new(stated_layout(&header)?),
        };
        check_header(&header, &layout)?;
        let tensors = directory.offset_keys().len();
        if tensors != 2 * header.layers.len() {
            return Err(broken(format!("{tensors} tensors for {} layers", header.layers.len())));
        }
        let shape = [layout.kv_heads, header.positions.len(), layout.head_dim];
        let mut layers = BTreeMap::new();
        for index in &header.layers {
            let index = *index as usize;
            let k = self.tensor(&directory, start, (index, "k", "keys"), &shape)?;
            let v = self.tensor(&directory, start, (index, "v", "values"), &shape)?;
            layers.insert(index, LayerKv { k, v });
        }
        let tokens = (header.token_ids.len() == header.positions.len()).then_some(header.token_ids);
        let spans = (header.spans.len() == header.positions.len()).then_some(header.spans);
        let cache = KvCache::new(layout, layers, header.positions, tokens, header.rotated)?;
        let cache = cache.with_generated(header.generated as usize).with_note(header.note);
        match spans {
            Some(spans) => cache.with_spans(spans),
            None => Ok(cache),
        }
    }

    /// What tensors there are, and where the first begins.
    fn directory(&mut self) -> Result<(Metadata, u64), CacheError> {
        let mut size = [0; 8];
        if self.length < 8 {
            return Err(broken(format!("it is {} bytes long", self.length)));
        }
        self.reader.read_exact(&mut size).map_err(self.failed)?;
        let size = u64::from_le_bytes(size);
        if size > DIRECTORY_BYTES_MAX || size > self.length - 8 {
            return Err(broken(format!("its directory claims {size} bytes of {}", self.length)));
        }
        let mut text = vec![0; usize::try_from(size).expect("at most DIRECTORY_BYTES_MAX")];
        self.reader.read_exact(&mut text).map_err(self.failed)?;
        // Checks that the tensors' bytes follow each other and fit their shapes.
        let directory: Metadata = serde_json::from_slice(&text).map_err(|error| broken(error.to_string()))?;
        let need = (8 + size).saturating_add(directory.data_len() as u64);
        if need != self.length {
            return Err(broken(format!("its directory asks for {need} bytes of {}", self.length)));
        }
        Ok((directory, 8 + size))
    }

    fn tensor(
        &mut self,
        directory: &Metadata,
        start: u64,
        (layer, name, part): (usize, &str, &'static str),
        shape: &[usize],
    ) -> Result<Vec<f32>, CacheError> {
        let name = format!("layer.{layer}.{name}");
        let info = directory.info(&name).ok_or_else(|| broken(format!("tensor {name} is missing")))?;
        if info.dtype != Dtype::F32 || info.shape != shape {
            let (dtype, got) = (info.dtype, &info.shape);
            return Err(broken(format!("tensor {name} is {dtype:?} {got:?}, expected F32 {shape:?}")));
        }
        self.reader.seek(SeekFrom::Start(start + info.data_offsets.0 as u64)).map_err(self.failed)?;
        let count: usize = shape.iter().product();
        let mut values = Vec::with_capacity(count);
        let mut buffer = vec![0; BLOCK.min(count) * size_of::<f32>()];
        while values.len() < count {
            let block = &mut buffer[..BLOCK.min(count - values.len()) * size_of::<f32>()];
            self.reader.read_exact(block).map_err(self.failed)?;
            let (words, _) = block.as_chunks::<4>();
            values.extend(words.iter().map(|word| f32::from_le_bytes(*word)));
        }
        match values.iter().all(|value| value.is_finite()) {
            true => Ok(values),
            false => Err(CacheError::NotFinite { layer, part }),
        }
    }
}

fn broken(what: String) -> CacheError {
    CacheError::Packet { what }
}

fn rope_facts(layer: &LayerConfig, head_dim: usize) -> RopeFacts {
    let (linear_factor, divisors) = match &layer.rope.scaling {
        RopeScaling::None => (1.0, Vec::new()),
        RopeScaling::Linear(factor) => (*factor, Vec::new()),
        RopeScaling::Divisors(divisors) => (1.0, divisors.clone()),
    };
    let dims = u32::try_from(head_dim).expect("a head's width fits 32 bits");
    RopeFacts { base: layer.rope.base, dims, linear_factor, divisors }
}

/// The layout that a header with every layer states.
fn stated_layout(header: &PacketHeader) -> Result<CacheLayout, CacheError> {
    let family = family(&header.architecture)
        .ok_or_else(|| broken(format!("it is of architecture {}, which is not known here", header.architecture)))?;
    let all = header.model_layers as usize;
    if header.rope.len() != all || header.sliding_window.len() != all {
        return Err(broken(format!("it holds {} of {all} layers; another model's must hold all", header.rope.len())));
    }
    let (kv_heads, head_dim) = (header.kv_heads as usize, header.head_dim as usize);
    if !(1..=SIDE_MAX).contains(&kv_heads) || !(2..=SIDE_MAX).contains(&head_dim) || head_dim % 2 != 0 {
        return Err(broken(format!("{kv_heads} heads of width {head_dim}")));
    }
    let layer = |(facts, window): (&RopeFacts, &Option<u32>)| {
        let scaling = match facts.divisors.as_slice() {
            [] if facts.linear_factor == 1.0 => RopeScaling::None,
            [] => RopeScaling::Linear(facts.linear_factor),
            divisors if divisors.len() == head_dim / 2 => RopeScaling::Divisors(divisors.to_vec()),
            divisors => return Err(broken(format!("{} RoPE divisors for a head of {head_dim}", divisors.len()))),
        };
        let window = window.map(|window| window as usize);
        Ok(LayerConfig { rope: Rope::new(facts.base, scaling, head_dim), window })
    };
    let layers = header.rope.iter().zip(&header.sliding_window).map(layer).collect::<Result<_, _>>()?;
    let (fingerprint, architecture) = (header.model_fingerprint.clone(), family.architecture);
    Ok(CacheLayout { fingerprint, architecture, layers, kv_heads, head_dim })
}

/// Refuses a header that contradicts itself or the model.
fn check_header(header: &PacketHeader, layout: &CacheLayout) -> Result<(), CacheError> {
    if header.format != FORMAT {
        return Err(broken(format!("format {}, this build reads {FORMAT}", header.format)));
    }
    if header.model_fingerprint != layout.fingerprint {
        let (expected, got) = (layout.fingerprint.clone(), header.model_fingerprint.clone());
        return Err(CacheError::Fingerprint { expected, got });
    }
    let same = |what: &str, expected: String, got: String| {
        if expected == got { Ok(()) } else { Err(CacheError::Layout { what: what.to_owned(), expected, got }) }
    };
    same("the architecture", layout.architecture.to_owned(), header.architecture.clone())?;
    same("the number of layers", layout.layers.len().to_string(), header.model_layers.to_string())?;
    same("the number of heads", layout.kv_heads.to_string(), header.kv_heads.to_string())?;
    same("the head dimension", layout.head_dim.to_string(), header.head_dim.to_string())?;
    same("the type of numbers", DTYPE.to_owned(), header.dtype.clone())?;
    if !header.layers.is_sorted_by(|a, b| a < b)
        || header.layers.last().is_some_and(|last| *last >= header.model_layers)
    {
        return Err(broken("layers are not ascending below the model's number of layers".to_owned()));
    }
    if header.rope.len() != header.layers.len() || header.sliding_window.len() != header.layers.len() {
        return Err(broken("RoPE and windows must be stated once a layer".to_owned()));
    }
    for ((index, rope), window) in header.layers.iter().zip(&header.rope).zip(&header.sliding_window) {
        let layer = &layout.layers[*index as usize];
        let expected = rope_facts(layer, layout.head_dim);
        same(&format!("RoPE of layer {index}"), format!("{expected:?}"), format!("{rope:?}"))?;
        let got = window.map(|window| window as usize);
        same(&format!("the window of layer {index}"), format!("{:?}", layer.window), format!("{got:?}"))?;
    }
    let columns = header.positions.len();
    if !header.token_ids.is_empty() && header.token_ids.len() != columns {
        return Err(broken(format!("{} token ids for {columns} positions", header.token_ids.len())));
    }
    if !header.spans.is_empty() && header.spans.len() != columns {
        return Err(broken(format!("{} spans for {columns} positions", header.spans.len())));
    }
    if header.generated as usize > columns {
        return Err(broken(format!("{} generated of {columns} tokens", header.generated)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::value::tests::sample;

    #[test]
    fn a_packet_comes_back_bit_for_bit() {
        for cache in [sample(5), sample(5).unrotated(), sample(0), sample(3).select_layers(&[1]).unwrap()] {
            let cache = cache.with_generated(2).with_note("read in 3 ms".to_owned());
            let spans = (0..u32::try_from(cache.len()).unwrap()).map(|column| (column, column + 1)).collect();
            let cache = cache.with_spans(spans).unwrap();
            assert_eq!(KvCache::from_bytes(&cache.to_bytes(), cache.layout()).unwrap(), cache);
            let foreign = KvCache::from_foreign_bytes(&cache.to_bytes());
            match cache.check_fits(cache.layout()) {
                Ok(()) => assert_eq!(foreign.unwrap(), cache),
                Err(_) => assert!(matches!(foreign, Err(CacheError::Packet { .. }))),
            }
        }
    }

    #[test]
    fn another_model_is_refused() {
        let cache = sample(3);
        let mut other = (**cache.layout()).clone();
        other.fingerprint = "sha256:11".to_owned();
        let refused = KvCache::from_bytes(&cache.to_bytes(), &Arc::new(other));
        assert!(matches!(refused, Err(CacheError::Fingerprint { .. })), "{refused:?}");
        let mut other = (**cache.layout()).clone();
        other.layers[1].window = None;
        let refused = KvCache::from_bytes(&cache.to_bytes(), &Arc::new(other));
        assert!(matches!(refused, Err(CacheError::Layout { .. })), "{refused:?}");
    }

    #[test]
    fn numbers_that_are_not_finite_are_refused() {
        let mut cache = sample(3);
        cache.layers.get_mut(&1).unwrap().v[7] = f32::NAN;
        let refused = KvCache::from_bytes(&cache.to_bytes(), cache.layout());
        assert!(matches!(refused, Err(CacheError::NotFinite { layer: 1, part: "values" })), "{refused:?}");
    }

    #[test]
    fn damaged_bytes_are_an_error_and_never_a_panic() {
        let cache = sample(3);
        let bytes = cache.to_bytes();
        for length in 0..bytes.len() {
            assert!(KvCache::from_bytes(&bytes[..length], cache.layout()).is_err(), "{length}");
        }
        for at in 0..bytes.len().min(2000) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x55;
            let _ = KvCache::from_bytes(&damaged, cache.layout());
            let _ = KvCache::from_foreign_bytes(&damaged);
        }
    }
}
