"""What the results say about each claim of the paper:  python -m study.verdict

Writes the table of claims between the two marker lines of docs/STUDY.md, whose other text is written by hand, and
every effect that was computed to docs/study/appendix.md. --out= prints both. docs/study/rules.md has the rules.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import files
from optimoe import config
from optimoe.config import require
from study import posttrain, results, rules
from study.claims import CLAIMS, REMEDIES, decide, overall, still_lost, would_decide
from study.execute import Run
from study.presets import PRESETS
from study.results import MIN_SEEDS, accuracy
from study.rules import interval
from study.sweep import gpu_minutes

BEGIN, END = "<!-- claims: begin (python -m study.verdict) -->", "<!-- claims: end -->"


@dataclass(frozen=True)
class VerdictConfig:
    results: str = "study/results.jsonl"  # rows of study.sweep
    posttrain: str = "study/posttrain.jsonl"  # rows of study.posttrain
    out: str = "docs/STUDY.md"  # the page whose table of claims is replaced; empty: print table and appendix
    appendix: str = "docs/study/appendix.md"  # every effect, one table a claim


def computed(rows, posttrained):
    """[(text, tests, presets)] of the nine claims."""
    found = [(text, list(compute(rows)), presets) for text, compute, presets in CLAIMS]
    return found + [(text, list(still_lost(posttrained, remedies)), ("votes",)) for text, remedies in REMEDIES]


def missing(presets, rows):
    """The runs missing of these presets and their minutes on one GPU, in words; "" when there are none."""
    todo = {run for name in presets for run in PRESETS[name](rows, "")} - {Run(**row["run"]) for row in rows}
    minutes = gpu_minutes(todo, rows)
    cost = f", about {minutes:.0f} min" if minutes else ""
    return f"{len(todo)} runs of `{'`, `'.join(presets)}`{cost}" if todo else ""


def number(value):
    return "–" if value is None else f"{value:+.3g}"


def strongest(tests):
    """The test that a one-line summary shows: one that votes or could, paired, with most seeds and runs."""
    silent = lambda test: any(word in test.note for word in ("beside", "nothing learned", "describes", "control"))  # noqa: E731
    order = lambda test: (test.votes, not silent(test), test.paired, len(test.effects), test.runs)  # noqa: E731
    return max(tests, key=order, default=None)


def claims_table(claims, rows):
    """A row for each claim: verdict, effect and interval of its strongest test, what is missing."""
    lines = ["| claim of the paper | verdict | effect and 95 % interval | seeds | missing |", "|---|---|---|---|---|"]
    for n, (text, tests, presets) in enumerate(claims, 1):
        test, verdict = strongest(tests), overall(tests)
        shown = "no runs"
        if test and test.effects:
            mean, low, high = interval(test.effects.values())
            shown = f"{number(mean)} ({number(low)} to {number(high)}) {test.unit}"
            shown += "" if test.votes else f"; no vote: {test.note}"
        kind = "" if verdict == "undecided" or not test else ", paired" if test.paired else ", unpaired"
        words = "not supported at this scale" if verdict == "not supported" else verdict
        seeds = len(test.effects) if test else 0
        lines.append(f"| {n}. {text} | **{words}**{kind} | {shown} | {seeds} | {missing(presets, rows) or 'nothing'} |")
    return "\n".join(lines)


def noise(rows):
    """A sentence on runs that were done twice: what the same run differs by from itself."""
    pairs = [pair for pair in results.repeats(rows) if "problems" in pair[0]]
    if not pairs:
        return ""
    rms = lambda value: math.sqrt(np.mean([(value(a) - value(b)) ** 2 for a, b in pairs]))  # noqa: E731
    points = lambda task: rms(lambda row: 100 * accuracy(row, task))  # noqa: E731
    same = sum(a["train_loss"] == b["train_loss"] and a["facts"] == b["facts"] for a, b in pairs)
    losses = [rms(lambda row, t=task: results.loss(row, t)) for task in ("train", "facts")]
    return (
        f" {len(pairs)} are runs done again on a GPU, {same} of these with the same bits; root mean square difference: "
        f"training loss {losses[0]:.3f}, fact loss {losses[1]:.3f}, recall {points('facts'):.1f} points, solutions "
        f"{points('problems'):.1f}. The first of each is used."
    )


def appendix(claims, rows):
    """All effects, as Markdown."""
    minutes, flops = sum(row["seconds"] / row["jobs"] for row in rows) / 60, sum(row["flops"] for row in rows)
    devices = ", ".join(sorted({row["device"] for row in rows})) or "no device yet"
    paired, diverged = sum(row["run"]["paired"] for row in rows), sum(row["diverged"] for row in rows)
    pairings = [rules.pairing(rows, paired=kind) for kind in (True, False)]
    left, unpaired = (f"{share:.2f} ({n} pairs of cells)" if n else "an unknown share" for share, n in pairings)
    lines = [
        "# The study: every effect",
        "",
        "Written by `python -m study.verdict`. [How to read it](rules.md), and [what it means](../STUDY.md).",
        "",
        f"{len(rows)} runs, {paired} of them paired, {minutes:.1f} device minutes, {flops:.3g} training FLOPs on "
        f"{devices}; {diverged} diverged.{noise(rows)}",
        "",
        f"{sum(row['run']['top_k'] == 1 for row in rows)} runs have k = 1. Their normalised gate is always 1, so "
        "the loss gave their routers no gradient. They are in no line and have no vote.",
        "",
        f"Pairing: {left} of the variance between two E is left where both have the same seed and so the same weights; "
        f"{unpaired} where the seed shares only the data (first edition).",
    ]
    for n, (text, tests, _) in enumerate(claims, 1):
        lines += ["", f"## {n}. {text}: {overall(tests)}", ""]
        if not tests:
            lines.append("Not enough runs.")
            continue
        lines += ["| runs | effect | 95 % interval | margin | seeds | verdict |", "|---|---|---|---|---|---|"]
        for test in tests:
            mean, low, high = interval(test.effects.values())
            said = decide(test) if test.votes else f"no vote: {test.note}"
            if test.votes and len(test.effects) < MIN_SEEDS:
                said += f" (fewer than {MIN_SEEDS} seeds)"
            elif said == "undecided":
                said += f" ({would_decide(test)})"
            effect = f"{number(mean)} {test.unit} | {number(low)} to {number(high)}"
            margin = f"{'below' if test.little else 'above'} {test.margin:g} | {len(test.effects)}"
            lines.append(f"| {test.where}; {test.runs} runs | {effect} | {margin} | {said} |")
    return "\n".join(lines) + "\n"


def write(path, table):
    """Replace what is between the markers of the file. Raises ValueError when they are not there."""
    text = Path(path).read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    require(begin and end, "out", path, f"it needs the two lines {BEGIN!r} and {END!r} where the table belongs")
    files.replace(path, f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")


def main(argv=None):
    try:
        cfg = config.parse(VerdictConfig, sys.argv[1:] if argv is None else argv, __doc__)
        rows = results.read(cfg.results)
        remedy = f"there is no run in it to write a table of into {cfg.out}; run study.sweep first"
        require(rows or not cfg.out, "results", cfg.results, remedy)
        given = cfg.posttrain != VerdictConfig.posttrain
        posttrained = results.read(cfg.posttrain, posttrain.ROW, optional=not given)
        claims = computed(rows, posttrained)
        table, text = claims_table(claims, rows), appendix(claims, rows)
        if not cfg.out:
            print(table, text, sep="\n\n")
            return
        write(cfg.out, table)
        files.replace(cfg.appendix, text)
        print(cfg.out, cfg.appendix, sep="\n")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
