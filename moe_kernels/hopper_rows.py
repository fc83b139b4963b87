"""GEMMs of routed rows for Hopper GPUs (sm_90) in Gluon: some warps load, two warpgroups multiply, other warps store.

In the plain kernels of grouped_gemm.py nothing is multiplied while a tile is stored. Here each of two warpgroups has
half of the rows of every tile. The two take turns in handing their halves over to the storing warps, through one buffer
in shared memory. So one warpgroup multiplies while the other one hands over, and the storing warps have the time of
half a tile for its epilogue. `down` and `dx` are here; `up` and `dswiglu`, whose epilogues compute, in hopper_gated.py.

The ring of buffers that connects loading and multiplying warps is that of hopper.py. The buffer of the halves belongs
to a warpgroup until its `ready` barrier completes, then to the storing warps until they arrive at the half's `free`
barrier, then to the other warpgroup.

Shape letters as in grouped_gemm.py. Products are added in the plain kernels' order.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moe_kernels import hopper
from moe_kernels.hopper import BLOCK_M, BLOCK_N, Blocks, _advance, _previous, _split_columns, tma_load, tma_store
from moe_kernels.language import launch
from moe_kernels.tiles import cdiv, multiprocessors

WIDTH = 64  # columns of a part of a tile: TMA swizzles rows of up to 128 bytes
ROWS = 32  # of an epilogue's step: a thread of four storing warps has 8 values of each of its operands
BLOCK_K, STAGES = 64, 4  # the ring has 192 KB, the buffer of the halves 32 KB
GROUP_M = 8  # row tiles that advance through the columns together
MANY_ROWS = 256  # per expert, from which on this is faster than the plain kernel


def fits(tile, N, R, mean_rows, dtype):
    """Whether to use `rows` for results (S, N) after reductions of R, where the plain kernel's tile is `tile`."""
    return mean_rows >= MANY_ROWS and tile.BLOCK_M == BLOCK_M and hopper.fits(R, N, dtype)


@gluon.jit
def _row_tile(tile, table, N_TILES: gl.constexpr, GROUP_M: gl.constexpr):
    """(expert, first row, rows up to the expert's end, column tile); no rows past the last tile. The last entry of
    `table` is the number of row tiles."""
    offsets_ptr, tile_expert_ptr, tile_row_ptr, n_row_tiles = table
    exists = tile < n_row_tiles * N_TILES
    first_m = tile // (GROUP_M * N_TILES) * GROUP_M
    size_m = gl.maximum(gl.minimum(n_row_tiles - first_m, GROUP_M), 1)
    pid_m = first_m + tile % (GROUP_M * N_TILES) % size_m
    expert = gl.load(tile_expert_ptr + pid_m, mask=exists, other=0)
    row = gl.load(tile_row_ptr + pid_m, mask=exists, other=0)
    end = gl.load(offsets_ptr + expert + 1, mask=exists, other=0)
    return expert, row, end - row, tile % (GROUP_M * N_TILES) // size_m


@gluon.jit
def _half_tile(i, table, N_TILES: gl.constexpr, GROUP_M: gl.constexpr, HALF_M: gl.constexpr):
    """(first row, rows up to the expert's end, column tile) of the i-th half that this program stores. The rows of a
    second half may be none or negative."""
    tile = gl.program_id(0) + i // 2 * gl.num_programs(0)
    _, row, n_rows, pid_n = _row_tile(tile, table, N_TILES, GROUP_M)
    return row + i % 2 * HALF_M, n_rows - i % 2 * HALF_M, pid_n


@gluon.jit
def _count_halves(table, N_TILES: gl.constexpr):
    return 2 * ((table[3] * N_TILES - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0))


