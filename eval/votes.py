"""Test-time compute: many samples per question, their coverage (is any right?) and their majority vote.

    python -m eval.votes --run=runs/NAME --task=gsm8k --samples=128 --limit=200

Writes votes-TASK.jsonl (every question's answers) and votes-TASK.json (the curves) to RUN/eval-STEP. The defaults are
those of arXiv 2508.18672: no examples, temperature 0.6, top-p 0.95. Samples without an answer do not vote.
"""

import functools
import math
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
        require(tasks.load(self.task).vote, "task", self.task, "it has no `vote` function in eval/tasks; try gsm8k")
        require(self.temperature > 0, "temperature", self.temperature, "greedy samples are all equal; use more than 0")


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate that one of k samples is right, from n with `right` right ones (arXiv 2107.03374)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(votes: list[str | None], gold: str, k: int) -> float:
    """Mean success of the majority of k consecutive votes, over all starts in the circle of votes: exact for k=1 and
    for all, and each vote counts equally. None is no vote, a tie counts its right share, and no votes are wrong."""
    n, names = len(votes), list(dict.fromkeys(vote for vote in votes if vote is not None))
    if gold not in names:
        return 0.0
    cast = np.array([[vote == name for name in names] for vote in votes], dtype=np.int64)
    sums = np.concatenate([np.zeros((1, len(names)), np.int64), np.concatenate([cast, cast[: k - 1]]).cumsum(0)])
    counts = sums[k : k + n] - sums[:n]  # (window, name)
    winners = (counts == counts.max(1, keepdims=True)) & (counts > 0)
    return float((winners[:, names.index(gold)] / winners.sum(1).clip(1)).mean())


def curves(questions: list[dict], resamples: int = 2000) -> dict:
    """Coverage and majority at 1, 2, 4, ... and all samples: means over the questions, {"votes": [...], "gold": ...},
    with 95 % bands by bootstrap over the questions."""
    n, size = len(questions[0]["votes"]), len(questions)
    points = sorted({*(2**i for i in range(n.bit_length())), n})
    rights = [sum(vote is not None and vote == q["gold"] for vote in q["votes"]) for q in questions]
    values = {
        "coverage": np.array([[pass_at_k(n, right, k) for k in points] for right in rights]),
        "majority": np.array([[majority(q["votes"], q["gold"], k) for k in points] for q in questions]),
    }
    weights = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), resamples) / size
    without = sum(vote is None for q in questions for vote in q["votes"]) / n / size
    result = {"samples": points, "questions": size, "without_answer": without}
    for name, value in values.items():
        low, high = np.percentile(weights @ value, [2.5, 97.5], axis=0).tolist()
        result[name] = {"mean": value.mean(0).tolist(), "low": low, "high": high}
    return result


def sample_answers(loaded, task, chunk, room, cfg):
    n = cfg.samples
    written, cut = harness.answers(loaded, task, chunk, room, cfg)
    votes = [task.vote(text) for text in written]
    return [
        {"id": item.id, "gold": task.gold(item), "votes": votes[i * n : (i + 1) * n], "cut": cut[i * n]}
        for i, (_, item) in enumerate(chunk)
    ]


def table(result, seq_len):
    lines = ["samples    coverage            majority"]
    for i, n in enumerate(result["samples"]):
        parts = ([result[kind][name][i] for name in ("mean", "low", "high")] for kind in ("coverage", "majority"))
        lines.append(f"{n:>7}    " + "   ".join(f"{mean:.4f} [{low:.3f}, {high:.3f}]" for mean, low, high in parts))
    return "\n".join(lines + harness.cut_line(result["cut"], result["questions"], seq_len))


def main(argv=None):
    """Returns the curves."""
    cfg = config.parse(VotesConfig, argv, __doc__)
    task, source = tasks.load(cfg.task), harness.open_source(cfg)
    items = task.asked(harness.read_items(task, source, cfg.shots))
    loaded, out = harness.open_model(cfg, writes=True)
    settings, path = harness.settings(loaded, items, cfg.shots, cfg), out / f"votes-{cfg.task}.json"
    none = {item.id: set() for item in items}  # a vote has no metrics
    stored = harness.Records(path.with_suffix(".jsonl"), settings, none, cfg.overwrite)
    room = harness.answer_length(loaded, task, items)
    compute = functools.partial(sample_answers, loaded, task, room=room, cfg=cfg)
    questions = stored.complete(items, compute, max(1, cfg.batch_size // cfg.samples), cfg.limit)
    cut = sum(question.get("cut", False) for question in questions)
    result = settings | {"sources": source.used, "cut": cut} | curves(questions)
    files.write_json(path, result)
    print(f"{table(result, loaded.model.cfg.seq_len)}\n{path}")
    return result


if __name__ == "__main__":
    config.command_line(main, harness.STOPPED)
