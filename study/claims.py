"""How each claim of the paper is put to the runs: what is compared, one effect per seed, its interval, the verdict. The rules are at the top of
study/verdict.py, which writes the tables."""

import itertools
import json
import math
from collections import defaultdict
from functools import partial
from typing import NamedTuple

import numpy as np

from study import posttrain, results
from study.execute import Run
from study.results import BEST, MEMORY, accuracy, families, loss_unit, tasks_of

MIN_SEEDS = 3
T975 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
COMPARABLE = 0.05  # training losses within this share of each other count as equal; those of two seeds differ as much
BRACKET = (10, 40)  # TPP that a regime must reach on both sides before it can say where between them an optimum lies


class Test(NamedTuple):
    """One claim put to one set of runs."""

    where: str  # regime and task
    effects: dict  # seed -> effect
    margin: float
    unit: str
    runs: int
    little: bool = False  # the claim is that the effect, of whatever sign, is smaller than the margin
    note: str = ""
    votes: bool = True  # False: shown beside the measure that decides


def interval(values):
    """(mean, low, high) of per-seed effects; low and high None for fewer than two."""
    x = np.array(list(values), dtype=float)
    n = len(x)
    if n < 2:
        return (float(x.mean()) if n else None), None, None
    if n <= 6:  # all resamples there are
        means = np.array([np.mean(draw) for draw in itertools.product(x, repeat=n)])
    else:
        means = np.random.default_rng(0).choice(x, (20_000, n)).mean(1)
    wider = math.sqrt(n / (n - 1)) * T975.get(n - 1, 2.1) / 1.96
    low, high = x.mean() + wider * (np.percentile(means, (2.5, 97.5)) - x.mean())
    return float(x.mean()), float(low), float(high)


def decide(test):
    mean, low, high = interval(test.effects.values())
    if len(test.effects) < MIN_SEEDS:
        return "undecided"
    if test.little:
        return (
            "supported"
            if -test.margin < low and high < test.margin
            else "not supported"
            if max(low, -high) > test.margin
            else "undecided"
        )
    return "supported" if low > 0 and mean >= test.margin else "not supported" if high < test.margin else "undecided"


def overall(tests):
    found = [decide(test) for test in tests if test.votes and len(test.effects) >= MIN_SEEDS]
    if {"supported", "not supported"} <= set(found):
        return "mixed"
    return next(
        (
            verdict
            for verdict in ("supported", "not supported")
            if verdict in found and 2 * found.count(verdict) >= len(found)
        ),
        "undecided",
    )


def by_k(cells):
    """{K: {E: {seed: row}}} with at least three values of E."""
    lines = defaultdict(dict)
    for (e, k), seeds in sorted(cells.items()):
        lines[k][e] = seeds
    return {k: line for k, line in lines.items() if len(line) >= 3}


def per_seed(lines, effect):
    """{seed: mean over K of effect(line, seed)}: a K counts for a seed that has all its cells and a defined effect."""
    found = defaultdict(list)
    for line in lines.values():
        for seed in set.intersection(*(set(cell) for cell in line.values())):
            value = effect(line, seed)
            if value is not None:
                found[seed].append(value)
    return {seed: float(np.mean(values)) for seed, values in sorted(found.items())}


def reasoning(row):
    return [task for task in tasks_of(row) if task not in MEMORY]


def score(row, task):
    """Accuracy in percent, or, where a task has none, minus its loss in hundredths of a bit per byte: larger is better."""
    share = accuracy(row, task)
    return 100 * share if share is not None else -100 * row[task]["loss"]


def score_unit(row, task):
    return "points" if accuracy(row, task) is not None else "hundredths of a bit per byte"


def slope(x, y):
    return float(np.polyfit(x, y, 1)[0])


def peak(line, task, seed):
    """The E with the best score of this seed."""
    return max(line, key=lambda e: score(line[e][seed], task))


def lead(line, value, seed, worst=None):
    """How much larger value(row) of this seed is where the other seeds' mean is largest than where it is smallest (or at `worst`).

    line: {anything: {seed: row}}. None without other seeds."""
    means = {x: [value(row) for s, row in cell.items() if s != seed] for x, cell in line.items()}
    if not all(means.values()):
        return None
    means = {x: np.mean(values) for x, values in means.items()}
    worst = min(means, key=means.get) if worst is None else worst
    return value(line[max(means, key=means.get)][seed]) - value(line[worst][seed])


def turned(seeds):
    """{seed: {value: row}} -> {value: {seed: row}}"""
    cells = defaultdict(dict)
    for seed, line in seeds.items():
        for value, row in line.items():
            cells[value][seed] = row
    return cells


