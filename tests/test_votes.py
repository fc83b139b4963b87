"""pass@k, majority votes and their bands, against brute force: python -m pytest tests/test_votes.py (CPU, seconds)"""

import itertools
import random

import pytest

from data import files
from eval import harness, votes
from eval.votes import curves, majority, pass_at_k

pytest_plugins = ("tests.evalrun",)  # its fixture tiny_run


@pytest.mark.parametrize("n, right", [(1, 0), (1, 1), (5, 0), (5, 2), (6, 6), (7, 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n, right):
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(range(n), k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(min(s) < right for s in subsets) / len(subsets))
    assert pass_at_k(5, 2, 2) != pytest.approx(1 - (1 - 2 / 5) ** 2)  # the check can fail: the biased estimate differs


def slow_majority(cast, gold, k):
    total = 0.0
    for start in range(len(cast)):
        window = [(cast + cast)[start + i] for i in range(k)]
        counts = {name: window.count(name) for name in window if name is not None}
        leaders = [name for name, count in counts.items() if count == max(counts.values())]
        total += (gold in leaders) / max(1, len(leaders))
    return total / len(cast)


def test_majority():
    rng = random.Random(0)
    for _ in range(200):
        cast = rng.choices(["1", "2", "3", None], k=rng.randint(1, 9))
        for k in range(1, len(cast) + 1):
            assert majority(cast, "1", k) == pytest.approx(slow_majority(cast, "1", k)), (cast, k)
    assert majority(["1", "1", "2"], "1", 3) == 1 and majority(["1", "2", "2"], "1", 3) == 0
    assert majority(["1", "2"], "1", 2) == 0.5  # a tie
    assert majority(["1", None, None], "1", 3) == 1  # those without an answer do not vote
    assert majority([None, None], "1", 2) == majority([None], None, 1) == 0
    assert majority(["1", "1", "2", "1"], "1", 1) == 0.75  # one vote: the mean


def make_questions(n, seed=0, votes=16):
    rng = random.Random(seed)
    return [
        {"gold": "1", "votes": rng.choices(["1", "2", "3", None], [rng.random(), 0.3, 0.1, 0.1], k=votes)}
        for _ in range(n)
    ]


def test_curves():
    questions = make_questions(300)
    result = curves(questions)
    assert result["samples"] == [1, 2, 4, 8, 16] and result["questions"] == 300
    mean = sum(vote == "1" for q in questions for vote in q["votes"]) / 300 / 16
    assert result["coverage"]["mean"][0] == pytest.approx(mean) and result["majority"]["mean"][0] == pytest.approx(mean)
    assert result["coverage"]["mean"][-1] == pytest.approx(sum("1" in q["votes"] for q in questions) / 300)
    assert result["majority"]["mean"][-1] == pytest.approx(
        sum(slow_majority(q["votes"], "1", 16) for q in questions) / 300
    )
    for kind in ("coverage", "majority"):
        for low, mean, high in zip(*(result[kind][name] for name in ("low", "mean", "high")), strict=True):
            assert low < mean < high
    assert result["coverage"]["mean"] == sorted(result["coverage"]["mean"])
    assert result["without_answer"] == pytest.approx(sum(q["votes"].count(None) for q in questions) / 300 / 16)
    assert curves([{"gold": "1", "votes": ["1", None, "2"]}])["samples"] == [1, 2, 3]  # the last point has all samples
    assert curves([{"gold": None, "votes": [None, "1"]}])["coverage"]["mean"] == [0, 0]  # no answer is never right


def test_bands_cover():
    """95 % bands from 100 questions hold the mean of 20,000 about 95 times in 100; half as wide a band would not."""
    truth = curves(make_questions(20_000, 1, votes=2), resamples=10)["majority"]["mean"][0]
    bands = [curves(make_questions(100, seed, votes=2), resamples=400)["majority"] for seed in range(2, 102)]
    assert 88 <= sum(band["low"][0] <= truth <= band["high"][0] for band in bands) <= 100
    half = [((band["low"][0] + band["mean"][0]) / 2, (band["high"][0] + band["mean"][0]) / 2) for band in bands]
    assert sum(low <= truth <= high for low, high in half) < 85


def test_command(tiny_run, monkeypatch, capsys):
    """Samples, resumes, and does not ask the model for finished questions again."""
    asked = []

    def texts(loaded, task, prompts, streams, room, cfg):
        asked.extend(zip(prompts, streams, strict=True))
        return [f"The answer is {stream % 3}" for stream in streams], [False] * len(prompts)

    monkeypatch.setattr(harness, "texts", texts)
    command = [f"--run={tiny_run}", f"--evaldata={tiny_run}", "--device=cpu", "--samples=4", "--batch-size=4"]
    first = votes.main([*command, "--limit=2"])
    assert len(asked) == 8 and len(set(asked)) == 8 and first["samples"] == [1, 2, 4] and first["questions"] == 2
    assert all(prompt.startswith("Question: ") and prompt.count("Question") == 1 for prompt, _ in asked)  # no examples
    votes.main([*command, "--limit=3"])
    assert len(asked) == 12
    out = tiny_run / "eval-00000003"
    lines, _ = files.read_rows(out / "votes-gsm8k.jsonl")
    assert lines[1] == {"id": "0", "gold": "0", "votes": ["0", "1", "2", "0"], "cut": False}
    assert files.read_json(out / "votes-gsm8k.json")["questions"] == 3 and "majority" in capsys.readouterr().out
    with pytest.raises(ValueError, match="made with temperature=0.6, not 0.7"):
        votes.main([*command, "--temperature=0.7"])
    with pytest.raises(ValueError, match="temperature=0.0: greedy samples are all equal"):
        votes.main([*command, "--temperature=0"])
    with pytest.raises(ValueError, match="task='humaneval': it has no `vote`"):
        votes.main([*command, "--task=humaneval"])


def test_samples_of_a_model(tiny_run):
    """Really generated: equal commands give equal votes, whatever the batch; another seed gives others."""
    flags = f"--run={tiny_run} --evaldata={tiny_run} --device=cpu --samples=3 --limit=2 --overwrite --temperature=1.5"
    command = flags.split()
    runs = []
    for more in (["--batch-size=1"], ["--batch-size=64"], ["--seed=1"]):
        record = []
        with pytest.MonkeyPatch.context() as patch:
            real = harness.texts
            patch.setattr(harness, "texts", lambda *args, seen=record, real=real: seen.append(real(*args)) or seen[-1])
            votes.main(command + more)
        runs.append([text for written, _ in record for text in written])
    assert runs[0] == runs[1] != runs[2] and len(set(runs[0])) == 6


def test_says_that_prompts_were_cut(tiny_run, capsys):
    (tiny_run / "gsm8k/train.jsonl").write_text((tiny_run / "gsm8k/test.jsonl").read_text())
    flags = f"--run={tiny_run} --evaldata={tiny_run} --device=cpu --samples=2 --limit=2 --shots=3"
    result = votes.main(flags.split())
    assert (
        result["cut"] == 2
        and "2 of 2 prompts lost their beginnings to fit the model's 64 tokens" in capsys.readouterr().out
    )
