"""The differentiable expert layer: registers the forward and backward ops; keeps x, the pre-activation and the routing metadata, nothing else.

Shapes: T tokens, D model width, F expert hidden width, G = 2F (gate rows, then up rows), E experts, K experts per token, S = T*K.
"""

import contextlib
import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels import grouped_gemm as gemm
from moe_kernels import hopper, reference
from moe_kernels.dispatch import Dispatch, combine, dispatch
from moe_kernels.routing import MAX_EXPERTS, MAX_TOP_K
from moe_kernels.tiles import eager, gemm_tiles, max_tiles, pick_impl

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def moe_experts(x_TD, w_in_EGD, w_out_EDF, gates_TK, experts_TK, impl=None):
    """y[t] = sum_k gates[t,k] * W_out[e] (silu(W_gate[e] x[t]) * (W_up[e] x[t])), e = experts[t,k]: SwiGLU experts (arXiv 2002.05202).

    x_TD (T, D), w_in_EGD (E, 2F, D) with the gate rows first, w_out_EDF (E, D, F): one dtype of float32, float16, bfloat16
      (the layout of Hugging Face's gate_up_proj and down_proj).
    gates_TK (T, K) float; experts_TK (T, K) integer, ids in 0..E-1 (not checked on the GPU: that would wait for it).
    impl: "reference", "grouped_mm", "triton", or None to choose by device.
    Returns (T, D) in x's dtype; differentiable in x, both weights and the gates. The triton backward is deterministic and saves x,
    the T*K*2F values of the pre-activation and 8 bytes per routed row.
    Raises ValueError for wrong shapes, dtypes or ids: D and F must be multiples of 16, 1 <= K <= min(E, 32), E <= 1024.
    """
    _check(x_TD, w_in_EGD, w_out_EDF, gates_TK, experts_TK)
    impl = pick_impl(impl, x_TD)
    if impl == "triton":
        op = EagerExperts.apply if eager(x_TD) else experts_op
        return op(x_TD, w_in_EGD, w_out_EDF, gates_TK.float(), experts_TK.int())[0]
    composition = reference.experts_grouped_mm if impl == "grouped_mm" else reference.experts
    return composition(x_TD, w_in_EGD, w_out_EDF, gates_TK, experts_TK)


def _check(x, w_in, w_out, gates, experts):
    if x.ndim != 2 or w_in.ndim != 3 or w_out.ndim != 3:
        raise ValueError(
            f"expected x (T, D), w_in (E, 2F, D), w_out (E, D, F); got {tuple(x.shape)}, {tuple(w_in.shape)}, {tuple(w_out.shape)}"
        )
    (T, D), (E, G, _), F = x.shape, w_in.shape, w_out.shape[2]
    if w_in.shape != (E, 2 * F, D) or w_out.shape != (E, D, F):
        raise ValueError(
            f"w_in {tuple(w_in.shape)} and w_out {tuple(w_out.shape)} do not fit (E, 2F, D) and (E, D, F) with D = {D} from x"
        )
    if D % 16 or F % 16:
        raise ValueError(f"D={D} and F={F} must be multiples of 16: pad the weights with zeros")
    if gates.shape != experts.shape or gates.ndim != 2 or gates.shape[0] != T:
        raise ValueError(f"gates {tuple(gates.shape)} and experts {tuple(experts.shape)}: expected (T, K) with T = {T}")
    if not 1 <= gates.shape[1] <= min(E, MAX_TOP_K) or E > MAX_EXPERTS:
        raise ValueError(
            f"K={gates.shape[1]}, E={E}: supported are 1 <= K <= min(E, {MAX_TOP_K}) and E <= {MAX_EXPERTS}"
        )
    if not (x.dtype == w_in.dtype == w_out.dtype) or x.dtype not in (*DTYPES, torch.float64):
        raise ValueError(f"x {x.dtype}, w_in {w_in.dtype}, w_out {w_out.dtype}: expected one floating dtype")
    if experts.is_floating_point() or experts.dtype == torch.bool:
        raise ValueError(f"experts must be integers, got {experts.dtype}")
    if experts.device.type == "cpu" and experts.numel() and eager(experts):  # traced ids have no values
        low, high = (int(n) for n in experts.aminmax())
        if low < 0 or high >= E:
            raise ValueError(f"experts hold ids from {low} to {high}: with E = {E} they must be in 0..{E - 1}")


