"""A table of runs and a picture of their curves:  python -m study.show RUN... [--out FILE]

One run: the picture that training keeps up to date (optimoe/curves.py). Several runs, all of train.py or all of
grpo.py, share one picture: thin lines are training, dots are tests.
"""

from dataclasses import dataclass
from pathlib import Path

from data import files
from optimoe import config, curves
from optimoe.config import check_file, require
from study.figures import canvas
from study.plan import aligned, short

# Columns of the table: what results.json, metrics.jsonl or the configuration calls them.
COLUMNS = {
    "parameters": "parameters",
    "active": "active_parameters",
    "tokens": "tokens",
    "step": "step",
    "loss": "loss",
    "validation": "val_loss",
    "bits/byte": "val_bits_per_byte",
    "reward": "reward",
    "unseen": "test_reward",
    "KL": "kl",
    "tokens/s": "tokens_per_s",
}


@dataclass(frozen=True)
class ShowConfig:
    POSITIONAL = ("runs",)

    runs: tuple[str, ...]  # run directories
    out: str = ""  # PNG file; empty: curves.png in the run directory, overlay.png in the first of several


def evaluations(run):
    """{"TASK METRIC": mean} of every evaluation of the run, the latest checkpoint last."""
    found = {}
    for path in sorted(Path(run).glob("eval-*/results.json")):
        for task, done in files.read_json(path).get("tasks", {}).items():
            found |= {f"{task} {metric}": stats["mean"] for metric, stats in done["metrics"].items()}
    return found


def table(runs):
    """Lines of a table: a row for each run, a column for every number that one of them has."""
    known = []
    for run in runs:
        _, rows, tests = curves.read(run)
        final = Path(run) / "results.json"
        numbers = rows[-1] | (tests[-1] if tests else {}) | (files.read_json(final) if final.exists() else {})
        known.append({title: numbers[name] for title, name in COLUMNS.items() if name in numbers} | evaluations(run))
    titles = list(dict.fromkeys(title for row in (COLUMNS, *known) for title in row))
    titles = [title for title in titles if any(row.get(title) is not None for row in known)]
    cell = lambda value: "–" if value is None else short(value) if value >= 1000 else f"{value:.4g}"
    cells = [[str(run), *(cell(row.get(title)) for title in titles)] for run, row in zip(runs, known, strict=True)]
    return aligned(["run", *titles], cells)


def overlay(runs):
    """The matplotlib figure for these run directories."""
    data = [(run, *curves.read(run)) for run in runs]
    found = [curves.panels(rows) for _, _, rows, _ in data]
    kinds = {"reward" in rows[0] for _, _, rows, _ in data}
    remedy = "runs of train.py and of grpo.py share no axis; show them apart"
    require(len(kinds) == 1, "runs", ",".join(map(str, runs)), remedy)
    grpo = kinds == {True}
    rates = [[row.get("lr") for row in rows] for _, _, rows, _ in data]
    titles = list(curves.GRPO) if grpo else [curves.LOSS, curves.NORM]
    titles += ["learning rate"] if rates != rates[:1] * len(rates) else []
    fig, axes = canvas(1, len(titles), (4 * len(titles), 4.4))
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set(title=title, xlabel="step" if grpo else "million tokens")
        axis.set_yscale("log" if title == curves.NORM else "linear")
        axis.locator_params(axis="x", nbins=5)
        for i, ((run, settings, rows, tests), panels) in enumerate(zip(data, found, strict=True)):
            x = lambda rows: [row["step"] if grpo else row["tokens"] / 1e6 for row in rows]
            line = panels.get(title, [rates[i]])[0]  # a rate that never changes has no panel of its own
            axis.plot(x(rows), line, color=f"C{i}", lw=0.8, alpha=0.7, **curves.dot(rows))
            if axis is axes[0][0]:
                tested = [row["test_reward" if grpo else "val_loss"] for row in tests]
                axis.plot(x(tests), tested, "o-", color=f"C{i}", ms=3, lw=1.5, label=curves.label(run, settings))
    if not grpo:
        losses = [row.get("loss", row.get("val_loss")) for *_, rows, tests in data for row in (*rows, *tests)]
        curves.set_loss_limits(axes[0][0], losses)
    fig.legend(fontsize=8, title="dots: tests, thin: training", title_fontsize=8, loc="outside lower center", ncols=2)
    return fig


def main(argv=None):
    cfg = config.parse(ShowConfig, argv, __doc__)
    several = len(cfg.runs) > 1
    if cfg.out:
        check_file(cfg.out, "out")
    print("\n".join(table(cfg.runs)))
    out = cfg.out or str(Path(cfg.runs[0]) / ("overlay.png" if several else "curves.png"))
    curves.write(lambda: overlay(cfg.runs) if several else curves.figure(cfg.runs[0]), out)


if __name__ == "__main__":
    config.command_line(main)
