"""Routing against the float64 reference: python -m pytest tests/test_routing.py (GPU where there is one, else the
interpreter)."""

import pytest
import torch

from moe_kernels import balance_loss, gates_of, reference, route
from tests.checks import DTYPES, check, rms_ratio

SHAPES = [(70, 8, 2), (33, 24, 5), (5, 256, 16), (1, 1, 1), (40, 40, 32), (0, 8, 2)]


def both(logits, K, score, normalize, bias, seed=1):
    """Outputs and the gradient of a random function of them, from the kernels and from the reference."""
    kernel_in, truth_in = logits.clone().requires_grad_(), logits.double().requires_grad_()
    kernel = route(kernel_in, K, score, normalize, bias, impl="triton")
    truth = reference.route(truth_in, K, score, normalize, None if bias is None else bias.double())
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(t.shape, generator=g).to(logits.device) for t in (kernel.gates_TK, kernel.probs_E, kernel.z)]
    for gates, probs, z in ((kernel.gates_TK, kernel.probs_E, kernel.z), (truth[0], truth[3], truth[4])):
        ((gates * weights[0]).sum() + (probs * weights[1]).sum() * 30 + z * weights[2]).backward()
    return kernel, truth, kernel_in.grad, truth_in.grad


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("T,E,K", SHAPES)
def test_matches_reference(T, E, K, score, normalize, use_bias, device, poison):
    torch.manual_seed(T + E)
    logits = torch.randn(T, E, device=device) * 2
    bias = torch.randn(E, device=device) * 0.3 if use_bias else None
    kernel, truth, grad, true_grad = both(logits, K, score, normalize, bias)
    assert torch.equal(kernel.experts_TK, truth[1]) and torch.equal(kernel.counts_E, truth[2])
    for name, a, b in (
        ("gates", kernel.gates_TK, truth[0]),
        ("probs", kernel.probs_E, truth[3]),
        ("z", kernel.z, truth[4]),
        ("grad", grad, true_grad),
    ):
        check(a, b, 1e-5, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_precision_logits_give_float32_results(dtype, device):
    logits = torch.randn(50, 16, device=device).to(dtype)
    kernel, truth, grad, true_grad = both(logits, 4, "softmax", True, None)
    assert kernel.gates_TK.dtype == torch.float32 and grad.dtype == dtype
    check(kernel.gates_TK, truth[0], 1e-5)
    check(grad, true_grad, {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype])


def test_extreme_logits_stay_finite(device):
    logits = torch.randn(20, 8, device=device) * 300
    kernel, truth, grad, true_grad = both(logits, 2, "softmax", True, None)
    check(kernel.gates_TK, truth[0], 1e-5)
    check(grad, true_grad, 1e-5)


def test_ties_go_to_the_lower_expert(device):
    for impl in ("triton", "reference"):
        assert route(torch.zeros(3, 8, device=device), 3, impl=impl).experts_TK.tolist() == [[0, 1, 2]] * 3


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("masked_by", ["logits", "bias"])
def test_masked_experts_are_chosen_once(score, masked_by, device):
    """Fewer experts than K have a finite score: the choice is still of K different ones, and no gradient is lost."""
    logits, bias = torch.randn(9, 5, device=device), None
    if masked_by == "logits":
        logits[:, 1::2] = logits[:, 4] = -float("inf")
    else:
        bias = torch.tensor([0.1, -float("inf"), 0.2, -float("inf"), -float("inf")], device=device)
    kernel, truth, grad, true_grad = both(logits, 4, score, True, bias)
    assert torch.equal(kernel.experts_TK, truth[1]) and torch.equal(kernel.counts_E, truth[2])
    check(kernel.gates_TK, truth[0], 1e-5)
    check(grad, true_grad, 1e-5)


def test_nan_logits_name_existing_experts(device):
    logits = torch.randn(9, 5, device=device)
    logits[4] = float("nan")
    experts = route(logits, 2, impl="triton").experts_TK
    assert experts.min() >= 0 and experts.max() < 5


def test_non_contiguous_logits_and_expanded_gradient(device):
    logits = torch.randn(12, 30, device=device).T[::2].detach().requires_grad_()
    truth = logits.detach().double().requires_grad_()
    route(logits, 3, normalize=False, impl="triton").gates_TK.sum().backward()
    reference.route(truth, 3, normalize=False)[0].sum().backward()
    check(logits.grad, truth.grad, 1e-5)


def test_balance_loss_is_one_at_balance_and_e_over_k_at_collapse():
    E = 8
    eye = torch.eye(E).repeat(4, 1) * 50
    r = route(eye, 1, impl="reference")
    assert balance_loss(r.counts_E, r.probs_E).item() == pytest.approx(1.0, abs=1e-5)
    collapsed = route(torch.tensor([[50.0] + [0.0] * (E - 1)]).repeat(16, 1), 1, impl="reference")
    assert balance_loss(collapsed.counts_E, collapsed.probs_E).item() == pytest.approx(E, rel=1e-5)


def test_bias_changes_the_choice_and_not_the_gates(device):
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]], device=device)
    biased = route(logits, 2, "sigmoid", False, torch.tensor([-1.0, 0, 0, 1.0], device=device), impl="triton")
    assert biased.experts_TK.tolist() == [[3, 1]]
    check(biased.gates_TK, logits[0, [3, 1]].sigmoid()[None], 1e-5)


