"""Two sets of benchmark rows side by side: `python -m bench.compare OLD.csv NEW.csv`, or --compare of any benchmark.

A row regresses when it is at least 3 % slower and its fast quantile (p20) is above the old slow one (p80): beyond the noise of both runs.
"""

import argparse
import os
import subprocess
from pathlib import Path

import torch

from bench.results import KEY, Results, cli, latest, parse, read

FLOOR = 0.03


def verdict(old, new):
    """("slower" | "faster" | "", relative change of p50) of one row; a change inside FLOOR or inside the spreads is no verdict."""
    change = new["p50_ms"] / old["p50_ms"] - 1
    if change > FLOOR and new["p20_ms"] > old["p80_ms"]:
        return "slower", change
    if change < -FLOOR and new["p80_ms"] < old["p20_ms"]:
        return "faster", change
    return "", change


def baseline(source, csv_path):
    """Rows of the file `source`, or of `csv_path` as committed in git revision `source`."""
    if Path(source).is_file():
        return read(source)
    if csv_path is None:
        raise SystemExit(f"--compare {source}: no such file, and for a git revision --csv must name the committed CSV")
    shown = subprocess.run(["git", "show", f"{source}:./{os.path.relpath(csv_path)}"], capture_output=True, text=True)
    if shown.returncode:
        raise SystemExit(
            f"--compare {source}: neither a CSV file nor a git revision that holds {csv_path} ({shown.stderr.strip()})"
        )
    return parse(shown.stdout, f"{csv_path} in {source}")


def compare(old_rows, new_rows):
    """Prints the change of every row that both have (the last of each); returns the number of regressions."""
    old, new = latest(old_rows), latest(new_rows)
    common = [key for key in new if key in old]
    slower = 0
    for key in common:
        word, change = verdict(old[key], new[key])
        slower += word == "slower"
        name = " ".join(str(part) for part in key[:3]) + "  " + ",".join(map(str, key[3:8])) + f"  {key[9]}"
        word = "REGRESSION" if word == "slower" else word
        print(
            f"{name:<70} {old[key]['p50_ms']:>9.4f} -> {new[key]['p50_ms']:>9.4f} ms {change:>+7.1%}  {word}".rstrip()
        )
    print(
        f"{len(common)} rows compared, {slower} regressions; {len(new) - len(common)} rows have no baseline with the same {', '.join(KEY)}"
    )
    return slower


def begin(parser, argv=None, rest=False):
    """(args, Results) of a benchmark's command line; with `rest`, unknown words go to args.rest. The baseline is read now: it may be the very
    file that this run appends to."""
    args, args.rest = parser.parse_known_args(argv)
    if args.rest and not rest:
        parser.error(f"unknown argument {args.rest[0]!r}")
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # tiny shapes: a second thread only waits
    args.baseline = baseline(args.compare, args.csv) if args.compare else None
    return args, Results(args)


def finish(args, results, failures):
    """Prints what was skipped and the comparison; the exit status: 1 after a regression, or when nothing but the ceilings could be measured."""
    for failure in failures:
        print("skipped", failure)
    slower = compare(args.baseline, results.rows) if args.compare else 0
    return 1 if slower or (failures and all(row["kernel"] == "ceiling" for row in results.rows)) else 0


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    args = parser.parse_args(argv)
    return 1 if compare(read(args.old), read(args.new)) else 0


if __name__ == "__main__":
    raise SystemExit(cli(main))
