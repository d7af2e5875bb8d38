//! The door: one function decides who a peer is, and is the only maker of [`Member`] and [`Joiner`].
//!
//! No stream is accepted before it returns. TLS has by then checked a shown certificate against the authority; here its
//! presence, names, role, time and standing are checked. A connection outlives its certificate in TLS, so a timer ends it.

use std::time::{Duration, SystemTime};

use quinn::crypto::rustls::HandshakeData;
use quinn::{Connection, VarInt};
use rustls::pki_types::CertificateDer;

use super::certificate::{CertificateError, CertificateFacts};
use super::settings::{BIDI_STREAMS, UNI_STREAMS};
use crate::control::{ALPN_CONTROL, ALPN_JOIN, ALPN_PEER, close};
use crate::identity::Identity;
use crate::time::{Human, UnixMillis};

/// A conversation, by its protocol name in the handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alpn {
    /// Worker and coordinator.
    Control,
    /// A box that has no certificate yet.
    Join,
    /// Worker and worker.
    Peer,
}

impl Alpn {
    fn of(name: &[u8]) -> Option<Self> {
        [(ALPN_CONTROL, Self::Control), (ALPN_JOIN, Self::Join), (ALPN_PEER, Self::Peer)]
            .into_iter()
            .find(|(known, _)| *known == name)
            .map(|(_, alpn)| alpn)
    }
}

/// A peer that may go on.
#[derive(Debug)]
pub enum Admitted {
    /// Has a good certificate of this cluster.
    Member(Member),
    /// Has none and says that it wants one.
    Joiner(Joiner),
}

/// A peer with a good certificate of this cluster. Only [`admit`] makes one.
#[derive(Debug, Clone)]
pub struct Member {
    connection: Connection,
    alpn: Alpn,
    facts: CertificateFacts,
}

impl Member {
    /// The connection it came on.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// The conversation it wants.
    pub fn alpn(&self) -> Alpn {
        self.alpn
    }

    /// Who it is.
    pub fn identity(&self) -> &Identity {
        &self.facts.identity
    }

    /// SHA-256 of its public key.
    pub fn spki_sha256(&self) -> [u8; 32] {
        self.facts.spki_sha256
    }

    /// When its certificate ends, and this connection with it.
    pub fn not_after(&self) -> UnixMillis {
        self.facts.not_after
    }
}

/// A peer without a certificate on the joining conversation. Only [`admit`] makes one.
#[derive(Debug)]
pub struct Joiner(Connection);

impl Joiner {
    /// The connection it came on: one bidirectional stream, nothing else.
    pub fn connection(&self) -> &Connection {
        &self.0
    }
}

/// Why a peer may not go on. Displayed to the operator here, and sent to the peer as the reason of the close.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotAdmitted {
    /// No protocol was agreed.
    #[error("no bonepile protocol was agreed")]
    Protocol,
    /// No certificate, on a conversation that needs one.
    #[error("no certificate was shown; a box gets one with `bonepile-worker join TOKEN`")]
    NoCertificate,
    /// Not a worker's certificate.
    #[error("the certificate is not a worker's")]
    Certificate(#[source] CertificateError),
    /// A certificate of the same authority for another cluster's name.
    #[error("the certificate is of cluster `{got}`, this is `{expected}`")]
    Cluster {
        /// The cluster here.
        expected: String,
        /// The cluster in the certificate.
        got: String,
    },
    /// Past its end.
    #[error("the certificate of {identity} ended {} ago; join again with a new token", Human(Duration::from_millis(*.ago_ms)))]
    Expired {
        /// Whose.
        identity: Identity,
        /// How long ago, milliseconds.
        ago_ms: u64,
    },
    /// A good certificate whose holder is not wanted: revoked, unknown, or not now.
    #[error("{identity} may not connect: {}", close::name(u64::from(*.code)))]
    Denied {
        /// Who.
        identity: Identity,
        /// Why, one of [`close`].
        code: u32,
    },
}

impl NotAdmitted {
    /// The code with which the connection is closed, one of [`close`].
    pub fn close_code(&self) -> u32 {
        match self {
            Self::Protocol => close::PROTOCOL,
            Self::NoCertificate | Self::Certificate(_) | Self::Cluster { .. } => close::ROLE,
            Self::Expired { .. } => close::EXPIRED,
            Self::Denied { code, .. } => *code,
        }
    }
}

