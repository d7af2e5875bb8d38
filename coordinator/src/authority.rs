//! The cluster's authority: its key and certificate on disk, the coordinator's own certificate, and signing workers.
//!
//! Decides about no one: who may have a certificate is the scheduler's to say. Reads no clock: `now` comes in.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use protocol::identity::{
    CertificateRole, ClusterNameError, Identity, check_cluster_name, coordinator_dns_name, sha256,
};
use protocol::ids::WorkerId;
use protocol::private_file;
use protocol::quic::certificate::{CertificateError, spki_sha256, validity};
use protocol::quic::{Credentials, EndpointSecret};
use protocol::time::UnixMillis;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ED25519, PublicKeyData, SanType,
    SerialNumber,
};
use ring::rand::SecureRandom;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};

const DAY: Duration = Duration::from_secs(24 * 3600);
/// Life of the authority's certificate.
const AUTHORITY_LIFE: Duration = Duration::from_secs(3650 * 24 * 3600);
/// Life of the coordinator's certificate; it renews itself at start when a third of it is left.
const COORDINATOR_LIFE: Duration = Duration::from_secs(30 * 24 * 3600);
/// Life of a worker's certificate.
pub const WORKER_LIFE: Duration = Duration::from_secs(7 * 24 * 3600);
/// Certificates begin this long before they are made: clocks of a cluster differ.
const CLOCK_SKEW: Duration = Duration::from_secs(3600);

const DIRECTORY: &str = "authority";
const CA_KEY: &str = "ca.key";
const CA_CERTIFICATE: &str = "ca.pem";
const LEAF_KEY: &str = "coordinator.key";
const LEAF_CERTIFICATE: &str = "coordinator.pem";
const ENDPOINT_SECRET: &str = "endpoint.secret";

