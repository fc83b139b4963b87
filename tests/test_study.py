"""The study: one run and the sweep around it. Run: python -m pytest tests/test_study.py (CPU, half a minute)"""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from data import facts, reasoning, shards
from data.loader import Loader
from optimoe import checkpoint
from optimoe.sizes import count_params
from study import execute as run
from study import results, sweep, verdict
from study.execute import Run, execute, key
from tests.evalrun import tiny_run  # noqa: F401
from tests.studyrows import TINY, fake, swept


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def row(cache):
    return execute(TINY, cache, "cpu", n=4, keep=cache / "kept")


# ---- one run


def test_a_run_is_measured_everywhere_and_learns(row, cache):
    assert [point["step"] for point in row["points"]] == [10, 20] and row["step"] == 40 and not row["diverged"]
    losses = [point["val_loss"] for point in (*row["points"], row)]
    assert (
        losses[-1] < losses[0] - 0.5 and abs(row["train_loss"] - row["val_loss"]) < 0.8
    )  # the data is new; two steps are noisy
    assert row["problems"]["by_steps"].keys() == {"1", "2", "3"} and row == json.loads(json.dumps(row))
    assert (
        row["tpp"] == pytest.approx(TINY.tokens / row["params"]["total"], rel=1e-5)
        and row["flops"] > 0
        and row["revision"]
    )
    assert row["skipped_steps"] == 0 and row["mano"]["chance"] >= 0.2  # modulo 5
    assert row["bits"]["possible"] > 0 and row["facts"]["people"] == 20 and len(json.dumps(row)) < 10_000
    kept = checkpoint.load_model(cache / "kept")
    assert kept.cfg.n_experts == 4 and (cache / "kept" / "config.json").exists()


def test_the_same_run_gives_the_same_numbers_and_another_seed_does_not(row, cache):
    times = ("train_seconds", "seconds", "tokens_per_s", "date")
    again = execute(TINY, cache, "cpu", n=4)
    assert {k: v for k, v in again.items() if k not in times} == {k: v for k, v in row.items() if k not in times}
    assert key(TINY) == row["key"] != key(dataclasses.replace(TINY, seed=1))


def test_runs_trained_side_by_side_are_the_same_runs(row, cache):
    other = dataclasses.replace(TINY, seed=1, lr=5e-3)
    rows = run.execute_together([other, TINY], cache, "cpu", n=4)
    measured = ("train_loss", "val_loss", "facts", "problems", "mano", "points")
    assert {name: rows[1][name] for name in measured} == {name: row[name] for name in measured}
    assert rows[0]["key"] == key(other) and rows[0]["train_loss"] != row["train_loss"] and rows[0]["together"] == 2
    assert run.form(other) == run.form(TINY) != run.form(dataclasses.replace(TINY, n_experts=8))


def test_samples_are_the_first_part_of_the_data_once_and_targets_follow_tokens(cache):
    sources = run.prepare_data(TINY, cache)
    samples = run.Samples(TINY, sources, "cpu")
    flat = torch.cat([torch.from_numpy(shard.astype("int64")) for shard in shards.open_shards(sources[0][0], "train")])
    assert sorted(samples.starts_SB.flatten().tolist()) == [96 * i for i in range(160)]  # 40 steps of 4 windows
    start = int(samples.starts_SB[7, 2])
    tokens, targets = samples.batch(torch.tensor([7]))
    assert (
        tokens[2].tolist() == flat[start : start + 96].tolist()
        and targets[2].tolist() == flat[start + 1 : start + 97].tolist()
    )
    with pytest.raises(ValueError, match="data_tokens"):
        run.Samples(dataclasses.replace(TINY, tokens=2**14, data_tokens=2**20), sources, "cpu") and run.Samples(
            dataclasses.replace(TINY, tokens=2**20, data_tokens=2**20), sources, "cpu"
        )


