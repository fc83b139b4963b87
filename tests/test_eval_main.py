"""`python -m eval` on a tiny random model and made-up items: python -m pytest tests/test_eval_main.py (CPU, 20 s)"""

import gzip
import json
import math
import statistics
import subprocess
import sys

import pytest
import torch

from data import files, tokenizer
from eval import __main__ as command
from eval import harness, tasks, votes
from eval.sources import Set, Source
from eval.taskloss import encode_pair, score
from optimoe import checkpoint, config
from optimoe.load import ModelChoice, load
from tests.evalrun import records, run

pytest_plugins = ("tests.evalrun",)  # its fixture tiny_run


def test_all_tasks(tiny_run, capsys):
    results = run(tiny_run, "--tasks=gsm8k,hellaswag,triviaqa,humaneval", "--shots=0")
    printed = capsys.readouterr().out
    assert results == files.read_json(tiny_run / "eval-00000003/results.json")
    assert list(results["tasks"]) == ["gsm8k", "hellaswag", "triviaqa", "humaneval"]
    assert results["checkpoint"].startswith("ckpt-00000003-")
    assert results["sources"]["gsm8k/test"] == str(tiny_run / "gsm8k/test.jsonl") and "seccomp" in results["sandbox"]
    expected = {
        "gsm8k": {"strict", "flexible"},
        "hellaswag": {"acc", "acc_norm"},
        "triviaqa": {"exact_match", "normalized"},
        "humaneval": {"pass@1"},
    }
    for task, metrics in expected.items():
        result, rows = results["tasks"][task], records(tiny_run, task).values()
        assert set(result["metrics"]) == metrics | {"bits/token", "bits/byte"} and result["items"] == len(rows)
        for metric, stats in result["metrics"].items():
            values = [record["metrics"][metric] for record in rows]
            mean, variance = statistics.mean(values), statistics.variance(values)
            assert stats["mean"] == pytest.approx(mean)
            assert stats["stderr"] == pytest.approx(math.sqrt(variance / len(values)))
            assert f"{mean:.4f}" in printed and metric in printed


def test_losses_and_choices_are_those_of_single_items(tiny_run):
    run(tiny_run, "--tasks=hellaswag", "--shots=1")
    model, tokens, *_ = load(ModelChoice(run=str(tiny_run), device="cpu"))
    items = tasks.load("hellaswag").items(Source(tiny_run), 1)
    for item in items:
        record = records(tiny_run, "hellaswag")[item.id]
        costs = [score(model, [encode_pair(tokens, item.prompt, choice)[:2]])[0] for choice in item.choices]
        assert record["choices"] == pytest.approx(costs, rel=1e-4)
        assert record["nats"] == pytest.approx(costs[item.gold], rel=1e-4)
        best = min(range(4), key=lambda i: costs[i])
        shortest = min(range(4), key=lambda i: costs[i] / len(item.choices[i][1:]))
        found, bits = record["metrics"], costs[item.gold] / math.log(2)
        assert found["acc"] == (best == item.gold) and found["acc_norm"] == (shortest == item.gold)
        assert found["bits/byte"] == pytest.approx(bits / len(item.answer.encode()), rel=1e-4)
    rows = records(tiny_run, "hellaswag").values()
    assert {record["metrics"]["acc"] for record in rows} == {0, 1}  # some right, some wrong


def answer_with(monkeypatch, answer):
    """Instead of a model, answer(prompt, number of its random stream) writes the texts."""

    def texts(loaded, task, prompts, streams, room, cfg):
        return list(map(answer, prompts, streams)), [False] * len(prompts)

    monkeypatch.setattr(harness, "texts", texts)


