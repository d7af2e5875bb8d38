"""A cluster of boxes on one machine: each a network namespace behind a shaped link, with a share of a processor of its own.

The coordinator and its store are in the machine's own namespace, reached over a bridge. A box has no view of the store, so what
it makes and needs goes over its link, as on a box without the mount. Needs root, `ip` and `tc`; shares of processors need a cgroup
controller `cpu` (either version). `missing()` says what is not there.
"""
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

NET = "198.51.100"
PERIOD_US = 20_000


def missing():
    """What keeps a lab from being built here, in words; None if nothing does."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ["ip", "tc", "unshare", "mount"]:
        if shutil.which(tool) is None:
            return f"`{tool}` is not installed"
    probe = subprocess.run(["ip", "netns", "add", "bp-probe"], stderr=subprocess.PIPE, text=True)
    if probe.returncode != 0:
        return f"network namespaces cannot be made: {probe.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", "bp-probe"], check=False)
    return None


def sh(*words):
    subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL)


class Share:
    """A part of a processor: a cgroup whose processes together get `cores` of time."""

    def __init__(self, name, cores):
        quota = int(PERIOD_US * cores)
        v1, v2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
        if (v1 / "cpu.cfs_quota_us").exists() or (v1 / "cgroup.procs").exists():
            self.path = v1 / name
            self.path.mkdir(exist_ok=True)
            (self.path / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (self.path / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            self.path = v2 / name
            self.path.mkdir(exist_ok=True)
            (self.path / "cpu.max").write_text(f"{quota} {PERIOD_US}")

    def enter(self):
        """In the child, before its program runs."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def remove(self):
        for _ in range(50):
            try:
                self.path.rmdir()
                return
            except OSError:
                time.sleep(0.1)


class Box:
    """A worker behind a link."""

    def __init__(self, lab, number, cores, rate, args=()):
        self.number, self.space, self.port = number, f"bp{os.getpid()}-{number}", f"bp{os.getpid() % 10000}v{number}"
        self.address = f"{NET}.{number + 10}"
        self.state, self.share = lab.root / f"box{number}", Share(f"bonepile-{os.getpid()}-{number}", cores)
        inner = f"{self.port}i"
        sh("ip", "netns", "add", self.space)
        sh("ip", "link", "add", self.port, "type", "veth", "peer", "name", inner)
        sh("ip", "link", "set", inner, "netns", self.space)
        sh("ip", "link", "set", self.port, "master", lab.bridge, "up")
        inside = ["ip", "netns", "exec", self.space]
        sh(*inside, "ip", "link", "set", "lo", "up")
        sh(*inside, "ip", "addr", "add", f"{self.address}/24", "dev", inner)
        sh(*inside, "ip", "link", "set", inner, "up")
        for prefix, port in [([], self.port), (inside, inner)]:
            sh(*prefix, "tc", "qdisc", "add", "dev", port, "root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms")
        token = lab.tell("token", "create").strip()
        sh(*inside, lab.programs / "bonepile-worker", "--state-dir", self.state, "join", token)
        log = open(lab.root / f"box{number}.log", "w")
        # The store's directory is covered by an empty one: this box has no mount.
        run = f'mount -t tmpfs none "{lab.store}" && exec "$@"'
        command = [*inside, "unshare", "-m", "sh", "-c", run, "sh", lab.programs / "bonepile-worker", "--state-dir",
                   self.state, "run", "--threads", "1", "--no-measure", *args]
        self.process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log, preexec_fn=self.share.enter)

    def moved(self):
        """Bytes over the link so far, both ways."""
        counters = Path("/sys/class/net") / self.port / "statistics"
        return sum(int((counters / name).read_text()) for name in ["rx_bytes", "tx_bytes"])

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        subprocess.run(["ip", "netns", "del", self.space], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "del", self.port], check=False, stderr=subprocess.DEVNULL)
        self.share.remove()


class Lab:
    """A coordinator, and boxes."""

    def __init__(self, programs, root, hub=None):
        self.programs, self.root = Path(programs).resolve(), Path(root)
        self.cluster, self.store = self.root / "cluster", self.root / "cluster" / "store"
        self.bridge = f"bp{os.getpid()}"
        self.boxes, self.hub = [], None
        sh("ip", "link", "add", self.bridge, "type", "bridge")
        sh("ip", "addr", "add", f"{NET}.1/24", "dev", self.bridge)
        sh("ip", "link", "set", self.bridge, "up")
        sh(self.programs / "bonepile", "init", self.cluster, "--listen", f"{NET}.1:4400")
        log = open(self.root / "coordinator.log", "w")
        command = [self.programs / "bonepile", "--config", self.cluster / "cluster.toml", "serve"]
        self.coordinator = subprocess.Popen(command, stdout=log, stderr=log)
        self.wait(lambda: self.ask("workers", check=False) is not None, "the coordinator")
        if hub is not None:
            # A worker beside the store, without models: outer steps are done here, where what they read already is.
            token, state = self.tell("token", "create").strip(), self.root / "hub"
            sh(self.programs / "bonepile-worker", "--state-dir", state, "join", token)
            log = open(self.root / "hub.log", "w")
            command = [self.programs / "bonepile-worker", "--state-dir", state, "run", "--threads", "1", "--no-measure", *hub]
            self.hub = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log)

    def box(self, cores, rate, args=()):
        self.boxes.append(Box(self, len(self.boxes), cores, rate, args))
        return self.boxes[-1]

    def ready(self):
        """Waits until every worker is online."""
        count = len(self.boxes) + (self.hub is not None)
        self.wait(lambda: sum(row["state"] == "online" for row in self.ask("workers")) == count, "the workers")

    def tell(self, *words):
        command = [self.programs / "bonepile", "--config", self.cluster / "cluster.toml", *words]
        return subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              text=True).stdout

    def ask(self, *words, check=True):
        command = [self.programs / "bonepile", "--config", self.cluster / "cluster.toml", "--json", *words]
        answer = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if answer.returncode != 0:
            if check:
                raise RuntimeError(f"{words}: exit {answer.returncode}: {answer.stderr.strip()}")
            return None
        return json.loads(answer.stdout)

    def wait(self, done, what, seconds=120):
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end:
                raise RuntimeError(f"{what} did not come up: see the logs in {self.root}")
            time.sleep(0.1)

    def run(self, name, text, seconds=1800):
        """Submits a sweep and waits for it; its run's id."""
        sweep = self.root / f"{name}.toml"
        sweep.write_text(text)
        run = self.ask("submit", sweep)["run"]
        end = time.monotonic() + seconds
        while True:
            state = next(row for row in self.ask("runs") if row["id"] == run)["state"]
            if state == "complete":
                return run
            if state != "running" or time.monotonic() > end:
                raise RuntimeError(f"{name} is {state}: see the logs in {self.root}")
            time.sleep(0.25)

    def close(self):
        for box in self.boxes:
            box.close()
        for process in [self.hub, self.coordinator]:
            if process is not None:
                process.terminate()
                process.wait(20)
        subprocess.run(["ip", "link", "del", self.bridge], check=False, stderr=subprocess.DEVNULL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
