"""How each claim of the paper is put to the runs: what it predicts, one effect per seed, its interval, the verdict.

docs/study/rules.md has the rules in words; study/verdict.py writes the tables."""

import json
import math
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from study import posttrain, results
from study.execute import Run
from study.presets import SCARCE
from study.results import MIN_SEEDS, accuracy, lines, loss, tune
from study.rules import RISE, interval, seeds_needed

MASTERED = 0.1  # nats per token: a line whose solutions cost less everywhere has nothing to lose
COMPARABLE = 0.05  # training losses within this share of each other count as equal; those of two seeds differ as much
LEARNED = 0.8  # share of whole solutions from which a run counts as having learned to solve problems
BRACKET = (
    10,
    40,
)  # tokens per parameter that a line must reach on both sides to say where between them an optimum lies


class Test(NamedTuple):
    """One claim put to one set of runs."""

    where: str  # regime and task
    effects: dict  # seed -> effect, positive as claimed
    margin: float
    unit: str
    runs: int
    little: bool = False  # the claim is that the effect, of whatever sign, is smaller than the margin
    note: str = ""  # why it has no vote, if it has none
    paired: bool = True

    @property
    def votes(self):
        return not self.note


def decide(test):
    mean, low, high = interval(test.effects.values())
    if len(test.effects) < MIN_SEEDS:
        return "undecided"
    if test.little:
        outside = max(low, -high) > test.margin
        return "supported" if max(-low, high) < test.margin else "not supported" if outside else "undecided"
    return "supported" if low > 0 and mean >= test.margin else "not supported" if high < test.margin else "undecided"


def overall(tests):
    """Paired runs decide where there are any with enough seeds, else unpaired ones: supported or not when at least
    half of the votes say so and none the opposite, mixed when both are among them."""
    voting = [test for test in tests if test.votes and len(test.effects) >= MIN_SEEDS]
    voting = [test for test in voting if test.paired] or voting
    found = [decide(test) for test in voting]
    if {"supported", "not supported"} <= set(found):
        return "mixed"
    for verdict in ("supported", "not supported"):
        if verdict in found and 2 * found.count(verdict) >= len(found):
            return verdict
    return "undecided"


def would_decide(test):
    """What is still missing of an undecided test, in words."""
    mean, low, high = interval(test.effects.values())
    if low is None:
        return "more seeds"
    needed = None if test.little else seeds_needed(test.effects.values(), test.margin)
    return f"half-width {(high - low) / 2:.2g}" + (f"; about {needed} seeds would decide" if needed else "")


# ---- what every claim needs


def slope(x, y):
    return round(float(np.polyfit(x, y, 1)[0]), 9)  # a flat line has slope 0


def rises(cells, value):
    """{seed: slope of value(row) over doublings of E} of {E: {seed: row}}."""
    x = np.log2(list(cells))
    return {s: slope(x, [value(cell[s]) for cell in cells.values()]) for s in next(iter(cells.values()))}


def solution_loss(row):
    return loss(row, "problems")


def mean_of(effects):
    """Per-seed effects of several lines as one: the mean over the lines that have the seed of all."""
    seeds = set.intersection(*map(set, effects)) if effects else ()
    return {seed: float(np.mean([effect[seed] for effect in effects])) for seed in sorted(seeds)}


def count(tuned):
    return sum(len(cell) for one in tuned for cell in one.cells.values())


def percent(row, task):
    return 100 * (accuracy(row, task) or 0.0)


def tells(cells, task):
    """Whether a line can say something: somewhere 5 points above the best constant answer, and somewhere not
    mastered."""
    rows = [row for cell in cells.values() for row in cell.values()]
    floor = 5 + 100 * max(row[task].get("chance", 0) for row in rows)
    means = [np.mean([percent(row, task) for row in cell.values()]) for cell in cells.values()]
    worst = max(np.mean([loss(row, task) for row in cell.values()]) for cell in cells.values())
    return max(means) > floor and min(means) < 95 and (task != "problems" or worst > MASTERED)


def silent(where, tuned, task):
    """Why tuned lines of one regime have no vote, or ""."""
    edges = [x for one in tuned for x in one.edges]
    reasons = {
        "text describes": where.data,
        "not calibrated": where.kind == "twohop",
        "nothing learned, or everything": not where.data and not any(tells(one.cells, task) for one in tuned),
        f"best rate at the edge for {len(edges)} of {sum(len(one.cells) for one in tuned)} models": edges,
        "rates of other data": not where.paired and any(one.single for one in tuned),
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds)


