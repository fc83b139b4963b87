"""The paper's figures from a results file:  python -m study.figures study/results.jsonl --out docs/study

    fig1  training, validation and task loss against total parameters          fig2  task loss against training loss
    fig3  accuracy against training loss                                       fig4  error against training loss, earlier points too, by density
    fig5  task loss and accuracy against density k/E                           fig7  accuracy against tokens per parameter
    bits  bits stored per total and per active parameter                       rates  answers against the learning rate, where rates were compared

Figures 1, 2, 3, 5 and bits are drawn for each family (study/results.py: a regime, at the best rate of each (E, k), or with --all also at one rate for
all); 4 and 7 pool the families that differ in tokens only, and in people so that each is met as often. One colour for each number of active
parameters, as (d, k) sets it; lines join models of growing E; bands span the seeds.
"""

import argparse
import collections
import itertools
import math
import re
import sys
import textwrap
from functools import partial
from pathlib import Path

from study import results
from study.results import BEST, MEMORY, accuracy, families, loss_unit, tasks_of

COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
)  # told apart by most eyes, and in grey by their markers
MARKERS = "osD^vP"
SMALL = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "lines.markersize": 4,
    "lines.linewidth": 1.4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def plot(axis, cells, x, y, style="-"):
    """One line for each k through the seed means of its cells; bands from the lowest to the highest seed. x, y: row -> number or None."""
    for k in sorted({k for _, k in cells}):
        n = k.bit_length() - 1  # the same colour in every figure
        line = []
        for (_, _), seeds in sorted(cell for cell in cells.items() if cell[0][1] == k):
            values = [(x(row), y(row)) for row in seeds.values() if y(row) is not None]
            if values:
                xs, ys = zip(*values, strict=True)
                line.append((sum(xs) / len(xs), sum(ys) / len(ys), min(ys), max(ys)))
        if line:
            xs, means, lows, highs = zip(*line, strict=True)
            active = [next(iter(seeds.values()))["params"] for (_, kk), seeds in cells.items() if kk == k]
            label = f"k={k}, {short(min(a['active'] - a['embedding'] for a in active))} active"
            axis.plot(xs, means, style, color=COLOURS[n % 6], marker=MARKERS[n % 6], label=label)
            axis.fill_between(xs, lows, highs, color=COLOURS[n % 6], alpha=0.2, lw=0)


def short(number):
    """1234567 -> 1.2M"""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2g}{unit}" if number < 100 * size else f"{number / size:.0f}{unit}"
    return f"{number:.3g}"


def total(row):
    return row["params"]["total"]


def density(row):
    return row["run"]["top_k"] / row["run"]["n_experts"]


def train_loss(row):
    return row["train_loss"]


def percent(task):
    return lambda row: None if (share := accuracy(row, task)) is None else 100 * share


def loss_of(task):
    return lambda row: row[task]["loss"]


def grid_figure(plt, panels, title, columns=None):
    """panels: [(title, x label, y label, draw(axis), scale of x)]. Panels without data are left out; None when all are."""
    columns = columns or len(panels)
    rows, width = (
        math.ceil(len(panels) / columns),
        max(4.0, 2.6 * columns),
    )  # one panel alone would be narrower than its legend
    fig, axes = plt.subplots(rows, columns, figsize=(width, 2.4 * rows + 0.5), squeeze=False, layout="constrained")
    handles = {}
    for axis, (name, x, y, draw, scale) in zip(axes.flat, panels, strict=False):
        draw(axis)
        axis.set(title=name, xlabel=x, ylabel=y)
        if scale:
            axis.set_xscale("log", base=scale)
        if scale == 10:
            low, high = axis.get_xlim()
            axis.xaxis.set_major_locator(plt.matplotlib.ticker.LogLocator(10, (1, 2, 5) if high < 40 * low else (1, 3)))
            axis.xaxis.set_major_formatter(lambda x, _: short(x))
            axis.xaxis.set_minor_formatter(plt.matplotlib.ticker.NullFormatter())
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    fig.suptitle(textwrap.fill(title, int(14.6 * width)), fontsize=9)
    if handles:
        fig.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=min(len(handles), int(width / 1.35)),
            frameon=False,
        )
    return fig


