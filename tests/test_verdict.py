"""Verdicts, the figure and plans from results files. Run: python -m pytest tests/test_verdict.py"""

import math
import random

import numpy as np
import pytest

from study import claims, figures, plan, posttrain, presets, results, rules, verdict
from study.execute import Run
from tests.studyrows import fake, finished, grid

SCARCE = dict(unique=presets.SCARCE)


def tuned_at(best, value):
    """value, and 0.1 more for every doubling that the rate is away from the best."""
    return lambda c: value(c) + 0.1 * abs(math.log2(c.lr / best))


def world(rise=0.0, memory=0.1, density=0.0, seeds=3, noise=0.01, **fields):
    """Rows whose fact loss falls by `memory` and whose solution loss rises by `rise` nats per doubling of E."""
    rng = random.Random(7)

    def effect(c, tpp):
        up = math.log2(c.n_experts / 8)
        facts = tuned_at(6e-3, lambda c: 1.5 - memory * up)(c)
        solutions = tuned_at(6e-3, lambda c: 0.2 + rise * up + rng.gauss(0, noise))(c)
        return facts, solutions, 2 - 0.05 * up + 0.2 * abs(math.log2(c.lr / 6e-3))

    return grid(effect, seeds=seeds, **(SCARCE | fields))


def decided(rows, number):
    return claims.overall(list(claims.CLAIMS[number - 1][1](rows)))


def test_memory_and_reasoning_follow_the_data():
    assert decided(world(memory=0.1), 1) == "supported" and decided(world(memory=0.0), 1) == "not supported"
    assert decided(world(rise=0.1), 2) == "supported" and decided(world(rise=0.0), 2) == "not supported"
    assert decided(world(rise=0.04), 2) == "not supported"  # rises, but by less than was asked
    assert decided(world(rise=0.08, noise=0.3), 2) == "undecided" == decided([], 2)
    assert decided(world(rise=0.1, seeds=2), 2) == "undecided"


def test_fresh_problems_are_a_control_and_more_problems_a_dose():
    for unique, note in ((0, "negative control"), (4_000, "more problems, see claim 3")):
        tests = list(claims.reasoning_turns(world(rise=0.1, unique=unique)))
        assert tests and all(any(word in test.note for word in (note, "beside", "one rate")) for test in tests)
        assert claims.overall(tests) == "undecided"
    # The slope over E falls by 0.05 nats for every doubling of problems.
    doses = [row for n, rise in ((500, 0.2), (1_000, 0.15), (2_000, 0.1)) for row in world(rise=rise, unique=n)]
    (test,) = (t for t in claims.dose_response(doses) if t.votes and ", k=8" in t.where)
    mean, low, high = rules.interval(test.effects.values())
    assert mean == pytest.approx(0.05, abs=0.01) and claims.decide(test) == "supported"
    same = [row for n in (500, 1_000, 2_000) for row in world(rise=0.15, unique=n)]
    assert {claims.decide(t) for t in claims.dose_response(same)} == {"not supported"}


def test_only_bracketed_rates_of_trained_routers_vote():
    """The best rate must lie between two others; a line at one rate votes only where it borrowed from paired
    searches; k = 1 never."""
    rows = world(rise=0.1)
    at_edge = [row for row in rows if row["lr"] != 3e-3]
    assert decided(at_edge, 2) == "undecided"
    assert "best rate at the edge for 12 of 12 models" in next(claims.reasoning_turns(at_edge)).note
    single = [row for row in rows if row["lr"] == 6e-3]
    assert decided(single, 2) == "supported"
    unpaired = [row | {"run": row["run"] | {"paired": False}} for row in single]
    assert decided(unpaired, 2) == "undecided" and "rates of other data" in next(claims.reasoning_turns(unpaired)).note
    swept = [row | {"run": row["run"] | {"paired": False}} for row in rows]
    assert decided(swept, 2) == "supported"
    routers = [row | {"run": row["run"] | {"top_k": 1}} for row in rows]
    assert results.lines(routers) == {} and {decided(routers, n) for n in range(1, 8)} == {"undecided"}


