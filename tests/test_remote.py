"""Experts spread over ranks whose memories are all on one device: python -m pytest tests/test_remote.py."""

import dataclasses
import functools

import pytest
import torch

from model import GPT, ModelConfig, compute_dtype
from moe_kernels import reference, remote
from moe_kernels.dispatch import Dispatch
from optimoe import exchange
from tests.checks import BOUNDS, DTYPES, ON_GPU, check, rms_ratio


def problem(W, T, D, F, E, K, dtype, device, seed=0):
    """x, dy, gates, expert ids of every rank, and the weights of all W * E experts."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    ids = torch.rand(W, T, E * W, generator=g).argsort(2)[:, :, :K].int().contiguous().to(device)
    gates = torch.rand(W, T, K, generator=g).to(device)
    tensors = draw(W, T, D), draw(W, T, D), draw(E * W, 2 * F, D) / D**0.5, draw(E * W, D, F) / F**0.5
    x, dy, *weights = (t.to(device, dtype) for t in tensors)
    return x, dy, gates, ids, weights


def play(W, T, D, F, E, K, n_rows, device, inputs):
    """What every rank computes, all ranks taking turns: (y, dx, dw_in, dw_out, dgates), each stacked over ranks."""
    x, dy, gates, ids, (w_in, w_out) = inputs
    sizes = remote.Sizes(layers=2, world=W, tokens=T, top_k=K, width=D, n_rows=n_rows, dtype=x.dtype)
    memories = [torch.full((sizes.lay_out(),), 0xFF, dtype=torch.uint8, device=device) for _ in range(W)]  # NaN
    ranks = [remote.Ranks(r, sizes, memories, barrier=None) for r in range(W)]
    own = [(w_in[r * E : (r + 1) * E], w_out[r * E : (r + 1) * E]) for r in range(W)]
    layer = 1
    for r in range(W):
        remote.publish(ranks[r], layer, x[r], gates[r], ids[r])
    saved = [remote.compute(ranks[r], layer, *own[r], "swiglu") for r in range(W)]
    y, dx, dgates = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan), torch.full_like(gates, torch.nan)
    for r in range(W):
        remote.collect(ranks[r], ids[r], E, y[r], gates[r])
    for r in range(W):
        ranks[r].own.dy[ranks[r].tokens_of(r)].copy_(dy[r])
    finish = [
        remote.compute_gradients(ranks[r], layer, *own[r], *saved[r][:3], Dispatch(*saved[r][3:]), "swiglu")
        for r in range(W)
    ]
    for r in range(W):
        remote.collect(ranks[r], ids[r], E, dx[r], dgates_TK=dgates[r])
    dw_in, dw_out = zip(*(weights() for weights in finish), strict=True)
    return y, dx, torch.cat(dw_in), torch.cat(dw_out), dgates


def whole(inputs):
    """The same of one layer with all experts and all tokens, in float64."""
    x, dy, gates, ids, weights = inputs
    leaves = [t.double().requires_grad_() for t in (x.flatten(0, 1), *weights, gates.flatten(0, 1))]
    y = reference.experts(leaves[0], *leaves[1:3], leaves[3], ids.flatten(0, 1), "swiglu")
    y.backward(dy.flatten(0, 1).double())
    dx, dw_in, dw_out, dgates = (t.grad for t in leaves)
    return y.view_as(x), dx.view_as(x), dw_in, dw_out, dgates.view_as(gates)


SHAPES = [(2, 23, 4, 2), (3, 17, 2, 3), (4, 9, 1, 1), (1, 12, 4, 2), *([(2, 140, 4, 2)] if ON_GPU else [])]
NAMES = "y", "dx", "dw_in", "dw_out", "dgates"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("W,T,E,K", SHAPES)
def test_ranks_equal_one_layer(W, T, E, K, dtype, device, poison, monkeypatch):
    """Rows to spare, so that some are never computed. The largest shapes are sorted in several chunks."""
    if device == "cpu":
        monkeypatch.setattr("moe_kernels.dispatch.CHUNK", 64)
    if device == "cpu" and dtype == torch.float16 and T != 9:
        pytest.skip("the interpreter is slow, and one shape shows what rounding does")
    inputs = problem(W, T, 48, 32, E, K, dtype, device)
    got = play(W, T, 48, 32, E, K, W * T * min(K, E), device, inputs)
    for name, a, b in zip(NAMES, got, whole(inputs), strict=True):
        check(a, b, BOUNDS[dtype], name)
    if device == "cuda" or T == 9:  # the interpreter is slow, and runs one program after another
        again = play(W, T, 48, 32, E, K, W * T * min(K, E), device, inputs)
        assert all(map(torch.equal, got, again))


def test_the_comparison_can_fail_and_idle_experts_get_zeros(device):
    inputs = problem(2, 23, 48, 32, 4, 2, torch.float32, device)
    inputs[3].clamp_(max=5).add_(inputs[3] == 0)  # nobody uses experts 0, 6 and 7
    got, truth = play(2, 23, 48, 32, 4, 2, 92, device, inputs), whole(inputs)
    for name, a, b in zip(NAMES, got, truth, strict=True):
        check(a, b, BOUNDS[torch.float32], name)
        assert rms_ratio(a.flip(0), b) > 0.1, name
    assert not got[2][[0, 6, 7]].any() and not got[3][[0, 6, 7]].any()


def test_more_rows_than_there_is_room_for_stay_within_their_buffers(device, poison):
    """The results are rubbish, but nothing is read or written elsewhere, and whoever has room is right."""
    inputs = problem(2, 40, 48, 32, 4, 2, torch.float32, device)
    inputs[3][:, 4:] = torch.tensor([0, 3], device=device)  # rank 0 gets nearly all rows
    x, _, gates, ids, (w_in, w_out) = inputs
    got, truth = play(2, 40, 48, 32, 4, 2, 60, device, inputs), whole(inputs)
    assert int((ids >= 4).sum()) < 60 < int((ids < 4).sum())
    check(got[2][4:], truth[2][4:], BOUNDS[torch.float32], "dw_in of rank 1")
    assert rms_ratio(got[2][:4], truth[2][:4]) > 1e-3


def test_blocks_of_all_layers_share_one_compilation(device, monkeypatch):
    """A number of each layer's own, if it were a Python int, would compile every block again, eight at most."""
    cfg = ModelConfig(
        vocab_size=64, d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, seq_len=8, n_experts=4, top_k=2,
        d_expert=32, impl="triton",
    )  # fmt: skip
    found = []
    for remotely in (False, True):
        torch.manual_seed(0)
        truth = {} if remotely or device == "cuda" else {"impl": "reference"}  # the interpreter is slow
        model = GPT(dataclasses.replace(cfg, **truth)).to(device)
        if remotely:
            sizes = remote.Sizes(2, 1, 8, cfg.top_k, cfg.d_model, 16, compute_dtype(cfg, torch.device(device)))
            memory = torch.zeros(sizes.lay_out(), dtype=torch.uint8, device=device)
            ranks = remote.Ranks(0, sizes, [memory], barrier=lambda: None)
            monkeypatch.setattr(remote, "LAYERS", [(ranks, layer) for layer in range(2)])
            for layer, block in enumerate(model.blocks):
                block.mlp.number = torch.tensor(layer)
                block.mlp.experts = functools.partial(exchange.experts_nearby, block.mlp)
                block.compile(fullgraph=True, dynamic=False, backend="inductor" if device == "cuda" else "aot_eager")
        tokens = (torch.arange(8, device=device) * 7 % 64)[None]
        torch._dynamo.reset()
        with torch._dynamo.config.patch(recompile_limit=1):
            loss = model(tokens, tokens).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        check(b, a, 2 * BOUNDS[compute_dtype(cfg, torch.device(device))], "gradient")
