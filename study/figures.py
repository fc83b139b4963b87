"""The picture of the study:  python -m study.figures

A dot is a seed, a line joins the means; every model is shown at the rate that is best for the task. Paired runs only.
"""

from dataclasses import dataclass

from optimoe import config, curves
from optimoe.config import require
from study import results
from study.presets import SCARCE
from study.results import accuracy, lines, loss, tune

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9")  # told apart by most eyes
MARKERS = "osD^vP"
STYLE = {"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}


@dataclass(frozen=True)
class FiguresConfig:
    results: str = "study/results.jsonl"  # rows of study.sweep
    out: str = "docs/study/headline.png"  # the picture


def usual(where):
    """Whether a regime is that of the study but for its number of problems."""
    fields = (where.d_model, where.d_expert, where.tokens, where.optimizer, where.kind, where.paired)
    return fields == (128, 64, 2**24, "muon", "mixture", True)


def curve(axis, cells, value, look, label):
    """Dots for the seeds of {x: {seed: row}}, a line through the means."""
    colour, marker = COLOURS[look % 6], MARKERS[look % 6]
    points = [(x, value(row)) for x, cell in cells.items() for row in cell.values()]
    axis.plot(*zip(*points, strict=True), marker, color=colour, ms=4, alpha=0.5, mew=0)
    means = [sum(value(row) for row in cell.values()) / len(cell) for cell in cells.values()]
    axis.plot(list(cells), means, "-", color=colour, lw=1.4, marker=marker, ms=5, label=label)


def headline(rows, k=8):
    """The matplotlib figure."""
    found = {where.unique: line for (where, kk), line in lines(rows).items() if kk == k and usual(where)}
    remedy = f"no line of {SCARCE} problems and three values of E; run python -m study.sweep pairs"
    require(SCARCE in found, "results", f"{len(rows)} rows", remedy)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for look, (task, name) in enumerate((("facts", "facts (memory)"), ("problems", "unseen solutions (reasoning)"))):
        if one := tune(found[SCARCE], task):
            curve(left, one.cells, lambda row, t=task: loss(row, t), look, name)
    left.set(title=f"{SCARCE} problems, best rates for each", ylabel="loss of answers, nats per token")
    for look, problems in enumerate(sorted(found, key=lambda n: n or 10**9)):
        if one := tune(found[problems], "problems"):
            label = f"{problems:,} problems" if problems else "all new"
            curve(middle, one.cells, lambda row: loss(row, "problems"), look, label)
    middle.set(title="unseen solutions by number of problems", ylabel="nats per token")
    line = found[SCARCE]
    for look, e in enumerate(sorted({min(line), sorted(line)[len(line) // 2], max(line)})):
        sound = {rate: {s: r for s, r in cell.items() if not r["diverged"]} for rate, cell in sorted(line[e].items())}
        if cells := {rate: cell for rate, cell in sound.items() if cell}:
            curve(right, cells, lambda row: 100 * accuracy(row, "problems"), look, f"E = {e}")
    right.set(title=f"{SCARCE} problems: the rate", xlabel="learning rate", ylabel="whole unseen solutions right, %")
    rates = sorted({rate for rates in line.values() for rate in rates})
    right.set_xscale("log")
    right.set_xticks(rates, [f"{rate:g}" for rate in rates])
    sizes = sorted({e for line in found.values() for e in line})
    for axis in (left, middle):
        axis.set_xscale("log", base=2)
        axis.set(xlabel="experts E", yscale="log")
        axis.set_xticks(sizes, sizes)
    for axis in (left, middle, right):
        axis.legend()
        axis.minorticks_off()
    n = max(len(cell) for line in found.values() for rates in line.values() for cell in rates.values())
    fig.suptitle(f"d = 128, k = {k}, 16.8 M tokens, paired weights; a dot is a seed, up to {n} a point")
    return fig


def main(argv=None):
    cfg = config.parse(FiguresConfig, argv, __doc__)
    rows = results.read(cfg.results)
    curves.write(lambda: headline(rows), cfg.out)


if __name__ == "__main__":
    config.command_line(main)
