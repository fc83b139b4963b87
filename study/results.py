"""The results file of the study: JSON lines, one for every finished run (written by study/sweep.py, described in study/run.py).

A regime is what runs must share to be compared over E and k.
"""

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

from study.run import Run

TASKS = {"facts": "biographies", "problems": "word problems", "mano": "mental arithmetic"}
TEXT_TASKS = {"triviaqa": "TriviaQA", "hellaswag": "HellaSwag", "gsm8k": "GSM8K", "humaneval": "HumanEval"}
MEMORY = ("facts", "triviaqa", "hellaswag")


class Regime(NamedTuple):
    """Every field of a Run but E, k, seed, rate and initial weights, and data_tokens, which changes no distribution."""

    d_model: int
    n_layers: int
    d_expert: int
    tokens: int
    unique: int
    data: str
    optimizer: str
    batch: int
    seq_len: int
    people: int
    max_steps: int
    mano_length: int
    modulus: int

    def __str__(self):
        what = "text" if self.data else f"{self.unique:,} problems repeated" if self.unique else "fresh problems"
        unusual = [f"{name} {value}" for name, value in self._asdict().items()
                   if name not in ("d_model", "d_expert", "tokens", "unique", "data") and value not in (0, getattr(Run, name))]
        tokens = [f"{self.tokens / 1e6:.3g} M tokens"] if self.tokens else []
        return ", ".join([f"d={self.d_model}", f"F={self.d_expert}", *tokens, what, *unusual])


def read(path):
    """The rows of a results file, without a last line torn by a crash; [] where there is none. Raises ValueError for other damage."""
    path = Path(path)
    content = path.read_text() if path.exists() else ""
    rows = []
    for number, line in enumerate(content[: content.rfind("\n") + 1].splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); restore the file or delete the line") from None
    return rows


def append(path, row):
    """One more line, on disk when this returns; a torn last line is removed first."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def tasks_of(row):
    return TEXT_TASKS if row["run"]["data"] else TASKS


def accuracy(row, task):
    """Share of right answers: values recalled, whole solutions and expressions of trained lengths; None where only loss is measured."""
    return row[task].get("overall", row[task].get("accuracy"))


def loss_unit(row):
    return "bits per byte" if row["run"]["data"] else "nats per token"


def regime(row):
    return Regime(*(row["run"][field] for field in Regime._fields))


def pool(regime):
    """What regimes share that are one experiment at several lengths: people grow with the tokens, so that each is met as often."""
    return regime._replace(tokens=0, people=0)


def answer_loss(row):
    """What learning rates are chosen by: the geometric mean of the losses of answers that training never had in this form, memory and reasoning
    counting half each. Their losses differ by a factor of hundreds, so in a sum, weighted by tokens or not, one of the two would decide alone.
    Prepared text: the validation loss."""
    if row["run"]["data"]:
        return row["val_loss"]
    logs = {task: math.log(max(row[task]["loss"], 1e-6)) for task in TASKS}
    halves = [[logs[task] for task in TASKS if (task in MEMORY) == memory] for memory in (True, False)]
    return math.exp(sum(sum(half) / len(half) for half in halves) / 2)


def standard(rows):
    """The rows that differ in nothing but regime, E, k and seed: learning rate by the common rule, initial weights as always."""
    return [row for row in rows if not row["diverged"] and not row["run"]["lr"]
            and row["run"]["init_std"] == (0.02 if row["run"]["data"] else Run.init_std)]


def families(rows):
    """{regime: {(E, k): {seed: row}}} of standard rows, for regimes with three values of E or more."""
    found = {}
    for row in standard(rows):
        run = row["run"]
        found.setdefault(regime(row), {}).setdefault((run["n_experts"], run["top_k"]), {})[run["seed"]] = row
    return {name: cells for name, cells in sorted(found.items()) if len({e for e, _ in cells}) >= 3}
