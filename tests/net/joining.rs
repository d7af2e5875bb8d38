//! Joining with every kind of token.

use coordinator::api::TokenState;
use coordinator::authority::Authority;
use protocol::control::{ALPN_CONTROL, ALPN_JOIN, FromAuthority, ToAuthority, close, refusal};
use protocol::identity::{JoinToken, Secret};
use protocol::ids::{TokenId, WorkerId};
use protocol::quic::joining::is_pin_mismatch;
use protocol::quic::{
    CertificateFacts, Credentials, FrameReader, JoinError, Received, join, join_client_config, write_frame,
};
use rcgen::{CertificateParams, KeyPair, PKCS_ED25519};

use crate::support::{Cluster, Log, closed, code, dialler};

fn key_and_csr() -> (KeyPair, Vec<u8>) {
    let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
    let csr = CertificateParams::default().serialize_request(&key).unwrap().der().to_vec();
    (key, csr)
}

async fn try_join(token: &JoinToken) -> Result<WorkerId, JoinError> {
    join(&dialler(), token, key_and_csr().1, "box".into()).await.map(|joined| joined.worker)
}

fn refused(outcome: Result<WorkerId, JoinError>) -> (u16, String, &'static str) {
    match outcome {
        Err(JoinError::Refused(ref refused)) => {
            (refused.code, refused.text.clone(), outcome.as_ref().unwrap_err().hint().unwrap())
        }
        other => panic!("a refusal was expected, not {other:?}"),
    }
}

#[tokio::test]
async fn a_box_joins_and_its_certificate_opens_the_control_conversation() {
    let cluster = Cluster::start();
    let token = cluster.token(1, TokenState::Open);
    let (key, csr) = key_and_csr();
    let joined = join(&dialler(), &token, csr.clone(), "box".into()).await.unwrap();
    let facts = CertificateFacts::parse(&joined.certificate).unwrap();
    assert_eq!((facts.identity.worker, joined.worker), (WorkerId(1), WorkerId(1)));
    assert_eq!((joined.cluster.as_str(), joined.server_name), ("lab", cluster.authority.server_name()));

    let credentials = Credentials {
        certificate: joined.certificate.into(),
        key_pkcs8: key.serialize_der(),
        authority: joined.authority.into(),
    };
    let connection = cluster.dial(&credentials, ALPN_CONTROL).await.unwrap();
    assert!(connection.open_bi().await.is_ok());

    // An answer may be lost on the way: the same key gets the same worker again, another key does not.
    let again = join(&dialler(), &token, csr, "box".into()).await.unwrap();
    assert_eq!(again.worker, WorkerId(1));
    let (refusal, text, hint) = refused(try_join(&token).await);
    assert_eq!((refusal, text.as_str()), (refusal::TOKEN_USED, "token was used"));
    assert!(hint.contains("bonepile token create"), "{hint}");
}

#[tokio::test]
async fn tokens_that_do_not_count_are_refused_each_in_its_own_words() {
    let (cluster, log) = (Cluster::start(), Log::capture());
    for (id, state, expected) in
        [(1, TokenState::Expired, refusal::TOKEN_EXPIRED), (2, TokenState::Revoked, refusal::TOKEN_REVOKED)]
    {
        let (refusal, text, _) = refused(try_join(&cluster.token(id, state)).await);
        assert_eq!(refusal, expected, "{text}");
        log.says(&format!("token=t{id} hostname=\"box\"")).await;
        log.says(&format!("refused a box that wants to join: {text}")).await;
    }
    let mut unknown = cluster.token(3, TokenState::Open);
    unknown.token = TokenId(9);
    let (refusal, text, _) = refused(try_join(&unknown).await);
    assert_eq!(
        (refusal, text.as_str()),
        (refusal::TOKEN_UNKNOWN, "token t9 is not known here, or its secret is wrong")
    );
    log.says("refused a box that wants to join: token t9 is not known here").await;
    let mut wrong = cluster.token(4, TokenState::Open);
    wrong.secret = Secret([0; 32]);
    assert_eq!(refused(try_join(&wrong).await).0, refusal::TOKEN_UNKNOWN);
    assert!(cluster.script.lock().unwrap().redeemed.is_empty());
}

#[tokio::test]
async fn five_wrong_secrets_burn_a_token() {
    let (cluster, log) = (Cluster::start(), Log::capture());
    let right = cluster.token(1, TokenState::Open);
    let wrong = JoinToken { secret: Secret([0; 32]), ..right.clone() };
    for _ in 0..5 {
        assert_eq!(refused(try_join(&wrong).await).0, refusal::TOKEN_UNKNOWN);
    }
    assert_eq!(refused(try_join(&right).await).0, refusal::TOKEN_REVOKED);
    log.says("a token was guessed at too often and is revoked").await;
}

