//! The receiving side: admits peers, answers offers, takes chunks, accepts whole packets.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use protocol::control::close;
use protocol::limits::OFFERS_OPEN_MAX;
use protocol::peer::{Accept, ChunkHeader, Grant, Offer, PeerMessage, Refuse, Wait, refuse};
use protocol::quic::admission::Alpn;
use protocol::quic::{Admitted, FrameReader, Member, Received, admit, close_with, explain, write_frame};
use quinn::{Endpoint, Incoming, RecvStream, SendStream, VarInt};
use tokio::sync::{Semaphore, mpsc};

use super::inbox::{ChunkError, FinishError, Inbox, Partial, Place};
use super::{Question, ask, header};
use crate::agent::core::{Input, OfferVerdict, SeatId};
use crate::agent::way::chain;

/// A peer must finish its handshake by then.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// A transfer without a chunk for so long is over; its sender may offer it again.
const STALLED: Duration = Duration::from_secs(30);
/// Pause asked of a sender that is early.
const EARLY_MS: u64 = 200;
/// Pause asked of a sender while too much is under way.
const FULL_MS: u64 = 1000;
/// Pause asked of a sender while the seat works through what it has: short, or the seat would wait for it.
const UNREAD_MS: u64 = 20;
/// Chunks of one connection in memory at once.
const CHUNKS_AT_ONCE: usize = 16;

/// What the receiving side works with.
#[derive(Debug)]
pub struct Receiving {
    /// The cluster whose peers are admitted.
    pub cluster: String,
    /// Packets under way.
    pub inbox: Inbox,
    /// Below it, each seat's directory.
    pub work: PathBuf,
    /// Hears of arrivals.
    pub inputs: mpsc::Sender<Input>,
    /// Answers whether a packet may come.
    pub questions: mpsc::Sender<Question>,
}

impl Receiving {
    /// Where a packet for a seat lies once it is whole.
    pub fn place(&self, to: SeatId, key: &str) -> PathBuf {
        self.work.join(format!("{}.in", to.directory_name())).join(format!("{key}.safetensors"))
    }
}

/// One peer's connection.
struct Peer {
    receiving: Arc<Receiving>,
    member: Member,
    transfers: Mutex<BTreeMap<u64, Arc<Transfer>>>,
    memory: Arc<Semaphore>,
}

/// A packet that this peer sends now.
struct Transfer {
    partial: Arc<Partial>,
    /// Why it cannot go on; the first reason counts.
    broken: mpsc::Sender<Refuse>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Admits peers until the endpoint closes.
pub async fn accept(endpoint: Endpoint, receiving: Arc<Receiving>) {
    while let Some(incoming) = endpoint.accept().await {
        tokio::spawn(connection(incoming, Arc::clone(&receiving)));
    }
}

async fn connection(incoming: Incoming, receiving: Arc<Receiving>) {
    let remote = incoming.remote_address();
    let handshake = async { incoming.accept()?.await };
    let connection = match tokio::time::timeout(HANDSHAKE, handshake).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            tracing::warn!(%remote, "refused a peer: {}", explain(&error).0);
            return;
        }
        Err(_) => return,
    };
    // Who may send what is decided by the seat it is for; a certificate of this cluster is enough to ask.
    let member = match admit(&connection, &receiving.cluster, |_| async { Ok(()) }).await {
        Ok(Admitted::Member(member)) if member.alpn() == Alpn::Peer => member,
        Ok(_) => {
            connection.close(VarInt::from_u32(close::ROLE), b"only peers are served here");
            return;
        }
        Err(error) => {
            tracing::warn!(%remote, "refused a peer: {}", chain(&error));
            return;
        }
    };
    tracing::debug!(%remote, worker = %member.identity().worker, "a peer has connected");
    let memory = Arc::new(Semaphore::new(CHUNKS_AT_ONCE));
    let peer = Arc::new(Peer { receiving, member, transfers: Mutex::default(), memory });
    tokio::select! {
        () = offers(&peer) => {}
        () = chunks(&peer) => {}
    }
}

/// Each bidirectional stream is one transfer's conversation.
async fn offers(peer: &Arc<Peer>) {
    while let Ok((send, receive)) = peer.member.connection().accept_bi().await {
        let peer = Arc::clone(peer);
        tokio::spawn(async move { converse(&peer, send, FrameReader::new(receive)).await });
    }
}

