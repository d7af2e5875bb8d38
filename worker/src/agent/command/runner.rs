//! The thread on which programs are started, watched and buried.

use std::collections::BTreeMap;
use std::io::{self, PipeReader};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use protocol::control::{Failure, FailureKind, SeatWrote, StartSeat};
use protocol::exec::Finished;
use protocol::experiment::{CommandSpec, ShardSpec};
use protocol::hardware::DeviceKind;
use protocol::ids::DeviceId;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};

use super::child::{self, Running};
use super::collect::collect;
use super::output::{OUTPUT_BYTES_MAX, OUTPUT_NAME, Output};
use super::places::Places;
use super::verdict::{self, EndedBy};
use super::warden::{Slot, Warden};
use crate::agent::core::{Input, STOP_GRACE_MS, SeatId};
use crate::agent::supervisor::Pids;
use crate::agent::way::chain;

/// How long a program that was asked to stop may take.
const STOP_GRACE: Duration = Duration::from_millis(STOP_GRACE_MS);
/// How long what a dead program left in its pipe may take to come out: another process may hold the other end.
const PIPE_RUNS_DRY: Duration = Duration::from_secs(2);
/// Bytes read from a pipe at once.
const READ_BYTES: usize = 16 << 10;
/// The kernel's count of kills is asked for at most this often: it goes over every counter of the box.
const KILLS_EVERY: Duration = Duration::from_secs(1);

/// What the runner works with.
#[derive(Debug)]
pub struct RunnerParts {
    /// Where seats have their directories.
    pub work: PathBuf,
    /// The devices of this box.
    pub devices: BTreeMap<DeviceId, DeviceKind>,
    /// Takes [`Input::CommandEnded`].
    pub inputs: mpsc::Sender<Input>,
    /// Takes what programs write; what does not fit is dropped.
    pub wrote: mpsc::Sender<SeatWrote>,
    /// Where their process numbers are noted, for telemetry.
    pub pids: Pids,
    /// Ends them with the agent.
    pub warden: Option<Warden>,
    /// Longest output kept, bytes.
    pub output_bytes_max: u64,
}

impl RunnerParts {
    /// The usual limit of a program's output.
    pub const OUTPUT_BYTES_MAX: u64 = OUTPUT_BYTES_MAX;
}

/// Runs programs. Dropped, it lets go of all of them.
#[derive(Debug)]
pub struct Runner {
    thread: Handle,
    shared: Arc<Shared>,
    seats: BTreeMap<SeatId, Signals>,
    /// Dropped with the runner: the thread ends.
    _end: oneshot::Sender<()>,
}

/// To and from a seat's program.
#[derive(Debug)]
struct Signals {
    stop: Option<oneshot::Sender<()>>,
    /// Closed when its program has ended.
    over: watch::Receiver<()>,
}

/// What a seat's program listens to, and what it says.
struct Cues {
    stop: oneshot::Receiver<()>,
    /// Closed when the program before has ended.
    before: Option<watch::Receiver<()>>,
    /// Dropped when this one has ended.
    over: watch::Sender<()>,
}

#[derive(Debug)]
struct Shared {
    parts: RunnerParts,
    places: Places,
    /// The kernel's kills as last asked for, and when.
    kills: Mutex<Option<(Instant, Option<u64>)>>,
}

