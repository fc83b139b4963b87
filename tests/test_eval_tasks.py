"""Prompts, scoring rules and data sources of the tasks, on made-up items (CPU, seconds)."""

import gzip
import importlib.util
import json
import random
import sys
import types

import pytest

from data.facts import FactsConfig
from data.reasoning import ReasoningConfig
from eval import tasks
from eval.sources import Source
from eval.tasks import Item, gsm8k, gsm_plus, hellaswag, humanevalplus, math500, mbppplus, triviaqa
from tests import evalrun

tiny_run = evalrun.tiny_run


class Rows:
    """A source of inline rows."""

    def __init__(self, **sets):
        self.sets = {name.replace("__", "/"): rows for name, rows in sets.items()}

    def rows(self, wanted):
        return self.sets[wanted.name]

    def first(self, *sets):
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
    assert (
        item.prompt == f"Question: {other['question']}?\nAnswer: {other['aliases'][0]}\n\nQuestion: Who is 0??\nAnswer:"
    )
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
    assert (
        item.choices == (" sings loud.", " leaves.", "  eats.", " flies.")
        and item.gold == 1
        and item.answer == " leaves."
    )


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
    with pytest.raises(ValueError, match="humaneval has no examples; use --shots=0"):
        humaneval.items(Rows(humaneval__test=[row, row | {"task_id": "1"}]), 1)

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
    assert (
        items[0].prompt
        == f"{show(2)}def f():\r\n  return 2\n[DONE]\n\n{show(3)}def f():\r\n  return 3\n[DONE]\n\n{show(11)}"
    )
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
    assert (
        items[1].prompt.endswith("Solution: Thus $\\boxed{9}$.\n\nProblem:\np1\n\nSolution:")
        and items[1].answer == " So $\\boxed{1}$."
    )


def test_paper_items():
    rows = [{"prompt": "def f():\n", "answer": "\n    return 1\n"}]
    for name, set_name in (("humanevalplus", "paper__humanevalplus"), ("mbppplus", "paper__mbppplus")):
        task = tasks.load(name)
        item = task.items(Rows(**{set_name: rows}), 0)[0]
        assert (item.prompt, item.answer) == ("def f():\n", "\n    return 1\n") and not task.generated()
        with pytest.raises(ValueError, match="the paper's task-loss items have no examples; use --shots=0"):
            task.items(Rows(**{set_name: [*rows, dict(rows[0])]}), 1)


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
        ("The answer is 1,234.50.", "1234.5"),
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


def test_a_task_is_one_file():
    assert {"gsm8k", "gsm_plus", "triviaqa", "hellaswag", "humaneval", "mbpp", "math500"} <= set(tasks.NAMES)
    for name in tasks.NAMES:
        task = tasks.load(name)
        assert task.module.__doc__ and isinstance(task.shots, int) and callable(task.items)
    with pytest.raises(ValueError, match="unknown task 'gsm9k'; there are .*gsm8k"):
        tasks.load("gsm9k")


SVAMP = '''
"""SVAMP (arXiv 2103.07191): short word problems."""

from eval.sources import Set
from eval.tasks import Item, gsm8k

TEST = Set("svamp/test", "svamp/test.jsonl", ("ChilleD/SVAMP", None, "test"))
TRAIN = Set("svamp/train", "svamp/train.jsonl", ("ChilleD/SVAMP", None, "train"))
SHOTS, LIKE = 4, gsm8k


def item(row):
    prompt = f"Question: {row['Body']} {row['Question']}\\nAnswer:"
    return Item(prompt=prompt, answer=f" #### {row['Answer']}", group=row["Type"])
'''
CHOICE = '''
"""OpenBookQA (arXiv 1809.02789): elementary science."""

from eval.sources import Set
from eval.tasks import choice

TEST = Set("bookqa/test", "bookqa/test.jsonl", ("allenai/openbookqa", "main", "test"))
TRAIN = Set("bookqa/train", "bookqa/train.jsonl", ("allenai/openbookqa", "main", "train"))
SHOTS = 0


def item(row):
    options = row["choices"]
    return choice(row["question_stem"], options["text"], options["label"].index(row["answerKey"]))
'''


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """Two files of somebody who adds tasks, and nothing else. Returns a folder with their items."""
    folder = tmp_path / "more"
    folder.mkdir()
    for name, source in (("svamp", SVAMP), ("bookqa", CHOICE)):
        assert len(source.strip().splitlines()) <= 15
        (folder / f"{name}.py").write_text(source.lstrip())
        monkeypatch.delitem(sys.modules, f"eval.tasks.{name}", raising=False)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(folder)])
    monkeypatch.setattr(tasks, "NAMES", (*tasks.NAMES, "svamp", "bookqa"))
    for split in ("train", "test"):
        rows = [{"Body": f"{split[:2]}{i}.", "Question": "All?", "Answer": i, "Type": "Sum"} for i in range(6)]
        write(tmp_path / f"sets/svamp/{split}.jsonl", rows)
        choices = {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}
        rows = [{"question_stem": f"{split} {i}", "choices": choices, "answerKey": "ABC"[i % 3]} for i in range(6)]
        write(tmp_path / f"sets/bookqa/{split}.jsonl", rows)
    return tmp_path / "sets"


