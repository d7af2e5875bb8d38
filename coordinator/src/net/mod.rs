//! The coordinator's UDP port: one endpoint, an accept loop, a task for each connection.
//!
//! Every peer passes [`protocol::quic::admit`] before anything it says is read. Decides nothing about work: sessions hand
//! what workers say to the driver and write what the driver says.
//!
//! Layout: `join` gives certificates to boxes with a token, `session` carries a worker's control stream, `transfers`
//! the streams of artifacts of workers without the store's mount (`upload`, `download`), `rate` bounds guessing.

mod download;
mod join;
mod rate;
mod session;
mod transfers;
mod upload;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use protocol::control::{ALPN_CONTROL, ALPN_JOIN, close};
use protocol::ids::WorkerId;
use protocol::quic::settings::{RETRY_ABOVE_HANDSHAKES, SettingsError, Side};
use protocol::quic::{Admitted, admit, bind, explain, server_config};
use protocol::store::Store;
use protocol::store::threads::StoreThreads;
use quinn::{Endpoint, Incoming, VarInt};

use self::rate::JoinLimits;
use crate::authority::Authority;
use crate::driver::DriverHandle;

/// A peer that has not finished its handshake, or said its first word, by then is dropped.
const FIRST_WORD: Duration = Duration::from_secs(10);
/// How long a stopping coordinator waits for its closes to be heard.
const LAST_WORD: Duration = Duration::from_secs(2);

/// The port could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The authority's credentials do not make a TLS configuration.
    #[error("could not set up TLS")]
    Settings(#[from] SettingsError),
    /// The address cannot be bound.
    #[error("could not listen on UDP {address}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// A directory or thread is missing.
    #[error("could not prepare {what}")]
    Prepare {
        /// What for.
        what: &'static str,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

/// What the port works with.
#[derive(Debug)]
pub struct NetParts {
    /// Signs, and lends its credentials.
    pub authority: Arc<Authority>,
    /// Hears what workers say.
    pub driver: DriverHandle,
    /// Takes uploads.
    pub store: Store,
    /// Directory on local disk for uploads under way; emptied at start.
    pub uploads: PathBuf,
}

/// The open port. Dropping it closes every connection without a word; [`Net::shutdown`] says goodbye.
#[derive(Debug)]
pub struct Net {
    endpoint: Endpoint,
}

/// What the tasks share.
struct Shared {
    authority: Arc<Authority>,
    driver: DriverHandle,
    store: Store,
    store_threads: StoreThreads,
    uploads: PathBuf,
    limits: Mutex<JoinLimits>,
    handshakes: AtomicUsize,
    sessions: Sessions,
}

/// Numbers of sessions: the latest one of each worker.
struct Sessions {
    next: AtomicU64,
    latest: Mutex<BTreeMap<WorkerId, u64>>,
}

impl Sessions {
    /// A new session of `worker`, larger than all before.
    fn begin(&self, worker: WorkerId) -> u64 {
        let session = self.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.latest).insert(worker, session);
        session
    }

    fn is_latest(&self, worker: WorkerId, session: u64) -> bool {
        lock(&self.latest).get(&worker) == Some(&session)
    }
}

/// The data behind these locks is whole after every statement, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Net {
    /// Opens the port and begins to accept.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn open(listen: SocketAddr, parts: NetParts) -> Result<Self, NetError> {
        let prepare = |what| move |source| NetError::Prepare { what, source };
        upload::prepare(&parts.uploads).map_err(prepare("the directory for uploads"))?;
        let store_threads = StoreThreads::start().map_err(prepare("threads for the store"))?;
        let server = server_config(&parts.authority.credentials(), &[ALPN_CONTROL, ALPN_JOIN], Side::Coordinator)?;
        let (endpoint, _) = bind(listen, parts.authority.endpoint_secret(), Some(server))
            .map_err(|source| NetError::Bind { address: listen, source })?;
        let shared = Arc::new(Shared {
            authority: parts.authority,
            driver: parts.driver,
            store: parts.store.with_writer("coordinator"),
            store_threads,
            uploads: parts.uploads,
            limits: Mutex::new(JoinLimits::default()),
            handshakes: AtomicUsize::new(0),
            sessions: Sessions { next: AtomicU64::new(1), latest: Mutex::new(BTreeMap::new()) },
        });
        tokio::spawn(accept(endpoint.clone(), shared));
        Ok(Self { endpoint })
    }

    /// Where it listens; the port is the one that the system chose if 0 was asked for.
    ///
    /// # Errors
    /// If the socket is gone.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// Closes every connection with `close::RESTARTING`: workers go on working and dial again.
    pub async fn shutdown(self) {
        self.endpoint.close(VarInt::from_u32(close::RESTARTING), b"the coordinator stops");
        let _ = tokio::time::timeout(LAST_WORD, self.endpoint.wait_idle()).await;
    }
}

async fn accept(endpoint: Endpoint, shared: Arc<Shared>) {
    while let Some(incoming) = endpoint.accept().await {
        let busy = shared.handshakes.load(Ordering::Relaxed) >= RETRY_ABOVE_HANDSHAKES;
        if busy && incoming.may_retry() && !incoming.remote_address_validated() {
            // `may_retry` was just true; if it is not any more the peer is gone.
            let _ = incoming.retry();
            continue;
        }
        tokio::spawn(connection(incoming, Arc::clone(&shared)));
    }
}

async fn connection(incoming: Incoming, shared: Arc<Shared>) {
    let remote = canonical(incoming.remote_address());
    shared.handshakes.fetch_add(1, Ordering::Relaxed);
    let handshake = async { incoming.accept()?.await };
    let handshake = tokio::time::timeout(FIRST_WORD, handshake).await;
    shared.handshakes.fetch_sub(1, Ordering::Relaxed);
    let connection = match handshake {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            let (why, _) = explain(&error);
            tracing::warn!(%remote, "refused a connection: {why}");
            return;
        }
        Err(_) => {
            tracing::debug!(%remote, "a handshake took too long");
            return;
        }
    };
    let driver = shared.driver.clone();
    let standing = |facts: protocol::quic::CertificateFacts| async move {
        driver.admissible(facts.identity.worker, facts.spki_sha256).await
    };
    match admit(&connection, shared.authority.cluster(), standing).await {
        Ok(Admitted::Joiner(joiner)) => join::serve(&joiner, remote, &shared).await,
        Ok(Admitted::Member(member)) => session::serve(&member, remote, &shared).await,
        Err(error) => tracing::warn!(%remote, "refused a connection: {}", chain(&error)),
    }
}

/// An IPv4 address that came in over an IPv6 socket, as IPv4.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// An error with its causes, for the log.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