@gluon.jit
def _multiply(
    table, x_ring, w_ring, half_tile, full, empty, ready, free,
    R: gl.constexpr, N_TILES: gl.constexpr, TRANSPOSED: gl.constexpr, WIDE: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """The warpgroup of one half of every tile: products of R terms, with columns of w that lie as rows when TRANSPOSED.

    The second warpgroup waits for the first one's half to be stored, and so falls half a tile behind."""
    STAGES: gl.constexpr = x_ring.shape[0]
    BLOCK_K: gl.constexpr = x_ring.shape[2]
    PARTS: gl.constexpr = half_tile.shape[0]
    HALF_M: gl.constexpr = half_tile.shape[1]
    COLUMNS: gl.constexpr = PARTS * half_tile.shape[2]
    # ptxas refuses a product of 256 columns where there are 512 threads, which leaves 128 registers each.
    PRODUCT: gl.constexpr = COLUMNS if WIDE else COLUMNS // 2
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, PRODUCT, 16])
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    free_phase = gl.to_tensor(1 - HALF)  # before the first tile the second half counts as stored
    for _ in range(gl.program_id(0), table[3] * N_TILES, gl.num_programs(0)):
        acc = gl.zeros([HALF_M, COLUMNS], gl.float32, mma)
        for k in range(0, R, BLOCK_K):
            mbarrier.wait(full.index(stage), phase)
            fence_async_shared()  # see hopper._dw_multiply
            w = w_ring.index(stage)
            if TRANSPOSED:
                w = w.reshape([COLUMNS, BLOCK_K]).permute((1, 0))
            acc = warpgroup_mma(x_ring.index(stage).slice(HALF * HALF_M, HALF_M), w, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index(_previous(stage, STAGES)), count=1, pred=k > 0)
            stage, phase = _advance(stage, phase, STAGES)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(_previous(stage, STAGES)), count=1)
        parts = _split_columns(acc, PARTS)
        mbarrier.wait(free.index(1 - HALF), free_phase)
        for i in gl.static_range(PARTS):
            half_tile.index(i).store(parts[i].to(half_tile.dtype))
        fence_async_shared()  # TMA may read it
        mbarrier.arrive(ready.index(HALF), count=1)
        free_phase ^= 1


@gluon.jit
def _shared_memory(
    w_desc, w_block: gl.constexpr, half: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, GATHERING_WARPS: gl.constexpr,
):  # fmt: skip
    """Rings of rows and of weights, the parts of half a tile that is handed over, and the barriers."""
    dtype: gl.constexpr = w_desc.dtype
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_K], dtype)
    part_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([half[1], half[2]], dtype)
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], x_layout)
    w_ring = gl.allocate_shared_memory(dtype, [STAGES] + w_block, w_desc.layout)
    half_tile = gl.allocate_shared_memory(dtype, half, part_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=32 * GATHERING_WARPS + 1)  # a thread announces TMA bytes, too
        mbarrier.init(empty.index(i), count=2)  # both multiplying warpgroups
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    return x_ring, w_ring, half_tile, full, empty, ready, free


@gluon.jit
def _load_rows(
    a_desc, w_desc, table, a_ring, w_ring, full, empty,
    N: gl.constexpr, R: gl.constexpr, N_TILES: gl.constexpr, GROUP_M: gl.constexpr, TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """TMA loads rows, which lie sorted by expert, and weights. Both reach past the expert's own: columns past N and
    rows past the expert's end are not stored, and past R `a` is zero."""
    STAGES: gl.constexpr = a_ring.shape[0]
    BLOCK_K: gl.constexpr = a_ring.shape[2]
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(1)  # the ring starts empty
    expert, row, _, pid_n = _row_tile(gl.program_id(0), table, N_TILES, GROUP_M)
    for tile in range(gl.program_id(0), table[3] * N_TILES, gl.num_programs(0)):
        # The next tile's place is loaded one tile ahead.
        next_expert, next_row, _, next_n = _row_tile(tile + gl.num_programs(0), table, N_TILES, GROUP_M)
        for k in range(0, R, BLOCK_K):
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), a_desc.block_type.nbytes + w_desc.block_type.nbytes)
            tma_load(a_desc, [row, k], full.index(stage), a_ring.index(stage))
            if TRANSPOSED:
                tma_load(w_desc, [expert * N + pid_n * w_ring.shape[1], k], full.index(stage), w_ring.index(stage))
            else:
                tma_load(w_desc, [expert * R + k, pid_n * w_ring.shape[2]], full.index(stage), w_ring.index(stage))
            stage, phase = _advance(stage, phase, STAGES)
        expert, row, pid_n = next_expert, next_row, next_n


