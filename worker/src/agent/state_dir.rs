//! The agent's directory on local disk: who this box is, and the work it has in hand.
//!
//! ```text
//! <root>/identity.json        key, certificate, authority, coordinator (0600): one file, so that they always fit together
//! <root>/joining-<token>.key  a key on its way to a certificate; the same key again gets the same worker id
//! <root>/endpoint.secret      lets peers notice a restart at once
//! <root>/lock                 one agent a directory
//! <root>/work/<seat>/         what an executor writes
//! <root>/receiving/           packets under way; emptied at start
//! <root>/inputs/              artifacts brought from the store, by hash; may be removed at any time
//! <root>/outbox/<seat>/       finished, not yet settled: survives everything but the disk
//! ```

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use protocol::identity::JoinToken;
use protocol::ids::{WorkerId, hex, unhex};
use protocol::private_file;
use protocol::quic::certificate::CertificateError;
use protocol::quic::{CertificateFacts, Credentials, EndpointSecret};
use rcgen::{KeyPair, PKCS_ED25519};
use ring::rand::SecureRandom;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

/// Environment variable that names the directory.
pub const STATE_VARIABLE: &str = "BONEPILE_WORKER_STATE";

/// The directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Nothing says where it is.
    #[error("no state directory: neither {STATE_VARIABLE}, XDG_STATE_HOME nor HOME is set")]
    NoDirectory,
    /// A file could not be read or written.
    #[error("could not {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// A file holds something else than it should.
    #[error("{} is damaged: {detail}", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// Another agent uses it.
    #[error("another agent uses {}", path.display())]
    Locked {
        /// Which directory.
        path: PathBuf,
    },
    /// The box has not joined.
    #[error("this box has not joined a cluster: no identity in {}", path.display())]
    NotJoined {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// A key could not be made.
    #[error("could not make a key: {detail}")]
    Key {
        /// Why.
        detail: String,
    },
}

impl StateError {
    /// What a person could do.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::NotJoined { .. } => {
                Some("get a token with `bonepile token create`, then `bonepile-worker join TOKEN` here")
            }
            Self::Damaged { .. } => Some("join again with a new token: `bonepile-worker join --force TOKEN`"),
            Self::Locked { .. } => Some("stop it first, or give this one a --state-dir of its own"),
            Self::NoDirectory => Some("say where with --state-dir"),
            Self::File { .. } | Self::Key { .. } => None,
        }
    }

    fn file<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + use<'a> {
        move |source| Self::File { action, path: path.to_owned(), source }
    }
}

/// The directory.
#[derive(Debug, Clone)]
pub struct StateDir {
    root: PathBuf,
}