def tuned_lines(rows, task, wide=3):
    """[(Regime, {k: Tuned})] with the lines of a regime that have the seeds of the longest list."""
    found = {}
    for (where, k), line in lines(rows, wide).items():
        sample = next(row for rates in line.values() for seeds in rates.values() for row in seeds.values())
        if (task == "train" or task in sample) and (one := tune(line, task)):
            found.setdefault(where, {})[k] = one
    for where, by_k in found.items():
        most = max(len(next(iter(one.cells.values()))) for one in by_k.values())
        found[where] = {k: one for k, one in by_k.items() if len(next(iter(one.cells.values()))) == most}
    return found.items()


def slopes(rows, task, value, margin, unit, note=lambda where: ""):
    """A Test per regime: the slope of value(row, task) over doublings of E, mean over k, at the best rates for the
    task.

    note(regime): why it has no vote, or \"\"."""
    for where, by_k in tuned_lines(rows, task):
        tuned = list(by_k.values())
        effects = [rises(one.cells, lambda row: value(row, task)) for one in tuned]
        why = "; ".join(filter(None, (note(where), silent(where, tuned, task))))
        label = f"{where}, k={','.join(map(str, by_k))}; {task_name(task, where)}"
        yield Test(label, mean_of(effects), margin, unit, count(tuned), note=why, paired=where.paired)


def beside_loss(where):
    return "beside the loss"


def task_name(task, where):
    return (results.TEXT_TASKS if where.data else results.TASKS).get(task, task)


# ---- the claims


def memory_rises(rows):
    """The loss of the values decides: exact recall jumps from nothing to everything within a doubling of training."""
    yield from slopes(rows, "facts", lambda row, t: -loss(row, t), 0.02, "fewer nats per token per doubling of E")
    yield from slopes(rows, "facts", percent, 0.5, "points of recall per doubling of E", beside_loss)
    for task in ("triviaqa", "hellaswag"):
        yield from slopes(rows, task, lambda row, t: -loss(row, t), 0.02, "fewer bits per byte per doubling of E")


def reasoning_turns(rows):
    """Scarce problems: the loss of unseen solutions rises with E. Where every problem is new it must not: the
    negative control."""
    text, made = ([row for row in rows if bool(row["run"]["data"]) == is_text] for is_text in (True, False))
    scarce = [row for row in made if row["run"]["unique"]]
    fresh = [row for row in made if not row["run"]["unique"] and row["run"]["kind"] == "mixture"]
    dose = lambda where: "more problems, see claim 3" if where.unique > SCARCE else ""  # noqa: E731
    more = "nats per token more per doubling of E"
    yield from slopes(scarce, "problems", loss, RISE, more, dose)
    yield from slopes(fresh, "problems", loss, RISE, more, lambda where: "negative control")
    points = lambda row, t: -percent(row, t)  # noqa: E731
    learns = lambda row, t: -100.0 * (accuracy(row, t) >= LEARNED)  # noqa: E731
    yield from slopes(scarce, "problems", points, 0.5, "points lost per doubling of E", beside_loss)
    yield from slopes(scarce, "problems", learns, 1.0, "% fewer runs that learn per doubling of E", beside_loss)
    for task in ("gsm8k", "humaneval"):
        yield from slopes(text, task, loss, RISE, "bits per byte more per doubling of E")


def optimum_near_20(rows):
    """Unseen solutions are best between 10 and 40 tokens per parameter, and it is tokens of reasoning that count:
    with more different problems the loss rises less with E."""
    for where, by_k in tuned_lines(rows, "problems"):
        for k, one in by_k.items():
            tpp = {e: next(iter(cell.values()))["tpp"] for e, cell in one.cells.items()}
            sides = [[e for e in tpp if tpp[e] < BRACKET[0]], [e for e in tpp if tpp[e] > BRACKET[1]]]
            near = [e for e in tpp if BRACKET[0] <= tpp[e] <= BRACKET[1]]
            if not all(sides) or not near:
                continue
            means = lambda line, es: np.mean([loss(line[e], "problems") for e in es])  # noqa: E731
            effects = {}
            for seed in next(iter(one.cells.values())):
                line = {e: cell[seed] for e, cell in one.cells.items()}
                others = [
                    {e: cell[s] for e, cell in one.cells.items()} for s in next(iter(one.cells.values())) if s != seed
                ]
                gap = [np.mean([means(o, side) - means(o, near) for o in others]) if others else 0.0 for side in sides]
                closer = sides[int(np.argmin(gap))]  # the other seeds choose the side, so that noise cannot
                effects[seed] = float(means(line, closer) - means(line, near))
            why, label = silent(where, [one], "problems"), f"{where}, k={k}; solutions"
            unit = "nats worse outside 10 to 40 tokens per parameter, on the better side"
            yield Test(label, effects, 0.02, unit, count([one]), note=why, paired=where.paired)
    yield from dose_response(rows)


