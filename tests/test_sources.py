"""Where evaluation items come from, and tasks that somebody adds: pytest tests/test_sources.py (CPU, seconds)"""

import gzip
import json
import sys
import types

import pytest

from data.facts import FactsConfig
from eval import tasks
from eval.sources import Source
from eval.tasks import Item, gsm8k, gsm_plus, hellaswag, humanevalplus, math500, mbppplus, triviaqa

pytest_plugins = ("tests.evalrun",)  # its fixture tiny_run


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows) if ".jsonl" in path.name else json.dumps(rows)
    path.write_bytes(gzip.compress(text.encode()) if path.name.endswith(".gz") else text.encode())


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch):
    monkeypatch.delenv("OPTIMOE_EVALDATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)


def test_local_folder(tmp_path, monkeypatch):
    write(tmp_path / "gsm8k/test.jsonl", [{"question": "1?"}] * 2 + [{"question": "line\u2028separator"}])
    write(tmp_path / "gsm8k/train.jsonl.gz", [{"question": "2?"}] * 3)
    write(tmp_path / "paper_taskloss/mbppplus_test.json.gz", [{"prompt": "a", "answer": "b"}])
    source = Source(tmp_path)
    assert len(source.rows(gsm8k.TEST)) == 3 and len(source.rows(gsm8k.TRAIN)) == 3
    assert source.rows(mbppplus.TEST) == [{"prompt": "a", "answer": "b"}]
    assert source.used["gsm8k/train"] == str(tmp_path / "gsm8k/train.jsonl.gz")
    assert source.rows(gsm_plus.FULL, gsm8k.TEST) is source.rows(gsm8k.TEST)
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
        Source(tmp_path).rows(math500.TRAIN, math500.TEST)


def test_a_folder_called_datasets_is_not_the_package(tmp_path, monkeypatch):
    """`data.prepare --out datasets/NAME` makes one in the checkout, which Python takes for a package."""
    (tmp_path / "datasets/books").mkdir(parents=True)
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="triviaqa/validation was not found: put triviaqa/"):
        Source(tmp_path).rows(triviaqa.TEST)


def test_hub(tmp_path, monkeypatch):
    calls = []

    def load_dataset(dataset, configuration, split):
        calls.append((dataset, configuration, split))
        if dataset == "Rowan/hellaswag":
            raise OSError("no network")
        return [{"question": "q?", "answer": {"value": "v", "aliases": ["v"]}}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    source = Source(tmp_path)
    assert source.rows(triviaqa.TEST)[0]["value"] == "v"
    assert calls == [("mandarjoshi/trivia_qa", "rc.nocontext", "validation")]
    assert source.used["triviaqa/validation"] == "hub: mandarjoshi/trivia_qa rc.nocontext validation"
    message = "(?s)reading Rowan/hellaswag from the hub failed.*no network.*put hellaswag/val.jsonl"
    with pytest.raises(ValueError, match=message):
        source.rows(hellaswag.TEST)


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
    assert Source(None, tmp_path).procedural("facts").facts == FactsConfig(n_people=3)
    with pytest.raises(ValueError, match="was not trained on procedural reasoning"):
        Source(None, tmp_path).procedural("reasoning")


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
    assert svamp.score(item, " #### 3") == {"strict": 1, "flexible": 1}
    assert svamp.gold(item) == svamp.vote("#### 3.0") == "3"
    (question,) = svamp.questions(source, "train", 1)
    assert question.prompt == "Question: tr0. All?\nAnswer:"
    assert svamp.rewards([question] * 3, ["#### 0", "#### 1", ""]) == [1, 0, 0]
    item = bookqa.items(source, 2)[1]
    assert item.compared() == tuple((item.prompt, f" {choice}") for choice in ("x", "y", "z")) and item.gold == 1
    assert item.prompt.count("\n\n") == 2 and item.prompt.endswith("\n\ntest 1") and item.answer == " y"
    assert not bookqa.generates
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
    svamp = results["svamp"]
    assert set(svamp["metrics"]) >= {"strict", "flexible", "bits/byte"} and "Sum" in svamp["groups"]
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
    assert tasks.load("gsm8k").trains and not tasks.load("humaneval").trains
