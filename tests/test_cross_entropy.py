"""Output layer and loss in one op, against the float64 reference: python -m pytest tests/test_cross_entropy.py."""

import pytest
import torch

from moe_kernels import linear_cross_entropy, reference
from moe_kernels.cross_entropy import cross_entropy_kernel
from tests.checks import BOUNDS, DTYPES, check, rms_ratio


def problem(T, D, V, dtype, device, w_dtype=torch.float32):
    g = torch.Generator().manual_seed(T + V)
    targets = torch.randint(V, (T,), generator=g)
    targets[::5] = -1
    x, w = torch.randn(T, D, generator=g), torch.randn(V, D, generator=g) / D**0.5
    return x.to(device, dtype).requires_grad_(), w.to(dtype).to(device, w_dtype).requires_grad_(), targets.to(device)


def results(x, w, targets, chunk=8192, impl="triton"):
    loss = linear_cross_entropy(x, w, targets, chunk, impl)
    return loss, *torch.autograd.grad(3.0 * loss, (x, w))


def truth(x, w, targets):
    x, w = (t.detach().double().requires_grad_() for t in (x, w))
    loss = reference.linear_cross_entropy(x, w, targets)
    return loss, *torch.autograd.grad(3.0 * loss, (x, w))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "T,D,V,chunk",
    [(37, 48, 100, 8192), (20, 16, 5000, 7), (1, 16, 16, 1), (64, 32, 257, 64), (6, 16, 16392, 4), (6, 16, 4099, 6)],
)
def test_matches_reference(T, D, V, chunk, dtype, device, poison):
    inputs = problem(T, D, V, dtype, device)
    got = results(*inputs, chunk)
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype and got[2].dtype == torch.float32
    for name, a, b in zip(("loss", "dx", "dw"), got, truth(*inputs), strict=True):
        check(a, b, BOUNDS[dtype], name)


def test_the_check_can_fail(device):
    x, w, targets = problem(30, 16, 40, torch.float32, device)
    right = truth(x, w, targets)
    wrong = results(x, w, targets.roll(1))
    assert all(rms_ratio(a, b) > 0.01 for a, b in zip(wrong, right, strict=True))


def test_uncounted_rows_give_nothing(device, poison):
    x, w, targets = problem(12, 16, 40, torch.float32, device)
    _, dx, _ = results(x, w, targets)
    assert (dx[targets < 0] == 0).all() and (dx[targets >= 0] != 0).any(1).all()
    assert all((t == 0).all() for t in results(x, w, torch.full_like(targets, -1)))  # no target at all is no NaN
    empty = results(x[:0], w, targets[:0])
    assert empty[0] == 0 and empty[1].shape == (0, 16) and (empty[2] == 0).all()


def test_uncounted_rows_are_not_read(device):
    """Whatever their logits are."""
    logits, losses = torch.randn(3, 40, device=device), torch.empty(3, device=device)
    logits[1] = float("nan")
    counted = logits[::2].clone()
    cross_entropy_kernel[(3,)](logits, torch.tensor([5, -1, 39], device=device), losses, 40, True, 16, 8)
    targets = torch.tensor([5, 39], device=device)
    assert losses[1] == 0 and (logits[1] == 0).all()
    check(losses[::2], torch.nn.functional.cross_entropy(counted, targets, reduction="none"), 1e-6)
    check(logits[::2], counted.softmax(1) - torch.nn.functional.one_hot(targets, 40), 1e-5)


def test_extreme_logits_stay_finite(device):
    x, w, targets = problem(30, 16, 40, torch.float32, device)
    with torch.no_grad():
        x *= 1e3
    for a, b in zip(results(x, w, targets), truth(x, w, targets), strict=True):
        check(a, b, 1e-5)


def test_without_gradients_only_the_loss_is_computed(device):
    x, w, targets = problem(12, 16, 40, torch.float32, device)
    with torch.no_grad():
        out = linear_cross_entropy(x, w, targets, impl="triton")
    check(out, reference.linear_cross_entropy(x, w, targets), 1e-6)
    assert not out.requires_grad


@pytest.mark.parametrize("grads", [True, False])
def test_opcheck(grads, device):
    x, w, targets = problem(12, 16, 40, torch.float32, device)
    if not grads:
        x, w = x.detach(), w.detach()
    torch.library.opcheck(torch.ops.moe_kernels.linear_cross_entropy, (x, w, targets, 5, grads))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_every_negative_target_is_ignored_and_any_integer_dtype_taken(impl, device):
    """-100 is what Hugging Face's collators write."""
    x, w, targets = problem(12, 16, 40, torch.float32, device)
    expected = results(x, w, targets, impl=impl)
    for other in (targets.int(), torch.where(targets < 0, -100, targets)):
        assert all(map(torch.equal, results(x, w, other, impl=impl), expected))


def test_a_target_past_the_vocabulary_gives_nan_and_writes_nowhere(device):
    logits, losses = torch.randn(2, 40, device=device), torch.empty(1, device=device)
    below = logits[1].clone()
    cross_entropy_kernel[(1,)](logits, torch.tensor([43], device=device), losses, 40, True, 16, 8)
    assert losses.isnan().all() and torch.equal(logits[1], below)


def test_bad_shapes_and_dtypes_are_named():
    x, w, targets = problem(12, 16, 40, torch.float32, "cpu")
    dtypes = (x.long(), w, targets), (x, w.long(), targets), (x, w, targets.float()), (x, w, targets > 0)
    for bad in ((x[:, :8], w, targets), (x, w, targets[:3]), (x[0], w, targets), *dtypes):
        with pytest.raises(ValueError, match="expected"):
            linear_cross_entropy(*bad)
    with pytest.raises(ValueError, match="chunk"):
        linear_cross_entropy(x, w, targets, chunk=0)
