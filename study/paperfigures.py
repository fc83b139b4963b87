"""Figures 1, 2, 3, 5 and 7 of arXiv 2508.18672 from rows of study.released, with the study's own rows beside them."""

import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

from optimoe import curves
from study import results
from study.figures import COLOURS, MARKERS, STYLE, usual

ACCURACY = dict(triviaqa="exact_match", hellaswag="acc", gsm8k="strict", gsm_plus="strict")
ACCURACY |= dict(humaneval="pass@1", mbpp="pass@1")

LOSSES = {"train_loss": "training loss, nats per token", "val_loss": "validation loss, nats per token"}  # of all text
# Figure of the paper: what is on the x axis, and what is drawn over it.
FIGURES = {
    1: ("params", "parameters", (*LOSSES, "loss")),
    2: ("train_loss", LOSSES["train_loss"], ("loss",)),
    3: ("train_loss", LOSSES["train_loss"], ("accuracy",)),
    5: ("density", "density k/E", ("loss", "accuracy")),
    7: ("tpp", "training tokens per parameter", ("accuracy",)),
}
UNITS = {"loss": "task loss, bits per token", "accuracy": "accuracy, %", **LOSSES}


class Point(NamedTuple):
    width: int  # d
    k: int
    values: dict  # params, density, tpp, train_loss; (task, "loss") and (task, "accuracy")


def paper_points(rows):
    found = []
    for row in rows.values():
        if "d_model" in row:
            values = {name: row.get(name) for name in ("params", "tpp", *LOSSES)}
            values["density"] = row["top_k"] / row["n_experts"]
            for task, done in row["tasks"].items():
                values[task, "loss"] = done["metrics"]["bits/token"]["mean"]
                values[task, "accuracy"] = 100 * done["metrics"][ACCURACY[task]]["mean"]
            found.append(Point(row["d_model"], row["top_k"], values))
    return found


def own_points(path):
    """Of the study's usual regime, with the number of problems that has most values of E and k: means over seeds, at
    the rate with the best training loss."""
    rows = results.read(path) if path and Path(path).exists() else []
    found = {}
    for (where, k), line in results.lines(rows).items():
        tuned = usual(where) and results.tune(line, "train")
        points = found.setdefault(where.unique, [])
        for e, cell in tuned.cells.items() if tuned else ():
            points.append(Point(where.d_model, k, own_values(cell, k / e)))
    return max(found.values(), key=len, default=[])


def own_values(cell, density):
    """Means over the rows of a cell {seed: row}."""
    mean = lambda of: sum(map(of, cell.values())) / len(cell)  # noqa: E731
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
    """Write the figures from the rows, ours in a row of panels below. Says which ones lack their numbers."""
    groups = {"the paper's models": paper_points(rows), "this study's runs": own_points(own)}
    for number, (x, label, kinds) in FIGURES.items():
        drawn = {who: panels(points, x, kinds) for who, points in groups.items() if points}
        for who in [who for who, found in drawn.items() if not found]:
            print(f"figure {number}: no row of {who} has a {x}")
            del drawn[who]
        if drawn:
            Path(out).mkdir(parents=True, exist_ok=True)
            scale = "linear" if x == "train_loss" else "log"
            curves.write(partial(picture, drawn, label, scale), Path(out) / f"figure-{number}-{family}.png")


def picture(drawn, label, scale):
    """The matplotlib figure of {who: panels}, a row of panels each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.close("all")  # those that were written
    plt.rcParams.update(STYLE)
    wide = max(map(len, drawn.values()))
    shape = dict(figsize=(3.6 * wide + 1.4, 3.2 * len(drawn)), squeeze=False, layout="constrained")
    fig, axes = plt.subplots(len(drawn), wide, **shape)
    for (who, found), row in zip(drawn.items(), axes, strict=True):
        for axis in row[len(found) :]:
            axis.set_axis_off()
        for axis, (title, kind, series) in zip(row, found, strict=False):
            for width, k, pairs in series:
                look = dict(color=COLOURS[k.bit_length() % 6], marker=MARKERS[width.bit_length() % 6], ms=4, lw=1)
                axis.plot(*zip(*pairs, strict=True), **look, label=f"d={width}, k={k}")
            axis.set(title=f"{who}: {title}", xlabel=label, ylabel=UNITS[kind], xscale=scale)
        beside = row[min(len(found), wide - 1)]  # an empty place, or the last panel
        look = dict(fontsize=8, loc="upper left", bbox_to_anchor=(float(len(found) == wide), 1))
        beside.legend(*row[0].get_legend_handles_labels(), **look)
    return fig
