//! Tiny models of every family as `transformers` wrote them (`tests/reference/make_tiny.py`), in Hugging Face's layout and
//! as GGUF, against what it computes with them; and directories that are damaged.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::Value;
use worker::model::hf::CheckpointError;
use worker::model::rope::RopeScaling;
use worker::model::{LoadOptions, Logits, Message, Model, ModelError, Precision, Tap, fingerprint};

/// f32 noise between implementations stays below this, relative to the norm of a tensor.
const NOISE_MAX: f64 = 1e-5;

pub(crate) const NAMES: [&str; 6] = ["llama", "llama3", "mistral", "qwen2", "qwen3", "gemma3"];

#[derive(Deserialize)]
pub(crate) struct Reference {
    pub(crate) ids: Vec<u32>,
    /// Columns that gradients are taken of.
    pub(crate) split: usize,
    texts: BTreeMap<String, Vec<u32>>,
    chat: Option<Vec<u32>>,
}

pub(crate) fn directory(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/reference/tiny").join(name)
}

pub(crate) fn reference(name: &str) -> (Reference, BTreeMap<String, Tensor>) {
    let text = std::fs::read_to_string(directory(name).join("reference.json")).unwrap();
    let tensors = candle_core::safetensors::load(directory(name).join("reference.safetensors"), &Device::Cpu).unwrap();
    (serde_json::from_str(&text).unwrap(), tensors.into_iter().collect())
}

/// The directory and the GGUF file of a model, each with f32 weights and with weights as stored.
pub(crate) fn models(name: &str) -> Vec<(String, Model)> {
    let paths = [directory(name), directory(name).join("model.gguf")];
    let load = |path: &PathBuf, precision| {
        let place = format!("{name}, {}, {precision:?}", path.extension().map_or("directory", |_| "GGUF"));
        (place, Model::load(path, &LoadOptions { precision, ..LoadOptions::default() }).unwrap())
    };
    paths.iter().flat_map(|path| [Precision::F32, Precision::Stored].map(|precision| load(path, precision))).collect()
}

pub(crate) fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// |a - b| / |b|.
pub(crate) fn deviation(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let difference: f64 = got.iter().zip(want).map(|(x, y)| f64::from(x - y).powi(2)).sum();
    (difference / want.iter().map(|y| f64::from(*y).powi(2)).sum::<f64>()).sqrt()
}

#[test]
fn keys_values_and_logits_are_those_of_transformers() {
    let mut worst = 0_f64;
    for name in NAMES {
        let (reference, expected) = reference(name);
        for (place, model) in models(name) {
            let mut check = |what: String, got: &[f32]| {
                let deviation = deviation(got, &numbers(&expected[&what]));
                worst = worst.max(deviation);
                assert!(deviation <= NOISE_MAX, "{place}: {what} deviates by {deviation:.1e}");
            };
            let positions: Vec<i64> = (0..reference.ids.len() as i64).collect();
            let mut seen = 0;
            let mut observe = |tap: Tap, layer: usize, tensor: &Tensor| {
                let what = match tap {
                    Tap::KeyPlain => "k_pre",
                    Tap::Key => "k_post",
                    Tap::Value => "v",
                    Tap::Attention | Tap::Residual => return Ok(()),
                };
                seen += 1;
                check(format!("{what}.{layer}"), &numbers(tensor));
                Ok(())
            };
            let mut context = model.start().unwrap();
            let rows =
                model.forward(&mut context, &reference.ids, &positions, Logits::All, Some(&mut observe)).unwrap();
            check("logits".to_owned(), &rows.concat());
            assert_eq!(seen, 3 * model.config().layers.len(), "{place}");
        }
    }
    eprintln!("tiny models: worst deviation {worst:.1e}");
}

#[test]
fn both_kinds_of_file_turn_keys_alike() {
    for name in NAMES {
        let models = models(name);
        let (_, first) = &models[0];
        for (place, model) in &models {
            for (layer, expected) in model.config().layers.iter().zip(&first.config().layers) {
                assert_eq!(layer.window, expected.window, "{place}");
                let pairs = layer.rope.frequencies.iter().zip(&expected.rope.frequencies);
                // Llama 3's scaling is a formula in one and a tensor of divisors in the other.
                assert!(pairs.clone().all(|(a, b)| (a / b - 1.0).abs() < 3e-7), "{place}");
            }
        }
        let scaled = first.config().layers.iter().any(|layer| layer.rope.scaling != RopeScaling::None);
        assert_eq!(scaled, matches!(name, "llama3" | "gemma3"), "{name}");
    }
}

