"""Muon's step for small matrices, one program each: momentum, normalisation, five Newton-Schulz rounds and the update.

A small MoE has hundreds of matrices that each fit into one multiprocessor. Batched products would move them to memory
and back fifteen times a step. Here they stay on the chip, and several layers share a launch.

Shapes: P parameters of one shape (R, B) or (E, R, B). Their rows stack matrices: each parameter is N matrices (A, B).
"""

import math

from moe_kernels.language import tl, triton
from moe_kernels.tiles import capability, interpreting, limits, pow2

# Of Muon's quintic polynomial. Five rounds bring singular values of 1e-3..1 into 0.7..1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
MOST = 2**14  # values of a padded matrix in registers; 128 x 256 would spill a kilobyte a thread
PER_LAUNCH = 8  # parameters per launch


def fits(shape, rows):
    """Whether `muon_update` takes parameters of this shape. rows: how many rows each of the stacked matrices has."""
    short, long = padded(rows[0], shape[-1])
    return len(set(rows)) == 1 and short * long <= MOST and short <= limits(capability()).square


def padded(A, B):
    """[shorter, longer] side of the tile that holds a matrix (A, B)."""
    return [max(16, pow2(side)) for side in sorted((A, B))]


@triton.jit
def pick(tensors, index, N: tl.constexpr):
    """tensors[index] of a tuple of pointers, for an index known at run time."""
    found = tensors[0]
    for i in tl.static_range(1, N):
        found = tl.where(index == i, tensors[i], found)
    return found


@triton.jit
def muon_kernel(
    weights, momenta, grads, lr_ptr, scale_ptr, skip_ptr, mu, weight_decay, size,
    P: tl.constexpr, A: tl.constexpr, B: tl.constexpr, SKIP_UNUSED: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr, C1: tl.constexpr, C3: tl.constexpr, C5: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    """One matrix, transposed if it is tall, so that its square products are small. Padding is zero and stays zero."""
    if skip_ptr is not None:
        if tl.load(skip_ptr) > 0:
            return
    layer, start = tl.program_id(1), tl.program_id(0).to(tl.int64) * (A * B)
    TALL: tl.constexpr = A > B
    short, long = tl.arange(0, BLOCK_S)[:, None], tl.arange(0, BLOCK_L)[None, :]
    offs = short + long * B if TALL else short * B + long
    mask = (short < (B if TALL else A)) & (long < (A if TALL else B))

    momentum_ptr = pick(momenta, layer, P) + start
    grad = tl.load(pick(grads, layer, P) + start + offs, mask=mask, other=0.0)
    if scale_ptr is not None:
        grad *= tl.load(scale_ptr)
    momentum = tl.load(momentum_ptr + offs, mask=mask, other=0.0)
    momentum += (1 - mu) * (grad - momentum)
    tl.store(momentum_ptr + offs, momentum, mask=mask)
    update = grad + mu * (momentum - grad)  # Nesterov
    rate = tl.load(lr_ptr)
    step = rate * size
    if SKIP_UNUSED:  # an expert without tokens: normalised, its fading momentum would be a full step
        step = tl.where(tl.max(tl.max(tl.abs(grad), 1), 0) > 0, step, 0.0)

    norm = tl.sqrt(tl.sum(tl.sum(update * update, 1), 0))
    x = (update / tl.maximum(norm, 1e-20)).to(DTYPE)
    for _ in range(ROUNDS):
        gram = tl.dot(x, tl.trans(x), input_precision="ieee").to(DTYPE)
        square = (C3 * gram.to(tl.float32) + C5 * tl.dot(gram, gram, input_precision="ieee")).to(DTYPE)
        x = (C1 * x.to(tl.float32) + tl.dot(square, x, input_precision="ieee")).to(DTYPE)

    weight_ptr = pick(weights, layer, P) + start
    weight = tl.load(weight_ptr + offs, mask=mask)
    tl.store(weight_ptr + offs, weight * (1 - rate * weight_decay) - step * x.to(tl.float32), mask=mask)


def muon_update(weights, momenta, grads, rows, lr, mu, weight_decay, scale=None, skip=None, skip_unused=False):
    """A step of Muon, in place on lists of float32 weights and momenta of one shape. Its twin is optim.Muon. Products
    are in bfloat16, or in float32 in the interpreter.

    rows: how many rows each of the stacked matrices has, all equal (`fits`). lr, scale, skip: float32 scalar tensors;
    the last two may be None. Gradients are multiplied by scale. Nothing changes if skip is above 0.
    skip_unused: a matrix whose gradient is all zero only decays."""
    A, B = rows[0], weights[0].shape[-1]
    N, (short, long) = weights[0].numel() // (A * B), padded(A, B)
    grads = [grad.contiguous() for grad in grads]
    C1, C3, C5 = COEFFICIENTS
    for i in range(0, len(weights) if N else 0, PER_LAUNCH):
        some = [tuple(tensors[i : i + PER_LAUNCH]) for tensors in (weights, momenta, grads)]
        muon_kernel[(N, len(some[0]))](
            *some, lr_ptr=lr, scale_ptr=scale, skip_ptr=skip, mu=mu, weight_decay=weight_decay,
            size=0.2 * math.sqrt(max(A, B)), P=len(some[0]), A=A, B=B, SKIP_UNUSED=skip_unused,
            DTYPE=tl.float32 if interpreting() else tl.bfloat16, BLOCK_S=short, BLOCK_L=long, C1=C1, C3=C3,
            C5=C5, ROUNDS=ROUNDS, num_warps=4 if short * long <= 2**13 else 8,
        )  # fmt: skip
