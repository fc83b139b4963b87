"""Which sizes fit a budget, and which of them to train:  python -m study.plan --flops 1e20 --memory 80 --gpus 8 --for reasoning

Two tables that are never mixed: the paper's grid with the paper's rules (arXiv 2508.18672: for memory the largest total size; for reasoning
first active compute, then about 20 tokens per parameter, a figure that its grid resolves to a factor of two), and the runs of this study
with what they measured. Budgets are limits: --flops and --tokens of the whole training (with --flops alone each model trains on as many
tokens as that buys), --memory in GiB of one GPU, which holds a whole copy of model and optimiser. Hours are at the utilisation of the nearest
measured model (docs/throughput.csv): an extrapolation, worse the farther the size.
"""

import argparse
import csv
import math
import sys
from pathlib import Path
from typing import NamedTuple

from optimoe.config import require
from optimoe.sizes import PRESETS, count_params, flops_per_token, peak_flops, preset, training_memory
from study import results
from study.claims import MIN_SEEDS

THROUGHPUT = Path(__file__).resolve().parent.parent / "docs" / "throughput.csv"
RESULTS = "study/results.jsonl"
BEST_TPP, RESOLUTION = 20, 2  # the paper's optimum, and the factor to which its grid resolves it


class Plan(NamedTuple):
    name: str
    tokens: float
    tpp: float
    total: int
    active: int
    flops: float
    gib: float
    hours: float | None


def throughput(path):
    """[(flops per token, share of the peak, row)] of the measured models."""
    found = []
    with open(path, newline="") as file:
        for row in (reader := csv.DictReader(file)):
            try:
                require(
                    None not in row.values(),
                    "row",
                    [value for value in row.values() if value is not None],
                    "fields are missing",
                )
                cfg = preset(row["model"], vocab_size=int(row["vocab_size"]), seq_len=int(row["seq_len"]))
                share = float(row["mfu"] or float(row["tokens_per_s"]) * flops_per_token(cfg) / peak_flops(row["gpu"]))
                require(0 < share <= 1, "mfu", share, "a share of the peak is needed")
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {reader.line_num}: not a measured speed ({error}); restore the file or delete the line"
                ) from None
            found.append((flops_per_token(cfg), share, row))
    return found


def hours_of(flops, per_token, gpus, gpu, measured):
    """Hours on so many GPUs of this name at the utilisation measured nearest in FLOPs per token; None where the peak is not known."""
    peak = peak_flops(gpu)
    if not measured or not peak:
        return None
    _, share, _ = min(measured, key=lambda entry: abs(math.log(entry[0] / per_token)))
    return flops / (share * peak * gpus) / 3600


def candidates(args, measured):
    """Every model of the paper's grid within the budget."""
    for name in PRESETS:
        if not name.startswith("paper"):
            continue
        cfg = preset(name, vocab_size=args.vocab_size, seq_len=args.seq_len)
        params, per_token = count_params(cfg), flops_per_token(cfg)
        tokens = args.tokens or args.flops / per_token
        gib = sum(training_memory(cfg, args.micro_batch * args.seq_len).values()) / 2**30
        if args.flops and tokens * per_token > args.flops * 1.0001 or args.memory and gib > args.memory:
            continue
        yield Plan(
            name,
            tokens,
            tokens / params.total,
            params.total,
            params.active,
            tokens * per_token,
            gib,
            hours_of(tokens * per_token, per_token, args.gpus, args.gpu, measured),
        )


def rank(plans, purpose):
    """Best first, by the paper's rules."""
    if purpose == "memory":
        return sorted(plans, key=lambda plan: (-plan.total, -plan.active))
    away = lambda plan: abs(math.log2(plan.tpp / BEST_TPP))  # noqa: E731
    near = lambda plan: away(plan) <= math.log2(RESOLUTION)  # noqa: E731
    return sorted(plans, key=lambda plan: (not near(plan), -plan.active if near(plan) else 0, away(plan)))


def short(number):
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def aligned(header, rows):
    """Lines of a table whose columns are as wide as their widest cell, names to the left, numbers to the right."""
    forms = [
        ("<" if name in ("model", "regime") else ">") + str(max(map(len, (name, *cells))))
        for name, *cells in zip(header, *rows, strict=True)
    ]
    return ["  ".join(map(format, row, forms)).rstrip() for row in (header, *rows)]


