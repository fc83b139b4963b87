"""The paper's task-loss items for HumanEval: EvalPlus's canonical solutions after the prompt. 164 items, task loss
only.
"""

from eval.sources import Set
from eval.tasks import Item

ORIGIN = "github.com/rioyokotalab/optimal-sparsity, under taskloss-eval/datasets"
TEST = Set("paper/humanevalplus", "paper_taskloss/humanevalplus_test.json", origin=ORIGIN)
SHOTS = 0


def items(source, shots, test=TEST):
    return [Item(str(i), row["prompt"], row["answer"]) for i, row in enumerate(source.rows(test))]
