"""Run what is missing of a grid of runs, in parallel, within a time limit:  python -m study.sweep PRESET,PRESET --minutes 9

One JSON line is appended for every finished run (study/run.py says what is in it); what the file already has is skipped, so the
same command goes on where the last one stopped, on whatever day and machine. A run that was cut off leaves nothing and is done again.
The order of each grid is such that whatever is finished is useful: what decides a claim for the least time comes first.

presets   smoke    two tiny runs: does it work, on a CPU in seconds
          pilot    which people, problems and expressions are neither out of reach nor child's play
          lr       peak learning rates at the corners of the (E, k) grid; every run below takes its rate from these rows
          main     E 4..256 x k 1..8 at one width, 2^24 and 2^26 tokens, 3 seeds; 4,000 different problems, people by the tokens
          scarce   the same E at k = 2 and 8, 2^24 tokens, with 1,000 different problems only
          long     the same as main at k = 2 and 8, 2^28 tokens
          topk     k 1..8 with k * d_expert and E * d_expert fixed: equal active and total parameters
          init     smaller and larger initial weights
          width    half and twice the width
          adamw    the deciding points again with the paper's optimiser
          full     lr, main, scarce, topk and init in the order of what they teach per minute
          text     prepared text (--data DIR:weight,...), task loss on the paper's tasks
"""

import argparse
import dataclasses
import math
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from config import require
from study.results import answer_loss, append, read
from study.run import ROOT, Run, data_dir, execute_together, form, key, prepare_data

JOBS = 3  # processes per GPU: while one or two of them start, compile or measure, work of the CPU for the most part, the others train
TOGETHER = 3  # the seeds, or rates, of one (E, k): on branches of one CUDA graph, where one model alone would leave the GPU waiting for launches
EXPERTS = (256, 4, 32, 128, 8, 64, 16)  # extremes first
TOP_K = (2, 8, 1, 4)
CORNERS = ((256, 8), (32, 2), (8, 8), (256, 1), (4, 1))  # slowest first; two of them have three seeds
SLACK = 1.1  # times its estimate must be left before a run is started: what is cut off is lost
UNUSUAL = ("optimizer", "n_layers", "init_std", "batch", "people", "unique", "max_steps", "mano_length", "modulus")  # named in a line where they are
RATES = {"muon": (6e-3, 1.2e-2, 3e-3), "adamw": (4e-3, 2e-3, 8e-3)}


def smoke(data):
    base = Run(d_model=32, n_layers=1, d_expert=32, top_k=1, tokens=2**14, lr=6e-3, batch=4, seq_len=96, people=20, max_steps=2, mano_length=2,
               modulus=5, data_tokens=2**14)
    return [dataclasses.replace(base, n_experts=e) for e in (2, 4)]


def pilot(data):
    """Which people, problems and expressions are neither out of reach nor child's play, at one end and the other of the grid (docs/STUDY.md)."""
    base = dict(lr=6e-3, data_tokens=2**25)
    scarce = base | dict(people=4_000, unique=4_000, mano_length=3)  # 29 biographies of each in 2^24 tokens
    fresh = base | dict(people=2_000, unique=0, modulus=23, mano_length=2)
    rare = base | dict(people=1_000, unique=1_000, mano_length=4)
    long = base | dict(people=8_000, unique=0, modulus=11, max_steps=10, mano_length=2)
    pairs = [scarce, fresh, rare, scarce | dict(tokens=2**25), fresh | dict(tokens=2**25), long, rare | dict(tokens=2**25)]
    runs = [setting | dict(n_experts=e) for setting in pairs for e in (16, 128)]
    runs += [scarce | dict(n_experts=e) for e in (4, 256)] + [scarce | dict(n_experts=128, top_k=8), scarce | dict(seed=1)]
    runs += [setting | dict(n_experts=e, tokens=2**26, data_tokens=2**26) for setting in (scarce, fresh) for e in (16, 128)]
    return [Run(**run) for run in runs]


