//! What a certificate says about its holder: names, key, end. Checks no signature: TLS has done that before.

use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::identity::{Identity, IdentityError, sha256};
use crate::time::UnixMillis;

/// A certificate could not be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// Not X.509.
    #[error("not an X.509 certificate: {detail}")]
    Malformed {
        /// What the parser says.
        detail: String,
    },
    /// It names no worker of any cluster.
    #[error("the certificate has no bonepile:// name")]
    NoIdentity,
    /// It names several.
    #[error("the certificate has {count} bonepile:// names instead of one")]
    ManyIdentities {
        /// How many.
        count: usize,
    },
    /// Its name is wrong.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// The facts of a member's certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateFacts {
    /// Who.
    pub identity: Identity,
    /// SHA-256 of its public key (SubjectPublicKeyInfo, DER).
    pub spki_sha256: [u8; 32],
    /// Valid from.
    pub not_before: UnixMillis,
    /// Valid until.
    pub not_after: UnixMillis,
}

impl CertificateFacts {
    /// Reads a worker's certificate.
    ///
    /// # Errors
    /// If it is not one, or names not exactly one worker.
    pub fn parse(der: &[u8]) -> Result<Self, CertificateError> {
        let certificate = parse(der)?;
        let names = certificate.subject_alternative_name().map_err(|error| malformed(&error))?;
        let uris: Vec<&str> = names
            .iter()
            .flat_map(|names| &names.value.general_names)
            .filter_map(|name| match name {
                GeneralName::URI(uri) if uri.starts_with("bonepile://") => Some(*uri),
                _ => None,
            })
            .collect();
        let identity = match uris[..] {
            [] => return Err(CertificateError::NoIdentity),
            [uri] => uri.parse()?,
            _ => return Err(CertificateError::ManyIdentities { count: uris.len() }),
        };
        Ok(Self {
            identity,
            spki_sha256: sha256(certificate.public_key().raw),
            not_before: millis(certificate.validity().not_before.timestamp()),
            not_after: millis(certificate.validity().not_after.timestamp()),
        })
    }
}

/// SHA-256 of a certificate's SubjectPublicKeyInfo.
///
/// # Errors
/// [`CertificateError::Malformed`].
pub fn spki_sha256(der: &[u8]) -> Result<[u8; 32], CertificateError> {
    Ok(sha256(parse(der)?.public_key().raw))
}

/// From when until when a certificate is valid.
///
/// # Errors
/// [`CertificateError::Malformed`].
pub fn validity(der: &[u8]) -> Result<(UnixMillis, UnixMillis), CertificateError> {
    let certificate = parse(der)?;
    let validity = certificate.validity();
    Ok((millis(validity.not_before.timestamp()), millis(validity.not_after.timestamp())))
}

/// The common name of a certificate's subject, if it has one.
///
/// # Errors
/// [`CertificateError::Malformed`].
pub fn common_name(der: &[u8]) -> Result<Option<String>, CertificateError> {
    let certificate = parse(der)?;
    let name = certificate.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
    Ok(name.map(str::to_owned))
}

/// The DNS names and IP addresses of a certificate, in its order.
///
/// # Errors
/// [`CertificateError::Malformed`].
pub fn host_names(der: &[u8]) -> Result<Vec<String>, CertificateError> {
    let certificate = parse(der)?;
    let names = certificate.subject_alternative_name().map_err(|error| malformed(&error))?;
    let names = names.iter().flat_map(|names| &names.value.general_names);
    Ok(names
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            GeneralName::IPAddress(bytes) => address(bytes),
            _ => None,
        })
        .collect())
}

fn address(bytes: &[u8]) -> Option<String> {
    let four = <[u8; 4]>::try_from(bytes).map(|bytes| std::net::IpAddr::from(bytes).to_string());
    four.or_else(|_| <[u8; 16]>::try_from(bytes).map(|bytes| std::net::IpAddr::from(bytes).to_string())).ok()
}

fn parse(der: &[u8]) -> Result<X509Certificate<'_>, CertificateError> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok((rest, _)) => Err(malformed(&format!("{} bytes behind it", rest.len()))),
        Err(error) => Err(malformed(&error)),
    }
}

fn malformed(detail: &impl ToString) -> CertificateError {
    CertificateError::Malformed { detail: detail.to_string() }
}

fn millis(seconds: i64) -> UnixMillis {
    UnixMillis(u64::try_from(seconds).unwrap_or(0).saturating_mul(1000))
}
