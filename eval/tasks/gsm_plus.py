"""GSM-Plus (arXiv 2402.19255): GSM8K test questions under eight kinds of perturbation. All 10,552 items, or the 2,400 of testmini.

As in the harness the five examples come from the other items of the test set, the gold answer is the worked solution, and an item
whose answer is "None" (critical thinking: a needed number is missing) can never be right. Prompt and task loss as in GSM8K.
"""

from eval.tasks import Item, examples
from eval.tasks.gsm8k import MAX_NEW_TOKENS, STOPS, score, vote  # noqa: F401  the same rules

SHOTS = 5


def items(source, shots):
    rows = source.first("gsm_plus/test", "gsm_plus/testmini")
    prefixes = examples(rows, rows, shots, lambda row: f"Question: {row['question']}\nAnswer: {row['solution']}")
    return [
        Item(str(i), f"{prefix}Question: {row['question']}\nAnswer:", row["solution"], group=row["perturbation_type"])
        for i, (prefix, row) in enumerate(zip(prefixes, rows, strict=True))
    ]
