//! Token ids of 200 strings against llama.cpp's (`tests/reference/make_tokens.py`), for both real models and for tiny
//! vocabularies of the kinds that those do not have.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use tokenizers::normalizers::NFC;
use tokenizers::{NormalizedString, Normalizer};
use worker::model::{Message, Tokenizer};

use crate::reference::{GEMMA3, SMOLLM2, model_file};

#[derive(Deserialize)]
struct Tokens {
    texts: Vec<String>,
    chats: Vec<Chat>,
    ids: BTreeMap<String, Vec<Ids>>,
}

#[derive(Deserialize)]
struct Chat {
    messages: Vec<(String, String)>,
    text: String,
    ids: Vec<u32>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Ids {
    Same(Vec<u32>),
    /// Of a user's text, and of our own text with special tokens.
    Apart([Vec<u32>; 2]),
}

impl Tokens {
    fn read() -> Self {
        serde_json::from_str(include_str!("../reference/tokens.json")).unwrap()
    }
}

/// What decoding can give back: everything, but for what the vocabulary or its normaliser cannot hold.
fn lossy(name: &str, text: &str) -> String {
    match name {
        // Its vocabulary lacks these bytes, which training has never seen.
        "smollm2" => text.replace(['\u{4}', '\u{6}', '\u{13}', '\u{14}', '\u{16}', '\u{1d}'], ""),
        // A space is written as this mark, so the mark comes back as a space.
        "gemma3" | "spm" | "spm-prefix" => text.replace('\u{2581}', " "),
        // Characters are composed first.
        "qwen2" => {
            let mut composed = NormalizedString::from(text);
            NFC.normalize(&mut composed).unwrap();
            composed.get().to_owned()
        }
        _ => text.to_owned(),
    }
}

/// Compares all strings, and says about each that differs what differs.
fn check(name: &str, tokenizer: &Tokenizer) {
    let tokens = Tokens::read();
    assert_eq!((tokens.texts.len(), tokens.ids[name].len()), (200, 200));
    let mut wrong = Vec::new();
    for (text, ids) in tokens.texts.iter().zip(&tokens.ids[name]) {
        let (user, own) = match ids {
            Ids::Same(ids) => (ids, ids),
            Ids::Apart([user, own]) => (user, own),
        };
        for (kind, want, got) in [
            ("a user's", user, tokenizer.encode(text).unwrap()),
            ("our own", own, tokenizer.encode_with_specials(text).unwrap()),
        ] {
            if got != *want {
                wrong.push(format!("{kind} {text:?}\n  want {want:?}\n  got  {got:?}"));
            }
        }
        let back = tokenizer.decode(user).unwrap();
        if back != lossy(name, text) {
            wrong.push(format!("{text:?} comes back as {back:?}"));
        }
    }
    assert!(wrong.is_empty(), "{name}: {} of 200 strings\n{}", wrong.len(), wrong.join("\n"));
}

fn real((file, _): (&str, &str)) -> Option<Tokenizer> {
    model_file(file).map(|path| Tokenizer::open(&path).unwrap())
}

fn vocabulary(kind: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/reference/vocabularies").join(format!("{kind}.gguf"))
}

#[test]
fn smollm2_gives_the_ids_of_llama_cpp() {
    let Some(tokenizer) = real(SMOLLM2) else { return };
    check("smollm2", &tokenizer);
}

#[test]
fn gemma3_gives_the_ids_of_llama_cpp() {
    let Some(tokenizer) = real(GEMMA3) else { return };
    check("gemma3", &tokenizer);
}

#[test]
fn smollm2_renders_and_encodes_conversations_alike() {
    let Some(tokenizer) = real(SMOLLM2) else { return };
    let mut wrong = Vec::new();
    for Chat { messages, text, ids } in Tokens::read().chats {
        let turn = |(role, content): &(String, String)| Message { role: role.clone(), content: content.clone() };
        let turns: Vec<Message> = messages.iter().map(turn).collect();
        assert_eq!(tokenizer.render_chat(&turns, true).unwrap(), text);
        let got = tokenizer.encode_chat(&turns, true).unwrap();
        if got != ids {
            wrong.push(format!("{text:?}\n  want {ids:?}\n  got  {got:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn kinds_of_other_models_give_the_ids_of_llama_cpp() {
    for kind in ["qwen2", "llama-bpe", "spm", "spm-prefix"] {
        check(kind, &Tokenizer::open(&vocabulary(kind)).unwrap());
    }
}
