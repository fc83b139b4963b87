"""How the loading, multiplying and storing warps of `down` and `dx` for Hopper share buffers, emulated on the CPU.
Run: python -m pytest tests/test_hopper_rows_protocol.py"""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

hopper_rows = pytest.importorskip("moe_kernels.hopper_rows", reason="needs triton with Gluon")

from moe_kernels import hopper  # noqa: E402  after the skip
from tests.gluon_emulator import BREAKS, Barrier, Buffer, Descriptor, Kernel, Pointer, is_broken  # noqa: E402
from tests.test_hopper_gated_protocol import BLOCK_K, BLOCK_M, BLOCK_N, GROUP_M, STAGES, WIDTH, Problem  # noqa: E402
from tests.test_hopper_protocol import Barriers  # noqa: E402

MODULE = SimpleNamespace(**{**vars(hopper), **vars(hopper_rows)})
NAMES = ("_advance", "_previous", "_products", "_hand_over", "_row_tile", "_load_rows", "_multiply", "_store_rows")
ROWS = 2


def emulate(counts, seed, transposed, changes=(), programs=2, R=7, N=10):
    """(y, what it should be)."""
    p, E = Problem(counts, seed), len(counts)
    a, w, n_tiles, y = p.draw(p.S, R), p.draw(E, R, N), -(-N // BLOCK_N), np.full((p.S, N), np.nan)
    block = [BLOCK_N, BLOCK_K] if transposed else [BLOCK_K, BLOCK_N]
    weights = Descriptor((w.transpose(0, 2, 1) if transposed else w).reshape(-1, R if transposed else N), block)
    for program in range(programs):
        shapes = (STAGES, BLOCK_M, BLOCK_K), (STAGES, *block), (BLOCK_N // WIDTH, BLOCK_M // 2, WIDTH)
        a_ring, w_ring, buffer = (Buffer(np.full(shape, np.nan)) for shape in shapes)
        full, empty, ready, free = (
            Barriers(Barrier(arrivals) for _ in range(count))
            for count, arrivals in ((STAGES, 1), (STAGES, 2), (2, 1), (2, 1))
        )
        kernel = Kernel(MODULE, NAMES, seed, program, programs, changes)
        load = partial(
            kernel.functions._load_rows, Descriptor(a, [BLOCK_M, BLOCK_K]), weights, p.table, a_ring, w_ring, full,
            empty, N, R, n_tiles, GROUP_M, transposed,
        )  # fmt: skip
        multiply = [
            partial(
                kernel.functions._multiply, p.table, a_ring, w_ring, buffer, full, empty, ready, free, R,
                n_tiles, transposed, True, True, half,
            )
            for half in (0, 1)
        ]  # fmt: skip
        store = partial(
            kernel.functions._store_rows, Pointer(y.reshape(-1)), Descriptor(y, [BLOCK_M // 2, WIDTH]), p.table,
            buffer, ready, free, N, n_tiles, GROUP_M, ROWS,
        )  # fmt: skip
        kernel.machine.run([*multiply, store, load])
    return y, np.einsum("sr,srn->sn", a, w[p.experts])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("counts", [[5, 0, 1, 25, 0, 9], [3], [16, 8]])
@pytest.mark.parametrize("seed", range(8))
def test_buffers_are_handed_over_in_order(seed, counts, transposed):
    """Experts without rows, with one row, with more tiles than a group has, and with whole tiles alone."""
    np.testing.assert_array_equal(*emulate(counts, seed, transposed))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("R", [1, 2, 3])
def test_reductions_shorter_than_the_ring_and_programs_without_tiles(seed, R):
    np.testing.assert_array_equal(*emulate([5, 0, 9], seed, False, programs=1, R=R, N=11))  # WIDTH does not divide N
    np.testing.assert_array_equal(*emulate([3], seed, True, programs=5, R=R))


def test_without_any_row_nothing_is_read():
    emulate([0, 0], 0, False)
    with pytest.raises(AssertionError, match="outside of its tensor"):  # the check can fail
        emulate([0, 0], 0, False, changes=[("mask=exists", "mask=True")])


@pytest.mark.parametrize(
    "old, new",
    [
        *BREAKS,
        ("mbarrier.wait(ready.index(half), phase)", "pass"),  # a half is stored before it is there
        ("if n_rows >= (half + 1) * HALF_M", "if n_rows >= 0"),  # the next expert's rows are overwritten
        ("a_desc.block_type.nbytes + w_desc", "w_desc"),  # rows are not waited for
    ],
)
def test_broken_protocols_are_found(old, new):
    assert is_broken(lambda seed: emulate([9, 0, 20], seed, False, [(old, new)]))
