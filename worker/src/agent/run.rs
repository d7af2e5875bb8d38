//! `bonepile-worker run`: the loop that feeds the agent's decisions and carries out what they ask for.
//!
//! The loop itself never waits for disk, store, network or an executor: each of these is a task that answers with an input.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use protocol::control::{
    ALPN_CONTROL, ALPN_PEER, Failure, FailureKind, Heartbeat, Hello, Output, SeatAddress, SeatWrote, StartSeat, Terms,
    ToCoordinator, Usage, close,
};
use protocol::exec::{self, ModelFile, RunSeat, ToExecutor};
use protocol::hardware::{Device, Telemetry};
use protocol::limits::HEARTBEAT_INTERVAL_MS;
use protocol::memory::ModelShape;
use protocol::models::ModelsDir;
use protocol::quic::settings::{SettingsError, Side, SmallBuffers, any_address};
use protocol::quic::{bind, client_config, server_config};
use protocol::store::threads::StoreThreads;
use protocol::time::UnixMillis;
use quinn::{Endpoint, VarInt};
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::command::runner::{Runner, RunnerParts};
use super::command::warden::{Warden, end_leftovers};
use super::core::{Agent, Effect, HandedOn, Input, Lent, SeatId};
use super::gather::Gatherer;
use super::inventory::{self, InventoryConfig};
use super::outbox::records::Records;
use super::outbox::{Outbox, OutboxError};
use super::peer::Question;
use super::peer::inbox::Inbox;
use super::peer::local::hand_over;
use super::peer::send::Sender;
use super::peer::serve::{Receiving, accept};
use super::publish::Publisher;
use super::session::{Coordinator, SessionEvent, keep_connected};
use super::shapes;
use super::state_dir::{BoxIdentity, StateDir, StateError, StateLock, make_empty};
use super::supervisor::Supervisor;
use super::way::{Link, ToStore, chain};

/// Inputs that wait for the loop; senders wait when it is full.
const INPUTS_MAX: usize = 1024;
/// Inputs taken in before anything is done about them: enough that a busy loop shares its wake-ups.
const INPUTS_AT_ONCE: usize = 256;
/// Pieces of programs' output that wait for the loop; more are dropped.
const PIECES_MAX: usize = 256;
/// How often the devices are asked how they are.
const TELEMETRY: Duration = Duration::from_millis(HEARTBEAT_INTERVAL_MS);
/// Shortest packet whose time says something about its link, bytes.
const RATED_BYTES_MIN: u64 = 64 << 10;
/// How long a stopping agent waits for its closes to be heard.
const LAST_WORD: Duration = Duration::from_secs(2);

/// What the operator set.
#[derive(Debug)]
pub struct RunConfig {
    /// Where the agent keeps its state.
    pub state: StateDir,
    /// The results store's mount; `None`: try the coordinator's path, else upload.
    pub store: Option<PathBuf>,
    /// Devices and budgets.
    pub inventory: InventoryConfig,
    /// The models directory.
    pub models: ModelsDir,
    /// UDP address; `None`: any port of both families.
    pub listen: Option<SocketAddr>,
    /// On what terms the box is lent.
    pub terms: Terms,
}

