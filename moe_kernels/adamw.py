"""One AdamW step (arXiv 1711.05101) of one tensor in one kernel, which reads and writes every value once.

bfloat16 has 8 significant bits. Rounding to nearest would lose any step below 1/512 of a weight, and nearly all steps
are smaller. Stochastic rounding rounds up with a probability equal to the fraction cut off, so stored values are right
on average (arXiv 2010.06192). Its bits are a hash of (seed, step, position): a resumed run continues bit for bit.
"""

import math

import torch

from moe_kernels import reference
from moe_kernels.language import tl, triton
from moe_kernels.tiles import cdiv, pick_impl

BLOCK = 2048  # values per program of four warps: 16 per thread


@torch.no_grad()
def adamw_step(
    weight, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay,
    scale=None, skip=None, copy=None, seed=0, impl=None,
):  # fmt: skip
    """Update weight, exp_avg and exp_avg_sq in place.

    weight, exp_avg, exp_avg_sq: contiguous tensors of one shape, each float32 or bfloat16. bfloat16 ones are rounded
    stochastically.
    grad: of that shape, float32 or bfloat16. copy: bfloat16 tensor of that shape that gets the new weight, rounded to
    nearest; or None.
    step: float32 scalar tensor, the number of this step, counted from 1. lr: float or float32 scalar tensor.
    scale, skip: float32 scalar tensors, or None. The gradient is multiplied by scale. Nothing changes if skip is not 0.
    seed: of the rounding, 0 <= seed < 2**31. With different seeds, tensors are rounded independently.
    impl: as in `route`. Raises ValueError for other shapes, dtypes, devices or seeds, and for betas outside [0, 1)."""
    shape, dtypes = weight.shape, (torch.float32, torch.bfloat16)
    tensors = dict(weight=weight, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    for name, t in (tensors if copy is None else tensors | dict(copy=copy)).items():
        if t.shape != shape or t.dtype not in dtypes or (name != "grad" and not t.is_contiguous()):
            expected = f"contiguous float32 or bfloat16 of weight's shape {tuple(shape)}"
            raise ValueError(f"{name} {tuple(t.shape)} {t.dtype}: expected {expected}")
    if copy is not None and copy.dtype != torch.bfloat16:
        raise ValueError(f"copy {copy.dtype}: it is the bfloat16 copy of weight")
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and 0 <= seed < 2**31):
        raise ValueError(f"beta1={beta1}, beta2={beta2}, seed={seed}: expected 0 <= beta < 1 and 0 <= seed < 2**31")
    if weight.numel() == 0:
        return
    scalars = dict(step=step, lr=lr, scale=1.0 if scale is None else scale, skip=0.0 if skip is None else skip)
    for name, t in scalars.items():
        if not isinstance(t, torch.Tensor):
            scalars[name] = torch.full((), t, dtype=torch.float32, device=weight.device)
        elif t.numel() != 1:
            raise ValueError(f"{name} {tuple(t.shape)}: expected a scalar")
    run = launch if pick_impl(impl, weight, copy=copy, **tensors, **scalars) == "triton" else reference.adamw
    run(*tensors.values(), *scalars.values(), beta1, beta2, eps, weight_decay, copy, seed)


def launch(weight, grad, exp_avg, exp_avg_sq, step, lr, scale, skip, beta1, beta2, eps, weight_decay, copy, seed):
    bits = lambda t: t.view(torch.int16) if t.dtype == torch.bfloat16 else t
    adamw_kernel[(cdiv(weight.numel(), BLOCK),)](
        weight_ptr=bits(weight), grad_ptr=bits(grad.contiguous()), exp_avg_ptr=bits(exp_avg),
        exp_avg_sq_ptr=bits(exp_avg_sq), copy_ptr=bits(weight if copy is None else copy), step_ptr=step, lr_ptr=lr,
        scale_ptr=scale, skip_ptr=skip, n=weight.numel(), seed=seed, eps=eps, weight_decay=weight_decay,
        BETA1=beta1, BETA2=beta2, LOG_BETA1=math.log(max(beta1, 1e-300)), LOG_BETA2=math.log(max(beta2, 1e-300)),
        COPY=copy is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


@triton.jit
def mix(x):
    """A hash of uint32: lowbias32 from Wellons, "Prospecting for Hash Functions"."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def load_float(ptr, offs, mask):
    """Load float32 values, from float32 or from the bits of bfloat16 in int16."""
    x = tl.load(ptr + offs, mask=mask, other=0)
    if ptr.dtype.element_ty == tl.int16:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x


@triton.jit
def store_bfloat16(ptr, offs, x, noise, mask):
    """Store float32 x as bfloat16: add noise < 2^16, then cut off 16 bits. Uniform noise rounds stochastically."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = tl.where(x == x, bits + noise, bits)  # a carry could make a NaN a number
    tl.store(ptr + offs, (bits >> 16).to(tl.int16), mask=mask)


@triton.jit
def store_float(ptr, offs, x, noise, mask):
    if ptr.dtype.element_ty == tl.int16:
        store_bfloat16(ptr, offs, x, noise, mask)
    else:
        tl.store(ptr + offs, x, mask=mask)


@triton.jit(do_not_specialize=["seed"])
def adamw_kernel(
    weight_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, copy_ptr, step_ptr, lr_ptr, scale_ptr, skip_ptr,
    n, seed, eps, weight_decay, BETA1: tl.constexpr, BETA2: tl.constexpr,
    LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of values. bfloat16 comes as int16, because bfloat16 arithmetic is wrong in Triton's interpreter."""
    if tl.load(skip_ptr) != 0:
        return
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    mask = offs < n - start
    step, lr = tl.load(step_ptr), tl.load(lr_ptr)
    # 1 - beta^step in float64: it is small for a large beta in the first steps, and float32 loses digits.
    rate = lr / (1.0 - tl.exp(step.to(tl.float64) * LOG_BETA1)).to(tl.float32)
    v_scale = 1.0 / tl.sqrt((1.0 - tl.exp(step.to(tl.float64) * LOG_BETA2)).to(tl.float32))
    g = load_float(grad_ptr + start, offs, mask) * tl.load(scale_ptr)
    m = BETA1 * load_float(exp_avg_ptr + start, offs, mask) + (1 - BETA1) * g
    v = BETA2 * load_float(exp_avg_sq_ptr + start, offs, mask) + (1 - BETA2) * g * g
    w = load_float(weight_ptr + start, offs, mask) * (1 - lr * weight_decay)
    w -= rate * m / (tl.sqrt(v) * v_scale + eps)
    # 48 random bits per position: 16 for each of the three stores.
    key = mix(mix(mix(seed.to(tl.uint32)) ^ step.to(tl.uint32)) ^ (start >> 32).to(tl.uint32))
    noise = mix((start.to(tl.uint32) + offs.to(tl.uint32)) ^ key)
    store_float(weight_ptr + start, offs, w, noise & 0xFFFF, mask)
    store_float(exp_avg_ptr + start, offs, m, noise >> 16, mask)
    # The second moment needs stochastic rounding most. In a step it falls by at most 1 - beta2 (1/20 to 1/1000) of
    # itself, but neighbours in bfloat16 differ by 1/256 to 1/128. Rounded to nearest, it might never fall again.
    store_float(exp_avg_sq_ptr + start, offs, v, mix(noise ^ 0x9E3779B9) & 0xFFFF, mask)
    if COPY:  # rounded to nearest, ties to even
        store_bfloat16(copy_ptr + start, offs, w, 0x7FFF + ((w.to(tl.uint32, bitcast=True) >> 16) & 1), mask)
