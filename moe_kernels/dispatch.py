"""A stable counting sort of slots by expert, the table of GEMM tiles, and the weighted sum back to tokens.

Shapes: T tokens, K experts per token, E experts, S = T*K routed rows, D model width. All index tensors are int32.
A slot is token * K + k. The sort maps slots to rows and leaves each expert's rows contiguous, in token order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels.language import launch, tl, triton
from moe_kernels.tiles import INTERPRETED, cdiv, max_tiles, pow2

CHUNK = 512  # slots per program of the sort
# Up to this many slots (with at most 128 experts), one launch does the whole sort: every program counts all slots. In a
# graph on an H200 this takes 5.9 us instead of 6.9 for 4,096 slots, and 7.9 instead of 7.2 for 8,192. Eagerly it saves
# two launches.
ONE_LAUNCH = 8192


class Dispatch(NamedTuple):
    offsets: Tensor  # (E + 1), rows of expert e are offsets[e]:offsets[e + 1]
    row_slot_S: Tensor  # slot of each row
    slot_row_TK: Tensor  # row of each slot
    tile_expert: Tensor  # expert of each tile of block_m rows; the first tile_count[0] entries are valid
    tile_row: Tensor  # first row of each tile
    tile_count: Tensor  # (1,)
    by_size: Tensor  # (3, E): experts by falling number of rows, the first row of each, one past its last row


@triton.jit
def _counts(experts, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """How often each expert occurs in a block of ids."""
    return tl.histogram(tl.minimum(experts, BLOCK_E - 1), BLOCK_E, mask=experts < E)


@triton.jit(do_not_specialize=["S"])
def count_kernel(experts_ptr, chunk_counts_ptr, S, E: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr):
    pid, offs_e = tl.program_id(0), tl.arange(0, BLOCK_E)
    slots = pid * CHUNK + tl.arange(0, CHUNK)
    experts = tl.load(experts_ptr + slots, mask=slots < S, other=E)
    counts = _counts(experts, E, BLOCK_E)
    tl.store(chunk_counts_ptr + pid * E + offs_e, counts, mask=offs_e < E)


@triton.jit(do_not_specialize=["n_chunks"])
def scan_kernel(chunk_counts_ptr, counts_ptr, n_chunks, E: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr):
    """Replaces chunk_counts by its exclusive prefix sum over chunks, and writes the total counts. Each program has
    BLOCK_E experts."""
    offs_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, n_chunks, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        ptrs = chunk_counts_ptr + offs_c[:, None] * E + offs_e[None, :]
        mask = (offs_c < n_chunks)[:, None] & (offs_e < E)[None, :]
        counts = tl.load(ptrs, mask=mask, other=0)
        tl.store(ptrs, total[None, :] + tl.cumsum(counts, 0) - counts, mask=mask)
        total += tl.sum(counts, 0)
    tl.store(counts_ptr + offs_e, total, mask=offs_e < E)


@triton.jit
def _histogram(experts_ptr, start, end, E: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr):
    """How many of the slots start..end-1 each expert has."""
    counts = tl.zeros([BLOCK_E], tl.int32)
    for first in range(start, end, BLOCK_S):
        slots = first + tl.arange(0, BLOCK_S)
        counts += _counts(tl.load(experts_ptr + slots, mask=slots < end, other=E), E, BLOCK_E)
    return counts


@triton.jit(do_not_specialize=["S", "n_rows", "n_chunks", "max_tiles", "block_m"])
def place_kernel(
    experts_ptr, chunk_prefix_ptr, counts_ptr, offsets_ptr, row_slot_ptr, slot_row_ptr, tile_expert_ptr, tile_row_ptr,
    tile_count_ptr, by_size_ptr, S, n_rows, n_chunks, max_tiles, block_m,
    E: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    # block_m is not a constexpr: the sort takes 1.4 s to compile, and generation uses several tile heights.
    pid, offs_e = tl.program_id(0), tl.arange(0, BLOCK_E)
    if BLOCK_S == 0:
        counts = tl.load(counts_ptr + offs_e, mask=offs_e < E, other=0)
        earlier = tl.load(chunk_prefix_ptr + pid * E + offs_e, mask=(offs_e < E) & (pid < n_chunks), other=0)
    else:  # this is the only launch: every program counts all slots
        chunk_start = tl.where(pid < n_chunks, pid * CHUNK, 0)
        earlier = _histogram(experts_ptr, 0, chunk_start, E, BLOCK_S, BLOCK_E)
        counts = earlier + _histogram(experts_ptr, chunk_start, S, E, BLOCK_S, BLOCK_E)
    ends = tl.cumsum(counts, 0)
    starts = tl.minimum(ends - counts, n_rows)
    counts = tl.minimum(ends, n_rows) - starts
    if pid < n_chunks:
        # Expert and position packed in one integer make the sort stable. A slot's row is its expert's first row, plus
        # the expert's rows in earlier chunks, plus its rank among the chunk's slots of that expert.
        offs = tl.arange(0, CHUNK)
        slots = pid * CHUNK + offs
        experts = tl.load(experts_ptr + slots, mask=slots < S, other=BLOCK_E)
        experts = tl.where(experts < E, experts, BLOCK_E)
        packed = tl.sort(experts * CHUNK + offs)
        expert = tl.minimum(packed // CHUNK, BLOCK_E - 1)
        slot = pid * CHUNK + packed % CHUNK
        here = _counts(experts, E, BLOCK_E)
        first = starts + earlier - (tl.cumsum(here, 0) - here)
        row = tl.gather(first, expert, 0) + offs
        mask_sorted = packed < BLOCK_E * CHUNK
        tl.store(row_slot_ptr + row, slot, mask=mask_sorted & (row < n_rows))
        tl.store(slot_row_ptr + slot, row, mask=mask_sorted)
    else:
        # The other programs list the tiles of EXPERTS experts each and find their ranks among all experts by size.
        e = (pid - n_chunks) * EXPERTS + tl.arange(0, EXPERTS)
        mask_e = e < E
        n_tiles = (counts + block_m - 1) // block_m
        first_tile = tl.gather(tl.cumsum(n_tiles, 0) - n_tiles, e, 0)[:, None]
        start, size, n = tl.gather(starts, e, 0), tl.gather(counts, e, 0), tl.gather(n_tiles, e, 0)
        for i in range(0, tl.max(n, 0), 128):
            tile = i + tl.arange(0, 128)[None, :]
            mask_tile = tile < n[:, None]
            tl.store(tile_expert_ptr + first_tile + tile, tl.broadcast_to(e[:, None], EXPERTS, 128), mask=mask_tile)
            tl.store(tile_row_ptr + first_tile + tile, start[:, None] + tile * block_m, mask=mask_tile)
        others = counts[None, :]
        before_it = (others > size[:, None]) | ((others == size[:, None]) & (offs_e[None, :] < e[:, None]))
        rank_ptr = by_size_ptr + tl.sum(before_it.to(tl.int32), 1)
        tl.store(rank_ptr, e, mask=mask_e)
        tl.store(rank_ptr + E, start, mask=mask_e)
        tl.store(rank_ptr + 2 * E, start + size, mask=mask_e)
        tl.store(offsets_ptr + e + 1, start + size, mask=mask_e)
        if pid == n_chunks:
            tl.store(offsets_ptr, 0)
            total = tl.sum(n_tiles, 0)
            tl.store(tile_count_ptr, total)
            for i in range(total, max_tiles, 128):  # zeros in unused entries: equal inputs give equal outputs
                tile = i + tl.arange(0, 128)
                tl.store(tile_expert_ptr + tile, tl.zeros([128], tl.int32), mask=tile < max_tiles)
                tl.store(tile_row_ptr + tile, tl.zeros([128], tl.int32), mask=tile < max_tiles)


def dispatch(experts_TK, n_experts, block_m, n_rows=None):
    """Sort the slots by expert and cut each expert's rows into tiles of `block_m`.

    experts_TK: (T, K) int32 contiguous, no id below 0 (not checked: that would wait for the GPU); slots with an id from
    n_experts on get no row. n_rows: how many rows fit, S if None; slots that do not fit have a row of n_rows or more.
    Returns a `Dispatch`."""
    S, E = experts_TK.numel(), n_experts
    out = empty_dispatch(experts_TK, E, block_m, n_rows)
    chunk = min(CHUNK, max(16, pow2(S))) if INTERPRETED else CHUNK  # the interpreter takes a second to sort 512
    n_chunks, n_tiles, block_e = cdiv(S, chunk), out.tile_expert.numel(), pow2(E)
    if S == 0:
        return Dispatch(*(index.zero_() for index in out))
    if n_rows is not None:
        out.row_slot_S.zero_()  # kernels also read the slots of a tile's rows past its expert's last one
    chunk_counts = counts = None
    one_launch = S * max(block_e, 128) <= ONE_LAUNCH * 128  # counting 256 experts takes twice as long as 128
    if not one_launch:
        chunk_counts, counts = out.offsets.new_empty(n_chunks, E), out.offsets.new_empty(E)
        launch(count_kernel, (n_chunks,), (experts_TK, chunk_counts), (S,), E=E, CHUNK=chunk, BLOCK_E=block_e)
        launch(scan_kernel, (cdiv(E, 16),), (chunk_counts, counts), (n_chunks,), E=E, BLOCK_C=64, BLOCK_E=16)
    per_program, block_s = min(8, block_e), min(max(chunk, pow2(S)), 2048) if one_launch else 0
    launch(
        place_kernel, (n_chunks + cdiv(E, per_program),),
        (experts_TK, chunk_counts, counts, *out), (S, out.row_slot_S.numel(), n_chunks, n_tiles, block_m),
        E=E, CHUNK=chunk, BLOCK_E=block_e, EXPERTS=per_program, BLOCK_S=block_s, num_warps=max(4, block_s // 256),
    )  # fmt: skip
    return out


def empty_dispatch(experts_TK, n_experts, block_m, n_rows=None):
    """A `Dispatch` of uninitialised tensors, for `dispatch` to fill."""
    S, E = experts_TK.numel() if n_rows is None else n_rows, n_experts
    n_tiles = max_tiles(S, E, block_m)
    shapes = (E + 1,), (S,), experts_TK.shape, (n_tiles,), (n_tiles,), (1,), (3, E)
    return Dispatch(*(experts_TK.new_empty(shape, dtype=torch.int32) for shape in shapes))


@triton.jit(do_not_specialize=["S"])
def combine_kernel(
    y_ptr, slot_row_ptr, gates_ptr, add_ptr, out_ptr, dgates_part_ptr, dgates_ptr, S,
    D: tl.constexpr, K: tl.constexpr, N_PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    acc = tl.zeros([BLOCK_D], tl.float32)
    for k in tl.static_range(K):
        row = tl.load(slot_row_ptr + t * K + k).to(tl.int64)
        y = tl.load(y_ptr + row * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        if gates_ptr is not None:
            y *= tl.load(gates_ptr + t * K + k)
        acc += y
    if add_ptr is not None:
        acc += tl.load(add_ptr + t * D + offs_d, mask=mask_d, other=0.0)
    tl.store(out_ptr + t * D + offs_d, acc.to(out_ptr.dtype.element_ty), mask=mask_d)
    if N_PARTS > 0:
        # Adding dswiglu_kernel's partial sums of the gates' gradient here spares a launch and atomics.
        if tl.program_id(1) == 0:
            for k in tl.static_range(K):
                row = tl.load(slot_row_ptr + t * K + k).to(tl.int64)
                part_ptr = dgates_part_ptr + row
                dgate = tl.load(part_ptr)
                for _ in tl.static_range(1, N_PARTS):
                    part_ptr += S
                    dgate += tl.load(part_ptr)
                tl.store(dgates_ptr + t * K + k, dgate)


def combine(y_SD, slot_row_TK, gates_TK=None, dgates_parts=None, out=None, add=None):
    """(sum_k gates[t,k] * y[row of (t,k)] (T, D), accumulated in float32; the gradient of the gates (T, K) float32).

    gates_TK: None means gates of one. dgates_parts: partial sums (N, S) of that gradient by row; None: it is None too.
    out: contiguous tensors for both results. add: (T, D), added to the first."""
    (T, K), (S, D) = slot_row_TK.shape, y_SD.shape
    n_parts = 0 if dgates_parts is None else dgates_parts.shape[0]
    out, dgates = out or (y_SD.new_empty(T, D), y_SD.new_empty(T, K, dtype=torch.float32) if n_parts else None)
    if T > 0:
        block_d = min(pow2(D), 2048)
        launch(
            combine_kernel, (T, cdiv(D, block_d)), (y_SD, slot_row_TK, gates_TK, add, out, dgates_parts, dgates), (S,),
            D=D, K=K, N_PARTS=n_parts, BLOCK_D=block_d, num_warps=min(8, max(1, block_d // 256)),
        )  # fmt: skip
    return out, dgates
