#!/usr/bin/env python3
"""What projectors between SmolLM2-135M and Gemma 3 270M carry, both directions, beside every control.

Job: train a ridge projector on made-up sentences, ask about facts that only the source has read, print accuracy with 95 %
Wilson intervals, KL to the target's own reading, bytes and latency, and lines `bar NAME VALUE >= GOAL` (or <=), whether they
hold or not. Then the reverse direction, refined by a fuser; then unseen values and binding over the breadth of training.

Use: projector.py PATH-TO-bonepile-executor [forward|reverse|breadth ...] [--quick] [--models DIRECTORY] [--threads N]
"""
import argparse
import json
import math
import os
import subprocess
import tempfile
import time
from pathlib import Path

SMOLLM2, GEMMA3 = "SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m-q4_k_m.gguf"
NAMES = {SMOLLM2: "smollm2", GEMMA3: "gemma3"}
DEMO = ["--samples", "128", "--values", "8", "--names", "96", "--layers", "3", "--lambdas", "0.03,0.1,0.3,1"]
REVERSE = ["--samples", "192", "--values", "16", "--names", "96", "--layers", "1", "--lambdas", "0.003,0.03,0.3"]
FUSE = ["--samples", "160", "--values", "16", "--names", "96", "--hidden", "64", "--gate", "3", "--dropout", "0", "--batch", "4",
        "--micro-batch", "4", "--local-steps", "20", "--validate", "4", "--rate", "5e-4"]
BREADTHS = (8, 32, 128, 400)
PARTS = ["forward", "reverse", "breadth"]


def wilson(right, count, z=1.96):
    """The 95 % interval of a share (Wilson 1927)."""
    share, spread = right / count, 1 + z * z / count
    middle = (share + z * z / 2 / count) / spread
    half = z * math.sqrt(share * (1 - share) / count + z * z / 4 / count / count) / spread
    return middle - half, middle + half


class Bench:
    def __init__(self, args, folder):
        self.args, self.folder = args, Path(folder)
        self.models = Path(args.models or os.environ.get("BONEPILE_MODELS") or Path.home() / ".cache/bonepile/models")

    def run(self, what, source, target, *more):
        command = [self.args.executor, "projector", what, "--source", self.models / source, "--target", self.models / target]
        command += ["--threads", str(self.args.threads)] if self.args.threads else []
        started = time.time()
        answer = subprocess.run([*map(str, command), *map(str, more)], check=True, stdout=subprocess.PIPE).stdout
        return json.loads(answer), time.time() - started

    def ridge(self, name, source, target, recipe):
        paths = self.folder / f"{name}.safetensors", self.folder / f"{name}-shuffled.safetensors"
        answer, seconds = self.run("train", source, target, *recipe, "--out", paths[0], "--shuffled", paths[1])
        layers = answer["result"]["layers"]
        r2 = {part: sum(layer[f"r2_{part}"] for layer in layers) / len(layers) for part in ("key", "value")}
        print(f"{name}: {answer['result']['rows']} rows, {answer['result']['parameters']} numbers in {answer['bytes']} bytes, "
              f"{seconds:.0f} s; held-out R2 {r2['key']:.3f} of keys, {r2['value']:.3f} of values", flush=True)
        return paths

    def fuser(self, name, source, target, base):
        """The same refined by a fuser, with a control trained on shuffled pairs."""
        paths = self.folder / f"{name}.safetensors", self.folder / f"{name}-shuffled.safetensors"
        for path, ridge, control in zip(paths, base, ([], ["--control"])):
            _, seconds = self.run("fuse", source, target, *FUSE, "--base", ridge, "--out", path, *control)
            print(f"{path.stem}: {seconds:.0f} s", flush=True)
        return paths

    def evaluate(self, name, source, target, paths, facts, tiers=(), more=()):
        tiers = [word for tier in tiers for word in ("--tier", tier)]
        answer, _ = self.run("eval", source, target, "--projector", paths[0], "--shuffled", paths[1], "--facts", facts, *tiers,
                             *(more or ("--answer-tokens", "2")))
        return {result["tier"]: summarise(name, result) for result in answer}


