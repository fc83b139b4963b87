"""A mixture that starts from a dense checkpoint computes what the dense model computed.
Run: python -m pytest tests/test_upcycle.py (CPU or GPU)"""

import dataclasses
import json

import pytest
import torch

from data import shards, tokenizer
from model import GPT, ModelConfig
from optimoe import checkpoint, upcycle
from optimoe.config import parse
from tests.checks import check
from train import TrainConfig, main

SHAPE = dict(vocab_size=64, seq_len=16, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16)
DENSE = ModelConfig(**SHAPE, n_experts=8, top_k=2, d_expert=32, dense=True, init_std=0.2, qk_norm=True)  # width 64
TOKENS = torch.randint(64, (3, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def dense(tmp_path):
    torch.manual_seed(3)
    model = GPT(DENSE)
    for p in model.parameters():
        p.data *= 1 + 0.1 * torch.randn_like(p)  # norms too: nothing may rest on its initial value
    path = checkpoint.save(tmp_path, 7, {"config": dataclasses.asdict(DENSE), "model": model.state_dict()}, keep=1)
    return model, path


def mixture(**changes):
    torch.manual_seed(5)
    return GPT(dataclasses.replace(DENSE, dense=False, **changes))


def logits(model):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.no_grad():
        return model.eval().to(device)(TOKENS.to(device)).logits.float().cpu()


CASES = {
    "copies": dict(d_expert=64),
    "copies, k=3": dict(d_expert=64, top_k=3),
    "equal FLOPs": dict(),
    "two copies of two slices": dict(top_k=4),
    "four slices": dict(d_expert=16, top_k=4),
    "shared": dict(d_expert=16, n_shared_experts=2),
    "sigmoid": dict(router_score="sigmoid"),
    "one of three shared": dict(d_expert=16, n_shared_experts=1, n_experts=9, top_k=3),
}
BOUND = 3e-2 if torch.cuda.is_available() else 1e-5  # bfloat16 there


@pytest.mark.parametrize("case", CASES)
def test_outputs_at_step_0_are_those_of_the_dense_model(dense, case):
    model = mixture(**CASES[case])
    upcycle.upcycle(model, dense[1])
    check(logits(model), logits(dense[0]), BOUND)
    tokens = TOKENS.to(model.embed.weight.device)
    counts = model(tokens[:, :-1], tokens[:, 1:]).counts_NE
    G = upcycle.slices_per_copy(dataclasses.asdict(DENSE), model.cfg)
    groups = counts.view(2, -1, G)
    assert (groups == groups[..., :1]).all() and (
        groups[..., 0] > 0
    ).sum() > 2  # whole copies are chosen, and not one alone


@pytest.mark.parametrize("damage", ["scale", "order", "router"])
def test_the_check_can_fail(dense, damage):
    model = mixture()
    upcycle.upcycle(model, dense[1])
    moe = model.blocks[1].mlp
    with torch.no_grad():
        if damage == "scale":
            moe.w_out.mul_(0.5)
        elif damage == "order":
            moe.w_in.copy_(moe.w_in.roll(1, 0))
        else:
            moe.router.weight.normal_()
    with pytest.raises(AssertionError):
        check(logits(model), logits(dense[0]), BOUND)


def test_copies_separate_in_training(dense):
    """By their tokens; so do the slices of a copy, and their router rows."""
    exact = mixture()
    upcycle.upcycle(exact, dense[1])
    w = exact.blocks[0].mlp.w_in
    assert torch.equal(w[0], w[2]) and not torch.equal(w[0], w[1])
    assert torch.equal(exact.embed.weight, dense[0].embed.weight)
    optimizer = torch.optim.AdamW(exact.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        out = exact(TOKENS[:, :-1], TOKENS[:, 1:])
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    moe = exact.blocks[0].mlp
    assert (
        losses[-1] < losses[0] - 0.1
        and not torch.equal(moe.w_in[0], moe.w_in[2])
        and not torch.equal(moe.router.weight[0], moe.router.weight[1])
    )


def test_from_bfloat16_weights(dense, tmp_path):
    """The mixture is float32: three times a bfloat16 weight is no bfloat16 number."""
    model = dense[0]
    state = {name: t.bfloat16() if ".mlp." in name else t for name, t in model.state_dict().items()}
    path = checkpoint.save(tmp_path, 8, {"config": dataclasses.asdict(DENSE), "model": state}, keep=2)
    model.load_state_dict(state)
    exact = mixture(**CASES["one of three shared"])
    upcycle.upcycle(exact, path)
    assert all(p.dtype == torch.float32 for p in exact.parameters())
    check(logits(exact), logits(model), BOUND)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(d_expert=48),
            "d_expert=48: slices of this width, 0 of them shared, do not make up the dense width 64",
        ),
        (dict(d_expert=64, n_shared_experts=1), "d_expert=64: slices"),
        (dict(top_k=1), "top_k=1: one copy of the dense layer is 2 experts: use a multiple"),
        (dict(top_k=1, d_expert=64), "top_k=1: a single gate .*; use --top_k=2, for example"),
        (dict(top_k=1, d_expert=64, n_experts=1), "top_k=1: .*; use --top_k=2 and --n_experts=8, for example"),
        (dict(activation="relu2"), "activation='relu2': the dense checkpoint has 'swiglu'"),
        (dict(top_k=3), "top_k=3: one copy of the dense layer is 2 experts"),
        (dict(n_experts=7), "n_experts=7: one copy"),
        (dict(router_normalize=False), "router_normalize=False: the dense output"),
        (dict(n_heads=4), "n_heads=4: the dense checkpoint has 2"),
    ],
)
def test_what_cannot_be_exact_is_refused(dense, changes, message):
    with pytest.raises(ValueError, match=message):
        upcycle.upcycle(mixture(**changes), dense[1])


