"""HumanEval (arXiv 2107.03374): complete a Python function. 164 items. pass@k by eval.sandbox; task loss
of the dataset's canonical solution (that of the paper is humanevalplus)."""

from eval.sources import Set
from eval.tasks import Item

TEST = Set("humaneval/test", "humaneval/HumanEval.jsonl", ("openai/openai_humaneval", None, "test"))
SHOTS, STOPS, MAX_NEW_TOKENS = 0, ("\nclass", "\ndef", "\n#", "\nif", "\nprint"), 1024


def item(row):
    tests = row["test"] + "\ncheck(" + row["entry_point"] + ")"
    return Item(row["task_id"], row["prompt"], row["canonical_solution"], row={"tests": tests})


def program(item, text):
    return item.prompt + text, item.row["tests"]
