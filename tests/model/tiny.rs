//! Tiny random models as GGUF files: two layers, hidden width 32, a real tokenizer of some 400 tokens.
//!
//! Written with candle's writer, so that our reader is tested against another's work. The weights mean nothing; they
//! are fixed by the family's name.

use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use worker::experiment::facts::CITIES;
use worker::model::{LoadOptions, Model, ModelError};
use worker::random::Random;

pub(crate) const FAMILIES: [&str; 4] = ["llama", "qwen2", "qwen3", "gemma3"];

/// Window of the first layer of the tiny gemma3; its second layer sees everything.
pub(crate) const WINDOW: usize = 8;

const HIDDEN: usize = 32;
const MLP: usize = 64;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;

/// A model about to be written; tests damage it first.
pub(crate) struct Tiny {
    pub(crate) metadata: Vec<(String, Value)>,
    pub(crate) tensors: Vec<(String, QTensor)>,
}

impl Tiny {
    pub(crate) fn new(family: &str) -> Self {
        let mut tiny = Self { metadata: Vec::new(), tensors: Vec::new() };
        tiny.settings(family);
        let vocabulary = if family == "gemma3" { tiny.sentence_piece() } else { tiny.byte_level(family) };
        tiny.weights(family, vocabulary);
        tiny
    }

    pub(crate) fn set(&mut self, key: &str, value: Value) {
        self.remove(key);
        self.metadata.push((key.to_owned(), value));
    }

    pub(crate) fn remove(&mut self, key: &str) {
        self.metadata.retain(|(known, _)| known != key);
    }

    pub(crate) fn tensor(&mut self, name: &str, values: Vec<f32>, shape: &[usize], dtype: GgmlDType) {
        self.tensors.retain(|(known, _)| known != name);
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
        self.tensors.push((name.to_owned(), QTensor::quantize(&tensor, dtype).unwrap()));
    }

    pub(crate) fn write(&self, path: &Path) {
        let metadata: Vec<(&str, &Value)> = self.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        let tensors: Vec<(&str, &QTensor)> =
            self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        gguf_file::write(&mut std::fs::File::create(path).unwrap(), &metadata, &tensors).unwrap();
    }

    pub(crate) fn load(&self) -> Result<Model, ModelError> {
        self.load_with(&LoadOptions::default())
    }

