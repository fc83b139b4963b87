"""The GEMMs of sorted rows, `down` and `dx`, for Hopper GPUs (sm_90) in Gluon. See hopper.py for how warps share the
work. TMA loads the rows, which lie sorted by expert, and stores the results, which are long after short reductions.

Shape letters as in grouped_gemm.py. The results are the plain kernels' bits.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from moe_kernels import hopper
from moe_kernels.hopper import (
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    STAGES,
    WIDTH,
    Blocks,
    _advance,
    _barriers,
    _hand_over,
    _products,
    tma_load,
    tma_store,
)
from moe_kernels.language import launch
from moe_kernels.tiles import cdiv, multiprocessors

ROWS = 32  # of a step in which the storing warps write rows of an expert's last tile
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
def _multiply(
    table, x_ring, w_ring, buffer, full, empty, ready, free,
    R: gl.constexpr, N_TILES: gl.constexpr, TRANSPOSED: gl.constexpr, WIDE: gl.constexpr, TURNS: gl.constexpr,
    HALF: gl.constexpr,
):  # fmt: skip
    """Rows of x times their expert's matrix, with products of all columns of a tile at once if WIDE."""
    COLUMNS: gl.constexpr = buffer.shape[0] * buffer.shape[2]
    # ptxas refuses a product of 256 columns where there are 512 threads, which leaves 128 registers each.
    PRODUCT: gl.constexpr = COLUMNS if WIDE else COLUMNS // 2
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, PRODUCT, 16])
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    free_phase = gl.to_tensor(1 - HALF if TURNS else 1)  # as in hopper._dw_multiply
    for _ in range(gl.program_id(0), table[3] * N_TILES, gl.num_programs(0)):
        acc = gl.zeros([x_ring.shape[1] // 2, COLUMNS], gl.float32, mma)
        acc, stage, phase = _products(acc, x_ring, w_ring, full, empty, stage, phase, R, False, TRANSPOSED, HALF)
        _hand_over(acc, buffer, ready, free, free_phase, False, TURNS, HALF)
        free_phase ^= 1


@gluon.jit
def _load_rows(
    a_desc, w_desc, table, a_ring, w_ring, full, empty,
    N: gl.constexpr, R: gl.constexpr, N_TILES: gl.constexpr, GROUP_M: gl.constexpr, TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """Rows and weights reach past the expert's own: columns past N and rows past the expert's end are not stored, and
    past R `a` is zero."""
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
    y_ptr, y_desc, table, buffer, ready, free,
    N: gl.constexpr, N_TILES: gl.constexpr, GROUP_M: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """TMA stores whole halves. Where the expert ends, the rows of a half are masked: the next expert's follow."""
    PARTS: gl.constexpr = buffer.shape[0]
    HALF_M: gl.constexpr = buffer.shape[1]
    WIDTH: gl.constexpr = buffer.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    offs_m = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    offs_n = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    phase = gl.to_tensor(0)
    for tile in range(gl.program_id(0), table[3] * N_TILES, gl.num_programs(0)):
        _, row, n_rows, pid_n = _row_tile(tile, table, N_TILES, GROUP_M)
        column = pid_n * (PARTS * WIDTH)
        y_ptrs = y_ptr + row.to(gl.int64) * N + column + (offs_m[:, None] * N + offs_n[None, :])
        for half in gl.static_range(2):
            mbarrier.wait(ready.index(half), phase)
            if n_rows >= (half + 1) * HALF_M:
                for part in gl.static_range(PARTS):
                    tma_store(y_desc, [row + half * HALF_M, column + part * WIDTH], buffer.index(part))
                tma.store_wait(0)  # the parts have been read
            else:
                for step in gl.static_range(HALF_M // ROWS):
                    first = half * HALF_M + step * ROWS
                    for part in gl.static_range(PARTS):
                        value = buffer.index(part).slice(step * ROWS, ROWS).load(layout)
                        mask = (offs_m < n_rows - first)[:, None] & (offs_n < N - column - part * WIDTH)[None, :]
                        gl.store(y_ptrs + (first * N + part * WIDTH), value, mask=mask)
            mbarrier.arrive(free.index(half), count=1)
        phase ^= 1


@gluon.jit
def rows_hopper_kernel(
    a_desc, w_desc, y_desc, y_ptr, offsets_ptr, tile_expert_ptr, tile_row_ptr, tile_count_ptr,
    N: gl.constexpr, R: gl.constexpr, TRANSPOSED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, WIDTH: gl.constexpr, GROUP_M: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Like grouped_gemm.rows_kernel."""
    N_TILES: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    dtype: gl.constexpr = w_desc.dtype
    w_block: gl.constexpr = [BLOCK_N, BLOCK_K] if TRANSPOSED else [BLOCK_K, BLOCK_N]
    a_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], a_desc.layout)
    w_ring = gl.allocate_shared_memory(dtype, [STAGES] + w_block, w_desc.layout)
    buffer = gl.allocate_shared_memory(dtype, [BLOCK_N // WIDTH, BLOCK_M // 2, WIDTH], y_desc.layout)
    full, empty = _barriers(STAGES, 1), _barriers(STAGES, 2)
    ready, free = _barriers(2, 1), _barriers(2, 1)
    table = (offsets_ptr, tile_expert_ptr, tile_row_ptr, gl.load(tile_count_ptr))
    gl.warp_specialize(
        [
            (_multiply, (table, a_ring, w_ring, buffer, full, empty, ready, free,
                         R, N_TILES, TRANSPOSED, True, True, 0)),
            (_multiply, (table, a_ring, w_ring, buffer, full, empty, ready, free,
                         R, N_TILES, TRANSPOSED, True, True, 1)),
            (_store_rows, (y_ptr, y_desc, table, buffer, ready, free, N, N_TILES, GROUP_M, ROWS)),
            (_load_rows, (a_desc, w_desc, table, a_ring, w_ring, full, empty, N, R, N_TILES, GROUP_M, TRANSPOSED)),
        ],
        [4, 2, 1],  # warps, and registers of a thread, as in hopper.dw_hopper_kernel
        [208, 96, 96],
    )  # fmt: skip


def rows(a_SR, w, transposed, dispatch, out=None):
    """The same bits as grouped_gemm.down (w (E, N, R), transposed) or grouped_gemm.dx (w (E, R, N)), where `fits`
    allows it; dispatch has tiles of BLOCK_M rows.

    a_SR (S, R) sorted by expert, bfloat16 or float16, contiguous like w; N, R multiples of 8. Returns (S, N) in their
    dtype, in `out` if it is given."""
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