def test_a_line_that_may_not_vote_takes_nothing_from_one_that_may():
    """With k = 8 every fact is known at every E, or the best rate for solutions is at the edge: k = 2 decides alone."""
    known = [row | {"facts": {"overall": 1.0, "loss": 0.0}} for row in world(memory=0.03, ks=(8,))]
    (test,) = (t for t in claims.memory_rises(known + world(memory=0.03, ks=(2,))) if t.votes)
    assert ", k=2;" in test.where and rules.interval(test.effects.values())[0] == pytest.approx(0.03, abs=0.005)
    edge = [row for row in world(rise=0.0, ks=(8,)) if row["lr"] != 3e-3]
    assert decided(edge + world(rise=0.1, ks=(2,)), 2) == "supported"
    assert "12 of 12 models" in next(claims.reasoning_turns(edge + [r for r in world(ks=(2,)) if r["lr"] != 3e-3])).note


def test_what_is_mastered_at_every_size_does_not_turn_over():
    """Claim 2 is judged there, the others are not; the rise at one rate for all is shown beside it."""

    def effect(c, tpp):  # the best rate rises with E: at the lowest, sparse models fail
        away = abs(math.log2(c.lr / (6e-3 if c.n_experts < 64 else 1.2e-2)))
        return 1, 0.01 + 0.5 * away, 2

    rows = grid(effect, rates=(3e-3, 6e-3, 1.2e-2, 2.4e-2), **SCARCE)
    assert decided(rows, 2) == "not supported" and decided(rows, 4) == "undecided"
    one_rate = [test for test in claims.at_one_rate(rows) if "rate 0.003" in test.where]
    assert len(one_rate) == 2 and all(rules.interval(test.effects.values())[1] > 0.06 for test in one_rate)
    assert {test.note for test in one_rate} == {"one rate for all"}
    level = [row | {"run": row["run"] | {"unique": presets.FEW}} for row in rows]
    assert verdict.stopped(("votes",), level).startswith("the rise of unseen-solution loss at k = 8 lies below 0.06")


def test_a_mixed_claim_shows_both_sides():
    rows = world(rise=0.1, unique=125) + world(rise=0.0, unique=500)
    tests = list(claims.reasoning_turns(rows))
    table = verdict.claims_table([verdict.Claim("It rises", tests, tests, ("scarce2",))], rows)
    assert "**mixed**, paired | 125 problems: +0." in table and "; 500 problems: " in table and "; 3 |" in table


def test_paired_runs_decide_before_unpaired_ones():
    old = [row | {"run": row["run"] | {"paired": False}, "key": f"old {row['key']}"} for row in world(rise=0.0)]
    assert decided(old, 2) == "not supported" and decided(old + world(rise=0.1), 2) == "supported"


def test_a_part_of_a_preset_decides_nothing():
    """The last run makes the difference. What it lacks up to its end was foreseen from the first runs on."""

    def effect(c, tpp):
        away = abs(math.log2(c.lr / 0.012))
        return 1.5 - 0.1 * math.log2(c.n_experts) + away, 0.2 + 0.1 * math.log2(c.n_experts / 8) + 0.1 * away, 2

    rows = finished(presets.scarce2, effect)
    for part, settled, found in ((rows, "supported", "supported"), (rows[:-1], "undecided", "supported")):
        claim = verdict.computed(part, [])[1]
        assert (claim.verdict, claims.overall(claim.tests)) == (settled, found)
    assert "| **supported**, paired | +0." in verdict.claims_table(verdict.computed(rows, []), rows)
    assert "so far supported: its preset is not finished" in verdict.appendix(verdict.computed(part, []), part)
    first = [row for row in rows if row["run"]["n_experts"] in (8, 512)]
    left = presets.foreseen("scarce2", first)
    assert len(left) == len(set(left)) and abs(len(left) + len(first) - len(rows)) < 0.2 * len(rows)
    assert presets.foreseen("scarce2", rows) == []
    few = finished(presets.scarce2_k2, effect)[:9]
    assert verdict.settled(rows + few, ("scarce2", "scarce2_k2")) == rows  # each k decides when its own runs are there
    old = [row | {"run": row["run"] | {"paired": False}} for row in part]  # the first edition knew no such rule
    assert verdict.settled(old, ("scarce2",)) == old and verdict.settled(part, ("scarce2",)) == []