/// The authority could not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// The cluster's name cannot stand in certificates.
    #[error(transparent)]
    Name(#[from] ClusterNameError),
    /// There is one already.
    #[error("an authority exists already in {path}")]
    Exists {
        /// Its directory.
        path: PathBuf,
    },
    /// There is none.
    #[error("no authority in {path}; `bonepile init` makes one")]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// A file could not be read or written.
    #[error("could not {action} {path}")]
    File {
        /// `read` or `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// A file holds something else than it should.
    #[error("{path} is damaged: {detail}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// A certificate request does not check.
    #[error("certificate request does not check: {detail}")]
    Request {
        /// What is wrong.
        detail: String,
    },
    /// Signing failed.
    #[error("could not make a certificate")]
    Signing(#[from] rcgen::Error),
    /// A certificate just made or loaded does not parse.
    #[error("certificate of ours does not parse")]
    Certificate(#[from] CertificateError),
    /// The system has no randomness.
    #[error("the system gave no randomness")]
    Randomness,
}

/// The cluster's authority and the coordinator's own credentials.
pub struct Authority {
    cluster: String,
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    leaf: CertificateDer<'static>,
    leaf_key_pkcs8: Vec<u8>,
    endpoint_secret: EndpointSecret,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("cluster", &self.cluster).finish_non_exhaustive()
    }
}

/// A worker's certificate, just signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedWorker {
    /// DER.
    pub certificate: Vec<u8>,
    /// SHA-256 of the worker's public key.
    pub spki_sha256: [u8; 32],
    /// When it ends.
    pub not_after: UnixMillis,
}

impl Authority {
    /// Makes the authority of a new cluster below `state_dir`, readable by this user alone, and the coordinator's
    /// certificate for `names` (DNS names or IP addresses) beside its built-in one.
    ///
    /// # Errors
    /// [`AuthorityError::Exists`] if there is one; it is never overwritten.
    pub fn create(state_dir: &Path, cluster: &str, names: &[String], now: SystemTime) -> Result<Self, AuthorityError> {
        check_cluster_name(cluster)?;
        let directory = state_dir.join(DIRECTORY);
        private_file::create_dir(&directory).map_err(|source| AuthorityError::File {
            action: "write",
            path: directory.clone(),
            source,
        })?;
        if directory.join(CA_CERTIFICATE).exists() {
            return Err(AuthorityError::Exists { path: directory });
        }
        let key = KeyPair::generate_for(&PKCS_ED25519)?;
        let certificate = authority_params(cluster, now)?.self_signed(&key)?;
        write_secret(&directory.join(CA_KEY), key.serialize_pem().as_bytes())?;
        write_secret(&directory.join(ENDPOINT_SECRET), &random::<64>()?)?;
        // The certificate last: its presence says that all of it is there.
        write_secret(&directory.join(CA_CERTIFICATE), certificate.pem().as_bytes())?;
        Self::load(state_dir, names, now)
    }

    /// Loads the authority below `state_dir`. The coordinator's certificate is made anew if it is absent, for other names,
    /// or past two thirds of its life.
    ///
    /// # Errors
    /// [`AuthorityError::Missing`], `File`, `Damaged`.
    pub fn load(state_dir: &Path, names: &[String], now: SystemTime) -> Result<Self, AuthorityError> {
        let directory = state_dir.join(DIRECTORY);
        let path = directory.join(CA_CERTIFICATE);
        if !path.exists() {
            return Err(AuthorityError::Missing { path: directory });
        }
        let certificate = read_certificate(&path)?;
        let cluster = cluster_of(&certificate, &path)?;
        let key_path = directory.join(CA_KEY);
        let key = read_key(&key_path)?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key)
            .map_err(|error| AuthorityError::Damaged { path, detail: error.to_string() })?;
        let secret_path = directory.join(ENDPOINT_SECRET);
        let secret: [u8; 64] = read(&secret_path)?.try_into().map_err(|bytes: Vec<u8>| AuthorityError::Damaged {
            path: secret_path,
            detail: format!("64 bytes expected, {} found", bytes.len()),
        })?;
        let mut authority = Self {
            cluster,
            issuer,
            certificate: certificate.clone(),
            leaf: certificate,
            leaf_key_pkcs8: Vec::new(),
            endpoint_secret: EndpointSecret(secret),
        };
        authority.load_or_renew_leaf(&directory, names, now)?;
        Ok(authority)
    }

    /// Name of the cluster.
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// TLS name of the coordinator.
    pub fn server_name(&self) -> String {
        coordinator_dns_name(&self.cluster)
    }

    /// SHA-256 of the authority's public key: the pin in join tokens.
    ///
    /// # Errors
    /// If its certificate does not parse, which loading has ruled out.
    pub fn spki_sha256(&self) -> Result<[u8; 32], AuthorityError> {
        Ok(spki_sha256(&self.certificate)?)
    }

    /// The authority's certificate, DER.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// What the coordinator's endpoint shows and believes.
    pub fn credentials(&self) -> Credentials {
        Credentials {
            certificate: self.leaf.clone(),
            key_pkcs8: self.leaf_key_pkcs8.clone(),
            authority: self.certificate.clone(),
        }
    }

    /// The endpoint's lasting secret.
    pub fn endpoint_secret(&self) -> &EndpointSecret {
        &self.endpoint_secret
    }

    /// SHA-256 of the public key in a certificate request, after checking that its sender holds the private key.
    ///
    /// # Errors
    /// [`AuthorityError::Request`].
    pub fn request_spki_sha256(csr_der: &[u8]) -> Result<[u8; 32], AuthorityError> {
        Ok(sha256(&parse_request(csr_der)?.public_key.subject_public_key_info()))
    }

    /// Signs a certificate that names `worker`. Of the request only the public key is used: whatever names, usages or
    /// flags it asks for are ignored.
    ///
    /// # Errors
    /// [`AuthorityError::Request`] if the request is not signed by its own key.
    pub fn sign_worker(
        &self,
        csr_der: &[u8],
        worker: WorkerId,
        role: CertificateRole,
        now: SystemTime,
    ) -> Result<SignedWorker, AuthorityError> {
        let public_key = parse_request(csr_der)?.public_key;
        let identity = Identity { cluster: self.cluster.clone(), worker, role };
        let mut params = leaf_params(&identity.to_string(), WORKER_LIFE, now)?;
        params.subject_alt_names = vec![dns(&identity.dns_name())?, uri(&identity.to_string())?];
        let certificate = params.signed_by(&public_key, &self.issuer)?;
        let (_, not_after) = validity(certificate.der())?;
        Ok(SignedWorker {
            certificate: certificate.der().to_vec(),
            spki_sha256: spki_sha256(certificate.der())?,
            not_after,
        })
    }

    fn load_or_renew_leaf(
        &mut self,
        directory: &Path,
        names: &[String],
        now: SystemTime,
    ) -> Result<(), AuthorityError> {
        let (key_path, path) = (directory.join(LEAF_KEY), directory.join(LEAF_CERTIFICATE));
        let mut wanted = vec![self.server_name()];
        wanted.extend(names.iter().cloned());
        if path.exists() && key_path.exists() {
            let leaf = read_certificate(&path)?;
            let (not_before, not_after) = validity(&leaf)?;
            let (life, left) = (not_after.since_ms(not_before), not_after.since_ms(now.into()));
            if left > life / 3 && not_before <= now.into() && names_of(&leaf) == wanted {
                self.leaf_key_pkcs8 = read_key(&key_path)?.serialize_der();
                self.leaf = leaf;
                return Ok(());
            }
        }
        let key = KeyPair::generate_for(&PKCS_ED25519)?;
        let mut params = leaf_params("bonepile coordinator", COORDINATOR_LIFE, now)?;
        params.subject_alt_names = CertificateParams::new(wanted)?.subject_alt_names;
        let certificate = params.signed_by(&key, &self.issuer)?;
        // Key first: a certificate without its key would be found and believed, a key without certificate is made anew.
        private_file::remove_if_present(&path).map_err(|source| AuthorityError::File {
            action: "write",
            path: path.clone(),
            source,
        })?;
        write_secret(&key_path, key.serialize_pem().as_bytes())?;
        write_secret(&path, certificate.pem().as_bytes())?;
        self.leaf = certificate.der().clone();
        self.leaf_key_pkcs8 = key.serialize_der();
        Ok(())
    }
}

