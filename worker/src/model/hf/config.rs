//! `config.json`: a model's sizes and per-layer settings as `transformers` writes them.
//!
//! Follows the file, and where it is silent what `transformers` assumes for that type of model. A setting that we do not
//! compute is refused, and so is a key that we do not know, for it may change the result.

use std::fmt::Display;

use super::super::config::{HEAD_DIM_MAX, LAYERS_MAX, LayerConfig, ModelConfig};
use super::super::error::ModelError;
use super::super::family::{Activation, Family, family};
use super::super::rope::{Rope, RopeScaling};
use super::checkpoint::{CONFIG, Checkpoint, CheckpointError, GENERATION, refused};
use super::json::Json;

/// What a directory says about its model.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) config: ModelConfig,
    /// The output head is the embedding.
    pub(crate) tied: bool,
    /// Rows of the embedding; may be more than the tokenizer has tokens.
    pub(crate) vocabulary: usize,
    /// The token that begins a sequence.
    pub(crate) bos: Option<u32>,
    /// Tokens that end a text.
    pub(crate) ends: Vec<u32>,
}

/// A `model_type`: the family it is, and what its files may leave out.
struct Kind {
    model_type: &'static str,
    architecture: &'static str,
    /// None: hidden / heads.
    head_dim: Option<usize>,
    rope_base: f64,
    window: Option<usize>,
    tied: bool,
}

const LLAMA: Kind =
    Kind { model_type: "llama", architecture: "llama", head_dim: None, rope_base: 1e4, window: None, tied: false };

const KINDS: [Kind; 5] = [
    LLAMA,
    Kind { model_type: "mistral", window: Some(4096), ..LLAMA },
    Kind { model_type: "qwen2", architecture: "qwen2", ..LLAMA },
    Kind { model_type: "qwen3", architecture: "qwen3", head_dim: Some(128), ..LLAMA },
    Kind {
        model_type: "gemma3_text",
        architecture: "gemma3",
        head_dim: Some(256),
        rope_base: 1e6,
        window: Some(4096),
        tied: true,
    },
];

/// Keys that are read here, and keys that say nothing about the computation.
const KNOWN: [&str; 56] = [
    "_sliding_window_pattern",
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "cache_implementation",
    "decoder_start_token_id",
    "dtype",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "hidden_size",
    "id2label",
    "initializer_range",
    "intermediate_size",
    "is_llama_config",
    "label2id",
    "layer_types",
    "max_position_embeddings",
    "max_window_layers",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "query_pre_attn_scalar",
    "return_dict",
    "rms_norm_eps",
    "rope_local_base_freq",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "sliding_window_pattern",
    "sep_token_id",
    "task_specific_params",
    "tie_word_embeddings",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
    "use_sliding_window",
    "vocab_size",
    "num_logits_to_keep",
    "_name_or_path",
    "_attn_implementation_autoset",
    "_commit_hash",
    "neftune_noise_alpha",
];

/// Keys with one value that we compute.
const FIXED: [(&str, Fixed); 11] = [
    ("attention_bias", Fixed::Boolean(false)),
    ("mlp_bias", Fixed::Boolean(false)),
    ("rope_interleaved", Fixed::Boolean(false)),
    ("use_bidirectional_attention", Fixed::Boolean(false)),
    ("use_qk_norm", Fixed::Boolean(false)),
    ("use_mrope", Fixed::Boolean(false)),
    ("is_encoder_decoder", Fixed::Boolean(false)),
    ("partial_rotary_factor", Fixed::One),
    ("quantization_config", Fixed::Absent),
    ("final_logit_softcapping", Fixed::Absent),
    ("attn_logit_softcapping", Fixed::Absent),
];

enum Fixed {
    Boolean(bool),
    One,
    Absent,
}

/// The file says something that we do not run, or is not what it should be.
enum ReadError {
    Checkpoint(CheckpointError),
    Model(ModelError),
}

impl From<CheckpointError> for ReadError {
    fn from(error: CheckpointError) -> Self {
        Self::Checkpoint(error)
    }
}

