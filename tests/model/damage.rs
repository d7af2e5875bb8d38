//! Model files that are cut, damaged, or ask for something that we do not compute: errors with names, never panics.

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;
use proptest::prelude::*;
use worker::model::gguf::GgufError;
use worker::model::{LoadOptions, Model, ModelError};

use crate::tiny::{FAMILIES, Tiny};

fn refused(change: impl FnOnce(&mut Tiny)) -> ModelError {
    let mut tiny = Tiny::new("llama");
    change(&mut tiny);
    tiny.load().expect_err("the model must be refused")
}

fn bytes_of(tiny: &Tiny) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tiny.gguf");
    tiny.write(&path);
    std::fs::read(path).unwrap()
}

fn load(bytes: &[u8]) -> Result<Model, ModelError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tiny.gguf");
    std::fs::write(&path, bytes).unwrap();
    Model::load(&path, &LoadOptions::default())
}

#[test]
fn what_we_do_not_compute_is_refused_by_name() {
    let text = |value: &str| Value::String(value.to_owned());
    let error = refused(|tiny| tiny.set("general.architecture", text("mamba")));
    assert!(
        matches!(&error, ModelError::UnknownArchitecture { name, known } if name == "mamba" && known.contains("gemma3"))
    );
    let error = refused(|tiny| tiny.set("llama.rope.scaling.type", text("yarn")));
    assert!(
        matches!(&error, ModelError::Unsupported { key, value, .. } if key == "llama.rope.scaling.type" && value == "yarn")
    );
    let error = refused(|tiny| tiny.set("llama.final_logit_softcapping", Value::F32(30.0)));
    assert!(matches!(&error, ModelError::Unsupported { key, .. } if key == "llama.final_logit_softcapping"));
    let error = refused(|tiny| tiny.set("llama.expert_count", Value::U32(8)));
    assert!(matches!(&error, ModelError::Unsupported { key, .. } if key == "llama.expert_count"));
    let error = refused(|tiny| tiny.set("llama.attention.something_new", Value::U32(1)));
    assert!(matches!(&error, ModelError::UnknownKey { key } if key == "llama.attention.something_new"));
    let error = refused(|tiny| tiny.set("llama.rope.dimension_count", Value::U32(4)));
    assert!(matches!(&error, ModelError::Unsupported { key, .. } if key == "llama.rope.dimension_count"));
    let error = refused(|tiny| tiny.set("tokenizer.ggml.pre", text("mystery")));
    assert!(
        matches!(&error, ModelError::UnknownTokenizer { value, known, .. } if value == "mystery" && known.contains("smollm"))
    );
    let error = refused(|tiny| tiny.set("tokenizer.ggml.pre", text("default")));
    assert!(matches!(&error, ModelError::UnknownTokenizer { value, .. } if value == "default"));
    let error = refused(|tiny| tiny.set("tokenizer.ggml.model", text("bert")));
    assert!(matches!(&error, ModelError::UnknownTokenizer { value, .. } if value == "bert"));
}

#[test]
fn tensors_must_be_the_familys() {
    let error = refused(|tiny| tiny.tensors.retain(|(name, _)| name != "blk.1.ffn_up.weight"));
    assert!(matches!(&error, ModelError::MissingTensor { name } if name == "blk.1.ffn_up.weight"));
    let error = refused(|tiny| tiny.tensor("blk.1.attn_q.bias", vec![0.0; 32], &[32], GgmlDType::F32));
    assert!(matches!(&error, ModelError::UnusedTensors { count: 1, first } if first == "blk.1.attn_q.bias"));
    let error = refused(|tiny| tiny.tensor("blk.0.attn_k.weight", vec![0.0; 256], &[8, 32], GgmlDType::F32));
    assert!(
        matches!(&error, ModelError::TensorShape { expected, got, .. } if *expected == [16, 32] && *got == [8, 32])
    );
    let error = refused(|tiny| tiny.tensor("output_norm.weight", vec![f32::NAN; 32], &[32], GgmlDType::F32));
    assert!(matches!(&error, ModelError::NotFinite { name } if name == "output_norm.weight"));
    let error = refused(|tiny| tiny.tensor("token_embd.weight", vec![0.0; 64], &[2, 32], GgmlDType::F32));
    assert!(matches!(&error, ModelError::TensorShape { name, .. } if name == "token_embd.weight"));
}