def test_the_training_step_is_that_of_train_py(cache):
    """Two steps by hand on the same windows give the same weights."""
    cfg = run.train_config(TINY, 1344)
    trainer = run.Trainer([cfg], [run.Samples(TINY, run.prepare_data(TINY, cache), "cpu")], "cpu")
    torch.manual_seed(cfg.seed)
    model = run.GPT(cfg)
    optimizer = run.make_optimizer(model, cfg)
    for step in range(2):
        optimizer.set_lr(run.lr_at(step, cfg))
        run.optimizer_step(
            model, optimizer, cfg, run.new_window(cfg, "cpu"), [trainer.samples[0].batch(torch.tensor([step]))]
        )
    trainer.advance(2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trainer.models[0].parameters(), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_recorded_steps_are_plain_steps(cache):
    """Twelve steps of two models, nine of them replayed on two branches, follow the same losses as twelve plain ones of each: data, rate and position
    move on inside the graph."""
    cfg, samples = run.train_config(TINY, 1344), run.Samples(TINY, run.prepare_data(TINY, cache), "cuda")
    cfgs = [cfg, dataclasses.replace(cfg, seed=1)]
    trainer = run.Trainer(cfgs, [samples] * 2, "cuda")
    both = [[loss for loss, _ in trainer.advance(step)] for step in range(1, 13)]
    for i in range(2):
        plain = run.Trainer(cfgs[i : i + 1], [samples], "cuda")
        plain.run_step = plain._step
        losses = [plain.advance(step)[0][0] for step in range(1, 13)]
        assert [pair[i] for pair in both] == pytest.approx(losses, rel=3e-2) and losses[-1] < losses[0] - 0.3
        assert int(trainer.positions[i]) == int(plain.positions[0]) == 12


def test_mixture_has_the_tokens_and_the_different_problems_it_is_asked_for(tmp_path):
    asked = dataclasses.replace(TINY, data_tokens=2**18, seq_len=256, batch=1, unique=50)
    meta = shards.read_meta(run.prepare_data(asked, tmp_path)[0][0])
    assert 1 <= meta["splits"]["train"]["tokens"] / 2**18 < 1.12
    assert meta["procedural"]["n_problems"] == 50 and meta["procedural"]["repeats"] > 10


def test_text_runs_follow_the_weights_of_their_sources(cache, tmp_path):
    first = run.prepare_data(TINY, cache)[0][0]
    second = run.prepare_data(dataclasses.replace(TINY, seed=1), tmp_path)[0][0]
    text = dataclasses.replace(TINY, data=f"{first}:3,{second}:1")
    samples = run.Samples(text, run.parse_sources(text.data), "cpu")
    border = len(Loader([(first, 1)], "train", 1, 96).sources[0].maps[0])
    assert int((samples.starts_SB < border).sum()) == 120 and samples.starts_SB.shape == (40, 4)


def test_task_loss_of_text_models(tiny_run, monkeypatch):  # noqa: F811
    monkeypatch.setenv("OPTIMOE_EVALDATA", str(tiny_run))
    found = run.measure_text(checkpoint.load_model(tiny_run), tiny_run / "data", 2)
    assert found.keys() == set(run.REAL_TASKS) and 0 <= found["hellaswag"]["accuracy"] <= 1
    assert all(
        5 < task["loss"] < 20 and task["items"] == 2 for task in found.values()
    )  # about 8 bits per byte: it knows nothing


def test_seeds_differ_in_everything_and_experts_in_nothing_but_the_model():
    at = lambda **fields: run.mixture(Run(**fields))  # noqa: E731
    other = Run(n_experts=256, top_k=8, lr=1.0, init_std=0.1, d_model=64)
    assert run.data_dir(Run(), "c") == run.data_dir(other, "c") != run.data_dir(Run(seed=1), "c")
    zero, one = at(), at(seed=1)
    assert not {p.name for p in facts.people(zero.facts)[:500]} & {p.name for p in facts.people(one.facts)[:500]}
    assert reasoning.problem(zero.reasoning, 0) != reasoning.problem(one.reasoning, 0) and zero.seed != one.seed
    longer = run.mixture(sweep.sized(2**26))
    assert facts.people(longer.facts)[:500] == facts.people(zero.facts)[:500]  # those whom recall asks about


def test_no_problem_that_is_asked_has_a_template_that_was_trained():
    cfg = run.mixture(Run()).reasoning
    trained = {reasoning.problem(cfg, i).template for i in range(4000)}
    asked = {reasoning.problem(cfg, i, "test", steps).template for steps in range(1, 13) for i in range(50)}
    assert len(trained) > 1000 and not trained & asked
    trained = {reasoning.mano(cfg, i).question for i in range(4000)}
    assert not trained & {reasoning.mano(cfg, i, "test", length).question for length in (2, 3) for i in range(200)}


def test_recall_asks_about_people_whom_training_met(cache):
    sources = run.prepare_data(TINY, cache)
    samples = run.Samples(TINY, sources, "cpu")
    text = run.tokenizer.load(sources[0][0]).decode(samples.ids.tolist())
    cfg = run.mixture(TINY)
    assert (
        min(text.count(person.name) for person in facts.people(cfg.facts)) >= cfg.exposures - 3 >= 3
    )  # 15,360 of 17,000 tokens


# ---- the sweep


def test_sweep_runs_what_is_missing_and_survives_a_torn_line(tmp_path):
    file, runs = tmp_path / "r.jsonl", sweep.smoke("")[:1]
    assert sweep.sweep(runs, file, 5, tmp_path / "cache", items=2) == 0
    assert [r["key"] for r in results.read(file)] == [key(runs[0])]
    with open(file, "a") as torn:
        torn.write('{"key": "')
    assert sweep.sweep(runs, file, 5, tmp_path / "cache", items=2) == 0  # starts no process: nothing is missing
    diverged = tmp_path / "diverged.jsonl"
    results.append(diverged, results.read(file)[0] | {"diverged": True})
    assert sweep.sweep(runs, diverged, 5, tmp_path / "cache", items=2, keep=["all"]) == 0
    assert len(results.read(diverged)) == 1  # again it would have no weights
    (tmp_path / "cache/weights" / key(runs[0])).mkdir(parents=True)  # as of a run that was cut off before it wrote them
    for _ in range(2):  # finished without weights: run again for them, once
        assert sweep.sweep(runs, file, 5, tmp_path / "cache", items=2, keep=["E2k1"]) == 0
    assert checkpoint.find(tmp_path / "cache/weights" / key(runs[0]))
    results.append(file, results.read(file)[0] | {"key": "x"})
    assert [r["key"] for r in results.read(file)] == [key(runs[0]), key(runs[0]), "x"]


ROW = fake(Run(lr=6e-3), lambda c, tpp: (0.5, 0.5, 1))


def test_a_last_line_is_kept_when_whole_dropped_when_torn_and_refused_when_of_another_file(tmp_path):
    file, line = tmp_path / "r.jsonl", json.dumps(ROW)
    for content, kept in ((line, 1), (line + "\n" + line, 2), (line + "\n" + line[:50], 1), (line[:3], 0), ("", 0)):
        file.write_text(content)
        assert len(results.read(file)) == kept
        results.append(file, ROW)
        assert file.read_text() == (kept + 1) * (line + "\n")
    foreign = (
        ("notes", "line 1: not JSON"),
        ("nonsense\n" + line, "line 1: not JSON"),
        (line + "\nmore", "line 2: not JSON"),
        ("5\n", "line 1: not a row"),
        (line + '\n{"a": 1}\n', "line 2: not a row of such a results file, it lacks key, run"),
    )
    for content, message in foreign:
        file.write_text(content)
        with pytest.raises(ValueError, match=f"r.jsonl, {message}"):
            results.read(file)
        if not content.endswith("\n") and not content.endswith(line):
            with pytest.raises(ValueError, match=f"r.jsonl, {message}"):
                results.append(file, ROW)
        assert file.read_text() == content
    with pytest.raises(FileNotFoundError, match="none.jsonl: no such results file"):
        results.read(tmp_path / "none.jsonl")
    assert results.read(tmp_path / "none.jsonl", optional=True) == []


def test_several_writers_of_one_file_lose_nothing(tmp_path):
    """Threads stand for processes: each append opens the file, and the lock belongs to what was opened."""
    file = tmp_path / "r.jsonl"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: results.append(file, ROW), range(200)))
    assert len(results.read(file)) == 200


