"""The verdict of the results on each claim of the paper:  python -m study.verdict

Writes the table of claims between two marker lines of docs/STUDY.md, and every effect to docs/study/appendix.md.
docs/study/rules.md has the rules.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data import files
from optimoe import config
from optimoe.config import require
from study import posttrain, results, rules
from study.claims import CLAIMS, REMEDIES, decide, overall, still_lost
from study.execute import Run, key
from study.presets import PRESETS, foreseen
from study.results import MIN_SEEDS, accuracy
from study.rules import interval, seeds_needed
from study.sweep import gpu_minutes

SILENT = ("beside", "nothing learned", "mastered", "control", "one rate")  # in notes of tests that can never vote
BEGIN, END = "<!-- claims: begin (python -m study.verdict) -->", "<!-- claims: end -->"


@dataclass(frozen=True)
class VerdictConfig:
    results: str = "study/results.jsonl"  # rows of study.sweep
    posttrain: str = "study/posttrain.jsonl"  # rows of study.posttrain
    out: str = "docs/STUDY.md"  # the page whose table of claims is replaced
    appendix: str = "docs/study/appendix.md"  # every effect, one table a claim


class Claim(NamedTuple):
    text: str
    tests: list  # of all runs
    settled: list  # of the runs of finished presets: these alone decide
    presets: tuple

    @property
    def verdict(self):
        return overall(self.settled)


def settled(rows, presets):
    """The rows that may decide a claim: of regimes and k that its presets have finished, and of the first edition."""
    done, lines = {row["key"] for row in rows}, {True: set(), False: set()}
    line = lambda row: (results.regime(row), row["run"]["top_k"])
    for name in presets:
        runs = PRESETS[name](rows)
        lines[{*map(key, runs)} <= done] |= {line({"run": vars(run)}) for run in runs}
    finished = lines[True] - lines[False]
    return [row for row in rows if not row["run"]["paired"] or line(row) in finished]


def settled_models(rows, posttrained):
    """The rows of study.posttrain that may decide: unpaired ones, and those of `votes` if all its models are there."""
    wanted, found = {*map(key, PRESETS["votes"](rows))}, defaultdict(dict)
    paired = lambda row: (row.get("run") or {}).get("paired")
    for row in filter(paired, posttrained):
        found[json.dumps(row["settings"], sort_keys=True)][key(Run(**row["run"]))] = row
    finished = [cell[name] for cell in found.values() if wanted <= cell.keys() for name in cell if name in wanted]
    return [row for row in posttrained if not paired(row) or row in finished]


def computed(rows, posttrained):
    """The nine claims."""
    claims = [(text, at, names.split()) for text, at, names in CLAIMS]
    found = [Claim(text, list(at(rows)), list(at(settled(rows, names))), names) for text, at, names in claims]
    tests = lambda rows: [list(still_lost(rows, remedies)) for _, remedies in REMEDIES]
    lost = zip(REMEDIES, tests(posttrained), tests(settled_models(rows, posttrained)), strict=True)
    return found + [Claim(text, now, at_end, ("votes",)) for (text, _), now, at_end in lost]


def stopped(presets, rows):
    """The stop rule that holds for one of these presets, in words, or ""."""
    return next(filter(None, (rules.stop_rule(name, rows) for name in presets)), "")


def missing(presets, rows, posttrained, test):
    """The runs up to the end of these presets and their minutes on one GPU, in words."""
    stop, parts = stopped(presets, rows), []
    for name in presets:
        runs = PRESETS[name](rows) if stop else foreseen(name, rows)
        minutes = gpu_minutes(runs, rows) or 0.0
        if name == "votes" and posttrained:  # each model is post-trained and questioned too
            minutes += len(runs) * sum(sum(row["seconds"]) for row in posttrained) / len(posttrained) / 60
        if runs:
            parts.append(f"`{name}` {len(runs)} runs" + (f", {minutes:.0f} min" if minutes else ""))
    needed = seeds_needed(test.effects.values(), test.margin) if test and test.votes and not test.little else None
    if needed and needed > len(test.effects):
        parts.append(f"at this spread {needed} seeds would decide")
    return ("stopped by its rule; otherwise " if stop else "") + ("; ".join(parts) or "nothing")


def number(value):
    return "–" if value is None else f"{value:+.3g}"


def strongest(tests):
    """The test for a one-line summary: one that votes or could, paired, with most seeds and runs."""
    loud = [test for test in tests if not any(word in test.note for word in SILENT)] or tests
    return max(loud, key=lambda test: (test.votes, test.paired, len(test.effects), test.runs), default=None)


def contradiction(tests):
    """The clearest votes for and against a claim: with the highest lower and the lowest upper bound."""
    votes = [test for test in tests if test.votes and len(test.effects) >= MIN_SEEDS]
    sides = {found: [test for test in votes if decide(test) == found] for found in ("supported", "not supported")}
    bounds = lambda test: interval(test.effects.values())
    return [
        max(sides["supported"], key=lambda t: bounds(t)[1]),
        min(sides["not supported"], key=lambda t: bounds(t)[2]),
    ]


def in_words(verdict):
    return "not supported at this scale" if verdict == "not supported" else verdict


def effect(test):
    """(effect and interval, half-width) in words"""
    if not test or not test.effects:
        return "no runs", "–"
    mean, low, high = interval(test.effects.values())
    shown = f"{number(mean)} ({number(low)} to {number(high)}) {test.unit}"
    shown += "" if test.votes else f"; no vote: {test.note}"
    return shown, "–" if low is None else f"{(high - low) / 2:.2g}"


def claims_table(claims, rows, posttrained=()):
    """A row for each claim: verdict, effect and interval of its strongest test, what would decide it."""
    lines = ["| claim of the paper | verdict | effect and 95 % interval | half-width | seeds | still to run |"]
    lines.append("|---|---|---|---|---|---|")
    for n, claim in enumerate(claims, 1):
        verdict, now = claim.verdict, overall(claim.tests)
        sides = contradiction(claim.settled) if verdict == "mixed" else []
        complete = verdict != "undecided" or any(test.votes and test.paired for test in claim.settled)
        test = strongest(sides or (claim.settled if complete else claim.tests))
        words = f"**{in_words(verdict)}**"
        if verdict != "undecided":
            words += ", paired" if test.paired else ", unpaired"
        if now != verdict:
            words += f"; so far {in_words(now)}"
        elif verdict != "undecided" and (strongest(claim.tests).paired, test.paired) == (True, False):
            words += "; so far also paired"
        shown, half = zip(*map(effect, sides or [test]), strict=True)
        if sides:  # each with what distinguishes it from the other
            parts = [side.where.split(", ") for side in sides]
            names = [", ".join(x for x in mine if x not in other) for mine, other in (parts, parts[::-1])]
            shown = [f"{name}: {text}" for name, text in zip(names, shown, strict=True)]
        seeds = [len(side.effects) if side else 0 for side in sides or [test]]
        cells = [f"{n}. {claim.text}", words, *("; ".join(map(str, each)) for each in (shown, half, seeds))]
        lines.append(f"| {' | '.join(cells)} | {missing(claim.presets, rows, posttrained, test)} |")
    return "\n".join(lines)


def best_table(rows):
    """Lines of a table: each paired model at the rate that is best for a task, means over the seeds."""
    yield from ("", "## Each model at its best rates", "")
    yield "| runs | k | E | best for | rate | its loss | facts right | solutions right | seeds |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for (where, k), line in results.lines(rows).items():
        for task in ("facts", "problems") if where.paired else ():
            one = results.tune(line, task)
            for e, cell in one.cells.items() if one else ():
                mean = lambda f, task, cell=cell: sum(f(row, task) for row in cell.values()) / len(cell)
                both = [f"{mean(accuracy, t):.0%}" if t in one.rows[0] else "–" for t in ("facts", "problems")]
                found = (results.TASKS[task], f"{one.rates[e]:g}", f"{mean(results.loss, task):.3g}", *both, len(cell))
                yield f"| {where} | {k} | {e} | {' | '.join(map(str, found))} |"


def appendix(claims, rows):
    """All effects, as Markdown."""
    minutes, flops = sum(row["seconds"] / row["jobs"] for row in rows) / 60, sum(row["flops"] for row in rows)
    devices = ", ".join(sorted({row["device"] for row in rows})) or "no device yet"
    count = lambda holds: sum(map(holds, rows))
    pairings = [rules.pairing(rows, paired=kind) for kind in (True, False)]
    left, unpaired = (f"{share:.2f} ({n} pairs of cells)" if n else "an unknown share" for share, n in pairings)
    lines = [
        "# The study: every effect",
        "",
        "Written by `python -m study.verdict`. [How to read it](rules.md), and [what it means](../STUDY.md).",
        "",
        f"{len(rows)} runs, {count(lambda row: row['run']['paired'])} of them paired, {minutes:.1f} device minutes, "
        f"{flops:.3g} training FLOPs on {devices}; {count(lambda row: row['diverged'])} diverged. "
        f"{len(rows) - len(results.counted(rows))} have no vote: runs done again, with k = 1 (their routers got no "
        "gradient from the loss), with other initial weights, or on text.",
        "",
        f"Pairing: {left} of the variance between two E is left where both have the same seed and so the same weights; "
        f"{unpaired} where the seed shares only the data (first edition).",
    ]
    for n, claim in enumerate(claims, 1):
        lines += ["", f"## {n}. {claim.text}: {claim.verdict}", ""]
        if reason := stopped(claim.presets, rows):
            lines += [f"Stopped: {reason}.", ""]
        besides = [test for test in claim.settled if test.votes and test not in claim.tests]
        tests = [test for test in claim.tests + besides if test.effects]
        if not tests:
            lines.append("Not enough runs.")
            continue
        lines += ["| runs | effect | 95 % interval | margin | seeds | verdict |", "|---|---|---|---|---|---|"]
        for test in sorted(tests, key=lambda test: (not test.votes, not test.paired, "beside" in test.note)):
            mean, low, high = interval(test.effects.values())
            said = decide(test) if test.votes else f"no vote: {test.note}"
            if test.votes and len(test.effects) < MIN_SEEDS:
                said += f" (fewer than {MIN_SEEDS} seeds)"
            if test.votes and test not in claim.settled:
                said = f"so far {said}: its preset is not finished"
            effect = f"{number(mean)} {test.unit} | {number(low)} to {number(high)}"
            margin = f"{'below' if test.little else 'above'} {test.margin:g} | {len(test.effects)}"
            lines.append(f"| {test.where}; {test.runs} runs | {effect} | {margin} | {said} |")
    return "\n".join([*lines, *best_table(rows)]) + "\n"


def write(path, table):
    """Replace what is between the markers of the file. ValueError if they are missing."""
    require(Path(path).is_file(), "out", path, f"no such page; it needs the lines {BEGIN!r} and {END!r}")
    text = Path(path).read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    require(begin and end, "out", path, f"it needs the two lines {BEGIN!r} and {END!r} where the table belongs")
    files.replace(path, f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")


def main(argv=None):
    cfg = config.parse(VerdictConfig, argv, __doc__)
    rows = results.read(cfg.results)
    require(rows, "results", cfg.results, "there is no run in it; run study.sweep first")
    posttrained = results.read(cfg.posttrain, posttrain.ROW)
    claims = computed(rows, posttrained)
    config.check_file(cfg.appendix, "appendix")
    write(cfg.out, claims_table(claims, rows, posttrained))
    files.replace(cfg.appendix, appendix(claims, rows))
    print(cfg.out, cfg.appendix, sep="\n")


if __name__ == "__main__":
    config.command_line(main)
