"""The study: one run and the sweep around it. Run: python -m pytest tests/test_study.py (CPU, half a minute)"""

import dataclasses
import json
import math
import os
import queue
import random
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data import facts, files, reasoning, shards, twohop
from optimoe import checkpoint
from optimoe.sizes import count_params
from study import execute as run
from study import measure, presets, results, rules, sweep
from study.execute import Run, execute, key
from study.presets import PRESETS
from tests.studyrows import TINY, fake, grid


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
    directory = run.prepare_data(TINY, cache)
    samples = run.Samples(TINY, directory, "cpu")
    flat = torch.cat([torch.from_numpy(shard.astype("int64")) for shard in shards.open_shards(directory, "train")])
    assert sorted(samples.starts_SB.flatten().tolist()) == [96 * i for i in range(160)]  # 40 steps of 4 windows
    start = int(samples.starts_SB[7, 2])
    tokens, targets = samples.batch(torch.tensor([7]))
    assert (
        tokens[2].tolist() == flat[start : start + 96].tolist()
        and targets[2].tolist() == flat[start + 1 : start + 97].tolist()
    )
    with pytest.raises(ValueError, match="data_tokens"):
        run.Samples(dataclasses.replace(TINY, tokens=2**14, data_tokens=2**20), directory, "cpu") and run.Samples(
            dataclasses.replace(TINY, tokens=2**20, data_tokens=2**20), directory, "cpu"
        )


def test_the_training_step_is_that_of_train_py(cache):
    """Two steps by hand on the same windows give the same weights."""
    cfg = run.train_config(TINY, 1344)
    trainer = run.Trainer([cfg], [run.Samples(TINY, run.prepare_data(TINY, cache), "cpu")], "cpu")
    model = run.GPT(cfg)
    optimizer = run.make_optimizer(model, cfg)
    for step in range(2):
        optimizer.set_lr(run.lr_at(step, cfg))
        run.optimizer_step(
            model, optimizer, cfg, run.new_window(cfg, "cpu"), [trainer.samples[0].batch(torch.tensor([step]))]
        )
    trainer.advance(2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trainer.models[0].parameters(), strict=True))


def test_models_of_one_seed_share_what_they_can():
    """Paired initialisation: attention, embeddings and the first experts do not depend on E or k; another seed
    changes all of them."""

    def weights(**fields):
        cfg = run.train_config(dataclasses.replace(TINY, **fields), 1344)
        return dict(run.GPT(cfg).named_parameters())

    small, large, other = weights(), weights(n_experts=8, top_k=3), weights(seed=1)
    for name, a in small.items():
        b = large[name]
        b = b if a.shape == b.shape else b[: a.shape[0]]  # the first experts, or their rows of the router
        assert torch.equal(a, b), name
        assert a.std() == 0 or not torch.equal(a, other[name]), name


@pytest.mark.parametrize("kind, unique", [("twohop", 60), ("room", 0)])
def test_facts_and_two_hop_questions_are_measured_by_the_same_names(cache, kind, unique):
    tiny = dataclasses.replace(TINY, kind=kind, unique=unique, people=16)
    found = execute(tiny, cache, "cpu", n=4)
    assert (
        found["facts"]["loss"] > 0.1
        and 0 <= found["facts"]["overall"] <= 1
        and ("problems" in found) == (kind == "twohop")
    )
    assert found["bits"]["possible"] == pytest.approx(160 * 4 if kind == "twohop" else 16 * 20)
    assert {name for name in results.TASKS if name in found} == {"facts"} | ({"problems"} if unique else set())
    model = run.GPT(run.train_config(tiny, 1344))  # an untrained model knows nothing
    fresh = measure.hops(model, run.data_dir(tiny, cache), 4, True)
    assert fresh["bits"]["values"] <= found["bits"]["values"] + 1e-9 and fresh["facts"]["loss"] > found["facts"]["loss"]
    assert twohop.read_config(run.data_dir(tiny, cache)).entities == 16


