"""What the kernels for Hopper GPUs (sm_90) share, and the gradients of the weights, in Gluon, Triton's lower-level
language.

In the plain kernels of grouped_gemm.py the tensor cores wait while a tile is stored and the first loads of the next one
arrive. Here a program computes many tiles, and its warps share the work. Some warps load. They run ahead of the
multiplying warps by up to the STAGES buffers of a ring in shared memory. Two warpgroups multiply, each one half of the
rows of every tile. Other warps store.

In dW, `down` and `dx` the two warpgroups take turns in handing their halves over to the storing warps, through one
buffer in shared memory. So the second warpgroup falls behind the first one, and one of them can multiply while the
other one hands over. Where that is slower, the buffer has room for a tile: with few rows per expert (see FEW_ROWS), and
in hopper_gated.py, whose epilogues compute.

A buffer of the ring belongs to the loader until the buffer's `full` barrier completes, then to the multipliers until
both arrive at its `empty` barrier. The buffer of the halves belongs to a warpgroup until the half's `ready` barrier
completes, then to the storing warps until they arrive at the half's `free` barrier, then to the other warpgroup. A wait
expects a parity, `phase`, which flips when the ring wraps around, or with every tile.

Shape letters as in grouped_gemm.py. Products are added in the plain kernels' order, so dW has the same bits.
"""

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moe_kernels.language import Unchecked, launch
from moe_kernels.tiles import INTERPRETED, capability, cdiv, multiprocessors

# Triton 3.9 has the shorter names.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
cp_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

BLOCK_M, BLOCK_N = 128, 256  # the largest accumulator that two warpgroups hold
WIDTH = 64  # columns of a part of a tile: TMA swizzles rows of up to 128 bytes
BLOCK_K, STAGES = 64, 4  # the ring has 192 KB, the buffer of the halves 32 KB
# With fewer rows per expert the time is that of storing dW. Shorter steps waste less, and a transposed tile is stored
# as a whole: half of one has pieces of 128 bytes only, far from each other.
FEW_ROWS, FEW_BLOCK_K, FEW_STAGES = 256, 32, 6


def fits(M, N, dtype):
    """Whether to use `dw` for gradients (E, M, N)."""
    large = M >= BLOCK_M and N >= BLOCK_N and dtype in (torch.bfloat16, torch.float16)
    return large and capability() == 90 and not INTERPRETED


class Blocks(Unchecked, TensorDescriptor):
    """A descriptor for TMA of blocks of a contiguous tensor, bfloat16 or float16, for kernels in Gluon."""

    def __init__(self, tensor, block_shape):
        super().__init__(tensor, tensor.shape, block_shape)
        self.layout = _layout(tensor.dtype, *block_shape)


@functools.cache
def _layout(dtype, *block_shape):
    return gl.NVMMASharedLayout.get_default_for(block_shape, gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


@gluon.jit
def _advance(stage, phase, STAGES: gl.constexpr):
    wrapped = stage + 1 == STAGES
    return gl.where(wrapped, 0, stage + 1), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def _previous(stage, STAGES: gl.constexpr):
    # Computed, not kept: Triton 3.6 does not carry a variable through a loop if it starts equal to another.
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def _products(
    acc, a_ring, b_ring, full, empty, stage, phase, length,
    A_TRANSPOSED: gl.constexpr, B_TRANSPOSED: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """(acc plus the half's products over `length`, the ring's next stage, its phase). Gives the buffers back. A buffer
    has (M, K) of `a`, or (K, M) if A_TRANSPOSED, and (K, N) of `b`, or (N, K) if B_TRANSPOSED."""
    STAGES: gl.constexpr = a_ring.shape[0]
    BLOCK_K: gl.constexpr = a_ring.shape[1] if A_TRANSPOSED else a_ring.shape[2]
    HALF_M: gl.constexpr = acc.shape[0]
    for k in range(0, length, BLOCK_K):
        mbarrier.wait(full.index(stage), phase)
        fence_async_shared()  # cp.async writes through the generic proxy, wgmma reads through the asynchronous one
        a, b = a_ring.index(stage), b_ring.index(stage)
        if A_TRANSPOSED:
            a = a.permute((1, 0))
        if B_TRANSPOSED:
            b = b.reshape([acc.shape[1], BLOCK_K]).permute((1, 0))
        acc = warpgroup_mma(a.slice(HALF * HALF_M, HALF_M), b, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])  # the previous product is done: release its buffers
        mbarrier.arrive(empty.index(_previous(stage, STAGES)), count=1, pred=k > 0)
        stage, phase = _advance(stage, phase, STAGES)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index(_previous(stage, STAGES)), count=1, pred=length > 0)
    return acc, stage, phase


