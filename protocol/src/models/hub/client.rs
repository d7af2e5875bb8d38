//! Requests to the hub: addresses and headers are hf-hub's, answers are read here, since hf-hub 0.5 tells of a refusal no more
//! than its status, and sends the token wherever a redirect leads.
//!
//! Does not write files.

use std::time::Duration;

use hf_hub::api::sync::{Api, ApiBuilder};
use hf_hub::{Cache, Repo, RepoType};
use ureq::http::{Response, Uri, header};
use ureq::{Agent, Body, Proxy};

use super::plan::Listing;
use super::{HubConfig, HubError};
use crate::model_name::HubName;

/// No connection, or no first byte of an answer, or no further byte for this long: given up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
const SILENCE_TIMEOUT: Duration = Duration::from_secs(60);
/// Redirects followed: the hub leads to its store, a renamed repository to its new name first.
const REDIRECTS_MAX: usize = 10;
/// Longest listing of a repository taken, bytes: one of 10,000 files is about 3 MB.
const LISTING_BYTES_MAX: u64 = 64 << 20;
/// Longest text of a refusal that is passed on, characters.
const WORDS_MAX: usize = 300;
/// The branch that is meant if none is named.
pub(super) const MAIN: &str = "main";

/// One who asks the hub.
pub(super) struct Client {
    config: HubConfig,
    api: Api,
    agent: Agent,
    proxy: Option<Proxy>,
}

/// What went wrong with a request: whether it is worth another try is the caller's to decide.
#[derive(Debug)]
pub(super) enum Refusal {
    /// No answer, or one that was cut short: another try may help.
    Network(String),
    /// The hub is busy or in trouble: another try may help.
    Busy(HubError),
    /// Another try would end the same.
    Final(HubError),
}

impl Client {
    pub(super) fn new(config: &HubConfig) -> Result<Self, HubError> {
        let setting = |variable, detail: String| HubError::Setting { variable, detail };
        let endpoint: Uri = config.endpoint.parse().map_err(|error| setting("HF_ENDPOINT", format!("{error}")))?;
        if endpoint.host().is_none() || !matches!(endpoint.scheme_str(), Some("http" | "https")) {
            return Err(setting("HF_ENDPOINT", format!("`{}` is no http or https address", config.endpoint)));
        }
        if config.token.as_ref().is_some_and(|token| !token.bytes().all(|byte| byte.is_ascii_graphic())) {
            return Err(setting("HF_TOKEN", "it holds characters that no token has".to_owned()));
        }
        // Nothing is ever put into this cache: files come by `get`.
        let api = ApiBuilder::from_cache(Cache::new(std::path::PathBuf::new()))
            .with_endpoint(config.endpoint.clone())
            .with_token(config.token.clone())
            .with_user_agent("bonepile", crate::BUILD)
            .build()
            .map_err(|error| setting("HF_ENDPOINT", error.to_string()))?;
        // A hub on this machine needs no proxy, and no proxy could find it.
        let here = endpoint.host().is_some_and(|host| matches!(host, "localhost" | "127.0.0.1" | "[::1]"));
        let proxy = if here { None } else { Proxy::try_from_env() };
        let agent = Agent::config_builder()
            .proxy(proxy.clone())
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_per_read(Some(SILENCE_TIMEOUT))
            // A compressed answer could not go on at a byte.
            .accept_encoding("identity")
            .user_agent(format!("bonepile/{}", crate::BUILD))
            .build()
            .into();
        Ok(Self { config: config.clone(), api, agent, proxy })
    }

    pub(super) fn config(&self) -> &HubConfig {
        &self.config
    }

    /// What the repository holds at the revision that `name` asks for.
    pub(super) fn listing(&self, name: &HubName) -> Result<Listing, Refusal> {
        let revision = name.revision.as_deref().unwrap_or(MAIN);
        let request = self.api.repo(repo(name, revision)).info_request();
        let sent = request
            .query("blobs", "true")
            .config()
            .proxy(self.proxy.clone())
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_per_read(Some(SILENCE_TIMEOUT))
            .build()
            .call();
        let mut answer = sent.map_err(|error| Refusal::Network(error.to_string()))?;
        if answer.status() != 200 {
            return Err(self.refusal(name, &format!("{} at {revision}", name.repository()), answer));
        }
        let text = answer.body_mut().with_config().limit(LISTING_BYTES_MAX).read_to_vec();
        let text = text.map_err(|error| Refusal::Network(error.to_string()))?;
        serde_json::from_slice(&text)
            .map_err(|error| Refusal::Final(HubError::Answer { what: name.repository(), detail: error.to_string() }))
    }

