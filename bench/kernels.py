"""Each kernel of the layer alone: its time, TFLOP/s or GB/s, and the fraction of its roofline.

    python -m bench.kernels --csv=kernels.csv                 all kernels at the target shapes
    python -m bench.kernels 32768,2048,768,128,8 --kernel=up,dw_in
    python -m bench.kernels 32768,2048,768,128,8 --counters   what limits them, by Nsight Compute

A roofline is max(FLOPs / peak, bytes / bandwidth) with the fewest bytes that the kernel can move; both ceilings are
measured in the same process. Every kernel runs with the arguments that it has inside the layer; the layer's results
are checked first. On a GPU it is replayed from a CUDA graph, so its time has no launch overhead.
"""

import dataclasses
import json
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from bench import counters, problem
from bench.compile import table
from bench.problem import TINY, kernel_costs, require_accuracy, rms
from bench.rows import BenchConfig, Results
from bench.timing import capture, poisoned, skipping, times_ms
from moe_kernels import experts, hopper, hopper_gated, hopper_rows, language, reference
from moe_kernels import grouped_gemm as gemm
from moe_kernels.dispatch import Dispatch
from moe_kernels.precompile import precompile
from moe_kernels.routing import route_bwd, route_fwd
from moe_kernels.tiles import interpreting
from optimoe import config

KERNELS = tuple(kernel_costs(TINY[0]))
LAUNCHERS = [(gemm, name) for name in ("up", "down", "dswiglu", "dx", "dw")]
LAUNCHERS += [(hopper_gated, "up"), (hopper_gated, "dswiglu"), (hopper_rows, "rows"), (hopper, "dw")]
LAUNCHERS += [(experts, "dispatch"), (experts, "combine")]


@dataclass(frozen=True)
class Config(BenchConfig):
    POSITIONAL: ClassVar = ("shapes",)
    shapes: tuple[str, ...] = ()  # layer shapes T,D,F,E,K; none: the target shapes
    # Kernels
    kernel: tuple[Literal[KERNELS], ...] = ()  # none: all
    counters: bool = False  # count with Nsight Compute instead of timing
    once: bool = False  # run each kernel once; --counters starts this under ncu


