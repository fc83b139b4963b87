"""A resumed run equals an unbroken one bit for bit; damage is named. CPU.

Run: python -m pytest tests/test_resume.py"""
# ruff: noqa: F811  two fixtures are imported

import shutil

import pytest
import torch

import train as train_file
from moe_kernels import reference
from optimoe import checkpoint
from tests.test_train import data_dir, whole_run  # noqa: F401
from tests.trainrun import TIMES, cut_at, differences, final_state, rows, run, snapshot
from train import main


def untimed(results):
    return {name: value for name, value in results.items() if name not in (*TIMES, "seconds")}


def test_resume_equals_uninterrupted_bit_for_bit(whole_run, tmp_path):
    whole, results = whole_run
    cut = cut_at(whole, tmp_path / "cut", 4)
    resumed = main([f"--resume={cut}"])
    assert differences(final_state(cut), final_state(whole)) == []
    assert rows(cut) == rows(whole)  # the line of step 6 averages over steps 4 to 6, across the break
    assert untimed(resumed) == untimed(results)


@pytest.mark.parametrize(
    "flags",
    [["--weights=bfloat16"], ["--dtype=bfloat16"], ["--weights=bfloat16", "--dtype=bfloat16", "--grad-accum=2"]],
)
def test_resume_in_bfloat16(data_dir, tmp_path, flags):
    """bfloat16 weights, or bfloat16 copies of float32 ones (then the checkpoint holds float32): bit for bit. What is
    saved loads for evaluation and goes on as a plain float32 run."""
    whole, adamw = tmp_path / "whole", ["--optimizer=adamw", "--clip-norm=0.5"]
    results = run(data_dir, whole, *adamw, *flags)
    cut = cut_at(whole, tmp_path / "cut", 4)
    main([f"--resume={cut}"])
    assert differences(final_state(cut), final_state(whole)) == [] and rows(cut) == rows(whole)
    state = final_state(whole)
    half = "--weights=bfloat16" in flags
    saved = {t.dtype for name, t in state["model"].items() if name.endswith(("w_in", "qkv.weight"))}
    assert saved == {torch.bfloat16 if half else torch.float32}
    assert results["loss"] < rows(whole)[0]["loss"] - 0.1
    assert checkpoint.load_model(whole, dtype="float32").blocks[0].mlp.w_in.dtype == torch.float32
    other = cut_at(whole, tmp_path / "other", 4)
    main([f"--resume={other}", "--weights=float32", "--dtype=float32", "--grad-accum=1"])
    assert rows(other)[-2]["loss"] == pytest.approx(rows(whole)[-2]["loss"], rel=2e-2)
    if half:  # the check can fail: other random bits
        broken = cut_at(whole, tmp_path / "broken", 4)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "mix", lambda x: x * 48271 & 0xFFFFFFFF)
            main([f"--resume={broken}"])
        assert differences(final_state(broken), state)


@pytest.mark.parametrize("part", ["loader", "optimizer", "window", "model/blocks.0.mlp.bias_E"])
def test_resume_check_can_fail(whole_run, tmp_path, part):
    """Losing any part of the state shows."""
    whole, _ = whole_run
    cut = cut_at(whole, tmp_path / "cut", 4)
    path = checkpoint.find(cut)[-1][1]
    state = checkpoint.read(path)
    if part == "loader":
        state["loader"]["drawn"] = [0]
    elif part == "optimizer":
        state["optimizer"][0]["state"][0]["exp_avg"].zero_()
    elif part == "window":
        state["window"]["sums"].zero_()
    else:
        state["model"][part.split("/")[1]].add_(1e-3)
    path.unlink()
    checkpoint.save(cut, 4, state, keep=9)
    main([f"--resume={cut}"])
    assert differences(final_state(cut), final_state(whole)) or rows(cut) != rows(whole)


def test_resuming_a_finished_run_only_reports_again(whole_run, tmp_path):
    whole, results = whole_run
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    (cut / "results.json").unlink()
    again = main([f"--resume={cut}"])
    assert untimed(again) == untimed(results) and again.keys() == results.keys()
    assert rows(cut) == rows(whole) and differences(final_state(cut), final_state(whole)) == []


