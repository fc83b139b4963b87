"""Curves of one run or several, from their metrics.jsonl:  python -m study.show RUN... [--out FILE]

Top: training (thin) and validation (dots) cross-entropy, learning rate, gradient norm. Below, for every run with experts: the load of the
busiest expert of each layer over time, relative to an even split (1 = balanced).
"""

import argparse
import json
import sys
from pathlib import Path


def read(run):
    """(config, training rows, validation rows) of a run directory; a last line torn by a crash is dropped.

    Raises ValueError when there is nothing to show."""
    run = Path(run)
    if not (run / "metrics.jsonl").exists():
        raise ValueError(f"{run} holds no metrics.jsonl: give a run directory of train.py")
    rows = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    train = [row for row in rows if "loss" in row]
    if not train:
        raise ValueError(f"{run} has logged no training step yet")
    config = json.loads((run / "config.json").read_text())
    return config, train, [row for row in rows if "val_loss" in row]


def label(run, config):
    kind = "dense" if config["dense"] else f"E={config['n_experts']}, k={config['top_k']}"
    return f"{Path(run).name} (d={config['d_model']}, {kind})"


def figure(runs):
    """The matplotlib figure for these run directories."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = [(run, *read(run)) for run in runs]
    moe = [(run, config, rows) for run, config, rows, _ in data if not config["dense"]]
    fig = plt.figure(figsize=(12, 4 + 2.6 * len(moe)), layout="constrained")
    grid = fig.add_gridspec(1 + len(moe), 3, height_ratios=[4] + [2.6] * len(moe))
    loss, rate, norm = (fig.add_subplot(grid[0, column]) for column in range(3))
    for i, (run, config, rows, val) in enumerate(data):
        million = lambda row, c=config: row["step"] * c["batch_size"] * c["seq_len"] / 1e6  # noqa: E731
        tokens = [million(row) for row in rows]
        loss.plot(tokens, [row["loss"] for row in rows], color=f"C{i}", lw=0.8, alpha=0.7)
        loss.plot([million(row) for row in val], [row["val_loss"] for row in val], "o-", color=f"C{i}", ms=3, lw=1.5, label=label(run, config))
        rate.plot(tokens, [row["lr"] for row in rows], color=f"C{i}")
        norm.plot(tokens, [row["grad_norm"] for row in rows], color=f"C{i}", lw=0.8)
    losses = sorted([row["loss"] for _, _, rows, _ in data for row in rows] + [row["val_loss"] for *_, val in data for row in val])
    loss.set_ylim(losses[0] - 0.1, losses[int(0.95 * (len(losses) - 1))] + 0.3)  # the first steps would flatten the rest
    loss.legend(fontsize=8, title="dots: validation, thin: training", title_fontsize=8)
    for axis, title in ((loss, "cross-entropy, nats per token"), (rate, "learning rate"), (norm, "gradient norm before clipping")):
        axis.set(title=title, xlabel="million tokens")
        axis.grid(alpha=0.3)
    norm.set_yscale("log")
    for i, (run, config, rows) in enumerate(moe):
        axis = fig.add_subplot(grid[1 + i, :])
        last = rows[-1]["step"] * config["batch_size"] * config["seq_len"] / 1e6
        image = axis.imshow(list(zip(*(row["load_max"] for row in rows), strict=True)), aspect="auto", origin="lower", cmap="viridis", vmin=1,
                            vmax=max(2.0, sorted(max(row["load_max"]) for row in rows)[len(rows) // 2]), extent=(0, last, -0.5, config["n_layers"] - 0.5))
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.set(title=f"load of the busiest expert, 1 = even split: {label(run, config)}", xlabel="million tokens", ylabel="layer")
        fig.colorbar(image, ax=axis, pad=0.01)
    return fig


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--out", help="PNG file; default: curves.png in the (first) run directory")
    args = parser.parse_args(argv)
    out = args.out or str(Path(args.runs[0]) / "curves.png")
    try:
        figure(args.runs).savefig(out, dpi=130)
    except (ValueError, ImportError) as error:
        sys.exit(f"error: {error}" + ("; pip install 'optimoe[plot]'" if isinstance(error, ImportError) else ""))
    print(out)


if __name__ == "__main__":
    main()
