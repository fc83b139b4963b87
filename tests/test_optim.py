"""Muon against singular values, torch.optim.Muon and a loop over experts; schedules; resume.
Run: python -m pytest tests/test_optim.py (CPU, and CUDA graphs on a GPU)"""

import copy
import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from model import GPT, ModelConfig
from moe_kernels.muon import fits, muon_update
from optimoe.optim import AdamW, Muon, clip_factor, lr_at, make_optimizer, orthogonalize, total_norm
from optimoe.sizes import training_memory
from tests.checks import check

SIZES = dict(vocab_size=64, seq_len=16, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, n_experts=4)
CFG = ModelConfig(**SIZES, d_expert=48, init_std=0.1, qk_norm=True, n_shared_experts=1)
SETTINGS = dict(optimizer="muon", weights="float32", seed=0, grad_accum=1, lr=2e-2, beta1=0.9, beta2=0.99, eps=1e-8)
SETTINGS |= dict(weight_decay=0.1, muon_momentum=0.9)
BF16 = dataclasses.replace(CFG, dtype="bfloat16", impl="reference")  # on CUDA the default
# Settings by mode; in "copies" the model's matrices are bfloat16 copies of the optimiser's float32 weights.
MODES = {
    "adamw": (CFG, dict(optimizer="adamw")),
    "muon": (CFG, {}),
    "copies": (BF16, dict(optimizer="adamw")),
    "bfloat16": (BF16, dict(optimizer="adamw", weights="bfloat16")),
    "bfloat16 in float32": (CFG, dict(optimizer="adamw", weights="bfloat16")),
}


def with_settings(cfg=CFG, **changes):
    return SimpleNamespace(**dataclasses.asdict(cfg), **SETTINGS | changes)


def model_and_batch(device="cpu", cfg=CFG):
    model = GPT(cfg).to(device)
    tokens = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(1)).to(device)
    return model, (tokens[:, :-1], tokens[:, 1:])


def backward(model, batch):
    model.zero_grad()
    out = model(*batch)
    (out.loss + 1e-2 * out.balance).backward()
    return out.loss.item()


def singular_values(m):
    return torch.linalg.svdvals(m.float().cpu())


@pytest.mark.parametrize("shape", [(1, 16, 64), (5, 48, 32), (2, 64, 64)])
def test_update_is_nearly_orthogonal(shape, device):
    m = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    scales = torch.logspace(-6, 3, shape[0], device=device)[:, None, None]
    values = singular_values(orthogonalize(m * scales))
    # A square random matrix has singular values near 0, which five rounds do not lift all the way.
    assert values.max() < 1.3 and values.quantile(0.1) > 0.6, values
    assert singular_values(m).max() > 1.3  # the check can fail
    assert orthogonalize(torch.zeros(1, 4, 8, device=device)).abs().max() == 0


def test_batch_equals_loop_over_experts(device):
    m = torch.randn(6, 24, 40, generator=torch.Generator().manual_seed(0)).to(device)
    batched = orthogonalize(m)
    check(batched, torch.cat([orthogonalize(m[i : i + 1]) for i in range(6)]), 1e-5 if device == "cpu" else 2e-2)
    with pytest.raises(AssertionError):
        check(batched.roll(1, 0), torch.cat([orthogonalize(m[i : i + 1]) for i in range(6)]), 2e-2)


def maps_of(t, rows):
    return [part for expert in t.view(-1, *t.shape[-2:]) for part in expert.split(rows)]


def muon_pair(shape, rows, **changes):
    """Our Muon on one stacked parameter, torch's on its maps one by one, same settings."""
    g = torch.Generator().manual_seed(0)
    whole = torch.nn.Parameter(torch.randn(shape, generator=g))
    apart = [torch.nn.Parameter(part.clone()) for part in maps_of(whole.detach(), rows)]
    settings = dict(lr=0.02, momentum=0.9, weight_decay=0.1) | changes
    ours = Muon([{"params": [whole], "rows": rows}], **settings)
    return whole, apart, ours, torch.optim.Muon(apart, adjust_lr_fn="match_rms_adamw", **settings)


