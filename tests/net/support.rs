//! A coordinator's port on loopback with a driver that the test scripts, and dialling ends for it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use coordinator::api::TokenState;
use coordinator::authority::Authority;
use coordinator::driver::{Command, DriverHandle, TokenRecord};
use coordinator::net::{Net, NetParts};
use protocol::control::{ALPN_CONTROL, Hello, Output, Refused, ToCoordinator, ToWorker, Welcome, close, refusal};
use protocol::identity::{JoinToken, Secret};
use protocol::ids::{TokenId, WorkerId};
use protocol::quic::{Credentials, EndpointSecret, FrameReader, Received, bind, client_config, write_frame};
use protocol::store::Store;
use protocol::time::UnixMillis;
use quinn::{Connection, ConnectionError, Endpoint, SendStream};
use rcgen::{CertificateParams, KeyPair, PKCS_ED25519};
use rustls::pki_types::CertificateDer;
use tokio::sync::mpsc;

pub(crate) const CLUSTER: &str = "lab";
/// No wait in these tests may take longer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// What the scripted driver knows and has heard.
#[derive(Default)]
pub(crate) struct Script {
    pub(crate) tokens: BTreeMap<TokenId, TokenRecord>,
    /// Key with which a token was used, and the worker it made.
    pub(crate) redeemed: BTreeMap<TokenId, ([u8; 32], WorkerId)>,
    pub(crate) denied: BTreeMap<WorkerId, u32>,
    /// What each worker's seats need.
    pub(crate) inputs: BTreeMap<WorkerId, Vec<Output>>,
    pub(crate) outboxes: BTreeMap<WorkerId, (u64, mpsc::Sender<ToWorker>)>,
}

pub(crate) struct Cluster {
    pub(crate) net: Net,
    pub(crate) address: SocketAddr,
    pub(crate) authority: Arc<Authority>,
    pub(crate) script: Arc<Mutex<Script>>,
    pub(crate) heard: mpsc::UnboundedReceiver<(WorkerId, ToCoordinator)>,
    pub(crate) store: Store,
    directory: tempfile::TempDir,
}

impl Cluster {
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        let authority = Arc::new(Authority::create(directory.path(), CLUSTER, &[], now).unwrap());
        let store = Store::init(&directory.path().join("store"), now.into()).unwrap();
        let (driver, commands) = DriverHandle::channel();
        let script = Arc::new(Mutex::new(Script::default()));
        let (hear, heard) = mpsc::unbounded_channel();
        tokio::spawn(drive(commands, Arc::clone(&script), hear));
        let parts = NetParts {
            authority: Arc::clone(&authority),
            driver,
            store: store.clone(),
            uploads: directory.path().join("uploads"),
        };
        let net = Net::open("127.0.0.1:0".parse().unwrap(), parts).unwrap();
        let address = net.local_addr().unwrap();
        Self { net, address, authority, script, heard, store, directory }
    }

    pub(crate) fn uploads(&self) -> PathBuf {
        self.directory.path().join("uploads")
    }

    pub(crate) fn token(&self, id: u64, state: TokenState) -> JoinToken {
        let secret = Secret([id as u8; 32]);
        let record = TokenRecord { secret_hash: secret.hash().0, state, expires_at: UnixMillis(u64::MAX) };
        self.script.lock().unwrap().tokens.insert(TokenId(id), record);
        JoinToken {
            coordinators: vec![self.address.to_string()],
            cluster: CLUSTER.into(),
            authority_spki_sha256: self.authority.spki_sha256().unwrap(),
            token: TokenId(id),
            secret,
        }
    }

    /// A worker's credentials, as joining would give them.
    pub(crate) fn credentials(&self, worker: u64) -> Credentials {
        self.credentials_at(worker, SystemTime::now())
    }

    pub(crate) fn credentials_at(&self, worker: u64, now: SystemTime) -> Credentials {
        credentials(&self.authority, worker, now)
    }

    pub(crate) async fn dial(&self, credentials: &Credentials, alpn: &[u8]) -> Result<Connection, ConnectionError> {
        let config = client_config(credentials, alpn).unwrap();
        let name = self.authority.server_name();
        dialler().connect_with(config, self.address, &name).unwrap().await
    }

    /// A worker that has said hello and been welcomed.
    pub(crate) async fn worker(&self, id: u64) -> Worker {
        let connection = self.dial(&self.credentials(id), ALPN_CONTROL).await.unwrap();
        let (mut send, receive) = connection.open_bi().await.unwrap();
        write_frame(&mut send, &ToCoordinator::from(hello())).await.unwrap();
        let mut worker = Worker { connection, send, reader: FrameReader::new(receive) };
        assert!(matches!(worker.hear().await, ToWorker::Welcome(_)));
        worker
    }
}

pub(crate) struct Worker {
    pub(crate) connection: Connection,
    pub(crate) send: SendStream,
    pub(crate) reader: FrameReader<ToWorker>,
}

impl Worker {
    pub(crate) async fn say(&mut self, message: impl Into<ToCoordinator>) {
        write_frame(&mut self.send, &message.into()).await.unwrap();
    }

    pub(crate) async fn hear(&mut self) -> ToWorker {
        match tokio::time::timeout(PATIENCE, self.reader.next()).await.expect("an answer in time").unwrap() {
            Some(Received::Message(message)) => message,
            other => panic!("a message was expected, not {other:?}"),
        }
    }
}

/// What the coordinator logs while this lives. Tests run on one thread each, and so does what they log.
pub(crate) struct Log {
    text: Arc<Mutex<Vec<u8>>>,
    _guard: tracing::subscriber::DefaultGuard,
}

