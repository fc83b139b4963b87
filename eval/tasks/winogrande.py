"""WinoGrande (arXiv 1907.10641): which of two names belongs in the blank. 1,267 validation items; chance is 50 %. As in
lm-eval, the text after the blank is compared after each name; its loss after the right name is the task loss."""

from eval.sources import Set
from eval.tasks import Item

HUB = "allenai/winogrande"
TEST = Set("winogrande/validation", "winogrande/validation.jsonl", (HUB, "winogrande_xl", "validation"))
TRAIN = Set("winogrande/train", "winogrande/train.jsonl", (HUB, "winogrande_xl", "train"))
SHOTS = 0


def item(row):
    before, _, after = row["sentence"].partition("_")
    names, after, gold = (row["option1"], row["option2"]), f" {after.strip()}", int(str(row["answer"])) - 1
    pairs = tuple((before + name, after) for name in names)
    choices = tuple(" " + name for name in names)
    return Item("", row["sentence"], after, pairs[gold][0], choices, gold, pairs=pairs)
