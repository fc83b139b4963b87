"""Times on the device, after the L2 cache has been cleared: medians of CUDA events, CUDA graphs, memory, and the two ceilings of a machine."""

import gc
import time
import traceback
import warnings
from contextlib import contextmanager
from typing import NamedTuple

import torch

FLUSH_MIB = 64  # more than the L2 of an H100 (50 MiB) or H200 (60 MiB)
MIB = 2**20


class Times(NamedTuple):
    p20: float  # milliseconds
    p50: float
    p80: float

    def minus(self, median_ms):
        return Times(*(t - median_ms for t in self))


def times_ms(fn, budget_ms=300, min_reps=20, max_reps=200):
    """Quantiles of the time of fn() in ms: as many repetitions as fit the budget, at least `min_reps`, each after a cleared L2. fn must have run
    before, so that nothing is compiled here. On the CPU: wall-clock time of a few repetitions."""
    if not torch.cuda.is_available():
        samples = []
        for _ in range(3):
            start = time.perf_counter()
            fn()
            samples.append((time.perf_counter() - start) * 1e3)
        return quantiles(samples)
    flush = torch.empty(FLUSH_MIB * MIB, dtype=torch.int8, device="cuda")

    def samples(n):
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(n)]
        for start, end in events:
            flush.zero_()
            start.record()
            fn()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    estimate = sorted(samples(3))[1]
    gc.collect()
    gc.disable()  # a collection inside a repetition would be timed with it
    try:
        return quantiles(samples(min(max_reps, max(min_reps, int(budget_ms / max(estimate, 1e-3))))))
    finally:
        gc.enable()


def quantiles(samples):
    return Times(
        *torch.tensor(samples, dtype=torch.float64)
        .quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
        .tolist()
    )


def capture(fn):
    """A CUDA graph of fn() as (replay, outputs): every replay() overwrites the outputs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fn()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = fn()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay, outputs


def memory_mib(forward, backward):
    """(peak, kept) in MiB above what is allocated now: the peak of forward() and backward(y), and what forward() leaves behind besides its result
    y. None on the CPU."""
    if not torch.cuda.is_available():
        return None, None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = forward()
    kept = torch.cuda.memory_allocated() - before - y.nbytes
    backward(y)
    del y
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB, kept / MIB


class Ceilings(NamedTuple):
    tflops: float  # of one large cuBLAS matrix product
    tb_s: float  # of one large copy, bytes read + bytes written


def measure_ceilings(dtype):
    """Times of an n x n x n matrix product and of a copy of `size` bytes, on random data: (n, Times, size, Times)."""
    device, n, size = ("cuda", 8192, 2**30) if torch.cuda.is_available() else ("cpu", 256, 2**22)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.randint(255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    gemm, copy = (lambda: a @ b), (lambda: target.copy_(source))
    gemm(), copy()
    return n, times_ms(gemm), size, times_ms(copy)


@contextmanager
def poisoned():
    """Inside, torch fills new memory with NaN (integers with their maximum), so that what a kernel leaves unwritten is seen."""
    with warnings.catch_warnings(action="ignore"):
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


@contextmanager
def skipping(what, failures):
    """Reports an error inside (out of memory, an unsupported shape, a wrong result), appends it to `failures` and goes on; after an error
    that leaves the GPU unusable it ends the program."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        print(f"skipped {what}: {type(error).__name__}: {reason}", flush=True)
        failures.append(f"{what}: {reason}")
        if any(word in str(error) for word in ("CUDA error", "illegal memory", "launch failure", "misaligned")):
            raise SystemExit(
                "the GPU is in an undefined state: the rows before this one are kept, run the rest again"
            ) from error
        traceback.clear_frames(error.__traceback__)  # its local variables hold GPU memory
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