def test_runs_of_the_old_draw_are_not_run_again(cache):
    for old in (dict(paired=False), dict(data="text:1")):
        with pytest.raises(ValueError, match=f"{next(iter(old))}="):
            execute(dataclasses.replace(TINY, **old), cache, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_recorded_steps_are_plain_steps(cache):
    """Twelve steps of two models, nine of them replayed on two branches, follow the same losses as twelve plain
    ones of each: data, rate and position move on inside the graph."""
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
    meta = shards.read_meta(run.prepare_data(asked, tmp_path))
    assert 1 <= meta["splits"]["train"]["tokens"] / 2**18 < 1.12
    assert meta["procedural"]["n_problems"] == 50 and meta["procedural"]["repeats"] > 10


def test_seeds_differ_in_everything_and_experts_in_nothing_but_the_model():
    at = lambda **fields: run.mixture(Run(**fields))  # noqa: E731
    other = Run(n_experts=256, top_k=8, lr=1.0, init_std=0.1, d_model=64)
    assert run.data_dir(Run(), "c") == run.data_dir(other, "c") != run.data_dir(Run(seed=1), "c")
    zero, one = at(), at(seed=1)
    assert not {p.name for p in facts.people(zero.facts)[:500]} & {p.name for p in facts.people(one.facts)[:500]}
    assert reasoning.problem(zero.reasoning, 0) != reasoning.problem(one.reasoning, 0) and zero.seed != one.seed
    longer = run.mixture(Run(tokens=2**26, data_tokens=2**26, people=16_000))
    assert facts.people(longer.facts)[:500] == facts.people(zero.facts)[:500]  # those whom recall asks about


def test_no_problem_that_is_asked_has_a_template_that_was_trained():
    cfg = run.mixture(Run()).reasoning
    trained = {reasoning.problem(cfg, i).template for i in range(4000)}
    asked = {reasoning.problem(cfg, i, "test", steps).template for steps in range(1, 13) for i in range(50)}
    assert len(trained) > 1000 and not trained & asked
    trained = {reasoning.mano(cfg, i).question for i in range(4000)}
    assert not trained & {reasoning.mano(cfg, i, "test", length).question for length in (2, 3) for i in range(200)}


def test_recall_asks_about_people_whom_training_met(cache):
    directory = run.prepare_data(TINY, cache)
    samples = run.Samples(TINY, directory, "cpu")
    text = run.tokenizer.load(directory).decode(samples.ids.tolist())
    cfg = run.mixture(TINY)
    assert (
        min(text.count(person.name) for person in facts.people(cfg.facts)) >= cfg.exposures - 3 >= 3
    )  # 15,360 of 17,000 tokens


# ---- the sweep


def config_of(*presets_, **fields):
    return sweep.SweepConfig(presets=presets_, device="cpu", items=2, **fields)


def test_sweep_runs_what_is_missing_and_survives_a_torn_line(tmp_path, monkeypatch):
    file, runs = tmp_path / "r.jsonl", presets.smoke([])[:1]
    monkeypatch.setitem(PRESETS, "smoke", lambda rows: runs)
    cfg = config_of("smoke", results=str(file), minutes=5, cache=str(tmp_path / "cache"))
    assert sweep.sweep(cfg) == 0
    assert [r["key"] for r in results.read(file)] == [key(runs[0])] and '"crc": "' in file.read_text()
    with open(file, "a") as torn:
        torn.write('{"key": "')
    assert sweep.sweep(cfg) == 0  # starts no process: nothing is missing
    diverged = tmp_path / "diverged.jsonl"
    results.append(diverged, results.read(file)[0] | {"diverged": True})
    assert sweep.sweep(dataclasses.replace(cfg, results=str(diverged), keep=("all",))) == 0
    assert len(results.read(diverged)) == 1  # again it would have no weights
    (tmp_path / "cache/weights" / key(runs[0])).mkdir(parents=True)  # as of a run that was cut off before it wrote them
    for _ in range(2):  # finished without weights: run again for them, once
        assert sweep.sweep(dataclasses.replace(cfg, keep=("E2k2",))) == 0
    assert checkpoint.find(tmp_path / "cache/weights" / key(runs[0]))
    assert files.read_json(tmp_path / "cache/weights" / key(runs[0]) / "results.json")["key"] == key(runs[0])
    assert [r["key"] for r in results.read(file)] == [key(runs[0])] * 2


def test_a_preset_that_asks_for_more_when_rows_come_gets_it(tmp_path, monkeypatch):
    first = presets.smoke([])[0]
    more = lambda rows: [first, *(dataclasses.replace(first, seed=1) for _ in rows[:1])]  # noqa: E731
    monkeypatch.setitem(PRESETS, "smoke", more)
    cfg = config_of("smoke", results=str(tmp_path / "r.jsonl"), minutes=5, cache=str(tmp_path / "cache"))
    assert sweep.sweep(cfg) == 0
    assert [row["run"]["seed"] for row in results.read(tmp_path / "r.jsonl")] == [0, 1]


ROW = fake(Run(lr=6e-3), lambda c, tpp: (0.5, 0.5, 1))


def test_a_last_line_is_kept_when_whole_dropped_when_torn_and_refused_when_of_another_file(tmp_path):
    file, line, signed = tmp_path / "r.jsonl", json.dumps(ROW), json.dumps(files.sign(ROW))
    for content, kept in ((line, 1), (line + "\n" + line, 2), (line + "\n" + line[:50], 1), (line[:3], 0), ("", 0)):
        file.write_text(content)
        assert len(results.read(file)) == kept
        results.append(file, ROW)
        assert file.read_text() == kept * (line + "\n") + signed + "\n"
    foreign = (
        ("notes", "line 1: not JSON"),
        ("nonsense\n" + line, "line 1: not JSON"),
        (line + "\nmore", "line 2: not JSON"),
        (line + "x", "line 1: not JSON"),
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


@pytest.mark.parametrize("name", ["results", "posttrain"])
def test_no_damaged_byte_changes_what_is_read(tmp_path, name):
    """Each byte of a signed file, changed in turn: the file is refused by name, or says what it said (white space,
    1e-3 as 1E-3)."""
    from study.posttrain import ROW as POSTTRAIN

    needed = results.ROW if name == "results" else POSTTRAIN
    with open(run.ROOT / f"study/{name}.jsonl", "rb") as source:
        content = b"".join(sorted((next(source) for _ in range(40)), key=len)[:2])
    whole, rng, silent = results.parsed(content, "f", needed)[0], random.Random(1), 0
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] = rng.choice([b for b in range(256) if b != content[at]])
        try:
            silent += results.parsed(bytes(damaged), "f", needed)[0] != whole
        except ValueError as error:
            assert str(error).startswith("f, line")
    assert silent == 0


def test_a_row_without_a_checksum_is_held_to_its_key(tmp_path):
    """Rows of older code: a changed field of the run is found, and so is a checksum whose name was lost."""
    file = tmp_path / "r.jsonl"
    old = {name: value for name, value in ROW["run"].items() if name not in run.BEFORE}
    before = ROW | {"run": old, "key": key(Run(**old | run.BEFORE))}
    file.write_text(json.dumps(before) + "\n")
    (row,) = results.read(file)
    assert (
        row["run"]["paired"] is False and row["run"]["kind"] == "mixture"
    )  # what was done before these fields existed
    for change, message in (
        ({"run": old | {"seed": 7}}, "its key .* is not that of its run"),
        ({"key": "0" * 12}, "its key .* is not that of its run"),
        ({"cqc": "00000000"}, "holds 'cqc' and no checksum"),
        ({"run": old | {"colour": 1}}, "its run cannot be read"),
        ({"run": old | {"batch": 0}}, "its run cannot be read"),
    ):
        file.write_text(json.dumps(before | change) + "\n")
        with pytest.raises(ValueError, match=f"r.jsonl, line 1.*{message}"):
            results.read(file)


def test_rows_planned_without_a_rate_become_the_runs_that_they_were(tmp_path):
    old = {name: value for name, value in ROW["run"].items() if name not in run.BEFORE} | {"lr": 0.0}
    file = tmp_path / "r.jsonl"
    for row in (ROW | {"run": old, "key": "planned"}, ROW | {"train_loss": 9}):
        file.write_text((file.read_text() if file.exists() else "") + json.dumps(row) + "\n")
    rows = results.read(file)
    assert rows[0]["run"]["lr"] == 6e-3 and rows[0]["key"] == key(Run(**rows[0]["run"]))
    again = [ROW, ROW | {"train_loss": 9}]
    assert results.distinct(again) == [ROW]


def test_the_committed_rows_are_signed_and_are_what_they_say():
    for name, needed in (("study/results.jsonl", results.ROW), ("docs/runs/study-pilot.jsonl", results.ROW)):
        rows = results.read(run.ROOT / name, needed)
        assert all('"crc": "' in line for line in (run.ROOT / name).read_text().splitlines())
        assert all(row["run"]["lr"] == row["lr"] and row["key"] == key(Run(**row["run"])) for row in rows)
        assert not any(row["run"]["paired"] for row in rows if row["date"] < "2026-11-28 19")


def test_several_writers_of_one_file_lose_nothing(tmp_path):
    """Threads stand for processes: each append opens the file, and the lock belongs to what was opened."""
    file = tmp_path / "r.jsonl"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: results.append(file, ROW), range(200)))
    assert len(results.read(file)) == 200


