"""Run what is missing of a grid of runs, in parallel, within a time limit:  python -m study.sweep PRESET,PRESET --minutes 9

One JSON line is appended for every finished run (study/execute.py says what is in it); what the file already has is skipped, so the
same command goes on where the last one stopped, on whatever day and machine. A run that was cut off leaves nothing and is done again.
The order of each grid is such that whatever is finished is useful: what decides a claim for the least time comes first.

presets   smoke    two tiny runs: does it work, on a CPU in seconds
          pilot    which people, problems and expressions are neither out of reach nor child's play
          main     E 4..256 x k 1..8 at one width, 3 seeds, 2^24 tokens at three learning rates and 2^26 at the best; 4,000 different problems
          lr       main at 2^24 tokens and one rate beyond the three, where the first sweep found the best at the edge
          scarce   the same E at k = 2 and 8, 2^24 tokens, with 1,000 different problems only
          long     the same as main at k = 2 and 8, 2^28 tokens
          topk     k 1..8 with k * d_expert and E * d_expert fixed, three rates: equal active and total parameters
          init     smaller and larger initial weights
          width    half and twice the width, three rates
          adamw    the deciding points again with the paper's optimiser, three rates
          family   main at k = 2 and 8, 2^24 tokens and the best rates: with --keep=all the models that study.posttrain starts from
          full     main, lr, topk, scarce and init in the order of what they teach per minute
          text     prepared text (--data DIR:weight,...), the paper's optimiser at three rates, task loss on the paper's tasks

A run planned with lr 0 takes the best rate of its own (E, k), compared at 2^24 tokens on the same kind of data where there is such a comparison, otherwise
of the nearest, and waits until that is finished. The results file names the rate itself.
"""

import argparse
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
from pathlib import Path

import torch

from data import shards
from data.loader import parse_sources
from optimoe.config import make_directory, require
from study.execute import Run, data_dir, execute_together, form, key, prepare_data
from study.results import alike, answer_loss, append, best, distinct, pool, read, regime_of

JOBS = 3  # processes per GPU: while one or two of them start, compile or measure, work of the CPU for the most part, the others train
TOGETHER = 3  # the seeds, or rates, of one (E, k): on branches of one CUDA graph, where one model alone would leave the GPU waiting for launches
EXPERTS = (256, 4, 32, 128, 8, 64, 16)  # extremes first
TOP_K = (2, 8, 1, 4)
SMOKE = "runs/study/smoke.jsonl"  # what two tiny runs on a CPU measure is no result of the study
SLACK = 1.1  # times its estimate must be left before a run is started: what is cut off is lost
UNUSUAL = (
    "optimizer",
    "n_layers",
    "init_std",
    "batch",
    "people",
    "unique",
    "max_steps",
    "mano_length",
    "modulus",
)  # named in a line where they are
RATES = {"muon": (6e-3, 1.2e-2, 3e-3), "adamw": (4e-3, 2e-3, 8e-3)}
BEYOND = {
    1: 2.4e-2,
    2: 1.5e-3,
    4: 1.5e-3,
    8: 1.5e-3,
}  # of k: in the first sweep the best was the highest rate at k = 1, else the lowest


def smoke(data):
    base = Run(
        d_model=32,
        n_layers=1,
        d_expert=32,
        top_k=1,
        tokens=2**14,
        lr=6e-3,
        batch=4,
        seq_len=96,
        people=20,
        max_steps=2,
        mano_length=2,
        modulus=5,
        data_tokens=2**14,
    )
    return [dataclasses.replace(base, n_experts=e) for e in (2, 4)]


def pilot(data):
    """Which people, problems and expressions are neither out of reach nor child's play, at one end and the other of the grid (docs/STUDY.md)."""
    base = dict(lr=6e-3, data_tokens=2**25)
    scarce = base | dict(people=4_000, unique=4_000, mano_length=3)  # 29 biographies of each in 2^24 tokens
    fresh = base | dict(people=2_000, unique=0, modulus=23, mano_length=2)
    rare = base | dict(people=1_000, unique=1_000, mano_length=4)
    long = base | dict(people=8_000, unique=0, modulus=11, max_steps=10, mano_length=2)
    pairs = [
        scarce,
        fresh,
        rare,
        scarce | dict(tokens=2**25),
        fresh | dict(tokens=2**25),
        long,
        rare | dict(tokens=2**25),
    ]
    runs = [setting | dict(n_experts=e) for setting in pairs for e in (16, 128)]
    runs += [scarce | dict(n_experts=e) for e in (4, 256)] + [
        scarce | dict(n_experts=128, top_k=8),
        scarce | dict(seed=1),
    ]
    runs += [
        setting | dict(n_experts=e, tokens=2**26, data_tokens=2**26) for setting in (scarce, fresh) for e in (16, 128)
    ]
    return [Run(**run) for run in runs]


