"""The runs of the study's programme (docs/study/rules.md), each preset a function of the rows there are: what it asks
for next may depend on what was found, such as the rate that is best for a task. `python -m study.sweep PRESET` runs
what is missing.

smoke     two tiny runs: does it work, on a CPU in seconds pairs     1. does pairing cut the variance, and which
rates are best: E 8, 64, 512, k = 8, three numbers of problems, four rates scarce2   2. 1,000 problems, E 8 to 512,
k = 8 and 2: each (E, k) searches its rates, then ten seeds at the best for reasoning dose      3. 500, 2,000 and
4,000 problems at the same number of tokens, k = 8 fresh     negative control: every problem is new votes     4.
the models of E 8, 64, 512 that study.posttrain starts from (--keep=all) width     5. half and twice the width, k =
2 and 8 room      6. memory limited by room: keys with values of 20 bits, met 100 times each, around one bit a
parameter topk2     7. k 2 to 16 where k F and E F are fixed, three rates long4     8. 2^26 tokens, E 4 to 1024, k
= 4: from 67 to 0.65 tokens per parameter adamw2    9. the paper's optimiser at E 8, 64, 512, three rates text4
10. prepared text (--data=DIR:weight,...), d = 256, four epochs; describes, does not vote twohop    two-hop
questions over stored facts, at three numbers of trained questions
"""

import dataclasses
import math

from study.execute import Run, key
from study.results import LIMITS, counted, distinct, loss

EXPERTS = (512, 8, 64, 256, 16, 128, 32)  # extremes first
ENDS = (512, 8, 64)
RATES = (0.003, 0.006, 0.012, 0.024)
SEARCH = 3  # seeds that look for the best rates
START = {"facts": 0.003, "problems": 0.012}  # the best rates of the unpaired runs, where no paired ones are known
SCARCE = 1_000  # problems of the regime that decides claim 2


def smoke(rows, data):
    tiny = dict(d_model=32, n_layers=1, d_expert=32, tokens=2**14, batch=4, seq_len=96, people=20)
    tiny |= dict(max_steps=2, mano_length=2, modulus=5, data_tokens=2**14)
    return [Run(n_experts=e, **tiny) for e in (2, 4)]


def pairs(rows, data):
    return [
        Run(n_experts=e, top_k=8, unique=unique, seed=seed, lr=rate)
        for unique in (SCARCE, 500, 2_000)
        for seed in range(3)
        for e in ENDS
        for rate in RATES
    ]


def scarce2(rows, data):
    return searched(rows, [Run(n_experts=e, top_k=k, unique=SCARCE) for k in (8, 2) for e in EXPERTS], 10)


def dose(rows, data):
    """The rates are searched at three E and borrowed by the others."""
    cells = [Run(n_experts=e, top_k=8, unique=unique) for unique in (500, 4_000, 2_000) for e in EXPERTS]
    ends = searched(rows, [cell for cell in cells if cell.n_experts in ENDS], 6)
    others = [cell for cell in cells if cell.n_experts not in ENDS]
    return ends + rated(rows, [dataclasses.replace(cell, seed=seed) for cell in others for seed in range(6)])


def fresh(rows, data):
    return rated(rows, [Run(n_experts=e, top_k=8, unique=0, seed=seed) for e in ENDS for seed in range(6)])


def votes(rows, data):
    return rated(rows, [Run(n_experts=e, top_k=8, unique=SCARCE, seed=seed) for seed in range(8) for e in ENDS])


