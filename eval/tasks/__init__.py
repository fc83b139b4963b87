"""The tasks of `python -m eval`. A task is one file here, and its name is the file's name; nothing else has to be told about it.

    SHOTS = 4                             # examples in front of each question, by default
    def items(source, shots):             # -> list of Item; source: eval.sources.Source

and, unless only task loss is wanted, either choices in its items (accuracy by likelihood, plain and per character), or

    STOPS, MAX_NEW_TOKENS = ("\\n",), 32   # generation ends at any of these strings, which are cut off
    def score(item, text):                # -> {metric: number}, averaged over items

or, for code, `program(item, text)` -> (program, tests) for eval.sandbox. `vote(text)` -> the final answer in canonical form,
or None, admits a task to `python -m eval.votes`.
"""

import importlib
import pkgutil
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

SEED = 42  # of the draws of examples, the paper's


class Item(NamedTuple):
    id: str  # unique in the task
    prompt: str
    answer: str  # gold; task loss is its cost right after loss_prompt, so it starts with the space that belongs there
    loss_prompt: str = ""  # where task loss has another prompt
    choices: tuple[str, ...] = ()  # answers to compare by likelihood, each with its leading space
    gold: int = 0  # the right one of choices
    group: str = ""  # results are also given by group
    row: dict = {}  # the source's row, for score


NAMES = tuple(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str):
    """The module of a task. Raises ValueError for an unknown name."""
    if name not in NAMES:
        raise ValueError(f"tasks: unknown task {name!r}; there are {', '.join(NAMES)}")
    return importlib.import_module(f"eval.tasks.{name}")


def examples(rows: list[dict], pool: list[dict], n: int, render: Callable[[dict], str]) -> Iterator[str]:
    """For each row the text of n rendered examples, each followed by an empty line, drawn from pool as lm-evaluation-harness does:
    one random stream through all rows in order; where pool is rows itself, a row is never its own example."""
    stream, shared = random.Random(SEED), pool is rows
    if not 0 <= n <= len(pool) - shared:
        raise ValueError(f"shots={n}: there are {len(pool) - shared} other examples; use at most as many")
    for row in rows:
        drawn = stream.sample(pool, n + shared) if n else []
        yield "".join(render(example) + "\n\n" for example in [example for example in drawn if example is not row][:n])
