#!/usr/bin/env python3
"""Compares every K, V and logit of both real models with transformers', on each path of computation.

Job: make the full tensors with make_reference.py, once for each version of it and of the models, below the user's cache
(0.9 GB); then run the test that reads them, which prints a table and fails beyond its limits. torch and transformers come
from packages, in a virtual environment beside the tensors; the first run takes minutes and 6 GB of disk.
Not its job: the small reference that all tests use (tests/reference/*.json).

Use: check.py CARGO      BONEPILE_REFERENCE_PYTHON names an interpreter that has the packages already.
"""
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

PACKAGES = ["torch==2.8.0", "transformers==4.57.6", "gguf==0.19.0", "numpy==2.4.6", "safetensors==0.8.0",
            "accelerate==1.10.1"]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bonepile"
MODELS = {"smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf", "gemma3": "gemma-3-270m-q4_k_m.gguf"}
SCRIPT = Path(__file__).with_name("make_reference.py")
TEST = "full::every_path_gives_the_full_tensors"


def interpreter():
    named = os.environ.get("BONEPILE_REFERENCE_PYTHON")
    if named:
        return named
    home = CACHE / "reference-venv"
    python = home / "bin" / "python"
    has = [str(python), "-c", "import torch, transformers, gguf, safetensors, accelerate"]
    if not python.exists() or subprocess.run(has, stderr=subprocess.DEVNULL).returncode != 0:
        print(f"installing {', '.join(PACKAGES)} in {home}", file=sys.stderr)
        venv.create(home, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return str(python)


def tensors():
    """The directory of the full tensors, made if they are not there."""
    folder = Path(os.environ.get("BONEPILE_MODELS") or CACHE / "models")
    files = {name: folder / file for name, file in MODELS.items()}
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        sys.exit(f"missing {', '.join(missing)}: bring them with `bonepile models pull --all`")
    version = hashlib.sha256(SCRIPT.read_bytes())
    for path in files.values():
        with open(path, "rb") as file:
            version.update(hashlib.file_digest(file, "sha256").digest())
    place = CACHE / "reference" / version.hexdigest()[:16]
    if not place.is_dir():
        begun = place.with_suffix(".begun")
        begun.mkdir(parents=True, exist_ok=True)
        arguments = [argument for name, path in files.items() for argument in (f"--{name}", str(path))]
        subprocess.run([interpreter(), str(SCRIPT), *arguments, "--full", str(begun)], check=True)
        begun.rename(place)
    return place


def main():
    cargo = sys.argv[1]
    environment = {**os.environ, "BONEPILE_REFERENCE": str(tensors())}
    command = [cargo, "test", "--workspace", "--locked", "--test", "model", "--", "--ignored", "--exact", TEST, "--nocapture"]
    sys.exit(subprocess.run(command, env=environment).returncode)


if __name__ == "__main__":
    main()
