"""Results files of the study and the programme of its runs. Run: python -m pytest tests/test_study_rows.py (CPU)"""

import dataclasses
import json
import math
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from data import files
from optimoe.sizes import count_params
from study import execute as run
from study import presets, results, rules
from study.execute import Run, key
from study.presets import PRESETS
from tests.studyrows import fake, finished, grid

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
    """Each byte of a signed file, or many of a long one, changed in turn: the file is refused by name, or says what it
    said (white space, 1e-3 as 1E-3)."""
    from study.posttrain import ROW as POSTTRAIN

    needed = results.ROW if name == "results" else POSTTRAIN
    with open(run.ROOT / f"study/{name}.jsonl", "rb") as source:
        content = b"".join(sorted((next(source) for _ in range(40)), key=len)[:2])
    whole, rng, silent = results.parsed(content, "f", needed)[0], random.Random(1), 0
    every = range(len(content))
    for at in every if len(every) < 6000 else (*every[:300], *rng.sample(every, 2000), *every[-300:]):
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
    assert rounds <= 6 and len(by_rate) == 7 and len(rows) < 200
    for (e, _), rates in by_rate.items():
        assert {rate: len(seeds) for rate, seeds in rates.items()}[0.024] == 10 and 0.048 in rates
        assert sum(len(seeds) == 10 for seeds in rates.values()) == 1 and min(rates) < (6e-3 if e < 64 else 1.5e-3)
    tuned = results.tune(next(iter(results.lines(rows).values())), "problems")
    assert not tuned.edges and not tuned.single and set(tuned.rates.values()) == {0.024} and len(tuned.cells[8]) == 10


def test_a_search_tries_what_is_best_at_the_other_sizes():
    """The model with 512 experts is best at 0.048, as the others are, but at 0.024 worse than at 0.012."""

    def effect(r, tpp):
        away = abs(math.log2(r.lr / 0.048))
        return 1 + abs(math.log2(r.lr / 3e-3)), 0.5 + 0.1 * away + (r.n_experts == 512 and r.lr == 0.024), 1.0

    rows = finished(presets.scarce2, effect)
    tuned = results.tune(next(iter(results.lines(rows).values())), "problems")
    assert set(tuned.rates.values()) == {0.048} and tuned.seeds == list(range(10)) and len(rows) < 200


def test_rates_come_from_the_most_similar_runs_for_the_task_at_hand():
    def effect(r, tpp):
        best = 0.012 if r.n_experts < 64 else 6e-3
        return abs(math.log2(r.lr / 3e-3)) + 1, abs(math.log2(r.lr / best)) + 1, 1

    rows = grid(effect, experts=(8, 512), ks=(8,), unique=1_000)
    known = {task: presets.compared(rows, task) for task in ("facts", "problems")}
    rate = lambda task, **fields: presets.best_rate(known[task], Run(top_k=8, **fields), task)
    assert rate("problems", n_experts=16, unique=1_000) == 0.012 and rate("problems", n_experts=256, unique=500) == 6e-3
    assert rate("facts", n_experts=16) == 3e-3
    assert rate("problems", n_experts=8, optimizer="adamw") == presets.START["problems"]  # another optimiser
    old = [row | {"run": row["run"] | {"paired": False}} for row in rows]
    assert presets.compared(old, "problems") == {} == presets.compared(rows[:2], "problems")


def test_presets_hold_what_the_programme_says():
    sizes = {name: len(set(preset([]))) for name, preset in PRESETS.items()}
    wanted = dict(pairs=108, dose=90, votes=24, width=96, room=70, topk2=48, long4=45, adamw2=18)
    assert {name: sizes[name] for name in wanted} == wanted
    first = {e: {r.lr for r in presets.dose([]) if r.n_experts == e} for e in (8, 16)}
    assert first == {8: set(presets.START.values()), 16: {presets.START["problems"]}}
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

        rows = grid(effect, ks=(8,), unique=presets.FEW)
        assert bool(rules.stop_rule("votes", rows)) == stopped
