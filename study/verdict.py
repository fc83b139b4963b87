"""What the results say about each claim of the paper:  python -m study.verdict study/results.jsonl --out docs/STUDY.md

Of the two claims about remedies, votes and GRPO, the rows of study.posttrain say it (--posttrain).

Writes the tables between the two marker lines of docs/STUDY.md (or to stdout); the text around them is written by hand.

The rules, the same for every claim:
  runs       Only runs that differ in nothing but what the claim is about are compared (results.families): lines along E at one learning rate, and the
             line of the best rate of each (E, k), once each of its points has run the same three rates or more (COMPARED) from the same seeds; longer
             and other runs borrow these. Only the best-rate lines vote. One rate for all is shown beside them: it is nearer the best of one E than of
             another, and how near is not what the claims are about. Rates that nobody compared make no line.
  effect     one number per seed, in the claim's direction (positive: as claimed), computed from that seed's runs alone. Where heights are compared
             after picking the best (or worst) of several noisy points, the other seeds' mean picks, so that noise cannot make a peak or a
             spread. Where a peak is, each seed says for itself: what the other seeds' means say would agree too well.
  interval   95 %: bootstrap over the seeds, widened by sqrt(n/(n-1)) * t(n-1)/1.96 because the bootstrap alone is too sure with few seeds
  margin     the smallest effect that would matter, fixed here, not fitted
  verdict    supported: the interval lies above 0 and the effect reaches the margin; not supported: the interval lies below the margin;
             undecided: anything else, and always with fewer than MIN_SEEDS seeds. Lines of models that learned nothing, or everything, have no say.
             Of a claim that an effect is small: supported when the interval lies within the margin on both sides of 0, not supported when outside.
A claim with several regimes or tasks is (not) supported when at least half of those with enough seeds say so and none the opposite, "mixed" when
both are among them.
The rule about runs is not the one fixed before the first run. That one gave each run the rate of the nearest of five corners and compared across them; in
the first sweep (107 runs) the rate changed along a line from 0.012 to 0.003 and moved recall more than E did. Nothing else was changed.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np

from optimoe.config import require
from study import posttrain, results
from study.claims import CLAIMS, MIN_SEEDS, REMEDIES, decide, interval, overall, score, still_lost
from study.execute import Run
from study.sweep import PRESETS, comparisons, gpu_minutes, settle

BEGIN, END = "<!-- tables: begin (python -m study.verdict) -->", "<!-- tables: end -->"


def number(value):
    return "–" if value is None else f"{value:+.2f}"


def missing(presets, rows):
    """The runs missing of these presets and the minutes of one GPU that they would take, in words; "" when there are none."""
    todo = settle([run for name in presets for run in PRESETS[name]("")], rows)
    minutes = gpu_minutes(todo, rows)
    return (
        f"{len(todo)} runs of `{'`, `'.join(presets)}`" + (f", about {minutes:.0f} minutes" if minutes else "")
        if todo
        else ""
    )


def noise(rows):
    """A sentence on runs that were done twice: what the same run differs by from itself."""
    pairs = [pair for pair in results.repeats(rows) if not pair[0]["run"]["data"]]
    if not pairs:
        return ""
    rms = lambda value: math.sqrt(np.mean([(value(a) - value(b)) ** 2 for a, b in pairs]))  # noqa: E731
    same = sum(a["train_loss"] == b["train_loss"] and a["facts"] == b["facts"] for a, b in pairs)
    return (
        f" {len(pairs)} are runs done again, {same} of these with the same bits; root mean square difference: training loss "
        f"{rms(lambda row: row['train_loss']):.3f}, loss of the values {rms(lambda row: row['facts']['loss']):.3f}, recall "
        f"{rms(lambda row: score(row, 'facts')):.1f} points, solutions {rms(lambda row: score(row, 'problems')):.1f}, mental arithmetic "
        f"{rms(lambda row: score(row, 'mano')):.1f}. The first of each is used below."
    )


def edges(rows):
    """A sentence on the (E, k) whose best rate was the lowest or the highest that they tried, so that a better one may lie beyond."""
    compared = [
        (group, rates, results.best(rates))
        for group, rates in comparisons(rows)
        if group["init_std"] == Run.init_std and len(rates) >= 3
    ]
    compared = [(group, rates, rate) for group, rates, rate in compared if rate]
    names = [
        f"E={group['n_experts']} k={group['top_k']} F={group['d_expert']} ({rate:g})"
        for group, rates, rate in compared
        if rate in (min(rates), max(rates))
    ]
    return f"Three rates or more were compared at {len(compared)} sets of one (E, k); the best was at the edge for {len(names)}: {', '.join(names) or 'none'}."


def tables(rows, posttrained=()):
    """The generated part of docs/STUDY.md, from the rows of the sweep and of study.posttrain."""
    claims = [(text, list(compute(rows)), missing(presets, rows)) for text, compute, presets in CLAIMS]
    models = {(row["d_model"], row["n_experts"], row["top_k"], row["seed"]) for row in posttrained}
    left = {(run.d_model, run.n_experts, run.top_k, run.seed) for run in PRESETS["family"]("")} - models
    claims += [
        (text, list(still_lost(posttrained, remedies)), f"{len(left)} models of `family`" if left else "")
        for text, remedies in REMEDIES
    ]
    minutes, flops = sum(row["seconds"] / row["jobs"] for row in rows) / 60, sum(row["flops"] for row in rows)
    devices = ", ".join(sorted({row["device"] for row in rows})) or "no device yet"
    diverged = sum(row["diverged"] for row in rows)
    lines = [
        f"{len(rows)} runs, {minutes:.1f} device minutes, {flops:.3g} training FLOPs on {devices}; {diverged} diverged.{noise(rows)}",
        "",
        edges(rows),
        "",
        "| claim of the paper | verdict | sets of runs: for / against / open | still missing |",
        "|---|---|---|---|",
    ]
    for number_, (text, found, cost) in enumerate(claims, 1):
        verdicts = [decide(test) for test in found if test.votes]
        cost = cost or ("more seeds" if overall(found) == "undecided" else "nothing")
        tally = (
            " / ".join(str(verdicts.count(v)) for v in ("supported", "not supported", "undecided"))
            if verdicts
            else "no runs"
        )
        unlost = text in dict(REMEDIES) and any(len(test.effects) >= MIN_SEEDS for test in found)
        why = "" if verdicts else ": no loss to rescue is shown" if unlost else ": not enough runs"
        lines.append(f"| {number_}. {text} | **{overall(found)}**{why} | {tally} | {cost} |")
    for number_, (text, found, _) in enumerate(claims, 1):
        lines += ["", f"### {number_}. {text}", ""]
        if not found:
            lines.append("Undecided: not enough runs.")
            continue
        lines += ["| runs | effect | 95 % interval | margin | seeds | verdict |", "|---|---|---|---|---|---|"]
        for test in found:
            mean, low, high = interval(test.effects.values())
            margin = f"{'below' if test.little else 'above'} {test.margin:g}"
            note = (
                f" ({test.note})"
                if test.note
                else f" (fewer than {MIN_SEEDS} seeds)"
                if len(test.effects) < MIN_SEEDS
                else ""
            )
            lines.append(
                f"| {test.where}; {test.runs} runs | {number(mean)} {test.unit} | {number(low)} to {number(high)} | {margin} | "
                f"{len(test.effects)} | {decide(test) if test.votes else 'no vote'}{note} |"
            )
    return "\n".join(lines)


def write(path, generated):
    """Replace what is between the markers of the file. Raises ValueError when they are not there."""
    text = Path(path).read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path}: needs the two lines {BEGIN!r} and {END!r}; put them where the tables belong")
    Path(path).write_text(f"{before}{BEGIN}\n\n{generated}\n\n{END}{after}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", default="study/results.jsonl")
    parser.add_argument(
        "--posttrain", default="study/posttrain.jsonl", help="results of study.posttrain (default: %(default)s)"
    )
    parser.add_argument("--out", help="file whose tables are replaced; default: print them")
    args = parser.parse_args(argv)
    try:
        rows = results.read(args.results)
        require(
            rows or not args.out,
            "results",
            args.results,
            f"there is no run in it to write tables of into {args.out}; run study.sweep first",
        )
        generated = tables(
            rows,
            results.read(args.posttrain, posttrain.ROW, optional=args.posttrain == parser.get_default("posttrain")),
        )
        if args.out:
            write(args.out, generated)
            print(args.out)
        else:
            print(generated)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
