"""Batched generation with a KV cache.

    texts = generate(model, [encode("Alice has"), encode("2+2=")], max_new_tokens=32, stop_ids=[eos])

Every prompt gets what it would get alone: rows keep their own positions (model.KVCache), and sampling draws from a random stream
of each prompt, so neither the batch size nor the other prompts change a result.

Shapes: B rows still running, L longest prompt of the batch, V vocabulary.
"""

import torch

from model import KVCache


@torch.no_grad()
def generate(model, prompts, max_new_tokens, stop_ids=(), temperature=0.0, top_p=1.0, seed=0, batch_size=64, n_vocab=None,
             stop_strings=(), decode=None, streams=None):
    """Continue each prompt; return the new token ids, one list per prompt.

    prompts: lists of token ids, none empty. A row ends before any of stop_ids (not returned), with the token that completes one of
    stop_strings (returned; needs decode: ids -> str), or after max_new_tokens.
    temperature 0 is greedy (top_p and seed unused); else sampling from the smallest set of tokens with probability >= top_p.
    Prompt i draws from a stream seeded with (seed, streams[i]), by default (seed, i).
    n_vocab: ids from here on are padding rows of the head, never produced.
    Raises ValueError for an empty prompt, bad sampling parameters, or a prompt + max_new_tokens beyond the model's seq_len.
    """
    longest = max(map(len, prompts), default=0)
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt is empty: start it with a token, for instance end-of-text")
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}, batch_size={batch_size}: use 1 or more")
    if longest + max_new_tokens > model.cfg.seq_len:
        raise ValueError(f"a prompt of {longest} tokens + max_new_tokens={max_new_tokens} exceeds seq_len={model.cfg.seq_len}: "
                         "shorten one of them")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature}, top_p={top_p}: use temperature >= 0 and 0 < top_p <= 1")
    if stop_strings and decode is None:
        raise ValueError("stop_strings needs decode, the tokenizer's ids -> str")

    def stopped(ids):
        # A stop string may span tokens; every token has at least one byte of it.
        return any(s in decode(ids[-len(s.encode()):]) for s in stop_strings)

    was_training = model.training
    model.eval()
    outputs = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths together: little padding
    try:
        for start in range(0, len(prompts), batch_size):
            rows = by_length[start : start + batch_size]
            seeds = [seed * 1_000_003 + (i if streams is None else streams[i]) for i in rows]
            _generate_batch(model, prompts, rows, outputs, max_new_tokens, set(stop_ids), stopped, temperature, top_p, seeds, n_vocab)
    finally:
        model.train(was_training)
    return outputs


def _generate_batch(model, prompts, rows, outputs, max_new_tokens, stop_ids, stopped, temperature, top_p, seeds, n_vocab):
    device = model.embed.weight.device
    lengths_B = torch.tensor([len(prompts[i]) for i in rows], device=device)
    L = len(prompts[rows[-1]])
    tokens_BL = torch.tensor([prompts[i] + [0] * (L - len(prompts[i])) for i in rows], device=device)
    cache = KVCache(model.cfg, len(rows), L + max_new_tokens - 1, device, model.dtype)
    cache.new_B = lengths_B
    noise = None
    if temperature > 0:
        draws = [torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(s)) for s in seeds]
        noise = torch.stack(draws).to(device)
    for step in range(max_new_tokens):
        logits_BV = model(tokens_BL, cache=cache).logits[:, 0, :n_vocab].float()
        next_B = logits_BV.argmax(1) if noise is None else sample(logits_BV / temperature, top_p, noise[:, step])
        alive = []
        for j, token in enumerate(next_B.tolist()):
            if token not in stop_ids:
                outputs[rows[j]].append(token)
                if not stopped(outputs[rows[j]]):
                    alive.append(j)
        if not alive:
            break
        if len(alive) < len(rows):  # finished rows leave the batch
            keep = torch.tensor(alive, device=device)
            cache.select(keep)
            next_B, noise = next_B[keep], None if noise is None else noise[keep]
            rows = [rows[j] for j in alive]
        tokens_BL = next_B[:, None]


def sample(logits_BV, top_p, uniform_B):
    """One token of each row from the nucleus top_p, by inverting the cumulative distribution at uniform_B in [0, 1)."""
    probs, ids = logits_BV.softmax(1).sort(dim=1, descending=True, stable=True)
    below = probs.cumsum(1) - probs
    probs = probs.masked_fill(below >= top_p, 0)  # the first token has nothing below it and always stays
    cumulative = probs.cumsum(1)
    pick = torch.searchsorted(cumulative, uniform_B[:, None] * cumulative[:, -1:], right=True)
    return ids.gather(1, pick.clamp(max=(probs > 0).sum(1, keepdim=True) - 1))[:, 0]
