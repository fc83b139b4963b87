"""The tasks of eval, eval.votes and grpo.py. A task is one file of this folder; nothing else names it.

    TEST = Set("svamp/test", "svamp/test.jsonl", ("ChilleD/SVAMP", None, "test"))  # where rows are: eval.sources.Set
    TRAIN = Set(...)                       # rows to train on and to draw examples from, if any
    SHOTS = 4                              # examples in front of each question, unless --shots says otherwise
    LIKE = gsm8k                           # the task that gives all definitions this file lacks
    def item(row)                          # -> Item, without examples; `choice` makes one with choices
    def example(row)                       # -> text of an example; default: the item's prompt and its answer
    def items(source, shots, split="test") # -> list of Item, where item(row) does not suffice

With these alone, a task is scored by likelihood: task loss, and accuracy where its items have choices. A task whose
answers are written defines STOPS (strings that end an answer and are cut off), MAX_NEW_TOKENS, and some of

    def score(item, text)                  # for eval: {metric: number}, averaged over items
    def program(item, text)                # or, for code: (program, tests) for eval.sandbox, which gives pass@k
    def vote(text)                         # for eval.votes: the final answer in canonical form, or None
    def gold(item)                         # the vote of the right answer; default: vote(item.answer)
    def reward(item, text)                 # for grpo.py: 1.0 or 0.0; default: whether vote(text) is the gold one
    def questions(source, split, n)        # for grpo.py: the first n items (0: all) of "train" or "test"; default,
                                           # if there is TRAIN: items(source, 0, split)

Multiple choice needs none of these: options get letters where an answer is written (`lettered`).
"""

import importlib
import pkgutil
import random
import re
from collections.abc import Callable
from string import ascii_uppercase
from typing import NamedTuple

SEED = 42  # draws the examples, as in the paper
NAMES = tuple(module.name for module in pkgutil.iter_modules(__path__))
RENAMED = {"math": "math500"}  # in old runs of grpo.py


class Item(NamedTuple):
    id: str = ""  # unique in the task; empty: its number
    prompt: str = ""
    answer: str = ""  # gold, with its leading space
    loss_prompt: str = ""  # for task loss, where it differs
    choices: tuple[str, ...] = ()  # answers to compare by likelihood, each with its leading space
    gold: int = 0  # index of the right choice
    group: str = ""  # results are also given by group
    row: dict = {}  # the source's row, for score
    pairs: tuple[tuple[str, str], ...] = ()  # (prompt, text) for each choice, where it is not (item.prompt, choice)

    def compared(self) -> tuple[tuple[str, str], ...]:
        """(prompt, text) of every choice: the most likely text wins."""
        return self.pairs or tuple((self.prompt, choice) for choice in self.choices)


def choice(prompt: str, choices: list[str], gold: int) -> Item:
    """An item whose choices, without their leading space, are compared after its prompt."""
    choices = tuple(" " + choice for choice in choices)
    return Item(prompt=prompt, answer=choices[gold], choices=choices, gold=gold)


