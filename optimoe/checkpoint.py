"""A run directory: its lock, its log, and checkpoint files that are whole or absent and say when they are damaged.

A checkpoint is called ckpt-<step>-<hash>.pt after the SHA-256 of its bytes. It is written under a temporary name, flushed to disk and
renamed, so a crash leaves the older files untouched; reading compares the hash first.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import torch

from data import files, tokenizer
from model import GPT, UNTAUGHT, ModelConfig
from optimoe.config import make_directory

NAME = re.compile(r"ckpt-(\d+)-([0-9a-f]{16})\.pt")


def open_run(name, resume):
    """Create (or reopen) a run directory and lock it. Returns (directory, lock file); the lock ends with the process."""
    run_dir = make_directory(name, "out_dir", name)
    lock = open(run_dir / "lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"out_dir={name!r}: another process is training there; wait for it or use another directory"
        ) from None
    if not resume and ((run_dir / "metrics.jsonl").exists() or find(run_dir)):
        raise ValueError(
            f"out_dir={name!r}: it already holds a run; continue it with --resume={name} or use another directory"
        )
    return run_dir, lock


def rewind_metrics(path, step):
    """Drop what a killed run logged after the checkpoint it resumes from; those steps will be logged again. Returns the rows that stay."""
    kept = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            kept += [(line.decode(), row)] if row["step"] <= step else []
        except (ValueError, TypeError, KeyError):  # the last line, torn by the kill, or one that was damaged since
            pass
    replace_file(path, "".join(line + "\n" for line, _ in kept))
    return [row for _, row in kept]


def replace_file(path, text):
    tmp = path.with_suffix(".tmp")
    tmp.write_text(text)
    os.replace(tmp, path)


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
    """Write `state` (tensors and plain Python values in dicts and lists) and keep only the newest `keep` files. Returns the path."""
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
    handle = os.open(run_dir, os.O_RDONLY)  # the rename itself must reach the disk before older files go
    os.fsync(handle)
    os.close(handle)
    older = [old for _, old in find(run_dir) if old != path]
    for old in older[: max(0, len(older) - (keep - 1))]:
        old.unlink()
    return path


def read(path):
    """The state written by `save`, on the CPU. `path` is a file, or a run directory for its newest one.

    Raises FileNotFoundError, or ValueError naming a file whose bytes changed since it was written."""
    path = Path(path)
    if path.is_dir():
        files = find(path)
        if not files:
            raise FileNotFoundError(f"{path} holds no checkpoint (ckpt-*.pt); train first, or name another directory")
        path = files[-1][1]
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
    # Mapped: ranks that read the same file share its memory, and who wants the weights alone never loads the optimiser's states.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def load_model(path, device="cpu", **overrides):
    """The trained GPT of a run directory or checkpoint file, in evaluation mode; overrides replace fields such as impl or dtype."""
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
