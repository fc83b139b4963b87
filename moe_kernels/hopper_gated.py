"""The GEMMs with long epilogues, `up` and `dswiglu`, for Hopper GPUs (sm_90) in Gluon: some warps load, two warpgroups
multiply, other warps compute the epilogue and store.

In the plain kernels of grouped_gemm.py nothing is multiplied during an epilogue, so at D = 1024 the tensor cores work
for 37 to 67 % of the time (docs/runs/counters-h200.csv). Here both multiplying warpgroups hand a whole tile over in
shared memory, in 16-bit numbers, and the storing warps do its epilogue while the next tile is multiplied. The ring of
buffers is that of hopper.py. Its halves in turn are slower here (docs/LOG.md, "Halves in turn in `up` and dSwiGLU").

The tile that is handed over belongs to the multiplying warps until its `ready` barrier completes, then to the storing
warps until they arrive at its `free` barrier.

Clocks around the waits showed what limited them (docs/LOG.md, "Clocks around the waits"): the multiplying warps waited
for loads, of which a ring of three large buffers has too few under way, and dSwiGLU's storing warps waited for h.

h has the plain kernel's bits. a is computed from h as it is stored, and dh and the gates' gradients from a da that was
rounded to 16 bits.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from moe_kernels import hopper
from moe_kernels.activation import ACTIVATIONS
from moe_kernels.hopper import (
    BLOCK_M,
    BLOCK_N,
    Blocks,
    _advance,
    _barriers,
    cp_async,
    tma_load,
)
from moe_kernels.hopper_rows import _multiply, _row_tile
from moe_kernels.language import launch
from moe_kernels.tiles import cdiv, multiprocessors

WIDTH = 32  # gate columns of a panel of h
ROWS = 32  # of an epilogue's step: a thread of four storing warps has 8 values of each of its operands
# (BLOCK_K, STAGES) of the ring of buffers, 144 KB; the tile that is handed over takes 64 KB. `up` with short reductions
# takes products of 256 columns, which read less shared memory. They need more registers, so that only two warps store
# and two load. Two warps load three large buffers faster than six small ones.
RING, WIDE_RING = (32, 6), (64, 3)
WIDE_BELOW = 1536  # from this D on the wide products are slower
MANY_ROWS = 256  # per expert, from which on `up` is faster than the plain kernel for any D
UP_GROUP, DSWIGLU_GROUP = 16, 8  # row tiles that advance through the columns together


def fits_up(tile, D, F, mean_rows, dtype):
    """Whether to use `up`, where the plain kernel's tile is `tile`. With wide rows and few of them per expert the plain
    kernel is faster."""
    fast = D < 2048 or mean_rows >= MANY_ROWS
    return fast and F % WIDTH == 0 and tile.BLOCK_M == BLOCK_M and hopper.fits(D, 2 * F, dtype)


def fits_dswiglu(tile, D, F, dtype):
    """Whether to use `dswiglu`. da is rounded before the router's gate scales it, and float16 could overflow there."""
    return dtype == torch.bfloat16 and F % WIDTH == 0 and tile.BLOCK_M == BLOCK_M and hopper.fits(D, F, dtype)


@gluon.jit
def _load(
    x_ptr, w_desc, row_slot_ptr, table, x_ring, w_ring, full, empty, S,
    D: gl.constexpr, N_TILES: gl.constexpr, GROUP_M: gl.constexpr, TOP_K: gl.constexpr, UP: gl.constexpr,
):  # fmt: skip
    """The loader of up and dswiglu: cp.async gathers rows of x by token, TMA loads weights."""
    STAGES: gl.constexpr = x_ring.shape[0]
    BLOCK_M: gl.constexpr = x_ring.shape[1]
    BLOCK_K: gl.constexpr = x_ring.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_K, BLOCK_K // 8], [gl.num_warps(), 1], [1, 0])
    offs_m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    offs_k = gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(1)  # the ring starts empty
    # Rows past the expert's end belong to the next expert. If all of them read one row, it would be slow.
    expert, row, _, pid_n = _row_tile(gl.program_id(0), table, N_TILES, GROUP_M)
    tokens = gl.load(row_slot_ptr + row + offs_m, mask=offs_m < S - row, other=0) // TOP_K
    for tile in range(gl.program_id(0), table[3] * N_TILES, gl.num_programs(0)):
        # The next tile's place and token ids are loaded one tile ahead.
        next_expert, row, _, next_n = _row_tile(tile + gl.num_programs(0), table, N_TILES, GROUP_M)
        next_tokens = gl.load(row_slot_ptr + row + offs_m, mask=offs_m < S - row, other=0) // TOP_K
        x_ptrs = x_ptr + tokens.to(gl.int64)[:, None] * D + offs_k[None, :]
        for k in range(0, D, BLOCK_K):
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), w_desc.block_type.nbytes)
            if UP:
                tma_load(w_desc, [2 * expert, pid_n * w_ring.shape[2], k], full.index(stage), w_ring.index(stage))
            else:
                tma_load(w_desc, [expert * D + k, pid_n * w_ring.shape[2]], full.index(stage), w_ring.index(stage))
            if D % BLOCK_K == 0:
                cp_async(x_ring.index(stage), x_ptrs + k)
            else:
                cp_async(x_ring.index(stage), x_ptrs + k, mask=(offs_k < D - k)[None, :])
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            stage, phase = _advance(stage, phase, STAGES)
        expert, pid_n, tokens = next_expert, next_n, next_tokens


