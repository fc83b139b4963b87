"""The expert layer: implementations x shapes, forward, backward and both, against the ceiling that cuBLAS sets with the same FLOPs.

    python -m bench.layer --csv bench/h100.csv                       the six target shapes, experts only, routing given
    python -m bench.layer --graph --router --routing zipf1.5         replayed CUDA graphs too; the router in front too; skewed routing
    python -m bench.layer --at 32768,512,1024 --experts 8,...,256 --topk 1,...,16      a sweep at fixed T,D,F
    python -m bench.layer --peers scattermoe,sonicmoe,liger

"gemms" is torch.bmm on E equal groups of T*K/E rows: the same matrix FLOPs (6 T K D F forward, 12 backward) and nothing else. "routing" rows
time router + top-k + statistics + sort by expert (backward: up to the router's gradients), in our kernels and in torch ops; not in sweeps.
"""

import re
import time
from collections import defaultdict
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F_

from bench import peers
from bench.compare import begin, finish
from bench.problem import (
    TARGETS,
    TINY,
    Cost,
    Shape,
    kernel_costs,
    layer_cost,
    layer_errors,
    layer_floor_ms,
    make_inputs,
    parse_routing,
    parse_shape,
    require_accuracy,
    rms,
)  # fmt: skip
from bench.results import DTYPES, HEADER, arguments, cli, typed
from bench.timing import MIB, capture, memory_mib, poisoned, skipping, times_ms
from bench.warm import compile_layer
from moe_kernels import moe_experts, route
from moe_kernels.dispatch import dispatch
from moe_kernels.precompile import precompile
from moe_kernels.tiles import IMPLS, gemm_tiles, interpreting

MODES = ("forward", "backward", "full")
CAPTURABLE = ("gemms", "triton")  # the others wait for the GPU inside


def powers(text):
    """ "8,16,64" or, doubling, "8,...,256" as a list of integers; ValueError for anything else, and when it names none."""
    text = text.replace("…", "...")
    numbers = [int(word) for word in re.findall(r"\d+", text)]
    if re.fullmatch(r"\d+,\.\.\.,\d+", text):
        first, last = numbers
        numbers = [first << i for i in range(64) if first << i <= last]
    elif not re.fullmatch(r"\d+(,\d+)*", text):
        numbers = []
    if not numbers or 0 in numbers:
        raise ValueError(f"{text!r}: expected numbers such as 8,24 or, doubling up to the last, 8,...,256")
    return numbers


def implementations(text):
    """Comma-separated names of implementations and peers as a list; ValueError for those that are unknown or cannot run here."""
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in (*IMPLS, *peers.MODULES):
            raise ValueError(
                f"{name!r} is unknown; implementations are {', '.join(IMPLS)}, peers {', '.join(peers.MODULES)}"
            )
    if "triton" in names and not torch.cuda.is_available() and not interpreting():
        raise ValueError("triton kernels need a GPU: set TRITON_INTERPRET=1 to run them in its interpreter")
    return names


def route_with(name, x_TD, w_router_ED, top_k):
    """Gates and experts (T, K): by our kernels for "triton", else in torch ops and without statistics."""
    logits = F_.linear(x_TD, w_router_ED)
    if name == "triton":
        return route(logits, top_k, impl=name)[:2]
    top = logits.topk(top_k, dim=1)
    return top.values.float().softmax(1), top.indices.int()


class Layer(NamedTuple):
    forward: callable  # of the leaves
    leaves: dict  # by the name of their gradient
    restore: callable  # dw_in as (E, G, D)

    def run(self, dy):
        y = self.forward(*self.leaves.values())
        return y, *torch.autograd.grad(y, list(self.leaves.values()), dy)


def build(name, inputs, w_router=None):
    """The Layer of implementation or peer `name`; with a router weight (E, D) it routes its input itself."""
    peer = peers.Peer(partial(moe_experts, impl=name)) if name in IMPLS else peers.load(name)
    x, w_in, w_out, gates, experts, *_ = inputs
    leaves = {"dx": x, "dw_in": peer.prepare(w_in), "dw_out": w_out}
    if w_router is None:
        leaves["dgates"], forward = gates, lambda x, w_in, w_out, gates: peer.experts(x, w_in, w_out, gates, experts)
    else:
        leaves["dw_router"] = w_router
        forward = lambda x, w_in, w_out, w: peer.experts(x, w_in, w_out, *route_with(name, x, w, experts.shape[1]))  # noqa: E731
    return Layer(forward, {what: leaf.detach().requires_grad_() for what, leaf in leaves.items()}, peer.restore)


