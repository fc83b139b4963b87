"""Gated activations f(gate) * up: the table that every kernel and the reference use, and the op of a dense layer.

To add one, write two kernel functions, f and (f, f'), add a row to ACTIVATIONS, and name it in ModelConfig.activation.
Shapes: T tokens, F hidden width, G = 2F (gate columns, then up columns).
"""

from typing import Any, NamedTuple

import torch.nn.functional as F_
from torch import Tensor

from moe_kernels.language import launch, tl, triton
from moe_kernels.ops import define, sheltered, use_kernels
from moe_kernels.tiles import cdiv, interpreting, pow2


@triton.jit
def _sigmoid_approx(x):
    # Four instructions, within 1e-6 of 1 / (1 + exp(-x)). tl.sigmoid spends ten more on numbers outside float32,
    # which here are 0 or 1 anyway; they were half of an epilogue's time.
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 t;
        mul.ftz.f32 t, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 t, t;
        add.ftz.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 $0, t;
        }""",
        "=f,f",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


_sigmoid = tl.sigmoid if interpreting() else _sigmoid_approx


@triton.jit
def silu(gate):
    return gate * _sigmoid(gate)


@triton.jit
def silu_slope(gate):
    sigmoid = _sigmoid(gate)
    value = gate * sigmoid
    return value, sigmoid + value - value * sigmoid


@triton.jit
def gelu(gate):
    # 0.5 x (1 + tanh(z)) = x sigmoid(2 z), with z = sqrt(2 / pi) (x + 0.044715 x^3).
    return gate * _sigmoid(gate * (1.5957691216057308 + 0.07135481282553853 * gate * gate))


@triton.jit
def gelu_slope(gate):
    sigmoid = _sigmoid(gate * (1.5957691216057308 + 0.07135481282553853 * gate * gate))
    value = gate * sigmoid
    return value, sigmoid + value * (1.0 - sigmoid) * (1.5957691216057308 + 0.21406443847661558 * gate * gate)


@triton.jit
def _relu(gate):
    # This keeps a NaN and spills no register in dswiglu_kernel: tl.maximum drops a NaN, tl.where spills 24 bytes a
    # thread.
    return tl.clamp(gate, 0.0, 3.4e38, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu2(gate):
    return _relu(gate) * _relu(gate)


@triton.jit
def relu2_slope(gate):
    return _relu(gate) * _relu(gate), 2.0 * _relu(gate)


class Activation(NamedTuple):
    truth: Any  # f in PyTorch; autograd has its slope
    value: Any  # f of a float32 block in a kernel
    slope: Any  # f and its derivative in a kernel


ACTIVATIONS = {
    "swiglu": Activation(F_.silu, silu, silu_slope),  # arXiv 2002.05202
    "geglu": Activation(lambda gate: F_.gelu(gate, approximate="tanh"), gelu, gelu_slope),  # the form of Gemma
    "relu2": Activation(lambda gate: F_.relu(gate).square(), relu2, relu2_slope),  # arXiv 2109.08668, gated
}


def activation_of(name):
    """The row of ACTIVATIONS. Raises ValueError for an unknown name."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r}: expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def gated_activation(h_TG, activation="swiglu", impl=None):
    """f(h[:, :F]) * h[:, F:] with the f of `activation`: "swiglu" (SiLU), "geglu" (GELU in its tanh form) or "relu2"
    (ReLU squared).

    h_TG (T, 2F), any floating dtype, rows of any stride. Returns (T, F) in its dtype; differentiable. The kernels
    compute in float32 and save h.
    impl: as in `moe_experts`; "grouped_mm" is the reference here. Raises ValueError for other shapes or names, and for
    float64 with "triton"."""
    if h_TG.ndim != 2 or h_TG.shape[1] % 2 or not h_TG.is_floating_point():
        raise ValueError(f"h: expected a (T, 2F) float tensor, got {tuple(h_TG.shape)} {h_TG.dtype}")
    activation_of(activation)
    return (run_gated if use_kernels(impl, h_TG) else gated)(h_TG, activation)


