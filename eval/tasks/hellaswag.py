"""HellaSwag (arXiv 1905.07830): which of four endings follows. 10,042 validation items; chance is 25 %. Text is cleaned
as in lm-eval. `acc_norm` is by likelihood per character; task loss is that of the right ending, after a space."""

import re

from eval.sources import Set
from eval.tasks import choice

TEST = Set("hellaswag/validation", "hellaswag/val.jsonl", ("Rowan/hellaswag", None, "validation"))
TRAIN = Set("hellaswag/train", "hellaswag/train.jsonl", ("Rowan/hellaswag", None, "train"))
SHOTS = 4


def item(row):
    context = clean(row["activity_label"] + ": " + row["ctx_a"] + " " + row["ctx_b"].capitalize())
    return choice(context, list(map(clean, row["endings"])), int(str(row["label"])))


def clean(text):
    """Without WikiHow's markup."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