impl Settings {
    /// Reads `config.json`, and `generation_config.json` for the tokens that end a text.
    ///
    /// # Errors
    /// Names the file, and the key and value that is missing, wrong, or not computed here.
    pub(crate) fn read(checkpoint: &Checkpoint) -> Result<Self, ModelError> {
        let path = checkpoint.path(CONFIG);
        let Some(document) = checkpoint.json(CONFIG)? else {
            return Err(ModelError::Io { path, source: std::io::ErrorKind::NotFound.into() });
        };
        let read = |error| match error {
            ReadError::Checkpoint(source) => refused(&path, source),
            ReadError::Model(error) => error,
        };
        let mut settings =
            Json::new(&document).map_err(Into::into).and_then(|json| Self::parse(&json)).map_err(read)?;
        if let Some(document) = checkpoint.json(GENERATION)? {
            let ids = Json::new(&document).and_then(|json| json.ids("eos_token_id"));
            settings.ends.extend(ids.map_err(|error| refused(&checkpoint.path(GENERATION), error))?);
        }
        Ok(settings)
    }

    fn parse(json: &Json<'_>) -> Result<Self, ReadError> {
        let model_type = json.required("model_type", json.text("model_type")?)?;
        let Some(kind) = KINDS.iter().find(|kind| kind.model_type == model_type) else {
            let known = KINDS.map(|kind| kind.model_type).join(", ");
            return Err(ReadError::Model(ModelError::UnknownArchitecture { name: model_type.to_owned(), known }));
        };
        let family = family(kind.architecture).expect("the kinds name families that there are");
        let reader = Reader { json, kind, family };
        reader.refuse_unknown()?;
        Ok(Self {
            config: reader.config()?,
            tied: json.boolean("tie_word_embeddings")?.unwrap_or(kind.tied),
            vocabulary: reader.required_size("vocab_size", 1 << 24)?,
            bos: json.ids("bos_token_id")?.first().copied(),
            ends: json.ids("eos_token_id")?,
        })
    }
}

struct Reader<'a> {
    json: &'a Json<'a>,
    kind: &'a Kind,
    family: Family,
}

