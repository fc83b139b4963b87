"""The runs of the study's programme, whose table is in docs/study/rules.md:  python -m study.sweep PRESET

Each preset is a function of the rows so far, because its runs may depend on them, for example on the best rate for a
task.
"""

import dataclasses
import functools
import itertools
import math
from operator import itemgetter

from study.execute import Run, key
from study.results import LIMITS, counted, distinct, loss

EXPERTS = (512, 8, 64, 256, 16, 128, 32)  # extremes first
ENDS = (512, 8, 64)
RATES = (0.003, 0.006, 0.012, 0.024)
SEARCH = 3  # seeds that search for the best rates
START = {"facts": 0.003, "problems": 0.012}  # the best rates of the unpaired runs, where no paired ones are known
SCARCE = 500  # problems of the regime that decides claim 2; 1,000 are mastered at their best rates
ENOUGH = 1_000
FEW = 250  # problems of the later presets: with rates up to 0.1 sparse models solved fewer here, but not with 500


def smoke(rows):
    """Two tiny runs, not part of the study, to see that it works."""
    tiny = dict(d_model=32, n_layers=1, d_expert=32, tokens=2**14, batch=4, seq_len=96, people=20)
    tiny |= dict(max_steps=2, mano_length=2, modulus=5, data_tokens=2**14)
    return [Run(n_experts=e, **tiny) for e in (2, 4)]


def grid(over, **fields):
    """Runs at every combination of the values in `over` {field: values}, the first field outermost."""
    return [Run(**fields | dict(zip(over, values, strict=True))) for values in itertools.product(*over.values())]


def pairs(rows):
    return grid(dict(unique=(ENOUGH, SCARCE, 2_000), seed=range(3), n_experts=ENDS, lr=RATES), top_k=8)


def scarce2(rows, top_k=8):
    return searched(rows, grid(dict(n_experts=EXPERTS), top_k=top_k, unique=SCARCE), 10)


def scarce2_k2(rows):
    return scarce2(rows, top_k=2)


def dose(rows):
    """Rates for facts are searched at three E only, because these runs are about problems."""
    problems = (250, 177, 125)
    cells = grid(dict(n_experts=(*ENDS, 16, 32, 128, 256), unique=problems), top_k=8)
    return searched(rows, cells, 6, facts=ENDS)


def fresh(rows):
    """The negative controls: every problem is new, or there are enough of them."""
    new = rated(rows, grid(dict(n_experts=ENDS, seed=range(6)), top_k=8, unique=0))
    return new + searched(rows, grid(dict(n_experts=ENDS), top_k=8, unique=ENOUGH), 10)


def votes(rows):
    return rated(rows, grid(dict(seed=range(8), n_experts=ENDS), top_k=8, unique=FEW))