impl Runner {
    /// Starts the thread.
    ///
    /// # Errors
    /// Of the system.
    pub fn start(parts: RunnerParts) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = runtime.handle().clone();
        let (end, ends) = oneshot::channel::<()>();
        std::thread::Builder::new().name("commands".to_owned()).spawn(move || {
            let _ = runtime.block_on(ends);
            runtime.shutdown_background();
        })?;
        let places = Places::new(parts.work.clone());
        let shared = Arc::new(Shared { parts, places, kills: Mutex::new(None) });
        Ok(Self { thread, shared, seats: BTreeMap::new(), _end: end })
    }

    /// Runs a seat's program, at once or when that of the seat `behind` which it stands has ended; whatever comes of it
    /// comes as [`Input::CommandEnded`].
    pub fn run(&mut self, start: Box<StartSeat>, behind: Option<SeatId>) {
        let seat = SeatId { attempt: start.attempt, role: start.role };
        let (stop, stopped) = oneshot::channel();
        let (ends, over) = watch::channel(());
        let before = behind.and_then(|before| Some(self.seats.get(&before)?.over.clone()));
        self.seats.insert(seat, Signals { stop: Some(stop), over });
        let shared = Arc::clone(&self.shared);
        let cues = Cues { stop: stopped, before, over: ends };
        self.thread.spawn(async move {
            let (wall_ms, ended) = shared.carry_out(seat, &start, cues).await;
            // The loop that listens ends only with the process.
            let _ = shared.parts.inputs.send(Input::CommandEnded { seat, wall_ms, ended }).await;
        });
    }

    /// Stops a seat's program.
    pub fn stop(&mut self, seat: SeatId) {
        if let Some(stop) = self.seats.get_mut(&seat).and_then(|signals| signals.stop.take()) {
            // One that has ended meanwhile need not be told.
            let _ = stop.send(());
        }
    }

    /// Forgets a seat whose end was heard of.
    pub fn forget(&mut self, seat: SeatId) {
        self.seats.remove(&seat);
    }
}

/// What a program made.
struct Made {
    outputs: Vec<(String, PathBuf)>,
    memory_peak_bytes: u64,
}

