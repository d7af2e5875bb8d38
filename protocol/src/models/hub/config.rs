//! Where the hub is and who asks: from the variables and files that Hugging Face's own tools use.
//!
//! The only place that reads them; everything else is given a [`HubConfig`].

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// Where the hub is if nobody says otherwise.
const ENDPOINT: &str = "https://huggingface.co";
/// Wait before the second try of a request; doubles with each further one.
const RETRY_WAIT: Duration = Duration::from_secs(1);

/// Where the hub is, and who asks.
#[derive(Clone, PartialEq, Eq)]
pub struct HubConfig {
    /// Its address, without a slash at the end.
    pub endpoint: String,
    /// Sent to the hub, and to no other host.
    pub token: Option<String>,
    /// Wait before the second try of a request; doubles with each further one.
    pub retry_wait: Duration,
}

impl HubConfig {
    /// The hub at `endpoint`, without a token.
    pub fn at(endpoint: &str) -> Self {
        Self { endpoint: endpoint.trim_end_matches('/').to_owned(), token: None, retry_wait: RETRY_WAIT }
    }

    /// From the process's environment: `HF_ENDPOINT`; `HF_TOKEN`, else the token file at `HF_TOKEN_PATH`, else `token` in
    /// `HF_HOME`, which is `huggingface` in the user's cache by default.
    pub fn from_env() -> Self {
        Self::from_variables(&|name| std::env::var_os(name))
    }

    /// The same from any variables.
    pub fn from_variables(variable: &dyn Fn(&str) -> Option<OsString>) -> Self {
        let set = |name| variable(name).filter(|value| !value.is_empty());
        let text = |name| set(name).and_then(|value| value.into_string().ok()).map(|text| text.trim().to_owned());
        let token = text("HF_TOKEN").filter(|token| !token.is_empty()).or_else(|| {
            let cache = set("XDG_CACHE_HOME").map(PathBuf::from);
            let cache = cache.or_else(|| set("HOME").map(|home| PathBuf::from(home).join(".cache")));
            let home = set("HF_HOME").map(PathBuf::from).or_else(|| cache.map(|cache| cache.join("huggingface")));
            match set("HF_TOKEN_PATH") {
                Some(path) => std::fs::read_to_string(path).ok().map(|token| token.trim().to_owned()),
                // hf-hub finds the token beside the cache that it is given.
                None => hf_hub::Cache::new(home?.join("hub")).token(),
            }
            .filter(|token| !token.is_empty())
        });
        Self { token, ..Self::at(&text("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned())) }
    }
}

/// Without the token, which must not get into a log.
impl fmt::Debug for HubConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let token = self.token.as_ref().map(|_| "(secret)");
        f.debug_struct("HubConfig").field("endpoint", &self.endpoint).field("token", &token).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn config(variables: &[(&str, &str)]) -> HubConfig {
        let variables: BTreeMap<&str, &str> = variables.iter().copied().collect();
        HubConfig::from_variables(&|name| variables.get(name).map(OsString::from))
    }

    #[test]
    fn variables_and_token_files_are_those_of_hugging_face() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().to_str().unwrap();
        assert_eq!(config(&[]), HubConfig::at(ENDPOINT));
        assert_eq!(config(&[("HOME", path)]).token, None);
        let cache = home.path().join(".cache/huggingface");
        std::fs::create_dir_all(&cache).unwrap();
        std::fs::write(cache.join("token"), "hf_file\n").unwrap();
        assert_eq!(config(&[("HOME", path)]).token.as_deref(), Some("hf_file"));
        let here = cache.to_str().unwrap();
        assert_eq!(config(&[("HF_HOME", here)]).token.as_deref(), Some("hf_file"));
        assert_eq!(config(&[("HF_TOKEN", " hf_variable "), ("HOME", path)]).token.as_deref(), Some("hf_variable"));
        assert_eq!(config(&[("HF_TOKEN", ""), ("HOME", path)]).token.as_deref(), Some("hf_file"));
        std::fs::write(home.path().join("own"), "hf_own").unwrap();
        let own = home.path().join("own");
        let own = config(&[("HF_TOKEN_PATH", own.to_str().unwrap()), ("HOME", path)]);
        assert_eq!(own.token.as_deref(), Some("hf_own"));
        assert_eq!(config(&[("HF_ENDPOINT", "https://mirror.example/")]).endpoint, "https://mirror.example");
    }

    #[test]
    fn a_token_is_not_shown() {
        let shown = format!("{:?}", config(&[("HF_TOKEN", "hf_secret")]));
        assert!(!shown.contains("hf_secret"), "{shown}");
    }
}
