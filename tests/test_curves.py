"""Pictures of runs. Run: python -m pytest tests/test_curves.py (CPU)"""

import json
import math

import pytest

from optimoe import curves
from study import show
from tests.test_train import data_dir  # noqa: F401  a fixture
from tests.trainrun import run as train_run

CONFIG = {
    "dense": False,
    "n_experts": 4,
    "top_k": 2,
    "d_model": 32,
    "n_layers": 3,
    "batch_size": 8,
    "seq_len": 16,
    "steps": 5,
}


def row(step, load=None):
    load = load or [[0.0, 1.0, 1.0, 2.0], [1.0] * 4, [0.25, 4.0, 1.0, 1.0]]
    return {
        "step": step,
        "loss": 5 - 0.1 * step,
        "lr": 1e-3 * step,
        "grad_norm": 1.0,
        "load": load,
        "load_max": [max(x) for x in load],
        "mfu": None,
        "load_min": [min(x) for x in load],
        "router_entropy": [1.2, 1.3, 1.1],
        "dead_experts": sum(x.count(0.0) for x in load),
    }


def write_run(path, rows, **changes):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", [row(1), row(2), {"step": 2, "val_loss": 4.9}, row(3)])


def test_picture_shows_every_number(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # torn
    fig = curves.figure(run)
    axes = {axis.get_title(): axis for axis in fig.axes}
    titles = " | ".join(axes)
    for part in ("cross-entropy", "learning rate", "gradient norm", "entropy of the mean router", "without a token"):
        assert part in titles
    loss = next(axis for title, axis in axes.items() if title.startswith("cross-entropy"))
    assert list(loss.lines[0].get_ydata()) == [4.9, 4.8, 4.7] and list(loss.lines[1].get_ydata()) == [4.9]
    busiest = axes[curves.LOAD]
    assert [list(line.get_ydata()) for line in busiest.lines] == [[2.0] * 3, [1.0] * 3, [4.0] * 3]  # of each layer
    assert {axis.get_xlabel() for title, axis in axes.items() if title} == {"million tokens"}
    even = next(axis for title, axis in axes.items() if title.startswith("entropy")).lines[-1]
    assert (
        even.get_ydata()[0] == math.log(4)
        and even.get_zorder() > loss.lines[0].get_zorder()
        and even.get_color() == "black"
    )
    curves.main([str(run)])
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG" and not list(run.glob("*.tmp*"))


def test_dense_and_several_runs(run, tmp_path):
    plain = ("step", "loss", "lr", "grad_norm")
    dense = write_run(tmp_path / "dense", [{k: row(s)[k] for k in plain} for s in (1, 2)], dense=True)
    titles = [axis.get_title() for axis in curves.figure(dense).axes]
    assert titles == [curves.LOSS, curves.NORM, "learning rate"]
    show.main([str(run), str(dense), "--out", str(tmp_path / "both.png")])
    assert (tmp_path / "both.png").stat().st_size > 10_000


def test_no_panel_is_empty(tmp_path):
    """A constant rate, routers that use every expert, and an even load need no panel; every panel left shows data."""
    even = [row(step, [[1.1, 0.9, 1.0, 1.0]] * 3) | {"lr": 1e-3} for step in (1, 2)]
    fig = curves.figure(write_run(tmp_path / "even", even))
    assert [axis.get_title().split()[0] for axis in fig.axes] == ["cross-entropy,", "gradient", "entropy"]
    fig = curves.figure(write_run(tmp_path / "uneven", [*even, row(3)]))
    assert len(fig.axes) == 6 and all(axis.lines for axis in fig.axes)


def test_the_legend_names_what_is_there(run, tmp_path):
    texts = lambda run: [text.get_text() for text in curves.figure(run).axes[0].get_legend().get_texts()]
    assert texts(run) == ["training", "validation"] and texts(write_run(tmp_path / "early", [row(1), row(2)])) == [
        "training"
    ]


@pytest.mark.parametrize("first, shown", [(3.5, True), (9.0, False)])
def test_first_losses_are_cut_off_only_where_they_would_flatten_the_rest(tmp_path, first, shown):
    run = write_run(
        tmp_path / "run", [row(1) | {"loss": first}, *(row(step) | {"loss": 3 - step / 20} for step in range(2, 30))]
    )
    low, high = curves.figure(run).axes[0].get_ylim()
    assert (high > first) == shown and low < 1.55 and high > 2.9


def test_a_run_of_one_row_is_seen(tmp_path, monkeypatch):
    """A line of one point has no length: it gets a dot."""
    one, two = (write_run(tmp_path / name, rows) for name, rows in (("one", [row(1)]), ("two", [row(1), row(2)])))
    dots = lambda fig: [line.get_marker() for axis in fig.axes for line in axis.lines if len(line.get_xdata()) == 1]
    assert dots(curves.figure(one)) == ["."] * 9 and dots(curves.figure(two)) == []
    assert dots(show.overlay([str(one), str(two)])) == ["."] * 3
    for fig in (
        curves.figure(one),
        show.overlay([str(one)] * 2),
    ):  # and numbers of many digits below the axis do not touch
        fig.canvas.draw()
        boxes = [[label.get_window_extent() for label in axis.get_xticklabels()] for axis in fig.axes[:3]]
        assert all(a.x1 < b.x0 for labels in boxes for a, b in zip(labels, labels[1:], strict=False))
    monkeypatch.chdir(one)
    assert curves.label(".", CONFIG) == "one (d=32, E=4, k=2)"


def test_nothing_to_show_is_said(tmp_path):
    with pytest.raises((ValueError, SystemExit), match="holds no metrics.jsonl"):
        show.main([str(tmp_path)])
    with pytest.raises(SystemExit, match="has logged no training step yet"):
        curves.main([str(write_run(tmp_path / "empty", []))])
    (tmp_path / "empty" / "metrics.jsonl").write_text('{"step": 1, "val_loss": 4}\n' + json.dumps(row(1))[:-5] + "\n")
    with pytest.raises((ValueError, SystemExit), match="empty/metrics.jsonl:2 is damaged"):
        show.main([str(tmp_path / "empty")])
    (tmp_path / "empty" / "metrics.jsonl").write_text(json.dumps(row(1)) + "\n")
    with pytest.raises(SystemExit, match="error: .*No such file or directory: '/nonexistent"):
        curves.main([str(tmp_path / "empty"), "--out=/nonexistent/curves.png"])
    settings = tmp_path / "empty" / "config.json"
    for damage, message in (
        (lambda: settings.write_text("{"), "config.json is damaged"),
        (settings.unlink, "holds no con"),
    ):
        damage()
        with pytest.raises(SystemExit, match=f"empty.*{message}"):
            curves.main([str(tmp_path / "empty")])


def test_only_a_torn_last_line_is_left_out(run):
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines) + lines[0][:-9])
    assert [r["step"] for r in curves.read(run)[1]] == [1, 2, 3]
    for damage in (b"5\n", lines[0][:9] + b"\n", b"\xff\n"):
        (run / "metrics.jsonl").write_bytes(lines[0] + damage + b"".join(lines[1:]))
        with pytest.raises(ValueError, match="metrics.jsonl:2"):
            curves.read(run)


