//! Believing one authority by the fingerprint of its key: how a joining box checks the coordinator with nothing but a token.
//!
//! The fingerprint only chooses the trust anchor out of the chain shown; leaf, name, time and signature are then checked as
//! in any other handshake. There is no way to go on after a mismatch.

use std::sync::Arc;
use std::time::Duration;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};

use super::certificate::spki_sha256;
use crate::identity::short_fingerprint;
use crate::time::Human;

/// Start of the text with which a handshake fails whose chain lacks the pinned authority.
pub const PIN_MISMATCH: &str = "the coordinator is not of the cluster that made this token";

/// Verifies servers against the one authority with a given fingerprint.
#[derive(Debug)]
pub struct PinnedAuthority {
    spki_sha256: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl PinnedAuthority {
    /// Believes only the authority whose public key has this SHA-256.
    pub fn new(spki_sha256: [u8; 32], provider: Arc<CryptoProvider>) -> Self {
        Self { spki_sha256, provider }
    }
}

/// Start of the text with which a handshake fails for a certificate outside its time.
pub const CLOCK: &str = "this box's clock";

/// A coordinator renews its certificate by itself, so one outside its time nearly always means a dead clock battery here.
fn name_the_clock(error: Error, now: UnixTime) -> Error {
    let apart = |seconds| Human(Duration::from_secs(seconds));
    match &error {
        Error::InvalidCertificate(CertificateError::NotValidYetContext { not_before, .. }) => {
            let apart = apart(not_before.as_secs().saturating_sub(now.as_secs()));
            Error::General(format!("{CLOCK} is {apart} behind the start of the coordinator's certificate"))
        }
        Error::InvalidCertificate(CertificateError::ExpiredContext { not_after, .. }) => {
            let apart = apart(now.as_secs().saturating_sub(not_after.as_secs()));
            Error::General(format!("{CLOCK} is {apart} past the end of the coordinator's certificate"))
        }
        _ => error,
    }
}

impl ServerCertVerifier for PinnedAuthority {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let pinned = |certificate: &&CertificateDer<'_>| {
            spki_sha256(certificate.as_ref()).is_ok_and(|found| found == self.spki_sha256)
        };
        let Some(anchor) = intermediates.iter().find(pinned) else {
            let shown = intermediates.last().unwrap_or(end_entity);
            let shown = spki_sha256(shown.as_ref()).map_or_else(|error| error.to_string(), |f| short_fingerprint(&f));
            let expected = short_fingerprint(&self.spki_sha256);
            return Err(Error::General(format!("{PIN_MISMATCH}: authority {expected} expected, {shown} shown")));
        };
        let mut roots = RootCertStore::empty();
        roots.add(anchor.clone().into_owned())?;
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider))
            .build()
            .map_err(|error| Error::General(error.to_string()))?
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
            .map_err(|error| name_the_clock(error, now))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
