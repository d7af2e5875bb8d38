//! Cache packets from worker to worker: offered, granted, sent in checked chunks, accepted whole.
//!
//! A peer is who its certificate says, and may send only to the seat that the coordinator named it for. A packet lies on
//! disk from its first chunk on, by the root of its content, so that a cut link costs the chunks under way and no more.
//!
//! Layout: [`header`] checks what an OFFER claims before anything is allocated, [`packet`] names a packet's content,
//! [`inbox`] holds what is under way here, [`serve`] speaks as receiver, [`send`] as sender; [`local`] is
//! for two seats of one worker.

pub mod header;
pub mod inbox;
pub(in crate::agent) mod local;
pub mod packet;
pub mod send;
pub mod serve;

use tokio::sync::{mpsc, oneshot};

use super::core::{OfferVerdict, SeatId};

/// Whether a packet may come: asked of the loop that owns the agent's decisions.
#[derive(Debug)]
pub struct Question {
    /// The seat that it is for.
    pub to: SeatId,
    /// Public key of who offers it.
    pub peer_spki_sha256: [u8; 32],
    /// Takes the answer.
    pub reply: oneshot::Sender<OfferVerdict>,
}

/// Asks; a loop that is gone knows of no seat.
pub(crate) async fn ask(questions: &mpsc::Sender<Question>, to: SeatId, peer_spki_sha256: [u8; 32]) -> OfferVerdict {
    let (reply, answer) = oneshot::channel();
    let question = Question { to, peer_spki_sha256, reply };
    match questions.send(question).await {
        Ok(()) => answer.await.unwrap_or(OfferVerdict::Over),
        Err(_) => OfferVerdict::Over,
    }
}
