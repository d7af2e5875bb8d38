//! Which files of a directory in Hugging Face's layout are the model: the executor reads these, and no others.
//!
//! The fingerprint is defined by the executor (`Checkpoint::fingerprint`), whose list this one must equal.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use ring::digest::{SHA256, digest};
use serde::Deserialize;

use super::{ModelError, digest_of};
use crate::ids::hex;
use crate::model_name::is_plain_path;

/// Settings: the file that makes a directory a model.
pub(super) const CONFIG: &str = "config.json";
/// The tokenizer, complete.
pub(super) const TOKENIZER: &str = "tokenizer.json";
/// Weights in one file.
pub(super) const WEIGHTS: &str = "model.safetensors";
/// Which shard holds which tensor, where weights are in several files.
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// Belong to the model where they are there.
pub(super) const OPTIONAL: [&str; 4] =
    ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja"];

/// Files that an index of weights names; what is wrong with it if it is none.
pub(super) fn shards(index: &[u8]) -> Result<BTreeSet<String>, String> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(index).map_err(|error| error.to_string())?;
    let files: BTreeSet<String> = index.weight_map.into_values().collect();
    match files.iter().find(|file| !is_plain_path(file) || file.contains('/')) {
        Some(file) => Err(format!("names {file:?}, which is no plain file name")),
        None if files.is_empty() => Err("names no file".to_owned()),
        None => Ok(files),
    }
}

/// The fingerprint of a directory that is a model: reads all its files.
pub(super) fn fingerprint_of(directory: &Path) -> Result<String, ModelError> {
    let index = directory.join(INDEX);
    let mut names = match index.is_file() {
        true => {
            let text = fs::read(&index).map_err(ModelError::io("read", &index))?;
            let expected = "an index of safetensors".to_owned();
            shards(&text).map_err(|got| ModelError::Corrupt { path: index.clone(), expected, got })?
        }
        false => BTreeSet::from([WEIGHTS.to_owned()]),
    };
    names.extend([CONFIG, TOKENIZER].map(str::to_owned));
    let optional = [INDEX].into_iter().chain(OPTIONAL).filter(|name| directory.join(name).is_file());
    names.extend(optional.map(str::to_owned));
    let mut files = Vec::new();
    for name in names {
        let sha256 = digest_of(&directory.join(&name))?;
        files.push((name, sha256));
    }
    Ok(fingerprint(files.iter().map(|(name, sha256)| (name.as_str(), sha256.as_str()))))
}

/// `sha256:` and the SHA-256 of what `sha256sum` prints for the files, which come in the order of their names.
pub(super) fn fingerprint<'a>(files: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let list: String = files.map(|(name, sha256)| format!("{sha256}  {name}\n")).collect();
    format!("sha256:{}", hex(digest(&SHA256, list.as_bytes()).as_ref()))
}
