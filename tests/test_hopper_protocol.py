"""How the loading, multiplying and storing warps of dW for Hopper share their buffers, emulated on the CPU.
Run: python -m pytest tests/test_hopper_protocol.py"""

from functools import partial

import numpy as np
import pytest

hopper = pytest.importorskip("moe_kernels.hopper", reason="needs triton with Gluon")

from tests.gluon_emulator import (  # noqa: E402  after the skip
    BREAKS,
    Barrier,
    Buffer,
    Descriptor,
    Kernel,
    Pointer,
    is_broken,
)

NAMES = ("_advance", "_previous", "_products", "_hand_over", "_dw_tile", "_dw_load", "_dw_multiply", "_dw_store")
BLOCK_M, BLOCK_N, BLOCK_K, WIDTH, STAGES, TOP_K = 4, 8, 2, 4, 3, 2


class Barriers(list):
    def index(self, i):
        return self[int(i)]


def emulate(counts, M, N, transposed, seed, programs=2, changes=(), turns=True):
    """(result, expected) of dw on random data with so many rows per expert."""
    rng = np.random.default_rng(seed)
    E, S = len(counts), sum(counts)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    order = np.argsort(-np.array(counts), kind="stable")
    by_size = np.stack([order, offsets[order], offsets[order + 1]])
    slots = rng.permutation(S)
    a, b = rng.integers(-3, 4, (-(-S // TOP_K), M)).astype(float), rng.integers(-3, 4, (S, N)).astype(float)
    out = np.full((E, N, M) if transposed else (E, M, N), np.nan)
    m_tiles, n_tiles = -(-M // BLOCK_M), -(-N // BLOCK_N)
    for program in range(programs):
        a_ring = Buffer(np.full((STAGES, BLOCK_K, BLOCK_M), np.nan))
        b_ring = Buffer(np.full((STAGES, BLOCK_K, BLOCK_N), np.nan))
        rows = BLOCK_M // 2 if turns else BLOCK_M
        block = [1, WIDTH, rows] if transposed else [1, rows, WIDTH]
        buffer = Buffer(np.full((BLOCK_N // WIDTH, *block), np.nan))
        ids = Buffer(np.full(2 * BLOCK_K, 10**6))
        full, empty = (Barriers(Barrier(count) for _ in range(STAGES)) for count in (129, 2))
        ready, free = (Barriers(Barrier(1) for _ in range(2)) for _ in range(2))
        kernel = Kernel(hopper, NAMES, seed, program, programs, changes)
        tiles = Pointer(by_size.ravel())
        load = partial(
            kernel.functions._dw_load, Pointer(a.ravel()), Descriptor(b, [BLOCK_K, BLOCK_N]), Pointer(slots),
            tiles, a_ring, b_ring, ids, full, empty, E, M, m_tiles, n_tiles, TOP_K,
        )  # fmt: skip
        multiply = [
            partial(
                kernel.functions._dw_multiply, tiles, a_ring, b_ring, buffer, full, empty, ready, free, E, m_tiles,
                n_tiles, transposed, turns, half,
            )
            for half in (0, 1)
        ]  # fmt: skip
        store = partial(
            kernel.functions._dw_store, Descriptor(out, block), tiles, buffer, ready, free, E, BLOCK_M, WIDTH,
            m_tiles, n_tiles, transposed, turns,
        )  # fmt: skip
        kernel.machine.run([*multiply, store, load])
    expected = np.stack([a[slots[i:j] // TOP_K].T @ b[i:j] for i, j in zip(offsets, offsets[1:], strict=False)])
    return out, expected.transpose(0, 2, 1) if transposed else expected


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_buffers_are_handed_over_in_order(seed, turns, transposed):
    """Experts without rows, with one, and with more than the ring holds; sizes that no tile divides."""
    out, expected = emulate([5, 0, 1, 16, 0, 7], M=6, N=20, transposed=transposed, seed=seed, turns=turns)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    "old, new",
    [
        *BREAKS,
        ("mbarrier.wait(ready.index(piece), phase)", "pass"),  # a half is stored before it is there
        ("ahead < end", "ahead < start"),  # ids of later steps are not loaded
        ("phase = gl.to_tensor(1)", "phase = gl.to_tensor(0)"),  # the loader waits for buffers that nobody holds
        ("fence_async_shared()  # cp", "pass  # cp"),
    ],
)
def test_broken_protocols_are_found(old, new):
    assert is_broken(lambda seed: emulate([5, 0, 9], 8, 16, False, seed, changes=[(old, new)]))


@pytest.mark.parametrize(
    "old, new",
    [
        ("if not TURNS:\n                mbarrier.wait(ready.index(1), phase)", "if False:\n                pass"),
        ("free_phase ^= 1", "free_phase ^= 0"),
    ],
)
def test_broken_protocols_of_whole_tiles_are_found(old, new):
    assert is_broken(lambda seed: emulate([5, 0, 9], 8, 16, False, seed, changes=[(old, new)], turns=False))
