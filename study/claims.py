"""How the runs test each claim of the paper: one effect per seed, its interval, the verdict. docs/study/rules.md gives
the rules in words; study/results.py says what a regime, a line and a cell are."""

import json
import math
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from study import posttrain, results
from study.presets import SCARCE
from study.results import MIN_SEEDS, accuracy, lines, loss, tune
from study.rules import RISE, interval, rises, slope, solution_loss

MASTERED = 0.1  # nats per token: with less loss of solutions at every E a line has nothing to lose
COMPARABLE = 0.05  # training losses within this share of each other count as equal: two seeds differ as much
LEARNED = 0.8  # share of whole solutions from which a run has learned to solve problems
BRACKET = (10, 40)  # tokens per parameter, around the paper's optimum


class Test(NamedTuple):
    """A test of one claim on one set of runs."""

    where: str  # regime and task
    effects: dict  # {seed: effect}, positive if the claim holds
    margin: float
    unit: str
    runs: int
    little: bool = False  # the claim is that the effect, of either sign, is smaller than the margin
    note: str = ""  # why it has no vote; empty: it votes
    paired: bool = True  # Run.paired of its runs

    @property
    def votes(self):
        return not self.note


def decide(test):
    """The verdict of one test, by the interval of its effects."""
    if len(test.effects) < MIN_SEEDS:
        return "undecided"
    mean, low, high = interval(test.effects.values())
    supported, refuted = low > 0 and mean >= test.margin, high < test.margin
    if test.little:
        supported, refuted = max(-low, high) < test.margin, max(low, -high) > test.margin
    return "supported" if supported else "not supported" if refuted else "undecided"


def overall(tests):
    """The verdict of the paired tests that vote and have enough seeds, or if there are none, of the unpaired ones.

    A verdict needs at least half of the votes, and no vote for the opposite; opposite votes make it mixed."""
    voting = [test for test in tests if test.votes and len(test.effects) >= MIN_SEEDS]
    found = [decide(test) for test in [test for test in voting if test.paired] or voting]
    if {"supported", "not supported"} <= set(found):
        return "mixed"
    decided = [v for v in ("supported", "not supported") if v in found and 2 * found.count(v) >= len(found)]
    return decided[0] if decided else "undecided"


# ---- helpers


def by_seed(groups, combine):
    """{seed: combine(each group's value)} for the seeds that all groups {seed: value} have."""
    seeds = set.intersection(*map(set, groups)) if groups else ()
    return {seed: float(combine([group[seed] for group in groups])) for seed in sorted(seeds)}


def because(reasons):
    """Why something has no vote, from {reason: whether it holds}."""
    return "; ".join(reason for reason, holds in reasons.items() if reason and holds)


def percent(row, task):
    return 100 * accuracy(row, task)


def dumb(cells, task):
    """Why cells show nothing (none is 5 points above the best constant answer, or all are mastered), or ""."""
    floor = 5 + 100 * max(row[task].get("chance", 0) for cell in cells.values() for row in cell.values())
    means = [np.mean([percent(row, task) for row in cell.values()]) for cell in cells.values()]
    worst = max(np.mean([loss(row, task) for row in cell.values()]) for cell in cells.values())
    mastered = min(means) >= 95 or task == "problems" and worst <= MASTERED
    return "nothing learned" if max(means) <= floor else "mastered" if mastered else ""


def silent(where, tuned, task, note="", decisive=False):
    """Why tuned lines of one regime have no vote, or "". decisive: lines mastered at every E vote."""
    edges, models = sum(len(one.edges) for one in tuned), sum(len(one.cells) for one in tuned)
    why = [dumb(one.cells, task) for one in tuned]
    reasons = {
        note: True,
        "not calibrated": where.kind == "twohop",
        why[0]: all(why) and not (decisive and "mastered" in why),
        f"best rate at the edge for {edges} of {models} models": edges,
        "rates of other data": not where.paired and any(one.single for one in tuned),
    }
    return because(reasons)


