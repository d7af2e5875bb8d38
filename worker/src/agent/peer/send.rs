//! The sending side: finds the target's worker, offers a packet, sends what it lacks, and tries again after a cut.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use protocol::control::{Failure, FailureKind, SeatAddress, close};
use protocol::identity::worker_dns_name;
use protocol::peer::{ChunkHeader, Done, Offer, PeerMessage, refuse};
use protocol::quic::{FrameReader, Received, explain, spki_sha256, write_frame};
use quinn::{ClientConfig, Connection, Endpoint, VarInt};
use rustls::pki_types::CertificateDer;
use tokio::sync::{Mutex, Semaphore};

use super::packet::PacketSource;
use crate::agent::backoff::{Backoff, random};
use crate::agent::core::SeatId;
use crate::agent::way::chain;

/// A target that cannot be reached, or gets nothing through, for so long is lost.
const PATIENCE: Duration = Duration::from_secs(60);
/// A target that answers but has not started, for so long, is lost too: its coordinator has long given the attempt up.
const WAITING_PATIENCE: Duration = Duration::from_secs(300);
/// One address gets so long to answer.
const DIAL: Duration = Duration::from_secs(3);
/// The target answers an offer or a DONE by then.
const ANSWER: Duration = Duration::from_secs(45);
/// Packets on their way to one target at once.
const AT_ONCE: usize = 4;
const RETRY: (Duration, Duration, Duration) =
    (Duration::from_millis(50), Duration::from_millis(300), Duration::from_secs(5));
/// Tries of a packet that arrives damaged.
const CORRUPT_TRIES: u32 = 3;

/// Sends packets to other workers.
#[derive(Debug)]
pub struct Sender {
    endpoint: Endpoint,
    config: ClientConfig,
    cluster: String,
    peers: Mutex<BTreeMap<[u8; 32], Arc<Peer>>>,
    transfers: AtomicU64,
    patience: Duration,
}

#[derive(Debug)]
struct Peer {
    connection: Mutex<Option<Connection>>,
    turns: Semaphore,
}

/// Why one try ended.
#[derive(Debug)]
enum Ended {
    /// It may work the next time.
    Again(String),
    /// The target is there and asks to wait.
    Wait { for_ms: u64, why: String, busy: bool },
    /// It did not arrive as it was sent.
    Corrupt { why: String },
    /// It will not work.
    Never(Failure),
}

fn again(why: impl Into<String>) -> Ended {
    Ended::Again(why.into())
}

impl Sender {
    /// A sender that dials from `endpoint` with `config`, this worker's for the peer conversation.
    pub fn new(endpoint: Endpoint, config: ClientConfig, cluster: String) -> Self {
        let (peers, transfers) = (Mutex::default(), AtomicU64::new(1));
        Self { endpoint, config, cluster, peers, transfers, patience: PATIENCE }
    }

    /// The same sender, giving up a target that cannot be reached after `patience` instead of a minute.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Sends the packet at `path` and returns its length once the target has it whole.
    ///
    /// # Errors
    /// `PeerLost` if the target cannot be reached within a bound or has given the attempt up; `PacketRefused`; `LocalDisk`.
    pub async fn send(&self, from: SeatId, to: &SeatAddress, key: &str, path: &Path) -> Result<u64, Failure> {
        let owned = path.to_owned();
        let source = tokio::task::spawn_blocking(move || PacketSource::open(&owned)).await;
        let source = match source {
            Ok(Ok(source)) => Arc::new(source),
            Ok(Err(error)) => {
                let text = format!("could not read packet {key} at {}: {error}", path.display());
                return Err(Failure::new(FailureKind::LocalDisk, text));
            }
            Err(error) => return Err(Failure::new(FailureKind::Internal, error.to_string())),
        };
        let peer = self.peer(to.spki_sha256).await;
        let _turn = peer.turns.acquire().await;
        let (floor, first, longest) = RETRY;
        let mut backoff = Backoff::new(floor, first, longest);
        let (mut reached_at, mut started_at) = (Instant::now(), Instant::now());
        let mut corrupt = 0;
        loop {
            let progress = AtomicBool::new(false);
            let wait = match self.attempt(from, to, key, &source, &peer, &progress).await {
                Ok(()) => return Ok(source.header.len() as u64 + source.payload_bytes),
                Err(Ended::Never(failure)) => return Err(failure),
                Err(Ended::Wait { for_ms, why, busy }) => {
                    reached_at = Instant::now();
                    if busy {
                        started_at = reached_at;
                    }
                    if started_at.elapsed() > WAITING_PATIENCE {
                        return Err(lost(to, &why));
                    }
                    Duration::from_millis(for_ms).min(WAITING_PATIENCE)
                }
                Err(Ended::Corrupt { why }) => {
                    corrupt += 1;
                    tracing::warn!(%from, key, "packet arrived damaged: {why}");
                    if corrupt >= CORRUPT_TRIES {
                        let text = format!("packet {key} arrives damaged at {}: {why}", to.worker);
                        return Err(Failure::new(FailureKind::PacketRefused, text));
                    }
                    backoff.next_wait(random())
                }
                Err(Ended::Again(why)) => {
                    tracing::debug!(%from, key, "packet not sent yet: {why}");
                    if progress.into_inner() {
                        reached_at = Instant::now();
                        backoff.reset();
                    }
                    if reached_at.elapsed() > self.patience {
                        return Err(lost(to, &why));
                    }
                    backoff.next_wait(random())
                }
            };
            tokio::time::sleep(wait).await;
        }
    }