def test_right_and_wrong_answers(tiny_run, monkeypatch):
    """With the gold answers as generated texts everything is right, with others everything is wrong."""
    names = ("gsm8k", "triviaqa", "humaneval")
    items = [item for name in names for item in tasks.load(name).items(Source(tiny_run), 0)]
    gold = {item.prompt: item.answer for item in items}
    wrong = dict.fromkeys(gold, "    return 99\n#### 99")
    for right, answers in ((1, gold), (0, wrong)):
        answer_with(monkeypatch, lambda prompt, _: answers[prompt])  # noqa: B023  used at once
        results = run(tiny_run, f"--tasks={','.join(names)}", "--shots=0", "--loss=false", "--overwrite")["tasks"]
        found = {name: stats["mean"] for result in results.values() for name, stats in result["metrics"].items()}
        assert found == dict.fromkeys(("strict", "flexible", "exact_match", "normalized", "pass@1"), right)


def test_pass_at_k(tiny_run, monkeypatch):
    """Ten samples of which sample i of an item is right when i < 3: pass@1 = 0.3, pass@10 = 1."""
    body = {item.prompt: item.answer for item in tasks.load("humaneval").items(Source(tiny_run), 0)}
    answer_with(monkeypatch, lambda prompt, stream: body[prompt] if stream % 4096 < 3 else "    return 99\n")
    flags = ["--tasks=humaneval", "--samples=10", "--temperature=0.8", "--loss=false", "--limit=1"]
    metrics = run(tiny_run, *flags)["tasks"]["humaneval"]["metrics"]
    assert metrics["pass@1"]["mean"] == pytest.approx(0.3) and metrics["pass@10"]["mean"] == 1
    record = records(tiny_run, "humaneval")["HumanEval/0"]
    assert record["reasons"][:3] == ["passed"] * 3 and record["reasons"][3].startswith("AssertionError")
    assert len(record["texts"]) == 10


LONG = "The answer is \\boxed{" + "9" * 5000 + "}. #### " + "9" * 5000 + "\nAnswer: " + "9" * 5000 + "."


@pytest.mark.parametrize(
    "text", [LONG, "9" * 5000, "1" * 5000 + "/" + "3" * 5000, "{" * 5000, "#### -.,", "\0\ud800", ""]
)
@pytest.mark.parametrize("name", tasks.NAMES)
def test_every_answer_is_judged(name, text):
    """Whatever a text says: numbers of more than 4,300 digits, which int() refuses, deep brackets, nothing at all."""
    task, item = tasks.load(name), example_item(name)
    for judge in filter(None, (task.score, task.reward)):
        found = judge(item, text)
        assert set((found if isinstance(found, dict) else {"reward": found}).values()) <= {0.0, 1.0}
    if task.vote:
        assert task.vote(text) is None or isinstance(task.vote(text), str)


def example_item(name):
    row = {"aliases": ["x"], "modulus": 23, "tests": [("1", 1)], "answer": 4}
    return tasks.Item("0", "Question: 1 + 1?\nAnswer:", "#### 2" if "gsm" in name else "\\boxed{2}", row=row)


def test_a_prompt_without_any_token(tiny_run, monkeypatch):
    """As in lm-eval an empty prompt is an end-of-text token where a tokenizer has no bos; without both, an error."""
    (tiny_run / "gsm8k/test.jsonl").write_text(json.dumps({"question": "", "answer": "#### 1"}) + "\n")
    monkeypatch.setattr("eval.tasks.gsm8k.items", lambda *_: [tasks.Item("0", "", " #### 1")], raising=False)
    whole = run(tiny_run, "--tasks=gsm8k")
    real = harness.load

    def bare(eos):
        def loaded(cfg):
            found = real(cfg)
            return found._replace(tokens=found.tokens._replace(bos=[], eos=eos))

        return loaded

    monkeypatch.setattr(harness, "load", bare([256]))
    assert run(tiny_run, "--tasks=gsm8k", "--overwrite")["tasks"] == whole["tasks"]  # bos is end-of-text there too
    monkeypatch.setattr(harness, "load", bare([]))
    with pytest.raises(ValueError, match="a prompt is empty, and the tokenizer has no token to start it with"):
        run(tiny_run, "--tasks=gsm8k", "--overwrite")


