"""TriviaQA (arXiv 1705.03551), closed book: 7,993 validation questions of rc.wikipedia, or the 17,944 of rc on the hub.

Prompts and `exact_match` (any alias, whatever its case and punctuation) are lm-eval's; `normalized`, the rule of the
dataset, ignores articles too. Task loss is that of the first answer (`value`).
"""

import re
import string

from eval.sources import Set
from eval.tasks import Item

HUB = "mandarjoshi/trivia_qa"
TEST = Set("triviaqa/validation", "triviaqa/rc_wikipedia_nocontext_val.jsonl", (HUB, "rc.nocontext", "validation"))
TRAIN = Set("triviaqa/train", "triviaqa/train.jsonl", (HUB, "rc.nocontext", "train"))
SHOTS, STOPS, MAX_NEW_TOKENS = 4, ("\n", ".", ","), 64  # lm-eval allows 256: no alias is longer than 64


def item(row):
    aliases = {"aliases": ["" + alias for alias in row["aliases"]]}  # a TypeError here, not in `score`
    return Item(row["question_id"], "Question: " + row["question"] + "?\nAnswer:", " " + row["value"], row=aliases)


def example(row):
    return f"Question: {row['question']}?\nAnswer: {row['aliases'][0]}"


def score(item, text):
    text, aliases = text.strip(), item.row["aliases"]
    return {
        "exact_match": float(plain(text) in map(plain, aliases)),
        "normalized": float(normalized(text) in map(normalized, aliases)),
    }


def plain(text):
    return text.lower().translate(dict.fromkeys(map(ord, string.punctuation)))


def normalized(text):
    spaced = text.lower().translate(dict.fromkeys(map(ord, string.punctuation + "‘’´`"), " "))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", spaced).split())
