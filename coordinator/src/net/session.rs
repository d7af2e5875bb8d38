//! A worker's session: greeting, then what it says to the driver and what the driver says to it.
//!
//! Reading and writing are separate tasks, so that neither side can block the other. Decides nothing.

use std::net::SocketAddr;
use std::sync::Arc;

use protocol::control::{HeartbeatAck, Hello, Refused, ToCoordinator, ToWorker, close, refusal};
use protocol::limits::{DEVICES_PER_WORKER_MAX, clean_text};
use protocol::quic::{FrameReader, Member, Received, close_with, explain, write_frame, write_frames};
use quinn::{SendStream, VarInt};
use tokio::sync::mpsc;

use super::{FIRST_WORD, LAST_WORD, Shared, chain, transfers};

/// Messages for one worker that wait for its connection; a worker that reads so slowly is dropped by the driver. Each of its
/// devices may be sent [`protocol::limits::SEATS_AHEAD_MAX`] seats at once.
const OUTBOX_MAX: usize = 16_384;
/// Messages written at once.
const WRITE_MAX: usize = 256;
/// Answers of net itself (acknowledgements, refusals) that wait; reading stops while it is full.
const ANSWERS_MAX: usize = 64;

/// A worker's connection, from greeting to end.
pub(super) async fn serve(member: &Member, remote: SocketAddr, shared: &Arc<Shared>) {
    let connection = member.connection();
    let worker = member.identity().worker;
    let greeting = tokio::time::timeout(FIRST_WORD, greet(member, remote)).await;
    let Ok(Some((hello, reader, mut send))) = greeting else {
        connection.close(VarInt::from_u32(close::PROTOCOL), b"no greeting");
        return;
    };
    let session = shared.sessions.begin(worker);
    let (outbox, messages) = mpsc::channel(OUTBOX_MAX);
    let hostname = hello.hostname.clone();
    let welcome = shared.driver.connected(worker, session, hello, remote, member.spki_sha256(), outbox).await;
    let welcome = match welcome {
        Ok(welcome) => welcome,
        Err(refused) => {
            tracing::warn!(%worker, %remote, "refused a worker's session: {}", refused.text);
            let (code, reason) = (refused_code(&refused), refused.text.clone());
            if write_frame(&mut send, &ToWorker::from(refused)).await.is_ok() && send.finish().is_ok() {
                let _ = tokio::time::timeout(LAST_WORD, send.stopped()).await;
            }
            connection.close(VarInt::from_u32(code), reason.as_bytes());
            return;
        }
    };
    tracing::info!(%worker, %remote, hostname, "worker connected");
    if write_frame(&mut send, &ToWorker::from(welcome)).await.is_ok() {
        converse(member, session, reader, send, messages, shared).await;
    }
    shared.driver.disconnected(worker, session).await;
    let why = connection.close_reason().map_or_else(|| "stream ended".to_owned(), |reason| explain(&reason).0);
    connection.close(VarInt::from_u32(close::DONE), b"");
    tracing::info!(%worker, %remote, "worker disconnected: {why}");
}

type Greeting = (Hello, FrameReader<ToCoordinator>, SendStream);

/// The first stream and its first message; `None` if the peer says something else.
async fn greet(member: &Member, remote: SocketAddr) -> Option<Greeting> {
    let (send, receive) = member.connection().accept_bi().await.ok()?;
    let mut reader = FrameReader::new(receive);
    match reader.next().await {
        Ok(Some(Received::Message(ToCoordinator::Hello(hello)))) => {
            if hello.devices.len() > DEVICES_PER_WORKER_MAX {
                member.connection().close(VarInt::from_u32(close::LIMIT), b"too many devices");
                return None;
            }
            Some((cleaned(hello), reader, send))
        }
        Ok(_) => None,
        Err(error) => {
            tracing::warn!(worker = %member.identity().worker, %remote, "closed a connection: {}", chain(&error));
            close_with(member.connection(), &error);
            None
        }
    }
}

/// What a worker says of itself ends on terminals.
fn cleaned(mut hello: Hello) -> Hello {
    hello.build = clean_text(&hello.build);
    hello.hostname = clean_text(&hello.hostname);
    for device in &mut hello.devices {
        device.model = clean_text(&device.model);
        device.unusable = device.unusable.as_deref().map(clean_text);
    }
    hello
}

fn refused_code(refused: &Refused) -> u32 {
    match refused.code {
        refusal::UNAVAILABLE => close::RESTARTING,
        refusal::WORKER_REVOKED => close::REVOKED,
        refusal::TOO_MUCH => close::LIMIT,
        _ => close::ROLE,
    }
}

