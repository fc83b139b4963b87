"""The paper's task-loss items for MBPP: EvalPlus's canonical solutions after the bare sentence. 378 items, task loss only."""

from eval.tasks import humanevalplus

SHOTS = 0


def items(source, shots):
    return humanevalplus.items(source, shots, "paper/mbppplus")
