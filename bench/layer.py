"""The expert layer: implementations x shapes, forward, backward and both, beside cuBLAS products of the same FLOPs.

    python -m bench.layer --csv=layer.csv                          the target shapes, experts only, routing given
    python -m bench.layer 32768,2048,768,128,8 --graph --peers=sonicmoe,liger --routing=softmax,zipf1.5
    python -m bench.layer 32768,512,1024,{8,64,256},{1,2,4}        a sweep: the shell expands the braces
    python -m bench.layer 1024,2048,768,128,8 --trace=layer.json   a few passes for Perfetto

"gemms" is torch.bmm on E equal groups of T*K/E rows: the same matrix FLOPs (6 T K D F forward, 12 backward) and nothing
else. Everything runs in one process. Implementations take turns, so that the GPU is equally hot for all; the L2 is
flushed before every repetition. python_ms is the time in which Python launches one pass. Backward passes run in the
thread that calls them, see `main`.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch

from bench import peers, problem
from bench.problem import layer_cost, layer_errors, make_inputs, require_accuracy
from bench.rows import BenchConfig, Results
from bench.timing import MIB, Times, capture, memory_mib, poisoned, python_ms, skipping, times_in_turn, trace
from moe_kernels import moe_experts
from moe_kernels.precompile import precompile
from moe_kernels.tiles import IMPLS, interpreting
from optimoe import config

PEERS = tuple(peers.PEERS)
CAPTURABLE = ("gemms", "triton")  # the others wait for the GPU inside


@dataclass(frozen=True)
class Config(BenchConfig):
    POSITIONAL: ClassVar = ("shapes",)
    shapes: tuple[str, ...] = ()  # layer shapes T,D,F,E,K; none: the target shapes
    # Layer
    impl: tuple[Literal[IMPLS], ...] = ()  # none: grouped_mm and triton, or those that run here
    peers: tuple[Literal[PEERS], ...] = ()  # other libraries (peers.py)
    routing: tuple[Literal[problem.ROUTINGS], ...] = ("softmax",)  # softmax: normal logits; zipf1.5: uneven
    graph: bool = False  # also replay CUDA graphs of triton and gemms
    trace: str = ""  # write a trace of a few passes of the first shape to this file instead of timing

    def __post_init__(self):
        runs = "triton" not in self.impl or torch.cuda.is_available() or interpreting()
        config.require(runs, "impl", "triton", "kernels need a GPU, or TRITON_INTERPRET=1 for Triton's interpreter")
        problem.chosen(self.shapes)


class Passes(NamedTuple):
    forward: Callable
    full: Callable  # forward and backward
    columns: dict  # further columns of the full pass's row
    note: str


def gemms(inputs):
    """The matrix products of the layer on equal groups of rows, with cuBLAS and nothing in between."""
    w_in, w_out = inputs.w_in_EGD, inputs.w_out_EDF
    (E, G, D), rows = w_in.shape, -(-inputs.gates_TK.numel() // w_in.shape[0])
    randn = lambda columns: torch.randn(E, rows, columns, device=w_in.device, dtype=w_in.dtype)
    x, a, dy, dh = randn(D), randn(G // 2), randn(D), randn(G)

    def forward():
        return torch.bmm(x, w_in.transpose(1, 2)), torch.bmm(a, w_out.transpose(1, 2))

    def full():
        forward()
        torch.bmm(dy, w_out), torch.bmm(dy.transpose(1, 2), a), torch.bmm(dh, w_in), torch.bmm(dh.transpose(1, 2), x)

    full()
    return Passes(forward, full, {}, "")


def layer(name, inputs):
    """One implementation or peer. ValueError for wrong results and, with triton, if a second run gives other bits."""
    peer = peers.Peer(partial(moe_experts, impl=name)) if name in IMPLS else peers.load(name)
    x, w_in, w_out, gates, experts, dy, _ = inputs
    leaves = [t.detach().requires_grad_() for t in (x, peer.prepare(w_in), w_out, gates)]
    forward = lambda: peer.experts(*leaves, experts)
    backward = lambda y: torch.autograd.grad(y, leaves, dy)

    def full():
        y = forward()
        return y, *backward(y)

    start = time.perf_counter()
    with poisoned() if name == "triton" else nullcontext():
        results = full()
    note = f"first call {time.perf_counter() - start:.1f} s"
    outputs = dict(zip(("y", "dx", "dw_in", "dw_out", "dgates"), results, strict=True))
    outputs["dw_in"] = peer.restore(outputs["dw_in"])
    # Other implementations round every intermediate to the dtype, so they get twice the tolerance.
    error = require_accuracy(layer_errors(inputs, outputs), x.dtype, slack=1 if name in ("triton", "reference") else 2)
    if name == "triton" and not all(map(torch.equal, results, full())):
        raise ValueError("wrong result: a second run gives other bits")
    del results, outputs
    peak, saved = memory_mib(forward, backward)
    if saved is not None:
        saved += x.nbytes / MIB
    columns = dict(peak_mib=peak, saved_mib=saved, python_ms=python_ms(full))
    return Passes(forward, full, columns, f"{note}, RMS error {error:.1e}, Python {columns['python_ms']:.3f} ms")


def build(shape, routing, dtype, names, failures):
    """{name: Passes} of the implementations that give the right results."""
    inputs = make_inputs(shape, dtype, "cuda" if torch.cuda.is_available() else "cpu", routing)
    built = {}
    for name in ("gemms", *names):
        with skipping(f"{shape} {routing} {name}", failures):
            built[name] = gemms(inputs) if name == "gemms" else layer(name, inputs)
    return built


def bench_shape(results, shape, routing, built, graph):
    """Times all implementations in turn and adds their rows."""
    fns = {}
    for name, passes in built.items():
        fns[name, "", "forward"], fns[name, "", "full"] = passes.forward, passes.full
        if graph and name in CAPTURABLE:
            for what in ("forward", "full"):
                fns[name, "-graph", what] = capture(getattr(passes, what))[0]
    times, ceilings = times_in_turn(fns), {}
    for name, suffix in dict.fromkeys(key[:2] for key in fns):
        forward, full = times[name, suffix, "forward"], times[name, suffix, "full"]
        backward = Times(*(t - forward.p50 for t in full))
        for what, t in (("forward", forward), ("backward", backward), ("full", full)):
            mode, note, columns = what + suffix, "", {}
            if mode == "full":
                note, columns = built[name].note, dict(built[name].columns)
            if name == "gemms":
                ceilings[mode] = t.p50
            elif mode in ceilings:
                columns["ceiling"] = ceilings[mode] / t.p50
            cost = layer_cost(shape, what, results.dtype.itemsize)
            results.add("layer", name, mode, shape, t, cost, note, routing=routing, **columns)


def main(argv=None):
    cfg = config.parse(Config, argv, __doc__)
    # In a thread of its own a backward pass takes 0.5 ms longer: both processor cores change the same Python objects.
    with torch.autograd.set_multithreading_enabled(False):
        return measure(cfg)


def measure(cfg):
    """All rows of the benchmark; the exit code."""
    if cfg.trace:
        config.check_file(cfg.trace, "trace", device=False)
    cuda, failures = torch.cuda.is_available(), []
    config.require(cuda or not cfg.graph, "graph", True, "CUDA graphs need a GPU; leave it out")
    results = Results(cfg)
    usual = {"triton": cuda or interpreting(), "grouped_mm": True, "reference": not cuda}
    names = list(cfg.impl) or [name for name, runs in usual.items() if runs]
    for name in cfg.peers:
        with skipping(f"peer {name}", failures):
            peers.load(name)
            names.append(name)
            print(f"{name}: {peers.TUNING}")
    shapes = problem.chosen(cfg.shapes)
    if "triton" in names:
        precompile([partial(problem.compile_layer, shape, results.dtype) for shape in shapes])

    if cfg.trace:
        built = build(shapes[0], cfg.routing[0], results.dtype, names, failures)
        trace({f"{shapes[0]} {name}": passes.full for name, passes in built.items()}, cfg.trace)
        return 0
    results.add_ceilings()
    for shape in shapes:
        for routing in cfg.routing:
            with skipping(f"{shape} {routing}", failures):
                built = build(shape, routing, results.dtype, names, failures)
                bench_shape(results, shape, routing, built, cfg.graph)

    return results.finish(failures)


if __name__ == "__main__":
    raise SystemExit(config.command_line(main))