/// Runs until either side ends the connection.
async fn converse(
    member: &Member,
    session: u64,
    reader: FrameReader<ToCoordinator>,
    send: SendStream,
    messages: mpsc::Receiver<ToWorker>,
    shared: &Arc<Shared>,
) {
    let (answers, to_answer) = mpsc::channel(ANSWERS_MAX);
    tokio::select! {
        () = read(member, session, reader, &answers, shared) => {}
        dropped = write(send, messages, to_answer) => {
            if dropped {
                let code = dropped_code(member, session, shared).await;
                member.connection().close(VarInt::from_u32(code), b"the coordinator ends this session");
            }
        }
        () = transfers::serve(member, shared) => {}
        _ = member.connection().closed() => {}
    }
}

/// Why the driver dropped a session: the code to close with.
async fn dropped_code(member: &Member, session: u64, shared: &Shared) -> u32 {
    let worker = member.identity().worker;
    match shared.driver.admissible(worker, member.spki_sha256()).await {
        Err(code) => code,
        Ok(()) if shared.sessions.is_latest(worker, session) => close::LIMIT,
        Ok(()) => close::DUPLICATE,
    }
}

async fn read(
    member: &Member,
    session: u64,
    mut reader: FrameReader<ToCoordinator>,
    answers: &mpsc::Sender<ToWorker>,
    shared: &Shared,
) {
    let worker = member.identity().worker;
    loop {
        let message = match reader.next().await {
            Ok(Some(Received::Message(message))) => message,
            Ok(Some(Received::Unknown { kind })) => {
                let text = format!("message type {kind:#06x} is not known here");
                let refused = Refused { code: refusal::UNKNOWN_MESSAGE, text };
                if answers.send(refused.into()).await.is_err() {
                    return;
                }
                continue;
            }
            Ok(None) => return,
            Err(error) => {
                if error.close_code().is_some() {
                    tracing::warn!(%worker, "closed a worker's connection: {}", chain(&error));
                }
                close_with(member.connection(), &error);
                return;
            }
        };
        let answer = match &message {
            ToCoordinator::Heartbeat(heartbeat) => Some(HeartbeatAck { sequence: heartbeat.sequence }),
            ToCoordinator::Hello(_) | ToCoordinator::Upload(_) | ToCoordinator::Download(_) => {
                tracing::warn!(%worker, "closed a worker's connection: a message that has no place on the control stream");
                member.connection().close(VarInt::from_u32(close::PROTOCOL), b"out of place on the control stream");
                return;
            }
            ToCoordinator::SeatFinished(_) | ToCoordinator::SeatFailed(_) | ToCoordinator::SeatWrote(_) => None,
        };
        if shared.driver.message(worker, session, cleaned_message(message)).await.is_err() {
            member.connection().close(VarInt::from_u32(close::RESTARTING), b"the coordinator stops");
            return;
        }
        if let Some(ack) = answer
            && answers.send(ack.into()).await.is_err()
        {
            return;
        }
    }
}

fn cleaned_message(mut message: ToCoordinator) -> ToCoordinator {
    match &mut message {
        ToCoordinator::Heartbeat(heartbeat) => {
            for held in &mut heartbeat.held {
                held.progress.note = clean_text(&held.progress.note);
            }
            for telemetry in &mut heartbeat.telemetry {
                telemetry.sick = telemetry.sick.as_deref().map(clean_text);
            }
        }
        ToCoordinator::SeatFailed(failed) => {
            failed.failure.message = clean_text(&failed.failure.message);
            failed.failure.hint = clean_text(&failed.failure.hint);
        }
        ToCoordinator::SeatFinished(finished) => finished.build = clean_text(&finished.build),
        ToCoordinator::Hello(_)
        | ToCoordinator::Upload(_)
        | ToCoordinator::Download(_)
        | ToCoordinator::SeatWrote(_) => {}
    }
    message
}

/// Writes what the driver and net have to say; `true` if the driver has dropped the session, `false` if the stream broke.
async fn write(
    mut send: SendStream,
    mut messages: mpsc::Receiver<ToWorker>,
    mut answers: mpsc::Receiver<ToWorker>,
) -> bool {
    let mut batch = Vec::with_capacity(WRITE_MAX);
    loop {
        let waiting = tokio::select! {
            biased;
            waiting = messages.recv_many(&mut batch, WRITE_MAX) => waiting,
            // The reading side holds the other end for as long as this runs.
            Some(answer) = answers.recv() => {
                batch.push(answer);
                1
            }
        };
        if waiting == 0 {
            return true;
        }
        if let Err(error) = write_frames(&mut send, &batch).await {
            tracing::debug!("could not write to a worker: {}", chain(&error));
            return false;
        }
        batch.clear();
    }
}
