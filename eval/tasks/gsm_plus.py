"""GSM-Plus (arXiv 2402.19255): GSM8K's test questions, perturbed in eight ways. 10,552 items, or the 2,400 of testmini.

As in lm-eval, examples are other test items, the gold answer is the worked solution, and an item whose answer is "None"
is never right.
"""

from eval.sources import Set
from eval.tasks import gsm8k, with_examples

FULL = Set("gsm_plus/test", "gsm_plus/gsmplus_test.jsonl", ("qintongli/GSM-Plus", None, "test"))
MINI = Set("gsm_plus/testmini", "gsm_plus/gsmplus_testmini.jsonl", ("qintongli/GSM-Plus", None, "testmini"))
SHOTS, LIKE = 5, gsm8k


def items(source, shots):
    rows = [row | {"answer": row["solution"]} for row in source.rows(FULL, MINI)]
    return with_examples(rows, rows, shots, item, gsm8k.example)


def item(row):
    return gsm8k.item(row)._replace(group=row["perturbation_type"])
