"""Verifiers against empty, repeated, multiple and adversarial answers (CPU)."""

import importlib.util
import json
import time

import pytest

from data import procedural, reasoning
from data.procedural import MixtureConfig
from data.reasoning import ReasoningConfig
from eval import equal, tasks
from eval.equal import canonical, number
from eval.rewards import judge, stated
from eval.sources import Source
from eval.tasks import Item

EGGS = "Question: 17 boxes of 23 eggs?\nAnswer:"
LIBRARY = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")


def load(task, split, source, n):
    return tasks.load(task).questions(source, split, n)


def grade(task, items, texts):
    return tasks.load(task).rewards(items, texts)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Procedural data and small made-up sets in one folder."""
    folder = tmp_path_factory.mktemp("data")
    procedural.build(
        folder / "procedural",
        MixtureConfig(exposures=0, n_problems=30, reasoning=ReasoningConfig(max_steps=3, modulus=7, names=24)),
    )
    rows = {
        "gsm8k/test": [{"question": "Two and two?", "answer": "So 4.\n#### 1,004"}],
        "math/math500": [{"problem": "P1", "solution": r"It is \boxed{\frac{1}{2}}.", "level": 1}],
        "math/math_test": [{"problem": f"P{i}", "solution": r"It is \boxed{x+1}.", "level": "Level 2"} for i in (1, 2)],
    }
    for name, lines in rows.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return Source(folder, folder / "procedural")


def test_questions(source, monkeypatch):
    monkeypatch.setattr(equal.importlib.util, "find_spec", lambda name: True)
    (item,) = load("gsm8k", "test", source, 0)
    assert item.prompt == "Question: Two and two?\nAnswer:" and tasks.load("gsm8k").gold(item) == "1004"
    (item,) = load("math", "test", source, 0)  # the name in old runs of grpo.py
    assert item.prompt == "Problem:\nP1\n\nSolution:" and "frac" in item.answer
    (item,) = load("math500", "train", source, 0)  # MATH-500 is unseen
    assert item.prompt == "Problem:\nP2\n\nSolution:"
    train, test = (load("reasoning", split, source, 40) for split in ("train", "test"))
    seen = {reasoning.problem(ReasoningConfig(max_steps=3, modulus=7, names=24), i).question for i in range(30)}
    asked = {q.prompt for q in train}
    assert not seen & asked and not asked & {q.prompt for q in test} and len(asked) == 40
    for task in ("reasoning", "mano"):
        with pytest.raises(ValueError, match="questions=0: there is no end of procedural questions"):
            load(task, "train", source, 0)
    monkeypatch.setattr(equal.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[rl\]'"):
        load("math500", "train", source, 0)


def test_reasoning(source):
    cfg = procedural.read_config(source.training_data).reasoning
    for i, question in enumerate(load("reasoning", "test", source, 30)):
        p = reasoning.problem(cfg, i, "test", 1 + i % 3)
        right, wrong = p.answer, (p.answer + 1) % 7
        assert question.prompt == p.question and question.row["modulus"] == 7
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
    questions = [Item("0", "Mano: + 1 3 =", " 4.")] * len(texts)
    assert dict(zip(texts, grade("mano", questions, list(texts)), strict=True)) == texts


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
        (r"\boxed{\frac{782}{2}}", 0),  # not worked out
        ("#### 782/2", 0),
        ("#### 391.0000000000000000000001", 0),
        ("#### 391 million", 0),
        (r"\boxed{0.391\text{ thousand}}", 1),
        (r"\boxed{391\text{ thousand}}", 0),
        (r"\boxed{391\,\text{eggs}}", 1),
        (r"\boxed{391\text{eggs}}", 1),
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
    assert judge(EGGS, "391", text) == reward


def test_enormous_answers_take_no_time():
    begin = time.process_time()
    texts = [
        r"\boxed{" * 10_000,
        "the answer is " + r"\boxed{" * 10_000,
        "the answer is " + r"\boxed{1} " * 10_000,
        "the answer is " * 10**5,
    ]
    assert [judge(EGGS, "391", text) for text in texts] == [0] * 4
    for text in ("9" * 20_000, "~" * 20_000, "9" * 20_000 + "million"):
        assert canonical(text) == text
    assert time.process_time() - begin < 10


def test_what_an_answer_is():
    answer = r"\frac{1}{\sqrt{2}}"
    assert stated(rf"First \boxed{{{answer}}}, so the answer is $\boxed{{{answer}}}$.") == answer
    assert stated("The final answer is 1,000. Thanks.") == "1,000"
    assert stated("answer is 7\nanswer is 8") is None and stated("no") is None
    assert judge("", "1,004", "#### 1004") == judge("", "1004", "#### 1,004") == 1.0


@pytest.mark.parametrize(
    "text, answer",
    [
        ("The answer is .5", ".5"),
        ("The answer is .5.", ".5"),
        ("#### -.5", "-.5"),
        ("#### $.50", ".50"),
        ("#### 5.", "5"),
        ("answer is: 5.0. Done.", "5.0"),
    ],
)
def test_a_leading_decimal_point_stays(text, answer):
    assert stated(text) == answer and judge("", "5", text) == float(number(answer).value == 5)
