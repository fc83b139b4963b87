"""The comparison before and after post-training. Run: python -m pytest tests/test_posttrain.py (CPU)"""

import dataclasses
import json

import numpy as np
import pytest

from data import procedural, tokenizer
from data.facts import FactsConfig
from data.procedural import MixtureConfig
from data.reasoning import ReasoningConfig
from model import GPT, ModelConfig
from optimoe import checkpoint
from optimoe.run import Stop
from study import posttrain
from study.claims import REMEDIES, overall, still_lost
from study.posttrain import ROW, main
from study.presets import PRESETS
from study.results import MIN_SEEDS, read
from study.verdict import appendix, claims_table, computed

BUDGET = (
    "--steps=2 --batch-prompts=4 --mini-batch=2 --group-size=2 --questions=20 --lr=1e-2 --problems=4 --samples=4 "
    "--device=cpu --eval-every=0 --eval-questions=2"
).split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two untrained models of one family, laid out as runs."""
    folder = tmp_path_factory.mktemp("runs")
    facts = FactsConfig(
        n_people=2,
        first_names=4,
        middle_names=4,
        last_names=4,
        cities=4,
        universities=4,
        majors=4,
        employers=4,
        years=4,
    )
    for E in (2, 4):
        run = folder / f"E{E}"
        mixture = MixtureConfig(
            facts, ReasoningConfig(max_steps=2, modulus=5, names=10), exposures=0, n_problems=10, window=0
        )
        procedural.build(run / "data", mixture)
        cfg = ModelConfig(
            vocab_size=tokenizer.load(run / "data").n_vocab,
            seq_len=64,
            d_model=32,
            n_layers=1,
            n_heads=2,
            n_kv_heads=2,
            head_dim=16,
            n_experts=E,
            top_k=2,
            d_expert=32,
        )
        checkpoint.save(
            run, 5, {"step": 5, "config": dataclasses.asdict(cfg) | {"seed": 3}, "model": GPT(cfg).state_dict()}, keep=1
        )
        (run / "results.json").write_text(f'{{"val_loss": {3 - E / 10}, "tpp": 1.5}}')
    return folder


def test_what_would_fail_after_the_work_is_refused_before_it(runs, monkeypatch):
    monkeypatch.setattr(posttrain, "posttrain", None)
    for flag, message in (
        ("--results=/proc/x.jsonl", "results='/proc/x.jsonl': nothing can be written"),
        ("--out_dir=x", "out_dir='x': every model of --runs has a run of its own"),
        ("--vote_top_p=7", "vote_top_p=7.0: use a number above 0, at most 1"),
        ("--vote_temperature=0", "vote_temperature=0.0: greedy votes are all equal"),
        ("--vote_temperature=1e-7", "vote_temperature=1e-07: greedy votes are all equal; use 1e-6 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            main([f"--runs={runs}/E2", *BUDGET, flag])


def test_every_run_gets_the_same_budget_once(runs, tmp_path, monkeypatch):
    results = tmp_path / "posttrain.jsonl"
    flags = [f"--runs={runs}/E*,{runs}/E2", f"--results={results}", *BUDGET]
    rows = main(flags)
    assert [(row["n_experts"], row["top_k"], row["seed"], row["val_loss"]) for row in rows] == [
        (2, 2, 3, 2.8),
        (4, 2, 3, 2.6),
    ]
    assert rows[0]["settings"] == rows[1]["settings"] and all(
        len(row["rewards"]) == 2 and len(row["seconds"]) == 3 for row in rows
    )
    for row in rows:
        for when in ("before", "after"):
            assert len(row[when]["greedy"]) == len(row[when]["majority"]) == len(row[when]["answers"]) == 4
    assert main(flags) == rows  # nothing is done twice
    text = results.read_text()
    older = [{**row, "settings": {n: v for n, v in row["settings"].items() if n != "clip"}} for row in rows]
    results.write_text("".join(json.dumps(row) + "\n" for row in older))  # of code that had no such field
    assert main(flags) == older
    results.write_text(text)
    results.write_text(results.read_text() + '{"checkpoint": "torn')
    assert read(results, ROW) == rows and main(flags) == rows
    with pytest.raises(ValueError, match=".*no directory of that name"):
        main(["--runs=/nonexistent/*", f"--results={results}"])
    results.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match=".*posttrain.jsonl, line 1: not a row .* lacks checkpoint"):
        main(flags)
    with pytest.raises(ValueError, match="runs=''"):
        main([f"--results={results}"])


def test_half_a_budget_is_no_row(runs, tmp_path, monkeypatch):
    results = tmp_path / "posttrain.jsonl"
    flags = [f"--runs={runs}/E2", f"--results={results}", *BUDGET, "--seed=1"]
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "asked", True)
        with pytest.raises(SystemExit, match="stopped and saved"):
            main(flags)
    assert not results.exists()
    (row,) = main(flags)
    assert len(row["rewards"]) == 2
    # A run trained on is another start model: what was made of the older checkpoint is left alone.
    state = checkpoint.read(runs / "E2") | {"step": 6}
    checkpoint.save(runs / "E2", 6, state, keep=1)
    before = set(runs.glob("E2-grpo-*"))
    first, second = main(flags)
    assert (
        first == row
        and second["checkpoint"].startswith("ckpt-00000006")
        and len(set(runs.glob("E2-grpo-*")) - before) == 1
    )


def made_up(E, seed, rate, rate_after, n=500):
    rng = np.random.default_rng((E, seed))
    parts = {"majority": [0.0] * n, "answers": [0] * n, "curves": {"samples": [1, 2], "solutions": [0.1, 0.2]}}
    draw = lambda p: {"greedy": (rng.random(n) < p).astype(int).tolist(), **parts}
    return {
        "d_model": 8,
        "top_k": 2,
        "n_experts": E,
        "seed": seed,
        "checkpoint": "",
        "settings": {"samples": 2},
        "train_loss": 1.0,
        "before": draw(rate),
        "after": draw(rate_after),
    }


def test_verdicts_on_remedies():
    def made(before, after):
        rates = list(zip((4, 8, 16), before, after, strict=True))
        return [made_up(E, seed, rate, rate_after) for seed in range(3) for E, rate, rate_after in rates]

    falls, flat, rises = (0.3, 0.6, 0.2), (1.0, 1.0, 1.0), (0.2, 0.4, 0.6)
    grpo_claim = lambda rows: overall(list(still_lost(rows, {"greedy answers after": ("after", "greedy")})))
    assert grpo_claim(made(falls, falls)) == "supported" and grpo_claim(made(falls, flat)) == "not supported"
    assert grpo_claim(made(rises, flat)) == "undecided"  # nothing to rescue
    tests = list(still_lost(made(rises, flat), REMEDIES[0][1]))
    assert "no loss before is shown" in {test.note for test in tests}
    assert f"| 8. {REMEDIES[0][0]} | **undecided** |" in claims_table(computed([], made(rises, flat)), [])
    assert f"| 9. {REMEDIES[1][0]} | **undecided** | no runs |" in claims_table(computed([], []), [])


def test_budgets_share_their_models_votes():
    """Two budgets of one family: votes are counted once, GRPO for each, and the table names what differs."""
    rows = [made_up(E, seed, rate, rate) for seed in range(3) for E, rate in ((4, 0.3), (8, 0.6), (16, 0.2))]
    rows += [row | {"settings": row["settings"] | {"replay": True}} for row in rows]
    votes, after = ([test.where for test in still_lost(rows, remedies)] for _, remedies in REMEDIES)
    assert len(votes) == 2 and len(after) == 4 and sum("experts replayed" in where for where in after) == 1


def test_a_part_of_the_models_decides_nothing():
    """The last of the paired models that `votes` asks for, questioned in the same way, makes the difference."""
    runs, rates = [dataclasses.asdict(run) for run in PRESETS["votes"]([])], {8: 0.6, 64: 0.5, 512: 0.2}
    model = lambda run: made_up(run["n_experts"], run["seed"], *[rates[run["n_experts"]]] * 2)
    rows = [model(run) | {"run": run, "checkpoint": str(i)} for i, run in enumerate(runs)]
    part = [row for row in rows if row["seed"] < 7 or row["n_experts"] == 64]
    other = [row | {"settings": {"samples": 3}} for row in rows if row not in part]
    for given, found in ((rows, "supported"), (part, "undecided"), (part + other, "undecided")):
        assert computed([], given)[8].verdict == found
    assert "so far" in appendix(computed([], part), [])


def test_no_verdict_on_remedies_while_seeds_are_missing():
    remedies = {"greedy answers after": ("after", "greedy")}
    rows = [made_up(E, seed, rate, rate) for seed in range(3) for E, rate in ((4, 0.3), (8, 0.6), (16, 0.5), (32, 0.2))]

    def tests(left_out):
        return list(still_lost([row for row in rows if (row["n_experts"], row["seed"]) not in left_out], remedies))

    assert [test.runs for test in tests([])] == [12, 12] and overall(tests([])) == "supported"
    assert [test.runs for test in tests([(4, 1)])] == [9, 9] and overall(
        tests([(4, 1)])
    ) == "supported"  # a small E may be unfinished
    assert [len(test.effects) for test in tests([(32, 1)])] == [2, 2] and overall(
        tests([(32, 1)])
    ) == "undecided"  # not the loss to E=16 instead
    two = [row for row in rows if row["seed"] < 2]
    assert {test.note for test in still_lost(two, remedies)} == {"before any remedy", "too few seeds"}
    assert MIN_SEEDS == 3 and f"| 9. {REMEDIES[1][0]} | **undecided** |" in claims_table(computed([], two), [])
