"""One run of train.py or grpo.py, from its command line to its end: directory, lock, log, checkpoints, signals, ranks.

A refused start leaves nothing behind.
"""

import contextlib
import dataclasses
import fcntl
import importlib
import os
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from data import files
from optimoe import checkpoint, config, guard, parallel
from optimoe.config import check_file, make_directory, no_reader, out_of_memory, require
from optimoe.exchange import RUN_MINUTES
from optimoe.load import pick_device

# Up to torch 2.13 this function has no public name.
set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout

CPU = torch.device("cpu")
START_SECONDS = 60  # how long ranks wait for each other at the start, when a dead one closes no connection
STOPPED = "stopped; continue with --resume from the last checkpoint; without one, the same command starts again"
FIRST_SECONDS = 5  # how long other ranks wait for rank 0 to say what ends the run


def parse(cls, argv, description=""):
    """(cfg, names of the fields that flags have set). With --resume=DIR, DIR/config.json gives the defaults. Its
    "resumed_with" lists fields that flags have changed since the last checkpoint: these count as set."""
    flags = config.split_flags(cls, [word for word in argv if word not in ("--help", "-h")])
    given = {field.name for field in dataclasses.fields(cls)} if flags.keys() & {"config", "preset"} else set(flags)
    for name in ("resume", "init_from", "upcycle_from"):  # perhaps a shell variable that is not set
        require(flags.get(name) != "", name, "", "it is empty; name a directory or leave the flag out")
    directory = flags.get("resume")
    if not directory:
        return config.parse(cls, argv, description), given
    path = Path(directory, "config.json")
    require(path.is_file(), "resume", directory, "not a run directory (it has no config.json)")
    values = files.read_json(path)
    # Only grpo.py has this field.
    mine, other = ("grpo.py" if found else "train.py" for found in (hasattr(cls, "group_size"), "group_size" in values))
    require(other == mine or "steps" not in values, "resume", directory, f"it is a run of {other}, not of {mine}")
    try:
        cfg = config.parse(cls, argv, description, config.complete(cls, values) | {"out_dir": directory})
    except ValueError as error:
        raise ValueError(f"{path} with these flags: {error}") from None
    stays = "out_dir" not in given or os.path.abspath(cfg.out_dir) == os.path.abspath(directory)
    require(stays, "out_dir", cfg.out_dir, f"a resumed run stays in {directory}; copy it and resume the copy")
    return dataclasses.replace(cfg, out_dir=directory), given | set(values.get("resumed_with", ()))


LOGS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def log_modules(cfg):
    """[(kind, module)] of cfg.log. Raises ValueError if one is unknown or not installed."""
    found = []
    for kind in filter(None, cfg.log.split(",")):
        require(kind in LOGS, "log", kind, "use tensorboard, wandb, or both with a comma")
        try:
            found.append((kind, importlib.import_module(LOGS[kind])))
        except ImportError:
            require(False, "log", kind, f"the package is not installed: pip install {kind}")
    return found


def open_log(kind, module, cfg, run_dir, step):
    """(function that logs {name: number} at a step, function to close the log)."""
    if kind == "wandb":
        run = module.init(project="optimoe", name=run_dir.name, config=dataclasses.asdict(cfg))
        return (lambda numbers, step: run.log(numbers, step=step)), run.finish
    writer = module.SummaryWriter(run_dir / "tensorboard", purge_step=step + 1)
    return lambda numbers, step: [writer.add_scalar(name, x, step) for name, x in numbers.items()], writer.close


def numbers_of(row):
    """{name: number} of a row, and {name/index: number} of its lists. Nothing nested deeper."""
    found = {}
    for name, value in row.items():
        values = {f"{name}/{i}": x for i, x in enumerate(value)} if isinstance(value, list) else {name: value}
        found |= {key: x for key, x in values.items() if isinstance(x, (int, float)) and key != "step"}
    return found


class Stopping(Exception):
    """A signal has asked the run to stop."""


