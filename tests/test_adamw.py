"""The AdamW kernel against torch.optim.AdamW and its twin; stochastic rounding: unbiased, repeatable, and what it is
for.
Run: python -m pytest tests/test_adamw.py (CPU: Triton's interpreter; the bfloat16 arithmetic is in integers, so it is
right there too)"""

import pytest
import torch

from moe_kernels import adamw_step, norm
from moe_kernels.reference import mix, random_bits, round_to
from optimoe.optim import total_norm
from tests.checks import BOUNDS, check

IMPLS = ["reference", "triton"]
SETTINGS = dict(beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
HALF, FULL = torch.bfloat16, torch.float32


def tensors(n, device, dtype=FULL, grad_dtype=None, seed=0):
    """weight, grad, exp_avg, exp_avg_sq of unit scale, as after some steps."""
    g = torch.Generator().manual_seed(seed)
    weight, grad, mean, var = (torch.randn(n, generator=g) for _ in range(4))
    return [
        t.to(device, d) for t, d in ((weight, dtype), (grad, grad_dtype or dtype), (mean, dtype), (var.square(), dtype))
    ]


def scalar(value, device):
    return torch.tensor(float(value), device=device)


@pytest.mark.parametrize("impl", IMPLS)
def test_equals_torch_in_float32(impl, device):
    """Five steps from fresh states, a new rate each."""
    weight, *_ = tensors(3000, device)
    theirs = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([theirs], betas=(0.9, 0.999), weight_decay=0.1)
    ours, moments = weight.clone(), [torch.zeros_like(weight), torch.zeros_like(weight)]
    copy = torch.empty_like(weight, dtype=HALF)
    for step in range(1, 6):
        _, grad, *_ = tensors(3000, device, seed=step)
        optimizer.param_groups[0]["lr"] = 0.1 / step
        theirs.grad = grad * 0.5
        optimizer.step()
        settings = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, scale=scalar(0.5, device))
        adamw_step(ours, grad, *moments, scalar(step, device), 0.1 / step, **settings, copy=copy, impl=impl)
    check(ours - weight, theirs.detach() - weight, BOUNDS[FULL])
    for mine, name in zip(moments, ("exp_avg", "exp_avg_sq"), strict=True):
        check(mine, optimizer.state[theirs][name], BOUNDS[FULL])
    assert torch.equal(copy, ours.bfloat16())
    with pytest.raises(AssertionError):
        check(ours - weight, 1.001 * (theirs.detach() - weight), BOUNDS[FULL])


@pytest.mark.parametrize("dtype", [FULL, HALF])
def test_square_of_several_tensors(dtype, device, poison):
    """Sizes that no block divides; also values whose squares differ by more than float32 has digits."""
    g = torch.Generator().manual_seed(0)
    values = [torch.randn(n, generator=g).to(device, dtype) for n in (1, 40_000, 16_384)]
    values[2][5] = 1e3
    true = sum(t.double().square().sum() for t in values)
    check(norm.square_of(values)[None], true[None], 1e-6)
    assert torch.equal(norm.square_of(values), norm.square_of(values))
    with pytest.raises(AssertionError):
        check(norm.square_of(values[1:])[None], true[None] - 2 * values[0].double().square() - 1, 1e-6)
    values[1][7] = torch.nan
    assert norm.square_of(values).isnan()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel is chosen on GPUs only")
@pytest.mark.parametrize("dtype", [FULL, HALF])
def test_norm_of_large_and_small_tensors(dtype):
    values = [torch.randn(n, device="cuda", dtype=dtype) for n in (2**20 + 16, 2**20 + 3, 100, 2**21)]
    values.append(torch.randn(2**20, 2, device="cuda", dtype=dtype).T)  # not contiguous
    assert [norm.fits(t) for t in values] == [True, False, False, True, False]
    check(total_norm(values)[None], torch.cat([t.double().flatten() for t in values]).norm()[None], 1e-6)


