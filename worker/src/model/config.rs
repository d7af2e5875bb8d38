//! A model's sizes and per-layer settings, read from GGUF metadata.
//!
//! Follows the file: what it does not say is taken from the family or is an error, and a setting that we do not compute
//! is an error too, never ignored. Does not look at tensors except `rope_freqs.weight`, which `weights` hands in. Settings
//! in Hugging Face's layout are read in `hf`.

use std::fmt::Display;

use protocol::memory::executor::activation_bytes_per_token;

use super::error::ModelError;
use super::family::{FAMILIES, Family, family};
use super::gguf::{GgufError, Metadata, Value};
use super::rope::{Rope, RopeScaling};

/// No published model of these families comes near; garbage does.
pub(super) const LAYERS_MAX: usize = 1024;
/// The same for one head.
pub(super) const HEAD_DIM_MAX: usize = 1024;

/// The sizes and settings of a model. Letters as in shapes: H heads, H_kv key-value heads, D head dimension.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// What the file does not state.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the MLP.
    pub mlp: usize,
    /// H.
    pub heads: usize,
    /// H_kv; divides H.
    pub kv_heads: usize,
    /// D.
    pub head_dim: usize,
    /// Epsilon of every RMS norm.
    pub epsilon: f32,
    /// Positions the model was made for.
    pub context_length: usize,
    /// Factor on embeddings.
    pub embedding_scale: f32,
    /// Factor on attention scores.
    pub attention_scale: f32,
    /// One entry a layer, first layer first.
    pub layers: Vec<LayerConfig>,
}

/// What differs from layer to layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerConfig {
    /// How queries and keys are rotated.
    pub rope: Rope,
    /// Position differences of this and more are invisible. None: everything before is visible.
    pub window: Option<usize>,
}

/// The keys below the architecture's name.
struct Keys<'a> {
    metadata: &'a Metadata,
    prefix: &'static str,
}

impl ModelConfig {
    /// Reads the settings; `rope_divisors` is the tensor `rope_freqs.weight` where there is one.
    ///
    /// # Errors
    /// Names the key and value that is missing, wrong, or not computed here.
    pub fn from_metadata(metadata: &Metadata, rope_divisors: Option<Vec<f32>>) -> Result<Self, ConfigError> {
        let family = family_of(metadata)?;
        let keys = Keys { metadata, prefix: family.architecture };
        keys.refuse_unknown()?;
        let layer_count = keys.size("block_count", LAYERS_MAX)?;
        let hidden = keys.size("embedding_length", 1 << 20)?;
        let heads = keys.size("attention.head_count", 1 << 12)?;
        let kv_heads = keys.optional_size("attention.head_count_kv", 1 << 12)?.unwrap_or(heads);
        if heads % kv_heads != 0 {
            return Err(keys.unsupported("attention.head_count_kv", kv_heads, "it must divide the number of heads"));
        }
        let head_dim = keys.head_dim(hidden, heads)?;
        let epsilon = keys.number("attention.layer_norm_rms_epsilon")?;
        let epsilon = metadata.required(&keys.name("attention.layer_norm_rms_epsilon"), epsilon)?;
        #[expect(clippy::cast_possible_truncation, reason = "all arithmetic of the model is f32")]
        Ok(Self {
            family,
            hidden,
            mlp: keys.size("feed_forward_length", 1 << 22)?,
            heads,
            kv_heads,
            head_dim,
            epsilon: epsilon as f32,
            context_length: keys.size("context_length", 1 << 30)?,
            embedding_scale: if family.scaled_embedding { (hidden as f32).sqrt() } else { 1.0 },
            attention_scale: attention_scale(family, layer_count, hidden, heads, head_dim),
            layers: keys.layers(family, layer_count, head_dim, rope_divisors)?,
        })
    }

    /// Bytes of activations that a pass on slices holds for each of its tokens.
    pub fn activation_bytes_per_token(&self) -> usize {
        let attention = (self.heads + self.kv_heads) * self.head_dim;
        let bytes = activation_bytes_per_token(self.hidden as u64, attention as u64, self.mlp as u64);
        usize::try_from(bytes).unwrap_or(usize::MAX)
    }