def test_bad_options_are_refused(tmp_path, monkeypatch):
    refused = (
        ("", "presets=''"),
        ("mian", "preset='mian'"),
        ("smoke --keep=E2k2,E3k2", "keep='E2k2,E3k2'"),
        ("smoke --minutes=-1", "minutes=-1.0: use 0"),
        ("smoke --minutes=nan", "minutes='nan'"),
        ("smoke --jobs=-1", "jobs=-1: use 0"),
        ("smoke --items=0", "items=0: use 1"),
        ("smoke --together=-1", "together=-1: use 0"),
        ("smoke --devise=cpu", "did you mean 'device'"),
        (f"smoke --results={tmp_path}", "Is a directory"),
        (
            "smoke --minutes=1 --results=/dev/null/r.jsonl",
            "results='/dev/null/r.jsonl': nothing can be written to /dev/null",
        ),
        (
            f"smoke --minutes=1 --results={tmp_path}/r.jsonl --cache=/dev/null/c",
            "cache='/dev/null/c': nothing can be written",
        ),
    )
    monkeypatch.setattr(sweep.multiprocessing, "get_context", None)  # no worker may be started
    for words, message in refused:
        with pytest.raises((ValueError, OSError), match=message):
            sweep.main(["--minutes=0", "--device=cpu", *words.split()])


