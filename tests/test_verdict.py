"""Verdicts, figures and plans from results files. Run: python -m pytest tests/test_verdict.py"""

import dataclasses
import math
import random

import pytest

from study import claims, figures, plan, results, sweep, verdict
from study.execute import Run
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
    assert (
        decided(world(lambda c, tpp: (0.5, 0.5 + 0.03 * c.top_k, 2 + 0.1 * c.top_k), sweep.topk("")), 5)
        == "not supported"
    )
    near = world(lambda c, tpp: (0.5, 0.8 - 0.1 * abs(math.log2(tpp / 20)), 2), sweep.main(""))
    far = world(lambda c, tpp: (0.5, 0.8 - 0.1 * abs(math.log2(tpp / 3)), 2), sweep.main(""))
    assert decided(near, 3) == "supported" and decided(far, 3) == "not supported"
    aside = world(
        lambda c, tpp: (0.5, 0.8 - 0.1 * abs(math.log2(tpp / 20 / 4 ** (1 if c.top_k > 2 else -1))), 2), sweep.main("")
    )
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
    assert [test.votes for test in tests] == [True, False] * 2 and {
        claims.decide(test) for test in tests if not test.votes
    } == {"undecided"}
    assert claims.overall(tests) == "supported" and "no vote (recall)" in verdict.tables(rows)


def test_rates_that_differ_along_a_line_move_no_verdict():
    """Memory and reasoning depend on the rate alone, and in the first sweep the rate fell as E rose."""
    by_rate = lambda c, tpp: (0.9 - 70 * c.lr, 0.9 - 40 * c.lr, 1.5 + 30 * c.lr)  # noqa: E731
    rate_of = lambda r: 1.2e-2 if r.n_experts <= 16 else 6e-3 if r.n_experts <= 64 else 3e-3  # noqa: E731
    plan = [dataclasses.replace(r, lr=rate_of(r)) for r in sweep.main("") if not r.lr or r.lr == 6e-3]
    confounded = world(by_rate, plan)
    assert results.families(confounded) == {} and {decided(confounded, number) for number in range(1, 8)} == {
        "undecided"
    }
    hidden = [
        row | {"run": row["run"] | {"lr": 6e-3}} for row in confounded
    ]  # as if they had not differed: there is an effect to be found
    assert {claims.decide(test) for test in claims.memory_rises(hidden)} == {"supported"}
    half = confounded + world(
        by_rate, [r for r in sweep.main("") if r.lr and r.n_experts >= 128]
    )  # swept at one end only
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
    less = [
        row
        for row in rows
        if (row["run"]["n_experts"], row["run"]["top_k"], row["lr"], row["run"]["seed"]) != (64, 8, 3e-3, 1)
    ]
    assert (
        sizes(less, results.BEST) == {2} and sizes(less, 3e-3) == {2} and sizes(less, 6e-3) == {2, 8}
    )  # the other k waits for its third seed
    bad = [row | {"diverged": row["lr"] == 1.2e-2 and row["run"]["n_experts"] == 256} for row in rows]
    assert sizes(bad, results.BEST) == {2, 8} and sizes(bad, 1.2e-2) == set()  # what diverges is not the best


def test_few_seeds_and_noise_decide_nothing():
    two = world(paper_world, [r for r in sweep.main("") if r.seed < 2])
    assert [decided(two, number) for number in range(1, 8)] == ["undecided"] * 7
    assert [decided([], number) for number in range(1, 8)] == ["undecided"] * 7
    flat = [world(lambda c, tpp, share=share: (share, share, 2), sweep.main("")) for share in (0.0, 0.97)]
    assert all(
        decided(rows, number) == "undecided" for rows in flat for number in (1, 2, 3, 7)
    )  # nothing learned, or everything
    rng = random.Random(1)
    noise = world(lambda c, tpp: (0.5, 0.5 + rng.gauss(0, 0.05), 2), sweep.main(""))
    assert (
        decided(noise, 2) != "supported" and decided(noise, 4) != "supported"
    )  # the best of seven noisy points is no optimum
    worlds = [world(lambda c, tpp: (0.5, 0.5 + rng.gauss(0, 0.04), 2), sweep.topk("")) for _ in range(5)]
    assert "not supported" not in {
        decided(rows, 5) for rows in worlds
    }  # nor is the distance of the best of four from the worst a spread


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
    assert (
        text.startswith("before\n")
        and text.endswith("\nafter\n")
        and "old" not in text
        and text.count("not enough runs") >= 7
    )
    file.write_text("no markers")
    with pytest.raises(ValueError, match="needs the two lines"):
        verdict.write(file, "x")


