"""TriviaQA (arXiv 1705.03551), closed book: 7,993 validation questions of rc.wikipedia, or the 17,944 of rc on the hub.

Prompt as in the harness, its second question mark included. `exact_match` is the harness's rule: one leading space dropped, case
and punctuation ignored, equal to any alias. `normalized` is the dataset's own: articles and extra spaces are ignored too.
Task loss: the dataset's first answer (`value`) after "Answer:" and a space. The paper's file for it is not published.
"""

import re
import string

from eval.tasks import Item, examples

SHOTS, STOPS, MAX_NEW_TOKENS = 4, ("\n", ".", ","), 64  # the harness allows 256: no alias is longer than 64


def items(source, shots):
    rows = source.rows("triviaqa/validation")
    pool = source.first("triviaqa/train", "triviaqa/validation") if shots else rows
    prefixes = examples(rows, pool, shots, lambda row: f"Question: {row['question']}?\nAnswer: {row['aliases'][0]}")
    return [
        Item(row["question_id"], f"{prefix}Question: {row['question']}?\nAnswer:", " " + row["value"], row=row)
        for prefix, row in zip(prefixes, rows, strict=True)
    ]


def score(item, text):
    text = text.removeprefix(" ")
    aliases = item.row["aliases"]
    return {
        "exact_match": float(plain(text) in map(plain, aliases)),
        "normalized": float(normalized(text) in map(normalized, aliases)),
    }


def plain(text):
    return text.lower().translate(dict.fromkeys(map(ord, string.punctuation)))


def normalized(text):
    spaced = text.lower().translate(dict.fromkeys(map(ord, string.punctuation + "‘’´`"), " "))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", spaced).split())