def _dense(tensor):
    # Tensor descriptors want 16-byte aligned rows: D and F guarantee the strides, a view's first element may still be off.
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def experts_fwd(
    x_TD: Tensor, w_in_EGD: Tensor, w_out_EDF: Tensor, gates_TK: Tensor, experts_TK: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output (T, D), pre-activation (P, S, W) in the panels of gemm.up, and the seven tensors of a `Dispatch`."""
    if x_TD.dtype not in DTYPES:
        raise ValueError(f"impl='triton' computes in float32, float16 or bfloat16, not {x_TD.dtype}")
    x, w_in, w_out = _dense(x_TD), _dense(w_in_EGD), _dense(w_out_EDF)
    T, D = x.shape
    E, G, _ = w_in.shape
    S = experts_TK.numel()
    tiles = gemm_tiles(S, E, D, G // 2, x.dtype)
    sorted_ = dispatch(experts_TK.contiguous(), E, tiles["up"].BLOCK_M)
    if T == 0:
        return x.new_empty(0, D), x.new_empty(gemm.panels(0, G // 2, tiles["up"])), *sorted_
    h, a = gemm.up(x, w_in, sorted_, tiles["up"])
    y = gemm.down(a, w_out, sorted_, tiles["down"])
    return combine(y, sorted_.slot_row_TK, gates_TK.contiguous())[0], h, *sorted_


experts_op = torch.library.custom_op("moe_kernels::experts", experts_fwd, mutates_args=())


@experts_op.register_fake
def _(x_TD, w_in_EGD, w_out_EDF, gates_TK, experts_TK):
    (T, K), E, G = experts_TK.shape, w_in_EGD.shape[0], w_in_EGD.shape[1]
    tile = gemm_tiles(T * K, E, x_TD.shape[1], G // 2, x_TD.dtype)["up"]
    n_tiles = max_tiles(T * K, E, tile.BLOCK_M)
    index = lambda *shape: x_TD.new_empty(shape, dtype=torch.int32)  # noqa: E731
    return (
        x_TD.new_empty(x_TD.shape),
        x_TD.new_empty(gemm.panels(T * K, G // 2, tile)),
        *Dispatch(index(E + 1), index(T * K), index(T, K), index(n_tiles), index(n_tiles), index(1), index(3, E)),
    )


def experts_bwd(
    dy_TD: Tensor,
    x_TD: Tensor,
    w_in_EGD: Tensor,
    w_out_EDF: Tensor,
    gates_TK: Tensor,
    h_PSW: Tensor,
    offsets: Tensor,
    row_slot_S: Tensor,
    slot_row_TK: Tensor,
    tile_expert: Tensor,
    tile_row: Tensor,
    tile_count: Tensor,
    by_size: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w_in, w_out and the gates."""
    dy, x, w_in, w_out, gates = _dense(dy_TD), _dense(x_TD), _dense(w_in_EGD), _dense(w_out_EDF), gates_TK.contiguous()
    if x.shape[0] == 0:
        return torch.zeros_like(x), torch.zeros_like(w_in), torch.zeros_like(w_out), torch.zeros_like(gates)
    sorted_ = Dispatch(offsets, row_slot_S, slot_row_TK, tile_expert, tile_row, tile_count, by_size)
    tiles = gemm_tiles(row_slot_S.numel(), w_in.shape[0], x.shape[1], w_out.shape[2], x.dtype)
    dh, ga, dgates_parts = gemm.dswiglu(dy, w_out, h_PSW, gates, sorted_, tiles["dswiglu"])
    # With few rows per expert dx reads the weights and dW writes their gradients: side by side 3 % of the layer on an H200. With many rows both want the
    # tensor cores and nothing is gained; outside of a graph a second stream costs more Python than it saves.
    main = captured_stream(x) if tiles["dx"].BLOCK_M < 128 else None
    side = main and side_stream(main)
    # Results are this stream's memory: what the side stream allocates would, once freed, be given to its next kernels without a wait for those here
    # that read it. torch has 32 streams and deals them out again and again, so the side stream may be another branch's main one.
    dx, dgates = torch.empty_like(x), torch.empty_like(gates)
    if main:
        side.wait_stream(main)
    with torch.cuda.stream(side) if main else contextlib.nullcontext():
        combine(gemm.dx(dh, w_in, sorted_, tiles["dx"]), slot_row_TK, dgates_parts=dgates_parts, out=(dx, dgates))
    dw_out = _dw(dy, ga, False, sorted_, tiles["dw_out"])
    dw_in = _dw(x, dh, True, sorted_, tiles["dw_in"])
    if main:
        main.wait_stream(side)
    return dx, dw_in, dw_out, dgates


def _dw(a_TM, b_SN, transposed, sorted_, tile):
    """A weight gradient by the kernel for Hopper where it fits, else by the plain one; both give the same bits."""
    mean_rows = b_SN.shape[0] // (sorted_.offsets.numel() - 1)
    if hopper.fits(a_TM.shape[1], b_SN.shape[1], mean_rows, a_TM.dtype, a_TM.device):
        return hopper.dw(a_TM, b_SN, transposed, sorted_)
    return gemm.dw(a_TM, b_SN, transposed, sorted_, tile)


def captured_stream(tensor):
    """The current stream if it is recorded into a CUDA graph, else None."""
    return torch.cuda.current_stream() if tensor.is_cuda and torch.cuda.is_current_stream_capturing() else None


side_stream = functools.cache(
    lambda main: torch.cuda.Stream(main.device)
)  # one for each: branches of one graph that meet in it wait for each other


experts_bwd_op = torch.library.custom_op("moe_kernels::experts_bwd", experts_bwd, mutates_args=())


@experts_bwd_op.register_fake
def _(dy_TD, x_TD, w_in_EGD, w_out_EDF, gates_TK, *_):
    return tuple(t.new_empty(t.shape) for t in (x_TD, w_in_EGD, w_out_EDF, gates_TK))


def _setup_context(ctx, inputs, output):
    x, w_in, w_out, gates, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, w_in, w_out, gates, *output[1:])


def _backward(ctx, dy, *_):
    return *experts_bwd_op(dy, *ctx.saved_tensors), None


experts_op.register_autograd(_backward, setup_context=_setup_context)


class EagerExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):  # a setup_context of its own would cost an inspect.signature per call
        output = experts_fwd(*inputs)
        ctx.set_materialize_grads(False)  # else backward would get zeros of the size of the pre-activation
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        return *experts_bwd(dy, *ctx.saved_tensors), None
