"""What the tests change in Triton's interpreter.

It combines the elements of a reduction one by one: the sort of a dispatch takes it a second. And that of Triton 3.6
takes no number from an array of one element where numpy is 2.4 or newer, as in `range(n)` of a loaded n."""

import functools

import numpy as np


def reduce_whole_slices():
    """Combine slices across the axis of a reduction instead: the same function in the same order, on arrays."""
    from triton.runtime.interpreter import ReduceOps

    def generic_reduce(self, input):
        given, axis = self.unravel(input, self.axis)
        kinds, arrays = [t.dtype for t in given], [t.handle.data for t in given]

        def part(i):
            return tuple(self.to_tensor(np.take(a, i, axis), kind) for a, kind in zip(arrays, kinds, strict=True))

        def combine(left, right):
            found = self.combine_fn.fn(*left, *right)
            return found if isinstance(found, tuple) else (found,)

        found = [t.handle.data for t in functools.reduce(combine, map(part, range(arrays[0].shape[axis])))]
        if self.keep_dims and self.axis is None:
            found = [np.reshape(a, [1] * input[0].handle.data.ndim) for a in found]
        elif self.keep_dims:
            found = [np.expand_dims(a, axis) for a in found]
        elif self.axis is None:
            found = [a.item() for a in found]
        return [self.to_tensor(a, kind) for a, kind in zip(found, kinds, strict=True)]

    ReduceOps.generic_reduce = generic_reduce


def take_numbers_from_arrays():
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda number: number.handle.data.item())

    interpreter._patch_lang_tensor = patched
