"""Weight gradients of the Hopper kernel equal those of the plain one: python -m pytest tests/test_hopper.py (H100 or H200)."""

import pytest
import torch

from moe_kernels import grouped_gemm as gemm
from moe_kernels import hopper
from moe_kernels.dispatch import dispatch
from moe_kernels.tiles import Tile

pytestmark = pytest.mark.skipif(
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
    assert hopper.fits(M, N, 512, dtype, a_TM.device)
    expected = gemm.dw(a_TM, b_SN, transposed, sorted_, TILE)
    for _ in range(3):  # a race would not show every time
        assert torch.equal(hopper.dw(a_TM, b_SN, transposed, sorted_), expected)
    assert not torch.equal(hopper.dw(a_TM, b_SN.flip(0), transposed, sorted_), expected)  # the check can fail


def test_where_it_does_not_fit():
    device = torch.device("cuda")
    assert not hopper.fits(256, 256, 512, torch.float32, device)
    assert not hopper.fits(64, 256, 512, torch.bfloat16, device)
    assert not hopper.fits(256, 256, 16, torch.bfloat16, device)
    assert not hopper.fits(256, 256, 512, torch.bfloat16, torch.device("cpu"))