def sized(tokens, **fields):
    """A run of so many tokens whose people are as many as are met 29 times each."""
    return Run(tokens=tokens, data_tokens=tokens, people=Run.people * tokens // Run.tokens, **fields)


def lr(data):
    return [Run(n_experts=e, top_k=k, lr=rate, seed=seed) for seed, corners in ((0, CORNERS), (1, CORNERS[:2]), (2, CORNERS[:2]))
            for e, k in corners for rate in RATES["muon"]]


def main(data):
    sizes = [(tokens, e, k) for tokens in (2**24, 2**26) for k in TOP_K for e in EXPERTS if k <= e]
    return [sized(tokens, n_experts=e, top_k=k, seed=seed) for tokens, e, k in sizes for seed in range(3)]


def scarce(data):
    return [Run(n_experts=e, top_k=k, seed=seed, unique=1_000) for k in (2, 8) for e in EXPERTS for seed in range(3) if k <= e]


def long(data):
    return [sized(2**28, n_experts=e, top_k=k, seed=seed) for seed in range(3) for e in EXPERTS for k in (2, 8) if k <= e]


def topk(data):
    return [Run(n_experts=8 * total * k, top_k=k, d_expert=256 // k, tokens=2**24, seed=seed, lr=6e-3) for seed in range(3) for total in (1, 4)
            for k in (1, 8, 2, 4)]


def init(data):
    shapes = ((32, 2), (256, 8))
    return [Run(n_experts=e, top_k=k, seed=seed, init_std=std) for seed in range(3) for e, k in shapes for std in (0.05, 0.0125, 0.025, 0.1)]


def width(data):
    runs = [Run(d_model=d, d_expert=d // 2, n_experts=32, lr=rate) for d in (64, 256) for rate in RATES["muon"]]
    return runs + [Run(d_model=d, d_expert=d // 2, n_experts=e, top_k=k, seed=seed) for seed in range(3) for d in (64, 256) for e in (256, 8, 32)
                   for k in (2, 8)]


def adamw(data):
    base = Run(optimizer="adamw")
    runs = [dataclasses.replace(base, n_experts=e, top_k=k, lr=rate) for e, k in CORNERS[:2] for rate in RATES["adamw"]]
    return runs + [dataclasses.replace(base, n_experts=e, top_k=k, seed=seed) for seed in range(3) for e in (256, 8, 32) for k in (2, 8)]


def full(data):
    """What decides a claim for the least time first: one k in each regime, before the other k."""
    runs = main(data)
    short, longer = ([run for run in runs if run.tokens == tokens] for tokens in (runs[0].tokens, runs[-1].tokens))
    at = lambda runs, *ks: [run for run in runs if run.top_k in ks]  # noqa: E731
    return [*lr(data), *short, *at(scarce(data), 2), *topk(data), *at(longer, 2), *init(data), *at(scarce(data), 8), *at(longer, 8), *longer]


def text(data):
    if not data:
        raise ValueError("data='': the preset text needs --data DIR:weight,DIR:weight of prepared text (python -m data.prepare)")
    base = Run(data=data, d_model=256, n_layers=8, d_expert=256, seq_len=512, init_std=0.02, tokens=2**25, top_k=2, n_experts=16)
    runs = [dataclasses.replace(base, lr=rate) for rate in (2e-3, 4e-3, 1e-3)]
    return runs + [dataclasses.replace(base, n_experts=e, top_k=k, seed=seed) for seed in range(3) for e in (128, 8, 32) for k in (2, 8)]


PRESETS = {preset.__name__: preset for preset in (smoke, pilot, lr, main, scarce, long, topk, init, width, adamw, full, text)}


def shape(run):
    """Runs of one shape share their choice of learning rate."""
    return run["d_model"], run["n_layers"], run["d_expert"], run["optimizer"], bool(run["data"])


def best_rate(run, rows, pending=()):
    """The learning rate with the lowest results.answer_loss (mean over seeds) at the nearest (E, k) of the same shape; None without rows, and
    while runs of that (E, k) are among `pending`.

    Rates are compared on runs that differ in nothing else, on the same seeds; of several such sets at one (E, k) on that of fewest tokens."""
    wanted, groups = vars(run), {}
    for other, row in [*((row["run"], row) for row in rows), *((vars(each), None) for each in pending)]:
        if other["lr"] and shape(other) == shape(wanted):
            group = tuple((field, value) for field, value in other.items() if field not in ("lr", "seed"))
            loss = row and (math.inf if row["diverged"] else answer_loss(row))
            groups.setdefault(group, {}).setdefault(other["lr"], {})[other["seed"]] = loss
    groups = [(dict(group), rates) for group, rates in groups.items() if len(rates) > 1 and set.intersection(*map(set, rates.values()))]
    if not groups:
        return None
    away = lambda group, field: abs(math.log2(group[field] / wanted[field]))  # noqa: E731
    far = lambda group: (away(group, "n_experts") + away(group, "top_k"), away(group, "top_k"), group["tokens"])  # noqa: E731
    _, rates = min(groups, key=lambda entry: far(entry[0]))
    if any(loss is None for seeds in rates.values() for loss in seeds.values()):
        return None
    seeds = set.intersection(*map(set, rates.values()))
    return min(rates, key=lambda rate: sum(math.log(rates[rate][seed]) for seed in seeds))


def estimate(run, rows, device):
    """Seconds that a run will take, from the most similar finished one on this device, of several the last, which compiled least; None when there
    is none."""
    sizes = lambda r: [math.log2(r[name]) for name in ("tokens", "d_model", "n_experts", "top_k", "n_layers")]  # noqa: E731
    wanted = dataclasses.asdict(run)
    known = [row for row in rows if row["device"] == device and not row["diverged"]]
    if not known:
        return None
    near = min(reversed(known), key=lambda row: sum(abs(a - b) for a, b in zip(sizes(row["run"]), sizes(wanted), strict=True)))
    return near["seconds"] + (run.tokens - near["tokens"]) / near["tokens_per_s"]  # compiling and measuring take as long in longer runs


def work(device, threads, cache, items, inbox, outbox):
    """A worker process: runs what comes, until None comes."""
    torch.set_num_threads(threads)
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device))
    while (task := inbox.get()) is not None:
        runs, rates, keep = task
        try:
            outbox.put((key(runs[0]), execute_together(runs, cache, device, rates, items, keep)))
        except Exception as error:  # one bad run must not end a sweep; it is reported, and tried again by the next sweep
            outbox.put((key(runs[0]), traceback.format_exc(limit=-4)))
            if "CUDA error" in str(error):
                return  # nothing works after that in this process


def warm_up(runs, device):
    """Start study/warm.py for the shapes of these runs and go on; None where there is nothing to compile for."""
    shapes = dict.fromkeys(f"{run.d_model},{run.d_expert},{run.n_experts},{run.top_k}" for run in runs if not run.data)
    if not device.startswith("cuda") or torch.version.hip or not shapes:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    # Triton's default, for all alike: inductor would move each worker's to a directory of its own for every device.
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
    return subprocess.Popen([sys.executable, "-m", "study.warm", f"--capability={10 * major + minor}", *shapes], cwd=ROOT, stdin=subprocess.DEVNULL,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


def threads_of(processes):
    return max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // processes))


def sweep(runs, results, minutes, cache="runs/study", devices=("cpu",), jobs=1, items=100, keep=(), together=1):
    """Run what is missing of `runs` (a list of Run, in this order) and append to the file `results`. Returns how many failed or were killed.

    minutes: no run is started that is not expected to end in time, and what still runs then is dropped; 0 only reports.
    jobs: processes per device. together: runs of one form that a process trains side by side.
    keep: names like "E16k2" whose final weights are kept under cache/weights."""
    began = time.monotonic()
    ends = began + 60 * minutes
    rows = read(results)
    done = {row["key"] for row in rows}
    runs = list({key(run): run for run in runs}.values())
    todo = [run for run in runs if key(run) not in done]
    name = torch.cuda.get_device_name(devices[0]) if devices[0].startswith("cuda") else f"CPU, {threads_of(jobs)} threads"
    lanes = min(len(devices) * jobs, max(1, len(todo)))

    def left():
        rest = [*todo, *in_flight(), *failed]
        if not rest:
            return f"all {len(runs)} runs are finished"
        seconds = [estimate(run, rows, name) for run in rest]
        when = "no estimate yet" if None in seconds else f"about {sum(seconds) / lanes / 60:.1f} minutes"
        return f"{len(rest)} of {len(runs)} runs left, {when}"

    def in_flight():
        return [run for runs in running.values() for run in runs]

    running, failed, lost = {}, [], 0  # running: first key of a group -> its runs
    print(f"{results}: {left()} on {len(devices)} x {name}, {jobs} at a time on each", flush=True)
    if not todo or not minutes:
        return 0
    data, builder = {}, ThreadPoolExecutor(1)  # directories are built in order, meanwhile what has its own is trained
    for run in todo:
        if not run.data and data_dir(run, cache) not in data:
            data[data_dir(run, cache)] = builder.submit(prepare_data, run, cache, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    threads = threads_of(jobs * len(devices))
    arguments = [(devices[i % len(devices)], threads, cache, items, inbox, outbox) for i in range(lanes)]
    workers = [context.Process(target=work, args=each, daemon=True) for each in arguments]
    warm = warm_up(todo, devices[0])  # first: workers inherit where the kernels are
    for worker in workers:
        worker.start()
    try:
        while (todo or running) and time.monotonic() < ends:
            alive, lost = sum(worker.is_alive() for worker in workers), sum(worker.exitcode not in (None, 0) for worker in workers)
            while len(running) < alive + lost and (group := choose_group(todo, in_flight(), rows, ends, name, together)):
                members, rates = map(list, zip(*group, strict=True))
                for run in members:
                    todo.remove(run)
                try:
                    for run in members:
                        if not run.data:
                            data[data_dir(run, cache)].result()
                except Exception as error:  # no data, no run; others have theirs
                    failed += members
                    print(f"FAILED: no data: {error} in {members}", flush=True)
                    continue
                running[key(members[0])] = members
                inbox.put((members, rates, [f"{cache}/weights/{key(run)}" if f"E{run.n_experts}k{run.top_k}" in keep else None for run in members]))
            if len(running) <= lost or not alive:  # a killed worker's run never comes back
                break
            try:
                finished, found = outbox.get(timeout=1)
            except queue.Empty:
                continue
            members = running.pop(finished)
            if isinstance(found, str):
                failed += members
                print(f"FAILED: {found}in {members}", flush=True)
                if len(failed) >= 3 * together and len(rows) == len(done):
                    break  # nothing works
                continue
            for row in found:
                row["jobs"] = jobs  # that shared the device: its seconds are 1 / jobs of the device's
                append(results, row)
                rows.append(row)
                print(f"{time.monotonic() - began:5.0f} s: {line(row)} | {left()}", flush=True)
    finally:
        builder.shutdown(wait=False, cancel_futures=True)
        if warm:
            warm.terminate()
        for _ in workers:
            inbox.put(None)
        for worker in workers:
            worker.join(timeout=0 if running else 5)
            if worker.is_alive():
                worker.terminate()  # its run is not in the file and will be done again
    print(f"{left()}" + (f", {len(failed)} failed" if failed else "") + (f", {len(in_flight())} cut off" if running else "")
          + (f", {lost} worker processes killed, perhaps for want of memory: use fewer --jobs" if lost else ""), flush=True)
    waiting = [run for run in todo if not run.lr and best_rate(run, rows) is None]
    if waiting:
        print(f"{len(waiting)} runs wait for learning rates of their shape: run the preset lr (or this one again)")
    return len(failed) + lost


def choose(todo, running, rows, ends, name):
    """The next run that can start, with its learning rate (0: its own), or None. It waits while the rates at its corner are being compared."""
    for run in todo:
        rate = 0.0
        if not run.lr:
            rate = best_rate(run, rows, [*running, *todo])
            if rate is None:
                continue
        seconds = estimate(run, rows, name)
        if seconds is None or time.monotonic() + SLACK * seconds < ends:
            return run, rate
    return None


def choose_group(todo, running, rows, ends, name, most):
    """What `choose` says and up to most - 1 runs of its form that can start, too, as a list of (run, rate); [] when nothing can."""
    group, waiting = [], list(todo)
    while len(group) < most and (found := choose(waiting, running, rows, ends, name)):
        group.append(found)
        waiting = [run for run in todo if form(run) == form(found[0]) and run not in [member for member, _ in group]]
        ends -= estimate(found[0], rows, name) or 0.0
    return group


def line(row):
    """A finished run for people."""
    run = row["run"]
    head = (f"d={run['d_model']} E={run['n_experts']} k={run['top_k']} F={run['d_expert']} lr={row['lr']:g} tokens={row['tokens'] / 1e6:.1f}M "
            f"seed={run['seed']}" + "".join(f" {name}={run[name]}" for name in UNUSUAL if run[name] != getattr(Run, name)))
    if row["diverged"]:
        return f"{head}: diverged"
    if run["data"]:
        found = ", ".join(f"{task} {row[task]['loss']:.3f}" for task in ("triviaqa", "hellaswag", "gsm8k", "humaneval"))
    else:
        found = f"recall {row['facts']['overall']:.1%}, solutions {row['problems']['accuracy']:.1%}, mano {row['mano']['accuracy']:.1%}"
    return f"{head}: loss {row['train_loss']:.3f}, {found}; {row['seconds']:.1f} s ({row['tokens_per_s'] / 1e6:.2f} M tokens/s)"


def cli(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", help="one, or several in this order: lr,main")
    parser.add_argument("--results", default="study/results.jsonl", help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=9, help="time limit; 0: only say what is left (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=0, help="processes per device (default: 3 on a GPU, 1 on the CPU)")
    parser.add_argument("--together", type=int, default=0, help="runs of one (E, k) that a process trains side by side (default: 3 on a GPU, else 1)")
    parser.add_argument("--cache", default="runs/study", help="where data directories and kept weights go (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--data", default="", help="for the preset text: DIR:weight,DIR:weight")
    parser.add_argument("--keep", default="", help="families whose final weights are kept under CACHE/weights: E16k2,E64k2")
    parser.add_argument("--items", type=int, default=100, help="size of the measurements: problems per number of steps (default: %(default)s)")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a time limit from outside then ends the workers too
    cuda = args.device == "cuda" or args.device == "auto" and torch.cuda.is_available()
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if cuda else ["cpu"]
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda': no CUDA device is visible; use --device=cpu")
        for name in (names := args.presets.split(",")):
            require(name in PRESETS, "preset", name, f"use {', '.join(PRESETS)}")
        runs = [run for name in names for run in PRESETS[name](args.data)]
        jobs = args.jobs or (JOBS if cuda else 1)
        return sweep(runs, args.results, args.minutes, args.cache, devices, jobs, args.items, [name for name in args.keep.split(",") if name],
                     args.together or (TOGETHER if cuda else 1))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    sys.exit(min(1, cli()))
