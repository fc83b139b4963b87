"""The keys and values of sequences that are being generated, and on request the experts of their tokens.

model.GPT calls begin, then update and record in each layer, then end. Shapes: B sequences, L new tokens of each, N
layers, Hkv key and value heads, d head width, K experts per token.
"""

import copy
import math

import torch

from optimoe.config import require


class KVCache:
    """Keys and values of B sequences of different lengths; each row gets the same results as alone.

    Prompts are padded on the right; `new_B` (B,) says how many tokens of each row are real (None: all L). Row b is
    written from lengths_B[b] on and attends to its own positions; padding after its end is overwritten before anything
    attends to it. All writes are in place, so a step with a fixed `span` can be captured in a CUDA graph."""

    def __init__(self, cfg, batch_size, max_len, device=None, dtype=torch.float32):
        shape = (cfg.n_layers, batch_size, max_len, cfg.n_kv_heads, cfg.head_dim)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.experts = None  # (N, B, max_len, K) int16 after keep_experts
        self.lengths_B = torch.zeros(batch_size, device=device, dtype=torch.long)
        self.new_B = None
        self.filled = 0  # upper bound of lengths_B, known without waiting for the device
        self.span = 0  # keys that a step attends to, masked ones included; 0: filled + L

    def view(self, n_rows, filled, span=0):
        """The first rows as a cache on the same memory."""
        cache = copy.copy(self)
        cache.k, cache.v, cache.lengths_B = self.k[:, :n_rows], self.v[:, :n_rows], self.lengths_B[:n_rows]
        cache.experts = None if self.experts is None else self.experts[:, :n_rows]
        cache.filled, cache.span = filled, span
        return cache

    def begin(self, L):
        """Positions (B, L) of the new tokens, and the mask (B, 1, L, span) to add to the attention scores, None while
        the cache is empty."""
        end, device = self.filled + L, self.lengths_B.device
        require(end <= self.k.shape[2], "length", end, f"the cache holds max_len={self.k.shape[2]} tokens")
        self.pos_BL = self.lengths_B[:, None] + torch.arange(L, device=device)
        self.row_B1 = torch.arange(len(self.pos_BL), device=device)[:, None]
        if not self.filled:
            return self.pos_BL, None
        hidden = self.pos_BL[:, None, :, None] < torch.arange(self.span or end, device=device)
        return self.pos_BL, torch.zeros(hidden.shape, device=device, dtype=self.k.dtype).masked_fill_(hidden, -math.inf)

    def begin_step(self):
        """Positions (B,) of one new token of each row. eval/one_token.py writes the cache and the lengths."""
        require(self.filled < self.k.shape[2], "length", self.filled + 1, f"the cache holds {self.k.shape[2]} tokens")
        self.pos_BL = self.lengths_B[:, None]
        if self.experts is not None:
            self.row_B1 = torch.arange(len(self.pos_BL), device=self.pos_BL.device)[:, None]
        return self.lengths_B

    def update(self, layer, k_BLHd, v_BLHd):
        """Store a layer's new keys and values; return all of them, (B, span, Hkv, d)."""
        L, at = self.pos_BL.shape[1], (layer, self.row_B1, self.pos_BL)
        self.k[at], self.v[at] = k_BLHd, v_BLHd
        span = self.span or self.filled + L
        return self.k[layer, :, :span], self.v[layer, :, :span]

    def keep_experts(self, top_k):
        """From now on, store which experts each token goes to."""
        self.experts = torch.zeros((*self.k.shape[:3], top_k), device=self.k.device, dtype=torch.int16)

    def record(self, layer, experts_TK):
        """Store the experts that a layer's router chose, after keep_experts."""
        if self.experts is not None:
            self.experts[layer, self.row_B1, self.pos_BL] = experts_TK.view(*self.pos_BL.shape, -1).to(torch.int16)

    def end(self, L):
        """Advance the lengths; return the index (B,) of the last real token of each row."""
        new_B = torch.full_like(self.lengths_B, L) if self.new_B is None else self.new_B
        self.lengths_B += new_B
        self.filled, self.new_B = self.filled + L, None
        return new_B - 1

    def select(self, rows):
        """Move these rows (a LongTensor) to the front, so that finished ones leave the batch."""
        n = rows.numel()
        for tensor in (self.k, self.v, self.experts):
            for layer in () if tensor is None else tensor:  # one at a time, because each makes a copy
                layer[:n] = layer[rows]
        self.lengths_B[:n] = self.lengths_B[rows]
