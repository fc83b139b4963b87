"""How ranks start, and what they say when they end: python -m pytest tests/test_parallel_start.py (CPU)"""
# ruff: noqa: F811  two fixtures are imported

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from optimoe import run
from tests.test_grpo import SHORT, start  # noqa: F401
from tests.test_train import data_dir  # noqa: F401
from tests.trainrun import ROOT, SMALL, free_port
from train import main


def start_rank(program, flags, rank, port, before="pass"):
    """One of two ranks that nobody supervises."""
    code = f"import os\nfrom optimoe import run\n{before}\nimport {program}\n{program}.main()"
    ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env = {name: value for name, value in os.environ.items() if name != "DEBUG"} | ranks | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *flags], cwd=ROOT, env=env, **pipes)


@pytest.mark.parametrize("program, moment", [("train", "before it came"), ("grpo", "in its first work")])
def test_rank_0_killed_at_the_start(data_dir, start, tmp_path, program, moment):
    """The other one ends soon, with one line, and not after the half hour that a rank may wait later. Both programs are
    started by run.launch."""
    flags = {"train": [*SMALL, f"--data={data_dir}"], "grpo": [*SHORT, f"--model={start}"]}[program]
    flags = [*flags, f"--out-dir={tmp_path / 'out'}"]
    port = free_port()
    if moment == "before it came":
        other = start_rank(program, flags, 1, port, "run.START_SECONDS = 3")
    else:
        first = start_rank(program, flags, 0, port, "run.Run._open = lambda self: os.kill(os.getpid(), 9)")
        other = start_rank(program, flags, 1, port)
        assert first.wait(timeout=300) == -9
    said, _ = other.communicate(timeout=300)
    assert other.returncode == 1 and "Traceback" not in said, said[-3000:]
    assert "error: rank 1 lost its connection to another rank, which died or never started" in said


@pytest.mark.parametrize(
    "fault, said", [("OSError('disk full')", "error: disk full\n"), ("KeyError('no such layer')", "KeyError: 'no such")]
)
def test_a_rank_that_fails_alone_ends_although_the_others_wait_for_it(data_dir, tmp_path, fault, said):
    """NCCL's orderly end would wait for them, so there must be none."""
    flags, port = [*SMALL, f"--data={data_dir}", f"--out-dir={tmp_path / 'out'}"], free_port()
    fail = f"import time\ndef fail(*_): raise {fault}\n"
    fail += "run.Run.record, run.parallel.disconnect = fail, lambda: time.sleep(999)"
    first, other = start_rank("train", flags, 0, port, fail), start_rank("train", flags, 1, port)
    try:
        printed, _ = first.communicate(timeout=100)
        assert first.returncode == 1 and said in printed, printed[-3000:]
        assert ("Traceback" in printed) == ("KeyError" in said)
        printed, _ = other.communicate(timeout=100)
        assert other.returncode == 1 and "error: rank 1 lost its connection to another rank" in printed, printed[-3000:]
    finally:
        first.kill(), other.kill()


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_says_what_is_wrong_before_others_do(rank, monkeypatch):
    slept = []
    for name, value in dict(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DEBUG", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", "--stpes=3"])
    monkeypatch.setattr(run.time, "sleep", slept.append)
    with pytest.raises(SystemExit, match="did you mean 'steps'"):
        main()
    assert slept == [run.FIRST_SECONDS] * rank


@pytest.mark.parametrize("ranks, command", [(1, "python"), (4, "torchrun --nproc-per-node=4")])
def test_a_stopped_run_goes_on_with_as_many_ranks(ranks, command, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    run.Run.stopped(SimpleNamespace(first=True, dir="runs/x"), 3, "train.py")
    assert capsys.readouterr().out.endswith(f"continue with: {command} train.py --resume=runs/x\n")


@pytest.mark.parametrize(
    "environment, said",
    [
        ("WORLD_SIZE=2 RANK=1", "WORLD_SIZE=2: it needs MASTER_ADDR, MASTER_PORT too; torchrun .* unset WORLD_SIZE"),
        ("WORLD_SIZE=two", "WORLD_SIZE='two': torchrun sets it: start all ranks with it, or unset WORLD_SIZE"),
        ("WORLD_SIZE=0", "WORLD_SIZE='0': torchrun sets it"),
        ("RANK=", "RANK='': torchrun sets it"),
    ],
)
def test_an_environment_that_no_torchrun_has_made(environment, said, monkeypatch):
    for word in environment.split():
        monkeypatch.setenv(*word.split("="))
    with pytest.raises(ValueError, match=said):
        main([])
