r"""Rewards of grpo.py for texts that answer a question: 1.0 or 0.0.

    judge("What is 17 \cdot 23?", "391", r"... \boxed{391}")  # 1.0

A doubtful answer earns nothing, because a wrong reward teaches cheating. An answer must be marked (\boxed{}, "####",
"the answer is"), equal the gold one and have its form (eval/equal.py). Several different answers count as none.
"""

import re

from eval.equal import LONGEST, canonical, right

MARKED = re.compile(r"(?:####|\banswer is:?)[ \t]*(.*?)(?:\.\s|\.?$)", re.IGNORECASE | re.MULTILINE)  # one sentence


def judge(question: str, gold: str, text: str) -> float:
    """1.0 for a text that marks one answer, which equals the gold one and has the form that was asked for."""
    answer = stated(text)
    return float(answer is not None and right(question, gold, answer))


def boxed(text: str):
    r"""The contents of each \boxed{}; "" where they are too long or do not end."""
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
