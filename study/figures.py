"""The picture of the study:  python -m study.figures

A dot is a seed, a line joins the means. Paired runs are drawn where there are any, else those of the first edition.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from optimoe import config
from study import results
from study.presets import SCARCE
from study.results import MIN_SEEDS, accuracy, lines, loss, tune

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9")  # told apart by most eyes
MARKERS = "osD^vP"
STYLE = {"font.size": 8, "axes.titlesize": 9, "axes.grid": True, "grid.alpha": 0.3}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}


@dataclass(frozen=True)
class FiguresConfig:
    results: str = "study/results.jsonl"  # rows of study.sweep
    out: str = "docs/study/headline.png"  # the picture


def usual(where, paired):
    """Whether a regime is that of the study but for its number of problems."""
    fields = (where.d_model, where.d_expert, where.tokens, where.optimizer, where.kind, where.data)
    return where.paired == paired and fields == (128, 64, 2**24, "muon", "mixture", "")


def chosen(rows, k=8):
    """(paired, {number of problems: line {E: {rate: {seed: row}}}}) of the usual regime at this k."""
    for paired in (True, False):
        found = {where.unique: line for (where, kk), line in lines(rows).items() if kk == k and usual(where, paired)}
        if SCARCE in found and all(any(len(c) >= MIN_SEEDS for c in r.values()) for r in found[SCARCE].values()):
            return paired, found
    raise ValueError("no line of 1,000 problems, three values of E and three seeds; run python -m study.sweep pairs")


def curve(axis, cells, value, look, label):
    """Dots for the seeds of {x: {seed: row}}, a line through the means."""
    colour, marker = COLOURS[look % 6], MARKERS[look % 6]
    points = [(x, value(row)) for x, cell in cells.items() for row in cell.values()]
    axis.plot(*zip(*points, strict=True), marker, color=colour, ms=3, alpha=0.5, mew=0)
    means = [sum(value(row) for row in cell.values()) / len(cell) for cell in cells.values()]
    axis.plot(list(cells), means, "-", color=colour, lw=1.4, marker=marker, ms=4, label=label)


def best_cells(line, task):
    return tuned.cells if (tuned := tune(line, task)) else {}


def headline(plt, rows):
    """The matplotlib figure."""
    paired, found = chosen(rows)
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for look, (task, name) in enumerate((("facts", "facts (memory)"), ("problems", "unseen solutions (reasoning)"))):
        if cells := best_cells(found[SCARCE], task):
            curve(left, cells, lambda row, t=task: loss(row, t), look, name)
    left.set(title="1,000 problems: memory and reasoning", xlabel="experts E", ylabel="loss of answers, nats per token")
    for look, problems in enumerate(sorted(found, key=lambda n: n or 10**9)):
        if cells := best_cells(found[problems], "problems"):
            label = f"{problems:,} problems" if problems else "all new"
            curve(middle, cells, lambda row: loss(row, "problems"), look, label)
    middle.set(title="solution loss by number of problems", xlabel="experts E", ylabel="nats per token", yscale="log")
    problems, line = max(found.items(), key=lambda item: (min(map(len, item[1].values())), item[0] == SCARCE))
    for look, e in enumerate(sorted({min(line), sorted(line)[len(line) // 2], max(line)})):
        sound = {rate: {s: r for s, r in cell.items() if not r["diverged"]} for rate, cell in sorted(line[e].items())}
        if cells := {rate: cell for rate, cell in sound.items() if cell}:
            curve(right, cells, lambda row: 100 * accuracy(row, "problems"), look, f"E = {e}")
    title = f"{problems:,} problems: rates" if problems else "new problems: rates"
    right.set(title=title, xlabel="learning rate", ylabel="whole solutions right, %", xscale="log")
    rates = sorted({rate for rates in line.values() for rate in rates})
    right.set_xticks(rates, [f"{rate:g}" for rate in rates])
    for axis in (left, middle):
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted(found[SCARCE]), sorted(found[SCARCE]))
    for axis in (left, middle, right):
        axis.legend(fontsize=8)
        axis.minorticks_off()
    n = max(len(cell) for line in found.values() for rates in line.values() for cell in rates.values())
    kind = "paired weights" if paired else "first edition: unpaired, rates best for memory"
    fig.suptitle(f"d = 128, k = 8, 2^24 tokens, up to {n} seeds ({kind})", fontsize=9)
    return fig


def draw(rows, out):
    """Write the picture. Raises ValueError where the rows do not allow it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        fig = headline(plt, rows)
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(out, dpi=160)
        plt.close(fig)


def main(argv=None):
    try:
        cfg = config.parse(FiguresConfig, sys.argv[1:] if argv is None else argv, __doc__)
        draw(results.read(cfg.results), cfg.out)
        print(cfg.out)
    except ImportError as error:
        sys.exit(f"error: {error}; pip install -e '.[plot]'")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