async fn converse(peer: &Arc<Peer>, mut send: SendStream, mut reader: FrameReader<PeerMessage>) {
    loop {
        let offer = match reader.next().await {
            Ok(Some(Received::Message(PeerMessage::Offer(offer)))) => offer,
            Ok(None) => return,
            // It crossed a refusal.
            Ok(Some(Received::Message(PeerMessage::Done(_)))) => continue,
            Ok(Some(_)) => {
                peer.member.connection().close(VarInt::from_u32(close::PROTOCOL), b"an offer was expected");
                return;
            }
            Err(error) => {
                close_with(peer.member.connection(), &error);
                return;
            }
        };
        let answer = match consider(peer, &offer).await {
            Ok(Place::Partial(partial)) => receive(peer, &offer, partial, &mut send, &mut reader).await,
            Ok(Place::Arrived) => arrived_before(&offer, &mut send, &mut reader).await,
            Ok(Place::Full) => {
                let reason = "too much is under way here".to_owned();
                Some(Wait { transfer: offer.transfer, retry_in_ms: FULL_MS, reason, busy: false }.into())
            }
            Err(answer) => Some(answer),
        };
        let Some(answer) = answer else { return };
        if let PeerMessage::Refuse(refuse) = &answer {
            let (from, attempt) = (peer.member.identity().worker, offer.attempt);
            tracing::warn!(%from, %attempt, key = protocol::limits::clean_text(&offer.key), "refused a packet: {refuse}");
        }
        if write_frame(&mut send, &answer).await.is_err() {
            return;
        }
    }
}

/// Whether a packet may come, and where to.
async fn consider(peer: &Peer, offer: &Offer) -> Result<Place, PeerMessage> {
    let transfer = offer.transfer;
    let refused = |code, text: String| PeerMessage::from(Refuse { transfer, code, text });
    let to = SeatId { attempt: offer.attempt, role: offer.to };
    match ask(&peer.receiving.questions, to, peer.member.spki_sha256()).await {
        OfferVerdict::Take => {}
        OfferVerdict::NotYet => {
            let reason = format!("{to} has not started here");
            return Err(Wait { transfer, retry_in_ms: EARLY_MS, reason, busy: false }.into());
        }
        OfferVerdict::Full => {
            let reason = format!("{to} has not read what came before");
            return Err(Wait { transfer, retry_in_ms: UNREAD_MS, reason, busy: true }.into());
        }
        OfferVerdict::NotTheSeat => {
            let text = format!("{} has no seat in {}", peer.member.identity().worker, offer.attempt);
            return Err(refused(refuse::NOT_THE_SEAT, text));
        }
        OfferVerdict::Over => return Err(refused(refuse::ATTEMPT_OVER, format!("{to} is over here"))),
    }
    header::check(offer).map_err(|error| refused(error.code, error.text))?;
    if lock(&peer.transfers).len() >= OFFERS_OPEN_MAX {
        return Err(refused(refuse::TOO_MANY, format!("more than {OFFERS_OPEN_MAX} offers are open")));
    }
    let (receiving, offer) = (Arc::clone(&peer.receiving), offer.clone());
    let placed = tokio::task::spawn_blocking(move || receiving.inbox.place(to, &offer, Instant::now())).await;
    match placed {
        Ok(Ok(place)) => Ok(place),
        Ok(Err(error)) => Err(refused(refuse::LOCAL_DISK, format!("could not make a place for it: {error}"))),
        Err(error) => Err(refused(refuse::LOCAL_DISK, error.to_string())),
    }
}

/// Its sender missed the ACCEPT: it is told that every chunk is here, and accepted again.
async fn arrived_before(
    offer: &Offer,
    send: &mut SendStream,
    reader: &mut FrameReader<PeerMessage>,
) -> Option<PeerMessage> {
    let count = super::packet::chunk_count(offer.payload_bytes, offer.chunk_bytes) as usize;
    let grant = Grant { transfer: offer.transfer, have: vec![0xff; count.div_ceil(8)] };
    write_frame(send, &PeerMessage::from(grant)).await.ok()?;
    match reader.next().await {
        Ok(Some(Received::Message(PeerMessage::Done(_)))) => {
            Some(Accept { transfer: offer.transfer, root: offer.root }.into())
        }
        _ => None,
    }
}

/// From GRANT to ACCEPT; `None` if the conversation broke off.
async fn receive(
    peer: &Arc<Peer>,
    offer: &Offer,
    partial: Arc<Partial>,
    send: &mut SendStream,
    reader: &mut FrameReader<PeerMessage>,
) -> Option<PeerMessage> {
    let (broken, mut breaks) = mpsc::channel(1);
    let transfer = Arc::new(Transfer { partial: Arc::clone(&partial), broken });
    // Before the grant goes out: chunks may follow it at once.
    lock(&peer.transfers).insert(offer.transfer, transfer);
    let grant = Grant { transfer: offer.transfer, have: partial.have() };
    let granted = write_frame(send, &PeerMessage::from(grant)).await;
    let answer = match granted {
        Ok(()) => tokio::select! {
            refused = breaks.recv() => refused.map(PeerMessage::from),
            done = wait_for_all(&partial, reader) => match done {
                Ok(()) => Some(finish(peer, offer, &partial).await),
                Err(Some(refused)) => Some(Refuse { transfer: offer.transfer, ..refused }.into()),
                Err(None) => None,
            },
        },
        Err(_) => None,
    };
    lock(&peer.transfers).remove(&offer.transfer);
    peer.receiving.inbox.release(&partial, Instant::now());
    answer
}