def chance(line, task):
    """Percent that the best constant answer gets."""
    return 100 * max(row[task].get("chance", 0) for cell in line.values() for row in cell.values())


def telling(lines, task, least=0.0):
    """The lines that can say something: somewhere 5 points above chance, somewhere below 95 %, and differing over E by more than `least`."""
    found = {}
    for k, line in lines.items():
        run = next(iter(next(iter(line.values())).values()))["run"]
        floor = 5 + chance(line, task)
        means = [np.mean([score(row, task) for row in cell.values()]) for cell in line.values()]
        learned = run["data"] or max(means) > floor and min(means) < 95
        if learned and max(means) - min(means) >= least:
            found[k] = line
    return found


def remarks(lines, family, *more):
    """What is to be said of a test beside its numbers: why it has no vote, or no effect."""
    return "; ".join(
        filter(
            None,
            ["" if lines else "nothing learned, or everything, at every k", "" if votes(family) else "one rate", *more],
        )
    )


def votes(family):
    return family.rate == BEST


def first_row(cells):
    return next(row for seeds in cells.values() for row in seeds.values())


def count(lines):
    return sum(len(cell) for line in lines.values() for cell in line.values())


def memory_rises(rows):
    """The loss of the values decides: exact recall jumps from nothing to everything within a doubling of training, and two seeds jump apart."""
    for family, cells in families(rows).items():
        lines, sample = by_k(cells), first_row(cells)
        for task in (task for task in tasks_of(sample) if task in MEMORY):
            told, exact = telling(lines, task), accuracy(sample, task) is not None
            for measure, value, margin, decides in (
                ("loss", lambda row, t=task: -row[t]["loss"], 0.02, True),
                ("recall", lambda row, t=task: score(row, t), 0.5, False),
            ):
                if decides or exact:
                    effects = per_seed(
                        told,
                        lambda line, seed, v=value: slope(
                            np.log2(list(line)), [v(cell[seed]) for cell in line.values()]
                        ),
                    )
                    unit = f"{'fewer ' + loss_unit(sample) if decides else 'points'} per doubling of E"
                    note = remarks(told, family, "" if decides else "recall")
                    yield Test(
                        f"{family}; {tasks_of(sample)[task]}, {measure}",
                        effects,
                        margin,
                        unit,
                        count(lines),
                        note=note,
                        votes=decides and votes(family),
                    )


def reasoning_turns(rows):
    for family, cells in families(rows).items():
        lines = by_k(cells)
        for task in reasoning(first_row(cells)):
            told = telling(lines, task)
            effects = per_seed(
                told, lambda line, seed, t=task: lead(line, lambda row: score(row, t), seed, worst=max(line))
            )
            yield Test(
                f"{family}; {tasks_of(first_row(cells))[task]}",
                effects,
                2.0,
                f"{score_unit(first_row(cells), task)} lost from the best E to the largest",
                count(lines),
                note=remarks(told, family),
                votes=votes(family),
            )


def optimum_near_20(rows):
    """Per k and seed, how many doublings the best TPP is above 20: few are claimed, so the claim is of the kind `little`."""
    for family, cells in families(rows).items():
        for k, line in by_k(cells).items():
            tpp = {e: next(iter(cell.values()))["tpp"] for e, cell in line.items()}
            if min(tpp.values()) > BRACKET[0] or max(tpp.values()) < BRACKET[1]:
                continue
            for task in reasoning(first_row(cells)):
                curved = telling({k: line}, task, 5)
                away = lambda line, seed, t=task, tpp=tpp: math.log2(tpp[peak(line, t, seed)] / 20)  # noqa: E731
                yield Test(
                    f"{family}, k={k}; {tasks_of(first_row(cells))[task]}",
                    per_seed(curved, away),
                    1.0,
                    "doublings from 20 to the best TPP",
                    count({k: line}),
                    little=True,
                    note=remarks(curved, family),
                    votes=votes(family),
                )


