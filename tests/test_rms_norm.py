"""The sum with its RMSNorm against the float64 reference: python -m pytest tests/test_rms_norm.py."""

import pytest
import torch

from moe_kernels import add_rms_norm, rms_norm
from moe_kernels.rms_norm import MAX_WIDTH, PROGRAMS, VALUES, add_norm_bwd_op, add_norm_fwd_op
from tests.checks import BOUNDS, DTYPES, ON_GPU, check, rms_ratio

EPS = 1e-2  # large enough to be seen
SIZES = [(37, 48), (1, 16), (3, 1), (0, 16), (5, 2500), (2, 7)]
LARGE = [(PROGRAMS * VALUES // 512 + 77, 512), (3001, 2048), (33, MAX_WIDTH)]  # programs with several blocks


def problem(T, D, dtype, device):
    g = torch.Generator().manual_seed(T + D)
    x, add, *grads = (torch.randn(T, D, generator=g).to(device, dtype) for _ in range(5))
    weight = 1 + 0.3 * torch.randn(D, generator=g).to(dtype).float().to(device)
    return [t.requires_grad_() for t in (x, add, weight)], grads


def results(leaves, grads, impl="triton"):
    outputs = add_rms_norm(*leaves, EPS, impl, uses=2)
    return *outputs, *torch.autograd.grad(outputs, leaves, grads)


def formula(leaves, grads):
    x, add, weight = (t.detach().double().requires_grad_() for t in leaves)
    s = x + add
    s = s + (s.to(leaves[0].dtype).double() - s).detach()  # rounded, as it is stored
    n = s / (s.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    return s, n, n, *torch.autograd.grad((s, n, n), (x, add, weight), [t.double() for t in grads])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T,D", SIZES + LARGE if ON_GPU else SIZES)
def test_matches_the_formula(T, D, dtype, device, poison):
    leaves, grads = problem(T, D, dtype, device)
    got, truth = results(leaves, grads), formula(leaves, grads)
    for name, a, b in zip(("s", "n", "n", "dx", "dadd", "dweight"), got, truth, strict=True):
        check(a, b, BOUNDS[dtype], name)
        assert a.dtype == (torch.float32 if name == "dweight" else dtype) and a.is_contiguous()
    assert torch.equal(got[3], got[4])


def test_the_check_can_fail(device):
    leaves, grads = problem(9, 48, torch.float32, device)
    right, wrong = formula(leaves, grads), results(leaves, grads[::-1])  # the two gradients exchanged
    assert all(rms_ratio(a, b) > 0.1 for a, b in zip(wrong[3:], right[3:], strict=True))
    ones = [*leaves[:2], torch.ones_like(leaves[2]).requires_grad_()]
    assert rms_ratio(results(ones, grads)[1], right[1]) > 0.1  # another weight


def test_the_reference_is_the_formula(device):
    leaves, grads = problem(9, 48, torch.float64, device)
    for a, b in zip(results(leaves, grads, "reference"), formula(leaves, grads), strict=True):
        check(a, b, 1e-7)  # the weight is float32


@pytest.mark.parametrize("layout", ["columns", "expanded"])
def test_any_layout_and_more_dimensions(layout, device, poison):
    (x, add, weight), grads = problem(6, 32, torch.float32, device)
    change = (lambda t: t.T.contiguous().T) if layout == "columns" else (lambda t: t[:1].expand(6, -1))
    x, add, *grads = (change(t.detach()) for t in (x, add, *grads))
    assert not x.is_contiguous() and not grads[1].is_contiguous()
    if layout == "expanded":
        x, add, *grads = (t.view(2, 3, 32) for t in (x, add, *grads))
    leaves = [x.requires_grad_(), add.requires_grad_(), weight]
    for a, b in zip(results(leaves, grads), formula(leaves, grads), strict=True):
        check(a, b, 1e-5)
        assert a.shape == b.shape


def test_an_unused_output_has_no_gradient(device, poison):
    leaves, grads = problem(5, 16, torch.float32, device)
    for i in range(3):
        outputs = add_rms_norm(*leaves, EPS, "triton", uses=2)
        zeros = [grad if i == j else torch.zeros_like(grad) for j, grad in enumerate(grads)]
        alone = torch.autograd.grad(outputs[i], leaves, grads[i], allow_unused=True)
        for a, b in zip(alone, formula(leaves, zeros)[3:], strict=True):
            check(a, b, 1e-5)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_one_use_and_gradients_that_add_up(impl, device, poison):
    """Twice .backward(), into leaves: the gradients of x and add are equal, but must not be one tensor."""
    leaves, (ds, dn, _) = problem(5, 48, torch.float32, device)
    expected = formula(leaves, (ds, dn, torch.zeros_like(dn)))
    for _ in range(2):
        s, n = add_rms_norm(*leaves, EPS, impl)
        torch.autograd.backward((s, n), (ds, dn))
    for leaf, grad in zip(leaves, expected[3:], strict=True):
        check(leaf.grad, 2 * grad, 1e-5)
    leaves[0].grad.zero_()
    check(leaves[1].grad, 2 * expected[4], 1e-5)


def test_programs_that_take_several_blocks(device, monkeypatch, poison):
    monkeypatch.setattr(rms_norm, "PROGRAMS", 2)
    for T, D in ((37, 48), (9, 1100), (130, 16)):
        leaves, grads = problem(T, D, torch.float32, device)
        for a, b in zip(results(leaves, grads), formula(leaves, grads), strict=True):
            check(a, b, 1e-5)


def test_the_rows_to_come_fit_into_shared_memory():
    """bench.compile shows 4 tensors of (stages - 1) blocks and 64 bytes more; the least there is has 99 KB."""
    sizes = [(D, dtype) for D in range(16, MAX_WIDTH + 1, 16) for dtype in (torch.float32, torch.bfloat16)]
    stages = {size: rms_norm._stages(*size) for size in sizes}
    assert set(stages.values()) == {1, 2} and stages[1024, torch.bfloat16] == 2
    for (D, dtype), n in stages.items():
        blocks = rms_norm._blocks(D)
        assert 4 * (n - 1) * blocks["BLOCK_T"] * blocks["BLOCK_D"] * dtype.itemsize + 64 <= 99 * 1024


def test_it_saves_one_large_tensor(device):
    leaves, _ = problem(64, 256, torch.float32, device)
    sizes = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.setdefault(t.data_ptr(), t), lambda t: t):
        s, *_ = add_rms_norm(*leaves, EPS, "triton")
    assert {t.data_ptr() for t in sizes.values()} == {s.data_ptr(), leaves[2].data_ptr()}


def test_fullgraph_compile_and_opcheck(device):
    leaves, grads = problem(6, 32, torch.float32, device)
    x, add, weight = (t.detach() for t in leaves)
    torch.library.opcheck(add_norm_fwd_op, (x, add, weight, EPS))
    for some in (grads, (None, grads[0], None)):
        torch.library.opcheck(add_norm_bwd_op, (*some, x, weight, EPS))
    norm = torch.compile(lambda *t: add_rms_norm(*t, EPS, "triton", uses=2), fullgraph=True, backend="aot_eager")
    compiled = norm(*leaves)
    compiled = *compiled, *torch.autograd.grad(compiled, leaves, grads)
    assert all(map(torch.equal, compiled, results(leaves, grads)))


def test_same_bits_every_time(device):
    leaves, grads = problem(700 if ON_GPU else 7, 64, torch.float32, device)
    first = results(leaves, grads)
    assert all(map(torch.equal, first, results(leaves, grads)))


def test_wide_rows_take_the_reference(device):
    leaves, grads = problem(2, MAX_WIDTH + 16, torch.float32, device)
    assert all(map(torch.equal, results(leaves, grads), results(leaves, grads, "reference")))


def test_bad_inputs_are_named(device):
    x, w = torch.zeros(3, 4, device=device), torch.ones(4, device=device)
    for bad in ((x, x[:2], w), (x, x.half(), w), (x, x, w[:3]), (x.int(), x.int(), w), (x, x, w.int())):
        with pytest.raises(ValueError, match="expected floats"):
            add_rms_norm(*bad)
    with pytest.raises(ValueError, match="uses=3: expected 1 or 2"):
        add_rms_norm(x, x, w, uses=3)
    with pytest.raises(ValueError, match="float64"):
        add_rms_norm(x.double(), x.double(), w, impl="triton")
