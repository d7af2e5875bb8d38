//! Reads what committed shards measured from the store, each file checked against its name.
//!
//! What cannot be read says why in its place; the rest is still an answer. Writes nothing.

use protocol::ids::ArtifactHash;
use protocol::limits::EXEC_FRAME_BYTES_MAX;
use protocol::results::ShardResult;
use protocol::store::Store;
use protocol::store::threads::StoreThreads;

use crate::api::{ApiError, ErrorCode, OutputRow, RESULT_NAME, RunResults, SeatResult, TrainingRow};
use crate::report::projector::gates_open;

/// Files read in one call of the store: few enough to be done well within its deadline.
const FILES_PER_CALL: usize = 64;

/// What became of one file.
type Read = Result<ShardResult, String>;

/// Fills in the results of `answer`.
///
/// # Errors
/// [`ErrorCode::Internal`] if the store does not answer.
pub(super) async fn fill(answer: &mut RunResults, store: &Store, threads: &StoreThreads) -> Result<(), ApiError> {
    let mut seats: Vec<&mut SeatResult> = answer.shards.iter_mut().flat_map(|shard| &mut shard.seats).collect();
    for chunk in seats.chunks_mut(FILES_PER_CALL) {
        let wanted: Vec<_> = chunk.iter().map(|seat| result_of(seat)).collect();
        let store = store.clone();
        let read =
            threads.run(move || wanted.into_iter().map(|wanted| read(&store, wanted?)).collect::<Vec<_>>()).await;
        let read = read.map_err(|stalled| {
            ApiError::new(ErrorCode::Internal, stalled.to_string())
                .hint("results are safe there; ask again once it is back")
        })?;
        for (seat, read) in chunk.iter_mut().zip(read) {
            match read {
                Some(Ok(result)) => seat.result = Some(result),
                Some(Err(why)) => seat.unreadable = Some(why),
                None => {}
            }
        }
    }
    Ok(())
}

/// Fills in what the newest steps of each training said. What cannot be read is left out: it is told in the results.
///
/// # Errors
/// [`ErrorCode::Internal`] if the store does not answer.
pub(super) async fn fill_trainings(
    trainings: &mut [TrainingRow],
    store: &Store,
    threads: &StoreThreads,
) -> Result<(), ApiError> {
    for training in trainings {
        let Some(OutputRow { hash, bytes, .. }) = training.newest.clone() else { continue };
        let store = store.clone();
        let read = threads.run(move || read_result(&store, hash, bytes)).await;
        let read = read.map_err(|stalled| ApiError::new(ErrorCode::Internal, stalled.to_string()))?;
        if let Ok(ShardResult::ProjectorSteps(steps)) = read {
            training.loss = steps.steps.last().map(|row| row.loss);
            let count = |gates: usize| u32::try_from(gates).unwrap_or(u32::MAX);
            training.gates_open = Some((count(gates_open(&steps.gates)), count(2 * steps.gates.len())));
        }
    }
    Ok(())
}

fn result_of(seat: &SeatResult) -> Option<(ArtifactHash, u64)> {
    seat.outputs.iter().find(|output| output.name == RESULT_NAME).map(|output| (output.hash, output.bytes))
}

fn read(store: &Store, (hash, bytes): (ArtifactHash, u64)) -> Option<Read> {
    Some(read_result(store, hash, bytes))
}

fn read_result(store: &Store, hash: ArtifactHash, bytes: u64) -> Read {
    if bytes > EXEC_FRAME_BYTES_MAX as u64 {
        return Err(format!("{bytes} bytes are more than a result may have"));
    }
    let text = store.read_verified(&hash).map_err(|error| error.to_string())?;
    serde_json::from_slice(&text).map_err(|error| format!("{hash} is not a result: {error}"))
}