def tuned_lines(rows, task):
    """Yields (Regime, {k: Tuned}), with those lines of the regime that have the largest number of seeds."""
    found = defaultdict(dict)
    for (where, k), line in lines(rows).items():
        if one := tune(line, task):
            found[where][k] = one
    for where, by_k in found.items():
        most = max(len(one.seeds) for one in by_k.values())
        yield where, {k: one for k, one in by_k.items() if len(one.seeds) == most}


def voters(where, by_k, task, decisive=False):
    """The lines {k: Tuned} of one regime that may vote, or all of them if none may."""
    return {k: one for k, one in by_k.items() if not silent(where, [one], task, decisive=decisive)} or by_k


def slopes(rows, task, value, margin, unit, note=lambda where: "", decisive=False):
    """A Test per regime: the slope of value(row, task) over doublings of E, mean over k, at the best rates for the
    task. note(regime): why it has no vote, or ""; decisive: as in `silent`."""
    for where, by_k in tuned_lines(rows, task):
        by_k = voters(where, by_k, task, decisive)
        tuned = list(by_k.values())
        effects = by_seed([rises(one, lambda row: value(row, task)) for one in tuned], np.mean)
        label = f"{where}, k={','.join(map(str, by_k))}; {results.TASKS[task]}"
        runs, why = sum(len(one.rows) for one in tuned), silent(where, tuned, task, note(where), decisive)
        yield Test(label, effects, margin, f"{unit} per doubling of E", runs, note=why, paired=where.paired)


def beside(where):
    return "beside the loss"


# ---- the claims


def memory_rises(rows):
    """The loss of the facts decides, because recall jumps from nothing to everything within a doubling of training."""
    yield from slopes(rows, "facts", lambda row, task: -loss(row, task), 0.02, "fewer nats per token")
    yield from slopes(rows, "facts", percent, 0.5, "points of recall", beside)


def reasoning_turns(rows):
    """With few problems the loss of unseen solutions rises with E. With new ones, the negative control, it must not.

    A line that is mastered up to its largest E votes: with the claimed rise it would not be mastered there."""

    def note(where):
        if not where.unique:
            return "negative control"
        return "more problems, see claim 3" if where.unique > SCARCE else ""

    yield from slopes(rows, "problems", loss, RISE, "nats per token more", note, decisive=True)
    yield from at_one_rate(rows)
    scarce = [row for row in rows if row["run"]["unique"]]
    yield from slopes(scarce, "problems", lambda row, task: -percent(row, task), 0.5, "points lost", beside)
    failed = lambda row, task: -100.0 * (accuracy(row, task) >= LEARNED)
    yield from slopes(scarce, "problems", failed, 1.0, "% fewer runs that learn", beside)


def at_one_rate(rows):
    """Claim 2 at one rate for all E, without a vote."""
    for (where, k), line in lines(rows).items():
        compared = where.usual and 0 < where.unique <= SCARCE
        for rate in sorted({rate for rates in line.values() for rate in rates}) if compared else ():
            cells = {e: {rate: rates[rate]} for e, rates in line.items() if len(rates.get(rate, ())) >= MIN_SEEDS}
            if len(cells) > 3 and (one := tune(cells, "problems")):
                label = f"{where}, k={k}, all at rate {rate:g}; solutions"
                unit = "nats per token more per doubling of E"
                yield Test(label, rises(one, solution_loss), RISE, unit, len(one.rows), note="one rate for all")


def optimum_near_20(rows):
    """Unseen solutions are best between 10 and 40 tokens per parameter, and it is tokens of reasoning that count:
    with more different problems the loss rises less with E."""
    unit = "nats worse outside 10 to 40 tokens per parameter"
    for where, by_k in tuned_lines(rows, "problems"):
        for k, one in by_k.items():
            tpp = {e: next(iter(cell.values()))["tpp"] for e, cell in one.cells.items()}
            sides = {e: (tpp[e] > BRACKET[1]) - (tpp[e] < BRACKET[0]) for e in tpp}  # -1: fewer, 0: between, 1: more
            if len(set(sides.values())) < 3:
                continue
            parts = {side: [cell for e, cell in one.cells.items() if sides[e] == side] for side in (-1, 0, 1)}
            mean = lambda side, seed, parts=parts: np.mean([solution_loss(cell[seed]) for cell in parts[side]])
            gaps = {seed: [mean(side, seed) - mean(0, seed) for side in (-1, 1)] for seed in one.seeds}
            effects = {}
            for seed in gaps:  # the other seeds choose the better side, so that noise cannot
                others = [gap for s, gap in gaps.items() if s != seed] or [[0.0, 0.0]]
                effects[seed] = float(gaps[seed][int(np.argmin(np.mean(others, 0)))])
            label, why = f"{where}, k={k}; solutions, against the better side", silent(where, [one], "problems")
            yield Test(label, effects, 0.02, unit, len(one.rows), note=why, paired=where.paired)
    yield from dose_response(rows)


