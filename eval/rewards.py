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
import importlib.util
import json
import math
import os
import re
import select
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from data import procedural, reasoning
from eval import sandbox
from eval.tasks.math500 import canonical, extract

TASKS = ("reasoning", "mano", "gsm8k", "math", "mbpp")
LONGEST_ANSWER = 200  # characters
SECONDS = 3  # of CPU time for a program, as in the paper


class Question(NamedTuple):
    prompt: str
    gold: object  # by task, see above


def load(task, split, source, n) -> list[Question]:
    """The first n questions of split "train" or "test" (n = 0: all; procedural tasks need a number). source: eval.sources.Source.

    Procedural training questions are new ones of the training templates. MATH trains on the test problems outside MATH-500. Raises ValueError."""
    if task in ("reasoning", "mano"):
        if not n:
            raise ValueError(f"{task}: there is no end of them; ask for a number of questions")
        source.procedural("reasoning")  # with its message where there is none
        return _procedural(task, split, procedural.read_config(source.training_data), n)
    if task == "math" and importlib.util.find_spec("math_verify") is None:
        raise ValueError("task='math': comparing expressions needs math-verify: pip install 'optimoe[rl]'")
    found = {"gsm8k": _gsm8k, "math": _math, "mbpp": _mbpp}[task](split, source)
    return found[: n or None]


def _procedural(task, split, cfg, n):
    start = max(cfg.n_problems, cfg.n_mano) if split == "train" else 0
    if task == "mano":
        found = [reasoning.mano(cfg.reasoning, start + i, split) for i in range(n)]
        return [Question(p.question, str(p.answer)) for p in found]
    steps = (None if split == "train" else 1 + i % cfg.reasoning.max_steps for i in range(n))
    found = [reasoning.problem(cfg.reasoning, start + i, split, s) for i, s in enumerate(steps)]
    return [Question(p.question, cfg.reasoning.modulus) for p in found]


def _gsm8k(split, source):
    return [
        Question(f"Question: {row['question']}\nAnswer:", row["answer"].rpartition("####")[2].strip())
        for row in source.rows(f"gsm8k/{split}")
    ]


def _math(split, source):
    held_out = source.rows("math500/test")
    names = {row["problem"] for row in held_out}
    rows = held_out if split == "test" else [row for row in source.rows("math/test") if row["problem"] not in names]
    return [Question(f"Problem:\n{row['problem']}\n\nSolution:", extract(row["solution"])) for row in rows]


def _mbpp(split, source):
    """One test is shown, all count. The few problems with a test other than `assert call == literal`, or with a single one, are left out."""
    first, last = (601, 974) if split == "train" else (11, 510)
    questions = []
    for row in source.rows("mbpp/test"):
        tests = [_test(text) for text in row["test_list"] + row.get("challenge_test_list", [])]
        if first <= row["task_id"] <= last and all(tests) and len(tests) > 1 and not row.get("test_setup_code"):
            task = f"You are an expert Python programmer, and here is your task: {row['text']} Your code should pass this test:"
            questions.append(Question(f"{task}\n\n{row['test_list'][0]}\n[BEGIN]\n", tests))
    if not questions:
        raise ValueError(
            f"mbpp/{split}: none of its items {first} to {last} in {source.used['mbpp/test']}; put mbpp/mbpp.jsonl, all 974, there"
        )
    return questions


def _test(text):
    """(expression, value) of `assert expression == literal`, else None."""
    try:
        (node,) = ast.parse(text.strip()).body
        (equals,), (value,) = node.test.ops, node.test.comparators
        return (ast.unparse(node.test.left), ast.literal_eval(value)) if isinstance(equals, ast.Eq) else None
    except (SyntaxError, ValueError, AttributeError):
        return None


def grade(task, questions, texts) -> list[float]:
    """1.0 or 0.0 for each text as an answer to its question. Whatever a text says, it is graded, not raised about."""
    pairs = list(zip(questions, texts, strict=True))
    if task == "mbpp":
        return _run([(text.split("[DONE]")[0], question.gold) for question, text in pairs])
    if task in ("gsm8k", "math"):
        programs = [program(text) for text in texts]
        ran = iter(
            _run(
                [
                    (found[0], [(found[1], number) for number in _number(question.gold)])
                    for found, (question, _) in zip(programs, pairs, strict=True)
                    if found
                ]
            )
        )
        return [next(ran) if found else _grade_text(*pair) for found, pair in zip(programs, pairs, strict=True)]
    if task == "mano":
        values = [re.fullmatch(r" (\d{1,9})\.", text, re.ASCII) for text in texts]
        return [
            float(value is not None and int(value[1]) == int(question.gold))
            for value, question in zip(values, questions, strict=True)
        ]
    return [
        float(text.count("Answer") == 1 and reasoning.check(question.prompt, text, question.gold)[0])
        for question, text in pairs
    ]


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


def _grade_text(question, text):
    answer, gold = stated(text), canonical(question.gold)
    if answer is None or not gold:
        return 0.0
    if SEVERAL.search(answer) or SEVERAL.search(question.gold):
        return float(answer.split() == question.gold.split())
    said = canonical(answer)
    if WORDS.search(question.gold):
        return float(said.lower() == gold.lower())
    if said == gold or NUMBER.fullmatch(gold):
        return float(said == gold)
    if said in canonical(question.prompt):
        return 0.0
    return float(_equal_expressions(gold, said))


def _number(gold):
    """[the number] that gold is, or []."""
    return [Fraction(canonical(gold))] if NUMBER.fullmatch(canonical(gold)) else []


_child = None


def _equal_expressions(gold, answer, seconds=5):
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


def _run(jobs):
    """Rewards of [(program, [(expression, value), ...]), ...], several processes at a time; without expressions there is none."""

    def one(job):
        source, tests = job
        values = sandbox.values(source, [expression for expression, _ in tests], SECONDS) if tests else None
        return float(values is not None and all(map(_right, values, (value for _, value in tests))))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(one, jobs))


def _right(text, gold):
    """Whether the repr that a program gave is that of gold; a Fraction stands for a number, up to the rounding of floats."""
    try:
        value = ast.literal_eval(text[:10_000])
        if isinstance(gold, Fraction):
            return type(value) in (int, float) and math.isclose(value, gold, rel_tol=1e-9)
        return value == gold
    except (SyntaxError, ValueError, TypeError, OverflowError, RecursionError, MemoryError):
        return False
