"""Evaluate a checkpoint: accuracy and task loss, with standard errors.

    python -m eval --run=runs/NAME --tasks=hellaswag,gsm8k --limit=200
    python -m eval --run=runs/NAME --tasks=humaneval --samples=20 --temperature=0.8 --top-p=0.95  # pass@1 and pass@10

Prints a table and writes results.json and TASK.jsonl, with one record per item, to RUN/eval-STEP. The same command
continues where it was interrupted, or adds the items of a larger --limit.
"""

import collections
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data import files
from eval import harness, probes, sandbox, tasks
from eval.taskloss import bits, encode_pair, mean_stderr, score
from eval.votes import pass_at_k
from optimoe import config
from optimoe.config import require


@dataclass(frozen=True)
class EvalConfig(harness.EvalChoice):
    # Tasks
    tasks: tuple[str, ...] = ()  # names of files in eval/tasks
    loss: bool = True  # measure task loss
    accuracy: bool = True  # generate answers and score them

    def validate(self):
        super().validate()
        require(self.tasks, "tasks", "", f"name some of {', '.join(tasks.NAMES)}")
        require(self.loss or self.accuracy, "accuracy", False, "with --loss=false there is nothing to measure")
        remedy = "greedy samples are all equal; give a --temperature"
        require(self.samples == 1 or self.temperature > 0, "samples", self.samples, remedy)
        for name in self.tasks:
            tasks.load(name)


class Job(NamedTuple):
    """A task of one evaluation."""

    task: object
    shots: int
    items: list
    generates: bool  # whether the model writes answers


def metrics_of(job, cfg) -> dict[str, set[str]]:
    """The names of each item's metrics, by its id."""
    names = {"bits/token", "bits/byte"} if cfg.loss else set()
    if job.generates and job.task.program:
        names |= {f"pass@{k}" for k in (1, 10, 100) if k <= cfg.samples}
    elif job.generates:
        names |= set(job.task.score(job.items[0], ""))
    compared = names | {"acc", "acc_norm"} if cfg.accuracy else names
    return {item.id: compared if item.choices else names for item in job.items}


def evaluate(loaded, job, chunk, room, cfg):
    """Records of a chunk of (index, item): metrics, and what they are computed from. room: tokens to generate."""
    wanted = [(item.loss_prompt or item.prompt, item.answer) for _, item in chunk if cfg.loss]
    wanted += [pair for _, item in chunk if cfg.accuracy for pair in item.compared()]
    # The right choice and the answer are often one pair, computed once.
    pairs = {pair: encode_pair(loaded.tokens, *pair) for pair in wanted}
    nats = dict(zip(pairs, score(loaded.model, [pair[:2] for pair in pairs.values()]), strict=True))

    records = []
    for _, item in chunk:
        record = {"id": item.id, "group": item.group, "metrics": {}}
        if cfg.loss:
            pair = item.loss_prompt or item.prompt, item.answer
            (context, answer, merged), size = pairs[pair], len(item.answer.encode())
            cut = len(context) + len(answer) > loaded.model.cfg.seq_len + 1
            record |= {"nats": nats[pair], "tokens": len(answer), "bytes": size, "merged": merged, "cut": cut}
            record["metrics"] |= {"bits/token": bits(nats[pair], len(answer)), "bits/byte": bits(nats[pair], size)}
        if cfg.accuracy and item.choices:
            record["choices"] = costs = [nats[pair] for pair in item.compared()]
            by_length = [nats[pair] / len(pair[1].removeprefix(" ")) for pair in item.compared()]
            for name, values in (("acc", costs), ("acc_norm", by_length)):
                record["metrics"][name] = float(values.index(min(values)) == item.gold)
        records.append(record)
    if job.generates:
        generate_and_score(loaded, job.task, chunk, records, room, cfg)
    return records


def generate_and_score(loaded, task, chunk, records, room, cfg):
    """Adds cfg.samples texts per item and their metrics to the records."""
    n = cfg.samples
    written, cut = harness.answers(loaded, task, chunk, room, cfg)
    answers = list(zip((item for _, item in chunk for _ in range(n)), written, strict=True))
    results = sandbox.run_many([task.program(*answer) for answer in answers]) if task.program else []
    for i, record in enumerate(records):
        own = slice(i * n, (i + 1) * n)
        record |= {"texts": written[own], "cut": record.get("cut", False) or cut[i * n]}
        if task.program:
            record["reasons"] = [result.reason for result in results[own]]
            right = sum(result.passed for result in results[own])
            record["metrics"] |= {f"pass@{k}": pass_at_k(n, right, k) for k in (1, 10, 100) if k <= n}
        else:
            scores = [task.score(*answer) for answer in answers[own]]
            record["metrics"] |= {name: sum(s[name] for s in scores) / n for name in scores[0]}


