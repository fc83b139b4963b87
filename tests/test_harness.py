"""Records of `python -m eval` that are continued, cut short or damaged: python -m pytest tests/test_harness.py (CPU)"""

import hashlib
import json
import random

import pytest

from data import files, shards, tokenizer
from eval import __main__ as command
from eval import harness, tasks
from eval.sources import Source
from optimoe import checkpoint
from optimoe.load import ModelChoice, load
from tests.evalrun import records, run

pytest_plugins = ("tests.evalrun",)  # its fixture tiny_run


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


def test_fewer_items_do_not_replace_a_result(tiny_run, capsys):
    flags, path = ["--tasks=gsm8k", "--shots=0"], tiny_run / "eval-00000003/results.json"
    kept = lambda: files.read_json(path)["tasks"]["gsm8k"]
    whole = run(tiny_run, *flags)["tasks"]["gsm8k"]
    assert run(tiny_run, *flags, "--limit=1")["tasks"]["gsm8k"]["items"] == 1 and kept() == whole
    assert "results.json keeps the result of gsm8k over 4 items; --overwrite replaces it" in capsys.readouterr().out
    run(tiny_run, *flags, "--limit=1", "--overwrite")
    assert kept()["items"] == 1


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
    """The content with one bit flipped, at n random places and at both ends."""
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
    for place, damaged in flips(content, 8 if name == "ckpt" else 24):
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
    said = f"{path}:{number + 1} is damaged .not a record of this task.: remove that line"
    for behind in (lines[number + 1 :], []):  # the damage is seen without others to compare with, too
        path.write_text("".join([*lines[:number], lines[number].replace(old, new), *behind]))
        with pytest.raises(ValueError, match=said):
            run(tiny_run, *flags)


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
    (tiny_run / "gsm8k/train.jsonl").write_text((tiny_run / "gsm8k/test.jsonl").read_text())
    result = run(tiny_run, "--tasks=gsm8k", "--shots=3", "--limit=2")["tasks"]["gsm8k"]
    printed = capsys.readouterr().out
    assert result["cut"] == 2 and "2 of 2 prompts lost their beginnings to fit the model's 64 tokens" in printed
    model, tokens, *_ = load(ModelChoice(run=str(tiny_run), device="cpu"))
    ids, cut = harness.prompt_ids(model, tokens, "x" * 100, 32)
    assert cut and len(ids) == 32 and ids[0] == tokens.bos[0] and ids[1:] == tokens.encode("x" * 31)
    assert harness.prompt_ids(model, tokens, "x" * 31, 32) == (tokens.bos + tokens.encode("x" * 31), False)
    assert harness.cut_at("a.b\nc", ("\n", ".")) == "a" and harness.cut_at("abc", ("\n",)) == "abc"
