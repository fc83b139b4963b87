"""Equality of mathematical answers and their form, on labelled pairs and bombs: pytest tests/test_equal.py (CPU)"""

import importlib.util
import os
import random
import signal
import time
from fractions import Fraction

import pytest

from eval import equal, tasks
from eval.equal import clean, find_number, number, right
from eval.rewards import judge

EGGS = "Question: 17 boxes of 23 eggs?\nAnswer:"
LIBRARY = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")

PAIRS = [  # (gold, answer, whether they are equal)
    # the named cases
    (r"5\text{ million}", "5", 0),
    (r"5", r"5\text{ million}", 0),
    (r"5\text{ or 7}", "5", 0),
    ("5", r"5\text{ or 7}", 0),
    ("10080", r"10{,}080", 1),
    (r"10{,}080", "10,080", 1),
    (r"5\text{ cm}", r"5\text{cm}", 1),
    (r"5\text{ cm}", r"5\,\text{cm}", 1),
    ("5", r"5\text{cm}", 1),
    (r"5\text{ cm}", "5", 1),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\ 2\end{pmatrix}", 1),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\ 1\end{pmatrix}", 0),
    # scale words, several answers
    (r"3\text{ thousand}", "3", 0),
    (r"2\text{ dozen}", "2", 0),
    (r"7\text{ billion}", r"7\text{ million}", 0),
    (r"7\text{ million}", r"7\text{ million}", 1),
    (r"4\text{ hundred}", "4", 0),
    (r"5\text{ million}", "5000000", 1),
    (r"5\text{ million dollars}", r"5", 0),
    ("3", r"3\text{ and 4}", 0),
    (r"3\text{ or }4", "3", 0),
    ("3,4", r"3\text{ and }4", 1),
    ("5", r"\text{about }5", 0),
    # numbers
    (r"\frac{1}{2}", "0.5", 1),
    (r"\frac{1}{2}", r"\frac12", 1),
    (r"\frac{1}{2}", r"\dfrac{1}{2}", 1),
    (r"\frac{1}{2}", "1/2", 1),
    ("0.5", ".5", 1),
    ("5", ".5", 0),
    ("-3", "3", 0),
    ("1000", "1,000", 1),
    ("1000", r"1\,000", 1),
    ("1000", r"1,\!000", 1),
    ("12", "1 2", 0),
    ("1.5", r"1\frac{1}{2}", 1),
    (r"\frac{11}{2}", r"1\frac{1}{2}", 0),
    ("7.00", "7", 1),
    ("391", "390.9999999", 0),
    (r"\frac13", "0.3333", 0),
    ("1234567", "1234568", 0),
    ("0.12345678", "0.12345679", 0),
    ("100000000000000000000", "100000000000000000001", 0),
    (r"\frac{1}{3}", "0.33333333", 0),
    ("50\\%", "50", 1),
    ("50\\%", "50%", 1),
    ("50\\%", "0.5", 0),
    (r"\$18.90", "18.90", 1),
    (r"\$18", r"18\text{ dollars}", 1),
    ("45^\\circ", "45", 1),
    (r"45^{\circ}", r"45^\circ", 1),
    ("60", r"60\text{ degrees}", 1),
    ("8", r"8\text{ m/s}", 1),
    ("4", r"4\mbox{ inches}^2", 1),
    ("4", r"4\text{ cm}^2", 1),
    ("4", r"4\mathrm{~cm}", 1),
    ("2^{10}", "1024", 1),
    ("10^3", "1000", 1),
    (r"\sqrt{4}", "2", 1),
    ("6\\cdot 10^5", "600000", 1),
    ("0", "-0", 1),
    # expressions
    ("x+1", "1+x", 1),
    ("x+1", "x+2", 0),
    (r"\frac{x}{2}", r"\frac12x", 1),
    (r"\frac{x}{2}", "0.5x", 1),
    ("2x", "2X", 0),
    ("x^2+2x+1", "(x+1)^2", 1),
    (r"\frac{\sqrt3}{2}", r"\frac{\sqrt{3}}{2}", 1),
    (r"\sqrt{12}", r"2\sqrt3", 1),
    (r"\sqrt2", "1.41421356", 0),
    (r"\pi", "3.14159", 0),
    ("-x+3", "3-x", 1),
    ("2xy", r"2\cdot y\cdot x", 1),
    ("x^{10}", "x^10", 1),
    ("3-9i", "-9i+3", 1),
    ("3-9i", "3+9i", 0),
    (r"\cos x", r"\cos(x)", 1),
    (r"\frac{3}{x-1}", r"3/(x-1)", 1),
    # tuples, sets, intervals
    ("(1,2)", "(1, 2)", 1),
    ("(1,2)", "(2,1)", 0),
    ("1,2", "2,1", 1),
    ("1,2", "1,3", 0),
    ("1,2,3", "1,2", 0),
    (r"\{1,2\}", r"\{2,1\}", 1),
    ("(1,2)", "[1,2]", 0),
    ("[1,2)", "(1,2]", 0),
    ("[1,2)", "[1,2)", 1),
    (r"(-\infty,3)\cup(5,\infty)", r"(5,\infty)\cup(-\infty,3)", 1),
    (r"(-\infty,3)\cup(5,\infty)", r"(-\infty,3]\cup(5,\infty)", 0),
    ("(1,2,3)", "(1,2,3,4)", 0),
    (r"\left(\frac12,3\right)", r"(0.5,3)", 1),
    (r"\left(3,\frac{\pi}{2}\right)", r"(3,\pi/2)", 1),
    (r"x\in[2,5]", "[2,5]", 1),
    ("1,-2", "-2, 1", 1),
    (r"1 \pm \sqrt{19}", r"1 + \sqrt{19}, 1 - \sqrt{19}", 1),
    ("(1,2),(3,4)", "(3,4),(1,2)", 1),
    # equations
    ("x=5", "5", 1),
    ("5", "x=5", 1),
    ("y=2x+3", "y=3+2x", 1),
    ("y=2x+3", "y=2x-3", 0),
    ("y=2x+3", "z=2x+3", 0),
    ("x<5", "x>5", 0),
    (r"x\le5", r"x\leq 5", 1),
    ("2<x<5", "(2,5)", 1),
    # bases and words
    ("1011_2", "1011_3", 0),
    ("1011_2", "1011_{2}", 1),
    ("1011_2", "1011", 0),
    (r"\text{east}", r"\text{seat}", 0),
    (r"\text{Evelyn}", "Evelyn", 1),
    (r"\text{Evelyn}", "evelyn", 1),
    (r"\text{(A)}", "A", 1),
    (r"\text{(A)}", r"\text{(B)}", 0),
    (r"\text{odd}", r"\text{even}", 0),
    (r"\text{June 20}", r"\text{June 21}", 0),
    (r"\text{June 20}", r"June 20", 1),
    (r"\text{A,C}", "A, C", 1),
    ("11:15", r"11:15\text{ a.m.}", 1),
    ("3:2", "2:3", 0),
    (r"\text{yes}", r"\textbf{Yes}", 1),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", 1),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", 1),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", 0),
]


