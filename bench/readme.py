"""The measurements of the README's section on speed, one after another into one CSV, most important first.

python -m bench.readme --csv=mine.csv  # about 25 minutes on an H100; --list prints the commands and runs nothing
"""

import shlex
import subprocess
import sys
from dataclasses import dataclass

import torch

from optimoe import config

WIDE = "--preset=paper-d1024-e16-k2 --vocab_size=50304 --seq_len=2048"
GPT2 = "--dense --preset=paper-d512-e8-k2 --d_model=768 --n_layers=12 --n_heads=12 --n_kv_heads=12 --head_dim=64"
GPT2 += " --d_expert=1024 --vocab_size=50304 --seq_len=1024 --batch_size=64"
NARROW = "--preset=paper-d512-e64-k4 --vocab_size=50304 --seq_len=2048 --batch_size=16"
TEXT = "--preset=paper-d512-e16-k2 --vocab_size=16384 --seq_len=1024 --batch_size=64"  # of the runs on real text


def sweep(sizes, *ks):
    """Layer shapes T,D,F,E,K of the sizes T,D,F, for six numbers E of experts and each K of ks."""
    return " ".join(f"{sizes},{E},{K}" for E in (8, 16, 32, 64, 128, 256) for K in ks if K <= E)


RUNS = f"""
layer       --graph --peers=sonicmoe,liger
step        {WIDE} --batch_size=16
step        {WIDE} --batch_size=16 --dense
step        {WIDE} --batch_size=16 --n_experts=64 --weights=bfloat16
step        {WIDE} --batch_size=20 --n_experts=64 --weights=bfloat16
step        {GPT2}
step        {NARROW}
step        {NARROW} --dense
generation
layer       {sweep("32768,512,1024", 2, 8)} --impl=triton
layer       {sweep("8192,2048,4096", 2, 8)} --impl=triton
layer       {sweep("32768,1024,2048", 1, 2, 4, 8, 16)} --impl=triton
kernels
step        {TEXT}
step        {TEXT} --impl=grouped_mm
"""


@dataclass(frozen=True)
class Config:
    csv: str = "mine.csv"  # append the rows to this file
    list: bool = False  # print the commands only


def main(argv=None):
    cfg, failed = config.parse(Config, argv, __doc__), 0
    config.require(cfg.list or torch.cuda.is_available(), "list", cfg.list, "these sizes need a GPU; use --list")
    for kind, *flags in map(str.split, RUNS.strip().splitlines()):
        if kind == "step":
            flags += ["--optimizer=adamw", "--compile=true"]
        command = ["-m", f"bench.{kind}", *flags, f"--csv={cfg.csv}"]
        print(shlex.join(["python", *command]), flush=True)
        failed += not cfg.list and subprocess.run([sys.executable, *command]).returncode != 0
    return f"error: {failed} of these benchmarks failed" if failed else 0


if __name__ == "__main__":
    raise SystemExit(config.command_line(main))