@pytest.mark.parametrize("n", [1, 48, 1024, 5001])
@pytest.mark.parametrize("dtype, grad_dtype", [(FULL, FULL), (FULL, HALF), (HALF, HALF), (HALF, FULL)])
def test_kernel_equals_twin(n, dtype, grad_dtype, device, poison):
    results = []
    for impl in IMPLS:
        mine = tensors(n, device, dtype, grad_dtype)
        copy = torch.empty(n, dtype=HALF, device=device)
        adamw_step(*mine, scalar(7, device), 1e-2, **SETTINGS, scale=scalar(0.3, device), copy=copy, seed=5, impl=impl)
        results.append([mine[0], *mine[2:], copy])
    for a, b in zip(*results, strict=True):
        # The same random bits, so that only results a rounding error away from a threshold come out on its other side.
        check(a, b, 1e-6 if a.dtype == FULL else 2e-4)
    before = tensors(n, device, dtype, grad_dtype)
    assert not any(torch.equal(a, b) for a, b in zip(results[1], (before[0], *before[2:]), strict=False))


@pytest.mark.parametrize("impl", IMPLS)
def test_rounding_is_unbiased_repeatable_and_to_a_neighbour(impl, device):
    """One step of rate 1e-3 on weights of 1, whose spacing in bfloat16 is 1/128 (above) and 1/256 (below): the mean
    over seeds is that of float32."""
    n, runs = 4096, 64
    make = lambda dtype: [torch.full((n,), value, dtype=dtype, device=device) for value in (1.0, 0.7, 0.3, 0.2)]

    def run(seed, dtype=HALF, step=3):
        mine = make(dtype)
        adamw_step(*mine, scalar(step, device), 1e-3, **SETTINGS, seed=seed, impl=impl)
        return torch.stack([mine[0], *mine[2:]])

    exact = run(0, FULL)[:, 0].double()
    # What a bfloat16 copy of 0.7, 0.3 and 0.2 says exactly.
    rounded = [t.bfloat16().float() for t in make(FULL)]
    adamw_step(*rounded, scalar(3, device), 1e-3, **SETTINGS, impl=impl)
    exact = torch.stack([rounded[0], *rounded[2:]])[:, 0].double()
    found = torch.stack([run(seed) for seed in range(runs)])
    for i, truth in enumerate(exact):
        values = found[:, i].double()
        below, above = values.min(), values.max()
        assert below < truth < above and set(values.unique().tolist()) == {below.item(), above.item()}
        spacing, share = above - below, (truth - below) / (above - below)
        error = spacing * (share * (1 - share) / values.numel()) ** 0.5
        assert (values.mean() - truth).abs() < 5 * error, (i, values.mean(), truth)
        nearest = above if share > 0.5 else below
        assert (nearest - truth).abs() > 20 * error  # the check can fail: rounding to nearest is far off
    assert torch.equal(run(3), run(3)) and not torch.equal(run(3), run(4)) and not torch.equal(run(3), run(3, step=4))
    # Rounding of the three results is independent, and so is that of neighbouring positions.
    ups = (found > found.double().mean((0, 2), keepdim=True)).float()
    ups = (ups - ups.mean((0, 2), keepdim=True)) / ups.std((0, 2), keepdim=True)
    for a, b in (
        (ups[:, 0], ups[:, 1]),
        (ups[:, 0], ups[:, 2]),
        (ups[:, 1], ups[:, 2]),
        (ups[:, 0, 1:], ups[:, 0, :-1]),
        (ups[1:, 0], ups[:-1, 0]),
    ):
        assert (a * b).mean().abs() < 5 / a.numel() ** 0.5
    assert (ups[:, 0] * ups[:, 0]).mean() > 0.9  # the check can fail


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [FULL, HALF])
def test_skip_leaves_everything_untouched(impl, dtype, device):
    mine, before = tensors(2000, device, dtype), tensors(2000, device, dtype)
    mine[1].fill_(float("nan"))
    copy = torch.ones_like(mine[0], dtype=HALF)
    for skip in (1.0, 0.0):
        extras = dict(skip=scalar(skip, device), scale=scalar("nan", device), copy=copy, impl=impl)
        adamw_step(*mine, scalar(2, device), 1e-2, **SETTINGS, **extras)
        pairs = zip((mine[0], *mine[2:], copy), (before[0], *before[2:], torch.ones_like(copy)), strict=True)
        same = [torch.equal(a, b) for a, b in pairs]
        assert all(same) if skip else not any(same)
    assert all(t.isnan().all() for t in (*mine, copy))  # no NaN is rounded to a number


