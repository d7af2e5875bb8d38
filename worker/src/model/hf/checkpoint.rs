//! A model's directory: which of its files belong to the model, and where in them each tensor lies.
//!
//! Values are read when they are asked for. Does not know what tensors are for, nor how a file says where they lie
//! (`header`). The index is the one that `transformers` writes beside shards.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::super::error::ModelError;
use super::super::gguf::TensorInfo;
use super::super::loaded::digest;
use super::header::header;
use super::json::Json;

/// Settings; the one file that makes a directory a model.
pub(super) const CONFIG: &str = "config.json";
/// Weights in one file.
const WEIGHTS: &str = "model.safetensors";
/// Which shard holds which tensor.
const INDEX: &str = "model.safetensors.index.json";
/// The tokenizer, complete.
pub(super) const TOKENIZER: &str = "tokenizer.json";
/// Its special tokens by role, and its chat template.
pub(super) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// The same special tokens, in older directories.
pub(super) const SPECIAL_TOKENS: &str = "special_tokens_map.json";
/// Tokens that end a text.
pub(super) const GENERATION: &str = "generation_config.json";
/// The chat template, in newer directories.
pub(super) const TEMPLATE: &str = "chat_template.jinja";
/// Read where they are there.
const OPTIONAL: [&str; 4] = [TOKENIZER_CONFIG, SPECIAL_TOKENS, GENERATION, TEMPLATE];

/// Old Llama checkpoints hold tables that follow from their settings.
const DERIVED: &str = ".rotary_emb.inv_freq";

/// A file of a model's directory does not hold what it should.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Not JSON.
    #[error("not JSON")]
    Json(#[from] serde_json::Error),
    /// A key that must be there is not.
    #[error("key {key} is missing")]
    MissingKey {
        /// Its name, with dots where it lies in an object.
        key: String,
    },
    /// A key holds something else than it should.
    #[error("key {key} should be {expected}")]
    KeyType {
        /// Its name, with dots where it lies in an object.
        key: String,
        /// What it should be.
        expected: &'static str,
    },
    /// The header is not one of safetensors.
    #[error("not a safetensors file: {what}")]
    Header {
        /// What is wrong with it.
        what: String,
    },
    /// The file is shorter, or longer, than its header says.
    #[error("truncated or corrupt: the header asks for {need} bytes, the file has {got}")]
    Length {
        /// By the header.
        need: u64,
        /// As it is.
        got: u64,
    },
    /// The index names a file that cannot belong to the directory.
    #[error("the index names the file {name:?}, which is not a plain file name")]
    FileName {
        /// As written in the index.
        name: String,
    },
    /// Index and shards do not agree.
    #[error("tensor {name} is not where the index says")]
    Index {
        /// The tensor.
        name: String,
    },
}

/// An opened directory: everything but the tensors' values is in memory.
#[derive(Debug)]
pub struct Checkpoint {
    directory: PathBuf,
    weights: BTreeSet<String>,
    tensors: BTreeMap<String, Placed>,
}

#[derive(Debug)]
struct Placed {
    file: String,
    info: TensorInfo,
}

impl Checkpoint {
    /// Reads the headers of the weights in `directory`: `model.safetensors`, or the shards that the index names.
    ///
    /// # Errors
    /// [`ModelError::Io`] and [`ModelError::Checkpoint`] with the file; [`ModelError::StoredType`] for a type of numbers
    /// that is not F32, F16 or BF16.
    pub fn open(directory: &Path) -> Result<Self, ModelError> {
        let index = Index::read(directory)?;
        let mut checkpoint =
            Self { directory: directory.to_path_buf(), weights: index.files, tensors: BTreeMap::new() };
        for file in &checkpoint.weights {
            let path = directory.join(file);
            for (name, info) in header(&path)? {
                if name.ends_with(DERIVED) {
                    continue;
                }
                let place = Placed { file: file.clone(), info };
                let misplaced = index.places.as_ref().is_some_and(|places| places.get(&name) != Some(file));
                if misplaced || checkpoint.tensors.insert(name.clone(), place).is_some() {
                    return Err(refused(&directory.join(INDEX), CheckpointError::Index { name }));
                }
            }
        }
        let places = index.places.iter().flat_map(BTreeMap::keys).filter(|name| !name.ends_with(DERIVED));
        if let Some(name) = places.into_iter().find(|name| !checkpoint.tensors.contains_key(*name)) {
            return Err(refused(&directory.join(INDEX), CheckpointError::Index { name: name.clone() }));
        }
        Ok(checkpoint)
    }

