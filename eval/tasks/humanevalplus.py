"""The paper's task-loss items for HumanEval: EvalPlus's canonical solutions after the prompt. 164, task loss only."""

from eval.sources import Set
from eval.tasks import Item

ORIGIN = "github.com/rioyokotalab/optimal-sparsity, under taskloss-eval/datasets"
TEST = Set("paper/humanevalplus", "paper_taskloss/humanevalplus_test.json", origin=ORIGIN)
SHOTS = 0


def item(row):
    return Item(prompt=row["prompt"], answer=row["answer"])