class Stop:
    """After `listen`, the first SIGINT or SIGTERM only sets `asked`; the next one acts as usual."""

    asked, handlers = False, ()

    def __init__(self, says):
        self.says = says

    def listen(self):
        self.handlers = [(number, signal.signal(number, self._handle)) for number in (signal.SIGINT, signal.SIGTERM)]

    def _handle(self, number, frame):
        self.asked = True
        self.restore()
        if self.says:  # not print: the signal may have interrupted one
            os.write(2, b"\nstopping: a checkpoint is saved first; Ctrl-C again ends the run without it\n")

    def restore(self):
        for number, handler in self.handlers:
            signal.signal(number, handler)
        self.handlers = ()


class Clock:
    """`read` gives the seconds since it was last called, without those inside `paused()`."""

    def __init__(self):
        self.since = time.perf_counter()

    def read(self):
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        return seconds

    @contextlib.contextmanager
    def paused(self):
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began


def duration(seconds):
    """Seconds as text, at most the longest time that a timedelta holds (2.7 million years)."""
    return str(timedelta(seconds=int(min(seconds, 86_399_999_999_999))))


class Progress:
    """Prints the progress of a part of a long step: on a terminal in one line, every second; else a line a minute.

    progress(i, n) says that n of the `total` units are now done in part i. With stops=True it raises Stopping after a
    signal to this rank; the next collective must then be that of `Run.stopping`."""

    def __init__(self, run, what, total, stops=False):
        self.run, self.what, self.total, self.stops, self.done = run, what, total, stops, {}
        self.began = self.shown = time.perf_counter()
        self.terminal = sys.stderr.isatty()

    def __call__(self, i, n):
        if self.stops and self.run.stop.asked:
            raise Stopping
        self.done[i], now = n, time.perf_counter()
        if self.run.first and now - self.shown >= (1 if self.terminal else 60):
            share = min(1.0, max(1, sum(self.done.values())) / self.total)
            left = duration((now - self.began) * (1 / share - 1))
            line, self.shown = f"{self.what}: {share:.0%}, {left} left", now
            form, end = (f"\r{line:<60}", "\r") if self.terminal else (line, "\n")
            print(form, end=end, file=sys.stderr, flush=True)