def test_a_new_task_is_one_file(newcomer):
    source = Source(newcomer)
    svamp, bookqa = tasks.load("svamp"), tasks.load("bookqa")
    item = svamp.items(source, 1)[3]
    assert item.prompt.startswith("Question: tr") and item.prompt.endswith("Question: te3. All?\nAnswer:")
    assert (
        svamp.score(item, " #### 3") == {"strict": 1, "flexible": 1}
        and svamp.gold(item) == svamp.vote("#### 3.0") == "3"
    )
    (question,) = svamp.questions(source, "train", 1)
    assert question.prompt == "Question: tr0. All?\nAnswer:"
    assert svamp.rewards([question] * 3, ["#### 0", "#### 1", ""]) == [1, 0, 0]
    item = bookqa.items(source, 2)[1]
    assert item.compared() == tuple((item.prompt, f" {choice}") for choice in ("x", "y", "z")) and item.gold == 1
    assert item.prompt.count("\n\n") == 2 and item.prompt.endswith("\n\ntest 1") and item.answer == " y"
    assert not bookqa.generated()
    question = bookqa.questions(source, "train", 0)[2]
    assert question.prompt == "train 2\nA. x\nB. y\nC. z\nAnswer:" and bookqa.gold(question) == "C"
    texts = {
        " C": 1,
        " (C) z": 1,
        "The answer is C.": 1,
        " A": 0,
        " A B C": 0,
        "": 0,
        " z": 0,
        "C's": 0,
        " Cats": 0,
    }
    assert dict(zip(texts, bookqa.rewards([question] * len(texts), list(texts)), strict=True)) == texts


def test_a_new_task_in_eval_votes_and_grpo(newcomer, tiny_run, monkeypatch):
    import grpo
    from eval import __main__ as main
    from eval import votes

    common = [f"--run={tiny_run}", f"--evaldata={newcomer}", "--device=cpu"]
    results = main.main([*common, "--tasks=svamp,bookqa", "--shots=0", "--batch-size=3"])["tasks"]
    assert (
        set(results["svamp"]["metrics"]) >= {"strict", "flexible", "bits/byte"} and "Sum" in results["svamp"]["groups"]
    )
    assert set(results["bookqa"]["metrics"]) == {"acc", "acc_norm", "bits/token", "bits/byte"}
    for task in ("svamp", "bookqa"):
        assert votes.main([*common, f"--task={task}", "--samples=2", "--limit=2"])["questions"] == 2
        sizes = "--steps=1 --batch-prompts=2 --mini-batch=2 --group-size=2 --answer-tokens=4 --eval-questions=2"
        folders = [f"--evaldata={newcomer}", f"--out-dir={tiny_run.parent / task}", f"--data={tiny_run / 'data'}"]
        results = grpo.main(
            [f"--model={tiny_run}", f"--task={task}", *folders, *sizes.split(), "--questions=4", "--device=cpu"]
        )
        assert results["test_questions"] == 2


def test_incomplete_files_are_named(newcomer):
    (newcomer.parent / "more/svamp.py").write_text("STOPS = ()\ndef items(source, shots): return []\n")
    with pytest.raises(ValueError, match="eval/tasks/svamp.py must define SHOTS"):
        tasks.load("svamp")
    with pytest.raises(ValueError, match="item 0: without choices there is only task loss"):
        tasks.load("humanevalplus").asked([Item("0", "a", "b")])
    with pytest.raises(ValueError, match="task='humaneval': .* no training questions"):
        tasks.load("humaneval").questions(None, "train", 1)


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