impl Shared {
    /// Waits for its turn, then runs the program: how long it ran, milliseconds, and what came of it.
    async fn carry_out(&self, seat: SeatId, start: &StartSeat, mut cues: Cues) -> (u64, Result<Finished, Failure>) {
        if let Some(mut before) = cues.before.take() {
            tokio::select! {
                // Nothing is ever sent.
                _ = before.changed() => {}
                _ = &mut cues.stop => return (0, Err(Failure::new(FailureKind::Cancelled, "the program did not start"))),
            }
        }
        let begun = Instant::now();
        let ended = match self.places.take() {
            Ok(place) => self.run_at(place, seat, start, cues).await,
            Err(error) => Err(local_disk("could not make the program's directory", &error)),
        };
        (u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX), ended)
    }

    /// Runs the program in `place`, which becomes the seat's directory if it made anything.
    async fn run_at(&self, place: PathBuf, seat: SeatId, start: &StartSeat, cues: Cues) -> Result<Finished, Failure> {
        let made = match &start.spec {
            ShardSpec::Command(spec) => match prepare(&place, &spec.files) {
                Ok(()) => self.run(seat, start, spec, &place, cues).await,
                Err(failure) => Err(failure),
            },
            other => Err(Failure::new(FailureKind::Internal, format!("{} is not a program", other.kind()))),
        };
        let directory = self.parts.work.join(seat.directory_name());
        let made = match made {
            Ok(made) if !made.outputs.is_empty() => std::fs::rename(&place, &directory)
                .map(|()| made)
                .map_err(|error| local_disk("could not name the program's directory", &error)),
            made => made,
        };
        if !matches!(&made, Ok(made) if !made.outputs.is_empty()) {
            self.places.give_back(place.clone()).await;
        }
        let Made { outputs, memory_peak_bytes } = made?;
        let moved = |path: PathBuf| match path.strip_prefix(&place) {
            Ok(rest) => directory.join(rest),
            Err(_) => path,
        };
        let outputs = outputs.into_iter().map(|(name, path)| (name, moved(path).to_string_lossy().into_owned()));
        let (outputs, models) = (outputs.collect(), Vec::new());
        Ok(Finished { attempt: seat.attempt, outputs, memory_peak_bytes, models, waited_ms: 0 })
    }

    async fn run(
        &self,
        seat: SeatId,
        start: &StartSeat,
        spec: &CommandSpec,
        directory: &Path,
        cues: Cues,
    ) -> Result<Made, Failure> {
        let kind = self.parts.devices.get(&start.device).copied().unwrap_or(DeviceKind::Cpu);
        let environment = child::environment(start, spec, kind);
        let name = spec.argv.first().map_or("", String::as_str);
        let program = child::find_program(name, &environment).ok_or_else(|| cannot_start(name, "not on the `PATH`"))?;
        let kills = self.kernel_kills(Instant::now());
        let (running, pipe) = child::spawn(&program, &spec.argv, &environment, directory)
            .map_err(|error| cannot_start(name, &error.to_string()))?;
        let watched = Watched::new(self, &start.device, running.pid());
        let mut output = Output::new(seat, directory, self.parts.output_bytes_max);
        let ended_by = self.watch(&running, pipe, &mut output, spec.timeout_ms, cues.stop).await;
        let card_bytes = watched.over();
        let ended = running.bury().map_err(|error| internal(&error))?;
        // The device is free: the next one need not wait until this one's files are picked up.
        drop(cues.over);
        let ended_by = ended_by.map_err(|error| local_disk("could not keep what the program wrote", &error))?;
        if let Some(piece) = output.last_piece() {
            self.tell(piece);
        }
        if let Some(failure) = verdict::failure(ended.status, ended_by, output.tail(), || kernel_was_short(kills)) {
            return Err(failure);
        }
        let memory_peak_bytes = match kind {
            DeviceKind::Cpu => ended.memory_peak_bytes,
            DeviceKind::Cuda => card_bytes,
        };
        let outputs = pick_up(directory, &spec.collect, output).await?;
        Ok(Made { outputs, memory_peak_bytes })
    }

    /// Until the program and what it left in its pipe is over; whether it was ended by us.
    async fn watch(
        &self,
        running: &Running,
        pipe: PipeReader,
        output: &mut Output,
        timeout_ms: u64,
        mut stop: oneshot::Receiver<()>,
    ) -> io::Result<Option<EndedBy>> {
        let mut pipe = Some(pipe::Receiver::from_owned_fd(OwnedFd::from(pipe))?);
        let mut buffer = vec![0; READ_BYTES];
        let mut times_out = (timeout_ms > 0).then(|| Instant::now() + Duration::from_millis(timeout_ms));
        let (mut kill_at, mut ended_by) = (None, None);
        loop {
            let wake = [times_out, kill_at, output.next_piece()].into_iter().flatten().min();
            let mut asked = None;
            tokio::select! {
                biased;
                () = running.ended() => break,
                _ = &mut stop, if ended_by.is_none() => asked = Some(EndedBy::Cancel),
                () = sleep_until(wake) => {}
                read = read(pipe.as_mut(), &mut buffer) => match read? {
                    0 => pipe = None,
                    length => self.keep(running, output, &buffer[..length]).await?,
                },
            }
            let now = Instant::now();
            if times_out.is_some_and(|at| at <= now) && ended_by.is_none() {
                asked = Some(EndedBy::Timeout(timeout_ms));
            }
            if asked.is_some() {
                running.terminate();
                (ended_by, kill_at, times_out) = (asked, Some(now + STOP_GRACE), None);
            }
            if kill_at.is_some_and(|at| at <= now) {
                running.kill();
                kill_at = None;
            }
            output.piece(now).into_iter().for_each(|piece| self.tell(piece));
        }
        // What it started is ended with it; then the pipe runs dry.
        running.kill();
        if let Some(mut pipe) = pipe {
            let rest = async {
                while let length @ 1.. = pipe.read(&mut buffer).await? {
                    output.take(&buffer[..length], Instant::now())?;
                }
                io::Result::Ok(())
            };
            // Someone who left the group may hold the other end for ever.
            tokio::time::timeout(PIPE_RUNS_DRY, rest).await.unwrap_or(Ok(()))?;
        }
        Ok(ended_by)
    }

    /// A program whose words cannot be kept is ended: nobody would know what it did.
    async fn keep(&self, running: &Running, output: &mut Output, bytes: &[u8]) -> io::Result<()> {
        let kept = output.take(bytes, Instant::now());
        if kept.is_err() {
            running.kill();
            running.ended().await;
        }
        kept
    }

    fn tell(&self, piece: SeatWrote) {
        // Whoever reads along can do without; the artifact has everything.
        let _ = self.parts.wrote.try_send(piece);
    }

    /// The kernel's kills at `now`, or a little before.
    fn kernel_kills(&self, now: Instant) -> Option<u64> {
        let mut kills = self.kills.lock().unwrap_or_else(PoisonError::into_inner);
        match *kills {
            Some((asked, count)) if now.duration_since(asked) < KILLS_EVERY => count,
            _ => {
                let count = verdict::kernel_kills();
                *kills = Some((now, count));
                count
            }
        }
    }
}