    pub(crate) fn load_with(&self, options: &LoadOptions) -> Result<Model, ModelError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tiny.gguf");
        self.write(&path);
        Model::load(&path, options)
    }

    fn settings(&mut self, family: &str) {
        let number = |value: usize| Value::U32(u32::try_from(value).unwrap());
        self.set("general.architecture", Value::String(family.to_owned()));
        let mut set = |key: &str, value| self.set(&format!("{family}.{key}"), value);
        set("block_count", number(2));
        set("embedding_length", number(HIDDEN));
        set("feed_forward_length", number(MLP));
        set("context_length", number(4096));
        set("attention.head_count", number(HEADS));
        set("attention.head_count_kv", number(KV_HEADS));
        set("attention.layer_norm_rms_epsilon", Value::F32(1e-5));
        set("rope.freq_base", Value::F32(if family == "gemma3" { 1e6 } else { 1e4 }));
        if head_dim(family) != HIDDEN / HEADS {
            set("attention.key_length", number(head_dim(family)));
            set("attention.value_length", number(head_dim(family)));
        }
        if family == "gemma3" {
            set("attention.sliding_window", number(WINDOW));
            set("attention.sliding_window_pattern", number(2));
        }
    }

    /// The `gpt2` kind: bytes, then each city with its leading space, built up by merges. Returns the vocabulary's size.
    fn byte_level(&mut self, family: &str) -> usize {
        let mut tokens: Vec<String> = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(str::to_owned).to_vec();
        let mut types = vec![3; 3];
        tokens.extend((0..=255).map(|byte| byte_char(byte).to_string()));
        let mut merges = Vec::new();
        for city in CITIES {
            let mut left = byte_char(b' ').to_string();
            for letter in city.chars() {
                merges.push(format!("{left} {letter}"));
                left.push(letter);
                tokens.push(left.clone());
            }
        }
        let mut seen = std::collections::BTreeSet::new();
        tokens.retain(|token| seen.insert(token.clone()));
        let mut seen = std::collections::BTreeSet::new();
        merges.retain(|merge| seen.insert(merge.clone()));
        types.resize(tokens.len(), 1);
        let pre = if family == "llama" { "smollm" } else { "qwen2" };
        let count = tokens.len();
        self.set("tokenizer.ggml.model", Value::String("gpt2".to_owned()));
        self.set("tokenizer.ggml.pre", Value::String(pre.to_owned()));
        self.set("tokenizer.ggml.merges", strings(merges));
        self.vocabulary(tokens, types);
        self.set("tokenizer.ggml.bos_token_id", Value::U32(1));
        self.set("tokenizer.ggml.eos_token_id", Value::U32(2));
        self.set("tokenizer.ggml.add_bos_token", Value::Bool(false));
        let template = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + \
                        '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        self.set("tokenizer.chat_template", Value::String(template.to_owned()));
        count
    }

    /// The `llama` kind: bytes, characters and cities with scores. Returns the vocabulary's size.
    fn sentence_piece(&mut self) -> usize {
        let mut tokens: Vec<String> = ["<pad>", "<eos>", "<bos>", "<unk>"].map(str::to_owned).to_vec();
        let mut types = vec![3, 3, 3, 2];
        tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
        types.resize(tokens.len(), 6);
        tokens.push("\u{2581}".to_owned());
        tokens.extend((b'!'..=b'~').map(|byte| char::from(byte).to_string()));
        for city in CITIES {
            for end in 1..=city.len() {
                tokens.push(format!("\u{2581}{}", &city[..end]));
            }
        }
        let mut seen = std::collections::BTreeSet::new();
        tokens.retain(|token| seen.insert(token.clone()));
        types.resize(tokens.len(), 1);
        let count = tokens.len();
        let scores = (0..count).map(|id| Value::F32(-(id as f32))).collect();
        self.set("tokenizer.ggml.model", Value::String("llama".to_owned()));
        self.set("tokenizer.ggml.pre", Value::String("default".to_owned()));
        self.set("tokenizer.ggml.scores", Value::Array(scores));
        self.vocabulary(tokens, types);
        for (key, id) in [("bos", 2), ("eos", 1), ("unknown", 3)] {
            self.set(&format!("tokenizer.ggml.{key}_token_id"), Value::U32(id));
        }
        self.set("tokenizer.ggml.add_space_prefix", Value::Bool(false));
        count
    }

    fn vocabulary(&mut self, tokens: Vec<String>, types: Vec<i32>) {
        self.set("tokenizer.ggml.tokens", strings(tokens));
        self.set("tokenizer.ggml.token_type", Value::Array(types.into_iter().map(Value::I32).collect()));
    }

    fn weights(&mut self, family: &str, vocabulary: usize) {
        let mut random = Random::new(1, family);
        let mut normal = |count: usize, scale: f64, mean: f64| -> Vec<f32> {
            (0..count).map(|_| (mean + scale * random.normal()) as f32).collect()
        };
        let (q, kv, dim) = (HEADS * head_dim(family), KV_HEADS * head_dim(family), head_dim(family));
        self.tensor("token_embd.weight", normal(vocabulary * HIDDEN, 1.0, 0.0), &[vocabulary, HIDDEN], GgmlDType::Q8_0);
        self.tensor("output_norm.weight", normal(HIDDEN, 0.1, 1.0), &[HIDDEN], GgmlDType::F32);
        if family == "qwen3" {
            self.tensor("output.weight", normal(vocabulary * HIDDEN, 0.3, 0.0), &[vocabulary, HIDDEN], GgmlDType::F16);
        }
        for layer in 0..2 {
            let mut add = |name: &str, shape: &[usize], dtype| {
                let (count, width) = (shape.iter().product(), *shape.last().unwrap());
                let (scale, mean) = match (shape.len(), name.ends_with("bias")) {
                    (1, false) => (0.1, 1.0),
                    (1, true) => (0.3, 0.0),
                    _ => (2.0 / (width as f64).sqrt(), 0.0),
                };
                self.tensor(&format!("blk.{layer}.{name}"), normal(count, scale, mean), shape, dtype);
            };
            add("attn_norm.weight", &[HIDDEN], GgmlDType::F32);
            add("ffn_norm.weight", &[HIDDEN], GgmlDType::F32);
            add("attn_q.weight", &[q, HIDDEN], GgmlDType::Q8_0);
            add("attn_k.weight", &[kv, HIDDEN], GgmlDType::Q4_1);
            add("attn_v.weight", &[kv, HIDDEN], GgmlDType::Q5_0);
            add("attn_output.weight", &[HIDDEN, q], GgmlDType::F32);
            add("ffn_gate.weight", &[MLP, HIDDEN], GgmlDType::Q4_0);
            add("ffn_up.weight", &[MLP, HIDDEN], GgmlDType::Q5_1);
            add("ffn_down.weight", &[HIDDEN, MLP], GgmlDType::BF16);
            if family == "qwen2" {
                for (name, size) in [("q", q), ("k", kv), ("v", kv)] {
                    add(&format!("attn_{name}.bias"), &[size], GgmlDType::F32);
                }
            }
            if family == "qwen3" || family == "gemma3" {
                add("attn_q_norm.weight", &[dim], GgmlDType::F32);
                add("attn_k_norm.weight", &[dim], GgmlDType::F32);
            }
            if family == "gemma3" {
                add("post_attention_norm.weight", &[HIDDEN], GgmlDType::F32);
                add("post_ffw_norm.weight", &[HIDDEN], GgmlDType::F32);
            }
        }
    }
}

/// Head dimensions that are not always hidden / heads.
fn head_dim(family: &str) -> usize {
    if matches!(family, "qwen3" | "gemma3") { 16 } else { HIDDEN / HEADS }
}

fn strings(values: Vec<String>) -> Value {
    Value::Array(values.into_iter().map(Value::String).collect())
}

/// How GPT-2 writes a byte: printable ones as themselves, the others from U+0100 on.
fn byte_char(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let place = (0..byte).filter(|other| !printable(*other)).count();
    char::from_u32(256 + u32::try_from(place).unwrap()).unwrap()
}
