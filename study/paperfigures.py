"""Figures 1, 2, 3, 5 and 7 of arXiv 2508.18672 from rows of study.released, with the study's own rows beside them."""

import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

from optimoe import curves
from study import results
from study.figures import COLOURS, MARKERS, canvas, index, index_page

ACCURACY = dict(triviaqa="exact_match", hellaswag="acc", gsm8k="strict", gsm_plus="strict")
ACCURACY |= dict(humaneval="pass@1", mbpp="pass@1")

LOSSES = {"train_loss": "training loss, nats per token", "val_loss": "validation loss, nats per token"}  # of all text
# Figure of the paper: (question, x, label of x, what is drawn over x).
FIGURES = {
    1: ("Does the loss fall with parameters?", "params", "parameters", (*LOSSES, "loss")),
    2: ("Does a lower training loss mean a lower task loss?", "train_loss", LOSSES["train_loss"], ("loss",)),
    3: ("Does a lower training loss mean more right answers?", "train_loss", LOSSES["train_loss"], ("accuracy",)),
    5: ("Which density is best?", "density", "density k/E", ("loss", "accuracy")),
    7: ("How many tokens per parameter are best?", "tpp", "training tokens per parameter", ("accuracy",)),
}
UNITS = {"loss": "task loss, bits per token", "accuracy": "accuracy, %", **LOSSES}


class Point(NamedTuple):
    width: int  # d
    k: int
    values: dict  # params, density, tpp, train_loss; (task, "loss") and (task, "accuracy")


def paper_points(rows):
    found = []
    for row in (row for row in rows.values() if "d_model" in row):
        values = {name: row.get(name) for name in ("params", "tpp", *LOSSES)}
        values["density"] = row["top_k"] / row["n_experts"]
        for task, done in row["tasks"].items():
            values[task, "loss"] = done["metrics"]["bits/token"]["mean"]
            values[task, "accuracy"] = 100 * done["metrics"][ACCURACY[task]]["mean"]
        found.append(Point(row["d_model"], row["top_k"], values))
    return found


def own_points(path):
    """Points of the study's usual regime: means over seeds, at the rate with the best training loss. They are those of
    the number of problems that has the most points."""
    found = {}
    for (where, k), line in results.lines(results.read(path, optional=True) if path else []).items():
        tuned = where.usual and results.tune(line, "train")
        cells = {e: cell for e, cell in tuned.cells.items() if e not in tuned.single} if tuned else {}
        points = [Point(where.d_model, k, own_values(cell, k / e)) for e, cell in cells.items()]
        found.setdefault(where.unique, []).extend(points)
    return max(found.values(), key=len, default=[])


def own_values(cell, density):
    """Means over the rows of a cell {seed: row}."""
    mean = lambda of: sum(map(of, cell.values())) / len(cell)
    values = {"density": density, "params": mean(lambda row: row["params"]["total"])}
    values |= {name: mean(lambda row, name=name: row[name]) for name in ("tpp", *LOSSES)}
    for task in ("facts", "problems"):
        values[task, "loss"] = mean(lambda row, task=task: results.loss(row, task)) / math.log(2)
        values[task, "accuracy"] = 100 * mean(lambda row, task=task: results.accuracy(row, task))
    return values


def panels(points, x, kinds):
    """[(title, what is drawn, [(width, k, pairs of x and y in order)])], of the points that have both values."""
    found = {}
    for width, k, values in points:
        for key, y in values.items():
            task, kind = key if isinstance(key, tuple) else ("all text", key)
            if kind in kinds and y is not None and values.get(x) is not None:
                series = found.setdefault((kinds.index(kind), task, kind), {})
                series.setdefault((width, k), []).append((values[x], y))
    return [
        (task, kind, [(*name, sorted(pairs)) for name, pairs in sorted(series.items())])
        for (_, task, kind), series in sorted(found.items(), key=lambda item: item[0][0])
    ]


def draw(rows, own, out, family):
    """Write the figures from the rows, the study's in panels below, and their index page. Prints which ones lack
    numbers."""
    index_page(out)
    groups, pictures = {"the paper's models": paper_points(rows), "this study's runs": own_points(own)}, {}
    for number, (question, x, label, kinds) in FIGURES.items():
        drawn = {who: panels(points, x, kinds) for who, points in groups.items() if points}
        for who in [who for who, found in drawn.items() if not found]:
            print(f"figure {number}: no row of {who} has a {x}")
            del drawn[who]
        if drawn:
            Path(out).mkdir(parents=True, exist_ok=True)
            pictures[f"figure-{number}-{family}.png"] = question
            scale = "linear" if x == "train_loss" else "log"
            curves.write(partial(picture, drawn, label, scale), Path(out) / f"figure-{number}-{family}.png")
    if pictures:
        index(out, "The figures of arXiv 2508.18672", pictures, f"python -m study.released --family={family} --plan")


def picture(drawn, label, scale):
    """The matplotlib figure of {who: panels}, a row for each quantity. A colour is a k, a marker a width."""
    rows = {}
    for who, found in drawn.items():
        for title, kind, series in found:
            rows.setdefault((who, "" if kind in LOSSES else kind), []).append((title, kind, series))
    wide = max(map(len, rows.values()))
    fig, axes = canvas(len(rows), wide, (3.6 * wide + 1.4, 3.2 * len(rows)))
    for ((who, _), found), row in zip(rows.items(), axes, strict=True):
        for axis in row[len(found) :]:
            axis.set_axis_off()
        for axis, (title, kind, series) in zip(row, found, strict=False):
            for width, k, pairs in series:
                look = dict(color=COLOURS[k.bit_length() % 6], marker=MARKERS[width.bit_length() % 6], ms=4, lw=1)
                axis.plot(*zip(*pairs, strict=True), **look)
            axis.set(title=f"{who}: {title}", xlabel=label, ylabel=UNITS[kind], xscale=scale)
            axis.minorticks_off()
    shown = [(width, k) for found in drawn.values() for *_, series in found for width, k, _ in series]
    for k in sorted({k for _, k in shown}):
        axes[0][0].plot([], [], color=COLOURS[k.bit_length() % 6], label=f"k={k}")
    for width in sorted({width for width, _ in shown}):
        axes[0][0].plot([], [], MARKERS[width.bit_length() % 6], color="grey", label=f"d={width}")
    fig.legend(loc="outside right center", frameon=False)
    return fig