@gluon.jit
def _split_columns(x, PARTS: gl.constexpr):
    """x (M, N) as a tuple of PARTS tensors (M, N / PARTS), in order."""
    pieces = (x,)
    for _ in gl.static_range(PARTS.bit_length() - 1):
        halves = ()
        for j in gl.static_range(len(pieces)):
            piece = pieces[j]
            halves += piece.reshape(piece.shape[0], 2, piece.shape[1] // 2).permute(0, 2, 1).split()
        pieces = halves
    return pieces


@gluon.jit
def _hand_over(
    acc, buffer, ready, free, free_phase, TRANSPOSED: gl.constexpr, TURNS: gl.constexpr, HALF: gl.constexpr
):  # fmt: skip
    """Gives a half to the storing warps, in parts of its columns, when the buffer is free. With TURNS the buffer has
    room for one half, and it is free when the other warpgroup's half is stored; else it has room for a tile."""
    PARTS: gl.constexpr = buffer.shape[0]
    HALF_M: gl.constexpr = acc.shape[0]
    ROWS: gl.constexpr = HALF_M if TURNS else 2 * HALF_M
    FIRST: gl.constexpr = 0 if TURNS else HALF * HALF_M
    WIDTH: gl.constexpr = acc.shape[1] // PARTS
    parts = _split_columns(acc, PARTS)
    mbarrier.wait(free.index(1 - HALF if TURNS else 0), free_phase)
    for i in gl.static_range(PARTS):
        if TRANSPOSED:
            part = buffer.index(i).reshape([WIDTH, ROWS]).permute((1, 0))
        else:
            part = buffer.index(i).reshape([ROWS, WIDTH])
        part.slice(FIRST, HALF_M).store(parts[i].to(buffer.dtype))
    fence_async_shared()  # TMA may read it, through the asynchronous proxy
    mbarrier.arrive(ready.index(HALF), count=1)


@gluon.jit
def _dw_tile(tile, by_size_ptr, E, M_TILES: gl.constexpr, N_TILES: gl.constexpr):
    """(expert, its first row, one past its last row, row tile, column tile). Experts with many rows come first."""
    rank_ptr = by_size_ptr + tile // (M_TILES * N_TILES)
    place = tile % (M_TILES * N_TILES)
    return gl.load(rank_ptr), gl.load(rank_ptr + E), gl.load(rank_ptr + 2 * E), place % M_TILES, place // M_TILES


@gluon.jit
def _dw_load(
    a_ptr, b_desc, row_slot_ptr, by_size_ptr, a_ring, b_ring, ids, full, empty, E,
    M: gl.constexpr, M_TILES: gl.constexpr, N_TILES: gl.constexpr, TOP_K: gl.constexpr,
):  # fmt: skip
    """cp.async gathers a, TMA loads b. Token ids are loaded for several steps at once, ahead of them, and wait in
    shared memory. Loaded one step ahead they came too late, probably: dW took up to 19 % longer."""
    STAGES: gl.constexpr = a_ring.shape[0]
    BLOCK_K: gl.constexpr = a_ring.shape[1]
    BLOCK_M: gl.constexpr = a_ring.shape[2]
    BATCH: gl.constexpr = ids.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    offs_k = gl.arange(0, BLOCK_K, gl.SliceLayout(1, layout))
    offs_m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, layout))
    offs = gl.arange(0, BATCH, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    last = E * (M_TILES * N_TILES) - 1
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(1)  # the ring starts empty
    _, start, end, pid_m, pid_n = _dw_tile(gl.program_id(0), by_size_ptr, E, M_TILES, N_TILES)
    slots = gl.load(row_slot_ptr + start + offs, mask=start + offs < end, other=0)
    for tile in range(gl.program_id(0), last + 1, gl.num_programs(0)):
        following = gl.minimum(tile + gl.num_programs(0), last)
        _, next_start, next_end, next_m, next_n = _dw_tile(following, by_size_ptr, E, M_TILES, N_TILES)
        next_slots = gl.load(row_slot_ptr + next_start + offs, mask=next_start + offs < next_end, other=0)
        columns = pid_m * BLOCK_M + offs_m
        a_ptrs = a_ptr + columns[None, :]
        for first in range(start, end, BATCH):
            ids.store(slots // TOP_K)
            ahead = first + BATCH + offs
            slots = gl.load(row_slot_ptr + ahead, mask=ahead < end, other=0)
            for step in gl.static_range(BATCH // BLOCK_K):
                row = first + step * BLOCK_K
                if row < end:
                    tokens = ids.slice(step * BLOCK_K, BLOCK_K).load(gl.SliceLayout(1, layout))
                    mask = (row + offs_k < end)[:, None]
                    if M % BLOCK_M != 0:
                        mask = mask & (columns < M)[None, :]
                    mbarrier.wait(empty.index(stage), phase)
                    mbarrier.expect(full.index(stage), b_desc.block_type.nbytes)
                    tma_load(b_desc, [row, pid_n * b_ring.shape[2]], full.index(stage), b_ring.index(stage))
                    cp_async(a_ring.index(stage), a_ptrs + tokens.to(gl.int64)[:, None] * M, mask=mask)
                    async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
                    stage, phase = _advance(stage, phase, STAGES)
        start, end, pid_m, pid_n, slots = next_start, next_end, next_m, next_n, next_slots


@gluon.jit
def _dw_multiply(
    by_size_ptr, a_ring, b_ring, buffer, full, empty, ready, free, E,
    M_TILES: gl.constexpr, N_TILES: gl.constexpr, TRANSPOSED: gl.constexpr, TURNS: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    HALF_M: gl.constexpr = a_ring.shape[2] // 2
    BLOCK_N: gl.constexpr = b_ring.shape[2]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    free_phase = gl.to_tensor(1 - HALF if TURNS else 1)  # before the first tile the second half counts as stored
    for tile in range(gl.program_id(0), E * (M_TILES * N_TILES), gl.num_programs(0)):
        _, start, end, _, _ = _dw_tile(tile, by_size_ptr, E, M_TILES, N_TILES)
        acc = gl.zeros([HALF_M, BLOCK_N], gl.float32, mma)
        acc, stage, phase = _products(acc, a_ring, b_ring, full, empty, stage, phase, end - start, True, False, HALF)
        _hand_over(acc, buffer, ready, free, free_phase, TRANSPOSED, TURNS, HALF)
        free_phase ^= 1


@gluon.jit
def _dw_store(
    dw_desc, by_size_ptr, buffer, ready, free, E,
    BLOCK_M: gl.constexpr, WIDTH: gl.constexpr, M_TILES: gl.constexpr, N_TILES: gl.constexpr, TRANSPOSED: gl.constexpr,
    TURNS: gl.constexpr,
):  # fmt: skip
    PARTS: gl.constexpr = buffer.shape[0]
    PIECES: gl.constexpr = 2 if TURNS else 1  # of a tile, which are stored one by one
    phase = gl.to_tensor(0)
    for tile in range(gl.program_id(0), E * (M_TILES * N_TILES), gl.num_programs(0)):
        expert, _, _, pid_m, pid_n = _dw_tile(tile, by_size_ptr, E, M_TILES, N_TILES)
        for piece in gl.static_range(PIECES):
            row = pid_m * BLOCK_M + piece * (BLOCK_M // PIECES)
            mbarrier.wait(ready.index(piece), phase)
            if not TURNS:
                mbarrier.wait(ready.index(1), phase)
            for part in gl.static_range(PARTS):
                column = (pid_n * PARTS + part) * WIDTH
                # The descriptor's dimension for experts cuts off what lies outside of this expert.
                if TRANSPOSED:
                    tma_store(dw_desc, [expert, column, row], buffer.index(part))
                else:
                    tma_store(dw_desc, [expert, row, column], buffer.index(part))
            tma.store_wait(0)  # the parts have been read
            mbarrier.arrive(free.index(piece), count=1)
        phase ^= 1


@gluon.jit(do_not_specialize=["E"])
def dw_hopper_kernel(
    a_ptr, b_desc, dw_desc, row_slot_ptr, by_size_ptr, E,
    M: gl.constexpr, N: gl.constexpr, TOP_K: gl.constexpr, TRANSPOSED: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Like grouped_gemm.dw_kernel."""
    M_TILES: gl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    N_TILES: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    dtype: gl.constexpr = b_desc.dtype
    a_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_K, BLOCK_M], dtype)
    a_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_M], a_layout)
    b_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_N], b_desc.layout)
    buffer = gl.allocate_shared_memory(dtype, [BLOCK_N // WIDTH] + dw_desc.block_type.shape, dw_desc.layout)
    ids = gl.allocate_shared_memory(gl.int32, [4 * BLOCK_K], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = _barriers(STAGES, 65)  # 64 threads gather rows, and one of them announces the bytes of TMA
    empty = _barriers(STAGES, 2)
    ready, free = _barriers(2, 1), _barriers(2, 1)
    gl.warp_specialize(
        [
            (_dw_multiply, (by_size_ptr, a_ring, b_ring, buffer, full, empty, ready, free, E,
                            M_TILES, N_TILES, TRANSPOSED, TURNS, 0)),
            (_dw_multiply, (by_size_ptr, a_ring, b_ring, buffer, full, empty, ready, free, E,
                            M_TILES, N_TILES, TRANSPOSED, TURNS, 1)),
            (_dw_store, (dw_desc, by_size_ptr, buffer, ready, free, E,
                         BLOCK_M, WIDTH, M_TILES, N_TILES, TRANSPOSED, TURNS)),
            (_dw_load, (a_ptr, b_desc, row_slot_ptr, by_size_ptr, a_ring, b_ring, ids, full, empty, E,
                        M, M_TILES, N_TILES, TOP_K)),
        ],
        [4, 1, 2],  # warps; the first multiplying warpgroup is the kernel's own
        [208, 48, 120],  # registers of a thread; the first multiplying warpgroup gets the rest
    )  # fmt: skip


def dw(a_TM, b_SN, transposed, dispatch):
    """The same bits as grouped_gemm.dw, where `fits` allows it: dw[e] = a[tokens of e's rows]^T b[rows of e].

    a_TM (T, M), b_SN (S, N) sorted by expert, bfloat16 or float16, contiguous; M, N multiples of 8. Returns (E, M, N)
    in their dtype, or (E, N, M) when `transposed`."""
    E, K = dispatch.offsets.numel() - 1, dispatch.slot_row_TK.shape[1]
    M, N = a_TM.shape[1], b_SN.shape[1]
    few = b_SN.shape[0] // E < FEW_ROWS
    block_k, stages = (FEW_BLOCK_K, FEW_STAGES) if few else (BLOCK_K, STAGES)
    turns = not (few and transposed)
    rows = BLOCK_M // 2 if turns else BLOCK_M
    out = a_TM.new_empty(E, *((N, M) if transposed else (M, N)))
    block = [1, WIDTH, rows] if transposed else [1, rows, WIDTH]
    tiles = E * cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N)
    tensors = a_TM, Blocks(b_SN, [block_k, BLOCK_N]), Blocks(out, block), dispatch.row_slot_S, dispatch.by_size
    launch(
        dw_hopper_kernel, (min(tiles, multiprocessors(a_TM.device)),), tensors, (E,),
        M=M, N=N, TOP_K=K, TRANSPOSED=transposed, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=block_k, WIDTH=WIDTH,
        STAGES=stages, TURNS=turns,
    )  # fmt: skip
    return out
