//! Packets from worker to worker: whole, damaged, cut and resumed, from the wrong peer; and between two real agents.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use protocol::control::{ALPN_PEER, FailureKind, SeatAddress, ToCoordinator, close};
use protocol::exec::ToExecutor;
use protocol::frame::Messages;
use protocol::ids::{Role, WorkerId};
use protocol::peer::{ChunkHeader, Done, Offer, PeerMessage, refuse};
use protocol::quic::settings::Side;
use protocol::quic::{
    CertificateFacts, Credentials, EndpointSecret, FrameReader, Received, bind, client_config, server_config,
    write_frame,
};
use protocol::store::Store;
use protocol::time::UnixMillis;
use quinn::{Connection, ConnectionError, Endpoint, VarInt};
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use worker::agent::core::{Input, OfferVerdict, SeatId};
use worker::agent::peer::Question;
use worker::agent::peer::inbox::Inbox;
use worker::agent::peer::packet::PacketSource;
use worker::agent::peer::send::Sender;
use worker::agent::peer::serve::{Receiving, accept};

use crate::packets::write_packet;
use crate::support::{
    CLUSTER, Hub, PATIENCE, TestAuthority, TestBox, attempt, loopback, packet_ready, start_seat, until_async, welcome,
};

/// A target's receiving side, with a loop that answers every question with one verdict.
struct Target {
    receiving: Arc<Receiving>,
    credentials: Credentials,
    verdict: Arc<Mutex<OfferVerdict>>,
    inputs: mpsc::Receiver<Input>,
    directory: tempfile::TempDir,
}

impl Target {
    fn new(authority: &TestAuthority) -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("receiving")).unwrap();
        let (inputs, heard) = mpsc::channel(16);
        let (questions, mut asked) = mpsc::channel::<Question>(16);
        let verdict = Arc::new(Mutex::new(OfferVerdict::Take));
        let answer = Arc::clone(&verdict);
        tokio::spawn(async move {
            while let Some(question) = asked.recv().await {
                let _ = question.reply.send(*answer.lock().unwrap());
            }
        });
        let receiving = Receiving {
            cluster: CLUSTER.into(),
            inbox: Inbox::new(directory.path().join("receiving")),
            work: directory.path().join("work"),
            inputs,
            questions,
        };
        let credentials = authority.worker(2);
        Self { receiving: Arc::new(receiving), credentials, verdict, inputs: heard, directory }
    }

    fn listen(&self, address: SocketAddr) -> Endpoint {
        let server = server_config(&self.credentials, &[ALPN_PEER], Side::Worker).unwrap();
        let (endpoint, _) = bind(address, &EndpointSecret([2; 64]), Some(server)).unwrap();
        tokio::spawn(accept(endpoint.clone(), Arc::clone(&self.receiving)));
        endpoint
    }

    fn seat(&self, address: SocketAddr) -> SeatAddress {
        SeatAddress {
            role: Role::Target,
            worker: WorkerId(2),
            spki_sha256: CertificateFacts::parse(&self.credentials.certificate).unwrap().spki_sha256,
            addresses: vec![address.to_string()],
        }
    }

    async fn arrived(&mut self) -> PathBuf {
        match tokio::time::timeout(PATIENCE, self.inputs.recv()).await.expect("an arrival in time") {
            Some(Input::PacketArrived { seat, key, path, .. }) => {
                assert_eq!((seat, key.as_str()), (SeatId { attempt: attempt(1), role: Role::Target }, "fact-0"));
                path.into()
            }
            other => panic!("an arrival was expected, not {other:?}"),
        }
    }
}

fn sender(credentials: &Credentials) -> Sender {
    let (endpoint, _) = bind(loopback(), &EndpointSecret([1; 64]), None).unwrap();
    Sender::new(endpoint, client_config(credentials, ALPN_PEER).unwrap(), CLUSTER.into())
}

