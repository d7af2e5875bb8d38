//! The door: who gets in on which conversation, and what the others are told.

use std::time::{Duration, SystemTime};

use coordinator::authority::Authority;
use protocol::control::{ALPN_CONTROL, ALPN_PEER, close};
use protocol::ids::WorkerId;
use protocol::quic::settings::provider;
use protocol::quic::{Credentials, explain};
use quinn::ConnectionError;

use crate::support::{CLUSTER, Cluster, DECRYPT_ERROR, Log, UNKNOWN_CA, closed, code, credentials, dialler};

/// A configuration that believes the cluster and shows no certificate, on any conversation.
fn nameless(cluster: &Cluster, alpn: &[u8]) -> quinn::ClientConfig {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(cluster.authority.certificate().clone()).unwrap();
    let mut tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![alpn.to_vec()];
    quinn::ClientConfig::new(std::sync::Arc::new(quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap()))
}

#[tokio::test]
async fn without_a_certificate_control_is_closed_with_role() {
    let (cluster, log) = (Cluster::start(), Log::capture());
    let name = cluster.authority.server_name();
    let config = nameless(&cluster, ALPN_CONTROL);
    let connection = dialler().connect_with(config, cluster.address, &name).unwrap().await.unwrap();
    let (got, reason) = closed(&connection).await;
    assert_eq!(got, code(close::ROLE));
    assert_eq!(reason, "no certificate was shown; a box gets one with `bonepile-worker join TOKEN`");
    log.says(&format!("refused a connection: {reason}")).await;
}

#[tokio::test]
async fn with_another_authoritys_certificate_tls_refuses() {
    let (cluster, log) = (Cluster::start(), Log::capture());
    for (name, expected) in [("home", UNKNOWN_CA), (CLUSTER, DECRYPT_ERROR)] {
        let directory = tempfile::tempdir().unwrap();
        let other = Authority::create(directory.path(), name, &[], SystemTime::now()).unwrap();
        let stranger = credentials(&other, 1, SystemTime::now());
        let foreign = Credentials { authority: cluster.authority.certificate().clone(), ..stranger };
        let error = ended(&cluster, &foreign).await;
        let ConnectionError::ConnectionClosed(closed) = &error else { panic!("not {error:?}") };
        assert_eq!(u64::from(closed.error_code), expected);
        let (text, hint) = explain(&error);
        assert!(text.starts_with("the other side does not believe the certificate"), "{text}");
        assert!(hint.unwrap().contains("join this cluster"));
        log.says("refused a connection: this side does not believe the certificate").await;
    }
}

/// How a dialled connection ends: in TLS 1.3 the dialling side is done before the other has looked at its certificate.
async fn ended(cluster: &Cluster, credentials: &Credentials) -> ConnectionError {
    match cluster.dial(credentials, ALPN_CONTROL).await {
        Ok(connection) => connection.closed().await,
        Err(error) => error,
    }
}

#[tokio::test]
async fn a_certificate_past_its_end_is_refused() {
    let (cluster, log) = (Cluster::start(), Log::capture());
    let long_ago = SystemTime::now() - Duration::from_secs(8 * 24 * 3600);
    let error = ended(&cluster, &cluster.credentials_at(1, long_ago)).await;
    let (text, hint) = explain(&error);
    assert!(text.starts_with("the other side finds a certificate outside its time"), "{text}");
    assert!(hint.unwrap().contains("clocks"));
    log.says("refused a connection: this side finds a certificate outside its time").await;
}

#[tokio::test]
async fn a_revoked_worker_is_closed_with_revoked_every_time() {
    let (cluster, log) = (Cluster::start(), Log::capture());
    let credentials = cluster.credentials(3);
    cluster.script.lock().unwrap().denied.insert(WorkerId(3), close::REVOKED);
    // More than once: a resumed TLS session would not show its certificate again.
    for _ in 0..3 {
        let connection = cluster.dial(&credentials, ALPN_CONTROL).await.unwrap();
        let (got, reason) = closed(&connection).await;
        assert_eq!(got, code(close::REVOKED));
        assert_eq!(reason, "bonepile://lab/worker/w3?role=worker may not connect: certificate revoked");
    }
    log.says("refused a connection: bonepile://lab/worker/w3?role=worker may not connect").await;
}

#[tokio::test]
async fn the_coordinator_does_not_speak_peer() {
    let cluster = Cluster::start();
    let error = cluster.dial(&cluster.credentials(1), ALPN_PEER).await.unwrap_err();
    let (text, _) = explain(&error);
    assert_eq!(text, "the other side speaks no protocol version of ours");
}

#[tokio::test]
async fn a_connection_ends_with_its_certificate() {
    let cluster = Cluster::start();
    let life = Duration::from_secs(7 * 24 * 3600);
    // Certificates end on whole seconds; two leave time for the handshake.
    let nearly_over = SystemTime::now() - life + Duration::from_secs(2);
    let connection = cluster.dial(&cluster.credentials_at(1, nearly_over), ALPN_CONTROL).await.unwrap();
    let (mut send, _receive) = connection.open_bi().await.unwrap();
    let hello = protocol::control::ToCoordinator::from(crate::support::hello());
    protocol::quic::write_frame(&mut send, &hello).await.unwrap();
    let (got, reason) = closed(&connection).await;
    assert_eq!(got, code(close::EXPIRED), "{reason}");
}
