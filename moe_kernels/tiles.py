"""Which implementation runs where, and which tile each GEMM kernel uses: static tables, no autotuning, so a first call costs one compilation."""

import os

import torch

IMPLS = ("reference", "grouped_mm", "triton")


def pick_impl(impl, tensor):
    """`impl` if it can run on `tensor`; None means triton on CUDA and reference on the CPU (there 20x faster than grouped_mm).

    Raises ValueError for an unknown name and RuntimeError for an implementation that cannot run here; nothing falls back silently."""
    if impl is None:
        return "triton" if tensor.is_cuda else "reference"
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r}: expected one of {', '.join(IMPLS)}, or None to choose by device")
    if impl == "triton" and not tensor.is_cuda and not interpreting():
        raise RuntimeError(
            f"impl='triton' needs a CUDA GPU, the input is on {tensor.device}: use impl='reference', or set TRITON_INTERPRET=1 before "
            "importing triton to run the kernels slowly on the CPU"
        )
    if impl == "triton" and tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) < (8, 0):
        raise RuntimeError(f"impl='triton' needs compute capability 8.0 or newer, {torch.cuda.get_device_name()} is older: use impl='reference'")
    if impl == "grouped_mm" and tensor.is_cuda and tensor.dtype != torch.bfloat16:
        raise RuntimeError(f"impl='grouped_mm' takes bfloat16 on CUDA, not {tensor.dtype}: use impl='triton' or 'reference'")
    return impl


def interpreting():
    """True when Triton kernels run in its CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
