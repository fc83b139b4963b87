"""One run of train.py or grpo.py, from its command line to its end: directory, lock, log, checkpoints, signals, ranks.

with Run(cfg, "runs/name", rank, world, device, given) as run:  # a refused start leaves nothing behind
    state = run.resume()                                        # the newest checkpoint, or None
    run.begin(cfg, step, state)
    ...                                                         # run.record(row, line), run.save(step, state, keep)
    if run.stopping():                                          # after Ctrl-C or SIGTERM
        return run.stopped(step, "train.py")
    return run.finish(results)
"""

import contextlib
import dataclasses
import fcntl
import os
import shutil
import signal
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from data import files
from optimoe import checkpoint, config
from optimoe.config import make_directory, require
from optimoe.load import pick_device

CPU = torch.device("cpu")
START_SECONDS = 60  # that a rank waits for the others at the start, where one that died closes no connection
RUN_MINUTES = 30  # that a rank waits for the others later: rank 0 may be writing a large checkpoint

STOPPED = "stopped; go on from the last checkpoint with --resume; if there is none yet, the same command starts again"


def parse(cls, argv, description=""):
    """(cfg, names of the fields that flags explain). With --resume=DIR, DIR/config.json holds where no flag is given.

    A run that was resumed with other flags, and has saved no checkpoint since, lists their fields in "resumed_with"."""
    helping = {"--help", "-h"} & set(argv)
    flags = {} if helping else config.split_flags(cls, argv)
    given = set(flags)
    if given & {"config", "preset"}:
        given |= {field.name for field in dataclasses.fields(cls)}
    directory = flags.get("resume")
    if not directory:
        return config.parse(cls, argv, description), given
    path = Path(directory, "config.json")
    require(path.is_file(), "resume", directory, "not a run directory (it has no config.json); check the path")
    values = files.read_json(path)
    # The two programs' configurations are told apart by a field that only one of them has.
    other = "grpo.py" if "group_size" in values else "train.py"
    mine = "grpo.py" if hasattr(cls, "group_size") else "train.py"
    require(other == mine or "steps" not in values, "resume", directory, f"it is a run of {other}, not of {mine}")
    try:
        cfg = config.parse(cls, argv, start=config.complete(cls, values))
    except ValueError as error:
        raise ValueError(f"{path} with these flags: {error}") from None
    stays = "out_dir" not in given or os.path.abspath(cfg.out_dir) == os.path.abspath(directory)
    remedy = f"a resumed run stays in {directory}; leave this flag away, or copy the directory and resume the copy"
    require(stays, "out_dir", cfg.out_dir, remedy)
    return dataclasses.replace(cfg, out_dir=directory), given | set(values.get("resumed_with", ()))


class Stop:
    """Between `listen` and `restore`, the first SIGINT or SIGTERM sets `asked`; a second one acts as usual."""

    asked = False
    handlers = ()

    def listen(self):
        self.handlers = [(number, signal.signal(number, self._handle)) for number in (signal.SIGINT, signal.SIGTERM)]

    def _handle(self, number, frame):
        self.asked = True
        self.restore()

    def restore(self):
        for number, handler in self.handlers:
            signal.signal(number, handler)
        self.handlers = ()


class Clock:
    """Seconds of work since the last reading, without those inside `paused()`."""

    def __init__(self):
        self.since, self.readings = time.perf_counter(), []

    def read(self):
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        return seconds

    def rate(self, amount):
        """`amount` per second of work since the last reading."""
        self.readings.append((amount, self.read()))
        return amount / self.readings[-1][1]

    def mean_rate(self):
        """The same over all readings but the first, which compiles; None without others."""
        rest = self.readings[1:]
        return sum(amount for amount, _ in rest) / sum(seconds for _, seconds in rest) if rest else None

    @contextlib.contextmanager
    def paused(self):
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began


