"""The sum of the residual stream and a layer's output, and its RMSNorm, in one launch forward and one backward. They
compute in float32.

torch.compile adds and normalises in one kernel, too, but it keeps both summands for the backward pass, and adds them
again wherever it needs the sum. Here the sum is written once.

Shapes: (..., D) with D the width; in the kernels T rows of D.
"""

import torch
from torch import Tensor

from moe_kernels import reference
from moe_kernels.language import launch, tl, triton
from moe_kernels.ops import described, first_order, use_kernels
from moe_kernels.tiles import cdiv, eager, pow2

MAX_WIDTH = 8192  # a program holds whole rows
VALUES = 1024  # per program and step, at least
AHEAD = 64 * 1024  # bytes of shared memory in which the backward pass loads the next rows, at most
PROGRAMS = 1056  # of the backward pass, at most: each adds up the weight's gradient over its rows


def add_rms_norm(x, add, weight, eps=1e-5, impl=None, uses=1):
    """(s, n): s = x + add, and n = s / sqrt(mean of squares of s + eps) * weight (arXiv 1910.07467).

    x, add: float tensors (..., D) of one shape and dtype; the results are like them. The norm is that of s as it is
    stored. weight: (D,) float, rounded to the dtype of x.
    impl: as in `route`; wider rows than 8,192 take the reference.
    uses: 2 gives (s, n, n). Where a layer uses n twice, the kernel then adds the gradients of both uses.
    Differentiable in x, add and weight. Saves s and the weight. Do not change the results in place.
    Raises ValueError for other shapes, dtypes or devices, and for float64 with "triton"."""
    fits = x.ndim >= 1 and x.is_floating_point() and weight.is_floating_point()
    if not fits or x.shape != add.shape or x.dtype != add.dtype or weight.shape != x.shape[-1:]:
        got = described(x=x, add=add, weight=weight)
        raise ValueError(f"{got}: expected floats (..., D), (..., D), (D,), the first two of one dtype")
    if uses not in (1, 2):
        raise ValueError(f"uses={uses}: expected 1 or 2")
    if not use_kernels(impl, x, add=add, weight=weight) or not 0 < x.shape[-1] <= MAX_WIDTH:
        total, normed = reference.add_rms_norm(x, add, weight, eps)
        return total, *[normed] * uses
    return AddRMSNorm.apply(x, add, weight, eps, uses)


@triton.jit
def _rows(ptr, t, offs_d, mask, D: tl.constexpr):
    return tl.load(ptr + t[:, None] * D + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def add_norm_fwd_kernel(
    x_ptr, add_ptr, weight_ptr, total_ptr, out_ptr, T, eps,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    dtype = out_ptr.dtype.element_ty
    t, offs_d = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    mask = (t < T)[:, None] & (offs_d < D)[None, :]
    weight = tl.load(weight_ptr + offs_d, mask=offs_d < D, other=0.0).to(dtype).to(tl.float32)[None, :]
    total = (_rows(x_ptr, t, offs_d, mask, D) + _rows(add_ptr, t, offs_d, mask, D)).to(dtype)
    tl.store(total_ptr + t[:, None] * D + offs_d[None, :], total, mask=mask)
    total = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, 1) / D + eps)[:, None]
    tl.store(out_ptr + t[:, None] * D + offs_d[None, :], (total * scale * weight).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["T"])
def add_norm_bwd_kernel(
    dx_ptr, dtotal_ptr, dout_ptr, dout2_ptr, total_ptr, weight_ptr, dweight_part_ptr, T, eps,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every program takes every num_programs-th block of rows and writes its part (D,) of the weight's gradient."""
    dtype = dx_ptr.dtype.element_ty
    offs_d = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + offs_d, mask=offs_d < D, other=0.0).to(dtype).to(tl.float32)[None, :]
    dweight = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for first in tl.range(tl.program_id(0) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T, num_stages=STAGES):
        t = tl.arange(0, BLOCK_T).to(tl.int64) + first
        mask = (t < T)[:, None] & (offs_d < D)[None, :]
        total, dout = _rows(total_ptr, t, offs_d, mask, D), _rows(dout_ptr, t, offs_d, mask, D)
        if dout2_ptr is not None:
            dout += _rows(dout2_ptr, t, offs_d, mask, D)
        scale = tl.rsqrt(tl.sum(total * total, 1) / D + eps)[:, None]
        unit = total * scale
        dweight += dout * unit
        dunit = dout * weight
        dx = (dunit - unit * (tl.sum(dunit * unit, 1) / D)[:, None]) * scale
        if dtotal_ptr is not None:
            dx += _rows(dtotal_ptr, t, offs_d, mask, D)
        tl.store(dx_ptr + t[:, None] * D + offs_d[None, :], dx.to(dtype), mask=mask)
    part_ptr = dweight_part_ptr + tl.program_id(0) * D
    tl.store(part_ptr + offs_d, tl.sum(dweight, 0), mask=offs_d < D)


