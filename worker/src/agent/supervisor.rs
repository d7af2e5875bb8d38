//! Executor processes: started with an explicit number of threads, spoken to over pipes, buried with their last words.
//!
//! Decides nothing: which executor does what is [`super::core`]'s. A child dies with the agent, however that ends, by the
//! kernel's parent-death signal.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use protocol::exec::{FromExecutor, ToExecutor};
use protocol::frame::{FrameError, HEADER_BYTES, Header, Messages};
use protocol::ids::DeviceId;
use protocol::limits::clean_text;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::sync::{mpsc, oneshot};

use super::core::{ExecutorId, Input};

/// An executor must say that it is up by then.
const READY: Duration = Duration::from_secs(60);
/// Lines of an executor's stderr that are kept for its obituary.
const LAST_WORDS: usize = 12;
/// Messages that wait for an executor.
const TOLD_MAX: usize = 256;
/// How long the pipes of a dead child may take to run dry.
const PIPES: Duration = Duration::from_secs(2);

/// How to start an executor for a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecutorBuild {
    /// The program.
    pub program: PathBuf,
    /// Compute threads, 1 or more.
    pub threads: u32,
    /// Further environment, for a GPU the variable that shows it no other.
    pub environment: Vec<(String, String)>,
}

/// Process ids of executors and of researchers' programs by device, for telemetry, and what telemetry saw of them.
#[derive(Debug, Clone, Default)]
pub struct Pids(Arc<Mutex<Known>>);

#[derive(Debug, Default)]
struct Known {
    by_device: BTreeMap<DeviceId, BTreeSet<u32>>,
    /// Most memory of a card that a process was seen to hold, bytes.
    peaks: BTreeMap<u32, u64>,
}

impl Pids {
    /// The processes on a device now.
    pub fn of(&self, device: &DeviceId) -> BTreeSet<u32> {
        self.known().by_device.get(device).cloned().unwrap_or_default()
    }

    /// A process works on a device.
    pub fn enter(&self, device: &DeviceId, pid: u32) {
        let mut known = self.known();
        if let Some(pids) = known.by_device.get_mut(device) {
            pids.insert(pid);
        } else {
            known.by_device.insert(device.clone(), [pid].into());
        }
    }

    /// A process has ended: the most memory of a card that it was seen to hold, bytes; 0 if it was not seen.
    pub fn leave(&self, device: &DeviceId, pid: u32) -> u64 {
        let mut known = self.known();
        if let Some(pids) = known.by_device.get_mut(device) {
            pids.remove(&pid);
        }
        known.peaks.remove(&pid).unwrap_or(0)
    }

