//! `tokenizer.json` and the small files around it.
//!
//! The file is the tokenizer as its authors run it; only padding and truncation are switched off. Whether a sequence begins
//! with BOS is what the file itself does to an empty text, unless `tokenizer_config.json` says otherwise.

use serde_json::Value;

use super::super::error::ModelError;
use super::super::tokenizer::{Tokenizer, failed, pair};
use super::checkpoint::{Checkpoint, CheckpointError, SPECIAL_TOKENS, TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, refused};
use super::config::Settings;

impl Tokenizer {
    /// The tokenizer of a directory.
    pub(crate) fn from_checkpoint(checkpoint: &Checkpoint, settings: &Settings) -> Result<Self, ModelError> {
        let Some(text) = checkpoint.text(TOKENIZER)? else {
            let path = checkpoint.path(TOKENIZER);
            return Err(ModelError::Io { path, source: std::io::ErrorKind::NotFound.into() });
        };
        check_parts(&text).map_err(|error| refused(&checkpoint.path(TOKENIZER), error))?;
        let mut with_specials = tokenizers::Tokenizer::from_bytes(text).map_err(failed)?;
        with_specials.with_truncation(None).map_err(failed)?.with_padding(None);
        let config = checkpoint.json(TOKENIZER_CONFIG)?.unwrap_or_default();
        let roles = checkpoint.json(SPECIAL_TOKENS)?.unwrap_or_default();

        let added = with_specials.get_added_tokens_decoder();
        let role = |key: &str| spelling(&config[key]).or_else(|| spelling(&roles[key]));
        let id = |key| role(key).and_then(|text| with_specials.token_to_id(text));
        let (bos, eos) = (id("bos_token").or(settings.bos), id("eos_token").or(settings.ends.first().copied()));
        // What a vocabulary lacks is no harm: a user's text may become it, though not by spelling it.
        let unknown = id("unk_token");
        let special = || added.iter().filter(|(_, token)| token.special);
        let adds = with_specials.encode("", true).map_err(failed)?.get_ids().to_vec();
        let add_bos = match (config["add_bos_token"].as_bool(), adds.as_slice()) {
            (Some(add_bos), _) => add_bos && bos.is_some(),
            (None, []) => false,
            (None, [first]) if Some(*first) == bos => true,
            (None, _) => {
                let what = format!("an empty text becomes {adds:?}, which is not the token that begins a sequence");
                return Err(ModelError::Tokenizer { what });
            }
        };
        let specials = special().map(|(id, _)| *id).filter(|id| Some(*id) != unknown).collect();
        let special_texts = special().map(|(_, token)| token.content.clone()).collect();
        let tokens = with_specials.get_vocab_size(true);
        let (with_specials, plain) = pair(with_specials)?;
        Ok(Self {
            specials,
            special_texts,
            tokens,
            bos,
            eos,
            ends: eos.into_iter().chain(settings.ends.iter().copied()).collect(),
            add_bos,
            template: match checkpoint.text(TEMPLATE)? {
                Some(template) => Some(template),
                None => {
                    template(&config["chat_template"]).map_err(|e| refused(&checkpoint.path(TOKENIZER_CONFIG), e))?
                }
            },
            with_specials,
            plain,
        })
    }
}

/// The parts of the file that the library panics on where they are not what it expects.
#[derive(serde::Deserialize)]
struct Parts {
    #[serde(default)]
    normalizer: Value,
    /// Need only be JSON.
    #[serde(default, rename = "decoder")]
    _decoder: Value,
}

fn check_parts(text: &str) -> Result<(), CheckpointError> {
    let parts: Parts = serde_json::from_str(text)?;
    let mut steps = vec![&parts.normalizer];
    while let Some(step) = steps.pop() {
        if step["type"] == "Precompiled" {
            let expected = "one of steps that our families have: Precompiled is not";
            return Err(CheckpointError::KeyType { key: "normalizer".to_owned(), expected });
        }
        steps.extend(step["normalizers"].as_array().into_iter().flatten());
    }
    Ok(())
}

/// A special token is written as text, or as an object with its settings.
fn spelling(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token["content"].as_str())
}

/// A chat template is one text, or a list of named ones of which `default` is meant.
fn template(value: &Value) -> Result<Option<String>, CheckpointError> {
    match value {
        Value::Null => Ok(None),
        Value::String(template) => Ok(Some(template.clone())),
        Value::Array(named) => {
            let default = named.iter().find(|entry| entry["name"] == "default");
            Ok(default.and_then(|entry| entry["template"].as_str()).map(str::to_owned))
        }
        _ => Err(CheckpointError::KeyType { key: "chat_template".to_owned(), expected: "a string, or named strings" }),
    }
}
