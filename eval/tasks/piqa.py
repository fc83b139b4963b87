"""PIQA (arXiv 1911.11641): which of two ways reaches a physical goal. 1,838 validation items; chance is 50 %."""

from eval.sources import Set
from eval.tasks import choice

TEST = Set("piqa/validation", "piqa/validation.jsonl", ("baber/piqa", None, "validation"))
TRAIN = Set("piqa/train", "piqa/train.jsonl", ("baber/piqa", None, "train"))
SHOTS = 0


def item(row):
    return choice("Question: " + row["goal"] + "\nAnswer:", [row["sol1"], row["sol2"]], int(str(row["label"])))