def _blocks(D):
    block_d = pow2(D)
    block_t = max(1, VALUES // block_d)
    return dict(D=D, BLOCK_T=block_t, BLOCK_D=block_d, num_warps=min(16, max(1, block_t * block_d // 512)))


def _stages(D, dtype):
    """Of the backward pass's loads: two, or one where the rows to come, of four tensors, need too much memory."""
    blocks = _blocks(D)
    return 2 if 4 * blocks["BLOCK_T"] * blocks["BLOCK_D"] * dtype.itemsize <= AHEAD else 1


def add_norm_fwd(x: Tensor, add: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """s and n of `add_rms_norm`."""
    x, add, D = x.contiguous(), add.contiguous(), x.shape[-1]
    total, out, blocks, T = torch.empty_like(x), torch.empty_like(x), _blocks(D), x.numel() // D
    if T > 0:
        tensors = x, add, weight_D.contiguous(), total, out
        launch(add_norm_fwd_kernel, (cdiv(T, blocks["BLOCK_T"]),), tensors, (T, eps), **blocks)
    return total, out


def add_norm_bwd(
    dtotal: Tensor | None, dout: Tensor, dout2: Tensor | None, total: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradient of x, which is also that of add, and of the weight, float32."""
    D = total.shape[-1]
    T, blocks = total.numel() // D, _blocks(D)
    programs = min(cdiv(T, blocks["BLOCK_T"]), PROGRAMS)
    dx, dweights = torch.empty_like(total), total.new_empty(programs, D, dtype=torch.float32)
    if T > 0:
        grads = (None if grad is None else grad.contiguous() for grad in (dtotal, dout, dout2))
        tensors = dx, *grads, total, weight_D.contiguous(), dweights
        launch(add_norm_bwd_kernel, (programs,), tensors, (T, eps), STAGES=_stages(D, total.dtype), **blocks)
    return dx, dweights.sum(0)


add_norm_fwd_op = torch.library.custom_op("moe_kernels::add_norm_fwd", add_norm_fwd, mutates_args=())
add_norm_bwd_op = torch.library.custom_op("moe_kernels::add_norm_bwd", add_norm_bwd, mutates_args=())


@add_norm_fwd_op.register_fake
def _(x, add, weight_D, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@add_norm_bwd_op.register_fake
def _(dtotal, dout, dout2, total, weight_D, eps):
    return total.new_empty(total.shape), total.new_empty(total.shape[-1], dtype=torch.float32)


class AddRMSNorm(torch.autograd.Function):
    """Not a custom op: those cannot return a tensor twice. Any reshaping happens inside: views of one gradient would
    become the gradients of two tensors that share memory."""

    @staticmethod
    def forward(ctx, x, add, weight_D, eps, uses):
        total, out = (add_norm_fwd if eager(x) else add_norm_fwd_op)(x, add, weight_D, eps)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight_D)
        return (total, out) if uses == 1 else (total, out, out.view(out.shape))

    @staticmethod
    @first_order
    def backward(ctx, dtotal, *douts):
        total, weight = ctx.saved_tensors
        dout, dout2 = sorted((*douts, None)[:2], key=lambda grad: grad is None)
        dout = torch.zeros_like(total) if dout is None else dout
        run = add_norm_bwd if eager(dout) else add_norm_bwd_op
        dx, dweight = run(dtotal, dout, dout2, total, weight, ctx.eps)
        return dx, dx, dweight.to(weight.dtype), None, None
