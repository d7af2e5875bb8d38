//! Reads what a committed shard's program wrote from the store. Writes nothing.

use protocol::store::Store;
use protocol::store::threads::StoreThreads;

use crate::api::{ApiError, ErrorCode, ShardLog};
use crate::driver::whole_characters;

/// Most text in one answer, bytes: the longest output a worker keeps takes sixteen.
const TEXT_BYTES_MAX: usize = 4 << 20;

/// Fills in the text of a log whose output is an artifact.
///
/// # Errors
/// [`ErrorCode::Internal`] if the store does not answer or the artifact is damaged.
pub(super) async fn fill(log: &mut ShardLog, store: &Store, threads: &StoreThreads) -> Result<(), ApiError> {
    let Some(artifact) = &log.artifact else { return Ok(()) };
    let (store, hash) = (store.clone(), artifact.hash);
    let internal = |error: String| ApiError::new(ErrorCode::Internal, error);
    let read = threads.run(move || store.read_verified(&hash)).await;
    let bytes = read
        .map_err(|stalled| internal(stalled.to_string()).hint("the output is safe there; ask again once it is back"))?
        .map_err(|error| internal(error.to_string()))?;
    let rest = usize::try_from(log.offset).ok().and_then(|offset| bytes.get(offset..)).unwrap_or_default();
    let (text, used) = match rest.get(..TEXT_BYTES_MAX) {
        Some(piece) => whole_characters(piece),
        None => (String::from_utf8_lossy(rest).into_owned(), rest.len()),
    };
    log.ended = used == rest.len();
    (log.text, log.next) = (text, log.offset + used as u64);
    Ok(())
}