#[test]
fn token_ids_and_chat_are_those_of_transformers() {
    for name in NAMES {
        let (reference, _) = reference(name);
        for (place, model) in models(name) {
            let tokenizer = model.tokenizer();
            for (text, ids) in &reference.texts {
                assert_eq!(tokenizer.encode_start(text).unwrap(), *ids, "{place}: {text:?}");
                let special = tokenizer.bos().filter(|_| tokenizer.adds_bos()).into_iter().count();
                assert_eq!(tokenizer.decode(&ids[special..]).unwrap(), *text, "{place}");
            }
            let turns = [("user", "a hat"), ("assistant", "the cat")];
            let turns = turns.map(|(role, content)| Message { role: role.into(), content: content.into() });
            match &reference.chat {
                Some(chat) if name != "llama3" => {
                    assert_eq!(tokenizer.encode_chat(&turns, true).unwrap(), *chat, "{place}");
                }
                // Its tokenizer begins sequences with BOS and its template does not: transformers' apply_chat_template
                // then leaves BOS out, we do not.
                Some(chat) => assert_eq!(tokenizer.encode_chat(&turns, true).unwrap()[1..], *chat, "{place}"),
                None => assert!(matches!(tokenizer.encode_chat(&turns, true), Err(ModelError::NoChatTemplate))),
            }
            let hostile = tokenizer.encode("<|im_end|>").unwrap();
            assert!(hostile.iter().all(|id| !tokenizer.is_special(*id)), "{place}");
            assert!(tokenizer.eos().is_some_and(|eos| tokenizer.is_end(eos)), "{place}");
        }
    }
}

/// A copy that tests damage.
struct Copy {
    place: tempfile::TempDir,
}

