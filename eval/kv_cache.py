"""Keys and values of sequences in generation, and on request the experts of their tokens. model.GPT calls it:
`model(tokens_BL, cache=cache)`.

Shapes: B sequences, L new tokens of each, N layers, Hkv key and value heads, d head width, K experts per token.
"""

import copy
import math

import torch

from optimoe.config import require


class KVCache:
    """Keys and values of B sequences, each with its own length, so that a batch generates what its rows would generate
    alone.

    Prompts are padded on the right; `forward(tokens_BL, cache=cache)` takes `cache.new_B` (B,) real tokens of each row
    (None: all L), writes row b at positions lengths_B[b] .. and lets it attend to its own positions only. What a pad
    token writes lies past the end of its row: the row's next tokens overwrite it before anyone can attend to it.
    Everything happens in place, so that a step with a fixed `span` can be captured in a CUDA graph.
    """

    def __init__(self, cfg, batch_size, max_len, device=None, dtype=torch.float32):
        require(
            1 <= max_len <= cfg.seq_len, "max_len", max_len, f"the model's RoPE table ends at seq_len={cfg.seq_len}"
        )
        shape = (cfg.n_layers, batch_size, max_len, cfg.n_kv_heads, cfg.head_dim)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.experts = None  # on request (N, B, max_len, K) int16: the experts of each token
        self.lengths_B = torch.zeros(batch_size, device=device, dtype=torch.long)
        self.new_B = None
        self.filled = 0  # host-side bound on lengths_B, so that nothing waits for the device
        self.span = 0  # keys that a step attends to, masked ones included; 0: filled + L

    def view(self, n_rows, filled, span=0):
        """The first rows as a cache on the same memory."""
        cache = copy.copy(self)
        cache.k, cache.v, cache.lengths_B = self.k[:, :n_rows], self.v[:, :n_rows], self.lengths_B[:n_rows]
        cache.experts = None if self.experts is None else self.experts[:, :n_rows]
        cache.filled, cache.span = filled, span
        return cache

    def begin(self, L):
        """Positions (B, L) of the new tokens and what is added to the attention scores, (B, 1, L, span); None while the
        cache is empty.
        """
        require(
            self.filled + L <= self.k.shape[2],
            "length",
            self.filled + L,
            f"the cache holds max_len={self.k.shape[2]} tokens",
        )
        device = self.lengths_B.device
        self.pos_BL = self.lengths_B[:, None] + torch.arange(L, device=device)
        self.row_B1 = torch.arange(len(self.pos_BL), device=device)[:, None]
        if not self.filled:
            return self.pos_BL, None
        hidden = self.pos_BL[:, None, :, None] < torch.arange(self.span or self.filled + L, device=device)
        return self.pos_BL, torch.zeros(hidden.shape, device=device, dtype=self.k.dtype).masked_fill_(hidden, -math.inf)

    def update(self, layer, k_BLHd, v_BLHd):
        """Store a layer's new keys and values; return all of them, (B, span, Hkv, d)."""
        L, at = self.pos_BL.shape[1], (layer, self.row_B1, self.pos_BL)
        self.k[at], self.v[at] = k_BLHd, v_BLHd
        span = self.span or self.filled + L
        return self.k[layer, :, :span], self.v[layer, :, :span]

    def keep_experts(self, top_k):
        """From now on remember which experts each token goes to, for grpo.py."""
        self.experts = torch.zeros((*self.k.shape[:3], top_k), device=self.k.device, dtype=torch.int16)

    def record(self, layer, experts_TK):
        """Store the experts that a layer's router chose, where they are asked for."""
        if self.experts is not None:
            self.experts[layer, self.row_B1, self.pos_BL] = experts_TK.view(*self.pos_BL.shape, -1).to(torch.int16)

    def end(self, L):
        """Advance the lengths; return the index (B,) of the last real token of each row."""
        new_B = torch.full_like(self.lengths_B, L) if self.new_B is None else self.new_B
        self.lengths_B += new_B
        self.filled, self.new_B = self.filled + L, None
        return new_B - 1

    def select(self, rows):
        """Move these rows (a LongTensor) to the front: finished sequences leave the batch."""
        n = rows.numel()
        for tensor in (
            *self.k,
            *self.v,
            *(() if self.experts is None else self.experts),
        ):  # a layer at a time: the copy needs that much memory
            tensor[:n] = tensor[rows]
        self.lengths_B[:n] = self.lengths_B[rows]
