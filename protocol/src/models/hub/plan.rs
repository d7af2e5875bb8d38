//! What a repository holds, and which of its files are the model that was asked for.
//!
//! Pure: reads the hub's answer, asks nobody.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::HubError;
use crate::model_name::{GGUF, HubName, is_commit, is_plain_path};
use crate::models::layout::{CONFIG, INDEX, OPTIONAL, TOKENIZER, WEIGHTS};

/// A repository at a commit, as the hub describes it.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Listing {
    /// The commit.
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
    #[serde(default)]
    tags: Vec<String>,
}

#[derive(Debug, Clone, Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Debug, Clone, Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

/// A file to be brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Its path in the repository; plain.
    pub(super) path: String,
    /// Its length, where the hub tells it.
    pub(super) bytes: Option<u64>,
    /// What its content must be, where the hub tells it.
    pub(super) digest: Option<Digest>,
}

/// What a content must be, hex.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Digest {
    /// SHA-256 of the content: of large files.
    Sha256(String),
    /// What git calls the content, a SHA-1 with its length: of files in git itself.
    Git(String),
}

/// The files of a model, as far as the listing says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Plan {
    /// One file.
    Gguf(Wanted),
    /// A directory, all of it.
    Whole(Vec<Wanted>),
    /// A directory whose weights are in the files that this index names.
    Sharded {
        /// The index.
        index: Wanted,
        /// All others but the weights.
        others: Vec<Wanted>,
    },
}

impl Digest {
    /// The digits.
    pub(super) fn text(&self) -> &str {
        let (Self::Sha256(text) | Self::Git(text)) = self;
        text
    }
}

impl Plan {
    /// Files in all, as far as known.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Gguf(_) => 1,
            Self::Whole(files) => files.len(),
            Self::Sharded { others, .. } => others.len() + 1,
        }
    }
}

impl Listing {
    /// The commit's name.
    ///
    /// # Errors
    /// [`HubError::Answer`] if the hub says something else.
    pub(super) fn commit(&self, repository: &str) -> Result<&str, HubError> {
        match is_commit(&self.sha) {
            true => Ok(&self.sha),
            false => {
                let detail = format!("its commit is {:?}", self.sha.chars().take(80).collect::<String>());
                Err(HubError::Answer { what: repository.to_owned(), detail })
            }
        }
    }

    /// What its author says about the licence: `apache-2.0`.
    pub(super) fn licence(&self) -> Option<&str> {
        self.tags.iter().find_map(|tag| tag.strip_prefix("license:"))
    }

    /// Which files are the model that `name` asks for: the GGUF file that it names; else the directory, if there are
    /// safetensors; else the only GGUF file.
    ///
    /// # Errors
    /// [`HubError::NoFile`], [`HubError::Several`], [`HubError::NoModel`].
    pub(super) fn plan(&self, name: &HubName) -> Result<Plan, HubError> {
        let repository = name.repository();
        let files = self.files();
        let find = |path: &str| files.get(path).cloned();
        let ggufs: Vec<String> = files.keys().filter(|path| path.ends_with(GGUF)).cloned().collect();
        if let Some(file) = &name.file {
            let none =
                || HubError::NoFile { repository: repository.clone(), file: file.clone(), others: ggufs.clone() };
            return single(&repository, find(file).ok_or_else(none)?);
        }
        let weights = find(INDEX).or_else(|| find(WEIGHTS));
        let (Some(weights), Some(config)) = (weights, find(CONFIG)) else {
            return match ggufs.as_slice() {
                [] => {
                    let what = "neither config.json with model.safetensors, nor a GGUF file".to_owned();
                    Err(HubError::NoModel { repository, what })
                }
                [only] => single(&repository, files[only].clone()),
                _ => Err(HubError::Several { repository, files: ggufs }),
            };
        };
        let Some(tokenizer) = find(TOKENIZER) else {
            return Err(HubError::NoModel { repository, what: format!("no {TOKENIZER}") });
        };
        let mut others = vec![config, tokenizer];
        others.extend(OPTIONAL.into_iter().filter_map(find));
        if weights.path == INDEX {
            return Ok(Plan::Sharded { index: weights, others });
        }
        others.push(weights);
        Ok(Plan::Whole(others))
    }

    /// The weights that an index names.
    ///
    /// # Errors
    /// [`HubError::NoModel`] if the repository lacks one.
    pub(super) fn shards<'a>(
        &self,
        name: &HubName,
        names: impl Iterator<Item = &'a String>,
    ) -> Result<Vec<Wanted>, HubError> {
        let files = self.files();
        let find = |shard: &String| {
            let what = || format!("{INDEX} names {shard}, which is not there");
            let none = || HubError::NoModel { repository: name.repository(), what: what() };
            files.get(shard).cloned().ok_or_else(none)
        };
        names.map(find).collect()
    }

    /// By path; what could lead out of a directory is not looked at.
    fn files(&self) -> BTreeMap<String, Wanted> {
        let plain = self.siblings.iter().filter(|file| is_plain_path(&file.rfilename));
        plain.map(|file| (file.rfilename.clone(), file.wanted())).collect()
    }
}