def dose_response(rows):
    """Regimes that differ in the number of problems alone: how much the slope of the unseen-solution loss over E
    falls per doubling."""
    groups = defaultdict(dict)
    for where, by_k in tuned_lines(rows, "problems"):
        for k, one in by_k.items():
            if where.unique and where.kind == "mixture" and not where.data:
                groups[where._replace(unique=0), k][where.unique] = one
    for (where, k), doses in groups.items():
        if len(doses) < 3:
            continue
        by_dose = {n: rises(one.cells, solution_loss) for n, one in sorted(doses.items())}
        seeds = set.intersection(*map(set, by_dose.values()))
        x = [math.log2(n) for n in by_dose]
        effects = {s: -slope(x, [effect[s] for effect in by_dose.values()]) for s in sorted(seeds)}
        why = "; ".join(filter(None, [silent(where, [one], "problems") for one in doses.values()][:1]))
        label = f"{where}, k={k}, {', '.join(map(str, by_dose))} problems; solutions"
        unit = "nats per doubling of E less, per doubling of problems"
        yield Test(label, effects, 0.02, unit, count(doses.values()), note=why, paired=where.paired)


def denser_at_equal_loss(rows):
    """A regression on training loss (quadratic) and log2 k/E, over final and earlier points of the runs at the
    best rates for solutions."""
    pooled = defaultdict(lambda: defaultdict(list))
    why, runs = defaultdict(list), defaultdict(int)
    for where, by_k in tuned_lines(rows, "problems"):
        name = where._replace(tokens=0, people=0)
        why[name].append(silent(where, list(by_k.values()), "problems"))
        for one in by_k.values():
            runs[name] += count([one])
            for cell in one.cells.values():
                for seed, row in cell.items():
                    pooled[name][seed].append(row)
    units = (("loss", 0.02, "nats per token fewer"), ("accuracy", 0.5, "points more"))
    for where, seeds in pooled.items():
        for measure, margin, unit in units:
            effects = {seed: at_equal_loss(members, measure) for seed, members in sorted(seeds.items())}
            effects = {seed: effect for seed, effect in effects.items() if effect is not None}
            note = "beside the loss" if measure == "accuracy" else "; ".join(sorted(set(filter(None, why[where]))))
            unit = f"{unit} per doubling of k/E at equal training loss"
            yield Test(f"{where}; solutions", effects, margin, unit, runs[where], note=note, paired=where.paired)


def at_equal_loss(members, measure):
    """The coefficient of log2 k/E, positive where denser models are better; None with too few points. Points at
    the floor (nothing solved) and at the ceiling say nothing."""
    points = []
    for row in members:
        for point in (*row["points"], row):
            share, nats = accuracy(point, "problems"), point["problems"]["loss"]
            if 0.02 < share < 0.98:
                value = 100 * share if measure == "accuracy" else -nats
                points.append((math.log2(row["run"]["top_k"] / row["run"]["n_experts"]), point["train_loss"], value))
    if len(points) < 12 or len({density for density, *_ in points}) < 3:
        return None
    density, train, y = np.array(points).T
    design = np.stack([np.ones_like(train), train - train.mean(), (train - train.mean()) ** 2, density], 1)
    return float(np.linalg.lstsq(design, y, rcond=None)[0][3])


