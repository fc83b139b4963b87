"""Which implementation runs where, and which tile each GEMM kernel uses.

The tables are fixed, without autotuning, so that a first call costs one compilation.
"""

import functools
import os
from typing import NamedTuple

import torch

from moe_kernels.language import MISSING, driver

IMPLS = ("reference", "grouped_mm", "triton")
GEMMS = ("up", "down", "dswiglu", "dx", "dw_in", "dw_out")


def pick_impl(impl, tensor, **others):
    """`impl` if it can run on `tensor`. None means triton on CUDA if it is installed, else grouped_mm if it takes the
    dtype (1.3x faster than the reference on a CPU), else the reference.

    Raises ValueError for an unknown name, or for one of `others` on another device, and RuntimeError for an impl
    that cannot run."""
    for name, other in others.items():
        if other is not None and other.device != tensor.device:
            raise ValueError(f"{name} on {other.device}: expected {tensor.device}, where the first argument is")
    if impl in (None, "triton") and tensor.is_cuda and not MISSING:
        if eager(tensor) and tensor.get_device() != torch.cuda.current_device():
            raise RuntimeError(f"kernels run on the current device: call `with torch.cuda.device('{tensor.device}'):`")
        if impl is None:
            return "triton"
    if impl is None:
        return "grouped_mm" if _grouped_mm_takes(tensor) else "reference"
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r}: expected one of {', '.join(IMPLS)}, or None to choose by device")
    if impl == "triton" and MISSING:
        raise RuntimeError(MISSING)
    if impl == "triton" and not tensor.is_cuda and not interpreting():
        remedy = "use impl='reference', or set TRITON_INTERPRET=1 before triton is imported, which is slow"
        raise RuntimeError(f"impl='triton' needs a CUDA GPU, the input is on {tensor.device}: {remedy}")
    if impl == "triton" and tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) < (8, 0):
        name = torch.cuda.get_device_name(tensor.device)
        raise RuntimeError(f"impl='triton' needs compute capability 8.0, {name} is older: use impl='reference'")
    if impl == "grouped_mm" and not _grouped_mm_takes(tensor):
        what = f"{tensor.dtype} on {tensor.device.type}"
        raise RuntimeError(f"impl='grouped_mm' does not take {what}: use impl='reference'")
    return impl


def _grouped_mm_takes(tensor):
    if tensor.device.type == "mps":
        return False
    return tensor.dtype == torch.bfloat16 if tensor.is_cuda else tensor.dtype != torch.float64


def eager(tensor):
    """True for an ordinary tensor outside of tracing and compilation. Ops on it run without torch's dispatcher."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def interpreting():
    """True when Triton kernels run in its CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


INTERPRETED = interpreting()  # read once, as Triton does: reading it takes longer than all of `capability`


def capability():
    """Compute capability, times ten, of the GPU that kernels are compiled for; 90 in the interpreter and without a
    GPU."""
    if INTERPRETED or MISSING:
        return 90
    try:
        return _target(driver.active)
    except RuntimeError:
        return 90


@functools.cache
def _target(active_driver):
    return active_driver.get_current_target().arch


