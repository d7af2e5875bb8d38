//! Settings of sockets, endpoints, transport and TLS. Every figure of the transport stands here and nowhere else.
//!
//! Opens no connection and decides about no peer: [`super::admission`] does.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::{NoInitialCipherSuite, QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, Endpoint, EndpointConfig, ServerConfig, TransportConfig, VarInt};
use quinn_proto::HashedConnectionIdGenerator;
use rustls::RootCertStore;
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier};

use super::pin::PinnedAuthority;
use crate::control::ALPN_JOIN;
use crate::identity::sha256;

/// Wished size of each socket buffer, bytes: bursts of a whole congestion window; the usual default of 208 KiB drops them.
pub const SOCKET_BUFFER_BYTES: usize = 8 << 20;
/// A connection silent for so long is gone. Not the failure detector of a worker: heartbeats are.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(20);
/// The dialling side speaks at least this often, which keeps NAT mappings.
pub const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// Bytes a peer may have in flight to us on one connection, over all streams.
pub const RECEIVE_WINDOW_BYTES: u32 = 32 << 20;
/// The same at the coordinator, which has many peers.
pub const RECEIVE_WINDOW_COORDINATOR_BYTES: u32 = 16 << 20;
/// Unidirectional streams a peer may have open once admitted.
pub const UNI_STREAMS: u32 = 64;
/// Bidirectional streams a peer may have open once admitted.
pub const BIDI_STREAMS: u32 = 8;
/// Handshakes kept waiting before further ones are refused.
pub const INCOMING_MAX: usize = 256;
/// Open handshakes above which a source address must prove itself first.
pub const RETRY_ABOVE_HANDSHAKES: usize = 32;
/// A fragmented first flight may take this much a connection before it is accepted.
const INCOMING_BUFFER_BYTES: u64 = 64 << 10;
const INCOMING_BUFFERS_BYTES: u64 = 4 << 20;
const RETRY_TOKEN_LIFETIME: Duration = Duration::from_secs(15);

/// The one crypto provider, always passed explicitly.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// TLS or QUIC settings could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// A certificate or key is unusable.
    #[error("certificate or key is not usable")]
    Tls(#[from] rustls::Error),
    /// The authority's certificate makes no verifier.
    #[error("the authority's certificate is not usable")]
    Verifier(#[from] VerifierBuilderError),
    /// The provider lacks the suite that QUIC begins with.
    #[error("the crypto provider lacks QUIC's first cipher suite")]
    Suite(#[from] NoInitialCipherSuite),
}

/// A certificate with its key, and the authority that both sides believe. DER throughout.
pub struct Credentials {
    /// The holder's certificate.
    pub certificate: CertificateDer<'static>,
    /// Its private key, PKCS#8.
    pub key_pkcs8: Vec<u8>,
    /// The cluster's authority.
    pub authority: CertificateDer<'static>,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("certificate_bytes", &self.certificate.len()).finish_non_exhaustive()
    }
}

impl Credentials {
    /// The holder's certificate and the authority's: a joining box pins the latter, so it must travel.
    fn chain(&self) -> Vec<CertificateDer<'static>> {
        vec![self.certificate.clone(), self.authority.clone()]
    }

    fn key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key_pkcs8.clone()).into()
    }

    fn roots(&self) -> Result<RootCertStore, rustls::Error> {
        let mut roots = RootCertStore::empty();
        roots.add(self.authority.clone())?;
        Ok(roots)
    }
}

/// Which side a server configuration is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Serves control and join to many workers.
    Coordinator,
    /// Serves a few peers with bulk data.
    Worker,
}

/// What a listening side offers. `alpns` in its order of preference. Client certificates are checked against the authority
/// when shown, and may be absent: [`super::admit`] refuses whom the conversation's protocol does not allow.
///
/// # Errors
/// If the credentials are unusable.
pub fn server_config(credentials: &Credentials, alpns: &[&[u8]], side: Side) -> Result<ServerConfig, SettingsError> {
    let provider = provider();
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(credentials.roots()?), Arc::clone(&provider))
        .allow_unauthenticated()
        .build()?;
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(credentials.chain(), credentials.key())?;
    tls.alpn_protocols = alpns.iter().map(|alpn| alpn.to_vec()).collect();
    tls.session_storage = Arc::new(NoServerSessionStorage {});
    tls.send_tls13_tickets = 0;
    tls.max_early_data_size = 0;

    let mut transport = transport(match side {
        Side::Coordinator => RECEIVE_WINDOW_COORDINATOR_BYTES,
        Side::Worker => RECEIVE_WINDOW_BYTES,
    });
    // Before admission a peer gets one stream, for joining; `admit` raises both numbers.
    transport.max_concurrent_bidi_streams(VarInt::from_u32(1)).max_concurrent_uni_streams(VarInt::from_u32(0));
    transport.send_fairness(side == Side::Coordinator);

    let mut config = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    config
        .transport_config(Arc::new(transport))
        .max_incoming(INCOMING_MAX)
        .incoming_buffer_size(INCOMING_BUFFER_BYTES)
        .incoming_buffer_size_total(INCOMING_BUFFERS_BYTES)
        .retry_token_lifetime(RETRY_TOKEN_LIFETIME)
        .migration(true);
    Ok(config)
}

