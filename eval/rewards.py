r"""What tasks use to judge a text that answers a question: 1.0 or 0.0, for grpo.py.

    judge("What is 17 \cdot 23?", "391", r"... \boxed{391}")           # 1.0
    passes("def f(x): return x + 1", [("f(1)", 2), ("f(2)", 3)])       # 1.0

A doubtful answer earns nothing: a false 1 teaches cheating. It must be marked (\boxed{}, "####", "the answer is"),
equal the gold answer and have its form (eval/equal.py); several that differ are none. Or a program answers:
eval/sandbox.py runs it and gives back values, which are compared here.
"""

import ast
import math
import re
import textwrap
from fractions import Fraction

from eval import sandbox
from eval.equal import LONGEST, canonical, number, right

SECONDS = 3  # of CPU time for a program, as in the paper
MARKED = re.compile(r"(?:####|\banswer is:?)[ \t]*(.*?)(?:\.\s|\.?$)", re.IGNORECASE | re.MULTILINE)  # one sentence


def judge(question: str, gold: str, text: str) -> float:
    """For a text that answers with one final answer, or with one program whose value is the answer."""
    if found := program(text):
        wanted = number(gold)
        return passes(found[0], [(found[1], wanted.value)]) if wanted else 0.0
    answer = stated(text)
    return float(answer is not None and right(question, gold, answer))


def passes(source: str, tests: list[tuple[str, object]]) -> float:
    """1.0 if each expression has its value after the program has run; 0.0 without any."""
    found = sandbox.values(source, [expression for expression, _ in tests], SECONDS) if tests else None
    return float(found is not None and all(map(_same, found, (value for _, value in tests))))


def _same(text, gold):
    """Whether a repr is that of gold; of a Fraction, up to the rounding of floats."""
    try:
        value = ast.literal_eval(text[:10_000])
        if isinstance(gold, Fraction):
            return type(value) in (int, float) and math.isclose(value, gold, rel_tol=1e-9)
        return value == gold
    except (SyntaxError, ValueError, TypeError, OverflowError, RecursionError, MemoryError):
        return False


def boxed(text: str):
    r"""What stands in each \boxed{}; "" where it is too long or does not end."""
    for start in re.finditer(r"\\f?boxed\s*\{", text):
        depth, end = 1, start.end()
        for brace in re.compile(r"[{}]").finditer(text, start.end(), start.end() + LONGEST + 2):
            depth, end = depth + (1 if brace[0] == "{" else -1), brace.start()
            if not depth:
                break
        yield "" if depth else text[start.end() : end]


def stated(text: str) -> str | None:
    """The one answer that a text marks; None where there is none, or where several differ."""
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


def program(text: str) -> tuple[str, str] | None:
    """(program, expression of its answer) of a function simple_math_problem(), or a <llm-code> block that ends in its
    result, as the paper's models write them. None without, ("", "") for several."""
    blocks = re.findall(r"<llm-code>(.*?)(?:</llm-code>|\Z)", text, re.DOTALL)
    function = r"^def simple_math_problem\(\).*\n(?:(?:[ \t].*)?\n)*(?:[ \t].*\Z)?"
    functions = re.findall(function, text + "\n", re.MULTILINE)
    if not blocks:
        return (functions[0], "simple_math_problem()") if len(functions) == 1 else ("", "") if functions else None
    try:
        (block,) = blocks
        *body, last = ast.parse(textwrap.dedent(block).strip()).body
        if isinstance(last, ast.Expr):
            printed = isinstance(last.value, ast.Call) and getattr(last.value.func, "id", "") == "print"
            return "\n".join(map(ast.unparse, body)), ast.unparse(last.value.args[0] if printed else last.value)
    except (SyntaxError, ValueError, IndexError, RecursionError, MemoryError):
        pass
    return "", ""
