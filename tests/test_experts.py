"""The expert layer and each of its GEMM kernels against float64: python -m pytest tests/test_experts.py (GPU where
there is one)."""

import contextlib

import pytest
import torch

from moe_kernels import ACTIVATIONS, moe_experts, reference, route
from moe_kernels import grouped_gemm as gemm
from moe_kernels.dispatch import dispatch
from moe_kernels.experts import experts_op, side_stream
from moe_kernels.tiles import gemm_tiles
from tests.checks import BOUNDS, DTYPES, ON_GPU, check, problem, rms_ratio, to_rows

SMALL = [(37, 48, 32, 4, 2), (9, 16, 80, 8, 3), (1, 16, 16, 1, 1), (0, 16, 16, 2, 1)]
LARGE = [
    (1000, 48, 80, 7, 3),
    (513, 128, 256, 256, 16),
    (2000, 256, 128, 8, 8),
    (1500, 144, 80, 3, 2),
    (4096, 512, 256, 64, 4),
]
NAMES = ("x", "w_in", "w_out", "gates")


def run(impl, inputs, dy, activation="swiglu"):
    leaves = [t.clone().requires_grad_() for t in inputs[:4]]
    y = moe_experts(*leaves, inputs[4], impl, activation)
    return y, torch.autograd.grad(y, leaves, dy)


def run_truth(inputs, dy, activation="swiglu"):
    return run("reference", (*(t.double() for t in inputs[:4]), inputs[4]), dy.double(), activation)


def compare(got, truth, bound):
    check(got[0], truth[0], bound, "y")
    for name, a, b in zip(NAMES, got[1], truth[1], strict=True):
        check(a, b, bound, f"gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T,D,F,E,K", SMALL + LARGE if ON_GPU else SMALL)
def test_triton_matches_float64(T, D, F, E, K, dtype, device, poison):
    inputs = problem(T, D, F, E, K, dtype, device)
    dy = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    compare(run("triton", inputs, dy), run_truth(inputs, dy), BOUNDS[dtype])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("impl", ["triton", "grouped_mm"])
def test_every_activation_matches_float64(impl, activation, device, poison):
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    inputs = problem(37, 48, 80, 4, 2, dtype, device)
    dy = torch.randn(37, 48, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    got, truth = run(impl, inputs, dy, activation), run_truth(inputs, dy, activation)
    compare(got, truth, BOUNDS[dtype] if impl == "triton" else 2 * BOUNDS[dtype])
    other = run_truth(inputs, dy, "geglu" if activation == "swiglu" else "swiglu")
    assert rms_ratio(got[0], other[0]) > 0.02  # the check can fail


@pytest.mark.parametrize("impl", ["triton", "grouped_mm", "reference"])
def test_a_summand_is_added(impl, device, poison):
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    inputs = problem(37, 48, 32, 4, 2, dtype, device)
    add, dy = (torch.randn(37, 48, device=device).to(dtype) for _ in range(2))
    leaves = [t.requires_grad_() for t in (*inputs[:4], add)]
    y = moe_experts(*leaves[:4], inputs[4], impl, add_TD=add)
    *grads, dadd = torch.autograd.grad(y, leaves, dy)
    alone = run(impl, inputs, dy)
    check(y, run_truth(inputs, dy)[0] + add, BOUNDS[dtype], "y")
    assert torch.equal(dadd, dy) and all(map(torch.equal, grads, alone[1]))


@pytest.mark.parametrize("routing", ["one", "hole"])
def test_uneven_routing(routing, device, poison):
    inputs = problem(40, 32, 16, 5, 2, torch.float32, device, routing)
    dy = torch.randn(40, 32, device=device)
    got = run("triton", inputs, dy)
    compare(got, run_truth(inputs, dy), BOUNDS[torch.float32])
    idle = 4 if routing == "one" else 0  # an expert without tokens: zeros, not garbage
    assert got[1][1][idle].abs().max() == 0 and got[1][2][idle].abs().max() == 0


@pytest.mark.skipif(ON_GPU, reason="on the GPU grouped_mm takes bfloat16 only: see test_grouped_mm_on_gpu")
def test_grouped_mm_composition_matches_float64():
    inputs = problem(37, 48, 32, 4, 2, torch.float32, "cpu")
    dy = torch.randn(37, 48)
    compare(run("grouped_mm", inputs, dy), run_truth(inputs, dy), BOUNDS[torch.float32])


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_grouped_mm_on_gpu():
    inputs = problem(600, 64, 128, 8, 2, torch.bfloat16, "cuda")
    dy = torch.randn(600, 64, device="cuda", dtype=torch.bfloat16)
    # It rounds more often: gates and activations pass through bfloat16.
    compare(run("grouped_mm", inputs, dy), run_truth(inputs, dy), 1e-2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, DTYPES[-1]])
