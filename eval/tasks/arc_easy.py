"""ARC-Easy (arXiv 1803.05457): 2,376 easier questions, for which lm-eval reports `acc`."""

from eval.sources import Set
from eval.tasks import arc_challenge

TEST = Set("arc_easy/test", "arc/ARC-Easy-Test.jsonl", (arc_challenge.HUB, "ARC-Easy", "test"))
TRAIN = Set("arc_easy/train", "arc/ARC-Easy-Train.jsonl", (arc_challenge.HUB, "ARC-Easy", "train"))
SHOTS, LIKE = 0, arc_challenge
