"""GSM8K (arXiv 2110.14168): grade-school word problems, worked solutions that end in "#### 18". 1,319 test items.

Four examples from the training split: the prompts are then, item by item, those of the paper's own task-loss file. As
there, the answer of the task loss starts right after "Answer:", without the space that the examples have. `strict` and
`flexible` are the harness's filters: the first "#### number", and the last number of any form.
"""

import re

from eval import rewards
from eval.equal import find_number, plain
from eval.sources import Set
from eval.tasks import Item, examples, split_rows

TEST = Set("gsm8k/test", "gsm8k/test.jsonl", ("openai/gsm8k", "main", "test"), ("gsm8k/gold_bpb_5shot",))
TRAIN = Set("gsm8k/train", "gsm8k/train.jsonl", ("openai/gsm8k", "main", "train"))

SHOTS, STOPS, MAX_NEW_TOKENS = 4, ("Question:", "</s>", "<|im_end|>"), 256


def items(source, shots, split="test"):
    rows, pool = split_rows(source, shots, split, TEST, TRAIN)
    prefixes = examples(rows, pool, shots, lambda row: f"Question: {row['question']}\nAnswer: {row['answer']}")
    return [
        Item(str(i), f"{prefix}Question: {row['question']}\nAnswer:", row["answer"])
        for i, (prefix, row) in enumerate(zip(prefixes, rows, strict=True))
    ]


def score(item, text):
    strict = re.search(r"#### (-?[0-9.,]+)", text)
    numbers = [found.group() for found in re.finditer(r"-?[$0-9.,]{2,}|-?[0-9]+", text)]
    return {
        "strict": float(strict is not None and _same(strict[1], item.answer)),
        "flexible": float(bool(numbers) and _same(numbers[-1], item.answer)),
    }


def _same(answer, solution):
    for dropped in (r",", r"\$", r"(?s).*#### ", r"\.$"):
        answer, solution = re.sub(dropped, "", answer), re.sub(dropped, "", solution)
    return answer.strip().lower() == solution.strip().lower()


def vote(text):
    """The number after the first "####", "Answer" or "The answer is": the paper's rule, for any notation."""
    value = find_number(text, "####|[Aa]nswer(?: is)?")
    return None if value is None else plain(value)


def gold(item):
    return vote("#### " + _final(item))


def reward(item, text):
    return rewards.judge(item.prompt, _final(item), text)


def _final(item):
    return item.answer.rpartition("####")[2].strip()
