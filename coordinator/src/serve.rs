//! `bonepile serve`: the coordinator, its parts started in order and stopped in order.
//!
//! Journal first (its lock keeps a second coordinator out), then the driver that replays it, then the port for workers, then
//! the API. Does not read files but through those parts, and does not print.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use protocol::config::ClusterConfig;
use protocol::store::threads::{Stalled, StoreThreads};
use protocol::store::{Store, StoreError};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::authority::{Authority, AuthorityError};
use crate::clock;
use crate::driver::{self, DriverError, DriverHandle, DriverParts};
use crate::http::{self, HttpError, HttpParts, TokenFacts};
use crate::journal::{Header, JournalError, JournalThread, SqliteJournal};
use crate::net::{Net, NetError, NetParts};
use crate::scheduler::Settings;

/// Name of the journal in the state directory.
pub const JOURNAL_FILE: &str = "journal.db";
/// How long requests under way are waited for at the end.
const LAST_ANSWERS: Duration = Duration::from_secs(5);

/// The coordinator cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The keys.
    #[error("could not load the cluster's keys")]
    Authority(#[from] AuthorityError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The journal reads but does not replay.
    #[error("could not replay the journal")]
    Driver(#[from] DriverError),
    /// The store.
    #[error("could not open the results store")]
    Store(#[from] StoreError),
    /// The store hangs.
    #[error(transparent)]
    Stalled(#[from] Stalled),
    /// The store has results, but there is no journal that could know them.
    #[error("there is no journal at {}, but the store has results of {run}", journal.display())]
    JournalLost {
        /// Where the journal should be.
        journal: PathBuf,
        /// A run of which the store has manifests.
        run: String,
    },
    /// The keys are another cluster's.
    #[error("the keys in {} are those of cluster {found}, cluster.name is {expected}", state_dir.display())]
    OtherCluster {
        /// Where the keys are.
        state_dir: PathBuf,
        /// The cluster in the authority's certificate.
        found: String,
        /// The cluster in the settings.
        expected: String,
    },
    /// The port for workers.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The API's socket.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// The system gives no thread or signal, or a directory cannot be made.
    #[error("could not prepare {what}")]
    Prepare {
        /// What for.
        what: &'static str,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
}

impl ServeError {
    /// Whether the journal itself is at fault, not its surroundings: exit code 5.
    pub fn is_journal_damage(&self) -> bool {
        match self {
            Self::Journal(error) => error.is_damage(),
            Self::Driver(error) => error.is_damage(),
            Self::JournalLost { .. } => true,
            _ => false,
        }
    }

    /// What an operator could do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Journal(error) | Self::Driver(DriverError::Journal(error)) => error.hint(),
            Self::Store(error) => error.hint(),
            Self::JournalLost { .. } => Some(
                "put the newest backup of the state directory back, or use another store for a new cluster".to_owned(),
            ),
            Self::OtherCluster { .. } => {
                Some("check cluster.name and coordinator.state_dir in cluster.toml".to_owned())
            }
            Self::Authority(AuthorityError::Missing { .. }) => Some("make the cluster with `bonepile init`".to_owned()),
            Self::Http(HttpError::InUse { .. }) => Some("stop the other `bonepile serve` first".to_owned()),
            Self::Http(HttpError::Bind { path, .. }) if path.as_os_str().len() > 100 => {
                Some("a socket's path has at most 107 bytes: set coordinator.api_socket to a shorter one".to_owned())
            }
            _ => None,
        }
    }
}

/// A running coordinator.
#[derive(Debug)]
pub struct Coordinator {
    driver: DriverHandle,
    driver_task: JoinHandle<()>,
    net: Net,
    listen: SocketAddr,
    http_stop: oneshot::Sender<()>,
    http_task: JoinHandle<()>,
    api_socket: PathBuf,
}

/// Runs a coordinator until SIGTERM or SIGINT.
///
/// # Errors
/// If it cannot start. While it runs, nothing that goes wrong ends it.
pub async fn run(config: &ClusterConfig) -> Result<(), ServeError> {
    let prepare = |source| ServeError::Prepare { what: "signals", source };
    let mut terminate = signal(SignalKind::terminate()).map_err(prepare)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(prepare)?;
    let mut coordinator = Coordinator::start(config).await?;
    tokio::select! {
        _ = terminate.recv() => tracing::info!("stopping: SIGTERM"),
        _ = interrupt.recv() => tracing::info!("stopping: SIGINT"),
        // Only a bug ends it early; the process then ends too, and whoever watches over it starts it again.
        _ = &mut coordinator.driver_task => tracing::error!("stopping: the driver has ended"),
    }
    coordinator.stop().await;
    Ok(())
}

impl Coordinator {
    /// Starts all parts; when this returns, workers and the API are answered.
    ///
    /// # Errors
    /// [`ServeError`]; nothing keeps running then.
    pub async fn start(config: &ClusterConfig) -> Result<Self, ServeError> {
        let authority = load_authority(config)?;
        let prepare = |what| move |source| ServeError::Prepare { what, source };
        let store_threads = StoreThreads::start().map_err(prepare("threads for the store"))?;
        let (journal, store) = open_journal_and_store(config, &store_threads).await?;
        let journal = JournalThread::start(Box::new(journal)).map_err(prepare("a thread for the journal"))?;
        let settings = Settings {
            lease_ttl_ms: config.lease_ttl_ms,
            attempts_max: config.attempts_max,
            weights: config.weights.clone(),
            ..Settings::default()
        };
        let (driver, driver_task) = driver::start(DriverParts {
            journal,
            settings,
            store: store.clone(),
            store_threads: store_threads.clone(),
        })
        .await?;
        let net = Net::open(
            listen_address(config),
            NetParts {
                authority: Arc::clone(&authority),
                driver: driver.clone(),
                store: store.clone(),
                uploads: config.state_dir.join("uploads"),
            },
        )?;
        let listen = net.local_addr().map_err(prepare("the UDP port"))?;
        let listener = http::bind(&config.api_socket)?;
        let tokens = TokenFacts {
            coordinators: advertised(config, listen),
            cluster: config.name.clone(),
            authority_spki_sha256: authority.spki_sha256()?,
        };
        let parts = HttpParts { driver: driver.clone(), store, store_threads, tokens, listen: listen.to_string() };
        let (http_stop, stopped) = oneshot::channel();
        let stop = async { drop(stopped.await) };
        let http_task = tokio::spawn(http::serve(listener, parts, stop));
        tracing::info!(cluster = config.name, %listen, api = %config.api_socket.display(), "ready");
        let api_socket = config.api_socket.clone();
        Ok(Self { driver, driver_task, net, listen, http_stop, http_task, api_socket })
    }

    /// UDP address that workers dial; the port is the one that the system chose if 0 was asked for.
    pub fn listen(&self) -> SocketAddr {
        self.listen
    }

    /// Answers what is under way, tells workers to dial again, and lets go of the journal.
    pub async fn stop(self) {
        // The other end is gone if the task has ended.
        let _ = self.http_stop.send(());
        if tokio::time::timeout(LAST_ANSWERS, self.http_task).await.is_err() {
            tracing::warn!("requests under way were cut off");
        }
        // One that stays is told from a living one at the next start, but looks like one to people.
        if let Err(error) = std::fs::remove_file(&self.api_socket) {
            tracing::debug!(%error, "could not remove the API's socket");
        }
        self.net.shutdown().await;
        self.driver.stop().await;
        tracing::info!("stopped");
    }
}

/// Host names and addresses that the coordinator's certificate should have: those it advertises.
pub fn certificate_names(config: &ClusterConfig) -> Vec<String> {
    let host = |address: &String| {
        let host = address.rsplit_once(':').map_or(address.as_str(), |(host, _)| host);
        host.trim_start_matches('[').trim_end_matches(']').to_owned()
    };
    config.advertise.iter().map(host).collect()
}

fn load_authority(config: &ClusterConfig) -> Result<Arc<Authority>, ServeError> {
    let authority = Authority::load(&config.state_dir, &certificate_names(config), clock::system())?;
    if authority.cluster() != config.name {
        return Err(ServeError::OtherCluster {
            state_dir: config.state_dir.clone(),
            found: authority.cluster().to_owned(),
            expected: config.name.clone(),
        });
    }
    Ok(Arc::new(authority))
}

/// Opens the journal and the store that belongs to it. A cluster that never ran has no journal yet: it gets one, tied to the
/// store that is there now.
async fn open_journal_and_store(
    config: &ClusterConfig,
    threads: &StoreThreads,
) -> Result<(SqliteJournal, Store), ServeError> {
    let path = config.state_dir.join(JOURNAL_FILE);
    let root = config.store_path.clone();
    if path.exists() {
        let journal = SqliteJournal::open(&path, &config.name)?;
        let expected = crate::journal::Journal::header(&journal).store_uuid.clone();
        let store = threads.run(move || Store::open(&root, Some(&expected))).await??;
        return Ok((journal, store));
    }
    let (store, run) = threads
        .run(move || {
            let store = Store::open(&root, None)?;
            let run = first_run(&store);
            Ok::<_, StoreError>((store, run))
        })
        .await??;
    // A new journal would give the same names to other results.
    if let Some(run) = run {
        return Err(ServeError::JournalLost { journal: path, run });
    }
    let header = Header {
        id: clock::random_id(),
        cluster: config.name.clone(),
        store_uuid: store.uuid().to_owned(),
        seed: clock::random_seed(),
        created_at: clock::now(),
    };
    tracing::info!(journal = %path.display(), "a new journal begins");
    Ok((SqliteJournal::create(&path, &header)?, store))
}

/// A run of which the store has manifests.
fn first_run(store: &Store) -> Option<String> {
    let entries = std::fs::read_dir(store.root().join("manifests")).ok()?;
    let mut names: Vec<_> =
        entries.filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned())).collect();
    names.sort();
    names.into_iter().next()
}

fn listen_address(config: &ClusterConfig) -> SocketAddr {
    config.listen.parse().expect("the settings were checked for an address")
}

/// Where a box finds us: what the operator says, else the address we listen on, else this host's name.
fn advertised(config: &ClusterConfig, listen: SocketAddr) -> Vec<String> {
    if !config.advertise.is_empty() {
        return config.advertise.clone();
    }
    let is_any = match listen.ip() {
        IpAddr::V4(ip) => ip.is_unspecified(),
        IpAddr::V6(ip) => ip.is_unspecified(),
    };
    if !is_any {
        return vec![listen.to_string()];
    }
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = match name.trim() {
        "" => "localhost",
        name => name,
    };
    vec![format!("{name}:{}", listen.port())]
}
