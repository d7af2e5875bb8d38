#!/usr/bin/env python3
"""Training a fuser over links: split over two boxes against together on one, and four unequal replicas against one and against
equal shares.

Job: real models, a real coordinator, boxes in network namespaces behind shaped links, none with the store's mount.
1. split: source and target on a box each, 1 Gbit/s between, one core each; then both on one box with one core. The bound of a
   split is its slower half; `split-efficiency` is what was reached of it once both had begun.
2. replicas: four boxes with 1/4, 1/4, 1/2 and 1 of a core behind 100 Mbit/s, beside the store a worker without models that does the
   outer steps. Shares by measured speed, equal shares, and the fastest box alone, on the same samples; time to the loss that all
   three reach, and bytes over all links beside those of an all-reduce of float32 gradients after every step (8 bytes a
   parameter, replica and step).
Prints one line `bar NAME VALUE >= GOAL` each. Needs root; says what is missing otherwise.

Use: rounds.py DIRECTORY-WITH-THE-PROGRAMS [split|replicas]
"""
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import lab as labs

PAIR = 'source = "gemma-3-270m"\ntarget = "smollm2-135m-instruct"\n'
CORPUS = "values = 32\nnames = 64\nwordings = 2\n"
GIGABIT, HUNDRED = "1gbit", "100mbit"
CORES = [0.25, 0.25, 0.5, 1.0]


def fuser(name, samples, replicas, more=""):
    return (f'[[experiment]]\nname = "{name}"\nkind = "projector-train"\n{PAIR}method = "fuser"\n{CORPUS}samples = {samples}\n'
            f"replicas = {replicas}\nhidden = 64\ndropout = 0.0\n{more}\n")


def manifests(lab, run):
    """Manifests of a run, by shard."""
    lab.wait(lambda: (lab.store / "manifests" / run).is_dir(), "manifests")
    return [json.loads(path.read_text()) for path in sorted((lab.store / "manifests" / run).glob("*.json"))]


def results(lab, manifest):
    """A shard's results, by kind."""
    found = {}
    for seat in manifest["seats"]:
        for output in seat["outputs"]:
            if output["name"] == "result.json":
                digest = output["hash"]
                path = next(lab.store.glob(f"**/{digest}"))
                found.update(json.loads(path.read_text()))
    return found


def steps_of(lab, run):
    """(manifest, steps, source) of each shard of local steps, in order."""
    rows = []
    for manifest in manifests(lab, run):
        found = results(lab, manifest)
        if "projector-steps" in found:
            rows.append((manifest, found["projector-steps"], found["projector-source"]))
    return sorted(rows, key=lambda row: (row[1]["round"], row[1]["replica"]))


def rate(row):
    """Milliseconds of the target's compute, its waiting, and the source's compute."""
    return row[1]["compute_ms"], row[1]["waited_ms"], row[2]["compute_ms"]


def split(programs):
    print("split: source and target apart and together, 96 samples, one core a box")
    sweep = 'name = "{0}"\nseed = 7\n' + fuser("f", 96, 1, 'local_steps = 12\nbatch = 8\nvalidate = 0\nspread = "{1}"')
    taken = {}
    for name, boxes, spread in [("apart", 2, "workers"), ("together", 1, "any")]:
        with tempfile.TemporaryDirectory(prefix="bonepile-lab-") as root, labs.Lab(programs, root) as lab:
            for _ in range(boxes):
                lab.box(1.0, GIGABIT)
            lab.ready()
            # The first brings models into memory and teaches how long things take.
            lab.run("warm", sweep.format("warm", spread))
            run = lab.run(name, sweep.format(name, spread))
            compute, waited, source = rate(steps_of(lab, run)[0])
            taken[name] = compute + waited
            print(f"  {name:9} target computes {compute / 1e3:6.2f} s, waits {waited / 1e3:6.2f} s, source computes {source / 1e3:6.2f} s")
            if name == "apart":
                bound = max(compute, source)
    efficiency = bound / taken["apart"]
    print(f"  apart is {taken['together'] / taken['apart']:.2f} times as fast as together")
    print(f"bar split-efficiency {efficiency:.3f} >= 0.9")


