//! Who is who: join tokens, proofs of knowing one, and the names in certificates.
//!
//! Pure: makes no randomness, reads no clock, parses no X.509 ([`crate::quic`] does). Secrets show themselves in no `Debug`.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::{digest, hmac};

use crate::ids::{TokenId, WorkerId, hex};

/// Every join token begins so; the digit is the version of the layout behind it.
pub const TOKEN_PREFIX: &str = "bpt1.";
/// Label under which both sides export keying material for the proof; the context is the token id, 8 bytes LE.
pub const PROOF_LABEL: &[u8] = b"EXPORTER-bonepile-join";
/// Bytes of exported keying material.
pub const EXPORTER_BYTES: usize = 32;
/// Longest name of a cluster, characters: it is a label of a DNS name.
pub const CLUSTER_NAME_CHARS_MAX: usize = 40;
/// Most coordinator addresses in a token.
const ADDRESSES_MAX: usize = 16;
const CHECKSUM_BYTES: usize = 4;

/// The name of a cluster: 1–40 of `a–z`, `0–9` and inner `-`, so that it can stand in DNS names and URIs.
///
/// # Errors
/// [`ClusterNameError`] with the name.
pub fn check_cluster_name(name: &str) -> Result<(), ClusterNameError> {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let good = (1..=CLUSTER_NAME_CHARS_MAX).contains(&name.len())
        && name.chars().all(inner)
        && !name.starts_with('-')
        && !name.ends_with('-');
    if good { Ok(()) } else { Err(ClusterNameError { name: name.to_owned() }) }
}

/// A name that no cluster can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` is not a cluster name: 1 to {CLUSTER_NAME_CHARS_MAX} of a-z, 0-9 and inner hyphens")]
pub struct ClusterNameError {
    /// What was given.
    pub name: String,
}

/// The secret of a join token. Printed once, inside the token; the coordinator keeps only its [`SecretHash`].
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub [u8; 32]);

impl Secret {
    /// What the coordinator stores.
    pub fn hash(&self) -> SecretHash {
        SecretHash(sha256(&self.0))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// SHA-256 of a token's secret: the key of the proof, so as secret as the token while the token is open.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SecretHash(pub [u8; 32]);

impl fmt::Debug for SecretHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretHash(…)")
    }
}

impl SecretHash {
    /// Proves knowledge of the secret on the channel that `exporter` comes from; worthless on any other.
    pub fn proof(&self, exporter: &[u8; EXPORTER_BYTES]) -> [u8; 32] {
        let tag = hmac::sign(&self.key(), exporter);
        tag.as_ref().try_into().expect("an HMAC-SHA256 has 32 bytes")
    }

    /// Checks a proof in constant time.
    pub fn verify(&self, exporter: &[u8; EXPORTER_BYTES], proof: &[u8; 32]) -> bool {
        hmac::verify(&self.key(), exporter, proof).is_ok()
    }

    fn key(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &self.0)
    }
}

/// SHA-256 of `bytes`.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    digest::digest(&digest::SHA256, bytes).as_ref().try_into().expect("a SHA-256 has 32 bytes")
}

/// The start of a fingerprint for people: `3f9a1c…`, 16 digits.
pub fn short_fingerprint(sha256: &[u8; 32]) -> String {
    format!("{}…", &hex(sha256)[..16])
}

/// What a box needs to join: one line, safe to copy, `bpt1.` and base64url.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// Where the coordinator listens, `host:port`, best first. Not empty.
    pub coordinators: Vec<String>,
    /// Name of the cluster.
    pub cluster: String,
    /// SHA-256 of the cluster authority's SubjectPublicKeyInfo: the only authority the box will believe.
    pub authority_spki_sha256: [u8; 32],
    /// Name of the token.
    pub token: TokenId,
    /// Its secret.
    pub secret: Secret,
}

/// A text is not a join token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It begins otherwise.
    #[error("a join token begins with `{TOKEN_PREFIX}`, this text does not")]
    Prefix,
    /// A token of another version.
    #[error("this token is of layout `{prefix}`, this build reads `{TOKEN_PREFIX}`")]
    Version {
        /// What it begins with.
        prefix: String,
    },
    /// A character that base64url does not have.
    #[error("character {position} of the token, `{found}`, cannot stand in a token")]
    Character {
        /// From 1, in the text as given (outer white space aside).
        position: usize,
        /// The character.
        found: char,
    },
    /// Cut short, or a character changed.
    #[error("the token is damaged: {detail}")]
    Damaged {
        /// What does not fit.
        detail: &'static str,
    },
}

