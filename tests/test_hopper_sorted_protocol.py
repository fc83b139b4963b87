"""How the loading, multiplying and storing warps of `down` and `dx` for Hopper share buffers, emulated on the CPU.
Run: python -m pytest tests/test_hopper_sorted_protocol.py"""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

hopper_sorted = pytest.importorskip("moe_kernels.hopper_sorted", reason="needs triton with Gluon")

from moe_kernels import hopper_rows  # noqa: E402  after the skip
from tests.gluon_emulator import Barrier, Buffer, Deadlock, Descriptor, Kernel, Pointer  # noqa: E402
from tests.test_hopper_protocol import Barriers  # noqa: E402
from tests.test_hopper_rows_protocol import BLOCK_K, BLOCK_M, BLOCK_N, GROUP_M, ROWS, STAGES, WIDTH, Problem  # noqa: E402

MODULE = SimpleNamespace(**{**vars(hopper_rows), **vars(hopper_sorted)})
NAMES = ("_advance", "_previous", "_row_tile", "_load_sorted", "_multiply", "_store_rows")


def emulate(counts, seed, transposed, changes=(), programs=2):
    """(y, what it should be)."""
    p = Problem(counts, seed)
    R, N, E = p.D, p.F, len(counts)  # 7 and 10: no block divides them
    a, w, n_tiles = p.draw(p.S, R), p.draw(E, R, N), -(-N // BLOCK_N)
    weights = (w.transpose(0, 2, 1) if transposed else w).reshape(-1, R if transposed else N)
    y, block = np.full((p.S, N), np.nan), [BLOCK_N, BLOCK_K] if transposed else [BLOCK_K, BLOCK_N]
    for program in range(programs):
        shapes = (STAGES, BLOCK_M, BLOCK_K), (STAGES, *block), (BLOCK_N // WIDTH, BLOCK_M, WIDTH)
        a_ring, w_ring, tile_parts = (Buffer(np.full(shape, np.nan)) for shape in shapes)
        full, empty = (Barriers(Barrier(count) for _ in range(STAGES)) for count in (1, 2))
        ready, free = Barrier(2), Barrier(1)
        kernel = Kernel(MODULE, NAMES, seed, program, programs, changes)
        f, handed_over = kernel.functions, (tile_parts, full, empty, ready, free)
        load = partial(
            f._load_sorted, Descriptor(a, [BLOCK_M, BLOCK_K]), Descriptor(weights, block), p.table, a_ring, w_ring,
            full, empty, N, R, n_tiles, GROUP_M, transposed,
        )  # fmt: skip
        multiply = [
            partial(f._multiply, p.table, a_ring, w_ring, *handed_over, R, n_tiles, transposed, True, half, True)
            for half in (0, 1)
        ]
        store = partial(
            f._store_rows, Pointer(y.reshape(-1)), Descriptor(y, [BLOCK_M, WIDTH]), p.table, tile_parts, ready, free,
            N, n_tiles, GROUP_M, ROWS,
        )  # fmt: skip
        kernel.machine.run([*multiply, store, load])
    return y, np.einsum("sr,srn->sn", a, w[p.experts])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("counts", [[5, 0, 1, 25, 0, 9], [3], [16, 8]])
@pytest.mark.parametrize("seed", range(8))
def test_buffers_are_handed_over_in_order(seed, counts, transposed):
    """Experts without rows, with one row, with more tiles than a group has, and with whole tiles alone."""
    np.testing.assert_array_equal(*emulate(counts, seed, transposed))


def test_without_any_row_nothing_is_read():
    emulate([0, 0], 0, False)


@pytest.mark.parametrize(
    "old, new",
    [
        ("mbarrier.wait(free, free_phase)", "pass"),  # a tile is overwritten while it is stored
        ("mbarrier.wait(ready, phase)", "pass"),  # a tile is stored before it is there
        ("tma.store_wait(0)", "pass"),  # the buffers are given back before they were read
        ("if n_rows >= BLOCK_M", "if n_rows >= 0"),  # the next expert's rows are overwritten
        ("fence_async_shared()  # the store", "pass  # the store"),
        ("free_phase = gl.to_tensor(1)", "free_phase = gl.to_tensor(0)"),  # the first tile waits for a tile before it
        ("_previous(stage, STAGES)), count=1, pred=k > 0", "stage), count=1, pred=k >= 0"),  # released too early
        ("warpgroup_mma_wait(0,", "warpgroup_mma_wait(1,"),  # a tile is handed over without its last product
        ("a_desc.block_type.nbytes + w_desc", "w_desc"),  # rows are not waited for
    ],
)
def test_broken_protocols_are_found(old, new):
    for seed in range(60):
        try:
            got, expected = emulate([5, 5, 5, 5, 16, 16], seed, False, [(old, new)])
            if not np.array_equal(got, expected):
                return
        except (Deadlock, AssertionError):
            return
    pytest.fail("not found")
