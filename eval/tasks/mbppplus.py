"""The paper's task-loss items for MBPP: EvalPlus's canonical solutions after the bare sentence. 378, task loss only."""

from eval.sources import Set
from eval.tasks import humanevalplus

TEST = Set("paper/mbppplus", "paper_taskloss/mbppplus_test.json", origin=humanevalplus.ORIGIN)
SHOTS, LIKE = 0, humanevalplus