#[test]
fn missing_keys_are_named() {
    for key in
        ["llama.block_count", "llama.attention.layer_norm_rms_epsilon", "tokenizer.ggml.tokens", "general.architecture"]
    {
        let error = refused(|tiny| tiny.remove(key));
        assert!(
            matches!(&error, ModelError::Gguf { source: GgufError::MissingKey { key: named }, .. } if named == key),
            "{error:?}"
        );
    }
    let error = refused(|tiny| tiny.set("llama.block_count", Value::String("two".to_owned())));
    assert!(
        matches!(&error, ModelError::Gguf { source: GgufError::KeyType { key, .. }, .. } if key == "llama.block_count")
    );
}

#[test]
fn another_tensor_type_is_named() {
    let mut bytes = bytes_of(&Tiny::new("llama"));
    // In the directory a name is followed by the number of axes (4 bytes), the axes (8 each) and the type (4).
    let name = b"output_norm.weight";
    let at = bytes.windows(name.len()).position(|window| window == name).unwrap() + name.len() + 4 + 8;
    bytes[at..at + 4].copy_from_slice(&99_u32.to_le_bytes());
    let error = load(&bytes).unwrap_err();
    let ModelError::Gguf { source: GgufError::TensorType { tensor, code: 99 }, .. } = &error else {
        panic!("{error:?}")
    };
    assert_eq!(tensor, "output_norm.weight");
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let bytes = bytes_of(&Tiny::new("gemma3"));
    let steps = (0..bytes.len()).step_by(1 + bytes.len() / 400);
    for length in steps.chain(0..64) {
        let error = load(&bytes[..length]).expect_err("a cut file must be refused");
        assert!(matches!(error, ModelError::Gguf { .. }), "{length}: {error:?}");
    }
    assert!(matches!(load(b"PK\x03\x04 not a model"), Err(ModelError::Gguf { source: GgufError::NotGguf { .. }, .. })));
    let missing = Model::load(std::path::Path::new("no/such/file.gguf"), &LoadOptions::default());
    assert!(matches!(missing, Err(ModelError::Io { .. })));
}

#[test]
fn claims_of_size_cost_no_memory() {
    // A header that announces 2^60 keys, then one that announces a string of 2^60 bytes.
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend_from_slice(&0_u64.to_le_bytes());
    bytes.extend_from_slice(&(1_u64 << 60).to_le_bytes());
    assert!(matches!(load(&bytes), Err(ModelError::Gguf { source: GgufError::Truncated { .. }, .. })));
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend_from_slice(&0_u64.to_le_bytes());
    bytes.extend_from_slice(&1_u64.to_le_bytes());
    bytes.extend_from_slice(&(1_u64 << 60).to_le_bytes());
    bytes.extend_from_slice(&[0; 16]);
    assert!(matches!(load(&bytes), Err(ModelError::Gguf { source: GgufError::Truncated { .. }, .. })));
}

/// Length of header and directory: where the name of the last tensor ends, and its entry with it.
fn header_length(tiny: &Tiny, bytes: &[u8]) -> usize {
    let last = tiny.tensors.last().unwrap().0.as_bytes();
    bytes.windows(last.len()).position(|window| window == last).unwrap() + last.len() + 40
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Loading either works, and then a pass works too or is refused, or it is an error.
    #[test]
    fn garbage_never_panics(
        family in prop::sample::select(FAMILIES.to_vec()),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        word in prop::option::of((any::<prop::sample::Index>(), any::<u64>())),
    ) {
        let tiny = Tiny::new(family);
        let mut bytes = bytes_of(&tiny);
        let header = header_length(&tiny, &bytes);
        for (at, value) in edits {
            bytes[at.index(header)] = value;
        }
        if let Some((at, value)) = word {
            let at = at.index(header - 8);
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        if let Ok(model) = load(&bytes) {
            let _ = model.prefill(&mut model.start().unwrap(), &[1, 2, 3]);
        }
    }
}