/// What a dialling member of the cluster offers on `alpn`.
///
/// # Errors
/// If the credentials are unusable.
pub fn client_config(credentials: &Credentials, alpn: &[u8]) -> Result<ClientConfig, SettingsError> {
    let tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(credentials.roots()?)
        .with_client_auth_cert(credentials.chain(), credentials.key())?;
    dialling(tls, alpn)
}

/// What a box offers that wants to join: no certificate of its own, and belief in the authority with this fingerprint only.
///
/// # Errors
/// If the provider is unusable.
pub fn join_client_config(authority_spki_sha256: [u8; 32]) -> Result<ClientConfig, SettingsError> {
    let provider = provider();
    let tls = rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(PinnedAuthority::new(authority_spki_sha256, provider)))
        .with_no_client_auth();
    dialling(tls, ALPN_JOIN)
}

fn dialling(mut tls: rustls::ClientConfig, alpn: &[u8]) -> Result<ClientConfig, SettingsError> {
    tls.alpn_protocols = vec![alpn.to_vec()];
    tls.resumption = Resumption::disabled();
    tls.enable_early_data = false;
    let mut transport = transport(RECEIVE_WINDOW_BYTES);
    // The side that dialled is spoken to on streams that it opened itself.
    transport.max_concurrent_bidi_streams(VarInt::from_u32(0)).max_concurrent_uni_streams(VarInt::from_u32(0));
    transport.keep_alive_interval(Some(KEEP_ALIVE)).send_fairness(false);
    let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    config.transport_config(Arc::new(transport));
    Ok(config)
}

fn transport(receive_window_bytes: u32) -> TransportConfig {
    let mut transport = TransportConfig::default();
    let idle = IDLE_TIMEOUT.try_into().expect("20 s fits a QUIC timeout");
    transport
        .max_idle_timeout(Some(idle))
        .receive_window(VarInt::from_u32(receive_window_bytes))
        .datagram_receive_buffer_size(None);
    transport
}

/// Secret of an endpoint that outlives its process: lets peers of a killed process learn of its death from the next one,
/// within a keep-alive instead of an idle timeout. 64 random bytes, kept in a file of mode 0600.
#[derive(Clone)]
pub struct EndpointSecret(pub [u8; 64]);

impl std::fmt::Debug for EndpointSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EndpointSecret(…)")
    }
}

impl EndpointSecret {
    fn endpoint_config(&self) -> EndpointConfig {
        let reset = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &self.0);
        // The ids' key is another secret than the resets' key, derived from the same file.
        let ids = sha256(&[&self.0[..], b"connection ids"].concat());
        let ids = u64::from_le_bytes(*ids.first_chunk().expect("a hash is longer than 8 bytes"));
        let mut config = EndpointConfig::new(Arc::new(reset));
        config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(ids)));
        config
    }
}

/// The system granted smaller socket buffers than bonepile wishes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SmallBuffers {
    /// Receive buffer granted, bytes.
    pub receive_bytes: usize,
    /// Send buffer granted, bytes.
    pub send_bytes: usize,
}

impl std::fmt::Display for SmallBuffers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "UDP socket buffers are {} KiB (receive) and {} KiB (send), wished {} KiB; bursts will be dropped. \
             Paste: sysctl -w net.core.rmem_max={SOCKET_BUFFER_BYTES} net.core.wmem_max={SOCKET_BUFFER_BYTES} \
             (to keep it: the same two lines in /etc/sysctl.d/90-bonepile.conf)",
            self.receive_bytes >> 10,
            self.send_bytes >> 10,
            SOCKET_BUFFER_BYTES >> 10,
        )
    }
}

/// An endpoint that dials, and listens too if `server` is given. Warns in the log if its buffers are small.
///
/// # Errors
/// If the address cannot be bound.
pub fn bind(
    address: SocketAddr,
    secret: &EndpointSecret,
    server: Option<ServerConfig>,
) -> io::Result<(Endpoint, Option<SmallBuffers>)> {
    let (socket, small) = udp_socket(address)?;
    if let Some(small) = small {
        tracing::warn!("{small}");
    }
    let endpoint = Endpoint::new(secret.endpoint_config(), server, socket, Arc::new(quinn::TokioRuntime))?;
    Ok((endpoint, small))
}

/// Any port, both address families where the system has both.
pub fn any_address() -> SocketAddr {
    let six = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
    match udp_socket(six) {
        Ok(_) => six,
        Err(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
    }
}

fn udp_socket(address: SocketAddr) -> io::Result<(std::net::UdpSocket, Option<SmallBuffers>)> {
    use socket2::{Domain, Protocol, Socket, Type};
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        // One socket for both families, so that a worker dials IPv4 coordinators from the port on which peers find it.
        socket.set_only_v6(false)?;
    }
    socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES)?;
    socket.set_send_buffer_size(SOCKET_BUFFER_BYTES)?;
    socket.bind(&address.into())?;
    // Linux reports twice what it granted, the other half being its own bookkeeping.
    let granted =
        SmallBuffers { receive_bytes: socket.recv_buffer_size()? / 2, send_bytes: socket.send_buffer_size()? / 2 };
    let small = granted.receive_bytes < SOCKET_BUFFER_BYTES || granted.send_bytes < SOCKET_BUFFER_BYTES;
    Ok((socket.into(), small.then_some(granted)))
}