/// Until the sender is done and every chunk is here: chunks travel on streams of their own and may come after DONE.
async fn wait_for_all(partial: &Partial, reader: &mut FrameReader<PeerMessage>) -> Result<(), Option<Refuse>> {
    let mut progress = partial.progress();
    match reader.next().await {
        Ok(Some(Received::Message(PeerMessage::Done(_)))) => {}
        _ => return Err(None),
    }
    loop {
        if *progress.borrow_and_update() >= partial.count() {
            return Ok(());
        }
        match tokio::time::timeout(STALLED, progress.changed()).await {
            Ok(Ok(())) => {}
            _ => {
                let text = format!("{} of {} chunks came", *progress.borrow(), partial.count());
                return Err(Some(Refuse { transfer: 0, code: refuse::CORRUPT, text }));
            }
        }
    }
}

async fn finish(peer: &Arc<Peer>, offer: &Offer, partial: &Arc<Partial>) -> PeerMessage {
    let to = SeatId { attempt: offer.attempt, role: offer.to };
    let path = peer.receiving.place(to, &offer.key);
    let refused = |code, text: String| PeerMessage::from(Refuse { transfer: offer.transfer, code, text });
    let (receiving, whole, place) = (Arc::clone(&peer.receiving), Arc::clone(partial), path.clone());
    let finished = tokio::task::spawn_blocking(move || {
        if let Some(directory) = place.parent() {
            protocol::private_file::create_dir(directory)?;
        }
        receiving.inbox.finish(&whole, &place)
    });
    match finished.await {
        Ok(Ok(bytes)) => {
            let path = path.to_string_lossy().into_owned();
            let arrived = Input::PacketArrived { seat: to, key: offer.key.clone(), path, bytes };
            // The loop that listens ends only with the process.
            let _ = peer.receiving.inputs.send(arrived).await;
            Accept { transfer: offer.transfer, root: offer.root }.into()
        }
        Ok(Err(error @ FinishError::Corrupt)) => refused(refuse::CORRUPT, error.to_string()),
        Ok(Err(FinishError::Disk(error))) => refused(refuse::LOCAL_DISK, format!("could not keep it: {error}")),
        Err(error) => refused(refuse::LOCAL_DISK, error.to_string()),
    }
}

/// Each unidirectional stream is one chunk.
async fn chunks(peer: &Arc<Peer>) {
    while let Ok(stream) = peer.member.connection().accept_uni().await {
        let Ok(permit) = Arc::clone(&peer.memory).acquire_owned().await else { return };
        let peer = Arc::clone(peer);
        tokio::spawn(async move {
            chunk(&peer, stream).await;
            drop(permit);
        });
    }
}

async fn chunk(peer: &Peer, mut stream: RecvStream) {
    let mut bytes = [0; ChunkHeader::BYTES];
    if stream.read_exact(&mut bytes).await.is_err() {
        return; // Cut off: the sender offers the packet again.
    }
    let header = match ChunkHeader::parse(&bytes) {
        Ok(header) => header,
        Err(error) => {
            peer.member.connection().close(VarInt::from_u32(close::PROTOCOL), error.to_string().as_bytes());
            return;
        }
    };
    let Some(transfer) = lock(&peer.transfers).get(&header.transfer).cloned() else {
        // Of a transfer that ended meanwhile.
        let _ = stream.stop(VarInt::from_u32(close::DONE));
        return;
    };
    let refused = |code, text: String| Refuse { transfer: header.transfer, code, text };
    // The place is checked before memory is taken for the payload.
    if transfer.partial.chunk_bytes_at(header.index, header.offset) != Some(header.payload_bytes) {
        let text = format!("chunk {} does not lie at byte {}", header.index, header.offset);
        let _ = transfer.broken.try_send(refused(refuse::CORRUPT, text));
        return;
    }
    let mut payload = vec![0; header.payload_bytes as usize];
    if stream.read_exact(&mut payload).await.is_err() {
        return;
    }
    let partial = Arc::clone(&transfer.partial);
    let put = move || partial.put(header.index, header.offset, header.hash, &payload);
    let refusal = match tokio::task::spawn_blocking(put).await {
        Ok(Ok(())) => return,
        Ok(Err(ChunkError::Disk(error))) => refused(refuse::LOCAL_DISK, format!("could not write it: {error}")),
        Ok(Err(error)) => refused(refuse::CORRUPT, error.to_string()),
        Err(error) => refused(refuse::LOCAL_DISK, error.to_string()),
    };
    // One reason is enough.
    let _ = transfer.broken.try_send(refusal);
}