class Run:
    """The directory of a run. Rank 0 locks and writes it; every rank reads its checkpoints.

    prepare(directory): called by rank 0 before the others go on; on all ranks `prepared` is its result.
    given: fields of cfg that flags have set; None: all. Raises ValueError if the directory cannot be written, is
    locked, or holds a run that is not resumed."""

    def __init__(self, cfg, name, rank=0, world=1, device=CPU, given=None, prepare=lambda directory: None):
        self.cfg, self.dir, self.given = cfg, Path(name), given
        self.rank, self.world, self.device, self.first = rank, world, device, rank == 0
        self.stop, self.logged, self.began = Stop(self.first), [], None
        self.lock, self.prepared, self.made = None, None, []  # made: paths that a refused start removes
        self.modules, self.logs, self.exits = log_modules(cfg), [], contextlib.ExitStack()
        try:
            if self.first:
                self._open()
                self.prepared = prepare(self.dir)
            if world > 1:
                shared = [self.dir, self.prepared]
                dist.broadcast_object_list(shared)
                self.dir, self.prepared = shared
                set_timeout(timedelta(minutes=RUN_MINUTES))
        except BaseException:
            self._close()
            raise

    def _open(self):
        name = str(self.dir)
        inside = [self.dir / name for name in ("data", "lock", "config.json", "metrics.jsonl", "tensorboard")]
        made = [path for path in (*inside, self.dir, *self.dir.parents) if not path.exists()]
        make_directory(self.dir, "out_dir", name)
        self.lock = open(self.dir / "lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            require(False, "out_dir", name, "another process is training there; use another directory")
        self.made = made  # only now: without the lock, they may be another process's
        holds_run = (self.dir / "metrics.jsonl").exists() or checkpoint.find(self.dir)
        remedy = f"it already holds a run; continue it with --resume={shlex.quote(name)} or use another directory"
        require(self.cfg.resume or not holds_run, "out_dir", name, remedy)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop.restore()
        self.exits.close()
        self._close()

    def _close(self):
        for path in self.made if self.began is None else ():
            if path in (self.dir, *self.dir.parents):
                with contextlib.suppress(OSError):  # it holds other files
                    path.rmdir()
            elif path.exists():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.lock:
            self.lock.close()

    def resume(self, part="config"):
        """The newest checkpoint of a resumed run. None if there is none yet: the run starts again.

        part: the checkpoint's member that is a copy of config.json. Raises ValueError for a field in which the two
        differ and which no flag has set."""
        found = checkpoint.find(self.dir) if self.cfg.resume else []
        if not found:
            return None
        path = found[-1][1]
        state = checkpoint.read(path)
        saved = state[part] = config.complete(type(self.cfg), state[part])
        for name in self._changed(saved):
            kept = f"{path.name} was trained with {saved[name]!r}"
            remedy = f"this is from {self.dir}/config.json, but {kept}: choose by --{name}=..."
            require(self.given is None or name in self.given, name, getattr(self.cfg, name), remedy)
        return state

    def _changed(self, saved):
        fields = {field.name for field in dataclasses.fields(self.cfg)} - {"out_dir", *config.NOT_FIELDS}
        return sorted(name for name in fields if saved.get(name) != getattr(self.cfg, name))

    def begin(self, cfg, step, state=None, part="config"):
        """After all checks: write the final config.json, open the logs, and listen to signals."""
        self.cfg, began = cfg, time.perf_counter()
        if self.first:
            kept = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in config.NOT_FIELDS}
            changed = {"resumed_with": self._changed(state[part])} if state else {}
            files.write_json(self.dir / "config.json", kept | changed)
            self._rewind(step, state)
        for kind, module in self.modules if self.first else ():
            log, close = open_log(kind, module, cfg, self.dir.absolute(), step)
            self.logs.append(log)
            self.exits.callback(close)
        self.began = began  # only now: what was written so far goes if one of it fails
        self.stop.listen()

    def _rewind(self, step, state):
        """Drop the rows after the checkpoint, which will be logged again. Print which rows before it are lost."""
        path, kept = self.dir / "metrics.jsonl", []
        for line in path.read_bytes().split(b"\n")[:-1] if state and path.exists() else ():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                row = files.check(files.parse(line, "row"), "row")
                if int(row["step"]) <= step:
                    kept.append((line, row))
        files.replace(path, b"".join(line + b"\n" for line, _ in kept))
        self.rows, self.logged = [row for _, row in kept], [row["step"] for _, row in kept]
        logged = state["logged"].tolist() if state and "logged" in state else ()
        if lost := Counter(logged) - Counter(self.logged):
            steps = ", ".join(map(str, sorted(lost.elements())[:20]))
            print(f"{path} has lost {lost.total()} rows, of step {steps}", flush=True)

    def record(self, row, line=""):
        """Append a row to metrics.jsonl and the other logs, and print `line`."""
        if self.first:
            files.append(self.dir / "metrics.jsonl", [row])
            self.logged.append(row["step"])
            for log in self.logs:
                log(numbers_of(row), row["step"])
            if line:
                print(line, flush=True)

    def traced(self, step, path):
        """`step`, which also writes a trace of its calls 6 to 8, after the capture of its CUDA graph, to a file."""

        def save(profiler):
            profiler.export_chrome_trace(path)
            print(f"{path}: open it in ui.perfetto.dev", flush=True)

        calls = torch.profiler.schedule(wait=4, warmup=1, active=3, repeat=1)
        profiler = torch.profiler.profile(schedule=calls, on_trace_ready=save)
        self.exits.enter_context(profiler)  # left running, it ends the process with a segmentation fault

        def traced_step(batches):
            result = step(batches)
            profiler.step()
            return result

        return traced_step

    def save(self, step, state, keep):
        """Flush the rows logged so far, write a checkpoint, and keep only the newest `keep`. All ranks take part.

        Raises ValueError for weights that are not finite."""
        norm = parallel.weights_norm(state["model"], self.world)
        guard.check_finite("norm of the weights", norm, step, self.dir, self.cfg.lr)
        if self.first:
            files.append(self.dir / "metrics.jsonl", [], sync=True)
        whole = {"step": step, **state, "logged": torch.tensor(self.logged)}
        checkpoint.save(self.dir, step, whole, keep, self.rank, self.world)

    def stopping(self):
        """Whether a signal has asked any rank to stop."""
        return bool(self.sum([self.stop.asked])[0])

    def sum(self, values):
        """Sums over the ranks, as a list; waits for the device."""
        values = torch.as_tensor(values, dtype=torch.float64, device="cpu" if self.world == 1 else self.device)
        if self.world > 1:
            dist.all_reduce(values)
        return values.tolist()

    def stopped(self, step, program):
        if self.first:
            again = f"{parallel.runner()} {program} --resume={shlex.quote(str(self.dir))}"
            print(f"stopped and saved at step {step}; continue with: {again}", flush=True)

    def finish(self, results):
        files.write_json(self.dir / "results.json", results)
        return results


