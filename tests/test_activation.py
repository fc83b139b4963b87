"""The gated activations of dense layers against the float64 reference: python -m pytest tests/test_activation.py."""

import pytest
import torch

from model import GPT, ModelConfig
from moe_kernels import ACTIVATIONS, gated_activation
from tests.checks import BOUNDS, DTYPES, check, rms_ratio


def problem(T, F, dtype, device):
    g = torch.Generator().manual_seed(T + F)
    h, da = (torch.randn(T, n, generator=g).to(device, dtype) for n in (2 * F, F))
    return h.requires_grad_(), da


def results(h, da, impl="triton", activation="swiglu"):
    a = gated_activation(h, activation, impl)
    return a, *torch.autograd.grad(a, h, da)


def truth(h, da, activation="swiglu"):
    return results(h.detach().double().requires_grad_(), da.double(), "reference", activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T,F", [(37, 48), (3, 1040), (5, 2048), (1, 1), (0, 16), (33, 16), (7, 131), (3, 0)])
def test_matches_reference(T, F, dtype, activation, device, poison):
    inputs = problem(T, F, dtype, device)
    pairs = zip(results(*inputs, activation=activation), truth(*inputs, activation), strict=True)
    for name, (a, b) in zip(("a", "dh"), pairs, strict=True):
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
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_gates_stay_finite(activation, device):
    h, da = problem(6, 32, torch.float32, device)
    h = (1e3 * h.detach()).requires_grad_()
    for a, b in zip(results(h, da, activation=activation), truth(h, da, activation), strict=True):
        check(a, b, 1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_stays_one(activation, device):
    h = torch.ones(2, 32, device=device)
    h[0, 3] = float("nan")
    da = torch.ones(2, 16, device=device)
    found, wanted = results(h.requires_grad_(), da, activation=activation), truth(h, da, activation)
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(found, wanted, strict=True))
    assert found[0].isnan().nonzero().tolist() == [[0, 3]]


def test_the_reference_is_the_formula():
    """Written out, with the slope by finite differences."""
    formulas = {
        "swiglu": lambda g: g / (1 + (-g).exp()),
        "geglu": lambda g: 0.5 * g * (1 + ((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3)).tanh()),
        "relu2": lambda g: g.clamp(min=0) ** 2,
    }
    h, da = problem(9, 32, torch.float64, "cpu")
    gate, up = h.detach().chunk(2, 1)
    for activation in ACTIVATIONS:  # a new one needs its formula here
        f = formulas[activation]
        slope = (f(gate + 1e-6) - f(gate - 1e-6)) / 2e-6
        a, dh = results(h, da, "reference", activation)
        check(a, f(gate) * up, 1e-12)
        check(dh, torch.cat([da * up * slope, da * f(gate)], 1), 1e-7)
        assert all(rms_ratio(formulas[other](gate) * up, a) > 0.01 for other in formulas if other != activation)


def test_unknown_activations_are_named(device):
    h = torch.zeros(2, 32, device=device)
    with pytest.raises(ValueError, match="activation='tanh': expected one of swiglu, geglu"):
        gated_activation(h, "tanh")


def test_fullgraph_compile_and_opcheck(device):
    h, da = problem(6, 32, torch.float32, device)
    torch.library.opcheck(torch.ops.moe_kernels.gated_activation, (h, "geglu"))
    torch.library.opcheck(torch.ops.moe_kernels.gated_activation_bwd, (h.detach(), da, "geglu"))
    compiled = torch.compile(lambda h: gated_activation(h, impl="triton"), fullgraph=True, backend="aot_eager")(h)
    eager = results(h, da)
    assert torch.equal(compiled, eager[0]) and torch.equal(torch.autograd.grad(compiled, h, da)[0], eager[1])


def test_bad_inputs_are_named(device):
    for bad in (torch.zeros(3), torch.zeros(3, 5), torch.zeros(3, 4, dtype=torch.int32)):
        with pytest.raises(ValueError, match="expected"):
            gated_activation(bad)
    with pytest.raises(ValueError, match="float64"):
        gated_activation(torch.zeros(3, 4, dtype=torch.float64, device=device), impl="triton")


@pytest.mark.parametrize("kind", [dict(dense=True), dict(n_shared_experts=1)])
def test_a_model_uses_the_activation_of_its_config(kind):
    """In its experts, its shared experts and its dense layers."""
    losses, tokens = {}, torch.arange(32).view(2, 16)
    for activation in ACTIVATIONS:
        torch.manual_seed(0)
        model = GPT(ModelConfig(vocab_size=32, seq_len=16, n_layers=1, init_std=0.2, activation=activation, **kind))
        mlp = model.blocks[0].mlp
        x = torch.randn(8, 128)
        dense = mlp if model.cfg.dense else mlp.shared
        gate, up = dense.gate_up(x).chunk(2, 1)
        check(dense(x), dense.down(ACTIVATIONS[activation].truth(gate) * up), 1e-5)
        losses[activation] = model(tokens, tokens.roll(-1, 1)).loss.item()
    assert len(set(losses.values())) == len(ACTIVATIONS), losses
