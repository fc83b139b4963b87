"""The model against a plain re-implementation, its losses, routers and options.

Run: python -m pytest tests/test_model.py"""

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F_

import model as model_file
from eval.kv_cache import KVCache
from model import GPT, ModelConfig, update_router_bias
from optimoe import checkpoint
from optimoe.sizes import count_params, preset

SMALL = dict(vocab_size=61, seq_len=24, d_model=32, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=8, d_expert=48)
SMALL |= dict(n_experts=4, top_k=2, init_std=0.2, dtype="float32")


OPTIONS = {
    "default": {},
    "gqa": dict(n_kv_heads=2),
    "wide_heads": dict(head_dim=16),
    "shared": dict(n_shared_experts=2),
    "raw_gates": dict(router_normalize=False),
    "sigmoid_bias": dict(router_score="sigmoid", router_bias_rate=1e-3),
    "qk_norm": dict(qk_norm=True),
    "qk_norm_joint": dict(qk_norm=True, qk_norm_joint=True, n_kv_heads=2),
    "tied": dict(tie_embeddings=True),
    "dense": dict(dense=True),
    "dense_shared": dict(dense=True, n_shared_experts=1),
    "one_expert": dict(n_experts=1, top_k=1),
    "all_experts": dict(top_k=4),
    "everything": dict(n_kv_heads=1, n_shared_experts=1, router_score="sigmoid", router_normalize=False)
    | dict(router_bias_rate=1e-2, qk_norm=True, tie_embeddings=True),
}


def make(**overrides):
    return GPT(ModelConfig(**{**SMALL, **overrides}))


def tokens(B=3, L=20, seed=1):
    return torch.randint(0, SMALL["vocab_size"], (B, L), generator=torch.Generator().manual_seed(seed))


