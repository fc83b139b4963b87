"""Checkpoint files that are whole or absent, and say when they are damaged.

A checkpoint is called ckpt-<step>-<hash>.pt after the SHA-256 of its bytes. It is written under a temporary name,
flushed to disk and renamed, so a crash leaves the older files untouched; reading compares the hash first.
"""

import dataclasses
import hashlib
import os
import re
import sys
from pathlib import Path

import torch

from data import files, tokenizer
from model import GPT, UNTAUGHT, ModelConfig
from optimoe import config

NAME = re.compile(r"ckpt-(\d+)-([0-9a-f]{16})\.pt")


class _HashingFile:
    """What torch.save writes, hashed on the way."""

    def __init__(self, file):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data):
        self.digest.update(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def find(run_dir):
    """Checkpoints of a run directory as [(step, path)], oldest first."""
    found = ((NAME.fullmatch(path.name), path) for path in Path(run_dir).glob("ckpt-*.pt"))
    return sorted((int(match[1]), path) for match, path in found if match)


def save(run_dir, step, state, keep):
    """Write `state` (tensors and plain values in dicts and lists) and keep only the newest `keep` files; the path."""
    run_dir = Path(run_dir)
    tmp = run_dir / "ckpt.tmp"
    try:
        with open(tmp, "wb") as file:
            hashing = _HashingFile(file)
            torch.save(state, hashing)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch wraps some of its writer's
        tmp.unlink(missing_ok=True)
        newest = (
            f"{find(run_dir)[-1][1]} is whole: free some space, then --resume={run_dir}"
            if find(run_dir)
            else "there is no older one"
        )
        raise OSError(f"the checkpoint of step {step} could not be written ({error}); {newest}") from error
    path = run_dir / f"ckpt-{step:08d}-{hashing.digest.hexdigest()[:16]}.pt"
    os.replace(tmp, path)
    files.sync_directory(run_dir)  # the rename itself must reach the disk before older files go
    older = [old for _, old in find(run_dir) if old != path]
    for old in older[: max(0, len(older) - (keep - 1))]:
        old.unlink()
    return path


def read(path):
    """The state written by `save`, on the CPU. `path` is a file, or a run directory for its newest one.

    The configuration of an earlier version is completed as config.complete does for a ModelConfig.

    Raises FileNotFoundError, or ValueError naming a file whose bytes changed since it was written."""
    path = Path(path)
    if path.is_dir():
        found = find(path)
        if not found:
            raise FileNotFoundError(f"{path} holds no checkpoint (ckpt-*.pt); train first, or name another directory")
        path = found[-1][1]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; check the path")
    match = NAME.fullmatch(path.name)
    if not match:
        raise ValueError(f"{path} is not named ckpt-<step>-<hash>.pt: give it back its name, it holds the checksum")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    if digest != match[2]:
        older = [str(other) for _, other in find(path.parent) if other != path]
        remedy = f"move it away to continue from {older[-1]}" if older else "restore it from a copy"
        raise ValueError(
            f"{path} is corrupt ({path.stat().st_size:,} bytes, SHA-256 {digest}... differs from its name): {remedy}"
        )
    # Mapped: ranks that read the same file share its memory, and optimiser states are read only where they are used.
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return state | {"config": config.complete(ModelConfig, state["config"])} if "config" in state else state


def load_model(path, device="cpu", **overrides):
    """The trained GPT of a run directory or checkpoint file, in evaluation mode. overrides: of fields such as impl."""
    state = read(path)
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    cfg = ModelConfig(**{name: value for name, value in state["config"].items() if name in names} | overrides)
    if not cfg.router_learns:
        print(f"warning: {path}: top_k={cfg.top_k}: {UNTAUGHT} in training", file=sys.stderr)
    model = GPT(cfg, draw=False).to(device)
    model.load_state_dict(state["model"])
    return model.eval()


def training_data(run_dir, named=""):
    """The data directory of a run: `named`, or else under the run, or where its config says (DIR or DIR:weight,...)."""
    run_dir = Path(run_dir)
    path = run_dir / "config.json"
    first = files.read_json(path).get("data", "").split(",")[0] if path.exists() and not named else ""
    for directory in (named,) if named else (run_dir / "data", first, first.rpartition(":")[0]):
        if directory and (Path(directory) / tokenizer.FILE).is_file():
            return Path(directory)
    where = "there" if named else f"in {run_dir / 'data'}" + (f" or in {first}" if first else "")
    raise ValueError(f"data={named!r}: no {tokenizer.FILE} {where}; name the run's data directory with --data")
