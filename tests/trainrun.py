"""What tests of training runs share: flags of a small run, what to look at and compare in its directory, ports."""

import contextlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

import train
from optimoe import checkpoint

ROOT = Path(train.__file__).parent
SMALL = (
    "--d-model=32 --n-layers=2 --n-heads=2 --n-kv-heads=2 --head-dim=16 --n-experts=4 --d-expert=32 --init-std=0.1 "
    "--seq-len=16 --batch-size=8 --steps=8 --warmup-steps=3 --lr=1e-2 --log-every=3 --val-every=4 --val-batches=2 "
    "--checkpoint-every=4 --keep-checkpoints=9 --sample-tokens=4 --device=cpu --curves=false"
).split()
TIMES = ("tokens_per_s", "memory_gb", "mfu")
PORTS = itertools.count(20_000 + 97 * os.getpid() % 10_000)  # other processes begin elsewhere


def run(data_dir, out_dir, *flags):
    return train.main([*SMALL, f"--data={data_dir}", f"--out-dir={out_dir}", *flags])


def rows(run_dir):
    """metrics.jsonl without the measurements of time and memory."""
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def final_state(run_dir):
    return checkpoint.read(run_dir)


def flat(value, prefix=""):
    """Leaves of nested dicts and lists as {path: leaf}."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: leaf for key, part in items for path, leaf in flat(part, f"{prefix}/{key}").items()}
    return {prefix: value}


def differences(a, b):
    """Paths where two checkpoints differ in any bit, the run's own name and length aside."""
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    same = lambda x, y: torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y  # noqa: E731
    own = "/config/out_dir", "/config/resume", "/config/checkpoint_every"
    return [key for key in a if not same(a[key], b[key]) and key not in own]


def cut_at(whole, out, step):
    """What a run killed after `step`, and some logging beyond it, leaves behind."""
    shutil.copytree(whole, out)
    (out / "results.json").unlink()
    for at, path in checkpoint.find(out):
        if at > step:
            path.unlink()
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:10])  # a torn last line
    return out


def snapshot(path):
    return {p.relative_to(path): p.read_bytes() for p in Path(path).rglob("*") if p.is_file() and p.name != "lock"}


def free_port():
    """A port below those that the kernel gives to whoever asks for any, so that nobody takes it before its user."""
    for port in PORTS:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("", port))
            return port


def gloo_threads():
    """Names of this process's threads of gloo. One that was joined may still be listed for a moment."""
    found = []
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has ended since
            found.append(Path("/proc/self/task", thread, "comm").read_text())
    return [name for name in found if "gloo" in name]


def wait_for(condition, seconds=60):
    """condition() as soon as it is true, or when the time is over."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def launch(*flags, ranks=2, **options):
    """A process of train.py, or of torchrun."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *several, "train.py", *flags], cwd=ROOT, env=env, **pipes, **options)