impl Sibling {
    fn wanted(&self) -> Wanted {
        let lfs = self.lfs.as_ref();
        let sha256 = lfs.and_then(|lfs| lfs.sha256.clone()).filter(|text| is_hex(text, 64));
        // The blob of a large file is the pointer to it, which says nothing about the content.
        let git = self.blob.clone().filter(|text| lfs.is_none() && is_hex(text, 40));
        Wanted {
            path: self.rfilename.clone(),
            bytes: lfs.and_then(|lfs| lfs.size).or(self.size),
            digest: sha256.map(Digest::Sha256).or(git.map(Digest::Git)),
        }
    }
}

/// A GGUF file, unless it is one of several that are a model only together.
fn single(repository: &str, file: Wanted) -> Result<Plan, HubError> {
    let stem = file.path.strip_suffix(GGUF).unwrap_or(&file.path);
    let numbered = stem.rsplit_once("-of-").is_some_and(|(before, count)| {
        let digits = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
        digits(count) && before.rsplit_once('-').is_some_and(|(_, number)| digits(number))
    });
    match numbered {
        true => {
            let what = format!("{} is one part of several, and only GGUF models in one file can be run", file.path);
            Err(HubError::NoModel { repository: repository.to_owned(), what })
        }
        false => Ok(Plan::Gguf(file)),
    }
}

/// Whether `text` is `digits` lowercase hex digits.
pub(super) fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn listing(files: &[&str]) -> Listing {
        let siblings: Vec<_> = files.iter().map(|file| json!({ "rfilename": file })).collect();
        let document = json!({ "sha": "a".repeat(40), "siblings": siblings, "tags": ["x", "license:apache-2.0"] });
        serde_json::from_value(document).unwrap()
    }

    fn plan(name: &str, files: &[&str]) -> Result<Vec<String>, String> {
        let paths = |files: Vec<Wanted>| files.into_iter().map(|file| file.path).collect();
        match listing(files).plan(&name.parse().unwrap()).map_err(|error| error.to_string())? {
            Plan::Gguf(file) => Ok(vec![file.path]),
            Plan::Whole(files) => Ok(paths(files)),
            Plan::Sharded { index, others } => Ok([paths(others), vec![index.path]].concat()),
        }
    }

    #[test]
    fn a_directory_is_exactly_what_the_executor_reads() {
        let files = [
            "README.md",
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "model.safetensors",
            "x.gguf",
            "pytorch_model.bin",
            "onnx/model.onnx",
            "chat_template.jinja",
        ];
        let expected =
            ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"];
        assert_eq!(plan("o/n", &files).unwrap(), expected);
        assert_eq!(plan("o/n:x.gguf", &files).unwrap(), ["x.gguf"]);
        let sharded =
            ["config.json", "tokenizer.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"];
        assert_eq!(plan("o/n", &sharded).unwrap(), &sharded[..3]);
        assert_eq!(listing(&files).licence(), Some("apache-2.0"));
    }

    #[test]
    fn a_gguf_file_is_named_or_the_only_one() {
        assert_eq!(plan("o/n", &["README.md", "config.json", "q/a.gguf"]).unwrap(), ["q/a.gguf"]);
        assert_eq!(
            plan("o/n", &["a.gguf", "b.gguf"]).unwrap_err(),
            "o/n has 2 GGUF files and no safetensors: a.gguf, b.gguf"
        );
        assert_eq!(plan("o/n:c.gguf", &["a.gguf"]).unwrap_err(), "o/n has no file c.gguf");
        assert!(
            plan("o/n:a-00001-of-00003.gguf", &["a-00001-of-00003.gguf"]).unwrap_err().contains("one part of several")
        );
        assert!(plan("o/n", &["config.json"]).unwrap_err().contains("neither"));
        assert!(plan("o/n", &["config.json", "model.safetensors"]).unwrap_err().contains("no tokenizer.json"));
        assert!(plan("o/n", &["../a.gguf"]).is_err(), "a path that leads out is no file");
    }

    #[test]
    fn digests_are_those_of_the_content() {
        let (sha, blob) = ("b".repeat(64), "c".repeat(40));
        let document = json!({ "sha": "a".repeat(40), "siblings": [
            { "rfilename": "large", "size": 9, "blobId": blob, "lfs": { "sha256": sha, "size": 9, "pointerSize": 134 } },
            { "rfilename": "small", "size": 3, "blobId": blob },
            { "rfilename": "odd", "blobId": "nothing", "lfs": { "sha256": "nothing" } },
        ]});
        let listing: Listing = serde_json::from_value(document).unwrap();
        let files = listing.files();
        assert_eq!(files["large"].digest, Some(Digest::Sha256(sha)));
        assert_eq!(files["small"].digest, Some(Digest::Git(blob)));
        assert_eq!((files["small"].bytes, files["odd"].digest.as_ref()), (Some(3), None));
        let moved = Listing { sha: "main".to_owned(), ..listing };
        assert!(matches!(moved.commit("o/n"), Err(HubError::Answer { .. })));
    }
}