@gluon.jit
def _store_up(
    h_ptr, a_ptr, table, buffer, ready, free, S,
    F: gl.constexpr, N_TILES: gl.constexpr, GROUP_M: gl.constexpr, ACTIVATION: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """The epilogue of grouped_gemm.up_kernel. buffer has the gate columns of every part, then their up columns."""
    PARTS: gl.constexpr = buffer.shape[0] // 2
    WIDTH: gl.constexpr = buffer.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [gl.num_warps(), 1], [1, 0])
    offs_m = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    offs_n = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    panel = S.to(gl.int64) * (2 * WIDTH)
    phase = gl.to_tensor(0)
    for tile in range(gl.program_id(0), table[3] * N_TILES, gl.num_programs(0)):
        _, row, n_rows, pid_n = _row_tile(tile, table, N_TILES, GROUP_M)
        h_ptrs = h_ptr + pid_n * PARTS * panel + row.to(gl.int64) * (2 * WIDTH)
        h_ptrs = h_ptrs + (offs_m[:, None] * (2 * WIDTH) + offs_n[None, :])
        a_ptrs = a_ptr + row.to(gl.int64) * F + pid_n * (PARTS * WIDTH) + (offs_m[:, None] * F + offs_n[None, :])
        mbarrier.wait(ready.index(0), phase)
        mbarrier.wait(ready.index(1), phase)
        for step in gl.static_range(buffer.shape[1] // ROWS):
            for part in gl.static_range(PARTS):
                mask = (offs_m < n_rows - step * ROWS)[:, None] & (part * WIDTH < F - pid_n * (PARTS * WIDTH))
                gate = buffer.index(part).slice(step * ROWS, ROWS).load(layout)
                up = buffer.index(PARTS + part).slice(step * ROWS, ROWS).load(layout)
                gl.store(h_ptrs + (part * panel + step * (ROWS * 2 * WIDTH)), gate, mask=mask)
                gl.store(h_ptrs + (part * panel + step * (ROWS * 2 * WIDTH) + WIDTH), up, mask=mask)
                value, _slope = ACTIVATION(gate.to(gl.float32))
                a = (value * up.to(gl.float32)).to(buffer.dtype)
                gl.store(a_ptrs + (step * ROWS * F + part * WIDTH), a, mask=mask)
        mbarrier.arrive(free.index(0), count=1)
        phase ^= 1


@gluon.jit
def _copy_part(h_ptrs, h_part, offs_m, n_rows, inside, WIDTH: gl.constexpr, ROWS: gl.constexpr):
    """Starts to copy the gate columns and the up columns of a part to h_part."""
    for step in gl.static_range(h_part.shape[1] // ROWS):
        mask = (offs_m < n_rows - step * ROWS)[:, None] & inside
        for half in gl.static_range(2):
            pointers = h_ptrs + (step * (ROWS * 2 * WIDTH) + half * WIDTH)
            cp_async(h_part.index(half).slice(step * ROWS, ROWS), pointers, mask=mask)
    async_copy.commit_group()


@gluon.jit
def _store_dh(
    h_ptr, gates_ptr, dh_ptr, ga_ptr, dgates_part_ptr, row_slot_ptr, table, buffer, h_part, gates, ready, free, S,
    F: gl.constexpr, N_TILES: gl.constexpr, GROUP_M: gl.constexpr, ACTIVATION: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """The epilogue of grouped_gemm.dswiglu_kernel. buffer is da.

    While a part is computed, the next part's h is copied to h_part. In registers it would be waited for too early:
    Triton takes 16-bit numbers apart before it carries them through a loop, and ptxas has one counter for loads and
    exponentials. The next tile's place and slots are loaded while a tile is computed."""
    PARTS: gl.constexpr = buffer.shape[0]
    BLOCK_M: gl.constexpr = buffer.shape[1]
    WIDTH: gl.constexpr = buffer.shape[2]
    STEPS: gl.constexpr = BLOCK_M // ROWS
    dtype: gl.constexpr = buffer.dtype
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [gl.num_warps(), 1], [1, 0])
    offs_m = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    offs_n = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    offs_h = offs_m[:, None] * (2 * WIDTH) + offs_n[None, :]
    rows = gl.arange(0, BLOCK_M, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    panel = S.to(gl.int64) * (2 * WIDTH)
    phase = gl.to_tensor(0)
    _, row, n_rows, pid_n = _row_tile(gl.program_id(0), table, N_TILES, GROUP_M)
    slots = gl.load(row_slot_ptr + row + rows, mask=rows < n_rows, other=0)
    h_ptrs = h_ptr + pid_n * PARTS * panel + row.to(gl.int64) * (2 * WIDTH) + offs_h
    _copy_part(h_ptrs, h_part, offs_m, n_rows, True, WIDTH, ROWS)
    for tile in range(gl.program_id(0), table[3] * N_TILES, gl.num_programs(0)):
        gates.store(gl.load(gates_ptr + slots, mask=rows < n_rows, other=0.0))
        _, next_row, next_n_rows, next_n = _row_tile(tile + gl.num_programs(0), table, N_TILES, GROUP_M)
        slots = gl.load(row_slot_ptr + next_row + rows, mask=rows < next_n_rows, other=0)
        next_ptrs = h_ptr + next_n * PARTS * panel + next_row.to(gl.int64) * (2 * WIDTH) + offs_h
        dh_ptrs = dh_ptr + row.to(gl.int64) * (2 * F) + pid_n * (PARTS * WIDTH)
        dh_ptrs = dh_ptrs + (offs_m[:, None] * (2 * F) + offs_n[None, :])
        ga_ptrs = ga_ptr + row.to(gl.int64) * F + pid_n * (PARTS * WIDTH) + (offs_m[:, None] * F + offs_n[None, :])
        sums = ()
        for _step in gl.static_range(STEPS):
            sums += (gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout)),)
        mbarrier.wait(ready.index(0), phase)
        mbarrier.wait(ready.index(1), phase)
        for part in range(PARTS):
            last = part == PARTS - 1
            h_ptrs += panel
            ahead = gl.where(last, next_ptrs, h_ptrs)
            ahead_rows = gl.where(last, next_n_rows, n_rows)
            inside = part * WIDTH < F - pid_n * (PARTS * WIDTH)
            ahead_inside = last | ((part + 1) * WIDTH < F - pid_n * (PARTS * WIDTH))
            async_copy.wait_group(0)
            h = ()
            for step in gl.static_range(STEPS):
                h += (h_part.index(0).slice(step * ROWS, ROWS).load(layout),)
                h += (h_part.index(1).slice(step * ROWS, ROWS).load(layout),)
            _copy_part(ahead, h_part, offs_m, ahead_rows, ahead_inside, WIDTH, ROWS)
            new_sums = ()
            for step in gl.static_range(STEPS):
                gate, up = h[2 * step].to(gl.float32), h[2 * step + 1].to(gl.float32)
                router_gate = gates.slice(step * ROWS, ROWS).load(gl.SliceLayout(1, layout))[:, None]
                da = buffer.index(part).slice(step * ROWS, ROWS).load(layout).to(gl.float32)
                value, slope = ACTIVATION(gate)
                a = value * up
                new_sums += (sums[step] + gl.sum(da * a, 1),)
                da *= router_gate
                mask = (offs_m < n_rows - step * ROWS)[:, None] & inside
                gl.store(ga_ptrs + step * ROWS * F, (router_gate * a).to(dtype), mask=mask)
                gl.store(dh_ptrs + step * (ROWS * 2 * F), (da * up * slope).to(dtype), mask=mask)
                gl.store(dh_ptrs + (step * (ROWS * 2 * F) + F), (da * value).to(dtype), mask=mask)
            sums = new_sums
            ga_ptrs += WIDTH
            dh_ptrs += WIDTH
        mbarrier.arrive(free.index(0), count=1)
        phase ^= 1
        sum_ptrs = dgates_part_ptr + pid_n * S.to(gl.int64) + row + offs_m
        for step in gl.static_range(STEPS):
            gl.store(sum_ptrs + step * ROWS, sums[step], mask=offs_m < n_rows - step * ROWS)
        row, n_rows, pid_n, h_ptrs = next_row, next_n_rows, next_n, next_ptrs


@gluon.jit
def _shared_memory(
    w_desc, w_shape: gl.constexpr, parts: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    LOADING_WARPS: gl.constexpr,
):  # fmt: skip
    """Rings of rows and of weights, the parts of the tile that is handed over, and the barriers."""
    dtype: gl.constexpr = w_desc.dtype
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([parts[1], BLOCK_K], dtype)
    part_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([parts[1], parts[2]], dtype)
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, parts[1], BLOCK_K], x_layout)
    w_ring = gl.allocate_shared_memory(dtype, [STAGES] + w_shape, w_desc.layout)
    buffer = gl.allocate_shared_memory(dtype, parts, part_layout)
    full = _barriers(STAGES, 32 * LOADING_WARPS + 1)  # a thread announces TMA bytes, too
    empty = _barriers(STAGES, 2)
    return x_ring, w_ring, buffer, full, empty, _barriers(2, 1), _barriers(1, 1)