impl Reader<'_> {
    fn refuse_unknown(&self) -> Result<(), ReadError> {
        for key in self.json.keys() {
            let Some((_, fixed)) = FIXED.iter().find(|(name, _)| *name == key) else {
                if KNOWN.contains(&key) || self.json.value(key).is_none() {
                    continue;
                }
                return Err(ReadError::Model(ModelError::UnknownKey { key: key.to_owned() }));
            };
            let Some(value) = self.json.value(key) else { continue };
            let fits = match fixed {
                Fixed::Boolean(wanted) => value.as_bool() == Some(*wanted),
                Fixed::One => value.as_f64() == Some(1.0),
                Fixed::Absent => false,
            };
            if !fits {
                return Err(self.unsupported(key, value, "it is not computed here"));
            }
        }
        let key = if self.family.activation == Activation::GeluTanh { "hidden_activation" } else { "hidden_act" };
        let wanted = if self.family.activation == Activation::GeluTanh { "gelu_pytorch_tanh" } else { "silu" };
        match self.json.text(key)? {
            Some(other) if other != wanted => Err(self.unsupported(key, other, "this type of model has another")),
            _ => Ok(()),
        }
    }

    #[expect(clippy::cast_possible_truncation, reason = "all arithmetic of the model is f32")]
    fn config(&self) -> Result<ModelConfig, ReadError> {
        let count = self.required_size("num_hidden_layers", LAYERS_MAX)?;
        let hidden = self.required_size("hidden_size", 1 << 20)?;
        let heads = self.required_size("num_attention_heads", 1 << 12)?;
        let kv_heads = self.size("num_key_value_heads", 1 << 12)?.unwrap_or(heads);
        if heads % kv_heads != 0 {
            return Err(self.unsupported("num_key_value_heads", kv_heads, "it must divide the number of heads"));
        }
        let head_dim = match self.size("head_dim", HEAD_DIM_MAX)?.or(self.kind.head_dim) {
            Some(value) => value,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => return Err(self.unsupported("num_attention_heads", heads, "it must divide the hidden size")),
        };
        if head_dim % 2 != 0 || head_dim > HEAD_DIM_MAX {
            return Err(self.unsupported("head_dim", head_dim, "it must be even and at most 1024"));
        }
        let epsilon = self.json.number("rms_norm_eps")?.unwrap_or(1e-6);
        if epsilon < 0.0 {
            return Err(self.unsupported("rms_norm_eps", epsilon, "it must not be negative"));
        }
        let width = match self.json.number("query_pre_attn_scalar")? {
            Some(scalar) if self.kind.architecture == "gemma3" && scalar > 0.0 => scalar as f32,
            Some(scalar) => {
                return Err(self.unsupported("query_pre_attn_scalar", scalar, "it is Gemma's, and positive"));
            }
            None => head_dim as f32,
        };
        Ok(ModelConfig {
            family: self.family,
            hidden,
            mlp: self.required_size("intermediate_size", 1 << 22)?,
            heads,
            kv_heads,
            head_dim,
            epsilon: epsilon as f32,
            context_length: self.required_size("max_position_embeddings", 1 << 30)?,
            embedding_scale: if self.family.scaled_embedding { (hidden as f32).sqrt() } else { 1.0 },
            attention_scale: 1.0 / width.sqrt(),
            layers: self.layers(count, head_dim)?,
        })
    }

    fn layers(&self, count: usize, head_dim: usize) -> Result<Vec<LayerConfig>, ReadError> {
        let is_local = self.pattern(count)?;
        let window = match self.json.value("sliding_window") {
            Some(_) => self.size("sliding_window", 1 << 30)?,
            // An explicit null switches the window off; silence means what the type of model has.
            None if self.json.keys().any(|key| key == "sliding_window") => None,
            None => self.kind.window,
        };
        if window.is_none() && is_local.contains(&true) && self.kind.model_type != "mistral" {
            return Err(self.unsupported("layer_types", "sliding_attention", "there is no sliding_window"));
        }
        let global = self.rope("full_attention", head_dim)?;
        let local = self.rope("sliding_attention", head_dim)?;
        let layer = |local_layer: bool| match window.filter(|_| local_layer) {
            Some(window) => LayerConfig { rope: local.clone(), window: Some(window) },
            None => LayerConfig { rope: global.clone(), window: None },
        };
        Ok(is_local.into_iter().map(layer).collect())
    }

    /// Which layers have the window, if there is one.
    fn pattern(&self, count: usize) -> Result<Vec<bool>, ReadError> {
        if let Some(types) = self.json.value("layer_types") {
            let wrong =
                || CheckpointError::KeyType { key: "layer_types".to_owned(), expected: "one name for each layer" };
            let types = types.as_array().filter(|types| types.len() == count).ok_or_else(wrong)?;
            let is_local = |name: &serde_json::Value| match name.as_str() {
                Some("sliding_attention") => Ok(true),
                Some("full_attention") => Ok(false),
                _ => Err(self.unsupported("layer_types", name, "only full and sliding attention are computed here")),
            };
            return types.iter().map(is_local).collect();
        }
        match self.kind.model_type {
            "mistral" => Ok(vec![true; count]),
            "gemma3_text" => {
                let period = match self.size("sliding_window_pattern", LAYERS_MAX)? {
                    Some(period) => period,
                    None => self.size("_sliding_window_pattern", LAYERS_MAX)?.unwrap_or(self.family.window_pattern),
                };
                Ok((0..count).map(|layer| (layer + 1) % period != 0).collect())
            }
            _ if self.json.boolean("use_sliding_window")? == Some(true) => {
                let first = self.json.integer("max_window_layers")?;
                let first = self.json.required("max_window_layers", first)?;
                Ok((0..count).map(|layer| layer >= first).collect())
            }
            _ => Ok(vec![false; count]),
        }
    }

    /// The rotation of layers of one type. Newer files hold it in `rope_parameters`, for each type where they differ.
    fn rope(&self, layer_type: &str, head_dim: usize) -> Result<Rope, ReadError> {
        let gemma_local = layer_type == "sliding_attention" && self.family.local_rope_base.is_some();
        if let Some(parameters) = self.json.object("rope_parameters")? {
            let nested = parameters.keys().any(|key| key.ends_with("_attention"));
            let own = if nested { parameters.object(layer_type)? } else { Some(parameters) };
            let Some(own) = own else { return Ok(Rope::new(self.kind.rope_base, RopeScaling::None, head_dim)) };
            let base = own.number("rope_theta")?.unwrap_or(self.kind.rope_base);
            return Ok(Rope::new(self.base("rope_theta", base)?, self.scaling(&own, base, head_dim)?, head_dim));
        }
        if gemma_local {
            let base = self.json.number("rope_local_base_freq")?.or(self.family.local_rope_base).unwrap_or(1e4);
            return Ok(Rope::new(self.base("rope_local_base_freq", base)?, RopeScaling::None, head_dim));
        }
        let base = self.json.number("rope_theta")?.unwrap_or(self.kind.rope_base);
        let base = self.base("rope_theta", base)?;
        let scaling = match self.json.object("rope_scaling")? {
            None => RopeScaling::None,
            Some(scaling) => self.scaling(&scaling, base, head_dim)?,
        };
        Ok(Rope::new(base, scaling, head_dim))
    }

    fn base(&self, key: &str, base: f64) -> Result<f64, ReadError> {
        if base >= 1.0 { Ok(base) } else { Err(self.unsupported(key, base, "a RoPE base is at least 1")) }
    }

    fn scaling(&self, json: &Json<'_>, base: f64, head_dim: usize) -> Result<RopeScaling, ReadError> {
        let kind = match json.text("rope_type")? {
            Some(kind) => Some(kind),
            None => json.text("type")?,
        };
        let positive = |key: &str| -> Result<f64, ReadError> {
            let value = json.required(key, json.number(key)?)?;
            if value > 0.0 { Ok(value) } else { Err(self.unsupported(&json.name(key), value, "it must be positive")) }
        };
        match kind {
            None | Some("default") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear(positive("factor")?)),
            Some("llama3") => {
                let (low, high) = (positive("low_freq_factor")?, positive("high_freq_factor")?);
                if low >= high {
                    let key = json.name("low_freq_factor");
                    return Err(self.unsupported(&key, low, "it must be below high_freq_factor"));
                }
                let length = positive("original_max_position_embeddings")?;
                Ok(RopeScaling::Divisors(llama3_divisors(base, head_dim, positive("factor")?, [low, high], length)))
            }
            Some(other) => Err(self.unsupported(
                &json.name("rope_type"),
                other,
                "only default, linear and llama3 are computed here",
            )),
        }
    }

    fn required_size(&self, key: &str, max: usize) -> Result<usize, ReadError> {
        Ok(self.json.required(key, self.size(key, max)?)?)
    }

    fn size(&self, key: &str, max: usize) -> Result<Option<usize>, ReadError> {
        match self.json.integer(key)? {
            Some(value) if value == 0 || value > max => Err(self.unsupported(key, value, "no model has such a size")),
            value => Ok(value),
        }
    }

    fn unsupported(&self, key: &str, value: impl Display, why: &'static str) -> ReadError {
        ReadError::Model(ModelError::Unsupported { key: key.to_owned(), value: value.to_string(), why })
    }
}