def curve(lab, run):
    """[(seconds since the run began, validation loss of the weights of that moment)]."""
    rows, begun = [], None
    for manifest, steps, _ in steps_of(lab, run):
        begun = begun or manifest["started"]
        if steps["validation"]:
            rows.append(((manifest["started"] - begun) / 1e3, steps["validation"]["matched"]))
    return rows


def time_to(rows, loss):
    """Seconds at which a falling curve first reaches `loss`, on straight lines between its points."""
    for (t0, l0), (t1, l1) in zip(rows, rows[1:]):
        if l1 <= loss < l0:
            return t0 + (t1 - t0) * (l0 - loss) / (l0 - l1)
    return rows[0][0] if rows[0][1] <= loss else float("inf")


def replicas(programs):
    print("replicas: 1/4, 1/4, 1/2 and 1 core behind 100 Mbit/s, 1920 samples an arm")
    arms = {
        "proportional": (4, 'shares = "speed"\nlocal_steps = 80'),
        "equal": (4, 'shares = "equal"\nlocal_steps = 40'),
        "one": (1, 'shares = "speed"\nlocal_steps = 80'),
    }
    curves, bytes_ratio = {}, 0.0
    with tempfile.TemporaryDirectory(prefix="bonepile-lab-") as root:
        with labs.Lab(programs, root, hub=["--label", "place=store", "--models", Path(root) / "none"]) as lab:
            for number, cores in enumerate(CORES):
                lab.box(cores, HUNDRED, ["--label", f"speed={number}"])
            lab.ready()
            prefer = '[experiment.require]\nprefer = ["place=store"]'
            teach = fuser("f", 96, 4, f'shares = "equal"\nlocal_steps = 6\nbatch = 4\nvalidate = 0\n{prefer}')
            lab.run("teach", f'name = "teach"\nseed = 7\n{teach}')
            for name, (count, shares) in arms.items():
                before = sum(box.moved() for box in lab.boxes)
                arm = fuser("f", 1920, count, f"{shares}\nbatch = 4\nvalidate = 16\n{prefer}")
                run = lab.run(name, f'name = "{name}"\nseed = 7\n{arm}')
                moved = sum(box.moved() for box in lab.boxes) - before
                rows = steps_of(lab, run)
                curves[name] = curve(lab, run)
                steps = sum(len(row[1]["steps"]) for row in rows)
                reduced = 8 * rows[0][1]["parameters"] * steps
                shares = [row[1]["samples"] for row in rows if row[1]["round"] == 0]
                points = ", ".join(f"{t:.0f} s {loss:.3f}" for t, loss in curves[name])
                print(f"  {name:12} samples a round {shares}, {moved / 1e6:.1f} MB over links, {reduced / moved:.0f} x fewer than all-reduce")
                print(f"  {'':12} validation loss: {points}")
                if name == "proportional":
                    bytes_ratio = reduced / moved
    loss = max(rows[-1][1] for rows in curves.values())
    times = {name: time_to(rows, loss) for name, rows in curves.items()}
    print(f"  to loss {loss:.3f}: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in times.items()))
    print(f"  four unequal replicas are {times['one'] / times['proportional']:.2f} times as fast as the fastest alone")
    print(f"bar proportional-over-equal {times['equal'] / times['proportional']:.2f} >= 1.5")
    print(f"bar bytes-under-all-reduce {bytes_ratio:.0f} >= 100")


def main():
    sys.stdout.reconfigure(line_buffering=True)
    programs, parts = Path(sys.argv[1]), sys.argv[2:] or ["split", "replicas"]
    lacking = labs.missing()
    if lacking:
        print(f"skipped: {lacking}")
        return
    for part in parts:
        {"split": split, "replicas": replicas}[part](programs)


if __name__ == "__main__":
    main()
