"""Curves of one run, or several laid over one another:  python -m study.show RUN... [--out FILE]

One run: the picture that training keeps up to date (curves.py). Several: training (thin) and validation (dots)
cross-entropy, learning rate, gradient norm; below, for every run with experts, the load of the busiest expert of
each layer over time, relative to an even split (1 = balanced).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from optimoe import config, curves
from optimoe.curves import dot, label, read


@dataclass(frozen=True)
class ShowConfig:
    POSITIONAL = ("runs",)

    runs: tuple[str, ...]  # run directories
    out: str = ""  # PNG file; empty: curves.png in the run directory, overlay.png in the first of several


def overlay(runs):
    """The matplotlib figure for these run directories."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = [(run, *read(run)) for run in runs]
    moe = [(label(run, kept), kept["n_layers"], rows) for run, kept, rows, _ in data if not kept["dense"]]
    fig = plt.figure(figsize=(12, 4 + 2.6 * len(moe)), layout="constrained")
    grid = fig.add_gridspec(1 + len(moe), 3, height_ratios=[4] + [2.6] * len(moe))
    names = {
        "loss": "cross-entropy, nats per token",
        "lr": "learning rate",
        "grad_norm": "gradient norm before clipping",
    }
    axes = {name: fig.add_subplot(grid[0, column]) for column, name in enumerate(names)}
    million = lambda rows: [row["tokens"] / 1e6 for row in rows]  # noqa: E731
    for i, (run, kept, rows, val) in enumerate(data):
        for name, axis in axes.items():
            axis.plot(million(rows), [row[name] for row in rows], color=f"C{i}", lw=0.8, alpha=0.7, **dot(rows))
        style = dict(color=f"C{i}", ms=3, lw=1.5, label=label(run, kept))
        axes["loss"].plot(million(val), [row["val_loss"] for row in val], "o-", **style)
    losses = [row.get("loss", row.get("val_loss")) for *_, rows, val in data for row in (*rows, *val)]
    curves.set_loss_limits(axes["loss"], losses)
    axes["loss"].legend(fontsize=8, title="dots: validation, thin: training", title_fontsize=8)
    for name, axis in axes.items():
        axis.set(title=names[name], xlabel="million tokens")
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.3)
    axes["grad_norm"].set_yscale("log")
    for i, (name, n_layers, rows) in enumerate(moe):
        axis = fig.add_subplot(grid[1 + i, :])
        typical = sorted(max(row["load_max"]) for row in rows)[len(rows) // 2]  # the first steps would take all colours
        load = list(zip(*(row["load_max"] for row in rows), strict=True))
        extent = (0, rows[-1]["tokens"] / 1e6, -0.5, n_layers - 0.5)
        image = axis.imshow(load, aspect="auto", origin="lower", vmin=1, vmax=max(2.0, typical), extent=extent)
        axis.yaxis.get_major_locator().set_params(integer=True)
        title = f"load of the busiest expert, 1 = even split: {name}"
        axis.set(title=title, xlabel="million tokens", ylabel="layer")
        fig.colorbar(image, ax=axis, pad=0.01)
    return fig


def main(argv=None):
    try:
        cfg = config.parse(ShowConfig, sys.argv[1:] if argv is None else argv, __doc__)
        several = len(cfg.runs) > 1
        out = cfg.out or str(Path(cfg.runs[0]) / ("overlay.png" if several else "curves.png"))
        curves.write(lambda: overlay(cfg.runs) if several else curves.figure(cfg.runs[0]), out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