/// What Llama 3 divides its frequencies by: long wavelengths by `factor`, short ones by 1, and smoothly between. In f32, as
/// `transformers` computes it.
#[expect(clippy::cast_possible_truncation, reason = "the reference computes in f32")]
fn llama3_divisors(base: f64, head_dim: usize, factor: f64, [low, high]: [f64; 2], length: f64) -> Vec<f32> {
    let (factor, low, high, length) = (factor as f32, low as f32, high as f32, length as f32);
    let divisor = |frequency: &f32| {
        let wavelength = std::f32::consts::TAU / frequency;
        if wavelength < length / high {
            1.0
        } else if wavelength > length / low {
            factor
        } else {
            let smooth = (length / wavelength - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    Rope::new(base, RopeScaling::None, head_dim).frequencies.iter().map(divisor).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn config() -> Value {
        json!({
            "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64,
            "num_attention_heads": 4, "max_position_embeddings": 512, "vocab_size": 100, "hidden_act": "silu",
        })
    }

    fn parse(change: impl FnOnce(&mut Value)) -> Result<Settings, String> {
        let mut document = config();
        change(&mut document);
        Json::new(&document).map_err(Into::into).and_then(|json| Settings::parse(&json)).map_err(|error| match error {
            ReadError::Checkpoint(error) => error.to_string(),
            ReadError::Model(error) => error.to_string(),
        })
    }

    #[test]
    fn silence_means_what_transformers_assumes() {
        let llama = parse(|_| ()).unwrap();
        assert_eq!((llama.config.kv_heads, llama.config.head_dim, llama.tied), (4, 8, false));
        assert!(llama.config.layers.iter().all(|layer| layer.window.is_none() && layer.rope.base == 1e4));
        let mistral = parse(|json| json["model_type"] = "mistral".into()).unwrap();
        assert!(mistral.config.layers.iter().all(|layer| layer.window == Some(4096)));
        let without = parse(|json| {
            json["model_type"] = "mistral".into();
            json["sliding_window"] = Value::Null;
        });
        assert!(without.unwrap().config.layers.iter().all(|layer| layer.window.is_none()));
        let gemma = parse(|json| {
            json["model_type"] = "gemma3_text".into();
            json["hidden_act"] = Value::Null;
            json["num_hidden_layers"] = 7.into();
            json["query_pre_attn_scalar"] = 64.into();
        });
        let gemma = gemma.unwrap();
        assert!(gemma.tied && gemma.config.attention_scale == 0.125 && gemma.config.head_dim == 256);
        let global: Vec<usize> = (0..7).filter(|layer| gemma.config.layers[*layer].window.is_none()).collect();
        assert_eq!(global, [5]);
        assert_eq!((gemma.config.layers[5].rope.base, gemma.config.layers[6].rope.base), (1e6, 1e4));
    }

    #[test]
    fn newer_files_say_the_same_elsewhere() {
        let old = parse(|json| {
            json["rope_theta"] = 5e5.into();
            json["rope_scaling"] = json!({ "type": "linear", "factor": 4.0 });
        });
        let new = parse(|json| {
            json["rope_parameters"] = json!({ "rope_type": "linear", "factor": 4.0, "rope_theta": 5e5 });
        });
        assert_eq!(old.unwrap().config, new.unwrap().config);
    }

    #[test]
    fn what_we_do_not_compute_is_refused_by_name() {
        for (key, value, message) in [
            ("model_type", json!("mamba"), "unknown architecture mamba; known are llama, mistral"),
            ("rope_scaling", json!({ "rope_type": "yarn", "factor": 2.0 }), "rope_scaling.rope_type is yarn"),
            ("rope_scaling", json!({ "rope_type": "linear" }), "key rope_scaling.factor is missing"),
            ("attention_bias", json!(true), "attention_bias is true"),
            ("quantization_config", json!({}), "quantization_config is {}"),
            ("hidden_act", json!("gelu"), "hidden_act is gelu"),
            ("num_local_experts", json!(8), "num_local_experts is not known"),
            ("num_key_value_heads", json!(3), "num_key_value_heads is 3"),
            ("hidden_size", json!("wide"), "key hidden_size should be an integer"),
            ("vocab_size", Value::Null, "key vocab_size is missing"),
            ("head_dim", json!(7), "head_dim is 7"),
            ("rope_theta", json!(0.5), "rope_theta is 0.5"),
            ("layer_types", json!(["full_attention", "chunked_attention"]), "layer_types is \"chunked_attention\""),
        ] {
            let error = parse(|json| json[key] = value).err().unwrap_or_default();
            assert!(error.contains(message), "{key}: {error}");
        }
    }

    #[test]
    fn llama3_has_the_frequencies_of_transformers() {
        // `ROPE_INIT_FUNCTIONS["llama3"]` of transformers 4.57.6 for Llama 3.1 8B and 3.2 1B: pairs on the slope, and the last.
        let large = [
            (29, 0.002_166_570_63),
            (30, 0.001_371_893_68),
            (31, 0.000_856_751_46),
            (32, 0.000_524_846_022),
            (33, 0.000_312_693_65),
            (34, 0.000_178_507_791),
            (63, 3.068_925_88e-7),
        ];
        let small = [(15, 0.001_290_548_01), (16, 0.000_429_556_705), (17, 9.708_286_23e-5), (31, 9.418_306_49e-8)];
        for (head_dim, factor, expected) in [(128, 8.0, large.as_slice()), (64, 32.0, &small)] {
            let divisors = llama3_divisors(5e5, head_dim, factor, [1.0, 4.0], 8192.0);
            let rope = Rope::new(5e5, RopeScaling::Divisors(divisors), head_dim);
            assert_eq!(rope.frequencies[0], 1.0);
            for (pair, wanted) in expected {
                let got = f64::from(rope.frequencies[*pair]);
                assert!((got / wanted - 1.0).abs() < 3e-7, "{head_dim}, pair {pair}: {got}, expected {wanted}");
            }
        }
    }

    #[test]
    fn llama3_divides_long_waves_only() {
        let divisors = llama3_divisors(5e5, 128, 8.0, [1.0, 4.0], 8192.0);
        assert_eq!((divisors[0], divisors[63]), (1.0, 8.0));
        assert!(divisors.is_sorted() && divisors.iter().any(|divisor| *divisor > 1.0 && *divisor < 8.0));
    }
}