def test_each_gemm_against_its_twin(dtype, activation, device, poison):
    T, D, F, E, K = 40, 48, 80, 6, 2
    x, w_in, w_out, gates, experts = problem(T, D, F, E, K, dtype, device, "hole")
    dy = torch.randn(T, D, device=device).to(dtype)
    tiles = gemm_tiles(T * K, E, D, F, dtype)
    d = dispatch(experts, E, tiles["up"].BLOCK_M)
    offsets, row_slot, _ = reference.dispatch(experts, E)
    wide = lambda *tensors: (t.double() for t in tensors)
    h, a = gemm.up(x, w_in, d, tiles["up"], activation)
    true_h, true_a = reference.up(*wide(x, w_in), row_slot, offsets, K, activation)
    dh, ga, parts = gemm.dswiglu(dy, w_out, h, gates, d, tiles["dswiglu"], activation)
    h_SG = to_rows(h)
    true_dh, true_ga, true_dgates = reference.dswiglu(*wide(dy, w_out, h_SG, gates), row_slot, offsets, activation)
    pairs = {
        "h": (h_SG, true_h),
        "a": (a, true_a),
        "y": (gemm.down(a, w_out, d, tiles["down"]), reference.down(*wide(a, w_out), offsets)),
        "dh": (dh, true_dh),
        "ga": (ga, true_ga),
        "dgates": (parts.sum(0), true_dgates),
        "dx": (gemm.dx(dh, w_in, d, tiles["dx"]), reference.dx(*wide(dh, w_in), offsets)),
        "dw_in": (gemm.dw(x, dh, True, d, tiles["dw_in"]), reference.dw(*wide(x, dh), True, row_slot, offsets, K)),
        "dw_out": (
            gemm.dw(dy, ga, False, d, tiles["dw_out"]),
            reference.dw(*wide(dy, ga), False, row_slot, offsets, K),
        ),
    }
    for name, (result, truth) in pairs.items():
        check(result, truth, BOUNDS[dtype], name)


@pytest.mark.parametrize("rows", [8, 10_000])
@pytest.mark.parametrize("D,F", [(48, 16), (144, 80), (144, 96), (272, 144)])
def test_the_tiles_of_a_gpu(D, F, rows, device, poison, monkeypatch):
    """Both families of tiles, by rows per expert, at widths that are less than a tile or no multiple of it; the
    interpreter's own are small squares."""
    monkeypatch.setattr("moe_kernels.tiles.interpreting", lambda: False)
    T, E, K = 40, 6, 2
    x, w_in, w_out, gates, experts = problem(T, D, F, E, K, torch.float16, device, "hole")
    tiles = gemm_tiles(rows * E, E, D, F, torch.float16)
    assert tiles["dw_in"].BLOCK_K == (16 if rows == 8 else 64)
    d, (offsets, row_slot, _) = dispatch(experts, E, tiles["up"].BLOCK_M), reference.dispatch(experts, E)
    g = torch.Generator().manual_seed(2)
    dy, dh, ga = (
        torch.randn(n, m, generator=g).to(device, torch.float16) for n, m in ((T, D), (T * K, 2 * F), (T * K, F))
    )
    h, a = gemm.up(x, w_in, d, tiles["up"])
    backward = gemm.dswiglu(dy, w_out, h, gates, d, tiles["dswiglu"])
    truths = (
        reference.up(x.double(), w_in.double(), row_slot, offsets, K),
        reference.dswiglu(dy.double(), w_out.double(), to_rows(h).double(), gates.double(), row_slot, offsets),
        (
            reference.dw(x.double(), dh.double(), True, row_slot, offsets, K),
            reference.dw(x.double(), ga.double(), False, row_slot, offsets, K),
        ),
    )
    weights = gemm.dw(x, dh, True, d, tiles["dw_in"]), gemm.dw(x, ga, False, d, tiles["dw_out"])
    results = (to_rows(h), a), (*backward[:2], backward[2].sum(0)), weights
    for names, got, want in zip(("h a", "dh ga dgates", "dw_in dw_out"), results, truths, strict=True):
        for name, result, truth in zip(names.split(), got, want, strict=True):
            check(result, truth, BOUNDS[torch.float16], name)


