"""All that the tables and pictures of the README's section on speed come from, one benchmark after another into one CSV:

    python -m bench.readme --csv docs/runs/bench-h100.csv --minutes 25        # an estimated 20 minutes on an H100
    python -m bench.readme --csv docs/runs/bench-h100.csv --only step         # one kind; --list prints the commands and runs nothing
    python -m bench.plot docs/runs/bench-h100.csv --out docs/figures

A benchmark is not started when the time left is shorter than its estimate; the most important come first. Rows are appended, and the last
of equal ones counts (bench/results.py), so a run that was cut short goes on with --only.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

GPT2 = "--dense --preset=paper-d512-e8-k2 --d-model=768 --n-layers=12 --n-heads=12 --n-kv-heads=12 --head-dim=64 --d-expert=1024 --vocab-size=50304"
WIDE = "--preset=paper-d1024-e16-k2 --vocab-size=50304 --seq-len=2048"
SMALL = (
    "--preset=tiny --d-model=256 --n-heads=8 --n-kv-heads=8 --n-layers=6 --d-expert=128 --seq-len=256 --batch-size=32"
)
TEXT = (
    "--preset=paper-d512-e16-k2 --vocab-size=16384 --seq-len=1024 --batch-size=64"  # the model of the runs on real text
)
STEP = "--optimizer=adamw --compile=true"


class Run(NamedTuple):
    kind: str  # module of bench
    arguments: str
    seconds: int  # an estimate for an H100 with 16 cores and an empty compilation cache: steps, generation and hf_layer took about that, the rest is a guess


RUNS = (
    Run("layer", "--graph", 100),
    Run("step", f"{STEP} {WIDE} --batch-size=16", 60),
    Run("step", f"{STEP} {WIDE} --batch-size=16 --dense", 40),
    *(Run("step", f"{STEP} {WIDE} --batch-size={batch} --n-experts=64 --weights=bfloat16", 60) for batch in (16, 20)),
    Run("step", f"{STEP} {GPT2} --seq-len=1024 --batch-size=64", 45),
    Run("step", f"{STEP} --preset=paper-d512-e64-k4 --batch-size=8", 45),
    Run("step", f"{STEP} --preset=paper-d512-e64-k4 --batch-size=8 --dense", 40),
    Run("generation", "", 100),
    Run("hf_layer", "", 60),
    Run("layer", "--at 32768,512,1024 8192,2048,4096 --experts=8,...,256 --topk=2,8 --impl=triton", 120),
    Run("layer", "--routing=zipf1.5,balanced --impl=triton", 60),
    Run("layer", "--experts=8,...,256 --topk=1,...,16 --impl=triton,grouped_mm", 180),
    Run("kernels", "", 60),
    *(Run("step", f"{STEP} {TEXT} --impl={impl}", 60) for impl in ("triton", "grouped_mm")),
    Run("step", f"--optimizer=adamw --compile=false --repeats=5 {TEXT} --impl=reference", 60),
    *(Run("step", f"{STEP} {SMALL} --n-experts={e}", 30) for e in (8, 32, 128)),
)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = list(dict.fromkeys(run.kind for run in RUNS))
    parser.add_argument(
        "--csv", type=Path, default=Path("mine.csv"), help="append the rows to this file (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=25, help="time limit (default: %(default)s)")
    parser.add_argument("--only", choices=kinds, help="benchmarks of one kind")
    parser.add_argument("--list", action="store_true", help="print the commands only")
    args = parser.parse_args(argv)
    ends, failed = time.monotonic() + 60 * args.minutes, 0
    if not args.list and not torch.cuda.is_available():
        return "error: these sizes need a GPU; --list prints the commands"
    for run in RUNS:
        if args.only not in (None, run.kind):
            continue
        words = ["-m", f"bench.{run.kind}", *run.arguments.split(), "--csv", str(args.csv)]
        left = ends - time.monotonic()
        if args.list:
            print("python", *words)
        elif left < run.seconds:
            print(f"{left:.0f} s left, not started ({run.seconds} s): python", *words, flush=True)
        else:
            print("\npython", *words, flush=True)
            try:
                failed += subprocess.run([sys.executable, *words], timeout=left).returncode != 0
            except subprocess.TimeoutExpired:
                failed += 1
                print("cut off: the time is over; the rows so far are in the file", flush=True)
    return f"error: {failed} of these benchmarks failed or were cut off" if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