    /// Bytes of K and V that one token takes, both as f32.
    pub fn kv_bytes_per_token(&self) -> usize {
        2 * self.layers.len() * self.kv_heads * self.head_dim * size_of::<f32>()
    }
}

/// The family that a file says it is.
///
/// # Errors
/// [`ModelError::UnknownArchitecture`], or the key is missing.
pub fn family_of(metadata: &Metadata) -> Result<Family, ConfigError> {
    let architecture = metadata.required("general.architecture", metadata.text("general.architecture")?)?;
    family(architecture).ok_or_else(|| {
        let known = FAMILIES.map(|family| family.architecture).join(", ");
        ModelError::UnknownArchitecture { name: architecture.to_owned(), known }.into()
    })
}

/// Settings could not be read: either the container or the model is at fault.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A key is missing or of the wrong type.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The settings are not ours.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl Keys<'_> {
    /// Keys that `from_metadata` reads, or that say nothing about the computation.
    const KNOWN: [&'static str; 22] = [
        "block_count",
        "embedding_length",
        "feed_forward_length",
        "context_length",
        "vocab_size",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "attention.layer_norm_epsilon",
        "attention.sliding_window",
        "attention.sliding_window_pattern",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.freq_base_swa",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "rope.scale_linear",
        "tensor_data_layout",
    ];

    /// Keys that ask for something we do not compute unless they are zero.
    const ZERO: [&'static str; 7] = [
        "expert_count",
        "expert_used_count",
        "final_logit_softcapping",
        "attn_logit_softcapping",
        "attention.max_alibi_bias",
        "attention.clamp_kqv",
        "logit_scale",
    ];

    fn refuse_unknown(&self) -> Result<(), ConfigError> {
        for (key, value) in &self.metadata.0 {
            let Some(key) = key.strip_prefix(self.prefix).and_then(|rest| rest.strip_prefix('.')) else { continue };
            if Self::ZERO.contains(&key) {
                if !matches!(value, Value::U64(0) | Value::I64(0)) && *value != Value::F64(0.0) {
                    return Err(self.unsupported(key, format!("{value:?}"), "only 0 is computed here"));
                }
            } else if !Self::KNOWN.contains(&key) {
                return Err(ModelError::UnknownKey { key: self.name(key) }.into());
            }
        }
        Ok(())
    }

    fn head_dim(&self, hidden: usize, heads: usize) -> Result<usize, ConfigError> {
        let head_dim = match self.optional_size("attention.key_length", HEAD_DIM_MAX)? {
            Some(value) => value,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => return Err(self.unsupported("attention.head_count", heads, "it must divide the embedding length")),
        };
        if head_dim % 2 != 0 || head_dim > HEAD_DIM_MAX {
            return Err(self.unsupported("attention.key_length", head_dim, "it must be even and at most 1024"));
        }
        for key in ["attention.value_length", "rope.dimension_count"] {
            match self.optional_size(key, HEAD_DIM_MAX)? {
                Some(value) if value != head_dim => {
                    return Err(self.unsupported(key, value, "only the head dimension itself is computed here"));
                }
                _ => {}
            }
        }
        Ok(head_dim)
    }

    fn layers(
        &self,
        family: Family,
        count: usize,
        head_dim: usize,
        divisors: Option<Vec<f32>>,
    ) -> Result<Vec<LayerConfig>, ConfigError> {
        let base = self.rope_base("rope.freq_base")?.unwrap_or(1e4);
        let global = Rope::new(base, self.scaling(head_dim, divisors)?, head_dim);
        let window = self.metadata.integer(&self.name("attention.sliding_window"))?.filter(|window| *window > 0);
        let local_base = self.rope_base("rope.freq_base_swa")?.or(family.local_rope_base);
        // Gemma 3 scales its global layers only; where local layers have no base of their own, they rotate like the rest.
        let local = local_base.map_or_else(|| global.clone(), |base| Rope::new(base, RopeScaling::None, head_dim));
        let is_local = self.pattern(family, count)?;
        Ok((0..count)
            .map(|layer| match window {
                Some(window) if is_local[layer] => LayerConfig { rope: local.clone(), window: Some(window) },
                _ => LayerConfig { rope: global.clone(), window: None },
            })
            .collect())
    }

    /// Which layers have the window, if there is one.
    fn pattern(&self, family: Family, count: usize) -> Result<Vec<bool>, ConfigError> {
        let key = "attention.sliding_window_pattern";
        let every = |period: usize| (0..count).map(|layer| period == 0 || layer % period < period - 1).collect();
        match self.metadata.0.get(&self.name(key)) {
            None => Ok(every(family.window_pattern)),
            Some(Value::Integers(flags)) if flags.len() == count => Ok(flags.iter().map(|flag| *flag != 0).collect()),
            Some(Value::Bytes(flags)) if flags.len() == count => Ok(flags.iter().map(|flag| *flag != 0).collect()),
            Some(Value::Integers(_) | Value::Bytes(_)) => {
                Err(self.unsupported(key, "a list", "there must be one for each layer"))
            }
            Some(_) => Ok(every(self.optional_size(key, LAYERS_MAX)?.unwrap_or(0))),
        }
    }

    fn scaling(&self, head_dim: usize, divisors: Option<Vec<f32>>) -> Result<RopeScaling, ConfigError> {
        if let Some(divisors) = divisors {
            let usable =
                divisors.len() == head_dim / 2 && divisors.iter().all(|value| value.is_finite() && *value > 0.0);
            if !usable {
                let got = vec![divisors.len()];
                let name = "rope_freqs.weight".to_owned();
                return Err(ModelError::TensorShape { name, expected: vec![head_dim / 2], got }.into());
            }
            return Ok(RopeScaling::Divisors(divisors));
        }
        let factor = match self.number("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.number("rope.scale_linear")?,
        };
        let kind = self.metadata.text(&self.name("rope.scaling.type"))?;
        match (kind, factor) {
            (Some("linear") | None, Some(factor)) if factor > 0.0 && factor != 1.0 => Ok(RopeScaling::Linear(factor)),
            (Some("linear"), None) => Err(self.unsupported("rope.scaling.factor", "absent", "linear scaling needs it")),
            (Some("none" | "linear") | None, factor) if factor.is_none_or(|value| value >= 0.0) => {
                Ok(RopeScaling::None)
            }
            (Some("none" | "linear") | None, _) => {
                Err(self.unsupported("rope.scaling.factor", format!("{factor:?}"), "it must be positive"))
            }
            (Some(other), _) => {
                Err(self.unsupported("rope.scaling.type", other, "only none and linear are computed here"))
            }
        }
    }

    fn rope_base(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        match self.number(key)? {
            Some(base) if base < 1.0 => Err(self.unsupported(key, base, "a RoPE base is at least 1")),
            base => Ok(base),
        }
    }

    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    fn number(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        Ok(self.metadata.number(&self.name(key))?)
    }

    /// A size that must be there, from 1 to `max`.
    fn size(&self, key: &str, max: usize) -> Result<usize, ConfigError> {
        Ok(self.metadata.required(&self.name(key), self.optional_size(key, max)?)?)
    }

    fn optional_size(&self, key: &str, max: usize) -> Result<Option<usize>, ConfigError> {
        match self.metadata.integer(&self.name(key))? {
            Some(value) if value == 0 || value > max => Err(self.unsupported(key, value, "no model has such a size")),
            value => Ok(value),
        }
    }

    fn unsupported(&self, key: &str, value: impl Display, why: &'static str) -> ConfigError {
        ModelError::Unsupported { key: self.name(key), value: value.to_string(), why }.into()
    }
}

/// 1/sqrt(D), except in Gemma 3 27B (told by its 62 layers, as llama.cpp does), which uses hidden / heads for D.
fn attention_scale(family: Family, layers: usize, hidden: usize, heads: usize, head_dim: usize) -> f32 {
    let width = if family.architecture == "gemma3" && layers == 62 { hidden / heads } else { head_dim };
    1.0 / (width as f32).sqrt()
}
