//! Packets between two seats of one worker: the same file under two names.

use std::path::PathBuf;
use std::time::Duration;

use protocol::control::{Failure, FailureKind};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Question, ask};
use crate::agent::core::{OfferVerdict, SeatId};

/// How often a packet for a seat that has not started is tried again, and for how long.
const EARLY_EVERY: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_secs(300);
/// How often while the seat works through what it has, for however long.
const UNREAD_EVERY: Duration = Duration::from_millis(10);

/// Gives a packet to a seat of this worker, once that has started.
pub(in crate::agent) async fn hand_over(
    questions: &mpsc::Sender<Question>,
    to: SeatId,
    own_key: [u8; 32],
    source: PathBuf,
    place: PathBuf,
) -> Result<u64, Failure> {
    let mut deadline = Instant::now() + PATIENCE;
    loop {
        let why = match ask(questions, to, own_key).await {
            OfferVerdict::Take => break,
            OfferVerdict::NotYet if Instant::now() < deadline => {
                tokio::time::sleep(EARLY_EVERY).await;
                continue;
            }
            OfferVerdict::Full => {
                tokio::time::sleep(UNREAD_EVERY).await;
                deadline = Instant::now() + PATIENCE;
                continue;
            }
            OfferVerdict::NotYet => "has not started here",
            OfferVerdict::Over => "is over here",
            OfferVerdict::NotTheSeat => "does not expect packets from this worker",
        };
        return Err(Failure::new(FailureKind::PeerLost, format!("{to} {why}")));
    }
    let linked = tokio::task::spawn_blocking(move || {
        if let Some(directory) = place.parent() {
            protocol::private_file::create_dir(directory)?;
        }
        // The same file under two names; each seat removes its own.
        std::fs::hard_link(&source, &place).or_else(|_| std::fs::copy(&source, &place).map(drop))?;
        std::fs::metadata(&place).map(|file| file.len())
    });
    let disk = |error: String| Failure::new(FailureKind::LocalDisk, format!("could not hand a packet over: {error}"));
    linked.await.map_err(|error| disk(error.to_string()))?.map_err(|error| disk(error.to_string()))
}