fn source_seat() -> SeatId {
    SeatId { attempt: attempt(1), role: Role::Source }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_packet_arrives_whole_once_its_target_has_started() {
    let authority = TestAuthority::new();
    let mut target = Target::new(&authority);
    let endpoint = target.listen(loopback());
    *target.verdict.lock().unwrap() = OfferVerdict::NotYet;
    let path = target.directory.path().join("packet");
    let content = write_packet(&path, 5_000_000);
    let (seat, sender) = (target.seat(endpoint.local_addr().unwrap()), sender(&authority.worker(1)));
    let sending = {
        let path = path.clone();
        tokio::spawn(async move { (sender.send(source_seat(), &seat, "fact-0", &path).await, sender, seat) })
    };
    // Time for a refusal, if there were one: it must still be waiting then.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!sending.is_finished());
    *target.verdict.lock().unwrap() = OfferVerdict::Take;
    let (sent, sender, seat) = sending.await.unwrap();
    assert_eq!(sent.unwrap(), content.len() as u64);
    assert_eq!(fs::read(target.arrived().await).unwrap(), content);
    // Again, as after an ACCEPT that was lost: nothing is sent twice, and it is no error.
    assert_eq!(sender.send(source_seat(), &seat, "fact-0", &path).await.unwrap(), content.len() as u64);
    assert!(target.inputs.try_recv().is_err());
}

/// Forwards datagrams to `to` and back, and counts the bytes forwarded.
async fn proxy(to: SocketAddr) -> (SocketAddr, Arc<AtomicU64>) {
    let (front, back) = (UdpSocket::bind(loopback()).await.unwrap(), UdpSocket::bind(loopback()).await.unwrap());
    let (address, bytes) = (front.local_addr().unwrap(), Arc::new(AtomicU64::new(0)));
    let counted = Arc::clone(&bytes);
    tokio::spawn(async move {
        let (mut there, mut here) = (vec![0; 65_536], vec![0; 65_536]);
        let mut dialler = None;
        loop {
            tokio::select! {
                Ok((length, from)) = front.recv_from(&mut there) => {
                    dialler = Some(from);
                    counted.fetch_add(length as u64, Ordering::Relaxed);
                    // A full buffer is a lost datagram, as on any link.
                    let _ = back.send_to(&there[..length], to).await;
                }
                Ok((length, _)) = back.recv_from(&mut here) => {
                    if let Some(dialler) = dialler {
                        let _ = front.send_to(&here[..length], dialler).await;
                    }
                }
            }
        }
    });
    (address, bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_costs_the_chunks_under_way_and_no_more() {
    let authority = TestAuthority::new();
    let mut target = Target::new(&authority);
    let endpoint = target.listen(loopback());
    let address = endpoint.local_addr().unwrap();
    let (through, forwarded) = proxy(address).await;
    let path = target.directory.path().join("packet");
    let content = write_packet(&path, 64_000_000);
    let (seat, sender) = (target.seat(through), sender(&authority.worker(1)));
    let sending = {
        let path = path.clone();
        tokio::spawn(async move { sender.send(source_seat(), &seat, "fact-0", &path).await })
    };
    let receiving = Arc::clone(&target.receiving);
    until_async(move || receiving.inbox.bytes_here() >= 16 << 20).await;
    endpoint.close(VarInt::from_u32(close::RESTARTING), b"cut");
    endpoint.wait_idle().await;
    drop(endpoint);
    let before = target.receiving.inbox.bytes_here();
    assert!(before < content.len() as u64, "the cut came too late to show anything");
    let until_cut = forwarded.load(Ordering::Relaxed);

    let again = loop {
        // The old endpoint's socket closes with its last task.
        let server = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| target.listen(address)));
        match server {
            Ok(endpoint) => break endpoint,
            Err(_) => tokio::task::yield_now().await,
        }
    };
    assert_eq!(sending.await.unwrap().unwrap(), content.len() as u64);
    assert_eq!(fs::read(target.arrived().await).unwrap(), content);
    let resent = forwarded.load(Ordering::Relaxed) - until_cut;
    let missing = content.len() as u64 - before;
    eprintln!("{before} bytes were there before the cut, {missing} were missing, {resent} crossed after it");
    assert!(resent < missing + missing / 4 + (4 << 20), "{resent} bytes for {missing} that were missing");
    drop(again);
}

/// A peer that says and sends what a good one would not.
struct Rogue {
    connection: Connection,
    source: PacketSource,
}

impl Rogue {
    async fn dial(target: &Target, address: SocketAddr, credentials: &Credentials, bytes: usize) -> Self {
        let path = target.directory.path().join("rogue");
        write_packet(&path, bytes);
        let (endpoint, _) = bind(loopback(), &EndpointSecret([3; 64]), None).unwrap();
        let config = client_config(credentials, ALPN_PEER).unwrap();
        let name = protocol::identity::worker_dns_name(CLUSTER, WorkerId(2));
        let connection = endpoint.connect_with(config, address, &name).unwrap().await.unwrap();
        Self { connection, source: PacketSource::open(&path).unwrap() }
    }

    fn offer(&self) -> Offer {
        Offer {
            transfer: 7,
            attempt: attempt(1),
            to: Role::Target,
            key: "fact-0".into(),
            header: self.source.header.clone(),
            payload_bytes: self.source.payload_bytes,
            chunk_bytes: self.source.chunk_bytes,
            root: self.source.root,
        }
    }

    /// Offers, sends chunks as `forge` changes them, and says DONE; the refusal's code.
    async fn refusal(
        &self,
        offer: Offer,
        mut forge: impl FnMut(ChunkHeader, Vec<u8>) -> (ChunkHeader, Vec<u8>),
    ) -> u16 {
        let (mut send, receive) = self.connection.open_bi().await.unwrap();
        let mut reader = FrameReader::<PeerMessage>::new(receive);
        write_frame(&mut send, &PeerMessage::from(offer)).await.unwrap();
        match reader.next().await.unwrap() {
            Some(Received::Message(PeerMessage::Grant(_))) => {}
            Some(Received::Message(PeerMessage::Refuse(refused))) => return refused.code,
            other => panic!("a grant or a refusal was expected, not {other:?}"),
        }
        for (index, hash) in self.source.hashes.iter().enumerate() {
            let index = u32::try_from(index).unwrap();
            let payload = self.source.chunk(index).unwrap();
            let header = ChunkHeader {
                transfer: 7,
                index,
                payload_bytes: payload.len() as u32,
                offset: u64::from(index) * u64::from(self.source.chunk_bytes),
                hash: *hash,
            };
            let (header, payload) = forge(header, payload);
            let mut stream = self.connection.open_uni().await.unwrap();
            stream.write_all(&header.to_bytes()).await.unwrap();
            let _ = stream.write_all(&payload).await;
            let _ = stream.finish();
        }
        let _ = write_frame(&mut send, &PeerMessage::from(Done { transfer: 7 })).await;
        match reader.next().await.unwrap() {
            Some(Received::Message(PeerMessage::Refuse(refused))) => refused.code,
            other => panic!("a refusal was expected, not {other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_and_forged_packets_are_refused_and_a_good_one_comes_after() {
    let authority = TestAuthority::new();
    let mut target = Target::new(&authority);
    let endpoint = target.listen(loopback());
    let address = endpoint.local_addr().unwrap();
    let source = authority.worker(1);
    let rogue = Rogue::dial(&target, address, &source, 3_000_000).await;
    let flipped = |header: ChunkHeader, mut payload: Vec<u8>| {
        payload[100] ^= 1;
        (header, payload)
    };
    assert_eq!(rogue.refusal(rogue.offer(), flipped).await, refuse::CORRUPT);
    let misplaced = |header: ChunkHeader, payload| (ChunkHeader { offset: header.offset + 1, ..header }, payload);
    assert_eq!(rogue.refusal(rogue.offer(), misplaced).await, refuse::CORRUPT);
    // Every chunk fits its own hash, the whole does not fit its root: nothing of it is kept.
    let forged = |header: ChunkHeader, payload: Vec<u8>| {
        let payload = vec![0; payload.len()];
        (ChunkHeader { hash: *blake3::hash(&payload).as_bytes(), ..header }, payload)
    };
    assert_eq!(rogue.refusal(rogue.offer(), forged).await, refuse::CORRUPT);
    assert_eq!(target.receiving.inbox.bytes_here(), 0);

    let claims_more = Offer { payload_bytes: rogue.source.payload_bytes + 4, ..rogue.offer() };
    assert_eq!(rogue.refusal(claims_more, |header, payload| (header, payload)).await, refuse::BAD_HEADER);
    let escaping = Offer { key: "../../identity".into(), ..rogue.offer() };
    assert_eq!(rogue.refusal(escaping, |header, payload| (header, payload)).await, refuse::BAD_HEADER);
    let huge = Offer { payload_bytes: u64::MAX, ..rogue.offer() };
    assert_eq!(rogue.refusal(huge, |header, payload| (header, payload)).await, refuse::TOO_LARGE);

    let path = target.directory.path().join("rogue");
    let content = fs::read(&path).unwrap();
    sender(&source).send(source_seat(), &target.seat(address), "fact-0", &path).await.unwrap();
    assert_eq!(fs::read(target.arrived().await).unwrap(), content);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_peer_of_the_seat_is_served() {
    let (authority, other) = (TestAuthority::new(), TestAuthority::new());
    let target = Target::new(&authority);
    let endpoint = target.listen(loopback());
    let address = endpoint.local_addr().unwrap();
    for (verdict, expected) in
        [(OfferVerdict::NotTheSeat, refuse::NOT_THE_SEAT), (OfferVerdict::Over, refuse::ATTEMPT_OVER)]
    {
        *target.verdict.lock().unwrap() = verdict;
        let stranger = Rogue::dial(&target, address, &authority.worker(3), 1000).await;
        let refusal = stranger.refusal(stranger.offer(), |header, payload| (header, payload)).await;
        assert_eq!(refusal, expected);
        let path = target.directory.path().join("rogue");
        let failure =
            sender(&authority.worker(3)).send(source_seat(), &target.seat(address), "fact-0", &path).await.unwrap_err();
        let kind = if verdict == OfferVerdict::Over { FailureKind::PeerLost } else { FailureKind::PacketRefused };
        assert_eq!(failure.kind, kind, "{failure}");
    }
    // Of another cluster: TLS ends it.
    let foreign = Credentials { authority: authority.worker(1).authority, ..other.worker(1) };
    let (dialler, _) = bind(loopback(), &EndpointSecret([3; 64]), None).unwrap();
    let config = client_config(&foreign, ALPN_PEER).unwrap();
    let name = protocol::identity::worker_dns_name(CLUSTER, WorkerId(2));
    let error = match dialler.connect_with(config, address, &name).unwrap().await {
        Ok(connection) => connection.closed().await,
        Err(error) => error,
    };
    assert!(matches!(error, ConnectionError::ConnectionClosed(_)), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_with_another_key_gets_nothing_and_is_lost_after_a_bound() {
    let authority = TestAuthority::new();
    let target = Target::new(&authority);
    let endpoint = target.listen(loopback());
    let path = target.directory.path().join("packet");
    write_packet(&path, 1000);
    let mut seat = target.seat(endpoint.local_addr().unwrap());
    seat.spki_sha256[0] ^= 1;
    let sender = sender(&authority.worker(1)).with_patience(Duration::from_millis(300));
    let failure = sender.send(source_seat(), &seat, "fact-0", &path).await.unwrap_err();
    assert_eq!(failure.kind, FailureKind::PeerLost);
    assert!(failure.message.contains("another key than the seat's"), "{failure}");
    assert_eq!(target.receiving.inbox.bytes_here(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_a_chunk_stream_closes_the_connection_with_its_code() {
    let authority = TestAuthority::new();
    let target = Target::new(&authority);
    let endpoint = target.listen(loopback());
    let rogue = Rogue::dial(&target, endpoint.local_addr().unwrap(), &authority.worker(1), 1000).await;
    let mut stream = rogue.connection.open_uni().await.unwrap();
    stream.write_all(&[0x55; 64]).await.unwrap();
    match tokio::time::timeout(PATIENCE, rogue.connection.closed()).await.unwrap() {
        ConnectionError::ApplicationClosed(closed) => {
            assert_eq!(closed.error_code, VarInt::from_u32(close::PROTOCOL));
            assert_eq!(&closed.reason[..], b"a chunk must begin with BPKV");
        }
        other => panic!("a close was expected, not {other:?}"),
    }
}

/// Two agents: the source's executor writes a packet, the target's is told of it and copies it into its result.
#[tokio::test(flavor = "multi_thread")]
async fn two_agents_pass_a_packet_and_both_seats_finish() {
    let authority = TestAuthority::new();
    let directory = tempfile::tempdir().unwrap();
    let store = Store::init(&directory.path().join("store"), UnixMillis(0)).unwrap();
    let mut hub = Hub::start(&authority.coordinator(), loopback(), welcome(Some(&store), store.root()));
    let (mut one, mut two) = (TestBox::new(&authority, 1, hub.address), TestBox::new(&authority, 2, hub.address));

    let content = write_packet(&one.path("prepared"), 3_000_000);
    let packet = one.work(1, Role::Source).join("fact-0.safetensors");
    one.frame("packet", &packet_ready(1, "fact-0", &packet));
    let before = format!("cp \"$D/prepared\" '{}'\ncat \"$F/packet\"", packet.display());
    one.finishing_executor(1, Role::Source, &before);
    // The target's order is read to its end, so that the next byte is the news of the packet.
    let incoming = two.path("state").join("work").join("r1.0-f1-target.in").join("fact-0.safetensors");
    one.start(&[]);
    let mut source = hub.session().await;
    let key_of = |session: &crate::support::Session| {
        let chain = session.connection.peer_identity().unwrap();
        let chain = chain.downcast::<Vec<rustls::pki_types::CertificateDer<'static>>>().unwrap();
        CertificateFacts::parse(&chain[0]).unwrap().spki_sha256
    };
    let seats = |source: &crate::support::Session, target_key, target_port: u16| {
        let address = |role, worker, spki_sha256, port| SeatAddress {
            role,
            worker: WorkerId(worker),
            spki_sha256,
            addresses: vec![format!("127.0.0.1:{port}")],
        };
        vec![
            address(Role::Source, 1, key_of(source), source.hello.peer_port),
            address(Role::Target, 2, target_key, target_port),
        ]
    };
    let model = two.path("models").join(crate::support::MODEL);
    let order = ToExecutor::RunSeat(protocol::exec::RunSeat {
        attempt: attempt(1),
        role: Role::Target,
        spec: start_seat(1, Role::Target).spec,
        directory: two.work(1, Role::Target).to_string_lossy().into_owned(),
        models: vec![protocol::exec::ModelFile {
            name: crate::support::MODEL.into(),
            path: model.to_string_lossy().into_owned(),
            fingerprint: None,
        }],
        inputs: Vec::new(),
    });
    let rest = order.to_frame().unwrap().len() - 1;
    let copy = format!("head -c {rest} >/dev/null\nhead -c 1 >/dev/null\ncp '{}' \"$D/got\"", incoming.display());
    two.finishing_executor(1, Role::Target, &copy);
    two.start(&[]);
    let mut target = hub.session().await;
    let seats = seats(&source, key_of(&target), target.hello.peer_port);

    // The source first: it has to wait for the target's start.
    source.say(protocol::control::StartSeat { seats: seats.clone(), ..start_seat(1, Role::Source) }).await;
    target.say(protocol::control::StartSeat { seats, ..start_seat(1, Role::Target) }).await;
    let finished = |message: &ToCoordinator| match message {
        ToCoordinator::SeatFinished(finished) => Some(finished.usage.packet_bytes),
        _ => None,
    };
    assert_eq!(target.hear(finished).await, content.len() as u64);
    assert_eq!(source.hear(finished).await, content.len() as u64);
    assert_eq!(fs::read(two.path("got")).unwrap(), content);
}
