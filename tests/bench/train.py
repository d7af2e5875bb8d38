#!/usr/bin/env python3
"""What training costs, beside other programs on the same weights, tokens and threads.

Job: run each part below, print its figures and one line `bar NAME VALUE >= GOAL` a bar, whether it holds or not. Parts:

- step: one step of training through the frozen target model, as a projector takes it: forward of a batch of short texts, each
  behind a cache of its own that is injected, mean next-token loss, backward to every key and value of the caches. Beside
  PyTorch, in turn. A training batch has texts of many lengths: PyTorch runs it padded, and text after text, and its faster way
  counts; the program here runs it without padding. Batches of equal lengths and one long text stand beside it.

PyTorch comes from the packages of tests/reference/check.py; where they cannot be had, only our own figures are printed.

Use: train.py PATH-TO-bonepile-executor [MODELS-DIRECTORY]
"""
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "reference"))
import check

THREADS, ROUNDS = 2, 5
# Tokens of the cache, and of the text behind it, of each sample.
STEPS = {
    "batch": "20+8,40+24,28+12,36+20,24+16,32+10,22+22,38+14",
    "equal": ",".join(["32+16"] * 8),
    "long": "32+128",
}
# Runs beside us. Steps that warm up are not counted; of the rest, the median.
TORCH = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM, DynamicCache
folder, file, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
for parameter in model.parameters():
    parameter.requires_grad_(False)

def ids(start, count):
    return [(1000 + i * 7919) % min(model.config.vocab_size, 40000) for i in range(start, start + count)]

def prefilled(text):
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.tensor([text]), past_key_values=cache, use_cache=True)
    return [(entry.keys, entry.values) for entry in cache.layers]

# Samples side by side, caches padded on the left and texts on the right; the sum of the losses of their next tokens.
def loss_of(samples, leaves):
    widest, longest = max(s["prefix"] for s in samples), max(s["tokens"] for s in samples)
    padded = len({(s["prefix"], s["tokens"]) for s in samples}) > 1
    pad = lambda x, prefix: torch.nn.functional.pad(x, (0, 0, widest - prefix, 0))
    cache = DynamicCache()
    for layer in range(len(leaves[0])):
        side = lambda which: torch.cat([pad(own[layer][which], s["prefix"]) for s, own in zip(samples, leaves)])
        cache.update(side(0), side(1), layer)
    fill = lambda row: row + [0] * (longest - len(row))
    tokens = torch.tensor([fill(s["text"][s["prefix"]:-1]) for s in samples])
    positions = torch.tensor([list(range(s["prefix"], s["prefix"] + longest)) for s in samples])
    mask = None
    if padded:
        mask = torch.tensor([[0] * (widest - s["prefix"]) + [1] * (s["prefix"] + s["tokens"]) + [0] * (longest - s["tokens"])
                             for s in samples])
    hidden = model.model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache,
                         use_cache=True, cache_position=torch.arange(widest, widest + longest)).last_hidden_state
    real = torch.tensor([[i < s["tokens"] for i in range(longest)] for s in samples])
    targets = torch.tensor([token for s in samples for token in s["text"][s["prefix"] + 1:]])
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[real]), targets, reduction="sum")

def step(samples, together):
    leaves = [[tuple(x.clone().requires_grad_(True) for x in pair) for pair in s["cache"]] for s in samples]
    count = sum(s["tokens"] for s in samples)
    start = time.perf_counter()
    total = 0.0
    for part in [slice(None)] if together else [slice(i, i + 1) for i in range(len(samples))]:
        loss = loss_of(samples[part], leaves[part]) / count
        loss.backward()
        total += loss.item()
    seconds = time.perf_counter() - start
    assert all(x.grad is not None for own in leaves for pair in own for x in pair)
    return seconds, total

answer = {}
for name, lengths in json.loads(sys.argv[4]).items():
    samples = []
    for index, lengths in enumerate(lengths.split(",")):
        prefix, tokens = map(int, lengths.split("+"))
        text = ids(index * 1000, prefix + tokens + 1)
        samples.append({"prefix": prefix, "tokens": tokens, "text": text, "cache": prefilled(text[:prefix])})
    ways = {}
    for way in ("together", "in turn") if len(samples) > 1 else ("together",):
        times = [step(samples, way == "together") for _ in range(4)][1:]
        ways[way] = (sorted(seconds for seconds, _ in times)[1], times[0][1])
    way = min(ways, key=lambda way: ways[way][0])
    answer[name] = {"seconds": ways[way][0], "loss": ways[way][1], "way": way}
print(json.dumps(answer))
"""


def median(values):
    return sorted(values)[len(values) // 2]


def our_step(executor, path, precision, lengths):
    command = [executor, "model", "bench", str(path), "--threads", str(THREADS), "--precision", precision, "--prompt", "1",
               "--decode", "1", "--runs", "4", "--step", lengths]
    answer = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return {"seconds": answer["step_s"], "loss": answer["step_loss"]}


def their_steps(python, path):
    command = [python, "-c", TORCH, str(path.parent), path.name, str(THREADS), json.dumps(STEPS)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return json.loads(run.stdout)


def step(executor, models, python):
    for name, file in check.MODELS.items():
        path = models / file
        if not path.is_file():
            print(f"skipped: {path} is absent; `bonepile models pull --all` brings it")
            continue
        rows = []
        for _ in range(ROUNDS):
            row = {(precision, case): our_step(executor, path, precision, lengths)
                   for case, lengths in STEPS.items() for precision in ("stored", "f32")}
            theirs = their_steps(python, path) if python else {}
            rows.append(row | {("torch", case): answer for case, answer in theirs.items()})
        for case in STEPS:
            for kind in ("stored", "f32", "torch") if python else ("stored", "f32"):
                answers = [row[kind, case] for row in rows]
                seconds = median([answer["seconds"] for answer in answers])
                ratio = median([row["torch", case]["seconds"] / row[kind, case]["seconds"] for row in rows]) if python else None
                print(f"{name}, {case}, {kind}: {seconds:.3f} s, loss {answers[0]['loss']:.5f}"
                      + (f", PyTorch / this {ratio:.2f}" if python and kind != "torch" else "")
                      + (f", {answers[0]['way']}" if kind == "torch" else ""))
                if python and (kind, case) == ("stored", "batch"):
                    bar = ratio
        if python:
            print(f"bar step-{name} {bar:.3f} >= 1.0")


def main():
    sys.stdout.reconfigure(line_buffering=True)
    executor = sys.argv[1]
    models = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(os.environ.get("BONEPILE_MODELS") or check.CACHE / "models")
    try:
        python = check.interpreter()
    except subprocess.CalledProcessError as error:
        print(f"PyTorch could not be had: {error}", file=sys.stderr)
        python = None
    step(executor, models, python)


if __name__ == "__main__":
    main()