/// Decides about a peer whose handshake is done. `standing` is asked about an otherwise good certificate, and answers with
/// the code of [`close`] to turn it away with (revoked, say).
///
/// On success the peer may open streams, and a task closes the connection with `close::EXPIRED` when its certificate ends.
/// On failure the connection is closed here, with the code and the text of the error.
///
/// # Errors
/// [`NotAdmitted`], for the log.
pub async fn admit<F>(
    connection: &Connection,
    cluster: &str,
    standing: impl FnOnce(CertificateFacts) -> F,
) -> Result<Admitted, NotAdmitted>
where
    F: Future<Output = Result<(), u32>>,
{
    let refuse = |error: NotAdmitted| {
        connection.close(VarInt::from_u32(error.close_code()), error.to_string().as_bytes());
        error
    };
    let (alpn, facts) = match examine(connection, cluster, now()).map_err(refuse)? {
        (Alpn::Join, _) => return Ok(Admitted::Joiner(Joiner(connection.clone()))),
        (alpn, Some(facts)) => (alpn, facts),
        (_, None) => return Err(refuse(NotAdmitted::NoCertificate)),
    };
    if let Err(code) = standing(facts.clone()).await {
        return Err(refuse(NotAdmitted::Denied { identity: facts.identity, code }));
    }
    connection.set_max_concurrent_bi_streams(VarInt::from_u32(BIDI_STREAMS));
    connection.set_max_concurrent_uni_streams(VarInt::from_u32(UNI_STREAMS));
    tokio::spawn(close_at_end(connection.clone(), facts.not_after));
    Ok(Admitted::Member(Member { connection: connection.clone(), alpn, facts }))
}

fn examine(
    connection: &Connection,
    cluster: &str,
    now: UnixMillis,
) -> Result<(Alpn, Option<CertificateFacts>), NotAdmitted> {
    let alpn = connection
        .handshake_data()
        .and_then(|data| data.downcast::<HandshakeData>().ok())
        .and_then(|data| data.protocol)
        .and_then(|name| Alpn::of(&name))
        .ok_or(NotAdmitted::Protocol)?;
    if alpn == Alpn::Join {
        return Ok((alpn, None));
    }
    let chain = connection
        .peer_identity()
        .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok())
        .unwrap_or_default();
    let leaf = chain.first().ok_or(NotAdmitted::NoCertificate)?;
    let facts = CertificateFacts::parse(leaf).map_err(NotAdmitted::Certificate)?;
    check(&facts, cluster, now)?;
    Ok((alpn, Some(facts)))
}

fn check(facts: &CertificateFacts, cluster: &str, now: UnixMillis) -> Result<(), NotAdmitted> {
    if facts.identity.cluster != cluster {
        let got = facts.identity.cluster.clone();
        return Err(NotAdmitted::Cluster { expected: cluster.to_owned(), got });
    }
    if now >= facts.not_after {
        return Err(NotAdmitted::Expired { identity: facts.identity.clone(), ago_ms: now.since_ms(facts.not_after) });
    }
    Ok(())
}

async fn close_at_end(connection: Connection, not_after: UnixMillis) {
    // Looked at once an hour, as a box may sleep or have its clock set meanwhile.
    const LOOK_EVERY: Duration = Duration::from_secs(3600);
    loop {
        let left = Duration::from_millis(not_after.since_ms(now()));
        if left.is_zero() {
            connection.close(VarInt::from_u32(close::EXPIRED), b"the certificate has ended; join again");
            return;
        }
        tokio::select! {
            _ = connection.closed() => return,
            () = tokio::time::sleep(left.min(LOOK_EVERY)) => {}
        }
    }
}

fn now() -> UnixMillis {
    SystemTime::now().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::CertificateRole;
    use crate::ids::WorkerId;

    fn facts() -> CertificateFacts {
        CertificateFacts {
            identity: Identity { cluster: "lab".into(), worker: WorkerId(1), role: CertificateRole::Worker },
            spki_sha256: [0; 32],
            not_before: UnixMillis(0),
            not_after: UnixMillis(10_000),
        }
    }

    #[test]
    fn another_clusters_and_ended_certificates_are_refused() {
        check(&facts(), "lab", UnixMillis(9_999)).unwrap();
        let other = check(&facts(), "home", UnixMillis(0)).unwrap_err();
        assert_eq!(other.close_code(), close::ROLE);
        assert_eq!(other.to_string(), "the certificate is of cluster `lab`, this is `home`");
        let ended = check(&facts(), "lab", UnixMillis(70_000)).unwrap_err();
        assert_eq!(ended.close_code(), close::EXPIRED);
        assert!(ended.to_string().contains("ended 1m 00s ago; join again"), "{ended}");
    }
}