def means(records):
    columns = collections.defaultdict(list)
    for record in records:
        for name, value in record["metrics"].items():
            columns[name].append(value)
    return {name: mean_stderr(values) for name, values in columns.items()}


def work(loaded, job, stored, cfg):
    """Computes the records that are missing and returns the summary of all."""
    room = harness.answer_length(loaded, job.task, job.items) if job.generates else 0
    compute = functools.partial(evaluate, loaded, job, room=room, cfg=cfg)
    records = stored.complete(job.items, compute, cfg.batch_size, cfg.limit)
    groups = sorted({record["group"] for record in records} - {""})
    return {
        "shots": job.shots,
        "seq_len": loaded.model.cfg.seq_len,
        "items": len(records),
        "metrics": means(records),
        "groups": {group: means(record for record in records if record["group"] == group) for group in groups},
        **{name: sum(record.get(name, False) for record in records) for name in ("merged", "cut")},
    }


def shares(metrics):
    return {name: stats["mean"] for name, stats in metrics.items() if not name.startswith("bits/")}


def table(results):
    """Means over all items with standard errors; then accuracies by group, in the form of train.py's closing report."""
    lines = [f"{'task':<14} {'items':>6} {'shots':>5}  {'metric':<12} {'value':>8}  stderr"]
    for name, result in results.items():
        head = f"{name:<14} {result['items']:>6,} {result['shots']:>5}"
        for metric, stats in result["metrics"].items():
            error = "n/a" if stats["stderr"] is None else f"{stats['stderr']:.4f}"
            lines.append(f"{head:<27}  {metric:<12} {stats['mean']:>8.4f}  {error}")
            head = ""
        lines += harness.cut_line(result["cut"], result["items"], result["seq_len"])
        if result["merged"]:
            lines.append(f"  {result['merged']:,} answers merge with their prompts and were encoded apart")
    for name, result in results.items():
        rows = {group: shares(metrics) for group, metrics in result["groups"].items()}
        if any(rows.values()):
            lines += probes.table(f"{name} by group", "", rows)
    return "\n".join(lines)


def earlier_results(path: Path, checkpoint: str) -> dict:
    """The results.json of this checkpoint, with other tasks; {} where it is of another checkpoint, or missing."""
    remedy = "remove it: the records of every task are kept, and the same commands write it again"
    old = files.read_json(path, remedy) if path.exists() else {}
    known = {"checkpoint", "sources", "tasks", "sandbox"}
    if not set(old) <= known or not all(isinstance(old.get(name, {}), dict) for name in ("sources", "tasks")):
        raise ValueError(f"{path} is damaged (not the results of an evaluation): {remedy}")
    return old if old.get("checkpoint") == checkpoint else {}


def more_items(old, new, cfg):
    """Whether an earlier result of a task says more than the new one: the same measurement, over more items."""
    same = new and all(old.get(name) == new[name] for name in ("shots", "seq_len"))
    return bool(
        same and not cfg.overwrite and old["items"] > new["items"] and new["metrics"].keys() <= old["metrics"].keys()
    )


def main(argv=None):
    """Returns the contents of results.json, with the present results of the tasks asked for."""
    cfg = config.parse(EvalConfig, argv, __doc__)
    source, jobs, stores = harness.open_source(cfg), {}, {}
    for task in map(tasks.load, cfg.tasks):  # find all data before anything is computed
        shots = task.shots if cfg.shots is None else cfg.shots
        jobs[task.name] = Job(task, shots, harness.read_items(task, source, shots), cfg.accuracy and task.generates)
    writes = any(job.generates for job in jobs.values())
    programs = any(job.generates and job.task.program for job in jobs.values())
    results = {"sandbox": sandbox.confinement()} if programs else {}
    loaded, out = harness.open_model(cfg, writes)
    path = out / "results.json"
    old = earlier_results(path, loaded.name)
    for name, job in jobs.items():
        settings = harness.settings(loaded, job.items, job.shots, cfg, ("loss", "accuracy"))
        stores[name] = harness.Records(out / f"{name}.jsonl", settings, metrics_of(job, cfg), cfg.overwrite)
    done = {name: work(loaded, job, stores[name], cfg) for name, job in jobs.items()}
    results |= {"checkpoint": loaded.name, "sources": old.get("sources", {}) | source.used}
    kept = {name: row for name, row in old.get("tasks", {}).items() if more_items(row, done.get(name), cfg)}
    results |= {"tasks": old.get("tasks", {}) | done}
    files.write_json(path, results | {"tasks": results["tasks"] | kept})
    print(f"{table(done)}\n{path}", flush=True)
    for name in kept.keys() & done.keys():
        print(f"{path.name} keeps the result of {name} over {kept[name]['items']:,} items; --overwrite replaces it")
    return results


if __name__ == "__main__":
    config.command_line(main, harness.STOPPED)