def trends(rows, place, x, label, unit, sign=1, span=0.0):
    """Groups the lines of word problems by place(regime, k); three or more give a Test. The rise of a line is that of
    the unseen-solution loss per doubling of E. The effect is `sign` times the slope of the rises over x(regime, Tuned),
    which must span at least `span`. Lines that may not vote are left out where three others may."""
    groups = defaultdict(list)
    for where, by_k in tuned_lines(rows, "problems"):
        for k, one in by_k.items() if where.kind == "mixture" else ():
            groups[place(where, k)].append((x(where, one), where, one, silent(where, [one], "problems")))
    for (same, k), members in groups.items():
        voting = [member for member in members if not member[-1]]
        members = voting if len(voting) >= 3 else members
        xs, regimes, tuned, notes = zip(*sorted(members, key=lambda member: member[0]), strict=True)
        if len(xs) >= 3 and xs[-1] - xs[0] >= span:
            effects = by_seed([rises(one, solution_loss) for one in tuned], lambda y, xs=xs: sign * slope(xs, y))
            runs, why = sum(len(one.rows) for one in tuned), min({*notes} - {""}, default="")
            yield Test(label(same, k, regimes), effects, 0.02, unit, runs, note=why, paired=same.paired)


def dose_response(rows):
    """How much the rise falls per doubling of the problems, over regimes that differ in nothing else."""
    numbers = lambda regimes: ", ".join(str(where.unique) for where in regimes)
    yield from trends(
        [row for row in rows if row["run"]["unique"]],
        place=lambda where, k: (where._replace(unique=0), k),
        x=lambda where, one: math.log2(where.unique),
        label=lambda same, k, regimes: f"{same}, k={k}; solutions".replace("fresh", numbers(regimes)),
        unit="nats less of a rise per doubling of E, for each doubling of problems",
        sign=-1,
    )


def more_active_moves(rows):
    """How much the rise grows per doubling of active parameters, over widths and k that span a factor of 4 or more."""
    widths = lambda regimes: ",".join(map(str, sorted({where.d_model for where in regimes})))
    yield from trends(
        rows,
        place=lambda where, k: (where._replace(d_model=0, d_expert=0), 0),
        x=lambda where, one: math.log2(one.rows[0]["params"]["active"] - one.rows[0]["params"]["embedding"]),
        label=lambda same, k, regimes: f"{same}; solutions".replace("d=0, F=0", f"d={widths(regimes)}"),
        unit="nats more of a rise per doubling of E, for each doubling of active parameters",
        span=2,
    )


def denser_at_equal_loss(rows):
    """A regression of the loss of solutions on training loss (quadratic) and log2 k/E, over final and earlier points of
    the runs at the best rates for solutions."""
    pooled, why = defaultdict(lambda: defaultdict(list)), defaultdict(dict)
    for where, by_k in tuned_lines(rows, "problems"):
        name, by_k = where._replace(tokens=0, people=0), voters(where, by_k, "problems")
        why[name][silent(where, list(by_k.values()), "problems")] = True
        for row in [row for one in by_k.values() for row in one.rows]:
            pooled[name][row["run"]["seed"]].append(row)
    unit = "nats per token fewer per doubling of k/E at equal training loss"
    for where, seeds in pooled.items():
        effects = {seed: at_equal_loss(members) for seed, members in sorted(seeds.items())}
        effects = {seed: effect for seed, effect in effects.items() if effect is not None}
        runs, note = sum(map(len, seeds.values())), because(why[where])
        yield Test(f"{where}; solutions", effects, 0.02, unit, runs, note=note, paired=where.paired)


