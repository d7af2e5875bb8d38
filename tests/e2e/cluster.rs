//! A real cluster of real processes in a temporary directory: one coordinator, workers with their executors, loopback only.
//!
//! Everything goes through the commands that an operator types. Nothing in here knows the journal or the wire.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Longest wait for anything in these tests; a wait that ends here fails the test with every log.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

pub(crate) struct Cluster {
    dir: tempfile::TempDir,
    coordinator: Option<Child>,
    workers: Vec<Worker>,
    listen: String,
    /// Extra flags of `bonepile-worker run`.
    pub(crate) worker_flags: Vec<String>,
}

struct Worker {
    child: Option<Child>,
    state_dir: PathBuf,
    log: PathBuf,
}

impl Cluster {
    /// `bonepile init` on a free port of loopback; nothing runs yet.
    pub(crate) fn init() -> Self {
        Self::init_with(&[])
    }

    /// The same with the results store elsewhere.
    pub(crate) fn init_with_store(store: &Path) -> Self {
        Self::init_with(&["--store", &store.display().to_string()])
    }

    fn init_with(flags: &[&str]) -> Self {
        let port = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let listen = format!("127.0.0.1:{port}");
        let cluster = Self {
            dir: tempfile::Builder::new().prefix("bonepile-e2e-").tempdir().unwrap(),
            coordinator: None,
            workers: Vec::new(),
            listen: listen.clone(),
            worker_flags: Vec::new(),
        };
        let directory = cluster.path("").display().to_string();
        cluster.ok(&[&["init", &directory, "--name", "e2e", "--listen", &listen], flags].concat());
        cluster
    }

    /// A running coordinator and `workers` running workers.
    pub(crate) fn with_workers(workers: usize) -> Self {
        let mut cluster = Self::init();
        cluster.serve();
        for _ in 0..workers {
            cluster.add_worker();
        }
        cluster.wait("every worker to be online", || (cluster.online_workers() == workers).then_some(()));
        cluster
    }

    pub(crate) fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join(below)
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.path("store")
    }

    /// Starts the coordinator and waits until its API answers.
    pub(crate) fn serve(&mut self) {
        let config = self.path("cluster.toml");
        let log = self.log("coordinator.log");
        let mut command = Command::new(binary("bonepile"));
        command.arg("serve").arg("--config").arg(config);
        self.coordinator = Some(spawn(&mut command, &log));
        self.wait("the coordinator to answer", || self.bonepile(&["workers", "--json"]).status.success().then_some(()));
    }

    /// SIGKILL to the coordinator.
    pub(crate) fn kill_coordinator(&mut self) {
        kill(self.coordinator.take().expect("a coordinator runs"));
    }

    pub(crate) fn coordinator_is_alive(&mut self) -> bool {
        self.coordinator.as_mut().is_some_and(|child| child.try_wait().unwrap().is_none())
    }

    /// A new box: token, join, run. Returns its place among the workers.
    pub(crate) fn add_worker(&mut self) -> usize {
        let index = self.workers.len();
        let state_dir = self.path(&format!("worker-{index}"));
        let token = self.token(&[]);
        let joined = self.join(&token, &state_dir);
        assert!(joined.status.success(), "join failed: {}", both(&joined));
        let log = self.log(&format!("worker-{index}.log"));
        self.workers.push(Worker { child: None, state_dir, log });
        self.start_worker(index);
        index
    }

    pub(crate) fn token(&self, flags: &[&str]) -> String {
        let arguments = [&["token", "create", "--json"], flags].concat();
        self.json(&arguments)["token"].as_str().expect("a token").to_owned()
    }

    pub(crate) fn join(&self, token: &str, state_dir: &Path) -> Output {
        Command::new(binary("bonepile-worker"))
            .args(["join", token, "--state-dir"])
            .arg(state_dir)
            .output()
            .expect("bonepile-worker starts")
    }

    pub(crate) fn start_worker(&mut self, index: usize) {
        let worker = &self.workers[index];
        let mut command = Command::new(binary("bonepile-worker"));
        command.arg("run").arg("--state-dir").arg(&worker.state_dir);
        command.args(["--listen", "127.0.0.1:0", "--threads", "1", "--memory", "4GB"]).args(&self.worker_flags);
        let child = spawn(&mut command, &worker.log);
        self.workers[index].child = Some(child);
    }

    /// SIGKILL to a worker; its executors must die with it.
    pub(crate) fn kill_worker(&mut self, index: usize) {
        let executors = self.executors(index);
        kill(self.workers[index].child.take().expect("the worker runs"));
        self.wait("the executors of a killed worker to be gone", || {
            executors.iter().all(|pid| !is_executor(*pid)).then_some(())
        });
    }

    /// A copy of another cluster's first worker, whose address list says that this coordinator is its own. Returns what it
    /// said until it was refused.
    pub(crate) fn meet_foreign_worker(&self, home: &Self) -> String {
        let state_dir = self.path("foreign");
        fs::create_dir(&state_dir).unwrap();
        let identity = fs::read_to_string(home.workers[0].state_dir.join("identity.json")).unwrap();
        let mut identity: Value = serde_json::from_str(&identity).unwrap();
        identity["coordinators"] = Value::from(vec![self.listen.clone()]);
        let copy = state_dir.join("identity.json");
        fs::write(&copy, identity.to_string()).unwrap();
        fs::set_permissions(&copy, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        let log = self.log("foreign.log");
        let mut command = Command::new(binary("bonepile-worker"));
        command.arg("run").arg("--state-dir").arg(&state_dir).args(["--listen", "127.0.0.1:0", "--memory", "1GB"]);
        let child = spawn(&mut command, &log);
        let said = self.wait("the foreign worker to be refused", || {
            let said = self.read_log("foreign.log");
            said.contains("could not connect").then_some(said)
        });
        kill(child);
        said
    }

    /// Seats that a worker has finished and the coordinator has not settled: whole directories of its outbox.
    pub(crate) fn finished_on_worker(&self, index: usize) -> usize {
        let entries = fs::read_dir(self.workers[index].state_dir.join("outbox")).into_iter().flatten().flatten();
        let named = entries.filter(|entry| !entry.file_name().to_string_lossy().starts_with('.'));
        named.filter(|entry| entry.path().join("record.json").is_file()).count()
    }

    /// Process ids of a worker's executors.
    pub(crate) fn executors(&self, index: usize) -> Vec<u32> {
        let Some(child) = &self.workers[index].child else { return Vec::new() };
        processes()
            .into_iter()
            .filter(|(pid, parent)| *parent == child.id() && is_executor(*pid))
            .map(|p| p.0)
            .collect()
    }

    /// `bonepile ARGUMENTS` against this cluster.
    pub(crate) fn bonepile(&self, arguments: &[&str]) -> Output {
        Command::new(binary("bonepile"))
            .args(arguments)
            .env("BONEPILE_CONFIG", self.path("cluster.toml"))
            .output()
            .expect("bonepile starts")
    }

    /// The same, which must succeed.
    pub(crate) fn ok(&self, arguments: &[&str]) -> String {
        let output = self.bonepile(arguments);
        assert!(output.status.success(), "bonepile {arguments:?}: {}\n{}", both(&output), self.logs());
        String::from_utf8(output.stdout).unwrap()
    }

    /// The same, whose answer is one JSON document.
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let text = self.ok(arguments);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("bonepile {arguments:?}: {error}: {text}"))
    }

    /// Submits a sweep; returns the run's id.
    pub(crate) fn submit(&self, sweep: &str) -> String {
        let file = self.path("sweep.toml");
        fs::write(&file, sweep).unwrap();
        let answer = self.json(&["submit", &file.display().to_string(), "--json"]);
        answer["run"].as_str().map_or_else(|| answer["run"].to_string(), ToOwned::to_owned)
    }

    /// Waits until `look` sees something; fails with every log when patience ends.
    pub(crate) fn wait<T>(&self, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(seen) = look() {
                return seen;
            }
            assert!(start.elapsed() < PATIENCE, "waited in vain for {what}\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub(crate) fn online_workers(&self) -> usize {
        let output = self.bonepile(&["workers", "--json"]);
        let Ok(answer) = serde_json::from_slice::<Value>(&output.stdout) else { return 0 };
        rows(&answer, "workers").iter().filter(|worker| worker["state"] == "online").count()
    }

    /// The log of one process.
    pub(crate) fn read_log(&self, name: &str) -> String {
        fs::read_to_string(self.log(name)).unwrap_or_default()
    }

    /// The ends of all logs, for a failing test.
    pub(crate) fn logs(&self) -> String {
        let mut text = String::new();
        for entry in fs::read_dir(self.dir.path()).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|extension| extension == "log") {
                let log = fs::read_to_string(&path).unwrap_or_default();
                let tail: Vec<_> = log.lines().rev().take(40).collect();
                text += &format!("--- {}\n", path.display());
                text.extend(tail.into_iter().rev().map(|line| format!("{line}\n")));
            }
        }
        text
    }

    fn log(&self, name: &str) -> PathBuf {
        self.path(name)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.workers.iter_mut().filter_map(|worker| worker.child.take()).for_each(kill);
        if let Some(coordinator) = self.coordinator.take() {
            kill(coordinator);
        }
    }
}

