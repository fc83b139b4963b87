"""ARC-Challenge (arXiv 1803.05457): 1,172 science questions of grade school; chance is 25 %. Prompts and choices are
those of lm-eval, which reports `acc_norm` (likelihood per character)."""

from eval.sources import Set
from eval.tasks import choice

HUB = "allenai/ai2_arc"
TEST = Set("arc_challenge/test", "arc/ARC-Challenge-Test.jsonl", (HUB, "ARC-Challenge", "test"))
TRAIN = Set("arc_challenge/train", "arc/ARC-Challenge-Train.jsonl", (HUB, "ARC-Challenge", "train"))
SHOTS = 0


def item(row):
    prompt, choices = "Question: " + row["question"] + "\nAnswer:", row["choices"]
    return choice(prompt, choices["text"], choices["label"].index(row["answerKey"]))