def denser_at_equal_loss(rows):
    """Points per doubling of k/E in a regression of the score on training loss (quadratic) and log2 k/E, over final and earlier points."""
    pooled = defaultdict(lambda: defaultdict(list))
    for family, cells in families(rows).items():
        for seeds in cells.values():
            for seed, row in seeds.items():
                pooled[results.Family(results.pool(family.regime), family.rate)][seed].append(row)
    for family, seeds in pooled.items():
        sample = next(iter(seeds.values()))[0]
        for task in reasoning(sample):
            effects, n = {}, 0
            for seed, members in sorted(seeds.items()):
                points = [
                    (math.log2(row["run"]["top_k"] / row["run"]["n_experts"]), point["train_loss"], score(point, task))
                    for row in members
                    for point in (*row["points"], row)
                ]
                floor = 100 * max(row[task].get("chance", 0) for row in members) + 2
                points = [
                    p for p in points if task not in results.TASKS or floor < p[2] < 98
                ]  # the floor and the ceiling say nothing
                n += len(members)
                if len(points) >= 12 and len({density for density, *_ in points}) >= 3:
                    density, loss, y = np.array(points).T
                    design = np.stack([np.ones_like(loss), loss - loss.mean(), (loss - loss.mean()) ** 2, density], 1)
                    effects[seed] = float(np.linalg.lstsq(design, y, rcond=None)[0][3])
            yield Test(
                f"{family}; {tasks_of(sample)[task]}",
                effects,
                0.5,
                f"{score_unit(sample, task)} per doubling of k/E at equal loss",
                n,
                note=remarks(True, family),
                votes=votes(family),
            )


def top_k_alone(rows):
    """What the choice of k is worth, in training loss and in scores, where k * d_expert and E * d_expert are the same."""
    groups = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for row in results.standard(rows):
        run = row["run"]
        if not run["data"]:
            group = (
                results.regime(row)._replace(d_expert=0),
                run["top_k"] * run["d_expert"],
                run["n_experts"] * run["d_expert"],
            )
            groups[group][run["top_k"]][row["lr"]][run["seed"]] = row
    for (regime, active, total), cells in sorted(groups.items()):
        if len(cells) < 3:
            continue
        for rate, line in results.policies(cells, results.best_along(cells)).items():
            family = results.Family(regime, rate)
            where, n = f"{family}".replace("F=0", f"k F={active}, E F={total}"), count({0: line})
            losses = per_seed(
                {0: line}, lambda line, seed: lead(line, lambda row: 100 * math.log(row["train_loss"]), seed)
            )
            yield Test(
                f"{where}; training loss",
                losses,
                100 * COMPARABLE,
                "% between the best and worst k",
                n,
                little=True,
                note=remarks(True, family),
                votes=votes(family),
            )
            for task in ("problems", "mano"):
                told = telling({0: line}, task)
                points = per_seed(told, lambda line, seed, t=task: lead(line, lambda row: score(row, t), seed))
                yield Test(
                    f"{where}; {results.TASKS[task]}",
                    points,
                    5.0,
                    "points between the best and worst k",
                    n,
                    little=True,
                    note=remarks(told, family),
                    votes=votes(family),
                )


def gentler(rows, name, unit):
    """Score at the next lower value of `name` minus that at the value with the best training loss, where the losses are comparable.

    The mean over the seeds says which value is best and which comparable: the seed that is lucky at one must not choose it."""
    groups = defaultdict(lambda: defaultdict(dict))
    for row in results.distinct(rows):
        run = row["run"]
        if row["diverged"] or run["data"] or name == "lr" and run["init_std"] != Run.init_std:
            continue
        value = run[name]
        groups[tuple((field, v) for field, v in run.items() if field not in (name, "seed"))][run["seed"]][value] = row
    found, n = defaultdict(lambda: defaultdict(list)), 0
    for seeds in groups.values():
        line = {value: cell for value, cell in turned(seeds).items() if len(cell) == len(seeds)}
        if len(line) < 3 or len(seeds) < MIN_SEEDS:
            continue
        losses = {value: np.mean([row["train_loss"] for row in cell.values()]) for value, cell in line.items()}
        best = min(losses, key=losses.get)
        lower = max(
            (value for value in losses if value < best and losses[value] <= (1 + COMPARABLE) * losses[best]),
            default=None,
        )
        if lower is None:
            continue
        n += 2 * len(seeds)
        for task in (task for task in ("problems", "mano") if telling({0: line}, task)):
            for seed in seeds:
                found[task][seed].append(
                    (score(line[lower][seed], task) - score(line[best][seed], task)) / math.log2(best / lower)
                )
    for task in ("problems", "mano"):
        yield Test(
            f"{unit}; {results.TASKS[task]}",
            {s: float(np.mean(v)) for s, v in sorted(found[task].items())},
            1.0,
            "points per halving at comparable loss",
            n,
        )


def gentler_training(rows):
    yield from gentler(rows, "lr", "learning rate")
    yield from gentler(rows, "init_std", "initial weights")


