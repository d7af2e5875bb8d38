//! An authority, a scripted coordinator, agent processes and executors made of shell.

use std::fs;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use protocol::control::{ALPN_CONTROL, HeartbeatAck, Hello, StartSeat, ToCoordinator, ToWorker, Upload, Welcome};
use protocol::exec::{Finished, FromExecutor, PacketFile, Ready};
use protocol::experiment::{InspectSpec, LayerSelection, ShardSpec};
use protocol::frame::Messages;
use protocol::identity::{CertificateRole, Identity, coordinator_dns_name};
use protocol::ids::{AttemptId, DeviceId, Fence, Role, RunId, ShardId, WorkerId};
use protocol::memory::ModelShape;
use protocol::quic::settings::Side;
use protocol::quic::{
    CertificateFacts, Credentials, EndpointSecret, FrameReader, Received, bind, server_config, write_frame,
    write_frames,
};
use protocol::store::Store;
use protocol::time::UnixMillis;
use quinn::{Connection, Endpoint, RecvStream, SendStream};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, PKCS_ED25519, SanType};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use worker::agent::state_dir::{BoxIdentity, StateDir};

pub(crate) const CLUSTER: &str = "lab";
/// No wait may take longer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
pub(crate) const MODEL: &str = "tiny.gguf";

/// Signs whatever a test asks for.
pub(crate) struct TestAuthority(CertifiedIssuer<'static, KeyPair>);

impl TestAuthority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
        Self(CertifiedIssuer::self_signed(params, key).unwrap())
    }

    pub(crate) fn coordinator(&self) -> Credentials {
        self.sign(vec![SanType::DnsName(coordinator_dns_name(CLUSTER).try_into().unwrap())])
    }

    pub(crate) fn worker(&self, id: u64) -> Credentials {
        let identity = Identity { cluster: CLUSTER.into(), worker: WorkerId(id), role: CertificateRole::Worker };
        self.sign(vec![
            SanType::DnsName(identity.dns_name().try_into().unwrap()),
            SanType::URI(identity.to_string().try_into().unwrap()),
        ])
    }

    fn sign(&self, names: Vec<SanType>) -> Credentials {
        let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = names;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let at = |since: Duration| rcgen::date_time_ymd(1970, 1, 1) + since;
        params.not_before = at(now.saturating_sub(Duration::from_secs(3600)));
        params.not_after = at(now + Duration::from_secs(3600));
        let certificate = params.signed_by(&key, &self.0).unwrap();
        Credentials {
            certificate: certificate.der().clone(),
            key_pkcs8: key.serialize_der(),
            authority: self.0.der().clone(),
        }
    }
}

/// A coordinator that does what the test says. It runs on a runtime of its own, so that it can die without a word.
pub(crate) struct Hub {
    runtime: Option<Runtime>,
    pub(crate) address: SocketAddr,
    sessions: mpsc::UnboundedReceiver<Session>,
}

/// A worker's connection as the coordinator has it.
pub(crate) struct Session {
    pub(crate) hello: Hello,
    pub(crate) connection: Connection,
    reader: FrameReader<ToCoordinator>,
    send: SendStream,
}

