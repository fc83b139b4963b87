"""Compile Triton kernels without running them: for a GPU that is not here, or on all cores before a benchmark."""

import contextlib
import os
from multiprocessing import get_context

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Driver:
    """The parts of a Triton driver that compiling needs. capability: 90 is compute capability 9.0."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # Triton caches compiled kernels by device, so each architecture is one

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def compile_only(capability):
    """In this context a launch only compiles its kernel, for `capability`. Yields a list of the kernels, each once."""
    compiled, launch, before = {}, JITFunction.__getitem__, driver._active

    def getitem(kernel, grid):
        def compile_instead(*args, **kwargs):
            binary = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            if compiled.setdefault(binary.hash, binary) is binary:
                kernels.append(binary)

        return compile_instead

    kernels = []
    driver.set_active(Driver(capability))
    JITFunction.__getitem__ = getitem
    try:
        yield kernels
    finally:
        JITFunction.__getitem__ = launch
        driver._active = before  # reset_active() would look for a GPU


def _compile(task, capability):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hide stderr: where the task is timed, a failure shows again
    with compile_only(capability):
        task()


def precompile(tasks, capability=None):
    """Run each task in its own process, to fill Triton's disk cache without the GPU. A task is a function that launches
    kernels on empty CPU tensors of the real shapes.

    Returns the exit codes, negative if the compiler crashed. Does nothing with neither a GPU nor a `capability` (90 is
    Hopper)."""
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