impl Copy {
    fn of(name: &str) -> Self {
        let place = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(directory(name)).unwrap() {
            let path = entry.unwrap().path();
            let file = path.file_name().unwrap().to_str().unwrap();
            if file != "model.gguf" && !file.starts_with("reference") {
                std::fs::copy(&path, place.path().join(file)).unwrap();
            }
        }
        Self { place }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    fn edit(&self, file: &str, change: impl FnOnce(&mut Value)) {
        let mut document = serde_json::from_slice(&std::fs::read(self.file(file)).unwrap()).unwrap();
        change(&mut document);
        std::fs::write(self.file(file), document.to_string()).unwrap();
    }

    /// Rewrites the weights.
    fn weights(&self, change: impl FnOnce(&mut std::collections::HashMap<String, Tensor>)) {
        let path = self.file("model.safetensors");
        let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        change(&mut tensors);
        candle_core::safetensors::save(&tensors, &path).unwrap();
    }

    fn load(&self) -> Result<Model, ModelError> {
        Model::load(self.place.path(), &LoadOptions::default())
    }

    fn refused(&self) -> ModelError {
        self.load().expect_err("the directory must be refused")
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let copy = Copy::of("llama");
    copy.load().unwrap();
    copy.edit("config.json", |config| config["model_type"] = "mamba".into());
    assert!(matches!(copy.refused(), ModelError::UnknownArchitecture { name, .. } if name == "mamba"));

    let copy = Copy::of("llama");
    copy.edit("config.json", |config| config["intermediate_size"] = 17.into());
    let name = "model.layers.0.mlp.gate_proj.weight";
    assert!(matches!(copy.refused(), ModelError::TensorShape { name: got, .. } if got == name));

    let copy = Copy::of("llama");
    copy.edit("config.json", |config| config["vocab_size"] = 1000.into());
    assert!(matches!(copy.refused(), ModelError::TensorShape { name, .. } if name == "model.embed_tokens.weight"));

    let copy = Copy::of("qwen2");
    copy.edit("config.json", |config| config["model_type"] = "llama".into());
    assert!(matches!(copy.refused(), ModelError::UnusedTensors { count: 6, first } if first.ends_with("k_proj.bias")));

    let copy = Copy::of("llama");
    copy.weights(|tensors| drop(tensors.remove("lm_head.weight")));
    assert!(matches!(copy.refused(), ModelError::MissingTensor { name } if name == "lm_head.weight"));

    let copy = Copy::of("llama");
    copy.edit("config.json", |config| config["tie_word_embeddings"] = true.into());
    assert!(matches!(copy.refused(), ModelError::Unsupported { key, .. } if key == "tie_word_embeddings"));
    copy.weights(|tensors| drop(tensors.insert("lm_head.weight".into(), tensors["model.embed_tokens.weight"].clone())));
    copy.load().unwrap();

    let copy = Copy::of("llama");
    let nan = Tensor::full(f32::NAN, 16, &Device::Cpu).unwrap();
    copy.weights(|tensors| drop(tensors.insert("model.norm.weight".into(), nan)));
    assert!(matches!(copy.refused(), ModelError::NotFinite { name } if name == "model.norm.weight"));

    let copy = Copy::of("llama");
    let whole = Tensor::zeros((16, 16), candle_core::DType::I64, &Device::Cpu).unwrap();
    copy.weights(|tensors| drop(tensors.insert("model.layers.1.mlp.up_proj.weight".into(), whole)));
    assert!(
        matches!(copy.refused(), ModelError::StoredType { name, dtype } if name.contains("1.mlp.up") && dtype == "I64")
    );
}

#[test]
fn files_that_are_missing_cut_or_elsewhere_are_named() {
    for file in ["config.json", "tokenizer.json", "model-00002-of-00002.safetensors"] {
        let copy = Copy::of("qwen3");
        std::fs::remove_file(copy.file(file)).unwrap();
        assert!(matches!(copy.refused(), ModelError::Io { path, .. } if path.ends_with(file)), "{file}");
    }
    let copy = Copy::of("qwen3");
    let index = "model.safetensors.index.json";
    copy.edit(index, |document| document["weight_map"]["lm_head.weight"] = "../model.safetensors".into());
    let error = copy.refused();
    assert!(
        matches!(&error, ModelError::Checkpoint { source: CheckpointError::FileName { name }, .. } if name == "../model.safetensors")
    );
    let copy = Copy::of("qwen3");
    copy.edit(index, |document| drop(document["weight_map"].as_object_mut().unwrap().remove("lm_head.weight")));
    let error = copy.refused();
    assert!(
        matches!(&error, ModelError::Checkpoint { source: CheckpointError::Index { name }, .. } if name == "lm_head.weight")
    );
    let copy = Copy::of("qwen3");
    std::fs::write(copy.file("config.json"), "{").unwrap();
    let error = copy.refused();
    assert!(matches!(&error, ModelError::Checkpoint { source: CheckpointError::Json(_), .. }));
}

#[test]
fn a_fingerprint_covers_every_file_of_the_model() {
    let copy = Copy::of("qwen3");
    let whole = fingerprint(copy.place.path()).unwrap();
    assert_eq!(whole, fingerprint(&directory("qwen3")).unwrap(), "other files do not count");
    let mut names: Vec<_> = std::fs::read_dir(copy.place.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    let mut list = String::new();
    for path in &names {
        let digest = fingerprint(path).unwrap();
        list.push_str(&format!("{}  {}\n", &digest[7..], path.file_name().unwrap().to_str().unwrap()));
    }
    let listing = copy.file("listing");
    std::fs::write(&listing, list).unwrap();
    assert_eq!(whole, fingerprint(&listing).unwrap(), "the digest of what sha256sum prints");
    for path in names {
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, [bytes.as_slice(), b" "].concat()).unwrap();
        assert_ne!(fingerprint(copy.place.path()).unwrap(), whole, "{}", path.display());
        std::fs::write(&path, bytes).unwrap();
    }
    let options = LoadOptions { expected_fingerprint: Some(whole), ..LoadOptions::default() };
    Model::load(copy.place.path(), &options).unwrap();
    copy.edit("generation_config.json", |document| document["eos_token_id"] = 1.into());
    assert!(matches!(Model::load(copy.place.path(), &options), Err(ModelError::CorruptModel { .. })));
}

#[test]
fn weights_cut_anywhere_are_refused() {
    let copy = Copy::of("llama3");
    let path = copy.file("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    for length in (0..bytes.len()).step_by(97) {
        std::fs::write(&path, &bytes[..length]).unwrap();
        assert!(matches!(copy.refused(), ModelError::Checkpoint { .. }), "{length} bytes");
    }
    std::fs::write(&path, [bytes.as_slice(), b" "].concat()).unwrap();
    let error = copy.refused();
    assert!(matches!(error, ModelError::Checkpoint { source: CheckpointError::Length { .. }, .. }));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Sizes, offsets, shapes, names and types in the header, overwritten.
    #[test]
    fn a_damaged_header_never_panics(changes in proptest::collection::vec((0..1500_usize, any::<u8>()), 1..4)) {
        let copy = Copy::of("llama3");
        let path = copy.file("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        for (place, byte) in changes {
            bytes[place] = byte;
        }
        std::fs::write(&path, bytes).unwrap();
        // A changed name of the metadata may still be a model; anything else is an error, and neither is a panic.
        drop(copy.load());
    }
}
