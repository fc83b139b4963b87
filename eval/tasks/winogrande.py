"""WinoGrande (arXiv 1907.10641): which of two names belongs in the blank. 1,267 validation items; chance is 50 %.

As in the harness the two names stand in the prompt, and the text after the blank is what is compared: it has the same
length for both, so `acc_norm` is `acc`. Task loss is its cost after the right name.
"""

from eval.sources import Set
from eval.tasks import Item, examples, split_rows

HUB = "allenai/winogrande"
VALIDATION = Set("winogrande/validation", "winogrande/validation.jsonl", (HUB, "winogrande_xl", "validation"))
TRAIN = Set("winogrande/train", "winogrande/train.jsonl", (HUB, "winogrande_xl", "train"))
SHOTS = 0


def items(source, shots, split="test"):
    rows, pool = split_rows(source, shots, split, VALIDATION, TRAIN)
    return [item(i, *pair) for i, pair in enumerate(zip(examples(rows, pool, shots, right), rows, strict=True))]


def parts(row):
    before, _, after = row["sentence"].partition("_")
    return before, (row["option1"], row["option2"]), after.strip(), int(row["answer"]) - 1


def right(row):
    before, names, after, gold = parts(row)
    return f"{before}{names[gold]} {after}"


def item(i, prefix, row):
    before, names, after, gold = parts(row)
    pairs = tuple((f"{prefix}{before}{name}", f" {after}") for name in names)
    choices = tuple(" " + name for name in names)
    return Item(str(i), prefix + row["sentence"], f" {after}", pairs[gold][0], choices, gold, pairs=pairs)
