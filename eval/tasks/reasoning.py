"""Word problems like those of the procedural training data, with unseen templates (data/reasoning.py): 200 for each number of steps.

`answer`: the stated answer is right; `solution`: every step of the worked solution is. One step beyond training is included.
"""

import re

from data.reasoning import ReasoningConfig, check, problem
from eval.tasks import Item

SHOTS, STOPS, MAX_NEW_TOKENS, PER_STEPS = 0, (), 256, 200


def items(source, shots):
    cfg = ReasoningConfig(**source.procedural("reasoning"))
    problems = [problem(cfg, i, "test", steps) for i in range(PER_STEPS) for steps in range(1, cfg.max_steps + 2)]
    return [
        Item(str(i), p.question, p.solution, group=f"{p.steps} steps", row={"modulus": cfg.modulus})
        for i, p in enumerate(problems)
    ]


def score(item, text):
    answer, solution = check(item.prompt, text, item.row["modulus"])
    return {"answer": float(answer), "solution": float(solution)}


def vote(text):
    found = re.search(r"Answer: (\d+)\.$", text)
    return found[1] if found else None
