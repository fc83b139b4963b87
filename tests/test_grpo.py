"""GRPO: loss and gradient against the formula, what must not teach, resuming, ranks, and that it learns. CPU, gloo.

Run: python -m pytest tests/test_grpo.py"""

import copy
import dataclasses
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import grpo as grpo_file
from data import procedural, reasoning, tokenizer
from data.facts import FactsConfig
from data.procedural import MixtureConfig
from data.reasoning import ReasoningConfig
from eval.tasks import Task
from grpo import (
    Batch,
    GRPOConfig,
    advantages,
    answer_logprobs,
    collate,
    draw_questions,
    look_back,
    main,
    make_batches,
    micro_batches,
    policy_loss,
    sample_answers,
)
from model import GPT, ModelConfig
from optimoe import checkpoint
from optimoe.run import Stop

ROOT = Path(grpo_file.__file__).parent
SHORT = (
    "--task=mano --questions=60 --eval-questions=7 --answer-tokens=6 --group-size=4 --device=cpu --lr=1e-3 "
    "--kl-coef=0.01 --curves=false"
).split()
TIMES = ("seconds_rollout", "seconds_reward", "seconds_update", "rollout_tokens_per_s", "memory_gb")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model that answers mental arithmetic modulo 10 in the right form with a random digit: one in ten is right."""
    torch.manual_seed(0)
    run = tmp_path_factory.mktemp("start") / "run"
    facts = FactsConfig(
        n_people=2,
        first_names=4,
        middle_names=4,
        last_names=4,
        cities=4,
        universities=4,
        majors=4,
        employers=4,
        years=4,
    )
    mixture = MixtureConfig(
        facts,
        ReasoningConfig(max_steps=1, modulus=10, mano_length=1, names=10),
        exposures=0,
        n_problems=0,
        n_mano=50,
        window=0,
    )
    procedural.build(run / "data", mixture)
    enc = tokenizer.load(run / "data")
    cfg = ModelConfig(
        vocab_size=-(-enc.n_vocab // 64) * 64,
        seq_len=24,
        d_model=64,
        n_layers=1,
        n_heads=2,
        n_kv_heads=2,
        head_dim=32,
        n_experts=4,
        top_k=2,
        d_expert=64,
        init_std=0.1,
        embed_init_std=0.5,
    )
    model, rng = GPT(cfg), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        texts = [
            reasoning.mano(mixture.reasoning, rng.randrange(10**6)).question + f" {rng.randrange(10)}."
            for _ in range(64)
        ]
        rows = torch.tensor([[enc.eot_token, *enc.encode_ordinary(text), enc.eot_token] for text in texts])
        targets = rows[:, 1:].clone()
        targets[:, :-3] = -1
        model(rows[:, :-1], targets).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    checkpoint.save(run, 60, {"step": 60, "config": dataclasses.asdict(cfg), "model": model.state_dict()}, keep=1)
    return run


def rows(run_dir):
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


# ---- parts


def test_advantages():
    found = advantages(torch.tensor([[1.0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 0, 1, 0]]))
    assert (found[1:3] == 0).all()
    sd = (0.8**2 + 4 * 0.2**2) ** 0.5 / 2
    torch.testing.assert_close(found[0], torch.tensor([0.8, -0.2, -0.2, -0.2, -0.2]) / (sd + 1e-6))


def test_questions_come_in_a_new_order_every_epoch():
    stream = draw_questions(7, 0, 30, seed=3)
    epochs = [stream[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 4
    assert [
        i for start in range(0, 30, 5) for i in draw_questions(7, start, 5, seed=3)
    ] == stream  # wherever a step begins
    assert draw_questions(7, 0, 30, seed=4) != stream


def test_micro_batches_hold_every_row_once_with_little_padding():
    lengths = torch.randint(1, 100, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    used = list(range(0, 300, 2))
    batches = micro_batches(used, lengths, 400)
    assert sorted(i for batch in batches for i in batch) == used
    padded = [len(batch) * max(lengths[i] for i in batch) for batch in batches]
    real = [sum(lengths[i] for i in batch) for batch in batches]
    assert (
        max(padded) <= 400
        and max(p - r for p, r in zip(padded, real, strict=True)) <= 25
        and sum(padded) < 1.05 * sum(real)
    )
    assert sum(padded) < 0.6 * len(used) * max(lengths)  # what padding all to the longest would cost
    assert micro_batches([3], lengths, 1) == [[3]]  # a row longer than the limit still goes through


def formula(logp, old, start, advantage, weight, clip, kl_coef):
    """The loss token by token, in Python floats."""
    loss = 0.0
    for p, o, s, a, w in zip(
        *(v.double().exp().tolist() for v in (logp, old, start)), advantage.tolist(), weight.tolist(), strict=True
    ):
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
    x = logp.to(dtype).requires_grad_()
    loss, (kl, clipped, n) = policy_loss(x, batch, 0.2, 0.5)
    loss.backward()
    expected = formula(logp, old, begin, advantage, weight, 0.2, 0.5)
    assert abs(loss.item() - expected) <= bound * abs(expected) and n == 500 and 50 < clipped < 250
    truth = formula_gradient(logp, old, begin, advantage, weight, 0.2, 0.5)
    assert ((x.grad - truth).norm() / truth.norm()).item() <= bound
    for wrong in ((0.3, 0.5), (0.2, 0.4)):  # the check can fail
        assert abs(formula(logp, old, begin, advantage, weight, *wrong) - expected) > 1e-2 * abs(expected)
        assert (
            (formula_gradient(logp, old, begin, advantage, weight, *wrong) - truth).norm() / truth.norm()
        ).item() > 1e-2


def test_kl_estimate_is_never_negative_and_unbiased():
    g = torch.Generator().manual_seed(0)
    p, q = (torch.randn(20, 6, generator=g).double().log_softmax(1) for _ in range(2))

    def estimate(logp, start):
        return policy_loss(
            logp, Batch(*[None] * 4, torch.zeros_like(logp), torch.ones_like(logp), logp, start), 0.2, 1.0
        )[0]

    for p_V, q_V in zip(p, q, strict=True):  # its mean over all tokens, each with its probability, is the KL itself
        mean = sum(p_V[v].exp() * estimate(p_V[v : v + 1], q_V[v : v + 1]) for v in range(6))
        torch.testing.assert_close(mean, (p_V.exp() * (p_V - q_V)).sum())
        assert abs(mean - (q_V.exp() * (q_V - p_V)).sum()) > 1e-4  # and not that in the other direction
    drawn = torch.multinomial(p[0].exp(), 100_000, replacement=True, generator=g)
    sampled = torch.stack([estimate(p[0][v : v + 1], q[0][v : v + 1]) for v in range(6)])[drawn]
    exact = (p[0].exp() * (p[0] - q[0])).sum()
    assert abs(sampled.mean() - exact) < 4 * sampled.std() / 100_000**0.5
    assert sampled.std() < (p[0] - q[0])[drawn].std()  # the low-variance estimator, not log p / q
    logs = torch.cat([-torch.logspace(-9, 1.5, 2000), torch.logspace(-9, 1.5, 2000)])
    each = torch.stack([estimate(torch.tensor([-2.0]), torch.tensor([-2.0]) + x) for x in logs])
    assert (each >= 0).all() and each.max() > 1
    x = torch.tensor(
        [-20.0, -2.0], requires_grad=True
    )  # what training finds impossible weighs little and pulls at nothing
    loss = estimate(x, torch.tensor([-1e-3, -1.0]))
    loss.backward()
    assert loss < 150 and x.grad.tolist() == [0.0, pytest.approx(1 - math.e)]
    x = torch.tensor(
        [-1.0, -1.0, -1.0], requires_grad=True
    )  # nor does what was impossible before the step make anything infinite
    policy_loss(
        x, Batch(*[None] * 4, torch.tensor([1.0, 0.0, -1.0]), torch.ones(3), torch.full((3,), -95.0)), 0.2, 0.0
    )[0].backward()
    assert x.grad.tolist() == [0.0, 0.0, 0.0]


# ---- the whole model

CFG = GRPOConfig(model="x", temperature=0.7, micro_tokens=70, rollout_batch=16)
N_VOCAB = 45


def make(seed=0):
    torch.manual_seed(seed)
    return GPT(
        ModelConfig(
            vocab_size=50,
            seq_len=40,
            d_model=32,
            n_layers=2,
            n_heads=2,
            n_kv_heads=2,
            head_dim=16,
            n_experts=4,
            top_k=2,
            d_expert=32,
            init_std=0.3,
            dtype="float32",
        )
    ).eval()


class Letters:
    eos, n_vocab = [0], N_VOCAB
    decode = staticmethod(lambda ids: " ".join(map(str, ids)))


@pytest.fixture(scope="module")
def sampled():
    """(sampling model, a slightly different one being trained, a start model, uneven samples, advantages)."""
    model = make()
    rng = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, N_VOCAB, (n,), generator=rng).tolist() for n in (3, 9, 5, 12, 4, 7, 6, 8)]
    for seed in range(50):
        samples = sample_answers(model, Letters, prompts, range(8), 20, CFG, seed)
        if len({s.length for s in samples}) > 3 and {s.ids[-1] == 0 for s in samples} == {
            True,
            False,
        }:  # some ended, some were cut
            break
    else:
        raise AssertionError("no suitable samples")
    now = copy.deepcopy(model)
    with torch.no_grad():
        for p in now.parameters():
            p += 0.03 * torch.randn(p.shape, generator=rng) * p.std()
    return model, now, make(1), samples, torch.randn(8, generator=rng).tolist()


def weights(samples, normalize):
    total = sum(s.length for s in samples)
    return [1 / total if normalize == "token" else 1 / (len(samples) * s.length) for s in samples]


@pytest.mark.parametrize("normalize", ["token", "sample"])
def test_gradient_of_the_model_equals_that_of_each_answer_alone(sampled, normalize):
    model, now, begin, samples, advantage = sampled
    weight = weights(samples, normalize)
    now.zero_grad()
    total = 0.0
    for part in micro_batches(range(8), [len(s.ids) - 1 for s in samples], CFG.micro_tokens):
        batch = collate(*([values[i] for i in part] for values in (samples, advantage, weight)), "cpu")
        batch = look_back(batch, model, begin, CFG, N_VOCAB)
        loss, _ = policy_loss(answer_logprobs(now, batch, CFG, N_VOCAB)[0], batch, 0.2, 0.1)
        loss.backward()
        total += loss.item()
    found = {name: p.grad.clone() for name, p in now.named_parameters()}

    def logp(model, s):
        probs = (model(torch.tensor([s.ids])).logits[0, :, :N_VOCAB].double() / CFG.temperature).log_softmax(1)
        return torch.stack([probs[t - 1, s.ids[t]] for t in range(s.start, len(s.ids))])

    now.zero_grad()
    expected = 0.0
    for s, a, w in zip(samples, advantage, weight, strict=True):
        mine = logp(now, s)
        given = [
            t.detach()
            for t in (mine, logp(model, s), logp(begin, s), torch.full_like(mine, a), torch.full_like(mine, w))
        ]
        expected += formula(*given, 0.2, 0.1)
        (mine * formula_gradient(*given, 0.2, 0.1)).sum().backward()
    assert total == pytest.approx(expected, rel=1e-4)
    for name, p in now.named_parameters():
        assert ((found[name] - p.grad).norm() / p.grad.norm()).item() < 1e-3, name


@pytest.mark.parametrize("normalize", ["token", "sample"])
def test_weights_of_a_mini_batch_sum_to_one(sampled, start, tmp_path, monkeypatch, normalize):
    """Over its micro-batches and ranks, as the loss says. Adam would hide any other scale."""
    model, _, _, samples, advantage = sampled
    cfg = dataclasses.replace(CFG, batch_prompts=4, mini_batch=4, group_size=4, normalize=normalize)
    for world in (1, 2):
        rank = SimpleNamespace(world=world, device="cpu", sum=lambda values, w=world: [w * value for value in values])
        job = SimpleNamespace(model=model, start_model=None, tokens=Letters)
        mine = samples * (2 // world)  # of two ranks, each has the same half
        (mini,) = make_batches(cfg, rank, job, mine, advantage * (2 // world))
        given = torch.cat([batch.weight_A for batch in mini])
        assert len(mini) > 1 and given.sum().item() * world == pytest.approx(1)
        expected = sorted(
            w / 2 for s, w in zip(samples, weights(samples, normalize), strict=True) for _ in range(s.length)
        )
        assert sorted(given.tolist()) == pytest.approx(sorted(expected * (2 // world)))
    seen, norms, loss, step = [], [], grpo_file.policy_loss, torch.optim.AdamW.step

    def norm(adamw):
        return torch.nn.utils.get_total_norm([p.grad for group in adamw.param_groups for p in group["params"]])

    monkeypatch.setattr(
        grpo_file, "policy_loss", lambda x, batch, *a: (seen.append(batch.weight_A), loss(x, batch, *a))[1]
    )
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (norms.append(norm(self)), step(self))[1])
    flags = [f"--out-dir={tmp_path / 'run'}", "--batch-prompts=12", "--mini-batch=4", "--steps=1", "--clip-norm=1e-3"]
    main([*SHORT, f"--model={start}", *flags, f"--normalize={normalize}"])
    assert torch.cat(seen).sum().item() == pytest.approx(3)
    assert [float(n) for n in norms] == pytest.approx([1e-3] * 3, rel=1e-2)  # and clipped, which Adam hides too


def test_prompts_and_padding_get_no_gradient(sampled):
    model, now, begin, samples, advantage = sampled
    batch = look_back(collate(samples, advantage, weights(samples, "token"), "cpu"), model, begin, CFG, N_VOCAB)
    seen = []
    handle = now.head.register_forward_hook(
        lambda module, inputs, output: output.register_hook(lambda g: seen.append(g.flatten(0, 1))) and None
    )
    losses = []
    for padding in (0, 17):
        tokens = batch.tokens_BL.masked_fill(batch.sampled_NTK[0, :, 0].view_as(batch.tokens_BL) < 0, padding)
        losses.append(
            policy_loss(answer_logprobs(now, batch._replace(tokens_BL=tokens), CFG, N_VOCAB)[0], batch, 0.2, 0.1)[0]
        )
        losses[-1].backward()
    handle.remove()
    torch.testing.assert_close(*losses)
    answers = torch.zeros(batch.tokens_BL.numel(), dtype=torch.bool)
    answers[batch.index_A] = True
    L = batch.tokens_BL.shape[1]
    assert answers.view(-1, L).sum(1).tolist() == [s.length for s in samples]
    for gradient in seen:
        norms = gradient.norm(dim=1)
        assert (norms[~answers] == 0).all() and (norms[answers] > 0).sum() > 0.5 * answers.sum()


def test_equal_rewards_teach_nothing(sampled):
    """Before the first update p = p_old = p_start, so the KL has no gradient either."""
    model, _, _, samples, advantage = sampled
    equal = advantages(torch.ones(2, 4)).flatten().tolist()
    for given, zero in ((equal, True), (advantage, False)):
        model.zero_grad()
        batch = look_back(
            collate(samples, given, weights(samples, "token"), "cpu"), None, copy.deepcopy(model), CFG, N_VOCAB
        )
        policy_loss(answer_logprobs(model, batch, CFG, N_VOCAB)[0], batch, 0.2, 0.1)[0].backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        assert norm < 1e-6 if zero else norm > 1e-2


def test_changed_choices_are_counted_and_replayed(sampled):
    model, now, _, samples, advantage = sampled
    batch = collate(samples, advantage, weights(samples, "token"), "cpu")
    _, (slots, changed) = answer_logprobs(model, batch, CFG, N_VOCAB)
    assert (
        slots == sum(2 * 2 * (len(s.ids) - 1) for s in samples) and changed == 0
    )  # layers x K; the weights that sampled choose the same
    logp, (_, changed) = answer_logprobs(now, batch, CFG, N_VOCAB)
    expected = sum(
        len(set(a) - set(b))
        for s in samples
        for own, before in zip(now(torch.tensor([s.ids[:-1]])).experts, s.experts, strict=True)
        for a, b in zip(own.tolist(), before.tolist(), strict=True)
    )
    assert changed == expected > 0
    replayed, _ = answer_logprobs(now, batch, CFG, N_VOCAB, replay=True)
    assert (replayed - logp).abs().max() > 1e-3
    alone = []
    for s in samples:
        logits = now(torch.tensor([s.ids[:-1]]), replay_NTK=s.experts.int()).logits[0, s.start - 1 :, :N_VOCAB]
        alone.append((logits / CFG.temperature).log_softmax(1).gather(1, torch.tensor(s.ids[s.start :])[:, None])[:, 0])
    torch.testing.assert_close(replayed, torch.cat(alone), rtol=1e-4, atol=1e-4)


# ---- runs


def test_learns_from_rewards_alone(start, tmp_path, monkeypatch):
    """From a reward of 10 % to 95 % and more on sums with 0; the start model answers in the right form."""
    everything = Task.questions
    easy = lambda q: q.prompt.endswith(" 0 =") and "*" not in q.prompt  # noqa: E731
    monkeypatch.setattr(
        Task, "questions", lambda task, source, split, n: list(filter(easy, everything(task, source, "train", n)))
    )
    results = main(
        [
            "--task=mano",
            f"--model={start}",
            f"--out-dir={tmp_path / 'run'}",
            "--questions=3000",
            "--eval-questions=600",
            "--answer-tokens=6",
            "--batch-prompts=64",
            "--mini-batch=32",
            "--group-size=16",
            "--steps=60",
            "--lr=1e-3",
            "--beta2=0.99",
            "--eval-every=0",
            "--device=cpu",
        ]
    )
    log = rows(tmp_path / "run")
    assert 0.05 < log[1]["reward"] < 0.15 and log[0]["test_reward"] < 0.3
    assert sum(row["reward"] for row in log[-6:-1]) / 5 >= 0.95 and results["test_reward"] >= 0.95
    assert (
        0 < log[-2]["kl"] < 5
        and log[1]["kl"] < log[-2]["kl"]
        and log[1]["mixed_groups"] > 0.5 > log[-2]["mixed_groups"]
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("replay", [False, True])
def test_on_a_gpu(start, tmp_path, replay):
    """bfloat16, Triton kernels, sampling from CUDA graphs: the routers choose mostly as they did while sampling."""
    main(
        [
            *SHORT,
            f"--model={start}",
            f"--out-dir={tmp_path / 'run'}",
            "--device=cuda",
            "--dtype=bfloat16",
            "--batch-prompts=64",
            "--mini-batch=16",
            "--steps=3",
            "--eval-every=0",
            f"--replay={replay}",
        ]
    )
    log = [row for row in rows(tmp_path / "run") if "reward" in row]
    assert all(
        row["ended"] > 0.9 and 0 < row["reward"] < 0.4 and row["router_changed_same_weights"] < 0.1 for row in log
    )
    assert log[0]["kl"] < 0.05 and 0 < log[-1]["grad_norm"] < 10


@pytest.fixture(scope="module")
def whole_run(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("grpo") / "whole"
    results = main(
        [
            *SHORT,
            f"--model={start}",
            f"--out-dir={out}",
            "--batch-prompts=12",
            "--mini-batch=4",
            "--steps=4",
            "--eval-every=3",
            "--checkpoint-every=2",
            "--keep-checkpoints=9",
        ]
    )
    return out, results


def test_run_directory(whole_run, start):
    out, results = whole_run
    log = rows(out)
    assert [row["step"] for row in log if "reward" in row] == [1, 2, 3, 4] and [
        row["step"] for row in log if "test_reward" in row
    ] == [0, 3, 4]
    assert (
        json.loads((out / "results.json").read_text())["test_reward"]
        == results["test_reward"]
        == log[-1]["test_reward"]
    )
    assert all(
        0 <= row["reward"] <= 1 and row["padding"] < 0.1 and row["router_changed_same_weights"] < 0.01
        for row in log
        if "reward" in row
    )
    assert checkpoint.load_model(out).cfg == checkpoint.load_model(start).cfg
    with pytest.raises(ValueError, match="it already holds a run"):
        main([*SHORT, f"--model={start}", f"--out-dir={out}"])


def test_resume_equals_uninterrupted_bit_for_bit(whole_run, tmp_path):
    whole, results = whole_run
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    checkpoint.find(cut)[-1][1].unlink()
    resumed = main([f"--resume={cut}"])
    assert resumed["test_reward"] == results["test_reward"] and rows(cut) == rows(whole)
    a, b = checkpoint.read(cut), checkpoint.read(whole)
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in b["model"])
    for i, state in b["optimizer"]["state"].items():
        assert all(torch.equal(value, a["optimizer"]["state"][i][name]) for name, value in state.items())
    written = (cut / "results.json").read_text()
    assert main([f"--resume={cut}"]) == resumed and rows(cut) == rows(whole)  # a finished run only reports again
    assert (cut / "results.json").read_text() == written


def test_resume_check_can_fail(whole_run, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(whole_run[0], cut)
    checkpoint.find(cut)[-1][1].unlink()
    state = checkpoint.read(cut)
    state["optimizer"]["state"][0]["exp_avg"].zero_()
    checkpoint.find(cut)[-1][1].unlink()
    checkpoint.save(cut, 2, state, keep=9)
    main([f"--resume={cut}"])
    found, expected = (checkpoint.read(run)["model"] for run in (cut, whole_run[0]))
    assert any(not torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("reward", [0.0, 1.0, None])
def test_without_differences_the_weights_stand_still(start, tmp_path, monkeypatch, reward):
    """All answers right, or all wrong. With real rewards, without a KL, per answer and with replay, they move."""
    if reward is not None:
        monkeypatch.setattr(Task, "rewards", lambda task, questions, texts: [reward] * len(texts))
    main(
        [
            *SHORT,
            f"--model={start}",
            f"--out-dir={tmp_path / 'run'}",
            "--batch-prompts=16",
            "--mini-batch=8",
            "--steps=2",
            "--eval-every=0",
            "--kl-coef=0",
            "--weight-decay=0",
            "--normalize=sample",
            "--replay",
        ]
    )
    before, after = (checkpoint.read(run)["model"] for run in (start, tmp_path / "run"))
    assert all(torch.equal(before[name], after[name]) for name in before) == (reward is not None)
    assert all(
        row["kl"] == 0 and row["reward"] == (row["reward"] if reward is None else reward)
        for row in rows(tmp_path / "run")
        if "reward" in row
    )


def asking(patch, part, calls=1):
    """A part of a step, in whose given call a signal asks for the end."""
    left = iter(range(calls - 1, -1, -1))

    def asked(*args):
        if next(left) == 0:
            patch.setattr(Stop, "asked", True)
        return part(*args)

    return asked


def test_a_signal_while_answers_are_sampled_ends_the_run_before_the_update(
    whole_run, start, tmp_path, monkeypatch, capsys
):
    """The weights are still those of the last step: they are saved, and the run goes on bit for bit."""
    for calls in (1, 2):
        out = tmp_path / f"stopped-{calls}"
        with monkeypatch.context() as patch:
            patch.setattr(grpo_file, "roll_out", asking(patch, grpo_file.roll_out, calls))
            flags = ["--batch-prompts=12", "--mini-batch=4", "--steps=4", "--eval-every=3", "--checkpoint-every=9"]
            assert main([*SHORT, f"--model={start}", f"--out-dir={out}", *flags]) is None
        assert [step for step, _ in checkpoint.find(out)] == [calls - 1]
        capsys.readouterr()
        main([f"--resume={out}", "--checkpoint-every=2"])
        assert rows(out) == rows(whole_run[0]) and "has lost" not in capsys.readouterr().out


def test_stopping_saves_and_goes_on(whole_run, start, tmp_path, monkeypatch, capsys):
    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(grpo_file, "update", asking(patch, grpo_file.update))
        flags = ["--batch-prompts=12", "--mini-batch=4", "--steps=4", "--eval-every=3", "--checkpoint-every=2"]
        assert main([*SHORT, f"--model={start}", f"--out-dir={out}", *flags]) is None
    assert [step for step, _ in checkpoint.find(out)] == [1] and not (out / "results.json").exists()
    shutil.copytree(out, tmp_path / "ended")
    main([f"--resume={out}"])
    assert rows(out) == rows(whole_run[0])
    ended = main([f"--resume={tmp_path / 'ended'}", "--steps=1"])
    assert (
        ended["step"] == 1
        and ended["test_reward"] == rows(tmp_path / "ended")[-1]["test_reward"]
        and len(rows(tmp_path / "ended")) == 3
    )
    main(
        [f"--resume={tmp_path / 'ended'}", "--steps=2", "--weight-decay=0.3", "--beta2=0.5", "--lr=0.1"]
    )  # other flags override
    said = capsys.readouterr().out
    assert "1 step of 12 x " in said and said.splitlines()[-2].endswith("| eta 0:00:00")
    groups = checkpoint.read(tmp_path / "ended")["optimizer"]["param_groups"]
    assert [(group["weight_decay"], tuple(group["betas"]), group["lr"]) for group in groups] == [
        (0.3, (0.9, 0.5), 0.1),
        (0, (0.9, 0.5), 0.1),
    ]


def test_an_interrupt_before_the_first_step_ends_with_a_message(start, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo_file, "load_start", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(sys, "argv", ["grpo.py", *SHORT, f"--model={start}", f"--out-dir={tmp_path / 'x'}"])
    monkeypatch.delenv("DEBUG", raising=False)
    with pytest.raises(SystemExit, match="^stopped; "):
        main()


def test_killed_before_the_first_checkpoint_starts_again(whole_run, tmp_path, monkeypatch):
    cut = tmp_path / "cut"
    shutil.copytree(whole_run[0], cut)
    for _, path in checkpoint.find(cut):
        path.unlink()
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match=f"the loss is nan at step 1: .*--resume={cut} --lr=0.0005 starts again"),
    ):
        patch.setattr(grpo_file, "policy_loss", lambda logp_A, *args: (logp_A.sum() * math.nan, logp_A.new_zeros(3)))
        main([f"--resume={cut}"])
    main([f"--resume={cut}"])
    assert rows(cut) == rows(whole_run[0])


def test_data_of_another_model(start, tmp_path):
    mixture = MixtureConfig(
        FactsConfig(n_people=2), ReasoningConfig(names=90), exposures=0, n_problems=0, n_mano=50, window=0
    )
    procedural.build(tmp_path / "data", mixture)
    with pytest.raises(ValueError, match="name the data directory that the model was trained on"):
        main([*SHORT, f"--model={start}", f"--out-dir={tmp_path / 'x'}", f"--data={tmp_path / 'data'}"])
    assert not (tmp_path / "x").exists()


def test_two_ranks_equal_one(whole_run, start, tmp_path):
    whole, _ = whole_run
    out = tmp_path / "two"
    flags = [
        *SHORT,
        f"--model={start}",
        f"--out-dir={out}",
        "--batch-prompts=12",
        "--mini-batch=4",
        "--steps=4",
        "--eval-every=3",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "grpo.py", *flags]
    process = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    for one, two in zip(rows(whole), rows(out), strict=True):
        for name in set(one) - {"padding"}:
            assert two[name] == pytest.approx(one[name], rel=2e-3, abs=1e-6), name
    before, one, two = (checkpoint.read(path)["model"] for path in (start, whole, out))
    for name in one:
        assert (one[name] - two[name]).norm() <= 0.02 * (one[name] - before[name]).norm(), name


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model="], "model=''"),
        (["--group-size=1"], "group_size=1"),
        (["--mini-batch=5"], "batch_prompts=1024"),
        (["--temperature=0"], "temperature=0"),
        (["--seed=-1"], "seed=-1"),
        (["--clip=1"], "clip=1"),
        (["--prompt-tokens=2"], "prompt_tokens=2"),
        (["--task=gsm8k"], "gsm8k/train was not found"),
        (["--questions=0"], "no end of procedural questions"),
    ],
)
def test_mistakes_are_named(start, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        main([*SHORT, f"--model={start}", f"--out-dir={tmp_path / 'x'}", *flags])
    assert not (tmp_path / "x").exists()
