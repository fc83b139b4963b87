"""Verdicts, figures and plans from results files. Run: python -m pytest tests/test_verdict.py"""

import dataclasses
import math
import random

import pytest

from study import claims, figures, plan, results, sweep, verdict
from study.run import Run
from tests.studyrows import fake, swept, world


def paper_world(config, tpp):
    """Everything as the paper says."""
    e, k = config.n_experts, config.top_k
    best = 64 / k  # the best E falls as k grows
    reason = 0.8 - 0.03 * (math.log2(e / best)) ** 2 + 0.05 * (config.lr == 3e-3) + 0.05 * (config.init_std == 0.025)
    worse = {1.2e-2: 0.2, 3e-3: 0.02}.get(config.lr, 0) + 0.01 * abs(math.log2(config.init_std / 0.05))
    return 0.1 + 0.08 * math.log2(e), reason, 2 - 0.05 * math.log2(e) + worse


def other_world(config, tpp):
    """Memory saturates, and reasoning only gains from experts."""
    return 0.5, 0.3 + 0.05 * math.log2(config.n_experts), 2 - 0.05 * math.log2(config.n_experts)


def decided(rows, number):
    return claims.overall(list(claims.CLAIMS[number - 1][1](rows)))


def test_verdicts_follow_the_data():
    runs = [*sweep.main(""), *sweep.lr(""), *sweep.init(""), *sweep.topk("")]
    as_claimed, otherwise = (world(effect, runs) for effect in (paper_world, other_world))
    assert [decided(as_claimed, number) for number in (1, 2, 4, 6, 7)] == ["supported"] * 5
    assert [decided(otherwise, number) for number in (1, 2, 3)] == ["not supported"] * 3
    assert decided(world(lambda c, tpp: (0.5, 0.5, 2.0), sweep.topk("")), 5) == "supported"
    assert decided(world(lambda c, tpp: (0.5, 0.5 + 0.03 * c.top_k, 2 + 0.1 * c.top_k), sweep.topk("")), 5) == "not supported"
    near = world(lambda c, tpp: (0.5, 0.8 - 0.1 * abs(math.log2(tpp / 20)), 2), sweep.main(""))
    far = world(lambda c, tpp: (0.5, 0.8 - 0.1 * abs(math.log2(tpp / 3)), 2), sweep.main(""))
    assert decided(near, 3) == "supported" and decided(far, 3) == "not supported"
    aside = world(lambda c, tpp: (0.5, 0.8 - 0.1 * abs(math.log2(tpp / 20 / 4 ** (1 if c.top_k > 2 else -1))), 2), sweep.main(""))
    assert decided(aside, 3) == "not supported"  # far above 20 at some k and far below at others is not near
    constant = world(lambda c, tpp: (0.5, 0.2 - 0.01 * abs(math.log2(c.n_experts / 32)), 2), sweep.main(""))
    for row in constant:
        row["mano"]["chance"] = row["problems"]["chance"] = 0.19
    assert decided(constant, 2) == "undecided"  # who always says 0 has learned nothing


def test_memory_is_judged_by_its_loss_beside_recall():
    """Recall of two seeds lies on both sides of its cliff; the loss is smooth."""
    jump = {0: 0.30, 1: 0.08, 2: 0.20}

    def smooth(row):
        row["facts"]["loss"] = 1.6 - 0.05 * math.log2(row["run"]["n_experts"]) + 0.1 * row["run"]["seed"]
        return row

    effect = lambda c, tpp: (jump[c.seed] + 0.02 * c.seed * math.log2(c.n_experts) * (-1) ** c.seed, 0.5, 2)  # noqa: E731
    rows = world(effect, sweep.main(""), smooth)
    tests = [test for test in claims.memory_rises(rows) if "best rates" in test.where]
    assert [test.votes for test in tests] == [True, False] * 2 and {claims.decide(test) for test in tests if not test.votes} == {"undecided"}
    assert claims.overall(tests) == "supported" and "no vote (recall)" in verdict.tables(rows)


def test_rates_that_differ_along_a_line_move_no_verdict():
    """Memory and reasoning depend on the rate alone, and in the first sweep the rate fell as E rose."""
    by_rate = lambda c, tpp: (0.9 - 70 * c.lr, 0.9 - 40 * c.lr, 1.5 + 30 * c.lr)  # noqa: E731
    rate_of = lambda r: 1.2e-2 if r.n_experts <= 16 else 6e-3 if r.n_experts <= 64 else 3e-3  # noqa: E731
    plan = [dataclasses.replace(r, lr=rate_of(r)) for r in sweep.main("") if not r.lr or r.lr == 6e-3]
    confounded = world(by_rate, plan)
    assert results.families(confounded) == {} and {decided(confounded, number) for number in range(1, 8)} == {"undecided"}
    hidden = [row | {"run": row["run"] | {"lr": 6e-3}} for row in confounded]  # as if they had not differed: there is an effect to be found
    assert {claims.decide(test) for test in claims.memory_rises(hidden)} == {"supported"}
    half = confounded + world(by_rate, [r for r in sweep.main("") if r.lr and r.n_experts >= 128])  # swept at one end only
    assert {decided(half, number) for number in range(1, 8)} == {"undecided"}
    assert not any(test.votes for number in (1, 2, 3, 4, 7) for test in claims.CLAIMS[number - 1][1](half))
    two = world(by_rate, [r for r in sweep.main("") if r.lr and r.lr < 1e-2])  # two of three rates: shown, no vote
    assert {family.rate for family in results.families(two)} == {3e-3, 6e-3} and decided(two, 1) == "undecided"
    full = confounded + world(by_rate, sweep.main(""))
    assert results.BEST in {family.rate for family in results.families(full)} and decided(full, 1) == "not supported"
    for (_, rate), cells in results.families(full).items():
        assert rate or {row["lr"] for cell in cells.values() for row in cell.values()} == {3e-3}


