//! Sessions: greeting, heartbeats, garbage, uploads, and that one bad peer does not disturb another.

use protocol::control::{
    ALPN_CONTROL, Download, Heartbeat, HeartbeatAck, Output, SeatSettled, ToCoordinator, ToWorker, Upload,
    UploadAnswer, close, refusal,
};
use protocol::ids::{ArtifactHash, AttemptId, Fence, Role, RunId, ShardId, WorkerId};
use protocol::quic::{FrameReader, Received, write_frame};

use crate::support::{Cluster, Log, Worker, closed, code, hello, name};

fn attempt() -> AttemptId {
    AttemptId { shard: ShardId { run: RunId(1), index: 0 }, fence: Fence(1) }
}

fn heartbeat(sequence: u64) -> Heartbeat {
    Heartbeat { sequence, telemetry: Vec::new(), held: Vec::new() }
}

async fn beats(worker: &mut Worker, sequence: u64) {
    worker.say(heartbeat(sequence)).await;
    assert_eq!(worker.hear().await, ToWorker::HeartbeatAck(HeartbeatAck { sequence }));
}

#[tokio::test]
async fn messages_flow_both_ways() {
    let mut cluster = Cluster::start();
    let mut worker = cluster.worker(1).await;
    beats(&mut worker, 1).await;
    let (from, message) = cluster.heard.recv().await.unwrap();
    assert_eq!((from, message), (WorkerId(1), heartbeat(1).into()));
    let settled = ToWorker::from(SeatSettled { attempt: attempt(), role: Role::Main, counted: true });
    let outbox = cluster.script.lock().unwrap().outboxes[&WorkerId(1)].1.clone();
    outbox.send(settled.clone()).await.unwrap();
    assert_eq!(worker.hear().await, settled);
}

#[tokio::test]
async fn garbage_closes_its_own_connection_only() {
    let (cluster, log) = (Cluster::start(), Log::capture());
    let mut good = cluster.worker(1).await;
    let far_too_long = [0xff, 0xff, 0xff, 0x7f, 2, 1, 1, 0].to_vec();
    let undecodable = [4, 0, 0, 0, 2, 1, 1, 0, 0xff, 0xff, 0xff, 0xff].to_vec();
    let future_schema = [0, 0, 0, 0, 2, 1, 9, 0].to_vec();
    let mut trailing = protocol::frame::Messages::to_frame(&ToCoordinator::from(heartbeat(1))).unwrap();
    trailing[0] += 1;
    trailing.push(0);
    let noise: Vec<u8> = (0u32..4096).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let out_of_place = protocol::frame::Messages::to_frame(&ToCoordinator::from(hello())).unwrap();
    for (bytes, expected) in [
        (far_too_long, vec![close::LIMIT]),
        (undecodable, vec![close::PROTOCOL]),
        (future_schema, vec![close::PROTOCOL]),
        (trailing, vec![close::PROTOCOL]),
        (noise, vec![close::PROTOCOL, close::LIMIT]),
        (out_of_place, vec![close::PROTOCOL]),
    ] {
        let mut bad = cluster.worker(2).await;
        bad.send.write_all(&bytes).await.unwrap();
        let (got, reason) = closed(&bad.connection).await;
        assert!(expected.iter().any(|expected| code(*expected) == got), "{}: {reason}", name(got));
        assert!(!reason.is_empty());
        beats(&mut good, 1).await;
    }
    assert!(good.connection.close_reason().is_none());
    log.says("frame of 2147483647 bytes is over the limit of 1048576 worker=w2").await;
    log.says("closed a worker's connection: a message that has no place on the control stream").await;
}

#[tokio::test]
async fn an_unknown_message_is_refused_and_an_ignorable_one_skipped() {
    let cluster = Cluster::start();
    let mut worker = cluster.worker(1).await;
    worker.send.write_all(&[1, 0, 0, 0, 0x77, 0x01, 1, 0, 42]).await.unwrap();
    let ToWorker::Refused(refused) = worker.hear().await else { panic!("a refusal was expected") };
    assert_eq!(refused.code, refusal::UNKNOWN_MESSAGE);
    worker.send.write_all(&[1, 0, 0, 0, 0x77, 0x81, 1, 0, 42]).await.unwrap();
    beats(&mut worker, 7).await;
}

#[tokio::test]
async fn a_peer_that_does_not_greet_is_closed() {
    let cluster = Cluster::start();
    let connection = cluster.dial(&cluster.credentials(1), ALPN_CONTROL).await.unwrap();
    let (mut send, _receive) = connection.open_bi().await.unwrap();
    write_frame(&mut send, &ToCoordinator::from(heartbeat(1))).await.unwrap();
    assert_eq!(closed(&connection).await, (code(close::PROTOCOL), "no greeting".into()));
}

