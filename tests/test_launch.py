"""What the direct launch takes for the same kind of call, and that it launches the same kernel."""

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels.launch import Kernel


@Kernel
@triton.jit(do_not_specialize=["n"])
def scale_kernel(x_ptr, y_ptr, factor, n, ADD: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n) * factor + ADD, mask=offs < n)


def scaled(x, factor, add, block=64, warps=4):
    y = torch.full_like(x, float("nan"))
    scale_kernel[(triton.cdiv(x.numel(), block),)](x, y, factor, x.numel(), add, BLOCK=block, num_warps=warps)
    return y


def test_every_launch_computes(device):
    """First and repeated launches of several kinds; on a GPU the second of a kind is direct."""
    x = torch.arange(1000.0, device=device)
    for _ in range(2):
        for view in (x, x[1:], x[: 3], x.half()):  # x[1:] is not aligned
            for factor, add, block, warps in ((2, 1, 64, 4), (3, 0, 64, 4), (2, 1, 128, 4), (2, 1, 64, 2)):
                assert torch.equal(scaled(view, factor, add, block, warps), view * factor + add)


def test_kinds():
    kernel = Kernel(triton.jit(scale_kernel.jit.fn))
    kernel.varying = {3}
    x, y = torch.zeros(64), torch.zeros(64)
    kind = lambda x, *rest, **options: kernel.kind((x, y, *rest), options)  # noqa: E731
    one = kind(x, 2, 100, 1, BLOCK=64)
    assert one == kind(torch.zeros(8), 2, 50, 1, BLOCK=64)  # another tensor, another varying integer
    others = [kind(x.half(), 2, 100, 1, BLOCK=64), kind(x[1:], 2, 100, 1, BLOCK=64), kind(x, 16, 100, 1, BLOCK=64), kind(x, 2, 2**31, 1, BLOCK=64),
              kind(x, 2, 100, 0, BLOCK=64), kind(x, 2, 100, 1, BLOCK=128), kind(None, 2, 100, 1, BLOCK=64)]  # fmt: skip
    assert len({one, *others}) == 1 + len(others)
    desc = [TensorDescriptor.from_tensor(x.view(8, 8), block) for block in ([4, 8], [8, 8])]
    assert len({kernel.kind((d,), {}) for d in desc}) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="direct launches need a GPU")
def test_the_second_launch_is_direct(monkeypatch):
    x = torch.ones(100, device="cuda")
    scaled(x, 5, 7)
    monkeypatch.setattr(type(scale_kernel.jit), "run", None)
    assert torch.equal(scaled(x, 5, 7), x * 12)
    with pytest.raises(TypeError):
        scaled(x, 6, 7)
