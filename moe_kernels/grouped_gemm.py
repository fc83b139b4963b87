"""The six grouped GEMMs of an expert layer, fused with the gathers in their loads, and with the activation and its
gradient in their epilogues.

Letters as in reference.py. In the kernels M indexes rows of the output tile, N its columns, and the reduction goes in
steps of BLOCK_K. Accumulation is float32; float32 inputs are multiplied in full precision. Weights come through tensor
descriptors (TMA on Hopper), gathered rows through pointers (asynchronous copies).

Only `up_kernel` writes the pre-activation h and only `dswiglu_kernel` reads it, so it is stored as these two use it:
h_PSW, P panels of W = 2F / P columns. A panel holds the gate columns of one column part of either kernel, then their up
columns, W / 2 of each. A tile's part of a panel is one contiguous piece of memory.
"""

import torch

from moe_kernels.activation import ACTIVATIONS
from moe_kernels.language import Matrix, launch, tl, triton
from moe_kernels.tiles import capability, cdiv, resident_programs


@triton.jit
def _place(pid, n_row_tiles, N_TILES: tl.constexpr, GROUP_M: tl.constexpr):
    # GROUP_M row tiles advance through the columns together, so that the weights they share come from L2.
    first_m = pid // (GROUP_M * N_TILES) * GROUP_M
    size_m = tl.minimum(n_row_tiles - first_m, GROUP_M)
    return first_m + pid % (GROUP_M * N_TILES) % size_m, pid % (GROUP_M * N_TILES) // size_m


@triton.jit
def _tile(pid, n_row_tiles, tile_expert_ptr, tile_row_ptr, N_TILES: tl.constexpr, GROUP_M: tl.constexpr):
    pid_m, pid_n = _place(pid, n_row_tiles, N_TILES, GROUP_M)
    return tl.load(tile_expert_ptr + pid_m), tl.load(tile_row_ptr + pid_m), pid_m, pid_n


