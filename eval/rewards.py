r"""Verifiers: questions with a known answer, and a reward of 1 or 0 for a text that answers one. For grpo.py.

    questions = load("gsm8k", "train", Source("evaldata"), 1000)
    grade("gsm8k", questions[:2], ["... #### 18", "no idea"])         # [1.0, 0.0]

    task        what earns the reward                                                gold
    reasoning   the value asked for, in one final "Answer: 4." (data/reasoning.py)    the modulus
    mano        the value and nothing else: " 4."                                     "4"
    gsm8k math  one final answer; or one program, whose value is the answer           LaTeX
    mbpp        a function with the right values, also where the prompt shows none    [(expression, value), ...]

A policy finds whatever a verifier lets through, so a doubtful answer earns nothing: a false 0 costs some signal, a false 1 teaches cheating.
An answer must be marked (\boxed{}, "####", "the answer is"), and several that differ are none. A number must be written as one: to
computer algebra, 17 \cdot 23 is a right answer to "What is 17 \cdot 23?". Other expressions are compared by math-verify (eval/equal.py), but not
when they only repeat the question. Programs run in eval/sandbox.py and give back values, which are compared out here: a program never sees
what it has to return, so neither an object that equals everything nor an early exit helps it.
"""

import ast
import json
import math
import re
import select
import subprocess
import sys
import textwrap
import threading
from fractions import Fraction
from pathlib import Path

from eval import sandbox

LONGEST_ANSWER = 200  # characters
SECONDS = 3  # of CPU time for a program, as in the paper


def assertion(text):
    """(expression, value) of `assert expression == literal`, else None."""
    try:
        (node,) = ast.parse(text.strip()).body
        (equals,), (value,) = node.test.ops, node.test.comparators
        return (ast.unparse(node.test.left), ast.literal_eval(value)) if isinstance(equals, ast.Eq) else None
    except (SyntaxError, ValueError, AttributeError):
        return None


def judge(question: str, gold: str, text: str) -> float:
    """1.0 or 0.0 for a text that answers with one final answer, or with one program whose value is the answer."""
    if found := program(text):
        return passes(found[0], [(found[1], number) for number in _number(gold)])
    return _grade_text(question, gold, text)


def passes(source: str, tests: list[tuple[str, object]]) -> float:
    """1.0 if each expression has its value after the program; 0.0 without tests."""
    found = sandbox.values(source, [expression for expression, _ in tests], SECONDS) if tests else None
    return float(found is not None and all(map(_right, found, (value for _, value in tests))))


# ---- answers in words

MARKED = re.compile(
    r"(?:####|\banswer is:?)[ \t]*(.*?)(?:\.\s|\.?$)", re.IGNORECASE | re.MULTILINE
)  # a sentence; the next may mark another
NUMBER = re.compile(r"-?\d+(/\d+)?", re.ASCII)  # as `canonical` writes it
SEVERAL = re.compile(
    r"(?<!frac)(?<!frac )\d\s+\d|\\text\{\s[^}]*\d"
)  # "1 1/2" is not 11/2; "5\text{ or 6}" has no unit
WORDS = re.compile(
    r"\\(?:mbox|text(?:bf|it)?|mathrm)\{(?!\s)[^}]*[a-zA-Z]{2}"
)  # not a product of letters, of which east and seat are the same


def stated(text: str) -> str | None:
    """The one answer that the text marks as its own; None where there is none, or where there are several and they differ."""
    answers = list(_boxed(text))
    if len({answer if len(answer) > LONGEST_ANSWER else canonical(answer) for answer in answers}) > 1:
        return None
    for found in MARKED.finditer(text):
        answer = found[1]
        for inside in dict.fromkeys(
            _boxed(answer)
        ):  # "the answer is \boxed{3}" and "is 2 + 1 = \boxed{3}" are one answer, "#### 2 \boxed{3}" two
            answer = re.sub(r"^.*=\s*(?=\\f?boxed)", "", answer).replace(f"\\boxed{{{inside}}}", inside)
        answers.append(answer.strip(" $."))
    if not answers or any(len(answer) > LONGEST_ANSWER for answer in answers):
        return None
    return answers[0] if len({canonical(answer) for answer in answers}) == 1 and canonical(answers[0]) else None


def _boxed(text):
    for start in re.finditer(r"\\f?boxed\s*\{", text):
        depth, end = 1, start.end()
        while end < len(text) and depth and end - start.end() <= LONGEST_ANSWER + 1:  # nothing longer is an answer
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        yield "" if depth else text[start.end() : end - 1]


def _grade_text(question, answer_given, text):
    answer, gold = stated(text), canonical(answer_given)
    if answer is None or not gold:
        return 0.0
    if SEVERAL.search(answer) or SEVERAL.search(answer_given):
        return float(answer.split() == answer_given.split())
    said = canonical(answer)
    if WORDS.search(answer_given):
        return float(said.lower() == gold.lower())
    if said == gold or NUMBER.fullmatch(gold):
        return float(said == gold)
    if said in canonical(question):
        return 0.0
    return float(_equal_expressions(gold, said))


