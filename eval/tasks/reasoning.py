"""Word problems with unseen templates (data/reasoning.py): 200 for each number of steps, up to one beyond training.

`answer`: the stated answer is right. `solution`: so is every step. The reward is for a single, final "Answer: 4.".
"""

import re

from data.reasoning import check, problem
from eval.tasks import Item, without_examples

SHOTS, STOPS, MAX_NEW_TOKENS, PER_STEPS = 0, (), 256, 200


def items(source, shots):
    without_examples(shots)
    cfg = source.procedural("reasoning").reasoning
    found = [problem(cfg, i, "test", steps) for i in range(PER_STEPS) for steps in range(1, cfg.max_steps + 2)]
    return written(found, cfg.modulus)


def questions(source, split, n):
    """Training questions are new problems with training templates."""
    cfg, start = unseen(source, split, n)
    steps = [None if split == "train" else 1 + i % cfg.max_steps for i in range(n)]
    return written([problem(cfg, start + i, split, steps[i]) for i in range(n)], cfg.modulus)


def unseen(source, split, n):
    """(configuration, index of the first untrained problem of a split)."""
    if not n:
        raise ValueError("questions=0: there is no end of procedural questions; ask for a number")
    cfg = source.procedural("reasoning")
    return cfg.reasoning, max(cfg.n_problems, cfg.n_mano) if split == "train" else 0


def written(problems, modulus):
    """Items of problems."""
    row, found = {"modulus": modulus}, enumerate(problems)
    return [Item(str(i), p.question, p.solution, group=f"{p.steps} steps", row=row) for i, p in found]


def score(item, text):
    answer, solution = check(item.prompt, text, item.row["modulus"])
    return {"answer": float(answer), "solution": float(solution)}


def vote(text):
    found = re.search(r"Answer: (\d+)\.$", text)
    return found[1] if found else None


def reward(item, text):
    return float(text.count("Answer") == 1 and check(item.prompt, text, item.row["modulus"])[0])
