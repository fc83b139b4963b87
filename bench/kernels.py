"""Each kernel of the layer alone: its time, TFLOP/s or GB/s, and the fraction of its own roofline.

    python -m bench.kernels --csv bench/h100.csv                     all kernels at the six target shapes
    python -m bench.kernels --kernel up,dw_in --shapes 32768,2048,768,128,8
    python -m bench.kernels --kernel up --candidates 128x128x64:g8:p2:w8:s4,64x256x64:w4      times other tiles, best first
    python -m bench.kernels --kernel up --candidates default         the candidates listed in this file

A roofline is max(FLOPs / peak, bytes / bandwidth) with the fewest bytes that the kernel can move, and both ceilings measured in the same process
(one cuBLAS product, one copy) unless --ceilings gives them. On a GPU every kernel is replayed from a CUDA graph: launch overhead is not in its time.
A tile is BLOCK_M x BLOCK_N x BLOCK_K and any of g (GROUP_M), p (PARTS), w (num_warps), s (num_stages) or NAME=value; the rest is as in tiles.py,
PARTS such that the parts are as wide. For up and dswiglu that width must divide F and be one and the same.
"""

import re
import time
from functools import cache, cached_property, partial
from itertools import chain
from typing import NamedTuple

import torch

from bench.compare import begin, finish
from bench.problem import (
    BACKWARD,
    TARGETS,
    TINY,
    kernel_costs,
    make_inputs,
    parse_routing,
    parse_shape,
    require_accuracy,
    rms,
    sample,
)
from bench.results import DTYPES, HEADER, arguments, cli, typed
from bench.timing import Ceilings, capture, poisoned, skipping, times_ms
from bench.warm import compile_layer, empty_inputs
from moe_kernels import grouped_gemm as gemm
from moe_kernels import reference
from moe_kernels.dispatch import combine, dispatch
from moe_kernels.precompile import precompile
from moe_kernels.routing import route_bwd, route_fwd
from moe_kernels.tiles import Tile, gemm_tiles, interpreting

GEMMS = ("up", "down", "dswiglu", "dw_out", "dx", "dw_in")
KERNELS = (
    "route_fwd",
    "route_bwd",
    "dispatch",
    "up",
    "down",
    "combine",
    "dswiglu",
    "dw_out",
    "dx",
    "combine_dx",
    "dw_in",
)
CANDIDATES = {
    "up": "128x128x64:s3,128x128x64:s4,128x128x64:g4,128x128x64:g16,64x128x64:w4,128x64x64:w8,128x64x128:s3",
    "dswiglu": "128x256x64:s3,128x256x64:g4,128x256x64:g16,128x128x64,128x128x64:w4,64x256x64:w4",
    **dict.fromkeys(
        ("down", "dx"),
        "128x256x64:s3,128x256x64:s4,128x256x64:g4,128x256x64:g16,128x128x64:w8,128x128x64:w4:s4,64x256x64:w4",
    ),
    **dict.fromkeys(
        ("dw_out", "dw_in"),
        "128x256x64:s3,128x256x64:s4,256x128x64:s4,128x256x32:s5,128x128x64:w8,128x128x64:w4,128x256x64:g8",
    ),
}

LETTERS = {"g": "GROUP_M", "p": "PARTS", "w": "num_warps", "s": "num_stages"}


class Case(NamedTuple):
    run: callable  # (tile) -> tuple of outputs; tile is None for kernels that have none
    expected: callable  # (outputs) -> [(sampled output, its float64 truth)]; integer truths must match exactly


