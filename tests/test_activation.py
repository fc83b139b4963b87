"""SwiGLU of dense layers against the float64 reference: python -m pytest tests/test_activation.py."""

import pytest
import torch

from moe_kernels import swiglu
from tests.checks import BOUNDS, DTYPES, check, rms_ratio


def problem(T, F, dtype, device):
    g = torch.Generator().manual_seed(T + F)
    return torch.randn(T, 2 * F, generator=g).to(device, dtype).requires_grad_(), torch.randn(T, F, generator=g).to(
        device, dtype
    )


def results(h, da, impl="triton"):
    a = gated_activation(h, impl=impl)
    return a, *torch.autograd.grad(a, h, da)


def truth(h, da):
    return results(h.detach().double().requires_grad_(), da.double(), "reference")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T,F", [(37, 48), (3, 1040), (5, 2048), (1, 1), (0, 16), (33, 16), (7, 131), (3, 0)])
def test_matches_reference(T, F, dtype, device, poison):
    inputs = problem(T, F, dtype, device)
    for name, a, b in zip(("a", "dh"), results(*inputs), truth(*inputs), strict=True):
        check(a, b, BOUNDS[dtype], name)
        assert a.dtype == dtype and a.is_contiguous()


def test_the_check_can_fail(device):
    h, da = problem(9, 32, torch.float32, device)
    wrong = results(torch.cat(h.detach().chunk(2, 1)[::-1], 1).requires_grad_(), da)  # up and gate exchanged
    assert all(rms_ratio(a, b) > 0.1 for a, b in zip(wrong, truth(h, da), strict=True))


@pytest.mark.parametrize("layout", ["rows", "columns", "expanded"])
def test_strided_inputs_and_gradients(layout, device, poison):
    h, da = problem(6, 32, torch.float32, device)
    if layout == "rows":
        h, da = (torch.cat([t.detach(), t.detach()], 1)[:, : t.shape[1]] for t in (h, da))
    elif layout == "columns":
        h, da = (t.detach().T.contiguous().T for t in (h, da))
    else:
        h, da = (t.detach()[:1].expand(6, -1) for t in (h, da[:, :1].expand(-1, 32)))
    assert not h.is_contiguous() and not da.is_contiguous()
    for a, b in zip(results(h.requires_grad_(), da), truth(h, da), strict=True):
        check(a, b, 1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # in the interpreter, whose infinity is right
def test_large_gates_stay_finite(device):
    h, da = problem(6, 32, torch.float32, device)
    h = (1e3 * h.detach()).requires_grad_()
    for a, b in zip(results(h, da), truth(h, da), strict=True):
        check(a, b, 1e-5)


def test_fullgraph_compile_and_opcheck(device):
    h, da = problem(6, 32, torch.float32, device)
    torch.library.opcheck(torch.ops.moe_kernels.swiglu, (h,))
    torch.library.opcheck(torch.ops.moe_kernels.swiglu_bwd, (h.detach(), da))
    compiled = torch.compile(lambda h: swiglu(h, "triton"), fullgraph=True, backend="aot_eager")(h)
    eager = results(h, da)
    assert torch.equal(compiled, eager[0]) and torch.equal(torch.autograd.grad(compiled, h, da)[0], eager[1])


def test_bad_inputs_are_named(device):
    for bad in (torch.zeros(3), torch.zeros(3, 5), torch.zeros(3, 4, dtype=torch.int32)):
        with pytest.raises(ValueError, match="expected"):
            swiglu(bad)
    with pytest.raises(ValueError, match="float64"):
        swiglu(torch.zeros(3, 4, dtype=torch.float64, device=device), "triton")
