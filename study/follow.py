"""metrics.jsonl of a run, live or finished, as TensorBoard or Weights & Biases curves:  python -m study.follow RUN --to=tensorboard|wandb

It reads what training writes and never the other way round: start it at any time, in another terminal; it ends after the validation of the run's
last step or with Ctrl-C. TensorBoard files go to RUN/tensorboard; wandb takes its project and its login from its own settings. Numbers per layer
become load_max/0, load_max/1 ...; the load of every expert stays in curves.png.
"""

import argparse
import json
import sys
import time
from pathlib import Path


def scalars(row):
    """A row of metrics.jsonl as {name: number}: lists by index, nested lists and nulls left out."""
    found = {}
    for name, value in row.items():
        if isinstance(value, list):
            found |= {f"{name}/{i}": v for i, v in enumerate(value) if not isinstance(v, list)}
        elif value is not None and name != "step":
            found[name] = value
    return found


def follow(run, poll=1.0):
    """Rows of metrics.jsonl as they appear, each step's once although a resumed run writes some again; ends with the last step's validation."""
    path, seen = Path(run) / "metrics.jsonl", set()
    while True:
        steps = json.loads((Path(run) / "config.json").read_text())[
            "steps"
        ]  # read again: a run may be resumed for more
        text = path.read_text() if path.exists() else ""
        for line in text[: text.rfind("\n") + 1].splitlines():  # the last line may be half written
            row = json.loads(line)
            key = (row["step"], "val_loss" in row)
            if key not in seen:
                seen.add(key)
                yield row
        if (steps, True) in seen:
            return
        time.sleep(poll)


def open_tensorboard(run):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(Path(run) / "tensorboard"))

    def log(step, values):
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log


def open_wandb(run):
    import wandb

    session = wandb.init(name=Path(run).name, config=json.loads((Path(run) / "config.json").read_text()))
    return lambda step, values: session.log(values, step=step)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--to", choices=("tensorboard", "wandb"), default="tensorboard")
    args = parser.parse_args(argv)
    if not (Path(args.run) / "config.json").exists():
        sys.exit(f"error: {args.run} holds no config.json: give a run directory of train.py")
    try:
        log = {"tensorboard": open_tensorboard, "wandb": open_wandb}[args.to](args.run)
    except ImportError as error:
        sys.exit(f"error: {error}; pip install {args.to}")
    try:
        for row in follow(args.run):
            log(row["step"], scalars(row))
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