@pytest.mark.parametrize("impl", IMPLS)
def test_small_steps_and_a_falling_second_moment_survive_bfloat16(impl, device):
    """Steps of 1e-4 move a weight of 1, and beta2 = 0.999 lets a second moment of 1 fall; rounded to nearest, both
    would stand still."""
    steps = 20 if impl == "triton" and device == "cpu" else 200  # the interpreter is slow
    weight, grad, mean, var, still, none, zero, falling = (
        torch.full((4096,), x, dtype=HALF, device=device) for x in (1, 1, 1, 1, 1, 0, 0, 1)
    )
    for step in range(steps):
        at = scalar(1e6 + step, device)  # the corrections are 1
        adamw_step(weight, grad, mean, var, at, 1e-4, 0.9, 0.999, 0.0, 0.0, impl=impl)
        adamw_step(still, none, zero, falling, at, 1e-4, 0.9, 0.999, 0.0, 0.0, seed=1, impl=impl)
    assert weight.double().mean().item() == pytest.approx(1 - 1e-4 * steps, abs=1e-4 * steps / 10 + 2e-4)
    assert falling.double().mean().item() == pytest.approx(0.999**steps, abs=1e-3 * steps / 10 + 5e-4)
    assert torch.equal(torch.tensor([1 - 1e-4, 0.999]).to(HALF), torch.ones(2, dtype=HALF))  # rounded to nearest


def test_positions_beyond_32_bits_differ():
    """The hash takes the high word of the position too; checked on the twin, which has no memory to allocate for it."""
    key = lambda high: mix(mix(mix(torch.tensor(5)) ^ 3) ^ high)
    low, high = (mix(torch.arange(8) ^ key(word)) for word in (0, 1))
    assert torch.equal(low, random_bits(5, torch.tensor(3.0), 8, "cpu")) and not torch.equal(low, high)


def test_rounding_of_the_extremes():
    x = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1.0, -1.0, 1e-40])
    for noise in (0, 0x7FFF, 0xFFFF):
        up = round_to(HALF, x, torch.full(x.shape, noise))
        assert torch.equal(up[:4].float(), x[:4]) and up[4].isnan() and torch.equal(up[5:7].float(), x[5:7])
        assert 9e-41 < up[7].item() < 1.9e-40


def test_bad_arguments(device):
    weight, grad, mean, var = tensors(8, device)
    call = lambda *a, **k: adamw_step(*a, scalar(1, device), 1e-3, **SETTINGS, **k)
    with pytest.raises(
        ValueError, match=r"grad \(4,\) torch.float32: expected contiguous float32 or bfloat16 of weight's shape \(8,\)"
    ):
        call(weight, grad[:4], mean, var)
    with pytest.raises(ValueError, match="exp_avg .* torch.float16"):
        call(weight, grad, mean.half(), var)
    with pytest.raises(ValueError, match=r"exp_avg_sq \(8,\) torch.float32: expected contiguous"):
        call(weight, grad, mean, torch.zeros(16, device=device)[::2])
    with pytest.raises(ValueError, match="copy torch.float32: it is the bfloat16 copy"):
        call(weight, grad, mean, var, copy=mean)
    call(*(t[:0] for t in (weight, grad, mean, var)))
    given = dict(step=scalar(1, device), lr=1e-3, **SETTINGS)
    for name, value in (("beta1", 1.0), ("beta2", -0.1), ("seed", -1), ("seed", 2**31), ("lr", weight), ("skip", mean)):
        with pytest.raises(ValueError, match=name):
            adamw_step(weight, grad, mean, var, **given | {name: value})


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [FULL, HALF])
def test_parameters_and_expanded_gradients(impl, dtype, device):
    weight, _, mean, var = tensors(8, device, dtype)
    p, before = torch.nn.Parameter(weight), weight.clone()
    adamw_step(p, torch.ones((), device=device).expand(8), mean, var, scalar(1, device), 1e-1, **SETTINGS, impl=impl)
    assert p.requires_grad and p.is_leaf and not torch.equal(p, before)