fn parse_request(csr_der: &[u8]) -> Result<CertificateSigningRequestParams, AuthorityError> {
    CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(csr_der))
        .map_err(|error| AuthorityError::Request { detail: error.to_string() })
}

fn authority_params(cluster: &str, now: SystemTime) -> Result<CertificateParams, AuthorityError> {
    let mut params = leaf_params(&authority_name(cluster), AUTHORITY_LIFE, now)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.extended_key_usages = Vec::new();
    Ok(params)
}

fn leaf_params(common_name: &str, life: Duration, now: SystemTime) -> Result<CertificateParams, AuthorityError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(DAY);
    params.not_before = epoch + since.saturating_sub(CLOCK_SKEW);
    params.not_after = epoch + (since + life);
    let mut serial = random::<16>()?;
    // A serial number is positive and not empty: its first bit is off, its first byte not zero.
    serial[0] = serial[0] & 0x7f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // Workers serve and dial each other, the coordinator may too one day: both usages.
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    Ok(params)
}

const AUTHORITY_NAME: &str = "bonepile authority of ";

fn authority_name(cluster: &str) -> String {
    format!("{AUTHORITY_NAME}{cluster}")
}

/// The cluster's name, kept nowhere but in the authority's own certificate.
fn cluster_of(certificate: &CertificateDer<'_>, path: &Path) -> Result<String, AuthorityError> {
    let damaged = |detail: &str| AuthorityError::Damaged { path: path.to_owned(), detail: detail.to_owned() };
    let subject = protocol::quic::certificate::common_name(certificate)?;
    let cluster = subject
        .as_deref()
        .and_then(|name| name.strip_prefix(AUTHORITY_NAME))
        .ok_or_else(|| damaged("its subject is not a bonepile authority"))?;
    check_cluster_name(cluster)?;
    Ok(cluster.to_owned())
}

fn names_of(certificate: &CertificateDer<'_>) -> Vec<String> {
    protocol::quic::certificate::host_names(certificate).unwrap_or_default()
}

fn dns(name: &str) -> Result<SanType, AuthorityError> {
    Ok(SanType::DnsName(name.try_into()?))
}

fn uri(name: &str) -> Result<SanType, AuthorityError> {
    Ok(SanType::URI(name.try_into()?))
}

/// `N` random bytes of the system.
///
/// # Errors
/// [`AuthorityError::Randomness`].
pub fn random<const N: usize>() -> Result<[u8; N], AuthorityError> {
    let mut bytes = [0; N];
    ring::rand::SystemRandom::new().fill(&mut bytes).map_err(|_| AuthorityError::Randomness)?;
    Ok(bytes)
}

fn read(path: &Path) -> Result<Vec<u8>, AuthorityError> {
    fs::read(path).map_err(|source| AuthorityError::File { action: "read", path: path.to_owned(), source })
}

fn read_certificate(path: &Path) -> Result<CertificateDer<'static>, AuthorityError> {
    CertificateDer::from_pem_slice(&read(path)?)
        .map_err(|error| AuthorityError::Damaged { path: path.to_owned(), detail: error.to_string() })
}

fn read_key(path: &Path) -> Result<KeyPair, AuthorityError> {
    let damaged = |detail: String| AuthorityError::Damaged { path: path.to_owned(), detail };
    let text = String::from_utf8(read(path)?).map_err(|error| damaged(error.to_string()))?;
    KeyPair::from_pem(&text).map_err(|error| damaged(error.to_string()))
}