class Task:
    """A file of this folder, with defaults or None for what it leaves out."""

    def __init__(self, name: str, module):
        like = getattr(module, "LIKE", None)

        def get(attribute, default=None):
            return getattr(module, attribute, getattr(like, attribute, default))

        self.name, self.module, self.lettered = name, module, get("STOPS") is None
        self._asks = module if hasattr(module, "item") or hasattr(module, "items") else like  # defines the items
        needed = ["SHOTS"] if hasattr(self._asks, "items") else ["SHOTS", "item"]
        for what in needed if self.lettered else [*needed, "MAX_NEW_TOKENS"]:
            if get(what) is None:
                raise ValueError(f"eval/tasks/{name}.py must define {what}; see eval/tasks/__init__.py")
        self.shots: int = get("SHOTS")
        self.items: Callable = getattr(self._asks, "items", self._items)  # (source, shots) -> list of Item
        self.stops: tuple[str, ...] = get("STOPS", ("\n",))
        self.max_new_tokens: int = get("MAX_NEW_TOKENS", 16)
        self.score: Callable | None = get("score")
        self.program: Callable | None = get("program")
        self.generates = bool(self.score or self.program)  # whether the model writes answers in eval
        self.vote: Callable | None = letter if self.lettered else get("vote")
        self.gold: Callable | None = get("gold", self._gold if self.vote else None)
        self.reward: Callable | None = get("reward", self._voted if self.vote else None)
        self.trains = bool(self.reward and (hasattr(module, "TRAIN") or hasattr(module, "questions")))

    def _items(self, source, shots, split="test"):
        train = getattr(self.module, "TRAIN", None)
        rows = source.rows(train if split == "train" else self.module.TEST)
        pool = source.rows(train, self.module.TEST) if train and shots else rows
        return with_examples(rows, pool, shots, self._asks.item, getattr(self._asks, "example", None))

    def _gold(self, item):
        return self.vote(item.answer)

    def _voted(self, item, text):
        return float(self.vote(text) is not None and self.vote(text) == self.gold(item))

    def asked(self, items: list[Item]) -> list[Item]:
        """The items as questions whose answer the model writes (eval.votes): choices become lettered options."""
        return [lettered(item) for item in items] if self.lettered else items

    def questions(self, source, split: str, n: int = 0) -> list[Item]:
        """The first n items (0: all) of a split, to be answered in words, of a task that `trains`."""
        if own := getattr(self.module, "questions", None):
            return own(source, split, n)
        return self.asked(self.items(source, 0, split)[: n or None])

    def rewards(self, items: list[Item], texts: list[str]) -> list[float]:
        """1.0 or 0.0 for each text as an answer to its item."""
        return [self.reward(item, text) for item, text in zip(items, texts, strict=True)]


def load(name: str) -> Task:
    """A task by name. ValueError for an unknown one, and for a file that does not define what it must."""
    name = RENAMED.get(name, name)
    if name not in NAMES:
        raise ValueError(f"unknown task {name!r}; there are {', '.join(NAMES)}")
    return Task(name, importlib.import_module(f"eval.tasks.{name}"))


def lettered(item: Item) -> Item:
    """An item with choices as a question with lettered options, answered by a letter."""
    if not item.choices:
        raise ValueError(f"item {item.id}: without choices there is only task loss; its answer cannot be written")
    if item.choices[0] == " A":  # the prompt has letters already
        return item
    options = "".join(f"\n{letter}.{choice}" for letter, choice in zip(ascii_uppercase, item.choices, strict=False))
    prompt = f"{item.prompt.removesuffix('Answer:').rstrip()}{options}\nAnswer:"
    return item._replace(prompt=prompt, answer=f" {ascii_uppercase[item.gold]}")


def letter(text: str) -> str | None:
    """The letter with which a text begins, or that it calls its answer; None without one."""
    found = re.match(r"\s*\(?([A-Z])\b(?!')", text) or re.search(r"(?i:answer is):? *\(?([A-Z])\b(?!')", text)
    return found[1] if found else None


def without_examples(shots):
    """ValueError unless `shots` is 0, for the items of a task that has no examples to show."""
    if shots:
        raise ValueError(f"shots={shots}: this task shows no examples; use 0, or evaluate it apart from the others")


def with_examples(rows, pool, n: int, item: Callable[[dict], Item], example=None) -> list[Item]:
    """item(row) of each row, after n examples: example(row), or the row's own prompt and answer. As in lm-eval, one
    random generator draws them from pool for all rows. If pool is rows itself, no row is its own example."""

    def whole(row):
        shown = item(row)
        return (shown.loss_prompt or shown.prompt) + shown.answer

    stream, shared, render = random.Random(SEED), pool is rows, example or whole
    if not 0 <= n <= len(pool) - shared:
        raise ValueError(f"shots={n}: there are {len(pool) - shared} other examples; use at most as many")
    found = []
    for i, row in enumerate(rows):
        drawn = stream.sample(pool, n + shared) if n else []
        prefix = "".join(render(other) + "\n\n" for other in [other for other in drawn if other is not row][:n])
        try:
            new = item(row)
        except ValueError as error:
            raise TypeError(f"row {i + 1}: {error}") from error  # read_items names the file
        pairs = tuple((prefix + prompt, text) for prompt, text in new.pairs)
        prompts = dict(prompt=prefix + new.prompt, loss_prompt=new.loss_prompt and prefix + new.loss_prompt)
        found.append(new._replace(id=new.id or str(i), pairs=pairs, **prompts))
    return found
