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
    moe = [(run, kept, rows) for run, kept, rows, _ in data if not kept["dense"]]
    fig = plt.figure(figsize=(12, 4 + 2.6 * len(moe)), layout="constrained")
    grid = fig.add_gridspec(1 + len(moe), 3, height_ratios=[4] + [2.6] * len(moe))
    loss, rate, norm = (fig.add_subplot(grid[0, column]) for column in range(3))
    for i, (run, kept, rows, val) in enumerate(data):
        million = lambda row: row["tokens"] / 1e6  # noqa: E731
        tokens = [million(row) for row in rows]
        loss.plot(tokens, [row["loss"] for row in rows], color=f"C{i}", lw=0.8, alpha=0.7, **dot(rows))
        loss.plot(
            [million(row) for row in val],
            [row["val_loss"] for row in val],
            "o-",
            color=f"C{i}",
            ms=3,
            lw=1.5,
            label=label(run, kept),
        )
        rate.plot(tokens, [row["lr"] for row in rows], color=f"C{i}", **dot(rows))
        norm.plot(tokens, [row["grad_norm"] for row in rows], color=f"C{i}", lw=0.8, **dot(rows))
    curves.set_loss_limits(
        loss,
        [row["loss"] for _, _, rows, _ in data for row in rows] + [row["val_loss"] for *_, val in data for row in val],
    )
    loss.legend(fontsize=8, title="dots: validation, thin: training", title_fontsize=8)
    for axis, title in (
        (loss, "cross-entropy, nats per token"),
        (rate, "learning rate"),
        (norm, "gradient norm before clipping"),
    ):
        axis.set(title=title, xlabel="million tokens")
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.3)
    norm.set_yscale("log")
    for i, (run, kept, rows) in enumerate(moe):
        axis = fig.add_subplot(grid[1 + i, :])
        last = rows[-1]["tokens"] / 1e6
        typical = sorted(max(row["load_max"]) for row in rows)[
            len(rows) // 2
        ]  # the first steps would leave no colours for the rest
        image = axis.imshow(
            list(zip(*(row["load_max"] for row in rows), strict=True)),
            aspect="auto",
            origin="lower",
            cmap="viridis",
            vmin=1,
            vmax=max(2.0, typical),
            extent=(0, last, -0.5, kept["n_layers"] - 0.5),
        )
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.set(
            title=f"load of the busiest expert, 1 = even split: {label(run, kept)}",
            xlabel="million tokens",
            ylabel="layer",
        )
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
