"""Triton, or a stand-in where it is not installed (macOS, Windows): every module imports, and launching a kernel raises
RuntimeError."""

MISSING = ""  # why kernels cannot run here; empty where they can


class Stub:
    """Whatever is taken from it, or made by calling it, is a stub too: enough to define kernels that cannot be
    launched."""

    def __getattr__(self, name):
        return self

    def __call__(self, *args, **kwargs):
        return self

    def __getitem__(self, grid):
        raise RuntimeError(MISSING)


try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:
    MISSING = (
        f"impl='triton' needs the package triton ({error}): on Linux run `pip install triton`, "
        "elsewhere use impl='grouped_mm' or impl='reference'"
    )
    triton = tl = TensorDescriptor = Stub()

__all__ = ["MISSING", "TensorDescriptor", "tl", "triton"]
