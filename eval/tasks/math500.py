r"""MATH-500 (arXiv 2103.03874, 2305.20050): competition problems, worked solutions with the answer in \boxed{}.

Prompts are lm-eval's; examples come from the rest of the MATH test set, or else from the other items. The answer is the
last \boxed{}, else the text after "answer is", else that between the first and the last dollar sign. It must equal the
gold one (eval/equal.py). The reward also needs its form, and a single marked answer (eval/rewards.py).
"""

import re

from eval.equal import canonical, equal, need_library
from eval.rewards import boxed, judge
from eval.sources import Set
from eval.tasks import Item, with_examples

TEST = Set("math500/test", "math/math500.jsonl", ("HuggingFaceH4/MATH-500", None, "test"))
ORIGIN = "the test split of EleutherAI/hendrycks_math"
TRAIN = Set("math/test", "math/math_test.jsonl", origin=ORIGIN)  # all but MATH-500 trains
SHOTS, STOPS, MAX_NEW_TOKENS = 4, ("Problem:",), 1024


def items(source, shots, split="test"):
    rows = pool = source.rows(TEST)
    if split == "train" or shots:
        seen = {row["problem"] for row in rows}
        found = source.rows(TRAIN) if split == "train" else source.rows(TRAIN, TEST)
        pool = [row for row in found if row["problem"] not in seen] or rows
    if split == "train":
        need_library()
        rows = pool if pool is not rows else []
    return with_examples(rows, pool, shots, item, example)


def example(row):
    return f"Problem:\n{row['problem']}\n\nSolution: {row['solution']}"


def item(row):
    prompt, group = "Problem:\n" + row["problem"] + "\n\nSolution:", f"level {str(row['level'])[-1]}"
    return Item(prompt=prompt, answer=" " + row["solution"], group=group)


def extract(text):
    """The answer of a solution, "" without one."""
    *_, last = "", *boxed(text)
    if last:
        return last
    for rule in (r"\\boxed\s+([^\s$]+)", r"answer is:?\s*(.+?)(?:\.\s|\.?$)", r"(?s)\$(.*)\$"):
        found = re.findall(rule, text, re.MULTILINE)
        if found:
            return found[-1]
    return ""


def score(item, text):
    return {"accuracy": float(equal(extract(item.answer), extract(text)))}


def vote(text):
    return canonical(extract(text)) or None


def reward(item, text):
    return judge(item.prompt, extract(item.answer), text)
