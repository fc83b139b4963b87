"""The results file of the study: JSON lines, one for every finished run (written by study/sweep.py, described in study/execute.py).

A regime is what runs must share to be compared over E and k.
"""

import fcntl
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

from study.execute import Run, key

TASKS = {"facts": "biographies", "problems": "word problems", "mano": "mental arithmetic"}
TEXT_TASKS = {"triviaqa": "TriviaQA", "hellaswag": "HellaSwag", "gsm8k": "GSM8K", "humaneval": "HumanEval"}
MEMORY = ("facts", "triviaqa", "hellaswag")
BEST = 0.0  # the rate policy of runs and lines that take the best rate of each (E, k)
ROW = (
    "key",
    "run",
    "lr",
    "diverged",
    "tokens",
    "tpp",
    "params",
    "flops",
    "points",
    "tokens_per_s",
    "seconds",
    "jobs",
    "device",
)  # keys of every row
COMPARED = 3  # rates that every (E, k) of a line must have run before the best of each may be compared


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
        unusual = [
            f"{name} {value}"
            for name, value in self._asdict().items()
            if name not in ("d_model", "d_expert", "tokens", "unique", "data") and value not in (0, getattr(Run, name))
        ]
        tokens = [f"{self.tokens / 1e6:.3g} M tokens"] if self.tokens else []
        return ", ".join([f"d={self.d_model}", f"F={self.d_expert}", *tokens, what, *unusual])


class Family(NamedTuple):
    """What a set of comparable runs shares: a regime, and one learning rate or the policy BEST."""

    regime: Regime
    rate: float

    def __str__(self):
        return f"{self.regime}, {rate_name(self.rate)}"


def rate_name(rate):
    return "best rates" if rate == BEST else f"lr {rate:g}"


def read(path, needed=ROW, optional=False):
    """The rows of a results file, without a last line torn by a crash. needed: keys that every row has, the first written first.
    optional: where there is no file there are no rows. Raises ValueError for other damage and for files of another kind."""
    path = Path(path)
    if not optional and not path.exists():
        raise FileNotFoundError(f"{path}: no such results file; check the path")
    return parsed(path.read_bytes() if path.exists() else b"", path, needed)[0]


def parsed(content, path, needed, first=1):
    """(rows, bytes that they take) of the content of a results file from this line on: all of it but a torn last line."""
    rows, size = [], 0
    for number, line in enumerate(content.splitlines(keepends=True), first):
        try:
            row = json.loads(line)
        except ValueError as error:
            begin = f'{{"{needed[0]}": "'.encode()
            if not line.endswith(b"\n") and begin.startswith(line[: len(begin)]):
                break
            raise ValueError(
                f"{path}, line {number}: not JSON ({error}); restore the file or delete the line"
            ) from None
        lacking = [name for name in needed if name not in row] if isinstance(row, dict) else needed
        if lacking:
            raise ValueError(
                f"{path}, line {number}: not a row of such a results file, it lacks {', '.join(lacking)}; name another file or delete the line"
            )
        rows.append(migrated(row))
        size += len(line)
    return rows, size


def migrated(row):
    """A row of the first sweep that was planned with rate 0 is, since rates are swept, the run with the rate that it took."""
    if "lr" in row and row["run"]["lr"] == 0:
        fields = row["run"] | {"lr": row["lr"]}
        row |= {"key": key(Run(**fields)), "run": fields}
    return row


