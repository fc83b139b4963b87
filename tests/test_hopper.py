"""The Hopper kernels against the plain ones (on an H100 or H200), and where they are chosen."""

from types import SimpleNamespace

import pytest
import torch

from moe_kernels import grouped_gemm as gemm
from moe_kernels import reference
from moe_kernels.activation import ACTIVATIONS
from moe_kernels.dispatch import dispatch
from moe_kernels.tiles import Tile, gemm_tiles
from tests.checks import BOUNDS, check, rms_ratio, to_rows

hopper = pytest.importorskip("moe_kernels.hopper", reason="needs triton with Gluon")
hopper_gated = pytest.importorskip("moe_kernels.hopper_gated", reason="needs triton with Gluon")
hopper_rows = pytest.importorskip("moe_kernels.hopper_rows", reason="needs triton with Gluon")
ON_HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
TILE = Tile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=4, PARTS=2, num_warps=8, num_stages=3)


def choose(T, E, K, routing):
    """Expert ids (T, K) int32 whose loads are even, half of the experts empty, or all on the first K experts."""
    scores = torch.randn(T, E, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    if routing == "half":
        scores[:, ::2] -= 100
    if routing == "one":
        scores[:, :K] += 100
    return scores.topk(K).indices.int()


@ON_HOPPER
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "T, M, N, E, K, routing",
    [
        (2000, 256, 256, 4, 2, "even"),
        (3000, 272, 288, 5, 2, "half"),  # no tile divides M, N or the rows
        (3000, 400, 336, 8, 3, "even"),
        (4000, 512, 512, 16, 2, "one"),
        (700, 1008, 496, 4, 1, "half"),
        (500, 400, 336, 8, 2, "even"),  # few rows per expert: shorter steps
        (90, 256, 272, 16, 2, "half"),
        (20000, 400, 528, 32, 2, "half"),  # three tiles for each program
        (1500, 400, 528, 64, 2, "half"),
    ],
)
def test_same_bits_as_the_plain_kernel(T, M, N, E, K, routing, dtype, transposed, poison):
    sorted_ = dispatch(choose(T, E, K, routing), E, 128)
    a_TM = torch.randn(T, M, device="cuda", dtype=dtype)
    b_SN = torch.randn(T * K, N, device="cuda", dtype=dtype)
    assert hopper.fits(M, N, dtype)
    expected = gemm.dw(a_TM, b_SN, transposed, sorted_, TILE)
    for _ in range(3):  # a race would not show every time
        assert torch.equal(hopper.dw(a_TM, b_SN, transposed, sorted_), expected)
    assert not torch.equal(hopper.dw(a_TM, b_SN.flip(0), transposed, sorted_), expected)  # the check can fail


@ON_HOPPER
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "T, D, F, E, K, routing",
    [
        (2000, 256, 256, 4, 2, "even"),
        (3000, 528, 288, 5, 2, "half"),  # no tile divides D, F or the rows
        (4000, 1024, 512, 16, 2, "one"),
        (900, 1552, 288, 4, 2, "half"),  # from D = 1536 on `up` has another ring
        (300, 64, 96, 4, 1, "half"),  # fewer tiles than multiprocessors
        (30000, 256, 288, 4, 2, "even"),  # seven or more tiles for each program
    ],
)
def test_rows_agree_with_float64_and_repeat(T, D, F, E, K, routing, dtype, activation, poison):
    experts = choose(T, E, K, routing)
    tiles, sorted_ = gemm_tiles(128 * E, E, D, F, dtype), dispatch(experts, E, 128)
    x, dy, gates = (torch.randn(T, n, device="cuda") for n in (D, D, K))
    x, dy, w_in, w_out = (
        t.to(dtype)
        for t in (x, dy, torch.randn(E, 2 * F, D, device="cuda") / D**0.5, torch.randn(E, D, F, device="cuda") / F**0.5)
    )
    h, a = hopper_gated.up(x, w_in, sorted_, activation)
    assert torch.equal(h, gemm.up(x, w_in, sorted_, tiles["up"], activation)[0])
    results = hopper_gated.dswiglu(dy, w_out, h, gates, sorted_, activation)
    offsets, row_slot, _ = reference.dispatch(experts, E)
    true_a = reference.up(x.double(), w_in.double(), row_slot, offsets, K, activation)[1]
    wide = dy.double(), w_out.double(), to_rows(h).double(), gates.double()
    true_dh, true_ga, true_dgates = reference.dswiglu(*wide, row_slot, offsets, activation)
    check(a, true_a, BOUNDS[dtype], "a")
    check(results[0], true_dh, BOUNDS[dtype], "dh")
    check(results[1], true_ga, BOUNDS[dtype], "ga")
    check(results[2].double().sum(0), true_dgates, BOUNDS[dtype], "dgates")
    assert rms_ratio(results[0].flip(0), true_dh) > 0.02  # the check can fail
    for _ in range(2):  # a race would not show every time
        assert torch.equal(hopper_gated.up(x, w_in, sorted_, activation)[1], a)
        again = hopper_gated.dswiglu(dy, w_out, h, gates, sorted_, activation)
        assert all(map(torch.equal, again, results))