def paper_table(args):
    measured = throughput(args.throughput)
    plans = rank(candidates(args, measured), args.purpose)
    why = (
        "largest total size first"
        if args.purpose == "memory"
        else f"TPP within a factor of {RESOLUTION} of {BEST_TPP} first, the most active parameters among them, then the nearest TPP"
    )
    lines = [f"From the paper's grid, for {args.purpose}: {why}.", ""]
    if not plans:
        return lines + ["nothing fits: raise --memory or --flops, or lower --micro-batch or --tokens"]
    hours = lambda value: "n/a" if value is None else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"  # noqa: E731
    lines += aligned(
        "model tokens TPP total active FLOPs GiB/GPU hours".split(),
        [
            [
                plan.name,
                short(plan.tokens),
                f"{plan.tpp:.3g}",
                short(plan.total),
                short(plan.active),
                f"{plan.flops:.2e}",
                f"{plan.gib:.1f}",
                hours(plan.hours),
            ]
            for plan in plans[: args.rows]
        ],
    )
    if len(plans) > args.rows:
        lines.append(f"... and {len(plans) - args.rows} more that fit (--rows)")
    sources = [
        f"  {row['model']} {float(row['tokens_per_s']):,.0f} tokens/s on {row['gpu']} ({row['source']})"
        for *_, row in measured
    ]
    return [
        *lines,
        "",
        f"hours: {args.gpus} x {args.gpu}, data parallel without loss, at the utilisation of the nearest of",
        *(sources or ["  no measurement"]),
    ]


def own_table(args):
    """Measured runs within the budget, best first, after those of MIN_SEEDS seeds the others: mean over seeds, regimes apart as they are not comparable."""
    found = results.read(args.results, optional=args.results == RESULTS)
    finished = [row for row in results.standard(found) if not row["diverged"]]
    rows = [
        row
        for row in finished
        if (not args.flops or row["flops"] <= args.flops) and (not args.tokens or row["tokens"] <= args.tokens)
    ]
    lines = [f"From the runs of this study ({args.results}), for {args.purpose}:", ""]
    found = {}
    for row in rows:
        scores = [
            results.accuracy(row, task)
            for task in results.tasks_of(row)
            if (task in results.MEMORY) == (args.purpose == "memory")
        ]
        scores = [score for score in scores if score is not None]
        if scores:
            cell = results.regime(row), row["run"]["n_experts"], row["run"]["top_k"], row["lr"]
            found.setdefault(cell, []).append((sum(scores) / len(scores), row))
    if not found:
        return lines + [
            "no finished run fits the budget" if finished else "no finished run yet: python -m study.sweep main"
        ]
    means = {cell: sum(score for score, _ in runs) / len(runs) for cell, runs in found.items()}
    seeds = {cell: len({row["run"]["seed"] for _, row in runs}) for cell, runs in found.items()}
    cells = []
    for cell in sorted(means, key=lambda cell: (seeds[cell] < MIN_SEEDS, -means[cell]))[: args.rows]:
        regime, e, k, rate = cell
        runs = [row for _, row in found[cell]]
        params = runs[0]["params"]
        cells.append(
            [
                str(e),
                str(k),
                f"{rate:g}",
                f"{runs[0]['tpp']:.3g}",
                short(params["total"]),
                short(params["active"]),
                f"{runs[0]['flops']:.2e}",
                f"{means[cell]:.1%}",
                str(seeds[cell]),
                f"{sum(row['train_seconds'] for row in runs) / len(runs):.1f}",
                str(regime),
            ]
        )
    lines += aligned("E k lr TPP total active FLOPs score seeds seconds regime".split(), cells)
    what = (
        "values recalled"
        if args.purpose == "memory"
        else "mean of whole solutions and mental arithmetic, trained lengths"
    )
    return [
        *lines,
        "",
        f"score: {what}; below them what has fewer than {MIN_SEEDS} seeds; one device, {', '.join(sorted({row['device'] for row in rows}))}",
    ]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--for", dest="purpose", choices=("reasoning", "memory"), required=True)
    parser.add_argument("--flops", type=float, default=0, help="training FLOPs in all")
    parser.add_argument("--tokens", type=float, default=0, help="training tokens")
    parser.add_argument("--memory", type=float, default=0, help="GiB of one GPU; 0: any")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--gpu", default="NVIDIA H100 80GB HBM3", help="name of the GPU (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=4096, help="default: the paper's %(default)s")
    parser.add_argument("--vocab-size", type=int, default=99_584, help="default: the paper's %(default)s")
    parser.add_argument(
        "--micro-batch", type=int, default=1, help="sequences per GPU and forward pass (default: %(default)s)"
    )
    parser.add_argument("--results", default=RESULTS)
    parser.add_argument(
        "--throughput", default=str(THROUGHPUT), help="measured training speeds (default: docs/throughput.csv)"
    )
    parser.add_argument("--rows", type=int, default=10, help="lines of each table (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        if not args.flops and not args.tokens:
            raise ValueError("give a budget: --flops=1e20, --tokens=1e10, or both")
        for name in ("flops", "tokens", "memory"):
            require(
                0 <= getattr(args, name) < math.inf,
                name,
                getattr(args, name),
                "use a finite number above 0, or leave it away",
            )
        for name in ("gpus", "seq_len", "vocab_size", "micro_batch", "rows"):
            require(getattr(args, name) >= 1, name, getattr(args, name), "use 1 or more")
        print("\n".join([*paper_table(args), "", *own_table(args)]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
