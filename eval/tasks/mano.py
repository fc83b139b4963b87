"""Mental arithmetic on 1,000 unseen prefix expressions (data/reasoning.py): "Mano: - 3 + 4 5 =", " 4.". `exact`: the
text is the value and nothing else."""

import re

from data.reasoning import mano
from eval.tasks import Item
from eval.tasks.reasoning import unseen

SHOTS, STOPS, MAX_NEW_TOKENS = 0, (), 8


def items(source, shots):
    return _items(source.procedural("reasoning").reasoning, 0, "test", 1000)


def questions(source, split, n):
    return _items(*unseen(source, split, n), split, n)


def _items(cfg, start, split, n):
    found = enumerate(mano(cfg, start + i, split) for i in range(n))
    return [Item(str(i), p.question, p.solution, group=f"{p.steps} steps") for i, p in found]


def vote(text):
    found = re.fullmatch(r" (\d{1,9})\.", text, re.ASCII)
    return str(int(found[1])) if found else None


def score(item, text):
    return {"exact": float(vote(text) == vote(item.answer))}
