//! The HTTP API on a unix socket: JSON in, JSON out, every failure an [`ApiError`].
//!
//! Who may open the socket may do everything: its file mode is the access control. Does not decide: the driver does; reads
//! only results from the store.
//!
//! Layout: `routes.rs` has a handler a route, `planning.rs` those about what would be, `results.rs` reads results from the
//! store, `logs.rs` what programs wrote.

mod logs;
mod planning;
mod results;
mod routes;
#[cfg(test)]
mod tests;

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use protocol::store::Store;
use protocol::store::threads::StoreThreads;
use tokio::net::UnixListener;

use crate::api::{ApiError, ErrorCode};
use crate::driver::DriverHandle;

/// Longest body of a request, bytes: a sweep of the largest size with every character escaped.
pub const BODY_BYTES_MAX: usize = 6 * protocol::limits::SWEEP_BYTES_MAX + 4096;
/// Mode of the socket: the operator's user and group.
const SOCKET_MODE: u32 = 0o660;

/// What the API works with.
#[derive(Debug, Clone)]
pub struct HttpParts {
    /// Answers and obeys.
    pub driver: DriverHandle,
    /// Where results are read.
    pub store: Store,
    /// On which threads.
    pub store_threads: StoreThreads,
    /// What join tokens say beside their secret.
    pub tokens: TokenFacts,
    /// UDP address that workers dial.
    pub listen: String,
}

/// What join tokens say beside their id and secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenFacts {
    /// Where the coordinator listens, `host:port`, best first.
    pub coordinators: Vec<String>,
    /// Name of the cluster.
    pub cluster: String,
    /// SHA-256 of the authority's public key.
    pub authority_spki_sha256: [u8; 32],
}

/// The socket could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// Another coordinator answers there.
    #[error("socket {} is in use by another coordinator", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// The system said no.
    #[error("could not listen on {}", path.display())]
    Bind {
        /// The socket.
        path: PathBuf,
        /// What it says.
        #[source]
        source: io::Error,
    },
}

/// Opens the socket; one that a dead coordinator left behind is removed.
///
/// # Errors
/// [`HttpError`].
pub fn bind(path: &Path) -> Result<UnixListener, HttpError> {
    let failed = |source| HttpError::Bind { path: path.to_owned(), source };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(failed)?;
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => return Err(HttpError::InUse { path: path.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path).map_err(failed)?,
        Err(error) => return Err(failed(error)),
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, Permissions::from_mode(SOCKET_MODE)).map_err(failed)?;
    Ok(listener)
}

/// Serves until `stop` is done and the requests under way are answered.
pub async fn serve(listener: UnixListener, parts: HttpParts, stop: impl Future<Output = ()> + Send + 'static) {
    let served = axum::serve(listener, router(parts)).with_graceful_shutdown(stop).await;
    served.expect("serving ends only when it is stopped");
}

/// Every route.
pub fn router(parts: HttpParts) -> Router {
    routes::router(Arc::new(parts))
}

/// A failed request as an answer.
struct Failed(ApiError);

impl From<ApiError> for Failed {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let status = match self.0.code {
            ErrorCode::BadSweep => StatusCode::UNPROCESSABLE_ENTITY,
            ErrorCode::BadRequest => StatusCode::BAD_REQUEST,
            ErrorCode::NotFound => StatusCode::NOT_FOUND,
            ErrorCode::Conflict => StatusCode::CONFLICT,
            ErrorCode::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            ErrorCode::JournalUnavailable | ErrorCode::Stopping => StatusCode::SERVICE_UNAVAILABLE,
            ErrorCode::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, Json(self.0)).into_response()
    }
}
