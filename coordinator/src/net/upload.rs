//! Artifacts of workers without the store's mount: the coordinator is then their one writer.
//!
//! Bytes land in a local file, hashed as they come; only a file that matches its announced name goes to the store. What is
//! cut short or wrong leaves nothing behind; the worker keeps the bytes and tries again.

use std::io;
use std::path::{Path, PathBuf};

use protocol::control::{ToWorker, Upload, UploadAnswer, close};
use protocol::ids::{ArtifactHash, WorkerId};
use protocol::quic::write_frame;
use quinn::{RecvStream, SendStream, VarInt};
use tokio::io::AsyncWriteExt;

use super::{Shared, chain};

/// Largest artifact taken from a worker, bytes; above it the answer is a refusal.
const UPLOAD_BYTES_MAX: u64 = 16 << 30;
/// Bytes asked of a stream at once.
const READ_BYTES: usize = 256 << 10;

/// Makes an empty directory for uploads under way; what an earlier process left there is of no use.
pub(super) fn prepare(directory: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    std::fs::create_dir_all(directory)
}

/// Takes one upload, and answers.
pub(super) async fn serve(
    worker: WorkerId,
    upload: &Upload,
    stream: RecvStream,
    send: &mut SendStream,
    shared: &Shared,
) {
    let path = shared.uploads.join(format!("{worker}-{}", upload.hash));
    let outcome = take(upload, stream, &path, shared).await;
    if let Err(error) = tokio::fs::remove_file(&path).await
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), "could not remove an upload: {error}");
    }
    if let Err(refused) = &outcome {
        tracing::warn!(%worker, attempt = %upload.attempt, artifact = %upload.hash, "refused an upload: {refused}");
    }
    answer(send, outcome.err()).await;
}

async fn answer(send: &mut SendStream, refused: Option<String>) {
    if write_frame(send, &ToWorker::from(UploadAnswer { refused })).await.is_ok() {
        // An unheard answer costs the worker one more try, nothing else.
        let _ = send.finish();
    }
}

/// Receives, checks and publishes; the error is what the worker is told.
async fn take(upload: &Upload, mut stream: RecvStream, path: &Path, shared: &Shared) -> Result<(), String> {
    if upload.bytes > UPLOAD_BYTES_MAX {
        // Not read: the worker is told and its stream stopped.
        let _ = stream.stop(VarInt::from_u32(close::LIMIT));
        return Err(format!("{} bytes are over the limit of {UPLOAD_BYTES_MAX}", upload.bytes));
    }
    let (hash, bytes) = receive(&mut stream, path, upload.bytes)
        .await
        .map_err(|error| format!("the coordinator could not keep it: {error}"))?;
    if (hash, bytes) != (upload.hash, upload.bytes) {
        return Err(format!(
            "{bytes} bytes named {hash} came, {} bytes named {} were announced",
            upload.bytes, upload.hash
        ));
    }
    let (store, file): (_, PathBuf) = (shared.store.clone(), path.to_owned());
    match shared.store_threads.run(move || store.publish_file(&file)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(chain(&error)),
        Err(stalled) => Err(stalled.to_string()),
    }
}

/// Reads up to one byte more than announced, so that a longer stream is noticed and a longest one is bounded.
async fn receive(stream: &mut RecvStream, path: &Path, announced: u64) -> io::Result<(ArtifactHash, u64)> {
    let mut file = tokio::fs::File::create(path).await?;
    let mut hasher = blake3::Hasher::new();
    let mut bytes = 0u64;
    while let Some(chunk) = stream.read_chunk(READ_BYTES, true).await? {
        bytes += chunk.bytes.len() as u64;
        if bytes > announced {
            let _ = stream.stop(VarInt::from_u32(close::LIMIT));
            break;
        }
        hasher.update(&chunk.bytes);
        file.write_all(&chunk.bytes).await?;
    }
    file.flush().await?;
    Ok((ArtifactHash(*hasher.finalize().as_bytes()), bytes))
}
