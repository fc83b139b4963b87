"""The picture of the study and its index page:  python -m study.figures

Dots are seeds, lines join means. Paired runs only.
"""

import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from data import files
from optimoe import config, curves
from optimoe.config import require
from study import results
from study.presets import FEW, SCARCE
from study.results import accuracy, lines, loss, tune
from study.rules import RISE

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9")  # distinct for colour-blind readers too
MARKERS = "osD^vP"
STYLE = {"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}
QUESTION = "Memory and reasoning against the number of experts, by number of problems, and against the learning rate"


@dataclass(frozen=True)
class FiguresConfig:
    results: str = "study/results.jsonl"  # rows of study.sweep
    out: str = "docs/study/headline.png"  # the picture; README.md beside it is the index page


def canvas(rows, columns, size):
    """(figure, axes as rows) of matplotlib without a display; older figures are closed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.close("all")
    with plt.rc_context(STYLE):
        return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


DRAWN = "Drawn by `"  # how the second paragraph of an index page begins


def index_page(folder):
    """The path of a folder's index page, README.md. ValueError where that is another page."""
    page = Path(folder, "README.md")
    other = page.exists() and f"\n\n{DRAWN}" not in page.read_text(errors="replace")
    require(not other, "out", str(folder), "the pictures' index would replace the README.md there; name another place")
    return page


def index(folder, title, pictures, command):
    """Write the index page: every picture {file: the question that it answers}."""
    parts = [f"## {question}\n\n![{question}]({name})\n" for name, question in pictures.items()]
    files.replace(index_page(folder), "\n".join([f"# {title}\n", f"{DRAWN}{command}`.\n", *parts]))
    print(index_page(folder))


def curve(axis, cells, value, look, label, hollow=(), colour=None, dashes="-"):
    """Dots for the seeds of {x: {seed: row}}, and a line through the means, hollow at some x. Returns the means."""
    style = dict(color=colour or COLOURS[look % 6], marker=MARKERS[look % 6])
    points = [(x, value(row)) for x, cell in cells.items() for row in cell.values()]
    axis.plot(*zip(*points, strict=True), **style, ls="None", ms=4, alpha=0.5, mew=0)
    means = [sum(map(value, cell.values())) / len(cell) for cell in cells.values()]
    axis.plot(list(cells), means, **style, ls=dashes, lw=1.4, ms=5, label=label)
    for x in hollow:
        axis.plot(x, means[list(cells).index(x)], **style, ms=5, mfc="white")
    return means


def headline(rows):
    """The matplotlib figure."""
    from matplotlib import colormaps

    found = {where.unique: line for (where, k), line in lines(rows).items() if k == 8 and where.usual}
    remedy = f"no line of {SCARCE} problems and three values of E; run python -m study.sweep pairs"
    require(SCARCE in found, "results", f"{len(rows)} rows", remedy)
    fig, ((left, middle, right),) = canvas(1, 3, (15, 4.8))
    shown = (("facts", SCARCE), ("problems", SCARCE), ("problems", FEW))
    for look, (task, problems) in enumerate(shown):
        if one := tune(found.get(problems, {}), task):
            name = "facts" if task == "facts" else f"solutions, {problems} problems"
            means = curve(left, one.cells, lambda row, t=task: loss(row, t), look, name, one.single)
            if (task, problems) == ("problems", SCARCE):  # the smallest rise that counts
                first, last = min(one.cells), max(one.cells)
                x = [first * (last / first) ** (i / 50) for i in range(51)]
                risen = [means[0] + RISE * math.log2(e / first) for e in x]
                left.plot(x, risen, "--", color=COLOURS[look], lw=1, label=f"{RISE} nats more a doubling")
    left.set(title="Do more experts help?", ylabel="loss of answers, nats per token")
    numbers = sorted(found, key=lambda n: n or 10**9)
    for look, problems in enumerate(numbers):
        if one := tune(found[problems], "problems"):
            label = f"{problems:,} problems" if problems else "all new"
            colour = colormaps["viridis"](0.92 * (1 - look / len(numbers)))  # an order, from light to dark
            curve(middle, one.cells, lambda row: loss(row, "problems"), look, label, one.single, colour)
    middle.set(title="Do more problems help?", ylabel="loss of unseen solutions, nats per token")
    line = found[SCARCE]
    shown = sorted({min(line), sorted(line)[len(line) // 2], max(line)})
    for (task, name), (look, e) in product((("problems", "solutions"), ("facts", "facts")), enumerate(shown)):
        sound = {rate: {s: r for s, r in cell.items() if not r["diverged"]} for rate, cell in sorted(line[e].items())}
        if cells := {rate: cell for rate, cell in sound.items() if cell}:
            dashes = "-" if task == "problems" else "--"
            curve(right, cells, lambda row, t=task: 100 * accuracy(row, t), look, f"{name}, E = {e}", dashes=dashes)
    right.set(title="Which learning rate does each need?")
    right.set(xlabel="peak learning rate", ylabel="right answers, %", xscale="log")
    rates = sorted({rate for rates in line.values() for rate in rates})[::-2]  # every second one fits
    right.set_xticks(rates, [f"{rate:g}" for rate in rates])
    sizes = sorted({e for line in found.values() for e in line})
    for axis in (left, middle):
        axis.set_xscale("log", base=2)
        axis.set(xlabel="experts per layer, E", yscale="log")
        axis.set_xticks(sizes, sizes)
    for axis in (left, middle, right):
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3 if axis is middle else 2, frameon=False)
        axis.minorticks_off()
    counts = sorted({len(cell) for line in found.values() for rates in line.values() for cell in rates.values()})
    n = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else counts[0]
    what = f"d = 128, k = 8, 16.8 M tokens, paired weights; facts and the right panel: {SCARCE} problems"
    dots = f"a dot is a seed, {n} a point; left and middle at the best rate for each task, hollow: one rate tried"
    fig.suptitle(f"{what}\n{dots}")
    return fig


def main(argv=None):
    cfg = config.parse(FiguresConfig, argv, __doc__)
    rows, out = results.read(cfg.results), Path(cfg.out)
    config.check_file(out, "out")
    index_page(out.parent)
    curves.write(lambda: headline(rows), out)
    index(out.parent, "Pictures of the study", {out.name: QUESTION}, "python -m study.figures")


if __name__ == "__main__":
    config.command_line(main)
