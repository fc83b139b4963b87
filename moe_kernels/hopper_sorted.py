"""The GEMMs of sorted rows, `down` and `dx`, for Hopper GPUs (sm_90) in Gluon: two warps load, two warpgroups multiply,
two warps store.

Their reductions are short and their results long: with F = 256 `down` reads 512 bytes of every row and writes 2 D. In
the plain kernel nothing is multiplied while a tile is stored. Here the multiplying warps of hopper_rows.py hand the
tile over in shared memory, and TMA stores it while they go on. Rows lie sorted by expert, so TMA loads them, too.

Shape letters as in grouped_gemm.py. Products are added in the plain kernel's order, so the results are the same bits.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from moe_kernels import hopper
from moe_kernels.hopper import BLOCK_M, BLOCK_N, Blocks, _advance, tma_load, tma_store
from moe_kernels.hopper_rows import RING, ROWS, _multiply, _row_tile, _shared_memory
from moe_kernels.language import launch
from moe_kernels.tiles import cdiv, multiprocessors

WIDTH = 64  # columns of a part of a tile: TMA swizzles rows of up to 128 bytes
GROUP_M = 8  # row tiles that advance through the columns together


def fits(tile, N, R, dtype):
    """Whether to use `rows`, where the plain kernel's tile is `tile`."""
    return tile.BLOCK_M == BLOCK_M and hopper.fits(R, N, dtype)


@gluon.jit
def _load_sorted(
    a_desc, w_desc, table, a_ring, w_ring, full, empty,
    N: gl.constexpr, R: gl.constexpr, N_TILES: gl.constexpr, GROUP_M: gl.constexpr, TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """TMA loads rows and weights. Both reach past the expert's own: columns past N and rows past the expert's end are
    not stored, and past R `a` is zero."""
    STAGES: gl.constexpr = a_ring.shape[0]
    BLOCK_K: gl.constexpr = a_ring.shape[2]
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(1)  # the ring starts empty
    for tile in range(gl.program_id(0), table[3] * N_TILES, gl.num_programs(0)):
        expert, row, _, pid_n = _row_tile(tile, table, N_TILES, GROUP_M)
        for k in range(0, R, BLOCK_K):
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), a_desc.block_type.nbytes + w_desc.block_type.nbytes)
            tma_load(a_desc, [row, k], full.index(stage), a_ring.index(stage))
            if TRANSPOSED:
                tma_load(w_desc, [expert * N + pid_n * w_ring.shape[1], k], full.index(stage), w_ring.index(stage))
            else:
                tma_load(w_desc, [expert * R + k, pid_n * w_ring.shape[2]], full.index(stage), w_ring.index(stage))
            stage, phase = _advance(stage, phase, STAGES)


@gluon.jit
def _store_rows(
    y_ptr, y_desc, table, tile_parts, ready, free,
    N: gl.constexpr, N_TILES: gl.constexpr, GROUP_M: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """TMA stores whole tiles. An expert's last tile ends where the next expert's rows begin, so its rows are masked."""
    PARTS: gl.constexpr = tile_parts.shape[0]
    BLOCK_M: gl.constexpr = tile_parts.shape[1]
    WIDTH: gl.constexpr = tile_parts.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    offs_m = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    offs_n = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    phase = gl.to_tensor(0)
    for tile in range(gl.program_id(0), table[3] * N_TILES, gl.num_programs(0)):
        _, row, n_rows, pid_n = _row_tile(tile, table, N_TILES, GROUP_M)
        column = pid_n * (PARTS * WIDTH)
        mbarrier.wait(ready, phase)
        if n_rows >= BLOCK_M:
            for part in gl.static_range(PARTS):
                tma_store(y_desc, [row, column + part * WIDTH], tile_parts.index(part))
            tma.store_wait(0)  # the parts have been read
        else:
            y_ptrs = y_ptr + row.to(gl.int64) * N + column + (offs_m[:, None] * N + offs_n[None, :])
            for step in gl.static_range(BLOCK_M // ROWS):
                for part in gl.static_range(PARTS):
                    value = tile_parts.index(part).slice(step * ROWS, ROWS).load(layout)
                    mask = (offs_m < n_rows - step * ROWS)[:, None] & (offs_n < N - column - part * WIDTH)[None, :]
                    gl.store(y_ptrs + (step * ROWS * N + part * WIDTH), value, mask=mask)
        mbarrier.arrive(free, count=1)
        phase ^= 1


@gluon.jit
def rows_hopper_kernel(
    a_desc, w_desc, y_desc, y_ptr, offsets_ptr, tile_expert_ptr, tile_row_ptr, tile_count_ptr,
    N: gl.constexpr, R: gl.constexpr, TRANSPOSED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, WIDTH: gl.constexpr, GROUP_M: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Like grouped_gemm.rows_kernel."""
    N_TILES: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    w_block: gl.constexpr = [BLOCK_N, BLOCK_K] if TRANSPOSED else [BLOCK_K, BLOCK_N]
    a_ring, w_ring, tile_parts, full, empty, ready, free = _shared_memory(
        w_desc, w_block, [BLOCK_N // WIDTH, BLOCK_M, WIDTH], BLOCK_K, STAGES, 0
    )
    table = (offsets_ptr, tile_expert_ptr, tile_row_ptr, gl.load(tile_count_ptr))
    gl.warp_specialize(
        [
            (_multiply, (table, a_ring, w_ring, tile_parts, full, empty, ready, free,
                         R, N_TILES, TRANSPOSED, True, 0, True)),
            (_multiply, (table, a_ring, w_ring, tile_parts, full, empty, ready, free,
                         R, N_TILES, TRANSPOSED, True, 1, True)),
            (_store_rows, (y_ptr, y_desc, table, tile_parts, ready, free, N, N_TILES, GROUP_M, ROWS)),
            (_load_sorted, (a_desc, w_desc, table, a_ring, w_ring, full, empty, N, R, N_TILES, GROUP_M, TRANSPOSED)),
        ],
        [4, 2, 2],
        [208, 96, 96],  # the first multiplying warpgroup gets the rest, 208
    )  # fmt: skip


def rows(a_SR, w, transposed, dispatch):
    """The same bits as grouped_gemm.down (w (E, N, R), transposed) or grouped_gemm.dx (w (E, R, N)), where `fits`
    allows it; dispatch has tiles of BLOCK_M rows. Returns (S, N)."""
    S, R = a_SR.shape
    N = w.shape[1] if transposed else w.shape[2]
    block_k, stages = RING
    y = a_SR.new_empty(S, N)
    weights = Blocks(w.view(-1, w.shape[2]), [BLOCK_N, block_k] if transposed else [block_k, BLOCK_N])
    table = dispatch.offsets, dispatch.tile_expert, dispatch.tile_row, dispatch.tile_count
    programs = min(dispatch.tile_expert.numel() * cdiv(N, BLOCK_N), multiprocessors(a_SR.device))
    launch(
        rows_hopper_kernel, (programs,),
        (Blocks(a_SR, [BLOCK_M, block_k]), weights, Blocks(y, [BLOCK_M, WIDTH]), y, *table),
        N=N, R=R, TRANSPOSED=transposed, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=block_k, WIDTH=WIDTH,
        GROUP_M=GROUP_M, ROWS=ROWS, STAGES=stages,
    )  # fmt: skip
    return y
