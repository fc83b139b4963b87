"""How the loading, multiplying and storing warps of `up`, `down`, `dswiglu` and `dx` for Hopper share buffers, emulated
on the CPU. Run: python -m pytest tests/test_hopper_rows_protocol.py"""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

hopper_rows = pytest.importorskip("moe_kernels.hopper_rows", reason="needs triton with Gluon")

from moe_kernels import hopper_gated  # noqa: E402  after the skip
from tests.gluon_emulator import Barrier, Buffer, Deadlock, Descriptor, Int, Kernel, Pointer  # noqa: E402
from tests.test_hopper_protocol import Barriers  # noqa: E402

MODULE = SimpleNamespace(**{**vars(hopper_rows), **vars(hopper_gated)})
NAMES = ("_advance", "_previous", "_row_tile", "_half_tile", "_count_halves", "_load", "_load_rows", "_multiply")
NAMES += ("_store_up", "_copy_part", "_store_dh", "_store_rows")
BLOCK_M, BLOCK_N, BLOCK_K, WIDTH, ROWS, STAGES, GROUP_M, TOP_K = 8, 8, 2, 2, 2, 3, 2, 2


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

    def load(self, functions, w, up, n_tiles, buffers):
        """The loading part of `up` or of dSwiGLU."""
        x, slots = Pointer(self.x.ravel()), Pointer(self.slots)
        return partial(functions._load, x, w, slots, self.table, *buffers, self.S, self.D, n_tiles, GROUP_M, TOP_K, up)

    def run(self, load, store, w, transposed, columns, more=(), gathers=True, changes=(), programs=2):
        """Emulates every program of a kernel whose tile has so many `columns`.

        `w` is the weights' Descriptor. load(functions, buffers) gives the loading part, and store(functions, half_tile,
        *more, ready, free) the storing part; `more` are the shapes of further buffers of the storing part."""
        n_tiles = -(-self.F // BLOCK_N)
        for program in range(programs):
            shapes = (
                (STAGES, BLOCK_M, BLOCK_K),
                (STAGES, *w.block_type.shape),
                (columns // WIDTH, BLOCK_M // 2, WIDTH),
                *more,
            )
            x_ring, w_ring, half_tile, *own = (Buffer(np.full(shape, np.nan)) for shape in shapes)
            full, empty = (Barriers(Barrier(count) for _ in range(STAGES)) for count in (129 if gathers else 1, 2))
            ready, free = (Barriers(Barrier(1) for _ in range(2)) for _ in range(2))
            kernel = Kernel(MODULE, NAMES, self.seed, program, programs, changes)
            handed_over = half_tile, full, empty, ready, free
            multiply = [
                partial(
                    kernel.functions._multiply, self.table, x_ring, w_ring, *handed_over, self.D, n_tiles, transposed,
                    True, half,
                )
                for half in (0, 1)
            ]  # fmt: skip
            store_part = store(kernel.functions, half_tile, *own, ready, free)
            kernel.machine.run([*multiply, store_part, load(kernel.functions, (x_ring, w_ring, full, empty))])


def emulate_up(counts, seed, changes=()):
    """((h, a), what they should be)."""
    p = Problem(counts, seed)
    w, n_tiles = p.draw(2 * len(counts), p.F, p.D), -(-p.F // BLOCK_N)
    h, a = np.full((p.F // WIDTH, p.S, 2 * WIDTH), np.nan), np.full((p.S, p.F), np.nan)
    h_ptr, a_ptr, weights = Pointer(h.reshape(-1)), Pointer(a.reshape(-1)), Descriptor(w, [2, BLOCK_N, BLOCK_K])
    last = p.S, p.F, n_tiles, GROUP_M, square, ROWS
    load = lambda f, buffers: p.load(f, weights, True, n_tiles, buffers)
    store = lambda f, *buffers: partial(f._store_up, h_ptr, a_ptr, p.table, *buffers, *last)
    p.run(load, store, weights, True, 2 * BLOCK_N, changes=changes)
    gate, up = (p.product(w[i::2].transpose(0, 2, 1)) for i in (0, 1))
    return (h, a), (p.panels(gate, up), gate * gate * up)


def emulate_dh(counts, seed, changes=()):
    """((dh, router gate * a, parts of the router gates' gradient), what they should be)."""
    p = Problem(counts, seed)
    w, gates = p.draw(len(counts), p.D, p.F), p.draw(p.S)
    gate, up, n_tiles = p.draw(p.S, p.F), p.draw(p.S, p.F), -(-p.F // BLOCK_N)
    dh, ga, sums = (np.full(shape, np.nan) for shape in ((p.S, 2 * p.F), (p.S, p.F), (n_tiles, p.S)))
    pointers = [Pointer(t.reshape(-1)) for t in (p.panels(gate, up), gates, dh, ga, sums, p.slots)]
    weights, last = Descriptor(w.reshape(-1, p.F), [BLOCK_K, BLOCK_N]), (p.S, p.F, n_tiles, GROUP_M, square, ROWS)
    load = lambda f, buffers: p.load(f, weights, False, n_tiles, buffers)
    store = lambda f, *buffers: partial(f._store_dh, *pointers, p.table, *buffers, *last)
    p.run(load, store, weights, False, BLOCK_N, [(2, BLOCK_M // 2, WIDTH), BLOCK_M // 2], changes=changes)
    da, g = p.product(w), gates[p.slots][:, None]
    a, ends = gate * gate * up, range(0, p.F, BLOCK_N)
    expected = np.hstack([g * da * up * 2 * gate, g * da * gate * gate]), g * a
    return (dh, ga, sums), (*expected, np.stack([(da * a)[:, i : i + BLOCK_N].sum(1) for i in ends]))


def emulate_rows(counts, seed, changes=(), transposed=False):
    """((y,), what it should be)."""
    p = Problem(counts, seed)
    R, N, E = p.D, p.F, len(counts)
    a, w, n_tiles, y = p.draw(p.S, R), p.draw(E, R, N), -(-N // BLOCK_N), np.full((p.S, N), np.nan)
    if transposed:
        weights = Descriptor(w.transpose(0, 2, 1).reshape(-1, R), [BLOCK_N, BLOCK_K])
    else:
        weights = Descriptor(w.reshape(-1, N), [BLOCK_K, BLOCK_N])
    rows, out = Descriptor(a, [BLOCK_M, BLOCK_K]), (Pointer(y.reshape(-1)), Descriptor(y, [BLOCK_M // 2, WIDTH]))
    load = lambda f, buffers: partial(
        f._load_rows, rows, weights, p.table, *buffers, N, R, n_tiles, GROUP_M, transposed
    )
    store = lambda f, *buffers: partial(f._store_rows, *out, p.table, *buffers, N, n_tiles, GROUP_M, ROWS)
    p.run(load, store, weights, transposed, BLOCK_N, gathers=False, changes=changes)
    return (y,), (np.einsum("sr,srn->sn", a, w[p.experts]),)


emulate_transposed = partial(emulate_rows, transposed=True)
KERNELS = [emulate_up, emulate_dh, emulate_rows, emulate_transposed]


@pytest.mark.parametrize("emulate", KERNELS, ids=["up", "dh", "rows", "transposed"])
@pytest.mark.parametrize("counts", [[5, 0, 1, 25, 0, 9], [3], [16, 8]])
@pytest.mark.parametrize("seed", range(8))
def test_buffers_are_handed_over_in_order(emulate, counts, seed):
    """Experts without rows, with one row, and with more tiles than a group has; tails; fewer rows than a tile has."""
    for got, expected in zip(*emulate(counts, seed), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("emulate", [emulate_up, emulate_dh, emulate_rows])
def test_without_any_row_nothing_is_read(emulate):
    """The emulator refuses accesses outside of a tensor, and the table of tiles holds garbage then."""
    emulate([0, 0], 0)
    with pytest.raises(AssertionError, match="outside of its tensor"):  # the check can fail
        emulate([0, 0], 0, changes=[("mask=exists", "mask=True")])


COMMON = [
    ("mbarrier.wait(free.index(1 - HALF), free_phase)", "pass"),  # a half is overwritten while it is stored
    ("wait(free.index(1 - HALF)", "wait(free.index(HALF)"),  # for its own last half instead of the other's
    ("to_tensor(1 - HALF)", "to_tensor(1)"),  # the second half counts as free before the first one was stored
    ("mbarrier.wait(ready.index(i % 2), i // 2 % 2)", "pass"),  # a half is stored before it is there
    ("(free.index(i % 2), count=1)\n", "(free.index(i % 2), count=2)\n"),
    ("_previous(stage, STAGES)), count=1, pred=k > 0", "stage), count=1, pred=k >= 0"),  # released too early
    ("warpgroup_mma_wait(0,", "warpgroup_mma_wait(1,"),  # a half is handed over without its last product
    ("fence_async_shared()  # see", "pass  # see"),
]
GATHERED = [("mask=(offs_k < D - k)", "mask=(offs_k < D)")]  # the last step reads the next token
BY_TMA = [
    ("tma.store_wait(0)", "pass"),  # the buffer is given back before it was read
    ("if n_rows >= HALF_M", "if n_rows >= 0"),  # the next expert's rows are overwritten
    ("fence_async_shared()  # TMA", "pass  # TMA"),
    ("a_desc.block_type.nbytes + w_desc", "w_desc"),  # rows are not waited for
]
BREAKS = [(emulate, *change) for emulate in (emulate_up, emulate_dh) for change in COMMON + GATHERED]
BREAKS += [(emulate_rows, *change) for change in COMMON[:-1] + BY_TMA]


@pytest.mark.parametrize("emulate, old, new", BREAKS)
def test_broken_protocols_are_found(emulate, old, new):
    assert finds(emulate, (old, new))


def test_a_part_of_h_is_copied_after_it_was_read_and_read_after_it_was_copied():
    copy = "            _copy_part(ahead, h_part, offs_h, half_rows < ahead_rows, ahead_inside)\n"
    wait = "            async_copy.wait_group(0)\n"
    assert finds(emulate_dh, (wait, ""))
    assert finds(emulate_dh, (copy, ""), (wait, wait + copy))


def finds(emulate, *changes):
    """Whether changes to the kernel's source give a wrong result or an error for one of thirty seeds."""
    for seed in range(30):
        try:
            results = emulate([9, 0, 20], seed, changes=changes)
            if not all(map(np.array_equal, *results)):
                return True
        except (Deadlock, AssertionError):
            return True
    return False