def gemms(inputs):
    """(forward, full): the matrix products of the layer on equal groups of rows, with cuBLAS and nothing in between."""
    _, w_in, w_out, gates, _, _, _ = inputs
    (E, G, D), rows = w_in.shape, -(-gates.numel() // w_in.shape[0])
    randn = lambda columns: torch.randn(E, rows, columns, device=w_in.device, dtype=w_in.dtype)  # noqa: E731
    x, a, dy, dh = randn(D), randn(G // 2), randn(D), randn(G)

    def forward():
        return torch.bmm(x, w_in.transpose(1, 2)), torch.bmm(a, w_out.transpose(1, 2))

    def full():
        forward()
        torch.bmm(dy, w_out), torch.bmm(dy.transpose(1, 2), a), torch.bmm(dh, w_in), torch.bmm(dh.transpose(1, 2), x)

    return forward, full


def time_modes(results, kernel, name, shape, routing, forward, full, costs, ceilings, graph, note="", **memory):
    """Times forward and full, eagerly and from CUDA graphs, and adds the rows of the three modes. `costs` and `ceilings` (ms) are by mode."""
    for suffix in ("", "-graph")[: 1 + graph]:
        fwd, both = (times_ms(capture(fn)[0] if suffix else fn) for fn in (forward, full))
        for mode, times in zip(MODES, (fwd, both.minus(fwd.p50), both), strict=True):
            last = dict(memory, note=note) if mode == "full" and not suffix else {}
            results.add(
                kernel, name, mode + suffix, shape, times, costs[mode], routing, ceilings.get(mode + suffix), **last
            )


def bench_gemms(results, shape, routing, inputs, costs, graph):
    """The ceiling in ms by mode."""
    forward, full = gemms(inputs)
    full()
    first = len(results.rows)
    time_modes(results, "layer", "gemms", shape, routing, forward, full, costs, {}, graph)
    return {row["mode"]: row["p50_ms"] for row in results.rows[first:]}


def bench_layer(results, name, shape, routing, inputs, w_router, costs, ceilings, graph):
    """Checks, measures and times one implementation; what is wrong, not reproducible (ours) or does not run raises."""
    layer, dy = build(name, inputs, w_router), inputs.dy_TD
    start = time.perf_counter()
    with poisoned() if name == "triton" else nullcontext():
        y, *grads = layer.run(dy)
    if y.is_cuda:
        torch.cuda.synchronize()
    note = f"first call {time.perf_counter() - start:.1f} s"

    outputs = dict(zip(layer.leaves, grads, strict=True)) | {"y": y}
    outputs["dw_in"] = layer.restore(outputs["dw_in"])
    if w_router is not None:  # its own choice of experts decides; dx holds the router's share too
        gates, experts = route_with(name, inputs.x_TD, w_router, shape.K)
        inputs, outputs = (
            inputs._replace(gates_TK=gates, experts_TK=experts),
            {what: outputs[what] for what in ("y", "dw_in", "dw_out")},
        )
    # The others round every intermediate to the dtype: twice the tolerance of ours.
    error = require_accuracy(layer_errors(inputs, outputs), y.dtype, slack=1 if name in ("triton", "reference") else 2)
    if name == "triton" and not all(map(torch.equal, (y, *grads), layer.run(dy))):
        raise ValueError("wrong result: a second run gives other bits")
    del y, grads, outputs

    forward = lambda: layer.forward(*layer.leaves.values())  # noqa: E731
    peak, saved = memory_mib(forward, lambda y: torch.autograd.grad(y, list(layer.leaves.values()), dy))
    saved = saved and saved + inputs.x_TD.nbytes / MIB
    time_modes(
        results, "layer" if w_router is None else "layer+router", name, shape, routing, forward, lambda: layer.run(dy), costs, ceilings,
        graph and name in CAPTURABLE, note=f"{note}, RMS error {error:.1e}", peak_mib=peak, saved_mib=saved,
    )  # fmt: skip


def bench_routing(results, shape, routing, inputs, w_router, cuda):
    """Router, top-k, statistics and sort, from our kernels and from torch ops, on the same input."""
    T, D, F, E, K = shape
    block_m = gemm_tiles(shape.S, E, D, F, inputs.x_TD.dtype)["up"].BLOCK_M
    x, w = inputs.x_TD.detach().requires_grad_(), w_router.detach().requires_grad_()

    def ours():
        r = route(F_.linear(x, w), K)
        return r.gates_TK, r.probs_E, r.z, r.counts_E, dispatch(r.experts_TK, E, block_m) if cuda else None

    def torch_ops():
        logits = F_.linear(x, w).float()
        top = logits.topk(K, dim=1)
        flat = top.indices.flatten()
        counts, order = (
            flat.new_zeros(E).index_add_(0, flat, torch.ones_like(flat)),
            flat.argsort(stable=True),
        )  # bincount waits for the GPU
        slot_row = torch.empty_like(order)
        slot_row[order] = torch.arange(flat.numel(), device=x.device)
        return (
            top.values.softmax(1),
            logits.softmax(1).mean(0),
            logits.logsumexp(1).square().mean(),
            counts,
            (counts.cumsum(0), order, slot_row),
        )

    with torch.no_grad():  # a live autograd graph of this stream would break the capture of another
        got, want = ours(), torch_ops()
    require_accuracy({"probs": rms(got[1], want[1]), "z": rms(got[2], want[2])}, torch.float32, slack=10)
    grads = [torch.randn_like(output) for output in want[:3]]
    costs = kernel_costs(shape, x.element_size())
    moved = sum(costs[name].bytes for name in ("route_fwd", "dispatch"))
    by_mode = {"forward": Cost(2 * T * D * E, moved), "backward": Cost(4 * T * D * E, costs["route_bwd"].bytes)}
    by_mode["full"] = Cost(*map(sum, zip(*by_mode.values(), strict=True)))
    for name, fn in (("triton" if cuda else "reference", ours), ("torch", torch_ops)):
        full = lambda fn=fn: torch.autograd.grad(fn()[:3], (x, w), grads)  # noqa: E731
        full()
        time_modes(results, "routing", name, shape, routing, fn, full, by_mode, {}, graph=cuda)


def bench_shape(results, args, shape, routing, dtype, failures):
    """All rows of one shape and routing; a row that fails is skipped."""
    cuda = torch.cuda.is_available()
    inputs = make_inputs(shape, dtype, "cuda" if cuda else "cpu", routing)
    w_router = torch.randn(shape.E, shape.D, device=inputs.x_TD.device, dtype=dtype) * shape.D**-0.5
    costs = {mode: layer_cost(shape, mode, dtype.itemsize) for mode in ("forward", "backward", "full")}
    ceilings = {}
    with skipping(f"{shape} gemms", failures):
        ceilings = bench_gemms(results, shape, routing, inputs, costs, args.graph)
    for name in args.names:
        for router in (None, w_router)[: 1 + (args.router and routing == "softmax")]:
            with skipping(f"{shape} {routing} {name}" + " with router" * (router is not None), failures):
                bench_layer(results, name, shape, routing, inputs, router, costs, ceilings, args.graph)
    if routing == "softmax" and not args.sweep:
        with skipping(f"{shape} routing", failures):
            bench_routing(results, shape, routing, inputs, w_router, cuda)


def fits(shape, itemsize):
    """Whether weights, their gradients and the activations of one layer have room on this GPU."""
    T, D, F, E, K = shape
    need = itemsize * (6 * E * D * F + shape.S * (3 * D + 8 * F))
    return not torch.cuda.is_available() or need < 0.9 * torch.cuda.get_device_properties(0).total_memory


def summary(rows, machine, itemsize):
    """What the targets are about, a line per shape and routing, and the cliffs along E."""
    full, curves = {}, defaultdict(list)
    for row in rows:
        full[
            row["kernel"],
            row["implementation"],
            row["mode"],
            row["routing"],
            Shape(*(row[letter] for letter in "TDFEK")),
        ] = row["p50_ms"]
    for (kernel, name, mode, routing, shape), ms in full.items():
        if (kernel, mode) == ("layer", "full") and name == "triton":
            others = {
                other: full[key]
                for key in full
                if key[0] == "layer" and key[2:] == (mode, routing, shape) and (other := key[1]) != name
            }
            line = f"{shape} {routing}: " + ", ".join(
                f"{other_ms / ms:.2f}x {other}" for other, other_ms in others.items()
            )
            if gemms_ms := full.get(("layer", "gemms", "full-graph", routing, shape)):
                line += f"; graph {gemms_ms / full['layer', name, 'full-graph', routing, shape]:.2f}x gemms"
            eager, graph, ops, ops_graph = (
                full.get(("routing", who, how, routing, shape))
                for who in (name, "torch")
                for how in (mode, "full-graph")
            )
            if graph and ops_graph:
                line += f"; routing {graph / ms:.1%} of the layer (graphs), torch ops take {ops / eager:.1f}x as long eager, {ops_graph / graph:.1f}x in graphs"
            print(line)
            if routing == "softmax":
                curves[shape._replace(E=0)].append((ms, layer_floor_ms(shape, mode, *machine, itemsize), shape.E))
    for shape, points in curves.items():
        if len(points) > 2:
            best, best_floor = min(ms for ms, _, _ in points), min(floor for _, floor, _ in points)
            share, allowed, E = min((best / ms, best_floor / floor, E) for ms, floor, E in points)
            T, D, F, _, K = shape
            print(
                f"T,D,F,K {T},{D},{F},{K}: slowest at E={E}, {share:.2f} of the best E; the weights' bytes allow {allowed:.2f}"
            )


def main(argv=None):
    cuda = torch.cuda.is_available()
    impl, at = (
        ("triton,grouped_mm", "32768,1024,2048")
        if cuda
        else ("reference,grouped_mm" + ",triton" * interpreting(), "64,32,48")
    )
    parser = arguments(__doc__)
    parser.add_argument(
        "--shapes", nargs="+", type=typed(parse_shape), metavar="T,D,F,E,K", help="default: the six target shapes"
    )
    parser.add_argument("--experts", type=typed(powers), help="such as 8,...,256 (doubling) or 8,24; makes a sweep")
    parser.add_argument("--topk", type=typed(powers), help="such as 1,...,16; makes a sweep")
    parser.add_argument("--at", nargs="+", metavar="T,D,F", default=[at], help="fixed sizes of the sweep")
    parser.add_argument(
        "--impl", type=typed(implementations), default=impl, help="comma-separated, of " + ", ".join(IMPLS)
    )
    parser.add_argument(
        "--peers", type=typed(implementations), default="", help="comma-separated, of " + ", ".join(peers.MODULES)
    )
    routings = typed(lambda text: [parse_routing(word) for word in text.split(",")])
    parser.add_argument(
        "--routing", type=routings, default="softmax", help="comma-separated: softmax, balanced, zipf1.5"
    )
    parser.add_argument("--graph", action="store_true", help="also replay CUDA graphs (ours and gemms)")
    parser.add_argument(
        "--router",
        action="store_true",
        help="also with a linear router and top-k in front (ours: route; the others: torch ops)",
    )
    args, results = begin(parser, argv)
    dtype, failures = DTYPES[args.dtype], []
    shapes = args.shapes or list(TARGETS if cuda else TINY)
    args.sweep = bool(args.experts or args.topk)
    if args.sweep:
        shapes = [
            parse_shape(f"{at},{E},{K}")
            for at in args.at
            for E in args.experts or [64]
            for K in args.topk or [2]
            if K <= E
        ]
        if not shapes:
            parser.error(
                f"nothing to measure: every K of {args.topk or [2]} (--topk) is above every E of {args.experts or [64]} (--experts)"
            )
    for shape in [shape for shape in shapes if not fits(shape, dtype.itemsize)]:
        shapes.remove(shape)
        failures.append(f"{shape}: weights and activations do not fit this GPU")
    args.names = [name for name in args.impl + args.peers if name in IMPLS]
    for name in (name for name in args.impl + args.peers if name in peers.MODULES):
        with skipping(f"peer {name}", failures):
            peers.load(name)
            args.names.append(name)
    args.graph = args.graph and cuda
    if "triton" in args.names:
        start = time.perf_counter()
        codes = precompile([partial(compile_layer, shape, dtype) for shape in shapes])
        print(
            f"compiled ahead in {time.perf_counter() - start:.1f} s"
            + ", not everything: the rest compiles at its first call" * any(codes)
        )
    print(HEADER)
    machine = results.add_ceilings()
    for shape in shapes:
        for routing in args.routing:
            with skipping(f"{shape} {routing}", failures):
                bench_shape(results, args, shape, routing, dtype, failures)
    summary(results.rows, machine, dtype.itemsize)
    return finish(args, results, failures)


if __name__ == "__main__":
    raise SystemExit(cli(main))
