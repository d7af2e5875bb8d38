//! The demo's processes: a coordinator and workers, their logs, their end.
//!
//! Each is in a process group of its own, so that a Ctrl-C reaches only the demo, which then ends them in order.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use protocol::limits::clean_text;
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};

use crate::cli::failure::Failure;

/// A process that does not end by itself this long after it was asked is killed.
const END_MAX: Duration = Duration::from_secs(10);
/// Time between looks at whether a process has ended.
const LOOK_INTERVAL: Duration = Duration::from_millis(300);
/// Lines of each log that are shown after a failure.
const TAIL_LINES: usize = 12;

/// The programs that the demo starts.
pub(super) struct Programs {
    bonepile: PathBuf,
    worker: PathBuf,
}

impl Programs {
    /// Finds them in the directory of this program, where a build puts all three.
    pub(super) fn beside_this_one() -> Result<Self, Failure> {
        let this = std::env::current_exe()
            .map_err(|error| Failure::failed("io", format!("failed to find this program's own file: {error}")))?;
        let directory = this.parent().unwrap_or(Path::new("."));
        let find = |name: &str| {
            let path = directory.join(name);
            if path.is_file() {
                return Ok(path);
            }
            Err(Failure::failed("programs", format!("{name} is not beside {}", this.display()))
                .hint("`make demo` builds all three programs"))
        };
        let worker = find("bonepile-worker")?;
        find("bonepile-executor")?;
        Ok(Self { bonepile: this, worker })
    }
}

/// What one worker may use of this machine.
#[derive(Debug, Clone, Copy)]
pub(super) struct Share {
    pub(super) threads: usize,
    /// `None` where the system does not say what is free.
    pub(super) memory_bytes: Option<u64>,
}

impl Share {
    /// An equal share for each of `workers`: of the cores, and of four fifths of the memory that is free now.
    pub(super) fn of(workers: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let free = fs::read_to_string("/proc/meminfo").ok().and_then(|text| available_bytes(&text));
        Self { threads: (cores / workers).max(1), memory_bytes: free.map(|free| free / 5 * 4 / workers as u64) }
    }
}

fn available_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

struct Running {
    name: String,
    child: Child,
}

/// Processes in order of their start. Dropping kills what is left.
pub(super) struct Children {
    logs: PathBuf,
    running: Vec<Running>,
}

impl Children {
    pub(super) fn new(logs: PathBuf) -> Result<Self, Failure> {
        // The cluster's directory must be empty for `init` but for this.
        fs::create_dir_all(&logs).map_err(|error| Failure::file("create", &logs, &error))?;
        Ok(Self { logs, running: Vec::new() })
    }

    pub(super) fn serve(&mut self, programs: &Programs, config: &Path) -> Result<(), Failure> {
        let mut command = Command::new(&programs.bonepile);
        command.arg("serve").arg("--config").arg(config);
        self.start("coordinator".to_owned(), command)
    }

    pub(super) async fn join(&mut self, programs: &Programs, state: &Path, token: &str) -> Result<(), Failure> {
        let mut command = Command::new(&programs.worker);
        command.arg("join").arg("--state-dir").arg(state).arg(token).stdin(Stdio::null()).kill_on_drop(true);
        let output = command.output().await.map_err(|error| cannot_start(&programs.worker, &error))?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(Failure::failed("join", format!("a worker could not join: {}", said.trim())))
    }

    pub(super) fn work(
        &mut self,
        programs: &Programs,
        state: &Path,
        index: usize,
        share: Share,
    ) -> Result<(), Failure> {
        let mut command = Command::new(&programs.worker);
        command.arg("run").arg("--state-dir").arg(state).args(["--listen", "127.0.0.1:0"]);
        command.arg("--threads").arg(share.threads.to_string());
        if let Some(memory_bytes) = share.memory_bytes {
            command.arg("--memory").arg(memory_bytes.to_string());
        }
        self.start(format!("worker-{index}"), command)
    }

    fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }

    fn start(&mut self, name: String, mut command: Command) -> Result<(), Failure> {
        let path = self.log(&name);
        let log = File::create(&path).map_err(|error| Failure::file("create", &path, &error))?;
        let again = log.try_clone().map_err(|error| Failure::file("open", &path, &error))?;
        command.stdin(Stdio::null()).stdout(log).stderr(again).process_group(0).kill_on_drop(true);
        let program = PathBuf::from(command.as_std().get_program());
        let child = command.spawn().map_err(|error| cannot_start(&program, &error))?;
        self.running.push(Running { name, child });
        Ok(())
    }

    /// Whether all are still running.
    pub(super) fn check(&mut self) -> Result<(), Failure> {
        for running in &mut self.running {
            if let Ok(Some(status)) = running.child.try_wait() {
                return Err(ended(&running.name, status));
            }
        }
        Ok(())
    }

    /// Waits until one ends, which none should.
    pub(super) async fn first_to_end(&mut self) -> Failure {
        loop {
            if let Err(failure) = self.check() {
                return failure;
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// Ends all of them, the last started first, and waits until they have ended.
    pub(super) async fn end(&mut self) {
        for running in self.running.iter_mut().rev() {
            let pid = running.child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
            if let Some(pid) = pid {
                // Fails only for a process that has ended already.
                let _ = kill_process(pid, Signal::TERM);
            }
            if tokio::time::timeout(END_MAX, running.child.wait()).await.is_err() {
                let _ = running.child.kill().await;
            }
        }
    }

    /// The last lines of every log.
    pub(super) fn tails(&self) -> String {
        let mut text = String::new();
        for running in &self.running {
            let log = fs::read(self.log(&running.name)).unwrap_or_default();
            text.push_str(&format!("--- end of {}\n", self.log(&running.name).display()));
            for line in last_lines(&String::from_utf8_lossy(&log), TAIL_LINES) {
                text.push_str(&clean_text(line));
                text.push('\n');
            }
        }
        text.truncate(text.trim_end().len());
        text
    }
}

fn last_lines(text: &str, count: usize) -> impl Iterator<Item = &str> {
    let lines = text.lines().count();
    text.lines().skip(lines.saturating_sub(count))
}

fn ended(name: &str, status: ExitStatus) -> Failure {
    Failure::failed("child", format!("the demo's {name} ended: {status}"))
}

fn cannot_start(program: &Path, error: &std::io::Error) -> Failure {
    Failure::file("start", program, error)
}
