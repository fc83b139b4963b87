"""The output layer and its loss in one op that never holds all (T, V) logits: it takes a chunk of tokens at a time, and
the gradient of the logits replaces them in memory.

The forward pass computes the gradients of x and w; the backward pass only scales them. The idea is Liger's (arXiv
2410.10989); here the gradient of w is summed in float32. Shapes: T tokens, D model width, V vocabulary.
"""

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from moe_kernels import reference
from moe_kernels.language import tl, triton
from moe_kernels.ops import INTEGERS, autocast_off, described, first_order, use_kernels
from moe_kernels.tiles import eager, pow2


def linear_cross_entropy(x_TD, w_VD, targets_T, chunk=16384, impl=None):
    """Mean cross-entropy in nats of softmax(x W^T) over the targets that are not negative: a float32 scalar, or float64
    for float64 inputs, differentiable in x and w. 0 if all targets are negative.

    x_TD (T, D) in the compute dtype; w_VD (V, D) in any floating dtype, cast to x's; targets_T (T,) integers below V
    (from larger ones the kernels make NaN). chunk: tokens whose logits exist at one time in the kernels.
    impl: as in `route`. Raises ValueError for other shapes, dtypes or devices, and for float64 with "triton"."""
    fits = (x_TD.ndim, w_VD.ndim) == (2, 2) and x_TD.shape[1] == w_VD.shape[1] and targets_T.shape == x_TD.shape[:1]
    if not (fits and x_TD.is_floating_point() and w_VD.is_floating_point() and targets_T.dtype in INTEGERS):
        raise ValueError(
            f"{described(x=x_TD, w=w_VD, targets=targets_T)}: expected floats (T, D), (V, D), integers (T,)"
        )
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: use 1 or more")
    if use_kernels(impl, x_TD, w=w_VD, targets=targets_T):
        if eager(x_TD) and any(unpack_dual(t).tangent is not None for t in (x_TD, w_VD)):
            raise NotImplementedError("the kernels have no forward-mode derivatives: use impl='reference'")
        return cross_entropy_op(x_TD, w_VD, targets_T, chunk, torch.is_grad_enabled())[0]
    return reference.linear_cross_entropy(x_TD, w_VD, targets_T)


LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def cross_entropy_kernel(
    logits_ptr, targets_ptr, losses_ptr, V: tl.constexpr, GRADS: tl.constexpr, BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """One row: its loss, and with GRADS softmax - onehot in place of its logits. If the target is negative, the row is
    not read and its gradient is 0. A target of V or more makes the loss NaN and touches no memory outside of the row.

    A thread keeps one running maximum and sum for GROUP neighbours (8 of bfloat16 are 16 bytes), and exponentials have
    the hardware's base 2. With tl.exp and a maximum for each value, the kernel took 36 instructions a value instead
    of 15, and they limited it."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    offs = tl.arange(0, BLOCK_V // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    dtype = logits_ptr.dtype.element_ty
    target = tl.load(targets_ptr + row)
    if target < 0:
        tl.store(losses_ptr + row, 0.0)
        if GRADS:
            for v in range(0, V, BLOCK_V):
                tl.store(logits_ptr + v + offs, tl.zeros([BLOCK_V // GROUP, GROUP], dtype), mask=offs < V - v)
    else:
        picked = tl.load(logits_ptr + target, mask=target < V, other=float("nan")).to(tl.float32)
        top = tl.full([BLOCK_V // GROUP], -1e30, tl.float32)  # finite: in empty lanes -inf - -inf would be NaN
        total = tl.zeros([BLOCK_V // GROUP], tl.float32)
        for v in range(0, V, BLOCK_V):
            x = tl.load(logits_ptr + v + offs, mask=offs < V - v, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(top, tl.max(x, 1))
            total = total * tl.exp2((top - higher) * LOG2E) + tl.sum(tl.exp2((x - higher[:, None]) * LOG2E), 1)
            top = higher
        best = tl.max(top, 0)
        log2_total = tl.log2(tl.sum(total * tl.exp2((top - best) * LOG2E), 0))
        tl.store(losses_ptr + row, log2_total / LOG2E + (best - picked))
        if GRADS:
            tl.debug_barrier()  # no warp may overwrite what another has yet to read; reductions are no barriers
            for back in range(0, V, BLOCK_V):  # backwards: the L2 cache still holds the end
                v = (V - 1) // BLOCK_V * BLOCK_V - back
                x = tl.load(logits_ptr + v + offs, mask=offs < V - v, other=0.0).to(tl.float32)
                tl.store(logits_ptr + v + offs, tl.exp2((x - best) * LOG2E - log2_total).to(dtype), mask=offs < V - v)
            tl.debug_barrier()  # the loop stored the target's value too; this one stays
            tl.store(logits_ptr + target, (tl.exp2((picked - best) * LOG2E - log2_total) - 1.0).to(dtype), target < V)


@torch.library.custom_op("moe_kernels::linear_cross_entropy", mutates_args=())
def cross_entropy_op(
    x_TD: Tensor, w_VD: Tensor, targets_T: Tensor, chunk: int, grads: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean loss, 1 / (number of targets), gradients of x and w without this factor: both are empty if not grads."""
    x, w, targets = x_TD.contiguous(), w_VD.to(x_TD.dtype).contiguous(), targets_T.contiguous()
    (T, _), V = x.shape, w.shape[0]
    # Two groups a thread. More than two rows on a multiprocessor would evict each other from L2 between the passes.
    block, group = (min(max(pow2(V), 8), 16384), 8) if V % 8 == 0 else (min(pow2(V), 4096), 1)
    scale = 1.0 / (targets >= 0).sum().clamp(min=1).float()
    losses = x.new_empty(T, dtype=torch.float32)
    dx, dw = x.new_empty(0), w.new_empty(0)
    if grads:
        dx, dw = torch.empty_like(x), w.new_zeros(w.shape, dtype=torch.float32)
    with autocast_off(x.device.type):
        for start in range(0, T, chunk):
            rows = x[start : start + chunk]
            logits = rows @ w.T
            cross_entropy_kernel[(len(rows),)](
                logits_ptr=logits, targets_ptr=targets[start:], losses_ptr=losses[start:],
                V=V, GRADS=grads, BLOCK_V=block, GROUP=group, num_warps=max(4, block // 512),
            )  # fmt: skip
            if grads:
                torch.mm(logits, w, out=dx[start : start + chunk])
                if x.is_cuda and x.dtype != torch.float32:
                    torch.addmm(dw, logits.T, rows, out_dtype=torch.float32, out=dw)
                else:
                    dw += logits.T @ rows
    return losses.sum() * scale, scale, dx, dw.to(w_VD.dtype) if grads else dw


@cross_entropy_op.register_fake
def _(x_TD, w_VD, targets_T, chunk, grads):
    loss, scale = (x_TD.new_empty((), dtype=torch.float32) for _ in range(2))
    return loss, scale, *(t.new_empty(t.shape if grads else 0) for t in (x_TD, w_VD))


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


@first_order
def _backward(ctx, dloss, *_):
    scale, dx, dw = ctx.saved_tensors
    factor = dloss * scale
    return dx * factor.to(dx.dtype), dw * factor.to(dw.dtype), None, None, None


cross_entropy_op.register_autograd(_backward, setup_context=_setup_context)