def test_panels_that_do_not_fit_are_refused(device):
    T, D, F, E, K = 8, 32, 80, 2, 1
    x, w_in, w_out, gates, experts = problem(T, D, F, E, K, torch.float32, device)
    tile = gemm_tiles(T * K, E, D, F, torch.float32)["up"]
    d = dispatch(experts, E, tile.BLOCK_M)
    h = torch.zeros(gemm.panels(T * K, F, tile), device=device)
    with pytest.raises(ValueError, match="must be that of up's tile"):
        gemm.dswiglu(x, w_out, h, gates, d, tile._replace(PARTS=2 * tile.PARTS))
    with pytest.raises(ValueError, match="must divide it"):  # else the last panel would be written past its end
        gemm.up(x, w_in, d, tile._replace(BLOCK_N=64, PARTS=1))


def test_reference_is_the_formula():
    """All experts on all tokens, weighted by gates scattered over the experts: slow and without any sorting."""
    x, w_in, w_out, gates, experts = problem(30, 32, 16, 5, 2, torch.float64, "cpu")
    gates = gates.double()
    h = torch.einsum("td,egd->teg", x, w_in)
    a = torch.nn.functional.silu(h[..., :16]) * h[..., 16:]
    weights = torch.zeros(30, 5, dtype=torch.float64).scatter(1, experts.long(), gates)
    check(
        moe_experts(x, w_in, w_out, gates, experts, impl="reference"),
        torch.einsum("tef,edf,te->td", a, w_out, weights),
        1e-12,
    )


def test_reference_twins_compose_to_autograd():
    """The twins are the truth for the kernels, so they must themselves agree with autograd of the layer."""
    T, D, F, E, K = 30, 32, 16, 5, 2
    inputs = problem(T, D, F, E, K, torch.float64, "cpu")
    x, w_in, w_out, gates, experts = (t.double() if t.is_floating_point() else t for t in inputs)
    dy = torch.randn(T, D, dtype=torch.float64)
    offsets, row_slot, slot_row = reference.dispatch(experts, E)
    h, a = reference.up(x, w_in, row_slot, offsets, K)
    dh, ga, dgates = reference.dswiglu(dy, w_out, h, gates, row_slot, offsets)
    got = (
        reference.combine(reference.down(a, w_out, offsets), slot_row, gates),
        (
            reference.combine(reference.dx(dh, w_in, offsets), slot_row),
            reference.dw(x, dh, True, row_slot, offsets, K),
            reference.dw(dy, ga, False, row_slot, offsets, K),
            dgates[slot_row.long()],
        ),
    )
    compare(got, run_truth((x, w_in, w_out, gates, experts), dy), 1e-12)


def test_same_inputs_same_bits(device):
    inputs = problem(100, 32, 48, 6, 3, DTYPES[-1], device)
    dy = torch.randn(100, 32, device=device).to(DTYPES[-1])
    first, second = run("triton", inputs, dy), run("triton", inputs, dy)
    assert torch.equal(first[0], second[0]) and all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_non_contiguous_inputs_and_expanded_gradient(device):
    x, w_in, w_out, gates, experts = problem(24, 32, 16, 4, 2, torch.float32, device)
    strided = [t.mT.contiguous().mT for t in (x, w_in, w_out, gates)]
    misaligned = torch.empty(x.numel() + 1, device=device)[1:].view_as(x).copy_(x)
    truth = run_truth((x, w_in, w_out, gates, experts), torch.ones(24, 32, device=device))
    for leaves in (strided, [misaligned, *strided[1:]]):
        leaves = [t.detach().requires_grad_() for t in leaves]
        y = moe_experts(*leaves, experts.T.contiguous().T, impl="triton")
        y.sum().backward()  # a gradient of stride zero
        compare((y, [t.grad for t in leaves]), truth, BOUNDS[torch.float32])