/// A list in an answer, whether it is the document itself or stands under `key`.
pub(crate) fn rows<'a>(answer: &'a Value, key: &str) -> &'a [Value] {
    answer.as_array().or_else(|| answer[key].as_array()).map_or(&[], Vec::as_slice)
}

/// stdout and stderr of a command, for messages and for looking into.
pub(crate) fn both(output: &Output) -> String {
    format!("{}\n{}{}", output.status, String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A binary of this workspace, which lies beside the one that cargo built for this test.
pub(crate) fn binary(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_bonepile")).with_file_name(name);
    assert!(path.exists(), "{} is not built; run `cargo build --workspace` first", path.display());
    path
}

fn spawn(command: &mut Command, log: &Path) -> Child {
    let log = fs::OpenOptions::new().create(true).append(true).open(log).unwrap();
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .env("BONEPILE_LOG", "info")
        .spawn()
        .expect("the binary starts")
}

fn kill(mut child: Child) {
    // The process may have ended already; there is nothing to do about it then.
    let _ = child.kill();
    child.wait().expect("a killed child can be waited for");
}

/// (process id, its parent's) of every process.
fn processes() -> Vec<(u32, u32)> {
    let numbers = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers
        .filter_map(|pid: u32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let after_name = stat.rsplit_once(") ")?.1;
            Some((pid, after_name.split(' ').nth(1)?.parse().ok()?))
        })
        .collect()
}

fn is_executor(pid: u32) -> bool {
    let zombie = fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "));
    !zombie && fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|path| path.ends_with("bonepile-executor"))
}

/// `kill -9`.
pub(crate) fn sigkill(pid: u32) {
    let status = Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
    assert!(status.success(), "kill -9 {pid}");
}

/// Whether the real models are on this box; if not, says so, and the test has nothing to do.
pub(crate) fn models_present() -> bool {
    let output = Command::new(binary("bonepile")).args(["models", "verify"]).output().unwrap();
    if !output.status.success() {
        eprintln!("skipped: the real models are not here; `bonepile models pull --all` brings them");
    }
    output.status.success()
}
