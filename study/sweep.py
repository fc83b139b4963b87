"""Run the missing runs of presets, in parallel, within a time limit:  python -m study.sweep PRESET... --minutes=9

A JSON line is appended for every finished run, and runs in the file are skipped: the same command continues where the
last one stopped. study/presets.py lists the presets. When a run is finished, its preset may ask for others.
"""

import dataclasses
import math
import multiprocessing
import os
import queue
import signal
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from optimoe import config
from optimoe.config import check_file, make_directory, require
from study import child
from study.execute import Run, data_dir, execute, form, key, prepare_data
from study.presets import PRESETS, foreseen
from study.results import TASKS, append, read
from study.rules import stop_rule

SMOKE = "runs/study/smoke.jsonl"  # two tiny runs on a CPU are no result of the study
SLACK = 1.1  # a run is started only if this many times its estimate is left: a run that is cut off is lost


@dataclass(frozen=True)
class SweepConfig:
    POSITIONAL = ("presets",)

    presets: tuple[Literal[tuple(PRESETS)], ...] = ()  # names of study/presets.py, run in this order
    results: str = "study/results.jsonl"  # the results file; the preset smoke alone writes to runs/study/smoke.jsonl
    minutes: float = 9.0  # time limit; 0: only say what is left
    cache: str = "runs/study"  # where data directories and kept weights go
    device: Literal["auto", "cpu", "cuda"] = "auto"
    jobs: int = 0  # processes per device; 0: six on a GPU, else one
    items: int = 100  # size of the measurements: problems for each number of steps
    keep: bool = False  # keep the final weights under CACHE/weights; runs that lack theirs are run again
    force: bool = False  # ignore the stop rules of the presets

    def __post_init__(self):
        require(self.presets, "presets", "", f"name one or more of {', '.join(PRESETS)}")
        require(0 <= self.minutes < math.inf, "minutes", self.minutes, "use 0 (only say what is left) or more")
        for name, least in (("jobs", 0), ("items", 1)):
            require(getattr(self, name) >= least, name, getattr(self, name), f"use {least} or more")

    @property
    def cuda(self):
        require(self.device != "cuda" or torch.cuda.is_available(), "device", "cuda", "no CUDA device is visible")
        return self.device != "cpu" and torch.cuda.is_available()

    @property
    def file(self):
        return SMOKE if self.presets == ("smoke",) and self.results == SweepConfig.results else self.results


def estimates(runs, rows, device):
    """Seconds that each run will take, from the last of the most similar runs on this device or, for a GPU, on
    another one; None without any.

    In longer runs only the training takes longer. The last run is taken because it compiled least."""
    sizes, cpu = ("tokens", "d_model", "n_experts", "top_k", "n_layers"), device.startswith("CPU")
    known = [row for row in rows if not row["diverged"] and row["device"].startswith("CPU") == cpu]
    here = [row for row in known if row["device"] == device]
    latest = {}  # of each size, the last first
    for row in reversed(here if here or cpu else known):
        latest.setdefault(tuple(row["run"][name] for name in sizes), row)
    times = {}
    for run in {form(run): run for run in runs}.values():
        mine = [getattr(run, name) for name in sizes]
        far = lambda size, mine=mine: sum(abs(math.log2(x / y)) for x, y in zip(size, mine, strict=True))
        near = latest[min(latest, key=far)] if latest else None
        times[form(run)] = near and near["seconds"] + (run.tokens - near["tokens"]) / near["tokens_per_s"]
    return [times[form(run)] for run in runs]


def gpu_minutes(runs, rows):
    """Minutes of one GPU that runs take, on the GPU of the last row; None before there is one."""
    gpu = next((row for row in reversed(rows) if not (row["device"].startswith("CPU") or row["diverged"])), None)
    return gpu and sum(estimates(runs, rows, gpu["device"])) / gpu["jobs"] / 60


def work(parent, device, threads, cache, items, inbox, outbox):
    """A worker process: executes tasks until it gets None or the sweep is gone."""
    child.end_with(parent)
    torch.set_num_threads(threads)
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device))
    while (task := inbox.get()) is not None:
        runs, keep = task
        try:
            outbox.put((key(runs[0]), execute(runs, cache, device, items, keep)))
        except Exception as error:  # one bad run must not end a sweep; the next sweep tries it again
            outbox.put((key(runs[0]), traceback.format_exc(limit=-4)))
            if "CUDA error" in str(error):
                return  # nothing works after that in this process