    /// A file at a commit from byte `from` on. Redirects are followed, the token goes to the hub's own address only. Also
    /// tells the SHA-256 that the hub names on the way, if it does.
    pub(super) fn get(
        &self,
        name: &HubName,
        commit: &str,
        file: &str,
        from: u64,
    ) -> Result<(Response<Body>, Option<String>), Refusal> {
        let mut address = self.api.repo(repo(name, commit)).url(&escaped(file));
        let mut named = None;
        for _ in 0..=REDIRECTS_MAX {
            let mut request = self.agent.get(&address);
            if let Some(token) = self.config.token.as_ref().filter(|_| same_host(&address, &self.config.endpoint)) {
                request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
            }
            if from > 0 {
                request = request.header(header::RANGE, format!("bytes={from}-"));
            }
            let answer = request.call().map_err(|error| Refusal::Network(error.to_string()))?;
            named = named.or_else(|| linked_sha256(&answer));
            let status = answer.status();
            if !status.is_redirection() {
                return match status.as_u16() {
                    200 | 206 | 416 => Ok((answer, named)),
                    _ if same_host(&address, &self.config.endpoint) => Err(self.refusal(name, file, answer)),
                    // The store knows nobody: what led there has run out, or it is in trouble. The hub leads there anew.
                    status => {
                        let message = "from the store that the hub leads to".to_owned();
                        Err(Refusal::Busy(HubError::Status { status, what: file.to_owned(), message }))
                    }
                };
            }
            let location = text(&answer, header::LOCATION.as_str()).and_then(|to| target(&address, to));
            address = location.ok_or_else(|| {
                let detail = "it leads nowhere".to_owned();
                Refusal::Final(HubError::Answer { what: file.to_owned(), detail })
            })?;
        }
        let detail = format!("it leads on for more than {REDIRECTS_MAX} times");
        Err(Refusal::Final(HubError::Answer { what: file.to_owned(), detail }))
    }

    /// What an answer other than the wanted means. The hub names the reason in a header; without one the status decides.
    fn refusal(&self, name: &HubName, what: &str, mut answer: Response<Body>) -> Refusal {
        let repository = name.repository();
        let status = answer.status().as_u16();
        let code = text(&answer, "x-error-code").unwrap_or_default().to_owned();
        let words = text(&answer, "x-error-message").map(str::to_owned).or_else(|| {
            let body = answer.body_mut().with_config().limit(1 << 16).read_to_vec().ok()?;
            let body: serde_json::Value = serde_json::from_slice(&body).ok()?;
            Some(body["error"].as_str()?.to_owned())
        });
        let words = words.filter(|words| !words.trim().is_empty()).unwrap_or_else(|| format!("status {status}"));
        let message: String = words.chars().map(|c| if c.is_control() { ' ' } else { c }).take(WORDS_MAX).collect();
        let with_token = self.config.token.is_some();
        let error = match (code.as_str(), status) {
            ("GatedRepo", _) => HubError::Gated { repository, with_token, message },
            ("RevisionNotFound", _) => {
                let revision = name.revision.clone().unwrap_or_else(|| MAIN.to_owned());
                HubError::NoRevision { repository, revision }
            }
            ("EntryNotFound", _) => HubError::NoFile { repository, file: what.to_owned(), others: Vec::new() },
            ("RepoNotFound", _) => HubError::NoRepository { repository },
            (_, 401) if message.contains("Invalid credentials") || message.contains("Invalid username or password") => {
                match with_token {
                    true => HubError::BadToken,
                    // The hub says so to those without a token, too, about what they may not see.
                    false => HubError::NoRepository { repository },
                }
            }
            (_, 401 | 403) => HubError::Gated { repository, with_token, message },
            (_, 404) => HubError::NoRepository { repository },
            _ => HubError::Status { status, what: what.to_owned(), message },
        };
        match status {
            408 | 425 | 429 | 500.. => Refusal::Busy(error),
            _ => Refusal::Final(error),
        }
    }
}

