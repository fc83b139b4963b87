"""The expert layer spread over the GPUs of one machine: each rank has some experts, and kernels read the rows of other
ranks over NVLink. Nothing waits for the host, and every launch has a static bound.

    publish          x, expert ids and gates become visible to all ranks
    barrier
    compute          fetch the tokens that use an expert of this rank, sort, up, down: rows of results, visible to all
    barrier
    collect          each rank adds up the rows of its own tokens, in the order of their slots

The backward pass does the same with gradients. Two barriers a pass are enough: what is published is read only between
its first and its second, and rows only between its second and the first of the next pass.

Letters as in reference.py; W ranks of T tokens each, E experts on each of them, at most C rows on a rank. A rank that
gets more computes garbage: the caller must check for it (optimoe/exchange.py) and discard the step.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels import grouped_gemm as gemm
from moe_kernels.dispatch import Dispatch, dispatch, empty_dispatch
from moe_kernels.experts import _dense, beside, dswiglu, dw, rows, up
from moe_kernels.language import tl, triton
from moe_kernels.muon import pick
from moe_kernels.ops import define
from moe_kernels.tiles import cdiv, gemm_tiles, pow2

ROWS = 4  # tokens per program of fetch_kernel


class Shown(NamedTuple):
    """What one rank lets the others read. x and dy are (W * T, D): its own T tokens, and those it fetches."""

    x: tuple  # one tensor for each layer, because the backward pass reads it again
    dy: Tensor
    rows: Tensor  # (C, D), results or gradients of inputs
    dgates: Tensor  # (C), float32
    gates: Tensor  # (T, K), float32
    experts: Tensor  # (T, K), int32
    slot_row: Tensor  # (W * T, K), int32: the row of each slot that uses an expert of this rank


class Sizes(NamedTuple):
    layers: int
    world: int  # W
    tokens: int  # T, of each rank
    top_k: int
    width: int  # D
    n_rows: int  # C
    dtype: torch.dtype

    def lay_out(self, memory=None):
        """A `Shown` whose tensors lie in `memory` (uint8). Without `memory`, the number of bytes that they take."""
        all_tokens, slots = self.world * self.tokens, (self.tokens, self.top_k)
        parts = [  # (shape, dtype) in the order of Shown's fields
            *[((all_tokens, self.width), self.dtype)] * (self.layers + 1),
            ((self.n_rows, self.width), self.dtype),
            ((self.n_rows,), torch.float32),
            (slots, torch.float32),
            (slots, torch.int32),
            ((all_tokens, self.top_k), torch.int32),
        ]
        tensors, start = [], 0
        for shape, dtype in parts:
            size = torch.Size(shape).numel() * dtype.itemsize
            if memory is not None:
                tensors.append(memory[start : start + size].view(dtype).view(shape))
            start += cdiv(size, 256) * 256
        return Shown(tuple(tensors[: self.layers]), *tensors[self.layers :]) if tensors else start


class Ranks:
    """One rank's view of all of them. memories: for each rank a uint8 tensor of sizes.lay_out() bytes that this device
    can read. barrier(): the current stream waits until all ranks are there."""

    def __init__(self, rank, sizes, memories, barrier):
        self.rank, self.sizes, self.barrier = rank, sizes, barrier
        self.shown = [sizes.lay_out(memory) for memory in memories]
        self.own = self.shown[rank]

    def tokens_of(self, rank):
        return slice(rank * self.sizes.tokens, (rank + 1) * self.sizes.tokens)


# (Ranks, number of the layer). Custom ops take no objects, so they take an index into this list. It is an int64 scalar
# tensor on the CPU, because torch.compile would compile every layer again if each had an int of its own.
LAYERS = []


@triton.jit(do_not_specialize=["T", "first", "rank"])
def fetch_kernel(
    sources, experts, gates, out_ptr, ids_ptr, gates_ptr, T, first, rank,
    D: tl.constexpr, K: tl.constexpr, E: tl.constexpr, WORLD: tl.constexpr, ROUTE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[p * T + t] = sources[p][t] for the tokens of other ranks p that use an expert of this rank.

    ROUTE: also write the gates, and ids (W * T, K): the number that an expert has on this rank, E for experts of other
    ranks. Without ROUTE the ids are read."""
    peer = (rank + 1 + tl.program_id(1)) % WORLD  # every rank begins with a different peer
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_k, offs_d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    slots = tokens[:, None] * K + offs_k[None, :]
    mask = (tokens < T)[:, None] & (offs_k < K)[None, :]
    all_slots = peer * T * K + slots
    if ROUTE:
        ids = tl.load(pick(experts, peer, WORLD) + slots, mask=mask, other=-1) - first
        ids = tl.where((ids >= 0) & (ids < E), ids, E)
        tl.store(ids_ptr + all_slots, ids, mask=mask)
        tl.store(gates_ptr + all_slots, tl.load(pick(gates, peer, WORLD) + slots, mask=mask), mask=mask)
    else:
        ids = tl.load(ids_ptr + all_slots, mask=mask, other=E)
    wanted = (tl.min(tl.where(mask, ids, E), 1) < E) & (peer != rank)
    offs = tokens.to(tl.int64)[:, None] * D + offs_d[None, :]
    mask_x = wanted[:, None] & (offs_d < D)[None, :]
    x = tl.load(pick(sources, peer, WORLD) + offs, mask=mask_x)
    tl.store(out_ptr + peer.to(tl.int64) * T * D + offs, x, mask=mask_x)


