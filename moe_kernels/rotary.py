"""Rotary position embedding (RoPE) of queries and keys, after an RMSNorm of each head if the model has one: one launch
forward and one backward, computed in float32.

Shapes: B batch, L sequence, T = B*L tokens, H query heads, Hkv key heads (and as many value heads), d head width.
"""

import torch
from torch import Tensor

from moe_kernels import reference
from moe_kernels.language import launch, tl, triton
from moe_kernels.ops import described, first_order, use_kernels
from moe_kernels.tiles import cdiv, eager, pow2


def rope(qkv_BLNd, cos, sin, n_heads, q_weight=None, k_weight=None, eps=1e-5, impl=None):
    """Queries (B, L, H, d) and keys (B, L, Hkv, d), rotated (arXiv 2104.09864), and values (B, L, Hkv, d), a view of
    qkv.

    qkv_BLNd (B, L, N, d), N = H + 2 Hkv: heads of queries, keys, values; H = n_heads; d even.
    cos, sin: float32 (L, 1, d), or (B, L, 1, d) for positions that differ by sequence; the first half of sin is
    negated (model.rope_tables).
    q_weight, k_weight (d,): weights of an RMSNorm, with eps, of each query and key head before the rotation; both or
    neither.
    impl: as in `route`. Differentiable in qkv and the weights; qkv is saved only if there are weights. Raises
    ValueError for other shapes, dtypes or devices, and for float64 with "triton"."""
    rest = qkv_BLNd.shape[2] - n_heads if qkv_BLNd.ndim == 4 else 0
    if rest < 2 or rest % 2 or n_heads < 1 or qkv_BLNd.shape[3] % 2 or not qkv_BLNd.is_floating_point():
        raise ValueError(f"{described(qkv=qkv_BLNd)}, {n_heads=}: expected floats (B, L, H + 2 Hkv, d) with even d")
    B, L, _, d = qkv_BLNd.shape
    if cos.shape != sin.shape or cos.shape not in ((L, 1, d), (B, L, 1, d)):
        raise ValueError(f"{described(cos=cos, sin=sin)}: expected ({L}, 1, {d}) or ({B}, {L}, 1, {d})")
    if [None if w is None else w.shape for w in (q_weight, k_weight)] not in ([None, None], [(d,), (d,)]):
        raise ValueError(f"q_weight and k_weight: expected two of shape ({d},), or none")
    if not use_kernels(impl, qkv_BLNd, cos=cos, sin=sin, q_weight=q_weight, k_weight=k_weight):
        return reference.rope(qkv_BLNd, cos, sin, n_heads, q_weight, k_weight, eps)
    q_weight, k_weight = (None if w is None else w.contiguous() for w in (q_weight, k_weight))
    return Rope.apply(qkv_BLNd, cos, sin, q_weight, k_weight, n_heads, eps)