class Queue:
    """The finished, running, failed and remaining runs of a sweep."""

    def __init__(self, cfg, rows, device, lanes):
        self.cfg, self.rows, self.device, self.lanes = cfg, rows, device, lanes
        self.running, self.failed = {}, []  # running: first key of a group -> its runs
        self.plan()

    def plan(self):
        """Ask the presets again: self.all are the runs that they want, self.todo those not begun."""
        self.all = list(dict.fromkeys(run for name in self.cfg.presets for run in PRESETS[name](self.rows)))
        finished = {row["key"]: row["diverged"] for row in self.rows}
        busy = {*self.in_flight(), *self.failed}
        # A run that diverged has no weights, however often it is repeated.
        done = lambda run: key(run) in finished and (finished[key(run)] or not self.weightless(run))
        self.todo = [run for run in self.all if run not in busy and not done(run)]

    def in_flight(self):
        return [run for runs in self.running.values() for run in runs]

    def kept(self, run):
        """Where the weights of a run are kept, or None."""
        return f"{self.cfg.cache}/weights/{key(run)}" if self.cfg.keep else None

    def weightless(self, run):
        """Whether its weights are wanted and not there. results.json, written last, marks a whole directory."""
        path = self.kept(run)
        return path and not os.path.exists(f"{path}/results.json")

    def left(self):
        if not (rest := [*self.todo, *self.in_flight(), *self.failed]):
            return f"all {len(self.all)} runs are finished"
        seconds = estimates(rest, self.rows, self.device)
        when = "no estimate yet" if None in seconds else f"about {sum(seconds) / self.lanes / 60:.1f} minutes"
        return f"{len(rest)} of {len(self.all)} runs left, {when}"

    def take(self, ends, most):
        """Remove from todo up to `most` runs of one form that can end in time; [] when none can."""
        group = []
        for run, seconds in zip(self.todo, estimates(self.todo, self.rows, self.device), strict=True):
            alike = not group or len(group) < most and form(run) == form(group[0])
            if alike and time.monotonic() + SLACK * (seconds or 0.0) < ends:
                group.append(run)
                ends -= seconds or 0.0
        self.todo = [run for run in self.todo if run not in group]
        return group

    def fail(self, members, why):
        self.failed += members
        print(f"FAILED: {why} in {members}", flush=True)


def sweep(cfg):
    """Run what is missing. Returns how many runs failed or were killed."""
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if cfg.cuda else ["cpu"]
    together = 3 if cfg.cuda else 1  # runs of one `form` that a process trains side by side
    jobs = cfg.jobs or (6 if cfg.cuda else 1)
    threads = max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // (jobs * len(devices))))
    name = torch.cuda.get_device_name(devices[0]) if cfg.cuda else f"CPU, {threads} threads"
    rows = read(cfg.file, optional=True)
    stopped = {} if cfg.force else {name: why for name in cfg.presets if (why := stop_rule(name, rows))}
    for reason in stopped.values():
        print(f"stop rule: {reason} (--force ignores it)", flush=True)
    if stopped.keys() >= set(cfg.presets):
        return 0
    cfg = dataclasses.replace(cfg, presets=tuple(name for name in cfg.presets if name not in stopped))
    tasks = Queue(cfg, rows, name, len(devices) * jobs)
    print(f"{cfg.file}: {tasks.left()} on {len(devices)} x {name}, {jobs} at a time on each", flush=True)
    if not tasks.todo or not cfg.minutes:
        for name in cfg.presets:
            rest = foreseen(name, rows)
            cost = gpu_minutes(rest, rows)
            print(f"{name}: about {len(rest)} runs to its end" + (f", {cost:.1f} minutes of one GPU" if cost else ""))
        return 0
    check_file(cfg.file, "results")  # refuse now what cannot be written
    make_directory(cfg.cache, "cache", cfg.cache)
    inbox, outbox, workers = start_workers(cfg, devices, min(tasks.lanes, len(tasks.todo) + 6), threads)
    builder = ThreadPoolExecutor(1)  # builds data in order, while other runs are trained
    try:
        lost = run_all(tasks, cfg, inbox, outbox, workers, builder, jobs, together)
    finally:
        builder.shutdown(wait=False, cancel_futures=True)
        for _ in workers:
            inbox.put(None)
        for worker in workers:
            worker.join(timeout=0 if tasks.running else 5)
            if worker.is_alive():
                worker.terminate()  # its run will be done again
        ends = {"failed": len(tasks.failed), "cut off": len(tasks.in_flight())}
        print(", ".join([tasks.left(), *(f"{n} {how}" for how, n in ends.items() if n)]), flush=True)
    if lost:
        print(f"{lost} worker processes were killed, perhaps for want of memory: use fewer --jobs", flush=True)
    return len(tasks.failed) + lost


