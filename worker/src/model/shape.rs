//! A model's sizes for the memory model, read from headers: no weights, no tokenizer.
//!
//! Takes what [`super::Model::load`] would take and refuses what that refuses for its settings, but looks at no number of a
//! tensor.

use std::path::Path;

use protocol::memory::{ModelShape, StoredBytes};

use super::config::{ConfigError, ModelConfig, family_of};
use super::error::ModelError;
use super::family::Family;
use super::gguf::{Gguf, TensorInfo};
use super::hf::Checkpoint;
use super::hf::config::Settings;
use super::names::{Naming, Part};

/// The shape of the model in a file or directory.
///
/// # Errors
/// [`ModelError`] as loading gives it for headers and settings, or if a size is beyond what a model can have.
pub fn shape(path: &Path) -> Result<ModelShape, ModelError> {
    let shape = if path.is_dir() { of_directory(path)? } else { of_gguf(path)? };
    match shape.is_plausible() {
        true => Ok(shape),
        false => {
            let (key, value) = ("sizes".to_owned(), format!("{shape:?}"));
            Err(ModelError::Unsupported { key, value, why: "no model is that large, or has none of something" })
        }
    }
}

fn of_gguf(path: &Path) -> Result<ModelShape, ModelError> {
    let wrong = |error: ConfigError| match error {
        ConfigError::Gguf(source) => ModelError::Gguf { path: path.to_path_buf(), source },
        ConfigError::Model(error) => error,
    };
    let gguf = Gguf::open(path).map_err(|source| ModelError::Gguf { path: path.to_path_buf(), source })?;
    let family = family_of(&gguf.metadata).map_err(wrong)?;
    // Factors of the rotation change no size.
    let config = ModelConfig::from_metadata(&gguf.metadata, None).map_err(wrong)?;
    let tensor = |name: &str| gguf.tensors.get(name);
    let all = gguf.tensors.values().map(|tensor| tensor.bytes as u64).sum();
    Ok(of_tensors(&config, &Tables::find(Naming::Gguf, &family, tensor)?, all, None))
}

fn of_directory(path: &Path) -> Result<ModelShape, ModelError> {
    let checkpoint = Checkpoint::open(path)?;
    let settings = Settings::read(&checkpoint)?;
    let tensor = |name: &str| checkpoint.tensor(name);
    let tables = Tables::find(Naming::HuggingFace, &settings.config.family, tensor)?;
    let all = checkpoint.tensors().map(|(_, tensor)| tensor.bytes as u64).sum();
    Ok(of_tensors(&settings.config, &tables, all, Some(settings.tied)))
}

/// Embedding and head, as far as headers tell.
struct Tables {
    vocabulary: usize,
    bytes: u64,
    head: bool,
}

impl Tables {
    fn find<'a>(
        naming: Naming,
        family: &Family,
        tensor: impl Fn(&str) -> Option<&'a TensorInfo>,
    ) -> Result<Self, ModelError> {
        let name = |part: Part| format!("{}.weight", part.name(naming, family));
        let embedding = name(Part::Embedding);
        let Some(table) = tensor(&embedding) else { return Err(ModelError::MissingTensor { name: embedding }) };
        let head = tensor(&name(Part::Head));
        let bytes = table.bytes as u64 + head.map_or(0, |head| head.bytes as u64);
        Ok(Self { vocabulary: table.shape.first().copied().unwrap_or(0), bytes, head: head.is_some() })
    }
}

fn of_tensors(config: &ModelConfig, tables: &Tables, all: u64, tied: Option<bool>) -> ModelShape {
    // What does not fit 32 bits is no model's size: zero, which is refused.
    let number = |size: usize| u32::try_from(size).unwrap_or(0);
    let windows = || config.layers.iter().filter_map(|layer| layer.window);
    ModelShape {
        layers: number(config.layers.len()),
        hidden: number(config.hidden),
        heads: number(config.heads),
        kv_heads: number(config.kv_heads),
        head_dim: number(config.head_dim),
        ffn: number(config.mlp),
        vocabulary: number(tables.vocabulary),
        tied: tied.unwrap_or(!tables.head),
        sliding_layers: number(windows().count()),
        window: windows().next().map(number),
        context_length: number(config.context_length),
        stored: Some(StoredBytes { all, tables: tables.bytes }),
    }
}