def test_each_task_is_compared_at_its_own_best_rates():
    """Facts are best at 0.003 and solutions at 0.012: neither line may be drawn at the other's rate."""
    effect = lambda c, tpp: (1 + abs(math.log2(c.lr / 6e-3)), 0.2 + abs(math.log2(c.lr / 1.2e-2)), 1)
    line = results.lines(grid(effect, ks=(8,), rates=(3e-3, 6e-3, 1.2e-2, 2.4e-2), **SCARCE)).popitem()[1]
    facts, solutions = (results.tune(line, task) for task in ("facts", "problems"))
    assert set(facts.rates.values()) == {6e-3} and set(solutions.rates.values()) == {1.2e-2}
    assert facts.edges == solutions.edges == solutions.single == []
    assert all(row["lr"] == 1.2e-2 for cell in solutions.cells.values() for row in cell.values())


def test_a_line_has_the_same_seeds_at_every_size_and_what_diverged_is_not_the_best():
    rows = world()
    less = [row for row in rows if (row["run"]["n_experts"], row["lr"], row["run"]["seed"]) != (64, 6e-3, 1)]
    tuned = results.tune(next(iter(results.lines(less).values())), "facts")
    assert all(cell.keys() in ({0, 2}, {0, 1, 2}) for cell in tuned.cells.values()) and len(tuned.cells[64]) <= 3
    assert len({tuple(cell) for cell in tuned.cells.values()}) == 1
    bad = [row | {"diverged": row["lr"] == 6e-3 and row["run"]["n_experts"] == 256} for row in rows]
    assert results.tune(next(iter(results.lines(bad).values())), "facts").rates[256] != 6e-3


def test_optimum_near_20_is_judged_against_the_better_side():
    def line(best):
        effect = lambda c, tpp: (1, 0.2 + 0.1 * abs(math.log2(tpp / best)) + 0.1 * abs(math.log2(c.lr / 6e-3)), 1)
        sizes = dict(tokens=2**26, data_tokens=2**26, people=16_000, **SCARCE)
        return grid(effect, experts=(4, 8, 16, 32, 64, 128, 256), ks=(2, 4), **sizes)

    assert decided(line(20), 3) == "supported" and decided(line(2), 3) == decided(line(100), 3) == "not supported"


def test_denser_at_equal_loss():
    def effect(slope):
        def at(c, tpp):
            density = math.log2(c.top_k / c.n_experts)
            return 1, 0.4 - slope * density + 0.1 * abs(math.log2(c.lr / 6e-3)), 2 + 0.1 * c.seed

        return at

    # With the loss at 0.4 to 0.8 everywhere, below mastery and above the floor.
    assert decided(grid(effect(0.05), **SCARCE), 4) == "supported"
    assert decided(grid(effect(0.0), **SCARCE), 4) == "not supported"


def test_top_k_alone():
    def rows(worth):
        effect = lambda c, tpp: (1.0, 0.3, 2 * (1 + worth * math.log2(c.top_k / 2)) + 0.1 * abs(math.log2(c.lr / 6e-3)))
        near = lambda c, tpp: tuple(x + 0.1 * abs(math.log2(c.lr / 6e-3)) for x in effect(c, tpp))
        return finished(presets.topk2, near)

    assert decided(rows(0.0), 5) == "supported" and decided(rows(0.2), 5) in ("not supported", "mixed")
    rng = random.Random(1)
    noise = lambda c, tpp: (1.0, 0.3 + rng.gauss(0, 0.02), 2 + rng.gauss(0, 0.02) + 0.1 * abs(math.log2(c.lr / 6e-3)))
    assert decided(finished(presets.topk2, noise), 5) != "not supported"  # the best of four is no spread


def test_gentler_training_and_active_compute():
    def effect(gain):
        def at(c, tpp):
            away = math.log2(c.lr / 6e-3)
            return 1, 0.4 + gain * away, 2 + 0.01 * abs(away)  # comparable training loss at all rates

        return at

    assert decided(grid(effect(0.05), **SCARCE), 6) == "supported"
    assert decided(grid(effect(-0.05), **SCARCE), 6) == "not supported"

    def moves(gain):
        def at(c, tpp):
            active = math.log2(c.d_model) + 0.2 * c.top_k
            return 1, 0.6 + gain * active * math.log2(c.n_experts / 32), 1

        return [fake(run, at) for run in presets.width([])]

    assert decided(moves(0.05), 7) == "supported" and decided(moves(0.0), 7) == "not supported"


