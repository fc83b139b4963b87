"""What every public op promises: its dtypes and values under any autocast, torch.compile of the whole op, and a life
without triton."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import moe_kernels as mk
from model import ModelConfig, rope_tables
from moe_kernels import language, tiles
from moe_kernels.muon import muon_update
from moe_kernels.tiles import pick_impl
from tests.checks import ON_GPU, check, problem

DEVICE = "cuda" if ON_GPU else "cpu"
ROOT = Path(__file__).parent.parent
IMPLS = ["reference", "grouped_mm", "triton"]


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def experts(dtype, impl, activation="swiglu"):
    *floats, ids = problem(24, 32, 16, 4, 2, dtype, DEVICE)
    return partial(call_experts, ids, impl, activation), floats


def call_experts(ids, impl, activation, x, w_in, w_out, gates):
    return mk.moe_experts(x, w_in, w_out, gates, ids, impl, activation)


def experts_and_residual(dtype, impl):
    *floats, ids = problem(24, 32, 16, 4, 2, dtype, DEVICE)
    call = lambda add, *floats: mk.moe_experts(*floats, ids, impl, add_TD=add)
    return call, [random(24, 32).to(DEVICE, dtype), *floats]


def norm(dtype, impl):
    call = lambda *tensors: mk.add_rms_norm(*tensors, impl=impl, uses=2)
    return call, [random(12, 32).to(dtype), random(12, 32, seed=2).to(dtype), random(32, seed=3)]


def route(dtype, impl, score="softmax"):
    def call(logits):
        r = mk.route(logits, 2, score, impl=impl)
        return r.gates_TK, r.probs_E, r.z, mk.balance_loss(r.counts_E, r.probs_E)

    return call, [random(12, 8).to(dtype)]


def gates(dtype, impl):
    chosen = torch.arange(24, device=DEVICE).view(12, 2) % 8
    return lambda logits: mk.gates_of(logits, chosen), [random(12, 8).to(dtype)]


def loss(dtype, impl):
    targets = torch.arange(-1, 11, device=DEVICE)
    return (lambda x, w: mk.linear_cross_entropy(x, w, targets, impl=impl)), [random(12, 16).to(dtype), random(40, 16)]


def gated(dtype, impl, activation="swiglu"):
    return (lambda h: mk.gated_activation(h, activation, impl)), [random(12, 32).to(dtype)]


def rope(dtype, impl):
    cos, sin = (t.to(DEVICE) for t in rope_tables(ModelConfig(seq_len=9, head_dim=8)))
    call = lambda qkv, *weights: mk.rope(qkv, cos, sin, 4, *weights, impl=impl)
    return call, [t.to(dtype) for t in (random(2, 9, 8, 8), random(8), random(8, seed=2))]


OPS = {
    "route": route,
    "route sigmoid": partial(route, score="sigmoid"),
    "gates_of": gates,
    "linear_cross_entropy": loss,
    "rope": rope,
    "add_rms_norm": norm,
    "experts and residual": experts_and_residual,
    **{f"experts {name}": partial(experts, activation=name) for name in mk.ACTIVATIONS},
    **{f"gated {name}": partial(gated, activation=name) for name in mk.ACTIVATIONS},
}


def impls_of(op):
    """Only the experts have a grouped_mm of their own; neither autocast nor compilation depends on a kernel's
    activation; gates_of has no kernel."""
    impls = ["reference"]
    if op.startswith("experts"):
        impls.append("grouped_mm")
    if op != "gates_of" and not op.endswith(("geglu", "relu2")):
        impls.append("triton")
    return impls


CASES = [(op, impl) for op in OPS for impl in impls_of(op)] + [("experts swiglu", None), ("route", None)]


def results(call, inputs, forward=False, backward=False):
    """Outputs and gradients; autocast to bfloat16 is on where it says so."""
    leaves = [t.detach().to(DEVICE).requires_grad_() for t in inputs]
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=forward):
        out = call(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    upstream = [(1 + torch.arange(t.numel(), device=DEVICE) % 3).view(t.shape).to(t.dtype) for t in out]
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=backward):
        return [*out, *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("missing", ["", "no triton"])
@pytest.mark.parametrize(
    "device, grouped",
    [("cpu", [torch.float32, torch.float16, torch.bfloat16]), ("cuda", [torch.bfloat16]), ("mps", [])],
)
def test_the_default_implementation_can_run(device, grouped, missing, monkeypatch):
    monkeypatch.setattr(tiles, "MISSING", missing)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        tensor = SimpleNamespace(device=torch.device(device), is_cuda=device == "cuda", dtype=dtype)
        expected = "grouped_mm" if dtype in grouped else "reference"
        assert pick_impl(None, tensor) == ("triton" if device == "cuda" and not missing else expected)
        if dtype in grouped:
            assert pick_impl("grouped_mm", tensor) == "grouped_mm"
        else:
            with pytest.raises(RuntimeError, match=f"does not take {dtype} on {device}"):
                pick_impl("grouped_mm", tensor)


def make(op, dtype, impl):
    if ON_GPU and impl == "grouped_mm" and op.startswith("experts") and dtype != torch.bfloat16:
        pytest.skip("on the GPU grouped_mm takes bfloat16 only")
    return OPS[op](dtype, impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("op, impl", CASES)
def test_autocast_changes_nothing(op, impl, dtype):
    call, inputs = make(op, dtype, impl)
    plain = results(call, inputs)
    for forward, backward in ((True, False), (True, True), (False, True)):
        for a, b in zip(results(call, inputs, forward, backward), plain, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b), (forward, backward)


def test_autocast_is_on_in_that_test_and_afterwards():
    """Else it could not fail: autocast changes a plain product. And it is back on after the op."""
    x, w = random(8, 8), random(8, 8, seed=2)
    plain = results(torch.matmul, [x, w])
    assert results(torch.matmul, [x, w], forward=True)[0].dtype == torch.bfloat16
    assert not torch.equal(results(torch.matmul, [x, w], backward=True)[1], plain[1])
    op, inputs = experts(torch.float32, "reference")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        torch.autograd.grad(op(*(t.requires_grad_() for t in inputs)).sum(), inputs)
        assert torch.is_autocast_enabled(DEVICE) and (x.to(DEVICE) @ w.to(DEVICE)).dtype == torch.bfloat16


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_autocast_changes_no_optimiser(impl):
    def adamw(impl):
        tensors = [random(40, seed=seed).abs().to(DEVICE) for seed in range(4)]
        step = torch.tensor(3.0, device=DEVICE)
        mk.adamw_step(*tensors, step, 0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, impl=impl)
        return tensors

    def muon():
        weights, momenta, grads = ([random(2, 16, 16, seed=seed).to(DEVICE)] for seed in range(3))
        muon_update(weights, momenta, grads, [16], torch.tensor(0.1, device=DEVICE), 0.9, 0.1)
        return weights + momenta

    step = partial(adamw, impl) if impl == "reference" else lambda: adamw(impl) + muon()
    plain = step()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(step(), plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("op, impl", CASES)
def test_fullgraph_compile(op, impl, dtype):
    call, inputs = make(op, dtype, impl)
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    bound = 1e-6 if dtype == torch.float32 else 2e-3
    for a, b in zip(results(compiled, inputs), results(call, inputs), strict=True):
        assert a.dtype == b.dtype
        check(a, b, bound, op)


@pytest.mark.parametrize("impl", IMPLS)
def test_fullgraph_compile_of_experts_by_inductor(impl):
    """The default backend, called with a new routing and then a new number of tokens: no graph depends on what was
    routed."""
    *inputs, ids = problem(24, 32, 16, 4, 2, torch.float32, DEVICE)
    make("experts swiglu", torch.float32, impl)
    torch.compiler.reset()
    compiled = torch.compile(mk.moe_experts, fullgraph=True)
    for chosen, n in ((ids, 24), ((ids + 1) % 4, 24), (ids, 9)):
        tensors = [inputs[0][:n], *inputs[1:3], inputs[3][:n]]
        got, plain = (
            results(partial(call, chosen[:n]), tensors)
            for call in (
                lambda ids, x, w_in, w_out, gates: compiled(x, w_in, w_out, gates, ids, impl=impl),
                lambda ids, x, w_in, w_out, gates: mk.moe_experts(x, w_in, w_out, gates, ids, impl=impl),
            )
        )
        for a, b in zip(got, plain, strict=True):
            check(a, b, 1e-5)


@pytest.mark.parametrize("op", OPS)
def test_kernels_refuse_derivatives_of_derivatives(op):
    """Even where the gradient that comes in is constant, as in a gradient penalty on a sum. Forward mode too."""
    for impl in impls_of(op):
        dtype = torch.bfloat16 if (impl, DEVICE) == ("grouped_mm", "cuda") else torch.float32
        call, inputs = OPS[op](dtype, impl)
        leaves = [t.to(DEVICE).requires_grad_() for t in inputs]
        first = lambda *args, call=call: out[0] if isinstance(out := call(*args), tuple) else out
        if impl != "triton":
            torch.autograd.grad(first(*leaves).sum(), leaves[0], create_graph=True)
            continue
        with pytest.raises(RuntimeError, match="no second derivatives, use impl='reference'"):
            torch.autograd.grad(first(*leaves).sum(), leaves[0], create_graph=True)
        inputs = tuple(t.detach() for t in leaves)
        with pytest.raises((RuntimeError, NotImplementedError), match="setup_context|forward-mode"):
            torch.func.jvp(first, inputs, inputs)


@pytest.mark.parametrize("impl", [None, "reference"])
def test_tensors_on_another_device_are_named(impl):
    x, w_in, w_out, gates, ids = problem(4, 16, 16, 4, 2, torch.float32, "cpu")
    cos, sin = rope_tables(ModelConfig(seq_len=9, head_dim=8))
    scalar, norm, state = torch.tensor(1.0), torch.ones(8), [torch.ones(3) for _ in range(4)]
    settings = dict(lr=0.1, beta1=0.9, beta2=0.9, eps=1e-8, weight_decay=0.0, scale=scalar, skip=scalar)
    calls = [
        (mk.moe_experts, (x, w_in, w_out, gates, ids), {}, ["w_in", "w_out", "gates", "experts"]),
        (mk.rope, (random(2, 9, 8, 8), cos, sin), dict(n_heads=4, q_weight=norm, k_weight=norm), ["cos", "sin"]),
        (mk.linear_cross_entropy, (x, random(8, 16), ids[:, 0]), {}, ["w", "targets"]),
        (mk.adamw_step, (*state, scalar), settings, ["grad", "exp_avg", "exp_avg_sq", "step"]),
        (mk.route, (x,), dict(top_k=2, bias_E=torch.ones(16)), []),
    ]
    for op, args, named, names in calls:
        for i, name in enumerate(names, 1):
            with pytest.raises(ValueError, match=f"^{name} on meta: expected cpu"):
                op(*args[:i], args[i].to("meta"), *args[i + 1 :], **named, impl=impl)
        for name in [name for name, value in named.items() if isinstance(value, torch.Tensor)]:
            with pytest.raises(ValueError, match=f"^{name} on meta: expected cpu"):
                op(*args, **named | {name: named[name].to("meta")}, impl=impl)


def test_kernels_refuse_another_gpu_than_the_current_one(monkeypatch):
    """They would run there, on memory that they may not reach or that its GPU has yet to write."""
    monkeypatch.setattr(tiles, "MISSING", "")
    monkeypatch.setattr(tiles, "eager", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for index in (0, 1):
        tensor = SimpleNamespace(device=torch.device(f"cuda:{index}"), is_cuda=True, get_device=lambda i=index: i)
        assert pick_impl("reference", tensor) == "reference"
        if index == 0:
            assert pick_impl(None, tensor) == "triton"
            continue
        for impl in (None, "triton"):
            with pytest.raises(RuntimeError, match=r"with torch.cuda.device\('cuda:1'\)"):
                pick_impl(impl, tensor)


def test_a_launch_reuses_only_what_was_compiled_for_its_arguments(monkeypatch):
    """A kernel that records how it is called: by Triton's slow way once for everything that makes other code."""
    calls = []

    class Compiled:
        function = packed_metadata = None

        def run(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
            calls.append(("again", (x, y, z), args))

        def __getitem__(self, grid):
            return lambda *args: calls.append(("with hooks", grid, args))

    compiled = Compiled()
    monkeypatch.setattr(language, "UNFENCED", False)
    monkeypatch.setattr(language.driver, "_active", SimpleNamespace(get_current_stream=lambda device: None))
    slow = lambda *args, **constants: calls.append(("compile", args)) or compiled
    kernel, x = type("Kernel", (), {"fn": object(), "__getitem__": lambda self, grid: slow})(), torch.zeros(40)
    variants = [
        dict(tensors=(x, None)),
        dict(tensors=(x.half(), None)),
        dict(tensors=(x[1:], None)),
        dict(tensors=(x, x)),
        dict(numbers=(7,)),
        dict(numbers=(32,)),
        dict(numbers=(2**31,)),
        dict(BLOCK=8),
        dict(num_warps=8),
    ]
    for change in variants:
        for expected in ("compile", "again"):
            language.launch(kernel, (2,), **dict(tensors=(x, None), numbers=(1,), BLOCK=4) | change)
            assert calls[-1][0] == expected, change
    language.launch(kernel, (2,), (x, None), (9,), BLOCK=4)  # as 7: neither 1 nor a multiple of 16
    assert calls[-1] == ("again", (2, 1, 1), (x, None, 9, 4))
    monkeypatch.setattr(language.triton.knobs.runtime.launch_enter_hook, "calls", [print])  # as a profiler does
    language.launch(kernel, (2,), (x, None), (9,), BLOCK=4)
    assert calls[-1] == ("with hooks", (2, 1, 1), (x, None, 9, 4))


def test_the_product_op():
    offsets = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    a, w = random(12, 16).requires_grad_(), random(3, 16, 32).requires_grad_()
    for native in (False, True):
        torch.library.opcheck(torch.ops.moe_kernels.grouped_product, (a, w, offsets, native))
        torch.library.opcheck(torch.ops.moe_kernels.grouped_product, (a.detach(), random(12, 32), offsets, native))


WITHOUT_TRITON = """
import tests.hide_triton, torch, moe_kernels as mk
import moe_kernels.muon, optimoe.optim
from tests.test_ops import OPS, results
for op, make in OPS.items():
    for impl in (None, "reference", "grouped_mm"):
        assert all(t.isfinite().all() for t in results(*make(torch.float32, impl))), op
    try:
        if op != "gates_of":
            results(*make(torch.float32, "triton"))
            raise SystemExit(f"{op} ran")
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.skipif(ON_GPU, reason="about machines without one")
def test_everything_but_the_kernels_works_without_triton():
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = set(run.stdout.splitlines())
    assert len(lines) == 1 and "needs the package triton" in run.stdout and "impl='grouped_mm'" in run.stdout


@pytest.mark.skipif(ON_GPU, reason="about machines without one")
def test_training_and_kernel_tests_run_without_triton(tmp_path):
    """Two steps of the README's first command with a smaller model, and two files of kernel tests. Neither imports what
    needs triton."""
    sizes = ["--steps=2", "--n_layers=1", "--d_model=32", "--batch_size=2", "--val_batches=1", "--sample_tokens=4"]
    job = [*sizes, f"--out_dir={tmp_path / 'run'}"]
    train = ["-m", "tests.hide_triton", "train.py", *job]
    files = ["tests/test_dispatch.py", "tests/test_cross_entropy.py"]
    # -s: else pytest captures the lines that tell what its files import.
    kernels = ["-m", "pytest", "-s", "-p", "tests.hide_triton", "-p", "no:cacheprovider", *files]
    env = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}  # writes a line for every import
    for command, said in ((train, "what to try next"), (kernels, r"\d+ passed, \d+ skipped")):
        run = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, cwd=ROOT)
        assert run.returncode == 0 and re.search(said, run.stdout), run.stdout[-2000:] + run.stderr[-2000:]
        imported = set(re.findall(r"^import time:.*\| +([\w.]+)$", run.stderr, re.MULTILINE))
        assert "moe_kernels.experts" in imported
        assert "moe_kernels.precompile" not in imported and not any(name.startswith("bench") for name in imported)