def more_active_moves(rows):
    """How many halvings of the best E a doubling of active parameters brings; only where some k has its optimum inside the grid."""
    for family, cells in families(rows).items():
        lines = by_k(cells)
        for task in reasoning(first_row(cells)):
            curved = telling(lines, task, 5)
            effects, inside = {}, False
            for seed in sorted({s for line in curved.values() for cell in line.values() for s in cell}):
                best = {
                    k: peak(line, task, seed)
                    for k, line in curved.items()
                    if all(seed in cell for cell in line.values())
                }
                if len(best) < 3:
                    continue
                inside |= any(min(curved[k]) < e < max(curved[k]) for k, e in best.items())
                active = [math.log2(next(iter(curved[k][e].values()))["params"]["active"]) for k, e in best.items()]
                effects[seed] = -slope(active, [math.log2(e) for e in best.values()])
            if not inside:
                effects = {}
            yield Test(
                f"{family}; {tasks_of(first_row(cells))[task]}",
                effects,
                0.25,
                "halvings of the best E per doubling of active parameters",
                count(lines),
                note=remarks(curved, family, "" if inside or not curved else "no optimum inside the grid"),
                votes=votes(family),
            )


def still_lost(rows, remedies):
    """Points lost from the best E, by the greedy answers of the other seeds before any remedy, to the largest, before and with each remedy {name: (when,
    measure)} of study.posttrain. No vote where it is not shown that anything was lost before: then there is nothing to rescue."""
    if all(when == "before" for when, _ in remedies.values()):  # whatever the model was post-trained with later
        rows = list({(row["checkpoint"], row["seed"], row["n_experts"], row["top_k"]): row for row in rows}.values())
    for (d, k, same), cells in posttrain.families(rows).items():
        settings, training = json.loads(same)
        where = f"d={d}, k={k}" + (
            f", {training['tokens'] / 1e6:.3g} M tokens, {training['unique']:,} problems repeated" if training else ""
        )
        budget = f", {settings.get('steps')} steps of {settings.get('batch_prompts')} x {settings.get('group_size')} answers{', experts replayed' * bool(settings.get('replay'))}"
        # An E that lacks seeds of the largest would cost all others theirs; without the largest itself the claim would be about another E.
        cells = {E: cell for E, cell in cells.items() if cell.keys() >= cells[max(cells)].keys()}
        if len(cells) < 3:
            continue

        def lost(when, measure):
            def effect(line, seed):
                others = {
                    E: [np.mean(row["before"]["greedy"]) for s, row in cell.items() if s != seed]
                    for E, cell in line.items()
                }
                if not all(others.values()):
                    return None
                best = max(others, key=lambda E: np.mean(others[E]))
                return 100 * float(
                    np.mean(line[best][seed][when][measure]) - np.mean(line[max(line)][seed][when][measure])
                )  # noqa: B023

            return per_seed({k: cells}, effect)  # noqa: B023

        add = partial(Test, margin=2.0, unit="points lost from the best E to the largest", runs=count({k: cells}))
        before = add(
            f"{where}; greedy answers before", lost("before", "greedy"), note="what there is to rescue", votes=False
        )
        shown = decide(before) == "supported"
        why = "" if shown or len(before.effects) < MIN_SEEDS else "no loss before is shown"
        yield before
        for name, remedy in remedies.items():
            yield add(f"{where}{budget * (remedy[0] == 'after')}; {name}", lost(*remedy), note=why, votes=shown)


REMEDIES = (  # text, what is compared: results of study.posttrain
    (
        "More test-time compute does not rescue a model that is too sparse",
        {"majority of all draws": ("before", "majority")},
    ),
    (
        "GRPO does not rescue a model that is too sparse",
        {"greedy answers after": ("after", "greedy"), "majority of all draws after": ("after", "majority")},
    ),
)
CLAIMS = (  # text, what computes it, presets that decide it
    ("Memory rises with total parameters at fixed active parameters", memory_rises, ("main", "lr", "scarce")),
    (
        "Reasoning turns over as total parameters grow at fixed active parameters",
        reasoning_turns,
        ("main", "lr", "scarce", "long"),
    ),
    ("Reasoning is best near 20 tokens per parameter", optimum_near_20, ("main", "lr")),
    ("At equal training loss, denser models reason better", denser_at_equal_loss, ("main", "lr", "scarce")),
    ("Top-k alone changes little at fixed active and total size", top_k_alone, ("topk",)),
    (
        "Lower learning rates and smaller initial weights help reasoning at comparable loss",
        gentler_training,
        ("main", "lr", "init"),
    ),
    ("More active compute moves the optimum towards denser models", more_active_moves, ("main", "lr")),
)
