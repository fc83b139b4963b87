r"""Rewards of grpo.py for texts that answer a question: 1.0 or 0.0.

    judge("What is 17 \cdot 23?", "391", r"... \boxed{391}")           # 1.0
    passes("def f(x): return x + 1", [("f(1)", 2), ("f(2)", 3)])       # 1.0

A doubtful answer earns nothing, because a false 1 teaches cheating. An answer must be marked (\boxed{}, "####", "the
answer is"), equal the gold one and have its form (eval/equal.py). Several that differ count as none. Programs run in
eval/sandbox.py, and their values are compared here.
"""

import ast
import re

from eval import sandbox
from eval.equal import LONGEST, canonical, right

SECONDS = 3  # of CPU time for a program, as in the paper
MARKED = re.compile(r"(?:####|\banswer is:?)[ \t]*(.*?)(?:\.\s|\.?$)", re.IGNORECASE | re.MULTILINE)  # one sentence


def judge(question: str, gold: str, text: str) -> float:
    """1.0 for a text that marks one answer, which equals the gold one and has the form that was asked for."""
    answer = stated(text)
    return float(answer is not None and right(question, gold, answer))


def passes(source: str, tests: list[tuple[str, object]]) -> float:
    """1.0 if each expression has its value after the program has run; 0.0 without any."""
    found = sandbox.values(source, [expression for expression, _ in tests], SECONDS) if tests else None
    return float(found is not None and all(map(_same, found, (value for _, value in tests))))


def _same(text, gold):
    """Whether a text is the repr of a value equal to gold."""
    try:
        return ast.literal_eval(text[:10_000]) == gold
    except (SyntaxError, ValueError, TypeError, OverflowError, RecursionError, MemoryError):
        return False


def boxed(text: str):
    r"""What stands in each \boxed{}; "" where that is too long or does not end."""
    for start in re.finditer(r"\\f?boxed\s*\{", text):
        depth, end = 1, start.end()
        for brace in re.compile(r"[{}]").finditer(text, start.end(), start.end() + LONGEST + 2):
            depth, end = depth + (1 if brace[0] == "{" else -1), brace.start()
            if not depth:
                break
        yield "" if depth else text[start.end() : end]


def stated(text: str) -> str | None:
    """The one answer that a text marks; None without one, or where several differ."""
    answers = list(boxed(text))
    if len(set(map(canonical, answers))) > 1:
        return None
    for found in MARKED.finditer(text):
        answer = found[1]
        for inside in dict.fromkeys(boxed(answer)):
            # "The answer is \boxed{3}" and "is 2 + 1 = \boxed{3}" are one answer, "#### 2 \boxed{3}" two.
            answer = re.sub(r"^.*=\s*(?=\\f?boxed)", "", answer).replace(f"\\boxed{{{inside}}}", inside)
        answers.append(answer.strip(" $").rstrip(".").strip(" $"))
    if not answers or any(len(answer) > LONGEST for answer in answers):
        return None
    return answers[0] if len(set(map(canonical, answers))) == 1 and canonical(answers[0]) else None