def test_tokens_are_what_was_read(run):
    """Where rows count them, whatever the configured batch is; older validations take the row of their step."""
    lines = [row(2) | {"tokens": 1_000_000}, {"step": 2, "val_loss": 4.9}, row(4) | {"tokens": 9_000_000}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loss = curves.figure(run).axes[0]
    assert list(loss.lines[0].get_xdata()) == [1, 9] and list(loss.lines[1].get_xdata()) == [1]
    assert list(show.overlay([str(run)] * 2).axes[0].lines[0].get_xdata()) == [1, 9]
    settings = json.loads((run / "config.json").read_text())
    (run / "metrics.jsonl").write_text(json.dumps(row(3)) + "\n")  # written before rows had a count
    assert curves.read(run)[1][0]["tokens"] == 3 * settings["batch_size"] * settings["seq_len"]


def test_training_goes_on_where_no_process_can_be_started(run, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(run))  # no nice
    pictures = curves.Curves(run)
    pictures.refresh(), pictures.close()
    assert "curves.png was not drawn" in capsys.readouterr().out and not (run / "curves.png").exists()


def test_redrawn_beside_training(run, capsys, monkeypatch):
    pictures = curves.Curves(run)
    pictures.refresh()
    first = pictures.process
    pictures.refresh()  # the first still draws: nothing new is started, and nobody waited
    assert pictures.process is first and first.returncode is None
    pictures.close()
    assert pictures.process is not first and pictures.process.returncode == 0 and (run / "curves.png").exists()
    monkeypatch.setattr(curves.importlib.util, "find_spec", lambda name: None)
    capsys.readouterr()
    without = curves.Curves(run)
    without.refresh(), without.refresh(), without.close()
    assert capsys.readouterr().out.count("pip install") == 1 and without.process is None


GRPO_CONFIG = {"group_size": 5, "task": "reasoning", "model": "runs/x"}


def grpo_row(step):
    return {"step": step, "reward": 0.1 * step, "loss": 0.0, "kl": 1e-3, "grad_norm": 0.5, "answer_tokens": 40.0}


def test_a_run_of_grpo(tmp_path):
    """Reward, KL, gradient norm and length by step, with the tests on unseen questions."""
    run = write_run(tmp_path / "run", [{"step": 0, "test_reward": 0.05}, grpo_row(1), grpo_row(2)])
    (run / "config.json").write_text(json.dumps(GRPO_CONFIG))
    fig = curves.figure(run)
    assert [axis.get_title().split()[0] for axis in fig.axes] == ["share", "KL", "gradient", "length"]
    reward = fig.axes[0]
    assert len({line.get_color() for line in reward.lines}) == 2
    assert [list(line.get_ydata()) for line in reward.lines] == [[0.1, 0.2], [0.05]]
    assert list(reward.lines[1].get_xdata()) == [0] and reward.get_xlabel() == "step"
    assert curves.label(run, GRPO_CONFIG) == "run (reasoning, groups of 5)"


def test_training_draws_its_curves(data_dir, tmp_path):  # noqa: F811
    train_run(data_dir, tmp_path / "out", "--curves=true", "--steps=4")
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    config, rows, val = curves.read(tmp_path / "out")
    for r in rows:
        assert len(r["router_entropy"]) == 2 and all(0.5 < h <= math.log(4) + 1e-6 for h in r["router_entropy"])
        assert [len(layer) for layer in r["load"]] == [4, 4] and [max(layer) for layer in r["load"]] == pytest.approx(
            r["load_max"], abs=1e-3
        )
        assert all(sum(layer) == pytest.approx(4, abs=0.01) for layer in r["load"])
