//! Artifacts that a worker without the store's mount needs for a seat: those, and no others.
//!
//! The file is read whole and checked against its name before a byte leaves; the worker checks again what arrives.

use std::fs::File;
use std::io::Read;

use protocol::control::{Download, DownloadAnswer, ToWorker};
use protocol::ids::WorkerId;
use protocol::quic::write_frame;
use quinn::SendStream;

use super::{Shared, chain};

/// Bytes read and written at once.
const PIECE_BYTES: usize = 1 << 20;

/// Answers one download, and sends what it asks for.
pub(super) async fn serve(worker: WorkerId, wanted: Download, send: &mut SendStream, shared: &Shared) {
    let (attempt, hash) = (wanted.attempt, wanted.hash);
    let opened = open(worker, wanted, shared).await;
    let (refused, bytes) = match &opened {
        Ok((_, bytes)) => (None, *bytes),
        Err(refused) => {
            tracing::warn!(%worker, %attempt, artifact = %hash, "refused a download: {refused}");
            (Some(refused.clone()), 0)
        }
    };
    if write_frame(send, &ToWorker::from(DownloadAnswer { refused, bytes })).await.is_err() {
        return;
    }
    if let Ok((file, _)) = opened
        && let Err(problem) = copy(file, send, shared).await
    {
        // The stream ends before its time: the worker sees that bytes are missing, and asks again.
        tracing::warn!(%worker, %attempt, artifact = %hash, "a download broke off: {problem}");
        let _ = send.reset(quinn::VarInt::from_u32(protocol::control::close::RESTARTING));
        return;
    }
    let _ = send.finish();
}

/// The file and its length; the error is what the worker is told.
async fn open(worker: WorkerId, wanted: Download, shared: &Shared) -> Result<(File, u64), String> {
    let hash = wanted.hash;
    let input = shared.driver.input(worker, wanted).await.map_err(|error| error.to_string())?;
    if input.is_none() {
        return Err("no seat that this worker holds needs it".to_owned());
    }
    let store = shared.store.clone();
    let opened = shared.store_threads.run(move || {
        let file = store.open_verified(&hash).map_err(|error| chain(&error))?;
        let bytes = file.metadata().map_err(|error| error.to_string())?.len();
        Ok((file, bytes))
    });
    opened.await.map_err(|stalled| stalled.to_string())?
}

async fn copy(mut file: File, send: &mut SendStream, shared: &Shared) -> Result<(), String> {
    loop {
        let read = shared.store_threads.run(move || {
            let mut piece = Vec::with_capacity(PIECE_BYTES);
            let read = (&mut file).take(PIECE_BYTES as u64).read_to_end(&mut piece);
            read.map(|_| (file, piece))
        });
        let read = read.await.map_err(|stalled| stalled.to_string())?;
        let (rest, piece) = read.map_err(|error| error.to_string())?;
        if piece.is_empty() {
            return Ok(());
        }
        file = rest;
        send.write_all(&piece).await.map_err(|error| error.to_string())?;
    }
}
