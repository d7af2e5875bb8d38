//! The coordinator's connection: dial, greet, carry messages, notice silence, dial again.
//!
//! Decides nothing about work. A connection's end changes nothing for seats: they go on, and what they say waits.

use std::sync::Arc;
use std::time::Duration;

use protocol::control::{Hello, Refused, ToCoordinator, ToWorker, Welcome, close};
use protocol::limits::SUSPECT_AFTER_MS;
use protocol::quic::joining::DialError;
use protocol::quic::{FrameReader, Received, close_with, dial, explain, write_frame, write_frames};
use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, SendStream, VarInt};
use tokio::sync::{mpsc, oneshot};

use super::backoff::{Backoff, random};

/// First tries come fast, so that a coordinator that only restarted is found again at once.
const REDIAL: (Duration, Duration, Duration) =
    (Duration::from_millis(50), Duration::from_millis(500), Duration::from_secs(30));
/// One round of dialling; short at first for the same reason, as a datagram sent to nobody is repeated ever more slowly.
const DIAL_FIRST: Duration = Duration::from_millis(1500);
const DIAL_LATER: Duration = Duration::from_secs(10);
/// Rounds with the short limit.
const DIAL_FAST_ROUNDS: u32 = 10;
/// The coordinator answers a greeting by then.
const WELCOME: Duration = Duration::from_secs(15);
/// Pause after a close that will likely be repeated (another agent with this certificate, say).
const UNWELCOME_PAUSE: Duration = Duration::from_secs(30);
/// Messages that wait for the connection: at a reconnect the outcome of every seat that was sent ahead to every device.
const OUTGOING_MAX: usize = 65_536;
/// Messages written at once.
const WRITE_MAX: usize = 256;

/// How to reach the coordinator.
#[derive(Debug, Clone)]
pub struct Coordinator {
    /// `host:port`, best first; names are resolved anew at each try.
    pub addresses: Vec<String>,
    /// Its TLS name.
    pub server_name: String,
    /// What to show and believe.
    pub config: ClientConfig,
}

/// What the session tells the loop.
#[derive(Debug)]
pub enum SessionEvent {
    /// A connection is up and wants a greeting.
    Greeting(oneshot::Sender<Hello>),
    /// The coordinator has welcomed this worker.
    Connected {
        /// What it said.
        welcome: Arc<Welcome>,
        /// The connection, for uploads.
        connection: Connection,
        /// Takes what is to be said; ends with the connection.
        outgoing: mpsc::Sender<ToCoordinator>,
    },
    /// It said something.
    Message(ToWorker),
    /// The connection is gone.
    Disconnected,
    /// There is no point in dialling again.
    Dismissed {
        /// What happened.
        text: String,
        /// What to do.
        hint: Option<&'static str>,
    },
}

/// Why a round ended.
enum Ended {
    /// Nobody there, or refused before a session began.
    NotReached { text: String, hint: Option<&'static str> },
    /// The session ran and is over; how the connection ended, if it was not this side that ended it.
    Over(ConnectionError),
    /// The loop is gone.
    Deaf,
}

/// Dials and serves for as long as someone listens to `events`.
pub async fn keep_connected(endpoint: Endpoint, coordinator: Coordinator, events: mpsc::Sender<SessionEvent>) {
    let (floor, first, longest) = REDIAL;
    let mut backoff = Backoff::new(floor, first, longest);
    let mut rounds = 0;
    let mut last_text = String::new();
    loop {
        let limit = if rounds < DIAL_FAST_ROUNDS { DIAL_FIRST } else { DIAL_LATER };
        rounds += 1;
        let mut pause = None;
        match round(&endpoint, &coordinator, &events, limit).await {
            Ended::Deaf => return,
            Ended::NotReached { text, hint } => {
                if text != last_text {
                    tracing::warn!("could not connect to the coordinator: {text}");
                    if let Some(hint) = hint {
                        tracing::warn!("hint: {hint}");
                    }
                    last_text = text;
                }
            }
            Ended::Over(reason) => {
                let (text, hint) = explain(&reason);
                match application_code(&reason) {
                    Some(close::REVOKED) => {
                        let _ = events.send(SessionEvent::Dismissed { text, hint }).await;
                        return;
                    }
                    Some(close::ROLE | close::EXPIRED | close::DUPLICATE | close::PROTOCOL | close::LIMIT) => {
                        tracing::error!("the coordinator ended the connection: {text}");
                        if let Some(hint) = hint {
                            tracing::error!("hint: {hint}");
                        }
                        pause = Some(UNWELCOME_PAUSE);
                    }
                    _ => tracing::info!("the coordinator's connection is gone: {text}"),
                }
                backoff.reset();
                (rounds, last_text) = (0, String::new());
            }
        }
        let wait = backoff.next_wait(random()).max(pause.unwrap_or_default());
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = events.closed() => return,
        }
    }
}

fn application_code(error: &ConnectionError) -> Option<u32> {
    match error {
        ConnectionError::ApplicationClosed(closed) => u32::try_from(closed.error_code.into_inner()).ok(),
        _ => None,
    }
}