    /// All tensors by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.tensors.iter().map(|(name, placed)| (name.as_str(), &placed.info))
    }

    /// One tensor, if it is there.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|placed| &placed.info)
    }

    /// The values of a tensor that is there, as they lie in the file.
    ///
    /// # Errors
    /// [`ModelError::Io`] if the file has changed or vanished, [`ModelError::MissingTensor`].
    pub fn bytes_of(&self, name: &str) -> Result<Vec<u8>, ModelError> {
        let Placed { file, info } =
            self.tensors.get(name).ok_or_else(|| ModelError::MissingTensor { name: name.to_owned() })?;
        let path = self.directory.join(file);
        let read = || {
            let mut file = File::open(&path)?;
            file.seek(SeekFrom::Start(info.offset))?;
            let mut bytes = vec![0; info.bytes];
            file.read_exact(&mut bytes)?;
            Ok(bytes)
        };
        read().map_err(|source| ModelError::Io { path: path.clone(), source })
    }

    /// `sha256:` and a digest over all files that the model is made of: `config.json`, weights with their index,
    /// `tokenizer.json`, and those of `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json` and
    /// `chat_template.jinja` that are there. It is the SHA-256 of what `sha256sum` prints for them in the order of their
    /// names: a line of digest, two spaces and name for each.
    ///
    /// # Errors
    /// [`ModelError::Io`] and, for an index that cannot be read, [`ModelError::Checkpoint`].
    pub fn fingerprint(directory: &Path) -> Result<String, ModelError> {
        let mut names = Index::read(directory)?.files;
        names.extend([CONFIG, TOKENIZER].map(str::to_owned));
        let present = [INDEX].into_iter().chain(OPTIONAL).filter(|name| directory.join(name).is_file());
        names.extend(present.map(str::to_owned));
        let mut list = String::new();
        for name in names {
            list.push_str(&format!("{}  {name}\n", digest(&directory.join(&name))?));
        }
        let hash = ring::digest::digest(&ring::digest::SHA256, list.as_bytes());
        Ok(format!("sha256:{}", super::super::loaded::hex(hash.as_ref())))
    }

    /// Where it is.
    pub(super) fn path(&self, file: &str) -> PathBuf {
        self.directory.join(file)
    }

    /// A text file of the directory; `None` if it is not there.
    pub(super) fn text(&self, file: &str) -> Result<Option<String>, ModelError> {
        let path = self.path(file);
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(ModelError::Io { path, source }),
        }
    }

    /// A JSON file of the directory; `None` if it is not there.
    pub(super) fn json(&self, file: &str) -> Result<Option<Value>, ModelError> {
        let parse = |text: String| serde_json::from_str(&text).map_err(|error| refused(&self.path(file), error.into()));
        self.text(file)?.map(parse).transpose()
    }
}

/// Which weight files there are, and, if an index says so, which holds what.
struct Index {
    files: BTreeSet<String>,
    places: Option<BTreeMap<String, String>>,
}

impl Index {
    fn read(directory: &Path) -> Result<Self, ModelError> {
        let path = directory.join(INDEX);
        if !path.is_file() {
            return Ok(Self { files: BTreeSet::from([WEIGHTS.to_owned()]), places: None });
        }
        let text = std::fs::read_to_string(&path).map_err(|source| ModelError::Io { path: path.clone(), source })?;
        Self::parse(&text).map_err(|error| refused(&path, error))
    }

    fn parse(text: &str) -> Result<Self, CheckpointError> {
        let document: Value = serde_json::from_str(text)?;
        let document = Json::new(&document)?;
        let map = document.required("weight_map", document.object("weight_map")?)?;
        let mut places = BTreeMap::new();
        for name in map.keys() {
            let file = map.required(name, map.text(name)?)?;
            let plain = Path::new(file).file_name().is_some_and(|last| last == file);
            if !plain || file.contains('\\') {
                return Err(CheckpointError::FileName { name: file.to_owned() });
            }
            places.insert(name.to_owned(), file.to_owned());
        }
        Ok(Self { files: places.values().cloned().collect(), places: Some(places) })
    }
}

/// What is wrong with a file of the directory.
pub(crate) fn refused(path: &Path, source: CheckpointError) -> ModelError {
    ModelError::Checkpoint { path: path.to_path_buf(), source }
}