/// Held as long as an agent uses a directory.
#[derive(Debug)]
pub struct StateLock(#[expect(dead_code, reason = "the lock goes with the file")] File);

/// Who this box is.
#[derive(Debug)]
pub struct BoxIdentity {
    /// Its worker id.
    pub worker: WorkerId,
    /// Its cluster.
    pub cluster: String,
    /// TLS name of the coordinator.
    pub server_name: String,
    /// Where the coordinator is, `host:port`.
    pub coordinators: Vec<String>,
    /// What it shows and believes.
    pub credentials: Credentials,
    /// What its certificate says.
    pub facts: CertificateFacts,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct IdentityFile {
    worker: WorkerId,
    cluster: String,
    server_name: String,
    coordinators: Vec<String>,
    certificate_der: String,
    key_pkcs8: String,
    authority_der: String,
}

impl StateDir {
    /// `$BONEPILE_WORKER_STATE`, else `$XDG_STATE_HOME/bonepile-worker`, else `~/.local/state/bonepile-worker`.
    ///
    /// # Errors
    /// [`StateError::NoDirectory`].
    pub fn default_path() -> Result<PathBuf, StateError> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        variable(STATE_VARIABLE)
            .or_else(|| variable("XDG_STATE_HOME").map(|state| state.join("bonepile-worker")))
            .or_else(|| variable("HOME").map(|home| home.join(".local/state/bonepile-worker")))
            .ok_or(StateError::NoDirectory)
    }

    /// Makes the directory if it is absent.
    ///
    /// # Errors
    /// [`StateError::File`].
    pub fn open(root: &Path) -> Result<Self, StateError> {
        private_file::create_dir(root).map_err(StateError::file("make", root))?;
        let root = fs::canonicalize(root).map_err(StateError::file("resolve", root))?;
        Ok(Self { root })
    }

    /// Where it is, absolute.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Below it, what executors write.
    pub fn work(&self) -> PathBuf {
        self.root.join("work")
    }

    /// Below it, packets under way.
    pub fn receiving(&self) -> PathBuf {
        self.root.join("receiving")
    }

    /// Below it, artifacts that were brought from the store, by hash.
    pub fn inputs(&self) -> PathBuf {
        self.root.join("inputs")
    }

    /// Below it, finished seats.
    pub fn outbox(&self) -> PathBuf {
        self.root.join("outbox")
    }

    /// Keeps other agents out; the system lets go of it with the process, however that ends.
    ///
    /// # Errors
    /// [`StateError::Locked`].
    pub fn lock(&self) -> Result<StateLock, StateError> {
        let path = self.root.join("lock");
        let file = fs::OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(StateError::file("open", &path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(StateLock(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(StateError::Locked { path: self.root.clone() }),
            Err(error) => Err(StateError::file("lock", &path)(error.into())),
        }
    }

    /// The endpoint's lasting secret, made at first use.
    ///
    /// # Errors
    /// [`StateError::File`], [`StateError::Key`].
    pub fn endpoint_secret(&self) -> Result<EndpointSecret, StateError> {
        let path = self.root.join("endpoint.secret");
        match fs::read(&path).map(<[u8; 64]>::try_from) {
            Ok(Ok(secret)) => return Ok(EndpointSecret(secret)),
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(StateError::file("read", &path)(error));
            }
            // Absent, or of another length: a new one costs peers an idle timeout once.
            _ => {}
        }
        let mut secret = [0; 64];
        ring::rand::SystemRandom::new()
            .fill(&mut secret)
            .map_err(|_| StateError::Key { detail: "the system gave no randomness".to_owned() })?;
        private_file::write(&path, &secret).map_err(StateError::file("write", &path))?;
        Ok(EndpointSecret(secret))
    }

    /// Who this box is.
    ///
    /// # Errors
    /// [`StateError::NotJoined`], [`StateError::Damaged`].
    pub fn identity(&self) -> Result<BoxIdentity, StateError> {
        let path = self.identity_path();
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(StateError::NotJoined { path: self.root.clone() });
            }
            Err(error) => return Err(StateError::file("read", &path)(error)),
        };
        let damaged = |detail: String| StateError::Damaged { path: path.clone(), detail };
        let file: IdentityFile = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        let bytes = |text: &str| unhex(text).ok_or_else(|| damaged("hex digits expected".to_owned()));
        let certificate = bytes(&file.certificate_der)?;
        let facts =
            CertificateFacts::parse(&certificate).map_err(|error: CertificateError| damaged(error.to_string()))?;
        Ok(BoxIdentity {
            worker: file.worker,
            cluster: file.cluster,
            server_name: file.server_name,
            coordinators: file.coordinators,
            credentials: Credentials {
                certificate: certificate.into(),
                key_pkcs8: bytes(&file.key_pkcs8)?,
                authority: bytes(&file.authority_der)?.into(),
            },
            facts,
        })
    }

    /// Keeps an identity, replacing an older one whole.
    ///
    /// # Errors
    /// [`StateError::File`].
    pub fn keep_identity(&self, identity: &BoxIdentity) -> Result<(), StateError> {
        let file = IdentityFile {
            worker: identity.worker,
            cluster: identity.cluster.clone(),
            server_name: identity.server_name.clone(),
            coordinators: identity.coordinators.clone(),
            certificate_der: hex(&identity.credentials.certificate),
            key_pkcs8: hex(&identity.credentials.key_pkcs8),
            authority_der: hex(&identity.credentials.authority),
        };
        let path = self.identity_path();
        let text = serde_json::to_vec_pretty(&file).expect("an identity is plain data");
        private_file::write(&path, &text).map_err(StateError::file("write", &path))
    }

    /// The key with which this box joins by `token`: the same one at every try, as an answer may be lost on the way.
    ///
    /// # Errors
    /// [`StateError::File`], [`StateError::Key`], [`StateError::Damaged`].
    pub fn joining_key(&self, token: &JoinToken) -> Result<KeyPair, StateError> {
        let path = self.joining_key_path(token);
        match fs::read_to_string(&path) {
            Ok(text) => {
                KeyPair::from_pem(&text).map_err(|error| StateError::Damaged { path, detail: error.to_string() })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let key = KeyPair::generate_for(&PKCS_ED25519)
                    .map_err(|error| StateError::Key { detail: error.to_string() })?;
                private_file::write(&path, key.serialize_pem().as_bytes()).map_err(StateError::file("write", &path))?;
                Ok(key)
            }
            Err(error) => Err(StateError::file("read", &path)(error)),
        }
    }

    /// Forgets the joining key: it is in the identity now.
    ///
    /// # Errors
    /// [`StateError::File`].
    pub fn forget_joining_key(&self, token: &JoinToken) -> Result<(), StateError> {
        let path = self.joining_key_path(token);
        private_file::remove_if_present(&path).map_err(StateError::file("remove", &path))
    }

    fn joining_key_path(&self, token: &JoinToken) -> PathBuf {
        // The token's number alone could be another cluster's.
        let name = format!("joining-{}-{}.key", token.token, &hex(&token.authority_spki_sha256)[..16]);
        self.root.join(name)
    }

    fn identity_path(&self) -> PathBuf {
        self.root.join("identity.json")
    }
}

/// Makes `path` an empty directory: what an earlier process left there is of no use.
///
/// # Errors
/// [`StateError::File`].
pub fn make_empty(path: &Path) -> Result<(), StateError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(StateError::file("empty", path)(error)),
        _ => {}
    }
    private_file::create_dir(path).map_err(StateError::file("make", path))
}