def run_all(tasks, cfg, inbox, outbox, workers, builder, jobs, together):
    """Hand groups to the workers and record their results. Returns how many workers were killed."""
    began, before, lost, data = time.monotonic(), len(tasks.rows), 0, {}
    ends = began + 60 * cfg.minutes
    while (tasks.todo or tasks.running) and time.monotonic() < ends:
        alive = sum(worker.is_alive() for worker in workers)
        lost = sum(worker.exitcode not in (None, 0) for worker in workers)
        for run in tasks.todo:
            if (directory := data_dir(run, cfg.cache)) not in data:
                data[directory] = builder.submit(prepare_data, run, cfg.cache, os.cpu_count() or 1)
        while len(tasks.running) < alive + lost and (members := tasks.take(ends, together)):
            first = key(members[0])
            tasks.running[first] = members  # before the wait for its data, so that Ctrl-C counts it as left
            try:
                for run in members:
                    data[data_dir(run, cfg.cache)].result()
            except Exception as error:  # only these runs lack data
                tasks.fail(tasks.running.pop(first), f"no data: {error}")
                continue
            inbox.put((members, [tasks.kept(run) for run in members]))
        if len(tasks.running) <= lost or not alive:  # a killed worker's run never comes back
            break
        try:
            first, found = outbox.get(timeout=1)
        except queue.Empty:
            continue
        members = tasks.running.pop(first)
        if isinstance(found, str):
            tasks.fail(members, found)
            found = []
        for row in found:
            row["jobs"] = jobs  # that shared the device: the run took seconds / jobs of it
            append(cfg.file, row)
            print(f"{time.monotonic() - began:5.0f} s: {line(row)}", flush=True)
        tasks.rows += found
        tasks.plan()
        print(tasks.left(), flush=True)
        if len(tasks.failed) >= 3 * together and len(tasks.rows) == before:
            break
    return lost


def start_workers(cfg, devices, lanes, threads):
    """(inbox, outbox, processes)"""
    context = multiprocessing.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    # One for all workers: inductor would give each its own directory.
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
    common = (threads, cfg.cache, cfg.items, inbox, outbox)
    arguments = [(os.getpid(), devices[i % len(devices)], *common) for i in range(lanes)]
    workers = [context.Process(target=work, args=each, daemon=True) for each in arguments]
    # Workers inherit this mask: the parent ends them. A blocked Ctrl-C waits; an ignored one would be lost.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    for worker in workers:
        worker.start()
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return inbox, outbox, workers


def line(row):
    """A finished run in words."""
    always = ("n_experts", "top_k", "lr", "seed")
    fields = " ".join(f"{name}={x}" for name, x in row["run"].items() if name in always or x != getattr(Run, name))
    if row["diverged"]:
        return f"{fields}: diverged"
    losses = "".join(f", {task} {row[task]['loss']:.3f}" for task in TASKS if task in row)
    return f"{fields}: loss {row['train_loss']:.3f}{losses}; {row['seconds']:.1f} s"


def main(argv=None):
    return sweep(config.parse(SweepConfig, argv, __doc__))


if __name__ == "__main__":
    for stop in (signal.SIGTERM, signal.SIGINT):  # a time limit from outside, Ctrl-C: either ends the workers too
        signal.signal(stop, lambda number, _: sys.exit(128 + number))
    config.command_line(lambda: sys.exit(min(1, main())))