@LIBRARY
def test_equality_of_labelled_pairs():
    assert len(PAIRS) > 110
    assert [(gold, answer) for gold, answer, same in PAIRS if equal.equal(gold, answer) != bool(same)] == []


EXPAND = ("Expand $(x+1)(x+2)$.", "x^2+3x+2")
FORMS = [  # (question, gold, answers that earn the reward, answers that do not)
    (
        *EXPAND,
        ["x^2+3x+2", "2+3x+x^2", "x^{2} + 3x + 2", r"x^2+3\cdot x+2", r"\left(x^2+3x+2\right)", "x^2+x3+2", "3x+2+x^2"],
        ["(x+1)(x+2)", "(x+2)(x+1)", "(x+1)(x+2)+0", "(x+1)(x+2)-0", "(x+1)(x+2)+y-y", r"\frac{(x+1)(x+2)}{1}"]
        + ["1(x+1)(x+2)", "((x+1)(x+2))^1", "x(x+3)+2", "x^2+3x+2+0", r"x^2+3x+2\cdot1", "X^2+3X+2", "x^2+2x+x+2"]
        + ["x(x+1)+2(x+1)", "-(-(x+1)(x+2))", "x^2+3x+2.00000000000000002", "x^2+3x+1", r"x^2+\sqrt{9}x+2", "x^2--3x+2"]
        + [
            r"\text{Expand }(x+1)(x+2)",
            "(x+1)(x+2)=x^2+3x+2",
            "x^2+3x+2, x^2",
            "x*x+3x+2",
            "x^2+3x^1+2",
            r"x^2+\frac{6}{2}x+2",
        ],
    ),
    (
        "Factor $x^2+3x+2$.",
        "(x+1)(x+2)",
        ["(x+2)(x+1)", "(1+x)(x+2)"],
        ["x^2+3x+2", "x^2+3x+2+0", "(x+1)x+2(x+1)", "1(x^2+3x+2)"],
    ),
    (
        r"Simplify $\frac{3x^3}{x}$.",
        "3x^2",
        [r"3\cdot x^2", "3x^{2}"],
        [r"\frac{3x^3}{x}", "3x^3/x", "3xx", "3x^2/1", "3X^2"],
    ),
    (
        r"Rationalise $\frac{1}{\sqrt{2}}$.",
        r"\frac{\sqrt{2}}{2}",
        [r"\sqrt2/2", r"\frac12\sqrt2", r"\dfrac{\sqrt 2}{2}"],
        [r"\frac{1}{\sqrt{2}}", "0.7071067811865476", r"\frac{2}{2\sqrt2}"],
    ),
    (
        r"Simplify $\sqrt{12}$.",
        r"2\sqrt{3}",
        [r"2\sqrt3", r"\sqrt{3}\cdot 2"],
        [r"\sqrt{12}", r"\sqrt{4}\sqrt{3}", r"\sqrt{12}+0", "3.4641016151377544", r"2\sqrt{3}^1"],
    ),
    (
        r"Simplify $\frac{6}{4}$.",
        r"\frac{3}{2}",
        ["3/2", r"\dfrac32", "1.5", r"1\frac{1}{2}"],
        [r"\frac{6}{4}", "6/4", r"\frac{12}{8}", r"\frac{3}{2}+0"],
    ),
    ("Write 0.5 as a fraction.", r"\frac{1}{2}", [r"\frac12", "1/2"], ["0.5", ".5+0"]),
    (
        "What is $17 \\cdot 23$?",
        "391",
        ["391", "391.0", "x=391", r"391\text{ eggs}"],
        [r"17\cdot23", "391+0", "--391", "391-0", r"\sqrt{152881}", "391^1"],
    ),
    ("What is $\\sqrt{4}$?", "2", ["2"], [r"\sqrt{4}", "1+1", "2/1", "4/2"]),
    (
        "Problem:\nWrite $y - (1 - x)$ simply.\n\nSolution:",
        "x+y-1",
        ["y+x-1", "-1+x+y"],
        ["y-(1-x)", "-(1-x)+y", "y-1(1-x)"],
    ),
    (
        r"Simplify $\dfrac{2x}{4}\, + 1$.",
        r"\frac{x}{2}+1",
        [r"1+\frac{x}{2}", r"\frac12x+1", "0.5x+1", "x/2+1"],
        [r"\dfrac{2x}{4}+1", r"\frac{2x}4 + 1", r"1+\frac{2x}{4}"],
    ),
    ("Solve $2x+2=x^2-1$.", "-1,3", ["3,-1", "x=-1, x=3", "-1, 3"], ["-1", "3", "2x+2=x^2-1", "-1,3,3", "-1,2"]),
    ("List $3, 1, 2$ in increasing order.", "1,2,3", ["1, 2, 3"], ["3,1,2", "3,2,1"]),
    (
        "Find it.",
        "(-1/2,\\sqrt{3})",
        [r"\left(-\frac{1}{2},\sqrt{3}\right)", r"(\frac{-1}{2},\sqrt3)", r"(-0.5,\sqrt3)"],
        [r"(\sqrt3,-1/2)", "(-1/2,1.7320508)"],
    ),
    ("Find it.", "3-9i", ["-9i+3"], ["3+9i"]),
    ("Find it.", r"\frac{x^2-3}{4}", ["(x^2-3)/4", r"\frac{-3+x^2}{4}"], ["x^2-3/4", "(x^2-3)4"]),
    ("Find it.", "(3,391)", ["(3, 391)"], [r"(3,17\cdot23)", "(391,3)"]),
    ("Find it.", "(-\\infty,3)\\cup[5,\\infty)", [r"[5,\infty)\cup(-\infty,3)"], [r"(-\infty,3]\cup(5,\infty)"]),
    ("Find it.", "1011_2", ["1011_{2}"], ["1011", "1011_3", "11"]),
    (
        "Find it.",
        r"\begin{pmatrix}1\\2\end{pmatrix}",
        [r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"],
        [r"\begin{pmatrix}2\\1\end{pmatrix}", r"\begin{pmatrix}1\\1+1\end{pmatrix}"],
    ),
    ("Odd or even?", r"\text{Evelyn}", ["evelyn", r"\textbf{Evelyn}"], ["nylevE", r"\text{Eve}"]),
    ("Which?", r"\text{(A)}", ["A", "(A)", r"\text{A}"], ["B", "a", r"\text{(A) or (B)}"]),
    (
        "How much?",
        r"5\text{ million}",
        ["5000000", "5,000,000", r"5\text{ million dollars}"],
        ["5", r"5\text{ billion}"],
    ),
    (
        "How much?",
        "5",
        [r"5\text{cm}", r"5\,\text{cm}", r"5\text{ cm}^2", "5."],
        [r"5\text{ million}", r"5\text{ or 7}", "5 or 7", r"\text{about }5", ".5", "$5$ $6$"],
    ),
    (
        "Find it.",
        r"\frac{9}{7}",
        ["(9)/(7)", "9/7"],
        ["(18)/(14)", "-(9)/(7)", "(9)/(-7)", "((9)/(7))^1", "(9)/(7)+0", "9(1)/(7)"],
    ),
    ("Find it.", r"-\frac{9}{7}", ["(-9)/(7)", "-(9)/(7)"], ["(9)/(7)", "-(-9)/(7)"]),
    ("Find it.", r"2\frac{1}{2}", [r"2\frac12", "5/2"], ["2(1)/(2)", "1"]),
    ("Find it.", r"x\leq-\pi", [r"x\le-\pi", "x≤−π"], [r"x\ge-\pi", r"x<-\pi"]),
    ("Simplify $a+(b-c)$.", "a+b-c", ["b+a-c"], ["a+(b-c)", "a-c-b"]),
    ("Write $3-x$ in descending powers.", "-x+3", ["-x+3"], ["3-x"]),
    ("What mixed number?", "1\\frac{1}{2}", [r"1\frac12", "1 1/2", "3/2"], ["11/2", r"\frac{11}{2}"]),
]


@LIBRARY
def test_rewards_need_the_form_that_was_asked_for():
    wrong = []
    for question, gold, good, bad in FORMS:
        wrong += [(gold, answer) for answer in good if not right(question, gold, answer)]
        wrong += [(gold, answer) for answer in bad if right(question, gold, answer)]
        assert right(question, gold, gold)
        for answer in good[:1] + bad[:2]:
            assert judge(question, gold, rf"So it is \boxed{{{answer}}}.") == right(question, gold, answer)
    assert wrong == []


NOTATIONS = [  # of a positive number n in text
    lambda n: f"{n}",
    lambda n: f"${n:,}",
    lambda n: f"{n:,}".replace(",", "{,}"),
    lambda n: f"{n}.0",
    lambda n: f"{n}.",
    lambda n: f"{n:,}.00 dollars",
    lambda n: rf"\${n}",
    lambda n: f"€{n:,}",
    lambda n: f"{n}%",
    lambda n: f"+{n}",
    lambda n: f"{n}!",
    lambda n: f"{n}, as above",
    lambda n: f"{n}\n",
    lambda n: f"{n} ({n} eggs)",
    lambda n: rf"\frac{{{2 * n}}}{{2}}",
    lambda n: rf"\dfrac{{{n}}}{{1}}",
    lambda n: f"{3 * n}/3",
    lambda n: f"{n}00/100.",
    lambda n: f"**{n}**",
    lambda n: f"{n // 1000} thousand" if n % 1000 == 0 else f"{n}",
]


def test_numbers_in_every_notation():
    draw = random.Random(0)
    for _ in range(300):
        n = draw.choice([draw.randrange(1, 10), draw.randrange(1, 10**6), 1000 * draw.randrange(1, 999)])
        for notation in NOTATIONS:
            for sign, value in (("", n), ("-", -n)):
                text = notation(n)
                text = text if text.startswith("+") and sign else sign + text
                if sign and text.startswith(("+", "-**")):
                    continue
                found = find_number(f"So the answer is {text}", "answer is")
                assert found == value and tasks.load("gsm8k").vote(f"#### {text}") == str(found), text
    for text, value in {
        ".5": "1/2",
        "-.25": "-1/4",
        "1e3": 1000,
        "1.5e3": 1500,
        r"\frac{1}{3}": "1/3",
        "1/3": "1/3",
        "9{,}500": 9500,
    }.items():
        assert find_number(f"#### {text}", "####") == Fraction(value) == number(text).value
    for text in ("3^2", "1/x", "2(3)", "1.2.3", "1e3e4", "x", "", "1/0", "five", "9" * 5000, "1," * 5000):
        assert find_number(f"#### {text}", "####") is None, text


@LIBRARY
def test_the_library_is_asked_in_a_process_that_may_hang_or_die():
    begin = time.monotonic()
    assert equal.equal("x+1", "1+x")
    assert not equal.equal("x+1", "9^{9^{9^{9}}}x", seconds=1) and time.monotonic() - begin < 70
    assert equal.equal("x+1", "1+x")  # a process that hung has been replaced
    child = equal._child
    for number_ in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # torchrun sends these to all processes, and the step is to be finished
        os.kill(child.pid, number_)
    time.sleep(0.5)
    assert equal.equal("x+1", "1+x") and equal._child is child
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert equal.equal("x+1", "1+x") and equal._child is not child


BOMBS = [
    "9" * 5000,
    "(" * 90 + "x+1" + ")" * 90,
    "{" * 95 + "}" * 95,
    r"\frac{" * 40,
    "^" * 190,
    "x^" * 90 + "2",
    "9^9^9^9",
    "10^{10^{10}}",
]
BOMBS += [
    r"\sqrt{" * 30 + "2" + "}" * 30,
    "1e999999",
    "1e-999",
    "!" * 150,
    "9!!!!!!!!",
    r"\int_0^1 x^x dx",
    "1," * 90,
    "-" * 199,
    "\0",
    "{,}" * 60,
]
BOMBS += [
    " " * 199,
    "~" * 199,
    r"\text{" * 30,
    "1" + " " * 150 + "2",
    "x=" * 90,
    "\ud800",
    "(((((" * 2000,
    "1,234" * 2000,
]


@LIBRARY
def test_bombs_earn_nothing_and_take_no_time():
    begin = time.monotonic()
    for bomb in BOMBS:
        for question, gold in ((EGGS, "391"), EXPAND, ("", r"\text{east}"), ("", "(1,2)")):
            assert not right(question, gold, bomb) and judge(question, gold, rf"\boxed{{{bomb}}}") == 0
            assert judge(question, gold, f"#### {bomb}") == 0
        tasks.load("gsm8k").vote(f"#### {bomb}")
        assert tasks.load("math500").vote(rf"\boxed{{{bomb}}}") != "391"
        clean(bomb)
    assert time.monotonic() - begin < 60
    for bomb in (BOMBS[1], BOMBS[4], BOMBS[7]):
        assert not equal.equal("x+1", bomb, seconds=1)