    async fn peer(&self, spki_sha256: [u8; 32]) -> Arc<Peer> {
        let mut peers = self.peers.lock().await;
        let fresh = || Arc::new(Peer { connection: Mutex::default(), turns: Semaphore::new(AT_ONCE) });
        Arc::clone(peers.entry(spki_sha256).or_insert_with(fresh))
    }

    /// One offer, and what follows from its answer; `progress` tells whether any chunk went out.
    async fn attempt(
        &self,
        from: SeatId,
        to: &SeatAddress,
        key: &str,
        source: &Arc<PacketSource>,
        peer: &Peer,
        progress: &AtomicBool,
    ) -> Result<(), Ended> {
        let connection = self.connect(to, peer).await?;
        let transfer = self.transfers.fetch_add(1, Ordering::Relaxed);
        let offer = Offer {
            transfer,
            attempt: from.attempt,
            to: to.role,
            key: key.to_owned(),
            header: source.header.clone(),
            payload_bytes: source.payload_bytes,
            chunk_bytes: source.chunk_bytes,
            root: source.root,
        };
        let broken = |error: &dyn std::error::Error| again(ended(&connection, error));
        let (mut send, receive) = connection.open_bi().await.map_err(|error| broken(&error))?;
        let mut reader = FrameReader::new(receive);
        write_frame(&mut send, &PeerMessage::from(offer)).await.map_err(|error| broken(&error))?;
        let have = match hear(&mut reader, &connection).await? {
            PeerMessage::Grant(grant) => grant.have,
            PeerMessage::Wait(wait) => {
                let why = protocol::limits::clean_text(&wait.reason);
                return Err(Ended::Wait { for_ms: wait.retry_in_ms, why, busy: wait.busy });
            }
            other => return Err(unexpected(to, key, other)),
        };
        let sent = send_chunks(&connection, transfer, source, &have, progress);
        // The target may refuse while chunks are still going out.
        let early = tokio::select! {
            sent = sent => {
                sent.map_err(Ended::Again)?;
                None
            }
            early = hear(&mut reader, &connection) => Some(early?),
        };
        let answer = match early {
            Some(answer) => answer,
            None => {
                let done = PeerMessage::from(Done { transfer });
                write_frame(&mut send, &done).await.map_err(|error| broken(&error))?;
                hear(&mut reader, &connection).await?
            }
        };
        match answer {
            PeerMessage::Accept(accept) if accept.root == source.root => Ok(()),
            other => Err(unexpected(to, key, other)),
        }
    }

    /// The connection to a target, dialled anew if there is none.
    async fn connect(&self, to: &SeatAddress, peer: &Peer) -> Result<Connection, Ended> {
        let mut known = peer.connection.lock().await;
        if let Some(connection) = known.as_ref().filter(|connection| connection.close_reason().is_none()) {
            return Ok(connection.clone());
        }
        let name = worker_dns_name(&self.cluster, to.worker);
        let mut tried = Vec::new();
        for text in &to.addresses {
            let Ok(address) = text.parse::<SocketAddr>() else {
                tried.push(format!("`{text}` is not an address"));
                continue;
            };
            let connecting = match self.endpoint.connect_with(self.config.clone(), address, &name) {
                Ok(connecting) => connecting,
                Err(error) => {
                    tried.push(format!("{address}: {error}"));
                    continue;
                }
            };
            match tokio::time::timeout(DIAL, connecting).await {
                Ok(Ok(connection)) => match is_the_peer(&connection, to) {
                    true => {
                        *known = Some(connection.clone());
                        return Ok(connection);
                    }
                    false => {
                        connection.close(VarInt::from_u32(close::ROLE), b"another key than the seat's");
                        tried.push(format!("{address}: another key than the seat's"));
                    }
                },
                Ok(Err(error)) => tried.push(format!("{address}: {}", explain(&error).0)),
                Err(_) => tried.push(format!("{address}: no answer")),
            }
        }
        match tried.is_empty() {
            true => Err(again("it has no address")),
            false => Err(again(tried.join("; "))),
        }
    }
}

