"""Prompts and scoring rules of the tasks, on made-up items: python -m pytest tests/test_eval_tasks.py (CPU, seconds)"""

import random

import pytest

from data.facts import FactsConfig
from data.procedural import MixtureConfig
from data.reasoning import ReasoningConfig
from eval import harness, tasks
from eval.tasks import Item

CHOICES = {"text": ["a", "b"], "label": ["A", "B"]}
FORMS = {
    "arc_easy": {"question": "q", "choices": CHOICES, "answerKey": "A"},
    "piqa": {"goal": "q", "sol1": "a", "sol2": "b", "label": "0"},
    "hellaswag": {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"], "label": "0"},
    "winogrande": {"sentence": "a _ b", "option1": "c", "option2": "d", "answer": "1"},
    "mmlu": {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 0, "subject": "s"},
    "gsm8k": {"question": "q", "answer": "#### 1"},
    "gsm_plus": {"question": "q", "solution": "#### 1", "perturbation_type": "p"},
    "math500": {"problem": "q", "solution": r"\boxed{1}", "level": 1},
    "triviaqa": {"question_id": 1, "question": "q", "value": "a", "aliases": ["a"]},
    "humaneval": {"task_id": 1, "prompt": "p", "canonical_solution": "a", "test": "t", "entry_point": "f"},
    "humanevalplus": {"prompt": "p", "answer": "a"},
    "mbpp": {"task_id": 11, "text": "q", "code": "a", "test_list": ["t"], "test_setup_code": ""},
}


@pytest.mark.parametrize("name", FORMS)
def test_a_null_or_a_list_in_the_place_of_a_text_is_no_item(name):
    """It would become the word None, or fail in the middle of an evaluation."""

    def items(row):
        source = Rows(**{getattr(task.module, "TEST", getattr(task.module, "FULL", None)).name: [row]})
        source.used = {"set": "FILE"}
        return harness.read_items(task, source, 0)

    task, row = tasks.load(name), FORMS[name]
    assert len(items(row)) == 1
    for field in row:
        for value in (None, ["x"]) if isinstance(row[field], str) else (None, [None]):
            if field not in ("task_id", "question_id", "level"):
                with pytest.raises(ValueError, match=f"{name}: .*get (its file|the file) again"):
                    pytest.fail(f"{field}={value}: {items(row | {field: value})}")


class Rows:
    """A source of inline rows."""

    def __init__(self, **sets):
        self.sets = {name.replace("__", "/"): rows for name, rows in sets.items()}

    def rows(self, *sets):
        return next(self.sets[wanted.name] for wanted in sets if wanted.name in self.sets)


def gsm(n, of="test"):
    return [
        {
            "question": f"{of} {i}?",
            "answer": f"It is {i}.\n#### {i}",
            "solution": f"It is {i}.\n#### {i}",
            "perturbation_type": "digits",
        }
        for i in range(n)
    ]


# ---- prompts


def test_gsm8k_prompt():
    source = Rows(gsm8k__test=gsm(3), gsm8k__train=gsm(50, "train"))
    items = tasks.load("gsm8k").items(source, 2)
    stream = random.Random(42)  # the harness: one stream, n draws an item, in order
    for i, item in enumerate(items):
        a, b = stream.sample(range(50), 2)
        assert item.prompt == (
            f"Question: train {a}?\nAnswer: It is {a}.\n#### {a}\n\n"
            f"Question: train {b}?\nAnswer: It is {b}.\n#### {b}\n\n"
            f"Question: test {i}?\nAnswer:"
        )
        assert item.answer == f"It is {i}.\n#### {i}" and item.id == str(i)
    assert tasks.load("gsm8k").items(source, 0)[1].prompt == "Question: test 1?\nAnswer:"


def test_examples_of_the_same_set_never_hold_the_item():
    rows = gsm(7)
    items = tasks.load("gsm_plus").items(Rows(gsm_plus__testmini=rows), 5)
    for i, item in enumerate(items):
        assert item.prompt.count("Question: ") == 6 and item.prompt.count(f"test {i}?") == 1 and item.group == "digits"
    assert len(tasks.load("gsm8k").items(Rows(gsm8k__test=rows), 4)) == 7  # no training split: from the other items
    with pytest.raises(ValueError, match="shots=7: there are 6 other examples"):
        tasks.load("gsm_plus").items(Rows(gsm_plus__testmini=rows), 7)


def test_triviaqa_prompt():
    rows = [
        {"question_id": f"q{i}", "question": f"Who is {i}?", "value": f"Dr. {i}", "aliases": [f"Alias {i}", f"Dr. {i}"]}
        for i in range(3)
    ]
    item = tasks.load("triviaqa").items(Rows(triviaqa__validation=rows), 1)[0]
    shot = random.Random(42).sample(rows, 2)
    other = next(row for row in shot if row is not rows[0])
    example = f"Question: {other['question']}?\nAnswer: {other['aliases'][0]}"
    assert item.prompt == f"{example}\n\nQuestion: Who is 0??\nAnswer:"
    assert item.answer == " Dr. 0" and item.id == "q0"


def test_hellaswag_prompt():
    row = {
        "activity_label": "Fixing a roof",
        "ctx_a": "A man sits. [header] How [title] Up there",
        "ctx_b": "he",
        "label": "1",
        "endings": ["sings [step] loud.", " leaves.", "[substeps] eats.", "flies."],
    }
    item = tasks.load("hellaswag").items(Rows(hellaswag__validation=[row, row | {"label": "3"}]), 0)[0]
    assert item.prompt == "Fixing a roof: A man sits. How. Up there He"
    assert item.choices == (" sings loud.", " leaves.", "  eats.", " flies.")
    assert item.gold == 1 and item.answer == " leaves."


def test_code_prompts():
    row = {
        "task_id": "HumanEval/0",
        "prompt": "def f(x):\n",
        "canonical_solution": "    return x\n",
        "test": "def check(c):\n    assert c(1) == 1\n",
        "entry_point": "f",
    }
    humaneval = tasks.load("humaneval")
    item = humaneval.items(Rows(humaneval__test=[row]), 0)[0]
    assert (item.prompt, item.answer) == ("def f(x):\n", "    return x\n")
    assert humaneval.program(item, "    return 2") == (
        "def f(x):\n    return 2",
        "def check(c):\n    assert c(1) == 1\n\ncheck(f)",
    )
    two = humaneval.items(Rows(humaneval__test=[row, row | {"task_id": "1", "prompt": "def g(x):\n"}]), 1)
    assert two[0].prompt == "def g(x):\n    return x\n\n\ndef f(x):\n"  # an example is another item

    rows = [
        {
            "task_id": i,
            "text": f"Write {i}.",
            "code": f"def f():\r\n  return {i}",
            "test_list": [f"assert f() == {i}"] * 3,
            "test_setup_code": "import math",
        }
        for i in (1, 2, 3, 4, 11, 510, 511)
    ]
    mbpp = tasks.load("mbpp")
    items = mbpp.items(Rows(mbpp__test=rows, mbpp__prompt=rows), 2)

    def show(i):
        task = f"You are an expert Python programmer, and here is your task: Write {i}."
        tests = "\n".join([f"assert f() == {i}"] * 3)
        return f"{task} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"

    assert [item.id for item in items] == ["11", "510"]
    examples = (f"{show(i)}def f():\r\n  return {i}\n[DONE]\n\n" for i in (2, 3))
    assert items[0].prompt == "".join(examples) + show(11)
    assert items[0].loss_prompt == "Write 11." and items[0].answer == "\ndef f():\n  return 11"
    assert mbpp.program(items[0], "code") == (
        "code",
        "import math\nassert f() == 11\nassert f() == 11\nassert f() == 11",
    )
    with pytest.raises(ValueError, match="shots=4: mbpp has 3 examples"):
        mbpp.items(Rows(mbpp__test=rows, mbpp__prompt=rows), 4)


def test_math500_prompt():
    test = [{"problem": f"p{i}", "solution": f"So $\\boxed{{{i}}}$.", "level": 2} for i in range(3)]
    rest = [{"problem": f"other {i}", "solution": "Thus $\\boxed{9}$."} for i in range(9)] + test
    items = tasks.load("math500").items(Rows(math500__test=test, math__test=rest), 4)
    assert all("Problem:\nother" in item.prompt and item.prompt.count("Problem:\np") == 1 for item in items)
    assert items[1].prompt.endswith("Solution: Thus $\\boxed{9}$.\n\nProblem:\np1\n\nSolution:")
    assert items[1].answer == " So $\\boxed{1}$."


def test_paper_items():
    rows = [{"prompt": "def f():\n", "answer": "\n    return 1\n"}]
    for name, set_name in (("humanevalplus", "paper__humanevalplus"), ("mbppplus", "paper__mbppplus")):
        task = tasks.load(name)
        item = task.items(Rows(**{set_name: rows}), 0)[0]
        assert (item.prompt, item.answer) == ("def f():\n", "\n    return 1\n") and not task.generates


# ---- scores


@pytest.mark.parametrize(
    "text, strict, flexible",
    [
        (" 5 + 5 = 10.\n#### 10", 1, 1),
        (" #### 10.\n\n", 1, 1),
        ("#### $10", 0, 1),
        ("#### 10\n#### 11", 1, 0),
        ("#### 11\n#### 10", 0, 1),
        ("so the answer is 10", 0, 1),
        ("it is 10 eggs, not 9", 0, 0),
        ("ten", 0, 0),
        ("", 0, 0),
        ("#### 1,0", 1, 1),
        ("cost: $10.", 0, 1),
        ("#### -10", 0, 0),
    ],
)
def test_gsm8k_scores(text, strict, flexible):
    item = Item("0", "", "2 * 5 = <<2*5=10>>10\n#### 10")
    assert tasks.load("gsm8k").score(item, text) == {"strict": strict, "flexible": flexible}
    assert tasks.load("gsm_plus").score(item, text) == {"strict": strict, "flexible": flexible}


def test_gsm8k_large_numbers_and_none():
    score = tasks.load("gsm8k").score
    assert score(Item("0", "", "#### 70,000"), "#### 70000") == score(Item("0", "", "#### 70000"), "it is $70,000.") | {
        "strict": 1.0
    }
    assert score(Item("0", "", " 18"), "#### 18") == {"strict": 1, "flexible": 1}  # a bare answer after its space
    assert score(Item("0", "", "Unknown.\n#### None"), "#### None") == {
        "strict": 0,
        "flexible": 0,
    }  # the harness's rule


@pytest.mark.parametrize(
    "text, vote",
    [
        ("#### 18", "18"),
        ("The answer is 1,234.50.", "2469/2"),
        ("the answer is: $7", "7"),
        ("Answer: -3\n#### 4", "-3"),
        ("#### 1000", "1000"),
        ("18 apples", None),
        ("", None),
        ("#### none", None),
        ("#### 3.0", "3"),
    ],
)
def test_gsm8k_votes(text, vote):
    assert tasks.load("gsm8k").vote(text) == vote


def test_triviaqa_scores():
    score = tasks.load("triviaqa").score
    item = Item("0", "", "", row={"aliases": ["The Beatles", "Beatles-band", "O’Neill"]})
    assert score(item, " the beatles") == {"exact_match": 1, "normalized": 1}
    assert score(item, " Beatles") == {"exact_match": 0, "normalized": 1}  # only the dataset's rule drops articles
    assert score(item, " beatles band") == {"exact_match": 0, "normalized": 1}
    assert score(item, "Beatlesband!") == {"exact_match": 1, "normalized": 0}
    assert score(item, "  the beatles\t ") == {"exact_match": 1, "normalized": 1}  # the harness strips both ends
    assert score(item, " O Neill") == {"exact_match": 0, "normalized": 1}
    assert score(item, " the beatles from Liverpool") == score(item, "") == {"exact_match": 0, "normalized": 0}


@pytest.mark.parametrize(
    "gold, text",
    [
        (r"\frac{1}{2}", r"so $\boxed{\frac12}$."),
        (r"\frac{1}{2}", r"\boxed{0.5}"),
        (r"\frac{1}{2}", r"\boxed{\dfrac{ 1 }{2}}"),
        (r"\frac{1}{2}", r"\boxed{1/2}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3,\frac{\pi}{2})}"),
        ("2\\sqrt{3}", "the final answer is $2\\sqrt3$. I hope it is correct."),
        ("10000", r"\boxed{10,000}"),
        ("x=5", r"\boxed{5}"),
        ("45^\\circ", r"\boxed{45}"),
        ("12\\text{ inches}", r"\boxed{12}"),
        ("50\\%", r"$50$"),
        (r"\text{Evelyn}", r"\boxed{Evelyn}"),
        ("-\\frac{3}{4}", r"\boxed{-0.75}"),
        ("2", r"\boxed 2"),
        (r"\frac{a}{b}", r"\boxed{1} no, \boxed{\frac ab}"),
    ],
)
def test_math500_right(gold, text):
    pytest.importorskip("math_verify")
    task, item = tasks.load("math500"), Item("0", "", f" Thus $\\boxed{{{gold}}}$.")
    assert task.score(item, text) == {"accuracy": 1}
    assert task.score(item, text + r" No, \boxed{999}.") == {"accuracy": 0}


@pytest.mark.parametrize(
    "gold, text",
    [
        ("2", ""),
        ("2", "2"),
        ("2", r"\boxed{}"),
        ("2", r"\boxed{3"),
        ("(1,234)", r"\boxed{1234}"),
        (r"\frac{1}{0}", r"\boxed{1}"),
    ],
)
def test_math500_wrong(gold, text):
    pytest.importorskip("math_verify")
    assert tasks.load("math500").score(Item("0", "", f" Thus $\\boxed{{{gold}}}$."), text) == {"accuracy": 0}


def test_multiple_choice_as_in_the_harness():
    """Prompts, choices and compared pairs of ARC, PIQA, WinoGrande and MMLU on made-up rows."""
    row = {"question": "Q?", "choices": {"text": ["x", "y y"], "label": ["1", "2"]}, "answerKey": "2"}
    for name in ("arc_easy", "arc_challenge"):
        sets = {f"{name}__test": [row], f"{name}__train": [row | {"question": "T?", "answerKey": "1"}]}
        item = tasks.load(name).items(Rows(**sets), 1)[0]
        prompt = "Question: T?\nAnswer: x\n\nQuestion: Q?\nAnswer:"
        assert item.compared() == ((prompt, " x"), (prompt, " y y")) and item.gold == 1 and item.answer == " y y"
        asked = tasks.load(name).questions(Rows(**sets), "test")[0]
        assert asked.prompt == "Question: Q?\nA. x\nB. y y\nAnswer:" and asked.answer == " B"
    row = {"goal": "Open a jar.", "sol1": "twist", "sol2": "sing", "label": 0}
    item = tasks.load("piqa").items(Rows(piqa__validation=[row]), 0)[0]
    assert item.prompt == "Question: Open a jar.\nAnswer:" and item.choices == (" twist", " sing") and item.gold == 0
    row = {"sentence": "Ann told Bo that _ was late.", "option1": "Ann", "option2": "Bo", "answer": "2"}
    task, sets = (
        tasks.load("winogrande"),
        {"winogrande__validation": [row], "winogrande__train": [row | {"answer": "1"}]},
    )
    item = task.items(Rows(**sets), 1)[0]
    shot = "Ann told Bo that Ann was late.\n\n"
    ends = [(f"{shot}Ann told Bo that {name}", " was late.") for name in ("Ann", "Bo")]
    assert item.compared() == tuple(ends) and item.gold == 1 and (item.loss_prompt, item.answer) == ends[1]
    (asked,) = task.questions(Rows(**sets), "train")
    assert asked.prompt == "Ann told Bo that _ was late.\nA. Ann\nB. Bo\nAnswer:" and task.gold(asked) == "A"
    row = {"question": " 2+2?", "subject": "high_school_maths", "choices": ["1", "2", "4", "3"], "answer": 2}
    other = row | {"subject": "law"}
    task, sets = tasks.load("mmlu"), {"mmlu__test": [row], "mmlu__dev": [other, row | {"answer": 3}, row]}
    item = task.items(Rows(**sets), 1)[0]
    block = "2+2?\nA. 1\nB. 2\nC. 4\nD. 3\nAnswer:"
    head = "The following are multiple choice questions (with answers) about high school maths.\n\n"
    assert item.prompt == f"{head}{block} D\n\n{block}" and item.choices == (" A", " B", " C", " D") and item.gold == 2
    assert item.group == "high_school_maths" and task.asked([item]) == [item]
    with pytest.raises(ValueError, match="shots=3: mmlu has 2 examples of high_school_maths"):
        task.items(Rows(**sets), 3)


# ---- procedural data


class Procedural:
    def __init__(self, **parts):
        self.mixture = MixtureConfig(**parts)

    def procedural(self, part):
        return self.mixture


@pytest.mark.parametrize("name", ["facts", "reasoning", "mano"])
def test_examples_that_no_task_would_show_are_refused(name):
    with pytest.raises(ValueError, match="shots=3: this task shows no examples; use 0"):
        tasks.load(name).items(Procedural(), 3)


def test_facts():
    task = tasks.load("facts")
    items = task.items(Procedural(facts=FactsConfig(n_people=3)), 0)
    assert len(items) == 18 and len({item.group for item in items}) == 6
    for item in items:
        assert task.score(item, item.answer) == {"exact": 1}
        assert task.score(item, item.answer + "x") == task.score(item, "") == {"exact": 0}


def test_reasoning():
    task = tasks.load("reasoning")
    items = task.items(Procedural(reasoning=ReasoningConfig(max_steps=2, names=24)), 0)
    assert len(items) == 3 * task.module.PER_STEPS and {item.group for item in items[:3]} == {
        "1 steps",
        "2 steps",
        "3 steps",
    }
    for item in items[:60]:
        gold = task.vote(item.answer)
        wrong = item.answer.replace(f"Answer: {gold}.", f"Answer: {(int(gold) + 1) % 10}.")
        assert task.score(item, item.answer) == {"answer": 1, "solution": 1} and task.score(item, wrong) == {
            "answer": 0,
            "solution": 0,
        }
        assert task.score(item, f" Answer: {gold}.") == {"answer": 1, "solution": 0} and task.score(item, "") == {
            "answer": 0,
            "solution": 0,
        }
        assert gold.isdigit() and task.vote("none") is None
