"""Verifiers against empty, repeated, multiple and adversarial answers. Run: python -m pytest tests/test_rewards.py (CPU; math-verify for one test)"""

import importlib.util
import json
import os
import signal
import time

import pytest

from data import procedural, reasoning
from data.procedural import MixtureConfig
from data.reasoning import ReasoningConfig
from eval import rewards, sandbox
from eval.rewards import Question, grade, load, program, stated
from eval.sources import Source

EGGS = Question("Question: 17 boxes of 23 eggs?\nAnswer:", "391")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Procedural data and small made-up sets in one folder."""
    folder = tmp_path_factory.mktemp("data")
    procedural.build(
        folder / "procedural",
        MixtureConfig(exposures=0, n_problems=30, reasoning=ReasoningConfig(max_steps=3, modulus=7, names=24)),
    )
    mbpp = [
        dict(
            task_id=i,
            text="Add one.",
            code="",
            test_list=["assert f(1) == 2", "assert f(2) == 3"],
            test_setup_code="",
            challenge_test_list=[],
        )
        for i in (2, 11, 601, 602)
    ]
    mbpp[3]["test_list"][1] = "assert abs(f(2) - 3) < 1"  # not a comparison with a value
    rows = {
        "gsm8k/test": [{"question": "Two and two?", "answer": "So 4.\n#### 1,004"}],
        "mbpp/mbpp": mbpp,
        "math/math500": [{"problem": "P1", "solution": r"It is \boxed{\frac{1}{2}}."}],
        "math/math_test": [{"problem": f"P{i}", "solution": r"It is \boxed{x+1}."} for i in (1, 2)],
    }
    for name, lines in rows.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return Source(folder, folder / "procedural")


def test_questions(source, monkeypatch):
    monkeypatch.setattr(rewards.importlib.util, "find_spec", lambda name: True)
    assert load("gsm8k", "test", source, 0) == [Question("Question: Two and two?\nAnswer:", "1,004")]
    assert load("math", "test", source, 0) == [Question("Problem:\nP1\n\nSolution:", r"\frac{1}{2}")]
    assert [q.prompt for q in load("math", "train", source, 0)] == [
        "Problem:\nP2\n\nSolution:"
    ]  # MATH-500 stays unseen
    (item,) = load("mbpp", "train", source, 0)
    assert item.gold == [("f(1)", 2), ("f(2)", 3)] and "f(1) == 2" in item.prompt and "f(2)" not in item.prompt
    train, test = (load("reasoning", split, source, 40) for split in ("train", "test"))
    seen = {reasoning.problem(ReasoningConfig(max_steps=3, modulus=7, names=24), i).question for i in range(30)}
    assert (
        not seen & {q.prompt for q in train}
        and not {q.prompt for q in train} & {q.prompt for q in test}
        and len(set(train)) == 40
    )
    monkeypatch.setattr(rewards.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'optimoe\[rl\]'"):
        load("math", "train", source, 0)


def test_reasoning(source):
    cfg = procedural.read_config(source.training_data).reasoning
    for i, question in enumerate(load("reasoning", "test", source, 30)):
        p = reasoning.problem(cfg, i, "test", 1 + i % 3)
        right, wrong = p.answer, (p.answer + 1) % 7
        assert question.prompt == p.question and question.gold == 7
        texts = {
            p.solution: 1,
            f" Answer: {right}.": 1,
            "": 0,
            f" Answer: {wrong}.": 0,
            f" Answer: {right}": 0,
            f"{right}.": 0,
            f" Answer: {right}. Answer": 0,
            f" Answer: {wrong}. Answer: {right}.": 0,
            " ".join(f"Answer: {n}." for n in range(7)): 0,
            p.solution + p.solution: 0,
            f" Answer: {right}.\n": 0,
            f" Answer: {chr(0x660 + right)}.": 0,  # an Arabic digit
            f" Answer: {right + 7}.": 0,
            f" Answer: -{right}.": 0,
            p.solution + " And so on.": 0,
            f" Answer: {'4' * 5000}.": 0,
            p.solution.replace(" is ", " is " + "4" * 5000, 1): 1,
            f" Answer: {right}{wrong}.": 0,
        }
        assert dict(zip(texts, grade("reasoning", [question] * len(texts), list(texts)), strict=True)) == texts


def test_mano():
    texts = {
        " 4.": 1,
        "": 0,
        " 3.": 0,
        " 4": 0,
        " 3. 4.": 0,
        " 4. 4.": 0,
        " 4 .": 0,
        " 0 1 2 3 4.": 0,
        "4.": 0,
        " ٤.": 0,
        " 4." * 99: 0,
        " " + "4" * 5000 + ".": 0,
    }
    assert (
        dict(zip(texts, grade("mano", [Question("Mano: + 1 3 =", "4")] * len(texts), list(texts)), strict=True))
        == texts
    )


@pytest.mark.parametrize(
    "text, reward",
    [
        ("17 * 23 = 391.\n#### 391", 1),
        (r"So \boxed{391}.", 1),
        ("The answer is 391.", 1),
        (r"The answer is $\boxed{391}$. #### 391", 1),
        ("#### 391.00", 1),
        ("#### $391", 1),
        ("", 0),
        ("391", 0),
        ("####", 0),
        ("#### ", 0),
        (r"\boxed{}", 0),
        ("#### 390", 0),
        ("#### 39", 0),
        ("#### -391", 0),
        ("#### 391 #### 391", 0),  # one line: "391 #### 391" is no number
        ("#### 391\n#### 391", 1),
        ("#### 390\n#### 391", 0),
        ("#### 391\n#### 390", 0),
        (r"\boxed{390} \boxed{391}", 0),
        (r"\boxed{390, 391}", 0),
        (r"#### 390 \boxed{391}", 0),
        (r"#### \boxed{391} or 390", 0),
        (r"So the answer is $17 \cdot 23 = \boxed{391}.$", 1),
        ("The answer is 1. The answer is 391.", 0),
        ("#### 390 or 391", 0),
        ("\n".join(f"#### {n}" for n in range(400)), 0),
        (r"\boxed{17 \cdot 23}", 0),
        ("#### 17*23", 0),
        (r"\boxed{390=391}", 0),
        (r"\boxed{x=391}", 1),
        (r"\boxed{\boxed{391}}", 0),
        (r"\boxed{391", 0),
        ("#### 391" + "0" * 5000, 0),
        (r"\boxed{" * 500, 0),
        (r"\boxed{\frac{391}{0}}", 0),
        (r"\boxed{\frac{782}{2}}", 1),
        ("#### 9^9^9^9", 0),
        ("#### \0", 0),
        ("#### 391. #### 390", 0),
        ("The answer is 391. The answer is 390.", 0),
        ("#### 391. #### 391", 1),
        ("#### 391...", 1),
        ("#### 39 1", 0),
        (r"\boxed{391\text{ or 390}}", 0),
        (r"\boxed{391\text{ eggs}}", 1),
    ],
)
def test_numbers(text, reward):
    assert grade("gsm8k", [EGGS], [text]) == [reward]


def test_numbers_apart_are_not_one_number():
    cases = [
        ("11/2", "1 1/2", 0),
        ("1 1/2", "11/2", 0),
        ("1 1/2", "1  1/2", 1),
        ("12", "1 2", 0),
        (r"11\sqrt{2}", r"1 1\sqrt{2}", 0),
        ("1/2", r"\frac 1 2", 1),
    ]
    questions = [Question("", gold) for gold, _, _ in cases]
    assert grade("gsm8k", questions, [rf"\boxed{{{answer}}}" for _, answer, _ in cases]) == [
        float(reward) for *_, reward in cases
    ]


def test_enormous_answers_take_no_time():
    begin = time.process_time()
    texts = [
        r"\boxed{" * 10_000,
        "the answer is " + r"\boxed{" * 10_000,
        "the answer is " + r"\boxed{1} " * 10_000,
        "the answer is " * 10**5,
    ]
    assert grade("gsm8k", [EGGS] * 4, texts) == [0] * 4
    assert time.process_time() - begin < 10


def test_what_an_answer_is():
    assert (
        stated(r"First \boxed{\frac{1}{\sqrt{2}}}, so the answer is $\boxed{\frac{1}{\sqrt{2}}}$.")
        == r"\frac{1}{\sqrt{2}}"
    )
    assert (
        stated("The final answer is 1,000. Thanks.") == "1,000"
        and stated("answer is 7\nanswer is 8") is None
        and stated("no") is None
    )
    assert (
        grade("gsm8k", [Question("", "1,004")], ["#### 1004"])
        == grade("gsm8k", [Question("", "1004")], ["#### 1,004"])
        == [1.0]
    )


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")
def test_expressions():
    cases = [
        ("x+1", "1+x", 1),
        (r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2", 1),
        (r"\{1,2\}", r"\{2,1\}", 1),
        ("(1,2)", "(1,3)", 0),
        ("x+1", "x+2", 0),
        ("x+1", "x+1, x+2, x+3", 0),
        ("x+1", "x+1=x+2", 0),
        ("x+1", "$x$ $x+1$", 0),
        (r"5\sqrt{3}", r"\sqrt{12}+\sqrt{27}", 0),
        (r"\sqrt{2}", "1.41421356237", 0),
        ("x^2+2x+1", "(1+x)^2", 0),
        ("x+1", r"\int (1) dx + 1", 0),
        ("x+1", "x+1+9^{9^{9^{9}}}-9^{9^{9^{9}}}", 0),
        ("x+1", r"\text{correct}", 0),
        ("x+1", "}{", 0),
        (r"(3,391)", r"(3,17\cdot23)", 0),
        ("(1,9)", "(1,3^2)", 0),
        (r"\{1,2\}", r"\{1,1+1\}", 0),
        ("x+12", "x+5+7", 0),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\1+1\end{pmatrix}", 0),
        ("2^{10}x", "x2^{10}", 1),
        ("x-3", "-3+x", 1),
        (r"-\frac{3\sqrt{2}}{2}", r"\frac{-3\sqrt{2}}{2}", 1),
        (r"(3,\frac{\pi}{2})", r"(3,\pi/2)", 1),
        ("3-9i", "-9i+3", 1),
        (r"(-\frac{1}{2},\sqrt{3})", r"(-1/2,\sqrt{3})", 1),
        (r"\frac{x^2-3}{4}", "(x^2-3)/4", 1),
        ("1011_2", "1011_3", 0),
        ("1011_2", "1011", 0),
        ("1011_2", "1011_{2}", 1),
        (r"\text{east}", r"\text{seat}", 0),
        (r"\text{Evelyn}", "nylevE", 0),
        (r"\text{Evelyn}", "evelyn", 1),
        ("ab", "ba", 1),
        (r"\text{(A)}", "A", 1),
        (r"5\sqrt{x}\text{ cm}", r"\sqrt{x}5", 1),
    ]
    questions = [Question("Problem:\nSimplify.\n\nSolution:", gold) for gold, _, _ in cases]
    assert grade("math", questions, [rf"\boxed{{{answer}}}" for _, answer, _ in cases]) == [
        float(reward) for *_, reward in cases
    ]
    copied = Question("Problem:\nWrite $y - (1 - x)$ simply.\n\nSolution:", "x+y-1")
    assert grade("math", [copied] * 2, [r"\boxed{y-(1-x)}", r"\boxed{y+x-1}"]) == [0.0, 1.0]
    copied = Question("Problem:\nSimplify $\\dfrac{2x}{4}\\, + 1$.\n\nSolution:", r"\frac{x}{2}+1")
    assert grade(
        "math", [copied] * 3, [r"\boxed{\dfrac{2x}{4}+1}", r"\boxed{\frac{2x}4 + 1}", r"\boxed{1+\frac{x}{2}}"]
    ) == [0.0, 0.0, 1.0]
    assert not rewards._equal_expressions("x+1", "9^{9^{9^{9}}}", seconds=0)
    assert rewards._equal_expressions("x+1", "1+x")  # a process that hung has been replaced
    child = rewards._child
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # torchrun and schedulers send it to all processes, and the step is to be finished
        os.kill(child.pid, number)
    time.sleep(0.5)
    assert rewards._equal_expressions("x+1", "1+x") and rewards._child is child


SOLVE = "def simple_math_problem():\n    boxes = 17\n    return boxes * 23\n"


def test_programs_that_answer(monkeypatch):
    monkeypatch.setattr(rewards, "SECONDS", 1)
    texts = {
        SOLVE: 1,
        "Let me see.\n" + SOLVE + "That is it.": 1,
        SOLVE.replace("23", "22"): 0,
        SOLVE + SOLVE: 0,
        SOLVE + "#### 5": 1,
        SOLVE + "    return (": 0,
        "def simple_math_problem():\n    return True": 0,
        "def simple_math_problem():\n    pass\n": 0,
        "def simple_math_problem():\n    while True: pass": 0,
        "def simple_math_problem():\n    raise SystemExit": 0,
        "def simple_math_problem():\n    return [390, 391]": 0,
        "class All(int):\n    __eq__ = lambda *_: True\n    __repr__ = lambda s: 'All()'\n"
        + "def simple_math_problem():\n    return All()": 0,
        "<llm-code>\nx = 17\nprint(x * 23)\n</llm-code> #### 3": 1,
        "<llm-code>17 * 23.0</llm-code>": 1,
        "<llm-code>1</llm-code><llm-code>391</llm-code>": 0,
        "<llm-code>x = 391</llm-code>": 0,
        "<llm-code>" + "(" * 3000 + "</llm-code>": 0,
        "<llm-code></llm-code>": 0,
    }
    assert dict(zip(texts, grade("gsm8k", [EGGS] * len(texts), list(texts)), strict=True)) == texts
    assert program("define simple_math_problem") is None


def test_programs_with_tests():
    question = Question("", [("f(1)", 2), ("f(2)", 3)])
    texts = {
        "def f(x):\n    return x + 1\n[DONE] more": 1,
        "def f(x):\n    return 2": 0,
        "def f(x):\n    return {1: 2}.get(x)": 0,
        "": 0,
        "def f(x": 0,
        "class A:\n    __eq__ = lambda *_: True\nf = lambda x: A()": 0,
        "import os\nos._exit(0)": 0,
        "f = print\nprint('passed')": 0,
        "class A:\n    __repr__ = lambda s: '[' * 9000\nf = lambda x: A()": 0,
        "class A:\n    __repr__ = lambda s: '3'\nf = lambda x: A()": 0,
        "class A:\n    __repr__ = lambda s: '2+0'\nf = lambda x: A()": 0,
        # answers the parent itself, over the channel, without being asked for values
        "import os\nfor d in range(3, 64):\n    try: os.write(d, b'\\0\\0\\0\\6[2, 3]')\n    except OSError: pass\nos._exit(0)": 0,
    }
    assert dict(zip(texts, grade("mbpp", [question] * len(texts), list(texts)), strict=True)) == texts
    assert (
        sandbox.values("x = 1.5", ["x", "[x] * 2"]) == ["1.5", "[1.5, 1.5]"] and sandbox.values("x = 1", ["y"]) is None
    )
    assert sandbox.values("x = 'a' * 70_000", ["x"]) is None and sandbox.values("", []) == []
