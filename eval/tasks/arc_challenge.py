"""ARC-Challenge (arXiv 1803.05457): 1,172 science questions of grade school; chance is 25 %. Prompt and choices as in
the harness, which reports `acc_norm` (likelihood per character of the choice)."""

from eval.sources import Set
from eval.tasks import choice

HUB = "allenai/ai2_arc"
TEST = Set("arc_challenge/test", "arc/ARC-Challenge-Test.jsonl", (HUB, "ARC-Challenge", "test"))
TRAIN = Set("arc_challenge/train", "arc/ARC-Challenge-Train.jsonl", (HUB, "ARC-Challenge", "train"))
SHOTS = 0


def item(row):
    choices = row["choices"]
    return choice(f"Question: {row['question']}\nAnswer:", choices["text"], choices["label"].index(row["answerKey"]))
