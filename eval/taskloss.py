"""Task loss: the bits that a model needs for the gold answer after the prompt, as in arXiv 2508.18672.

    context, answer, merged = encode_pair(tokens, "2+2=", "4")
    nats = score(model, [(context, answer)])[0]

bits/token and bits/byte are NLL / ln 2 / the answer's tokens or UTF-8 bytes. As in the paper, the answer's tokens are
those of encode(prompt + answer) after encode(prompt). If encode(prompt) is not its beginning, a token has merged
across the boundary ("Answer:" + "Janet": ":J", "anet"). Then both are encoded separately; the item is `merged`.
"""

import math

import torch
import torch.nn.functional as F

from data.fast import inside
from data.tokenizer import Tokens, context_ids
from eval.generate import any_shape


def encode_pair(tokens: Tokens, prompt: str, answer: str) -> tuple[list[int], list[int], bool]:
    """(prompt ids with bos, answer ids, merged). ValueError for an empty answer."""
    if not answer:
        raise ValueError(f"the answer after {prompt[-40:]!r} is empty: nothing to score")
    context, whole = context_ids(tokens, prompt), tokens.bos + tokens.encode(prompt + answer)
    if prompt and whole[: len(context)] == context:
        return context, whole[len(context) :], False
    ids = tokens.encode(answer)
    if prompt and tokens.decode(ids) == " " + answer:
        ids = inside(tokens.encode, answer)
    return context, ids, bool(prompt)


def windows(context: list[int], answer: list[int], seq_len: int):
    """Yields (ids, n): the model reads ids[:-1], and the last n are scored, each answer token once. If not all fits
    into one window, each scored token has at least seq_len / 2 tokens before it."""
    ids, start = context + answer, len(context)
    while start < len(ids):
        end = min(len(ids), max(start + (seq_len // 2 or 1), seq_len + 1))
        yield ids[max(0, end - seq_len - 1) : end], end - start
        start = end


@torch.no_grad()
@any_shape
def token_costs(model, pairs, max_tokens: int | None = None, n_vocab: int | None = None) -> list[tuple]:
    """For each (context, answer) of ids: (float64 nats of every answer token given all before it; whether each is the
    most likely one), on the CPU. The softmax is in float32, over the first n_vocab ids (None: the whole head).

    A batch has at most max_tokens, padding included (default: by vocabulary, for logits of 1 GB)."""
    device, cfg = model.embed.weight.device, model.cfg
    max_tokens = max_tokens or min(16384, 2**29 // cfg.vocab_size)
    work = [(*window, i) for i, pair in enumerate(pairs) for window in windows(*pair, cfg.seq_len)]
    work.sort(key=lambda window: len(window[0]), reverse=True)  # longest first: lack of memory shows at once
    nats, likely = ([[torch.zeros(0)] for _ in pairs] for _ in range(2))
    while work:
        L = len(work[0][0]) - 1
        rows = max(1, max_tokens // max(1, L))
        batch, work = work[:rows], work[rows:]
        ids = torch.tensor([ids + [0] * (L + 1 - len(ids)) for ids, _, _ in batch], device=device)
        lengths, counts = torch.tensor([(len(ids), n) for ids, n, _ in batch], device=device).T[:, :, None]
        position = torch.arange(1, L + 1, device=device)
        scored_BL = (position < lengths) & (position >= lengths - counts)
        logits, wanted = model(ids[:, :-1]).logits[scored_BL][:, :n_vocab].float(), ids[:, 1:][scored_BL]
        found = F.cross_entropy(logits, wanted, reduction="none").double(), logits.argmax(1) == wanted
        for values, parts in zip((nats, likely), found, strict=True):
            for (_, _, i), part in zip(batch, parts.cpu().split([n for _, n, _ in batch]), strict=True):
                values[i].append(part)
    return [(torch.cat(costs), torch.cat(best).bool()) for costs, best in zip(nats, likely, strict=True)]


def score(model, pairs: list[tuple[list[int], list[int]]], max_tokens: int | None = None) -> list[float]:
    """NLL in nats of each answer given its context, which must not be empty."""
    return [float(nats.sum()) for nats, _ in token_costs(model, pairs, max_tokens)]


def bits(nats: float, count: int) -> float:
    return nats / math.log(2) / count


def mean_stderr(values: list[float]) -> dict:
    """{"mean", "stderr", "n"}: stderr is the sample standard deviation / sqrt(n), None for fewer than two values."""
    n = len(values)
    mean = sum(values) / n if n else None
    stderr = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None
    return {"mean": mean, "stderr": stderr, "n": n}