/// A program that telemetry counts and the warden guards.
struct Watched<'a> {
    shared: &'a Shared,
    device: &'a DeviceId,
    pid: u32,
    slot: Option<Slot>,
}

impl<'a> Watched<'a> {
    fn new(shared: &'a Shared, device: &'a DeviceId, pid: u32) -> Self {
        shared.parts.pids.enter(device, pid);
        let guarded = shared.parts.warden.as_ref().map(|warden| warden.guard(pid));
        let slot = match guarded.transpose() {
            Ok(slot) => slot,
            Err(error) => {
                tracing::warn!("a program will not end with the agent: {error}");
                None
            }
        };
        Self { shared, device, pid, slot }
    }

    /// It has ended: the most that it was seen to hold of a card, bytes.
    fn over(self) -> u64 {
        if let (Some(warden), Some(slot)) = (&self.shared.parts.warden, self.slot) {
            warden.release(slot);
        }
        self.shared.parts.pids.leave(self.device, self.pid)
    }
}

/// Whether the kernel has killed anything for lack of memory since it was asked.
fn kernel_was_short(before: Option<u64>) -> bool {
    before.zip(verdict::kernel_kills()).is_some_and(|(before, now)| now > before)
}

/// The pipe's next bytes; 0 at its end. Pending for ever without a pipe.
async fn read(pipe: Option<&mut pipe::Receiver>, buffer: &mut [u8]) -> io::Result<usize> {
    match pipe {
        Some(pipe) => pipe.read(buffer).await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(wake: Option<Instant>) {
    match wake {
        Some(wake) => tokio::time::sleep_until(wake.into()).await,
        None => std::future::pending().await,
    }
}

/// Puts the sweep's files into the program's directory. A text that begins with `#!` may be run.
fn prepare(directory: &Path, files: &[(String, String)]) -> Result<(), Failure> {
    let disk = |error| local_disk("could not write the sweep's files", &error);
    for (name, text) in files {
        let relative = Path::new(name);
        if name.is_empty() || !relative.components().all(|part| matches!(part, Component::Normal(_))) {
            let message = format!("file `{name}` is not below the program's directory");
            return Err(Failure::new(FailureKind::BadSpec, message));
        }
        let path = directory.join(relative);
        let mode = if text.starts_with("#!") { 0o700 } else { 0o600 };
        let written = path.parent().map_or(Ok(()), protocol::private_file::create_dir).and_then(|()| {
            let file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&path);
            io::Write::write_all(&mut file?, text.as_bytes())
        });
        written.map_err(disk)?;
    }
    Ok(())
}

/// The files that the sweep asks for, and the output if there was any.
async fn pick_up(directory: &Path, patterns: &[String], output: Output) -> Result<Vec<(String, PathBuf)>, Failure> {
    let log = output.finish().map_err(|error| local_disk("could not keep what the program wrote", &error))?;
    let mut outputs: Vec<_> = log.into_iter().map(|path| (OUTPUT_NAME.to_owned(), path)).collect();
    if !patterns.is_empty() {
        let (directory, patterns) = (directory.to_owned(), patterns.to_vec());
        let found = tokio::task::spawn_blocking(move || collect(&directory, &patterns)).await;
        let found = found.map_err(|error| Failure::new(FailureKind::Internal, error.to_string()))?;
        outputs.extend(found.map_err(|error| Failure::new(FailureKind::CommandFailed, chain(&error)))?);
    }
    Ok(outputs)
}

fn cannot_start(name: &str, why: &str) -> Failure {
    let message = format!("could not start `{name}` on this worker: {why}");
    Failure::new(FailureKind::CommandFailed, message).hint("programs are looked for on the worker's `PATH`")
}

fn local_disk(what: &str, error: &io::Error) -> Failure {
    Failure::new(FailureKind::LocalDisk, format!("{what}: {error}"))
}

fn internal(error: &io::Error) -> Failure {
    Failure::new(FailureKind::Internal, format!("nobody knows how the program ended: {error}"))
}

#[cfg(test)]
mod tests;