ROW = json.dumps({"question": "1 egg?", "answer": "#### 1"}).encode()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\xef\xbb\xbf" + ROW + b"\r\n" + ROW + b"\r\n", None),
        (b"\xef\xbb\xbf" + ROW + b"\n\n\xef\xbb\xbf" + ROW, None),
        (gzip.compress(b"\xef\xbb\xbf" + ROW + b"\n" + ROW, mtime=0), None),
        (ROW + b"\n" + b"[" * 10**5 + b"\n", "{path}:2 is damaged"),
        (ROW + b'\n{"question": ' + b"9" * 5000 + b"}\n", "{path}:2 is damaged"),
        (ROW + b"\n" + ROW[:20] + b"\n", "{path}:2 is damaged"),
        (ROW + b"\n\xff\n", "{path} is damaged"),
        (ROW + b"\n[1, 2]\n", "{path} must hold a JSON object for each item"),
        (ROW + b'\n{"problem": "1"}\n', "gsm8k: {path} has rows of another form .KeyError.'question'"),
        (ROW + b'\n{"question": "1", "answer": null}\n', "gsm8k: item 1 has None as its answer"),
        (ROW + b'\n{"question": null, "answer": "1"}\n', "gsm8k: {path} has rows of another form .TypeError"),
        (ROW + b'\n{"question": "\\ud800", "answer": "1"}\n', None),
        (b"", "{path} must hold a JSON object for each item"),
        (gzip.compress(ROW * 100, mtime=0)[:-10], "{path} is damaged"),
        (gzip.compress(ROW * 100, mtime=0)[:30] + b"xxxx", "{path} is damaged"),
    ],
)
def test_evaluation_sets_of_all_kinds(tiny_run, content, message):
    (tiny_run / "gsm8k/test.jsonl").unlink()
    path = tiny_run / ("gsm8k/test.jsonl.gz" if content[:2] == b"\x1f\x8b" else "gsm8k/test.jsonl")
    path.write_bytes(content)
    if message is None:
        assert run(tiny_run, "--tasks=gsm8k", "--shots=0", "--accuracy=false")["tasks"]["gsm8k"]["items"] == 2
    else:
        with pytest.raises(ValueError, match=message.format(path=path)):
            run(tiny_run, "--tasks=gsm8k", "--shots=0")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"label": "-1"}, "item 6 has choices .* and choice -1"),
        ({"label": "4"}, "rows of another form .IndexError"),
        ({"label": ""}, "rows of another form .TypeError.*row 7: invalid literal"),
        ({"label": 1.7}, "rows of another form .TypeError.*row 7: invalid literal"),
        ({"endings": ["a", "[step]", "c", "d"]}, "item 6 has choices"),
    ],
)
def test_labels_and_choices_that_cannot_be(tiny_run, change, message):
    path = tiny_run / "hellaswag/val.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    path.write_text(path.read_text() + json.dumps(row | change) + "\n")
    with pytest.raises(ValueError, match=f"hellaswag: .*{message}"):
        run(tiny_run, "--tasks=hellaswag", "--shots=0")