impl TokenError {
    /// What to try.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Prefix => "copy the whole line that `bonepile token create` printed",
            Self::Version { .. } => "use the same version of bonepile on the coordinator and on this box",
            Self::Character { .. } | Self::Damaged { .. } => {
                "copy the line that `bonepile token create` printed once more, whole and unbroken"
            }
        }
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = Vec::with_capacity(160);
        let count = self.coordinators.len().min(ADDRESSES_MAX);
        bytes.push(u8::try_from(count).map_err(|_| fmt::Error)?);
        for text in self.coordinators.iter().take(count).chain([&self.cluster]) {
            bytes.push(u8::try_from(text.len()).map_err(|_| fmt::Error)?);
            bytes.extend_from_slice(text.as_bytes());
        }
        bytes.extend_from_slice(&self.authority_spki_sha256);
        bytes.extend_from_slice(&self.token.0.to_le_bytes());
        bytes.extend_from_slice(&self.secret.0);
        let sum = checksum(&bytes);
        bytes.extend_from_slice(&sum);
        write!(f, "{TOKEN_PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        let Some(body) = text.strip_prefix(TOKEN_PREFIX) else {
            return Err(match text.split_once('.') {
                Some((name, _)) if is_token_prefix(name) => TokenError::Version { prefix: format!("{name}.") },
                _ => TokenError::Prefix,
            });
        };
        let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if let Some((index, found)) = body.chars().enumerate().find(|(_, c)| !allowed(*c)) {
            return Err(TokenError::Character { position: TOKEN_PREFIX.len() + index + 1, found });
        }
        let damaged = |detail| TokenError::Damaged { detail };
        let bytes = URL_SAFE_NO_PAD.decode(body).map_err(|_| damaged("its length is impossible"))?;
        let (content, sum) = bytes
            .len()
            .checked_sub(CHECKSUM_BYTES)
            .map(|at| bytes.split_at(at))
            .ok_or_else(|| damaged("it is too short"))?;
        if checksum(content) != sum {
            return Err(damaged("its checksum does not fit"));
        }
        Self::from_content(content).ok_or_else(|| damaged("its parts do not fit"))
    }
}

impl JoinToken {
    fn from_content(content: &[u8]) -> Option<Self> {
        let mut reader = Reader(content);
        let count = usize::from(reader.byte()?);
        if count == 0 || count > ADDRESSES_MAX {
            return None;
        }
        let coordinators = (0..count).map(|_| reader.text()).collect::<Option<Vec<_>>>()?;
        let cluster = reader.text()?;
        check_cluster_name(&cluster).ok()?;
        let token = Self {
            coordinators,
            cluster,
            authority_spki_sha256: reader.array()?,
            token: TokenId(u64::from_le_bytes(reader.array()?)),
            secret: Secret(reader.array()?),
        };
        reader.0.is_empty().then_some(token)
    }
}

fn is_token_prefix(name: &str) -> bool {
    name.strip_prefix("bpt").is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()))
}

fn checksum(content: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let hash = blake3::hash(content);
    *hash.as_bytes().first_chunk().expect("a hash is longer than a checksum")
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    fn byte(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn text(&mut self) -> Option<String> {
        let length = usize::from(self.byte()?);
        let (head, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        String::from_utf8(head.to_vec()).ok()
    }
}

/// What a certificate allows its holder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum CertificateRole {
    /// A box of the cluster.
    Worker,
    /// A rented box: a worker with a short certificate.
    Burst,
}

impl CertificateRole {
    /// As it stands in a certificate.
    pub fn name(self) -> &'static str {
        match self {
            Self::Worker => "worker",
            Self::Burst => "burst",
        }
    }
}

/// Who a certificate says its holder is: the URI `bonepile://<cluster>/worker/<id>?role=<role>` among its names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Name of the cluster.
    pub cluster: String,
    /// The worker.
    pub worker: WorkerId,
    /// What it may do.
    pub role: CertificateRole,
}

/// A certificate's URI names nobody of bonepile's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{uri}` is not bonepile://<cluster>/worker/<id>?role=<worker or burst>")]
pub struct IdentityError {
    /// The URI.
    pub uri: String,
}

impl Identity {
    /// The DNS name under which peers dial this worker.
    pub fn dns_name(&self) -> String {
        worker_dns_name(&self.cluster, self.worker)
    }
}

/// The DNS name of a worker's certificate: `w3.worker.<cluster>.bonepile.internal`.
pub fn worker_dns_name(cluster: &str, worker: WorkerId) -> String {
    format!("{worker}.worker.{cluster}.bonepile.internal")
}

