#!/usr/bin/env python3
"""What a shard costs the machinery: no-ops and /bin/true through a real coordinator and a real worker, beside HyperQueue.

Job: make a cluster in a temporary directory (journal on, worker as a process of its own), submit N no-op shards, then N
commands running /bin/true, and print wall and CPU a shard, memory of the coordinator and sizes of programs; the same N
commands through HyperQueue's LocalCluster (package `hyperqueue`, in a virtual environment below the user's cache) with the
same number of processors, and a plain posix_spawn loop of the same minute. One line `bar NAME VALUE >= GOAL` (or `<=`) for each
bar, whether it holds or not.

Use: overhead.py DIRECTORY-WITH-THE-PROGRAMS [SHARDS]
"""
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

THREADS = 2
HQ = "hyperqueue==0.27.0"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bonepile"
TICKS = os.sysconf("SC_CLK_TCK")
# Its server and workers live in the script's own process and in children of it: CPU is theirs together.
HQ_SCRIPT = """
import json, os, sys, tempfile, time
from hyperqueue import Job
from hyperqueue.cluster import LocalCluster, WorkerConfig
count, cores = int(sys.argv[1]), int(sys.argv[2])
directory = tempfile.mkdtemp()
with LocalCluster(directory) as cluster:
    cluster.start_worker(WorkerConfig(cores=cores))
    client = cluster.client()
    job = Job()
    for _ in range(count):
        job.program(["/bin/true"], stdout=None, stderr=None)
    before = os.times()
    start = time.perf_counter()
    submitted = client.submit(job)
    client.wait_for_jobs([submitted])
    wall = time.perf_counter() - start
    after = os.times()
    rss = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
    cpu = (after.user - before.user) + (after.system - before.system)
    print(json.dumps({"wall": wall, "cpu": cpu, "rss_kb": rss}), flush=True)
    os._exit(0)
"""


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def rss_mb(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1000
    return 0.0


def free_port():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Cluster:
    """A coordinator and a worker as processes."""

    def __init__(self, programs, root):
        self.bonepile, self.worker_program = programs / "bonepile", programs / "bonepile-worker"
        self.config = root / "cluster" / "cluster.toml"
        self.root = root
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        listen = f"127.0.0.1:{free_port()}"
        subprocess.run([self.bonepile, "init", root / "cluster", "--listen", listen], check=True, **quiet)
        log = open(root / "coordinator.log", "w")
        self.coordinator = subprocess.Popen([self.bonepile, "--config", self.config, "serve"], stdout=log, stderr=log)
        self.wait_for(lambda: self.ask("workers", check=False) is not None)
        self.idle_mb = rss_mb(self.coordinator.pid)
        token = subprocess.run([self.bonepile, "--config", self.config, "token", "create"], check=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout.strip()
        state = ["--state-dir", root / "worker"]
        subprocess.run([self.worker_program, *state, "join", token], check=True, **quiet)
        log = open(root / "worker.log", "w")
        command = [self.worker_program, *state, "run", "--allow-commands", "--no-measure", "--threads", str(THREADS)]
        self.worker = subprocess.Popen(command, stdout=log, stderr=log)
        self.wait_for(lambda: any(row["state"] == "online" for row in self.ask("workers")))

    def ask(self, *words, check=True):
        answer = subprocess.run([self.bonepile, "--config", self.config, "--json", *words], stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL, check=False)
        if answer.returncode != 0:
            if check:
                raise RuntimeError(f"{words}: exit {answer.returncode}")
            return None
        return json.loads(answer.stdout)

    def wait_for(self, done, seconds=60):
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end:
                raise RuntimeError(f"did not start: see {self.root}")
            time.sleep(0.1)

    def run(self, name, experiment):
        """Submits a sweep; seconds of wall by the coordinator's clock, of its CPU and of the worker's."""
        sweep = self.root / f"{name}.toml"
        sweep.write_text(f'name = "{name}"\n[[experiment]]\n{experiment}')
        before = cpu_seconds(self.coordinator.pid), cpu_seconds(self.worker.pid)
        run = self.ask("submit", str(sweep))["run"]
        while True:
            time.sleep(0.25)
            row = next(row for row in self.ask("runs") if row["id"] == run)
            if row["state"] != "running":
                break
        after = cpu_seconds(self.coordinator.pid), cpu_seconds(self.worker.pid)
        if row["state"] != "complete":
            raise RuntimeError(f"{name}: {row}")
        wall = (row["finished_at_ms"] - row["submitted_at_ms"]) / 1000
        return wall, after[0] - before[0], after[1] - before[1]

    def close(self):
        for process in (self.worker, self.coordinator):
            process.terminate()
        for process in (self.worker, self.coordinator):
            process.wait(timeout=30)


def hyperqueue_python():
    """An interpreter that has HyperQueue, or None."""
    home = CACHE / "bench-venv"
    python = home / "bin" / "python"
    has = [str(python), "-c", "import hyperqueue"]
    if python.exists() and subprocess.run(has, stderr=subprocess.DEVNULL).returncode == 0:
        return python
    try:
        if not python.exists():
            venv.create(home, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", HQ], check=True)
        return python
    except (subprocess.CalledProcessError, OSError) as error:
        print(f"{HQ} cannot be had ({error}): only our own figures", file=sys.stderr)
        return None


def spawn_floor(count):
    """Seconds a process of a plain posix_spawn loop, THREADS in flight."""
    start, running = time.perf_counter(), 0
    for _ in range(count):
        if running == THREADS:
            os.wait()
            running -= 1
        os.posix_spawn("/bin/true", ["/bin/true"], {})
        running += 1
    for _ in range(running):
        os.wait()
    return (time.perf_counter() - start) / count


def main():
    programs = Path(sys.argv[1])
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 20_000
    for name in ("bonepile", "bonepile-worker"):
        print(f"{name}: {(programs / name).stat().st_size / 1e6:.1f} MB")
    with tempfile.TemporaryDirectory(prefix="bonepile-overhead-") as root:
        cluster = Cluster(programs, Path(root))
        try:
            noop = cluster.run("no-op", f'kind = "no-op"\nshards = {count}\n')
            # One file expands to a shard for each value of its matrix.
            values = ", ".join(str(i) for i in range(count))
            command = cluster.run("true", f'kind = "command"\nargv = ["/bin/true"]\n[experiment.matrix]\nn = [{values}]\n')
            after_mb = rss_mb(cluster.coordinator.pid)
        finally:
            cluster.close()
        idle_mb = cluster.idle_mb
    floor = spawn_floor(min(count, 2000))
    for name, (wall, cpu, worker) in (("no-op", noop), ("/bin/true", command)):
        print(f"{count} {name}: wall {wall:.2f} s ({count / wall:.0f}/s), coordinator {cpu / count * 1e6:.1f} us CPU a shard, "
              f"worker {worker / count * 1e6:.1f} us")
    print(f"posix_spawn of /bin/true, {THREADS} in flight: {floor * 1e3:.2f} ms each, {1 / floor:.0f}/s")
    print(f"coordinator resident: {idle_mb:.1f} MB idle, {after_mb:.1f} MB after {2 * count} shards")
    ratio = None
    python = hyperqueue_python()
    if python:
        answer = subprocess.run([python, "-c", HQ_SCRIPT, str(count), str(THREADS)], stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL, check=True)
        hq = json.loads(answer.stdout.decode().strip().splitlines()[-1])
        ratio = command[0] / hq["wall"]
        print(f"HyperQueue, {count} /bin/true: wall {hq['wall']:.2f} s ({count / hq['wall']:.0f}/s), server and worker in one "
              f"process {hq['cpu'] / count * 1e6:.1f} us CPU a task, {hq['rss_kb'] / 1000:.1f} MB resident")
    print(f"bar coordinator-cpu-us-per-shard {noop[1] / count * 1e6:.1f} <= 34")
    print(f"bar no-op-shards-per-second {count / noop[0]:.0f} >= 5000")
    if ratio is not None:
        print(f"bar command-wall-over-hyperqueue {ratio:.3f} <= 1.0")


if __name__ == "__main__":
    main()