def append(path, row, needed=ROW):
    """One more line, on disk when this returns; a torn last line is removed first. Several processes may do so at once."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        last = content.rfind(b"\n") + 1
        end = last + parsed(content[last:], path, needed, content.count(b"\n") + 1)[1]
        file.truncate(end)
        file.write(b"\n" * (end > last) + json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def tasks_of(row):
    return TEXT_TASKS if row["run"]["data"] else TASKS


def accuracy(row, task):
    """Share of right answers: values recalled, whole solutions and expressions of trained lengths; None where only loss is measured."""
    return row[task].get("overall", row[task].get("accuracy"))


def loss_unit(row):
    return "bits per byte" if row["run"]["data"] else "nats per token"


def regime_of(run):
    """run: the fields of a Run, as a dict."""
    return Regime(*(run[field] for field in Regime._fields))


def regime(row):
    return regime_of(row["run"])


def pool(regime):
    """What regimes share that are one experiment at several lengths: people grow with the tokens, so that each is met as often."""
    return regime._replace(tokens=0, people=0)


def answer_loss(row):
    """What learning rates are chosen by: the mean of the losses of answers, nats per token, that training never had in this form, memory and reasoning
    counting half each. Not the geometric mean: a run done twice moves the loss of solutions, 0.002 to 0.07, by a factor of 1.7, and that decided.
    Prepared text: the validation loss. Infinite where the run diverged."""
    if row["diverged"]:
        return math.inf
    if row["run"]["data"]:
        return row["val_loss"]
    halves = [[row[task]["loss"] for task in TASKS if (task in MEMORY) == memory] for memory in (True, False)]
    return sum(sum(half) / len(half) for half in halves) / 2


def distinct(rows):
    """The first row of every run. Others are the same run again, with slightly different numbers on a GPU (study/verdict.py says how different)."""
    return list({row["key"]: row for row in reversed(rows)}.values())[::-1]


def repeats(rows):
    """[(row, row of the same run, done again)]"""
    first = {row["key"]: row for row in distinct(rows)}
    return [
        (first[row["key"]], row)
        for row in rows
        if row is not first[row["key"]] and not row["diverged"] and not first[row["key"]]["diverged"]
    ]


def standard(rows):
    """Every run with the initial weights as always, once."""
    return [row for row in distinct(rows) if row["run"]["init_std"] == (0.02 if row["run"]["data"] else Run.init_std)]


def best(rates):
    """The rate with the lowest mean loss of {rate: {seed: loss}}, among those that have all seeds of the rate with most; None without two."""
    most = max(map(len, rates.values()), default=0)
    full = {rate: sum(seeds.values()) / most for rate, seeds in rates.items() if len(seeds) == most > 0}
    return min(full, key=full.get) if len(full) > 1 else None


def best_along(line):
    """{x: best rate} of a line {x: {rate: {seed: row}}}: every x chooses among the same rates, from the same seeds; {} before COMPARED rates are."""
    rates = set.intersection(*map(set, line.values()))
    seeds = {rate: set.intersection(*(set(cell[rate]) for cell in line.values())) for rate in rates}
    most = max(map(len, seeds.values()), default=0)
    rates = [rate for rate in sorted(rates) if len(seeds[rate]) == most > 0]
    if len(rates) < COMPARED:
        return {}
    return {
        x: best({rate: {seed: answer_loss(cell[rate][seed]) for seed in seeds[rate]} for rate in rates})
        for x, cell in line.items()
    }


def policies(line, chosen):
    """{rate: {x: {seed: row}}} of a line {x: {rate: {seed: row}}}: each rate that every x has run, and BEST with the rates `chosen` ({x: rate}).
    Each holds the same seeds at every x."""
    choices = {rate: dict.fromkeys(line, rate) for rate in set.intersection(*map(set, line.values()))} | (
        {BEST: chosen} if chosen else {}
    )
    found = {}
    for policy, rates in sorted(choices.items()):
        cells = {x: {seed: row for seed, row in line[x].get(rates[x], {}).items() if not row["diverged"]} for x in line}
        if seeds := set.intersection(*map(set, cells.values())):
            found[policy] = {
                x: {seed: row for seed, row in sorted(cell.items()) if seed in seeds} for x, cell in cells.items()
            }
    return found


def alike(regime, other):
    """Whether rates found in one regime serve in the other: models of one shape and one optimiser."""
    return all(
        getattr(regime, name) == getattr(other, name) for name in ("d_model", "n_layers", "d_expert", "optimizer")
    ) and (bool(regime.data) == bool(other.data))


def families(rows):
    """{Family: {(E, k): {seed: row}}}: what a claim about E may compare, lines along three values of E or more in which nothing else differs.

    A line of one k has every E that its regime has at this k, from the same seeds, at one rate for all or at the best rate of each (E, k); a family
    holds the lines that have the seeds of its longest list. The best rates are those of the regime, or, where it did not compare any, of the nearest regime `alike`."""
    grid, found = {}, {}
    for row in standard(rows):
        run = row["run"]
        line = grid.setdefault((regime(row), run["top_k"]), {})
        line.setdefault(run["n_experts"], {}).setdefault(run["lr"], {})[run["seed"]] = row
    for (where, k), line in grid.items():
        if len(line) < 3:
            continue
        near = lambda other, where=where: (other != where, pool(other) != pool(where), other.tokens)  # noqa: E731
        sources = [
            grid[other, k]
            for other in sorted((other for other, kk in grid if kk == k and alike(other, where)), key=near)
        ]
        sources = [{e: source[e] for e in line} for source in sources if source.keys() >= line.keys()]
        chosen = next(filter(None, map(best_along, sources)), {})
        for rate, cells in policies(line, chosen).items():
            found.setdefault(Family(where, rate), {})[k] = cells
    for family, lines in found.items():
        seeds = {k: set(next(iter(cells.values()))) for k, cells in lines.items()}
        most = max(seeds.values(), key=len)
        found[family] = {
            (e, k): cell for k, cells in sorted(lines.items()) if seeds[k] == most for e, cell in sorted(cells.items())
        }
    return dict(sorted(found.items()))
