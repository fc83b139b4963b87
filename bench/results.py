"""One CSV schema for every benchmark, and the command line they share.

kernel           what ran: a kernel's name, "layer" (experts, routing given), "layer+router", "routing" (router, top-k, dispatch), "step",
                 "step-family" (a family of a step's kernels, its name as the mode), or "ceiling" (the machine's largest matrix product and copy)
implementation   triton, grouped_mm, reference, gemms (cuBLAS products of the same FLOPs, nothing else), torch, or a peer
mode             forward, backward, full, or a part; "-graph" when replayed from a CUDA graph (single kernels always are, on a GPU)
T D F E K        sizes (README); dtype; routing: softmax, balanced, zipfA
p20 p50 p80_ms   quantiles of the time; backward = full - median forward
tflops gb_s      at p50, from the FLOPs and the fewest bytes that the operation needs
ceiling          fraction of the ceiling: of `gemms` for a layer, of its own roofline for a kernel, of the GPU's peak (MFU) for a step
peak_mib         peak of forward + backward above the inputs; saved_mib: kept for backward, x included, weights and routing not
gpu torch triton revision date
"""

import argparse
import csv
import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
import triton

from bench.problem import Cost, Shape
from bench.timing import Ceilings, measure_ceilings

COLUMNS = (
    "kernel implementation mode T D F E K dtype routing p20_ms p50_ms p80_ms tflops gb_s ceiling peak_mib saved_mib gpu torch triton revision date"
).split()
KEY = COLUMNS[:10] + ["gpu"]
INTEGERS, FLOATS = COLUMNS[3:8], COLUMNS[10:18]
INSTALL = {"matplotlib": "'optimoe[plot]'", "transformers": "'transformers>=5'"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def revision():
    """Short git revision of this file's repository, with "+" when tracked files differ from it; "unknown" outside git."""
    git = lambda *args: (
        subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout
    )  # noqa: E731
    try:
        return git("rev-parse", "--short", "HEAD").strip() + (
            "+" if git("status", "--porcelain", "-uno").strip() else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def arguments(description):
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--csv", type=Path, help="append the rows to this file (created with a header)")
    parser.add_argument(
        "--compare",
        metavar="REV_OR_CSV",
        help="baseline: a CSV, or a git revision for its committed copy of --csv; regressions exit with status 1",
    )
    parser.add_argument("--revision", default=None, help="git revision to write into the rows (default: ask git)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if torch.cuda.is_available() else "fp32")
    return parser


def typed(parse):
    """`parse` as the type of an argument: argparse shows the text of this exception, but not that of a ValueError."""

    def convert(text):
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(error) from error

    return convert


def cli(main):
    """main() of a benchmark for the command line: a wrong argument or file or a missing library is one line, with DEBUG set a traceback."""
    try:
        return main()
    except (ValueError, OSError, ImportError) as error:
        if "DEBUG" in os.environ:
            raise
        library = (getattr(error, "name", None) or "").split(".")[0]
        return f"error: {error}" + (f"; pip install {INSTALL[library]}" if library in INSTALL else "")


class Results:
    """The rows of this run, printed and appended to the CSV one by one, so that whatever fails later loses none of them."""

    def __init__(self, args):
        self.path, self.rows = args.csv, []
        if self.path:
            append(self.path)  # a file that takes no rows is found before anything is measured
        self.environment = {
            "dtype": args.dtype,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}",
            "torch": torch.__version__,
            "triton": triton.__version__,
            "revision": args.revision or revision(),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ"),
        }
        print("  ".join(f"{name} {value}" for name, value in self.environment.items()))
        if not torch.cuda.is_available():
            print("No GPU: tiny shapes, to show that everything runs. The numbers mean nothing about GPUs.")

    def add(
        self,
        kernel,
        implementation,
        mode,
        shape,
        times,
        cost=Cost(0, 0),
        routing="",
        ceiling_ms=None,
        note="",
        quiet=False,
        **more,
    ):
        """One row; `ceiling_ms` is the least possible time, `more` are columns by name. The note is printed, not stored; with `quiet` nothing is."""
        row = (
            dict.fromkeys(COLUMNS)
            | self.environment
            | dict(kernel=kernel, implementation=implementation, mode=mode, routing=routing)
        )
        row |= dict(zip("TDFEK", shape, strict=True)) | dict(zip(("p20_ms", "p50_ms", "p80_ms"), times, strict=True))
        row |= {
            "tflops": cost.flops / times.p50 * 1e-9,
            "gb_s": cost.bytes / times.p50 * 1e-6,
            "ceiling": ceiling_ms and ceiling_ms / times.p50,
        }
        row = {
            name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in (row | more).items()
        }
        self.rows.append(row)
        if self.path:
            append(self.path, row)
        if not quiet:
            print(line(row) + ("   " + note if note else ""), flush=True)
        return row

    def add_ceilings(self):
        """Measures what this machine can do, writes it as rows and returns it."""
        n, gemm, size, copy = measure_ceilings(DTYPES[self.environment["dtype"]])
        gemm = self.add("ceiling", "cublas", "gemm", Shape(n, n, n, 1, 1), gemm, Cost(2 * n**3, 0))
        copy = self.add("ceiling", "torch", "copy", Shape(size, 1, 1, 1, 1), copy, Cost(0, 2 * size))
        return Ceilings(gemm["tflops"], copy["gb_s"] / 1e3)


HEADER = (
    f"{'T,D,F,E,K':<26}{'kernel':<13}{'implementation':<15}{'mode':<15}{'p20 ms':>10}{'p50':>10}{'p80':>10}"
    f"{'TFLOP/s':>9}{'GB/s':>7}{'ceiling':>9}{'peak MiB':>10}{'saved':>8}"
)


def line(row):
    number = lambda name, width, digits: (
        f"{row[name]:>{width}.{digits}f}" if row[name] not in (None, 0) else " " * (width - 1) + "-"
    )  # noqa: E731
    sizes = ",".join(str(row[name]) for name in "TDFEK")
    return (
        f"{sizes:<26}{row['kernel']:<13}{row['implementation']:<15}{row['mode']:<15}"
        + "".join(number(name, 10, 4) for name in ("p20_ms", "p50_ms", "p80_ms"))
        + number("tflops", 9, 1) + number("gb_s", 7, 0) + number("ceiling", 9, 3) + number("peak_mib", 10, 0) + number("saved_mib", 8, 0)
    )  # fmt: skip


def append(path, *rows):
    """Add rows to a CSV, at once and on lines of their own even after an interrupted write. Raises ValueError if the file has other columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.exists() else ""
    if text and text.splitlines()[0].split(",") != COLUMNS:
        raise ValueError(f"{path}: its columns are not those of this version; move the file away")
    with open(path, "a", newline="") as file:
        if text and not text.endswith("\n"):
            file.write("\n")
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not text:
            writer.writeheader()
        writer.writerows({name: "" if value is None else value for name, value in row.items()} for row in rows)
        file.flush()
        os.fsync(file.fileno())


def parse(text, where="CSV"):
    """Rows of a CSV's text, numbers as numbers and empty cells as None. Lines cut short are named and left out."""
    lines = text.splitlines()
    if not lines or lines[0].split(",") != COLUMNS:
        raise ValueError(f"{where}: expected the header {','.join(COLUMNS)}")
    rows = []
    for number, raw in enumerate(csv.DictReader(lines), 2):
        try:
            if None in raw or None in raw.values():
                raise ValueError("wrong number of cells")
            row = {name: value or None if name in FLOATS else value for name, value in raw.items()}
            row.update(
                {name: int(row[name]) for name in INTEGERS}, **{name: float(row[name]) for name in FLOATS if row[name]}
            )
            rows.append(row)
        except ValueError as error:
            print(f"{where}, line {number}: left out ({error})", file=sys.stderr)
    return rows


def read(path):
    return parse(Path(path).read_text(), str(path))


def latest(rows):
    """The last row of each KEY: {key: row}, in order of first appearance."""
    return {tuple(row[name] for name in KEY): row for row in rows}
