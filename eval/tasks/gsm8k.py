"""GSM8K (arXiv 2110.14168): word problems with worked solutions that end in "#### 18". 1,319 test items.

With four examples the prompts are those of the paper's task loss, whose answers have no space after "Answer:". `strict`
and `flexible` are lm-eval's filters: the first "#### number", and the last number of any form.
"""

import re

from eval import rewards
from eval.equal import find_number
from eval.sources import Set
from eval.tasks import Item

TEST = Set("gsm8k/test", "gsm8k/test.jsonl", ("openai/gsm8k", "main", "test"))
TRAIN = Set("gsm8k/train", "gsm8k/train.jsonl", ("openai/gsm8k", "main", "train"))

SHOTS, STOPS, MAX_NEW_TOKENS = 4, ("Question:", "</s>", "<|im_end|>"), 256


def item(row):
    return Item(prompt="Question: " + row["question"] + "\nAnswer:", answer=row["answer"])


def example(row):
    return f"Question: {row['question']}\nAnswer: {row['answer']}"


def score(item, text):
    strict = re.search(r"#### (-?[0-9.,]+)", text)
    numbers = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)
    found = {"strict": strict and strict[1], "flexible": numbers and numbers[-1]}
    return {name: float(bool(said) and _bare(said) == _bare(item.answer)) for name, said in found.items()}


def _bare(answer):
    return re.sub(r"(?s),|\$|.*#### |\.$", "", answer).strip().lower()


def vote(text):
    """The number after the first "####", "Answer" or "answer is", as in the paper."""
    value = find_number(text, "####|[Aa]nswer(?: is)?")
    return None if value is None else str(value)


def gold(item):
    return vote("#### " + _final(item))


def reward(item, text):
    return rewards.judge(item.prompt, _final(item), text)


def _final(item):
    return item.answer.rpartition("####")[2].strip()
