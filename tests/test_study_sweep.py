"""The sweep around the runs of the study. Run: python -m pytest tests/test_study_sweep.py (CPU, half a minute)"""

import dataclasses
import json
import math
import os
import queue
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest

from data import files
from optimoe import checkpoint
from study import execute as run
from study import presets, results, sweep
from study.execute import Run, key
from study.presets import PRESETS
from tests.studyrows import fake, grid
from tests.trainrun import wait_for


def config_of(*presets_, **fields):
    return sweep.SweepConfig(presets=presets_, device="cpu", items=2, **fields)


def test_sweep_runs_what_is_missing_and_survives_a_torn_line(tmp_path, monkeypatch):
    file, runs = tmp_path / "r.jsonl", presets.smoke([])[:1]
    monkeypatch.setitem(PRESETS, "smoke", lambda rows: runs)
    cfg = config_of("smoke", results=str(file), minutes=5, cache=str(tmp_path / "cache"))
    results.append(file, run.execute(runs, tmp_path / "cache", "cpu", n=2)[0] | {"jobs": 1})
    assert [r["key"] for r in results.read(file)] == [key(runs[0])] and '"crc": "' in file.read_text()
    with open(file, "a") as torn:
        torn.write('{"key": "')
    assert sweep.sweep(cfg) == 0  # starts no process: nothing is missing
    diverged = tmp_path / "diverged.jsonl"
    results.append(diverged, results.read(file)[0] | {"diverged": True})
    assert sweep.sweep(dataclasses.replace(cfg, results=str(diverged), keep=True)) == 0
    assert len(results.read(diverged)) == 1  # again it would have no weights
    (tmp_path / "cache/weights" / key(runs[0])).mkdir(parents=True)  # as of a run that was cut off before it wrote them
    for _ in range(2):  # finished without weights: run again for them, once
        assert sweep.sweep(dataclasses.replace(cfg, keep=True)) == 0
    assert checkpoint.find(tmp_path / "cache/weights" / key(runs[0]))
    assert files.read_json(tmp_path / "cache/weights" / key(runs[0]) / "results.json")["key"] == key(runs[0])
    assert [r["key"] for r in results.read(file)] == [key(runs[0])] * 2


def test_a_preset_that_asks_for_more_when_rows_come_gets_it(tmp_path, monkeypatch):
    first = presets.smoke([])[0]
    more = lambda rows: [first, *(dataclasses.replace(first, seed=1) for _ in rows[:1])]
    monkeypatch.setitem(PRESETS, "smoke", more)
    cfg = config_of("smoke", results=str(tmp_path / "r.jsonl"), minutes=5, cache=str(tmp_path / "cache"))
    assert sweep.sweep(cfg) == 0
    assert [row["run"]["seed"] for row in results.read(tmp_path / "r.jsonl")] == [0, 1]


