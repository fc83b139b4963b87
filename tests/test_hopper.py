"""Weight gradients of the Hopper kernel equal those of the plain one (on an H100 or H200), and where it is chosen."""

import pytest
import torch

from moe_kernels import grouped_gemm as gemm
from moe_kernels.dispatch import dispatch
from moe_kernels.tiles import Tile

hopper = pytest.importorskip("moe_kernels.hopper", reason="needs triton with Gluon")
TILE = Tile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=4, PARTS=2, num_warps=8, num_stages=3)


def choose(T, E, K, routing):
    """Expert ids (T, K) int32 whose loads are even, half of the experts empty, or all on the first K experts."""
    scores = torch.randn(T, E, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    if routing == "half":
        scores[:, ::2] -= 100
    if routing == "one":
        scores[:, :K] += 100
    return scores.topk(K).indices.int()


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
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
    ],
)
def test_same_bits_as_the_plain_kernel(T, M, N, E, K, routing, dtype, transposed, poison):
    sorted_ = dispatch(choose(T, E, K, routing), E, 128)
    a_TM = torch.randn(T, M, device="cuda", dtype=dtype)
    b_SN = torch.randn(T * K, N, device="cuda", dtype=dtype)
    assert hopper.fits(M, N, 512, dtype)
    expected = gemm.dw(a_TM, b_SN, transposed, sorted_, TILE)
    for _ in range(3):  # a race would not show every time
        assert torch.equal(hopper.dw(a_TM, b_SN, transposed, sorted_), expected)
    assert not torch.equal(hopper.dw(a_TM, b_SN.flip(0), transposed, sorted_), expected)  # the check can fail


def test_where_it_is_chosen(monkeypatch):
    monkeypatch.setattr(hopper, "interpreting", lambda: False)
    for capability in (80, 89, 90, 100, 120):
        monkeypatch.setattr(hopper, "capability", lambda capability=capability: capability)
        for dtype in (torch.bfloat16, torch.float16):
            assert hopper.fits(128, 256, 512, dtype) == (capability == 90)
    monkeypatch.setattr(hopper, "capability", lambda: 90)
    assert not hopper.fits(128, 256, 512, torch.float32)
    assert not hopper.fits(64, 256, 512, torch.bfloat16)
    assert not hopper.fits(128, 128, 512, torch.bfloat16)
    assert not hopper.fits(128, 256, 511, torch.bfloat16)
    monkeypatch.setattr(hopper, "interpreting", lambda: True)
    assert not hopper.fits(128, 256, 512, torch.bfloat16)