@triton.jit
def _split_columns(x, PARTS: tl.constexpr, part: tl.constexpr):
    """The part-th of PARTS equal column ranges. No data moves: a thread holds whole rows of a wgmma accumulator."""
    if PARTS == 1:
        return x
    else:
        left, right = x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()
        if part < PARTS // 2:
            return _split_columns(left, PARTS // 2, part)
        else:
            return _split_columns(right, PARTS // 2, part - PARTS // 2)


@triton.jit
def _descriptor(matrix, n_rows, N_COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """`matrix` itself if it is a descriptor. Without TMA it is a pointer, and the result a descriptor made of it: rows
    from n_rows on read as zero. Its loads become masked copies, which are wide because the strides are constants."""
    if isinstance(matrix, tl.tensor):
        return tl.make_tensor_descriptor(matrix, [n_rows, N_COLUMNS], [N_COLUMNS, 1], [BLOCK_ROWS, BLOCK_COLUMNS])
    else:
        return matrix


@triton.jit(do_not_specialize=["S", "max_tiles"])
def up_kernel(
    x_ptr, w_in_desc, h_ptr, a_ptr, row_slot_ptr, offsets_ptr, tile_expert_ptr, tile_row_ptr, tile_count_ptr, S,
    max_tiles, D: tl.constexpr, F: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """h = gather(x) W_in^T and a = f(gate) * up. One product has the tile's gate columns and their up columns: in W_in,
    seen as (2E, F, D), they lie in neighbouring planes, and one TMA box takes a piece of both."""
    N_TILES: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    # Keep two dependent loads before the first load of x, the tile's row and its slots: it needs no count of tiles or
    # rows. Rows past the expert's end belong to the next expert; they are computed and not stored.
    expert, row, pid_m, pid_n = _tile(tl.program_id(0), max_tiles, tile_expert_ptr, tile_row_ptr, N_TILES, GROUP_M)
    if pid_m >= tl.load(tile_count_ptr):
        return
    n_rows = tl.load(offsets_ptr + expert + 1) - row
    offs_m, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    mask_m = offs_m < n_rows
    tokens = tl.load(row_slot_ptr + row + offs_m, mask=offs_m < S - row, other=0) // TOP_K
    x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * D + offs_k[None, :]
    if isinstance(w_in_desc, tl.tensor):  # see _descriptor
        w_in_desc = tl.make_tensor_descriptor(w_in_desc, [2 * expert + 2, F, D], [F * D, D, 1], [2, BLOCK_N, BLOCK_K])
    acc = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
    for k in range(0, D, BLOCK_K):
        if D % BLOCK_K == 0:
            x = tl.load(x_ptrs + k)
        else:
            x = tl.load(x_ptrs + k, mask=(offs_k < D - k)[None, :], other=0.0)
        w = w_in_desc.load([2 * expert, pid_n * BLOCK_N, k]).reshape(2 * BLOCK_N, BLOCK_K)
        acc = tl.dot(x, w.T, acc, input_precision="ieee")  # behind a proxy fence, see language.launch
    # A 64-bit base and 32-bit offsets: 64-bit pointers for every value would fill the registers.
    dtype = a_ptr.dtype.element_ty
    panel = S.to(tl.int64) * (2 * WIDTH)
    h_ptr += pid_n * PARTS * panel + row.to(tl.int64) * (2 * WIDTH)
    a_ptr += row.to(tl.int64) * F + pid_n * BLOCK_N
    offs_n = tl.arange(0, WIDTH)
    offs_h = offs_m[:, None] * (2 * WIDTH) + offs_n[None, :]
    for part in tl.static_range(PARTS):
        mask = mask_m[:, None]
        if F % BLOCK_N != 0:
            mask = mask & (tl.full([1, 1], part * WIDTH, tl.int32) < F - pid_n * BLOCK_N)  # all of a panel or nothing
        g, u = _split_columns(acc, 2 * PARTS, part), _split_columns(acc, 2 * PARTS, PARTS + part)
        tl.store(h_ptr + part * panel + offs_h, g.to(dtype), mask=mask)
        tl.store(h_ptr + part * panel + WIDTH + offs_h, u.to(dtype), mask=mask)
        a_ptrs = a_ptr + part * WIDTH + offs_m[:, None] * F + offs_n[None, :]
        value, _slope = ACTIVATION(g)
        tl.store(a_ptrs, (value * u).to(dtype), mask=mask)


@triton.jit
def rows_kernel(
    a_desc, w_desc, y_ptr, offsets_ptr, tile_expert_ptr, tile_row_ptr, tile_count_ptr,
    N: tl.constexpr, R: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """y (S, N) = a (S, R) times each row's expert matrix: w^T with w (E, N, R) when TRANSPOSED, else w (E, R, N).

    Persistent, with flattened loops, so that the next tile's loads overlap this tile's stores: 10 % faster on an H100.
    The same would make the gathering kernels 5-20 % slower."""
    N_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    n_tiles_m = tl.load(tile_count_ptr)
    offs_m = tl.arange(0, BLOCK_M)
    for tile in tl.range(tl.program_id(0), n_tiles_m * N_TILES, tl.num_programs(0), flatten=True):
        expert, row, _, pid_n = _tile(tile, n_tiles_m, tile_expert_ptr, tile_row_ptr, N_TILES, GROUP_M)
        n_rows = tl.load(offsets_ptr + expert + 1) - row
        a_rows = _descriptor(a_desc, row + n_rows, R, BLOCK_M, BLOCK_K)
        if TRANSPOSED:
            weights = _descriptor(w_desc, (expert + 1) * N, R, BLOCK_N, BLOCK_K)
        else:
            weights = _descriptor(w_desc, (expert + 1) * R, N, BLOCK_K, BLOCK_N)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, R, BLOCK_K):
            # `w` may hold another expert's weights past N and past R. Columns past N are not stored, nor are rows past
            # the expert's end, and past R `a` is zero.
            a = a_rows.load([row, k])
            if TRANSPOSED:
                w = weights.load([expert * N + pid_n * BLOCK_N, k]).T
            else:
                w = weights.load([expert * R + k, pid_n * BLOCK_N])
            acc = tl.dot(a, w, acc, input_precision="ieee")
        tile_ptr = y_ptr + row.to(tl.int64) * N + pid_n * BLOCK_N
        for part in tl.static_range(PARTS):
            offs_n = part * WIDTH + tl.arange(0, WIDTH)
            mask = (offs_m < n_rows)[:, None]
            if N % BLOCK_N != 0:
                mask = mask & (offs_n < N - pid_n * BLOCK_N)[None, :]
            ptrs = tile_ptr + offs_m[:, None] * N + offs_n[None, :]
            tl.store(ptrs, _split_columns(acc, PARTS, part).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["S", "max_tiles"])
def dswiglu_kernel(
    dy_ptr, w_out_desc, h_ptr, gates_ptr, dh_ptr, ga_ptr, dgates_part_ptr, row_slot_ptr, offsets_ptr, tile_expert_ptr,
    tile_row_ptr, tile_count_ptr, S, max_tiles,
    D: tl.constexpr, F: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """da = gather(dy) W_out, then in the epilogue dh, ga = router gate * a, and the row sums of da * a: parts of the
    router gate's gradient."""
    N_TILES: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    expert, row, pid_m, pid_n = _tile(tl.program_id(0), max_tiles, tile_expert_ptr, tile_row_ptr, N_TILES, GROUP_M)
    if pid_m >= tl.load(tile_count_ptr):
        return
    n_rows = tl.load(offsets_ptr + expert + 1) - row
    offs_m, offs_k, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, WIDTH)
    mask_m = offs_m < n_rows
    slots = tl.load(row_slot_ptr + row + offs_m, mask=offs_m < S - row, other=0)
    dy_ptrs = dy_ptr + (slots // TOP_K).to(tl.int64)[:, None] * D + offs_k[None, :]
    weights = _descriptor(w_out_desc, (expert + 1) * D, F, BLOCK_K, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, D, BLOCK_K):
        if D % BLOCK_K == 0:
            dy = tl.load(dy_ptrs + k)
        else:
            dy = tl.load(dy_ptrs + k, mask=(offs_k < D - k)[None, :], other=0.0)
        w = weights.load([expert * D + k, pid_n * BLOCK_N])
        acc = tl.dot(dy, w, acc, input_precision="ieee")  # behind a proxy fence, see language.launch

    # Narrow column parts keep the five tiles in registers. The next part's h is loaded while this part is computed.
    dtype = ga_ptr.dtype.element_ty
    router_gate = tl.load(gates_ptr + slots, mask=mask_m, other=0.0)[:, None]
    dgate = tl.zeros([BLOCK_M], tl.float32)
    panel = S.to(tl.int64) * (2 * WIDTH)
    h_ptr += pid_n * PARTS * panel + row.to(tl.int64) * (2 * WIDTH)
    dh_ptr += row.to(tl.int64) * (2 * F) + pid_n * BLOCK_N
    ga_ptr += row.to(tl.int64) * F + pid_n * BLOCK_N
    offs_h = offs_m[:, None] * (2 * WIDTH) + offs_n[None, :]
    offs_dh = offs_m[:, None] * (2 * F) + offs_n[None, :]
    offs_a = offs_m[:, None] * F + offs_n[None, :]
    mask_next = mask_m[:, None]
    g_next = tl.load(h_ptr + offs_h, mask=mask_next, other=0.0)
    u_next = tl.load(h_ptr + WIDTH + offs_h, mask=mask_next, other=0.0)
    for part in tl.static_range(PARTS):
        g, u, mask = g_next.to(tl.float32), u_next.to(tl.float32), mask_next
        if part + 1 < PARTS:
            if F % BLOCK_N != 0:
                whole = tl.full([1, 1], (part + 1) * WIDTH, tl.int32) < F - pid_n * BLOCK_N  # as in up_kernel
                mask_next = mask_m[:, None] & whole
            g_next = tl.load(h_ptr + (part + 1) * panel + offs_h, mask=mask_next, other=0.0)
            u_next = tl.load(h_ptr + (part + 1) * panel + WIDTH + offs_h, mask=mask_next, other=0.0)
        da = _split_columns(acc, PARTS, part)
        value, slope = ACTIVATION(g)
        a = value * u
        dgate += tl.sum(da * a, 1)
        tl.store(ga_ptr + part * WIDTH + offs_a, (router_gate * a).to(dtype), mask=mask)
        da *= router_gate
        tl.store(dh_ptr + part * WIDTH + offs_dh, (da * u * slope).to(dtype), mask=mask)
        tl.store(dh_ptr + F + part * WIDTH + offs_dh, (da * value).to(dtype), mask=mask)
    tl.store(dgates_part_ptr + pid_n * S.to(tl.int64) + row + offs_m, dgate, mask=mask_m)


@triton.jit(do_not_specialize=["E"])
def dw_kernel(
    a_ptr, b_desc, dw_ptr, row_slot_ptr, by_size_ptr, E,
    M: tl.constexpr, N: tl.constexpr, TOP_K: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dw[e] (M, N) = a[rows of e]^T b[rows of e], stored as (N, M) when TRANSPOSED. `a` is gathered by token, `b` lies
    sorted by expert. An expert without rows gets zeros.

    The wide, sorted operand is on the right, where TMA spares the address arithmetic. TMA of a left operand, which the
    product reads transposed, is slower than pointers."""
    M_TILES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    N_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    # Large experts first: a long reduction that starts late would leave other multiprocessors idle.
    rank_ptr = by_size_ptr + tl.program_id(0) // (M_TILES * N_TILES)
    expert, start, end = tl.load(rank_ptr), tl.load(rank_ptr + E), tl.load(rank_ptr + 2 * E)
    pid_m, pid_n = _place(tl.program_id(0) % (M_TILES * N_TILES), M_TILES, N_TILES, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    b_rows = _descriptor(b_desc, end, N, BLOCK_K, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # Token ids are loaded one step ahead: loaded in the step that uses them, they would halve the pipeline's depth.
    tokens = tl.load(row_slot_ptr + start + offs_k, mask=start + offs_k < end, other=0) // TOP_K
    for row in range(start, end, BLOCK_K):
        rows = row + offs_k
        mask = (rows < end)[:, None]
        if M % BLOCK_M != 0:
            mask = mask & (offs_m < M)[None, :]
        a = tl.load(a_ptr + tokens.to(tl.int64)[:, None] * M + offs_m[None, :], mask=mask, other=0.0)
        b = b_rows.load([row, pid_n * BLOCK_N])  # rows past the end meet zeros of `a`
        tokens = tl.load(row_slot_ptr + rows + BLOCK_K, mask=rows + BLOCK_K < end, other=0) // TOP_K
        acc = tl.dot(a.T, b, acc, input_precision="ieee")  # behind a proxy fence, see language.launch
    dw_ptr += expert.to(tl.int64) * (M * N)
    for part in tl.static_range(PARTS):
        columns = pid_n * BLOCK_N + part * WIDTH + tl.arange(0, WIDTH)
        tile = _split_columns(acc, PARTS, part).to(dw_ptr.dtype.element_ty)
        if TRANSPOSED:
            inside = (columns < N)[:, None] & (offs_m < M)[None, :]
            tl.store(dw_ptr + columns[:, None] * M + offs_m[None, :], tile.T, mask=inside)
        else:
            inside = (offs_m < M)[:, None] & (columns < N)[None, :]
            tl.store(dw_ptr + offs_m[:, None] * N + columns[None, :], tile, mask=inside)


def _desc(tensor, block, shape=None):
    """What the kernels' `_descriptor` takes: a descriptor of the tensor, seen as `shape` (None: as the matrix of its
    rows), or without TMA the tensor itself."""
    if capability() < 90:
        return tensor
    return Matrix(tensor, shape or [tensor.numel() // tensor.shape[-1], tensor.shape[-1]], block)


def panels(S, F, tile):
    """Shape (P, S, W) of the pre-activations of S rows. W / 2 is BLOCK_N / PARTS of a tile, the same for `up` and
    `dswiglu`.

    Raises ValueError where W / 2 does not divide F: the last panel would not be whole."""
    width = tile.BLOCK_N // tile.PARTS
    if F % width:
        raise ValueError(f"F={F}: BLOCK_N / PARTS = {width} of the tile must divide it")
    return F // width, S, 2 * width


def _tile_table(dispatch):
    """The arguments that every row-tiled kernel takes."""
    return dispatch.offsets, dispatch.tile_expert, dispatch.tile_row, dispatch.tile_count


def _launch_gathering(kernel, tensors, D, F, dispatch, tile, activation):
    # The launch has as many row tiles as there can be at most; surplus programs return at once.
    n_tiles = dispatch.tile_expert.numel()
    launch(
        kernel, (n_tiles * cdiv(F, tile.BLOCK_N),), (*tensors, dispatch.row_slot_S, *_tile_table(dispatch)),
        (dispatch.row_slot_S.numel(), n_tiles), D=D, F=F, TOP_K=dispatch.slot_row_TK.shape[1],
        ACTIVATION=ACTIVATIONS[activation].kernel, **tile._asdict(),
    )  # fmt: skip


def up(x_TD, w_in_EGD, dispatch, tile, activation="swiglu"):
    """Pre-activations h (P, S, W) of the routed rows, see `panels`, and activations a = f(gate) * up (S, F). Raises
    ValueError as `panels` does."""
    (E, _, D), S, F = w_in_EGD.shape, dispatch.row_slot_S.numel(), w_in_EGD.shape[1] // 2
    h, a = x_TD.new_empty(panels(S, F, tile)), x_TD.new_empty(S, F)
    w_desc = _desc(w_in_EGD, [2, tile.BLOCK_N, tile.BLOCK_K], [2 * E, F, D])
    _launch_gathering(up_kernel, (x_TD, w_desc, h, a), D, F, dispatch, tile, activation)
    return h, a


def _rows_gemm(a_SR, w, transposed, dispatch, tile, out=None):
    """Row s of the result (S, N) is w[e] a[s] with w (E, N, R) when transposed, else a[s] w[e] with w (E, R, N); e is
    the row's expert."""
    S, R = a_SR.shape
    N = w.shape[1] if transposed else w.shape[2]
    y = a_SR.new_empty(S, N) if out is None else out
    programs = min(dispatch.tile_expert.numel() * cdiv(N, tile.BLOCK_N), resident_programs(tile, a_SR.device))
    w_desc = _desc(w, [tile.BLOCK_N, tile.BLOCK_K] if transposed else [tile.BLOCK_K, tile.BLOCK_N])
    launch(
        rows_kernel, (programs,), (_desc(a_SR, [tile.BLOCK_M, tile.BLOCK_K]), w_desc, y, *_tile_table(dispatch)),
        N=N, R=R, TRANSPOSED=transposed, **tile._asdict(),
    )  # fmt: skip
    return y


def down(a_SF, w_out_EDF, dispatch, tile, out=None):
    """Expert outputs before the router's gates (S, D)."""
    return _rows_gemm(a_SF, w_out_EDF, True, dispatch, tile, out)


def dx(dh_SG, w_in_EGD, dispatch, tile, out=None):
    """Gradient of each routed row's input (S, D)."""
    return _rows_gemm(dh_SG, w_in_EGD, False, dispatch, tile, out)


def dswiglu(dy_TD, w_out_EDF, h_PSW, gates_TK, dispatch, tile, activation="swiglu"):
    """dh (S, 2F), router gate * a (S, F), and the router gates' gradient by row, one partial sum per column tile
    (tiles, S) float32. It is named after the usual activation and takes any.

    Raises ValueError when h (P, S, W) does not lie in the panels of this tile."""
    S, (_, D, F) = dispatch.row_slot_S.numel(), w_out_EDF.shape
    expected = panels(S, F, tile)
    if h_PSW.shape != expected:
        raise ValueError(f"h is {tuple(h_PSW.shape)}, expected {expected}: BLOCK_N / PARTS must be that of up's tile")
    dh, ga = h_PSW.new_empty(S, 2 * F), h_PSW.new_empty(S, F)
    dgates_parts = h_PSW.new_empty(cdiv(F, tile.BLOCK_N), S, dtype=torch.float32)
    tensors = (dy_TD, _desc(w_out_EDF, [tile.BLOCK_K, tile.BLOCK_N]), h_PSW, gates_TK, dh, ga, dgates_parts)
    _launch_gathering(dswiglu_kernel, tensors, D, F, dispatch, tile, activation)
    return dh, ga, dgates_parts


def dw(a_TM, b_SN, transposed, dispatch, tile):
    """(E, M, N): a[tokens of e's rows]^T b[rows of e]; its transpose (E, N, M) when `transposed`."""
    E, M, N = dispatch.offsets.numel() - 1, a_TM.shape[1], b_SN.shape[1]
    dw = a_TM.new_empty(E, *((N, M) if transposed else (M, N)))
    launch(
        dw_kernel, (E * cdiv(M, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N),),
        (a_TM, _desc(b_SN, [tile.BLOCK_K, tile.BLOCK_N]), dw, dispatch.row_slot_S, dispatch.by_size), (E,),
        M=M, N=N, TOP_K=dispatch.slot_row_TK.shape[1], TRANSPOSED=transposed, **tile._asdict(),
    )  # fmt: skip
    return dw