/// The agent cannot run, or not any longer.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The state directory cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// The outbox cannot be used.
    #[error("could not open the outbox")]
    Outbox(#[from] OutboxError),
    /// TLS settings could not be made.
    #[error("could not set up TLS; is the identity damaged?")]
    Settings(#[from] SettingsError),
    /// The UDP port cannot be had.
    #[error("could not listen on UDP {address}")]
    Bind {
        /// Which.
        address: SocketAddr,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// No threads, no signals.
    #[error("could not prepare {what}")]
    Prepare {
        /// What.
        what: &'static str,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The coordinator does not want this worker any more.
    #[error("the coordinator has dismissed this worker: {text}")]
    Dismissed {
        /// Its words.
        text: String,
        /// What to do.
        hint: Option<&'static str>,
    },
}

impl RunError {
    /// What a person could do.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::State(error) => error.hint(),
            Self::Dismissed { hint, .. } => *hint,
            Self::Bind { .. } => Some("is another process on that port? --listen names another"),
            Self::Settings(_) => Some("join again with a new token: `bonepile-worker join --force TOKEN`"),
            Self::Outbox(_) | Self::Prepare { .. } => None,
        }
    }
}

/// A running agent: everything the loop owns.
struct Loop {
    agent: Agent,
    supervisor: Supervisor,
    runner: Runner,
    terms: Terms,
    state: StateDir,
    outbox: Outbox,
    records: Records,
    gatherer: Gatherer,
    publisher: Arc<Publisher>,
    sender: Arc<Sender>,
    receiving: Arc<Receiving>,
    questions: mpsc::Sender<Question>,
    models: ModelsDir,
    /// Asked for at the start; models that come later are reported by name.
    shapes: Vec<(String, ModelShape)>,
    devices: Vec<Device>,
    own_key: [u8; 32],
    epoch: UnixMillis,
    bound: SocketAddr,
    inputs: mpsc::Sender<Input>,
    link: watch::Sender<Link>,
    outgoing: Option<mpsc::Sender<ToCoordinator>>,
    heartbeats: u64,
    telemetry: watch::Receiver<Vec<Telemetry>>,
    /// Tasks of seats: sends, publications, hand-overs.
    tasks: BTreeMap<SeatId, Vec<AbortHandle>>,
    _lock: StateLock,
}

/// What the loop listens to.
struct Ears {
    inputs: mpsc::Receiver<Input>,
    questions: mpsc::Receiver<Question>,
    wrote: mpsc::Receiver<SeatWrote>,
    session: mpsc::Receiver<SessionEvent>,
}

/// Runs the agent until `stop` resolves or the coordinator dismisses it.
///
/// # Errors
/// [`RunError`]. What is finished stays in the outbox.
pub async fn run(config: RunConfig, stop: impl Future<Output = ()>) -> Result<(), RunError> {
    let identity = config.state.identity()?;
    let lock = config.state.lock()?;
    let (endpoint, _) = open_endpoint(&config, &identity)?;
    let (mut the_loop, mut ears) = assemble(config, &identity, &endpoint, lock)?;

    let control = client_config(&identity.credentials, ALPN_CONTROL)?;
    let coordinator = Coordinator {
        addresses: identity.coordinators.clone(),
        server_name: identity.server_name.clone(),
        config: control,
    };
    let (events, session) = mpsc::channel(INPUTS_MAX);
    ears.session = session;
    tokio::spawn(keep_connected(endpoint.clone(), coordinator, events));
    tokio::spawn(accept(endpoint.clone(), Arc::clone(&the_loop.receiving)));

    let outcome = the_loop.listen(&mut ears, stop).await;
    endpoint.close(VarInt::from_u32(close::DRAINING), b"the worker stops");
    let _ = tokio::time::timeout(LAST_WORD, endpoint.wait_idle()).await;
    outcome
}

fn open_endpoint(config: &RunConfig, identity: &BoxIdentity) -> Result<(Endpoint, Option<SmallBuffers>), RunError> {
    let server = server_config(&identity.credentials, &[ALPN_PEER], Side::Worker)?;
    let address = config.listen.unwrap_or_else(any_address);
    let secret = config.state.endpoint_secret()?;
    bind(address, &secret, Some(server)).map_err(|source| RunError::Bind { address, source })
}

fn assemble(
    config: RunConfig,
    identity: &BoxIdentity,
    endpoint: &Endpoint,
    lock: StateLock,
) -> Result<(Loop, Ears), RunError> {
    let prepare = |what| move |source| RunError::Prepare { what, source };
    let state = config.state;
    // Executors of an earlier process are dead, and their work with them; its outbox is not.
    end_leftovers(&state.work());
    make_empty(&state.work())?;
    make_empty(&state.receiving())?;
    let (inputs, heard) = mpsc::channel(INPUTS_MAX);
    let (outbox, seats) = Outbox::open(&state.outbox())?;
    let (records, handed_on) = Records::open(&state.outbox(), inputs.clone())?;
    let found = inventory::take(&config.inventory);
    let shapes = shapes::ask(&config.inventory.executor, &config.models);
    for device in &found.devices {
        match &device.unusable {
            None => tracing::info!(device = %device.id, model = device.model, "device found"),
            Some(why) => tracing::warn!(device = %device.id, model = device.model, "device is unusable: {why}"),
        }
    }
    let (questions, asked) = mpsc::channel(INPUTS_MAX);
    let (link, linked) = watch::channel(Link::default());
    let lent = Lent {
        devices: found.devices.iter().map(|device| device.id.clone()).collect(),
        executors: found.builds.keys().cloned().collect(),
        commands: config.terms.commands,
    };
    let supervisor = Supervisor::new(found.builds, inputs.clone());
    let (pieces, wrote) = mpsc::channel(PIECES_MAX);
    let runner = Runner::start(RunnerParts {
        work: state.work(),
        devices: found.devices.iter().map(|device| (device.id.clone(), device.kind)).collect(),
        inputs: inputs.clone(),
        wrote: pieces,
        pids: supervisor.pids(),
        warden: if lent.commands { Some(start_warden().map_err(prepare("the warden of programs"))?) } else { None },
        output_bytes_max: RunnerParts::OUTPUT_BYTES_MAX,
    });
    let runner = runner.map_err(prepare("the thread of programs"))?;
    let telemetry = inventory::watch_devices(found.devices.clone(), supervisor.pids(), TELEMETRY)
        .map_err(prepare("the telemetry thread"))?;
    let threads = StoreThreads::start().map_err(prepare("threads for the store"))?;
    let worker = identity.worker;
    let store = ToStore { path: config.store, worker: worker.to_string(), threads, link: linked };
    let publisher = Publisher::new(store.clone(), outbox.clone());
    let gatherer = Gatherer { store, shelf: state.inputs(), coming: Default::default() };
    let peer = client_config(&identity.credentials, ALPN_PEER)?;
    let receiving = Receiving {
        cluster: identity.cluster.clone(),
        inbox: Inbox::new(state.receiving()),
        work: state.work(),
        inputs: inputs.clone(),
        questions: questions.clone(),
    };
    let the_loop = Loop {
        agent: Agent::new(worker, lent, HandedOn { seats, records: handed_on }),
        supervisor,
        runner,
        terms: config.terms,
        outbox,
        records,
        gatherer,
        publisher: Arc::new(publisher),
        sender: Arc::new(Sender::new(endpoint.clone(), peer, identity.cluster.clone())),
        receiving: Arc::new(receiving),
        questions,
        shapes,
        models: config.models,
        devices: found.devices,
        own_key: identity.facts.spki_sha256,
        epoch: now(),
        bound: endpoint.local_addr().map_err(prepare("the UDP port"))?,
        inputs,
        link,
        outgoing: None,
        heartbeats: 0,
        telemetry,
        tasks: BTreeMap::new(),
        state,
        _lock: lock,
    };
    // Replaced by the session's.
    let (_, session) = mpsc::channel(1);
    Ok((the_loop, Ears { inputs: heard, questions: asked, wrote, session }))
}

fn start_warden() -> io::Result<Warden> {
    Warden::start(&std::env::current_exe()?)
}

fn now() -> UnixMillis {
    SystemTime::now().into()
}

impl Loop {
    async fn listen(&mut self, ears: &mut Ears, stop: impl Future<Output = ()>) -> Result<(), RunError> {
        let mut stop = std::pin::pin!(stop);
        let mut beat = interval(Duration::from_millis(HEARTBEAT_INTERVAL_MS));
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut inputs, mut events) = (Vec::new(), Vec::new());
        loop {
            self.act();
            let deadline = self.agent.next_deadline().map(|at| Duration::from_millis(at.since_ms(now())));
            tokio::select! {
                () = &mut stop => return Ok(()),
                _ = ears.inputs.recv_many(&mut inputs, INPUTS_AT_ONCE) => {
                    inputs.drain(..).for_each(|input| self.take_in(input));
                }
                Some(question) = ears.questions.recv() => self.answer(question),
                Some(wrote) = ears.wrote.recv() => self.pass_on(wrote),
                heard = ears.session.recv_many(&mut events, INPUTS_AT_ONCE) => match heard {
                    // The session ends by itself only after it has dismissed this worker.
                    0 => return Ok(()),
                    _ => events.drain(..).try_for_each(|event| self.on_session(event))?,
                },
                _ = beat.tick() => self.beat(),
                () = tokio::time::sleep(deadline.unwrap_or_default()), if deadline.is_some() => {
                    self.agent.handle(now(), Input::Deadline);
                }
            }
        }
    }

    fn take_in(&mut self, input: Input) {
        if let Input::ExecutorExited { executor, detail } = &input {
            tracing::info!("{detail}");
            self.supervisor.forget(*executor);
        }
        if let Input::CommandEnded { seat, .. } = &input {
            self.runner.forget(*seat);
        }
        self.agent.handle(now(), input);
    }

    fn answer(&self, question: Question) {
        let verdict = self.agent.offer(question.to, &question.peer_spki_sha256);
        // Who asked may be gone.
        let _ = question.reply.send(verdict);
    }

    fn on_session(&mut self, event: SessionEvent) -> Result<(), RunError> {
        match event {
            SessionEvent::Greeting(reply) => {
                let _ = reply.send(self.hello());
            }
            SessionEvent::Connected { welcome, connection, outgoing } => {
                self.link.send_replace(Link { connection: Some(connection), welcome: Some(welcome) });
                self.outgoing = Some(outgoing);
                self.heartbeats = 0;
                self.agent.handle(now(), Input::Connected);
                self.beat();
            }
            SessionEvent::Message(message) => self.agent.handle(now(), Input::Coordinator(message)),
            SessionEvent::Disconnected => {
                self.outgoing = None;
                self.link.send_modify(|link| link.connection = None);
                self.agent.handle(now(), Input::Disconnected);
            }
            SessionEvent::Dismissed { text, hint } => return Err(RunError::Dismissed { text, hint }),
        }
        Ok(())
    }

    fn hello(&self) -> Hello {
        Hello {
            build: protocol::BUILD.to_owned(),
            hostname: super::joining::hostname(),
            epoch: self.epoch,
            devices: self.devices.clone(),
            models: self.models.answers_to(),
            held: self.agent.held(),
            peer_port: self.bound.port(),
            addresses: own_addresses(self.bound.ip()),
            terms: self.terms.clone(),
            shapes: self.shapes.clone(),
        }
    }

    fn beat(&mut self) {
        self.heartbeats += 1;
        let telemetry = self.telemetry.borrow().clone();
        let heartbeat = Heartbeat { sequence: self.heartbeats, telemetry, held: self.agent.held() };
        self.say(heartbeat.into());
    }

    /// Says something if there is someone to say it to; outcomes are repeated on the next connection.
    fn say(&mut self, message: ToCoordinator) {
        if let Some(outgoing) = &self.outgoing
            && outgoing.try_send(message).is_err()
        {
            tracing::warn!("the coordinator reads nothing; dropping its connection");
            self.outgoing = None;
        }
    }

    /// Passes a piece of output on unless the connection is behind: what is in it is an artifact later.
    fn pass_on(&mut self, wrote: SeatWrote) {
        if let Some(outgoing) = &self.outgoing
            && outgoing.capacity() * 2 > outgoing.max_capacity()
        {
            self.say(wrote.into());
        }
    }

    /// Carries out what the agent wants done.
    fn act(&mut self) {
        while let Some(effect) = self.agent.poll_effect() {
            match effect {
                Effect::Say { message } => self.say(message),
                Effect::Launch { executor, device } => self.supervisor.launch(executor, &device),
                Effect::Gather { seat, inputs } => self.gather(seat, inputs),
                Effect::Run { executor, start, inputs } => match self.prepare(&start, inputs) {
                    Ok(run) => self.supervisor.tell(executor, ToExecutor::RunSeat(run)),
                    Err(failure) => {
                        let seat = SeatId { attempt: start.attempt, role: start.role };
                        self.agent.handle(now(), Input::CouldNotStart { seat, failure });
                    }
                },
                Effect::Tell { executor, message } => self.supervisor.tell(executor, message),
                Effect::Kill { executor } => self.supervisor.kill(executor),
                Effect::RunCommand { start, behind } => self.runner.run(start, behind),
                Effect::StopCommand { seat } => self.runner.stop(seat),
                Effect::KeepRecord { finished } => self.records.keep(finished),
                Effect::ForgetRecord { seat } => self.records.forget(seat),
                Effect::Keep { seat, finished, usage, build } => self.keep(seat, *finished, usage, build),
                Effect::Publish { seat } => self.publish(seat),
                Effect::SendPacket { from, to, key, path } => self.send(from, to, key, path),
                Effect::HandOver { from, to, key, path } => self.hand_over(from, to, key, path),
                Effect::StopTransfers { seat } => {
                    for task in self.tasks.remove(&seat).unwrap_or_default() {
                        task.abort();
                    }
                    self.receiving.inbox.forget(seat);
                }
                Effect::Discard { seat } => self.discard(seat),
            }
        }
    }

    fn prepare(&self, start: &StartSeat, inputs: Vec<(String, String)>) -> Result<RunSeat, Failure> {
        let seat = SeatId { attempt: start.attempt, role: start.role };
        let directory = self.state.work().join(seat.directory_name());
        protocol::private_file::create_dir(&directory).map_err(|error| {
            Failure::new(FailureKind::LocalDisk, format!("could not make {}: {error}", directory.display()))
        })?;
        let mut models = Vec::new();
        for name in start.spec.models_of(start.role) {
            let (path, fingerprint) = self.models.locate(name).map_err(|error| {
                use protocol::models::ModelError;
                let kind = match &error {
                    ModelError::Corrupt { .. } => FailureKind::ModelCorrupt,
                    _ => FailureKind::ModelMissing,
                };
                let hint = error.hint_on_worker().unwrap_or_default();
                Failure::new(kind, chain(&error)).hint(hint)
            })?;
            let path = path.to_string_lossy().into_owned();
            models.push(ModelFile { name: name.to_owned(), path, fingerprint });
        }
        Ok(RunSeat {
            attempt: start.attempt,
            role: start.role,
            spec: start.spec.clone(),
            directory: directory.to_string_lossy().into_owned(),
            models,
            inputs,
        })
    }

    fn gather(&mut self, seat: SeatId, wanted: Vec<Output>) {
        let (gatherer, inputs) = (self.gatherer.clone(), self.inputs.clone());
        let directory = self.state.work().join(format!("{}.inputs", seat.directory_name()));
        self.spawn_for(seat, async move {
            let input = match gatherer.gather(seat, wanted, directory).await {
                Ok(inputs) => Input::Gathered { seat, inputs },
                Err(failure) => Input::CouldNotStart { seat, failure },
            };
            let _ = inputs.send(input).await;
        });
    }

    fn keep(&self, seat: SeatId, finished: exec::Finished, usage: Usage, build: String) {
        let (outbox, inputs) = (self.outbox.clone(), self.inputs.clone());
        let work = self.state.work().join(seat.directory_name());
        let kept = tokio::task::spawn_blocking(move || outbox.keep(seat, &work, &finished, usage, build));
        tokio::spawn(async move {
            let failure = |text: String| Failure::new(FailureKind::LocalDisk, text);
            let input = match kept.await {
                Ok(Ok(())) => Input::Kept { seat },
                Ok(Err(error)) => Input::NotKept { seat, failure: failure(chain(&error)) },
                Err(error) => Input::NotKept { seat, failure: failure(error.to_string()) },
            };
            let _ = inputs.send(input).await;
        });
    }

    fn publish(&mut self, seat: SeatId) {
        let (publisher, inputs) = (Arc::clone(&self.publisher), self.inputs.clone());
        self.spawn_for(seat, async move { publisher.publish(seat, &inputs).await });
    }

    fn send(&mut self, from: SeatId, to: SeatAddress, key: String, path: String) {
        let (sender, inputs) = (Arc::clone(&self.sender), self.inputs.clone());
        self.spawn_for(from, async move {
            let began = Instant::now();
            let input = match sender.send(from, &to, &key, path.as_ref()).await {
                Ok(bytes) => {
                    let bytes_per_second = rate(bytes, began.elapsed());
                    // What has arrived is of no more use here.
                    let _ = tokio::fs::remove_file(&path).await;
                    Input::PacketSent { seat: from, key, bytes, bytes_per_second }
                }
                Err(failure) => Input::PacketNotSent { seat: from, key, failure },
            };
            let _ = inputs.send(input).await;
        });
    }

    fn hand_over(&mut self, from: SeatId, to: SeatId, key: String, path: String) {
        let (receiving, questions, inputs) = (Arc::clone(&self.receiving), self.questions.clone(), self.inputs.clone());
        let own_key = self.own_key;
        self.spawn_for(from, async move {
            let place = receiving.place(to, &key);
            let input = match hand_over(&questions, to, own_key, path.clone().into(), place.clone()).await {
                Ok(bytes) => {
                    let place = place.to_string_lossy().into_owned();
                    let _ = inputs.send(Input::PacketArrived { seat: to, key: key.clone(), path: place, bytes }).await;
                    let _ = tokio::fs::remove_file(&path).await;
                    Input::PacketSent { seat: from, key, bytes, bytes_per_second: 0 }
                }
                Err(failure) => Input::PacketNotSent { seat: from, key, failure },
            };
            let _ = inputs.send(input).await;
        });
    }

    fn discard(&mut self, seat: SeatId) {
        for task in self.tasks.remove(&seat).unwrap_or_default() {
            task.abort();
        }
        let (outbox, work) = (self.outbox.clone(), self.state.work());
        tokio::task::spawn_blocking(move || {
            if let Err(error) = outbox.discard(seat) {
                tracing::warn!(%seat, "could not remove a settled seat: {}", chain(&error));
            }
            for ending in ["", ".in", ".inputs"] {
                let path = work.join(format!("{}{ending}", seat.directory_name()));
                match std::fs::remove_dir_all(&path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        tracing::warn!(path = %path.display(), "could not remove a seat's directory: {error}");
                    }
                    _ => {}
                }
            }
        });
    }

    /// A task that ends with its seat.
    fn spawn_for(&mut self, seat: SeatId, task: impl Future<Output = ()> + Send + 'static) {
        let tasks = self.tasks.entry(seat).or_default();
        tasks.retain(|task| !task.is_finished());
        tasks.push(tokio::spawn(task).abort_handle());
    }
}

/// Bytes a second; 0 for a packet too short to tell.
fn rate(bytes: u64, took: Duration) -> u64 {
    let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
    if bytes < RATED_BYTES_MIN { 0 } else { bytes.saturating_mul(1_000_000) / us }
}

/// Addresses by which others may reach this box, beside the one that the coordinator sees: the one that the socket is bound
/// to, or else the one from which the system would send to the outside. Interfaces are not listed.
fn own_addresses(bound: IpAddr) -> Vec<String> {
    if !bound.is_unspecified() {
        return vec![bound.to_string()];
    }
    // Connecting a UDP socket sends nothing; it only asks the system which way it would go. The address is documentation's.
    let outward = || -> io::Result<SocketAddr> {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
        socket.connect("192.0.2.1:9")?;
        socket.local_addr()
    };
    outward().map(|address| address.ip().to_string()).into_iter().collect()
}