def test_saved_memory_is_x_and_pre_activation(device):
    T, D, F, E, K = (4096, 512, 256, 32, 4) if ON_GPU else (256, 64, 64, 4, 2)
    inputs = problem(T, D, F, E, K, torch.float32, device)
    leaves = [t.requires_grad_() for t in inputs[:4]]
    sizes = {}

    def pack(t):
        if t.data_ptr() not in {leaf.data_ptr() for leaf in leaves[1:3]}:  # the weights are kept anyway
            sizes[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        moe_experts(*leaves, inputs[4], impl="triton")
    budget = 4 * (T * D + T * K * 2 * F)
    assert budget <= sum(sizes.values()) <= 1.03 * budget + 16 * T * K


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_past_two_to_the_31_elements():
    T, D, F, E, K = 70_000, 256, 2048, 9, 8  # the pre-activation has 2.3e9 elements
    x, w_in, w_out, gates, experts = problem(T, D, F, E, K, torch.bfloat16, "cuda")
    dy = torch.randn(T, D, device="cuda", dtype=torch.bfloat16)
    y, grads = run("triton", (x, w_in, w_out, gates, experts), dy)
    tail = slice(T - 300, T)
    ty, tgrads = run_truth((x[tail], w_in, w_out, gates[tail], experts[tail]), dy[tail])
    check(y[tail], ty, BOUNDS[torch.bfloat16], "y")
    check(grads[0][tail], tgrads[0], BOUNDS[torch.bfloat16], "gradient of x")
    check(grads[3][tail], tgrads[3], BOUNDS[torch.bfloat16], "gradient of gates")


def test_fullgraph_compile_and_opcheck(device):
    x, w_in, w_out, gates, experts = problem(24, 32, 16, 4, 2, torch.float32, device)
    leaves = [t.requires_grad_() for t in (x, w_in, w_out, gates)]
    torch.library.opcheck(experts_op, (*leaves, experts))
    torch.library.opcheck(experts_op, (*leaves, experts, "geglu", x.detach().clone().requires_grad_()))
    logits = torch.randn(24, 4, device=device, requires_grad=True)

    def layer(logits, x, w_in, w_out):
        r = route(logits, 2, impl="triton")
        return moe_experts(x, w_in, w_out, r.gates_TK, r.experts_TK, impl="triton") * r.z

    args = (logits, *leaves[:3])
    eager = layer(*args)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(*args)
    assert torch.equal(eager, compiled)
    for a, b in zip(torch.autograd.grad(eager.sum(), args), torch.autograd.grad(compiled.sum(), args), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("T", [300, 100])  # with 100 tokens, 25 rows per expert, dx runs on a second stream
def test_cuda_graph_capture_follows_new_routing(T, monkeypatch):
    inputs = problem(T, 64, 48, 8, 2, torch.bfloat16, "cuda")
    dy = torch.randn(T, 64, device="cuda", dtype=torch.bfloat16)
    run("triton", inputs, dy)  # compile outside the capture
    graph, asked = torch.cuda.CUDAGraph(), []
    monkeypatch.setattr("moe_kernels.experts.side_stream", lambda main: asked.append(main) or side_stream(main))
    with torch.cuda.graph(graph):
        captured = run("triton", inputs, dy)
    assert len(asked) == (T == 100)
    other = problem(T, 64, 48, 8, 2, torch.bfloat16, "cuda", "hole", seed=5)
    for static, new in zip(inputs, other, strict=True):
        static.copy_(new)
    graph.replay()
    fresh = run("triton", other, dy)
    assert torch.equal(captured[0], fresh[0]) and all(
        torch.equal(a, b) for a, b in zip(captured[1], fresh[1], strict=True)
    )


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_branches_of_a_graph_do_not_meet(monkeypatch):
    """Two branches, each with the other's stream as its second one: the most unlucky of what torch's pool of streams
    may give."""
    inputs = [problem(100, 64, 48, 8, 2, torch.bfloat16, "cuda", seed=seed) for seed in range(2)]
    dy = torch.randn(100, 64, device="cuda", dtype=torch.bfloat16)
    alone, streams, captured = [run("triton", each, dy) for each in inputs], [torch.cuda.Stream() for _ in inputs], []
    monkeypatch.setattr("moe_kernels.experts.side_stream", lambda main: streams[1 - streams.index(main)])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        start = torch.cuda.current_stream()
        for each, stream in zip(inputs, streams, strict=True):
            stream.wait_stream(start)
            with torch.cuda.stream(stream):
                y, grads = run("triton", each, dy)
                # Freed, the originals are the next branch's to overwrite.
                captured.append((y, [grad.clone() for grad in grads]))
                del y, grads
        for stream in streams:
            start.wait_stream(stream)
    for _ in range(10):
        graph.replay()
        for (y, grads), (true_y, true_grads) in zip(captured, alone, strict=True):
            assert torch.equal(y, true_y) and all(torch.equal(a, b) for a, b in zip(grads, true_grads, strict=True))


@pytest.mark.skipif(ON_GPU, reason="stands in for streams")
def test_results_are_not_memory_of_the_side_stream(monkeypatch):
    """Nothing records for the allocator that the main stream reads them. And the two streams wait for each other,
    around all that the side one does."""
    events, on_side, theirs = [], [], []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def enter(stream):
        on_side.append(stream.name)
        yield
        on_side.pop()

    def watched(make, *args, **kwargs):
        t = make(*args, **kwargs)
        if on_side and t.numel():  # the interpreter makes views of empty tensors
            events.append("side allocates")
            theirs.append(t)
        return t

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        make = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, _make=make, **kwargs: watched(_make, *args, **kwargs))
    monkeypatch.setattr(torch.cuda, "stream", enter)
    monkeypatch.setattr("moe_kernels.experts.captured_stream", lambda tensor: Stream("main"))
    monkeypatch.setattr("moe_kernels.experts.side_stream", lambda main: Stream("side"))
    inputs, dy = problem(24, 32, 16, 4, 2, torch.float32, "cpu"), torch.randn(24, 32)
    got = run("triton", inputs, dy)
    assert events[0] == "side waits for main" and events[-1] == "main waits for side"
    assert set(events[1:-1]) == {"side allocates"}
    assert not {t.data_ptr() for t in theirs} & {t.data_ptr() for t in got[1]}
    compare(got, run_truth(inputs, dy), BOUNDS[torch.float32])


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(D=24), "multiples of 16"),
        (dict(F=8), "multiples of 16"),
        (dict(w_in=torch.zeros(4, 30, 32)), "w_in"),
        (dict(gates=torch.zeros(5, 2)), "gates"),
        (dict(F=0), "multiples of 16"),
        (dict(gates=torch.ones(24, 2, dtype=torch.complex64)), "gates .*complex64.*: expected floats"),
        (dict(experts=torch.zeros(24, 2)), "integers"),
        (dict(experts=torch.zeros(24, 2, dtype=torch.complex64)), "integers"),
        (dict(experts=torch.arange(48).view(24, 2) % 5, impl="grouped_mm"), r"ids from 0 to 4: .* in 0\.\.3"),
        (dict(experts=torch.arange(48).view(24, 2) % 4 - 1, impl="reference"), r"ids from -1 to 2: .* in 0\.\.3"),
        (dict(x=torch.zeros(24, 32, dtype=torch.float16)), "floating dtype"),
        (dict(impl="fast"), "fast"),
        (dict(add_TD=torch.zeros(23, 32)), r"add \(23, 32\) torch.float32: expected one shape and dtype"),
        (dict(add_TD=torch.zeros(24, 32, dtype=torch.float16)), r"add .*float16: expected one shape and dtype"),
        (dict(activation="tanh"), "activation='tanh': expected one of swiglu, geglu"),
    ],
)
def test_bad_arguments_are_named(change, message):
    D, F = change.pop("D", 32), change.pop("F", 16)
    names = ("x", "w_in", "w_out", "gates", "experts")
    arguments = dict(zip(names, problem(24, D, F, 4, 2, torch.float32, "cpu"), strict=True)) | change
    options = {name: arguments.pop(name) for name in ("impl", "activation", "add_TD") if name in arguments}
    with pytest.raises(ValueError, match=message):
        moe_experts(*arguments.values(), **options)


