//! The way to the results store: its mount, or the coordinator for boxes without one.

use std::path::PathBuf;
use std::sync::Arc;

use protocol::control::Welcome;
use protocol::store::threads::StoreThreads;
use protocol::store::{Store, StoreError};
use quinn::Connection;
use tokio::sync::watch;

/// The coordinator's connection, and what it said in its welcome; both outlive a connection's end in the last value seen.
#[derive(Debug, Clone, Default)]
pub struct Link {
    /// `None` while there is none.
    pub connection: Option<Connection>,
    /// The last welcome; `None` before the first.
    pub welcome: Option<Arc<Welcome>>,
}

/// Finds the way to the store anew for each use: mounts and connections come and go.
#[derive(Debug, Clone)]
pub struct ToStore {
    /// The operator's setting; `None`: try the coordinator's path, go through the coordinator if that is not the store.
    pub path: Option<PathBuf>,
    /// Name of this worker, as the store's writer.
    pub worker: String,
    /// Where calls into the store run: never on the network's threads.
    pub threads: StoreThreads,
    /// The coordinator.
    pub link: watch::Receiver<Link>,
}

/// The way to the store.
pub(super) enum Way {
    /// It is mounted here.
    Mount(Store),
    /// It is not; the coordinator reads and writes for us.
    Coordinator(Connection),
}

/// Why the store cannot be used now, for people.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct NotYet(pub(super) String);

impl ToStore {
    pub(super) async fn way(&self) -> Result<Way, NotYet> {
        let link = self.link.borrow().clone();
        let Some(welcome) = link.welcome else {
            return Err(NotYet("the coordinator has not yet said which store is its own".to_owned()));
        };
        let own = self.path.is_some();
        let path = self.path.clone().unwrap_or_else(|| PathBuf::from(&welcome.store_path));
        let uuid = welcome.store_uuid.clone();
        let opened = self.threads.run(move || Store::open(&path, Some(&uuid))).await;
        match (opened, link.connection) {
            (Ok(Ok(store)), _) => Ok(Way::Mount(store.with_writer(self.worker.clone()))),
            // Without a setting, a path that is not the store means: no mount here.
            (Ok(Err(error)), Some(connection)) if !own && no_mount(&error) => Ok(Way::Coordinator(connection)),
            (Ok(Err(error)), None) if !own && no_mount(&error) => {
                Err(NotYet("no mount here, and the coordinator is not connected".to_owned()))
            }
            (Ok(Err(error)), _) => Err(NotYet(chain(&error))),
            (Err(stalled), _) => Err(NotYet(stalled.to_string())),
        }
    }
}

fn no_mount(error: &StoreError) -> bool {
    matches!(error, StoreError::NotMounted { .. } | StoreError::WrongStore { .. })
}

/// Runs a call on local disk where it may block.
pub(super) async fn blocking<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> Result<T, NotYet> {
    tokio::task::spawn_blocking(call).await.map_err(|error| NotYet(error.to_string()))
}

/// An error with its causes.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
