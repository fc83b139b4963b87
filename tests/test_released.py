"""study.released on tiny random checkpoints under the paper's names, from a hub on the loopback interface.
Run: python -m pytest tests/test_released.py (CPU, 30 s)"""

import json
import re

import pytest
import torch

from data import files, tokenizer
from eval import __main__ as evaluation
from model import GPT, ModelConfig
from optimoe import hf, hub
from study import paperfigures, released
from tests.evalrun import write
from tests.loopback import Hub
from tests.test_hub import point_to

pytest.importorskip("safetensors")
pytest.importorskip("huggingface_hub")
FIRST, SECOND = "math-d512-E8-k2", "math-d512-E16-k2"


def name_of(short):
    return next(m.name for family in released.FAMILIES for m in all_models(family) if m.short == short)


def all_models(family="math"):
    return released.models(released.ReleasedConfig(family=family))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base, enc = tmp_path_factory.mktemp("models"), tokenizer.encoding({bytes([b]): b for b in range(256)})
    for seed, short in enumerate((FIRST, SECOND, "code-d512-E8-k2")):
        torch.manual_seed(seed)
        sizes = dict(d_model=32, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=16, n_experts=8, top_k=2, d_expert=32)
        model = GPT(ModelConfig(vocab_size=320, seq_len=96, init_std=0.2, **sizes), draw=False)
        for weight in model.parameters():
            weight.data.normal_(std=0.2)
        hf.save_model(model, base / short, eos=enc.eot_token)
        hf.save_tokens(enc, base / short)
    return base


@pytest.fixture
def work(folders, tmp_path, monkeypatch):
    """A hub that has these models, and run(*flags), which calls study.released."""
    server = Hub({name_of(path.name): path for path in folders.iterdir()})
    point_to(server, tmp_path, monkeypatch)
    answer = "So {0}.\n#### {0}"
    for split in ("test", "train"):
        write(tmp_path / f"eval/gsm8k/{split}.jsonl",
              [{"question": f"{i} eggs?", "answer": answer.format(i)} for i in range(6)])  # fmt: skip
    write(tmp_path / "eval/gsm_plus/gsmplus_testmini.jsonl",
          [{"question": f"{i} figs?", "solution": answer.format(i), "answer": str(i), "perturbation_type": "p"}
           for i in range(7)])  # fmt: skip
    write(tmp_path / "eval/hellaswag/val.jsonl",
          [{"activity_label": "A", "ctx_a": f"b{i}", "ctx_b": "c", "label": "1", "endings": ["d", "ef", "g", "h"]}
           for i in range(6)])  # fmt: skip
    write(tmp_path / "eval/triviaqa/rc_wikipedia_nocontext_val.jsonl",
          [{"question_id": f"q{i}", "question": f"Who {i}", "value": f"X{i}", "aliases": [f"X{i}"]}
           for i in range(6)])  # fmt: skip

    def run(*flags):
        hub.folder.cache_clear()
        usual = [
            "--limit=2",
            "--device=cpu",
            "--own=",
            f"--evaldata={tmp_path / 'eval'}",
            "--grid=d512-E8-k2,d512-E16-k2",
        ]
        released.main([*usual, f"--results={tmp_path / 'rows.jsonl'}", f"--out={tmp_path / 'out'}", *flags])
        return files.read_rows(tmp_path / "rows.jsonl")[0] if (tmp_path / "rows.jsonl").exists() else []

    yield run, server, tmp_path
    server.server.shutdown()


def test_names_are_the_published_ones():
    names = [model.name for model in all_models()]
    assert len(names) == len(set(names)) == 65 and names[0] == "llm-jp/optimal-sparsity-math-d512-E8-k2-320M-A170M"
    for known in ("code-d512-E16-k8-520M-A320M", "code-d1024-E64-k8-6.7B-A1.1B"):
        assert f"llm-jp/optimal-sparsity-{known}" in [model.name for model in all_models("code")]
    unit = lambda text: float(text[:-1]) * {"M": 1e6, "B": 1e9}[text[-1]]
    for model in all_models():
        total, active = re.search(r"-([\d.]+[MB])-A([\d.]+[MB])$", model.name).groups()
        assert unit(total) == pytest.approx(model.params.total, rel=0.03)
        assert unit(active) == pytest.approx(model.params.active, rel=0.03)


