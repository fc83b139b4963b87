"""Evaluate a checkpoint: accuracy and task loss, with standard errors.

    python -m eval --run=runs/NAME --tasks=hellaswag,gsm8k --limit=200
    python -m eval --run=runs/NAME --tasks=humaneval --samples=20 --temperature=0.8 --top-p=0.95      # pass@1 and pass@10

Prints a table and writes, to RUN/eval-STEP, results.json and for each task TASK.jsonl with one record per item. An interrupted
evaluation goes on where it was when the same command is given again; so does a finished one with a larger --limit.
"""

import collections
import json
import sys
from dataclasses import dataclass

from eval import sandbox, tasks
from eval.harness import ModelChoice, Progress, Records, answer_length, data_of, fingerprint, load, texts, write_json
from eval.sources import Source
from eval.taskloss import bits, encode_pair, mean_stderr, score
from eval.votes import pass_at_k
from optimoe import config
from optimoe.config import require


@dataclass(frozen=True)
class EvalConfig(ModelChoice):
    # Tasks
    tasks: str = ""  # names separated by commas, each a file in eval/tasks
    shots: int | None = None  # examples in front of each question; none: as many as the task's file says
    loss: bool = True  # measure task loss
    accuracy: bool = True  # generate answers and score them
    samples: int = 1  # answers per item; metrics are means over them, and code tasks get pass@k for k up to this
    temperature: float = 0.0  # 0: greedy

    def validate(self):
        super().validate()
        require(self.names(), "tasks", self.tasks, f"name some of {', '.join(tasks.NAMES)}")
        require(self.samples >= 1, "samples", self.samples, "use 1 or more")
        require(self.temperature >= 0, "temperature", self.temperature, "use 0 (greedy) or more")
        require(
            self.samples == 1 or self.temperature > 0,
            "samples",
            self.samples,
            "greedy samples are all equal; give a --temperature",
        )
        require(self.shots is None or self.shots >= 0, "shots", self.shots, "use 0 or more")
        for name in self.names():
            tasks.load(name)

    def names(self):
        return list(dict.fromkeys(name.strip() for name in self.tasks.split(",") if name.strip()))


def evaluate(model, tokens, task, chunk, room, cfg):
    """Records of a chunk of (index, item): {"id", "group", "metrics": {name: number}} and what they were computed from. room: tokens to generate."""
    wanted = [(item.loss_prompt or item.prompt, item.answer) for _, item in chunk if cfg.loss]
    wanted += [pair for _, item in chunk if cfg.accuracy for pair in item.compared()]
    pairs = {
        pair: encode_pair(tokens, *pair) for pair in wanted
    }  # the right choice and the answer are often the same pair
    nats = dict(zip(pairs, score(model, [pair[:2] for pair in pairs.values()]), strict=True))

    records = []
    for _, item in chunk:
        record = {"id": item.id, "group": item.group, "metrics": {}}
        if cfg.loss:
            pair = item.loss_prompt or item.prompt, item.answer
            (context, answer, merged), size = pairs[pair], len(item.answer.encode())
            record |= {
                "nats": nats[pair],
                "tokens": len(answer),
                "bytes": size,
                "merged": merged,
                "cut": len(context) + len(answer) > model.cfg.seq_len + 1,
            }
            record["metrics"] |= {"bits/token": bits(nats[pair], len(answer)), "bits/byte": bits(nats[pair], size)}
        if cfg.accuracy and item.choices:
            costs = [nats[pair] for pair in item.compared()]
            per_character = [nats[prompt, choice] / len(choice.removeprefix(" ")) for prompt, choice in item.compared()]
            record["choices"] = costs
            record["metrics"] |= {
                "acc": float(costs.index(min(costs)) == item.gold),
                "acc_norm": float(per_character.index(min(per_character)) == item.gold),
            }
        records.append(record)
    if cfg.accuracy and task.generated():
        generate_and_score(model, tokens, task, chunk, records, room, cfg)
    return records


def generate_and_score(model, tokens, task, chunk, records, room, cfg):
    """Adds cfg.samples texts per item and their metrics to the records."""
    n = cfg.samples
    prompts, streams = zip(*((item.prompt, 4096 * index + i) for index, item in chunk for i in range(n)), strict=True)
    written, cut = texts(model, tokens, task, prompts, streams, room, cfg)
    for i, ((_, item), record) in enumerate(zip(chunk, records, strict=True)):
        record |= {"texts": written[i * n : (i + 1) * n], "cut": record.get("cut", False) or cut[i * n]}
        if not task.program:
            scores = [task.score(item, text) for text in record["texts"]]
            record["metrics"] |= {name: sum(s[name] for s in scores) / n for name in scores[0]}
    if task.program:
        results = sandbox.run_many(
            [
                task.program(item, text)
                for (_, item), record in zip(chunk, records, strict=True)
                for text in record["texts"]
            ]
        )
        for i, record in enumerate(records):
            own = results[i * n : (i + 1) * n]
            record["reasons"] = [result.reason for result in own]
            record["metrics"] |= {
                f"pass@{k}": pass_at_k(n, sum(result.passed for result in own), k) for k in (1, 10, 100) if k <= n
            }


