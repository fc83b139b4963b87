"""Gated activations f(gate) * up: the table that every kernel and the reference use, and the op of a dense layer.

To add one, write a function that returns (f, f'), add a row to ACTIVATIONS, and name it in ModelConfig.activation.
Where a kernel needs only f, the compiler removes f'.
Shapes: T tokens, F hidden width, G = 2F (gate columns, then up columns).
"""

from typing import Any, NamedTuple

import torch.nn.functional as F_
from torch import Tensor

from moe_kernels.language import launch, tl, triton
from moe_kernels.ops import define, no_autocast, use_kernels
from moe_kernels.tiles import cdiv, interpreting, pow2


@triton.jit
def _sigmoid_approx(x):
    # Four instructions, within 1e-6 of 1 / (1 + exp(-x)). tl.sigmoid takes ten more, half of an epilogue's time, for x
    # whose exponential is outside of float32; there the result is 0 or 1 anyway.
    code: tl.constexpr = """{
        .reg .f32 t;
        mul.ftz.f32 t, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 t, t;
        add.ftz.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 $0, t;
        }"""
    return tl.inline_asm_elementwise(code, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


_sigmoid = tl.sigmoid if interpreting() else _sigmoid_approx


@triton.jit
def silu(gate):
    sigmoid = _sigmoid(gate)
    value = gate * sigmoid
    return value, sigmoid + value - value * sigmoid


@triton.jit
def gelu(gate):
    # 0.5 x (1 + tanh(z)) = x sigmoid(2 z), with z = sqrt(2 / pi) (x + 0.044715 x^3).
    sigmoid = _sigmoid(gate * (1.5957691216057308 + 0.07135481282553853 * gate * gate))
    value = gate * sigmoid
    return value, sigmoid + value * (1.0 - sigmoid) * (1.5957691216057308 + 0.21406443847661558 * gate * gate)


@triton.jit
def relu2(gate):
    # tl.maximum would hide a NaN. tl.where would spill 24 bytes a thread in dswiglu_kernel.
    relu = tl.clamp(gate, 0.0, 3.4e38, propagate_nan=tl.PropagateNan.ALL)
    return relu * relu, 2.0 * relu


class Activation(NamedTuple):
    truth: Any  # f in PyTorch; autograd finds its slope
    kernel: Any  # in a kernel: (f, f') of a float32 block


ACTIVATIONS = {
    "swiglu": Activation(F_.silu, silu),  # arXiv 2002.05202
    "geglu": Activation(lambda gate: F_.gelu(gate, approximate="tanh"), gelu),  # the form of Gemma
    "relu2": Activation(lambda gate: F_.relu(gate).square(), relu2),  # arXiv 2109.08668, gated
}


def activation_of(name):
    """The row of ACTIVATIONS. Raises ValueError for an unknown name."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r}: expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def gated_activation(h_TG, activation="swiglu", impl=None):
    """f(h[:, :F]) * h[:, F:]. activation names f, as in `moe_experts`.

    h_TG (T, 2F), any floating dtype. Returns (T, F) in the same dtype; differentiable. The kernels compute in float32
    and save h.
    impl: as in `route`. Raises ValueError for other shapes or names, and for float64 with "triton"."""
    if h_TG.ndim != 2 or h_TG.shape[1] % 2 or not h_TG.is_floating_point():
        raise ValueError(f"h {tuple(h_TG.shape)} {h_TG.dtype}: expected (T, 2F), floats")
    activation_of(activation)
    return (run_gated if use_kernels(impl, h_TG) else gated)(h_TG, activation)


@no_autocast
def gated(h_TG, activation="swiglu"):
    """Twin of `gated_activation`, in any floating dtype."""
    gate, up = h_TG.chunk(2, dim=1)
    return ACTIVATIONS[activation].truth(gate) * up


@triton.jit
def _block(h_ptr, T, stride_h, F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    n_blocks: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    pid = tl.program_id(0)
    offs_t = (pid // n_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    offs_f = pid % n_blocks * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    mask = (offs_t < T) & (offs_f < F)
    gate = tl.load(h_ptr + offs_t * stride_h + offs_f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + offs_t * stride_h + F + offs_f, mask=mask, other=0.0).to(tl.float32)
    return offs_t, offs_f, mask, gate, up


@triton.jit(do_not_specialize=["T"])
def gated_fwd_kernel(
    h_ptr, a_ptr, T, stride_h,
    F: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    offs_t, offs_f, mask, gate, up = _block(h_ptr, T, stride_h, F, BLOCK_T, BLOCK_F)
    a_ptrs = a_ptr + offs_t * F + offs_f
    value, _slope = ACTIVATION(gate)
    tl.store(a_ptrs, (value * up).to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def gated_bwd_kernel(
    h_ptr, da_ptr, dh_ptr, T, stride_h, stride_da,
    F: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    offs_t, offs_f, mask, gate, up = _block(h_ptr, T, stride_h, F, BLOCK_T, BLOCK_F)
    da = tl.load(da_ptr + offs_t * stride_da + offs_f, mask=mask, other=0.0).to(tl.float32)
    value, slope = ACTIVATION(gate)
    dh_ptrs = dh_ptr + offs_t * (2 * F) + offs_f
    tl.store(dh_ptrs, (da * up * slope).to(dh_ptr.dtype.element_ty), mask=mask)
    tl.store(dh_ptrs + F, (da * value).to(dh_ptr.dtype.element_ty), mask=mask)


def _launch(kernel, tensors, strides, activation):
    T, F = tensors[0].shape[0], tensors[0].shape[1] // 2
    if T * F > 0:
        block_f = min(pow2(F), 1024)
        block_t = max(1, 1024 // block_f)  # 8 values a thread: accesses of 16 bytes in bfloat16
        grid = (cdiv(T, block_t) * cdiv(F, block_f),)
        constants = dict(F=F, ACTIVATION=ACTIVATIONS[activation].kernel, BLOCK_T=block_t, BLOCK_F=block_f)
        launch(kernel, grid, tensors, (T, *strides), **constants)
    return tensors[-1]


def _rows(tensor):
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def gated_fwd(h_TG: Tensor, activation: str) -> Tensor:
    h, (T, G) = _rows(h_TG), h_TG.shape
    return _launch(gated_fwd_kernel, (h, h.new_empty(T, G // 2)), h.stride()[:1], activation)


def gated_bwd(h_TG: Tensor, da_TF: Tensor, activation: str) -> Tensor:
    h, da = _rows(h_TG), _rows(da_TF)
    return _launch(gated_bwd_kernel, (h, da, h.new_empty(h.shape)), (h.stride(0), da.stride(0)), activation)


def _setup_context(ctx, inputs, output):
    ctx.activation = inputs[1]
    ctx.save_for_backward(inputs[0])


gated_op, gated_bwd_op, run_gated = define(
    "gated_activation", gated_fwd, gated_bwd,
    lambda h_TG, activation: h_TG.new_empty(h_TG.shape[0], h_TG.shape[1] // 2),
    lambda h_TG, da_TF, activation: h_TG.new_empty(h_TG.shape),
    _setup_context,
    lambda ctx, run, da: (run(*ctx.saved_tensors, da, ctx.activation), None),
)  # fmt: skip