def test_bad_options_are_refused(tmp_path, monkeypatch):
    refused = (
        ("mian", "preset='mian'"),
        ("smoke --keep=E2k1,E3k2", "keep='E2k1,E3k2'"),
        ("smoke --minutes=-1", "minutes=-1.0: use 0"),
        ("smoke --minutes=nan", "minutes=nan"),
        ("smoke --jobs=-1", "jobs=-1: use 1"),
        ("smoke --items=0", "items=0: use 1"),
        ("smoke --together=-1", "together=-1: use 1"),
        (f"text --data={tmp_path}", f"data='{tmp_path}': {tmp_path} holds no meta.json"),
        (f"smoke --results={tmp_path}", "Is a directory"),
        (
            "smoke --minutes=1 --results=/dev/null/r.jsonl",
            "results='/dev/null/r.jsonl': nothing can be written to /dev/null",
        ),
        (
            f"smoke --minutes=1 --results={tmp_path}/r.jsonl --cache=/dev/null/c",
            "cache='/dev/null/c': nothing can be written to /dev/null/c",
        ),
    )
    monkeypatch.setattr(sweep.multiprocessing, "get_context", None)  # no worker may be started
    for words, message in refused:
        with pytest.raises(SystemExit, match=message):
            sweep.cli(["--minutes=0", "--device=cpu", *words.split()])