@pytest.mark.parametrize(
    "kwargs,message",
    [
        (dict(top_k=0), "top_k=0"),
        (dict(top_k=5), "top_k=5"),
        (dict(top_k=2.0), "top_k=2.0"),
        (dict(top_k=2, score="relu"), "relu"),
        (dict(top_k=2, impl="cuda"), "cuda"),
        (dict(top_k=2, bias_E=torch.zeros(3)), "bias_E"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        route(torch.randn(6, 4), **kwargs)


def test_bad_arguments_of_gates_and_balance_are_named():
    logits, ids = torch.randn(6, 4), torch.zeros(6, 2, dtype=torch.int32)
    for bad in ((logits, ids[:3]), (logits[:3], ids), (logits, ids[0]), (logits[None], ids[None])):
        with pytest.raises(ValueError, match=r"expected floats \(T, E\)"):
            gates_of(*bad)
    for bad in ((logits, ids.float()), (logits, ids > 0), (logits.long(), ids), (logits, ids, "relu")):
        with pytest.raises(ValueError, match="logits .* experts .* score="):
            gates_of(*bad)
    counts, probs = torch.ones(4, dtype=torch.int32), torch.full((4,), 0.25)
    assert balance_loss(counts, probs) == 1
    for bad in ((counts, probs[:1]), (counts, probs.expand(6, 4)), (counts[None], probs[None])):
        with pytest.raises(ValueError, match="counts .* probs"):
            balance_loss(*bad)


def test_the_check_can_fail(device):
    kernel, truth, grad, true_grad = both(torch.randn(40, 8, device=device), 2, "softmax", True, None)
    assert rms_ratio(torch.zeros_like(grad), true_grad) > 0.9
    assert rms_ratio(kernel.gates_TK.flip(1), truth[0]) > 0.1
    assert not rms_ratio(grad * float("nan"), true_grad) <= 1e-5


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
def test_gates_of_a_recorded_choice(device, score, normalize):
    """Of the router's own choice they are its gates, gradient included; of another one those of a router that is biased
    to it."""
    logits = torch.randn(20, 6, device=device, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(20, 2, device=device, dtype=torch.float64)
    own = reference.route(logits, 2, score, normalize)
    replayed = gates_of(logits, own[1], score, normalize)
    check(replayed, own[0], 1e-12)
    check(
        *(torch.autograd.grad((gates * upstream).sum(), logits, retain_graph=True)[0] for gates in (replayed, own[0])),
        1e-12,
    )
    bias = torch.tensor([0, 0, 0, 99.0, 0, 98], device=device, dtype=torch.float64)
    other = reference.route(logits, 2, score, normalize, bias)
    assert (other[1] == torch.tensor([3, 5], device=device)).all()
    check(gates_of(logits, other[1], score, normalize), other[0], 1e-12)
    assert rms_ratio(gates_of(logits, other[1].flip(1), score, normalize), other[0]) > 0.1
