"""SwiGLU of a dense layer, silu(gate) * up, and its gradient: one launch each, which reads and writes every value once.

Shapes: T tokens, F hidden width, G = 2F (gate columns, then up columns). The experts' SwiGLU is part of their GEMMs (grouped_gemm.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels import reference
from moe_kernels.grouped_gemm import _sigmoid
from moe_kernels.tiles import cdiv, eager, pick_impl, pow2


def swiglu(h_TG, impl=None):
    """silu(h[:, :F]) * h[:, F:] (arXiv 2002.05202).

    h_TG (T, 2F), any floating dtype, rows of any stride. Returns (T, F) in its dtype; differentiable. The triton path computes in float32 and saves h.
    impl: as in `moe_experts`; "grouped_mm" is the reference here. Raises ValueError for other shapes, and for float64 on the triton path."""
    if h_TG.ndim != 2 or h_TG.shape[1] % 2 or not h_TG.is_floating_point():
        raise ValueError(f"h: expected a (T, 2F) float tensor, got {tuple(h_TG.shape)} {h_TG.dtype}")
    if impl == "grouped_mm" or pick_impl(impl, h_TG) != "triton":
        return reference.swiglu(h_TG)
    if h_TG.dtype == torch.float64:
        raise ValueError("impl='triton' computes in float32 at most, not float64: use impl='reference'")
    return (EagerSwiglu.apply if eager(h_TG) else swiglu_op)(h_TG)


@triton.jit(do_not_specialize=["T"])
def swiglu_fwd_kernel(h_ptr, a_ptr, T, stride_h, F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    n_blocks: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    pid = tl.program_id(0)
    offs_t = (pid // n_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    offs_f = pid % n_blocks * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    mask = (offs_t < T) & (offs_f < F)
    gate = tl.load(h_ptr + offs_t * stride_h + offs_f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + offs_t * stride_h + F + offs_f, mask=mask, other=0.0).to(tl.float32)
    tl.store(a_ptr + offs_t * F + offs_f, (gate * _sigmoid(gate) * up).to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def swiglu_bwd_kernel(
    h_ptr, da_ptr, dh_ptr, T, stride_h, stride_da, F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr
):
    n_blocks: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    pid = tl.program_id(0)
    offs_t = (pid // n_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    offs_f = pid % n_blocks * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    mask = (offs_t < T) & (offs_f < F)
    gate = tl.load(h_ptr + offs_t * stride_h + offs_f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + offs_t * stride_h + F + offs_f, mask=mask, other=0.0).to(tl.float32)
    da = tl.load(da_ptr + offs_t * stride_da + offs_f, mask=mask, other=0.0).to(tl.float32)
    sig = _sigmoid(gate)
    silu = gate * sig
    dh_ptrs = dh_ptr + offs_t * (2 * F) + offs_f
    tl.store(dh_ptrs, (da * up * (sig + silu * (1.0 - sig))).to(dh_ptr.dtype.element_ty), mask=mask)
    tl.store(dh_ptrs + F, (da * silu).to(dh_ptr.dtype.element_ty), mask=mask)


def _launch(kernel, T, F, *args):
    if T * F > 0:
        block_f = min(pow2(F), 1024)
        block_t = max(1, 1024 // block_f)  # 8 values a thread: accesses of 16 bytes in bfloat16
        kernel[(cdiv(T, block_t) * cdiv(F, block_f),)](*args, F, block_t, block_f)


def _rows(tensor):
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def swiglu_fwd(h_TG: Tensor) -> Tensor:
    h, (T, G) = _rows(h_TG), h_TG.shape
    a = h.new_empty(T, G // 2)
    _launch(swiglu_fwd_kernel, T, G // 2, h, a, T, h.stride(0))
    return a


def swiglu_bwd(h_TG: Tensor, da_TF: Tensor) -> Tensor:
    """Gradient of h (T, 2F), contiguous."""
    h, da, (T, G) = _rows(h_TG), _rows(da_TF), h_TG.shape
    dh = h.new_empty(T, G)
    _launch(swiglu_bwd_kernel, T, G // 2, h, da, dh, T, h.stride(0), da.stride(0))
    return dh


swiglu_op = torch.library.custom_op("moe_kernels::swiglu", swiglu_fwd, mutates_args=())
swiglu_bwd_op = torch.library.custom_op("moe_kernels::swiglu_bwd", swiglu_bwd, mutates_args=())


@swiglu_op.register_fake
def _(h_TG):
    return h_TG.new_empty(h_TG.shape[0], h_TG.shape[1] // 2)


@swiglu_bwd_op.register_fake
def _(h_TG, da_TF):
    return h_TG.new_empty(h_TG.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, da):
    return swiglu_bwd_op(*ctx.saved_tensors, da)


swiglu_op.register_autograd(_backward, setup_context=_setup_context)


class EagerSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_TG):
        ctx.save_for_backward(h_TG)
        return swiglu_fwd(h_TG)

    @staticmethod
    @once_differentiable
    def backward(ctx, da):
        return swiglu_bwd(*ctx.saved_tensors, da)
