"""MMLU (arXiv 2009.03300): questions with four options from 57 subjects. 14,042 test items; chance is 25 %. As in
lm-eval, letters are compared, and the examples are the first of the subject's development set."""

from eval.sources import Set
from eval.tasks import Item

TEST = Set("mmlu/test", "mmlu/test.jsonl", ("cais/mmlu", "all", "test"))
DEV = Set("mmlu/dev", "mmlu/dev.jsonl", ("cais/mmlu", "all", "dev"))
TRAIN = Set("mmlu/train", "mmlu/auxiliary_train.jsonl", ("cais/mmlu", "all", "auxiliary_train"))
SHOTS = 5
LETTERS = (" A", " B", " C", " D")


def items(source, shots, split="test"):
    dev = source.rows(DEV) if shots else []
    found = []
    for row in source.rows(TRAIN if split == "train" else TEST):
        shown = [example for example in dev if example["subject"] == row["subject"]][:shots]
        if len(shown) < shots:
            raise ValueError(f"shots={shots}: mmlu has {len(shown)} examples of {row['subject']}")
        subject = row["subject"].replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        prompt = head + "".join(f"{ask(example)}{LETTERS[example['answer']]}\n\n" for example in shown) + ask(row)
        gold = row["answer"]
        found.append(Item(str(len(found)), prompt, LETTERS[gold], choices=LETTERS, gold=gold, group=row["subject"]))
    return found


def ask(row):
    options = (f"\n{letter.strip()}. " + choice for letter, choice in zip(LETTERS, row["choices"], strict=True))
    return f"{row['question'].strip()}{''.join(options)}\nAnswer:"