def family_figures(plt, regime, cells):
    """[(name, figure)] of one family, called `regime`."""
    row = next(row for seeds in cells.values() for row in seeds.values())
    names, unit = tasks_of(row), loss_unit(row)
    scored = [
        task for task in names if any(accuracy(r, task) is not None for seeds in cells.values() for r in seeds.values())
    ]

    def lines(x, y):
        return lambda axis: plot(axis, cells, x, y)

    kind = lambda task: f"{names[task]} ({'memory' if task in MEMORY else 'reasoning'})"  # noqa: E731
    yield (
        "fig1",
        grid_figure(
            plt,
            [
                ("training", "total parameters", "loss, nats per token", lines(total, train_loss), 10),
                ("validation", "total parameters", "loss, nats per token", lines(total, lambda r: r["val_loss"]), 10),
                *(
                    (kind(task), "total parameters", f"task loss, {unit}", lines(total, loss_of(task)), 10)
                    for task in names
                ),
            ],
            f"Loss and total size: {regime}",
            3,
        ),
    )
    yield (
        "fig2",
        grid_figure(
            plt,
            [
                (kind(task), "training loss", f"task loss, {unit}", lines(train_loss, loss_of(task)), None)
                for task in names
            ],
            f"Task loss and training loss: {regime}",
        ),
    )
    if scored:
        yield (
            "fig3",
            grid_figure(
                plt,
                [
                    (kind(task), "training loss", "accuracy, %", lines(train_loss, percent(task)), None)
                    for task in scored
                ],
                f"Accuracy and training loss: {regime}",
            ),
        )
    yield (
        "fig5",
        grid_figure(
            plt,
            [
                *(
                    (kind(task), "density k/E", f"task loss, {unit}", lines(density, loss_of(task)), 2)
                    for task in names
                ),
                *((kind(task), "density k/E", "accuracy, %", lines(density, percent(task)), 2) for task in scored),
            ],
            f"Density: {regime}",
            len(names),
        ),
    )
    if row.get("bits"):
        yield (
            "bits",
            grid_figure(
                plt,
                [
                    (
                        "per parameter",
                        "total parameters",
                        "bits",
                        lines(total, lambda r: r["bits"]["per_parameter"]),
                        10,
                    ),
                    (
                        "per active parameter",
                        "total parameters",
                        "bits",
                        lines(total, lambda r: r["bits"]["per_active_parameter"]),
                        10,
                    ),
                    (
                        "of all there is to know",
                        "total parameters",
                        "%",
                        lines(total, lambda r: 100 * r["bits"]["total"] / r["bits"]["possible"]),
                        10,
                    ),
                ],
                f"Bits stored about {row['run']['people']:,} people: {regime}",
            ),
        )


def pooled_figures(plt, title, groups):
    """Figures over several token budgets. groups: [(regime, cells)] of one results.pool."""
    rows = [row for _, cells in groups for seeds in cells.values() for row in seeds.values()]
    names = tasks_of(rows[0])
    scored = [task for task in names if accuracy(rows[0], task) is not None]
    if not scored:
        return
    densities = sorted({density(row) for row in rows})

    def errors(task):
        def draw(axis):
            import matplotlib

            colours = matplotlib.colormaps["turbo"]
            for i, share in enumerate(densities):
                of_this = [point for row in rows if density(row) == share for point in (*row["points"], row)]
                points = [(point["train_loss"], 100 - 100 * accuracy(point, task)) for point in of_this]
                axis.plot(
                    *zip(*points, strict=True),
                    MARKERS[i % 6],
                    ms=3,
                    mew=0,
                    color=colours(i / max(1, len(densities) - 1)),
                    label=f"k/E = 1/{1 / share:g}" if share < 1 else "k/E = 1",
                )

        return draw

    yield (
        "fig4",
        grid_figure(
            plt,
            [(names[task], "training loss", "error, %", errors(task), None) for task in scored],
            f"Error at equal training loss: {title}",
        ),
    )

    def over_tpp(task):
        def draw(axis):
            merged = collections.defaultdict(dict)
            for regime, cells in groups:
                for (e, k), seeds in cells.items():
                    for seed, row in seeds.items():
                        merged[regime.tokens, e, k][seed] = row
            for tokens, style in zip(
                sorted({regime.tokens for regime, _ in groups}), itertools.cycle(("-", "--", ":", "-.")), strict=False
            ):
                plot(
                    axis,
                    {(e, k): seeds for (t, e, k), seeds in merged.items() if t == tokens},
                    lambda row: row["tpp"],
                    percent(task),
                    style,
                )
            axis.axvline(20, color="0.5", lw=0.8, ls="--")

        return draw

    yield (
        "fig7",
        grid_figure(
            plt,
            [(names[task], "tokens per parameter", "accuracy, %", over_tpp(task), 10) for task in scored],
            f"Tokens per parameter (a line for each k and number of tokens, solid for the fewest; vertical: 20): {title}",
        ),
    )


