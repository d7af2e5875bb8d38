//! How models are named in sweeps and on command lines: parsed here, once, for every side.
//!
//! | written as | is |
//! |---|---|
//! | `smollm2-135m-instruct` | a model of the [`catalogue`] |
//! | `ORG/NAME[@REVISION][:FILE]` | a model that was pulled from Hugging Face's hub |
//! | `some.gguf` | a file in the models directory |
//! | `/data/some.gguf`, `/data/some-model` | a file or directory of the box, by its absolute path |
//!
//! Does not know what is on a box: [`crate::models`] does.

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use crate::catalogue::{self, KnownModel, MODELS};
use crate::error::nearest;

/// Longest name of a model, bytes: a path of a box fits, a text pasted by mistake does not.
pub const MODEL_NAME_BYTES_MAX: usize = 1024;
/// Ending of the files that are a model in themselves.
pub const GGUF: &str = ".gguf";
/// Longest part of a repository's name on the hub, bytes; by the hub's own rules.
const HUB_PART_BYTES_MAX: usize = 96;
/// Hex digits of a commit.
const COMMIT_DIGITS: usize = 40;

/// A model's name, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelName {
    /// Of the catalogue.
    Known(&'static KnownModel),
    /// From the hub.
    Hub(HubName),
    /// A GGUF file in the models directory; a plain file name.
    File(String),
    /// A GGUF file, or a directory with `config.json`, by its absolute path.
    Path(PathBuf),
}

/// A model on Hugging Face's hub: `ORG/NAME[@REVISION][:FILE]`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct HubName {
    /// Whose it is.
    pub org: String,
    /// What it is called there.
    pub name: String,
    /// A branch, a tag or a commit; none: `main` where one is pulled, the newest pulled one where one is looked for.
    pub revision: Option<String>,
    /// A GGUF file in it, with `/` between directories; none: the whole model, or the only GGUF file.
    pub file: Option<String>,
}

/// A text that names no model. Displays as what is wrong with it, without the text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Empty, far too long, or with control characters.
    #[error("expected 1 to {MODEL_NAME_BYTES_MAX} printable characters")]
    Unprintable,
    /// Neither of the catalogue nor of another form.
    #[error("expected one of {}", known())]
    Unknown,
    /// A part of a hub's name is not as the hub allows.
    #[error("`{part}` is no {what} that the hub could have; expected {expected}")]
    Hub {
        /// Organisation, name, revision or file.
        what: &'static str,
        /// As written.
        part: String,
        /// What it may be.
        expected: &'static str,
    },
    /// What lies at a path is none.
    #[error("it is neither a .gguf file nor a directory with config.json")]
    NoModel,
    /// `..` in a path.
    #[error("`..` may not stand in it")]
    Parent,
}

impl NameError {
    /// What a person could do about `text`.
    pub fn hint(&self, text: &str) -> String {
        match nearest(text, MODELS.iter().map(|model| model.name)) {
            Some(near) => format!("did you mean `{near}`?"),
            None => FORMS.to_owned(),
        }
    }
}

/// Every form, for hints.
const FORMS: &str = "a name from `bonepile models list`, ORG/NAME[@REVISION][:FILE] of Hugging Face's hub, the name of a \
                     .gguf file in the models directory, or an absolute path";

fn known() -> String {
    MODELS.iter().map(|model| model.name).collect::<Vec<_>>().join(", ")
}

impl FromStr for ModelName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.is_empty() || text.len() > MODEL_NAME_BYTES_MAX || text.chars().any(char::is_control) {
            return Err(NameError::Unprintable);
        }
        if let Some(known) = catalogue::model(text) {
            return Ok(Self::Known(known));
        }
        if is_path(text) {
            let path = Path::new(text);
            return match path.components().any(|part| part == Component::ParentDir) {
                true => Err(NameError::Parent),
                false => Ok(Self::Path(path.to_owned())),
            };
        }
        if text.contains('/') {
            return text.parse().map(Self::Hub);
        }
        match text.ends_with(GGUF) && !text.starts_with('.') {
            true => Ok(Self::File(text.to_owned())),
            false => Err(NameError::Unknown),
        }
    }
}

impl FromStr for HubName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let (rest, file) = split(text, ':');
        let (repository, revision) = split(rest, '@');
        let (org, name) = repository.split_once('/').ok_or(NameError::Unknown)?;
        let check = |what, part: &str, good: bool, expected| match good {
            true => Ok(part.to_owned()),
            false => Err(NameError::Hub { what, part: part.to_owned(), expected }),
        };
        let owned = |what, part| check(what, part, is_hub_part(part), "letters, digits, `-`, `_` and `.`, at most 96");
        Ok(Self {
            org: owned("organisation", org)?,
            name: owned("name", name)?,
            revision: revision
                .map(|text| check("revision", text, is_revision(text), "a branch, a tag or a commit"))
                .transpose()?,
            file: file
                .map(|text| {
                    check("file", text, is_plain_path(text) && text.ends_with(GGUF), "a path that ends in .gguf")
                })
                .transpose()?,
        })
    }
}