def test_tables_are_not_replaced_by_those_of_nothing(tmp_path):
    study, empty, none, foreign = (
        tmp_path / name for name in ("STUDY.md", "empty.jsonl", "none.jsonl", "foreign.jsonl")
    )
    study.write_text(f"{verdict.BEGIN}\nold\n{verdict.END}\n")
    empty.write_text(""), foreign.write_text('{"a": 1}\n')
    for words, message in (
        ([none], "none.jsonl: no such results file"),
        ([empty], "empty.jsonl.*there is no run in it"),
        ([foreign], "foreign.jsonl, line 1: not a row"),
        ([f"--posttrain={none}"], "none.jsonl: no such results file"),
        ([f"--posttrain={foreign}"], "foreign.jsonl, line 1: not a row .* lacks checkpoint"),
    ):
        with pytest.raises(SystemExit, match=message):
            verdict.main([*map(str, words), f"--out={study}"])
    assert "old" in study.read_text()


# ---- figures and plans


def test_figures_of_a_small_grid(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        fake(Run(n_experts=e, top_k=2, seed=seed, lr=lr), paper_world)
        for lr in (6e-3, 3e-3)
        for e in (4, 16, 64)
        for seed in (0, 1)
    ]
    drawn = figures.draw(rows, tmp_path, everything=True)
    assert {path.name.split("-")[0] for path in drawn} == {
        "fig1",
        "fig2",
        "fig3",
        "fig4",
        "fig5",
        "fig7",
        "bits",
        "rates",
    }
    assert len(drawn) == 2 * 7 + 1  # two rates; their best is none of three
    assert all(path.stat().st_size > 10_000 for path in drawn)
    assert [path.name for path in figures.draw(rows, tmp_path)] == [
        "rates-d-128-f-64-16.8-m-tokens-4-000-problems-repeated.png"
    ]
    with pytest.raises(ValueError, match="no line"):
        figures.draw(rows[:2], tmp_path)
    file = tmp_path / "r.jsonl"
    for row in rows:
        results.append(file, row)
    for words, message in (
        ([f"{tmp_path}/none.jsonl"], "none.jsonl: no such results file"),
        ([str(file), "--out=/dev/null/x"], "error: .*'/dev/null/x'"),
    ):
        with pytest.raises(SystemExit, match=message):
            figures.main(words)