#[derive(Clone)]
struct Pen(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Pen {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    pub(crate) fn capture() -> Self {
        let text = Arc::new(Mutex::new(Vec::new()));
        let pen = Pen(Arc::clone(&text));
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter("coordinator=info")
            .with_ansi(false)
            .without_time()
            .with_target(false)
            .with_writer(move || pen.clone())
            .finish();
        Self { text, _guard: tracing::subscriber::set_default(subscriber) }
    }

    /// Waits for a line that contains `part`.
    pub(crate) async fn says(&self, part: &str) {
        let said = async {
            while !String::from_utf8_lossy(&self.text.lock().unwrap()).contains(part) {
                tokio::task::yield_now().await;
            }
        };
        if tokio::time::timeout(PATIENCE, said).await.is_err() {
            panic!("`{part}` was not logged:\n{}", String::from_utf8_lossy(&self.text.lock().unwrap()));
        }
    }
}

pub(crate) fn credentials(authority: &Authority, worker: u64, now: SystemTime) -> Credentials {
    let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
    let csr = CertificateParams::default().serialize_request(&key).unwrap();
    let role = protocol::identity::CertificateRole::Worker;
    let signed = authority.sign_worker(csr.der(), WorkerId(worker), role, now).unwrap();
    Credentials {
        certificate: CertificateDer::from(signed.certificate),
        key_pkcs8: key.serialize_der(),
        authority: authority.certificate().clone(),
    }
}

pub(crate) fn hello() -> Hello {
    Hello {
        build: "test".into(),
        hostname: "box".into(),
        epoch: UnixMillis(1),
        devices: Vec::new(),
        models: Vec::new(),
        held: Vec::new(),
        peer_port: 0,
        addresses: Vec::new(),
        terms: Default::default(),
        shapes: Vec::new(),
    }
}

pub(crate) fn dialler() -> Endpoint {
    bind("127.0.0.1:0".parse().unwrap(), &EndpointSecret([3; 64]), None).unwrap().0
}

/// Code and reason with which the other side closed.
pub(crate) async fn closed(connection: &Connection) -> (u64, String) {
    match tokio::time::timeout(PATIENCE, connection.closed()).await.expect("a close in time") {
        ConnectionError::ApplicationClosed(closed) => {
            (closed.error_code.into_inner(), String::from_utf8_lossy(&closed.reason).into_owned())
        }
        other => panic!("an application close was expected, not {other:?}"),
    }
}

async fn drive(
    mut commands: mpsc::Receiver<Command>,
    script: Arc<Mutex<Script>>,
    hear: mpsc::UnboundedSender<(WorkerId, ToCoordinator)>,
) {
    while let Some(command) = commands.recv().await {
        let mut script = script.lock().unwrap();
        match command {
            Command::Connected { worker, session, outbox, reply, .. } => {
                script.outboxes.insert(worker, (session, outbox));
                let _ = reply.send(Ok(welcome()));
            }
            Command::Message { worker, message, .. } => drop(hear.send((worker, message))),
            Command::Disconnected { worker, session } => {
                script.outboxes.retain(|of, (latest, _)| (*of, *latest) != (worker, session));
            }
            Command::Token { id, reply } => drop(reply.send(Ok(script.tokens.get(&id).copied()))),
            Command::Redeem { id, spki_sha256, reply, .. } => drop(reply.send(redeem(&mut script, id, spki_sha256))),
            Command::Admissible { worker, reply, .. } => {
                let _ = reply.send(script.denied.get(&worker).map_or(Ok(()), |code| Err(*code)));
            }
            Command::Input { worker, download, reply } => {
                let mut inputs = script.inputs.get(&worker).into_iter().flatten();
                let input = inputs.find(|input| input.hash == download.hash).cloned();
                drop(reply.send(Ok(input)));
            }
            Command::RevokeToken { id, reply } => {
                script.tokens.get_mut(&id).unwrap().state = TokenState::Revoked;
                drop(reply);
            }
            other => panic!("the port has no business with {other:?}"),
        }
    }
}

fn redeem(script: &mut Script, id: TokenId, key: [u8; 32]) -> Result<WorkerId, Refused> {
    let refused = |code, text: &str| Err(Refused { code, text: text.into() });
    match script.tokens[&id].state {
        TokenState::Expired => refused(refusal::TOKEN_EXPIRED, "token has expired"),
        TokenState::Revoked => refused(refusal::TOKEN_REVOKED, "token was revoked"),
        _ => match script.redeemed.get(&id) {
            Some((used_by, worker)) if *used_by == key => Ok(*worker),
            Some(_) => refused(refusal::TOKEN_USED, "token was used"),
            None => {
                let worker = WorkerId(script.redeemed.len() as u64 + 1);
                script.redeemed.insert(id, (key, worker));
                Ok(worker)
            }
        },
    }
}

fn welcome() -> Welcome {
    Welcome {
        build: "test".into(),
        cluster: CLUSTER.into(),
        server_time: SystemTime::now().into(),
        heartbeat_interval_ms: 2000,
        store_uuid: String::new(),
        store_path: String::new(),
    }
}

/// `close` codes as they come off the wire.
pub(crate) const fn code(code: u32) -> u64 {
    code as u64
}

/// The TLS alert `unknown_ca`, as QUIC carries it: no authority of that name is believed.
pub(crate) const UNKNOWN_CA: u64 = 0x130;
/// The TLS alert `decrypt_error`: an authority of that name is believed, but its signature is not on the certificate.
pub(crate) const DECRYPT_ERROR: u64 = 0x133;

/// Names a code for a failed assertion.
pub(crate) fn name(code: u64) -> &'static str {
    close::name(code)
}