impl Hub {
    pub(crate) fn start(credentials: &Credentials, listen: SocketAddr, welcome: Welcome) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let server = server_config(credentials, &[ALPN_CONTROL], Side::Coordinator).unwrap();
        let guard = runtime.enter();
        let (endpoint, _) = bind(listen, &EndpointSecret([9; 64]), Some(server)).unwrap();
        drop(guard);
        let address = endpoint.local_addr().unwrap();
        let (ready, sessions) = mpsc::unbounded_channel();
        runtime.spawn(greet(endpoint, welcome, ready));
        Self { runtime: Some(runtime), address, sessions }
    }

    /// The next worker that greets.
    pub(crate) async fn session(&mut self) -> Session {
        tokio::time::timeout(PATIENCE, self.sessions.recv()).await.expect("a worker in time").unwrap()
    }

    /// As `kill -9` would: the socket is gone, nobody is told.
    pub(crate) fn kill(mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn greet(endpoint: Endpoint, welcome: Welcome, ready: mpsc::UnboundedSender<Session>) {
    while let Some(incoming) = endpoint.accept().await {
        let (welcome, ready) = (welcome.clone(), ready.clone());
        tokio::spawn(async move {
            let Ok(connection) = incoming.await else { return };
            connection.set_max_concurrent_bi_streams(quinn::VarInt::from_u32(8));
            let Ok((mut send, receive)) = connection.accept_bi().await else { return };
            let mut reader = FrameReader::new(receive);
            let Ok(Some(Received::Message(ToCoordinator::Hello(hello)))) = reader.next().await else { return };
            write_frame(&mut send, &ToWorker::from(welcome)).await.unwrap();
            let _ = ready.send(Session { hello, connection, reader, send });
        });
    }
}

impl Session {
    pub(crate) async fn say(&mut self, message: impl Into<ToWorker>) {
        write_frame(&mut self.send, &message.into()).await.unwrap();
    }

    /// Says several things at once, as the coordinator does.
    pub(crate) async fn say_all(&mut self, messages: &[ToWorker]) {
        write_frames(&mut self.send, messages).await.unwrap();
    }

    /// The next message that `pick` wants; heartbeats are acknowledged on the way.
    pub(crate) async fn hear<T>(&mut self, mut pick: impl FnMut(&ToCoordinator) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let next = tokio::time::timeout(left, self.reader.next()).await.expect("a message in time");
            let Some(Received::Message(message)) = next.unwrap() else { panic!("the worker's stream ended") };
            if let ToCoordinator::Heartbeat(beat) = &message {
                self.say(HeartbeatAck { sequence: beat.sequence }).await;
            }
            if let Some(wanted) = pick(&message) {
                return wanted;
            }
        }
    }

    /// The next upload: what is announced, its bytes, and where to answer.
    pub(crate) async fn upload(&mut self) -> (Upload, Vec<u8>, SendStream) {
        let (send, receive) =
            tokio::time::timeout(PATIENCE, self.connection.accept_bi()).await.expect("an upload").unwrap();
        let mut reader = FrameReader::<ToCoordinator>::new(receive);
        let Some(Received::Message(ToCoordinator::Upload(upload))) = reader.next().await.unwrap() else {
            panic!("an upload was expected");
        };
        let mut stream: RecvStream = reader.into_stream();
        (upload, stream.read_to_end(1 << 20).await.unwrap(), send)
    }
}

pub(crate) fn welcome(store: Option<&Store>, store_path: &Path) -> Welcome {
    Welcome {
        build: "test".into(),
        cluster: CLUSTER.into(),
        server_time: SystemTime::now().into(),
        heartbeat_interval_ms: 2000,
        store_uuid: store.map_or_else(|| "none".to_owned(), |store| store.uuid().to_owned()),
        store_path: store_path.to_string_lossy().into_owned(),
    }
}

/// A box: its directories, its executor's script, and its agent's process.
pub(crate) struct TestBox {
    pub(crate) directory: tempfile::TempDir,
    id: u64,
    agent: Option<Child>,
}

impl TestBox {
    /// A box that has joined as worker `id`.
    pub(crate) fn new(authority: &TestAuthority, id: u64, coordinator: SocketAddr) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let this = Self { directory, id, agent: None };
        fs::create_dir(this.path("frames")).unwrap();
        fs::create_dir(this.path("models")).unwrap();
        fs::write(this.path("models").join(MODEL), "weights").unwrap();
        let credentials = authority.worker(id);
        let facts = CertificateFacts::parse(&credentials.certificate).unwrap();
        let identity = BoxIdentity {
            worker: WorkerId(id),
            cluster: CLUSTER.into(),
            server_name: coordinator_dns_name(CLUSTER),
            coordinators: vec![coordinator.to_string()],
            credentials,
            facts,
        };
        StateDir::open(&this.path("state")).unwrap().keep_identity(&identity).unwrap();
        let shape = serde_json::to_vec(&shape()).unwrap();
        fs::write(this.path("shape.json"), shape).unwrap();
        let ready = Ready { build: "executor-build".into(), backend: "cpu".into(), threads: 1 };
        this.frame("ready", &FromExecutor::from(ready));
        this.executor("cat >/dev/null");
        this
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Where the executor of a seat works.
    pub(crate) fn work(&self, fence: u64, role: Role) -> PathBuf {
        self.path("state").join("work").join(format!("r1.0-f{fence}-{role}"))
    }

    /// Lays a frame down for the script.
    pub(crate) fn frame(&self, name: &str, message: &FromExecutor) {
        fs::write(self.path("frames").join(name), message.to_frame().unwrap()).unwrap();
    }