@sheltered
def gated(h_TG, activation="swiglu"):
    """Twin of `gated_activation`, in any floating dtype."""
    gate, up = h_TG.chunk(2, dim=1)
    return ACTIVATIONS[activation].truth(gate) * up


@triton.jit
def _block(T, F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    """Rows, columns and mask of this program's block."""
    n_blocks: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    pid = tl.program_id(0)
    offs_t = (pid // n_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    offs_f = pid % n_blocks * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    return offs_t, offs_f, (offs_t < T) & (offs_f < F)


@triton.jit(do_not_specialize=["T"])
def gated_fwd_kernel(
    h_ptr, a_ptr, T, stride_h, F: tl.constexpr, VALUE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr
):
    offs_t, offs_f, mask = _block(T, F, BLOCK_T, BLOCK_F)
    gate = tl.load(h_ptr + offs_t * stride_h + offs_f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + offs_t * stride_h + F + offs_f, mask=mask, other=0.0).to(tl.float32)
    tl.store(a_ptr + offs_t * F + offs_f, (VALUE(gate) * up).to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def gated_bwd_kernel(
    h_ptr, da_ptr, dh_ptr, T, stride_h, stride_da,
    F: tl.constexpr, SLOPE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    offs_t, offs_f, mask = _block(T, F, BLOCK_T, BLOCK_F)
    gate = tl.load(h_ptr + offs_t * stride_h + offs_f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + offs_t * stride_h + F + offs_f, mask=mask, other=0.0).to(tl.float32)
    da = tl.load(da_ptr + offs_t * stride_da + offs_f, mask=mask, other=0.0).to(tl.float32)
    value, slope = SLOPE(gate)
    dh_ptrs = dh_ptr + offs_t * (2 * F) + offs_f
    tl.store(dh_ptrs, (da * up * slope).to(dh_ptr.dtype.element_ty), mask=mask)
    tl.store(dh_ptrs + F, (da * value).to(dh_ptr.dtype.element_ty), mask=mask)


def _launch(kernel, tensors, strides, **function):
    T, F = tensors[0].shape[0], tensors[0].shape[1] // 2
    if T * F > 0:
        block_f = min(pow2(F), 1024)
        block_t = max(1, 1024 // block_f)  # 8 values a thread: accesses of 16 bytes in bfloat16
        grid = (cdiv(T, block_t) * cdiv(F, block_f),)
        launch(kernel, grid, tensors, (T, *strides), F=F, **function, BLOCK_T=block_t, BLOCK_F=block_f)
    return tensors[-1]


def _rows(tensor):
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def gated_fwd(h_TG: Tensor, activation: str) -> Tensor:
    """f(gate) * up (T, F), contiguous."""
    h, (T, G) = _rows(h_TG), h_TG.shape
    return _launch(gated_fwd_kernel, (h, h.new_empty(T, G // 2)), h.stride()[:1], VALUE=ACTIVATIONS[activation].value)


def gated_bwd(h_TG: Tensor, da_TF: Tensor, activation: str) -> Tensor:
    """Gradient of h (T, 2F), contiguous."""
    h, da = _rows(h_TG), _rows(da_TF)
    strides, slope = (h.stride(0), da.stride(0)), ACTIVATIONS[activation].slope
    return _launch(gated_bwd_kernel, (h, da, h.new_empty(h.shape)), strides, SLOPE=slope)


def _setup_context(ctx, inputs, output):
    ctx.activation = inputs[1]
    ctx.save_for_backward(inputs[0])


gated_op, gated_bwd_op, run_gated = define(
    "gated_activation",
    gated_fwd,
    gated_bwd,
    lambda h_TG, activation: h_TG.new_empty(h_TG.shape[0], h_TG.shape[1] // 2),
    lambda h_TG, da_TF, activation: h_TG.new_empty(h_TG.shape),
    _setup_context,
    lambda ctx, run, da: (run(*ctx.saved_tensors, da, ctx.activation), None),
)
