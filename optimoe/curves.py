"""run/curves.png from metrics.jsonl: what a person looks at while a run trains.  python -m optimoe.curves RUN

Cross-entropy, learning rate and gradient norm; router entropy and dead experts; and for every layer a heat map of the
load of its experts over time (white: even, red: more, blue: less, green: no token). train.py redraws it at every
validation and checkpoint in a process of its own, so that training never waits for it. `python -m study.show RUN...`
lays several runs over one another.
"""

import importlib.util
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from data import files
from optimoe import config


def read(run):
    """(config, training rows, validation rows) of a run directory; every row has its "step" and "tokens".

    Raises ValueError for damaged files, and when there is nothing to show."""
    log, path = Path(run) / "metrics.jsonl", Path(run) / "config.json"
    for needed in (log, path):
        if not needed.exists():
            raise ValueError(f"{run} holds no {needed.name}: give a run directory of train.py")
    rows, _ = files.read_rows(log)
    train = [row for row in rows if "loss" in row]
    if not train:
        raise ValueError(f"{run} has logged no training step yet")
    settings = config.renamed(files.read_json(path))
    # Validations of older runs have no count of tokens: it is that of the training row of their step.
    counted = {row["step"]: row["tokens"] for row in train if "tokens" in row}
    for row in rows:
        each_step = settings.get("batch_size", 0) * settings["seq_len"]
        row.setdefault("tokens", counted.get(row["step"], row["step"] * each_step))
    return settings, train, [row for row in rows if "val_loss" in row]


def label(run, settings):
    kind = "dense" if settings["dense"] else f"E={settings['n_experts']}, k={settings['top_k']}"
    return f"{Path(run).absolute().name} (d={settings['d_model']}, {kind})"


def dot(rows):
    """The style with which a run of one row is seen: a line takes two."""
    return {"marker": "."} if len(rows) == 1 else {}


def set_loss_limits(axis, losses):
    """All of them, unless the first steps took more than half of the height from the rest."""
    losses = sorted(losses)
    low, usual = losses[0] - 0.1, losses[int(0.95 * (len(losses) - 1))] + 0.3
    axis.set_ylim(low, usual if losses[-1] - low > 2 * (usual - low) else max(usual, losses[-1] + 0.1))


