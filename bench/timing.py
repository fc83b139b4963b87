"""Times on the device with the L2 cache cleared before each repetition, CUDA graphs, traces and memory."""

import gc
import time
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import profile, record_function

from optimoe.config import require

MIB = 2**20
FLUSH = 64 * MIB  # bytes: more than the L2 of an H100 (50 MiB) or H200 (60 MiB)


class Times(NamedTuple):
    p20: float  # milliseconds
    p50: float
    p80: float


def quantiles(samples):
    ranks = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return Times(*torch.tensor(samples, dtype=torch.float64).quantile(ranks).tolist())


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def wall_ms(fn):
    """Milliseconds of fn() on the host's clock, with the device idle before and after."""
    synchronize()
    start = time.perf_counter()
    fn()
    synchronize()
    return (time.perf_counter() - start) * 1e3


def repeat(fn, seconds):
    """Times in ms of fn(), back to back for about this many seconds; on the CPU three times."""
    if not torch.cuda.is_available():
        return [wall_ms(fn) for _ in range(3)]
    size = max(FLUSH, torch.cuda.get_device_properties().L2_cache_size)
    flush = torch.empty(size, dtype=torch.int8, device="cuda")

    def samples(n):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
        for start, end in events:
            flush.zero_()
            start.record()
            fn()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    estimate = sorted(samples(3))[1] + 0.05  # ms for the flush
    gc.collect()
    gc.disable()  # a collection inside a repetition would be timed with it
    try:
        return samples(min(2000, max(10, int(1e3 * seconds / estimate))))
    finally:
        gc.enable()


def times_in_turn(fns):
    """Times of each of `fns` by name. In each of four rounds each runs back to back for 0.4 s, so that the GPU is as
    hot for all of them; the first round only heats it. They must have run before, so that nothing is compiled here."""
    samples, rounds = {name: [] for name in fns}, 4 if torch.cuda.is_available() else 1
    for turn in range(rounds):
        for name, fn in fns.items():
            times = repeat(fn, 0.4)
            if turn > 0 or rounds == 1:
                samples[name] += times
    return {name: quantiles(times) for name, times in samples.items()}


def times_ms(fn, seconds=0.3):
    return quantiles(repeat(fn, seconds))


def python_ms(fn):
    """Median time in ms after which fn() returns to Python while the device still works."""
    times = []
    for _ in range(20 if torch.cuda.is_available() else 3):
        synchronize()
        start = time.perf_counter()
        fn()
        times.append((time.perf_counter() - start) * 1e3)
    return quantiles(times).p50


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


def trace(fns, path):
    """A trace of three calls of each of `fns` by name, for chrome://tracing or Perfetto."""
    with profile(record_shapes=True) as prof:
        for name, fn in fns.items():
            for _ in range(3):
                with record_function(name):
                    fn()
        synchronize()
    prof.export_chrome_trace(str(path))
    require(Path(path).is_file(), "trace", path, "it could not be written; name another file")
    print(f"{path}: open it in ui.perfetto.dev")


def memory_mib(forward, backward):
    """(peak, kept) in MiB above what is allocated now: the peak of forward() and backward(y), and what forward() keeps
    besides its result y. (None, None) on the CPU."""
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


@contextmanager
def poisoned():
    """Inside, torch fills new memory with NaN (integers with their maximum), so that unwritten results show."""
    with warnings.catch_warnings(action="ignore"):
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


@contextmanager
def skipping(what, failures):
    """Reports an error inside (out of memory, a wrong result), appends it to `failures` and goes on. One that leaves
    the GPU unusable ends the program."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        print(f"skipped {what}: {type(error).__name__}: {reason}", flush=True)
        failures.append(f"{what}: {reason}")
        if any(word in str(error) for word in ("CUDA error", "illegal memory", "launch failure", "misaligned")):
            undefined = "the GPU is in an undefined state: the rows before this one are kept, run the rest again"
            raise SystemExit(undefined) from error
        traceback.clear_frames(error.__traceback__)  # its local variables hold GPU memory
    gc.collect()
    torch.cuda.empty_cache()