class Tile(NamedTuple):
    """An output tile of BLOCK_M x BLOCK_N, reduced in steps of BLOCK_K. GROUP_M row tiles advance through the columns
    together, to share weights in L2. The epilogue works on PARTS ranges of columns, one by one."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    PARTS: int
    num_warps: int
    num_stages: int


class Limits(NamedTuple):
    """Upper limits for the tiles of an architecture."""

    shared: int  # bytes of shared memory per program
    columns: int  # of an accumulator
    step: int  # BLOCK_K
    stages: int  # of the software pipeline
    square: int  # rows of the largest square matrix that Muon's kernel multiplies without spilling


# By compute capability times ten. Only 90 was timed (H100 and H200); for the others bench.compile checks the kernels.
# With 99 KB of shared memory, 128 columns leave room for two programs on a multiprocessor.
LIMITS = {
    80: Limits(163 * 1024, 256, 64, 3, 64),
    86: Limits(99 * 1024, 128, 32, 4, 64),
    89: Limits(99 * 1024, 128, 32, 4, 64),
    90: Limits(227 * 1024, 256, 64, 4, 128),
    100: Limits(227 * 1024, 256, 64, 4, 128),
    120: Limits(99 * 1024, 128, 32, 4, 64),
}


def limits(capability):
    """The entry of LIMITS for a capability or the next lower one: 87 takes 86, and 103 takes 100."""
    return LIMITS[max((known for known in LIMITS if known <= capability), default=80)]


def pow2(n):
    """The least power of two that is not below n. Triton's own functions are slow on the host (docs/LOG.md)."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a, b):
    """a / b, rounded up."""
    return -(-a // b)


def max_tiles(n_rows, n_experts, block_m):
    """Upper bound of sum_e ceil(rows_e / block_m), without knowing rows_e."""
    return n_rows // block_m + min(n_experts, n_rows)


def gemm_tiles(n_rows, n_experts, D, F, dtype):
    """The tile of each GEMM for S = n_rows routed rows over n_experts, for the GPU of `capability`.

    Returns a dict with the keys GEMMS. It is cached: do not change it. All GEMMs but dw_in and dw_out have one BLOCK_M,
    which follows from the mean number of rows per expert."""
    sizes = n_rows, n_experts, D, F
    # The symbolic sizes of torch.compile are not hashable.
    table = _gemm_tiles if all(type(n) is int for n in sizes) else _gemm_tiles.__wrapped__
    return table(*sizes, dtype, None if interpreting() else capability())


@functools.lru_cache(maxsize=1024)
def _gemm_tiles(n_rows, n_experts, D, F, dtype, target):
    if target is None:  # the interpreter
        return dict.fromkeys(GEMMS, Tile(32, 32, 32, 2, 2, 4, 2))
    # Columns of a part in up and dswiglu. dswiglu spills with 64 and was 7-16 % slower with 16.
    panel = 32 if F % 32 == 0 else 16
    if dtype == torch.float32:  # full-precision products use no tensor cores: any tile that fits
        return dict.fromkeys(GEMMS, Tile(64, 64, 16, 8, 64 // panel, 8, 2))
    _, columns, step, stages, _ = limits(target)
    mean_rows = n_rows // n_experts
    # With few rows the time is that of reading weights: empty rows cost less than an expert's second tile, which reads
    # its weights again.
    block_m = 128 if mean_rows > 32 else max(pow2(mean_rows), 16)
    row_tiles = max_tiles(n_rows, n_experts, block_m)
    warps = 8 if block_m == 128 else 4
    up_k, down_k, dx_k = (min(step, pow2(n)) for n in (D, F, 2 * F))

    def wide(n, most=columns):
        return min(pow2(n), most)

    def forward(n, block_n):
        # Few rows (generation): narrower tiles until all multiprocessors of an H100 read weights.
        while block_m == 16 and block_n > 32 and row_tiles * cdiv(n, block_n) < 132:
            block_n //= 2
        return block_n

    if mean_rows > 512:
        dw_in = Tile(128, wide(2 * F), step, 4, 8, 8, stages)
        dw_out = Tile(128, wide(F), step, 4, 512 // columns, 8, 3)
    else:  # few steps per tile: several small tiles on a multiprocessor hide each other's latencies
        dw_in, dw_out = (Tile(128, wide(n, 128), min(block_m, 32), 4, 2, 4, stages) for n in (2 * F, F))
    up_n, down_n, dswiglu_n = forward(F, wide(F, columns // 2)), forward(D, wide(D)), wide(F)
    return {
        "up": Tile(block_m, up_n, up_k, 8, up_n // panel, warps, stages),
        "down": Tile(block_m, down_n, down_k, 8, 1 if block_m == 16 else 2, warps, stages),
        "dswiglu": Tile(block_m, dswiglu_n, up_k, 8, dswiglu_n // panel, warps, stages),
        "dx": Tile(block_m, wide(D), dx_k, 8, 4, warps, 3),
        "dw_in": dw_in,
        "dw_out": dw_out,
    }


@functools.cache
def multiprocessors(device):
    """How many a GPU has. Elsewhere 4: kernels are interpreted or only compiled there."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def resident_programs(tile, device):
    """How many programs of a persistent kernel fit on `device`, by shared memory and threads."""
    shared = tile.num_stages * (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K * 2
    room = limits(capability()).shared - 32 * 1024  # for the epilogue
    return multiprocessors(device) * max(1, min(room // shared, 32 // tile.num_warps))
