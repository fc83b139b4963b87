"""Test-time compute: many samples per question, their coverage (is any right?) and their majority vote.

    python -m eval.votes --run=runs/NAME --task=gsm8k --samples=128 --limit=200

Writes votes-TASK.jsonl (the answers of every question) and votes-TASK.json (the curves) to RUN/eval-STEP. As in the
paper (arXiv 2508.18672): no examples in the prompt, temperature 0.6, top-p 0.95, samples without an answer do not vote.
"""

import math
import sys
from dataclasses import dataclass

import numpy as np

from data import files
from eval import harness, tasks
from optimoe import config
from optimoe.config import require


@dataclass(frozen=True)
class VotesConfig(harness.EvalChoice):
    # Votes
    task: str = "gsm8k"  # a file in eval/tasks whose answers can vote
    shots: int = 0  # examples in front of each question
    samples: int = 128  # answers per question
    temperature: float = 0.6
    top_p: float = 0.95  # sample from the smallest set of tokens with this probability

    def validate(self):
        super().validate()
        remedy = "it has no `vote` function in eval/tasks; try gsm8k"
        require(tasks.load(self.task).vote, "task", self.task, remedy)
        require(self.shots >= 0, "shots", self.shots, "use 0 or more")
        require(1 <= self.samples <= 4096, "samples", self.samples, "use 1 to 4096")
        remedy = "greedy samples are all equal; use a positive number"
        require(self.temperature > 0, "temperature", self.temperature, remedy)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate, from n samples of which `right` are right, that one of k samples is (arXiv 2107.03374,
    equation 1).
    """
    if not 1 <= k <= n or not 0 <= right <= n:
        raise ValueError(f"pass_at_k(n={n}, right={right}, k={k}): needs 1 <= k <= n and 0 <= right <= n")
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(votes: list[str | None], gold: str, k: int) -> float:
    """Mean success of the majority among k of the votes; None does not vote, a tie counts its right share, no votes at
    all are wrong.

    The mean is over the len(votes) windows of k consecutive votes in a circle: each vote counts equally, and the ends
    are exact (k=1 the mean of right votes, k=n the vote of all).
    """
    n, names = len(votes), list(dict.fromkeys(vote for vote in votes if vote is not None))
    if gold not in names:
        return 0.0
    cast = np.array([[vote == name for name in names] for vote in votes], dtype=np.int64)
    sums = np.concatenate([np.zeros((1, len(names)), np.int64), np.concatenate([cast, cast[: k - 1]]).cumsum(0)])
    counts = sums[k : k + n] - sums[:n]  # (window, name)
    leads = (counts == counts.max(1, keepdims=True)) & (counts > 0)
    return float((leads[:, names.index(gold)] / leads.sum(1).clip(1)).mean())


def curves(questions: list[dict], resamples: int = 2000, seed: int = 0) -> dict:
    """questions: {"votes": [...], "gold": ...}, equally many votes each. Coverage and majority at 1, 2, 4, ... and all
    samples: means over the questions with 95 % bands by bootstrap over the questions (percentiles of `resamples`
    draws).
    """
    n = len(questions[0]["votes"])
    points = sorted({*(2**i for i in range(n.bit_length())), n})
    rights = [sum(vote is not None and vote == q["gold"] for vote in q["votes"]) for q in questions]
    values = {
        "coverage": np.array([[pass_at_k(n, right, k) for k in points] for right in rights]),
        "majority": np.array([[majority(q["votes"], q["gold"], k) for k in points] for q in questions]),
    }
    weights = np.random.default_rng(seed).multinomial(
        len(questions), np.full(len(questions), 1 / len(questions)), resamples
    ) / len(questions)
    result = {
        "samples": points,
        "questions": len(questions),
        "without_answer": sum(vote is None for q in questions for vote in q["votes"]) / n / len(questions),
    }
    for name, value in values.items():
        low, high = np.percentile(weights @ value, [2.5, 97.5], axis=0)
        result[name] = {"mean": value.mean(0).tolist(), "low": low.tolist(), "high": high.tolist()}
    return result


def sample_answers(loaded, task, items, stored, cfg, name):
    """Computes the records that are missing and returns those of the first cfg.limit items."""
    wanted = list(enumerate(items))[: cfg.limit or None]
    pending = [(i, item) for i, item in wanted if item.id not in stored.items]
    room, n = harness.answer_length(loaded, task, items), cfg.samples
    progress, per_chunk = harness.Progress(name, len(wanted), len(wanted) - len(pending)), max(1, cfg.batch_size // n)
    for start in range(0, len(pending), per_chunk):
        chunk = pending[start : start + per_chunk]
        pairs = [(item.prompt, 4096 * i + j) for i, item in chunk for j in range(n)]
        written, cut = harness.texts(loaded, task, *map(list, zip(*pairs, strict=True)), room, cfg)
        votes = [task.vote(text) for text in written]
        stored.add(
            [
                {"id": item.id, "gold": task.gold(item), "votes": votes[j * n : (j + 1) * n], "cut": cut[j * n]}
                for j, (_, item) in enumerate(chunk)
            ]
        )
        progress(len(wanted) - len(pending) + start + len(chunk))
    return [stored.items[item.id] for _, item in wanted]


def table(result, seq_len):
    lines = ["samples    coverage            majority"]
    for i, n in enumerate(result["samples"]):
        parts = ([result[kind][name][i] for name in ("mean", "low", "high")] for kind in ("coverage", "majority"))
        lines.append(f"{n:>7}    " + "   ".join(f"{mean:.4f} [{low:.3f}, {high:.3f}]" for mean, low, high in parts))
    if result["cut"]:
        room = f"the model's {seq_len} tokens"
        lines.append(f"  {result['cut']:,} questions did not fit {room}: their prompts lost their beginnings")
    return "\n".join(lines)


def main(argv=None):
    """Returns the curves."""
    cfg = config.parse(VotesConfig, sys.argv[1:] if argv is None else argv, __doc__)
    task, source = tasks.load(cfg.task), harness.open_source(cfg)
    items = task.asked(harness.read_items(task, source, cfg.shots))
    loaded, out = harness.open_model(cfg)
    settings = {"checkpoint": loaded.name, "items": harness.fingerprint(items)}
    settings |= {name: getattr(cfg, name) for name in ("shots", "samples", "temperature", "top_p", "seed")}
    settings["dtype"] = str(loaded.model.dtype)
    path = out / f"votes-{cfg.task}.json"
    known = {item.id: set() for item in items}
    stored = harness.Records(path.with_suffix(".jsonl"), settings, known, ("id", "gold", "votes", "cut"), cfg.overwrite)
    questions = sample_answers(loaded, task, items, stored, cfg, path.stem)
    cut = sum(question.get("cut", False) for question in questions)
    result = settings | {"sources": source.used, "cut": cut} | curves(questions)
    files.write_json(path, result)
    print(f"{table(result, loaded.model.cfg.seq_len)}\n{path}")
    return result


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command, without --overwrite, goes on from here")