def at_equal_loss(members):
    """The coefficient of log2 k/E, positive where denser models are better; None with too few points. Points where
    almost nothing or everything is solved say nothing."""
    points = []
    for row in members:
        density = math.log2(row["run"]["top_k"] / row["run"]["n_experts"])
        for point in (*row["points"], row):
            if 0.02 < accuracy(point, "problems") < 0.98:
                points.append((density, point["train_loss"], -point["problems"]["loss"]))
    if len(points) < 12 or len({density for density, *_ in points}) < 3:
        return None
    density, train, y = np.array(points).T
    design = np.stack([np.ones_like(train), train - train.mean(), (train - train.mean()) ** 2, density], 1)
    return float(np.linalg.lstsq(design, y, rcond=None)[0][3])


SPREADS = (  # task, its value in a row, margin, unit, name
    ("train", lambda row: 100 * math.log(row["train_loss"]), 100 * COMPARABLE, "%", "training loss"),
    ("facts", lambda row: loss(row, "facts"), 0.1, "nats", "facts"),
    ("problems", solution_loss, RISE, "nats", "solutions"),
)


def top_k_alone(rows):
    """How much the worst k loses against the best, where k F and E F are the same. The other seeds choose both k."""
    groups = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for row in results.counted(rows):
        run, where = row["run"], results.regime(row)._replace(d_expert=0)
        if where.kind == "mixture":
            group = groups[where, run["top_k"] * run["d_expert"], run["n_experts"] * run["d_expert"]]
            group[run["top_k"]][row["lr"]][run["seed"]] = row
    for (where, active, total), line in sorted(groups.items()):
        shared = f"{where}, k F={active}, E F={total}, k={','.join(map(str, sorted(line)))}".replace("F=0, ", "")
        for task, value, margin, unit, name in SPREADS if len(line) > 2 else ():
            if one := tune(line, task):
                edges = f"best rate at the edge for k={','.join(map(str, one.edges))}"
                reasons = {"rates not compared": one.single, edges: one.edges}
                reasons |= {dumb(one.cells, task): True} if task == "problems" else {}
                label, unit = f"{shared}; {name}", f"{unit} between the best and worst k"
                effects = spread(one, value) if len(one.seeds) > 1 else {}
                yield Test(label, effects, margin, unit, len(one.rows), True, because(reasons), where.paired)


def spread(tuned, value):
    """{seed: value(row) at the x where the other seeds' mean is largest, minus that at the x where it is smallest}"""
    effects = {}
    for seed in tuned.seeds:
        means = {x: np.mean([value(r) for s, r in cell.items() if s != seed]) for x, cell in tuned.cells.items()}
        most, least = max(means, key=means.get), min(means, key=means.get)
        effects[seed] = value(tuned.cells[most][seed]) - value(tuned.cells[least][seed])
    return effects


def gentler_training(rows):
    """How much the loss of unseen solutions falls per halving of the rate, from the rate with the best training loss to
    the next lower one with a comparable training loss. Means over the seeds choose both rates, so that no lucky seed
    does."""
    found = {True: defaultdict(list), False: defaultdict(list)}
    for (where, _), line in lines(rows, 1).items():
        for rates in line.values() if where.kind == "mixture" else ():
            sound = {rate: {s: r for s, r in cell.items() if not r["diverged"]} for rate, cell in rates.items()}
            full = {rate: cell for rate, cell in sound.items() if len(cell) >= MIN_SEEDS}
            common = sorted(set.intersection(*map(set, full.values()))) if full else []
            full = {rate: {s: cell[s] for s in common} for rate, cell in full.items()}
            if len(full) < 3 or len(common) < MIN_SEEDS or dumb(full, "problems"):
                continue
            losses = {rate: np.mean([row["train_loss"] for row in cell.values()]) for rate, cell in full.items()}
            best = min(losses, key=losses.get)
            if lower := [r for r in losses if r < best and losses[r] <= (1 + COMPARABLE) * losses[best]]:
                low = max(lower)
                for seed in common:
                    gain = solution_loss(full[best][seed]) - solution_loss(full[low][seed])
                    found[where.paired][seed].append(gain / math.log2(best / low))
    for paired, gains in found.items():
        effects = {seed: float(np.mean(values)) for seed, values in sorted(gains.items())}
        runs = 2 * sum(map(len, gains.values()))
        label = f"learning rate, all regimes{'' if paired else ', unpaired'}; solutions"
        unit = "nats fewer per halving at comparable training loss"
        yield Test(label, effects, 0.02, unit, runs, paired=paired)


