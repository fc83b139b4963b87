"""MBPP (arXiv 2108.07732): short Python functions from a sentence and three tests. The 500 test items, ids 11 to 510.

The examples are ids 2, 3 and 4, as in lm-eval. pass@k is by eval.sandbox. Task loss is the paper's: the solution on
a new line after the bare sentence.
"""

from eval.sources import Set
from eval.tasks import Item

HUB = "google-research-datasets/mbpp"
TEST = Set("mbpp/test", "mbpp/mbpp.jsonl", (HUB, "full", "test"))
PROMPT = Set("mbpp/prompt", "mbpp/mbpp.jsonl", (HUB, "full", "prompt"))
SHOTS, STOPS, MAX_NEW_TOKENS = 3, ("[DONE]",), 256


def items(source, shots):
    rows = [row for row in source.rows(TEST) if 11 <= row["task_id"] <= 510]
    fixed = [row for row in source.rows(PROMPT, TEST) if row["task_id"] in (2, 3, 4)]
    if shots > len(fixed):
        raise ValueError(f"shots={shots}: mbpp has {len(fixed)} examples")
    prefix = "".join(example(row) + "\n\n" for row in fixed[:shots])
    return [item(row, prefix) for row in rows]


def item(row, prefix):
    answer = "\n" + row["code"].replace("\r\n", "\n")
    tests = {"tests": "\n".join([row["test_setup_code"], *row["test_list"]])}
    return Item(str(row["task_id"]), prefix + question(row), answer, loss_prompt=row["text"], row=tests)


def example(row):
    return f"{question(row)}{row['code']}\n[DONE]"


def question(row):
    task = "You are an expert Python programmer, and here is your task: " + row["text"]
    tests = "\n".join(row["test_list"][:3])
    return f"{task} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"


def program(item, text):
    return text, item.row["tests"]