#[tokio::test]
async fn an_address_that_tries_too_often_must_wait() {
    let cluster = Cluster::start();
    let mut unknown = cluster.token(1, TokenState::Open);
    unknown.token = TokenId(9);
    for _ in 0..20 {
        assert_eq!(refused(try_join(&unknown).await).0, refusal::TOKEN_UNKNOWN);
    }
    assert_eq!(refused(try_join(&unknown).await).0, refusal::RATE);
}

#[tokio::test]
async fn a_token_of_another_cluster_stops_before_anything_is_sent() {
    let (cluster, other) = (Cluster::start(), Cluster::start());
    let mut token = cluster.token(1, TokenState::Open);
    token.coordinators = vec![other.address.to_string()];
    let error = try_join(&token).await.unwrap_err();
    assert!(is_pin_mismatch(&error), "{error}");
    let expected = protocol::identity::short_fingerprint(&cluster.authority.spki_sha256().unwrap());
    let shown = protocol::identity::short_fingerprint(&other.authority.spki_sha256().unwrap());
    let text = error.to_string();
    assert!(text.contains(&expected) && text.contains(&shown), "{text}");
}

#[tokio::test]
async fn nobody_there_is_said_with_the_address() {
    let cluster = Cluster::start();
    let mut token = cluster.token(1, TokenState::Open);
    token.coordinators = vec!["no-such-host.invalid:1".into()];
    let error = try_join(&token).await.unwrap_err();
    assert!(matches!(&error, JoinError::Unreachable { tried } if tried[0].starts_with("no-such-host.invalid:1: ")));
    assert!(error.hint().unwrap().contains("firewall"));
}

#[tokio::test]
async fn a_proof_of_another_channel_and_a_bad_request_are_refused() {
    let cluster = Cluster::start();
    let token = cluster.token(1, TokenState::Open);
    let say = async |join: protocol::control::Join| {
        let config = join_client_config(token.authority_spki_sha256).unwrap();
        let name = cluster.authority.server_name();
        let connection = dialler().connect_with(config, cluster.address, &name).unwrap().await.unwrap();
        let mut proof = [0; 32];
        connection
            .export_keying_material(&mut proof, protocol::identity::PROOF_LABEL, &token.token.0.to_le_bytes())
            .unwrap();
        let own = token.secret.hash().proof(&proof);
        let proof = if join.proof == [1; 32] { own } else { join.proof };
        let (mut send, receive) = connection.open_bi().await.unwrap();
        write_frame(&mut send, &ToAuthority::from(protocol::control::Join { proof, ..join })).await.unwrap();
        match FrameReader::<FromAuthority>::new(receive).next().await.unwrap().unwrap() {
            Received::Message(FromAuthority::JoinRefused(refused)) => (refused.code, proof),
            other => panic!("a refusal was expected, not {other:?}"),
        }
    };
    let request = |proof, csr| protocol::control::Join {
        token: token.token,
        proof,
        csr,
        hostname: "box".into(),
        build: "test".into(),
    };
    // [1; 32] stands for the right proof of the channel at hand.
    let (refusal, overheard) = say(request([1; 32], b"nonsense".to_vec())).await;
    assert_eq!(refusal, refusal::BAD_REQUEST);
    let (refusal, _) = say(request(overheard, key_and_csr().1)).await;
    assert_eq!(refusal, refusal::TOKEN_UNKNOWN);
    assert!(cluster.script.lock().unwrap().redeemed.is_empty());
}

#[tokio::test]
async fn a_joining_connection_carries_nothing_but_a_join() {
    let cluster = Cluster::start();
    let config = join_client_config(cluster.authority.spki_sha256().unwrap()).unwrap();
    let name = cluster.authority.server_name();
    let connection = dialler().connect_with(config, cluster.address, &name).unwrap().await.unwrap();
    let (mut send, _receive) = connection.open_bi().await.unwrap();
    // A length over the joining limit, under the control limit.
    send.write_all(&[0, 0, 1, 0, 1, 3, 1, 0]).await.unwrap();
    let (got, reason) = closed(&connection).await;
    assert_eq!(got, code(close::LIMIT), "{reason}");
    assert!(reason.contains("65536 bytes is over the limit of 16384"), "{reason}");
}

#[tokio::test]
async fn joining_needs_no_certificate_and_an_authority_loads_again_between() {
    let cluster = Cluster::start();
    let token = cluster.token(1, TokenState::Open);
    assert_eq!(token.to_string().parse::<JoinToken>().unwrap(), token);
    assert_eq!(ALPN_JOIN, b"bonepile-join/1");
    let csr = key_and_csr().1;
    let worker = join(&dialler(), &token, csr.clone(), "box".into()).await.unwrap().worker;
    assert_eq!(Authority::request_spki_sha256(&csr).unwrap(), cluster.script.lock().unwrap().redeemed[&TokenId(1)].0);
    assert_eq!(worker, WorkerId(1));
}
