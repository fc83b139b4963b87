"""Checkpoint files that are whole or absent, and whose damage is noticed.

A checkpoint is named ckpt-<step>-<hash>.pt; the hash is the start of the SHA-256 of its bytes. It is written under a
temporary name, flushed to disk and renamed, so a crash leaves older files untouched. Reading compares the hash first.

Several ranks write one file together. Rank 0 makes it with room for all tensors, and every rank writes its parts at
their places. So no rank needs memory for more than its parts, and a single process writes the same file.
"""

import dataclasses
import hashlib
import os
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from data import files, tokenizer
from data.loader import parse_sources
from data.tokenizer import Tokens, tiktoken_tokens
from model import GPT, UNTAUGHT, ModelConfig
from optimoe import config
from optimoe.config import require

NAME = re.compile(r"ckpt-(\d+)-([0-9a-f]{16})\.pt")


class Piece(NamedTuple):
    """One rank's part of a tensor, which is cut into `parts` equal parts along dimension 0."""

    tensor: torch.Tensor
    index: int  # of this part
    parts: int
    copy: int = 0  # numbers the ranks that hold the same part; copy 0 is written


def find(run_dir):
    """Checkpoints of a run directory as [(step, path)], oldest first."""
    found = ((NAME.fullmatch(path.name), path) for path in Path(run_dir).glob("ckpt-*.pt"))
    return sorted((int(match[1]), path) for match, path in found if match)


def newest(path):
    """The newest checkpoint of a run directory; a file is returned as it is. Raises FileNotFoundError without one."""
    path = Path(path)
    if not path.is_dir():
        return path
    if not (found := find(path)):
        raise FileNotFoundError(f"{path} holds no checkpoint (ckpt-*.pt); train first, or name another directory")
    return found[-1][1]


def save(run_dir, step, state, keep, rank=0, world=1):
    """Write `state` (tensors, Pieces and plain values in dicts and lists), and keep only the newest `keep` files.

    All ranks take part, each with its own Pieces; all else is taken from rank 0, which returns the path. The state of
    a run on data gets the member `tokenizer`, see `tokenizer_of`."""
    data = state.get("config", {}).get("data")
    state = (tokenizer_of(data) if data and rank == 0 else {}) | state
    tmp = Path(run_dir, "ckpt.tmp")
    try:
        places = _on_all(lambda: _make_room(tmp, state) if rank == 0 else None, world)[0]
        _on_all(lambda: _fill(tmp, state, places, rank), world)
        if rank:
            return None
        path = tmp.with_name(f"ckpt-{step:08d}-{_digest(tmp)}.pt")
        os.replace(tmp, path)
    except OSError as error:
        if rank == 0:
            tmp.unlink(missing_ok=True)
        newest = "there is no older one"
        if found := find(run_dir):
            newest = f"{found[-1][1]} is whole: free some space, then --resume={shlex.quote(str(run_dir))}"
        raise OSError(f"the checkpoint of step {step} could not be written ({error}); {newest}") from error
    files.sync_directory(run_dir)  # the rename must be on disk before older files go
    older = [old for _, old in find(run_dir) if old != path]
    for old in older[: max(0, len(older) - (keep - 1))]:
        old.unlink()
    return path


def tokenizer_of(data):
    """{"tokenizer": {"sha256": of the tokenizer file, "ends": ids besides eos that end an answer}} of data directories
    ("DIR" or "DIR:0.7,DIR2:0.3"). {} if they have been moved."""
    try:
        directories = [directory for directory, _ in parse_sources(data)]
        metas = [Path(directory, tokenizer.META) for directory in directories]
        ends = {end for meta in metas if meta.exists() for end in files.read_json(meta).get("ends", ())}
        return {"tokenizer": {"sha256": tokenizer.digest(directories[0]), "ends": sorted(ends)}}
    except (OSError, ValueError):
        return {}


def _on_all(work, world):
    """The results of work() on all ranks, as a list. If it fails on one rank, all raise OSError."""
    try:
        mine = work(), None
    except (OSError, RuntimeError) as error:  # torch's writer raises some as RuntimeError
        mine = None, str(error)
    found = [mine] * world
    if world > 1:
        dist.all_gather_object(found, mine)
    for _, error in found:
        if error:
            raise OSError(error)
    return [result for result, _ in found]


