"""ARC-Easy (arXiv 1803.05457): 2,376 grade-school science questions, as in arc_challenge; the harness reports `acc` for
it.
"""

from eval.sources import Set
from eval.tasks import arc_challenge, choice_items

TEST = Set("arc_easy/test", "arc/ARC-Easy-Test.jsonl", (arc_challenge.HUB, "ARC-Easy", "test"))
TRAIN = Set("arc_easy/train", "arc/ARC-Easy-Train.jsonl", (arc_challenge.HUB, "ARC-Easy", "train"))
SHOTS = 0


def items(source, shots, split="test"):
    return choice_items(source, shots, split, TEST, TRAIN, arc_challenge.show)
