"""Which implementation runs where, and which tile each GEMM kernel uses: static tables, no autotuning, so a first call costs one compilation."""

import functools
import os
from typing import NamedTuple

import torch

IMPLS = ("reference", "grouped_mm", "triton")

# Bytes of shared memory that a block may have, by compute capability times ten.
KB = 1024
SHARED_MEMORY = {80: 163 * KB, 86: 99 * KB, 89: 99 * KB, 90: 227 * KB, 100: 227 * KB, 120: 99 * KB}


def pick_impl(impl, tensor):
    """`impl` if it can run on `tensor`; None means triton on CUDA and grouped_mm on the CPU (there 1.3x faster than the reference).

    Raises ValueError for an unknown name and RuntimeError for an implementation that cannot run here; nothing falls back silently."""
    if impl is None:
        return "triton" if tensor.is_cuda else "reference" if tensor.dtype == torch.float64 else "grouped_mm"
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r}: expected one of {', '.join(IMPLS)}, or None to choose by device")
    if impl == "triton" and not tensor.is_cuda and not interpreting():
        raise RuntimeError(
            f"impl='triton' needs a CUDA GPU, the input is on {tensor.device}: use impl='reference', or set TRITON_INTERPRET=1 before "
            "importing triton to run the kernels slowly on the CPU"
        )
    if impl == "triton" and tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) < (8, 0):
        raise RuntimeError(
            f"impl='triton' needs compute capability 8.0 or newer, {torch.cuda.get_device_name()} is older: use impl='reference'"
        )
    if impl == "grouped_mm" and (tensor.dtype == torch.float64 or tensor.is_cuda and tensor.dtype != torch.bfloat16):
        raise RuntimeError(
            f"impl='grouped_mm' does not take {tensor.dtype} on {tensor.device.type}: use impl='reference'"
        )
    return impl


def eager(tensor):
    """True for an ordinary tensor outside of tracing and compilation. There the layer calls its functions through autograd.Function: the same
    functions as a custom op cost 75 us more of Python per call (empty ops on a CPU; as much again in backward), which small batches would feel."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def interpreting():
    """True when Triton kernels run in its CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def capability():
    """Compute capability, times ten, of the GPU that kernels are compiled for; 90 in the interpreter and where there is none, as in tracing on a CPU."""
    if interpreting():
        return 90
    from triton.runtime import driver  # optional: tables of tiles do without triton

    try:
        return _target(driver.active)
    except RuntimeError:
        return 90


@functools.cache
def _target(active_driver):
    return active_driver.get_current_target().arch


class Tile(NamedTuple):
    """Output tile BLOCK_M x BLOCK_N, reduction step BLOCK_K, GROUP_M row tiles sharing a walk over the columns, column PARTS of the epilogue."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    PARTS: int
    num_warps: int
    num_stages: int


def pow2(n):
    """The least power of two that is not below n; like `cdiv` for the host, where triton's own are compiler functions and slow (docs/LOG.md)."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a, b):
    """a / b, rounded up."""
    return -(-a // b)


def max_tiles(n_rows, n_experts, block_m):
    """Static upper bound of sum_e ceil(rows_e / block_m)."""
    return n_rows // block_m + min(n_experts, n_rows)


def gemm_tiles(n_rows, n_experts, D, F, dtype):
    """The tile of each GEMM for S = n_rows routed rows over n_experts: dict with keys up, down, dswiglu, dx, dw_in, dw_out; not to be changed.

    All row-tiled GEMMs share BLOCK_M, hence one tile table. It follows the mean number of rows per expert."""
    sizes = n_rows, n_experts, D, F
    table = (
        _gemm_tiles if all(type(n) is int for n in sizes) else _gemm_tiles.__wrapped__
    )  # the symbolic sizes of a compilation are not hashable
    return table(*sizes, dtype, interpreting())


@functools.lru_cache(maxsize=1024)
def _gemm_tiles(n_rows, n_experts, D, F, dtype, interpreted):
    if interpreted:
        step = 16 if min(D, F) < 64 else 32
        tile = Tile(step, step, step, 2, 2, 4, 2)
        return dict.fromkeys(("up", "down", "dswiglu", "dx", "dw_in", "dw_out"), tile)
    panel = (
        32 if F % 32 == 0 else 16
    )  # columns of a part of up and dswiglu (grouped_gemm.py): dswiglu spills with 64 and was 7-16 % slower with 16
    if dtype == torch.float32:  # full-precision dots run outside the tensor cores: any tile that fits
        tile = Tile(64, 64, 16, 8, 64 // panel, 8, 2)
        return dict.fromkeys(("up", "down", "dswiglu", "dx", "dw_in", "dw_out"), tile)
    block_m = min(max(pow2(n_rows // n_experts), 16), 128)
    warps = 8 if block_m == 128 else 4
    wide = lambda n, block_n: min(pow2(n), block_n)  # noqa: E731
    if n_rows // n_experts > 512:
        dw_in, dw_out = Tile(128, wide(2 * F, 256), 64, 4, 8, 8, 4), Tile(128, wide(F, 256), 64, 4, 2, 8, 3)
    else:  # few steps per tile: small tiles, several to a multiprocessor, hide one another's latencies
        dw_k = min(max(pow2(n_rows // n_experts), 16), 32)
        dw_in, dw_out = (Tile(128, wide(n, 128), dw_k, 4, 2, 4, 4) for n in (2 * F, F))
    row_tiles = max_tiles(n_rows, n_experts, block_m)

    def forward(n, block_n):
        # A few tokens at a time (generation): narrower tiles until every multiprocessor reads a share of the weights.
        block_n = wide(n, block_n)
        while block_m == 16 and block_n > 32 and row_tiles * cdiv(n, block_n) < 132:  # those of an H100
            block_n //= 2
        return block_n

    up_n, down_n, dswiglu_n = forward(F, 128), forward(D, 256), wide(F, 256)
    return {
        "up": Tile(block_m, up_n, min(64, pow2(D)), 8, up_n // panel, warps, 4),
        "down": Tile(block_m, down_n, min(64, pow2(F)), 8, 1 if block_m == 16 else 2, warps, 4),
        "dswiglu": Tile(block_m, dswiglu_n, min(64, pow2(D)), 8, dswiglu_n // panel, 8 if block_m >= 64 else 4, 4),
        "dx": Tile(block_m, wide(D, 256), min(64, pow2(2 * F)), 8, 4, warps, 3),
        "dw_in": dw_in,
        "dw_out": dw_out,
    }


def resident_programs(tile, device):
    """How many programs of a persistent kernel fill `device`: as many as its multiprocessors hold by shared memory."""
    n_sm = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    shared = tile.num_stages * (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K * 2
    return n_sm * max(1, min(200_000 // shared, 32 // tile.num_warps))
