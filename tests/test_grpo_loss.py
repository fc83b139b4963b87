"""The loss of GRPO through a whole model: gradients, weights, and what must not teach. CPU.

Run: python -m pytest tests/test_grpo_loss.py"""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch

import grpo as grpo_file
from grpo import GRPOConfig, answer_logprobs, look_back, main, make_batches, sample_answers
from model import GPT, ModelConfig
from optimoe.policy import advantages, collate, micro_batches, policy_loss
from tests.test_grpo import SHAPE, SHORT, start  # noqa: F401  a fixture
from tests.test_policy import formula, formula_gradient

CFG = GRPOConfig(model="x", temperature=0.7, micro_tokens=70, rollout_batch=16)


N_VOCAB = 45


def make(seed=0):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=50, seq_len=40, d_model=32, head_dim=16, d_expert=32, init_std=0.3, dtype="float32")
    return GPT(ModelConfig(**SHAPE | {"n_layers": 2}, **sizes)).eval()


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
        if len({s.length for s in samples}) > 3 and len({s.ids[-1] == 0 for s in samples}) == 2:  # some were cut
            break
    else:
        raise AssertionError("no suitable samples")
    now = copy.deepcopy(model)
    with torch.no_grad():
        for p in now.parameters():
            p += 0.03 * torch.randn(p.shape, generator=rng) * p.std()
    return model, now, make(1), samples, torch.randn(8, generator=rng).tolist()


def test_a_sampled_answer_ends_at_any_end_and_keeps_the_one_that_was_drawn():
    every = SimpleNamespace(eos=[0, 7, 9], n_vocab=N_VOCAB, decode=Letters.decode)
    samples = sample_answers(make(), every, [[1, 2, 3]] * 64, range(64), 12, CFG, 0)
    answers = [sample.ids[3:] for sample in samples]
    assert {ids[-1] for ids in answers if len(ids) < 12} == {0, 7, 9}
    assert not {0, 7, 9} & {token for ids in answers for token in ids[:-1]}
    assert all(len(ids) <= 13 and (len(ids) == 12 or ids[-1] in every.eos) for ids in answers)


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
        given = mine, logp(model, s), logp(begin, s), torch.full_like(mine, a), torch.full_like(mine, w)
        given = [t.detach() for t in given]
        expected += formula(*given, 0.2, 0.1)
        (mine * formula_gradient(*given, 0.2, 0.1)).sum().backward()
    assert total == pytest.approx(expected, rel=1e-4)
    for name, p in now.named_parameters():
        assert ((found[name] - p.grad).norm() / p.grad.norm()).item() < 1e-3, name


@pytest.mark.parametrize("normalize", ["token", "sample"])
def test_weights_of_a_mini_batch_sum_to_one(sampled, start, tmp_path, monkeypatch, normalize):  # noqa: F811
    """Over its micro-batches and ranks, as the loss says. Adam would hide any other scale."""
    model, _, _, samples, advantage = sampled
    cfg = dataclasses.replace(CFG, batch_prompts=4, mini_batch=4, group_size=4, normalize=normalize)
    for world in (1, 2):
        rank = SimpleNamespace(world=world, device="cpu", sum=lambda values, w=world: [w * value for value in values])
        rank.stop, rank.first = SimpleNamespace(asked=False), False
        job = SimpleNamespace(model=model, start_model=None, tokens=Letters, step=0)
        mine = samples * (2 // world)  # of two ranks, each has the same half
        (mini,) = make_batches(cfg, rank, job, mine, advantage * (2 // world))
        given = torch.cat([batch.weight_A for batch in mini])
        assert len(mini) > 1 and given.sum().item() * world == pytest.approx(1)
        pairs = zip(samples, weights(samples, normalize), strict=True)
        expected = [w / 2 for s, w in pairs for _ in range(s.length)] * (2 // world)
        assert sorted(given.tolist()) == pytest.approx(sorted(expected))
    seen, norms, loss, step = [], [], grpo_file.policy_loss, torch.optim.AdamW.step

    def norm(adamw):
        return torch.nn.utils.get_total_norm([p.grad for group in adamw.param_groups for p in group["params"]])

    weighed = lambda x, batch, *a: (seen.append(batch.weight_A), loss(x, batch, *a))[1]
    monkeypatch.setattr(grpo_file, "policy_loss", weighed)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (norms.append(norm(self)), step(self))[1])
    flags = [f"--out-dir={tmp_path / 'run'}", "--batch-prompts=12", "--mini-batch=4", "--steps=1", "--clip-norm=1e-3"]
    main([*SHORT, f"--model={start}", *flags, f"--normalize={normalize}"])
    assert torch.cat(seen).sum().item() == pytest.approx(3)
    assert [float(n) for n in norms] == pytest.approx([1e-3] * 3, rel=1e-2)  # and clipped, which Adam hides too


def test_prompts_and_padding_get_no_gradient(sampled):
    model, now, begin, samples, advantage = sampled
    batch = look_back(collate(samples, advantage, weights(samples, "token"), "cpu"), model, begin, CFG, N_VOCAB)
    seen = []
    look = lambda _, inputs, output: output.register_hook(lambda g: seen.append(g.flatten(0, 1))) and None
    handle, losses = now.head.register_forward_hook(look), []
    for padding in (0, 17):
        tokens = batch.tokens_BL.masked_fill(batch.sampled_NTK[0, :, 0].view_as(batch.tokens_BL) < 0, padding)
        logp_A, _ = answer_logprobs(now, batch._replace(tokens_BL=tokens), CFG, N_VOCAB)
        losses.append(policy_loss(logp_A, batch, 0.2, 0.1)[0])
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
        batch = collate(samples, given, weights(samples, "token"), "cpu")
        batch = look_back(batch, None, copy.deepcopy(model), CFG, N_VOCAB)
        policy_loss(answer_logprobs(model, batch, CFG, N_VOCAB)[0], batch, 0.2, 0.1)[0].backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        assert norm < 1e-6 if zero else norm > 1e-2


def test_changed_choices_are_counted_and_replayed(sampled):
    model, now, _, samples, advantage = sampled
    batch = collate(samples, advantage, weights(samples, "token"), "cpu")
    _, (slots, changed) = answer_logprobs(model, batch, CFG, N_VOCAB)
    assert slots == sum(2 * 2 * (len(s.ids) - 1) for s in samples)  # layers x K
    assert changed == 0  # the weights that sampled choose the same
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
