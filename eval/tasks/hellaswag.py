"""HellaSwag (arXiv 1905.07830): which of four endings follows. 10,042 validation items; chance is 25 %.

Text cleaned as in the harness. `acc` compares the endings' total log-likelihoods, `acc_norm` those per character of the ending.
Task loss: the right ending after the context and a space, as it is scored among the choices. The paper's file is not published.
"""

import re

from eval.sources import Set
from eval.tasks import Item, examples

VALIDATION = Set(
    "hellaswag/validation",
    "hellaswag/val.jsonl",
    ("Rowan/hellaswag", None, "validation"),
    ("hf_datasets/hellaswag/none/validation",),
)
TRAIN = Set("hellaswag/train", "hellaswag/train.jsonl", ("Rowan/hellaswag", None, "train"))
SHOTS = 4


def items(source, shots, split="test"):
    rows = source.rows(TRAIN if split == "train" else VALIDATION)
    pool = source.first(TRAIN, VALIDATION) if shots else rows
    prefixes = examples(rows, pool, shots, lambda row: f"{context(row)} {clean(row['endings'][int(row['label'])])}")
    items = []
    for i, (prefix, row) in enumerate(zip(prefixes, rows, strict=True)):
        choices, gold = tuple(" " + clean(ending) for ending in row["endings"]), int(row["label"])
        items.append(Item(str(i), prefix + context(row), choices[gold], choices=choices, gold=gold))
    return items


def context(row):
    return clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")


def clean(text):
    """Without the markup of the WikiHow half: "[title]" ends a sentence, other brackets go, double spaces shrink once."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
