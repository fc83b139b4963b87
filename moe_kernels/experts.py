"""The differentiable expert layer and its ops. Besides the weights they save x, the gates, the pre-activation and the
sort for the backward pass, and nothing else.

Letters as in reference.py.
"""

import contextlib
import functools

import torch
from torch import Tensor

from moe_kernels import grouped_gemm as gemm
from moe_kernels import reference
from moe_kernels.activation import activation_of
from moe_kernels.dispatch import Dispatch, combine, dispatch, empty_dispatch
from moe_kernels.language import MISSING
from moe_kernels.ops import INTEGERS, define, described
from moe_kernels.routing import MAX_EXPERTS, MAX_TOP_K
from moe_kernels.tiles import eager, gemm_tiles, pick_impl

if not MISSING:
    from moe_kernels import hopper, hopper_gated, hopper_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def moe_experts(x_TD, w_in_EGD, w_out_EDF, gates_TK, experts_TK, impl=None, activation="swiglu", add_TD=None):
    """y[t] = sum_k gates[t,k] * W_out[e] (f(W_gate[e] x[t]) * (W_up[e] x[t])), e = experts[t,k] (arXiv 2002.05202).

    x_TD (T, D), w_in_EGD (E, 2F, D) with the gate rows first, w_out_EDF (E, D, F), the layout of Hugging Face's
      gate_up_proj and down_proj: one dtype of float32, float16, bfloat16 (and float64 with "reference").
    gates_TK (T, K) float; experts_TK (T, K) integer, ids in 0..E-1 (not checked on the GPU: that would wait for it).
    impl: "reference", "grouped_mm", "triton", or None to choose by device.
    activation: f is SiLU for "swiglu", GELU in its tanh form for "geglu", the square of ReLU for "relu2".
    add_TD: (T, D) in x's dtype, for example the residual stream; it is added to y, by the kernels before y is rounded.
    Returns (T, D) in x's dtype; differentiable in x, both weights, the gates and add. The kernels save x, the T*K*2F
    values of the pre-activation, the gates in float32 and 8 bytes of indices per routed row.
    Raises ValueError for wrong shapes, dtypes, devices, ids or names: D and F must be multiples of 16,
      1 <= K <= min(E, 32), E <= 1024. Raises RuntimeError for an impl that cannot run here.
    """
    _check(x_TD, w_in_EGD, w_out_EDF, gates_TK, experts_TK)
    if add_TD is not None and (add_TD.shape != x_TD.shape or add_TD.dtype != x_TD.dtype):
        raise ValueError(f"{described(x=x_TD, add=add_TD)}: expected one shape and dtype")
    activation_of(activation)
    impl = pick_impl(impl, x_TD, w_in=w_in_EGD, w_out=w_out_EDF, gates=gates_TK, experts=experts_TK, add=add_TD)
    if impl == "triton":
        return run_experts(x_TD, w_in_EGD, w_out_EDF, gates_TK.float(), experts_TK.int(), activation, add_TD)[0]
    native = impl == "grouped_mm"
    y_TD = reference.experts(x_TD, w_in_EGD, w_out_EDF, gates_TK, experts_TK, activation, native=native)
    return y_TD if add_TD is None else y_TD + add_TD


def _check(x, w_in, w_out, gates, experts):
    fits = (x.ndim, w_in.ndim, w_out.ndim) == (2, 3, 3)
    fits = fits and x.dtype == w_in.dtype == w_out.dtype and x.dtype in (*DTYPES, torch.float64)
    if not fits or w_out.shape[1] != x.shape[1] or w_in.shape != (w_out.shape[0], 2 * w_out.shape[2], x.shape[1]):
        got = described(x=x, w_in=w_in, w_out=w_out)
        raise ValueError(f"{got}: expected (T, D), (E, 2F, D), (E, D, F), of one floating dtype")
    T, (E, D, F) = x.shape[0], w_out.shape
    if D % 16 or F % 16 or not D or not F:
        raise ValueError(f"D={D} and F={F} must be positive multiples of 16: pad the weights with zeros")
    fits = gates.shape == experts.shape and gates.ndim == 2 and gates.shape[0] == T
    if not (fits and gates.is_floating_point() and experts.dtype in INTEGERS):
        raise ValueError(f"{described(gates=gates, experts=experts)}: expected floats and integers (T, K), T = {T}")
    if not 1 <= gates.shape[1] <= min(E, MAX_TOP_K) or E > MAX_EXPERTS:
        raise ValueError(f"K={gates.shape[1]}, E={E}: expected 1 <= K <= min(E, {MAX_TOP_K}) and E <= {MAX_EXPERTS}")
    if experts.device.type == "cpu" and experts.numel() and eager(experts):  # traced ids have no values
        low, high = (int(n) for n in experts.aminmax())
        if low < 0 or high >= E:
            raise ValueError(f"experts hold ids from {low} to {high}: with E = {E} they must be in 0..{E - 1}")


