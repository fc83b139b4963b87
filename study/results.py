"""The results files of the study: signed JSON lines, one for every finished run or post-trained model.

A regime is what runs must share to be compared over E. A line is {E: {rate: {seed: row}}}, all runs of one regime
and one k. A cell is {seed: row}, runs that differ in the seed alone.
"""

import dataclasses
import fcntl
import json
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

from data import files
from study.execute import BEFORE, Run, key

TASKS = {"facts": "facts", "problems": "solutions", "mano": "mental arithmetic"}
MIN_SEEDS = 3
LIMITS = (7e-4, 0.4)  # of learning rates: no search goes beyond
# Keys of every row, for `read` and `append`.
ROW = tuple("key run lr diverged tokens tpp params flops points tokens_per_s seconds jobs device".split())
REMEDY = "restore the file or delete the line"


def read(path, needed=ROW, optional=False):
    """The rows of a results file, without a last line torn by a crash. ValueError for other damage and other files.

    needed: keys of every row; each line begins with the first of them. optional: a missing file has no rows, instead of
    raising FileNotFoundError."""
    path = Path(path)
    if not optional and not path.exists():
        raise FileNotFoundError(f"{path}: no such results file; check the path")
    return parsed(path.read_bytes() if path.exists() else b"", path, needed)[0]


def parsed(content, path, needed, first=1):
    """(rows, their length in bytes) of the content of a results file from line `first` on, without a torn last line."""
    rows, size = [], 0
    for number, line in enumerate(re.findall(rb"[^\n]*\n|[^\n]+", content), first):  # splitlines also splits at \r
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            begin = f'{{"{needed[0]}": "'.encode()
            cut = isinstance(error, json.JSONDecodeError) and not error.msg.startswith("Extra data")
            if cut and not line.endswith(b"\n") and begin.startswith(line[: len(begin)]):
                break
            raise ValueError(f"{where}: not JSON ({error}); {REMEDY}") from None
        if lacking := [name for name in needed if not isinstance(row, dict) or name not in row]:
            found = f"not a row of such a results file, it lacks {', '.join(lacking)}"
            raise ValueError(f"{where}: {found}; name another file or delete the line")
        rows.append(checked(row, where))
        size += len(line)
    return rows, size