def test_links_that_lead_nowhere(tiny_run, monkeypatch):
    """A loop of links is a missing file. A damaged training set is no reason to take examples from the test set."""
    (tiny_run / "loop").symlink_to(tiny_run / "loop")
    for flag in ("--run", "--evaldata", "--data", "--hf", "--checkpoint"):
        with pytest.raises((ValueError, OSError), match="loop|give one of --run"):
            run(tiny_run, "--tasks=gsm8k", "--shots=0", f"{flag}={tiny_run / 'loop'}")
    (tiny_run / "gsm8k/train.jsonl").symlink_to(tiny_run / "loop")
    assert run(tiny_run, "--tasks=gsm8k", "--shots=2", "--limit=1")["sources"] == {
        "gsm8k/test": str(tiny_run / "gsm8k/test.jsonl")
    }
    (tiny_run / "gsm8k/train.jsonl").unlink()
    (tiny_run / "gsm8k/train.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="gsm8k/train.jsonl:1 is damaged"):
        run(tiny_run, "--tasks=gsm8k", "--shots=2", "--limit=1")


def test_a_set_that_no_one_has(tmp_path):
    """A task may name any set: where it is nowhere, the message says where it could be."""
    wanted = Set("new/test", "new/test.jsonl", ("someone/new", None, "test"), ("new/none/test",))
    with pytest.raises(ValueError, match="new/test was not found: put new/test.jsonl .*--evaldata"):
        Source(tmp_path).rows(wanted)


@pytest.mark.parametrize("module", [command, votes])
def test_a_mistake_is_one_line(module):
    for flags in (["--tasks=gsm8k", "--run=/nonexistent"], ["--tasks=nothing"], ["--nothing"]):
        flags = [flag.replace("--tasks", "--task") if module is votes else flag for flag in flags]
        with pytest.raises(SystemExit, match="^error: [^\n]*$"):
            config.command_line(lambda: module.main(flags))  # noqa: B023  used at once
    name = module.__name__.removesuffix(".__main__")
    found = subprocess.run([sys.executable, "-m", name, "--nothing"], capture_output=True, text=True, timeout=300)
    assert found.returncode == 1 and found.stdout == "" and found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize("main, task", [(command.main, "--tasks=facts"), (votes.main, "--task=reasoning")])
def test_a_model_that_is_not_there_is_blamed_and_not_the_task(tmp_path, monkeypatch, main, task):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name, message in (
        ("someone/typo", "neither a directory nor a complete model"),
        (tmp_path, "no config.json there"),
    ):
        with pytest.raises(ValueError, match=f"^hf='{name}': {message}"):
            main([f"--hf={name}", task])
    (tmp_path / "best.pt").touch()
    for flag, value in (("run", tmp_path), ("checkpoint", tmp_path / "best.pt")):
        with pytest.raises(ValueError, match=f"^{flag}='{value}': no checkpoint"):
            main([f"--{flag}={value}", task])


def test_kernels_that_cannot_run_are_refused(tiny_run, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl='triton' needs a CUDA GPU.*leave --impl=auto"):
        run(tiny_run, "--tasks=gsm8k", "--shots=0", "--impl=triton")


def test_groups(tiny_run, monkeypatch, capsys):
    (tiny_run / "gsm_plus").mkdir()
    rows = [
        {"question": f"{i}?", "solution": f"#### {i}", "answer": str(i), "perturbation_type": ("add", "drop")[i % 2]}
        for i in range(6)
    ]
    (tiny_run / "gsm_plus/gsmplus_testmini.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(tiny_run, "--tasks=gsm_plus", "--shots=0", "--accuracy=false")["tasks"]["gsm_plus"]
    assert set(result["metrics"]) == {"bits/token", "bits/byte"} and "by group" not in capsys.readouterr().out
    assert {group: stats["bits/byte"]["n"] for group, stats in result["groups"].items()} == {"add": 3, "drop": 3}
    right = {f"Question: {i}?\nAnswer:" for i in (0, 1, 2)}
    answer_with(monkeypatch, lambda prompt, _: f"#### {prompt[10]}" if prompt in right else "")
    run(tiny_run, "--tasks=gsm_plus", "--shots=0", "--overwrite")
    printed = capsys.readouterr().out.split("gsm_plus by group\n")[1].splitlines()  # shares, as train.py prints them
    rows = [line.split() for line in printed[:3]]
    assert rows == [["strict", "flexible"], ["add", "66.7%", "66.7%"], ["drop", "33.3%", "33.3%"]]


def test_checkpoint_file_and_tokenizer(tiny_run, tmp_path):
    path = checkpoint.find(tiny_run)[-1][1]
    flags = (
        f"--checkpoint={path} --evaldata={tiny_run} --tasks=gsm8k --limit=1 --shots=0 --out={tmp_path / 'elsewhere'}"
    )
    results = command.main(["--device=cpu", *flags.split()])
    assert files.read_json(tmp_path / "elsewhere/results.json") == results
    assert results["tasks"]["gsm8k"]["metrics"]["strict"]["stderr"] is None  # one item has no standard error
    (tiny_run / "data").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="no tokenizer.json in .*name the run's data directory with --data"):
        run(tiny_run, "--tasks=gsm8k", "--shots=0")
    run(tiny_run, "--tasks=gsm8k", "--limit=1", "--shots=0", f"--data={tmp_path / 'moved'}")
    (tmp_path / "larger").mkdir()
    ranks = {bytes([b]): b for b in range(256)} | {b"a%d" % i: 256 + i for i in range(80)}
    tokenizer.save(tokenizer.encoding(ranks), tmp_path / "larger")
    with pytest.raises(ValueError, match="larger': its tokenizer has 337 tokens and the model 320"):
        run(tiny_run, "--tasks=gsm8k", "--shots=0", f"--data={tmp_path / 'larger'}")
    (tiny_run / "config.json").write_text(json.dumps({"data": f"{tmp_path / 'moved'}:0.5,other:0.5"}))
    run(tiny_run, "--tasks=gsm8k", "--limit=1", "--shots=0")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tasks="], "tasks='': name some of .*gsm8k"),
        (["--tasks=gsm9k"], "unknown task 'gsm9k'"),
        (["--tasks=mbpp"], "put mbpp/mbpp.jsonl"),
        (["--tasks=gsm8k", "--samples=2"], "samples=2: greedy"),
        (["--tasks=gsm8k", "--shots=-1"], "shots=-1"),
        (["--tasks=gsm8k", "--limit=-1"], "limit=-1"),
        (["--tasks=gsm8k", "--batch-size=0"], "batch_size=0"),
        (["--tasks=gsm8k", "--checkpoint=x"], "run and checkpoint given: give one of --run=DIR, --checkpoint"),
        (["--tasks=gsm8k", "--seed=-1"], "seed=-1"),
        (["--tasks=gsm8k", "--loss=false", "--accuracy=false"], "accuracy=False: with --loss=false there is nothing"),
        (["--tasks=gsm8k", "--shots=0", "--out=/proc/x"], "out='/proc/x': nothing can be written"),
        (["--tasks=gsm8k", "--run=", "--checkpoint=x"], "checkpoint='x': no such file"),
        (["--tasks=gsm8k", "--shots=0", "--device=cuda"], "no CUDA device"),
    ],
)
def test_bad_arguments(tiny_run, flags, message):
    if "cuda" in str(flags) and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=message):
        run(tiny_run, *flags)