fn lost(to: &SeatAddress, why: &str) -> Failure {
    Failure::new(FailureKind::PeerLost, format!("could not reach {} at {}: {why}", to.worker, to.addresses.join(", ")))
        .hint("workers must reach each other's UDP port; `bonepile-worker run --listen` fixes it for a firewall")
}

/// TLS has checked that the certificate is the cluster's and names the worker; the key must be the one of the seat.
fn is_the_peer(connection: &Connection, to: &SeatAddress) -> bool {
    connection
        .peer_identity()
        .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok())
        .and_then(|chain| spki_sha256(chain.first()?).ok())
        .is_some_and(|found| found == to.spki_sha256)
}

/// How a connection ended, or else how the stream did.
fn ended(connection: &Connection, error: &dyn std::error::Error) -> String {
    connection.close_reason().map_or_else(|| chain(error), |reason| explain(&reason).0)
}

async fn hear(reader: &mut FrameReader<PeerMessage>, connection: &Connection) -> Result<PeerMessage, Ended> {
    match tokio::time::timeout(ANSWER, reader.next()).await {
        Ok(Ok(Some(Received::Message(message)))) => Ok(message),
        Ok(Ok(Some(Received::Unknown { kind }))) => Err(again(format!("it answers with message type {kind:#06x}"))),
        Ok(Ok(None)) => Err(again("it ended the conversation")),
        Ok(Err(error)) => Err(again(ended(connection, &error))),
        Err(_) => {
            connection.close(VarInt::from_u32(close::DONE), b"no answer");
            Err(again("it does not answer"))
        }
    }
}

fn unexpected(to: &SeatAddress, key: &str, message: PeerMessage) -> Ended {
    match message {
        PeerMessage::Refuse(refused) => {
            let why = protocol::limits::clean_text(&refused.text);
            let kind = match refused.code {
                refuse::CORRUPT => return Ended::Corrupt { why },
                refuse::TOO_MANY => return again(why),
                refuse::ATTEMPT_OVER => FailureKind::PeerLost,
                _ => FailureKind::PacketRefused,
            };
            Ended::Never(Failure::new(kind, format!("{} refuses packet {key}: {why}", to.worker)))
        }
        other => again(format!("it answers out of turn: {other:?}").chars().take(200).collect::<String>()),
    }
}

/// Sends every chunk that the target lacks, each on a stream of its own.
async fn send_chunks(
    connection: &Connection,
    transfer: u64,
    source: &Arc<PacketSource>,
    have: &[u8],
    progress: &AtomicBool,
) -> Result<(), String> {
    let has = |index: usize| have.get(index / 8).is_some_and(|bits| bits >> (index % 8) & 1 == 1);
    for (index, hash) in source.hashes.iter().enumerate().filter(|(index, _)| !has(*index)) {
        let index = u32::try_from(index).expect("chunks are counted in 32 bits");
        let reading = Arc::clone(source);
        let payload = tokio::task::spawn_blocking(move || reading.chunk(index)).await;
        let payload = payload.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
        let header = ChunkHeader {
            transfer,
            index,
            payload_bytes: u32::try_from(payload.len()).expect("a chunk is small"),
            offset: u64::from(index) * u64::from(source.chunk_bytes),
            hash: *hash,
        };
        let mut stream = connection.open_uni().await.map_err(|error| ended(connection, &error))?;
        stream.write_all(&header.to_bytes()).await.map_err(|error| ended(connection, &error))?;
        stream.write_chunk(payload.into()).await.map_err(|error| ended(connection, &error))?;
        // A stream that the target stopped is told by its answer.
        let _ = stream.finish();
        progress.store(true, Ordering::Relaxed);
    }
    Ok(())
}