fn write_secret(path: &Path, bytes: &[u8]) -> Result<(), AuthorityError> {
    private_file::write(path, bytes).map_err(|source| AuthorityError::File {
        action: "write",
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use protocol::quic::CertificateFacts;

    use super::*;

    fn at(days: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + DAY * u32::try_from(20_000 + days).unwrap()
    }

    fn csr(params: &CertificateParams) -> Vec<u8> {
        let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
        params.serialize_request(&key).unwrap().der().to_vec()
    }

    #[test]
    fn an_authority_is_made_once_and_loads_again() {
        let state = tempfile::tempdir().unwrap();
        assert!(matches!(Authority::load(state.path(), &[], at(0)), Err(AuthorityError::Missing { .. })));
        let made = Authority::create(state.path(), "lab", &[], at(0)).unwrap();
        let loaded = Authority::load(state.path(), &[], at(1)).unwrap();
        assert_eq!(loaded.cluster(), "lab");
        assert_eq!(loaded.spki_sha256().unwrap(), made.spki_sha256().unwrap());
        assert_eq!(loaded.leaf, made.leaf);
        assert_eq!(loaded.endpoint_secret().0, made.endpoint_secret().0);
        assert!(matches!(Authority::create(state.path(), "lab", &[], at(1)), Err(AuthorityError::Exists { .. })));
        for entry in fs::read_dir(state.path().join(DIRECTORY)).unwrap() {
            let entry = entry.unwrap();
            let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
            assert_eq!(mode, 0o600, "{:?}", entry.path());
        }
    }

    #[test]
    fn the_coordinators_certificate_renews_itself() {
        let state = tempfile::tempdir().unwrap();
        let made = Authority::create(state.path(), "lab", &[], at(0)).unwrap();
        assert_eq!(Authority::load(state.path(), &[], at(19)).unwrap().leaf, made.leaf);
        let renewed = Authority::load(state.path(), &[], at(21)).unwrap();
        assert_ne!(renewed.leaf, made.leaf);
        let named = Authority::load(state.path(), &["bones.example".into()], at(21)).unwrap();
        assert_ne!(named.leaf, renewed.leaf);
    }

    #[test]
    fn a_request_gets_only_what_the_authority_says() {
        let state = tempfile::tempdir().unwrap();
        let authority = Authority::create(state.path(), "lab", &[], at(0)).unwrap();
        let mut greedy = CertificateParams::new(vec!["coordinator.lab.bonepile.internal".into()]).unwrap();
        greedy.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        greedy.subject_alt_names.push(uri("bonepile://lab/worker/w1?role=worker").unwrap());
        let csr = csr(&greedy);
        let signed = authority.sign_worker(&csr, WorkerId(7), CertificateRole::Worker, at(0)).unwrap();
        let facts = CertificateFacts::parse(&signed.certificate).unwrap();
        assert_eq!(facts.identity.to_string(), "bonepile://lab/worker/w7?role=worker");
        assert_eq!(facts.spki_sha256, Authority::request_spki_sha256(&csr).unwrap());
        assert_eq!(facts.not_after.since_ms(facts.not_before), (7 * 24 + 1) * 3_600_000);
        let der = CertificateDer::from(signed.certificate);
        assert_eq!(names_of(&der), ["w7.worker.lab.bonepile.internal"]);
        let again = authority.sign_worker(&csr, WorkerId(7), CertificateRole::Worker, at(0)).unwrap();
        assert_ne!(again.certificate, der.to_vec(), "serial numbers are random");
    }

    #[test]
    fn a_request_signed_by_another_key_is_refused() {
        let state = tempfile::tempdir().unwrap();
        let authority = Authority::create(state.path(), "lab", &[], at(0)).unwrap();
        let mut csr = csr(&CertificateParams::default());
        let last = csr.len() - 1;
        csr[last] ^= 1;
        let refused = authority.sign_worker(&csr, WorkerId(1), CertificateRole::Worker, at(0));
        assert!(matches!(refused, Err(AuthorityError::Request { .. })), "{refused:?}");
    }

    #[test]
    fn damage_names_the_file() {
        let state = tempfile::tempdir().unwrap();
        Authority::create(state.path(), "lab", &[], at(0)).unwrap();
        fs::write(state.path().join(DIRECTORY).join(CA_KEY), "nonsense").unwrap();
        let error = Authority::load(state.path(), &[], at(0)).unwrap_err();
        assert!(error.to_string().contains("ca.key is damaged"), "{error}");
    }
}
