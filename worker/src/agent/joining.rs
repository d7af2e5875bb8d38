//! `bonepile-worker join TOKEN`: makes a key, proves the token, keeps the certificate.

use std::time::SystemTime;

use protocol::identity::JoinToken;
use protocol::quic::joining::clock_note;
use protocol::quic::settings::any_address;
use protocol::quic::{CertificateFacts, Credentials, JoinError, bind, join, spki_sha256};
use rcgen::CertificateParams;

use super::state_dir::{BoxIdentity, StateDir, StateError};

/// Joining failed.
#[derive(Debug, thiserror::Error)]
pub enum JoiningError {
    /// The state directory cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// The box has a good certificate already.
    #[error("this box is {worker} of cluster {cluster} already")]
    Already {
        /// Its id there.
        worker: protocol::ids::WorkerId,
        /// The cluster.
        cluster: String,
    },
    /// No UDP socket.
    #[error("could not open a UDP socket")]
    Socket(#[source] std::io::Error),
    /// The certificate request could not be made.
    #[error("could not make a certificate request: {detail}")]
    Request {
        /// Why.
        detail: String,
    },
    /// The coordinator was not reached or said no.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// The answer does not fit what was asked.
    #[error("the coordinator's answer does not check: {detail}")]
    Answer {
        /// What does not fit.
        detail: String,
    },
}

impl JoiningError {
    /// What a person could do.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::State(error) => error.hint(),
            Self::Already { .. } => Some("to join anew: `bonepile-worker join --force TOKEN`"),
            Self::Join(error) => error.hint(),
            Self::Answer { .. } => Some("use the same version of bonepile on both sides"),
            Self::Socket(_) | Self::Request { .. } => None,
        }
    }
}

/// What came of it.
#[derive(Debug)]
pub struct Membership {
    /// Who this box is now.
    pub identity: BoxIdentity,
    /// A word about clocks, if they differ.
    pub clock_note: Option<String>,
}

/// Joins the cluster of `token`. With `force` an identity that is still good is replaced.
///
/// # Errors
/// [`JoiningError`]. After any of them the old identity, if there was one, is as it was; trying again is safe.
pub async fn join_cluster(state: &StateDir, token: &JoinToken, force: bool) -> Result<Membership, JoiningError> {
    let _lock = state.lock()?;
    if !force && let Ok(identity) = state.identity() {
        let good = identity.facts.not_after > SystemTime::now().into();
        if good {
            return Err(JoiningError::Already { worker: identity.worker, cluster: identity.cluster });
        }
    }
    let key = state.joining_key(token)?;
    let csr = CertificateParams::default()
        .serialize_request(&key)
        .map_err(|error| JoiningError::Request { detail: error.to_string() })?;
    let (endpoint, _) = bind(any_address(), &state.endpoint_secret()?, None).map_err(JoiningError::Socket)?;
    let joined = join(&endpoint, token, csr.der().to_vec(), hostname()).await?;
    endpoint.wait_idle().await;

    let answer = |detail: String| JoiningError::Answer { detail };
    let facts = CertificateFacts::parse(&joined.certificate).map_err(|error| answer(error.to_string()))?;
    let authority = spki_sha256(&joined.authority).map_err(|error| answer(error.to_string()))?;
    if authority != token.authority_spki_sha256 {
        return Err(answer("its authority is not the token's".to_owned()));
    }
    if facts.spki_sha256 != protocol::identity::sha256(&rcgen::PublicKeyData::subject_public_key_info(&key)) {
        return Err(answer("its certificate is for another key".to_owned()));
    }
    if facts.identity.worker != joined.worker || facts.identity.cluster != token.cluster {
        return Err(answer(format!("its certificate names {}", facts.identity)));
    }
    let identity = BoxIdentity {
        worker: joined.worker,
        cluster: joined.cluster,
        server_name: joined.server_name,
        coordinators: token.coordinators.clone(),
        credentials: Credentials {
            certificate: joined.certificate.into(),
            key_pkcs8: key.serialize_der(),
            authority: joined.authority.into(),
        },
        facts,
    };
    state.keep_identity(&identity)?;
    state.forget_joining_key(token)?;
    Ok(Membership { identity, clock_note: clock_note(joined.server_time, SystemTime::now()) })
}

/// The box's name, for people.
pub fn hostname() -> String {
    sysinfo::System::host_name().unwrap_or_else(|_| "unnamed".to_owned())
}
