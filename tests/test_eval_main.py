"""`python -m eval` on a tiny random model and made-up items: python -m pytest tests/test_eval_main.py (CPU, 20 s)"""

import gzip
import hashlib
import json
import math
import random
import subprocess
import sys

import pytest
import torch

from data import files, shards, tokenizer
from eval import __main__ as command
from eval import harness, tasks
from eval.sources import Set, Source
from eval.taskloss import encode_pair, score
from optimoe import checkpoint
from optimoe.load import ModelChoice, load

pytest_plugins = ("tests.evalrun",)  # its fixture tiny_run


def run(tiny_run, *flags):
    return command.main([f"--run={tiny_run}", f"--evaldata={tiny_run}", "--device=cpu", *flags])


def records(tiny_run, task):
    (_, *rows), _ = files.read_rows(tiny_run / f"eval-00000003/{task}.jsonl")
    return {record["id"]: record for record in rows}


def test_all_tasks(tiny_run, capsys):
    results = run(tiny_run, "--tasks=gsm8k,hellaswag,triviaqa,humaneval", "--shots=0")
    printed = capsys.readouterr().out
    assert results == files.read_json(tiny_run / "eval-00000003/results.json")
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
    model, tokens, *_ = load(ModelChoice(run=str(tiny_run), device="cpu"))
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
            harness,
            "texts",
            lambda loaded, task, prompts, streams, room, cfg: (
                [gold[prompt] if right else "    return 99\n#### 99" for prompt in prompts],  # noqa: B023
                [False] * len(prompts),
            ),
        )
        results = run(tiny_run, "--tasks=gsm8k,triviaqa,humaneval", "--shots=0", "--loss=false", "--overwrite")["tasks"]
        assert {
            metric: stats["mean"] for result in results.values() for metric, stats in result["metrics"].items()
        } == dict.fromkeys(("strict", "flexible", "exact_match", "normalized", "pass@1"), right)