def check_trace(path, steps):
    """Raises ValueError if no trace of a run of these steps can be written. To be called last: makes its directory."""
    require(steps >= 8, "trace", path, f"it shows steps 6 to 8, and this run has {steps}; use more --steps")
    check_file(path, "trace", device=False)


def check_rates(cfg, names):
    for name in names.split():
        require(0 <= getattr(cfg, name) < 1, name, getattr(cfg, name), "use a number from 0 to below 1")


def explain(error, rank, world):
    """The line that ends a program with this error; None for a bug in the program."""
    text = str(error)
    if isinstance(error, KeyboardInterrupt):
        return STOPPED
    if line := out_of_memory(error):
        return line
    if isinstance(error, (ValueError, OSError)):
        return f"error: {text}"
    if lost_rank(error, world):
        reason = "which died or never started (its own message says why); continue with --resume"
        return f"error: rank {rank} lost its connection to another rank, {reason}\n{text}"
    return None


def lost_rank(error, world):
    of_torch = any(word in str(error).lower() for word in ("gloo", "nccl", "connection"))
    return world > 1 and (isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and of_torch)


def launch(program, cls, description, argv=None):
    """program(cfg, rank, world, device, given) from the command line or torchrun.

    A user's mistake ends the process with one line. With an argv, or DEBUG in the environment, it is raised."""
    rank, world = 0, 1
    try:
        rank, local_rank, world = parallel.own_place()
        cfg, given = parse(cls, sys.argv[1:] if argv is None else argv, description)
        device = pick_device(cfg, local_rank)
        if getattr(cfg, "deterministic", False):
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)  # with warn_only, attention would still use atomics
            torch.utils.deterministic.fill_uninitialized_memory = False  # only finds bugs
        if world > 1:
            parallel.connect(device, timeout=timedelta(seconds=START_SECONDS))
        return program(cfg, rank, world, device, given)
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError) and no_reader():
            os._exit(1)
        line = explain(error, rank, world)
        lost, grouped = line and lost_rank(error, world), dist.is_initialized()
        if "DEBUG" in os.environ and not lost:
            line = None
        if not lost and (argv is not None or line is None and not grouped):
            raise
        if rank and isinstance(error, KeyboardInterrupt):
            line = ""  # Ctrl-C reaches all ranks; rank 0 says so
        elif rank:  # rank 0 may print the same or the cause; then torchrun ends this rank
            time.sleep(FIRST_SECONDS)
        if not lost and not grouped:
            sys.exit(line or 1)
        # No orderly end: it could wait for ever, for a rank that is gone or for ranks that wait for this one.
        print(traceback.format_exc() if line is None else line, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)
    finally:
        parallel.disconnect()