def test_smoke_is_no_part_of_the_study(monkeypatch):
    files = []
    monkeypatch.setattr(sweep, "sweep", lambda runs, results, *rest: files.append(results))
    for words in (["smoke"], ["main"], ["smoke", "--results=r.jsonl"]):
        sweep.cli([*words, "--device=cpu"])
    assert files == ["runs/study/smoke.jsonl", "study/results.jsonl", "r.jsonl"]


def test_runs_that_turn_out_equal_are_counted_once(tmp_path, capsys):
    """At E=32, k=2 the run of `init` with the usual weights takes the best rate, and is then one of `main`."""
    file, same = tmp_path / "r.jsonl", lambda run: (run.n_experts, run.top_k, run.init_std) == (32, 2, Run.init_std)  # noqa: E731
    for row in (rows := swept(lambda c, tpp: (0.5 - 0.1 * abs(math.log2(c.lr / 6e-3)), 0.5, 1))):
        if same(Run(**row["run"])):
            results.append(file, row)
    plan = [r for name in ("main", "init") for r in sweep.PRESETS[name]("") if same(r) and r.tokens == 2**24]
    assert len(plan) == 12 and len(rows) > 9 and sweep.sweep(plan, file, 0) == 0
    assert "all 9 runs are finished" in capsys.readouterr().out


