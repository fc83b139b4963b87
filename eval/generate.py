"""Batched generation with a KV cache.

    texts = generate(model, [encode("Alice has"), encode("2+2=")], max_new_tokens=32, stop_ids=[eos])

Every prompt gets the text that it would get alone: rows have their own positions (KVCache) and random streams.

On a GPU, launching a token's kernels takes longer than running them in a small model. So there are few shapes, and one
that comes again is captured in a CUDA graph, which also picks the token. The host looks every eight steps: tokens after
a row's end are dropped, and finished rows leave when most of the batch has finished.

Shapes: B rows of the batch, L longest prompt of the batch, V vocabulary.
"""

import copy

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from eval.kv_cache import KVCache
from eval.one_token import has_step, step
from moe_kernels import decode
from optimoe.config import require

# cuDNN's attention, the default of an H100, builds a plan for each new shape; evaluation has a new one in every batch.
any_shape = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


@torch.no_grad()
@any_shape
def generate(
    model,
    prompts,
    max_new_tokens,
    stop_ids=(),
    temperature=0.0,
    top_p=1.0,
    seed=0,
    batch_size=64,
    n_vocab=None,
    stop_strings=(),
    decode=None,
    streams=None,
    experts=None,
    top_k=0,
    watch=None,
    ended=None,
):
    """Continue each prompt, a list of token ids that is not empty. Returns the new token ids, one list per prompt.

    stop_ids, stop_strings: a row ends before one of these ids, or with the token that completes one of these strings
    (which needs decode: ids -> str), or after max_new_tokens.
    temperature: 0 is greedy. Else a token is drawn from the top_k most likely ones (0: all), and of those from the
    smallest set with probability >= top_p, by a stream seeded with (seed, streams[i]), by default (seed, i).
    n_vocab: ids from here on are padding rows of the head and never produced.
    experts: a list to be filled with the experts that the routers chose for each prompt, int16 (N, tokens, K), without
    the last new token, which the model has not read unless a stop id followed.
    watch: called as watch(i, new ids of prompt i so far) whenever they have grown.
    ended: a list to be filled with the stop id that ended each prompt's text, or None where none did.

    Needs memory for the cache of batch_size rows and for a copy of weights that are not in the compute dtype.
    ValueError for an empty prompt, bad sampling parameters, or prompt + max_new_tokens beyond the model's seq_len."""
    longest = max(map(len, prompts), default=0)
    require(all(map(len, prompts)), "prompts", "", "a prompt is empty: start it with a token, for instance end-of-text")
    require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "use 1 or more")
    check_sampling(batch_size, temperature, top_p, top_k)
    require(decode or not stop_strings, "stop_strings", stop_strings, "it needs decode, the tokenizer's ids -> str")
    remedy = f"after a prompt of {longest} tokens this exceeds seq_len={model.cfg.seq_len}; shorten one of them"
    require(longest + max_new_tokens <= model.cfg.seq_len, "max_new_tokens", max_new_tokens, remedy)
    if not prompts:
        return []
    ending, outputs = (max_new_tokens, set(stop_ids), stop_strings, decode), [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths together: little padding
    n_batches = -(-len(prompts) // batch_size)
    batches = [by_length[len(prompts) * b // n_batches : len(prompts) * (b + 1) // n_batches] for b in range(n_batches)]
    decoder = Decoder(model, max(map(len, batches)), longest, max_new_tokens, temperature, top_p, n_vocab, top_k)
    if experts is not None:
        decoder.cache.keep_experts(model.cfg.top_k)
        experts[:] = [None] * len(prompts)
    if ended is not None:
        ended[:] = [None] * len(prompts)
    for rows in batches:
        seeds = [(seed * 1_000_003 + (i if streams is None else streams[i])) % 2**63 for i in rows]
        decoder.start([prompts[i] for i in rows], seeds)
        alive = rows
        while alive:
            new, rows = decoder.read(), list(rows)
            for j, i in enumerate(rows):
                before = 0 if i is None else len(outputs[i])
                n_read = None if i is None else extend(outputs[i], new[j], *ending)
                if i is not None and watch:
                    watch(i, outputs[i])
                if n_read is not None:
                    rows[j] = None
                    if ended is not None and n_read == len(outputs[i]):
                        ended[i] = new[j][n_read - before]
                    if experts is not None:
                        experts[i] = decoder.cache.experts[:, j, : len(prompts[i]) + n_read].clone()
            alive = [j for j, i in enumerate(rows) if i is not None]
            if alive and decoder.shrink(alive):
                rows = [rows[j] for j in alive]
    return outputs


def check_sampling(batch_size, temperature, top_p, top_k=0, prefix="", greedy=""):
    """ValueError for what cannot be sampled with. prefix: of the fields' names, temperature and top_p. greedy: why a
    temperature of 0 is refused too."""
    require(batch_size >= 1, "batch_size", batch_size, "use 1 or more")
    usable = temperature == 0 and not greedy or temperature >= 1e-6  # logits divided by less may be infinite
    remedy = f"{greedy}; use 1e-6 or more" if greedy else "use 0 (greedy), or 1e-6 or more"
    require(usable, f"{prefix}temperature", temperature, remedy)
    require(0 < top_p <= 1, f"{prefix}top_p", top_p, "use a number above 0, at most 1")
    require(top_k >= 0, "top_k", top_k, "use 0 (all tokens) or more")


def extend(ids, new, max_new_tokens, stop_ids, stop_strings, decode):
    """Append the new tokens to the row's ids, up to its end. Returns how many of its ids the model has read, or None if
    the row has not ended."""
    # A stop string may span tokens, each with at least one byte of it. One look at all new tokens often suffices.
    room = max((len(s.encode()) for s in stop_strings), default=0)
    suspect = room and any(s in decode(ids[-room:] + new) for s in stop_strings)
    for token in new:
        if token in stop_ids:
            return len(ids)
        ids.append(token)
        if suspect and any(s in decode(ids[-len(s.encode()) :]) for s in stop_strings):
            return len(ids) - 1
    return max_new_tokens - 1 if len(ids) == max_new_tokens else None


def coarse(device):
    """Whether to use few shapes and to look rarely for ended rows, at the price of unused rows, keys and steps."""
    return device.type == "cuda"


class Decoder:
    """The memory and the steps of one batch after another, each of at most n_rows prompts of `longest` tokens."""

    def __init__(self, model, n_rows, longest, max_new_tokens, temperature, top_p, n_vocab, top_k=0):
        device = model.embed.weight.device
        self.coarse = coarse(device)
        syncs = not model.cfg.dense and model.cfg.impl not in ("auto", "triton")  # their experts wait for the device
        self.capture = device.type == "cuda" and not syncs
        self.has_step = has_step(model)
        self.max_new_tokens, self.n_vocab = max_new_tokens, n_vocab
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        # Weights are cast once, not at every step, in a copy that shares those of the right dtype.
        cast = {id(p): nn.Parameter(p.detach().to(model.dtype), requires_grad=False) for p in model.parameters()}
        self.model = copy.deepcopy(model, cast | {id(b): b for b in model.buffers()}).eval()
        n_rows = self.bucket(n_rows)
        aligned = -(-(longest + max_new_tokens - 1) // 16) * 16  # attention is faster with aligned masks
        max_len = min(model.cfg.seq_len, aligned)
        self.cache = KVCache(model.cfg, n_rows, max_len, device, model.dtype)
        self.tokens = torch.zeros(n_rows, 1, dtype=torch.long, device=device)
        self.written = torch.zeros(n_rows, max_new_tokens, dtype=torch.long, device=device)
        self.noise = torch.zeros(n_rows, max_new_tokens, device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)  # n_written, on the device
        self.graphs, self.pool = {}, torch.cuda.graph_pool_handle() if self.capture else None

    def bucket(self, n):
        """Rows of a step for n prompts: n, or on a GPU the next power of two, above 64 the next multiple of 64."""
        if not self.coarse:
            return n
        return 1 << (n - 1).bit_length() if n <= 64 else -(-n // 64) * 64

    def start(self, prompts, seeds):
        """Read the prompts, sorted by length, and pick their first tokens."""
        n, L, device = len(prompts), len(prompts[-1]), self.tokens.device
        if self.temperature > 0:
            draws = [torch.rand(self.max_new_tokens, generator=torch.Generator().manual_seed(s)) for s in seeds]
            self.noise[:n] = torch.stack(draws).to(device)
        self.step.zero_()
        self.cache.lengths_B.zero_()
        cache = self.cache.view(n, 0)
        cache.new_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
        padded = torch.tensor([prompt + [0] * (L - len(prompt)) for prompt in prompts], device=device)
        self.pick(self.model(padded, cache=cache).logits[:, 0])
        self.n_rows, self.filled, self.n_written, self.n_read = n, L, 1, 0
        if self.bucket(n) > n:
            self.select(list(range(n)))

    def read(self):
        """The next tokens of each row: one, or on a GPU eight, because the host must wait for it."""
        end = min(self.n_read + (8 if self.coarse else 1), self.max_new_tokens)
        while self.n_written < end:
            span = self.filled + 1
            if self.has_step:
                span = 0  # eval/one_token.py reads each row's own keys
            elif self.coarse:
                span = min(max(128, 1 << self.filled.bit_length()), self.cache.k.shape[2])
            self.run(self.n_rows, span)
            self.n_written, self.filled = self.n_written + 1, self.filled + 1
        new = self.written[: self.n_rows, self.n_read : end].tolist()
        self.n_read = end
        return new

    def shrink(self, alive):
        """Keep only the rows `alive` if that is worth a new shape. Returns whether it was."""
        most = self.n_rows // 4 if self.coarse else self.n_rows - 1
        if worth := self.bucket(len(alive)) <= most:
            self.select(alive)
        return worth

    def select(self, rows):
        """Move these rows to the front, and fill their bucket with copies of the first."""
        rows = torch.tensor(rows + rows[:1] * (self.bucket(len(rows)) - len(rows)), device=self.tokens.device)
        self.n_rows = len(rows)
        self.cache.select(rows)
        for tensor in (self.tokens, self.noise, self.written):
            tensor[: len(rows)] = tensor[rows]

    def run(self, n_rows, span):
        """One step, from a CUDA graph where its shape has come before. span: as in KVCache."""
        shape = n_rows, span
        if not self.capture or shape not in self.graphs:  # a first run compiles what a capture needs
            self.graphs[shape] = None
            return self.decode(*shape)
        if self.graphs[shape] is None:
            self.graphs[shape] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[shape], pool=self.pool, capture_error_mode="thread_local"):
                self.decode(*shape)
        self.graphs[shape].replay()

    def decode(self, n_rows, span):
        tokens, cache = self.tokens[:n_rows], self.cache.view(n_rows, self.filled, span)
        self.pick(step(self.model, tokens, cache) if self.has_step else self.model(tokens, cache=cache).logits[:, 0])

    def pick(self, logits_BV):
        """Choose the next token of the first B rows."""
        n = len(logits_BV)
        if self.has_step and self.temperature == 0:
            decode.greedy(logits_BV, self.n_vocab, self.tokens, self.written, self.step)
            self.step += 1
            return
        logits_BV = logits_BV[:, : self.n_vocab].float()
        if self.temperature == 0:
            next_B = logits_BV.argmax(1)
        else:
            uniform_B = self.noise[:n].index_select(1, self.step)[:, 0]
            next_B = sample(logits_BV / self.temperature, self.top_p, uniform_B, self.top_k)
        self.tokens[:n] = next_B[:, None]
        self.written[:n].index_copy_(1, self.step, next_B[:, None])
        self.step += 1


def sample(logits_BV, top_p, uniform_B, top_k=0):
    """One token of each row: the inverse of the cumulative distribution at uniform_B in [0, 1), within the nucleus
    top_p of the top_k most likely tokens (0: all)."""
    probs, ids = logits_BV.softmax(1), None
    if top_p < 1 or 0 < top_k < probs.shape[1]:
        probs, ids = probs.sort(dim=1, descending=True, stable=True)
        if top_k:
            probs[:, top_k:] = 0
            probs /= probs.sum(1, keepdim=True)
        below = probs.cumsum(1) - probs
        probs = probs.masked_fill(below >= top_p, 0)  # the first token has nothing below it and always stays
    cumulative = probs.cumsum(1)
    total = cumulative[:, -1:]
    pick = torch.searchsorted(cumulative, uniform_B[:, None] * total, right=True)
    # Rounding up to the total must not pick a token of probability 0.
    pick = pick.clamp(max=(cumulative < total).sum(1, keepdim=True))
    return (pick if ids is None else ids.gather(1, pick))[:, 0]
