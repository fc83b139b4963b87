"""Launching a kernel again without Triton's bookkeeping.

Triton looks at every argument of every launch to find the compiled kernel: tens of microseconds of Python, more than many of the kernels here take, and a
layer is a dozen launches. Arguments of a kind that was launched before need none of it.
"""

from functools import partial

import torch
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor


class Kernel:
    """Decorator of a `triton.jit` function: kernel[grid](*args, **options) as before, and straight to the compiled kernel from the second time on.

    The kind of a call is all that Triton specialises on: dtypes, 16-byte alignment, blocks of descriptors, the values of constants and integers (of those
    under do_not_specialize only whether they need 64 bits), options and device. Tuples of tensors are not known here."""

    def __init__(self, jit):
        self.jit, self.known = jit, {}
        self.varying = {i for i, p in enumerate(getattr(jit, "params", ())) if p.do_not_specialize}

    def __getitem__(self, grid):
        return partial(self.launch, grid)

    def kind(self, args, options):
        """Equal for calls that the same compiled kernel serves."""
        kind = [*options.values()]
        for i, arg in enumerate(args):
            if isinstance(arg, torch.Tensor):
                kind += (arg.dtype, arg.data_ptr() % 16 == 0)
            elif isinstance(arg, TensorDescriptor):
                kind += (arg.base.dtype, *arg.block_shape)
            else:
                kind.append(arg.bit_length() > 31 if i in self.varying else arg)
        return tuple(kind)

    def launch(self, grid, *args, **options):
        first = args[0].base if isinstance(args[0], TensorDescriptor) else args[0]
        if not first.is_cuda:  # interpreted, or compiled only
            return self.jit[grid](*args, **options)
        kind = first.get_device(), *self.kind(args, options)
        if kind in self.known:
            compiled, constants = self.known[kind]
            compiled[(*grid, 1, 1)[:3]](*args, *constants)
            return
        compiled = self.jit[grid](*args, **options)
        if isinstance(compiled, CompiledKernel):
            self.known[kind] = compiled, tuple(options[name] for name in self.jit.arg_names[len(args) :])
