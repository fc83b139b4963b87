"""Triton, or a stand-in if it is not installed (macOS, Windows): modules can be imported, but kernels cannot run."""

import contextlib

MISSING = ""  # why kernels cannot run here; empty where they can


class Stub:
    """Every attribute and every call gives the stub again, so kernels can be defined. Launching one raises."""

    def __getattr__(self, name):
        return self

    def __call__(self, *args, **kwargs):
        return self

    def __getitem__(self, grid):
        raise RuntimeError(MISSING)


try:
    import triton
    import triton.language as tl
    from triton.runtime import driver
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:
    MISSING = (
        f"impl='triton' needs the package triton ({error}): on Linux run `pip install triton`, "
        "elsewhere use impl='grouped_mm' or impl='reference'"
    )
    triton = tl = driver = Stub()
    TensorDescriptor = object


class Unchecked:
    """Makes a descriptor class of Triton's, as a base before it, skip the checks of its constructor, which take longer
    than the rest of a launch. The caller must pass an aligned, contiguous tensor; it is seen as `shape`."""

    def __init__(self, tensor, shape, block_shape):
        strides = [1]
        for n in shape[:0:-1]:
            strides.insert(0, n * strides[0])
        self.base, self.shape, self.strides, self.block_shape = tensor, shape, strides, block_shape
        self.dtype, self.get_device = tensor.dtype, tensor.get_device


class Matrix(Unchecked, TensorDescriptor):
    """A descriptor for kernels in Triton."""


# Triton 3.7 adds the fences of `_fenced` itself.
UNFENCED = not MISSING and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)


@contextlib.contextmanager
def _fenced():
    """In this context Triton 3.6 adds a proxy fence between copies to shared memory and wgmma, as 3.7 does.

    cp.async writes through the generic proxy, and wgmma reads through the asynchronous one. Only such a fence orders
    the two ("Async proxy", PTX ISA 8.7)."""

    def hook(backend, stages, options, language, capability):
        def ptx(source, metadata):
            code = make_ptx(source, metadata)
            if "cp.async.c" not in code or "fence.proxy.async" in code:
                return code
            return code.replace("wgmma.fence.sync", "fence.proxy.async.shared::cta;\n\twgmma.fence.sync")

        make_ptx, stages["ptx"] = stages["ptx"], ptx

    before = triton.knobs.runtime.add_stages_inspection_hook
    triton.knobs.runtime.add_stages_inspection_hook = hook
    try:
        yield
    finally:
        triton.knobs.runtime.add_stages_inspection_hook = before


def _kind(argument):
    """What a kernel is compiled for, of a tensor, descriptor or None."""
    if argument is None:
        return None
    if isinstance(argument, Unchecked):
        return argument.dtype, *argument.block_shape
    return argument.dtype, argument.data_ptr() % 16


def _start(compiled, grid, arguments, device):
    """compiled[grid](*arguments), without preparing what only profilers with hooks ask for."""
    hooks = triton.knobs.runtime
    if any(getattr(hook, "calls", hook) for hook in (hooks.launch_enter_hook, hooks.launch_exit_hook)):
        compiled[grid](*arguments)
    else:
        stream = driver.active.get_current_stream(device)
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


_compiled = {}  # {everything that Triton compiles a kernel for: compiled kernel}


def launch(kernel, grid, tensors, numbers=(), num_warps=4, num_stages=3, **constants):
    """kernel[grid](*tensors, *numbers, **constants) in a quarter of the host's time (docs/LOG.md).

    Triton inspects every argument of every launch. This looks only at what can change from call to call: the device;
    of `tensors`, which may be descriptors or None, dtypes and alignments or blocks; of `numbers`, divisibility; and the
    constants."""
    key = (
        kernel.fn, tensors[0].get_device(), num_warps, num_stages, *constants.values(),
        *map(_kind, tensors),
        *[(n == 1, n % 16 == 0, n < 2**31) for n in numbers],
    )  # fmt: skip
    compiled = _compiled.get(key)
    if compiled is not None:
        return _start(compiled, (*grid, 1, 1)[:3], (*tensors, *numbers, *constants.values()), key[1])
    options = dict(num_warps=num_warps, num_stages=num_stages)
    with _fenced() if UNFENCED else contextlib.nullcontext():
        compiled = kernel[grid](*tensors, *numbers, **constants, **options)
    if compiled is not None:  # the interpreter and compile_only return nothing
        _compiled[key] = compiled


__all__ = ["MISSING", "Matrix", "Unchecked", "driver", "launch", "tl", "triton"]
