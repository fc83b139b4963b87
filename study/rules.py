"""The statistics of the study and the stop rules of its programme (docs/study/rules.md). Their unit is the seed."""

import math
from itertools import combinations

import numpy as np

from study.execute import key
from study.presets import FEW, PRESETS
from study.results import MIN_SEEDS, distinct, lines, loss, tune

T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # for 1 to 10 degrees of freedom
RISE = 0.06  # nats per doubling of E: the smallest rise of the unseen-solution loss that counts for claim 2


def t975(freedom):
    """The 97.5 % point of Student's t; beyond the table by Cornish and Fisher's expansion, good to 0.001."""
    if freedom <= len(T975):
        return T975[freedom - 1]
    z = 1.959964
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return sum(term / freedom**power for power, term in enumerate(terms))


def interval(values):
    """(mean, low, high) of per-seed effects, 95 % by Student's t; low and high None for fewer than two."""
    x = np.array(list(values), dtype=float)
    if len(x) < 2:
        return (float(x[0]) if len(x) else None), None, None
    half = t975(len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def seeds_needed(values, margin):
    """Seeds that would decide against 0 or the margin, whichever is farther from the mean, if mean and spread stay the
    same; None for a thousand or more."""
    x = np.array(list(values), dtype=float)
    if len(x) < 2:
        return None
    distance = max(x.mean() if x.mean() >= margin else 0.0, margin - x.mean())
    enough = (n for n in range(len(x), 999) if t975(n - 1) * x.std(ddof=1) / math.sqrt(n) < distance)
    return next(enough, None) if distance > 0 else None


def pairing(rows, paired=True):
    """(share, number of pairs of cells). share: the variance of the difference between two E in the log loss of
    unseen solutions with one seed, over that with two seeds; below 1 where a shared seed helps. Pooled over cells that
    differ in E alone, of paired runs or of the first edition, whose seeds share only the data. (None, 0) without two
    seeds."""
    groups = {}
    for row in distinct(rows):
        run = row["run"]
        if run["paired"] == paired and run["kind"] == "mixture" and not run["data"] and not row["diverged"]:
            same = tuple((name, value) for name, value in run.items() if name not in ("n_experts", "seed"))
            groups.setdefault(same, {}).setdefault(run["n_experts"], {})[run["seed"]] = row
    within, between = [], []
    for cell in groups.values():
        for a, b in combinations(cell.values(), 2):
            seeds = sorted(set(a) & set(b))
            if len(seeds) >= 2:
                x, y = (np.array([math.log(r[s]["problems"]["loss"]) for s in seeds]) for r in (a, b))
                within.append((x - y).var(ddof=1))
                between.append(x.var(ddof=1) + y.var(ddof=1))
    return (float(sum(within) / sum(between)) if sum(between) else None), len(within)


def slope(x, y):
    return round(float(np.polyfit(x, y, 1)[0]), 9)  # so that a flat line has slope 0


def solution_loss(row):
    return loss(row, "problems")


def rises(tuned, value):
    """{seed: slope of value(row) over doublings of E}"""
    x = np.log2(list(tuned.cells))
    return {seed: slope(x, [value(cell[seed]) for cell in tuned.cells.values()]) for seed in tuned.seeds}


def rise_of_votes(rows):
    """Per seed the rise of the unseen-solution loss per doubling of E, with as many problems as in `votes`."""
    for (where, k), line in lines(rows, wide=5).items():
        if k == 8 and where.usual and where.unique == FEW and (tuned := tune(line, "problems")):
            return list(rises(tuned, solution_loss).values())
    return []


def stop_rule(preset, rows):
    """Why the programme does not run this preset now, or ""."""
    if preset == "scarce2":
        share, cells = pairing(rows)
        if not cells:
            return "scarce2 waits for pairs, which says whether pairing helps and where to look for rates"
        if share >= 1:
            return f"pairing does not cut the variance ({share:.2f} of it is left over {cells} cells); find another way"
    if preset == "votes":
        rise = rise_of_votes(rows)
        if not rise:
            return "votes waits for dose: is there anything to rescue?"
        high = interval(rise)[2]
        if len(rise) >= MIN_SEEDS and high < RISE:
            far = "" if {*map(key, PRESETS["dose"](rows))} <= {row["key"] for row in rows} else " so far"
            what = f"the rise of unseen-solution loss at k = 8 lies below {RISE} nats a doubling{far}"
            return f"{what} (at most {high:.3f})"
    return ""
