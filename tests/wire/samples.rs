//! One value of every message, with every optional part present and every number different.

use protocol::control::{
    CancelSeat, Download, DownloadAnswer, Failure, FailureKind, FromAuthority, Heartbeat, HeartbeatAck, HeldSeat,
    Hello, Join, Joined, Output, Refused, SeatAddress, SeatFailed, SeatFinished, SeatProgress, SeatSettled, SeatWrote,
    StartSeat, Terms, ToAuthority, ToCoordinator, ToWorker, Upload, UploadAnswer, Usage, Welcome, refusal,
};
use protocol::exec::{
    Failed, Finished, FromExecutor, ModelFile, PacketFile, PacketKey, Progressed, Ready, RunSeat, StopSeat, ToExecutor,
};
use protocol::experiment::{Condition, InspectSpec, LayerSelection, ShardSpec, Spread, TransferSpec};
use protocol::frame::{FrameError, Header, Messages};
use protocol::hardware::{ComputeCapability, Device, DeviceKind, Speed, Telemetry};
use protocol::ids::{ArtifactHash, AttemptId, DeviceId, Fence, Role, RunId, ShardId, TokenId, WorkerId};
use protocol::memory::ModelShape;
use protocol::peer::{Accept, Done, Grant, Offer, PeerMessage, Refuse, Wait, refuse};
use protocol::time::UnixMillis;

/// Decodes a body as a conversation's message, for tests that hold messages of many types.
pub(crate) type Decode = fn(Header, &[u8]) -> Result<String, FrameError>;

/// A message by its name.
pub(crate) struct Sample {
    /// `to-coordinator/hello`.
    pub(crate) name: String,
    /// Its frame.
    pub(crate) frame: Vec<u8>,
    /// Its value, for people.
    pub(crate) value: String,
    /// Decodes a frame of its conversation to its value's text.
    pub(crate) decode: Decode,
}

fn sample<M: Messages + std::fmt::Debug>(conversation: &str, name: &str, message: &M) -> Sample {
    Sample {
        name: format!("{conversation}/{name}"),
        frame: message.to_frame().unwrap(),
        value: format!("{message:?}"),
        decode: |header, body| M::from_body(header, body).map(|message| format!("{message:?}")),
    }
}

/// Every message. The matches without a wildcard make a new message a compile error here until it has a sample.
pub(crate) fn all() -> Vec<Sample> {
    let mut all = Vec::new();
    for message in to_coordinator() {
        let name = match &message {
            ToCoordinator::Hello(_) => "hello",
            ToCoordinator::Heartbeat(_) => "heartbeat",
            ToCoordinator::SeatFinished(_) => "seat-finished",
            ToCoordinator::SeatFailed(_) => "seat-failed",
            ToCoordinator::Upload(_) => "upload",
            ToCoordinator::SeatWrote(_) => "seat-wrote",
            ToCoordinator::Download(_) => "download",
        };
        all.push(sample("to-coordinator", name, &message));
    }
    for message in to_worker() {
        let name = match &message {
            ToWorker::Welcome(_) => "welcome",
            ToWorker::HeartbeatAck(_) => "heartbeat-ack",
            ToWorker::StartSeat(_) => "start-seat",
            ToWorker::CancelSeat(_) => "cancel-seat",
            ToWorker::SeatSettled(_) => "seat-settled",
            ToWorker::Refused(_) => "refused",
            ToWorker::UploadAnswer(_) => "upload-answer",
            ToWorker::DownloadAnswer(_) => "download-answer",
        };
        all.push(sample("to-worker", name, &message));
    }
    let ToAuthority::Join(_) = &join();
    all.push(sample("to-authority", "join", &join()));
    for message in from_authority() {
        let name = match &message {
            FromAuthority::Joined(_) => "joined",
            FromAuthority::JoinRefused(_) => "join-refused",
        };
        all.push(sample("from-authority", name, &message));
    }
    for message in to_executor() {
        let name = match &message {
            ToExecutor::RunSeat(_) => "run-seat",
            ToExecutor::PacketArrived(_) => "packet-arrived",
            ToExecutor::StopSeat(_) => "stop-seat",
            ToExecutor::PacketSent(_) => "packet-sent",
        };
        all.push(sample("to-executor", name, &message));
    }
    for message in from_executor() {
        let name = match &message {
            FromExecutor::Ready(_) => "ready",
            FromExecutor::Progressed(_) => "progressed",
            FromExecutor::PacketReady(_) => "packet-ready",
            FromExecutor::Finished(_) => "finished",
            FromExecutor::Failed(_) => "failed",
            FromExecutor::PacketUsed(_) => "packet-used",
        };
        all.push(sample("from-executor", name, &message));
    }
    for message in peer() {
        let name = match &message {
            PeerMessage::Offer(_) => "offer",
            PeerMessage::Grant(_) => "grant",
            PeerMessage::Wait(_) => "wait",
            PeerMessage::Refuse(_) => "refuse",
            PeerMessage::Done(_) => "done",
            PeerMessage::Accept(_) => "accept",
        };
        all.push(sample("peer", name, &message));
    }
    all
}