class Run:
    """The directory of a run. Rank 0 locks and writes it; every rank knows its name and reads its checkpoints.

    prepare(directory): what rank 0 alone makes there before the others go on; they all find its result in `prepared`.
    given: names of the fields of cfg that flags explain, None for all of them (a program that calls another one).
    Raises ValueError where the directory cannot be written, is locked, or holds a run that is not resumed."""

    def __init__(self, cfg, name, rank=0, world=1, device=CPU, given=None, prepare=lambda directory: None):
        self.cfg, self.dir, self.given = cfg, Path(name), given
        self.rank, self.world, self.device, self.first = rank, world, device, rank == 0
        self.stop, self.logged, self.began = Stop(), [], None
        self.lock, self.prepared, self.made = None, None, []  # made: what a refused start removes
        try:
            if self.first:
                self._open()
                self.prepared = prepare(self.dir)
            if world > 1:
                shared = [self.dir, self.prepared]
                dist.broadcast_object_list(shared)
                self.dir, self.prepared = shared
                dist.distributed_c10d._set_pg_timeout(timedelta(minutes=RUN_MINUTES))
        except BaseException:
            self._close()
            raise

    def _open(self):
        name = str(self.dir)
        made = [path for path in (self.dir / "data", self.dir / "lock", self.dir) if not path.exists()]
        make_directory(self.dir, "out_dir", name)
        self.lock = open(self.dir / "lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            require(False, "out_dir", name, "another process is training there; wait for it or use another directory")
        self.made = made  # only now: until it has the lock, they may be another process's
        holds_run = (self.dir / "metrics.jsonl").exists() or checkpoint.find(self.dir)
        remedy = f"it already holds a run; continue it with --resume={name} or use another directory"
        require(self.cfg.resume or not holds_run, "out_dir", name, remedy)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop.restore()
        self._close()

    def _close(self):
        for path in self.made if self.began is None else ():
            if path == self.dir:
                with contextlib.suppress(OSError):  # holds what is not ours
                    path.rmdir()
            elif path.exists():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.lock:
            self.lock.close()

    def resume(self, part="config"):
        """The newest checkpoint of a resumed run, or None: it ended before its first one, and starts again.

        part: name of the member of the checkpoint that is a copy of config.json. ValueError names a field with which
        they differ although no flag has changed it."""
        found = checkpoint.find(self.dir) if self.cfg.resume else []
        if not found:
            return None
        path = found[-1][1]
        state = checkpoint.read(path)
        saved = state[part] = config.complete(type(self.cfg), state[part])
        for name in self._changed(saved):
            remedy = f"so says {self.dir}/config.json, but {path.name} was trained with {saved[name]!r}: one of them "
            remedy += f"was changed; choose with --{name}=..."
            require(self.given is None or name in self.given, name, getattr(self.cfg, name), remedy)
        return state

    def _changed(self, saved):
        """Names of the fields of cfg that had another value when `saved` was written."""
        fields = {field.name for field in dataclasses.fields(self.cfg)} - {"out_dir", "resume"}
        return sorted(name for name in fields if saved.get(name) != getattr(self.cfg, name))

    def begin(self, cfg, step, state=None, part="config"):
        """The start was not refused: write config.json, of the cfg with nothing left open, and listen to signals."""
        self.cfg, self.began = cfg, time.perf_counter()
        if self.first:
            changed = {"resumed_with": self._changed(state[part])} if state else {}
            files.write_json(self.dir / "config.json", dataclasses.asdict(cfg) | changed)
            self._rewind(step, state.get("logged") if state else None)
        self.stop.listen()

    def _rewind(self, step, logged):
        """Drop the rows after the checkpoint: their steps will be logged again. Say which rows before it are lost."""
        path, kept, damaged = self.dir / "metrics.jsonl", [], 0
        for line in path.read_bytes().split(b"\n")[:-1] if step and path.exists() else ():
            try:
                row = files.check(files.parse(line, "row"), "row")
                if int(row["step"]) <= step:
                    kept.append((line, row))
            except (ValueError, TypeError, KeyError):
                damaged += 1
        files.replace(path, b"".join(line + b"\n" for line, _ in kept))
        self.rows, self.logged = [row for _, row in kept], [row["step"] for _, row in kept]
        if logged is None and damaged:  # an earlier version did not write down what it had logged
            print(f"{path} has lost {damaged} rows, whose lines were damaged", flush=True)
        elif logged is not None and (lost := Counter(logged.tolist()) - Counter(self.logged)):
            steps = sorted(lost.elements())
            print(f"{path} has lost {len(steps)} rows, of step {', '.join(map(str, steps[:20]))}", flush=True)

    def record(self, row, line=""):
        """Append a row to metrics.jsonl, and print a line about it."""
        if self.first:
            files.append(self.dir / "metrics.jsonl", [row])
            self.logged.append(row["step"])
            if line:
                print(line, flush=True)

    def save(self, step, state, keep):
        """Write a checkpoint after the rows that were logged before it, and keep the newest `keep`. All ranks take
        part."""
        if self.first:
            files.append(self.dir / "metrics.jsonl", [], sync=True)
        whole = {"step": step, **state, "logged": torch.tensor(self.logged)}
        checkpoint.save(self.dir, step, whole, keep, self.rank, self.world)

    def stopping(self):
        """Whether a signal has asked for the end. Ranks hear it at different steps: all of them agree here."""
        return bool(self.sum([self.stop.asked])[0])

    def sum(self, values):
        """Sums over the ranks, as a list; waits for the device."""
        values = torch.as_tensor(values, dtype=torch.float64, device="cpu" if self.world == 1 else self.device)
        if self.world > 1:
            dist.all_reduce(values)
        return values.tolist()

    def stopped(self, step, program):
        if self.first:
            print(f"stopped and saved at step {step}; continue with: python {program} --resume={self.dir}", flush=True)

    def finish(self, results):
        """Write results.json; returns them."""
        files.write_json(self.dir / "results.json", results)
        return results


def check_bounds(cfg, least):
    """ValueError for a field of cfg below its bound in `least`, a dict {bound: names}, or beyond 64 bits."""
    for bound, names in least.items():
        for name in names.split():
            require(getattr(cfg, name) >= bound, name, getattr(cfg, name), f"use {bound} or more")
    for name, value in dataclasses.asdict(cfg).items():
        if isinstance(value, int):
            require(-(2**63) <= value < 2**63, name, value, "use a whole number below 2^63")
    require(cfg.seed >= 0, "seed", cfg.seed, "use a whole number from 0 to below 2^63")


def device_memory(device):
    """Bytes of memory of a GPU, or of the machine as far as this process may use it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(memory, int(text)) if text.isdigit() else memory


def require_memory(what, least, device, remedy):
    """ValueError where `what` needs `least` bytes or more and the device has not as many."""
    has = device_memory(device)
    if least > has:
        sizes = f"{least / 2**30:,.0f} GiB of memory or more, and there are {has / 2**30:,.1f}"
        raise ValueError(f"{what} need {sizes}: {remedy}")


def explain(error, rank, world):
    """The line that ends a program with this error, or None for a fault of the program."""
    text = str(error)
    if isinstance(error, KeyboardInterrupt):
        return STOPPED
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text or "enough memory" in text:
        first = text.splitlines()[0] if text else "no bytes left"
        return f"error: out of memory ({first}); use a smaller batch or model"
    if isinstance(error, (ValueError, OSError)):
        return f"error: {text}"
    if lost_rank(error, world):
        reason = "which died or never started (its own message says why)"
        remedy = "continue from the last checkpoint with --resume"
        return f"error: rank {rank} lost its connection to another rank, {reason}; {remedy}\n{text}"
    return None


def lost_rank(error, world):
    of_torch = any(word in str(error).lower() for word in ("gloo", "nccl", "connection"))
    return world > 1 and (isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and of_torch)


def launch(program, cls, description, argv=None):
    """Run program(cfg, rank, world, device, given) from the command line or torchrun; returns what it returns.

    A mistake ends the process with one line; with an argv, or DEBUG in the environment, it is raised."""
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    try:
        cfg, given = parse(cls, sys.argv[1:] if argv is None else argv, description)
        device = pick_device(cfg, local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if getattr(cfg, "deterministic", False):
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # the tests do that; a run need not pay for it
        if world > 1:
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=START_SECONDS))
        return program(cfg, rank, world, device, given)
    except (Exception, KeyboardInterrupt) as error:
        line = explain(error, rank, world)
        if line and lost_rank(error, world):
            print(line, file=sys.stderr, flush=True)
            os._exit(1)  # not sys.exit: communication threads may still wait for the rank that is gone
        if line is None or argv is not None or "DEBUG" in os.environ:
            raise
        sys.exit(line)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