fn repo(name: &HubName, revision: &str) -> Repo {
    Repo::with_revision(name.repository(), RepoType::Model, revision.to_owned())
}

/// The text of a header, if it is one.
pub(super) fn text<'a>(answer: &'a Response<Body>, header: &str) -> Option<&'a str> {
    answer.headers().get(header)?.to_str().ok()
}

/// The SHA-256 that the hub names in a file's first answer: of large files it is the etag.
fn linked_sha256(answer: &Response<Body>) -> Option<String> {
    let etag = text(answer, "x-linked-etag")?.trim_start_matches("W/").trim_matches('"');
    super::plan::is_hex(etag, 64).then(|| etag.to_owned())
}

/// A path as it stands in an address: what has a meaning there is written as `%XX`.
fn escaped(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    for byte in path.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => out.push(char::from(byte)),
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}

/// Where a redirect from `address` leads; `None` if that is no address.
fn target(address: &str, location: &str) -> Option<String> {
    let uri: Uri = location.parse().ok()?;
    let from: Uri = address.parse().ok()?;
    if uri.host().is_some() {
        // From https nothing leads back to what others can read on the way.
        let kept = from.scheme_str() == Some("http") && uri.scheme_str() == Some("http");
        return (kept || uri.scheme_str() == Some("https")).then(|| location.to_owned());
    }
    let origin = format!("{}://{}", from.scheme_str()?, from.authority()?);
    location.starts_with('/').then(|| format!("{origin}{location}"))
}

/// Whether both addresses have the same scheme, host and port.
fn same_host(one: &str, other: &str) -> bool {
    let parts = |text: &str| {
        let uri: Uri = text.parse().ok()?;
        Some((uri.scheme_str()?.to_owned(), uri.authority()?.as_str().to_ascii_lowercase()))
    };
    parts(one).is_some_and(|one| parts(other) == Some(one))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_hub_itself_gets_the_token() {
        let hub = "https://hub.example";
        assert!(same_host("https://hub.example/o/n/resolve/x", hub));
        assert!(same_host("https://HUB.example/o", hub));
        for other in [
            "https://cdn.hub.example/x",
            "http://hub.example/x",
            "https://hub.example:444/x",
            "https://hub.example.evil/x",
            "nonsense",
        ] {
            assert!(!same_host(other, hub), "{other}");
        }
    }

    #[test]
    fn redirects_lead_to_http_addresses_only() {
        let from = "https://hub.example/o/n/resolve/main/x";
        assert_eq!(target(from, "/p/n/resolve/main/x").unwrap(), "https://hub.example/p/n/resolve/main/x");
        assert_eq!(target(from, "https://cdn.example/x?y=1").unwrap(), "https://cdn.example/x?y=1");
        assert_eq!(target(from, "http://cdn.example/x"), None, "not where everybody can read it");
        assert_eq!(target("http://127.0.0.1:1/x", "http://127.0.0.1:2/x").unwrap(), "http://127.0.0.1:2/x");
        assert_eq!(target(from, "file:///etc/passwd"), None);
        assert_eq!(target(from, "x"), None);
    }

    #[test]
    fn names_are_escaped_in_addresses() {
        assert_eq!(escaped("sub/a b#1?%.gguf"), "sub/a%20b%231%3F%25.gguf");
    }

    #[test]
    fn settings_that_cannot_be_sent_are_refused() {
        for endpoint in ["hub.example", "ftp://hub.example", "https://", "::"] {
            let refused = Client::new(&HubConfig::at(endpoint));
            assert!(matches!(refused, Err(HubError::Setting { variable: "HF_ENDPOINT", .. })), "{endpoint}");
        }
        let config = HubConfig { token: Some("hf_a\nb".to_owned()), ..HubConfig::at("https://hub.example") };
        assert!(matches!(Client::new(&config), Err(HubError::Setting { variable: "HF_TOKEN", .. })));
    }
}
