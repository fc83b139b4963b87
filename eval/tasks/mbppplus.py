"""The paper's task-loss items for MBPP: EvalPlus's canonical solutions after the bare sentence. 378 items, task loss
only.
"""

from eval.sources import Set
from eval.tasks import humanevalplus

TEST = Set("paper/mbppplus", "paper_taskloss/mbppplus_test.json", origin=humanevalplus.ORIGIN)
SHOTS = 0


def items(source, shots):
    return humanevalplus.items(source, shots, TEST)
