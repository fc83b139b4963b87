"""A refused start leaves nothing behind: python -m pytest tests/test_refused.py (CPU)"""
# ruff: noqa: F811  two fixtures are imported

from pathlib import Path

import pytest

import grpo
from data import files
from optimoe import config
from tests.test_grpo import SHORT, start  # noqa: F401
from tests.test_train import data_dir  # noqa: F401
from tests.trainrun import run as train_run
from train import main


@pytest.mark.parametrize("flag", ["--steps=1000000000000000000", "--batch-size=100000000000000000"])
def test_more_tokens_than_can_be_counted(tmp_path, flag):
    with pytest.raises(ValueError, match=r"^steps=\d+: with batch_size=\d+ and seq_len=\d+ these are 2\^63 tokens or"):
        main([flag, f"--out-dir={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_a_refused_trace_makes_no_directory(data_dir, tmp_path):
    trace = f"--trace={tmp_path}/new/t.json"
    for flags in (["--steps=7"], ["--upcycle-from=/nonexistent"]):
        with pytest.raises((ValueError, FileNotFoundError)):
            train_run(data_dir, tmp_path / "out", trace, *flags)
        assert not list(tmp_path.iterdir())


def test_a_full_disk_refuses_a_start_and_leaves_nothing(data_dir, start, tmp_path, monkeypatch):
    post_train = lambda out: grpo.main([*SHORT, f"--model={start}", f"--out-dir={out}"])
    starts = [lambda out: train_run(data_dir, out), post_train]
    with monkeypatch.context() as patch:
        patch.setattr(config.tempfile, "TemporaryFile", lambda dir: open("/dev/full", "wb"))
        for begin in starts:
            said = "out_dir=.*: nothing can be written to .*No space left on device.; free some space or name another"
            with pytest.raises(ValueError, match=said):
                begin(tmp_path / "new/out")
            assert not list(tmp_path.iterdir())
    for name in ("write_json", "replace"):  # the disk becomes full later: at config.json, at metrics.jsonl
        for begin in starts:
            with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
                patch.setattr(files, name, fail_under(tmp_path, getattr(files, name)))
                begin(tmp_path / "new/out")
            assert not list(tmp_path.iterdir())


def fail_under(folder, write):
    """`write`, which after its work runs out of disk in this folder."""

    def full(path, *args):
        write(path, *args)
        if folder in Path(path).parents:
            raise OSError(28, "No space left on device")

    return full