def top_k_alone(rows):
    """What the choice of k is worth where k F and E F are the same: the best k against the worst, which the other
    seeds choose."""
    groups = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for row in results.counted(rows):
        run = row["run"]
        if not run["data"] and run["kind"] == "mixture":
            where = results.regime(row)._replace(d_expert=0)
            group = (where, run["top_k"] * run["d_expert"], run["n_experts"] * run["d_expert"])
            groups[group][run["top_k"]][row["lr"]][run["seed"]] = row
    values = (
        ("train", lambda row: 100 * math.log(row["train_loss"]), 100 * COMPARABLE, "%", "training loss"),
        ("facts", lambda row: loss(row, "facts"), 0.1, "nats", "facts"),
        ("problems", lambda row: loss(row, "problems"), RISE, "nats", "solutions"),
    )
    for (where, active, total), line in sorted(groups.items()):
        for task, value, margin, unit, name in values:
            one = tune(line, task) if len(line) >= 3 else None
            if one is None:
                continue
            mastered = "mastered" if task == "problems" and not tells(one.cells, task) else ""
            why = "; ".join(filter(None, ("rates not compared" if one.single else "", edge_note(one), mastered)))
            label = f"{where}, k F={active}, E F={total}, k={','.join(map(str, sorted(line)))}; {name}"
            label = label.replace("F=0, ", "")
            effects = {seed: spread(one.cells, value, seed) for seed in next(iter(one.cells.values()))}
            effects = {seed: effect for seed, effect in effects.items() if effect is not None}
            unit = f"{unit} between the best and worst k"
            yield Test(label, effects, margin, unit, count([one]), True, why, where.paired)


def edge_note(one):
    return f"best rate at the edge for k={','.join(map(str, one.edges))}" if one.edges else ""


def spread(cells, value, seed):
    """value(row) of this seed where the other seeds' mean is largest, minus that where it is smallest; None
    without other seeds."""
    means = {
        x: np.mean([value(row) for s, row in cell.items() if s != seed]) for x, cell in cells.items() if len(cell) > 1
    }
    if len(means) < len(cells):
        return None
    return value(cells[max(means, key=means.get)][seed]) - value(cells[min(means, key=means.get)][seed])


def gentler_training(rows):
    """Loss of unseen solutions at the next lower rate (or smaller initial weights) than the one with the best
    training loss, where the training losses are comparable. The mean over the seeds says which these are: a lucky
    seed must not choose."""
    for name, text in (("lr", "learning rate"), ("init_std", "initial weights")):
        for paired in (True, False):
            yield gentler([row for row in rows if row["run"]["paired"] == paired], name, text, paired)


def gentler(rows, name, text, paired):
    groups = defaultdict(lambda: defaultdict(dict))
    for row in results.distinct(rows):
        run = row["run"]
        usual = name == "init_std" or run["init_std"] == Run.init_std
        if not row["diverged"] and not run["data"] and run["kind"] == "mixture" and run["top_k"] > 1 and usual:
            same = tuple((field, v) for field, v in run.items() if field not in (name, "seed"))
            groups[same][run[name]][run["seed"]] = row
    found, runs = defaultdict(list), 0
    for line in groups.values():
        most = max(map(len, line.values()))
        full = {value: cell for value, cell in line.items() if len(cell) == most >= MIN_SEEDS}
        if len(full) < 3 or not tells(full, "problems"):
            continue
        losses = {value: np.mean([row["train_loss"] for row in cell.values()]) for value, cell in full.items()}
        best = min(losses, key=losses.get)
        lower = [value for value in losses if value < best and losses[value] <= (1 + COMPARABLE) * losses[best]]
        if lower:
            low, runs = max(lower), runs + 2 * most
            for seed in set(full[low]) & set(full[best]):
                gain = loss(full[best][seed], "problems") - loss(full[low][seed], "problems")
                found[seed].append(gain / math.log2(best / low))
    effects = {seed: float(np.mean(values)) for seed, values in sorted(found.items())}
    label = f"{text}, all regimes{'' if paired else ', unpaired'}; solutions"
    return Test(label, effects, 0.02, "nats fewer per halving at comparable training loss", runs, paired=paired)


