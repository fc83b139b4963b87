"""What to train with the available hours and GPUs:  python -m study.plan reasoning --hours=24 --gpus=8

The models of the paper's grid (arXiv 2508.18672) that fit the budget, by the paper's rules. The last lines say what is
evidence and what is extrapolation.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from data import files
from optimoe import config
from optimoe.config import require
from optimoe.sizes import PRESETS, count_params, flops_per_token, peak_flops, preset, training_memory

THROUGHPUT = Path(__file__).resolve().parent.parent / "docs" / "throughput.csv"
BEST_TPP, RESOLUTION = 20, 2  # the paper's optimum, and the factor to which its grid resolves it
GRID = (2.4, 390)  # tokens per parameter of the paper's models: nothing is known outside


@dataclass(frozen=True)
class PlanConfig:
    POSITIONAL = ("purpose",)

    purpose: Literal["reasoning", "memory"]  # what the model is for
    # Budget: one or more
    hours: float = 0.0  # wall-clock hours, with all the GPUs
    flops: float = 0.0  # training FLOPs in all
    tokens: float = 0.0  # training tokens; with hours or flops alone, as many as these buy
    # Machine
    gpus: int = 1
    gpu: str = "NVIDIA H100 80GB HBM3"  # its name, for the peak
    memory: float = 80.0  # GiB of each GPU; experts and all states are divided among the GPUs (--parallel=ep)
    # Bounds: a model with fewer or more tokens per parameter is left out
    min_tpp: float = GRID[0]
    max_tpp: float = GRID[1]
    # Report
    rows: int = 8  # lines of the table

    def __post_init__(self):
        budget = self.hours or self.flops or self.tokens
        require(budget, "hours", self.hours, "give a budget: --hours=24, --flops=1e20, --tokens=1e10, or several")
        for name in ("hours", "flops", "tokens", "memory", "min_tpp", "max_tpp"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "use a finite number from 0")
        for name in ("gpus", "rows"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "use 1 or more")
        require(self.min_tpp <= self.max_tpp, "min_tpp", self.min_tpp, f"use at most max_tpp={self.max_tpp:g}")


class Plan(NamedTuple):
    name: str
    tokens: float
    tpp: float
    total: int
    active: int
    flops: float
    gib: float  # on each GPU
    hours: float | None  # None: the GPU's peak is unknown


def throughput(path=THROUGHPUT):
    """[(FLOPs per token, share of the peak, row)] of the measured models."""
    found = []
    for row in (reader := csv.DictReader(files.read_text(path).splitlines())):
        try:
            cfg = preset(row["model"], vocab_size=int(row["vocab_size"]), seq_len=int(row["seq_len"]))
            share = float(row["mfu"])
            require(0 < share <= 1 and None not in row.values(), "mfu", share, "a share of the peak is needed")
        except (KeyError, TypeError, ValueError) as error:
            where = f"{path}, line {reader.line_num}: not a measured speed"
            raise ValueError(f"{where} ({error}); restore the file") from None
        found.append((flops_per_token(cfg), share, row))
    return found


def candidates(cfg, measured):
    """Every model of the paper's grid that fits memory and budget, whatever its tokens per parameter. Its MFU is that
    of the measured model nearest in FLOPs per token."""
    for name in (name for name in PRESETS if name.startswith("paper")):
        model = preset(name)
        params, per_token = count_params(model), flops_per_token(model)
        parts = training_memory(model, model.seq_len)  # one window per GPU at a time
        experts = 3 * model.n_layers * model.d_model * model.d_expert * model.n_experts
        divided = 12 * params.total + 4 * experts  # float32 weights and states; copies and gradients of experts
        gib = (divided / cfg.gpus + sum(parts.values()) - divided) / 2**30
        share = min(measured, key=lambda entry, n=per_token: abs(math.log(entry[0] / n)))[1]
        speed = share * (peak_flops(cfg.gpu) or 0.0) * cfg.gpus  # FLOP/s
        require(speed or not cfg.hours, "gpu", cfg.gpu, "its peak or speed is not known: give --flops instead of hours")
        most = min(cfg.flops or math.inf, cfg.hours * 3600 * speed if cfg.hours else math.inf)
        flops = cfg.tokens * per_token or most
        if gib <= cfg.memory and flops <= most * 1.0001:
            tokens, hours = flops / per_token, flops / speed / 3600 if speed else None
            yield Plan(name, tokens, tokens / params.total, params.total, params.active, flops, gib, hours)


def rank(plans, purpose):
    """Best first, by the paper's rules."""
    if purpose == "memory":
        return sorted(plans, key=lambda plan: (-plan.total, -plan.active))
    away = lambda plan: abs(math.log2(plan.tpp / BEST_TPP))
    near = lambda plan: away(plan) <= math.log2(RESOLUTION)
    return sorted(plans, key=lambda plan: (not near(plan), -plan.active if near(plan) else 0, away(plan)))