def test_pass_at_k(tiny_run, monkeypatch):
    """Ten samples of which sample i of an item is right when i < 3: pass@1 = 0.3, pass@10 = 1."""
    body = {item.prompt: item.answer for item in tasks.load("humaneval").items(Source(tiny_run), 0)}
    monkeypatch.setattr(
        harness,
        "texts",
        lambda loaded, task, prompts, streams, room, cfg: (
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

    def noting(loaded, job, chunk, **options):
        done.extend(item.id for _, item in chunk)
        return real(loaded, job, chunk, **options)

    monkeypatch.setattr(command, "evaluate", noting)
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

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(command, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_run, "--tasks=gsm8k", "--shots=0", "--batch-size=1")
    assert len(records(tiny_run, "gsm8k")) == 2
    run(tiny_run, "--tasks=gsm8k", "--shots=0", "--batch-size=1")
    assert len(calls) == 5 and len(records(tiny_run, "gsm8k")) == 4


def flips(content, n, seed=0):
    """The content with one bit flipped at n places, always at both ends and in every word of the first line."""
    rng = random.Random(seed)
    places = {0, len(content) - 1, *rng.sample(range(len(content)), min(n, len(content)))}
    for place in sorted(places):
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(7)
        yield place, bytes(damaged)


@pytest.mark.parametrize(
    "name",
    [
        "eval-00000003/gsm8k.jsonl",
        "eval-00000003/hellaswag.jsonl",
        "eval-00000003/humaneval.jsonl",
        "eval-00000003/results.json",
        "data/tokenizer.json",
        "data/meta.json",
        "config.json",
        "ckpt",
    ],
)
def test_damage_is_refused_by_name_or_changes_nothing(tiny_run, name):
    """Every file that evaluation reads back, a bit flipped: the same results as before, or an error naming the file."""
    write_meta(tiny_run / "data")
    (tiny_run / "config.json").write_text(json.dumps({"data": str(tiny_run / "data"), "lr": 1e-3, "steps": 100}))
    flags = ["--tasks=gsm8k,hellaswag,humaneval", "--shots=0", "--limit=2"]
    whole = run(tiny_run, *flags)
    path = checkpoint.find(tiny_run)[-1][1] if name == "ckpt" else tiny_run / name
    content, refused = path.read_bytes(), 0
    for place, damaged in flips(content, 12 if name == "ckpt" else 40):
        path.write_bytes(damaged)
        try:
            found = run(tiny_run, *flags)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) or "was made with" in str(error), (place, error)
        else:
            # A lost last line is computed again, alone in its batch: the last digits may differ.
            assert rounded(found) == rounded(whole), (place, damaged[max(0, place - 20) : place + 20])
            path.write_bytes(content)
            run(tiny_run, *flags)
    assert refused or name == "config.json"


def rounded(value):
    """The same results with five significant digits."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def write_meta(directory):
    """The meta.json of a finished data directory that has only a tokenizer."""
    digest = hashlib.sha256((directory / tokenizer.FILE).read_bytes()).hexdigest()
    meta = {"version": shards.PLAIN, "tokenizer": tokenizer.FILE, "tokenizer_sha256": digest, "vocab_size": 257}
    files.write_json(directory / shards.META, meta | {"eos": 256, "dtype": "uint16", "splits": {}})


@pytest.mark.parametrize("old, new", [("strict", "strjct"), ('"id": "2"', '"id": "9"'), ('"cut"', '"cud"')])
def test_unsigned_records_are_continued_if_their_names_are_right(tiny_run, old, new):
    """Files from before lines were signed: a name that the task does not have is damage all the same."""
    flags = ["--tasks=gsm8k", "--shots=0"]
    whole, path = run(tiny_run, *flags), tiny_run / "eval-00000003/gsm8k.jsonl"
    rows, _ = files.read_rows(path)
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines[:4]))
    assert run(tiny_run, *flags)["tasks"]["gsm8k"]["metrics"]["strict"] == whole["tasks"]["gsm8k"]["metrics"]["strict"]
    number = next(i for i, line in enumerate(lines) if i and old in line)
    path.write_text("".join([*lines[:number], lines[number].replace(old, new), *lines[number + 1 :]]))
    with pytest.raises(
        ValueError, match=f"{path}:{number + 1} is damaged .not a record of this task.: remove that line"
    ):
        run(tiny_run, *flags)


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
        (gzip.compress(b"\xef\xbb\xbf" + ROW + b"\n" + ROW), None),
        (ROW + b"\n" + b"[" * 10**5 + b"\n", "{path}:2 is damaged"),
        (ROW + b'\n{"question": ' + b"9" * 5000 + b"}\n", "{path}:2 is damaged"),
        (ROW + b"\n" + ROW[:20] + b"\n", "{path}:2 is damaged"),
        (ROW + b"\n\xff\n", "{path} is damaged"),
        (ROW + b"\n[1, 2]\n", "{path} must hold a JSON object for each item"),
        (ROW + b'\n{"problem": "1"}\n', "gsm8k: {path} has rows of another form .KeyError.'question'"),
        (ROW + b'\n{"question": "1", "answer": null}\n', "gsm8k: item 1 has None as its answer"),
        (b"", "{path} must hold a JSON object for each item"),
        (gzip.compress(ROW * 100)[:-10], "{path} is damaged"),
        (gzip.compress(ROW * 100)[:30] + b"xxxx", "{path} is damaged"),
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


def test_two_items_of_one_id_are_refused(tiny_run):
    """They would share one record: the second would be taken for done, and the summary would count the first twice."""
    path = tiny_run / "triviaqa/rc_wikipedia_nocontext_val.jsonl"
    path.write_text(path.read_text().replace('"q2"', '"q0"'))
    message = f"triviaqa: 2 items of {path} have the id 'q0'; remove or rename all but one"
    with pytest.raises(ValueError, match=message):
        run(tiny_run, "--tasks=triviaqa", "--shots=0")
    source = Source(tiny_run)
    with pytest.raises(ValueError, match=message):
        harness.read_items(tasks.load("triviaqa"), source, 0)
    assert not (tiny_run / "eval-00000003").exists()


def test_links_that_lead_nowhere(tiny_run, monkeypatch):
    """A loop of links is a missing file. A damaged training set is no reason to take examples from the test set."""
    (tiny_run / "loop").symlink_to(tiny_run / "loop")
    for flag in ("--run", "--evaldata", "--data", "--hf", "--checkpoint"):
        with pytest.raises((ValueError, OSError), match="loop|run, checkpoint, hf"):
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


@pytest.mark.parametrize("flags", [["--tasks=gsm8k", "--run=/nonexistent"], ["--tasks=nothing"], ["--nothing"]])
@pytest.mark.parametrize("module", ["eval", "eval.votes"])
def test_a_mistake_is_one_line(module, flags):
    flags = [flag.replace("--tasks", "--task") if module == "eval.votes" else flag for flag in flags]
    found = subprocess.run([sys.executable, "-m", module, *flags], capture_output=True, text=True, timeout=100)
    assert found.returncode == 1 and found.stdout == "" and found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1


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
    model, tokens, *_ = load(ModelChoice(run=str(tiny_run), device="cpu"))
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
            f"--evaldata={tiny_run}",
            "--device=cpu",
            "--tasks=gsm8k",
            "--limit=1",
            "--shots=0",
            f"--out={tmp_path / 'elsewhere'}",
        ]
    )
    assert files.read_json(tmp_path / "elsewhere/results.json") == results
    assert results["tasks"]["gsm8k"]["metrics"]["strict"]["stderr"] is None  # one item has no standard error
    (tiny_run / "data").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="no tokenizer.json in .*name the run's data directory with --data"):
        run(tiny_run, "--tasks=gsm8k", "--shots=0")
    run(tiny_run, "--tasks=gsm8k", "--limit=1", "--shots=0", f"--data={tmp_path / 'moved'}")
    (tmp_path / "larger").mkdir()
    tokenizer.save(
        tokenizer.encoding({bytes([b]): b for b in range(256)} | {b"a%d" % i: 256 + i for i in range(80)}),
        tmp_path / "larger",
    )
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