#[tokio::test]
async fn a_session_that_the_driver_drops_is_closed_with_the_reason() {
    let cluster = Cluster::start();
    let first = cluster.worker(1).await;
    // A second connection takes the place of the first in the driver's table.
    let second = cluster.worker(1).await;
    assert_eq!(closed(&first.connection).await.0, code(close::DUPLICATE));
    let third = cluster.worker(2).await;
    {
        let mut script = cluster.script.lock().unwrap();
        script.denied.insert(WorkerId(2), close::REVOKED);
        script.outboxes.remove(&WorkerId(2));
    }
    assert_eq!(closed(&third.connection).await.0, code(close::REVOKED));
    assert!(second.connection.close_reason().is_none());
}

#[tokio::test]
async fn a_stopping_coordinator_says_that_it_will_be_back() {
    let cluster = Cluster::start();
    let worker = cluster.worker(1).await;
    cluster.net.shutdown().await;
    assert_eq!(closed(&worker.connection).await.0, code(close::RESTARTING));
}

async fn upload(worker: &Worker, hash: ArtifactHash, announced: u64, bytes: &[u8]) -> Option<String> {
    let (mut send, receive) = worker.connection.open_bi().await.unwrap();
    let header = Upload { attempt: attempt(), hash, bytes: announced };
    write_frame(&mut send, &ToCoordinator::from(header)).await.unwrap();
    // The coordinator may stop reading early; its answer says why.
    let _ = send.write_all(bytes).await;
    let _ = send.finish();
    match FrameReader::<ToWorker>::new(receive).next().await.unwrap() {
        Some(Received::Message(ToWorker::UploadAnswer(UploadAnswer { refused }))) => refused,
        other => panic!("an answer was expected, not {other:?}"),
    }
}

#[tokio::test]
async fn uploads_reach_the_store_whole_or_not_at_all() {
    let cluster = Cluster::start();
    let worker = cluster.worker(1).await;
    let bytes: Vec<u8> = (0..3_000_000u32).map(|n| n as u8).collect();
    let (hash, length) = (ArtifactHash::of(&bytes), bytes.len() as u64);

    let short = upload(&worker, hash, length, &bytes[..1000]).await.unwrap();
    assert!(short.contains("1000 bytes named"), "{short}");
    let mut corrupt = bytes.clone();
    corrupt[1_500_000] ^= 1;
    assert!(upload(&worker, hash, length, &corrupt).await.is_some());
    assert!(upload(&worker, hash, length - 1, &bytes).await.is_some());
    let huge = upload(&worker, hash, u64::MAX, &[]).await.unwrap();
    assert!(huge.contains("over the limit"), "{huge}");
    assert!(!cluster.store.contains(&hash).unwrap());

    assert_eq!(upload(&worker, hash, length, &bytes).await, None);
    assert_eq!(cluster.store.read_verified(&hash).unwrap(), bytes);
    assert_eq!(upload(&worker, hash, length, &bytes).await, None, "again is no error");
    assert_eq!(std::fs::read_dir(cluster.uploads()).unwrap().count(), 0);
}

/// The answer's length or refusal, and the bytes that came.
async fn download(worker: &Worker, hash: ArtifactHash) -> (Result<u64, String>, Vec<u8>) {
    let (mut send, receive) = worker.connection.open_bi().await.unwrap();
    write_frame(&mut send, &ToCoordinator::from(Download { attempt: attempt(), hash })).await.unwrap();
    let mut reader = FrameReader::<ToWorker>::new(receive);
    let answer = match reader.next().await.unwrap() {
        Some(Received::Message(ToWorker::DownloadAnswer(answer))) => answer,
        other => panic!("an answer was expected, not {other:?}"),
    };
    let bytes = reader.into_stream().read_to_end(64 << 20).await.unwrap();
    (answer.refused.map_or(Ok(answer.bytes), Err), bytes)
}

#[tokio::test]
async fn a_worker_gets_what_its_seats_need_and_nothing_else() {
    let cluster = Cluster::start();
    let (one, other) = (cluster.worker(1).await, cluster.worker(2).await);
    let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    let (hash, length) = cluster.store.publish_bytes(&bytes).unwrap();
    let (secret, _) = cluster.store.publish_bytes(b"not an input").unwrap();
    let gone = ArtifactHash::of(b"never made");
    let input = |hash| Output { name: "projector.safetensors".into(), hash, bytes: length };
    cluster.script.lock().unwrap().inputs.insert(WorkerId(1), vec![input(hash), input(gone)]);

    assert_eq!(download(&one, hash).await, (Ok(length), bytes.clone()));
    for refused in [download(&one, secret).await, download(&other, hash).await] {
        assert!(refused.0.unwrap_err().contains("no seat that this worker holds needs it") && refused.1.is_empty());
    }
    assert!(download(&one, gone).await.0.is_err());
    // What the disk has made something else of does not leave.
    let path = cluster.store.blob_path(&hash);
    let mut permissions = std::fs::metadata(&path).unwrap().permissions();
    #[expect(clippy::permissions_set_readonly_false, reason = "a file of this test")]
    permissions.set_readonly(false);
    std::fs::set_permissions(&path, permissions).unwrap();
    std::fs::write(&path, &bytes[1..]).unwrap();
    assert!(download(&one, hash).await.0.is_err());
    assert!(one.connection.close_reason().is_none() && other.connection.close_reason().is_none());
}