    /// Processes were seen to hold memory of a card, bytes.
    pub fn note_memory(&self, held: &BTreeMap<u32, u64>) {
        let mut known = self.known();
        for (pid, bytes) in held {
            // It may have ended while the driver was asked.
            if !known.by_device.values().any(|pids| pids.contains(pid)) {
                continue;
            }
            let peak = known.peaks.entry(*pid).or_default();
            *peak = (*peak).max(*bytes);
        }
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The executors of this agent.
#[derive(Debug)]
pub struct Supervisor {
    builds: BTreeMap<DeviceId, ExecutorBuild>,
    running: BTreeMap<ExecutorId, Running>,
    inputs: mpsc::Sender<Input>,
    pids: Pids,
}

#[derive(Debug)]
struct Running {
    tell: mpsc::Sender<ToExecutor>,
    /// Dropped or sent: the process is killed.
    kill: Option<oneshot::Sender<()>>,
}

impl Supervisor {
    /// A supervisor that can start executors on the devices of `builds`, and says what they say to `inputs`.
    pub fn new(builds: BTreeMap<DeviceId, ExecutorBuild>, inputs: mpsc::Sender<Input>) -> Self {
        Self { builds, running: BTreeMap::new(), inputs, pids: Pids::default() }
    }

    /// Process ids, for telemetry.
    pub fn pids(&self) -> Pids {
        self.pids.clone()
    }

    /// Starts an executor; whatever comes of it comes as an input. Must be called from a thread that lives as long as the
    /// agent: the kernel ends a child with the thread that made it.
    pub fn launch(&mut self, executor: ExecutorId, device: &DeviceId) {
        let (tell, told) = mpsc::channel(TOLD_MAX);
        let (kill, killed) = oneshot::channel();
        self.running.insert(executor, Running { tell, kill: Some(kill) });
        let spawned = match self.builds.get(device) {
            Some(build) => {
                spawn(build).map_err(|error| format!("could not start {}: {error}", build.program.display()))
            }
            None => Err(format!("no executor build for device {device}")),
        };
        let (inputs, pids, device) = (self.inputs.clone(), self.pids.clone(), device.clone());
        tokio::spawn(async move {
            let detail = match spawned {
                Ok(child) => {
                    let pid = child.id();
                    pid.into_iter().for_each(|pid| pids.enter(&device, pid));
                    let detail = attend(executor, child, told, killed, &inputs).await;
                    if let Some(pid) = pid {
                        pids.leave(&device, pid);
                    }
                    format!("executor {executor} on {device} {detail}")
                }
                Err(detail) => detail,
            };
            // The loop that listens ends only with the process.
            let _ = inputs.send(Input::ExecutorExited { executor, detail }).await;
        });
    }

    /// Tells an executor; one that is gone, or reads nothing, is told nothing: its end comes as an input.
    pub fn tell(&mut self, executor: ExecutorId, message: ToExecutor) {
        if let Some(running) = self.running.get(&executor)
            && running.tell.try_send(message).is_err()
        {
            tracing::warn!(%executor, "an executor reads nothing any more; killing it");
            self.kill(executor);
        }
    }

    /// Kills an executor's process.
    pub fn kill(&mut self, executor: ExecutorId) {
        if let Some(kill) = self.running.get_mut(&executor).and_then(|running| running.kill.take()) {
            // If it is gone already there is nothing to kill.
            let _ = kill.send(());
        }
    }

    /// Forgets an executor whose end was heard of.
    pub fn forget(&mut self, executor: ExecutorId) {
        self.running.remove(&executor);
    }
}

#[expect(unsafe_code, reason = "pre_exec is unsafe; the one call in it is async-signal-safe")]
fn spawn(build: &ExecutorBuild) -> io::Result<Child> {
    let threads = build.threads.to_string();
    let mut command = Command::new(&build.program);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .env("RAYON_NUM_THREADS", &threads)
        .env("OMP_NUM_THREADS", &threads)
        .env("BONEPILE_THREADS", &threads)
        .envs(build.environment.iter().map(|(name, value)| (name, value)))
        // A terminal's Ctrl-C is the agent's to answer; its children end with it.
        .process_group(0)
        .kill_on_drop(true);
    let agent = rustix::process::getpid();
    // SAFETY: between fork and exec only prctl and getppid are called, both async-signal-safe; nothing is allocated.
    unsafe {
        command.pre_exec(move || {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            // The agent may have died before the line above took effect.
            match rustix::process::getppid() == Some(agent) {
                true => Ok(()),
                false => Err(io::Error::from_raw_os_error(rustix::io::Errno::SRCH.raw_os_error())),
            }
        });
    }
    command.spawn()
}

/// Carries messages until the process is gone; says how it went.
async fn attend(
    executor: ExecutorId,
    mut child: Child,
    told: mpsc::Receiver<ToExecutor>,
    killed: oneshot::Receiver<()>,
    inputs: &mpsc::Sender<Input>,
) -> String {
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let (Some(stdin), Some(stdout), Some(stderr)) = (stdin, stdout, stderr) else {
        return "has no pipes".to_owned();
    };
    let words = tokio::spawn(last_words(executor, stderr));
    let writer = tokio::spawn(write(stdin, told));
    let reason = tokio::select! {
        broken = listen(executor, stdout, inputs) => broken,
        _ = killed => Some("was killed by the agent".to_owned()),
    };
    // Whatever the reason was: without a conversation there is no executor.
    if reason.is_some() {
        let _ = child.start_kill();
    }
    let status = match tokio::time::timeout(PIPES, child.wait()).await {
        Ok(status) => status,
        // It has closed its side and lives on: end it.
        Err(_) => {
            let _ = child.start_kill();
            child.wait().await
        }
    };
    writer.abort();
    let words = tokio::time::timeout(PIPES, words).await.ok().and_then(Result::ok).unwrap_or_default();
    let ended = reason.unwrap_or_else(|| describe(status));
    match words.is_empty() {
        true => ended,
        false => format!("{ended}; its last words: {}", words.join(" | ")),
    }
}

fn describe(status: io::Result<ExitStatus>) -> String {
    use std::os::unix::process::ExitStatusExt;
    match status {
        Ok(status) => match (status.code(), status.signal()) {
            (Some(code), _) => format!("ended with exit code {code}"),
            (None, Some(signal)) => format!("was killed by signal {signal}"),
            (None, None) => "ended".to_owned(),
        },
        Err(error) => format!("ended, how is not known: {error}"),
    }
}

/// Reads messages until the pipe ends; a text if the executor talks nonsense or does not come up.
async fn listen(executor: ExecutorId, mut stdout: ChildStdout, inputs: &mpsc::Sender<Input>) -> Option<String> {
    let mut up = false;
    loop {
        let next = read_frame(&mut stdout);
        let message = match up {
            true => next.await,
            false => match tokio::time::timeout(READY, next).await {
                Ok(message) => message,
                Err(_) => return Some(format!("did not come up within {} s", READY.as_secs())),
            },
        };
        let input = match message {
            Ok(Some(FromExecutor::Ready(ready))) if !up => {
                up = true;
                tracing::info!(%executor, backend = ready.backend, threads = ready.threads, "executor is up");
                Input::ExecutorReady { executor, build: clean_text(&ready.build) }
            }
            Ok(Some(message)) if up => Input::Executor { executor, message },
            Ok(Some(_)) => return Some("spoke before it was ready".to_owned()),
            Ok(None) => return None,
            Err(error) => return Some(format!("spoke nonsense: {error}")),
        };
        // The loop that listens ends only with the process.
        inputs.send(input).await.ok()?;
    }
}

/// A frame could not be read from a pipe.
#[derive(Debug, thiserror::Error)]
enum PipeError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Frame(#[from] FrameError),
}

async fn read_frame(pipe: &mut ChildStdout) -> Result<Option<FromExecutor>, PipeError> {
    let mut header = [0; HEADER_BYTES];
    match pipe.read_exact(&mut header).await {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let header = Header::parse(header, FromExecutor::BYTES_MAX)?;
    let mut body = vec![0; header.len];
    pipe.read_exact(&mut body).await?;
    Ok(Some(FromExecutor::from_body(header, &body)?))
}

async fn write(mut stdin: ChildStdin, mut told: mpsc::Receiver<ToExecutor>) {
    while let Some(message) = told.recv().await {
        let frame = match message.to_frame() {
            Ok(frame) => frame,
            Err(error) => {
                tracing::error!("could not tell an executor: {error}");
                continue;
            }
        };
        if stdin.write_all(&frame).await.is_err() || stdin.flush().await.is_err() {
            // It is gone; the reading side says so.
            return;
        }
    }
}

/// Passes an executor's stderr on to the log and keeps its last lines.
async fn last_words(executor: ExecutorId, stderr: ChildStderr) -> Vec<String> {
    let mut lines = BufReader::new(stderr).split(b'\n');
    let mut last = VecDeque::new();
    while let Ok(Some(line)) = lines.next_segment().await {
        let line = clean_text(String::from_utf8_lossy(&line).trim_end());
        if line.is_empty() {
            continue;
        }
        tracing::debug!(%executor, "{line}");
        if last.len() == LAST_WORDS {
            last.pop_front();
        }
        last.push_back(line);
    }
    last.into()
}

/// The executor beside this program, unless the operator names another.
pub fn default_program() -> PathBuf {
    std::env::current_exe()
        .ok()
        .and_then(|path| path.parent().map(|directory| directory.join("bonepile-executor")))
        .unwrap_or_else(|| PathBuf::from("bonepile-executor"))
}

/// The build for a GPU of compute capability `major.minor`, beside the one for processors: `bonepile-executor-cuda-61`.
pub fn cuda_program(cpu_program: &Path, major: u16, minor: u16) -> PathBuf {
    cpu_program.with_file_name(format!("bonepile-executor-cuda-{major}{minor}"))
}
