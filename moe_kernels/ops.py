"""How ops are run: kernels or PyTorch, as a custom op or eagerly, and never under torch.autocast."""

import contextlib
import functools

import torch
from torch.autograd.graph import get_gradient_edge

from moe_kernels.tiles import eager, pick_impl

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def use_kernels(impl, tensor, **others):
    """Whether an op without a GEMM runs its kernels. For such ops "grouped_mm" means the reference. Raises what
    `pick_impl` raises, and ValueError for float64 with "triton"."""
    if pick_impl("reference" if impl == "grouped_mm" else impl, tensor, **others) != "triton":
        return False
    if tensor.dtype == torch.float64:
        raise ValueError("impl='triton' computes in float32 at most, not float64: use impl='reference'")
    return True


def described(**tensors):
    """Names, shapes and dtypes, for an error's message."""
    return ", ".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in tensors.items())


def first_order(backward):
    """Decorator: backward raises under create_graph=True, where once_differentiable may silently drop terms."""

    def once(ctx, *grads):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("create_graph=True: the kernels have no second derivatives, use impl='reference'")
        return backward(ctx, *grads)

    return once


def define(name, forward, backward, fake_forward, fake_backward, setup_context, derivative, n_outputs=None):
    """Make custom ops of two launchers: moe_kernels::<name>, and moe_kernels::<name>_bwd for its gradient.

    derivative(ctx, run, *gradients) calls `run`, which is the second op or its launcher, on what setup_context saved.
    n_outputs: how many outputs are results (None: all, or one tensor); the others are only saved for backward.
    Returns both ops and a differentiable function of a tensor and more arguments. Where `eager(tensor)`, it calls the
    launchers through autograd.Function, because a custom op takes 75 us more of Python (empty ops on a CPU)."""
    op = torch.library.custom_op(f"moe_kernels::{name}", forward, mutates_args=())
    backward_op = torch.library.custom_op(f"moe_kernels::{name}_bwd", backward, mutates_args=())
    op.register_fake(fake_forward)
    backward_op.register_fake(fake_backward)
    op.register_autograd(lambda ctx, *grads: derivative(ctx, backward_op, *grads), setup_context=setup_context)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):  # a separate setup_context would cost an inspect.signature per call
            output = forward(*inputs)
            setup_context(ctx, inputs, output)
            return output if n_outputs is None else output[:n_outputs]

        @staticmethod
        @first_order
        def backward(ctx, *grads):
            return derivative(ctx, backward, *grads)

    return op, backward_op, lambda tensor, *rest: (Eager.apply if eager(tensor) else op)(tensor, *rest)


# Computed at import: torch.compile of torch 2.11 cannot trace is_autocast_available.
WITH_AUTOCAST = {device for device in ("cpu", "cuda", "mps") if torch.amp.is_autocast_available(device)}


def autocast_off(device):
    return torch.autocast(device, enabled=False) if device in WITH_AUTOCAST else contextlib.nullcontext()


def no_autocast(fn):
    """Decorator: fn(tensor, ...) ignores torch.autocast and computes in its arguments' dtypes, forward and backward."""

    @functools.wraps(fn)
    def op(*args, **kwargs):
        with autocast_off(args[0].device.type):
            out = fn(*args, **kwargs)
        if torch.is_grad_enabled() and eager(args[0]):
            _off_in_backward(out if isinstance(out, tuple) else (out,), (*args, *kwargs.values()))
        return out

    return op


def _off_in_backward(outputs, arguments):
    """Turn autocast off while `backward` runs the graph nodes between arguments and outputs."""
    inputs = [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]
    seen, nodes = {get_gradient_edge(t).node for t in inputs}, [t.grad_fn for t in outputs]
    device, states = outputs[0].device.type, []

    def turn_off(_):
        states.append(torch.is_autocast_enabled(device))
        torch.set_autocast_enabled(device, False)

    def restore(*_):
        torch.set_autocast_enabled(device, states.pop())

    while inputs and nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            node.register_prehook(turn_off)
            node.register_hook(restore)
            nodes += [before for before, _ in node.next_functions]