def ratio(a, b):
    """RMS error of a relative to b."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def plain_forward(model, tokens_BL, replay_NTK=None):
    """The same network in float64 from its definition: complex RoPE, attention written out, a loop over tokens."""
    cfg = model.cfg
    w = {name: value.double() for name, value in model.state_dict().items()}
    B, L = tokens_BL.shape
    norm = lambda x, g: x / (x.square().mean(-1, keepdim=True) + cfg.norm_eps).sqrt() * g
    half = cfg.head_dim // 2
    angles = torch.arange(L)[:, None] * cfg.rope_theta ** (-torch.arange(half).double() / half)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def rope(x):
        z = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat([z.real, z.imag], -1)

    def swiglu(x, w_in, w_out):
        gate, up = (w_in @ x).chunk(2)
        return w_out @ (gate * gate.sigmoid() * up)

    x = w["embed.weight"][tokens_BL]
    for i in range(cfg.n_layers):
        p = f"blocks.{i}."
        h = norm(x, w[p + "attn_norm.weight"])
        qkv = (h @ w[p + "attn.qkv.weight"].T).view(B, L, -1, cfg.head_dim)
        q, k, v = qkv.split((cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads), 2)
        if cfg.qk_norm:
            q, k = (
                norm(x.flatten(2) if cfg.qk_norm_joint else x, w[p + f"attn.{name}_norm.weight"]).view_as(x)
                for name, x in (("q", q), ("k", k))
            )
        group = cfg.n_heads // cfg.n_kv_heads
        k, v = rope(k).repeat_interleave(group, 2), v.repeat_interleave(group, 2)
        scores = torch.einsum("bihd,bjhd->bhij", rope(q), k) / math.sqrt(cfg.head_dim)
        scores = scores.masked_fill(torch.ones(L, L).triu(1).bool(), -math.inf).softmax(-1)
        x = x + torch.einsum("bhij,bjhd->bihd", scores, v).reshape(B, L, -1) @ w[p + "attn.out.weight"].T
        h = norm(x, w[p + "mlp_norm.weight"])
        y = torch.zeros_like(h)
        for b in range(B):
            for t in range(L):
                if cfg.dense:
                    y[b, t] = swiglu(h[b, t], w[p + "mlp.gate_up.weight"], w[p + "mlp.down.weight"])
                    continue
                logits = w[p + "mlp.router.weight"] @ h[b, t]
                score = logits.softmax(0) if cfg.router_score == "softmax" else logits.sigmoid()
                chosen = (score + w.get(p + "mlp.bias_E", 0)).topk(cfg.top_k).indices
                chosen = chosen if replay_NTK is None else replay_NTK[i, b * L + t]
                gates = score[chosen] / (score[chosen].sum() if cfg.router_normalize else 1)
                for gate, e in zip(gates, chosen, strict=True):
                    y[b, t] += gate * swiglu(h[b, t], w[p + "mlp.w_in"][e], w[p + "mlp.w_out"][e])
                if cfg.n_shared_experts:
                    y[b, t] += swiglu(h[b, t], w[p + "mlp.shared.gate_up.weight"], w[p + "mlp.shared.down.weight"])
        x = x + y
    return norm(x, w["norm.weight"]) @ w["head.weight"].T


@pytest.mark.parametrize("name", OPTIONS)
def test_forward_equals_the_definition(name):
    model = make(**OPTIONS[name])
    for block in model.blocks:  # a bias that changes some choices
        if getattr(block.mlp, "bias_E", None) is not None:
            block.mlp.bias_E.copy_(torch.tensor([0.2, 0.0, -0.1, 0.1]))
    x = tokens(2, 9)
    expected = plain_forward(model, x)
    assert ratio(model(x).logits, expected) < 2e-6
    broken = {key: value.clone() for key, value in model.state_dict().items()}
    broken["blocks.1.attn.qkv.weight"][0] = 0  # the check can fail: one row of one matrix
    model.load_state_dict(broken)
    assert ratio(model(x).logits, expected) > 1e-3


@pytest.mark.parametrize("name", OPTIONS)
def test_every_parameter_is_counted_and_trained(name):
    model = make(**OPTIONS[name])
    assert count_params(model.cfg).total == sum(p.numel() for p in model.parameters())
    out = model(tokens(), tokens(seed=2))
    (out.loss + 1e-2 * out.balance + 1e-3 * out.z).backward()
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), key


def test_initialisation():
    model = GPT(ModelConfig(vocab_size=256, n_layers=8))
    for name, p in model.named_parameters():
        if p.ndim < 2:
            assert (p == 1).all(), name
        else:
            expected = 0.02 / 4 if name.endswith(("attn.out.weight", "w_out")) else 0.02
            assert abs(p.std().item() / expected - 1) < 0.05, name


def test_models_of_any_sparsity_share_their_first_draws(device):
    """Whatever E and k: attention, embeddings, and experts and router rows by their index."""
    base = dict(vocab_size=61, n_layers=2, d_model=32, head_dim=8, d_expert=48)
    few, many = (ModelConfig(**base, n_experts=E, top_k=k) for E, k in ((8, 2), (64, 8)))
    for second in (many, dataclasses.replace(few, top_k=8), dataclasses.replace(few, dense=True)):
        with torch.device(device):
            one, other = GPT(few).state_dict(), GPT(second).state_dict()
        for name in one.keys() & other.keys():
            assert torch.equal(one[name], other[name][: len(one[name])]), name
        assert any(name.endswith("attn.qkv.weight") for name in one.keys() & other.keys())
    matrices = {name: value for name, value in GPT(many).state_dict().items() if value.ndim > 1}
    parts = [part.flatten()[:32] for value in matrices.values() for part in (value if value.ndim == 3 else [value])]
    normed = torch.stack([part / part.std() for part in parts])
    assert (normed @ normed.T / 32 - torch.eye(len(parts))).abs().max() < 0.9  # no two draws are alike
    redrawn = GPT(many)
    redrawn.draw(1)
    assert not any(torch.equal(matrices[name], redrawn.state_dict()[name]) for name in matrices)


def test_the_seed_of_a_training_configuration_is_that_of_its_weights():
    from train import TrainConfig

    small = dict(vocab_size=61, n_layers=1, d_model=32, head_dim=8, d_expert=48, n_experts=4)
    state = torch.get_rng_state()
    first, again, plain, second = (
        GPT(cfg).blocks[0].mlp.w_in
        for cfg in (TrainConfig(**small), TrainConfig(**small), ModelConfig(**small), TrainConfig(**small, seed=1))
    )
    assert torch.equal(first, again) and torch.equal(first, plain) and not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers change


STARTS = {
    "softmax": {},
    "raw": dict(router_normalize=False),
    "sigmoid": dict(router_score="sigmoid", router_bias_rate=1e-3),
    "sigmoid raw, one expert": dict(router_score="sigmoid", router_normalize=False, top_k=1),
    "shared": dict(n_shared_experts=1),
    "dense": dict(dense=True),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("name", ["tiny", "paper-d512-e8-k2", "paper-d1024-e64-k8", "paper-d2048-e128-k16"])
def test_training_starts_near_a_uniform_prediction(name, options, tied):
    """The loss of fresh models is near ln V, whatever shares the embedding. Fewer layers and vocabulary make it
    harder."""
    sizes = dict(vocab_size=512, seq_len=64, n_layers=2, d_expert=16, tie_embeddings=tied)
    cfg = preset(name, **sizes, n_experts=16, **{"top_k": min(preset(name).top_k, 4)} | options)
    x, y = (torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(i)) for i in range(2))
    with torch.no_grad():
        model = GPT(cfg)
        assert abs(model(x, y).loss.item() / math.log(512) - 1) < 0.1
        if tied and cfg.embed_init_std:
            model.norm.weight.fill_(1.0)
            assert model(x, y).loss.item() > 2 * math.log(512)  # the check can fail


def test_a_router_without_gradient_is_known(capsys, tmp_path):
    """Over all kinds of routers, `router_learns` says whether the cross-entropy has a gradient for the router."""
    seen = set()
    for score in ("softmax", "sigmoid"):
        for normalize in (True, False):
            for top_k in (1, 2, 4):
                model = make(router_score=score, router_normalize=normalize, top_k=top_k)
                model(tokens(), tokens(seed=2)).loss.backward()
                steep = [block.mlp.router.weight.grad.norm() > 1e-8 for block in model.blocks]
                assert steep == [model.cfg.router_learns] * 2, model.cfg
                seen.add(model.cfg.router_learns)
    assert seen == {True, False}


def test_a_router_without_gradient_is_not_trained_but_loaded(capsys, tmp_path):
    from train import TrainConfig

    for score in ("softmax", "sigmoid"):
        with pytest.raises(ValueError, match="top_k=1: .*no gradient for the router; use --router_normalize=false"):
            TrainConfig(top_k=1, router_score=score)
        assert TrainConfig(top_k=1, router_score=score, router_normalize=False).router_learns
    assert TrainConfig(top_k=1, n_experts=1).router_learns and TrainConfig(top_k=1, dense=True).router_learns
    assert TrainConfig(top_k=1, resume="runs/old").top_k == 1  # an old run goes on as it began
    for top_k, warned in ((1, True), (2, False)):
        model = make(top_k=top_k)
        state = {"step": 3, "config": dataclasses.asdict(model.cfg), "model": model.state_dict()}
        loaded = checkpoint.load_model(checkpoint.save(tmp_path, 3, state, keep=1))
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
        assert ("warning: " in (said := capsys.readouterr().err)) == warned and ("no gradient" in said) == warned


def test_a_router_variant_is_one_field_and_one_method():
    """What CONTRIBUTING.md describes: a field of the configuration, used in MoE.choose. It reaches training and
    replay."""

    @dataclass(frozen=True)
    class Variant(ModelConfig):
        router_temperature: float = 1.0

    def choose(moe, x_TD, replay_TK=None):
        heat = moe.cfg.router_temperature
        return original(moe, x_TD / heat, replay_TK)

    original = model_file.MoE.choose
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_file.MoE, "choose", choose)
        hot, plain = GPT(Variant(**SMALL, router_temperature=1e4)), GPT(Variant(**SMALL))
        free, other = hot(tokens()), plain(tokens())
        assert torch.equal(free.experts[0], other.experts[0]) and ratio(free.logits, other.logits) > 1e-3
        assert torch.equal(hot(tokens(), replay_NTK=torch.stack(free.experts)).logits, free.logits)
    assert torch.equal(make()(tokens()).logits, other.logits)


def changed_positions(model, position):
    """Positions of the logits that change when the token at `position` does."""
    x = tokens()
    y = x.clone()
    y[:, position] = (y[:, position] + 1) % SMALL["vocab_size"]
    with torch.no_grad():
        difference = (model.eval()(x).logits - model(y).logits).abs().amax((0, 2))
    return difference.nonzero().flatten().tolist()


def test_causal(monkeypatch):
    model = make()
    assert changed_positions(model, 12) == list(range(12, 20))  # nothing before 12, everything from 12 on
    real = F_.scaled_dot_product_attention
    monkeypatch.setattr(F_, "scaled_dot_product_attention", lambda *args, is_causal, **rest: real(*args, **rest))
    assert changed_positions(model, 12) == list(range(20))  # the check can fail


def test_balance_is_one_at_balance_and_high_when_collapsed():
    model = make(n_experts=4, top_k=1)
    x = tokens(4, 24)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.router.weight.zero_()  # uniform probabilities: 1 whatever the counts
    assert model(x).balance.item() == pytest.approx(2.0, abs=1e-6)  # summed over two layers
    with torch.no_grad():
        for block in model.blocks:
            block.attn_norm.weight.zero_()
            block.mlp_norm.weight.fill_(0)
            block.mlp_norm.weight[0] = 1
            block.mlp.router.weight[:, 0] = torch.tensor([1e4, 0, 0, -1e4])
        model.embed.weight[:, 0] = 1.0  # every token to expert 0
    out = model(x)
    assert out.balance.item() == pytest.approx(8.0, abs=1e-4) and out.counts_NE.tolist() == [[96, 0, 0, 0]] * 2
    with torch.no_grad():
        model.embed.weight[:31, 0] = -1.0  # half the vocabulary to expert 3
    assert 4.0 <= model(x).balance.item() < 4.2


def test_losses_are_apart_and_pure():
    model = make()
    x, y = tokens(), tokens(seed=2)
    y[0, :7] = -1
    out = model(x, y)
    logits = model(x).logits
    assert out.logits is None
    expected = F_.cross_entropy(logits[y >= 0], y[y >= 0])
    torch.testing.assert_close(out.loss, expected)
    assert out.counts_NE.dtype == torch.int32 and out.counts_NE.sum(1).tolist() == [3 * 20 * 2] * 2
    torch.testing.assert_close(out.probs_NE.sum(1), torch.ones(2))
    zeros = model(x, torch.full_like(y, -1)).loss
    assert zeros.item() == 0.0  # no target at all is no NaN


def test_dense_equals_one_expert_and_gqa_equals_repeated_heads():
    one, dense = make(n_experts=1, top_k=1), make(dense=True, n_experts=1, top_k=1)
    weights = {name: value for name, value in one.state_dict().items() if "router" not in name}
    for i in range(2):
        weights[f"blocks.{i}.mlp.gate_up.weight"] = weights.pop(f"blocks.{i}.mlp.w_in")[0]
        weights[f"blocks.{i}.mlp.down.weight"] = weights.pop(f"blocks.{i}.mlp.w_out")[0]
    dense.load_state_dict(weights)
    assert ratio(dense(tokens()).logits, one(tokens()).logits) < 1e-6
    gqa, mha = make(n_kv_heads=2), make()
    weights = gqa.state_dict()
    for name in [name for name in weights if "qkv" in name]:
        q, kv = weights[name].split((32, 32))
        weights[name] = torch.cat([q, kv.view(4, 8, 32).repeat_interleave(2, 0).reshape(64, 32)])
    mha.load_state_dict(weights)
    assert ratio(mha(tokens()).logits, gqa(tokens()).logits) < 1e-6


def test_replayed_experts():
    """Replaying a model's own choice changes nothing; another choice is used where given, with the gates of the
    router."""
    model = make(n_experts=6)
    x = tokens()
    free = model(x)
    own = torch.stack(free.experts)
    assert own.shape == (2, x.numel(), 2)
    assert torch.equal(own[0].flatten().bincount(minlength=6), free.counts_NE[0].long())
    for replay_NTK in (own, torch.full_like(own, -1)):
        assert torch.equal(model(x, replay_NTK=replay_NTK).logits, free.logits)
    other = (own + 1) % 6
    forced = model(x, replay_NTK=other)
    assert ratio(forced.logits, plain_forward(model, x, other)) < 1e-5 and ratio(forced.logits, free.logits) > 0.1
    assert torch.equal(forced.experts[0], free.experts[0])  # what is reported stays the router's own choice
    forced.logits.square().mean().backward()
    assert all(block.mlp.router.weight.grad.norm() > 0 for block in model.blocks)


def test_router_bias_moves_towards_balance_and_only_when_told():
    model = make(router_bias_rate=0.01)
    x = tokens(8, 24)
    with torch.no_grad():
        model(x)
        model.eval()(x)
    assert all((block.mlp.bias_E == 0).all() for block in model.blocks)  # neither forward changes it
    counts = model(x).counts_NE
    update_router_bias(model, counts)
    for block, counts_E in zip(model.blocks, counts.float(), strict=True):
        torch.testing.assert_close(block.mlp.bias_E, 0.01 * torch.sign(counts_E.mean() - counts_E))
    before = counts.max(1).values
    for _ in range(60):
        update_router_bias(model, model(x).counts_NE)
    after = model(x).counts_NE.max(1).values
    assert (after < before).all() and (after - 96).abs().max() <= 24  # 96 is balance
    assert all("bias_E" not in name for name, _ in model.named_parameters())
    update_router_bias(make(), counts)  # nothing to do without the option


def test_bad_fields_are_named():
    for field, value, message in (
        ("d_model", 40, "multiple of 16"),
        ("d_expert", 100, "multiple of 16"),
        ("top_k", 5, "use 4 or less"),
        ("n_kv_heads", 3, "divisor of n_heads=4"),
        ("head_dim", 7, "multiple of 2"),
        ("n_experts", 2048, "1,024 or less"),
        ("n_layers", 0, "1 or more"),
        ("init_std", 0.0, "positive"),
        ("vocab_size", -1, "0 or more"),
        ("router_bias_rate", -0.1, "0 or more"),
        ("d_model", 10**18, "or less"),
        ("seq_len", 10**9, "or less"),
    ):
        with pytest.raises(ValueError, match=f"^{field}={value}.*{message}"):
            ModelConfig(**{**SMALL, field: value})


def test_bad_inputs():
    model = make()
    with pytest.raises(ValueError, match="sequence length=25.*seq_len is 24"):
        model(tokens(1, 25))
    with pytest.raises(ValueError, match="vocab_size=0"):
        GPT(ModelConfig())
    cache = KVCache(model.cfg, 1, 8)
    model.eval()(tokens(1, 6), cache=cache)
    with pytest.raises(ValueError, match="max_len=8"):
        model(tokens(1, 3), cache=cache)