def _make_room(path, state):
    """Write a file with all of `state` but the bytes of its tensors. Returns the offset in it of each of `_leaves`."""
    numbers = {}  # {key: (number in the file, empty tensor)}; equal keys are one tensor, such as tied embeddings

    def shape_of(value):
        if isinstance(value, (torch.Tensor, Piece)):
            t = value.tensor if isinstance(value, Piece) else value
            key = t.data_ptr(), t.shape, t.dtype
            if key not in numbers:
                rows = (t.shape[0] * value.parts, *t.shape[1:]) if isinstance(value, Piece) else t.shape
                numbers[key] = len(numbers), torch.empty(rows, dtype=t.dtype)  # its memory is never touched
            order.append(numbers[key][0])
            return numbers[key][1]
        if isinstance(value, dict):
            return {name: shape_of(part) for name, part in value.items()}
        return [shape_of(part) for part in value] if isinstance(value, (list, tuple)) else value

    order = []
    with torch.serialization.skip_data():
        torch.save(shape_of(state), path)
    reader = torch._C.PyTorchFileReader(str(path))
    return [reader.get_record_offset(f"data/{number}") for number in order]


def _leaves(state):
    """The tensors and Pieces of a state, in order."""
    if isinstance(state, (torch.Tensor, Piece)):
        yield state
    elif isinstance(state, (dict, list, tuple)):
        for part in state.values() if isinstance(state, dict) else state:
            yield from _leaves(part)


def _fill(path, state, places, rank):
    """Write the tensors of this rank where they belong, one at a time, and flush them to disk."""
    with open(path, "r+b") as file:
        for place, value in zip(places, _leaves(state), strict=True):
            if (value.copy if isinstance(value, Piece) else rank) == 0:
                t = value.tensor if isinstance(value, Piece) else value
                data = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                _write(file, place + (value.index * data.nbytes if isinstance(value, Piece) else 0), data)
        file.flush()
        os.fsync(file.fileno())


def _write(file, place, data):
    file.seek(place)
    file.write(data)


def _digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def read(path):
    """The state written by `save`, on the CPU. `path` is a file, or a run directory for its newest one.

    config.complete adds fields of ModelConfig that an earlier version's configuration lacks.

    Raises FileNotFoundError, or a ValueError that names a file whose bytes changed since it was written."""
    path = newest(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; check the path")
    match = NAME.fullmatch(path.name)
    if not match:
        raise ValueError(f"{path} is not named ckpt-<step>-<hash>.pt: restore its name, which holds the checksum")
    digest = _digest(path)
    if digest != match[2]:
        older = [str(other) for _, other in find(path.parent) if other != path]
        remedy = f"move it away to continue from {older[-1]}" if older else "restore it from a copy"
        raise ValueError(f"{path} is corrupt (its SHA-256, {digest}..., is not that of its name): {remedy}")
    # Mapped: ranks share the file's memory, and only what is used is read.
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return state | {"config": config.complete(ModelConfig, state["config"])} if "config" in state else state


def load_model(path, device="cpu", **overrides):
    """The trained GPT of a run directory or checkpoint file, in evaluation mode. overrides: fields such as impl.

    Its attribute `tokenizer` is that member of the checkpoint, or None in those of earlier versions."""
    state = read(path)
    values = {field.name: state["config"][field.name] for field in dataclasses.fields(ModelConfig)}
    cfg = ModelConfig(**values | overrides)
    if not cfg.router_learns:
        print(f"warning: {path}: top_k={cfg.top_k}: {UNTAUGHT} in training", file=sys.stderr)
    model = GPT(cfg, draw=False).to(device)
    model.load_state_dict(state["model"])
    model.tokenizer = state.get("tokenizer")
    return model.eval()


def training_data(run_dir, named=""):
    """The data directory of a run: `named`, else RUN/data, else the first in its config (DIR or DIR:weight,...)."""
    run_dir = Path(run_dir)
    path = run_dir / "config.json"
    first = files.read_json(path).get("data", "").split(",")[0] if path.exists() and not named else ""
    for directory in (named,) if named else (run_dir / "data", first, first.rpartition(":")[0]):
        if directory and (Path(directory) / tokenizer.FILE).is_file():
            return Path(directory)
    where = "there" if named else f"in {run_dir / 'data'}" + (f" or in {first}" if first else "")
    raise ValueError(f"data={named!r}: no {tokenizer.FILE} {where}; name the run's data directory with --data")


def run_tokens(directory, model) -> Tokens:
    """The tokenizer of a data directory. All that ended an answer in the run's data ends one here.

    Raises ValueError if it has more tokens than the model, or is not the tokenizer of the run, whose SHA-256 is in
    checkpoints, but not in those of earlier versions."""
    tokens, rows = tiktoken_tokens(tokenizer.load(directory)), model.cfg.vocab_size
    remedy = "name the data directory that the model was trained on"
    fault = f"its tokenizer has {tokens.n_vocab:,} tokens and the model {rows:,}"
    require(tokens.n_vocab <= rows, "data", str(directory), f"{fault}: {remedy}")
    kept = getattr(model, "tokenizer", None)
    if not kept:
        return tokens
    same = kept["sha256"] == tokenizer.digest(directory)
    require(same, "data", str(directory), f"its tokenizer is not that of the run: {remedy} with --data")
    return tokens.ending(kept["ends"])
