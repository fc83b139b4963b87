"""GSM-Plus (arXiv 2402.19255): GSM8K test questions under eight kinds of perturbation. All 10,552 items, or the 2,400
of testmini.

As in the harness the five examples come from the other items of the test set, the gold answer is the worked solution,
and an item whose answer is "None" (critical thinking: a needed number is missing) can never be right. Prompt and task
loss as in GSM8K.
"""

from eval.sources import Set
from eval.tasks import Item, examples, gsm8k

FULL = Set("gsm_plus/test", "gsm_plus/gsmplus_test.jsonl", ("qintongli/GSM-Plus", None, "test"))
MINI = Set("gsm_plus/testmini", "gsm_plus/gsmplus_testmini.jsonl", ("qintongli/GSM-Plus", None, "testmini"))
SHOTS, LIKE = 5, gsm8k


def items(source, shots):
    rows = source.first(FULL, MINI)
    prefixes = examples(rows, rows, shots, lambda row: f"Question: {row['question']}\nAnswer: {row['solution']}")
    return [
        Item(str(i), f"{prefix}Question: {row['question']}\nAnswer:", row["solution"], group=row["perturbation_type"])
        for i, (prefix, row) in enumerate(zip(prefixes, rows, strict=True))
    ]