def test_what_stands_in_a_figure_fits_into_it():
    """A figure of one panel is as wide as its title and legend need; ticks of sizes are few and short; every density has a mark of its own."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [fake(Run(n_experts=e, top_k=k, lr=6e-3), paper_world) for k in (1, 2) for e in (4, 8, 16, 32, 64, 128, 256)]
    cells = {(row["run"]["n_experts"], row["run"]["top_k"]): {0: row} for row in rows}
    panel = (
        "task",
        "total parameters",
        "loss",
        lambda axis: figures.plot(axis, cells, figures.total, figures.train_loss),
        10,
    )
    with plt.rc_context(figures.SMALL):
        fig = figures.grid_figure(
            plt,
            [panel],
            "Accuracy and training loss: d=256, F=256, 33.6 M tokens, text, n_layers 8, optimizer adamw, best rates",
        )
        (_, scatter), *_ = figures.pooled_figures(plt, "", [(results.regime(rows[0]), cells)])
    fig.canvas.draw()
    boxes = [artist.get_window_extent() for artist in (*fig.legends, fig._suptitle)]
    assert all(fig.bbox.x0 <= box.x0 and box.x1 <= fig.bbox.x1 for box in boxes)
    labels = [
        label
        for label in fig.axes[0].get_xticklabels()
        if fig.axes[0].get_xlim()[0] <= label.get_position()[0] <= fig.axes[0].get_xlim()[1]
    ]
    assert [label.get_text() for label in labels] == ["1M", "2M", "5M", "10M", "20M"] and not any(
        t.get_text() for t in fig.axes[0].get_xticklabels(minor=True)
    )
    looks = {(line.get_marker(), line.get_color()) for line in scatter.axes[0].lines}
    names = [text.get_text() for text in scatter.legends[0].get_texts()]
    assert len(looks) == 8 and names == [f"k/E = 1/{2**n}" for n in range(8, 0, -1)]
    plt.close("all")


def test_plan_ranks_by_purpose_and_keeps_to_the_budget(tmp_path, capsys, monkeypatch):
    file = tmp_path / "r.jsonl"
    for e in (4, 16, 64):
        results.append(file, fake(Run(n_experts=e, lr=6e-3), other_world))
    plan.main(["--for=reasoning", "--flops=1e20", "--memory=80", "--gpus=8", "--rows=3", f"--results={file}"])
    text = capsys.readouterr().out
    first = next(line for line in text.splitlines() if line.startswith("paper-")).split()
    assert 10 <= float(first[2]) <= 40 and float(first[-2]) <= 80 and "tokens/s on NVIDIA H100" in text
    own = [line.split()[0] for line in text.splitlines() if line.endswith("problems repeated")]
    assert own == ["64", "16", "4"]
    monkeypatch.chdir(tmp_path)  # where the default file is not
    plan.main(["--for=memory", "--tokens=1e10", "--memory=80", "--rows=1"])
    text = capsys.readouterr().out
    assert "paper-d2048-e8-k8" in text and "no finished run yet" in text  # the largest total that fits 80 GiB
    cut = tmp_path / "cut.csv"
    for size in (60, 100, 115):  # within a line; before and in the speed; "0." for a share
        cut.write_text(plan.THROUGHPUT.read_text()[:size])
        with pytest.raises(SystemExit, match="cut.csv, line 2: not a measured speed"):
            plan.main(["--for=memory", "--flops=1e20", f"--throughput={cut}"])
    for words, message in (
        ([], "give a budget"),
        (["--tokens=-4"], "tokens=-4.0: use a finite"),
        (["--flops=nan"], "flops=nan"),
        (["--flops=-1"], "flops=-1"),
        (["--flops=1e20", "--memory=-1"], "memory=-1"),
        (["--flops=1e20", "--results=none"], "none: no such results file"),
    ):
        with pytest.raises(SystemExit, match=message):
            plan.main(["--for=memory", *words])


def test_plans_tables_are_readable(tmp_path, capsys):
    """Columns stay apart whatever the numbers; each source has its line; what has fewer than three seeds comes last, though its score is higher."""
    file = tmp_path / "r.jsonl"
    for e, seeds in ((4, 3), (64, 2)):
        for seed in range(seeds):
            results.append(file, fake(Run(n_experts=e, lr=6e-3, seed=seed), other_world))
    plan.main(["--for=reasoning", "--tokens=2e7", "--rows=3", f"--results={file}"])
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines() if line.endswith("problems repeated")] == [
        "4",
        "64",
    ] and "fewer than 3 seeds" in text
    assert (
        sum(line.startswith("  paper-") for line in text.splitlines())
        == len(plan.THROUGHPUT.read_text().splitlines()) - 1
    )
    plan.main(["--for=reasoning", "--flops=1234", "--rows=3", f"--results={file}"])
    assert {
        len(line.split()) for line in capsys.readouterr().out.splitlines() if line.startswith(("model", "paper-"))
    } == {8}
