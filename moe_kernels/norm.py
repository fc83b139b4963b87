"""The squared norm of large tensors, each read once. PyTorch's norm of bfloat16 reads at half to two thirds of
a copy's speed (docs/LOG.md)."""

import torch

from moe_kernels.adamw import load_float
from moe_kernels.language import MISSING, tl, triton
from moe_kernels.tiles import capability, cdiv, eager

BLOCK = 4096  # values that a program of eight warps loads at once
STEPS = 4  # how often it does
LARGE = 2**20  # values from which a launch of its own is worth it


def fits(tensor):
    """Whether `square_of` can take a tensor and is worth it. A size that 16 does not divide would be read value by
    value."""
    if not tensor.is_cuda or not eager(tensor) or MISSING or tensor.get_device() != torch.cuda.current_device():
        return False
    large = tensor.numel() >= LARGE and tensor.numel() % 16 == 0 and tensor.is_contiguous()
    return large and tensor.dtype in (torch.float32, torch.bfloat16) and capability() >= 80


def square_of(tensors):
    """The sum of the squares of all values of `tensors`, contiguous, float32 or bfloat16, on one device: a float32
    scalar. It is added in a fixed order."""
    programs = [cdiv(t.numel(), BLOCK * STEPS) for t in tensors]
    sums = torch.empty(sum(programs), dtype=torch.float32, device=tensors[0].device)
    for tensor, part in zip(tensors, sums.split(programs), strict=True):
        bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        squares_kernel[(part.numel(),)](bits, part, tensor.numel(), BLOCK=BLOCK, STEPS=STEPS, num_warps=8)
    return sums.sum()


@triton.jit
def squares_kernel(x_ptr, sums_ptr, n, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    offs = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for step in tl.static_range(STEPS):
        x = load_float(x_ptr + start, step * BLOCK + offs, step * BLOCK + offs < n - start)
        total += x * x
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total))