@pytest.mark.parametrize("impl", ["reference", "grouped_mm", "triton"])
def test_weights_of_any_strides(impl, device):
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    x, w_in, w_out, gates, ids = problem(24, 32, 16, 4, 2, dtype, device)
    spread = [torch.stack([w, w], -1)[..., 0] for w in (w_in, w_out)] + [w.mT.contiguous().mT for w in (w_in, w_out)]
    expected = moe_experts(x, w_in, w_out, gates, ids, impl)
    for i in (0, 2):
        assert torch.equal(moe_experts(x, *spread[i : i + 2], gates, ids, impl), expected)


def test_triton_without_gpu_or_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="impl='reference'"):
        moe_experts(*problem(4, 16, 16, 2, 1, torch.float32, "cpu"), impl="triton")


def test_the_check_can_fail(device):
    inputs = problem(40, 32, 16, 4, 2, torch.float32, device)
    dy = torch.randn(40, 32, device=device)
    y, grads = run("triton", inputs, dy)
    truth = run_truth(inputs, dy)
    zeroed = y, [torch.zeros_like(g) for g in grads]
    permuted = y.roll(1, 0), grads
    swapped = y, [grads[0], grads[1].roll(16, 1), *grads[2:]]  # gate and up rows exchanged
    missing = y, [grads[0] * float("nan"), *grads[1:]]
    for wrong in (zeroed, permuted, swapped, missing):
        with pytest.raises(AssertionError, match="error ratio"):
            compare(wrong, truth, BOUNDS[torch.float32])
    assert rms_ratio(y, truth[0]) <= BOUNDS[torch.float32]