def checked(row, where):
    """The row as the present code writes it. ValueError where its checksum or its key shows that it was changed."""
    for name, value in row.items() if files.CRC not in row else ():
        # A damaged byte in the name of a checksum leaves its value: eight hexadecimal digits.
        if name != "revision" and isinstance(value, str) and re.fullmatch("[0-9a-f]{8}", value):
            raise ValueError(f"{where}: damaged, it holds {name!r} and no checksum; {REMEDY}")
    row = files.check(row, where, REMEDY)
    if "key" not in row:  # a row of study.posttrain
        return row
    if not row["run"]["lr"]:  # the first sweep planned runs without a rate: take the one that was used
        row |= {"run": row["run"] | {"lr": row["lr"]}, "key": None}
    try:
        run = Run(**BEFORE | row["run"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: its run cannot be read ({error}); {REMEDY}, or use older code") from None
    if row["key"] not in (None, key(run)):
        raise ValueError(f"{where} is damaged: its key {row['key']!r} is not that of its run; {REMEDY}")
    return row | {"key": key(run), "run": dataclasses.asdict(run)}


def append(path, row, needed=ROW):
    """Append one signed line, after removing a torn last line. Several processes may do so at once."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        last = content.rfind(b"\n") + 1
        end = last + parsed(content[last:], path, needed, content.count(b"\n") + 1)[1]
        file.truncate(end)
        begin = b"\n" if end > last else b""  # a whole last line may lack its line break
        file.write(begin + json.dumps(files.sign(row)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


# ---- what a row says


def accuracy(row, task):
    """Share of right answers: values recalled, or whole solutions of trained lengths."""
    return row[task].get("overall", row[task].get("accuracy"))


def loss(row, task):
    """Nats per token of the answers ("train": the training loss); infinite where it diverged."""
    return math.inf if row["diverged"] else row["train_loss"] if task == "train" else row[task]["loss"]


def distinct(rows):
    """The first row of every run. Later rows are the same run again, with slightly different numbers on a GPU."""
    return list({row["key"]: row for row in reversed(rows)}.values())[::-1]


def counted(rows):
    """The runs that may vote, one row of each. Those with k = 1 may not: their normalised gate is always 1, so the loss
    trains no router. Runs of the first edition with another init_std, or on text, are another study."""
    may_vote = lambda run: run["top_k"] > 1 and run["init_std"] == Run.init_std and not run["data"]
    return [row for row in distinct(rows) if may_vote(row["run"])]


HIDDEN = "n_experts top_k init_std lr seed data data_tokens".split()  # may differ in a regime, or equal if runs vote
REGIME = [field.name for field in dataclasses.fields(Run) if field.name not in HIDDEN]


class Regime(NamedTuple("Regime", [(name, object) for name in REGIME])):
    """Every field of a Run that is not HIDDEN."""

    @property
    def usual(self):
        """Whether it is the study's usual regime, apart from the number of problems."""
        fields = (self.d_model, self.d_expert, self.tokens, self.optimizer, self.kind, self.paired)
        return fields == (128, 64, 2**24, "muon", "mixture", True)

    def __str__(self):
        named = ("d_model", "d_expert", "tokens", "unique", "paired", "kind")
        what = f"{self.unique:,} problems" if self.unique else "fresh problems"
        what = {"room": "keys", "twohop": f"{self.unique:,} two-hop questions"}.get(self.kind, what)
        tokens = f"{self.tokens / 1e6:.3g} M tokens" if self.tokens else ""
        unusual = [f"{n} {v}" for n, v in self._asdict().items() if n not in named and v not in (0, getattr(Run, n))]
        paired = "" if self.paired else "unpaired"
        return ", ".join(filter(None, [f"d={self.d_model}", f"F={self.d_expert}", tokens, what, *unusual, paired]))


def regime(row):
    return Regime(*(row["run"][field] for field in REGIME))


def lines(rows, wide=3):
    """{(Regime, k): {E: {rate: {seed: row}}}} of the rows that may vote; a line has `wide` values of E or more."""
    found = {}
    for row in counted(rows):
        run = row["run"]
        line = found.setdefault((regime(row), run["top_k"]), {})
        line.setdefault(run["n_experts"], {}).setdefault(run["lr"], {})[run["seed"]] = row
    return {name: dict(sorted(line.items())) for name, line in sorted(found.items()) if len(line) >= wide}


class Tuned(NamedTuple):
    """A line at the rates that are best for one task."""

    cells: dict  # {x: {seed: row}}, the same seeds at every x
    rates: dict  # {x: rate}
    edges: list  # every x whose best rate is the lowest or highest tried, although LIMITS allow one beyond it
    single: list  # every x with one rate only

    @property
    def rows(self):
        return [row for cell in self.cells.values() for row in cell.values()]

    @property
    def seeds(self):
        return list(next(iter(self.cells.values())))


def tune(line, task):
    """A line {x: {rate: {seed: row}}} at the rate with the lowest mean loss of the task at each x. None without the
    task or without common seeds.

    Rates are compared over the seeds that all rates of x with MIN_SEEDS seeds have; the best keeps all its seeds."""
    cells, best, edges, single = {}, {}, [], []
    for x, rates in line.items():
        full = {rate: seeds for rate, seeds in rates.items() if len(seeds) >= MIN_SEEDS} or rates
        common = set.intersection(*map(set, full.values()))
        known = [row for seeds in full.values() for row in seeds.values() if task == "train" or task in row]
        if not common or not known:
            return None
        mean = {rate: sum(loss(seeds[s], task) for s in common) / len(common) for rate, seeds in full.items()}
        best[x] = min(sorted(mean), key=mean.get)
        cells[x] = {s: row for s, row in full[best[x]].items() if not row["diverged"]}
        lowest = best[x] == min(full) and best[x] / 2 > LIMITS[0]
        highest = best[x] == max(full) and best[x] * 2 < LIMITS[1]
        if len(full) == 1:
            single.append(x)
        elif lowest or highest:
            edges.append(x)
    seeds = set.intersection(*map(set, cells.values())) if cells else set()
    cells = {x: {s: cell[s] for s in sorted(seeds)} for x, cell in cells.items()}
    return Tuned(cells, best, edges, single) if seeds else None
