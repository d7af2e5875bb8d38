//! `cluster.toml`: the coordinator's settings, parsed from text. Does not read files or the environment.
//!
//! Every key has a default but `cluster.name`; `cluster.toml.example` at the root shows them all.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::error::SourceError;
use crate::limits;
use crate::source::{Source, TableReader};

/// UDP port of the coordinator unless `coordinator.listen` says another.
pub const DEFAULT_PORT: u16 = 4717;

/// Settings of a cluster. Paths are absolute: relative ones in the file are taken from its directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterConfig {
    /// `cluster.name`: 1–40 of a–z, 0–9 and `-`; part of certificates.
    pub name: String,
    /// `coordinator.listen`: UDP address for workers. Default `[::]:4717`.
    pub listen: String,
    /// `coordinator.advertise`: addresses put into join tokens, `host:port` each. Default: the listening address if it is
    /// not a wildcard, else this host's name.
    pub advertise: Vec<String>,
    /// `coordinator.state_dir`: keys and journal; local disk, never NFS. Default `state`.
    pub state_dir: PathBuf,
    /// `coordinator.api_socket`: unix socket of the HTTP API. Default `state/api.sock`.
    pub api_socket: PathBuf,
    /// `store.path`: the results store. Default `store`.
    pub store_path: PathBuf,
    /// `scheduling.lease_ttl_ms`: an attempt whose worker is silent for this long is given up; 5000–3600000.
    pub lease_ttl_ms: u64,
    /// `scheduling.attempts_max`: tries of a shard before it fails for good; 1–100.
    pub attempts_max: u32,
    /// `[accounts]`: shares of the cluster by account, 1 to 1000; who is not named has 1.
    pub weights: BTreeMap<String, u32>,
}

impl ClusterConfig {
    /// Reads settings from `text`. `file` names it in complaints and, with `directory`, anchors relative paths.
    ///
    /// # Errors
    /// The first thing wrong, with its place.
    pub fn parse(file: &str, directory: &Path, text: &str) -> Result<Self, SourceError> {
        let source = Source { file, text };
        let table = source.parse()?;
        let mut root = TableReader::root(source, &table);
        let name = match root.table("cluster")? {
            Some(mut cluster) => {
                let name: String = cluster.required("name")?;
                if !is_name(&name) {
                    return Err(cluster.complain("name", "expected 1 to 40 of a-z, 0-9 and -"));
                }
                cluster.finish()?;
                name
            }
            None => return Err(root.complain("cluster", "missing; expected a table [cluster] with a name")),
        };
        let mut config = Self {
            name,
            listen: format!("[::]:{DEFAULT_PORT}"),
            advertise: Vec::new(),
            state_dir: directory.join("state"),
            api_socket: PathBuf::new(),
            store_path: directory.join("store"),
            lease_ttl_ms: limits::LEASE_TTL_MS,
            attempts_max: limits::ATTEMPTS_PER_SHARD_MAX,
            weights: BTreeMap::new(),
        };
        if let Some(mut coordinator) = root.table("coordinator")? {
            config.read_coordinator(&mut coordinator, directory)?;
            coordinator.finish()?;
        }
        if config.api_socket.as_os_str().is_empty() {
            config.api_socket = config.state_dir.join("api.sock");
        }
        if let Some(mut store) = root.table("store")? {
            if let Some(path) = store.optional::<String>("path")? {
                config.store_path = directory.join(path);
            }
            store.finish()?;
        }
        if let Some(mut scheduling) = root.table("scheduling")? {
            config.lease_ttl_ms = scheduling.number("lease_ttl_ms", 5_000..=3_600_000, Some(config.lease_ttl_ms))?;
            let attempts = scheduling.number("attempts_max", 1..=100, Some(u64::from(config.attempts_max)))?;
            config.attempts_max = u32::try_from(attempts).expect("the range ends at 100");
            scheduling.finish()?;
        }
        if let Some(mut accounts) = root.table("accounts")? {
            for name in accounts.keys() {
                let weight = accounts.plain(name)?.unwrap_or_default();
                let weight = weight.parse().ok().filter(|weight| (1..=1000).contains(weight));
                let weight = weight.ok_or_else(|| accounts.complain(name, "expected a whole number from 1 to 1000"))?;
                config.weights.insert(name.to_owned(), weight);
            }
        }
        root.finish()?;
        Ok(config)
    }

    fn read_coordinator(&mut self, table: &mut TableReader<'_>, directory: &Path) -> Result<(), SourceError> {
        if let Some(listen) = table.optional::<String>("listen")? {
            if listen.parse::<std::net::SocketAddr>().is_err() {
                return Err(table
                    .complain("listen", format!("`{listen}` is not an address with a port"))
                    .hint(format!("for example \"0.0.0.0:{DEFAULT_PORT}\" or \"[::]:{DEFAULT_PORT}\"")));
            }
            self.listen = listen;
        }
        if let Some(advertise) = table.optional::<Vec<String>>("advertise")? {
            if let Some(bad) = advertise.iter().find(|address| !is_host_port(address)) {
                return Err(table.complain("advertise", format!("`{bad}` is not host:port")));
            }
            self.advertise = advertise;
        }
        if let Some(path) = table.optional::<String>("state_dir")? {
            self.state_dir = directory.join(path);
        }
        if let Some(path) = table.optional::<String>("api_socket")? {
            self.api_socket = directory.join(path);
        }
        Ok(())
    }
}

fn is_name(name: &str) -> bool {
    (1..=40).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

fn is_host_port(address: &str) -> bool {
    address.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|p| p > 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ClusterConfig, SourceError> {
        ClusterConfig::parse("cluster.toml", Path::new("/etc/bonepile"), text)
    }

    #[test]
    fn only_the_name_is_needed() {
        let config = parse("[cluster]\nname = \"lab-1\"\n").unwrap();
        assert_eq!(config.api_socket, Path::new("/etc/bonepile/state/api.sock"));
        assert_eq!(config.store_path, Path::new("/etc/bonepile/store"));
        assert_eq!(config.listen, "[::]:4717");
    }

    #[test]
    fn complaints_name_place_and_hint() {
        let complaint = |text: &str| parse(text).unwrap_err().to_string();
        assert_eq!(
            complaint("[cluster]\nname = \"Lab\"\n"),
            "cluster.toml:2:8: key \"cluster.name\": expected 1 to 40 of a-z, 0-9 and -"
        );
        assert_eq!(
            complaint("[cluster]\nname = \"lab\"\n[coordinator]\nlisten = \"4717\"\n"),
            "cluster.toml:4:10: key \"coordinator.listen\": `4717` is not an address with a port"
        );
        assert_eq!(
            complaint("[cluster]\nname = \"lab\"\n[sheduling]\n"),
            "cluster.toml:3:2: key \"sheduling\": unknown key; expected one of cluster, coordinator, store, scheduling, accounts"
        );
        assert!(complaint("").contains("missing; expected a table [cluster]"));
        assert!(complaint("[cluster]\nname = \"lab\"\n[scheduling]\nlease_ttl_ms = 10\n").contains("5000 to 3600000"));
    }
}