def rate_figures(plt, rows):
    """[(regime, figure)]: means over the seeds of all rates against the rate, a column for each k and a line for each E that has run two rates."""
    import matplotlib

    regimes = collections.defaultdict(
        lambda: collections.defaultdict(lambda: collections.defaultdict(lambda: collections.defaultdict(dict)))
    )
    for row in rows:
        if not row["diverged"]:
            regimes[results.regime(row)][row["run"]["top_k"]][row["run"]["n_experts"]][row["lr"]][
                row["run"]["seed"]
            ] = row
    for regime, lines in sorted(regimes.items()):
        told = {
            k: {
                e: rates
                for e, rates in sorted(line.items())
                if len(rates) > 1 and set.intersection(*map(set, rates.values()))
            }
            for k, line in sorted(lines.items())
        }
        told = {k: line for k, line in told.items() if line}
        sizes, colours = sorted({e for line in told.values() for e in line}), matplotlib.colormaps["viridis"]
        ticks = sorted({rate for line in told.values() for rates in line.values() for rate in rates})

        def curves(line, y, sizes=sizes, colours=colours, ticks=ticks):
            def draw(axis):
                for n, e in enumerate(sizes):  # all of them, for the order of the legend
                    rates = line.get(e, {})
                    seeds = set.intersection(*map(set, rates.values())) if rates else ()
                    means = [sum(y(found[seed]) for seed in seeds) / len(seeds) for _, found in sorted(rates.items())]
                    axis.plot(
                        sorted(rates), means, "o-", color=colours(0.95 * n / max(1, len(sizes) - 1)), label=f"E={e}"
                    )
                axis.set_xscale("log")
                axis.set_xticks(ticks, [f"{1000 * rate:g}" for rate in ticks])
                axis.minorticks_off()

            return draw

        if told:
            names = tasks_of(first(told[min(told)]))
            panels = [
                (f"{name}, k={k}", "learning rate, thousandths", "task loss", curves(line, loss_of(task)), None)
                for task, name in names.items()
                for k, line in told.items()
            ]
            yield str(regime), grid_figure(plt, panels, f"Task loss and learning rate: {regime}", len(told))


def first(nested):
    """A row of nested dicts of rows."""
    while "run" not in nested:
        nested = next(iter(nested.values()))
    return nested


def draw(rows, out, everything=False):
    """Write the figures that the rows allow into the directory `out`, those of one rate for all only where `everything` is asked for; returns their
    paths. Raises ValueError when there is none."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {family: cells for family, cells in families(rows).items() if everything or family.rate == BEST}
    out, paths, pools = Path(out), [], collections.defaultdict(list)
    with plt.rc_context(SMALL):
        work = [
            (str(family), partial(family_figures, plt, family, cells)) for family, cells in found.items()
        ]  # drawn one at a time
        work += [
            (title, partial(list, [("rates", figure)])) for title, figure in rate_figures(plt, results.standard(rows))
        ]
        for (regime, rate), cells in found.items():
            pools[results.Family(results.pool(regime), rate)].append((regime, cells))
        work += [(str(pool), partial(pooled_figures, plt, pool, groups)) for pool, groups in pools.items()]
        if not work:
            raise ValueError(
                "no line has three values of E at one k and compared rates yet: run `python -m study.sweep main`, or draw all lines (--all)"
            )
        out.mkdir(parents=True, exist_ok=True)
        for title, figures in work:
            for name, figure in figures():
                path = out / f"{name}-{re.sub('[^a-z0-9.]+', '-', title.lower())}.png"
                figure.savefig(path, dpi=160)
                plt.close(figure)
                paths.append(path)
    return paths


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", default="study/results.jsonl")
    parser.add_argument("--out", default="docs/study", help="directory (default: %(default)s)")
    parser.add_argument(
        "--all",
        action="store_true",
        help="draw lines at one rate for all too, not only those at the best rate of each (E, k)",
    )
    args = parser.parse_args(argv)
    try:
        print(*draw(results.read(args.results), args.out, args.all), sep="\n")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}" + ("; pip install 'optimoe[plot]'" if isinstance(error, ImportError) else ""))


if __name__ == "__main__":
    main()
