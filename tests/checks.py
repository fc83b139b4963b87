"""What the kernel tests share: the error measure, its bounds, poisoned allocations, and random problems."""

import contextlib

import torch

ON_GPU = torch.cuda.is_available()
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 6e-3}
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else [])


def rms_ratio(result, truth):
    """Norm of the error over the norm of the truth; a NaN or a missing value gives NaN or infinity, never a small
    number."""
    result, truth = result.detach().double().cpu(), truth.detach().double().cpu()
    assert result.shape == truth.shape, f"{tuple(result.shape)} is not {tuple(truth.shape)}"
    if truth.numel() == 0:
        return 0.0
    return ((result - truth).norm() / truth.norm().clamp(min=1e-30)).item()


def check(result, truth, bound, name=""):
    ratio = rms_ratio(result, truth)
    assert ratio <= bound, f"{name}: error ratio {ratio:.2e} above {bound:.0e}"


def _fill(tensor):
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor.fill_(0x3FFFFFFF) if tensor.dtype in (torch.int32, torch.int64) else tensor


@contextlib.contextmanager
def poisoned_empty():
    originals = torch.empty, torch.empty_like, torch.Tensor.new_empty
    poisoned = [lambda *a, _make=make, **k: _fill(_make(*a, **k)) for make in originals]
    torch.empty, torch.empty_like, torch.Tensor.new_empty = poisoned
    try:
        yield
    finally:
        torch.empty, torch.empty_like, torch.Tensor.new_empty = originals


def problem(T, D, F, E, K, dtype, device, routing="random", seed=0):
    """Unit-scale inputs of an expert layer: x, w_in, w_out, gates, experts. routing: random | one (all tokens to the
    first K experts) | hole (expert 0 gets nothing)."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g)
    logits = randn(T, E)
    if routing == "one":
        logits[:, :K] += 100
    if routing == "hole":
        logits[:, 0] = -100
    values, experts = logits.topk(K, dim=1)
    x, w_in, w_out = randn(T, D), randn(E, 2 * F, D) / D**0.5, randn(E, D, F) / F**0.5
    return *(t.to(device, dtype) for t in (x, w_in, w_out)), values.softmax(1).to(device), experts.int().to(device)


def to_rows(h_PSW):
    """Pre-activations (P, S, W) as (S, 2F), gate columns first."""
    return h_PSW.unflatten(2, (2, -1)).permute(1, 2, 0, 3).flatten(1)
