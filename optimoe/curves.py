"""Draw RUN/curves.png from RUN/metrics.jsonl:  python -m optimoe.curves RUN

Training redraws it in a process of its own. `python -m study.show RUN...` draws several runs into one picture.
"""

import importlib.util
import io
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from data import files
from optimoe import config

LOSS, NORM = "cross-entropy, nats per token", "gradient norm before clipping"
ENTROPY = "entropy of the mean router, nats (dotted: even; dark: first layer)"
LOAD = "load of the busiest expert (1: even; dark: first layer)"
NUMBERS = ("step", "tokens", "loss", "val_loss", "reward", "test_reward")  # never None; others may be unknown
GRPO = {
    "share of right answers (reward)": "reward",
    "KL to the start model, nats per token": "kl",
    NORM: "grad_norm",
    "length of an answer, tokens": "answer_tokens",
}


def read(run):
    """(config, training rows, validation rows) of a run directory. Rows have a "step", and except in GRPO "tokens".

    Raises ValueError for damaged files, and if there is nothing to show."""
    log, path = Path(run) / "metrics.jsonl", Path(run) / "config.json"
    for needed in (log, path):
        if not needed.exists():
            raise ValueError(f"{run} holds no {needed.name}: give a run directory")
    rows = checked(log)
    train = [row for row in rows if "loss" in row]
    if not train:
        raise ValueError(f"{run} has logged no training step yet")
    settings = config.renamed(files.read_json(path))
    # Older validation rows lack tokens: take those of the training row of that step.
    counted = {row["step"]: row["tokens"] for row in train if "tokens" in row}
    for row in rows if "seq_len" in settings else ():
        each_step = settings.get("batch_size", 0) * settings["seq_len"]
        row.setdefault("tokens", counted.get(row["step"], row["step"] * each_step))
    return settings, train, [row for row in rows if "val_loss" in row or "loss" not in row and "test_reward" in row]


def checked(log):
    """The rows of a metrics.jsonl. ValueError names the first line that lacks a number where one is drawn."""
    rows, lines = files.read_rows(log)[0], log.read_bytes().split(b"\n")
    places = [number for number, line in enumerate(lines, 1) if line.strip()]
    for place, row in zip(places, rows, strict=False):  # a last line may be cut off
        for name, value in {"step": None, **row}.items():
            values = value if isinstance(value, list) else [value]
            ok = all(isinstance(x, (int, float, list)) or x is None and name not in NUMBERS for x in values)
            config.require(ok, f"{log}:{place}: {name}", value, "a number is needed; remove that line")
    return rows


def label(run, settings):
    name = Path(run).absolute().name
    if "group_size" in settings:
        return f"{name} ({settings['task']}, groups of {settings['group_size']})"
    kind = "dense" if settings["dense"] else f"E={settings['n_experts']}, k={settings['top_k']}"
    return f"{name} (d={settings['d_model']}, {kind})"


def dot(rows):
    """The style of a line: a single row needs a dot to be seen."""
    return {"marker": "."} if len(rows) == 1 else {}


def set_loss_limits(axis, losses):
    """Show all losses, unless the highest 5 % would take more than half of the height."""
    losses = sorted(losses)
    low, usual = losses[0] - 0.1, losses[int(0.95 * (len(losses) - 1))] + 0.3
    axis.set_ylim(low, usual if losses[-1] - low > 2 * (usual - low) else max(usual, losses[-1] + 0.1))


def panels(rows):
    """{title: list of series, a single one or one for each layer} of everything worth a panel."""
    column = lambda name: [row.get(name, 0) for row in rows]
    if "reward" in rows[0]:
        return {title: [column(name)] for title, name in GRPO.items()}
    found = {LOSS: [column("loss")], NORM: [column("grad_norm")]}
    if len(set(column("lr"))) > 1:
        found["learning rate"] = [column("lr")]
    if rows[-1].get("router_entropy"):  # absent from dense runs
        found[ENTROPY] = list(zip(*column("router_entropy"), strict=True))
        if max(map(max, column("load_max"))) > 1.2:
            found[LOAD] = list(zip(*column("load_max"), strict=True))
    if any(column("dead_experts")):
        found["experts without a token, all layers"] = [column("dead_experts")]
    return found


def figure(run):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    settings, rows, val = read(run)
    found, grpo = panels(rows), "reward" in rows[0]
    x = lambda rows: [row["step"] if grpo else row["tokens"] / 1e6 for row in rows]
    columns = min(3, len(found)) if len(found) != 4 else 2
    height = math.ceil(len(found) / columns)
    size = {"figsize": (13, 2.8 * height + 0.6), "layout": "constrained"}
    fig, axes = plt.subplots(height, columns, squeeze=False, **size)
    fig.suptitle(label(run, settings))
    for axis in axes.flatten()[len(found) :]:
        axis.remove()
    for axis, (title, series) in zip(axes.flatten(), found.items(), strict=False):
        for layer, values in enumerate(series):
            colour = plt.cm.viridis(layer / len(series)) if len(series) > 1 else "C0"
            axis.plot(x(rows), values, lw=0.8, color=colour, label="training", **dot(rows))
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step" if grpo else "million tokens", fontsize=8)
        axis.locator_params(axis="x", nbins=5, integer=grpo)  # more would touch: long labels in a short run
        axis.grid(alpha=0.3)
        if axis is axes[0, 0]:
            tested = [row["test_reward" if grpo else "val_loss"] for row in val]
            if val:
                named = "greedy, on unseen questions" if grpo else "validation"
                axis.plot(x(val), tested, "C1o-", ms=3, lw=1.2, label=named)
            if not grpo:
                set_loss_limits(axis, [*series[0], *tested])
            axis.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.1))
        elif title == ENTROPY:
            axis.axhline(math.log(settings["n_experts"]), color="black", ls=":", lw=1.5, zorder=3)
            axis.margins(y=0.1)
        elif title == NORM:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
    return fig


def write(draw, path):
    """Save the figure that draw() makes, or end the program with a line about what is missing."""
    try:
        content = io.BytesIO()
        draw().savefig(content, dpi=110, format="png")
        files.replace(path, content.getvalue())
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}" + ("; pip install -e '.[plot]'" if isinstance(error, ImportError) else ""))
    print(path)


class Curves:
    """Redraws the picture during training, in one process at a time. If it fails, training continues."""

    def __init__(self, run_dir):
        self.run_dir, self.process = run_dir, None
        self.possible = importlib.util.find_spec("matplotlib") is not None
        if not self.possible:
            print(f"{run_dir}/curves.png will not be drawn: pip install -e '.[plot]'", flush=True)

    def refresh(self):
        if self.possible and (self.process is None or self.process.poll() is not None):
            command = ["nice", "-n", "10", sys.executable, "-m", "optimoe.curves", str(Path(self.run_dir).absolute())]
            silent = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
            try:
                self.process = subprocess.Popen(command, cwd=Path(__file__).parent.parent, **silent)
            except OSError as error:  # no memory for a process, or none allowed
                print(f"{self.run_dir}/curves.png was not drawn: {error}", flush=True)

    def close(self):
        """Draw once more, with the last rows. Waits at most a minute for each drawing."""
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
    run: str  # run directory of train.py or grpo.py
    out: str = ""  # PNG file; empty: curves.png in the run directory


def main(argv=None):
    args = config.parse(CurvesConfig, argv, __doc__)
    write(lambda: figure(args.run), args.out or str(Path(args.run) / "curves.png"))


if __name__ == "__main__":
    config.command_line(main)
