"""Compiles Triton kernels in parallel before they are needed: forked processes fill Triton's disk cache on all cores, without touching the GPU."""

import os
from functools import partial
from multiprocessing import get_context

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Driver:
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
    driver.set_active(Driver(capability))
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