async fn round(
    endpoint: &Endpoint,
    coordinator: &Coordinator,
    events: &mpsc::Sender<SessionEvent>,
    limit: Duration,
) -> Ended {
    let mut tried = Vec::new();
    for address in &coordinator.addresses {
        let dialling = dial(endpoint, &coordinator.config, address, &coordinator.server_name);
        match tokio::time::timeout(limit, dialling).await {
            Ok(Ok(connection)) => return serve(connection, address, events).await,
            Ok(Err(DialError::Failed(error))) => {
                let (text, hint) = explain(&error);
                tried.push((format!("{address}: {text}"), hint));
            }
            Ok(Err(error)) => tried.push((format!("{address}: {error}"), None)),
            Err(_) => tried.push((format!("{address}: no answer"), None)),
        }
    }
    let hint = tried.iter().find_map(|(_, hint)| *hint);
    Ended::NotReached { text: tried.into_iter().map(|(text, _)| text).collect::<Vec<_>>().join("; "), hint }
}

async fn serve(connection: Connection, address: &str, events: &mpsc::Sender<SessionEvent>) -> Ended {
    let greeted = tokio::time::timeout(WELCOME, greet(&connection, events)).await;
    let (welcome, reader, send) = match greeted {
        Ok(Some(greeted)) => greeted,
        _ if events.is_closed() => return Ended::Deaf,
        _ => {
            return over(&connection, close::PROTOCOL, b"no welcome");
        }
    };
    tracing::info!(address, cluster = welcome.cluster, build = welcome.build, "connected to the coordinator");
    let (outgoing, messages) = mpsc::channel(OUTGOING_MAX);
    let connected = SessionEvent::Connected { welcome, connection: connection.clone(), outgoing };
    if events.send(connected).await.is_err() {
        return Ended::Deaf;
    }
    tokio::select! {
        () = read(&connection, reader, events) => {}
        () = write(send, messages) => {}
        _ = connection.closed() => {}
    }
    let ended = over(&connection, close::DONE, b"");
    match events.send(SessionEvent::Disconnected).await {
        Ok(()) => ended,
        Err(_) => Ended::Deaf,
    }
}

/// Closes a connection. Closing overwrites how it ended, so that is read before.
fn over(connection: &Connection, code: u32, reason: &[u8]) -> Ended {
    let ended = connection.close_reason().unwrap_or(ConnectionError::LocallyClosed);
    connection.close(VarInt::from_u32(code), reason);
    Ended::Over(ended)
}

type Greeted = (Arc<Welcome>, FrameReader<ToWorker>, SendStream);

async fn greet(connection: &Connection, events: &mpsc::Sender<SessionEvent>) -> Option<Greeted> {
    let (mut send, receive) = connection.open_bi().await.ok()?;
    let (reply, hello) = oneshot::channel();
    events.send(SessionEvent::Greeting(reply)).await.ok()?;
    write_frame(&mut send, &ToCoordinator::from(hello.await.ok()?)).await.ok()?;
    let mut reader = FrameReader::new(receive);
    match reader.next().await {
        Ok(Some(Received::Message(ToWorker::Welcome(welcome)))) => Some((Arc::new(welcome), reader, send)),
        Ok(Some(Received::Message(ToWorker::Refused(Refused { text, .. })))) => {
            tracing::warn!("the coordinator refused this worker: {}", protocol::limits::clean_text(&text));
            // The close that follows carries the code.
            connection.closed().await;
            None
        }
        Ok(_) => None,
        Err(error) => {
            close_with(connection, &error);
            None
        }
    }
}

/// Reads until the stream ends or falls silent: heartbeats are acknowledged, so silence means that nobody is there.
async fn read(connection: &Connection, mut reader: FrameReader<ToWorker>, events: &mpsc::Sender<SessionEvent>) {
    loop {
        let next = tokio::time::timeout(Duration::from_millis(SUSPECT_AFTER_MS), reader.next()).await;
        let message = match next {
            Ok(Ok(Some(Received::Message(message)))) => message,
            Ok(Ok(Some(Received::Unknown { kind }))) => {
                tracing::warn!("the coordinator said something this build does not know: type {kind:#06x}");
                continue;
            }
            Ok(Ok(None)) => return,
            Ok(Err(error)) => {
                close_with(connection, &error);
                return;
            }
            Err(_) => {
                tracing::warn!("the coordinator does not acknowledge heartbeats");
                return;
            }
        };
        if events.send(SessionEvent::Message(message)).await.is_err() {
            return;
        }
    }
}

async fn write(mut send: SendStream, mut messages: mpsc::Receiver<ToCoordinator>) {
    let mut batch = Vec::with_capacity(WRITE_MAX);
    while messages.recv_many(&mut batch, WRITE_MAX).await > 0 {
        if let Err(error) = write_frames(&mut send, &batch).await {
            tracing::debug!("could not write to the coordinator: {error}");
            return;
        }
        batch.clear();
    }
}