fn attempt() -> AttemptId {
    AttemptId { shard: ShardId { run: RunId(12), index: 3 }, fence: Fence(40) }
}

fn held() -> Vec<HeldSeat> {
    let progress = SeatProgress { done: 3, total: 8, note: "fact 3 of 8".into() };
    vec![HeldSeat { attempt: attempt(), role: Role::Target, progress }]
}

fn failure() -> Failure {
    Failure::new(FailureKind::OutOfMemory, "6.1 GB wanted, 5.9 GB free").hint("a smaller batch fits")
}

fn to_coordinator() -> Vec<ToCoordinator> {
    let hello = Hello {
        build: "0.1.0".into(),
        hostname: "attic".into(),
        epoch: UnixMillis(1_700_000_000_123),
        devices: vec![Device {
            id: DeviceId("GPU-1".into()),
            kind: DeviceKind::Cuda,
            model: "NVIDIA GeForce GTX 1080".into(),
            compute_capability: Some(ComputeCapability { major: 6, minor: 1 }),
            memory_total_bytes: 8 << 30,
            memory_budget_bytes: 7 << 30,
            threads: 1,
            unusable: Some("no executor build for compute capability 6.1".into()),
            speed: Some(Speed { f32_mflops: 8_900_000, memory_bytes_per_second: 320_000_000_000 }),
        }],
        models: vec!["gemma-3-270m".into()],
        held: held(),
        peer_port: 40_001,
        addresses: vec!["192.0.2.7".into()],
        terms: Terms { labels: vec!["site=attic".into()], price_microusd_per_hour: 350_000, commands: true, ahead: 64 },
        shapes: vec![("own.gguf".into(), ModelShape::new([2, 64, 4, 2, 16, 128], 1000, true, 512).sliding(1, 64))],
    };
    let telemetry = Telemetry {
        device: DeviceId("GPU-1".into()),
        memory_free_bytes: 5_000_000_000,
        memory_ours_bytes: 1_000_000,
        utilisation_percent: Some(97),
        temperature_celsius: Some(71),
        power_milliwatts: Some(151_000),
        sick: Some("fell off the bus".into()),
    };
    let finished = SeatFinished {
        attempt: attempt(),
        role: Role::Target,
        outputs: vec![Output { name: "result.json".into(), hash: ArtifactHash([0xab; 32]), bytes: 4711 }],
        usage: Usage {
            wall_ms: 12_345,
            memory_peak_bytes: 2 << 30,
            packet_bytes: 300_000,
            link_bytes_per_second: 110_000_000,
            waited_ms: 345,
        },
        models: vec![("gemma-3-270m".into(), "sha256:00".into())],
        build: "0.1.0".into(),
    };
    vec![
        hello.into(),
        Heartbeat { sequence: 300, telemetry: vec![telemetry], held: held() }.into(),
        finished.into(),
        SeatFailed { attempt: attempt(), role: Role::Source, failure: failure() }.into(),
        Upload { attempt: attempt(), hash: ArtifactHash([0xcd; 32]), bytes: 70_000 }.into(),
        SeatWrote { attempt: attempt(), role: Role::Main, offset: 4096, bytes: b"epoch 1\n".to_vec() }.into(),
        Download { attempt: attempt(), hash: ArtifactHash([0xcd; 32]) }.into(),
    ]
}

fn transfer() -> ShardSpec {
    // In the order of their numbers on the wire: one put in the middle would shift those behind it.
    let conditions = vec![
        Condition::Text,
        Condition::NoContext,
        Condition::Injected,
        Condition::Shifted(128),
        Condition::Rerotated(1024),
        Condition::MatchedNoise,
        Condition::OtherSubject,
        Condition::Naive,
        Condition::KeysOnly,
        Condition::ValuesOnly,
        Condition::NaiveText,
    ];
    ShardSpec::Transfer(TransferSpec {
        model: "smollm2-135m-instruct".into(),
        first_fact: 8,
        facts: 4,
        conditions,
        answer_tokens: 16,
        spread: Spread::Workers,
        seed: 99,
    })
}

fn inspect() -> ShardSpec {
    let (model, layers) = ("gemma-3-270m".into(), LayerSelection::Sliding);
    ShardSpec::Inspect(InspectSpec { model, layers, texts: 16, seed: 7 })
}

