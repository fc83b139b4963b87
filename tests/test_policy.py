"""The arithmetic of GRPO against its formulas: advantages, micro-batches, loss and gradient. CPU.

Run: python -m pytest tests/test_policy.py"""

import math

import pytest
import torch

from optimoe.policy import Batch, advantages, draw_questions, micro_batches, policy_loss


def test_advantages():
    found = advantages(torch.tensor([[1.0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 0, 1, 0]]))
    assert (found[1:3] == 0).all()
    sd = (0.8**2 + 4 * 0.2**2) ** 0.5 / 2
    torch.testing.assert_close(found[0], torch.tensor([0.8, -0.2, -0.2, -0.2, -0.2]) / (sd + 1e-6))


def test_questions_come_in_a_new_order_every_epoch():
    stream = draw_questions(7, 0, 30, seed=3)
    epochs = [stream[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 4
    again = [i for start in range(0, 30, 5) for i in draw_questions(7, start, 5, seed=3)]
    assert again == stream  # wherever a step begins
    assert draw_questions(7, 0, 30, seed=4) != stream


def test_micro_batches_hold_every_row_once_with_little_padding():
    lengths = torch.randint(1, 100, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    used = list(range(0, 300, 2))
    batches = micro_batches(used, lengths, 400)
    assert sorted(i for batch in batches for i in batch) == used
    padded = [len(batch) * max(lengths[i] for i in batch) for batch in batches]
    real = [sum(lengths[i] for i in batch) for batch in batches]
    assert max(padded) <= 400 and max(p - r for p, r in zip(padded, real, strict=True)) <= 25
    assert sum(padded) < 1.05 * sum(real)
    assert sum(padded) < 0.6 * len(used) * max(lengths)  # what padding all to the longest would cost
    assert micro_batches([3], lengths, 1) == [[3]]  # a row longer than the limit still goes through


def formula(logp, old, start, advantage, weight, clip, kl_coef):
    """The loss token by token, in Python floats."""
    loss = 0.0
    probabilities = (v.double().exp().tolist() for v in (logp, old, start))
    for p, o, s, a, w in zip(*probabilities, advantage.tolist(), weight.tolist(), strict=True):
        ratio = p / o
        clipped = min(max(ratio, 1 - clip), 1 + clip)
        loss += w * (-min(ratio * a, clipped * a) + kl_coef * (s / p - 1 - math.log(s / p)))
    return loss


def formula_gradient(logp, old, start, advantage, weight, clip, kl_coef):
    """d loss / d logp: nothing of the first term where the clipped ratio decides, 1 - s/p of the second."""
    ratio, s = (logp - old).double().exp(), (start - logp).double().exp()
    free = ~(((advantage > 0) & (ratio > 1 + clip)) | ((advantage < 0) & (ratio < 1 - clip)))
    return weight * (-advantage * ratio * free + kl_coef * (1 - s))


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_loss_and_gradient_equal_the_formula(dtype, bound):
    g = torch.Generator().manual_seed(0)
    logp = -3 * torch.rand(500, generator=g).double() - 0.01
    old, begin = (logp + 0.4 * torch.randn(500, generator=g).double() for _ in range(2))
    advantage, weight = torch.randn(500, generator=g).double(), torch.rand(500, generator=g).double()
    batch = Batch(None, None, None, None, advantage.to(dtype), weight.to(dtype), old.to(dtype), begin.to(dtype))
    x, parts = logp.to(dtype).requires_grad_(), (logp, old, begin, advantage, weight)
    loss, (kl, clipped, n) = policy_loss(x, batch, 0.2, 0.5)
    loss.backward()
    expected, truth = formula(*parts, 0.2, 0.5), formula_gradient(*parts, 0.2, 0.5)
    ratio = lambda gradient: ((gradient - truth).norm() / truth.norm()).item()
    assert abs(loss.item() - expected) <= bound * abs(expected) and n == 500 and 50 < clipped < 250
    assert ratio(x.grad) <= bound
    for wrong in ((0.3, 0.5), (0.2, 0.4)):  # the check can fail
        assert abs(formula(*parts, *wrong) - expected) > 1e-2 * abs(expected)
        assert ratio(formula_gradient(*parts, *wrong)) > 1e-2


def estimate(logp, start):
    """The KL estimate of the loss, summed."""
    return policy_loss(logp, Batch(*[None] * 4, torch.zeros_like(logp), torch.ones_like(logp), logp, start), 0.2, 1.0)[
        0
    ]


def test_kl_estimate_is_never_negative_and_unbiased():
    g = torch.Generator().manual_seed(0)
    p, q = (torch.randn(20, 6, generator=g).double().log_softmax(1) for _ in range(2))
    for p_V, q_V in zip(p, q, strict=True):  # its mean over all tokens, each with its probability, is the KL itself
        mean = sum(p_V[v].exp() * estimate(p_V[v : v + 1], q_V[v : v + 1]) for v in range(6))
        torch.testing.assert_close(mean, (p_V.exp() * (p_V - q_V)).sum())
        assert abs(mean - (q_V.exp() * (q_V - p_V)).sum()) > 1e-4  # and not that in the other direction
    drawn = torch.multinomial(p[0].exp(), 100_000, replacement=True, generator=g)
    sampled = torch.stack([estimate(p[0][v : v + 1], q[0][v : v + 1]) for v in range(6)])[drawn]
    exact = (p[0].exp() * (p[0] - q[0])).sum()
    assert abs(sampled.mean() - exact) < 4 * sampled.std() / 100_000**0.5
    assert sampled.std() < (p[0] - q[0])[drawn].std()  # the low-variance estimator, not log p / q
    logs = torch.cat([-torch.logspace(-9, 1.5, 500), torch.logspace(-9, 1.5, 500)])
    each = torch.stack([estimate(torch.tensor([-2.0]), torch.tensor([-2.0]) + x) for x in logs])
    assert (each >= 0).all() and each.max() > 1


def test_impossible_tokens_neither_rule_the_loss_nor_make_it_infinite():
    x = torch.tensor([-20.0, -2.0], requires_grad=True)  # the first is what training finds impossible
    loss = estimate(x, torch.tensor([-1e-3, -1.0]))
    loss.backward()
    assert loss < 150 and x.grad.tolist() == [0.0, pytest.approx(1 - math.e)]
    x = torch.full((3,), -1.0, requires_grad=True)  # and these were impossible before the step
    batch = Batch(*[None] * 4, torch.tensor([1.0, 0.0, -1.0]), torch.ones(3), torch.full((3,), -95.0))
    policy_loss(x, batch, 0.2, 0.0)[0].backward()
    assert x.grad.tolist() == [0.0, 0.0, 0.0]
