"""HellaSwag (arXiv 1905.07830): which of four endings follows. 10,042 validation items; chance is 25 %.

Text cleaned as in the harness. `acc` compares the endings' total log-likelihoods, `acc_norm` those per character of the
ending. Task loss: the right ending after the context and a space, as it is scored among the choices. The paper's file
is not published.
"""

import re

from eval.sources import Set
from eval.tasks import choice

TEST = Set(
    "hellaswag/validation",
    "hellaswag/val.jsonl",
    ("Rowan/hellaswag", None, "validation"),
    ("hf_datasets/hellaswag/none/validation",),
)
TRAIN = Set("hellaswag/train", "hellaswag/train.jsonl", ("Rowan/hellaswag", None, "train"))
SHOTS = 4


def item(row):
    context = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return choice(context, list(map(clean, row["endings"])), int(row["label"]))


def clean(text):
    """Without WikiHow's markup: "[title]" ends a sentence, other brackets go, double spaces shrink once."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
