"""MBPP (arXiv 2108.07732): short Python functions from a sentence and three tests. The 500 test items, ids 11 to 510.

The examples are ids 2, 3 and 4, as in lm-eval. pass@k is by eval.sandbox. Task loss is the paper's: the solution on
a new line after the bare sentence.
"""

import ast

from eval import rewards
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
    return Item(str(row["task_id"]), prefix + question(row), answer, loss_prompt=row["text"], row=row)


def example(row):
    return f"{question(row)}{row['code']}\n[DONE]"


def question(row, shown=3):
    tests, these = "\n".join(row["test_list"][:shown]), "these tests" if shown > 1 else "this test"
    task = f"You are an expert Python programmer, and here is your task: {row['text']}"
    return f"{task} Your code should pass {these}:\n\n{tests}\n[BEGIN]\n"


def program(item, text):
    return text, "\n".join([item.row["test_setup_code"], *item.row["test_list"]])


def questions(source, split, n):
    """Ids 601 to 974 train. One test is shown, all count; only problems whose tests are `assert call == literal`."""
    first, last = (601, 974) if split == "train" else (11, 510)
    found = []
    for row in source.rows(TEST):
        tests = [assertion(text) for text in row["test_list"] + row.get("challenge_test_list", [])]
        if first <= row["task_id"] <= last and all(tests) and len(tests) > 1 and not row.get("test_setup_code"):
            found.append(Item(str(row["task_id"]), question(row, 1), row["code"], row={"tests": tests}))
    if not found:
        where = f"none of its items {first} to {last} in {source.used[TEST.name]}"
        raise ValueError(f"mbpp/{split}: {where}; put {TEST.file}, all 974, there")
    return found[: n or None]


def assertion(text):
    """(expression, value) of `assert expression == literal`, else None."""
    try:
        (node,) = ast.parse(text.strip()).body
        (equals,), (value,) = node.test.ops, node.test.comparators
        return (ast.unparse(node.test.left), ast.literal_eval(value)) if isinstance(equals, ast.Eq) else None
    except (SyntaxError, ValueError, AttributeError, RecursionError, MemoryError):
        return None


def reward(item, text):
    return rewards.passes(text.partition("[DONE]")[0], item.row["tests"])
