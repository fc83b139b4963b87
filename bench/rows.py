"""The one CSV schema of all benchmarks, and their common flags.

kernel           a kernel, "layer" (experts, routing given), "step", "step-family" (kernels of a step), "node",
                 "generate", "hf-block", or "ceiling" (the largest matrix product and copy)
implementation   triton, grouped_mm, reference, gemms (cuBLAS products of the same FLOPs, nothing else), a peer, a model
mode             forward, backward, full, or a part; "-graph": from a CUDA graph, as single kernels always are on a GPU
T D F E K        sizes; dtype; routing: softmax or zipf1.5
p20 p50 p80_ms   quantiles of the time; backward = full - median forward
tflops gb_s      at p50, from the FLOPs and the fewest bytes that the operation needs
ceiling          fraction of `gemms` for a layer, of its roofline for a kernel, of the GPU's peak for a step
peak_mib         peak of forward + backward above the inputs; saved_mib: kept for backward, x included
share            of the speed of single GPUs; nccl_ms: communicating kernels, exposed_ms: while no other kernel runs
python_ms        time in which Python launches the layer's kernels
"""

import csv
import datetime
import io
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import triton

from bench.problem import Cost, Shape
from bench.timing import times_ms
from data import files
from optimoe.config import check_file

ADDED = ["share", "exposed_ms", "nccl_ms", "python_ms"]  # older files lack these columns
COLUMNS = "kernel implementation mode T D F E K dtype routing p20_ms p50_ms p80_ms tflops gb_s ceiling".split()
COLUMNS += "peak_mib saved_mib gpu torch triton revision date".split() + ADDED
KEY = COLUMNS[:10] + ["gpu"]
INTEGERS, FLOATS = COLUMNS[3:8], COLUMNS[10:18] + ADDED
SHORT = {torch.bfloat16: "bf16", torch.float32: "fp32"}
NOTHING = Cost(0, 0)


class Ceilings(NamedTuple):
    tflops: float  # of one large cuBLAS matrix product
    tb_s: float  # of one large copy, bytes read + bytes written


@dataclass(frozen=True)
class BenchConfig:
    # Results
    csv: str = ""  # append the rows to this file
    revision: str = ""  # git revision to write into the rows; empty: ask git
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA, float32 elsewhere