def test_bad_options_are_refused(tmp_path, monkeypatch):
    refused = (
        ("", "presets=''"),
        ("mian", "presets='mian': use one of smoke, pairs"),
        ("smoke --minutes=-1", "minutes=-1.0: use 0"),
        ("smoke --minutes=nan", "minutes='nan'"),
        ("smoke --jobs=-1", "jobs=-1: use 0"),
        ("smoke --items=0", "items=0: use 1"),
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
    file = lambda *presets_, **fields: config_of(*presets_, **fields).file
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


def test_ctrl_c_ends_the_workers_and_says_what_is_left(tmp_path):
    process, mark = start(tmp_path, "--items=2000")
    first = process.stdout.readline()
    time.sleep(1.5)  # workers are starting
    os.killpg(process.pid, signal.SIGINT)
    text = first + process.communicate(timeout=300)[0]
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in text, text
    assert text.count("2 of 2 runs left") == 2, text
    assert wait_for(lambda: not alive(mark), 300)


def test_ctrl_c_while_workers_start_is_not_lost(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    started = SimpleNamespace(start=lambda: signal.raise_signal(signal.SIGINT))
    context = SimpleNamespace(Queue=queue.Queue, Process=lambda **_: started)
    monkeypatch.setattr(sweep.multiprocessing, "get_context", lambda _: context)
    with pytest.raises(KeyboardInterrupt):
        sweep.start_workers(config_of("smoke", cache=str(tmp_path)), ["cpu"], 1, 1)


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
    made = lambda: list((tmp_path / "cache").glob("data-*/meta.json"))
    # The sweep, two workers, and the builder.
    many = lambda: len(alive(mark)) >= (4 if moment == "data" else 3)
    assert wait_for(lambda: many() and (moment == "data" or made()), 300), process.communicate(timeout=5)
    process.kill()
    assert wait_for(lambda: not alive(mark), 300), alive(mark)
    process.communicate(timeout=60)


def test_a_run_that_fails_leaves_the_others_alone(tmp_path, capsys, monkeypatch):
    good = presets.smoke([])[0]
    bad = dataclasses.replace(good, paired=False)
    homeless = dataclasses.replace(good, seed=2, max_steps=60)  # too few names for these
    monkeypatch.setitem(PRESETS, "smoke", lambda rows: [bad, homeless, good])
    cfg = config_of("smoke", results=str(tmp_path / "r.jsonl"), minutes=5, cache=str(tmp_path / "cache"))
    assert sweep.sweep(cfg) == 2
    assert [r["key"] for r in results.read(tmp_path / "r.jsonl")] == [key(good)]
    assert "no data" in (text := capsys.readouterr().out) and "2 failed" in text


def test_a_stopped_sweep_goes_on_exactly_where_it_stands(tmp_path, monkeypatch):
    """Two sweeps of `scarce2_k2 dose` on the committed rows, the first cut off after five groups: no run is done twice,
    none is left out, and scarce2_k2 is searched to its end before dose begins. Runs take no time here."""
    monkeypatch.setattr(presets, "EXPERTS", (512, 8, 64, 256))
    monkeypatch.setattr(os, "fsync", lambda _: None)
    file = tmp_path / "r.jsonl"
    rows = (run.ROOT / "study/results.jsonl").read_text().splitlines(keepends=True)
    run_of = lambda row: json.loads(row)["run"]
    begun = lambda fields: fields.get("paired") and fields["top_k"] == 8 and fields["unique"] not in (177, 250)
    file.write_text("".join(row for row in rows if begun(run_of(row))))
    known, ran = [row["key"] for row in results.read(file)], []

    def effect(r, tpp):
        return 1 + abs(math.log2(r.lr / 0.003)), 0.02 + abs(math.log2(r.lr / 0.048)), 0.5

    class Workers(queue.Queue):
        def put(self, task):
            rows = [fake(r, effect) | {"device": "NVIDIA H200", "jobs": 3} for r in task[0]]
            ran.extend(task[0])
            outbox.put((key(task[0][0]), rows))

    cfg = config_of("scarce2_k2", "dose", results=str(file), minutes=60, cache=str(tmp_path))
    builder = SimpleNamespace(submit=lambda *_: SimpleNamespace(result=lambda: None))
    alive = SimpleNamespace(is_alive=lambda: True, exitcode=None)
    for most in (5, 10**9):
        outbox, groups = queue.Queue(), []
        tasks = sweep.Queue(cfg, results.read(file), "NVIDIA H200", 3)
        take = tasks.take
        tasks.take = lambda ends, n, take=take, groups=groups, most=most: (
            take(ends, n) if len(groups) < most and not groups.append(1) else []
        )
        sweep.run_all(tasks, cfg, Workers(), outbox, [alive] * 3, builder, 3, 3)
    keys = [key(r) for r in ran]
    assert len(keys) == len(set(keys)) and not set(keys) & set(known) and tasks.left().endswith("are finished")
    assert [row["key"] for row in results.read(file)] == known + keys
    assert {r.unique for r in ran[:15]} == {500} and {r.unique for r in ran} >= {177, 250, 500}
    wanted = {r for name in ("scarce2_k2", "dose") for r in PRESETS[name](results.read(file))}
    assert {key(r) for r in wanted} <= {*known, *keys}


def test_a_stopped_preset_is_said_and_not_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep.multiprocessing, "get_context", None)  # no worker may be started
    cfg = config_of("scarce2", results=str(tmp_path / "r.jsonl"), minutes=1)
    assert sweep.sweep(cfg) == 0 and "stop rule: scarce2 waits for pairs" in capsys.readouterr().out
    assert sweep.sweep(dataclasses.replace(cfg, minutes=0, force=True)) == 0
    text = capsys.readouterr().out
    assert "42 of 42 runs left" in text and "scarce2: about 154 runs to its end" in text


def test_groups_are_of_one_form_and_end_in_time():
    cfg, rows = config_of("pairs"), grid(lambda c, tpp: (1, 1, 1), experts=(16,), ks=(8,), rates=(6e-3,))
    tasks = sweep.Queue(cfg, rows, "NVIDIA fake", 1)
    assert tasks.take(time.monotonic() - 1, 3) == [] and len(tasks.todo) == 108
    assert len(tasks.take(time.monotonic() + 29, 3)) == 2  # ten seconds each
    group = tasks.take(time.monotonic() + 1e9, 3)
    assert len(group) == 3 and len({run.form(r) for r in group}) == 1 and len(tasks.todo) == 103
    assert sweep.estimates([Run(tokens=2**26, data_tokens=2**26)], rows, "NVIDIA fake") == [pytest.approx(10 + 24)]
    assert sweep.gpu_minutes([Run()], rows) == pytest.approx(1 / 6) and sweep.gpu_minutes([Run()], []) is None
    # Another GPU is a better guess than none, which would start runs that cannot end; a GPU says nothing of a CPU.
    assert sweep.estimates([Run()], rows, "NVIDIA other") == [10] and sweep.estimates([Run()], rows, "CPU, 1") == [None]
