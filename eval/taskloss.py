"""Task loss: the cost in bits of the gold answer given the prompt, as in the taskloss-eval of arXiv 2508.18672.

For each item: NLL = -sum log p(answer token | prompt, answer so far); bits/token = NLL / ln 2 / answer tokens,
bits/byte = NLL / ln 2 / UTF-8 bytes of the answer. The task's figure is the plain mean over items, so short answers
weigh as much as long ones.

Which tokens are the answer's? The paper takes encode(prompt + answer) from index len(encode(prompt)) on, special tokens
included. That is right while encode(prompt) is a prefix of it, and there this file does the same. Otherwise a token has
merged across the boundary ("Answer:" + "Janet" may give ":J", "anet"), and the paper's slice would charge the wrong
tokens: then the prompt is encoded alone, which is also what generation sees, and the answer alone. So every byte of the
answer is paid for exactly once, and no byte of the prompt is. Such items are counted as `merged` in the results.

    tokens = tiktoken_tokens(enc)
    context, answer, merged = encode_pair(tokens, "2+2=", "4")
    nats = score(model, [(context, answer)])[0]
"""

import math

import torch
import torch.nn.functional as F

from data.tokenizer import Tokens
from eval.generate import any_shape


def context_ids(tokens: Tokens, prompt: str) -> list[int]:
    """The ids of a prompt with bos. An empty prompt of a tokenizer without bos is an end-of-text token, as in lm-eval.
    Raises ValueError where there is neither.
    """
    ids = tokens.bos + tokens.encode(prompt)
    if not ids and not tokens.eos:
        raise ValueError("a prompt is empty, and the tokenizer has no token to start it with (neither bos nor eos)")
    return ids or tokens.eos[:1]


def encode_pair(tokens: Tokens, prompt: str, answer: str) -> tuple[list[int], list[int], bool]:
    """(prompt ids with bos, answer ids, merged); see the top of this file. ValueError when the answer is empty."""
    if not answer:
        raise ValueError(f"the answer after {prompt[-40:]!r} is empty: nothing to score")
    context, whole = context_ids(tokens, prompt), tokens.bos + tokens.encode(prompt + answer)
    if prompt and whole[: len(context)] == context:
        return context, whole[len(context) :], False
    return (context, encode_inside(tokens, answer), True) if prompt else (context, tokens.encode(answer), False)


def encode_inside(tokens: Tokens, text: str) -> list[int]:
    """Of a text that follows others: without the space that SentencePiece puts in front of every text."""
    ids = tokens.encode(text)
    if tokens.decode(ids) == " " + text:
        for before in "\n.a":
            head, whole = tokens.encode(before), tokens.encode(before + text)
            if whole[: len(head)] == head and tokens.decode(whole[len(head) :]) == text:
                return whole[len(head) :]
    return ids


def windows(context: list[int], answer: list[int], seq_len: int):
    """Yields (ids, n): the model reads ids[:-1] and the last n of ids are scored. One window when everything fits, ids
    then being context + answer; else every answer token is scored once, with as much before it as fits, at least half
    of seq_len.
    """
    ids, start = context + answer, len(context)
    while start < len(ids):
        end = min(len(ids), max(start + seq_len // 2, seq_len + 1))
        yield ids[max(0, end - seq_len - 1) : end], end - start
        start = end


@torch.no_grad()
@any_shape
def score(model, pairs: list[tuple[list[int], list[int]]], max_tokens: int | None = None) -> list[float]:
    """NLL in nats of each answer given its context; contexts must not be empty. Similar lengths go through the model
    together, max_tokens at a time, padding included (default: by vocabulary, so that the logits stay near 1 GB).
    Weights in any dtype; softmax in float32 over the whole head, sums in float64.
    """
    device, cfg = model.embed.weight.device, model.cfg
    max_tokens = max_tokens or min(16384, 2**29 // cfg.vocab_size)
    work = [(*window, i) for i, pair in enumerate(pairs) for window in windows(*pair, cfg.seq_len)]
    work.sort(
        key=lambda window: len(window[0]), reverse=True
    )  # longest first: what does not fit in memory fails at once
    totals = torch.zeros(len(pairs), dtype=torch.float64, device=device)
    while work:
        L = len(work[0][0]) - 1
        rows = max(1, max_tokens // max(1, L))
        batch, work = work[:rows], work[rows:]
        ids = torch.tensor([ids + [0] * (L + 1 - len(ids)) for ids, _, _ in batch], device=device)
        ends, counts, owners = (
            torch.tensor(values, device=device)
            for values in zip(*((len(ids), n, i) for ids, n, i in batch), strict=True)
        )
        position = torch.arange(1, L + 1, device=device)
        scored_BL = (position < ends[:, None]) & (position >= (ends - counts)[:, None])
        logits = model(ids[:, :-1]).logits[scored_BL].float()
        nll = F.cross_entropy(logits, ids[:, 1:][scored_BL], reduction="none")
        totals.index_add_(0, owners.repeat_interleave(counts), nll.double())
    return totals.tolist()


def bits(nats: float, count: int) -> float:
    return nats / math.log(2) / count


def mean_stderr(values: list[float]) -> dict:
    """{"mean", "stderr", "n"}: stderr is the sample standard deviation / sqrt(n); None for fewer than two values."""
    n = len(values)
    mean = sum(values) / n if n else None
    stderr = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None
    return {"mean": mean, "stderr": stderr, "n": n}
