"""`python -m eval` on a tiny random model and made-up items. Run: python -m pytest tests/test_eval_main.py (CPU, 10 s)"""

import json
import math

import pytest
import torch

from data import tokenizer
from eval import __main__ as command
from eval import harness, tasks
from eval.sources import Source
from eval.taskloss import encode_pair, score
from optimoe import checkpoint
from tests.evalrun import tiny_run  # noqa: F401


def run(tiny_run, *flags):
    return command.main([f"--run={tiny_run}", f"--data={tiny_run}", "--device=cpu", *flags])


def records(tiny_run, task):
    first, *lines = (tiny_run / f"eval-00000003/{task}.jsonl").read_text().splitlines()
    return {record["id"]: record for record in map(json.loads, lines)}


def test_all_tasks(tiny_run, capsys):
    results = run(tiny_run, "--tasks=gsm8k,hellaswag,triviaqa,humaneval", "--shots=0")
    printed = capsys.readouterr().out
    assert results == json.loads((tiny_run / "eval-00000003/results.json").read_text())
    assert list(results["tasks"]) == ["gsm8k", "hellaswag", "triviaqa", "humaneval"] and results[
        "checkpoint"
    ].startswith("ckpt-00000003-")
    assert results["sources"]["gsm8k/test"] == str(tiny_run / "gsm8k/test.jsonl") and "seccomp" in results["sandbox"]
    expected = {
        "gsm8k": {"strict", "flexible"},
        "hellaswag": {"acc", "acc_norm"},
        "triviaqa": {"exact_match", "normalized"},
        "humaneval": {"pass@1"},
    }
    for task, metrics in expected.items():
        result = results["tasks"][task]
        assert set(result["metrics"]) == metrics | {"bits/token", "bits/byte"} and result["items"] == len(
            records(tiny_run, task)
        )
        for metric, stats in result["metrics"].items():
            values = [record["metrics"][metric] for record in records(tiny_run, task).values()]
            mean = sum(values) / len(values)
            assert stats["mean"] == pytest.approx(mean)
            assert stats["stderr"] == pytest.approx(
                math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
            )
            assert f"{mean:.4f}" in printed and metric in printed


def test_losses_and_choices_are_those_of_single_items(tiny_run):
    run(tiny_run, "--tasks=hellaswag", "--shots=1")
    model, tokens, _, _ = harness.load(command.EvalConfig(run=str(tiny_run), device="cpu", tasks="hellaswag"))
    items = tasks.load("hellaswag").items(Source(tiny_run), 1)
    for item in items:
        record = records(tiny_run, "hellaswag")[item.id]
        costs = [score(model, [encode_pair(tokens, item.prompt, choice)[:2]])[0] for choice in item.choices]
        assert record["choices"] == pytest.approx(costs, rel=1e-4) and record["nats"] == pytest.approx(
            costs[item.gold], rel=1e-4
        )
        best = min(range(4), key=lambda i: costs[i])
        shortest = min(range(4), key=lambda i: costs[i] / len(item.choices[i][1:]))
        assert record["metrics"]["acc"] == (best == item.gold) and record["metrics"]["acc_norm"] == (
            shortest == item.gold
        )
        assert record["metrics"]["bits/byte"] == pytest.approx(
            costs[item.gold] / math.log(2) / len(item.answer.encode()), rel=1e-4
        )
    assert (
        len({record["metrics"]["acc"] for record in records(tiny_run, "hellaswag").values()}) == 2
    )  # some right, some wrong


def test_right_and_wrong_answers(tiny_run, monkeypatch):
    """With the gold answers as generated texts everything is right, with others everything is wrong."""
    gold = {
        item.prompt: item.answer
        for name in ("gsm8k", "triviaqa", "humaneval")
        for item in tasks.load(name).items(Source(tiny_run), 0)
    }
    for right in (1, 0):
        monkeypatch.setattr(
            command,
            "texts",
            lambda model, tokens, task, prompts, streams, room, cfg: (
                [gold[prompt] if right else "    return 99\n#### 99" for prompt in prompts],
                [False] * len(prompts),
            ),
        )  # noqa: B023
        results = run(tiny_run, "--tasks=gsm8k,triviaqa,humaneval", "--shots=0", "--loss=false", "--overwrite")["tasks"]
        assert {
            metric: stats["mean"] for result in results.values() for metric, stats in result["metrics"].items()
        } == dict.fromkeys(("strict", "flexible", "exact_match", "normalized", "pass@1"), right)


