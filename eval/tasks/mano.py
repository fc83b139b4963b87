"""Mental arithmetic on 1,000 unseen prefix expressions (data/reasoning.py): "Mano: - 3 + 4 5 =", " 4.". `exact`: the
text is the value and a period."""

import re

from data.reasoning import mano
from eval.tasks import without_examples
from eval.tasks.reasoning import unseen, written

SHOTS, STOPS, MAX_NEW_TOKENS = 0, (), 8


def items(source, shots):
    without_examples(shots)
    cfg = source.procedural("reasoning").reasoning
    return written([mano(cfg, i, "test") for i in range(1000)], cfg.modulus)


def questions(source, split, n):
    cfg, start = unseen(source, split, n)
    return written([mano(cfg, start + i, split) for i in range(n)], cfg.modulus)


def vote(text):
    found = re.fullmatch(r" (\d{1,9})\.", text, re.ASCII)
    return str(int(found[1])) if found else None


def score(item, text):
    return {"exact": float(vote(text) == vote(item.answer))}