def test_ctrl_c_ends_the_workers_and_says_what_is_left(tmp_path):
    command = [
        sys.executable,
        "-m",
        "study.sweep",
        "smoke",
        "--device=cpu",
        "--items=2000",
        f"--results={tmp_path}/r.jsonl",
        f"--cache={tmp_path}/cache",
    ]
    process = subprocess.Popen(
        command, cwd=run.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    first = process.stdout.readline()
    time.sleep(1.5)  # workers are starting
    os.killpg(process.pid, signal.SIGINT)
    text = first + process.communicate(timeout=60)[0]
    assert (
        process.returncode == 128 + signal.SIGINT and "Traceback" not in text and text.count("2 of 2 runs left") == 2
    ), text


def test_a_run_that_fails_leaves_the_others_alone(tmp_path, capsys):
    good = sweep.smoke("")[0]
    bad, homeless = (
        dataclasses.replace(good, data=str(tmp_path / "none")),
        dataclasses.replace(good, seed=2, max_steps=60),
    )  # too few names for these
    assert sweep.sweep([bad, homeless, good], tmp_path / "r.jsonl", 5, tmp_path / "cache", items=2) == 2
    assert [r["key"] for r in results.read(tmp_path / "r.jsonl")] == [key(good)]
    assert "no data" in (text := capsys.readouterr().out) and "2 failed" in text


def test_learning_rate_is_the_best_of_the_same_experts_and_k():
    rows = swept(lambda c, tpp: (0.5 - 0.1 * abs(math.log2(c.lr / (3e-3 if c.n_experts == 256 else 6e-3))), 0.5, 1))
    rate = lambda rows, **fields: sweep.best_rate(Run(**fields), sweep.comparisons(rows))  # noqa: E731
    assert (
        rate(rows, n_experts=256, top_k=8) == 3e-3 and rate(rows, n_experts=128, top_k=8) == 6e-3
    )  # neighbours do not matter
    assert (
        rate(rows, n_experts=512, top_k=8) == 3e-3
        and rate(rows, n_experts=512, top_k=8, tokens=2**26, data_tokens=2**26, people=16_000) == 3e-3
    )
    assert rate(rows, d_model=64, n_experts=8) is None and rate(rows, optimizer="adamw", n_experts=8) is None
    scarce = [
        fake(Run(n_experts=256, top_k=8, unique=1_000, lr=lr, seed=seed), lambda c, tpp: (10 * c.lr, 0.5, 1))
        for lr in (3e-3, 6e-3)
        for seed in (0, 1)
    ]
    assert (
        rate(rows + scarce, n_experts=256, top_k=8, unique=1_000) == 6e-3
        and rate(rows + scarce, n_experts=256, top_k=8) == 3e-3
    )  # same data first
    assert rate(rows + scarce, n_experts=256, top_k=8, unique=500) == 3e-3
    lonely = [
        fake(Run(n_experts=8, top_k=2, batch=16, lr=1.2e-2), lambda c, tpp: (0.9, 0.9, 0.1))
    ]  # one rate is no comparison
    assert rate(rows + lonely, n_experts=8, top_k=2) == 6e-3
    fewer = [
        row for row in rows if row["lr"] == 6e-3 or row["run"]["seed"] == 0
    ]  # the others did not run from all seeds
    assert rate(fewer, n_experts=8, top_k=2) is None


def test_plans_take_their_rates_when_these_are_known_and_are_done_once():
    rows = swept(lambda c, tpp: (0.5 - 0.1 * abs(math.log2(c.lr / 6e-3)), 0.5, 1))
    plan = [Run(n_experts=256, top_k=8, unique=1_000), Run(n_experts=8, top_k=2)]
    (settled,) = sweep.settle(plan, rows)  # the second is a run of the sweep
    assert settled == dataclasses.replace(plan[0], lr=6e-3) and sweep.settle(plan, rows, [settled]) == []
    most = [row for row in rows if (row["run"]["n_experts"], row["run"]["top_k"], row["lr"]) != (256, 8, 3e-3)]
    pending = [r for r in sweep.main("") if (r.n_experts, r.top_k, r.lr) == (256, 8, 3e-3)]
    assert sweep.settle(plan[:1], most, pending) == plan[:1] and sweep.settle(plan[:1], most) == [settled]
    assert (
        sweep.choose(plan[:1], most, math.inf, "CPU") is None
        and sweep.choose([plan[0], settled], most, math.inf, "CPU") == settled
    )
    assert sweep.choose([settled], rows, -math.inf, "NVIDIA fake") is None  # no time left
    grid = sweep.main("")
    group = sweep.choose_group(grid, rows, math.inf, "CPU", 3)
    assert len({run.form(r) for r in group}) == 1 and [(r.seed, r.lr) for r in group] == [
        (0, rate) for rate in sweep.RATES["muon"]
    ]
    assert len(sweep.choose_group(grid, rows, time.monotonic() + 25, "NVIDIA fake", 3)) == 2  # ten seconds each
    assert sweep.estimate(sweep.sized(2**26), rows, "NVIDIA fake") == pytest.approx(2 + 8 * 4)


def test_rates_are_chosen_by_answers_of_both_abilities():
    row = fake(Run(lr=6e-3), lambda c, tpp: (0.5, 0.5, 1))
    losses = lambda facts, problems, mano: (
        row | {"facts": {"loss": facts}, "problems": {"loss": problems}, "mano": {"loss": mano}}
    )  # noqa: E731
    assert results.answer_loss(losses(1.0, 0.1, 1.3)) == pytest.approx(0.5 + 0.35)
    assert results.answer_loss(losses(1.0, 0.006, 1.4)) < results.answer_loss(
        losses(1.5, 0.002, 1.4)
    )  # what the geometric mean got wrong
    assert results.answer_loss(row | {"diverged": True}) == math.inf
    measured = results.read(run.ROOT / "study/results.jsonl")
    first = [row for row in measured if row["date"] < "2026-11-27 12"]
    assert sweep.best_rate(Run(n_experts=32), sweep.comparisons(first)) == 3e-3


def test_rows_planned_without_a_rate_become_the_runs_that_they_were(tmp_path):
    new = fake(Run(lr=6e-3), lambda c, tpp: (0.5, 0.5, 1))
    old = new | {"key": key(Run()), "run": new["run"] | {"lr": 0.0}}
    file = tmp_path / "r.jsonl"
    for row in (old, new | {"train_loss": 9}, new | {"key": "x"}):
        results.append(file, row)
    rows = results.read(file)
    assert rows[0] == json.loads(json.dumps(new)) and rows[2] == json.loads(json.dumps(new)) | {"key": "x"}
    assert results.distinct(rows) == [rows[0], rows[2]] and results.repeats(rows) == [(rows[0], rows[1])]
    assert "1 are runs done again" in verdict.tables(rows[:2])
    kept = results.read(run.ROOT / "study/results.jsonl")
    assert all(row["run"]["lr"] == row["lr"] and row["key"] == key(Run(**row["run"])) for row in kept)


def test_grids_cover_what_they_promise():
    grid = sweep.main("")
    assert (
        {r.n_experts for r in grid} == {4, 8, 16, 32, 64, 128, 256}
        and {r.top_k for r in grid} == {1, 2, 4, 8}
        and len(grid) == 3 * 27 * 4
    )
    assert {r.lr for r in grid if r.tokens == 2**24} == {3e-3, 6e-3, 1.2e-2} and {
        r.lr for r in grid if r.tokens == 2**26
    } == {0}
    assert len({*grid, *sweep.lr("")}) == len(grid) + len(sweep.lr("")) == 3 * 27 * 5
    tpp = [r.tokens / count_params(run.train_config(r, 1344, 1e-3)).total for r in grid]
    assert min(tpp) < 1 and max(tpp) > 60
    for r in (
        *grid,
        *sweep.long(""),
        *sweep.scarce(""),
        *sweep.topk(""),
    ):  # each person is met as often, and data is as long as the training
        assert r.data_tokens == r.tokens and run.mixture(r).exposures == 30
    assert {(run.mixture(r).n_problems, r.tokens) for r in (*grid, *sweep.scarce(""))} == {
        (4000, 2**24),
        (4000, 2**26),
        (1000, 2**24),
    }
    keys = [key(r) for r in dict.fromkeys(sweep.full(""))]
    assert set(keys) == {key(r) for name in ("main", "lr", "scarce", "topk", "init") for r in sweep.PRESETS[name]("")}
    assert (
        all(r.tokens == 2**24 and r.lr for r in sweep.full("")[: 3 * 81 + 39])
        and sweep.full("")[3 * 81 + 39].tokens == 2**26
    )
    plan = list(dict.fromkeys(sweep.full("")))
    last = {
        k: max(i for i, r in enumerate(plan) if r.lr and r.top_k == k and r.d_expert == 64 and r.tokens == 2**24)
        for k in (2, 8)
    }
    assert all(i > last[r.top_k] for i, r in enumerate(plan) if not r.lr and r.top_k in last)  # rates first
    assert {key(r) for r in sweep.pilot("")} == {
        row["key"] for row in results.read(run.ROOT / "docs/runs/study-pilot.jsonl")
    }
    for group in ({2048}, {8192}):
        same = {
            tuple(count_params(run.train_config(r, 1344))[i] for i in (0,))
            for r in sweep.topk("")
            if {r.n_experts * r.d_expert} == group
        }
        assert max(same)[0] - min(same)[0] < 0.06 * min(same)[0]  # the routers differ
    assert all(r.data == "d:1" for r in sweep.text("d:1"))
    with pytest.raises(ValueError, match="--data"):
        sweep.text("")