def more_active_moves(rows):
    """How much the rise of the unseen-solution loss per doubling of E grows with a doubling of active parameters,
    by width and k."""
    groups = defaultdict(list)
    for where, by_k in tuned_lines(rows, "problems"):
        for one in by_k.values():
            row = next(row for cell in one.cells.values() for row in cell.values())
            active = math.log2(row["params"]["active"] - row["params"]["embedding"])
            if where.kind == "mixture" and not where.data:
                groups[where._replace(d_model=0, d_expert=0)].append(
                    (active, rises(one.cells, solution_loss), where, one)
                )
    for where, found in groups.items():
        active = [a for a, *_ in found]
        if len(found) < 3 or max(active) - min(active) < 2:  # a factor of four
            continue
        seeds = set.intersection(*(set(rise) for _, rise, *_ in found))
        effects = {s: slope(active, [rise[s] for _, rise, *_ in found]) for s in sorted(seeds)}
        why = "; ".join(sorted({note for _, _, w, one in found if (note := silent(w, [one], "problems"))})[:1])
        widths = ", ".join(map(str, sorted({w.d_model for _, _, w, _ in found})))
        label = f"{where}; solutions".replace("d=0, F=0", f"d={widths}")
        unit = "nats per doubling of E more, per doubling of active parameters"
        yield Test(label, effects, 0.02, unit, count([one for *_, one in found]), note=why, paired=where.paired)


def still_lost(rows, remedies):
    """Points lost from the best E, by the greedy answers of the other seeds before any remedy, to the largest,
    before and with each remedy {name: (when, measure)} of study.posttrain. No vote where it is not shown that
    anything was lost before."""
    if all(when == "before" for when, _ in remedies.values()):  # whatever the model was post-trained with later
        rows = list({(row["checkpoint"], row["seed"], row["n_experts"], row["top_k"]): row for row in rows}.values())
    for (d, k, same), cells in posttrain.families(rows).items():
        settings, training = json.loads(same)
        paired = bool(training.get("paired"))
        where = (
            f"d={d}, k={k}" + (f", {training['unique']:,} problems" if training else "") + ", unpaired" * (not paired)
        )
        budget = (
            f", {settings.get('steps')} steps of {settings.get('batch_prompts')} x {settings.get('group_size')} answers"
        )
        budget += f" to {settings.get('questions')} questions" + ", experts replayed" * bool(settings.get("replay"))
        # An E that lacks seeds of the largest would cost all others theirs; without the largest the claim would be
        # about another E.
        cells = {E: cell for E, cell in cells.items() if cell.keys() >= cells[max(cells)].keys()}
        if len(cells) < 3:
            continue
        unit, runs = "points lost from the best E to the largest", sum(len(cell) for cell in cells.values())
        shared = dict(margin=2.0, unit=unit, runs=runs, paired=paired)
        before = lost(cells, "before", "greedy")
        yield Test(f"{where}; greedy answers before", before, note="before any remedy", **shared)
        shown = decide(Test("", before, 2.0, "", 0)) == "supported"
        why = "" if shown else "no loss before is shown" if len(before) >= MIN_SEEDS else "too few seeds"
        for name, (when, measure) in remedies.items():
            label = f"{where}{budget if when == 'after' else ''}; {name}"
            yield Test(label, lost(cells, when, measure), note=why, **shared)


def lost(cells, when, measure):
    """{seed: percent of problems lost from the best E, chosen by the other seeds, to the largest}"""
    effects = {}
    for seed in cells[max(cells)]:
        others = {
            E: [np.mean(r["before"]["greedy"]) for s, r in cell.items() if s != seed] for E, cell in cells.items()
        }
        if all(others.values()):
            best = max(others, key=lambda E: np.mean(others[E]))  # noqa: B023  used at once
            at = lambda E: np.mean(cells[E][seed][when][measure])  # noqa: B023, E731
            effects[seed] = 100 * float(at(best) - at(max(cells)))
    return effects


REMEDIES = (  # text, what is compared: results of study.posttrain
    (
        "More test-time compute does not rescue a model that is too sparse",
        {"majority of all draws": ("before", "majority")},
    ),
    ("GRPO does not rescue a model that is too sparse", {"greedy answers after": ("after", "greedy")}),
)
CLAIMS = (  # text, what computes it, presets that decide it
    ("Memory rises with total parameters at fixed active parameters", memory_rises, ("room", "scarce2")),
    ("Reasoning turns over as total parameters grow", reasoning_turns, ("scarce2", "dose", "fresh")),
    ("Reasoning is best near 20 tokens per parameter", optimum_near_20, ("dose", "long4")),
    ("At equal training loss, denser models reason better", denser_at_equal_loss, ("scarce2",)),
    ("Top-k alone changes little at fixed active and total size", top_k_alone, ("topk2",)),
    ("Lower rates and smaller initial weights help reasoning", gentler_training, ("scarce2",)),
    ("More active compute moves the optimum to denser models", more_active_moves, ("width",)),
)