def test_smoke_is_no_part_of_the_study():
    file = lambda *presets_, **fields: config_of(*presets_, **fields).file  # noqa: E731
    assert file("smoke") == "runs/study/smoke.jsonl" and file("pairs") == "study/results.jsonl"
    assert file("smoke", results="r.jsonl") == "r.jsonl"


def start(tmp_path, *words):
    """A sweep of two runs that take long to measure, marked so that whatever it started can be found."""
    mark = f"STUDY_TEST={uuid.uuid4().hex}"
    command = (
        f"{sys.executable} -m study.sweep smoke --device=cpu --results={tmp_path}/r.jsonl --cache={tmp_path}/cache"
    )
    process = subprocess.Popen(
        [*command.split(), *words],
        cwd=run.ROOT,
        env=os.environ | dict([mark.split("=")]),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    return process, mark


def alive(mark):
    """Processes with this mark in their environment that are not zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (path / "environ").read_bytes() and "\nState:\tZ" not in (path / "status").read_text():
                found.append(int(path.name))
        except OSError:
            pass
    return found


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.2)
    return condition()


def test_ctrl_c_ends_the_workers_and_says_what_is_left(tmp_path):
    process, mark = start(tmp_path, "--items=2000")
    first = process.stdout.readline()
    time.sleep(1.5)  # workers are starting
    os.killpg(process.pid, signal.SIGINT)
    text = first + process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in text, text
    assert text.count("2 of 2 runs left") == 2, text
    assert wait_for(lambda: not alive(mark), 20)


def test_what_waits_for_its_data_is_still_left_when_the_sweep_ends(tmp_path):
    class Interrupted:
        def submit(self, *_):
            return self

        def result(self):
            raise KeyboardInterrupt

    cfg = config_of("smoke", minutes=1, cache=str(tmp_path))
    tasks, worker = sweep.Queue(cfg, [], "CPU", 1), SimpleNamespace(is_alive=lambda: True, exitcode=None)
    with pytest.raises(KeyboardInterrupt):
        sweep.run_all(tasks, cfg, queue.Queue(), queue.Queue(), [worker], Interrupted(), 1, 1)
    assert tasks.left().startswith("2 of 2 runs left") and len(tasks.in_flight()) == 1


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to find processes")
@pytest.mark.parametrize("moment", ["data", "training"])
def test_nothing_outlives_a_sweep_that_is_killed(tmp_path, moment):
    """SIGKILL while data is made by processes of its own, and while workers train or wait for their next task."""
    process, mark = start(tmp_path, "--items=2000", "--jobs=2")
    made = lambda: list((tmp_path / "cache").glob("data-*/meta.json"))  # noqa: E731
    many = lambda: len(alive(mark)) >= (4 if moment == "data" else 3)  # noqa: E731  the sweep, two workers, and the builder
    assert wait_for(lambda: many() and (moment == "data" or made()), 60), process.communicate(timeout=5)
    process.kill()
    assert wait_for(lambda: not alive(mark), 20), alive(mark)
    process.communicate(timeout=5)


def test_a_run_that_fails_leaves_the_others_alone(tmp_path, capsys, monkeypatch):
    good = presets.smoke([])[0]
    bad = dataclasses.replace(good, paired=False)
    homeless = dataclasses.replace(good, seed=2, max_steps=60)  # too few names for these
    monkeypatch.setitem(PRESETS, "smoke", lambda rows: [bad, homeless, good])
    cfg = config_of("smoke", results=str(tmp_path / "r.jsonl"), minutes=5, cache=str(tmp_path / "cache"))
    assert sweep.sweep(cfg) == 2
    assert [r["key"] for r in results.read(tmp_path / "r.jsonl")] == [key(good)]
    assert "no data" in (text := capsys.readouterr().out) and "2 failed" in text


# ---- the programme


def test_a_search_goes_on_until_the_best_rates_lie_between_others():
    """The best rate for facts falls with E, the best for solutions is 0.024: ten seeds are run there and nowhere
    else."""

    def effect(r, tpp):
        best = 6e-3 if r.n_experts < 64 else 1.5e-3
        return 1 + abs(math.log2(r.lr / best)), 0.5 + 0.1 * abs(math.log2(r.lr / 0.024)), 1.0

    rows, rounds = [], 0
    while todo := [r for r in presets.scarce2(rows) if key(r) not in {row["key"] for row in rows}]:
        rows, rounds = rows + [fake(r, effect) for r in todo], rounds + 1
    by_rate = {}
    for row in rows:
        by_rate.setdefault((row["run"]["n_experts"], row["run"]["top_k"]), {}).setdefault(row["lr"], set()).add(
            row["run"]["seed"]
        )
    assert rounds <= 6 and len(by_rate) == 14 and len(rows) < 400
    for (e, _), rates in by_rate.items():
        assert {rate: len(seeds) for rate, seeds in rates.items()}[0.024] == 10 and 0.048 in rates
        assert sum(len(seeds) == 10 for seeds in rates.values()) == 1 and min(rates) < (6e-3 if e < 64 else 1.5e-3)
    tuned = results.tune(next(iter(results.lines(rows).values())), "problems")
    assert not tuned.edges and not tuned.single and set(tuned.rates.values()) == {0.024} and len(tuned.cells[8]) == 10


def test_rates_come_from_the_most_similar_runs_for_the_task_at_hand():
    def effect(r, tpp):
        best = 0.012 if r.n_experts < 64 else 6e-3
        return abs(math.log2(r.lr / 3e-3)) + 1, abs(math.log2(r.lr / best)) + 1, 1

    rows = grid(effect, experts=(8, 512), ks=(8,), unique=1_000)
    known = {task: presets.compared(rows, task) for task in ("facts", "problems")}
    rate = lambda task, **fields: presets.best_rate(known[task], Run(top_k=8, **fields), task)  # noqa: E731
    assert rate("problems", n_experts=16, unique=1_000) == 0.012 and rate("problems", n_experts=256, unique=500) == 6e-3
    assert rate("facts", n_experts=16) == 3e-3
    assert rate("problems", n_experts=8, optimizer="adamw") == presets.START["problems"]  # another optimiser
    old = [row | {"run": row["run"] | {"paired": False}} for row in rows]
    assert presets.compared(old, "problems") == {} == presets.compared(rows[:2], "problems")


def test_presets_hold_what_the_programme_says():
    sizes = {name: len(set(preset([]))) for name, preset in PRESETS.items()}
    wanted = dict(pairs=108, dose=36, votes=24, width=96, room=70, topk2=48, long4=45, adamw2=18)
    assert {name: sizes[name] for name in wanted} == wanted
    runs = [r for name, preset in PRESETS.items() for r in preset([])]
    assert all(r.top_k > 1 and r.lr > 0 and r.paired and r.data_tokens >= r.tokens for r in runs)
    assert {r.top_k * r.d_expert for r in presets.topk2([])} == {256}
    assert {r.n_experts * r.d_expert for r in presets.topk2([])} == {2048, 8192}
    for r in dict.fromkeys(dataclasses.replace(r, seed=0, n_experts=64, top_k=2, d_expert=64) for r in runs):
        run.train_config(r, 1344), run.data_config(r).validate()
    tpp = [r.tokens / count_params(run.train_config(r, 1344)).total for r in presets.long4([])]
    assert min(tpp) < 1 and max(tpp) > 60


def test_stop_rules_hold_where_they_should():
    def cell(e, seed, value):
        return fake(Run(n_experts=e, top_k=8, unique=presets.SCARCE, seed=seed), lambda c, tpp: (1, value, 1))

    assert "waits for pairs" in rules.stop_rule("scarce2", []) and rules.stop_rule("pairs", []) == ""
    draws = (0.3, 0.6, 1.2)  # a seed's luck
    helps = [cell(e, s, draw) for e in (8, 64) for s, draw in enumerate(draws)]
    hinders = [cell(e, s, draw) for e, order in ((8, draws), (64, draws[::-1])) for s, draw in enumerate(order)]
    assert rules.stop_rule("scarce2", helps) == "" and rules.pairing(helps)[0] < 0.1 and rules.pairing(helps)[1] == 1
    assert "does not cut the variance" in rules.stop_rule("scarce2", hinders) and rules.pairing([]) == (None, 0)
    for slope, stopped in ((0.0, True), (0.2, False)):

        def effect(c, tpp, slope=slope):
            return 1.0, 0.4 + slope * math.log2(c.n_experts / 8) + 0.1 * abs(math.log2(c.lr / 6e-3)), 1

        rows = grid(effect, ks=(8,), unique=presets.SCARCE)
        assert bool(rules.stop_rule("votes", rows)) == stopped


def test_a_stopped_preset_is_said_and_not_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep.multiprocessing, "get_context", None)  # no worker may be started
    cfg = config_of("scarce2", results=str(tmp_path / "r.jsonl"), minutes=1)
    assert sweep.sweep(cfg) == 0 and "stop rule: scarce2 waits for pairs" in capsys.readouterr().out
    assert sweep.sweep(dataclasses.replace(cfg, minutes=0, force=True)) == 0
    assert "84 of 84 runs left" in capsys.readouterr().out


def test_groups_are_of_one_form_and_end_in_time():
    cfg, rows = config_of("pairs"), grid(lambda c, tpp: (1, 1, 1), experts=(16,), ks=(8,), rates=(6e-3,))
    tasks = sweep.Queue(cfg, rows, "NVIDIA fake", 1)
    assert tasks.take(time.monotonic() - 1, 3) == [] and len(tasks.todo) == 108
    assert len(tasks.take(time.monotonic() + 25, 3)) == 2  # ten seconds each
    group = tasks.take(time.monotonic() + 1e9, 3)
    assert len(group) == 3 and len({run.form(r) for r in group}) == 1 and len(tasks.todo) == 103
    assert sweep.estimates([Run(tokens=2**26, data_tokens=2**26)], rows, "NVIDIA fake") == [pytest.approx(10 + 24)]
    assert sweep.gpu_minutes([Run()], rows) == pytest.approx(1 / 6) and sweep.gpu_minutes([Run()], []) is None
