"""Compiles Triton kernels in parallel before a benchmark runs: forked processes fill Triton's disk cache on all cores, without touching the GPU."""

import os
from functools import partial
from multiprocessing import get_context

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.problem import Inputs
from moe_kernels.experts import experts_bwd_op, experts_op
from moe_kernels.routing import route_bwd_op, route_op


class _Driver:
    """As much of a driver as compiling needs."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def _compile(fn, capability):
    driver.set_active(_Driver(capability))
    JITFunction.__getitem__ = lambda kernel, grid: partial(kernel.run, grid=grid, warmup=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what fails here fails again, with its message, where it is timed
    fn()


def precompile(tasks, capability=None):
    """Run every task (a function that launches kernels on empty CPU tensors of the real shapes) in a process of its own, where launching
    only compiles. Returns their exit codes: negative when the compiler crashed. Does nothing without a GPU or a `capability` (90: Hopper)."""
    if capability is None:
        if not torch.cuda.is_available() or torch.version.hip:
            return [0] * len(tasks)
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    fork, codes, n = get_context("fork"), [], os.cpu_count()
    for i in range(0, len(tasks), n):
        running = [fork.Process(target=_compile, args=(task, capability)) for task in tasks[i : i + n]]
        for process in running:
            process.start()
        for process in running:
            process.join()
        codes += [process.exitcode for process in running]
    return codes


def empty_inputs(shape, dtype):
    """Inputs of the real sizes on the CPU; they are never touched and take no memory."""
    T, D, F, E, K = shape
    new, floats = partial(torch.empty, dtype=dtype), partial(torch.empty, dtype=torch.float32)
    return Inputs(new(T, D), new(E, 2 * F, D), new(E, D, F), floats(T, K), torch.empty(T, K, dtype=torch.int32), new(T, D), floats(T, E))


def compile_layer(shape, dtype):
    """A task: launches every kernel of the layer and of routing once, as the benchmarks do."""
    x, w_in, w_out, gates, experts, dy, logits = empty_inputs(shape, dtype)
    out = experts_op(x, w_in, w_out, gates, experts)
    experts_bwd_op(dy, x, w_in, w_out, gates, *out[1:])
    logits = torch.empty_like(logits, dtype=dtype)
    route_op(logits, None, shape.K, False, True)
    route_bwd_op(logits, experts, gates, gates, gates.new_empty(shape.E), gates.new_empty(()), False, True)