def test_not_a_dense_checkpoint(tmp_path):
    model = mixture()
    path = checkpoint.save(tmp_path, 1, {"config": dataclasses.asdict(model.cfg), "model": model.state_dict()}, keep=1)
    with pytest.raises(ValueError, match=f"upcycle_from='{path}': a mixture of experts"):
        upcycle.upcycle(mixture(), path)


def test_in_training_step_0_has_the_dense_loss(tmp_path):
    """train.py --upcycle-from: the first line of the log has the validation loss of the dense run."""
    data = tmp_path / "data"
    enc = tokenizer.word_tokenizer([])
    with shards.ShardWriter(data, enc) as writer:
        for split in ("train", "val"):
            writer.add(split, enc.encode_ordinary("the cat sat on the mat. " * 60) + [enc.eot_token])
    shape = (
        "--d-model=32 --n-layers=2 --n-heads=2 --n-kv-heads=2 --head-dim=16 --n-experts=4 --d-expert=32 --seq-len=16"
    )
    rest = "--batch-size=4 --warmup-steps=1 --init-std=0.2 --val-every=0 --val-batches=4 --sample-tokens=0"
    flags = f"{shape} {rest} --curves=false --device=cpu --data={data}".split()
    dense = main([*flags, "--dense", "--steps=10", f"--out-dir={tmp_path / 'dense'}"])
    flags = f"{rest} --curves=false --device=cpu --upcycle-from={tmp_path / 'dense'} --steps=2 --lr=1e-2".split()
    mixture = main([*flags, f"--out-dir={tmp_path / 'moe'}"])  # sizes and data are those of the dense run
    first, *others = [json.loads(line) for line in (tmp_path / "moe" / "metrics.jsonl").read_text().splitlines()]
    assert first["step"] == 0 and first["val_loss"] == pytest.approx(dense["val_loss"], rel=1e-5)
    assert others[-1]["val_loss"] < first["val_loss"] and mixture["parameters"] > dense["parameters"]
    main([f"--resume={tmp_path / 'moe'}", "--steps=3"])  # goes on from its own weights
    assert json.loads((tmp_path / "moe" / "metrics.jsonl").read_text().splitlines()[0]) == first
    wider = parse(TrainConfig, [*flags, "--d-expert=64", "--n-experts=8"])
    assert (wider.d_expert, wider.n_experts, wider.top_k, wider.dense, wider.data) == (64, 8, 2, False, str(data))