@pytest.mark.parametrize("shape, rows", [((3, 32, 24), [16, 16]), ((40, 24), [20, 10, 10]), ((24, 40), [24])])
def test_three_steps_equal_torch_muon_on_every_map(shape, rows):
    whole, apart, ours, theirs = muon_pair(shape, rows)
    before = whole.detach().clone()
    for step in range(3):
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        whole.grad = grad
        for p, part in zip(apart, maps_of(grad, rows), strict=True):
            p.grad = part.clone()
        ours.step(), theirs.step()
    assembled = torch.cat([p.detach() for p in apart]).view(shape)
    check(whole - before, assembled - before, 3e-2)  # torch's products are in bfloat16, ours on a CPU in float32
    with pytest.raises(AssertionError):
        check(whole - before, (assembled - before).roll(1, -2), 3e-2)


def test_expert_without_tokens_stands_still():
    whole, _, ours, _ = muon_pair((3, 32, 24), [16, 16], weight_decay=0.0)
    whole.grad = torch.randn(whole.shape)
    ours.step()
    after = whole.detach().clone()
    whole.grad = torch.randn(whole.shape)
    whole.grad[1] = 0
    ours.step()
    assert [torch.equal(*pair) for pair in zip(whole, after, strict=True)] == [False, True, False]


@pytest.mark.parametrize(
    "shape, rows", [((3, 32, 24), [16, 16]), ((2, 64, 32), [64]), ((48, 16), [16, 16, 16]), ((24, 40), [24])]
)
def test_the_kernel_is_muon(shape, rows, device, monkeypatch):
    """Three steps on nine parameters, the first of which has a map without gradient: two launches, against the batched
    products."""
    monkeypatch.setattr("optimoe.optim.on_chip", lambda p, rows: False)
    g, still = torch.Generator().manual_seed(0), len(shape) == 3
    params = [torch.nn.Parameter(torch.randn(shape, generator=g).to(device)) for _ in range(9)]
    weights, momenta = [p.detach().clone() for p in params], [torch.zeros_like(p) for p in params]
    before = torch.stack(weights)
    rate, skip, scale = torch.tensor([0.1, 0.0, 0.5], device=device)
    muon = Muon([{"params": params, "rows": rows}], rate, 0.9, 0.1)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(shape, generator=g).to(device)
        if still:
            params[0].grad[1] = 0
        grads = [p.grad.clone() for p in params]
        muon.scale = scale  # halves the gradients in place
        muon.step()
        muon_update(weights, momenta, grads, rows, rate, 0.9, 0.1, scale, skip, still)
    moved, truth = torch.stack(weights) - before, torch.stack([p.detach() for p in params]) - before
    bound = 1e-5 if device == "cpu" else 3e-2
    check(moved, truth, bound)
    check(torch.stack(momenta), torch.stack([muon.state[p]["momentum"] for p in params]), 1e-5)
    if still:
        check(weights[0][1], before[0, 1] * 0.99**3, 1e-6)
    with pytest.raises(AssertionError):
        check(moved.roll(1, 0), truth, bound)
    kept = torch.stack([*weights, *momenta])
    muon_update(weights, momenta, [p.grad * float("nan") for p in params], rows, rate, 0.9, 0.1, None, skip + 1, still)
    assert torch.equal(torch.stack([*weights, *momenta]), kept)


def test_what_the_kernel_takes():
    assert (
        fits((256, 128, 128), [64, 64])
        and fits((256, 128, 64), [128])
        and fits((384, 128), [128] * 3)
        and fits((9, 48, 1), [48])
    )
    assert not fits((8, 128, 256), [128]) and not fits((8, 256, 160), [256]) and not fits((64, 32), [32, 16, 16])


