"""What to compile before a benchmark runs (moe_kernels/precompile.py does it): every kernel of a layer of the real shape."""

from functools import partial

import torch

from bench.problem import Inputs
from moe_kernels.experts import experts_bwd_op, experts_op
from moe_kernels.routing import route_bwd_op, route_op


def empty_inputs(shape, dtype):
    """Inputs of the real sizes on the CPU; they are never touched and take no memory."""
    T, D, F, E, K = shape
    new, floats = partial(torch.empty, dtype=dtype), partial(torch.empty, dtype=torch.float32)
    return Inputs(
        new(T, D),
        new(E, 2 * F, D),
        new(E, D, F),
        floats(T, K),
        torch.empty(T, K, dtype=torch.int32),
        new(T, D),
        floats(T, E),
    )


def compile_layer(shape, dtype):
    """A task: launches every kernel of the layer and of routing once, as the benchmarks do."""
    x, w_in, w_out, gates, experts, dy, logits = empty_inputs(shape, dtype)
    out = experts_op(x, w_in, w_out, gates, experts)
    experts_bwd_op(dy, x, w_in, w_out, gates, *out[1:])
    logits = torch.empty_like(logits, dtype=dtype)
    route_op(logits, None, shape.K, False, True)
    route_bwd_op(logits, experts, gates, gates, gates.new_empty(shape.E), gates.new_empty(()), False, True)