def _dense(tensor):
    # Tensor descriptors need rows aligned to 16 bytes. D and F guarantee the strides, but a view may start anywhere.
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def experts_fwd(
    x_TD: Tensor, w_in_EGD: Tensor, w_out_EDF: Tensor, gates_TK: Tensor, experts_TK: Tensor,
    activation: str = "swiglu", add_TD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output (T, D), pre-activation (P, S, W) in the panels of gemm.up, and the seven tensors of a `Dispatch`."""
    if x_TD.dtype not in DTYPES:
        raise ValueError(f"impl='triton' computes in float32, float16 or bfloat16, not {x_TD.dtype}")
    x, w_in, w_out = _dense(x_TD), _dense(w_in_EGD), _dense(w_out_EDF)
    (E, D, F), S = w_out.shape, experts_TK.numel()
    tiles = gemm_tiles(S, E, D, F, x.dtype)
    sorted_ = dispatch(experts_TK.contiguous(), E, tiles["up"].BLOCK_M)
    if S == 0:
        return x.new_empty(0, D), x.new_empty(gemm.panels(0, F, tiles["up"])), *sorted_
    h, a = up(x, w_in, sorted_, tiles["up"], activation)
    y = rows(a, w_out, True, sorted_, tiles["down"])
    add = None if add_TD is None else add_TD.contiguous()
    return combine(y, sorted_.slot_row_TK, gates_TK.contiguous(), add=add)[0], h, *sorted_


def _fake_fwd(x_TD, w_in_EGD, w_out_EDF, gates_TK, experts_TK, activation="swiglu", add_TD=None):
    (E, _, F), S = w_out_EDF.shape, experts_TK.shape[0] * experts_TK.shape[1]
    tile = gemm_tiles(S, E, x_TD.shape[1], F, x_TD.dtype)["up"]
    h = x_TD.new_empty(gemm.panels(S, F, tile))
    return x_TD.new_empty(x_TD.shape), h, *empty_dispatch(experts_TK, E, tile.BLOCK_M)


def experts_bwd(
    dy_TD: Tensor, x_TD: Tensor, w_in_EGD: Tensor, w_out_EDF: Tensor, gates_TK: Tensor, h_PSW: Tensor, offsets: Tensor,
    row_slot_S: Tensor, slot_row_TK: Tensor, tile_expert: Tensor, tile_row: Tensor, tile_count: Tensor,
    by_size: Tensor, activation: str = "swiglu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, w_in, w_out and the gates."""
    dy, x, w_in, w_out, gates = _dense(dy_TD), _dense(x_TD), _dense(w_in_EGD), _dense(w_out_EDF), gates_TK.contiguous()
    if x.shape[0] == 0:
        return tuple(torch.zeros_like(t) for t in (x, w_in, w_out, gates))
    sorted_ = Dispatch(offsets, row_slot_S, slot_row_TK, tile_expert, tile_row, tile_count, by_size)
    tiles = gemm_tiles(row_slot_S.numel(), w_in.shape[0], x.shape[1], w_out.shape[2], x.dtype)
    dh, ga, dgates_parts = dswiglu(dy, w_out, h_PSW, gates, sorted_, tiles["dswiglu"], activation)
    dx, dgates = torch.empty_like(x), torch.empty_like(gates)

    def input_gradients():
        dx_rows = rows(dh, w_in, False, sorted_, tiles["dx"])
        combine(dx_rows, slot_row_TK, dgates_parts=dgates_parts, out=(dx, dgates))

    # With few rows per expert dx reads the weights while dW writes their gradients: side by side they save 1 % of the
    # layer on an H200. With many rows both need the tensor cores.
    with beside(input_gradients, x, row_slot_S.numel() <= 64 * w_in.shape[0]):
        dw_out = dw(dy, ga, False, sorted_, tiles["dw_out"])
        dw_in = dw(x, dh, True, sorted_, tiles["dw_in"])
    return dx, dw_in, dw_out, dgates


def up(x_TD, w_in_EGD, sorted_, tile, activation):
    """h and a by the kernel for Hopper where it fits, else by the plain one. h has the same bits; a may differ in its
    last one, so that it depends on the number of rows."""
    (E, G, D), S = w_in_EGD.shape, sorted_.row_slot_S.numel()
    if hopper_gated.fits_up(tile, D, G // 2, S // E, x_TD.dtype):
        return hopper_gated.up(x_TD, w_in_EGD, sorted_, activation)
    return gemm.up(x_TD, w_in_EGD, sorted_, tile, activation)


def dswiglu(dy_TD, w_out_EDF, h_PSW, gates_TK, sorted_, tile, activation):
    """dh, router gate * a, and parts of the router gates' gradient, by the kernel for Hopper where it fits. It
    rounds da to 16 bits, so that dh and the gates' gradient depend a little on the number of rows."""
    if hopper_gated.fits_dswiglu(tile, *w_out_EDF.shape[1:], dy_TD.dtype):
        return hopper_gated.dswiglu(dy_TD, w_out_EDF, h_PSW, gates_TK, sorted_, activation)
    return gemm.dswiglu(dy_TD, w_out_EDF, h_PSW, gates_TK, sorted_, tile, activation)


def rows(a_SR, w, transposed, sorted_, tile, out=None):
    """gemm.down when transposed, else gemm.dx, by the kernel for Hopper where it fits, else by the plain one, which
    gives the same bits. The result (S, N) is in `out` if it is given."""
    (S, R), E = a_SR.shape, w.shape[0]
    if hopper_rows.fits(tile, w.shape[1 if transposed else 2], R, S // E, a_SR.dtype):
        return hopper_rows.rows(a_SR, w, transposed, sorted_, out)
    return (gemm.down if transposed else gemm.dx)(a_SR, w, sorted_, tile, out)


def dw(a_TM, b_SN, transposed, sorted_, tile):
    """A weight gradient by the kernel for Hopper where it fits, else by the plain one, which gives the same bits."""
    if hopper.fits(a_TM.shape[1], b_SN.shape[1], a_TM.dtype):
        return hopper.dw(a_TM, b_SN, transposed, sorted_)
    return gemm.dw(a_TM, b_SN, transposed, sorted_, tile)


@contextlib.contextmanager
def beside(work, tensor, wanted=True):
    """Runs `work()`. If `wanted` and in a CUDA graph, it runs on a second stream, in parallel with what the context
    launches. Outside of a graph a second stream costs more Python than it saves.

    `work` must fill tensors allocated on the main stream: freed memory of the side stream is reused without waiting for
    readers on the main stream. torch has 32 streams, so the side stream may be the main one of another branch."""
    main = captured_stream(tensor) if wanted else None
    side = main and side_stream(main)
    if main:
        side.wait_stream(main)
    with torch.cuda.stream(side) if main else contextlib.nullcontext():
        work()
    yield
    if main:
        main.wait_stream(side)


def captured_stream(tensor):
    """The current stream if it is recorded into a CUDA graph, else None."""
    return torch.cuda.current_stream() if tensor.is_cuda and torch.cuda.is_current_stream_capturing() else None


@functools.cache
def side_stream(main):
    """The second stream for `main`, for no other: branches of a graph that shared one would wait for each other."""
    return torch.cuda.Stream(main.device)


def _setup_context(ctx, inputs, output):
    x, w_in, w_out, gates, _, ctx.activation, add = inputs
    ctx.adds = add is not None
    ctx.set_materialize_grads(False)  # else backward would get zeros of the size of the pre-activation
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, w_in, w_out, gates, *output[1:])


experts_op, experts_bwd_op, run_experts = define(
    "experts", experts_fwd, experts_bwd, _fake_fwd,
    lambda dy, x, w_in, w_out, gates, *_: tuple(t.new_empty(t.shape) for t in (x, w_in, w_out, gates)),
    _setup_context,
    lambda ctx, run, dy, *_: (*run(dy, *ctx.saved_tensors, ctx.activation), None, None, dy if ctx.adds else None),
    n_outputs=1,
)  # fmt: skip