fn to_worker() -> Vec<ToWorker> {
    let welcome = Welcome {
        build: "0.1.0".into(),
        cluster: "lab".into(),
        server_time: UnixMillis(1_700_000_001_000),
        heartbeat_interval_ms: 2000,
        store_uuid: "0f8fad5b".into(),
        store_path: "/srv/bonepile".into(),
    };
    let start = StartSeat {
        attempt: attempt(),
        role: Role::Source,
        device: DeviceId("cpu".into()),
        reserved_bytes: 1_200_000_000,
        lane: 1,
        spec: transfer(),
        seats: vec![SeatAddress {
            role: Role::Target,
            worker: WorkerId(7),
            spki_sha256: [0x11; 32],
            addresses: vec!["192.0.2.8:40001".into()],
        }],
        inputs: vec![Output { name: "projector.safetensors".into(), hash: ArtifactHash([0x44; 32]), bytes: 9_000 }],
    };
    vec![
        welcome.into(),
        HeartbeatAck { sequence: 300 }.into(),
        start.into(),
        CancelSeat { attempt: attempt(), reason: "the run was cancelled".into() }.into(),
        SeatSettled { attempt: attempt(), role: Role::Main, counted: true }.into(),
        Refused { code: refusal::UNKNOWN_MESSAGE, text: "message type 0x0177 is not known here".into() }.into(),
        UploadAnswer { refused: Some("the store is full".into()) }.into(),
        DownloadAnswer { refused: None, bytes: 9_000 }.into(),
    ]
}

fn join() -> ToAuthority {
    let (hostname, build) = ("attic".into(), "0.1.0".into());
    Join { token: TokenId(2), proof: [0x22; 32], csr: vec![0x30, 0x82, 1, 2], hostname, build }.into()
}

fn from_authority() -> Vec<FromAuthority> {
    let joined = Joined {
        worker: WorkerId(7),
        certificate: vec![0x30, 1],
        authority: vec![0x30, 2],
        cluster: "lab".into(),
        server_name: "coordinator.lab.bonepile.internal".into(),
        server_time: UnixMillis(1_700_000_002_000),
    };
    vec![joined.into(), Refused { code: refusal::TOKEN_EXPIRED, text: "token t2 has expired".into() }.into()]
}

fn to_executor() -> Vec<ToExecutor> {
    let run = RunSeat {
        attempt: attempt(),
        role: Role::Main,
        spec: inspect(),
        directory: "/var/lib/bonepile/work/r12.3-f40-main".into(),
        models: vec![ModelFile {
            name: "gemma-3-270m".into(),
            path: "/models/gemma.gguf".into(),
            fingerprint: Some("sha256:00".into()),
        }],
        inputs: vec![(
            "projector.safetensors".into(),
            "/var/lib/bonepile/work/r12.3-f40-main.inputs/projector.safetensors".into(),
        )],
    };
    let packet = PacketFile { attempt: attempt(), key: "fact-3".into(), path: "/packets/fact-3.safetensors".into() };
    let sent = PacketKey { attempt: attempt(), key: "fact-3".into() };
    vec![run.into(), packet.into(), StopSeat { attempt: attempt() }.into(), sent.into()]
}

fn from_executor() -> Vec<FromExecutor> {
    let progress = SeatProgress { done: 1, total: 2, note: "loading model".into() };
    let packet =
        PacketFile { attempt: attempt(), key: "fact-3".into(), path: "/var/tmp/seat/fact-3.safetensors".into() };
    let finished = Finished {
        attempt: attempt(),
        outputs: vec![("result.json".into(), "/var/tmp/seat/result.json".into())],
        memory_peak_bytes: 2 << 30,
        models: vec![("gemma-3-270m".into(), "sha256:00".into())],
        waited_ms: 345,
    };
    vec![
        Ready { build: "0.1.0".into(), backend: "cuda 6.1".into(), threads: 2 }.into(),
        Progressed { attempt: attempt(), progress }.into(),
        packet.into(),
        finished.into(),
        Failed { attempt: attempt(), failure: failure() }.into(),
        PacketKey { attempt: attempt(), key: "fact-3".into() }.into(),
    ]
}

fn peer() -> Vec<PeerMessage> {
    let offer = Offer {
        transfer: 5,
        attempt: attempt(),
        to: Role::Target,
        key: "fact-3".into(),
        header: b"\x02\0\0\0\0\0\0\0{}".to_vec(),
        payload_bytes: 3_000_000,
        chunk_bytes: 1 << 20,
        root: [0x33; 32],
    };
    vec![
        offer.into(),
        Grant { transfer: 5, have: vec![0b101] }.into(),
        Wait { transfer: 5, retry_in_ms: 200, reason: "r12.3#f40 target has not started here".into(), busy: false }
            .into(),
        Refuse { transfer: 5, code: refuse::CORRUPT, text: "chunk 2 does not have its hash".into() }.into(),
        Done { transfer: 5 }.into(),
        Accept { transfer: 5, root: [0x33; 32] }.into(),
    ]
}