def width(rows):
    over = dict(top_k=(2, 8), n_experts=(512, 8, 128, 32), seed=range(6))
    return rated(rows, [run for d in (64, 256) for run in grid(over, d_model=d, d_expert=d // 2, unique=FEW)])


def room(rows):
    """Memory limited by capacity: 100 exposures, around one bit a parameter."""
    size = dict(kind="room", people=2**17, unique=0, tokens=2**26, data_tokens=2**26, lr=START["facts"])
    return grid(dict(top_k=(2, 4), n_experts=(256, 4, 32, 128, 8, 64, 16), seed=range(5)), **size)


def topk2(rows):
    """k F = 256, and two values of E F."""
    shapes = [dict(n_experts=8 * total * k, top_k=k, d_expert=256 // k) for total in (4, 1) for k in (2, 16, 4, 8)]
    return searched(rows, [Run(unique=FEW, **shape) for shape in shapes], 6)


def long4(rows):
    size = dict(top_k=4, tokens=2**26, data_tokens=2**26, people=16_000, unique=FEW)
    return rated(rows, grid(dict(n_experts=(1024, 4, 64, 16, 256, 8, 512, 32, 128), seed=range(5)), **size))


def adamw2(rows):
    return searched(rows, grid(dict(n_experts=ENDS), optimizer="adamw", top_k=8, unique=FEW), 6)


def twohop(rows):
    """2,000 facts, 20,000 questions."""
    over = dict(unique=(8_000, 16_000, 4_000), n_experts=ENDS, seed=range(3), lr=(0.003, 0.012))
    return grid(over, kind="twohop", people=200, top_k=2)


PROGRAMME = (smoke, pairs, dose, fresh, scarce2, votes, width, room, topk2, long4, scarce2_k2, adamw2, twohop)
PRESETS = {preset.__name__: preset for preset in PROGRAMME}


def searched(rows, cells, seeds, facts=None):
    """The runs of cells, which are Runs without rate and seed. SEARCH seeds of each try rates until half and twice its
    best ones for facts and for solutions were tried (or the LIMITS are reached), and also all that are best for
    solutions in another cell with as many problems, because noise may end a search beside a better rate. Then `seeds`
    seeds run at the best rate for solutions.

    facts: the E at which rates for facts are searched; None for all."""
    done, known = {row["key"]: row for row in distinct(rows)}, {task: compared(rows, task) for task in START}
    asked = {cell: [t for t in START if t != "facts" or facts is None or cell.n_experts in facts] for cell in cells}
    rates = {cell: {best_rate(known[task], cell, task) for task in asked[cell]} for cell in cells}

    def search(cell):
        """(runs, best rate for solutions, None where runs are missing)"""
        while True:
            wanted = [dataclasses.replace(cell, lr=rate, seed=s) for rate in sorted(rates[cell]) for s in range(SEARCH)]
            if any(key(run) not in done for run in wanted):
                return wanted, None
            cost = lambda rate, task: sum(loss(done[key(r)], task) for r in wanted if r.lr == rate)  # noqa: B023
            best = {task: min(sorted(rates[cell]), key=functools.partial(cost, task=task)) for task in asked[cell]}
            beside = {float(f"{rate * factor:.6g}") for rate in best.values() for factor in (0.5, 2)}
            beside = {rate for rate in beside - rates[cell] if LIMITS[0] < rate < LIMITS[1]}
            if not beside:
                return wanted, best["problems"]
            rates[cell] |= beside

    while True:
        found = {cell: search(cell) for cell in cells}
        alike = {cell: {rate for other, (_, rate) in found.items() if other.unique == cell.unique} for cell in cells}
        ended = [cell for cell in cells if None not in alike[cell]]
        if all(alike[cell] <= rates[cell] for cell in ended):
            break
        for cell in ended:
            rates[cell] |= alike[cell]
    rest = [dataclasses.replace(cell, lr=found[cell][1], seed=s) for cell in ended for s in range(SEARCH, seeds)]
    return [run for wanted, _ in found.values() for run in wanted] + rest


def compared(rows, task):
    """{place(run): best rate for the task} where paired runs compared two or more rates with SEARCH seeds."""
    cells, found = {}, {}
    for row in counted(rows):
        run = row["run"]
        if run["paired"] and task in row:
            cells.setdefault(place(run), {}).setdefault(row["lr"], {})[run["seed"]] = loss(row, task)
    for where, rates in cells.items():
        full = {rate: seeds for rate, seeds in sorted(rates.items()) if len(seeds) >= SEARCH}
        if len(full) > 1 and (common := set.intersection(*map(set, full.values()))):
            found[where] = min(full, key=lambda rate: sum(full[rate][s] for s in common))  # noqa: B023  used at once
    return found


place = itemgetter("top_k", "n_experts", "unique", "tokens", "d_model", "optimizer", "kind")  # of the fields of a run


def best_rate(known, run, task):
    """The rate in `known` of the place nearest to the run's in doublings of its numbers, or the START of the task."""
    mine = place(vars(run))
    alike = [where for where in known if where[5:] == mine[5:]]
    size = lambda number: math.log2(number or 2**20)  # 0 problems: no limit, so very many
    far = lambda where: sum(abs(size(a) - size(b)) for a, b in zip(where[:5], mine[:5], strict=True))
    return known[min(alike, key=lambda where: (far(where), where))] if alike else START[task]


def rated(rows, runs):
    """The runs, each at the rate that was best for solutions in the most similar runs that compared rates."""
    known = compared(rows, "problems")
    return [dataclasses.replace(run, lr=best_rate(known, run, "problems")) for run in runs]


def foreseen(preset, rows):
    """The runs that a preset still lacks, if its searches find the best rates of the most similar runs."""
    known, rows, done = {task: compared(rows, task) for task in START}, list(rows), {row["key"] for row in rows}
    found = []
    while todo := [run for run in dict.fromkeys(PRESETS[preset](rows)) if key(run) not in done]:
        for run in todo:
            away = {task: abs(math.log2(run.lr / best_rate(known[task], run, task))) for task in START}
            measured = {task: {"loss": doublings} for task, doublings in away.items()}
            rows.append({"key": key(run), "run": vars(run), "lr": run.lr, "diverged": False, **measured})
        done |= {*map(key, todo)}
        found += todo
    return found