def test_pass_at_k(tiny_run, monkeypatch):
    """Ten samples of which sample i of an item is right when i < 3: pass@1 = 0.3, pass@10 = 1."""
    body = {item.prompt: item.answer for item in tasks.load("humaneval").items(Source(tiny_run), 0)}
    monkeypatch.setattr(
        command,
        "texts",
        lambda model, tokens, task, prompts, streams, room, cfg: (
            [
                body[prompt] if stream % 4096 < 3 else "    return 99\n"
                for prompt, stream in zip(prompts, streams, strict=True)
            ],
            [False] * len(prompts),
        ),
    )
    metrics = run(tiny_run, "--tasks=humaneval", "--samples=10", "--temperature=0.8", "--loss=false", "--limit=1")[
        "tasks"
    ]["humaneval"]["metrics"]
    assert metrics["pass@1"]["mean"] == pytest.approx(0.3) and metrics["pass@10"]["mean"] == 1
    record = records(tiny_run, "humaneval")["HumanEval/0"]
    assert (
        record["reasons"][:3] == ["passed"] * 3
        and record["reasons"][3].startswith("AssertionError")
        and len(record["texts"]) == 10
    )


def test_resumes(tiny_run, monkeypatch):
    done, real = [], command.evaluate
    monkeypatch.setattr(command, "evaluate", lambda *args: done.extend(item.id for _, item in args[3]) or real(*args))
    flags = ["--tasks=gsm8k", "--shots=0", "--batch-size=2"]
    run(tiny_run, *flags, "--limit=2")
    assert sorted(done) == ["0", "1"]
    path = tiny_run / "eval-00000003/gsm8k.jsonl"
    path.write_text(path.read_text() + '{"id": "2", "met')  # killed while writing
    whole = run(tiny_run, *flags)
    assert sorted(done) == ["0", "1", "2", "3"] and whole["tasks"]["gsm8k"]["items"] == 4
    run(tiny_run, *flags)
    assert len(done) == 4  # nothing left to do
    fresh = run(tiny_run, *flags, "--overwrite", "--batch-size=1")
    assert len(done) == 8
    for metric, stats in fresh["tasks"]["gsm8k"]["metrics"].items():
        assert stats["mean"] == pytest.approx(whole["tasks"]["gsm8k"]["metrics"][metric]["mean"], rel=1e-5)
    with pytest.raises(ValueError, match="gsm8k.jsonl was made with shots=0, not 1: give the same, use --overwrite"):
        run(tiny_run, "--tasks=gsm8k", "--shots=1")
    with pytest.raises(ValueError, match="gsm8k.jsonl was made with"):  # before the other task is computed
        run(tiny_run, "--tasks=hellaswag, gsm8k, gsm8k", "--shots=1")
    assert len(done) == 8
    (tiny_run / "gsm8k/test.jsonl").write_text((tiny_run / "gsm8k/test.jsonl").read_text().replace("eggs", "hens"))
    with pytest.raises(ValueError, match="was made with items="):  # other data under the same name
        run(tiny_run, *flags)


def test_an_interruption_keeps_what_is_done(tiny_run, monkeypatch):
    calls, real = [], command.evaluate

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(command, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_run, "--tasks=gsm8k", "--shots=0", "--batch-size=1")
    assert len(records(tiny_run, "gsm8k")) == 2
    run(tiny_run, "--tasks=gsm8k", "--shots=0", "--batch-size=1")
    assert len(calls) == 5 and len(records(tiny_run, "gsm8k")) == 4