def test_which_parameters_get_muon():
    model, _ = model_and_batch()
    optimizer = make_optimizer(model, with_settings())
    assert [type(part) for part in optimizer.parts] == [AdamW, Muon]
    muon = {id(p): group for group in optimizer.parts[1].param_groups for p in group["params"]}
    adamw = {id(p): group["weight_decay"] for group in optimizer.parts[0].param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        hidden = name.endswith(("qkv.weight", "attn.out.weight", "w_in", "w_out", "gate_up.weight", "down.weight"))
        assert (id(p) in muon) == hidden and (id(p) in adamw) != hidden, name
        assert hidden or adamw[id(p)] == (0.0 if "norm" in name else 0.1), name
        assert not hidden or sum(muon[id(p)]["rows"]) == p.shape[-2], name
    rows = lambda name: muon[id(model.get_parameter(name))]["rows"]
    assert rows("blocks.1.attn.qkv.weight") == [32, 16, 16] and rows("blocks.0.mlp.w_in") == rows(
        "blocks.0.mlp.shared.gate_up.weight"
    ) == [48, 48]
    groups = make_optimizer(model, with_settings(optimizer="adamw")).param_groups
    assert all(group["weight_decay"] == (0.1 if p.ndim > 1 else 0.0) for group in groups for p in group["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def train(model, optimizer, batch, steps):
    losses = []
    for _ in range(steps):
        losses.append(backward(model, batch))
        optimizer.step()
    return losses


@pytest.mark.parametrize("mode", MODES)
def test_learns_and_resumes_bit_for_bit(mode):
    model_cfg, changes = MODES[mode]
    cfg = with_settings(model_cfg, **changes)
    model, batch = model_and_batch(cfg=model_cfg)
    optimizer = make_optimizer(model, cfg)
    losses = train(model, optimizer, batch, 4)
    saved, loss = copy.deepcopy((optimizer.weights(model), optimizer.state_dict())), model(*batch).loss
    losses += train(model, optimizer, batch, 4)
    assert losses[-1] < losses[0] - 0.5
    for forget in (False, True):  # the check can fail
        other, _ = model_and_batch(cfg=model_cfg)
        other.load_state_dict(saved[0])  # before the optimiser, as train.py does
        assert torch.equal(
            other(*batch).loss, loss
        )  # validation in training, on copies or not, is evaluation of the checkpoint
        again = make_optimizer(other, cfg)
        if not forget:
            again.load_state_dict(copy.deepcopy(saved[1]))
        assert (train(other, again, batch, 4) == losses[4:]) is not forget
        ours, theirs = optimizer.weights(model), again.weights(other)
        assert (
            all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
            is not forget
        )


def test_copies_change_nothing_but_bytes():
    """The bfloat16 copies of float32 weights, and their gradients, are what casts make of float32 parameters: equal
    losses, and weights equal to a rounding error. What is saved is float32, and goes on in a run without copies."""
    cfg = with_settings(BF16, optimizer="adamw")
    (model, batch), (plain, _) = model_and_batch(cfg=BF16), model_and_batch(cfg=BF16)
    ours, theirs = (
        make_optimizer(model, cfg),
        make_optimizer(plain, with_settings(BF16, optimizer="adamw", grad_accum=2)),
    )
    copies = ours.parts[0].copies
    names = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert names and names == {
        name
        for name, p in plain.named_parameters()
        if name.startswith("blocks") and p.ndim > 1 and "router" not in name
    }
    assert (
        len(copies) == len(names)
        and not theirs.parts[0].copies
        and all(p.dtype == torch.float32 for p in plain.parameters())
    )
    assert backward(model, batch) == backward(plain, batch)
    assert all(torch.equal(a.grad.float(), b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert total_norm([p.grad for p in model.parameters() if p.grad is not None]).item() == pytest.approx(
        total_norm([p.grad for p in plain.parameters() if p.grad is not None]).item(), rel=1e-6
    )
    before = copy.deepcopy(plain.state_dict())
    for optimizer in (ours, theirs):
        optimizer.step(torch.tensor(0.0), torch.tensor(0.5))
    for name, weight in ours.weights(model).items():
        check(weight - before[name], plain.state_dict()[name] - before[name], 2e-5)  # of a small difference of weights
    assert all(torch.equal(p, master.bfloat16()) for master, p in copies.items())
    ours.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    # Not where it could be told from float32 parameters: gradients summed over micro-batches, computing in float32; nor
    # for Muon.
    for model_cfg, changes in ((BF16, dict(grad_accum=2)), (CFG, {}), (BF16, dict(optimizer="muon"))):
        other, _ = model_and_batch(cfg=model_cfg)
        optimizer = make_optimizer(other, with_settings(model_cfg, **dict(optimizer="adamw") | changes))
        assert all(p.dtype == torch.float32 for p in other.parameters()) and not optimizer.parts[0].copies
    resumed, _ = model_and_batch(cfg=BF16)
    resumed.load_state_dict(ours.weights(model))
    optimizer = make_optimizer(resumed, cfg, piece=lambda p: p)
    optimizer.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert train(resumed, optimizer, batch, 3) == pytest.approx(train(model, ours, batch, 3), rel=2e-3)


def test_equal_tensors_round_differently():
    """The seeds of tensors, and of runs, differ; the same seed gives the same weights."""
    results = []
    for seed in (0, 0, 1):
        weights = [torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = AdamW([{"params": weights, "weight_decay": 0.0}], 1e-3, (0.9, 0.99), 1e-8, seed=seed)
        for p in weights:
            p.grad = torch.ones_like(p)
        optimizer.step()
        results.append([p.detach() for p in weights])
    assert torch.equal(results[0][0], results[1][0]) and not torch.equal(results[0][0], results[0][1])
    assert not any(torch.equal(a, b) for a in results[0] for b in results[2])


@pytest.mark.parametrize(
    "fields", [{}, {"dense": True}, {"n_shared_experts": 1, "qk_norm": True}, {"tie_embeddings": True}]
)
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_memory_table_equals_a_step(fields, weights):
    """Bytes of weights, gradients and AdamW's states, counted; what is float32 outside the blocks has copies only while
    it is used."""
    cfg = dataclasses.replace(BF16, **{"n_shared_experts": 0, "qk_norm": False} | fields)
    model, batch = model_and_batch(cfg=cfg)
    optimizer = make_optimizer(model, with_settings(cfg, optimizer="adamw", weights=weights))
    model(*batch).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    optimizer.step()
    masters = [p for group in optimizer.param_groups for p in group["params"] if p in optimizer.parts[0].copies]
    states = [t for values in optimizer.parts[0].state.values() for name, t in values.items() if name != "step"]
    held = sum(t.nbytes for t in [*model.parameters(), *masters, *gradients, *states])
    parts = training_memory(cfg, 64, weights)
    rest = sum(p.numel() for p in model.parameters() if p.dtype == torch.float32)
    assert held == sum(parts.values()) - parts["activations (estimate)"] - 2 * rest
    assert {
        p.dtype for name, p in model.named_parameters() if name.endswith(("w_in", "qkv.weight", "gate_up.weight"))
    } == {torch.bfloat16}
    assert {
        p.dtype for name, p in model.named_parameters() if "norm" in name or "embed" in name or "router" in name
    } == {torch.float32}


def test_a_resumed_run_keeps_its_own_settings():
    model, batch = model_and_batch()
    old, new = (
        make_optimizer(model, with_settings()),
        make_optimizer(model, with_settings(lr=1e-3, beta2=0.9, weight_decay=0.3, muon_momentum=0.8)),
    )
    train(model, old, batch, 1)
    settings = [{key: value for key, value in group.items() if key != "params"} for group in new.param_groups]
    new.load_state_dict(old.state_dict())
    assert [{key: value for key, value in group.items() if key != "params"} for group in new.param_groups] == settings
    assert settings[0]["weight_decay"] == 0.3 and settings[-1]["momentum"] == 0.8


@pytest.mark.parametrize("mode", MODES)
def test_found_inf_leaves_everything_untouched(mode):
    model_cfg, changes = MODES[mode]
    cfg = with_settings(model_cfg, **changes)
    model, batch = model_and_batch(cfg=model_cfg)
    optimizer = make_optimizer(model, cfg)
    train(model, optimizer, batch, 2)
    state = lambda: {**optimizer.weights(model), **{f"copy of {name}": p for name, p in model.named_parameters()}}
    before, states = copy.deepcopy(state()), copy.deepcopy(optimizer.state_dict())
    backward(model, batch)
    for p in model.parameters():
        p.grad.fill_(float("nan"))
    for bad in (1.0, 0.0):
        optimizer.step(torch.tensor(bad), torch.tensor(float("nan")))
        same = all(torch.equal(a, b) for a, b in zip(before.values(), state().values(), strict=True))
        assert same == bool(bad)
        if bad:
            again, _ = model_and_batch(cfg=model_cfg)
            again.load_state_dict({name: t for name, t in before.items() if "copy" not in name})
            other = make_optimizer(again, cfg)
            other.load_state_dict(states)
            assert train(again, other, batch, 2) == train(model, optimizer, batch, 2)  # moments and step counts too
            for p in model.parameters():
                p.grad.fill_(float("nan"))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("limit", [0.0, 0.1, 1e6])
def test_clipping_in_the_step_equals_scaled_gradients(kind, limit):
    """Bit for bit on a CPU, and the norm that is logged is that before clipping; limit 0 is never."""
    results = []
    for folded in (True, False):
        model, batch = model_and_batch()
        optimizer = make_optimizer(model, with_settings(optimizer=kind))
        for _ in range(3):
            backward(model, batch)
            before = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            norm = total_norm([p.grad for p in model.parameters() if p.grad is not None])
            assert norm == before and norm.dtype == torch.float32 and 0.1 < norm < 1e6
            if not folded and limit:
                torch.nn.utils.clip_grad_norm_(model.parameters(), limit, foreach=True)
            optimizer.step(None, clip_factor(norm, limit) if folded else None)
        results.append([p.detach() for p in model.parameters()] + [clip_factor(norm, limit)])
    assert all(torch.equal(a, b) for a, b in zip(*(r[:-1] for r in results), strict=True))
    factor = results[0][-1]
    assert factor is None if limit == 0 else factor == 1 if limit == 1e6 else factor < 1


def test_norm_of_bfloat16_gradients_is_that_of_their_values():
    """In a list with float32 ones, in an order that torch's kernel for one dtype does not take."""
    g = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1000, generator=g).to(dtype)
        for dtype in (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32)
    ]
    check(total_norm(tensors)[None], torch.cat([t.double() for t in tensors]).norm()[None], 1e-6)
    with pytest.raises(AssertionError):
        check(
            torch.cat(tensors[::2]).norm()[None], torch.cat(tensors[::2]).double().norm()[None], 1e-6
        )  # the check can fail


def test_learning_rate_as_a_tensor_changes_nothing():
    results = []
    for lr in (1e-2, torch.tensor(1e-2)):
        model, batch = model_and_batch()
        optimizer = make_optimizer(model, with_settings())
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.set_lr(2e-2)
        results.append(train(model, optimizer, batch, 3))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_schedules():
    cfg = SimpleNamespace(steps=100, warmup_steps=10, lr=1.0, min_lr_frac=0.1, schedule="cosine", decay_frac=0.2)
    cosine = [lr_at(step, cfg) for step in range(100)]
    assert cosine[0] == 0.1 and cosine[9] == 1.0 and cosine[10] == 1.0 and max(cosine) == 1.0
    assert cosine[55] == pytest.approx(0.55) and cosine[99] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in zip(cosine[10:], cosine[11:], strict=False))
    cfg.schedule = "wsd"
    wsd = [lr_at(step, cfg) for step in range(100)]
    assert wsd[10:81] == [1.0] * 71 and wsd[90] == pytest.approx(0.55) and wsd[99] == pytest.approx(0.145)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_no_schedule_jumps(schedule):
    """Whatever overlaps: up to the peak at a constant slope, never above it, then down without a step to the floor."""
    grid = itertools.product(
        (1, 7, 200), (0, 1, 50, 100, 199, 200, 400), (0.0, 0.01, 0.2, 0.5, 0.9, 1.0), (0.0, 0.1, 1.0)
    )
    for steps, warmup_steps, decay_frac, floor in grid:
        cfg = SimpleNamespace(
            steps=steps, warmup_steps=warmup_steps, lr=2.0, min_lr_frac=floor, schedule=schedule, decay_frac=decay_frac
        )
        rates = [lr_at(step, cfg) / cfg.lr for step in range(steps)]
        rise, fall = rates[:warmup_steps], rates[max(0, warmup_steps - 1) :]
        assert rise == pytest.approx([(step + 1) / warmup_steps for step in range(len(rise))])
        assert all(a >= b for a, b in itertools.pairwise(fall)) and max(rates) <= 1, cfg
        if warmup_steps < steps:
            assert rates[warmup_steps] == pytest.approx(1), cfg  # the peak is reached, and the decay begins there
            decay = steps - max(warmup_steps, (1 - decay_frac) * steps if schedule == "wsd" else 0)
            steepest = (1 - floor) / max(decay, 1) * (1 if schedule == "wsd" else math.pi / 2)
            assert all(a - b <= steepest + 1e-9 for a, b in itertools.pairwise(fall)), cfg


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_muon_in_a_cuda_graph():
    """Replays equal eager steps, and a learning rate changed between them acts."""
    runs = []
    for graphed in (False, True):
        p = torch.nn.Parameter(torch.randn(4, 64, 32, generator=torch.Generator().manual_seed(0)).cuda())
        p.grad, rate = torch.empty_like(p), torch.tensor(1e-2, device="cuda")
        muon = Muon([{"params": [p], "rows": [32, 32]}], rate, weight_decay=0.1)
        muon.found_inf = torch.zeros((), device="cuda")
        start = p.detach().clone()
        p.grad.normal_()
        with torch.cuda.stream(torch.cuda.Stream()):
            muon.step()
        torch.cuda.synchronize()
        with torch.no_grad():
            p.copy_(start)
            muon.state[p]["momentum"].zero_()
        act = muon.step
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                muon.step()
            act = graph.replay
        for step in range(3):
            p.grad.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))
            rate.fill_(1e-2 / (step + 1))
            act()
        runs.append(p.detach().clone())
    assert torch.equal(*runs)