def fetch(ranks, layer, ids, gates, n_experts, backward=False):
    """Copy the tokens of other ranks into x of a layer, and fill ids and gates. With `backward`, copy gradients into dy
    instead, for the same ids."""
    sizes, own = ranks.sizes, ranks.own
    published = [(shown.dy if backward else shown.x[layer])[ranks.tokens_of(p)] for p, shown in enumerate(ranks.shown)]
    fetch_kernel[(cdiv(sizes.tokens, ROWS), sizes.world)](
        sources=tuple(published), experts=tuple(shown.experts for shown in ranks.shown),
        gates=tuple(shown.gates for shown in ranks.shown), out_ptr=own.dy if backward else own.x[layer], ids_ptr=ids,
        gates_ptr=gates, T=sizes.tokens, first=ranks.rank * n_experts, rank=ranks.rank, D=sizes.width, K=sizes.top_k,
        E=n_experts, WORLD=sizes.world, ROUTE=not backward, ROWS=ROWS, BLOCK_D=pow2(sizes.width),
        BLOCK_K=pow2(sizes.top_k),
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows"])
def collect_kernel(
    rows, slot_rows, dgates, experts_ptr, gates_ptr, out_ptr, dgates_ptr, n_rows,
    D: tl.constexpr, K: tl.constexpr, E: tl.constexpr, WORLD: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    acc = tl.zeros([BLOCK_D], tl.float32)
    for k in tl.static_range(K):
        peer = tl.load(experts_ptr + t * K + k) // E
        row = tl.load(pick(slot_rows, peer, WORLD) + t * K + k)
        row = tl.minimum(row, n_rows - 1).to(tl.int64)  # it is larger where a rank got too many rows
        y = tl.load(pick(rows, peer, WORLD) + row * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        if BACKWARD:
            tl.store(dgates_ptr + t * K + k, tl.load(pick(dgates, peer, WORLD) + row))
        else:
            y *= tl.load(gates_ptr + t * K + k)
        acc += y
    tl.store(out_ptr + t * D + offs_d, acc.to(out_ptr.dtype.element_ty), mask=mask_d)


def collect(ranks, experts_TK, n_experts, out, gates_TK=None, dgates_TK=None):
    """out[t] = sum_k gates[t,k] * row of (t,k), on whichever rank it is. If dgates_TK is given, it is filled with the
    gradients of the gates, and the gates in the sum are one."""
    sizes, shown = ranks.sizes, ranks.shown
    collect_kernel[(sizes.tokens,)](
        rows=tuple(s.rows for s in shown), slot_rows=tuple(s.slot_row[ranks.tokens_of(ranks.rank)] for s in shown),
        dgates=tuple(s.dgates for s in shown), experts_ptr=experts_TK, gates_ptr=gates_TK, out_ptr=out,
        dgates_ptr=dgates_TK, n_rows=sizes.n_rows, D=sizes.width, K=sizes.top_k, E=n_experts, WORLD=sizes.world,
        BACKWARD=dgates_TK is not None, BLOCK_D=pow2(sizes.width), num_warps=min(8, max(1, pow2(sizes.width) // 256)),
    )  # fmt: skip


@triton.jit(do_not_specialize=["C"])
def clear_kernel(a_ptr, offsets_ptr, C, E: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    rows = tl.load(offsets_ptr + E) + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < C)[:, None] & (offs < N)[None, :]
    zeros = tl.zeros([ROWS, BLOCK_N], a_ptr.dtype.element_ty)
    tl.store(a_ptr + rows.to(tl.int64)[:, None] * N + offs[None, :], zeros, mask=mask)


def clear_after(a_CN, offsets):
    """Write zeros into the 128 rows of a_CN after the used ones: they may hold NaN, and dW multiplies some by zero."""
    (C, N), block = a_CN.shape, 256
    clear_kernel[(8, cdiv(N, block))](
        a_ptr=a_CN, offsets_ptr=offsets, C=C, E=offsets.numel() - 1, N=N, ROWS=16, BLOCK_N=block
    )


def publish(ranks, layer, x_TD, gates_TK, experts_TK):
    own = ranks.own
    own.x[layer][ranks.tokens_of(ranks.rank)].copy_(x_TD)
    own.gates.copy_(gates_TK)
    own.experts.copy_(experts_TK)


def tiles_of(sizes, w_out_EDF):
    return gemm_tiles(sizes.tokens * sizes.top_k, *w_out_EDF.shape, sizes.dtype)


def compute(ranks, layer, w_in_EGD, w_out_EDF, activation):
    """After publish and a barrier: the rows of this rank's experts. Returns what the backward pass needs: the
    pre-activation in the shape gemm.panels(C, F, tile), ids (W * T, K), gates (W * T, K), and the seven tensors of a
    `Dispatch`."""
    sizes, own, E = ranks.sizes, ranks.own, w_out_EDF.shape[0]
    tiles = tiles_of(sizes, w_out_EDF)
    ids, gates = torch.empty_like(own.slot_row), own.gates.new_empty(own.slot_row.shape)
    fetch(ranks, layer, ids, gates, E)
    sorted_ = dispatch(ids, E, tiles["up"].BLOCK_M, sizes.n_rows)
    own.slot_row.copy_(sorted_.slot_row_TK)
    h, a = up(own.x[layer], _dense(w_in_EGD), sorted_, tiles["up"], activation)
    rows(a, _dense(w_out_EDF), True, sorted_, tiles["down"], out=own.rows)
    return h, ids, gates, *sorted_


def compute_gradients(ranks, layer, w_in_EGD, w_out_EDF, h, ids, gates, sorted_, activation):
    """After dy is published and a barrier: the gradients of this rank's rows, for all to read. Returns a function that
    gives the gradients of w_in and w_out."""
    own, tiles = ranks.own, tiles_of(ranks.sizes, w_out_EDF)
    fetch(ranks, layer, ids, gates, w_out_EDF.shape[0], backward=True)
    own.slot_row.copy_(sorted_.slot_row_TK)
    dh, ga, parts = dswiglu(own.dy, _dense(w_out_EDF), h, gates, sorted_, tiles["dswiglu"], activation)
    torch.sum(parts, 0, out=own.dgates)
    rows(dh, _dense(w_in_EGD), False, sorted_, tiles["dx"], out=own.rows)

    def weight_gradients():
        clear_after(ga, sorted_.offsets)
        clear_after(dh, sorted_.offsets)
        dw_out = dw(own.dy, ga, False, sorted_, tiles["dw_out"])
        return dw(own.x[layer], dh, True, sorted_, tiles["dw_in"]), dw_out

    return weight_gradients


def remote_fwd(
    x_TD: Tensor, w_in_EGD: Tensor, w_out_EDF: Tensor, gates_TK: Tensor, experts_TK: Tensor, activation: str,
    index: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output (T, D), then what `compute` returns. gates float32, experts int32, both (T, K); index: into LAYERS."""
    ranks, layer = LAYERS[int(index)]
    publish(ranks, layer, x_TD, gates_TK, experts_TK)
    ranks.barrier()
    saved = compute(ranks, layer, w_in_EGD, w_out_EDF, activation)
    ranks.barrier()
    out = x_TD.new_empty(x_TD.shape)
    collect(ranks, experts_TK.contiguous(), len(w_in_EGD), out, gates_TK.contiguous())
    return out, *saved


def _fake_fwd(x_TD, w_in_EGD, w_out_EDF, gates_TK, experts_TK, activation, index):
    sizes, (E, _, F) = LAYERS[0][0].sizes, w_out_EDF.shape  # the same for all layers
    tile = tiles_of(sizes, w_out_EDF)["up"]
    ids = experts_TK.new_empty(sizes.world * sizes.tokens, sizes.top_k)
    h = x_TD.new_empty(gemm.panels(sizes.n_rows, F, tile))
    sorted_ = empty_dispatch(ids, E, tile.BLOCK_M, sizes.n_rows)
    return x_TD.new_empty(x_TD.shape), h, ids, gates_TK.new_empty(ids.shape), *sorted_


def remote_bwd(
    dy_TD: Tensor, w_in_EGD: Tensor, w_out_EDF: Tensor, experts_TK: Tensor, h: Tensor, ids: Tensor, gates: Tensor,
    offsets: Tensor, row_slot: Tensor, slot_row: Tensor, tile_expert: Tensor, tile_row: Tensor, tile_count: Tensor,
    by_size: Tensor, index: Tensor, activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, w_in, w_out and the gates."""
    ranks, layer = LAYERS[int(index)]
    ranks.own.dy[ranks.tokens_of(ranks.rank)].copy_(dy_TD)
    ranks.barrier()
    sorted_ = Dispatch(offsets, row_slot, slot_row, tile_expert, tile_row, tile_count, by_size)
    weight_gradients = compute_gradients(ranks, layer, w_in_EGD, w_out_EDF, h, ids, gates, sorted_, activation)
    dx, dgates = dy_TD.new_empty(dy_TD.shape), gates.new_empty(experts_TK.shape)

    def input_gradients():
        ranks.barrier()
        collect(ranks, experts_TK.contiguous(), len(w_in_EGD), dx, dgates_TK=dgates)

    with beside(input_gradients, dx):  # in a graph the other ranks' rows arrive beside the gradients of the weights
        dw_in, dw_out = weight_gradients()
    return dx, dw_in, dw_out, dgates


def _fake_bwd(dy_TD, w_in_EGD, w_out_EDF, experts_TK, h, ids, gates, *_):
    new = [t.new_empty(t.shape) for t in (dy_TD, w_in_EGD, w_out_EDF)]
    return *new, gates.new_empty(experts_TK.shape)


def _setup_context(ctx, inputs, output):
    _, w_in, w_out, _, experts, ctx.activation, index = inputs
    ctx.set_materialize_grads(False)  # else backward would get zeros of the size of the pre-activation
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(w_in, w_out, experts, *output[1:], index)


# remote_experts(x, w_in, w_out, gates, experts, activation, index): each rank gives the weights of its own E experts,
# and the first result is that of `moe_experts` with all W * E. The backward pass must follow before the layer's next
# forward pass. These ops write into the memory of Ranks, where torch does not see it: a graph must keep their order.
remote_op, remote_bwd_op, remote_experts = define(
    "remote_experts", remote_fwd, remote_bwd, _fake_fwd, _fake_bwd, _setup_context,
    lambda ctx, run, dy, *_: (*run(dy, *ctx.saved_tensors, ctx.activation), None, None, None),
    n_outputs=1,
)  # fmt: skip