def sized(tokens, **fields):
    """A run of so many tokens whose people are as many as are met 29 times each."""
    return Run(tokens=tokens, data_tokens=tokens, people=Run.people * tokens // Run.tokens, **fields)


def grid(tokens, rates):
    """Runs of every (E, k) from three seeds; rates: k -> learning rates. Rates change faster than seeds: the first group needs one seed's data."""
    return [
        sized(tokens, n_experts=e, top_k=k, seed=seed, lr=rate)
        for k in TOP_K
        for e in EXPERTS
        if k <= e
        for seed in range(3)
        for rate in rates(k)
    ]


def main(data):
    return grid(2**24, lambda k: RATES["muon"]) + grid(2**26, lambda k: (0.0,))


def lr(data):
    return grid(2**24, lambda k: (BEYOND[k],))


def scarce(data):
    return [
        Run(n_experts=e, top_k=k, seed=seed, unique=1_000)
        for k in (2, 8)
        for e in EXPERTS
        for seed in range(3)
        if k <= e
    ]


def long(data):
    return [
        sized(2**28, n_experts=e, top_k=k, seed=seed) for k in (2, 8) for e in EXPERTS for seed in range(3) if k <= e
    ]


def topk(data):
    return [
        Run(n_experts=8 * total * k, top_k=k, d_expert=256 // k, tokens=2**24, seed=seed, lr=rate)
        for total in (4, 1)
        for k in (1, 8, 2, 4)
        for seed in range(3)
        for rate in RATES["muon"]
    ]


def init(data):
    shapes = ((32, 2), (256, 8))
    return [
        Run(n_experts=e, top_k=k, seed=seed, init_std=std)
        for seed in range(3)
        for e, k in shapes
        for std in (0.05, 0.0125, 0.025, 0.1)
    ]


def width(data):
    return [
        Run(d_model=d, d_expert=d // 2, n_experts=e, top_k=k, seed=seed, lr=rate)
        for d in (64, 256)
        for k in (2, 8)
        for e in (256, 8, 32)
        for seed in range(3)
        for rate in RATES["muon"]
    ]


def adamw(data):
    return [
        Run(optimizer="adamw", n_experts=e, top_k=k, seed=seed, lr=rate)
        for k in (2, 8)
        for e in (256, 8, 32)
        for seed in range(3)
        for rate in RATES["adamw"]
    ]


def family(data):
    return [Run(n_experts=e, top_k=k, seed=seed) for k in (2, 8) for e in EXPERTS for seed in range(3) if k <= e]


def full(data):
    """What decides a claim for the least time first. What takes the best rates of a k comes after all that are compared at this k."""
    short, longer = ([run for run in main(data) if run.tokens == tokens] for tokens in (2**24, 2**26))
    at = lambda runs: [run for run in runs if run.top_k in (2, 8)]  # noqa: E731
    return [*short, *at(lr(data)), *at(longer), *topk(data), *scarce(data), *init(data), *lr(data), *longer]


def text(data):
    if not data:
        raise ValueError(
            "data='': the preset text needs --data DIR:weight,DIR:weight of prepared text (python -m data.prepare)"
        )
    return [
        Run(
            data=data,
            optimizer="adamw",
            d_model=256,
            n_layers=8,
            d_expert=256,
            seq_len=512,
            init_std=0.02,
            tokens=2**25,
            n_experts=e,
            top_k=k,
            seed=seed,
            lr=rate,
        )
        for k in (2, 8)
        for e in (128, 8, 32)
        for seed in range(3)
        for rate in (2e-3, 4e-3, 1e-3)
    ]


PRESETS = {
    preset.__name__: preset
    for preset in (smoke, pilot, lr, main, scarce, long, topk, init, width, adamw, family, full, text)
}


def comparisons(rows, pending=()):
    """[(what its runs share, {rate: {seed: answer loss, None while it is pending}})]: the sets of runs that differ in rate and seed alone."""
    groups = {}
    for other, row in [*((row["run"], row) for row in distinct(rows)), *((vars(each), None) for each in pending)]:
        if other["lr"]:
            group = tuple((field, value) for field, value in other.items() if field not in ("lr", "seed"))
            groups.setdefault(group, {}).setdefault(other["lr"], {}).setdefault(other["seed"], row and answer_loss(row))
    return [
        (dict(group), rates)
        for group, rates in groups.items()
        if len(rates) > 1 and set.intersection(*map(set, rates.values()))
    ]


def best_rate(run, compared):
    """The best learning rate (results.best) at the nearest (E, k) of `comparisons` among models of the same shape; of equals that of the same k, of the
    same data, of fewest tokens. None without one, and while runs of it are pending."""
    wanted = regime_of(vars(run))
    away = lambda group, field: abs(math.log2(group[field] / getattr(run, field)))  # noqa: E731
    far = lambda group: (
        away(group, "n_experts") + away(group, "top_k"),
        away(group, "top_k"),
        group["init_std"] != run.init_std,  # noqa: E731
        pool(regime_of(group)) != pool(wanted),
        group["tokens"],
    )
    near = min(
        (entry for entry in compared if alike(regime_of(entry[0]), wanted)),
        key=lambda entry: far(entry[0]),
        default=None,
    )
    if near is None or any(loss is None for seeds in near[1].values() for loss in seeds.values()):
        return None
    return best(near[1])


def rated(runs, rows, pending=()):
    """{key: run}: `runs` with the learning rates that are known by now. One planned with rate 0 may turn out to be another that names its rate."""
    compared = comparisons(rows, [*pending, *runs])
    return {
        key(run): run
        for run in (run if run.lr else dataclasses.replace(run, lr=best_rate(run, compared) or 0.0) for run in runs)
    }


def settle(runs, rows, pending=(), again=lambda run: False):
    """`rated` as a list, less what is finished (and not wanted `again`) or pending (other runs than these)."""
    finished, started = {row["key"] for row in rows}, set(map(key, pending))
    return [
        run
        for name, run in rated(runs, rows, pending).items()
        if name not in started and (name not in finished or again(run))
    ]


def estimate(run, rows, device):
    """Seconds that a run will take, from the most similar finished one on this device, of several the last, which compiled least; None when there
    is none."""
    sizes = lambda r: [math.log2(r[name]) for name in ("tokens", "d_model", "n_experts", "top_k", "n_layers")]  # noqa: E731
    wanted = dataclasses.asdict(run)
    known = [row for row in rows if row["device"] == device and not row["diverged"]]
    if not known:
        return None
    near = min(
        reversed(known), key=lambda row: sum(abs(a - b) for a, b in zip(sizes(row["run"]), sizes(wanted), strict=True))
    )
    return (
        near["seconds"] + (run.tokens - near["tokens"]) / near["tokens_per_s"]
    )  # compiling and measuring take as long in longer runs


def gpu_minutes(runs, rows):
    """Minutes of one GPU that runs take, on the GPU of the last row; None before there is one."""
    gpu = [row for row in rows if not row["device"].startswith("CPU")][-1:]
    times = {form(run): estimate(run, rows, gpu[0]["device"]) / gpu[0]["jobs"] / 60 for run in runs if gpu}
    return sum(times[form(run)] for run in runs) if gpu else None


def check_writable(results, cache):
    """Raise ValueError now, not after the first run, where one of the two cannot be written."""
    make_directory(Path(results).parent, "results", str(results))
    make_directory(cache, "cache", str(cache))
    try:
        open(results, "ab").close()
    except OSError as error:
        require(False, "results", str(results), f"cannot be written ({error.strerror}); name another file")


def work(device, threads, cache, items, inbox, outbox):
    """A worker process: runs what comes, until None comes."""
    torch.set_num_threads(threads)
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device))
    while (task := inbox.get()) is not None:
        runs, keep = task
        try:
            outbox.put((key(runs[0]), execute_together(runs, cache, device, items, keep)))
        except (
            Exception
        ) as error:  # one bad run must not end a sweep; it is reported, and tried again by the next sweep
            outbox.put((key(runs[0]), traceback.format_exc(limit=-4)))
            if "CUDA error" in str(error):
                return  # nothing works after that in this process


def threads_of(processes):
    return max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // processes))


def sweep(runs, results, minutes, cache="runs/study", devices=("cpu",), jobs=1, items=100, keep=(), together=1):
    """Run what is missing of `runs` (a list of Run, in this order) and append to the file `results`. Returns how many failed or were killed.

    minutes: no run is started that is not expected to end in time, and what still runs then is dropped; 0 only reports.
    jobs: processes per device. together: runs of one form that a process trains side by side.
    keep: names like "E16k2", or "all", whose final weights are kept under cache/weights; what is finished without them is run again for them."""
    began = time.monotonic()
    ends = began + 60 * minutes
    rows = read(results, optional=True)
    before = len(rows)

    def kept(run):
        return f"{cache}/weights/{key(run)}" if f"E{run.n_experts}k{run.top_k}" in keep or "all" in keep else None

    def weightless(
        run,
    ):  # results.json is written last: a directory without it was cut off. What diverged has no weights, however often it is run
        if not kept(run) or os.path.exists(f"{kept(run)}/results.json"):
            return False
        name = key(run)
        return not any(row["key"] == name and row["diverged"] for row in rows)

    todo = settle(runs, rows, again=weightless)
    name = (
        torch.cuda.get_device_name(devices[0]) if devices[0].startswith("cuda") else f"CPU, {threads_of(jobs)} threads"
    )
    lanes = min(len(devices) * jobs, max(1, len(todo)))

    def left():
        rest, planned = [*todo, *in_flight(), *failed], len(rated(runs, rows))
        if not rest:
            return f"all {planned} runs are finished"
        times = {form(run): estimate(run, rows, name) for run in {form(run): run for run in rest}.values()}
        seconds = [times[form(run)] for run in rest]
        when = "no estimate yet" if None in seconds else f"about {sum(seconds) / lanes / 60:.1f} minutes"
        return f"{len(rest)} of {planned} runs left, {when}"

    def in_flight():
        return [run for runs in running.values() for run in runs]

    running, failed, lost = {}, [], 0  # running: first key of a group -> its runs
    print(f"{results}: {left()} on {len(devices)} x {name}, {jobs} at a time on each", flush=True)
    if not todo or not minutes:
        if cost := gpu_minutes(todo, rows):
            print(f"about {cost:.1f} minutes of one GPU like the last; the first rows come after a minute more")
        return 0
    check_writable(results, cache)
    data, builder = {}, ThreadPoolExecutor(1)  # directories are built in order, meanwhile what has its own is trained
    for run in todo:
        if not run.data and data_dir(run, cache) not in data:
            data[data_dir(run, cache)] = builder.submit(prepare_data, run, cache, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    threads = threads_of(jobs * len(devices))
    arguments = [(devices[i % len(devices)], threads, cache, items, inbox, outbox) for i in range(lanes)]
    workers = [context.Process(target=work, args=each, daemon=True) for each in arguments]
    # Triton's default, for all workers: inductor would give each a directory of its own.
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
    interrupted = signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # workers inherit it: Ctrl-C reaches them too, and it is the parent who ends them
    for worker in workers:
        worker.start()
    signal.signal(signal.SIGINT, interrupted)
    try:
        while (todo or running) and time.monotonic() < ends:
            alive, lost = (
                sum(worker.is_alive() for worker in workers),
                sum(worker.exitcode not in (None, 0) for worker in workers),
            )
            while len(running) < alive + lost and (members := choose_group(todo, rows, ends, name, together)):
                try:
                    for run in members:
                        if not run.data:
                            data[data_dir(run, cache)].result()
                except Exception as error:  # no data, no run; others have theirs
                    failed += members
                    print(f"FAILED: no data: {error} in {members}", flush=True)
                    todo = settle([run for run in todo if run not in members], rows, in_flight(), weightless)
                    continue
                for run in members:
                    todo.remove(run)
                running[key(members[0])] = members
                inbox.put((members, [kept(run) for run in members]))
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
                if len(failed) >= 3 * together and len(rows) == before:
                    break  # nothing works
                found = []
            for row in found:
                row["jobs"] = jobs  # that shared the device: its seconds are 1 / jobs of the device's
                append(results, row)
                rows.append(row)
                print(
                    f"{time.monotonic() - began:5.0f} s: {line(row)}" + (f" | {left()}" if row is found[-1] else ""),
                    flush=True,
                )
            todo = settle(todo, rows, in_flight(), weightless)
    finally:
        builder.shutdown(wait=False, cancel_futures=True)
        for _ in workers:
            inbox.put(None)
        for worker in workers:
            worker.join(timeout=0 if running else 5)
            if worker.is_alive():
                worker.terminate()  # its run is not in the file and will be done again
        print(
            f"{left()}"
            + (f", {len(failed)} failed" if failed else "")
            + (f", {len(in_flight())} cut off" if running else "")
            + (f", {lost} worker processes killed, perhaps for want of memory: use fewer --jobs" if lost else "")
            + (
                "; the data directory in work is finished first"
                if any(each.running() for each in data.values())
                else ""
            ),
            flush=True,
        )
    if waiting := sum(not run.lr for run in todo):
        print(
            f"{waiting} runs wait for learning rates of their shape: run the preset that compares them (or this one again)"
        )
    return len(failed) + lost


def choose(todo, rows, ends, name):
    """The next run that has its learning rate and can end in time, or None."""
    times = {}
    for run in (run for run in todo if run.lr):
        if form(run) not in times:
            times[form(run)] = estimate(run, rows, name)
        seconds = times[form(run)]
        if seconds is None or time.monotonic() + SLACK * seconds < ends:
            return run
    return None


def choose_group(todo, rows, ends, name, most):
    """What `choose` says and up to most - 1 runs of its form that can start, too; [] when nothing can."""
    group, waiting = [], todo
    while len(group) < most and (found := choose(waiting, rows, ends, name)):
        group.append(found)
        waiting = [run for run in todo if form(run) == form(found) and run not in group]
        ends -= estimate(found, rows, name) or 0.0
    return group


def line(row):
    """A finished run for people."""
    run = row["run"]
    head = (
        f"d={run['d_model']} E={run['n_experts']} k={run['top_k']} F={run['d_expert']} lr={row['lr']:g} tokens={row['tokens'] / 1e6:.1f}M "
        f"seed={run['seed']}" + "".join(f" {name}={run[name]}" for name in UNUSUAL if run[name] != getattr(Run, name))
    )
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
    parser.add_argument("--results", help=f"default: study/results.jsonl; with the preset smoke {SMOKE}")
    parser.add_argument(
        "--minutes", type=float, default=9, help="time limit; 0: only say what is left (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=0, help="processes per device (default: 3 on a GPU, 1 on the CPU)")
    parser.add_argument(
        "--together",
        type=int,
        default=0,
        help="runs of one (E, k) that a process trains side by side (default: 3 on a GPU, else 1)",
    )
    parser.add_argument(
        "--cache", default="runs/study", help="where data directories and kept weights go (default: %(default)s)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--data", default="", help="for the preset text: DIR:weight,DIR:weight")
    parser.add_argument(
        "--keep", default="", help="models whose final weights are kept under CACHE/weights: all, or E16k2,E64k2"
    )
    parser.add_argument(
        "--items",
        type=int,
        default=100,
        help="size of the measurements: problems per number of steps (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    cuda = args.device == "cuda" or args.device == "auto" and torch.cuda.is_available()
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if cuda else ["cpu"]
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda': no CUDA device is visible; use --device=cpu")
        for name in (names := args.presets.split(",")):
            require(name in PRESETS, "preset", name, f"use {', '.join(PRESETS)}")
        for name, least, remedy in (
            ("minutes", 0, "use 0 (only say what is left) or more"),
            ("jobs", 0, "use 1 or more, or 0 for the default"),
            ("together", 0, "use 1 or more, or 0 for the default"),
            ("items", 1, "use 1 or more"),
        ):
            require(getattr(args, name) >= least, name, getattr(args, name), remedy)
        for directory, _ in parse_sources(args.data) if args.data else ():
            require(
                (Path(directory) / shards.META).exists(),
                "data",
                args.data,
                f"{directory} holds no {shards.META}; make it with python -m data.prepare",
            )
        runs = [run for name in names for run in PRESETS[name](args.data)]
        jobs, keep = args.jobs or (JOBS if cuda else 1), [name for name in args.keep.split(",") if name]
        models = {f"E{run.n_experts}k{run.top_k}" for run in runs} | {"all"}
        require(models >= set(keep), "keep", args.keep, "name models of these presets, such as E16k2, or all")
        results = args.results or (SMOKE if "smoke" in names else "study/results.jsonl")
        return sweep(
            runs,
            results,
            args.minutes,
            args.cache,
            devices,
            jobs,
            args.items,
            keep,
            args.together or (TOGETHER if cuda else 1),
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    for stop in (signal.SIGTERM, signal.SIGINT):  # a time limit from outside, Ctrl-C: either ends the workers too
        signal.signal(stop, lambda number, _: sys.exit(128 + number))
    sys.exit(min(1, cli()))
