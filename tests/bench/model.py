#!/usr/bin/env python3
"""Prefill, decode and peak memory of both real models: bonepile's executor beside llama.cpp, same files, same threads.

Job: run the two in turn, ids as input and keys and values in halves on both sides, print rates and ratios, and one line
`bar NAME VALUE >= GOAL` (or `<=`) for each bar, whether it holds or not. llama.cpp comes from the package llama-cpp-python, in a virtual environment below the user's cache; its first
build takes minutes. Where it cannot be had, only our own figures and the memory bars are printed.

Use: model.py PATH-TO-bonepile-executor [MODELS-DIRECTORY]
"""
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

THREADS = 2
PROMPT, DECODE, ROUNDS = 512, 64, 3
LLAMA = "llama-cpp-python==0.3.36"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bonepile"
MODELS = [
    ("smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    ("gemma3", "gemma-3-270m-q4_k_m.gguf"),
]
# Runs inside the virtual environment. Peak memory is read where the process ends, as the kernel counts it.
LLAMA_SCRIPT = """
import json, sys, time
from llama_cpp import Llama
path, threads, prompt, decode = sys.argv[1], *map(int, sys.argv[2:])
model = Llama(path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, n_batch=512, n_ubatch=512, verbose=False)
ids = [(1000 + i * 7919) % 40000 for i in range(prompt)]
start = time.perf_counter(); model.eval(ids); prefill = prompt / (time.perf_counter() - start)
start = time.perf_counter()
for i in range(decode):
    model.eval([1000 + i])
print(json.dumps({"prefill": prefill, "decode": decode / (time.perf_counter() - start)}))
"""


def median(values):
    return sorted(values)[len(values) // 2]


def ours(executor, path):
    command = [executor, "model", "bench", str(path), "--threads", str(THREADS), "--prompt", str(PROMPT),
               "--decode", str(DECODE), "--runs", "1", "--kv", "f16"]
    answer = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return {"prefill": answer["prefill_tokens_per_s"], "decode": answer["decode_tokens_per_s"],
            "peak": answer["peak_bytes"] / answer["file_bytes"]}


def llama_python():
    """An interpreter that has llama.cpp, or None."""
    home = CACHE / "bench-venv"
    python = home / "bin" / "python"
    has = [str(python), "-c", "import llama_cpp"]
    if python.exists() and subprocess.run(has, stderr=subprocess.DEVNULL).returncode == 0:
        return python
    print(f"building {LLAMA} in {home}; this takes minutes", file=sys.stderr)
    venv.create(home, with_pip=True)
    built = subprocess.run([str(python), "-m", "pip", "install", "--quiet", LLAMA])
    return python if built.returncode == 0 else None


def theirs(python, path):
    command = [str(python), "-c", LLAMA_SCRIPT, str(path), str(THREADS), str(PROMPT), str(DECODE)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return json.loads(run.stdout)


def main():
    executor = sys.argv[1]
    models = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(os.environ.get("BONEPILE_MODELS") or CACHE / "models")
    python, bars = llama_python(), []
    for name, file in MODELS:
        path = models / file
        if not path.is_file():
            print(f"skipped {name}: {path} is absent; `bonepile models pull --all` brings it")
            continue
        rows = []
        for _ in range(ROUNDS):
            rows.append((ours(executor, path), theirs(python, path) if python else None))
        own = {key: median([row[0][key] for row in rows]) for key in ("prefill", "decode", "peak")}
        print(f"{name}: bonepile prefill {own['prefill']:.1f} tokens/s, decode {own['decode']:.1f} tokens/s, "
              f"peak memory {own['peak']:.2f} x the file")
        bars.append(f"bar peak-{name} {own['peak']:.3f} <= 1.3")
        if python:
            other = {key: median([row[1][key] for row in rows]) for key in ("prefill", "decode")}
            ratio = {key: median([row[0][key] / row[1][key] for row in rows]) for key in ("prefill", "decode")}
            print(f"{name}: llama.cpp prefill {other['prefill']:.1f} tokens/s, decode {other['decode']:.1f} tokens/s; "
                  f"ratios {ratio['prefill']:.2f} and {ratio['decode']:.2f}")
            bars.append(f"bar prefill-{name} {ratio['prefill']:.3f} >= 1.0")
            bars.append(f"bar decode-{name} {ratio['decode']:.3f} >= 0.8")
    if not python:
        print(f"{LLAMA} could not be had: no ratio")
    print("\n".join(bars))


if __name__ == "__main__":
    main()