def still_lost(rows, remedies):
    """Points lost from the best E to the largest, before and with each remedy {name: (when, measure)}, from rows of
    study.posttrain. A remedy has no vote where no loss before it is shown."""
    if all(when == "before" for when, _ in remedies.values()):  # how a model was post-trained later does not matter
        rows = list({(row["checkpoint"], row["seed"], row["n_experts"], row["top_k"]): row for row in rows}.values())
    for (d, k, same), cells in posttrain.families(rows).items():
        settings, training = json.loads(same)
        paired = bool(training.get("paired"))
        problems = f", {training['unique']:,} problems" if training else ""
        where = f"d={d}, k={k}{problems}{'' if paired else ', unpaired'}"
        answers = f"{settings.get('batch_prompts')} x {settings.get('group_size')} answers"
        budget = f", {settings.get('steps')} steps of {answers} to {settings.get('questions')} questions"
        budget += ", experts replayed" if settings.get("replay") else ""
        # An E without all seeds of the largest E is left out; otherwise all E would have to lose those seeds.
        cells = {E: cell for E, cell in cells.items() if cell.keys() >= cells[max(cells)].keys()}
        if len(cells) < 3:
            continue
        unit, runs = "points lost from the best E to the largest", sum(map(len, cells.values()))
        shared = dict(margin=2.0, unit=unit, runs=runs, paired=paired)
        before = Test(f"{where}; greedy answers before", lost(cells, "before", "greedy"), **shared)
        yield before._replace(note="before any remedy")
        enough, shown = len(before.effects) >= MIN_SEEDS, decide(before) == "supported"
        why = "" if shown else "no loss before is shown" if enough else "too few seeds"
        for name, (when, measure) in remedies.items():
            label = f"{where}{budget if when == 'after' else ''}; {name}"
            yield Test(label, lost(cells, when, measure), note=why, **shared)


def lost(cells, when, measure):
    """{seed: percent of problems lost from the best E to the largest}. The other seeds' greedy answers, before any
    remedy, say which E is best."""
    effects = {}
    for seed, at_largest in cells[max(cells)].items():
        others = {E: [row["before"]["greedy"] for s, row in cell.items() if s != seed] for E, cell in cells.items()}
        if all(others.values()):
            best = cells[max(others, key=lambda E: np.mean(others[E]))][seed]  # noqa: B023  used at once
            effects[seed] = 100 * float(np.mean(best[when][measure]) - np.mean(at_largest[when][measure]))
    return effects


RESCUE = "does not rescue a model that is too sparse"
REMEDIES = (  # text, what is compared: results of study.posttrain
    (f"More test-time compute {RESCUE}", {"majority of all draws": ("before", "majority")}),
    (f"GRPO {RESCUE}", {"greedy answers after": ("after", "greedy")}),
)
CLAIMS = (  # text, what computes it, presets that decide it
    ("Memory rises with total parameters at fixed active parameters", memory_rises, "room scarce2 scarce2_k2"),
    ("Reasoning turns over as total parameters grow", reasoning_turns, "scarce2 dose fresh scarce2_k2 adamw2"),
    ("Reasoning is best near 20 tokens per parameter", optimum_near_20, "dose long4"),
    ("At equal training loss, denser models reason better", denser_at_equal_loss, "scarce2 dose scarce2_k2"),
    ("Top-k alone changes little at fixed active and total size", top_k_alone, "topk2"),
    ("Lower learning rates help reasoning", gentler_training, "scarce2 scarce2_k2"),
    ("More active compute moves the optimum to denser models", more_active_moves, "width"),
)