/// The DNS name of the coordinator's certificate: `coordinator.<cluster>.bonepile.internal`.
pub fn coordinator_dns_name(cluster: &str) -> String {
    format!("coordinator.{cluster}.bonepile.internal")
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bonepile://{}/worker/{}?role={}", self.cluster, self.worker, self.role.name())
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(uri: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (cluster, rest) = uri.strip_prefix("bonepile://")?.split_once("/worker/")?;
            let (worker, role) = rest.split_once("?role=")?;
            check_cluster_name(cluster).ok()?;
            let role =
                [CertificateRole::Worker, CertificateRole::Burst].into_iter().find(|known| known.name() == role)?;
            Some(Self { cluster: cluster.to_owned(), worker: worker.parse().ok()?, role })
        };
        parse().ok_or_else(|| IdentityError { uri: uri.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn token() -> JoinToken {
        JoinToken {
            coordinators: vec!["127.0.0.1:7117".into(), "bones.example:7117".into()],
            cluster: "lab-1".into(),
            authority_spki_sha256: [7; 32],
            token: TokenId(3),
            secret: Secret([9; 32]),
        }
    }

    #[test]
    fn a_token_round_trips_and_survives_white_space() {
        let text = token().to_string();
        assert!(text.starts_with(TOKEN_PREFIX));
        assert_eq!(text.parse::<JoinToken>().unwrap(), token());
        assert_eq!(format!("  {text}\n").parse::<JoinToken>().unwrap(), token());
    }

    #[test]
    fn a_mangled_token_says_what_is_wrong() {
        let text = token().to_string();
        assert_eq!("hello".parse::<JoinToken>(), Err(TokenError::Prefix));
        assert_eq!("bpt2.abc".parse::<JoinToken>(), Err(TokenError::Version { prefix: "bpt2.".into() }));
        let (head, tail) = text.split_at(20);
        assert_eq!(
            format!("{head} {tail}").parse::<JoinToken>(),
            Err(TokenError::Character { position: 21, found: ' ' })
        );
        assert!(matches!(text[..text.len() - 3].parse::<JoinToken>(), Err(TokenError::Damaged { .. })));
        assert!(matches!(TOKEN_PREFIX.parse::<JoinToken>(), Err(TokenError::Damaged { .. })));
    }

    #[test]
    fn a_secret_is_never_shown() {
        let shown = format!("{:?} {:?}", token(), token().secret.hash());
        assert!(!shown.contains("9, 9"), "{shown}");
    }

    #[test]
    fn a_proof_holds_for_its_channel_only() {
        let hash = token().secret.hash();
        let proof = hash.proof(&[1; 32]);
        assert!(hash.verify(&[1; 32], &proof));
        assert!(!hash.verify(&[2; 32], &proof));
        assert!(!Secret([8; 32]).hash().verify(&[1; 32], &proof));
    }

    #[test]
    fn identities_round_trip_through_uris() {
        let identity = Identity { cluster: "lab".into(), worker: WorkerId(3), role: CertificateRole::Burst };
        assert_eq!(identity.to_string(), "bonepile://lab/worker/w3?role=burst");
        assert_eq!(identity.to_string().parse::<Identity>().unwrap(), identity);
        for bad in [
            "https://lab/worker/w3?role=worker",
            "bonepile://lab/worker/3?role=worker",
            "bonepile://lab/worker/w3",
            "bonepile://lab/worker/w3?role=root",
            "bonepile://Lab/worker/w3?role=worker",
            "bonepile:///worker/w3?role=worker",
            "bonepile://lab/worker/w3?role=worker&role=burst",
        ] {
            assert!(bad.parse::<Identity>().is_err(), "{bad}");
        }
    }

    #[test]
    fn cluster_names_are_dns_labels() {
        for good in ["a", "lab-1", "0"] {
            check_cluster_name(good).unwrap();
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a/b", &"a".repeat(41)] {
            assert!(check_cluster_name(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn one_changed_character_is_noticed(at in 0usize..200, to in "[A-Za-z0-9_-]") {
            let text = token().to_string();
            let at = TOKEN_PREFIX.len() + at % (text.len() - TOKEN_PREFIX.len());
            let mut mangled = text.clone();
            mangled.replace_range(at..=at, &to);
            prop_assume!(mangled != text);
            prop_assert!(mangled.parse::<JoinToken>().is_err());
        }

        #[test]
        fn parsing_a_token_never_panics(text in "bpt1\\.[A-Za-z0-9_-]{0,300}") {
            let _ = text.parse::<JoinToken>();
        }
    }
}