def test_a_damaged_record_is_named(tiny_run):
    flags = ["--tasks=gsm8k", "--shots=0"]
    whole, path = run(tiny_run, *flags), tiny_run / "eval-00000003/gsm8k.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for damage in (lines[2][:9] + b"\n", b"\xff" + lines[2]):
        path.write_bytes(b"".join([*lines[:2], damage, *lines[3:]]))
        with pytest.raises(ValueError, match=f"{path}:3 is damaged .*--overwrite"):
            run(tiny_run, *flags)
    path.write_bytes(b"".join(lines[:2] + lines[3:]))  # the remedy
    assert run(tiny_run, *flags)["tasks"] == whole["tasks"]


def test_long_prompts_are_cut_at_the_beginning(tiny_run, capsys):
    result = run(tiny_run, "--tasks=gsm8k", "--shots=3", "--limit=2")["tasks"]["gsm8k"]
    assert (
        result["cut"] == 2
        and "2 items did not fit the model's 64 tokens: their prompts lost" in capsys.readouterr().out
    )
    model, tokens, _, _ = harness.load(command.EvalConfig(run=str(tiny_run), device="cpu", tasks="gsm8k"))
    ids, cut = harness.prompt_ids(model, tokens, "x" * 100, 32)
    assert cut and len(ids) == 32 and ids[0] == tokens.bos[0] and ids[1:] == tokens.encode("x" * 31)
    assert harness.prompt_ids(model, tokens, "x" * 31, 32) == (tokens.bos + tokens.encode("x" * 31), False)
    assert harness.cut_at("a.b\nc", ("\n", ".")) == "a" and harness.cut_at("abc", ("\n",)) == "abc"


def test_kernels_that_cannot_run_are_refused(tiny_run, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl='triton' needs a CUDA GPU.*leave --impl=auto"):
        run(tiny_run, "--tasks=gsm8k", "--shots=0", "--impl=triton")


def test_groups(tiny_run):
    (tiny_run / "gsm_plus").mkdir()
    rows = [
        {"question": f"{i}?", "solution": f"#### {i}", "answer": str(i), "perturbation_type": ("add", "drop")[i % 2]}
        for i in range(6)
    ]
    (tiny_run / "gsm_plus/gsmplus_testmini.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(tiny_run, "--tasks=gsm_plus", "--shots=0", "--accuracy=false")["tasks"]["gsm_plus"]
    assert set(result["metrics"]) == {"bits/token", "bits/byte"}
    assert {group: stats["bits/byte"]["n"] for group, stats in result["groups"].items()} == {"add": 3, "drop": 3}


def test_checkpoint_file_and_tokenizer(tiny_run, tmp_path):
    path = checkpoint.find(tiny_run)[-1][1]
    results = command.main(
        [
            f"--checkpoint={path}",
            f"--data={tiny_run}",
            "--device=cpu",
            "--tasks=gsm8k",
            "--limit=1",
            "--shots=0",
            f"--out={tmp_path / 'elsewhere'}",
        ]
    )
    assert json.loads((tmp_path / "elsewhere/results.json").read_text()) == results
    assert results["tasks"]["gsm8k"]["metrics"]["strict"]["stderr"] is None  # one item has no standard error
    (tiny_run / "data").rename(tmp_path / "moved")
    with pytest.raises(
        ValueError, match="no tokenizer.json there, in .*name the run's data directory with --tokenizer"
    ):
        run(tiny_run, "--tasks=gsm8k", "--shots=0")
    run(tiny_run, "--tasks=gsm8k", "--limit=1", "--shots=0", f"--tokenizer={tmp_path / 'moved'}")
    (tmp_path / "larger").mkdir()
    tokenizer.save(
        tokenizer.encoding({bytes([b]): b for b in range(256)} | {b"a%d" % i: 256 + i for i in range(80)}),
        tmp_path / "larger",
    )
    with pytest.raises(ValueError, match="larger': it has 337 tokens and the model 320"):
        run(tiny_run, "--tasks=gsm8k", "--shots=0", f"--tokenizer={tmp_path / 'larger'}")
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
        (["--tasks=gsm8k", "--checkpoint=x"], r"run, checkpoint, hf=\('.*/run', 'x', ''\): give .* one of them"),
        (["--tasks=gsm8k", "--seed=-1"], "seed=-1"),
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
