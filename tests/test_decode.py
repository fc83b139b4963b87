"""The kernels of one new token per sequence against the model itself: python -m pytest tests/test_decode.py."""

import pytest
import torch

from eval import one_token
from eval.generate import generate
from eval.kv_cache import KVCache
from eval.one_token import has_step, step
from model import GPT, ModelConfig
from moe_kernels import decode, reference
from tests.checks import BOUNDS, DTYPES, check, problem

MODEL = dict(
    vocab_size=50, seq_len=40, d_model=48, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, n_experts=5, top_k=2
)


def make(device, dtype=torch.float32, **overrides):
    fields = MODEL | dict(d_expert=32, init_std=0.3, dtype="float32", impl="triton") | overrides
    return GPT(ModelConfig(**fields)).eval().to(device)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(qk_norm=True, n_kv_heads=4, router_score="sigmoid", router_bias_rate=1e-3),
        dict(router_normalize=False, activation="geglu", n_kv_heads=1, tie_embeddings=True),
    ],
)
@pytest.mark.parametrize("few", [0, 64])
def test_a_step_equals_the_model(options, few, device, monkeypatch, poison):
    monkeypatch.setattr(decode, "FEW_PAIRS", few)
    monkeypatch.setattr(decode, "FEW_ROWS", few)
    model = make(device, **options)
    for block in model.blocks:
        block.mlp_norm.weight.data.uniform_(0.5, 1.5)
        if model.cfg.router_bias_rate:
            block.mlp.bias_E.uniform_(-1, 1)
    assert has_step(model)
    truth = make(device, **options, **({"impl": "reference"} if device == "cpu" else {}))  # the interpreter is slow
    truth.load_state_dict(model.state_dict())
    tokens = torch.randint(50, (3, 9), device=device)
    caches = [KVCache(model.cfg, 3, 20, device) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            cache.keep_experts(2)
            cache.new_B = torch.tensor([6, 2, 5], device=device)
            truth(tokens[:, :6], cache=cache)
        for i in range(6, 9):
            expected = truth(tokens[:, i : i + 1], cache=caches[0]).logits[:, 0]
            got = step(model, tokens[:, i : i + 1], caches[1])
            caches[1].filled += 1
            check(got, expected, 1e-5, "logits")
    assert torch.equal(caches[0].lengths_B, caches[1].lengths_B)
    assert torch.equal(caches[0].experts, caches[1].experts)
    for row, length in enumerate(caches[0].lengths_B.tolist()):
        check(caches[1].k[:, row, :length], caches[0].k[:, row, :length], 1e-5, "keys")
        check(caches[1].v[:, row, :length], caches[0].v[:, row, :length], 1e-5, "values")
    with pytest.raises(ValueError, match="the cache holds 20 tokens"):
        caches[1].view(3, 20).begin_step()


@pytest.mark.parametrize(
    "options",
    [dict(dense=True), dict(n_shared_experts=1), dict(qk_norm=True, qk_norm_joint=True), dict(impl="reference")],
)
def test_other_models_have_no_step(options, device):
    assert not has_step(make(device, **options))


def test_a_field_that_step_does_not_know_has_none(device, monkeypatch):
    """Such as that of a new router variant: generation on a GPU would ignore it."""
    monkeypatch.setattr(one_token, "OBEYED", [name for name in one_token.OBEYED if name != "router_score"])
    assert has_step(make(device)) and not has_step(make(device, router_score="sigmoid"))


@pytest.mark.parametrize("few", [0, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T,D,F,E,K", [(1, 272, 80, 4, 2), (5, 48, 32, 3, 3)])
def test_experts(T, D, F, E, K, dtype, few, device, monkeypatch, poison):
    monkeypatch.setattr(decode, "FEW_PAIRS", few)
    x, w_in, w_out, gates, ids = problem(T, D, F, E, K, dtype, device)
    add = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    truth = add.double() + reference.experts(x.double(), w_in.double(), w_out.double(), gates.double(), ids)
    got = decode.experts(x, w_in, w_out, gates, ids, add)
    check(got, truth, BOUNDS[dtype])
    assert torch.equal(decode.experts(x, w_in, w_out, gates, ids, add), got)
    with pytest.raises(AssertionError):  # the check can fail
        check(decode.experts(x, w_in, w_out, gates, (ids + 1) % E, add), truth, BOUNDS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T,D,N", [(1, 48, 40), (17, 272, 8)])
def test_linear(T, D, N, dtype, device, poison):
    g = torch.Generator().manual_seed(T)
    x, w, add, norm = (torch.randn(*s, generator=g).to(device, dtype) for s in ((T, D), (N, D), (T, N), (D,)))
    x64, w64 = x.double(), w.double()
    check(decode.linear(x, w, add=add), x64 @ w64.T + add.double(), BOUNDS[dtype])
    normed = torch.nn.functional.rms_norm(x64, (D,), norm.double(), 1e-5)
    check(decode.linear(x, w, norm, 1e-5), normed @ w64.T, BOUNDS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V,n_vocab", [(7, None), (300, 290), (20000, 19999)])
def test_greedy(V, n_vocab, dtype, device):
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(V)).to(device, dtype)
    logits[0, -1] = 9  # a padding row where n_vocab says so
    logits[1, [2, 5]] = 8  # equals: the lowest id
    tokens, written = (torch.zeros(4, n, dtype=torch.long, device=device) for n in (1, 6))
    decode.greedy(logits, n_vocab, tokens, written, torch.tensor([4], device=device))
    expected = logits[:, :n_vocab].argmax(1)
    expected[1] = 2
    assert torch.equal(tokens[:, 0], torch.cat([expected, expected.new_zeros(1)]))
    assert torch.equal(written[:, 4], tokens[:, 0]) and written.count_nonzero() == tokens.count_nonzero()


def test_generate_takes_steps(device, monkeypatch):
    model, prompts, steps = make(device, init_std=0.5, n_layers=1), [[1, 2, 3], [4]], []
    monkeypatch.setattr("eval.generate.step", lambda *args: steps.append(1) or step(*args))
    texts = generate(model, prompts, 3)
    assert steps
    monkeypatch.setattr("eval.generate.has_step", lambda model: False)
    assert generate(model, prompts, 3) == texts  # float32, far from ties
