#!/usr/bin/env python3
"""One training step through a frozen model: bonepile's executor beside PyTorch, same weights, same tokens, same threads.

Job: forward, mean next-token loss and backward to an injected cache's keys and values, 128 tokens behind 32; run the two in
turn, print seconds, ratio and both losses, and one line `bar NAME VALUE >= GOAL`, whether it holds or not. PyTorch comes from
the packages of tests/reference/check.py; where they cannot be had, only our own figure is printed.

Use: step.py PATH-TO-bonepile-executor [MODELS-DIRECTORY]
"""
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "reference"))
import check

THREADS, PREFIX, TOKENS, ROUNDS = 2, 32, 128, 5
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Runs beside us: the best of a few steps, as the first one warms up.
TORCH = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM, DynamicCache
folder, file, threads, prefix, tokens = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
for parameter in model.parameters():
    parameter.requires_grad_(False)
ids = [(1000 + i * 7919) % 40000 for i in range(prefix + tokens + 1)]
whole = DynamicCache()
with torch.no_grad():
    model(input_ids=torch.tensor([ids[:prefix]]), past_key_values=whole, use_cache=True)
times = []
for _ in range(4):
    cache, leaves = DynamicCache(), []
    for layer, entry in enumerate(whole.layers):
        pair = [entry.keys.clone().requires_grad_(True), entry.values.clone().requires_grad_(True)]
        cache.update(*pair, layer)
        leaves += pair
    start = time.perf_counter()
    logits = model(input_ids=torch.tensor([ids[prefix:-1]]), past_key_values=cache, use_cache=True,
                   cache_position=torch.arange(prefix, prefix + tokens)).logits[0]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[prefix + 1:]))
    loss.backward()
    times.append(time.perf_counter() - start)
    assert all(leaf.grad is not None for leaf in leaves)
print(json.dumps({"seconds": sorted(times)[len(times) // 2], "loss": loss.item()}))
"""


def ours(executor, path, precision):
    command = [executor, "model", "bench", str(path), "--threads", str(THREADS), "--precision", precision, "--prompt", "1",
               "--decode", "1", "--runs", "4", "--step", str(TOKENS), "--prefix", str(PREFIX)]
    answer = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return {"seconds": answer["step_s"], "loss": answer["step_loss"]}


def theirs(python, path):
    command = [python, "-c", TORCH, str(path.parent), path.name, *map(str, (THREADS, PREFIX, TOKENS))]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return json.loads(run.stdout)


def median(values):
    return sorted(values)[len(values) // 2]


def main():
    executor = sys.argv[1]
    models = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(os.environ.get("BONEPILE_MODELS") or check.CACHE / "models")
    path = models / MODEL
    if not path.is_file():
        sys.exit(print(f"skipped: {path} is absent; `bonepile models pull --all` brings it"))
    try:
        python = check.interpreter()
    except subprocess.CalledProcessError as error:
        print(f"PyTorch could not be had: {error}", file=sys.stderr)
        python = None
    rows = []
    for _ in range(ROUNDS):
        rows.append({precision: ours(executor, path, precision) for precision in ("f32", "stored")})
        rows[-1]["torch"] = theirs(python, path) if python else None
    for precision in ("f32", "stored"):
        print(f"step of {TOKENS} tokens, {precision}: {median([row[precision]['seconds'] for row in rows]):.3f} s, "
              f"loss {rows[0][precision]['loss']:.5f}")
    if python:
        print(f"step of {TOKENS} tokens, PyTorch f32: {median([row['torch']['seconds'] for row in rows]):.3f} s, "
              f"loss {rows[0]['torch']['loss']:.5f}")
        for precision in ("f32", "stored"):
            ratio = median([row["torch"]["seconds"] / row[precision]["seconds"] for row in rows])
            print(f"bar step-{precision} {ratio:.3f} >= 1.0")


if __name__ == "__main__":
    main()