def test_a_full_disk_leaves_no_directory(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(config.tempfile, "TemporaryFile", lambda dir: open("/dev/full", "wb"))
    with pytest.raises(ValueError, match="out=.*: nothing can be written to .*; free some space or name another"):
        run(tiny_run, "--tasks=gsm8k", "--shots=0", f"--out={tmp_path}/new/out")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("program", [command.main, votes.main])
def test_a_model_that_cannot_write_is_refused_by_its_seq_len(tiny_run, program):
    """With a window of two tokens it can: the prompt loses its beginning."""
    state = checkpoint.read(tiny_run)
    task = "--tasks=gsm8k" if program == command.main else "--task=gsm8k"
    flags = ["--device=cpu", f"--run={tiny_run}", f"--evaldata={tiny_run}", "--shots=0", "--limit=1", task]
    for seq_len in (1, 2):
        checkpoint.save(tiny_run, 4, state | {"config": state["config"] | {"seq_len": seq_len}}, keep=1)
        if seq_len == 1:
            with pytest.raises(ValueError, match="^seq_len=1: the model reads one token and can write no answer"):
                program(flags)
            assert not list(tiny_run.glob("eval-*"))
    results = program(flags)
    assert results.get("tasks", {"gsm8k": results})["gsm8k"]["cut"] == 1