def short(number):
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def aligned(header, rows):
    """Lines of a table; the first column is aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    sides = "<" + ">" * (len(widths) - 1)
    return ["  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)) for row in (header, *rows)]


def paper_table(cfg):
    fitting = list(candidates(cfg, throughput()))
    remedy = "no model of the grid fits: raise --memory, --gpus, --hours or --flops, or lower --tokens"
    require(fitting, "memory", cfg.memory, remedy)
    plans = rank([plan for plan in fitting if cfg.min_tpp <= plan.tpp <= cfg.max_tpp], cfg.purpose)
    if not plans:
        nearest = min(fitting, key=lambda plan: abs(math.log(plan.tpp / BEST_TPP)))
        found = f"{short(nearest.tokens)} tokens for {short(nearest.total)} parameters: {nearest.tpp:.3g} a parameter"
        asked = f"{cfg.min_tpp:g} to {cfg.max_tpp:g} are asked for; the paper has nothing beyond {GRID[0]} to {GRID[1]}"
        raise ValueError(f"the nearest that fits, {nearest.name}, gets {found}, and {asked}: change the budget")
    cells = []
    for p in plans[: cfg.rows]:
        sizes = (short(p.tokens), f"{p.tpp:.3g}", short(p.total), short(p.active))
        hours = "n/a" if p.hours is None else f"{p.hours:,.2f}"
        cells.append((p.name, *sizes, f"{p.flops:.2e}", f"{p.gib:.1f}", hours))
    reasoning = f"{BEST_TPP} tokens per parameter (TPP) to a factor of {RESOLUTION} first, then active size"
    order = "largest total size first" if cfg.purpose == "memory" else reasoning
    lines = [f"From the paper's grid, for {cfg.purpose}: {order}.", ""]
    lines += aligned("model tokens TPP total active FLOPs GiB/GPU hours".split(), cells)
    if len(plans) > cfg.rows:
        lines.append(f"... and {len(plans) - cfg.rows} more that fit (--rows)")
    if left := len(fitting) - len(plans):
        lines.append(f"{left} more would fit, but not with {cfg.min_tpp:g} to {cfg.max_tpp:g} tokens per parameter")
    return lines


def evidence():
    rows = (row for *_, row in throughput())
    speeds = [f"  {row['model']} {float(row['tokens_per_s']):,.0f} tokens/s on {row['gpu']}" for row in rows]
    return [
        "Evidence: the order of the table, for 125 B tokens of the paper's mixture (65 models, one run each; the",
        f"  optimum, {BEST_TPP} TPP, to a factor of {RESOLUTION}). Of models of 1 to 51 M parameters, docs/STUDY.md:",
        "  larger ones remember more; with 500 problems no loss of reasoning was found at the learning rates that suit",
        "  it, which are higher than those for memory.",
        "Extrapolation: other numbers of tokens, other data, models between those of the grid. Hours: without loss",
        "  between GPUs, at the utilisation of the nearest of",
        *speeds,
    ]


def main(argv=None):
    cfg = config.parse(PlanConfig, argv, __doc__)
    print("\n".join([*paper_table(cfg), "", *evidence()]))


if __name__ == "__main__":
    config.command_line(main)
