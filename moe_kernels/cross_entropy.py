"""The output layer and its loss in one op, without the (T, V) logits: a chunk of logits becomes its own gradient in place.

Shapes: T tokens, D model width, V vocabulary. The gradients of x and w are complete when the forward ends, so the backward only scales them
and no logits are ever computed twice (the idea is Liger's, arXiv 2410.10989; here the weight's gradient is summed in float32).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels import reference
from moe_kernels.tiles import pick_impl


def linear_cross_entropy(x_TD, w_VD, targets_T, chunk=8192, impl=None):
    """Mean cross-entropy in nats (float32 scalar) of softmax(x W^T) against the targets; those of -1 do not count.

    x_TD (T, D) in the compute dtype; w_VD (V, D) in any floating dtype, cast to x's; targets_T (T,) int64 below V (not checked).
    chunk: tokens whose logits exist at one time on the triton path. Differentiable in x and w; w's gradient has w's dtype.
    impl: as in `moe_experts`; "grouped_mm" is the reference here. Raises ValueError when the shapes do not fit, and for float64 on the triton path."""
    if x_TD.ndim != 2 or w_VD.ndim != 2 or x_TD.shape[1] != w_VD.shape[1] or targets_T.shape != x_TD.shape[:1]:
        raise ValueError(f"x {tuple(x_TD.shape)}, w {tuple(w_VD.shape)}, targets {tuple(targets_T.shape)}: expected (T, D), (V, D), (T,)")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: use 1 or more")
    if impl == "grouped_mm" or pick_impl(impl, x_TD) != "triton":
        return reference.linear_cross_entropy(x_TD, w_VD, targets_T)
    if x_TD.dtype == torch.float64:
        raise ValueError("impl='triton' computes in float32 at most, not float64: use impl='reference'")
    return cross_entropy_op(x_TD, w_VD, targets_T, chunk, torch.is_grad_enabled())[0]


@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, V: tl.constexpr, GRADS: tl.constexpr, BLOCK_V: tl.constexpr):
    """One row: its loss, and softmax - onehot in place of its logits."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    offs = tl.arange(0, BLOCK_V)
    target = tl.load(targets_ptr + row)
    picked = tl.load(logits_ptr + tl.maximum(target, 0)).to(tl.float32)  # before any warp overwrites it: the reductions below are barriers
    # Each lane keeps its own running maximum and sum of exponentials; starting from a finite number keeps empty lanes free of NaN.
    top = tl.full([BLOCK_V], -1e30, tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    for v in range(0, V, BLOCK_V):
        x = tl.load(logits_ptr + v + offs, mask=offs < V - v, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, x)
        total = total * tl.exp(top - higher) + tl.exp(x - higher)
        top = higher
    best = tl.max(top, 0)
    lse = best + tl.log(tl.sum(total * tl.exp(top - best), 0))
    counted = target >= 0
    tl.store(losses_ptr + row, tl.where(counted, lse - picked, 0.0))
    if GRADS:
        for v in range(0, V, BLOCK_V):
            mask = offs < V - v
            x = tl.load(logits_ptr + v + offs, mask=mask, other=0.0).to(tl.float32)
            grad = tl.exp(x - lse) - tl.where(v + offs == target, 1.0, 0.0)
            tl.store(logits_ptr + v + offs, tl.where(counted, grad, 0.0).to(logits_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("moe_kernels::linear_cross_entropy", mutates_args=())
def cross_entropy_op(x_TD: Tensor, w_VD: Tensor, targets_T: Tensor, chunk: int, grads: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mean loss, the factor (1 / counted targets) by which the two gradients that follow are too large, and these; empty without `grads`."""
    x, w, targets = x_TD.contiguous(), w_VD.to(x_TD.dtype).contiguous(), targets_T.contiguous()
    (T, _), V = x.shape, w.shape[0]
    block = min(triton.next_power_of_2(V), 4096)
    scale = 1.0 / (targets >= 0).sum().clamp(min=1).float()
    losses = x.new_empty(T, dtype=torch.float32)
    dx, dw = (torch.empty_like(x), w.new_zeros(w.shape, dtype=torch.float32)) if grads else (x.new_empty(0), w.new_empty(0))
    for start in range(0, T, chunk):
        rows = x[start : start + chunk]
        logits = rows @ w.T
        cross_entropy_kernel[(len(rows),)](logits, targets[start:], losses[start:], V, grads, block, num_warps=max(4, min(8, block // 512)))
        if grads:
            torch.mm(logits, w, out=dx[start : start + chunk])
            if x.is_cuda and x.dtype != torch.float32:
                dw = torch.addmm(dw, logits.T, rows, out_dtype=torch.float32)
            else:
                dw += logits.T @ rows
    return losses.sum() * scale, scale, dx, dw.to(w_VD.dtype) if grads else dw


@cross_entropy_op.register_fake
def _(x_TD, w_VD, targets_T, chunk, grads):
    scalar = lambda: x_TD.new_empty((), dtype=torch.float32)  # noqa: E731
    gradient = lambda t: torch.empty_like(t, memory_format=torch.contiguous_format) if grads else t.new_empty(0)  # noqa: E731
    return scalar(), scalar(), gradient(x_TD), gradient(w_VD)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _backward(ctx, dloss, *_):
    scale, dx, dw = ctx.saved_tensors
    factor = dloss * scale
    return dx * factor.to(dx.dtype), dw * factor.to(dw.dtype), None, None, None


cross_entropy_op.register_autograd(_backward, setup_context=_setup_context)
