"""Triton, or a stand-in where it is not installed (macOS, Windows): modules import, launching a kernel raises."""

MISSING = ""  # why kernels cannot run here; empty where they can


class Stub:
    """Every attribute and every result of a call is the stub again: enough to define kernels that cannot run."""

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