def test_a_line_has_every_size_of_its_regime_and_the_same_seeds():
    rows = [row for row in swept(paper_world) if row["run"]["top_k"] in (2, 8)]
    regime = results.regime(rows[0])
    sizes = lambda rows, rate: {k for _, k in results.families(rows).get(results.Family(regime, rate), ())}  # noqa: E731
    assert sizes(rows, results.BEST) == sizes(rows, 3e-3) == {2, 8}
    less = [row for row in rows if (row["run"]["n_experts"], row["run"]["top_k"], row["lr"], row["run"]["seed"]) != (64, 8, 3e-3, 1)]
    assert sizes(less, results.BEST) == {2} and sizes(less, 3e-3) == {2} and sizes(less, 6e-3) == {2, 8}  # the other k waits for its third seed
    bad = [row | {"diverged": row["lr"] == 1.2e-2 and row["run"]["n_experts"] == 256} for row in rows]
    assert sizes(bad, results.BEST) == {2, 8} and sizes(bad, 1.2e-2) == set()  # what diverges is not the best


def test_few_seeds_and_noise_decide_nothing():
    two = world(paper_world, [r for r in sweep.main("") if r.seed < 2])
    assert [decided(two, number) for number in range(1, 8)] == ["undecided"] * 7
    assert [decided([], number) for number in range(1, 8)] == ["undecided"] * 7
    flat = [world(lambda c, tpp, share=share: (share, share, 2), sweep.main("")) for share in (0.0, 0.97)]
    assert all(decided(rows, number) == "undecided" for rows in flat for number in (1, 2, 3, 7))  # nothing learned, or everything
    rng = random.Random(1)
    noise = world(lambda c, tpp: (0.5, 0.5 + rng.gauss(0, 0.05), 2), sweep.main(""))
    assert decided(noise, 2) != "supported" and decided(noise, 4) != "supported"  # the best of seven noisy points is no optimum
    worlds = [world(lambda c, tpp: (0.5, 0.5 + rng.gauss(0, 0.04), 2), sweep.topk("")) for _ in range(5)]
    assert "not supported" not in {decided(rows, 5) for rows in worlds}  # nor is the distance of the best of four from the worst a spread


def test_interval_is_wider_than_the_spread_of_three_seeds_and_shrinks():
    mean, low, high = claims.interval([1.0, 2.0, 3.0])
    assert mean == 2 and low < 0.2 and high > 3.8  # Student's t would say 2 +- 2.5
    many = claims.interval([1.0, 2.0, 3.0] * 10)
    assert 1.6 < many[1] < 2 < many[2] < 2.4
    assert claims.interval([1.0]) == (1.0, None, None)


def test_tables_are_put_between_the_markers(tmp_path):
    file = tmp_path / "STUDY.md"
    file.write_text(f"before\n{verdict.BEGIN}\nold\n{verdict.END}\nafter\n")
    verdict.write(file, verdict.tables([]))
    text = file.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text and text.count("not enough runs") >= 7
    file.write_text("no markers")
    with pytest.raises(ValueError, match="needs the two lines"):
        verdict.write(file, "x")


# ---- figures and plans

def test_figures_of_a_small_grid(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [fake(Run(n_experts=e, top_k=2, seed=seed, lr=lr), paper_world) for lr in (6e-3, 3e-3) for e in (4, 16, 64) for seed in (0, 1)]
    drawn = figures.draw(rows, tmp_path)
    assert {path.name.split("-")[0] for path in drawn} == {"fig1", "fig2", "fig3", "fig4", "fig5", "fig7", "bits", "rates"}
    assert len(drawn) == 2 * 7 + 1  # two rates; their best is none of three
    assert all(path.stat().st_size > 10_000 for path in drawn)
    with pytest.raises(ValueError, match="no line"):
        figures.draw(rows[:2], tmp_path)


def test_plan_ranks_by_purpose_and_keeps_to_the_budget(tmp_path, capsys):
    file = tmp_path / "r.jsonl"
    for e in (4, 16, 64):
        results.append(file, fake(Run(n_experts=e, lr=6e-3), other_world))
    plan.main(["--for=reasoning", "--flops=1e20", "--memory=80", "--gpus=8", "--rows=3", f"--results={file}"])
    text = capsys.readouterr().out
    first = next(line for line in text.splitlines() if line.startswith("paper-")).split()
    assert 10 <= float(first[2]) <= 40 and float(first[-2]) <= 80 and "tokens/s on NVIDIA H100" in text
    own = [line.split()[0] for line in text.splitlines() if line.endswith("problems repeated")]
    assert own == ["64", "16", "4"]
    plan.main(["--for=memory", "--tokens=1e10", "--memory=80", "--rows=1", f"--results={tmp_path}/none"])
    text = capsys.readouterr().out
    assert "paper-d2048-e8-k8" in text and "no finished run yet" in text  # the largest total that fits 80 GiB
    with pytest.raises(SystemExit, match="give a budget"):
        plan.main(["--for=memory"])