    /// What the executor does once it has said that it is up. `$D` is this box, `$F` its frames.
    pub(crate) fn executor(&self, body: &str) {
        let path = self.path("executor");
        let directory = self.directory.path().display();
        let text = format!(
            "#!/bin/sh\nD='{directory}'\nF=\"$D/frames\"\nif [ \"$1 $2\" = 'model shape' ]; then cat \"$D/shape.json\"; exit; fi\n\
             cat \"$F/ready\"\n{body}\n"
        );
        let mut file = fs::File::create(&path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file.set_permissions(fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// An executor that, for attempt `fence`, writes `result.json` and is done, each run noted in `$D/runs`; `before` comes
    /// between its order and its work.
    pub(crate) fn finishing_executor(&self, fence: u64, role: Role, before: &str) {
        let result = self.work(fence, role).join("result.json");
        let finished = Finished {
            attempt: attempt(fence),
            outputs: vec![("result.json".into(), result.to_string_lossy().into_owned())],
            memory_peak_bytes: 7,
            models: vec![(MODEL.into(), "sha256:00".into())],
            waited_ms: 0,
        };
        self.frame("finished", &finished.into());
        let result = result.display();
        self.executor(&format!(
            "head -c 1 >/dev/null\necho run >>\"$D/runs\"\n{before}\nprintf '%s' '{RESULT}' >'{result}'\n\
             cat \"$F/finished\"\ncat >/dev/null"
        ));
    }

    pub(crate) fn start(&mut self, arguments: &[&str]) {
        let log = fs::File::options().create(true).append(true).open(self.path("log")).unwrap();
        let agent = Command::new(env!("CARGO_BIN_EXE_bonepile-worker"))
            .args(["run", "--listen", "127.0.0.1:0", "--threads", "1", "--no-measure"])
            .arg("--state-dir")
            .arg(self.path("state"))
            .arg("--models")
            .arg(self.path("models"))
            .arg("--executor")
            .arg(self.path("executor"))
            .args(arguments)
            .env("BONEPILE_LOG", "debug,quinn=info,rustls=info")
            .env("BONEPILE_NVML", "/nonexistent")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.agent = Some(agent);
    }

    pub(crate) fn kill(&mut self) {
        let mut agent = self.agent.take().unwrap();
        agent.kill().unwrap();
        agent.wait().unwrap();
    }

    /// Waits for the agent to end by itself; its exit code.
    pub(crate) fn wait(&mut self) -> Option<i32> {
        let agent = self.agent.as_mut().unwrap();
        let mut code = None;
        until(|| {
            code = agent.try_wait().unwrap();
            code.is_some()
        });
        self.agent = None;
        code.and_then(|status| status.code())
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }
}

impl Drop for TestBox {
    fn drop(&mut self) {
        if let Some(agent) = &mut self.agent {
            let _ = agent.kill();
            let _ = agent.wait();
        }
        if std::thread::panicking() {
            eprintln!("---- log of w{} ----\n{}", self.id, self.log());
        }
    }
}

pub(crate) const RESULT: &str = r#"{"measured":42}"#;

/// What the executor says of [`MODEL`].
pub(crate) fn shape() -> ModelShape {
    ModelShape::new([2, 32, 4, 2, 8, 64], 400, true, 4096).stored(90_000, 50_000)
}

pub(crate) fn attempt(fence: u64) -> AttemptId {
    AttemptId { shard: ShardId { run: RunId(1), index: 0 }, fence: Fence(fence) }
}

pub(crate) fn start_seat(fence: u64, role: Role) -> StartSeat {
    let spec = InspectSpec { model: MODEL.into(), layers: LayerSelection::All, texts: 1, seed: 0 };
    StartSeat {
        attempt: attempt(fence),
        role,
        device: DeviceId("cpu".into()),
        reserved_bytes: 1,
        lane: 0,
        spec: ShardSpec::Inspect(spec),
        seats: Vec::new(),
        inputs: Vec::new(),
    }
}

pub(crate) fn packet_ready(fence: u64, key: &str, path: &Path) -> FromExecutor {
    PacketFile { attempt: attempt(fence), key: key.into(), path: path.to_string_lossy().into_owned() }.into()
}

/// Waits for a level, not an edge.
pub(crate) fn until(mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "it did not come about in time");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// [`until`], off the runtime's threads.
pub(crate) async fn until_async(holds: impl FnMut() -> bool + Send + 'static) {
    tokio::task::spawn_blocking(move || until(holds)).await.unwrap();
}

pub(crate) fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

/// The coordinator's clock in a greeting, to tell two agents of one box apart.
pub(crate) fn epoch(session: &Session) -> UnixMillis {
    session.hello.epoch
}
