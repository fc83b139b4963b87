"""metrics.jsonl of a run, live or finished, as TensorBoard or Weights & Biases curves:  python -m study.follow RUN
--to=tensorboard|wandb

It reads what training writes and never the other way round: start it at any time, in another terminal; it ends
after the validation of the run's last step or with Ctrl-C. TensorBoard files go to RUN/tensorboard; wandb takes
its project and its login from its own settings. Numbers per layer become load_max/0, load_max/1 ...; the load of
every expert stays in curves.png.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data import files
from optimoe import config
from optimoe.config import require


@dataclass(frozen=True)
class FollowConfig:
    POSITIONAL = ("run",)

    run: str  # the run directory
    to: Literal["tensorboard", "wandb"] = "tensorboard"


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
    """Rows of metrics.jsonl as they appear, each step's once although a resumed run writes some again; ends with
    the last step's validation."""
    path, seen = Path(run) / "metrics.jsonl", set()
    while True:
        steps = files.read_json(Path(run) / "config.json")["steps"]  # read again: a run may be resumed for more
        for row in files.read_rows(path)[0] if path.exists() else ():
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

    session = wandb.init(name=Path(run).name, config=files.read_json(Path(run) / "config.json"))
    return lambda step, values: session.log(values, step=step)


def main(argv=None):
    try:
        cfg = config.parse(FollowConfig, sys.argv[1:] if argv is None else argv, __doc__)
        found = (Path(cfg.run) / "config.json").exists()
        require(found, "run", cfg.run, "it holds no config.json: give a run directory of train.py")
        log = {"tensorboard": open_tensorboard, "wandb": open_wandb}[cfg.to](cfg.run)
        for row in follow(cfg.run):
            log(row["step"], scalars(row))
    except ImportError as error:
        sys.exit(f"error: {error}; pip install {cfg.to}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