def summarise(records):
    """{"items", "metrics": {name: mean, stderr, n}, "groups": {group: the same}, numbers of merged and cut items}."""

    def means(records):
        columns = collections.defaultdict(list)
        for record in records:
            for name, value in record["metrics"].items():
                columns[name].append(value)
        return {name: mean_stderr(values) for name, values in columns.items()}

    groups = collections.defaultdict(list)
    for record in records:
        groups[record["group"]].append(record)
    return {
        "items": len(records),
        "metrics": means(records),
        "groups": {group: means(members) for group, members in sorted(groups.items()) if group},
        "merged": sum(record.get("merged", False) for record in records),
        "cut": sum(record.get("cut", False) for record in records),
    }


def table(results):
    lines = [f"{'task':<14} {'items':>6} {'shots':>5}  {'metric':<12} {'value':>8}  stderr"]
    for name, result in results.items():
        head = f"{name:<14} {result['items']:>6,} {result['shots']:>5}"
        for metric, stats in result["metrics"].items():
            error = "n/a" if stats["stderr"] is None else f"{stats['stderr']:.4f}"
            lines.append(f"{head:<27}  {metric:<12} {stats['mean']:>8.4f}  {error}")
            head = ""
        if result["cut"]:
            lines.append(
                f"  {result['cut']:,} items did not fit the model's {result['seq_len']} tokens: their prompts lost their beginnings"
            )
        if result["merged"]:
            lines.append(
                f"  {result['merged']:,} answers merge with their prompts when encoded together; they were encoded apart (eval/taskloss.py)"
            )
    return "\n".join(lines)


def main(argv=None):
    """Returns the contents of results.json."""
    cfg = config.parse(EvalConfig, sys.argv[1:] if argv is None else argv, __doc__)
    source = Source(cfg.data, data_of(cfg))
    work = []
    for name in cfg.names():  # all data is found before the first item is computed
        task = tasks.load(name)
        shots = task.shots if cfg.shots is None else cfg.shots
        work.append((name, task, shots, task.items(source, shots)))
    extra = {"sandbox": sandbox.confinement()} if cfg.accuracy and any(task.program for _, task, _, _ in work) else {}
    model, tokens, file, out = load(cfg)
    stores, done = {}, {}
    for name, _, shots, items in work:  # and so are results of other settings
        settings = {
            "checkpoint": file,
            "shots": shots,
            "items": fingerprint(items),
            "loss": cfg.loss,
            "accuracy": cfg.accuracy,
            "samples": cfg.samples,
            "temperature": cfg.temperature,
            "top_p": cfg.top_p,
            "seed": cfg.seed,
            "dtype": str(model.dtype),
        }
        stores[name] = Records(out / f"{name}.jsonl", settings, cfg.overwrite)
    for name, task, shots, items in work:
        stored = stores[name]
        wanted = list(enumerate(items))[: cfg.limit or None]
        pending = [(i, item) for i, item in wanted if item.id not in stored.items]
        pending.sort(key=lambda pair: len(pair[1].prompt), reverse=True)  # similar lengths in a batch
        room = answer_length(model, tokens, task, items) if cfg.accuracy and task.generated() else 0
        progress = Progress(name, len(wanted), len(wanted) - len(pending))
        for start in range(0, len(pending), cfg.batch_size):
            chunk = pending[start : start + cfg.batch_size]
            stored.add(evaluate(model, tokens, task, chunk, room, cfg))
            progress(len(wanted) - len(pending) + start + len(chunk))
        done[name] = {
            "shots": shots,
            "seq_len": model.cfg.seq_len,
            **summarise([stored.items[item.id] for _, item in wanted]),
        }
    old = json.loads((out / "results.json").read_text()) if (out / "results.json").exists() else {}
    if old.get("checkpoint") != file:  # no numbers of other weights under this one's name
        old = {}
    results = extra | {
        "checkpoint": file,
        "sources": old.get("sources", {}) | source.used,
        "tasks": old.get("tasks", {}) | done,
    }
    write_json(out / "results.json", results)
    print(f"{table(done)}\n{out}/results.json", flush=True)
    return results


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command, without --overwrite, goes on from here")