@triton.jit
def _rows(T, L, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sequence, position and index of this program's tokens, the columns of half a head, and the mask."""
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (offs_t < T) & (offs_d < D // 2)
    return (offs_t // L).to(tl.int64), (offs_t % L).to(tl.int64), offs_t.to(tl.int64), offs_d, mask


@triton.jit
def _halves(ptrs, mask, D: tl.constexpr):
    x1 = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    return x1, tl.load(ptrs + D // 2, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _normed(x_ptrs, mask, eps, D: tl.constexpr):
    x1, x2 = _halves(x_ptrs, mask, D)
    rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / D + eps)[:, None]
    return x1 * rstd, x2 * rstd, rstd


@triton.jit
def _rotate(
    x_ptrs, y_ptrs, cos, sin, mask, weight_ptr, offs_d, eps, HEADS: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr
):
    if NORM:
        w1, w2 = _halves(weight_ptr + offs_d, offs_d < D // 2, D)
    for _ in range(HEADS):
        if NORM:
            x1, x2, _rstd = _normed(x_ptrs, mask, eps, D)
            x1, x2 = x1 * w1, x2 * w2
        else:
            x1, x2 = _halves(x_ptrs, mask, D)
        tl.store(y_ptrs, (x1 * cos - x2 * sin).to(y_ptrs.dtype.element_ty), mask=mask)
        tl.store(y_ptrs + D // 2, (x2 * cos + x1 * sin).to(y_ptrs.dtype.element_ty), mask=mask)
        x_ptrs += D
        y_ptrs += D


@triton.jit(do_not_specialize=["T", "L"])
def rope_fwd_kernel(
    qkv_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, q_ptr, k_ptr, T, L, stride_table, eps,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program rotates all query heads or all key heads of BLOCK_T tokens, to read cos and sin once."""
    offs_b, offs_l, offs_t, offs_d, mask = _rows(T, L, D, BLOCK_T, BLOCK_D)
    table = offs_b * stride_table + offs_l * D + offs_d
    cos, sin = tl.load(cos_ptr + table, mask=mask, other=0.0), tl.load(sin_ptr + D // 2 + table, mask=mask, other=0.0)
    x_ptrs = qkv_ptr + offs_t * ((H + 2 * HKV) * D) + offs_d
    if tl.program_id(1) == 0:
        _rotate(x_ptrs, q_ptr + offs_t * (H * D) + offs_d, cos, sin, mask, q_weight_ptr, offs_d, eps, H, D, NORM)
    else:
        _rotate(
            x_ptrs + H * D, k_ptr + offs_t * (HKV * D) + offs_d, cos, sin, mask, k_weight_ptr, offs_d, eps, HKV, D, NORM
        )


@triton.jit
def _rotate_back(
    dy_ptrs, stride_dy, x_ptrs, dx_ptrs, cos, sin, mask, weight_ptr, dweight_ptr, offs_d, eps,
    HEADS: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    if NORM:
        w1, w2 = _halves(weight_ptr + offs_d, offs_d < D // 2, D)
        dw1, dw2 = tl.zeros_like(cos), tl.zeros_like(cos)
    for _ in range(HEADS):
        dy1, dy2 = _halves(dy_ptrs, mask, D)
        dx1, dx2 = dy1 * cos + dy2 * sin, dy2 * cos - dy1 * sin
        if NORM:
            x1, x2, rstd = _normed(x_ptrs, mask, eps, D)
            dw1 += tl.where(mask, dx1 * x1, 0.0)  # rows past the end are NaN when eps is 0
            dw2 += tl.where(mask, dx2 * x2, 0.0)
            dx1, dx2 = dx1 * w1, dx2 * w2
            mean = (tl.sum(dx1 * x1 + dx2 * x2, 1) / D)[:, None]
            dx1, dx2 = (dx1 - x1 * mean) * rstd, (dx2 - x2 * mean) * rstd
            x_ptrs += D
        tl.store(dx_ptrs, dx1.to(dx_ptrs.dtype.element_ty), mask=mask)
        tl.store(dx_ptrs + D // 2, dx2.to(dx_ptrs.dtype.element_ty), mask=mask)
        dy_ptrs += stride_dy
        dx_ptrs += D
    if NORM:  # one partial sum per program; the launcher adds them in a fixed order
        tl.store(dweight_ptr + offs_d, tl.sum(dw1, 0)[None, :], mask=offs_d < D // 2)
        tl.store(dweight_ptr + D // 2 + offs_d, tl.sum(dw2, 0)[None, :], mask=offs_d < D // 2)


@triton.jit(do_not_specialize=["T", "L"])
def rope_bwd_kernel(
    dq_ptr, dk_ptr, dv_ptr, qkv_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, dqkv_ptr, dweight_ptr, T, L,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh, stride_table,
    eps, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of all query, all key or all value heads of BLOCK_T tokens. Those of values are copied."""
    offs_b, offs_l, offs_t, offs_d, mask = _rows(T, L, D, BLOCK_T, BLOCK_D)
    offs_x = offs_t * ((H + 2 * HKV) * D) + offs_d
    x_ptrs, dx_ptrs = qkv_ptr + offs_x, dqkv_ptr + offs_x
    if tl.program_id(1) == 2:
        dv_ptrs = dv_ptr + offs_b * stride_vb + offs_l * stride_vl + offs_d
        dx_ptrs += (H + HKV) * D
        for _ in range(HKV):
            tl.store(dx_ptrs, tl.load(dv_ptrs, mask=mask, other=0.0), mask=mask)
            tl.store(dx_ptrs + D // 2, tl.load(dv_ptrs + D // 2, mask=mask, other=0.0), mask=mask)
            dv_ptrs += stride_vh
            dx_ptrs += D
    else:
        table = offs_b * stride_table + offs_l * D + offs_d
        cos = tl.load(cos_ptr + table, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + D // 2 + table, mask=mask, other=0.0)
        dweight_ptr += tl.program_id(0).to(tl.int64) * (2 * D)
        if tl.program_id(1) == 0:
            dq_ptrs = dq_ptr + offs_b * stride_qb + offs_l * stride_ql + offs_d
            _rotate_back(
                dq_ptrs, stride_qh, x_ptrs, dx_ptrs, cos, sin, mask, q_weight_ptr, dweight_ptr, offs_d, eps, H, D, NORM
            )
        else:
            dk_ptrs = dk_ptr + offs_b * stride_kb + offs_l * stride_kl + offs_d
            x_ptrs += H * D
            dx_ptrs += H * D
            dweight_ptr += D
            _rotate_back(
                dk_ptrs, stride_kh, x_ptrs, dx_ptrs, cos, sin, mask, k_weight_ptr, dweight_ptr, offs_d, eps, HKV, D,
                NORM,
            )  # fmt: skip


def _tables(cos, sin):
    return cos.contiguous(), sin.contiguous(), cos.shape[1] * cos.shape[3] if cos.ndim == 4 else 0


def _blocks(d):
    block_d = pow2(d // 2)  # 8 values a thread of 2 warps: accesses of 16 bytes in bfloat16
    return dict(BLOCK_T=max(1, 512 // block_d), BLOCK_D=block_d, num_warps=2)


def rope_fwd(
    qkv_BLNd: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, n_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    qkv, (B, L, N, d), (cos, sin, stride_table) = qkv_BLNd.contiguous(), qkv_BLNd.shape, _tables(cos, sin)
    n_kv_heads, T, blocks = (N - n_heads) // 2, B * L, _blocks(d)
    q, k = qkv.new_empty(B, L, n_heads, d), qkv.new_empty(B, L, n_kv_heads, d)
    if T > 0:
        launch(
            rope_fwd_kernel, (cdiv(T, blocks["BLOCK_T"]), 2), (qkv, cos, sin, q_weight, k_weight, q, k),
            (T, L, stride_table, eps), H=n_heads, HKV=n_kv_heads, D=d, NORM=q_weight is not None, **blocks,
        )  # fmt: skip
    return q, k


def rope_bwd(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv_BLNd: Tensor | None, cos: Tensor, sin: Tensor, q_weight: Tensor | None,
    k_weight: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradient of qkv, contiguous, and of both weights, (2, d) float32, or (0, d) without weights."""
    dq, dk, dv = (t if t.stride(3) == 1 else t.contiguous() for t in (dq, dk, dv))
    (B, L, H, d), n_kv_heads, (cos, sin, stride_table) = dq.shape, dk.shape[2], _tables(cos, sin)
    T, norm, blocks = B * L, q_weight is not None, _blocks(d)
    n_blocks = cdiv(T, blocks["BLOCK_T"])
    dqkv = dq.new_empty(B, L, H + 2 * n_kv_heads, d)
    dweights = dq.new_empty(n_blocks, 2 if norm else 0, d, dtype=torch.float32)
    if T > 0:
        qkv = dqkv if qkv_BLNd is None else qkv_BLNd.contiguous()
        strides = (stride for grad in (dq, dk, dv) for stride in grad.stride()[:3])
        launch(
            rope_bwd_kernel, (n_blocks, 3), (dq, dk, dv, qkv, cos, sin, q_weight, k_weight, dqkv, dweights),
            (T, L, *strides, stride_table, eps), H=H, HKV=n_kv_heads, D=d, NORM=norm, **blocks,
        )  # fmt: skip
    return dqkv, dweights.sum(0)


rope_fwd_op = torch.library.custom_op("moe_kernels::rope_fwd", rope_fwd, mutates_args=())
rope_bwd_op = torch.library.custom_op("moe_kernels::rope_bwd", rope_bwd, mutates_args=())


@rope_fwd_op.register_fake
def _(qkv_BLNd, cos, sin, q_weight, k_weight, n_heads, eps):
    B, L, N, d = qkv_BLNd.shape
    return qkv_BLNd.new_empty(B, L, n_heads, d), qkv_BLNd.new_empty(B, L, (N - n_heads) // 2, d)


@rope_bwd_op.register_fake
def _(dq, dk, dv, qkv_BLNd, cos, sin, q_weight, k_weight, eps):
    B, L, H, d = dq.shape
    dweights = dq.new_empty(0 if q_weight is None else 2, d, dtype=torch.float32)
    return dq.new_empty(B, L, H + 2 * dk.shape[2], d), dweights


class Rope(torch.autograd.Function):
    """One autograd node, and so one launch, for the gradients of queries, keys and values. It is not a custom op: those
    cannot return a view of an input, and the values are a view."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, q_weight, k_weight, n_heads, eps):
        q, k = (rope_fwd if eager(qkv) else rope_fwd_op)(qkv, cos, sin, q_weight, k_weight, n_heads, eps)
        ctx.eps = eps
        ctx.save_for_backward(None if q_weight is None else qkv, cos, sin, q_weight, k_weight)
        return q, k, qkv[:, :, n_heads + k.shape[2] :]

    @staticmethod
    @first_order
    def backward(ctx, dq, dk, dv):
        qkv, cos, sin, q_weight, k_weight = ctx.saved_tensors
        run = rope_bwd if eager(dq) else rope_bwd_op
        dqkv, dweights = run(dq, dk, dv, qkv, cos, sin, q_weight, k_weight, ctx.eps)
        weights = [None if w is None else dweights[i].to(w.dtype) for i, w in enumerate((q_weight, k_weight))]
        return dqkv, None, None, *weights, None, None