def test_from_download_to_figures(work, capsys, monkeypatch):
    run, server, tmp_path = work
    assert run("--plan") == [] and server.asked == []
    printed = capsys.readouterr().out
    assert "0 models are done, 2 are left: 1.7 GB to download" in printed

    with pytest.raises(ValueError, match=r"calibration: bits/token of math-d512-E8-k2 is .* should be 1.4509. Check"):
        run()
    found = hub.place(name_of(FIRST)).exists(), (tmp_path / "rows.jsonl").exists()
    assert found == (True, False)
    # With what these weights give in its place, the calibration passes, once.
    truth = files.read_json(tmp_path / f"out/{FIRST}-calibration/results.json")["tasks"]["gsm8k"]["metrics"]
    known = {metric: 1.009 * truth[metric]["mean"] for metric in ("bits/token", "bits/byte")}
    monkeypatch.setattr(released, "CALIBRATION", (FIRST, known))

    # A kill in the middle of the second model.
    real, calls = evaluation.generate_and_score, []

    def killed(loaded, task, *others):
        calls.append(task.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(loaded, task, *others)

    monkeypatch.setattr(evaluation, "generate_and_score", killed)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert not hub.place(name_of(FIRST)).exists() and hub.place(name_of(SECOND)).exists()
    monkeypatch.setattr(evaluation, "generate_and_score", real)
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"model": "torn')
    rows, asked = run(), len(server.asked)
    assert [row["model"] for row in rows] == [f"{FIRST} calibration", FIRST, SECOND]
    assert not hub.place(name_of(SECOND)).exists()
    for row in rows[1:]:
        assert list(row["tasks"]) == list(released.FAMILIES["math"]) and row["limit"] == 2
        assert all(done["items"] == 2 for done in row["tasks"].values())
        assert [done["shots"] for done in row["tasks"].values()] == [4, 4, 4, 5]
    assert rows[1]["params"] == 320_160_256 and rows[1]["tpp"] == pytest.approx(390, rel=1e-2)
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert pictures == [f"figure-{number}-math.png" for number in (1, 5, 7)]
    assert "figure 2: no row of the paper's models has a train_loss" in capsys.readouterr().out
    assert run() == rows and len(server.asked) == asked  # nothing is done twice
    assert "2 models are done, 0 are left: 0.0 GB to download, no time" in capsys.readouterr().out


def test_a_plan_changes_no_file(tmp_path):
    path, words = tmp_path / "rows.jsonl", [f"--out={tmp_path}", "--own="]
    path.write_text("a letter to a friend")
    with pytest.raises(ValueError, match="rows.jsonl, line 1: not JSON"):
        released.main(["--plan", f"--results={path}", *words])
    path.write_text(json.dumps(files.sign({"model": "x", "limit": 0, "tasks": {}})) + '\n{"model": "torn')
    before = path.read_bytes()
    released.main(["--plan", f"--results={path}", *words])
    assert path.read_bytes() == before


def test_what_was_there_stays_and_what_is_missing_is_named(work, capsys):
    run, server, tmp_path = work
    hub.folder(name_of(FIRST), "hf")
    del server.models[name_of(SECOND)]
    with pytest.raises(SystemExit, match="error: 1 of 2 models were not evaluated; the same command") as failed:
        run("--calibrate=false", "--limit=1")
    reason = f"hf='{name_of(SECOND)}': neither a directory nor a model at"
    assert f"\n  {SECOND}: {reason}" in str(failed.value)  # a text as the exit status: printed last, and 1
    rows = files.read_rows(tmp_path / "rows.jsonl")[0]
    assert [row["model"] for row in rows] == [FIRST] and hub.place(name_of(FIRST)).exists()
    printed = capsys.readouterr().out
    assert reason in printed and "1 models are done, 1 are left" in printed
    assert (tmp_path / "out/README.md").exists()  # what there is was drawn
    assert "(from 1 measured)" in printed
    server.models[name_of(SECOND)] = server.models[name_of(FIRST)]
    assert [row["model"] for row in run("--calibrate=false", "--limit=1", "--keep")] == [FIRST, SECOND]
    assert hub.place(name_of(SECOND)).exists()
    assert len(run("--calibrate=false", "--grid=d512-E8-k2")) == 3  # a larger limit is another measurement


def test_models_that_do_not_fit_are_left_out(work, monkeypatch, capsys):
    run, *_ = work
    small = lambda what, least, device, remedy: released.require(least < 2e9, what, least, remedy)
    monkeypatch.setattr(released, "require_memory", small)
    run("--plan", "--dtype=bfloat16", "--grid=d512-E8,d1024-E8")
    printed = capsys.readouterr().out
    assert "0 models are done, 3 are left" in printed
    assert "they need several GPUs or one with more memory than this device: d1024-E8 (2 GB)" in printed


def test_mistakes(tmp_path):
    with pytest.raises(ValueError, match="grid='d640': no model fits"):
        released.ReleasedConfig(grid=("d640",))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"model": "x"}) + "\n")
    with pytest.raises(ValueError, match="rows.jsonl, line 1: not a row of such a results file, it lacks limit, tasks"):
        released.main([f"--results={tmp_path / 'rows.jsonl'}", "--plan"])
    with pytest.raises(ValueError, match="results='/proc/x.jsonl': nothing can be written"):  # before any download
        released.main(["--results=/proc/x.jsonl", "--grid=d512-E8-k2"])


def test_figures_of_the_study_s_own_rows(tmp_path):
    points = paperfigures.own_points("study/results.jsonl")
    assert {point.k for point in points} and all(0 < point.values["density"] <= 1 for point in points)
    drawn = paperfigures.panels(points, "train_loss", ("accuracy",))
    assert [(title, kind) for title, kind, _ in drawn] == [("facts", "accuracy"), ("problems", "accuracy")]
    for _, _, series in drawn:
        assert sum(len(pairs) for *_, pairs in series) == len(points)