@contextmanager
def recording(calls):
    """Inside, each launch of a kernel of the layer is kept in calls[kernel], with its arguments."""

    def recorded(launch, name):
        def call(*args, **kwargs):
            kernel = name
            if name == "dw":
                kernel = "dw_in" if args[2] else "dw_out"  # transposed
            elif name == "rows":
                kernel = "down" if args[2] else "dx"
            elif "dgates_parts" in kwargs:
                kernel = "combine_dx"
            calls[kernel] = partial(launch, *args, **kwargs)
            return launch(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for module, name in LAUNCHERS:
            stack.enter_context(mock.patch.object(module, name, recorded(getattr(module, name), name)))
        yield


def layer_calls(inputs):
    """({kernel: its launch as in the layer}, RMS error of the layer). ValueError if the layer's results are wrong."""
    calls = {}
    with recording(calls), poisoned():
        outputs = dict(zip(("y", "dx", "dw_in", "dw_out", "dgates"), problem.run_kernels(inputs), strict=True))
    return calls, require_accuracy(problem.layer_errors(inputs, outputs), inputs.x_TD.dtype)


def routing_calls(inputs, top_k):
    """{kernel: its launch} of routing. ValueError if the results are wrong."""
    logits = inputs.logits_TE.to(inputs.x_TD.dtype)
    leaf = logits.double().requires_grad_()
    want = reference.route(leaf, top_k)
    gates, ids, _, *statistics = want
    grads = [torch.randn_like(t) for t in (gates, *statistics)]
    dlogits = torch.autograd.grad((gates, *statistics), leaf, grads)
    forward = partial(route_fwd, logits, None, top_k, False, True)
    backward = partial(route_bwd, logits, ids, gates.detach().float(), *(t.float() for t in grads), False, True)
    for i, (a, b) in enumerate(zip((*forward(), backward()), (*want, *dlogits), strict=True)):
        if b.is_floating_point():
            require_accuracy({f"output {i} of routing": rms(a, b)}, logits.dtype)
        elif not torch.equal(a.long(), b.long()):
            raise ValueError(f"wrong result: output {i} of routing differs from the reference")
    return {"route_fwd": forward, "route_bwd": backward}


def tensors(outputs):
    """The results of a launcher as a list of tensors, without the fields of a Dispatch that are not all written."""
    outputs = outputs[:3] if isinstance(outputs, Dispatch) else outputs
    return [outputs] if torch.is_tensor(outputs) else [t for t in outputs if t is not None]


def timed(call):
    """Times of one kernel; ValueError if its replay gives other bits."""
    run, outputs = capture(call) if torch.cuda.is_available() else (call, call())
    if not all(map(torch.equal, tensors(outputs), tensors(call()))):
        raise ValueError("wrong result: a second run gives other bits")
    return times_ms(run, 0.15)


def run_once(shape, names):
    """Runs the kernels under Nsight Compute and prints [(kernel, name of the function)] in order of launch."""
    inputs = problem.make_inputs(shape, torch.bfloat16, "cuda")
    calls = layer_calls(inputs)[0] | routing_calls(inputs, shape.K)
    functions, launched, original = [], [], JITFunction.run

    def run(kernel, *args, **kwargs):
        functions.append(kernel.fn.__name__)
        return original(kernel, *args, **kwargs)

    for name in names:
        calls[name]()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    with mock.patch.object(JITFunction, "run", run):
        for name in names:
            language._compiled.clear()  # else kernels that have run before bypass JITFunction.run
            before = len(functions)
            calls[name]()
            launched += [(name, function) for function in functions[before:]]
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    print(json.dumps(launched))


def bench_shape(results, shape, inputs, names, machine, failures):
    """A row for each kernel."""
    calls, error = layer_calls(inputs)
    calls |= routing_calls(inputs, shape.K)
    print(f"{shape}: RMS error of the layer {error:.1e}")
    costs = kernel_costs(shape, inputs.x_TD.dtype.itemsize)
    for name in names:
        with skipping(f"{shape} {name}", failures):
            times = timed(calls[name])
            mode = "backward" if name in ("route_bwd", *problem.BACKWARD) else "forward"
            if inputs.x_TD.is_cuda:
                mode += "-graph"
            share = costs[name].floor_ms(*machine) / times.p50
            results.add(name, "triton", mode, shape, times, costs[name], routing="softmax", ceiling=share)


def count(cfg, shapes, names):
    """--counters: prints a table of each shape and appends its rows to --csv."""
    ncu, results = counters.find_ncu(), Results(dataclasses.replace(cfg, csv=""))
    machine = results.add_ceilings()
    for shape in shapes:
        rows = counters.count(ncu, shape, names, machine)
        print(f"\n{shape}\n{table(rows)}")
        if cfg.csv:
            counters.append(cfg.csv, [shape._asdict() | row | results.environment for row in rows])
    return 0


def main(argv=None):
    cfg = config.parse(Config, argv, __doc__)
    cuda, names = torch.cuda.is_available(), cfg.kernel or KERNELS
    shapes = problem.chosen(cfg.shapes)
    if cfg.once:
        config.require(cuda, "once", True, "Nsight Compute counts on a GPU; leave it out")
        for shape in shapes:
            run_once(shape, names)
        return 0
    if cfg.counters:
        return count(cfg, shapes, names)
    if not cuda and not interpreting():
        raise ValueError("kernels need a GPU; with TRITON_INTERPRET=1 Triton's interpreter runs them on a CPU")
    results, failures = Results(cfg), []
    machine = results.add_ceilings()
    precompile([partial(problem.compile_layer, shape, results.dtype) for shape in shapes])
    for shape in shapes:
        with skipping(f"{shape}", failures):
            inputs = problem.make_inputs(shape, results.dtype, "cuda" if cuda else "cpu")
            bench_shape(results, shape, inputs, names, machine, failures)
    return results.finish(failures)


if __name__ == "__main__":
    raise SystemExit(config.command_line(main))