def test_damaged_checkpoint_is_named_and_kept(whole_run, tmp_path):
    cut = cut_at(whole_run[0], tmp_path / "cut", 8)
    good, path = (p for _, p in checkpoint.find(cut))
    content = bytearray(path.read_bytes())
    for damage in ("flip", "truncate"):
        if damage == "flip":
            content[len(content) // 2] ^= 1
        path.write_bytes(content if damage == "flip" else content[:-100])
        before = snapshot(cut)
        with pytest.raises(ValueError, match=f"{path.name} is corrupt.*continue from .*{good.name}"):
            main([f"--resume={cut}"])
        assert snapshot(cut) == before
    path.rename(tmp_path / "away.pt")
    main([f"--resume={cut}"])  # the remedy works
    assert differences(final_state(cut), final_state(whole_run[0])) == []
    with pytest.raises(ValueError, match="restore its name"):
        checkpoint.read(tmp_path / "away.pt")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        checkpoint.read(tmp_path)


def test_resume_refuses_another_model_or_data(whole_run, data_dir, tmp_path):
    cut = cut_at(whole_run[0], tmp_path / "cut", 4)
    before = snapshot(cut)
    with pytest.raises(ValueError, match="d_expert=64: the checkpoint has 32"):
        main([f"--resume={cut}", "--d-expert=64"])
    with pytest.raises(ValueError, match="optimizer='adamw': the checkpoint has 'muon'"):
        main([f"--resume={cut}", "--optimizer=adamw"])
    with pytest.raises(ValueError, match="loader state: seed"):
        main([f"--resume={cut}", "--seed=1"])
    with pytest.raises(ValueError, match="steps=3: the checkpoint is that of step 4"):
        main([f"--resume={cut}", "--steps=3"])
    assert snapshot(cut) == before


@pytest.mark.parametrize(
    "damage", [b"\xff\xfe", b"5\n", b"[1]\n", b'{"loss": 1}\n', b'{"step": "x"}\n', b"\0" * 9 + b"\n"]
)
def test_damaged_lines_of_the_log_are_dropped(whole_run, tmp_path, damage):
    cut = cut_at(whole_run[0], tmp_path / "cut", 4)
    log = cut / "metrics.jsonl"
    first, *others = log.read_bytes().splitlines(keepends=True)
    damaged = first[:-3] + damage + first[-3:] if damage == b"\xff\xfe" else first + damage
    log.write_bytes(damaged + b"".join(others))
    main([f"--resume={cut}"])
    assert rows(cut) == rows(whole_run[0])[damage == b"\xff\xfe" :]


def test_a_failed_save_keeps_the_older_checkpoints(whole_run, tmp_path, monkeypatch):
    cut = cut_at(whole_run[0], tmp_path / "cut", 4)
    before = snapshot(cut)

    def full_disk(file, place, data):
        file.write(b"half of it")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(checkpoint, "_write", full_disk)
        checkpoint.save(cut, 5, {"losses": torch.ones(3)}, keep=1)
    after = snapshot(cut)
    assert {path: after[path] for path in before} == before
    checkpoint.save(cut, 5, {"losses": torch.ones(3)}, keep=1)  # the next one succeeds, and only then removes the older
    assert [step for step, _ in checkpoint.find(cut)] == [5] and checkpoint.read(cut)["losses"].tolist() == [1, 1, 1]
    assert not list(cut.glob("*.tmp"))


EMBEDDING = "diverged at step 6: the loss is nan, embed.weight was"


@pytest.mark.parametrize("every, message", [(1, "the norm of the weights is nan at step 5: use"), (0, EMBEDDING)])
def test_not_a_number_ends_the_run_and_keeps_the_checkpoint(whole_run, tmp_path, monkeypatch, every, message):
    cut = cut_at(whole_run[0], tmp_path / "cut", 4)
    monkeypatch.setattr(train_file, "lr_at", lambda step, cfg: float("nan"))
    with pytest.raises(ValueError, match=message):
        main([f"--resume={cut}", "--keep-checkpoints=1", f"--checkpoint-every={every}", "--val-every=0"])
    assert [step for step, _ in checkpoint.find(cut)] == [4]