# ---- sources


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows) if ".jsonl" in path.name else json.dumps(rows)
    path.write_bytes(gzip.compress(text.encode()) if path.name.endswith(".gz") else text.encode())


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch):
    monkeypatch.delenv("OPTIMOE_EVALDATA", raising=False)
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: real(name) if name == "math_verify" else None)


def test_local_folder(tmp_path, monkeypatch):
    write(tmp_path / "gsm8k/test.jsonl", gsm(2) + [{"question": "line\u2028separator"}])
    write(tmp_path / "gsm8k/train.jsonl.gz", gsm(3))
    write(tmp_path / "paper_taskloss/mbppplus_test.json.gz", [{"prompt": "a", "answer": "b"}])
    source = Source(tmp_path)
    assert len(source.rows(gsm8k.TEST)) == 3 and len(source.rows(gsm8k.TRAIN)) == 3
    assert source.rows(mbppplus.TEST) == [{"prompt": "a", "answer": "b"}]
    assert source.used["gsm8k/train"] == str(tmp_path / "gsm8k/train.jsonl.gz")
    assert source.first(gsm_plus.FULL, gsm8k.TEST) is source.rows(gsm8k.TEST)
    monkeypatch.setenv("OPTIMOE_EVALDATA", str(tmp_path))
    assert len(Source().rows(gsm8k.TEST)) == 3
    with pytest.raises(ValueError, match="evaldata='nowhere': no such folder"):
        Source("nowhere")


def test_missing_says_what_to_do(tmp_path):
    with pytest.raises(ValueError) as error:
        Source(tmp_path).rows(triviaqa.TEST)
    for part in (
        "put triviaqa/rc_wikipedia_nocontext_val.jsonl (or triviaqa/rc_wikipedia_nocontext_val.jsonl.gz) "
        f"into the folder {tmp_path}",
        "OPTIMOE_EVALDATA",
        "mandarjoshi/trivia_qa rc.nocontext validation",
    ):
        assert part in str(error.value)
    with pytest.raises(
        ValueError,
        match="put paper_taskloss/humanevalplus_test.json .*it is in github.com/rioyokotalab/optimal-sparsity",
    ):
        Source(tmp_path).rows(humanevalplus.TEST)
    with pytest.raises(ValueError, match="math/test was not found"):  # the first one's message
        Source(tmp_path).first(math500.TRAIN, math500.TEST)


def test_hub(tmp_path, monkeypatch):
    calls = []

    def load_dataset(dataset, configuration, split):
        calls.append((dataset, configuration, split))
        if dataset == "Rowan/hellaswag":
            raise OSError("no network")
        return [{"question": "q?", "answer": {"value": "v", "aliases": ["v"]}}]

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "datasets" else None)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    source = Source(tmp_path)
    assert source.rows(triviaqa.TEST)[0]["value"] == "v" and calls == [
        ("mandarjoshi/trivia_qa", "rc.nocontext", "validation")
    ]
    assert source.used["triviaqa/validation"] == "hub: mandarjoshi/trivia_qa rc.nocontext validation"
    with pytest.raises(
        ValueError, match="(?s)reading Rowan/hellaswag from the hub failed.*no network.*put hellaswag/val.jsonl"
    ):
        source.rows(hellaswag.TEST)


# ---- procedural data


class Procedural:
    def __init__(self, **parts):
        self.parts = parts

    def procedural(self, part):
        return self.parts[part]


def test_facts():
    task = tasks.load("facts")
    items = task.items(Procedural(facts=FactsConfig(n_people=3)), 0)
    assert len(items) == 18 and len({item.group for item in items}) == 6
    for item in items:
        assert task.score(item, item.answer) == {"exact": 1} and task.score(item, item.answer + "x") == task.score(
            item, ""
        ) == {"exact": 0}


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


def test_procedural_source(tmp_path):
    meta = {
        "version": 1,
        "splits": {},
        "vocab_size": 3,
        "dtype": "uint16",
        "tokenizer": "tokenizer.json",
        "tokenizer_sha256": "",
        "procedural": {"facts": {"n_people": 3}},
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert Source(None, tmp_path).procedural("facts") == FactsConfig(n_people=3)
    with pytest.raises(ValueError, match="was not trained on procedural reasoning"):
        Source(None, tmp_path).procedural("reasoning")