def figure(run):
    """The matplotlib figure of one run directory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    load_colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad="limegreen")  # green: no token at all
    settings, rows, val = read(run)
    tokens = [row["tokens"] / 1e6 for row in rows]
    column = lambda name: [row[name] for row in rows]  # noqa: E731
    entropy = rows[-1].get("router_entropy")  # absent from dense runs
    maps = _heat_maps(rows)
    columns = max(1, min(4, len(maps)))
    map_rows = math.ceil(len(maps) / columns)
    heights = [3.2] + [2.4] * bool(entropy) + [2.1] * map_rows
    fig = plt.figure(figsize=(13, sum(heights) + 0.6), layout="constrained")
    fig.suptitle(label(run, settings))
    parts = fig.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]

    loss, rate, norm = parts[0].subplots(1, 3)
    loss.plot(tokens, column("loss"), lw=0.8, alpha=0.8, label="training", **dot(rows))
    if val:
        loss.plot(
            [row["tokens"] / 1e6 for row in val],
            [row["val_loss"] for row in val],
            "o-",
            ms=3,
            lw=1.2,
            label="validation",
        )
    set_loss_limits(loss, column("loss") + [row["val_loss"] for row in val])
    loss.legend(fontsize=8)
    rate.plot(tokens, column("lr"), **dot(rows))
    norm.plot(tokens, column("grad_norm"), lw=0.8, **dot(rows))
    norm.set_yscale("log")
    named = [(loss, "cross-entropy, nats per token"), (rate, "learning rate"), (norm, "gradient norm before clipping")]
    if entropy:
        spread, dead = parts[1].subplots(1, 2)
        for layer, values in enumerate(zip(*column("router_entropy"), strict=True)):
            spread.plot(tokens, values, lw=0.8, color=plt.cm.viridis(layer / max(1, len(entropy) - 1)), **dot(rows))
        spread.axhline(math.log(settings["n_experts"]), color="black", ls=":", lw=1.5, zorder=3)
        spread.margins(y=0.1)
        dead.step(tokens, column("dead_experts"), where="post", **dot(rows))
        dead.set_ylim(-0.05, 1.05 * max(1, *column("dead_experts")))
        named += [
            (spread, "entropy of the mean router distribution, nats (dark: first layer, dotted: even)"),
            (dead, "experts without a token, all layers"),
        ]
    for axis, title in named:
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("million tokens", fontsize=8)
        axis.locator_params(axis="x", nbins=5)  # more would touch in a run of a few thousand tokens
        axis.grid(alpha=0.3)
    for index, part in enumerate(parts[len(parts) - map_rows :]):
        axes = part.subplots(1, columns, squeeze=False)[0]
        for layer, axis in enumerate(axes, columns * index):
            if layer >= len(maps):
                axis.axis("off")
                continue
            image = maps[layer]
            drawn = axis.imshow(
                image,
                aspect="auto",
                origin="lower",
                cmap=load_colours,
                vmin=-2,
                vmax=2,
                interpolation="nearest",
                extent=(0, tokens[-1], -0.5, len(image) - 0.5),
            )
            axis.set_title(f"load of layer {layer}", fontsize=8)
            axis.set_xlabel("million tokens", fontsize=8)
            axis.set_ylabel("expert", fontsize=8)
            axis.tick_params(labelsize=7)
            axis.yaxis.get_major_locator().set_params(integer=True)
        bar = part.colorbar(drawn, ax=list(axes), pad=0.01)
        bar.set_ticks([-2, -1, 0, 1, 2], labels=["≤ 1/4", "1/2", "even", "2", "≥ 4"])
    return fig


def _heat_maps(rows):
    """For each layer the log2 of the load of its experts, each a time series; none for a dense model."""
    log2 = lambda load: math.log2(load) if load > 0 else math.nan  # noqa: E731
    layers = zip(*(row.get("load", ()) for row in rows), strict=True)
    return [[[log2(x) for x in expert] for expert in zip(*times, strict=True)] for times in layers]


def write(draw, path):
    """Save the figure that draw() makes, whole or not at all, or end the program with what is missing."""
    tmp = Path(path).with_suffix(".tmp.png")
    try:
        draw().savefig(tmp, dpi=110)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}" + ("; pip install 'optimoe[plot]'" if isinstance(error, ImportError) else ""))
    os.replace(tmp, path)
    print(path)


class Curves:
    """Redraws the picture of a run beside its training, in one process at a time. If it fails, training goes on."""

    def __init__(self, run_dir):
        self.run_dir, self.process = run_dir, None
        self.possible = importlib.util.find_spec("matplotlib") is not None
        if not self.possible:
            print(f"{run_dir}/curves.png will not be drawn: pip install 'optimoe[plot]'", flush=True)

    def refresh(self):
        if self.possible and (self.process is None or self.process.poll() is not None):
            try:
                self.process = subprocess.Popen(
                    ["nice", "-n", "10", sys.executable, "-m", "optimoe.curves", str(Path(self.run_dir).absolute())],
                    cwd=Path(__file__).parent.parent,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            except OSError as error:  # no memory for a process, or none allowed
                print(f"{self.run_dir}/curves.png was not drawn: {error}", flush=True)

    def close(self):
        """Draw once more, with the last rows, and wait (at most a minute)."""
        try:
            for draw in (lambda: None, self.refresh):
                draw()
                if self.process is not None:
                    self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()


@dataclass(frozen=True)
class CurvesConfig:
    POSITIONAL: ClassVar = ("run",)
    run: str  # run directory of train.py
    out: str = ""  # PNG file; empty: curves.png in the run directory


def main(argv=None):
    args = config.parse(CurvesConfig, argv, __doc__)
    write(lambda: figure(args.run), args.out or str(Path(args.run) / "curves.png"))


if __name__ == "__main__":
    main()
