"""How the loading, multiplying and storing warps of `up` and `dswiglu` for Hopper share buffers, emulated on the CPU.
Run: python -m pytest tests/test_hopper_gated_protocol.py"""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

hopper_gated = pytest.importorskip("moe_kernels.hopper_gated", reason="needs triton with Gluon")

from moe_kernels import hopper, hopper_rows  # noqa: E402  after the skip
from tests.gluon_emulator import Barrier, Buffer, Descriptor, Int, Kernel, Pointer, is_broken  # noqa: E402
from tests.test_hopper_protocol import Barriers  # noqa: E402

MODULE = SimpleNamespace(**{**vars(hopper), **vars(hopper_rows), **vars(hopper_gated)})
NAMES = ("_advance", "_previous", "_products", "_hand_over", "_row_tile", "_load", "_multiply")
NAMES += ("_store_up", "_copy_part", "_store_dh")
BLOCK_M, BLOCK_N, BLOCK_K, WIDTH, ROWS, STAGES, GROUP_M, TOP_K = 8, 8, 2, 2, 4, 3, 2, 2


def square(gate):
    """An activation that is exact in the emulator."""
    return gate * gate, 2 * gate


class Problem:
    """Rows of experts with so many rows each, D = 7 and F = 10, which no block divides."""

    def __init__(self, counts, seed):
        self.rng, self.seed, E = np.random.default_rng(seed), seed, len(counts)
        self.D, self.F, self.S = 7, 10, Int(sum(counts))
        self.offsets = np.concatenate([[0], np.cumsum(counts)])
        self.experts = np.repeat(np.arange(E), counts)
        self.slots = self.rng.permutation(self.S)
        self.x = self.draw(-(-self.S // TOP_K), self.D)
        tiles = [(e, row) for e in range(E) for row in range(self.offsets[e], self.offsets[e + 1], BLOCK_M)]
        columns = [np.array([tile[i] for tile in tiles] + [10**6]) for i in (0, 1)]  # entries past the count: garbage
        self.table = Pointer(self.offsets), Pointer(columns[0]), Pointer(columns[1]), Int(len(tiles))

    def draw(self, *shape):
        return self.rng.integers(-3, 4, shape).astype(float)

    def product(self, w_EDN):
        """x[token of each row] times the matrix of its expert."""
        return np.einsum("sd,sdn->sn", self.x[self.slots // TOP_K], w_EDN[self.experts])

    def panels(self, gate, up):
        """(S, F) twice -> (P, S, 2 WIDTH)."""
        both = [m.reshape(self.S, self.F // WIDTH, WIDTH).transpose(1, 0, 2) for m in (gate, up)]
        return np.concatenate(both, axis=2)

    def run(self, w, w_block, block_n, store, changes, programs=2):
        """Emulates every program; store(functions) gives its storing part up to the buffers."""
        n_tiles, up = -(-self.F // block_n), len(w_block) == 3
        parts = np.prod(w_block[:2]) // WIDTH if up else block_n // WIDTH
        for program in range(programs):
            shapes = (
                (STAGES, BLOCK_M, BLOCK_K),
                (STAGES, *w_block),
                (parts, BLOCK_M, WIDTH),
                (2, BLOCK_M, WIDTH),
                BLOCK_M,
            )
            x_ring, w_ring, tile_parts, h_part, gates = (Buffer(np.full(shape, np.nan)) for shape in shapes)
            full, empty = (Barriers(Barrier(count) for _ in range(STAGES)) for count in (129, 2))
            ready, free = Barriers([Barrier(1), Barrier(1)]), Barriers([Barrier(1)])
            kernel = Kernel(MODULE, NAMES, self.seed, program, programs, changes)
            load = partial(
                kernel.functions._load, Pointer(self.x.ravel()), Descriptor(w, w_block), Pointer(self.slots),
                self.table, x_ring, w_ring, full, empty, self.S, self.D, n_tiles, GROUP_M, TOP_K, up,
            )  # fmt: skip
            multiply = [
                partial(
                    kernel.functions._multiply, self.table, x_ring, w_ring, tile_parts, full, empty, ready, free,
                    self.D, n_tiles, up, False, False, half,
                )
                for half in (0, 1)
            ]  # fmt: skip
            buffers = (tile_parts, ready, free) if up else (tile_parts, h_part, gates, ready, free)
            last = self.S, self.F, n_tiles, GROUP_M, square, ROWS
            kernel.machine.run([*multiply, partial(store(kernel.functions), *buffers, *last), load])


def emulate_up(counts, seed, changes=()):
    """((h, a), what they should be)."""
    p = Problem(counts, seed)
    w = p.draw(2 * len(counts), p.F, p.D)
    h, a = np.full((p.F // WIDTH, p.S, 2 * WIDTH), np.nan), np.full((p.S, p.F), np.nan)
    store = lambda functions: partial(functions._store_up, Pointer(h.reshape(-1)), Pointer(a.reshape(-1)), p.table)
    p.run(w, [2, BLOCK_N, BLOCK_K], BLOCK_N, store, changes)
    gate, up = (p.product(w[i::2].transpose(0, 2, 1)) for i in (0, 1))
    return (h, a), (p.panels(gate, up), gate * gate * up)


def emulate_dh(counts, seed, changes=()):
    """((dh, router gate * a, parts of the router gates' gradient), what they should be)."""
    p = Problem(counts, seed)
    w, gates = p.draw(len(counts), p.D, p.F), p.draw(p.S)
    gate, up, n_tiles = p.draw(p.S, p.F), p.draw(p.S, p.F), -(-p.F // BLOCK_N)
    dh, ga, sums = (np.full(shape, np.nan) for shape in ((p.S, 2 * p.F), (p.S, p.F), (n_tiles, p.S)))
    h = p.panels(gate, up)
    pointers = [Pointer(t.reshape(-1)) for t in (h, gates, dh, ga, sums, p.slots)]
    store = lambda functions: partial(functions._store_dh, *pointers, p.table)
    p.run(w.reshape(-1, p.F), [BLOCK_K, BLOCK_N], BLOCK_N, store, changes)
    da, g = p.product(w), gates[p.slots][:, None]
    a, ends = gate * gate * up, range(0, p.F, BLOCK_N)
    expected = np.hstack([g * da * up * 2 * gate, g * da * gate * gate]), g * a
    return (dh, ga, sums), (*expected, np.stack([(da * a)[:, i : i + BLOCK_N].sum(1) for i in ends]))


@pytest.mark.parametrize("emulate", [emulate_up, emulate_dh])
@pytest.mark.parametrize("counts", [[5, 0, 1, 25, 0, 9], [3]])
@pytest.mark.parametrize("seed", range(8))
def test_buffers_are_handed_over_in_order(emulate, counts, seed):
    """Experts without rows, with one row, and with more tiles than a group has; tails; fewer rows than a tile has."""
    for got, expected in zip(*emulate(counts, seed), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("emulate", [emulate_up, emulate_dh])
def test_without_any_row_nothing_is_read(emulate):
    """The emulator refuses accesses outside of a tensor, and the table of tiles holds garbage then."""
    emulate([0, 0], 0)
    with pytest.raises(AssertionError, match="outside of its tensor"):  # the check can fail
        emulate([0, 0], 0, changes=[("mask=exists", "mask=True")])


@pytest.mark.parametrize("emulate", [emulate_up, emulate_dh])
@pytest.mark.parametrize(
    "old, new",
    [
        ("mbarrier.wait(free.index(1 - HALF if TURNS else 0), ", "max(0, "),  # a tile is overwritten too early
        ("to_tensor(1 - HALF if TURNS else 1)", "to_tensor(0)"),  # the first tile waits for a tile before it
        ("mbarrier.wait(ready.index(0), phase)", "pass"),  # a tile is stored before it is there
        ("mbarrier.wait(ready.index(1), phase)", "pass"),
        ("(free.index(0), count=1)", "(free.index(0), count=2)"),
        ("_previous(stage, STAGES)), count=1, pred=k > 0", "stage), count=1, pred=k >= 0"),  # released too early
        ("warpgroup_mma_wait(0,", "warpgroup_mma_wait(1,"),  # a tile is handed over without its last product
        ("fence_async_shared()  # cp", "pass  # cp"),
        ("mask=(offs_k < D - k)", "mask=(offs_k < D)"),  # the last step reads the next token
    ],
)
def test_broken_protocols_are_found(emulate, old, new):
    assert is_broken(lambda seed: emulate([9, 0, 20], seed, [(old, new)]))


def test_a_part_of_h_is_copied_after_it_was_read_and_read_after_it_was_copied():
    copy = "            _copy_part(ahead, h_part, offs_m, ahead_rows, ahead_inside, WIDTH, ROWS)\n"
    wait = "            async_copy.wait_group(0)\n"
    for changes in [(wait, "")], [(copy, ""), (wait, wait + copy)]:
        assert is_broken(lambda seed, changes=changes: emulate_dh([9, 0, 20], seed, changes))