@ON_HOPPER
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "T, N, R, E, K, routing",
    [
        (2000, 256, 256, 4, 2, "even"),
        (3000, 528, 272, 5, 2, "half"),  # no tile divides N, R or the rows
        (4000, 1024, 512, 16, 2, "one"),
        (300, 304, 144, 4, 1, "half"),  # fewer tiles than multiprocessors
        (8192, 256, 128, 2, 1, "one"),  # whole tiles alone
        (40000, 528, 128, 4, 2, "even"),  # 15 tiles of two steps for each program
    ],
)
def test_sorted_rows_have_the_same_bits_as_the_plain_kernel(T, N, R, E, K, routing, dtype, transposed, poison):
    sorted_ = dispatch(choose(T, E, K, routing), E, 128)
    a_SR = torch.randn(T * K, R, device="cuda", dtype=dtype)
    w = torch.randn(E, *((N, R) if transposed else (R, N)), device="cuda", dtype=dtype)
    assert hopper_rows.fits(TILE, N, R, 256, dtype)
    expected = (gemm.down if transposed else gemm.dx)(a_SR, w, sorted_, TILE)
    for _ in range(3):  # a race would not show every time
        assert torch.equal(hopper_rows.rows(a_SR, w, transposed, sorted_), expected)
    assert not torch.equal(hopper_rows.rows(a_SR.flip(0), w, transposed, sorted_), expected)  # the check can fail


@ON_HOPPER
def test_rows_without_any_row(poison):
    """Ids from E on get no row, so that there is no tile."""
    E, D, F = 2, 256, 256
    sorted_ = dispatch(torch.full((512, 1), E, device="cuda", dtype=torch.int32), E, 128)
    x, w_in, w_out = (
        torch.randn(*n, device="cuda", dtype=torch.bfloat16) for n in ((512, D), (E, 2 * F, D), (E, D, F))
    )
    h, a = hopper_gated.up(x, w_in, sorted_)
    results = hopper_gated.dswiglu(x, w_out, h, torch.ones(512, 1, device="cuda"), sorted_)
    torch.cuda.synchronize()
    assert all(t.isnan().all() for t in (h, a, *results))


def test_panels_of_another_tile_are_refused():
    x, w, h, gates = (torch.empty(*n) for n in ((4, 64), (1, 64, 64), (4, 4, 32), (4, 1)))
    with pytest.raises(ValueError, match=r"h is \(4, 4, 32\), expected \(2, 4, 64\)"):
        hopper_gated.dswiglu(x, w, h, gates, SimpleNamespace(row_slot_S=torch.empty(4)))


def test_where_rows_are_chosen(monkeypatch):
    monkeypatch.setattr(hopper, "INTERPRETED", False)
    monkeypatch.setattr(hopper, "capability", lambda: 90)

    def up(D, F=256, rows=512, dtype=torch.bfloat16, tile=TILE):
        return hopper_gated.fits_up(tile, D, F, rows, dtype)

    def dswiglu(D, F=256, dtype=torch.bfloat16, tile=TILE):
        return hopper_gated.fits_dswiglu(tile, D, F, dtype)

    for fits in (up, dswiglu):
        assert fits(512) and fits(1536, 2880) and fits(4096) and not fits(1024, dtype=torch.float32)
        assert not fits(1024, 272)  # panels of h are narrower there
        assert not fits(1024, tile=TILE._replace(BLOCK_M=32))  # few rows: smaller tiles
    assert up(1024, dtype=torch.float16) and not dswiglu(1024, dtype=torch.float16)  # da may overflow
    assert [up(D, rows=255) for D in (1024, 2032, 2048)] == [True, True, False]
    assert [hopper_rows.fits(TILE, 512, 256, rows, torch.float16) for rows in (255, 256)] == [False, True]
    assert not hopper_rows.fits(TILE._replace(BLOCK_M=64), 512, 256, 256, torch.float16)
    monkeypatch.setattr(hopper, "capability", lambda: 80)
    assert not up(1024) and not dswiglu(1024)


def test_where_it_is_chosen(monkeypatch):
    monkeypatch.setattr(hopper, "INTERPRETED", False)
    for capability in (80, 89, 90, 100, 120):
        monkeypatch.setattr(hopper, "capability", lambda capability=capability: capability)
        for dtype in (torch.bfloat16, torch.float16):
            assert hopper.fits(128, 256, dtype) == (capability == 90)
    monkeypatch.setattr(hopper, "capability", lambda: 90)
    assert not hopper.fits(128, 256, torch.float32)
    assert not hopper.fits(64, 256, torch.bfloat16)
    assert not hopper.fits(128, 128, torch.bfloat16)
    monkeypatch.setattr(hopper, "INTERPRETED", True)
    assert not hopper.fits(128, 256, torch.bfloat16)
