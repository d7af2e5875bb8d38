//! Why the hub did not give a model, and what a person could do about it.

/// Why the hub did not give a model.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// There is none of this name, or it is private and the token does not open it: the hub tells nobody which.
    #[error("the hub has no model {repository}, or keeps it private")]
    NoRepository {
        /// `ORG/NAME`.
        repository: String,
    },
    /// The repository has no such branch, tag or commit.
    #[error("{repository} has no branch, tag or commit `{revision}`")]
    NoRevision {
        /// `ORG/NAME`.
        repository: String,
        /// As asked for.
        revision: String,
    },
    /// The repository has no such file.
    #[error("{repository} has no file {file}")]
    NoFile {
        /// `ORG/NAME`.
        repository: String,
        /// As asked for.
        file: String,
        /// GGUF files that it has.
        others: Vec<String>,
    },
    /// Nobody said which of several GGUF files.
    #[error("{repository} has {} GGUF files and no safetensors: {}", files.len(), files.join(", "))]
    Several {
        /// `ORG/NAME`.
        repository: String,
        /// Their names.
        files: Vec<String>,
    },
    /// The repository holds no model that could be run.
    #[error("{repository} holds no model for bonepile: {what}")]
    NoModel {
        /// `ORG/NAME`.
        repository: String,
        /// What is missing, or cannot be read.
        what: String,
    },
    /// Who asks may not have it.
    #[error("the hub does not give {repository} to {}: {message}", if *with_token { "this token" } else { "one without a token" })]
    Gated {
        /// `ORG/NAME`.
        repository: String,
        /// Whether a token was sent.
        with_token: bool,
        /// The hub's words.
        message: String,
    },
    /// The token is none.
    #[error("the hub does not know the token")]
    BadToken,
    /// No answer.
    #[error("the hub at {endpoint} does not answer: {detail}")]
    Unreachable {
        /// Where it was looked for.
        endpoint: String,
        /// What the network says.
        detail: String,
    },
    /// A file came only in part, time after time.
    #[error("{file} did not come whole: {bytes} bytes are here, then {detail}")]
    Cut {
        /// Its name.
        file: String,
        /// What is here.
        bytes: u64,
        /// What the network says.
        detail: String,
    },
    /// An answer that is none of the above.
    #[error("the hub answered {status} to {what}: {message}")]
    Status {
        /// HTTP status.
        status: u16,
        /// What was asked for.
        what: String,
        /// The hub's words.
        message: String,
    },
    /// An answer that says nothing.
    #[error("the hub's answer about {what} is of no use: {detail}")]
    Answer {
        /// What was asked for.
        what: String,
        /// What is wrong with it.
        detail: String,
    },
    /// It would not fit on the disk.
    #[error("{path} has {free} bytes free, {need} are needed")]
    NoRoom {
        /// The models directory.
        path: String,
        /// Free, bytes.
        free: u64,
        /// Still to come, bytes.
        need: u64,
    },
    /// The address of the hub, or the token, cannot be used.
    #[error("{variable} cannot be used: {detail}")]
    Setting {
        /// Its variable.
        variable: &'static str,
        /// Why.
        detail: String,
    },
}

impl HubError {
    /// What a person could do with `program`.
    pub(crate) fn hint(&self, program: &str) -> Option<String> {
        Some(match self {
            Self::NoRepository { .. } => {
                "check the name; for a private model set HF_TOKEN to a token that may read it".to_owned()
            }
            Self::NoRevision { repository, .. } => {
                format!("leave `@…` out for the main branch: `{program} models pull {repository}`")
            }
            Self::NoFile { others, .. } if others.is_empty() => "it has no GGUF file at all".to_owned(),
            Self::NoFile { repository, others, file } => {
                let near = crate::error::nearest(file, others.iter().map(String::as_str)).unwrap_or(&others[0]);
                format!("it has {}: `{program} models pull {repository}:{near}`", others.join(", "))
            }
            Self::Several { repository, files } => {
                let first = files.first().map_or("FILE", String::as_str);
                format!("name one: `{program} models pull {repository}:{first}`")
            }
            Self::NoModel { .. } => {
                "wanted are config.json, tokenizer.json and safetensors, or a single GGUF file".to_owned()
            }
            Self::Gated { repository, with_token: false, .. } => {
                format!("accept its terms on its page ({repository}), then set HF_TOKEN to a token of that account")
            }
            Self::Gated { repository, .. } => {
                format!("accept its terms on its page ({repository}) with the token's account; the token must be allowed to read it")
            }
            Self::BadToken => "make a new one on the hub and set HF_TOKEN, or unset it".to_owned(),
            Self::Unreachable { .. } => {
                "check the network; HTTPS_PROXY names a proxy, HF_ENDPOINT another address of the hub; a model that lies on \
                 disk can be named by its absolute path"
                    .to_owned()
            }
            Self::Cut { .. } => "pull again: it goes on where it was cut".to_owned(),
            Self::Status { status: 429, .. } => "wait some minutes, then pull again: it goes on where it was".to_owned(),
            Self::Status { status: 500.., .. } => "the hub is in trouble; pull again later".to_owned(),
            Self::NoRoom { .. } => format!("free some space, or set {} to a larger disk", super::super::MODELS_VARIABLE),
            Self::Status { .. } | Self::Answer { .. } | Self::Setting { .. } => return None,
        })
    }
}