def test_intervals_are_students_and_the_seeds_that_would_decide_are_said():
    mean, low, high = rules.interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2, 2 - 2.484, 2 + 2.484), abs=1e-3)
    for freedom, point in ((1, 12.706), (9, 2.262), (11, 2.201), (20, 2.086), (120, 1.980)):
        assert rules.t975(freedom) == pytest.approx(point, abs=2e-3)
    assert rules.interval([1.0]) == (1.0, None, None) and rules.interval([]) == (None, None, None)
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        _, low, high = rules.interval(rng.normal(1, 2, 3))
        inside += low < 1 < high
    assert 0.935 < inside / 2000 < 0.965  # the bootstrap of the first edition covered less
    needed = rules.seeds_needed([0.05, 0.10, 0.15], 0.02)
    half = rules.t975(needed - 1) * 0.05 / math.sqrt(needed)
    assert half < 0.10 < rules.t975(needed - 2) * 0.05 / math.sqrt(needed - 1)
    assert rules.seeds_needed([1.0], 0.1) is None


def test_the_table_is_put_between_the_markers_and_never_replaced_by_that_of_nothing(tmp_path):
    page, good = tmp_path / "STUDY.md", tmp_path / "r.jsonl"
    page.write_text(f"before\n{verdict.BEGIN}\nold\n{verdict.END}\nafter\n")
    for row in world(rise=0.1):
        results.append(good, row)
    words = [f"--results={good}", f"--out={page}", f"--appendix={tmp_path}/appendix.md"]
    verdict.main(words)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| 2. Reasoning turns over as total parameters grow | **undecided**; so far supported |" in text
    effects = (tmp_path / "appendix.md").read_text()
    assert "no vote: beside the loss" in effects and "| 8 | 8 | facts | 0.006 | 1.5 | 25% | 80% | 3 |" in effects
    empty, none, foreign = (tmp_path / name for name in ("empty.jsonl", "none.jsonl", "foreign.jsonl"))
    empty.write_text(""), foreign.write_text('{"a": 1}\n')
    for more, message in (
        ([f"--results={none}"], "none.jsonl: no such results file"),
        ([f"--results={empty}"], "empty.jsonl.*there is no run in it"),
        ([f"--results={foreign}"], "foreign.jsonl, line 1: not a row"),
        ([f"--posttrain={none}"], "none.jsonl: no such results file"),
        ([f"--posttrain={foreign}"], "foreign.jsonl, line 1: not a row .* lacks checkpoint"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            verdict.main([*words, *more])
    assert page.read_text() == text
    page.write_text("no markers")
    with pytest.raises(ValueError, match="out=.*needs the two lines"):
        verdict.main(words)
    assert page.read_text() == "no markers"


def test_the_committed_page_is_what_the_committed_rows_say():
    rows, posttrained = results.read("study/results.jsonl"), results.read("study/posttrain.jsonl", posttrain.ROW)
    found = verdict.computed(rows, posttrained)
    page = (plan.THROUGHPUT.parent / "STUDY.md").read_text()
    assert page.count(verdict.BEGIN) == page.count(verdict.END) == 1
    assert page.split(verdict.BEGIN)[1].split(verdict.END)[0].strip() == verdict.claims_table(found, rows, posttrained)
    assert (plan.THROUGHPUT.parent / "study/appendix.md").read_text() == verdict.appendix(found, rows)


# ---- the figure and plans


def test_an_index_of_pictures_replaces_no_other_page(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("# A project\n")
    with pytest.raises(ValueError, match="the pictures' index would replace the README.md there; name another place"):
        figures.main([f"--out={tmp_path / 'h.png'}"])
    assert page.read_text() == "# A project\n" and list(tmp_path.iterdir()) == [page]
    page.unlink()
    for _ in range(2):  # its own page may be replaced
        figures.index(tmp_path, "Pictures", {"h.png": "Why?"}, "python -m study.figures")
    assert "Why?" in page.read_text()


def test_the_figure_has_a_dot_for_every_seed(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    rows = world(rise=0.1) + world(rise=0.0, unique=4_000) + world(rise=0.1, unique=presets.FEW)
    file, out = tmp_path / "r.jsonl", tmp_path / "h.png"
    for row in rows:
        results.append(file, row)
    figures.main([f"--results={file}", f"--out={out}"])
    assert out.stat().st_size > 20_000
    fig = figures.headline(rows)
    dots = [line.get_xydata() for line in fig.axes[0].lines if line.get_linestyle() == "None"]
    assert [len(points) for points in dots] == [6 * 3] * 3 and "paired weights" in fig._suptitle.get_text()
    texts = [[text.get_text() for text in axis.get_legend().get_texts()] for axis in fig.axes]
    assert texts == [
        ["facts", "solutions, 500 problems", "0.06 nats more a doubling", "solutions, 250 problems"],
        ["250 problems", "500 problems", "4,000 problems"],
        [f"{what}, E = {e}" for what in ("solutions", "facts") for e in (8, 64, 256)],
    ]
    dashed = next(line for line in fig.axes[0].lines if line.get_linestyle() == "--").get_ydata()
    assert dashed[-1] - dashed[0] == pytest.approx(0.06 * 5)
    hollow = lambda fig: sum(line.get_markerfacecolor() == "white" for line in fig.axes[0].lines)
    alone = [row for row in rows if row["run"]["n_experts"] != 16 or row["lr"] == 6e-3]
    assert (hollow(fig), hollow(figures.headline(alone))) == (0, 3)  # a point of one rate, for each line
    assert "![" in (tmp_path / "README.md").read_text() and "(h.png)" in (tmp_path / "README.md").read_text()
    fig.canvas.draw()
    for axis in fig.axes:
        box = axis.title.get_window_extent()
        assert fig.bbox.x0 <= box.x0 and box.x1 <= fig.bbox.x1
    plt.close("all")
    for words, message in (([f"--results={tmp_path}/none.jsonl"], "none.jsonl: no such results file"),):
        with pytest.raises((ValueError, OSError), match=message):
            figures.main(words)
    with pytest.raises(ValueError, match="no line of 500 problems"):
        figures.headline(rows[:2])


def table_of(text):
    return [line.split() for line in text.splitlines() if line.startswith("paper-")]


def test_plan_answers_in_hours_and_gpus(capsys):
    plan.main(["reasoning", "--hours=24", "--gpus=8", "--rows=3"])
    text = capsys.readouterr().out
    first = table_of(text)[0]
    assert 10 <= float(first[2]) <= 40 and float(first[6]) <= 80 and float(first[7]) == pytest.approx(24)
    assert "Evidence:" in text and "Extrapolation:" in text
    assert "of H100" not in text and sum(line.startswith("  paper-") for line in text.splitlines()) == 5
    plan.main(["memory", "--tokens=1e11", "--rows=99"])
    one = {row[0]: float(row[6]) for row in table_of(capsys.readouterr().out)}
    plan.main(["memory", "--tokens=1e11", "--gpus=8", "--rows=99"])
    eight = {row[0]: float(row[6]) for row in table_of(capsys.readouterr().out)}
    assert set(one) < set(eight) and all(eight[name] < one[name] for name in one)  # memory is divided among the GPUs


def test_plan_refuses_nonsense(tmp_path, capsys):
    cut = tmp_path / "cut.csv"
    for size in (60, 100, 115):  # within a line; before and in the speed; "0." for a share
        cut.write_text(plan.THROUGHPUT.read_text()[:size])
        with pytest.raises(ValueError, match="cut.csv, line 2: not a measured speed"):
            plan.throughput(cut)
    for words, message in (
        (["memory"], "give a budget"),
        (["--hours=2"], "purpose"),
        (["cake", "--hours=2"], "purpose='cake': use one of reasoning, memory"),
        (["memory", "--tokens=-4"], "tokens=-4.0: use a finite"),
        (["memory", "--flops=nan"], "flops='nan'"),
        (["memory", "--flops=1e20", "--memory=-1"], "memory=-1"),
        (["memory", "--flops=1e20", "--memory=1"], "no model of the grid fits"),
        (["memory", "--tokens=2.4e6", "--gpus=64"], "2.4M tokens for 320M parameters: 0.0075 a parameter"),
        (["memory", "--tokens=1e15"], "a parameter, and 2.4 to 390 are asked for"),
        (["memory", "--hours=1", "--gpu=Abacus"], "gpu='Abacus'"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            plan.main(words)
    plan.main(["memory", "--tokens=2.4e8", "--min_tpp=0.1", "--rows=99"])  # who asks for it gets it
    assert table_of(capsys.readouterr().out)


def test_runs_of_the_figure_are_those_of_the_study():
    assert results.regime(fake(Run(), lambda c, tpp: (1, 1, 1))).usual