def width(rows, data):
    runs = [
        Run(d_model=d, d_expert=d // 2, n_experts=e, top_k=k, unique=SCARCE, seed=seed)
        for d in (64, 256)
        for k in (2, 8)
        for e in (512, 8, 128, 32)
        for seed in range(6)
    ]
    return rated(rows, runs)


def room(rows, data):
    size = dict(kind="room", people=2**17, unique=0, tokens=2**26, data_tokens=2**26, lr=START["facts"])
    experts = (256, 4, 32, 128, 8, 64, 16)
    return [Run(n_experts=max(e, k), top_k=k, seed=seed, **size) for k in (2, 4) for e in experts for seed in range(5)]


def topk2(rows, data):
    return [
        Run(n_experts=8 * total * k, top_k=k, d_expert=256 // k, unique=SCARCE, seed=seed, lr=rate)
        for total in (4, 1)
        for k in (2, 16, 4, 8)
        for seed in range(6)
        for rate in (0.006, 0.012, 0.003)
    ]


def long4(rows, data):
    size = dict(top_k=4, tokens=2**26, data_tokens=2**26, people=16_000)
    experts = (1024, 4, 64, 16, 256, 8, 512, 32, 128)
    return rated(rows, [Run(n_experts=e, seed=seed, **size) for e in experts for seed in range(5)])


def adamw2(rows, data):
    return [
        Run(optimizer="adamw", n_experts=e, top_k=8, unique=SCARCE, seed=seed, lr=rate)
        for e in ENDS
        for seed in range(6)
        for rate in (0.004, 0.002, 0.008)
    ]


def text4(rows, data):
    if not data:
        raise ValueError(
            "data='': the preset text4 needs --data=DIR:weight,DIR:weight of prepared text (python -m data.prepare)"
        )
    size = dict(data=data, optimizer="adamw", d_model=256, n_layers=8, d_expert=256, seq_len=512, init_std=0.02)
    return [
        Run(n_experts=e, top_k=k, seed=seed, lr=0.002, tokens=15_744 * 2**14, **size)
        for k in (2, 8)
        for e in (64, 8, 32)
        for seed in range(3)
    ]


def twohop(rows, data):
    size = dict(kind="twohop", people=200, top_k=2)  # 2,000 facts, 20,000 questions
    return [
        Run(n_experts=e, unique=unique, seed=seed, lr=rate, **size)
        for unique in (8_000, 16_000, 4_000)
        for e in ENDS
        for seed in range(3)
        for rate in (0.003, 0.012)
    ]


PRESETS = {
    preset.__name__: preset
    for preset in (smoke, pairs, scarce2, dose, fresh, votes, width, room, topk2, long4, adamw2, text4, twohop)
}


def searched(rows, cells, seeds):
    """Runs of several (E, k). Each is run from SEARCH seeds until its best rate for facts and its best for
    solutions lie between two others (or at the LIMITS), then from `seeds` seeds at the best for solutions. cells:
    Runs whose rate and seed do not matter."""
    done, known = {row["key"]: row for row in distinct(rows)}, {task: compared(rows, task) for task in START}
    runs = []
    for cell in cells:
        rates = {best_rate(known[task], cell, task) for task in START}
        while True:
            looked = {
                rate: [dataclasses.replace(cell, lr=rate, seed=s) for s in range(SEARCH)] for rate in sorted(rates)
            }
            wanted = [run for runs in looked.values() for run in runs]
            if any(key(run) not in done for run in wanted):
                break
            mean = {
                task: {rate: sum(loss(done[key(run)], task) for run in runs) for rate, runs in looked.items()}
                for task in START
            }
            best = {task: min(of, key=of.get) for task, of in mean.items()}
            beyond = {rate / 2 for rate in best.values() if rate == min(rates)}
            beyond |= {rate * 2 for rate in best.values() if rate == max(rates)}
            beyond = {float(f"{rate:.6g}") for rate in beyond if LIMITS[0] < rate < LIMITS[1]}
            if not beyond:
                rate = best["problems"]
                wanted += [dataclasses.replace(cell, lr=rate, seed=s) for s in range(SEARCH, seeds)]
                break
            rates |= beyond
        runs += wanted
    return runs


def compared(rows, task):
    """{(k, E, problems, tokens, width, optimiser, kind): best rate for the task}: paired runs that compared two
    rates from SEARCH seeds."""
    cells, found = {}, {}
    for row in counted(rows):
        run = row["run"]
        if run["paired"] and not run["data"] and task in row:
            rates = cells.setdefault(place(run), {})
            rates.setdefault(row["lr"], {})[run["seed"]] = loss(row, task)
    for where, rates in cells.items():
        full = {rate: seeds for rate, seeds in sorted(rates.items()) if len(seeds) >= SEARCH}
        if len(full) > 1 and (common := set.intersection(*map(set, full.values()))):
            found[where] = min(full, key=lambda rate: sum(full[rate][s] for s in common))  # noqa: B023  used at once
    return found


def place(run):
    names = ("top_k", "n_experts", "unique", "tokens", "d_model", "optimizer", "kind")
    return tuple(run[name] for name in names)


def best_rate(known, run, task):
    """The rate of the nearest place of `compared`, in doublings of its numbers; the START of the task where there
    is none."""
    mine = place(vars(run))
    alike = [where for where in known if where[5:] == mine[5:]]
    size = lambda number: math.log2(number or 2**20)  # noqa: E731  no limit to different problems is very many
    far = lambda where: sum(abs(size(a) - size(b)) for a, b in zip(where[:5], mine[:5], strict=True))  # noqa: E731
    return known[min(alike, key=lambda where: (far(where), where))] if alike else START[task]


def rated(rows, runs, task="problems"):
    """The runs at the rates that are best for a task where the most similar runs compared them."""
    known = compared(rows, task)
    return [dataclasses.replace(run, lr=best_rate(known, run, task)) for run in runs]
