"""What Nsight Compute counts of each kernel of the layer: `python -m bench.kernels T,D,F,E,K --counters`.

Percentages are of the peak while the kernel runs: tensor pipe, L2, DRAM, issue slots, warps of an SM. "roofline" is the
fraction of the kernel's roofline (bench/kernels.py) that it reaches. "stalls" are the two reasons for which warps wait
longest between instructions, in cycles, and the sum over all reasons. --csv gets this table; its columns differ.
"""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench.problem import kernel_costs
from data import files

SECTIONS = "LaunchStats Occupancy SpeedOfLight ComputeWorkloadAnalysis SchedulerStats WarpStateStats".split()
# Heading: pattern for the names of its metric in all versions of Nsight Compute; the largest match is shown.
METRICS = {
    "us": r"gpu__time_duration\.sum",
    "tensor %": r"sm__(inst_executed_)?pipe_tensor\w*\.avg\.pct_of_peak_sustained_active",
    "L2 %": r"lts__throughput\.avg\.pct_of_peak_sustained_elapsed",
    "DRAM %": r"(gpu__)?dram_+throughput\.avg\.pct_of_peak_sustained_elapsed",
    "issue %": r"(sm__inst_issued|sm(sp)?__issue_active)\.avg\.pct_of_peak_sustained_active",
    "warps %": r"sm__warps_active\.avg\.pct_of_peak_sustained_active",
    "registers": r"launch__registers_per_thread",
    "shared": r"launch__shared_mem_per_block_(dynamic|static)",
}
STALL = re.compile(r"smsp__average_warps_issue_stalled_(?!\w+_not_issued)(?!selected)(\w+)_per_issue_active\.ratio")


def find_ncu():
    """The path of ncu. ValueError, with the remedy, where nothing can be counted."""
    ncu = shutil.which("ncu") or next(map(str, Path("/usr/local").glob("cuda*/bin/ncu")), None)
    if not ncu:
        raise ValueError("--counters needs ncu of NVIDIA Nsight Compute: install it and put it on the PATH")
    if not torch.cuda.is_available():
        raise ValueError("--counters needs an NVIDIA GPU; without one, bench.compile shows registers and instructions")
    return ncu


def count(ncu, shape, names, machine):
    """Rows of the table of one shape. machine: bench.rows.Ceilings."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "counters.csv")
        command = [ncu, "--csv", "--page=raw", "--print-units=base", f"--log-file={log}", "--clock-control=none"]
        command += ["--profile-from-start=off", *(f"--section={name}" for name in SECTIONS)]
        command += [sys.executable, "-m", "bench.kernels", str(shape), f"--kernel={','.join(names)}", "--once"]
        done = subprocess.run(command, capture_output=True, text=True)
        text = log.read_text() if log.exists() else ""
    if "ERR_NVGPUCTRPERM" in text + done.stdout + done.stderr:
        raise ValueError("the driver lets only the administrator read counters: run as root")
    if done.returncode:
        raise ValueError(f"ncu failed: {(done.stderr or text or done.stdout).strip()[-500:]}")
    launched = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))
    return beside_roofline(parse(text, launched), shape, machine)


def beside_roofline(rows, shape, machine):
    """The rows with the fraction of its roofline that each kernel reaches, all its functions together."""
    us = dict.fromkeys((row["kernel"] for row in rows), 0.0)
    for row in rows:
        us[row["kernel"]] += float(row["us"].replace("-", "nan"))  # "-": not counted
    floors = {name: 1e3 * cost.floor_ms(*machine) for name, cost in kernel_costs(shape, 2).items()}
    return [row | {"roofline": f"{floors[row['kernel']] / us[row['kernel']]:.3f}"} for row in rows]


def append(path, rows):
    """Add rows to a CSV of such tables. ValueError where its columns differ."""
    path, text = Path(path), io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    header, old = text.getvalue(), files.read_text(path) if path.exists() else ""
    if old and not old.startswith(header):
        raise ValueError(f"csv={str(path)!r}: its columns are not those of --counters; name another file")
    writer.writerows(rows)
    files.replace(path, old + text.getvalue()[len(header) if old else 0 :])


def parse(text, launched):
    """Rows of the table from ncu's CSV; launched: [(kernel of the layer, name of the function)] in order."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError(f"ncu printed no table: {text.strip()[-500:]}")
    ours = {function for _, function in launched}
    found = [raw for raw in csv.DictReader(lines[start:]) if raw["Kernel Name"].split("(")[0].strip() in ours]
    if len(found) != len(launched):
        raise ValueError(f"ncu counted {len(found)} kernels, {len(launched)} were launched")
    return [{"kernel": name, **row_of(raw)} for (name, _), raw in zip(launched, found, strict=True)]


def row_of(raw):
    """A row of the table from the cells of one kernel."""
    cells = {metric: (value or "").replace(",", "") for metric, value in raw.items() if metric}
    numbers = {metric: float(value) for metric, value in cells.items() if re.fullmatch(r"\d+(\.\d+)?", value)}
    row = {"function": raw["Kernel Name"].split("(")[0]}
    for heading, pattern in METRICS.items():
        values = [value for metric, value in numbers.items() if re.fullmatch(pattern, metric)]
        row[heading] = f"{round(max(values) / (1e3 if heading == 'us' else 1), 1):g}" if values else "-"
    stalls = {match[1]: value for metric, value in numbers.items() if (match := STALL.fullmatch(metric))}
    worst = sorted(stalls, key=stalls.get, reverse=True)[:2]
    stalled = ", ".join(f"{name} {stalls[name]:.1f}" for name in worst)
    return row | {"stalls": f"{stalled} of {sum(stalls.values()):.1f}" if stalls else "-"}