def revision():
    """The git revision of this repository, with "+" when tracked files differ from it; "unknown" outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Results:
    """The rows of this run, printed and appended to the CSV one by one."""

    def __init__(self, cfg):
        cuda = torch.cuda.is_available()
        auto = "bfloat16" if cuda else "float32"
        self.path, self.rows, self.dtype = cfg.csv, [], getattr(torch, auto if cfg.dtype == "auto" else cfg.dtype)
        if self.path:
            append(self.path)  # an unusable file is found early
        self.environment = {
            "dtype": SHORT[self.dtype],
            "gpu": torch.cuda.get_device_name() if cuda else f"CPU {platform.machine()}",
            "torch": torch.__version__,
            "triton": triton.__version__,
            "revision": cfg.revision or revision(),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ"),
        }
        print("  ".join(f"{name} {value}" for name, value in self.environment.items()))
        if not cuda:
            print("No GPU: small sizes show that everything runs. The numbers mean nothing about GPUs.")
            torch.set_num_threads(1)  # with small sizes a second thread only waits
        print(HEADER)

    def add(self, kernel, implementation, mode, shape, times, cost=NOTHING, note="", quiet=False, **columns):
        """Add a row and return it. The note is printed, not stored; with `quiet` nothing is printed."""
        row = dict.fromkeys(COLUMNS) | self.environment | shape._asdict()
        row |= dict(kernel=kernel, implementation=implementation, mode=mode, routing="")
        row |= dict(zip(("p20_ms", "p50_ms", "p80_ms"), times, strict=True))
        row |= {"tflops": cost.flops / times.p50 * 1e-9, "gb_s": cost.bytes / times.p50 * 1e-6} | columns
        row = {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in row.items()}
        self.rows.append(row)
        if self.path:
            append(self.path, row)
        if not quiet:
            print(f"{line(row)}   {note}".rstrip(), flush=True)
        return row

    def add_ceilings(self):
        """Measures one large matrix product and one large copy of random data; adds their rows."""
        device, n, size = ("cuda", 8192, 2**30) if torch.cuda.is_available() else ("cpu", 256, 2**22)
        a, b = (torch.randn(n, n, device=device).to(self.dtype) for _ in range(2))
        source = torch.randint(255, (size,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        gemm, copy = (lambda: a @ b), (lambda: target.copy_(source))
        gemm(), copy()
        times = times_ms(gemm), times_ms(copy)
        gemm = self.add("ceiling", "cublas", "gemm", Shape(n, n, n, 1, 1), times[0], Cost(2 * n**3, 0))
        copy = self.add("ceiling", "torch", "copy", Shape(size, 1, 1, 1, 1), times[1], Cost(0, 2 * size))
        return Ceilings(gemm["tflops"], copy["gb_s"] / 1e3)

    def finish(self, failures=()):
        """Prints what was skipped. Exit code: 1 if nothing was measured."""
        for failure in failures:
            print("skipped", failure)
        aside = [row["kernel"] == "ceiling" or row["implementation"] == "gemms" for row in self.rows]
        return int(bool(failures) and all(aside))


# Printed columns and their decimals.
SHOWN = dict(p20_ms=4, p50_ms=4, p80_ms=4, tflops=1, gb_s=0, ceiling=3, peak_mib=0, saved_mib=0)
HEADER = f"{'T,D,F,E,K':<26}{'kernel':<13}{'implementation':<15}{'mode':<15}"
HEADER += "".join(f"{name:>10}" for name in SHOWN)


def line(row):
    text = f"{shape_of(row)!s:<26}{row['kernel']:<13}{row['implementation']:<15}{row['mode']:<15}"
    return text + "".join(f"{row[name]:>10.{n}f}" if row[name] else f"{'-':>10}" for name, n in SHOWN.items())


def shape_of(row):
    return Shape(*(row[letter] for letter in "TDFEK"))


def lines_of(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writerows({name: "" if value is None else value for name, value in row.items()} for row in rows)
    return text.getvalue()


def append(path, *rows):
    """Add rows to a CSV, on new lines even after an interrupted write. ValueError if its columns differ.

    A file of an earlier version first gets the columns that it lacks."""
    path, header = Path(path), ",".join(COLUMNS)
    check_file(path, "csv")
    text = files.read_text(path) if path.exists() else ""
    if text.partition("\n")[0] != header:
        old = parse(text, str(path)) if text else []
        text = f"{header}\n{lines_of(old)}"
        files.replace(path.resolve(), text)
    with open(path, "a") as file:
        if not text.endswith("\n"):
            file.write("\n")
        file.write(lines_of(rows))
        file.flush()
        os.fsync(file.fileno())


def parse(text, where="CSV"):
    """Rows of a CSV's text, numbers as numbers and empty cells as None. Lines cut short are named and left out."""
    lines = text.splitlines()
    header = lines[0].split(",") if lines else []
    if header not in (COLUMNS, COLUMNS[: -len(ADDED)]):
        raise ValueError(f"{where}: its columns are not those of benchmarks; name another file")
    rows = []
    for number, raw in enumerate(csv.DictReader(lines), 2):
        try:
            if None in raw or None in raw.values():
                raise ValueError("wrong number of cells")
            row = dict.fromkeys(COLUMNS) | raw
            row |= {name: int(row[name]) for name in INTEGERS}
            if min(row[name] for name in INTEGERS) < 1:
                raise ValueError("a size below 1")
            row |= {name: float(row[name]) if row[name] else None for name in FLOATS}
            rows.append(row)
        except ValueError as error:
            print(f"{where}, line {number}: left out ({error})", file=sys.stderr)
    return rows


def read(path):
    return parse(files.read_text(path), str(path))


def latest(rows):
    """The last row of each KEY: {key: row}, in order of first appearance."""
    return {tuple(row[name] for name in KEY): row for row in rows}
