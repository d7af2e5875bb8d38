//! Joining: a box shows that it knows a token's secret, and gets a certificate for the key it made itself.
//!
//! The secret never travels: the proof is an HMAC over keying material of this very channel. What the token is worth is the
//! driver's to say; it is only asked once the proof holds, so a guesser learns nothing about tokens.

use std::net::SocketAddr;

use protocol::control::{FromAuthority, Join, Joined, Refused, ToAuthority, close, refusal};
use protocol::identity::{CertificateRole, EXPORTER_BYTES, PROOF_LABEL, SecretHash};
use protocol::limits::clean_text;
use protocol::quic::{FrameReader, Joiner, Received, close_with, write_frame};
use quinn::{SendStream, VarInt};

use super::{FIRST_WORD, LAST_WORD, Shared, chain, lock};
use crate::authority::Authority;

/// The whole conversation, bounded in time.
pub(super) async fn serve(joiner: &Joiner, remote: SocketAddr, shared: &Shared) {
    let connection = joiner.connection();
    let conversation = async {
        let (mut send, receive) = connection.accept_bi().await.ok()?;
        let mut reader = FrameReader::<ToAuthority>::new(receive);
        let join = match reader.next().await {
            Ok(Some(Received::Message(ToAuthority::Join(join)))) => join,
            Ok(Some(Received::Unknown { kind })) => {
                let text = format!("message type {kind:#06x} is not known here");
                answer(&mut send, Refused { code: refusal::UNKNOWN_MESSAGE, text }.into()).await;
                return Some(());
            }
            Ok(None) => return None,
            Err(error) => {
                tracing::warn!(%remote, "closed a joining connection: {}", chain(&error));
                close_with(connection, &error);
                return None;
            }
        };
        let (hostname, token) = (clean_text(&join.hostname), join.token);
        match decide(joiner, &join, remote, shared).await {
            Ok(joined) => {
                tracing::info!(%remote, worker = %joined.worker, %token, hostname, "a box has joined");
                answer(&mut send, joined.into()).await;
            }
            Err(refused) => {
                tracing::warn!(%remote, %token, hostname, "refused a box that wants to join: {}", refused.text);
                answer(&mut send, refused.into()).await;
            }
        }
        Some(())
    };
    let _ = tokio::time::timeout(FIRST_WORD, conversation).await;
    connection.close(VarInt::from_u32(close::DONE), b"");
}

async fn answer(send: &mut SendStream, message: FromAuthority) {
    if write_frame(send, &message).await.is_ok() && send.finish().is_ok() {
        // The close that follows would overtake the answer: wait until the box has it.
        let _ = tokio::time::timeout(LAST_WORD, send.stopped()).await;
    }
}

async fn decide(joiner: &Joiner, join: &Join, remote: SocketAddr, shared: &Shared) -> Result<Joined, Refused> {
    let refused = |code, text: &str| Refused { code, text: text.to_owned() };
    let now = crate::clock::system();
    if !lock(&shared.limits).may_try(remote.ip(), now.into()) {
        return Err(refused(refusal::RATE, "too many tries from this address; wait a minute"));
    }
    check_proof(joiner, join, shared).await?;
    let unusable = |error: crate::authority::AuthorityError| refused(refusal::BAD_REQUEST, &error.to_string());
    let spki_sha256 = Authority::request_spki_sha256(&join.csr).map_err(unusable)?;
    // In the journal before anything is signed; the same key with the same token again gets the same worker.
    let worker = shared.driver.redeem(join.token, spki_sha256, clean_text(&join.hostname)).await?;
    let signed = shared.authority.sign_worker(&join.csr, worker, CertificateRole::Worker, now).map_err(|error| {
        tracing::error!(%worker, error = chain(&error), "could not sign a worker's certificate");
        refused(refusal::UNAVAILABLE, "the coordinator could not sign; its log says why")
    })?;
    Ok(Joined {
        worker,
        certificate: signed.certificate,
        authority: shared.authority.certificate().to_vec(),
        cluster: shared.authority.cluster().to_owned(),
        server_name: shared.authority.server_name(),
        server_time: now.into(),
    })
}

/// An unknown token and a wrong proof get the same answer.
async fn check_proof(joiner: &Joiner, join: &Join, shared: &Shared) -> Result<(), Refused> {
    let unknown = || Refused {
        code: refusal::TOKEN_UNKNOWN,
        text: format!("token {} is not known here, or its secret is wrong", join.token),
    };
    let record = shared.driver.token(join.token).await?.ok_or_else(unknown)?;
    let mut exporter = [0; EXPORTER_BYTES];
    joiner
        .connection()
        .export_keying_material(&mut exporter, PROOF_LABEL, &join.token.0.to_le_bytes())
        .map_err(|_| unknown())?;
    if SecretHash(record.secret_hash).verify(&exporter, &join.proof) {
        return Ok(());
    }
    if lock(&shared.limits).wrong_proof(join.token) {
        tracing::warn!(token = %join.token, "a token was guessed at too often and is revoked");
        if let Err(error) = shared.driver.revoke_token(join.token).await {
            tracing::error!(token = %join.token, "could not revoke a token that is guessed at: {}", error.message);
        }
    }
    Err(unknown())
}