@gluon.jit(do_not_specialize=["S"])
def up_hopper_kernel(
    x_ptr, w_in_desc, h_ptr, a_ptr, row_slot_ptr, offsets_ptr, tile_expert_ptr, tile_row_ptr, tile_count_ptr, S,
    D: gl.constexpr, F: gl.constexpr, TOP_K: gl.constexpr, ACTIVATION: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, WIDTH: gl.constexpr, GROUP_M: gl.constexpr, ROWS: gl.constexpr,
    STAGES: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Like grouped_gemm.up_kernel. BLOCK_N counts gate columns."""
    N_TILES: gl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    x_ring, w_ring, buffer, full, empty, ready, free = _shared_memory(
        w_in_desc, [2, BLOCK_N, BLOCK_K], [2 * BLOCK_N // WIDTH, BLOCK_M, WIDTH], BLOCK_K, STAGES, 2 if WIDE else 4
    )
    table = (offsets_ptr, tile_expert_ptr, tile_row_ptr, gl.load(tile_count_ptr))
    gl.warp_specialize(
        [
            (_multiply, (table, x_ring, w_ring, buffer, full, empty, ready, free, D, N_TILES, True, WIDE, False, 0)),
            (_multiply, (table, x_ring, w_ring, buffer, full, empty, ready, free, D, N_TILES, True, WIDE, False, 1)),
            (_store_up, (h_ptr, a_ptr, table, buffer, ready, free, S, F, N_TILES, GROUP_M, ACTIVATION, ROWS)),
            (_load, (x_ptr, w_in_desc, row_slot_ptr, table, x_ring, w_ring, full, empty, S,
                     D, N_TILES, GROUP_M, TOP_K, True)),
        ],
        [4, 2, 2] if WIDE else [4, 4, 4],
        [192, 128, 128] if WIDE else [160, 144, 48],  # the first multiplying warpgroup gets the rest: 184 or 160
    )  # fmt: skip


@gluon.jit(do_not_specialize=["S"])
def dswiglu_hopper_kernel(
    dy_ptr, w_out_desc, h_ptr, gates_ptr, dh_ptr, ga_ptr, dgates_part_ptr, row_slot_ptr, offsets_ptr, tile_expert_ptr,
    tile_row_ptr, tile_count_ptr, S,
    D: gl.constexpr, F: gl.constexpr, TOP_K: gl.constexpr, ACTIVATION: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, WIDTH: gl.constexpr, GROUP_M: gl.constexpr, ROWS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Like grouped_gemm.dswiglu_kernel."""
    N_TILES: gl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    dy_ring, w_ring, buffer, full, empty, ready, free = _shared_memory(
        w_out_desc, [BLOCK_K, BLOCK_N], [BLOCK_N // WIDTH, BLOCK_M, WIDTH], BLOCK_K, STAGES, 4
    )
    h_part = gl.allocate_shared_memory(w_out_desc.dtype, [2, BLOCK_M, WIDTH], buffer.layout)
    gates = gl.allocate_shared_memory(gl.float32, [BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    table = (offsets_ptr, tile_expert_ptr, tile_row_ptr, gl.load(tile_count_ptr))
    gl.warp_specialize(
        [
            (_multiply, (table, dy_ring, w_ring, buffer, full, empty, ready, free, D, N_TILES, False, False, False, 0)),
            (_multiply, (table, dy_ring, w_ring, buffer, full, empty, ready, free, D, N_TILES, False, False, False, 1)),
            (_store_dh, (h_ptr, gates_ptr, dh_ptr, ga_ptr, dgates_part_ptr, row_slot_ptr, table, buffer, h_part,
                         gates, ready, free, S, F, N_TILES, GROUP_M, ACTIVATION, ROWS)),
            (_load, (dy_ptr, w_out_desc, row_slot_ptr, table, dy_ring, w_ring, full, empty, S,
                     D, N_TILES, GROUP_M, TOP_K, False)),
        ],
        [4, 4, 4],
        [160, 144, 48],  # the first multiplying warpgroup gets the rest, 160
    )  # fmt: skip


def _launch(kernel, tensors, D, F, dispatch, block_n, ring, group, activation, **more):
    table = dispatch.row_slot_S, dispatch.offsets, dispatch.tile_expert, dispatch.tile_row, dispatch.tile_count
    programs = min(dispatch.tile_expert.numel() * cdiv(F, block_n), multiprocessors(dispatch.offsets.device))
    launch(
        kernel, (programs,), (*tensors, *table), (dispatch.row_slot_S.numel(),),
        D=D, F=F, TOP_K=dispatch.slot_row_TK.shape[1], ACTIVATION=ACTIVATIONS[activation].kernel, BLOCK_M=BLOCK_M,
        BLOCK_N=block_n, BLOCK_K=ring[0], WIDTH=WIDTH, GROUP_M=group, ROWS=ROWS, STAGES=ring[1], **more,
    )  # fmt: skip


def up(x_TD, w_in_EGD, dispatch, activation="swiglu"):
    """As grouped_gemm.up, where `fits_up` allows it; dispatch has tiles of BLOCK_M rows."""
    (E, _, D), S, F = w_in_EGD.shape, dispatch.row_slot_S.numel(), w_in_EGD.shape[1] // 2
    h, a = x_TD.new_empty(F // WIDTH, S, 2 * WIDTH), x_TD.new_empty(S, F)
    wide = D < WIDE_BELOW
    ring = WIDE_RING if wide else RING
    weights = Blocks(w_in_EGD.view(2 * E, F, D), [2, BLOCK_N // 2, ring[0]])
    tensors = x_TD, weights, h, a
    _launch(up_hopper_kernel, tensors, D, F, dispatch, BLOCK_N // 2, ring, UP_GROUP, activation, WIDE=wide)
    return h, a


def dswiglu(dy_TD, w_out_EDF, h_PSW, gates_TK, dispatch, activation="swiglu"):
    """As grouped_gemm.dswiglu, where `fits_dswiglu` allows it; dispatch has tiles of BLOCK_M rows.

    Raises ValueError when h does not lie in panels (F / WIDTH, S, 2 WIDTH)."""
    S, (E, D, F) = dispatch.row_slot_S.numel(), w_out_EDF.shape
    if h_PSW.shape != (F // WIDTH, S, 2 * WIDTH):
        raise ValueError(f"h is {tuple(h_PSW.shape)}, expected {F // WIDTH, S, 2 * WIDTH}")
    dh, ga = h_PSW.new_empty(S, 2 * F), h_PSW.new_empty(S, F)
    dgates_parts = h_PSW.new_empty(cdiv(F, BLOCK_N), S, dtype=torch.float32)
    weights = Blocks(w_out_EDF.view(E * D, F), [RING[0], BLOCK_N])
    tensors = dy_TD, weights, h_PSW, gates_TK, dh, ga, dgates_parts
    _launch(dswiglu_hopper_kernel, tensors, D, F, dispatch, BLOCK_N, RING, DSWIGLU_GROUP, activation)
    return dh, ga, dgates_parts
