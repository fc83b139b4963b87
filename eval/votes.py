"""Test-time compute: many samples per question, their coverage (is any right?) and their majority vote.

    python -m eval.votes --run=runs/NAME --task=gsm8k --samples=128 --limit=200

Writes votes-TASK.jsonl (the answers of every question), votes-TASK.json (the curves) and votes-TASK.png to RUN/eval-STEP. As in the
paper (arXiv 2508.18672): no examples in the prompt, temperature 0.6, top-p 0.95, samples without an answer do not vote.
"""

import math
import sys
from dataclasses import dataclass

import numpy as np

from eval import tasks
from eval.harness import ModelChoice, Progress, Records, answer_length, data_of, fingerprint, load, texts, write_json
from eval.sources import Source
from optimoe import config
from optimoe.config import require


@dataclass(frozen=True)
class VotesConfig(ModelChoice):
    # Votes
    task: str = "gsm8k"  # a file in eval/tasks with a `vote` function
    shots: int = 0  # examples in front of each question
    samples: int = 128  # answers per question
    temperature: float = 0.6
    top_p: float = 0.95  # sample from the smallest set of tokens with this probability

    def validate(self):
        super().validate()
        require(
            tasks.load(self.task).vote,
            "task",
            self.task,
            "it has no `vote` function in eval/tasks; try gsm8k",
        )
        require(1 <= self.samples <= 4096, "samples", self.samples, "use 1 to 4096")
        require(
            self.temperature > 0, "temperature", self.temperature, "greedy samples are all equal; use a positive number"
        )


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate, from n samples of which `right` are right, that one of k samples is (arXiv 2107.03374, equation 1)."""
    if not 1 <= k <= n or not 0 <= right <= n:
        raise ValueError(f"pass_at_k(n={n}, right={right}, k={k}): needs 1 <= k <= n and 0 <= right <= n")
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(votes: list[str | None], gold: str, k: int) -> float:
    """Mean success of the majority among k of the votes; None does not vote, a tie counts its right share, no votes at all are wrong.

    The mean is over the len(votes) windows of k consecutive votes in a circle: each vote counts equally, and the ends are exact
    (k=1 the mean of right votes, k=n the vote of all)."""
    n, names = len(votes), list(dict.fromkeys(vote for vote in votes if vote is not None))
    if gold not in names:
        return 0.0
    cast = np.array([[vote == name for name in names] for vote in votes], dtype=np.int64)
    sums = np.concatenate([np.zeros((1, len(names)), np.int64), np.concatenate([cast, cast[: k - 1]]).cumsum(0)])
    counts = sums[k : k + n] - sums[:n]  # (window, name)
    leads = (counts == counts.max(1, keepdims=True)) & (counts > 0)
    return float((leads[:, names.index(gold)] / leads.sum(1).clip(1)).mean())


def curves(questions: list[dict], resamples: int = 2000, seed: int = 0) -> dict:
    """questions: {"votes": [...], "gold": ...}, equally many votes each. Coverage and majority at 1, 2, 4, ... and all samples: means over the
    questions with 95 % bands by bootstrap over the questions (percentiles of `resamples` draws)."""
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


def plot(curves_by_name: dict[str, dict], path, title: str = "") -> None:
    """Coverage (dashed) and majority (solid) with their bands over the number of samples, one colour per entry."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for i, (name, result) in enumerate(curves_by_name.items()):
        for kind, style in (("coverage", "--"), ("majority", "-")):
            axes.plot(
                result["samples"],
                result[kind]["mean"],
                style,
                color=f"C{i}",
                marker="o",
                markersize=3,
                label=f"{name} {kind}".strip(),
            )
            axes.fill_between(
                result["samples"], result[kind]["low"], result[kind]["high"], color=f"C{i}", alpha=0.15, linewidth=0
            )
    axes.set_xscale("log", base=2)
    axes.set(xlabel="samples per question", ylabel="share of questions", title=title, ylim=(-0.03, 1.03))
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv=None):
    """Returns the curves."""
    cfg = config.parse(VotesConfig, sys.argv[1:] if argv is None else argv, __doc__)
    task, source = tasks.load(cfg.task), Source(cfg.data, data_of(cfg))
    items = task.asked(task.items(source, cfg.shots))
    model, tokens, file, out = load(cfg)
    settings = {
        "checkpoint": file,
        "items": fingerprint(items),
        "shots": cfg.shots,
        "samples": cfg.samples,
        "temperature": cfg.temperature,
        "top_p": cfg.top_p,
        "seed": cfg.seed,
        "dtype": str(model.dtype),
    }
    path = out / f"votes-{cfg.task}.json"
    stored = Records(path.with_suffix(".jsonl"), settings, cfg.overwrite)
    wanted = list(enumerate(items))[: cfg.limit or None]
    pending = [(i, item) for i, item in wanted if item.id not in stored.items]
    room = answer_length(model, tokens, task, items)
    progress, per_chunk = (
        Progress(path.stem, len(wanted), len(wanted) - len(pending)),
        max(1, cfg.batch_size // cfg.samples),
    )
    for start in range(0, len(pending), per_chunk):
        chunk = pending[start : start + per_chunk]
        prompts, streams = zip(
            *((item.prompt, 4096 * i + j) for i, item in chunk for j in range(cfg.samples)), strict=True
        )
        written, cut = texts(model, tokens, task, prompts, streams, room, cfg)
        votes = [task.vote(text) for text in written]
        stored.add(
            [
                {
                    "id": item.id,
                    "gold": task.gold(item),
                    "votes": votes[j * cfg.samples : (j + 1) * cfg.samples],
                    "cut": cut[j * cfg.samples],
                }
                for j, (_, item) in enumerate(chunk)
            ]
        )
        progress(len(stored.items))
    questions = [stored.items[item.id] for _, item in wanted]
    result = (
        settings
        | {"sources": source.used, "cut": sum(question.get("cut", False) for question in questions)}
        | curves(questions)
    )
    write_json(path, result)
    print("samples    coverage            majority")
    for i, n in enumerate(result["samples"]):
        mean, low, high = (
            [result[kind][name][i] for kind in ("coverage", "majority")] for name in ("mean", "low", "high")
        )
        print(f"{n:>7}    {mean[0]:.4f} [{low[0]:.3f}, {high[0]:.3f}]   {mean[1]:.4f} [{low[1]:.3f}, {high[1]:.3f}]")
    if result["cut"]:
        print(
            f"  {result['cut']:,} questions did not fit the model's {model.cfg.seq_len} tokens: their prompts lost their beginnings"
        )
    try:
        plot({"": result}, path.with_suffix(".png"), f"{cfg.task}, {result['questions']} questions")
        print(path.with_suffix(".png"))
    except ImportError:
        print(f"{path}: not plotted, matplotlib is missing (pip install matplotlib)")
    return result


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command, without --overwrite, goes on from here")