def _number(gold):
    """[the number] that gold is, or []."""
    return [Fraction(canonical(gold))] if NUMBER.fullmatch(canonical(gold)) else []


_child = None


_lock = threading.Lock()


def _equal_expressions(gold, answer, seconds=5):
    with _lock:
        return _ask(gold, answer, seconds)


def _ask(gold, answer, seconds):
    """Asks the process of eval/equal.py, started at the first question and again after every one that it did not answer in time."""
    global _child
    if _child is None or _child.poll() is not None:
        _child = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("equal.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        seconds += 60  # for the imports
    try:
        _child.stdin.write(json.dumps([gold, answer]) + "\n")
        _child.stdin.flush()
        if select.select([_child.stdout], [], [], seconds)[0]:
            return _child.stdout.readline() == "true\n"
    except BrokenPipeError:
        pass
    _child.kill()
    _child.communicate()
    return False


# ---- programs


def program(text: str):
    """(program, expression of its answer) of a text that answers by program, as the paper's models sometimes do: a single function
    simple_math_problem(), or a single <llm-code> block that ends in its result. None without one; of two, neither counts: ("", "")."""
    blocks = re.findall(r"<llm-code>(.*?)(?:</llm-code>|\Z)", text, re.DOTALL)
    functions = re.findall(
        r"^def simple_math_problem\(\).*\n(?:(?:[ \t].*)?\n)*(?:[ \t].*\Z)?", text + "\n", re.MULTILINE
    )
    if not blocks and not functions:
        return None
    if len(blocks) > 1 or not blocks and len(functions) > 1:
        return "", ""
    if not blocks:
        return functions[0], "simple_math_problem()"
    try:
        *body, last = ast.parse(textwrap.dedent(blocks[0]).strip()).body
        if isinstance(last, ast.Expr):
            value = (
                last.value.args[0]
                if isinstance(last.value, ast.Call) and getattr(last.value.func, "id", "") == "print"
                else last.value
            )
            return "\n".join(map(ast.unparse, body)), ast.unparse(value)
    except (SyntaxError, ValueError, IndexError, RecursionError, MemoryError):
        pass
    return "", ""


def _right(text, gold):
    """Whether the repr that a program gave is that of gold; a Fraction stands for a number, up to the rounding of floats."""
    try:
        value = ast.literal_eval(text[:10_000])
        if isinstance(gold, Fraction):
            return type(value) in (int, float) and math.isclose(value, gold, rel_tol=1e-9)
        return value == gold
    except (SyntaxError, ValueError, TypeError, OverflowError, RecursionError, MemoryError):
        return False


def extract(text):
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if start >= 0:
        begin = text.index("{", start) + 1
        depth = 1
        for end in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if not depth:
                return text[begin:end]
    bare = re.search(r"\\boxed\s+([^\s$]+)", text)  # \boxed 2
    if bare:
        return bare[1]
    said = re.findall(r"answer is:?\s*(.+?)(?:\.\s|\.?$)", text, re.MULTILINE)
    if said:
        return said[-1]
    return text[text.index("$") + 1 : text.rindex("$")] if text.count("$") > 1 else ""


def canonical(answer):
    s = answer.strip().rstrip(".")
    s = re.sub(r"\\(left|right|displaystyle|[!,;: ])(?![a-z])|\^\{?\\circ\}?|\\?[$%]|~", "", s)
    s = re.sub(
        r"\\text\{\s[^}]*\}(?:\^\{?\d\}?)?$|\\(?:mbox|text|textbf|mathrm|textit)\{([^}]*)\}", r"\1", s
    )  # a trailing unit; other text
    s = re.sub(r"^[a-zA-Z]\w?\s*(=|\\in)\s*", "", s)
    s = re.sub(r"\s+", "", s).replace("dfrac", "frac").replace("tfrac", "frac").replace("cfrac", "frac")
    s = re.sub(r"\\sqrt([^{\[])", r"\\sqrt{\1}", s)
    s = re.sub(r"\\frac(\w)(\w)", r"\\frac{\1}{\2}", s)
    s = re.sub(r"\\frac(\w)\{", r"\\frac{\1}{", s)
    s = re.sub(r"\\frac(\{[^{}]*\})(\w)", r"\\frac\1{\2}", s)
    if re.fullmatch(r"-?\d{1,3}(,(\\!)?\d{3})+(\.\d+)?", s):
        s = s.replace(",", "")
    number = re.fullmatch(r"(-?)(?:\\frac\{(-?\d+)\}\{(\d+)\}|(\d+)/(\d+)|(\d*\.?\d+))", s)
    if number:
        sign, over, under, a, b, plain = number.groups()
        if int(under or b or 1):
            value = Fraction(plain) if plain else Fraction(int(over or a), int(under or b))
            return str(-value if sign else value)
    return s