impl HubName {
    /// `ORG/NAME`.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.org, self.name)
    }

    /// The same model at a commit.
    #[must_use]
    pub fn at(&self, commit: &str) -> Self {
        Self { revision: Some(commit.to_owned()), ..self.clone() }
    }
}

impl fmt::Display for HubName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.org, self.name)?;
        if let Some(revision) = &self.revision {
            write!(f, "@{revision}")?;
        }
        match &self.file {
            Some(file) => write!(f, ":{file}"),
            None => Ok(()),
        }
    }
}

/// Whether `text` is a path of a box: nobody but the box can tell what lies there.
pub fn is_path(text: &str) -> bool {
    text.starts_with('/')
}

/// Whether `text` is a whole commit's name: 40 lowercase hex digits.
pub fn is_commit(text: &str) -> bool {
    text.len() == COMMIT_DIGITS && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Whether `text` is a relative path of plain names: it stays below whatever it is joined to.
pub fn is_plain_path(text: &str) -> bool {
    let plain = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.contains(['\\', '\0']);
    text.split('/').all(plain) && !text.chars().any(char::is_control)
}

/// What stands before the first `mark`, and after it if it is there.
fn split(text: &str, mark: char) -> (&str, Option<&str>) {
    text.split_once(mark).map_or((text, None), |(before, after)| (before, Some(after)))
}

fn is_hub_part(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let edges = text.starts_with(['.', '-']) || text.ends_with(['.', '-']);
    (1..=HUB_PART_BYTES_MAX).contains(&text.len()) && text.bytes().all(allowed) && !edges && !text.contains("..")
}

fn is_revision(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'/' | b'+');
    text.len() <= HUB_PART_BYTES_MAX && is_plain_path(text) && text.bytes().all(allowed) && !text.contains("..")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> ModelName {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn each_form_is_told_apart() {
        assert_eq!(read("gemma-3-270m"), ModelName::Known(catalogue::model("gemma-3-270m").unwrap()));
        assert_eq!(read("own.gguf"), ModelName::File("own.gguf".to_owned()));
        assert_eq!(read("/data/a b/model"), ModelName::Path("/data/a b/model".into()));
        let ModelName::Hub(plain) = read("Qwen/Qwen3-0.6B") else { panic!("not of the hub") };
        assert_eq!((plain.org.as_str(), plain.name.as_str()), ("Qwen", "Qwen3-0.6B"));
        assert_eq!((plain.revision, plain.file), (None, None));
        let ModelName::Hub(full) = read("org/name@refs/pr/1:sub/x.Q4_0.gguf") else { panic!("not of the hub") };
        assert_eq!(full.revision.as_deref(), Some("refs/pr/1"));
        assert_eq!(full.file.as_deref(), Some("sub/x.Q4_0.gguf"));
        for text in ["org/name", "org/name@v1.0", "org/name:x.gguf", "org/name@refs/pr/1:sub/x.gguf"] {
            let ModelName::Hub(name) = read(text) else { panic!("not of the hub") };
            assert_eq!(name.to_string(), text);
        }
        assert_eq!(full.at(&"a".repeat(40)).to_string(), format!("org/name@{}:sub/x.Q4_0.gguf", "a".repeat(40)));
    }

    #[test]
    fn what_could_leave_its_directory_or_is_nothing_is_refused() {
        for bad in [
            "",
            "smollm",
            "gpt2",
            ".hidden.gguf",
            "../own.gguf",
            "./own.gguf",
            "a/../b",
            "a/b/c",
            "a/",
            "/a/../b",
            "org/na me",
            "org/name@",
            "org/name:",
            "org/name:readme.md",
            "org/name:../x.gguf",
            "org/name:/x.gguf",
            "org/name:a//x.gguf",
            "org/name:a/.x/y.gguf",
            "org/name@../main",
            "org/name@a b",
            "org/..",
            "-org/name",
            "org/name?x",
            "a\nb",
        ] {
            assert!(bad.parse::<ModelName>().is_err(), "{bad}");
        }
        assert!("a".repeat(MODEL_NAME_BYTES_MAX + 1).parse::<ModelName>().is_err());
    }

    #[test]
    fn complaints_say_what_was_expected() {
        let told = |text: &str| text.parse::<ModelName>().unwrap_err();
        assert_eq!(told("gemma-3-270").to_string(), "expected one of smollm2-135m-instruct, gemma-3-270m");
        assert_eq!(told("gemma-3-270").hint("gemma-3-270"), "did you mean `gemma-3-270m`?");
        assert!(told("gpt2").hint("gpt2").contains("ORG/NAME[@REVISION][:FILE]"));
        let file = told("org/name:model.safetensors");
        assert_eq!(
            file.to_string(),
            "`model.safetensors` is no file that the hub could have; expected a path that ends in .gguf"
        );
    }

    #[test]
    fn a_commit_is_forty_hex_digits() {
        assert!(is_commit(&"0a".repeat(20)));
        assert!(!is_commit("main") && !is_commit(&"0A".repeat(20)) && !is_commit(&"0a".repeat(19)));
    }
}
