"""The table and the curves of several runs. Run: python -m pytest tests/test_show.py (CPU)"""

import json
import re

import pytest

from optimoe import curves
from study import show


def write_run(path, settings, rows, results=None):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(settings))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if results:
        (path / "results.json").write_text(json.dumps(results))
    return str(path)


@pytest.fixture
def runs(tmp_path):
    trained = {"dense": True, "d_model": 32, "batch_size": 2, "seq_len": 8}
    row = lambda step: {"step": step, "loss": 5 - step, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 2.5e6}
    final = {"loss": 3.0, "val_loss": 3.25, "parameters": 1_500_000}
    one = write_run(tmp_path / "one", trained, [row(1), {"step": 1, "val_loss": 4.5}, row(2)], final)
    slow = write_run(tmp_path / "slow", trained, [row(1) | {"lr": 5e-4}])
    (tmp_path / "one/eval-00000002").mkdir()
    tasks = {"gsm8k": {"metrics": {"strict": {"mean": 0.125}}}}
    (tmp_path / "one/eval-00000002/results.json").write_text(json.dumps({"tasks": tasks}))
    known = {"kl": 0.01, "grad_norm": 1.0, "answer_tokens": 9, "loss": 0.0}
    reward = lambda step: {"step": step, "reward": 0.1 * step, **known}
    rl = {"group_size": 4, "task": "reasoning"}
    rows = [{"step": 0, "test_reward": 0.5}, reward(1), reward(2), {"step": 2, "test_reward": 0.75}]
    return one, slow, write_run(tmp_path / "rl", rl, rows), write_run(tmp_path / "rl2", rl, rows)


def test_a_picture_that_cannot_be_written_is_refused_first(runs, tmp_path, capsys):
    with pytest.raises(ValueError, match=f"out='{tmp_path}': this is a directory"):
        show.main([runs[0], f"--out={tmp_path}"])
    assert not capsys.readouterr().out


def test_the_table_has_a_run_a_line_and_what_is_known(runs):
    lines = [line.split() for line in show.table(runs)]
    names = lines[0]
    cells = [dict(zip([*names[:-2], "gsm8k strict"], line, strict=True)) for line in lines[1:]]
    assert names[0] == "run" and names[-2:] == ["gsm8k", "strict"] and [row["run"] for row in cells] == list(runs)
    one, slow, rl, _ = cells
    assert (one["parameters"], one["validation"], one["loss"], one["gsm8k strict"]) == ("1.5M", "3.25", "3", "0.125")
    assert (slow["parameters"], slow["loss"], slow["tokens/s"]) == ("–", "4", "2.5M")
    assert (rl["reward"], rl["unseen"], rl["KL"], rl["tokens/s"]) == ("0.2", "0.75", "0.01", "–")


@pytest.mark.parametrize(
    "name, value", [("loss", "x"), ("loss", None), ("step", "1"), ("tokens", {}), ("val_loss", "y"), ("lr", ["z"])]
)
def test_a_row_without_its_number_is_named(tmp_path, name, value):
    good = {"step": 1, "loss": 2.0, "lr": 1e-3, "grad_norm": None, "load": [[1.0, 0.5]]}
    run = write_run(tmp_path / "run", {"dense": True, "batch_size": 2, "seq_len": 8}, [good, good | {name: value}])
    log = tmp_path / "run/metrics.jsonl"
    log.write_text("\n" + log.read_text() + '{"step": 3, "lo')  # a blank line, and one that a kill has cut off
    with pytest.raises(ValueError, match=f"^{re.escape(str(log))}:3: {name}=.*: a number is needed; remove that line$"):
        show.main([run])
    log.write_text(json.dumps(good) + "\n" + '{"loss": 1.0}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:2: step=None"):
        show.main([run])
    log.write_text(json.dumps(good) + "\n")
    assert len(show.table([run])) == 2


def test_runs_of_one_kind_are_laid_over_one_another(runs, tmp_path, capsys):
    one, slow, *rl = runs
    fig = show.overlay([one, slow])
    assert [axis.get_title() for axis in fig.axes] == [curves.LOSS, curves.NORM, "learning rate"]
    assert [list(line.get_ydata()) for line in fig.axes[2].lines] == [[1e-3] * 2, [5e-4]]
    assert len(show.overlay([one, one]).axes) == 2  # equal rates need no panel
    fig = show.overlay(rl)
    assert [axis.get_title() for axis in fig.axes] == list(curves.GRPO)
    assert {axis.get_xlabel() for axis in fig.axes} == {"step"} and len(fig.legends[0].get_texts()) == 2
    assert [list(line.get_ydata()) for line in fig.axes[0].lines[:2]] == [[0.1, 0.2], [0.5, 0.75]]
    show.main([*rl, f"--out={tmp_path}/rl.png"])
    assert (tmp_path / "rl.png").stat().st_size > 10_000 and "0.75" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="share no axis; show them apart"):
        show.main([one, rl[0]])
