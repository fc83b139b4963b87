"""The arithmetic of GRPO (arXiv 2402.03300) for grpo.py: advantages in groups of answers, micro-batches, and the loss

    sum over answer tokens of weight * (-min(r A, clip(r, 1 - clip, 1 + clip) A) + kl_coef * (s - 1 - log s))
    r = p / p_old, s = p_start / p,  A = (reward - mean of the group) / (standard deviation + 1e-6)

p is the model's probability of a token at the sampling temperature, p_old is p before the step, and p_start is that of
the start model. The second term estimates KL(p || p_start); only the cut of s at exp(MAX_LOG_S) biases it.
weight is 1 / (answer tokens of the mini-batch), or 1 / (answers * tokens of this answer).

Shapes: B sequences of a micro-batch, the longest of L tokens, A answer tokens of all of them, N MoE layers, K experts
per token, P groups of G answers.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Sample(NamedTuple):
    """One answer, with the prompt before it."""

    ids: list[int]  # prompt, answer, and end of text if the answer reached it
    start: int  # index of the answer's first token
    experts: Tensor  # int16 (N, len(ids) - 1, K): what the routers chose while sampling
    text: str  # of the answer
    length = property(lambda self: len(self.ids) - self.start)  # of the answer, in tokens


class Batch(NamedTuple):
    tokens_BL: Tensor  # padded on the right
    sampled_NTK: Tensor  # int32 experts chosen while sampling; -1 at padding
    index_A: Tensor  # positions in B*L before the tokens of answers
    target_A: Tensor  # the tokens of answers
    advantage_A: Tensor
    weight_A: Tensor
    old_A: Tensor | None = None  # log-probabilities before the step; None: the present ones
    start_A: Tensor | None = None  # log-probabilities by the start model; None: no KL term


def advantages(rewards_PG):
    """(P, G) rewards -> (reward - mean of its group) / (standard deviation + 1e-6); exactly 0 if all are equal."""
    return (rewards_PG - rewards_PG.mean(1, keepdim=True)) / (rewards_PG.std(1, keepdim=True) + 1e-6)


def micro_batches(rows, lengths, max_tokens):
    """Lists of rows of similar length: single rows, or at most max_tokens each, a sixteenth of it padding at most."""
    batches, longest, padding = [], 0, 0
    for i in sorted(rows, key=lambda i: -lengths[i]):
        padding += longest - lengths[i]
        if batches and (len(batches[-1]) + 1) * longest <= max_tokens and padding <= max_tokens // 16:
            batches[-1].append(i)
        else:
            batches, longest, padding = [*batches, [i]], lengths[i], 0
    return batches


def collate(samples, advantage_B, weight_B, device):
    """The Batch of some samples. Each token gets the advantage and the weight of its answer."""
    tokens = pad_sequence([torch.tensor(s.ids[:-1]) for s in samples], batch_first=True)
    L = tokens.shape[1]
    sampled_BLNK = pad_sequence([s.experts.transpose(0, 1) for s in samples], batch_first=True, padding_value=-1)
    sampled_NTK = sampled_BLNK.flatten(0, 1).transpose(0, 1).int().contiguous()
    index = torch.cat([torch.arange(b * L + s.start - 1, b * L + len(s.ids) - 1) for b, s in enumerate(samples)])
    target = torch.tensor([token for s in samples for token in s.ids[s.start :]])
    lengths = torch.tensor([s.length for s in samples])
    advantage, weight = (torch.tensor(values).repeat_interleave(lengths) for values in (advantage_B, weight_B))
    return Batch(*(t.to(device) for t in (tokens, sampled_NTK, index, target, advantage, weight)))


# With experts other than those of sampling, a token may be almost impossible (docs/LOG.md). Its s, up to 1e8, would
# outweigh all other tokens. Above e^5 the KL term has no gradient.
MAX_LOG_S = 5.0


def policy_loss(logp_A, batch, clip, kl_coef):
    """The loss at the top of this file; and (3,): sum of the KL estimates, clipped tokens, all tokens."""
    old_A = logp_A.detach() if batch.old_A is None else batch.old_A
    ratio_A = (logp_A - old_A).clamp(max=20).exp()  # e^89 would be infinite, and its gradient NaN
    surrogate = ratio_A * batch.advantage_A
    gain = torch.minimum(surrogate, ratio_A.clamp(1 - clip, 1 + clip) * batch.advantage_A)
    log_s = torch.zeros_like(logp_A) if batch.start_A is None else (batch.start_A - logp_A).clamp(max=MAX_LOG_S)
    kl = torch.expm1(log_s) - log_s
    loss = (batch.weight_A * (kl_coef * kl - gain)).sum()
    return loss, torch.stack([kl.sum(), (gain < surrogate).sum(), torch.ones_like(gain).sum()]).detach()


def draw_questions(n_questions, start, count, seed):
    """Entries start .. start + count - 1 of an endless list: all questions again and again, always in a new order."""
    order = []
    for epoch in range(start // n_questions, (start + count - 1) // n_questions + 1):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        order += torch.randperm(n_questions, generator=generator).tolist()
    return order[start % n_questions :][:count]
