"""Curves of one run, or several laid over one another:  python -m study.show RUN... [--out FILE]

One run: the picture that training keeps up to date (optimoe/curves.py). Several: training (thin) and validation (dots)
cross-entropy, learning rate, gradient norm.
"""

from dataclasses import dataclass
from pathlib import Path

from optimoe import config, curves
from optimoe.curves import LOSS, dot, label, read

PANELS = {"loss": LOSS, "lr": "learning rate", "grad_norm": "gradient norm before clipping"}


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
    fig, axes = plt.subplots(1, len(PANELS), figsize=(12, 4), layout="constrained")
    for axis, (name, title) in zip(axes, PANELS.items(), strict=True):
        axis.set(title=title, xlabel="million tokens", yscale="log" if name == "grad_norm" else "linear")
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.3)
        for i, (run, kept, rows, val) in enumerate(data):
            million = [row["tokens"] / 1e6 for row in rows]
            axis.plot(million, [row[name] for row in rows], color=f"C{i}", lw=0.8, alpha=0.7, **dot(rows))
            if name == "loss":
                points = [row["tokens"] / 1e6 for row in val], [row["val_loss"] for row in val]
                axis.plot(*points, "o-", color=f"C{i}", ms=3, lw=1.5, label=label(run, kept))
    losses = [row.get("loss", row.get("val_loss")) for *_, rows, val in data for row in (*rows, *val)]
    curves.set_loss_limits(axes[0], losses)
    axes[0].legend(fontsize=8, title="dots: validation, thin: training", title_fontsize=8)
    return fig


def main(argv=None):
    cfg = config.parse(ShowConfig, argv, __doc__)
    several = len(cfg.runs) > 1
    out = cfg.out or str(Path(cfg.runs[0]) / ("overlay.png" if several else "curves.png"))
    curves.write(lambda: overlay(cfg.runs) if several else curves.figure(cfg.runs[0]), out)


if __name__ == "__main__":
    config.command_line(main)