class Cases:
    """The kernels of one shape as Cases, a method each, on inputs of their own made by `new`: torch.randn, or torch.empty to compile only."""

    def __init__(self, shape, inputs, new=torch.randn):
        self.shape, self.inputs = shape, inputs
        self.new = partial(new, device=inputs.x_TD.device, dtype=inputs.x_TD.dtype)
        self.tiles = gemm_tiles(shape.S, shape.E, shape.D, shape.F, inputs.x_TD.dtype)
        self.sorted = cache(lambda block_m: dispatch(inputs.experts_TK, shape.E, block_m))
        self.any_sorted = self.sorted(self.tiles["up"].BLOCK_M)  # for what needs no tile table

    @cached_property
    def sampled(self):
        """(tokens, experts, rows of the experts, their slots, their offsets): with these the twins in reference.py compute a small problem."""
        tokens, experts = sample(self.inputs.experts_TK, self.shape.E)
        offsets = self.any_sorted.offsets.tolist()
        ranges = [range(offsets[e], offsets[e + 1]) for e in experts]
        rows = torch.tensor(list(chain(*ranges)), device=tokens.device, dtype=torch.long)
        return tokens, experts, rows, self.any_sorted.row_slot_S[rows], torch.tensor([0, *map(len, ranges)]).cumsum(0)

    def rows(self, *tensors):
        return [t[self.sampled[2]].double() for t in tensors]

    def weights(self, w):
        return w[self.sampled[1]].double()

    def route_fwd(self):
        logits, K = self.inputs.logits_TE.to(self.inputs.x_TD.dtype), self.shape.K
        return Case(
            lambda _: route_fwd(logits, None, K, False, True),
            lambda out: zip(out, reference.route(logits.double(), K), strict=True),
        )

    def route_bwd(self):
        leaf = self.inputs.logits_TE.to(self.inputs.x_TD.dtype).double().requires_grad_()
        gates, experts, _, probs, z = reference.route(leaf, self.shape.K)
        grads = [torch.randn_like(t) for t in (gates, probs, z)]
        want = torch.autograd.grad((gates, probs, z), leaf, grads)
        args = (
            leaf.detach().to(self.inputs.x_TD.dtype),
            experts,
            gates.detach().float(),
            *(t.float() for t in grads),
            False,
            True,
        )
        return Case(lambda _: (route_bwd(*args),), lambda out: zip(out, want, strict=True))

    def dispatch(self):
        experts, E, block_m = self.inputs.experts_TK, self.shape.E, self.tiles["up"].BLOCK_M
        return Case(
            lambda _: dispatch(experts, E, block_m),
            lambda out: zip(out[:3], reference.dispatch(experts, E), strict=True),
        )

    def combine(self):
        y, places, gates = self.new(self.shape.S, self.shape.D), self.any_sorted.slot_row_TK, self.inputs.gates_TK
        return Case(lambda _: combine(y, places, gates)[:1], lambda out: [self.tokens_sum(out[0], y, places, gates)])

    def combine_dx(self):
        y, places = self.new(self.shape.S, self.shape.D), self.any_sorted.slot_row_TK
        parts = self.new(-(-self.shape.F // self.tiles["dswiglu"].BLOCK_N), self.shape.S).float()

        def expected(out):
            tokens = self.sampled[0]
            return [self.tokens_sum(out[0], y, places), (out[1][tokens], parts.double().sum(0)[places[tokens].long()])]

        return Case(lambda _: combine(y, places, dgates_parts=parts), expected)

    def tokens_sum(self, out, y, places, gates=None):
        tokens = self.sampled[0]
        flat = torch.arange(len(tokens) * self.shape.K, device=y.device).view(-1, self.shape.K)
        return out[tokens], reference.combine(
            y[places[tokens].flatten()].double(), flat, gates if gates is None else gates[tokens].double()
        )

    def up(self):
        x, w = self.inputs.x_TD, self.inputs.w_in_EGD
        twin = lambda: reference.up(x.double(), self.weights(w), *self.sampled[3:], self.shape.K)  # noqa: E731
        return Case(
            lambda tile: gemm.up(x, w, self.sorted(tile.BLOCK_M), tile),
            lambda out: zip(self.rows(gemm.to_rows(out[0]), out[1]), twin(), strict=True),
        )

    def down(self):
        a, w = self.new(self.shape.S, self.shape.F), self.inputs.w_out_EDF
        twin = lambda: reference.down(*self.rows(a), self.weights(w), self.sampled[4])  # noqa: E731
        return Case(
            lambda tile: (gemm.down(a, w, self.sorted(tile.BLOCK_M), tile),), lambda out: [(*self.rows(*out), twin())]
        )

    def dswiglu(self):
        dy, w, gates = self.inputs.dy_TD, self.inputs.w_out_EDF, self.inputs.gates_TK
        h = self.new(*gemm.panels(self.shape.S, self.shape.F, self.tiles["dswiglu"]))
        twin = lambda: reference.dswiglu(
            dy.double(), self.weights(w), *self.rows(gemm.to_rows(h)), gates.double(), *self.sampled[3:]
        )  # noqa: E731
        return Case(
            lambda tile: gemm.dswiglu(dy, w, h, gates, self.sorted(tile.BLOCK_M), tile),
            lambda out: zip(self.rows(*out[:2], out[2].double().sum(0)), twin(), strict=True),
        )

    def dx(self):
        dh, w = self.new(self.shape.S, 2 * self.shape.F), self.inputs.w_in_EGD
        twin = lambda: reference.dx(*self.rows(dh), self.weights(w), self.sampled[4])  # noqa: E731
        return Case(
            lambda tile: (gemm.dx(dh, w, self.sorted(tile.BLOCK_M), tile),), lambda out: [(*self.rows(*out), twin())]
        )

    def dw_in(self):
        dh, x = self.new(self.shape.S, 2 * self.shape.F), self.inputs.x_TD
        twin = lambda: reference.dw_in(*self.rows(dh), x.double(), *self.sampled[3:], self.shape.K)  # noqa: E731
        return Case(
            lambda tile: (gemm.dw(x, dh, True, self.any_sorted, tile),), lambda out: [(out[0][self.sampled[1]], twin())]
        )

    def dw_out(self):
        dy, ga = self.inputs.dy_TD, self.new(self.shape.S, self.shape.F)
        twin = lambda: reference.dw_out(dy.double(), *self.rows(ga), *self.sampled[3:], self.shape.K)  # noqa: E731
        return Case(
            lambda tile: (gemm.dw(dy, ga, False, self.any_sorted, tile),),
            lambda out: [(out[0][self.sampled[1]], twin())],
        )


def check(case, outputs, dtype):
    """The worst RMS ratio of the sampled outputs; ValueError when one is wrong."""
    errors = {}
    for i, (got, want) in enumerate(case.expected(outputs)):
        if want.is_floating_point():
            errors[f"output {i}"] = rms(got, want)
        elif not torch.equal(got.long(), want.long()):
            raise ValueError(f"wrong result: output {i} ({got.dtype}) differs from the reference")
    return require_accuracy(errors, dtype) if errors else 0.0


def timed(case, tile, dtype):
    """(Times, RMS error) of one kernel, checked first."""
    with poisoned():
        outputs = case.run(tile)
    error = check(case, outputs, dtype)
    run = partial(case.run, tile)
    if torch.cuda.is_available():
        run, outputs = capture(run)
        check(case, outputs, dtype)
    return times_ms(run, budget_ms=150), error


def parse_tile(text, base):
    """ "128x256x64:g8:p2:w8:s4" as a tile; what it leaves out is as in `base`, PARTS by their width. ValueError for anything else."""
    blocks, *options = text.split(":")
    if not re.fullmatch(r"\d+x\d+x\d+", blocks):
        raise ValueError(f"tile {text!r}: expected BLOCK_MxBLOCK_NxBLOCK_K:g8:p2:w8:s4")
    values = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), map(int, blocks.split("x")), strict=True))
    values["PARTS"] = max(1, values["BLOCK_N"] * base.PARTS // base.BLOCK_N)
    for option in options:
        name, value = re.fullmatch(r"(.*?)=?(\d*)", option).groups()
        if not value or LETTERS.get(name, name) not in Tile._fields:
            known = ", ".join(f"{letter} ({field})" for letter, field in LETTERS.items())
            raise ValueError(f"tile {text!r}: {option!r} is not understood; expected one of {known} and a number")
        values[LETTERS.get(name, name)] = int(value)
    tile = base._replace(**values)
    doubling = *tile[:3], tile.PARTS, tile.num_warps
    if min(tile) < 1 or any(n & (n - 1) for n in doubling) or tile.PARTS > tile.BLOCK_N:
        raise ValueError(
            f"tile {text!r}: blocks, PARTS ({tile.PARTS}) and num_warps must be powers of two, the others at least 1, PARTS at most BLOCK_N"
        )
    return tile


def parse_ceilings(text):
    """ "798,3.0" as Ceilings; ValueError for anything else."""
    numbers = [float(word) for word in text.split(",")] if re.fullmatch(r"\d+(\.\d+)?,\d+(\.\d+)?", text) else []
    if not numbers or 0 in numbers:
        raise ValueError(f"{text!r}: expected TFLOP/s and TB/s such as 798,3.0")
    return Ceilings(*numbers)


def resources(run):
    """(registers, spilled bytes, shared memory) of the largest kernel that run() launches."""
    from triton.runtime.jit import JITFunction

    launched, original = [], JITFunction.run

    def record(kernel, *args, **kwargs):
        launched.append(original(kernel, *args, **kwargs))
        return launched[-1]

    JITFunction.run = record
    try:
        run()
    finally:
        JITFunction.run = original
    return max(((kernel.n_regs, kernel.n_spills, kernel.metadata.shared) for kernel in launched), default=(0, 0, 0))


def compare_tiles(shape, dtype, device, names, candidates, routing, machine, failures):
    """Prints the candidates of each kernel as they are timed and once more from fastest to slowest. The tile of today comes first and last:
    the difference between the two is noise."""
    today, jobs = gemm_tiles(shape.S, shape.E, shape.D, shape.F, dtype), []
    for name in names:
        texts = (CANDIDATES[name] if candidates == "default" else candidates).split(",")
        tiles = dict.fromkeys([today[name], *(parse_tile(text, today[name]) for text in texts)])
        jobs += [(name, tile) for tile in (*tiles, today[name])]
    start = time.perf_counter()
    codes = precompile(
        [
            lambda job=job: getattr(Cases(shape, empty_inputs(shape, dtype), torch.empty), job[0])().run(job[1])
            for job in jobs
        ]
    )
    print(f"{shape}: {len(jobs)} candidates compiled ahead in {time.perf_counter() - start:.1f} s")
    cases, costs, table = (
        Cases(shape, make_inputs(shape, dtype, device, routing)),
        kernel_costs(shape, dtype.itemsize),
        [],
    )
    for (name, tile), code in zip(jobs, codes, strict=True):
        label = "x".join(map(str, tile[:3])) + "".join(
            f" {field}={value}" for field, value in list(tile._asdict().items())[3:]
        )
        with skipping(f"{name} {label}", failures):
            if code < 0:
                raise RuntimeError(f"the compiler crashed (signal {-code})")
            case = getattr(cases, name)()
            times, error = timed(case, tile, dtype)
            text = f"{name:<8}{label:<64}{times.p50:>9.4f} ms ({times.p20:.4f}-{times.p80:.4f})"
            if device == "cuda":  # the interpreter has no registers, and its speed means nothing
                regs, spills, shared = resources(partial(case.run, tile))
                text += f"{costs[name].flops / times.p50 * 1e-9:>7.0f} TF {costs[name].floor_ms(*machine) / times.p50:>6.1%}"
                text += f"  regs {regs:>3}  spills {spills:>4}  shared {shared:>6}"
            text += f"  error {error:.1e}" + "  <- today" * (tile == today[name])
            table.append((names.index(name), times.p50, text))
            print(text, flush=True)
    print("\nFastest first:")
    for *_, text in sorted(table):
        print(text)


def main(argv=None):
    cuda = torch.cuda.is_available()
    parser = arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", type=typed(parse_shape), metavar="T,D,F,E,K", default=None)
    parser.add_argument("--kernel", default="", help="comma-separated, of " + ", ".join(KERNELS))
    parser.add_argument(
        "--candidates", help="comma-separated tiles to time (only six GEMM kernels have tiles), or default"
    )
    parser.add_argument("--routing", type=typed(parse_routing), default="softmax", help="softmax, balanced or zipf1.5")
    parser.add_argument(
        "--ceilings", type=typed(parse_ceilings), metavar="TFLOPS,TB_S", help="such as 798,3.0; default: measured here"
    )
    args, results = begin(parser, argv)
    dtype, device, failures = DTYPES[args.dtype], "cuda" if cuda else "cpu", []
    shapes = args.shapes or (TARGETS[:1] if args.candidates else TARGETS) if cuda else args.shapes or TINY
    known = GEMMS if args.candidates else KERNELS
    names = [name for name in args.kernel.split(",") if name] or list(known)
    if unknown := set(names) - set(known):
        parser.error(f"--kernel {','.join(unknown)}: known here are {', '.join(known)}")
    if not cuda and not interpreting():
        print("Triton kernels need a GPU: set TRITON_INTERPRET=1 to run them in its interpreter.")
        return 0
    print(HEADER)
    machine = args.ceilings or results.add_ceilings()
    if args.candidates:
        for shape in shapes:
            compare_tiles(shape, dtype, device, names, args.candidates, args.routing, machine, failures)
        return 0
    precompile([partial(compile_layer, shape, dtype) for shape in shapes])
    for shape in shapes:
        with skipping(f"{shape}", failures):
            cases, costs = (
                Cases(shape, make_inputs(shape, dtype, device, args.routing)),
                kernel_costs(shape, dtype.itemsize),
            )
            for name in names:
                with skipping(f"{shape} {name}", failures):
                    times, error = timed(getattr(cases, name)(), cases.tiles.get(name), dtype)
                    mode = ("backward" if name in ("route_bwd", *BACKWARD) else "forward") + "-graph" * cuda
                    floor = costs[name].floor_ms(*machine)
                    results.add(
                        name,
                        "triton",
                        mode,
                        shape,
                        times,
                        costs[name],
                        args.routing,
                        floor,
                        note=f"RMS error {error:.1e}",
                    )
    return finish(args, results, failures)


if __name__ == "__main__":
    raise SystemExit(cli(main))