def summarise(name, result):
    """Prints a row a condition; returns them by condition."""
    rows = {}
    print(f"{name}, {result['tier']}: accuracy [95 %], of the cache's own answer, KL, injected, stalled, bytes, ms")
    for condition in dict.fromkeys(item["condition"] for item in result["items"]):
        items = [item for item in result["items"] if item["condition"] == condition]
        mean = lambda value: sum(map(value, items)) / len(items)
        right = sum(item["choice"] == item["answer"] for item in items)
        low, high = wilson(right, len(items))
        rows[condition] = row = {"accuracy": right / len(items), "low": low, "high": high, "kl": mean(lambda item: item["kl"]),
                                 "packet": mean(lambda item: item["choice"] == item["packet_answer"])}
        # Two places stand in a text of two persons: the other one is what a projector without binding says as often.
        row["other"] = mean(lambda item: item["choice"] != item["answer"] and item["choice"] in item["context"])
        print(f"  {condition:<11} {row['accuracy']:.3f} [{low:.3f}, {high:.3f}]  {row['packet']:.3f}  {row['kl']:7.3f}"
              f"  {mean(lambda item: item['injected']):.2f}  {mean(lambda item: item['stalled']):.2f}"
              f"  {mean(lambda item: item['bytes']):8.0f}  {mean(lambda item: item['latency_ms']):6.0f}"
              + (f"  other person's {row['other']:.3f}" if result["tier"] == "binding" else ""), flush=True)
    return rows


def identity(pair, rows, accuracy, kl):
    print(f"bar identity-accuracy-{pair} {rows['projected']['accuracy']:.3f} >= {accuracy}")
    print(f"bar identity-kl-{pair} {rows['projected']['kl']:.3f} <= {kl}")
    for control in ("raw-copy", "shuffled", "no-context", "mismatched"):
        row = rows[control]
        print(f"bar {control}-accuracy-{pair} {row['accuracy']:.3f} <= 0.25")
    print(f"bar follows-the-cache-{pair} {rows['mismatched']['packet']:.3f} >= 0.9", flush=True)


def above(tier, pair, rows):
    """Separate intervals: the lower end of one above the upper end of the other."""
    low, high = rows["projected"]["low"], rows["shuffled"]["high"]
    print(f"bar {tier}-above-shuffled-{pair} {low:.3f} >= {high:.3f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("executor")
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="all by default")
    parser.add_argument("--models")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true", help="the demo's projector only, 16 facts a tier")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, folder)
        missing = [name for name in (SMOLLM2, GEMMA3) if not (bench.models / name).is_file()]
        if missing:
            print(f"skipped: {missing[0]} is absent; `bonepile models pull --all` brings it")
            return
        facts = 16 if args.quick else 64
        parts = ["forward"] if args.quick else args.parts or PARTS
        for part in parts:
            {"forward": forward, "reverse": reverse, "breadth": breadth}[part](bench, facts)


def forward(bench, facts):
    pair = f"{NAMES[SMOLLM2]}-{NAMES[GEMMA3]}"
    ridge = bench.ridge(f"ridge-{pair}", SMOLLM2, GEMMA3, DEMO)
    tiers = bench.evaluate(f"ridge-{pair}", SMOLLM2, GEMMA3, ridge, facts)
    identity(pair, tiers["seen"], 0.95, 0.15)
    for tier in ("unseen", "binding"):
        above(tier, pair, tiers[tier])


def reverse(bench, facts):
    pair = f"{NAMES[GEMMA3]}-{NAMES[SMOLLM2]}"
    ridge = bench.ridge(f"ridge-{pair}", GEMMA3, SMOLLM2, REVERSE)
    rows = bench.evaluate(f"ridge-{pair}", GEMMA3, SMOLLM2, ridge, facts, ("seen",))["seen"]
    print(f"reported: ridge {pair} accuracy {rows['projected']['accuracy']:.3f}, KL {rows['projected']['kl']:.3f}")
    fuser = bench.fuser(f"fuser-{pair}", GEMMA3, SMOLLM2, ridge)
    identity(pair, bench.evaluate(f"fuser-{pair}", GEMMA3, SMOLLM2, fuser, facts, ("seen",))["seen"], 0.97, 0.15)


def breadth(bench, facts):
    """Unseen values and binding over the number of values in training, samples equal."""
    pair, curve = f"{NAMES[SMOLLM2]}-{NAMES[GEMMA3]}", []
    for values in BREADTHS:
        name = f"breadth-{values}"
        recipe = ["--samples", "400", "--values", values, "--names", "320", "--wordings", "2", "--pairs", "25", "--layers", "1"]
        ridge = bench.ridge(name, SMOLLM2, GEMMA3, recipe)
        short = ("--conditions", "native,projected,shuffled", "--answer-tokens", "1")
        curve.append((values, bench.evaluate(name, SMOLLM2, GEMMA3, ridge, facts, more=short)))
    for tier in ("seen", "unseen", "binding"):
        points = (f"{values}: {rows[tier]['projected']['accuracy']:.3f}" for values, rows in curve)
        print(f"curve {tier} accuracy by values in training: {', '.join(points)}")
    for tier in ("unseen", "binding"):
        above(tier, f"{pair}-broad", curve[-1][1][tier])


if __name__ == "__main__":
    main()