@gluon.jit
def _store_rows(
    y_ptr, y_desc, table, half_tile, ready, free,
    N: gl.constexpr, N_TILES: gl.constexpr, GROUP_M: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """TMA stores whole halves. Where the expert ends, the rows of a half are masked: the next expert's follow."""
    PARTS: gl.constexpr = half_tile.shape[0]
    HALF_M: gl.constexpr = half_tile.shape[1]
    WIDTH: gl.constexpr = half_tile.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    offs_m = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    offs_n = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    for i in range(_count_halves(table, N_TILES)):
        row, n_rows, pid_n = _half_tile(i, table, N_TILES, GROUP_M, HALF_M)
        column = pid_n * (PARTS * WIDTH)
        mbarrier.wait(ready.index(i % 2), i // 2 % 2)
        if n_rows >= HALF_M:
            for part in gl.static_range(PARTS):
                tma_store(y_desc, [row, column + part * WIDTH], half_tile.index(part))
            tma.store_wait(0)  # the parts have been read
        else:
            y_ptrs = y_ptr + row.to(gl.int64) * N + column + (offs_m[:, None] * N + offs_n[None, :])
            for step in gl.static_range(HALF_M // ROWS):
                for part in gl.static_range(PARTS):
                    value = half_tile.index(part).slice(step * ROWS, ROWS).load(layout)
                    mask = (offs_m < n_rows - step * ROWS)[:, None] & (offs_n < N - column - part * WIDTH)[None, :]
                    gl.store(y_ptrs + (step * ROWS * N + part * WIDTH), value, mask=mask)
        mbarrier.arrive(free.index(i % 2), count=1)


@gluon.jit
def rows_hopper_kernel(
    a_desc, w_desc, y_desc, y_ptr, offsets_ptr, tile_expert_ptr, tile_row_ptr, tile_count_ptr,
    N: gl.constexpr, R: gl.constexpr, TRANSPOSED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, WIDTH: gl.constexpr, GROUP_M: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Like grouped_gemm.rows_kernel."""
    N_TILES: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    w_block: gl.constexpr = [BLOCK_N, BLOCK_K] if TRANSPOSED else [BLOCK_K, BLOCK_N]
    a_ring, w_ring, half_tile, full, empty, ready, free = _shared_memory(
        w_desc, w_block, [BLOCK_N // WIDTH, BLOCK_M // 2, WIDTH], BLOCK_M, BLOCK_K, STAGES, 0
    )
    table = (offsets_ptr, tile_expert_ptr, tile_row_ptr, gl.load(tile_count_ptr))
    gl.warp_specialize(
        [
            (_multiply, (table, a_ring, w_ring, half_tile, full, empty, ready, free, R, N_TILES, TRANSPOSED, True, 0)),
            (_multiply, (table, a_ring, w_ring, half_tile, full, empty, ready, free, R, N_TILES, TRANSPOSED, True, 1)),
            (_store_rows, (y_ptr, y_desc, table, half_tile, ready, free, N, N_TILES, GROUP_M, ROWS)),
            (_load_rows, (a_desc, w_desc, table, a_ring, w_ring, full, empty, N, R, N_TILES, GROUP_M, TRANSPOSED)),
        ],
        [4, 2, 1],
        [208, 96, 96],  # the first multiplying warpgroup gets the rest, 208
    )  # fmt: skip


def rows(a_SR, w, transposed, dispatch, out=None):
    """The same bits as grouped_gemm.down (w (E, N, R), transposed) or grouped_gemm.dx (w (E, R, N)), where `fits`
    allows it; dispatch has tiles of BLOCK_M rows. Returns (S, N)."""
    S, R = a_SR.shape
    N = w.shape[1] if transposed else w.shape[2]
    y = a_SR.new_empty(S, N) if out is None else out
    weights = Blocks(w.view(-1, w.shape[2]), [BLOCK_N, BLOCK_K] if transposed else [BLOCK_K, BLOCK_N])
    table = dispatch.offsets, dispatch.tile_expert, dispatch.tile_row, dispatch.tile_count
    programs = min(dispatch.tile_expert.numel() * cdiv(N, BLOCK_N), multiprocessors(a_SR.device))
    launch(
        rows_hopper_kernel, (programs,),
        (Blocks(a_SR, [BLOCK_M, BLOCK_K]), weights, Blocks(y, [BLOCK_M // 2, WIDTH]), y, *table),
        N=N, R=R, TRANSPOSED=transposed, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, WIDTH=WIDTH,
        GROUP_M=GROUP_M, ROWS=ROWS, STAGES=STAGES,
    )  # fmt: skip
    return y
