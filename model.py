"""A GPT whose feed-forward layers are mixtures of experts, Mixtral-style, as in arXiv 2508.18672.

    model = GPT(preset("tiny", vocab_size=512))
    out = model(tokens_BL, targets_BL)  # train.py minimises out.loss + 1e-2 * out.balance + 1e-3 * out.z

Shapes: B batch, L sequence, T = B*L tokens, D width, F expert width, G = 2F (gate rows, then up rows), E experts, K
experts per token, N MoE layers, H heads (Hkv for keys and values), d head width, V vocabulary. Weights are float32,
cast at each use; AdamW may keep the matrices in blocks in bfloat16 (docs/optimizer.md).
"""

import functools
import hashlib
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F_
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from moe_kernels import (
    add_rms_norm,
    balance_loss,
    gated_activation,
    gates_of,
    linear_cross_entropy,
    moe_experts,
    rope,
    route,
)
from moe_kernels.ops import use_kernels
from optimoe.config import check_range, require

UNTAUGHT = "a single gate that sums to 1 is always 1, so the loss has no gradient for the router; "
UNTAUGHT += "use --router_normalize=false"


@dataclass(frozen=True)
class ModelConfig:
    # Model
    vocab_size: int = 0  # V; 0: size of the tokenizer, rounded up to a multiple of 64
    seq_len: int = 256  # L, tokens in the longest sequence
    d_model: int = 128  # D, width of the model
    n_layers: int = 4  # number of blocks
    n_heads: int = 4  # query heads
    n_kv_heads: int = 4  # key and value heads; fewer than n_heads: grouped-query attention
    head_dim: int = 32  # width of a head
    # Experts
    n_experts: int = 8  # E, experts per layer
    top_k: int = 2  # K, experts per token
    d_expert: int = 256  # F, hidden width of one expert
    n_shared_experts: int = 0  # experts that every token uses
    dense: bool = False  # no router: one gated MLP with the same active FLOPs
    router_score: Literal["softmax", "sigmoid"] = "softmax"  # turns the router's logits into scores
    router_normalize: bool = True  # divide a token's gates (the scores of its K experts) by their sum
    router_bias_rate: float = 0.0  # rate of loss-free balancing by a selection bias (1e-3 is usual); 0: off
    # Choices
    activation: Literal["swiglu", "geglu", "relu2"] = "swiglu"  # of experts and dense layers
    qk_norm: bool = False  # RMSNorm on query and key heads before RoPE
    qk_norm_joint: bool = False  # with qk_norm: one RMSNorm for all query heads, one for all key heads (OLMoE)
    tie_embeddings: bool = False  # one matrix for input and output embeddings
    rope_theta: float = 1e4  # base of the RoPE frequencies
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    init_std: float = 0.02  # std of initial weights; / sqrt(2 * n_layers) in matrices that write to the residual stream
    embed_init_std: float = 0.0  # std of the initial input embeddings; 0: init_std
    # Execution
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of compute; auto: bfloat16 on CUDA, else float32
    impl: Literal["auto", "reference", "grouped_mm", "triton"] = "auto"  # of moe_kernels' ops; auto: by device
    loss_chunk: int = 16384  # tokens whose logits exist at one time (triton)
    recompute: Literal["none", "experts", "blocks"] = "none"  # computed again in the backward pass, to save memory

    def __post_init__(self):
        self.validate()

    @property
    def kernels(self):
        """The argument impl of the ops."""
        return None if self.impl == "auto" else self.impl

    @property
    def router_learns(self):
        """Whether the router, if any, gets a gradient. Without it train.py starts no new run; old models load."""
        return self.dense or self.n_experts == 1 or self.top_k > 1 or not self.router_normalize

    def validate(self):
        """Raises ValueError with the field, its value and the remedy."""
        check_range(self, "d_model n_layers n_heads n_kv_heads head_dim d_expert loss_chunk", 1, 2**30)
        check_range(self, "vocab_size n_shared_experts router_bias_rate norm_eps embed_init_std", 0, 2**30)
        check_range(self, "seq_len", 1, 2**22)
        check_range(self, "n_experts", 1, 1024)
        check_range(self, "top_k", 1, min(32, self.n_experts))
        require(self.init_std > 0, "init_std", self.init_std, "use a positive number")
        require(self.rope_theta > 1, "rope_theta", self.rope_theta, "use a number above 1 (1e4 is usual)")
        for name, factor in (("d_model", 16), ("d_expert", 16), ("head_dim", 2)):
            require(getattr(self, name) % factor == 0, name, getattr(self, name), f"use a multiple of {factor}")
        has_experts = not self.dense or self.recompute != "experts"
        require(has_experts, "recompute", self.recompute, "a dense model has no experts: use blocks")
        kv, heads = self.n_kv_heads, self.n_heads
        require(heads % kv == 0, "n_kv_heads", kv, f"use a divisor of n_heads={heads}")


class Output(NamedTuple):
    logits: Tensor | None  # (B, L, V), or (B, 1, V) with a cache; None with targets
    loss: Tensor | None  # float32 mean cross-entropy in nats over targets >= 0; None without targets
    balance: Tensor  # float32, balance_loss summed over MoE layers; N at perfect balance
    z: Tensor  # float32, sum over MoE layers of mean logsumexp(router logits)^2
    counts_NE: Tensor  # int32, tokens that chose each expert, by MoE layer; (0, E) in a dense model
    probs_NE: Tensor  # float32, mean router probabilities; differentiable
    experts: tuple[Tensor, ...] = ()  # the router's choice in each MoE layer, int32 (T, K)


class Linear(nn.Linear):
    """Without bias. Its weight is cast to the input's dtype; GPT.draw initialises it."""

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out, bias=False)

    def reset_parameters(self):
        pass

    def forward(self, x):
        return F_.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """x / sqrt(mean of squares + eps) * weight, with float32 statistics."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return F_.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class AddNorm(RMSNorm):
    """See `add_rms_norm`: x + y, and the RMSNorm of this sum, for a router and its experts twice."""

    def __init__(self, cfg):
        super().__init__(cfg.d_model, cfg.norm_eps)
        self.impl, self.uses = cfg.kernels, 1 if cfg.dense else 2

    def forward(self, x, y):
        # Under autocast the residual stream may be float32 and the output of attention bfloat16.
        return add_rms_norm(x, y.to(x.dtype), self.weight, self.eps, self.impl, self.uses)


def rope_tables(cfg):
    """cos and sin, each (L, 1, d) float32. The first half of sin is negated: a rotation is x*cos + roll(x, d/2)*sin."""
    exact = dict(dtype=torch.float64, device="cpu")  # MPS has no float64
    freqs = cfg.rope_theta ** (-torch.arange(0, cfg.head_dim, 2, **exact) / cfg.head_dim)
    angles = torch.outer(torch.arange(cfg.seq_len, **exact), freqs)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], 1).float()[:, None], torch.cat([-sin, sin], 1).float()[:, None]


def document_mask(doc_ids_BL, fused):
    """The attention mask: a token sees itself and earlier tokens of its document.

    fused: a BlockMask for flex_attention, which skips blocks of 128 x 128 masked pairs. Else booleans
    (B, 1, L, L), with which attention computes masked pairs too."""
    B, L = doc_ids_BL.shape
    make = create_block_mask if fused else create_mask
    sees = lambda b, h, i, j: (i >= j) & (doc_ids_BL[b, i] == doc_ids_BL[b, j])
    return make(sees, B, 1, L, L, doc_ids_BL.device)


@functools.cache
def fused_attention():
    """For blocks that are not compiled: uncompiled flex_attention writes all scores to memory."""
    return torch.compile(flex_attention, dynamic=False)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.heads = (cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads)
        self.head_dim, self.eps, self.impl = cfg.head_dim, cfg.norm_eps, cfg.kernels
        self.qkv = Linear(cfg.d_model, sum(self.heads) * cfg.head_dim)
        self.out = Linear(cfg.n_heads * cfg.head_dim, cfg.d_model)
        q_width, k_width = (n * cfg.head_dim if cfg.qk_norm_joint else cfg.head_dim for n in self.heads[:2])
        self.q_norm = RMSNorm(q_width, cfg.norm_eps) if cfg.qk_norm else None
        self.k_norm = RMSNorm(k_width, cfg.norm_eps) if cfg.qk_norm else None
        self.joint = cfg.qk_norm and cfg.qk_norm_joint

    def forward(self, x_BLD, cos, sin, mask=None, cache=None, layer=0):
        B, L, _ = x_BLD.shape
        H, Hkv, _ = self.heads
        qkv = self.qkv(x_BLD).view(B, L, sum(self.heads), self.head_dim)
        if self.joint:
            q, k, v = qkv.split(self.heads, 2)
            qkv = torch.cat([self.q_norm(q.flatten(2)).view_as(q), self.k_norm(k.flatten(2)).view_as(k), v], 2)
        norms = (None, None) if self.joint or self.q_norm is None else (self.q_norm.weight, self.k_norm.weight)
        q, k, v = rope(qkv, cos, sin, H, *norms, self.eps, self.impl)
        if cache is not None:
            k_all, v_all = cache.update(layer, k, v)
            if mask is not None:  # without a mask the cache was empty
                k, v = k_all, v_all
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if mask is not None and L == 1:  # a key head's query heads become its queries: no repeated keys
            y = F_.scaled_dot_product_attention(q.view(B, Hkv, H // Hkv, self.head_dim), k, v, attn_mask=mask)
        elif isinstance(mask, BlockMask):
            attend = flex_attention if torch.compiler.is_compiling() else fused_attention()
            y = attend(q.transpose(1, 2), k, v, block_mask=mask, enable_gqa=H != Hkv).transpose(1, 2)
        else:
            form = dict(attn_mask=mask, is_causal=mask is None, enable_gqa=H != Hkv)
            y = F_.scaled_dot_product_attention(q.transpose(1, 2), k, v, **form).transpose(1, 2)
        return self.out(y.reshape(B, L, H * self.head_dim))


class GatedMLP(nn.Module):
    """A dense layer, or the shared experts."""

    def __init__(self, cfg, d_hidden):
        super().__init__()
        self.gate_up, self.down = Linear(cfg.d_model, 2 * d_hidden), Linear(d_hidden, cfg.d_model)
        self.activation, self.impl = cfg.activation, cfg.kernels

    def forward(self, x_TD):
        return self.down(gated_activation(self.gate_up(x_TD), self.activation, self.impl))


def again(function, *args, **kwargs):
    """function(*args, **kwargs), of which only the arguments are kept: the backward pass computes it again."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


class MoE(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.router = Linear(cfg.d_model, cfg.n_experts)
        self.w_in = nn.Parameter(torch.empty(cfg.n_experts, 2 * cfg.d_expert, cfg.d_model))
        self.w_out = nn.Parameter(torch.empty(cfg.n_experts, cfg.d_model, cfg.d_expert))
        self.experts = moe_experts  # optimoe/exchange.py replaces it where experts live on several GPUs
        self.shared = GatedMLP(cfg, cfg.n_shared_experts * cfg.d_expert) if cfg.n_shared_experts else None
        self.register_buffer("bias_E", torch.zeros(cfg.n_experts) if cfg.router_bias_rate else None)

    def choose(self, x_TD, replay_TK=None):
        """(Routing, the router's own choice int32 (T, K)). A router variant is a field of ModelConfig and a line here.

        replay_TK: experts to use instead of that choice; -1 keeps the choice. Gates come from the present logits."""
        cfg = self.cfg
        logits_TE = self.router(x_TD)
        r = route(logits_TE, cfg.top_k, cfg.router_score, cfg.router_normalize, self.bias_E, impl=cfg.kernels)
        chosen_TK = r.experts_TK
        if replay_TK is not None:
            experts_TK = torch.where(replay_TK >= 0, replay_TK, chosen_TK)
            gates_TK = gates_of(logits_TE, experts_TK, cfg.router_score, cfg.router_normalize)
            r = r._replace(experts_TK=experts_TK, gates_TK=gates_TK)
        return r, chosen_TK

    def forward(self, x_TD, router_x_TD, add_TD, replay_TK=None, stats=True):
        """add + y (T, D) and (balance, z, counts (E,), probs (E,), choice (T, K)); without stats add + y and (choice,).

        router_x_TD: x once more, for the router, see add_rms_norm."""
        r, chosen_TK = self.choose(router_x_TD, replay_TK)
        w_in, w_out = self.w_in.to(x_TD.dtype), self.w_out.to(x_TD.dtype)
        kernels = dict(impl=self.cfg.kernels, activation=self.cfg.activation, add_TD=add_TD)
        args = x_TD, w_in, w_out, r.gates_TK, r.experts_TK
        recompute = self.cfg.recompute == "experts"
        y_TD = again(self.experts, *args, **kernels) if recompute else self.experts(*args, **kernels)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        if not stats:
            return y_TD, (chosen_TK,)
        return y_TD, (balance_loss(r.counts_E, r.probs_E), r.z, r.counts_E, r.probs_E, chosen_TK)


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(cfg.d_model, cfg.norm_eps), Attention(cfg)
        self.mlp_norm = AddNorm(cfg)
        self.mlp = GatedMLP(cfg, (cfg.top_k + cfg.n_shared_experts) * cfg.d_expert) if cfg.dense else MoE(cfg)

    def forward(self, x_BLD, cos, sin, mask=None, cache=None, layer=0, replay_TK=None):
        y_BLD = self.attn(self.attn_norm(x_BLD), cos, sin, mask, cache, layer)
        x_TD, *normed = (t.flatten(0, 1) for t in self.mlp_norm(x_BLD, y_BLD))
        if isinstance(self.mlp, MoE):
            x_TD, stats = self.mlp(*normed, x_TD, replay_TK, stats=cache is None)
        else:
            x_TD, stats = x_TD + self.mlp(*normed), None
        return x_TD.view_as(x_BLD), stats


class GPT(nn.Module):
    """draw=False leaves the weights uninitialised: the caller loads them."""

    def __init__(self, cfg, draw=True):
        super().__init__()
        require(cfg.vocab_size >= 1, "vocab_size", cfg.vocab_size, "give the tokenizer's size")
        self.cfg = cfg
        self.before_layer = None  # called with each block's number before it runs, then with n_layers
        self.limit = None  # exchange.Limit where kernels send tokens to experts on other GPUs
        self.embed = nn.Embedding.from_pretrained(torch.empty(cfg.vocab_size, cfg.d_model), freeze=False)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.head = Linear(cfg.d_model, cfg.vocab_size)
        if cfg.tie_embeddings:
            self.head.weight = self.embed.weight
        for name, table in zip(("cos", "sin"), rope_tables(cfg), strict=True):
            self.register_buffer(name, table.to(self.embed.weight.device), persistent=False)
        if draw and not self.embed.weight.is_meta:
            self.draw(getattr(cfg, "seed", 0))  # train.py's configuration has a seed

    @torch.no_grad()
    def draw(self, seed):
        """Draw initial weights. The generator of a matrix, or of an expert in it, is seeded by seed, name and index.

        docs/optimizer.md says why. A CPU and a GPU draw different numbers."""
        cfg, generator = self.cfg, torch.Generator(self.embed.weight.device)
        embed_std = cfg.embed_init_std or cfg.init_std
        for name, weight in self.named_parameters():
            if weight.ndim == 1:  # norms start at 1
                continue
            to_residual = name.endswith(("attn.out.weight", "w_out", "down.weight"))
            std = cfg.init_std / math.sqrt(2 * cfg.n_layers) if to_residual else cfg.init_std
            key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7])
            by_expert = name.endswith(("router.weight", "w_in", "w_out"))
            for i, part in enumerate(weight if by_expert else [weight]):
                generator.manual_seed(key + i)
                part.normal_(std=embed_std if name == "embed.weight" else std, generator=generator)
        if cfg.tie_embeddings:
            # Else the logit of the input token itself would start at about D * embed_std.
            self.norm.weight.fill_(min(1.0, 1 / (cfg.d_model * embed_std)))

    @property
    def dtype(self):
        return compute_dtype(self.cfg, self.embed.weight.device)

    def forward(self, tokens_BL, targets_BL=None, doc_ids_BL=None, cache=None, replay_NTK=None):
        """tokens (B, L) int64 -> Output. Given targets (B, L), where -1 means no loss, it has a loss and no logits.

        doc_ids (B, L) int32, from data/loader.py: attention stays within a document.
        cache (eval/kv_cache.py): the tokens continue its sequences. Logits are those of each row's last token that is
        not padding; there are no statistics.
        replay_NTK (int32): experts to use instead of the routers' choice, which is still counted; -1 keeps the choice.
        Raises ValueError if L is above seq_len."""
        B, L = tokens_BL.shape
        require(L <= self.cfg.seq_len, "sequence length", L, f"the model's seq_len is {self.cfg.seq_len}")
        ready = self.before_layer or (lambda layer: None)
        ready(0)
        x = self.embed(tokens_BL).to(self.dtype)
        cos, sin, mask, stats = self.cos[:L], self.sin[:L], None, []
        if cache is not None:
            pos_BL, mask = cache.begin(L)
            cos, sin = self.cos[pos_BL], self.sin[pos_BL]
        elif doc_ids_BL is not None:  # RoPE is relative: positions need not restart
            mask = document_mask(doc_ids_BL, x.is_cuda and use_kernels(self.cfg.kernels, x))
        # Blocks are compiled for the one shape of training; evaluation has many shapes and runs them eagerly.
        compiled = self.training and cache is None and replay_NTK is None
        for layer, block in enumerate(self.blocks):
            ready(layer)
            if compiled:
                recompute = self.cfg.recompute == "blocks"
                x, layer_stats = again(block, x, cos, sin, mask) if recompute else block(x, cos, sin, mask)
            else:
                replay_TK = None if replay_NTK is None else replay_NTK[layer]
                x, layer_stats = block.forward(x, cos, sin, mask, cache, layer, replay_TK)
            if layer_stats is not None and cache is not None:
                cache.record(layer, layer_stats[-1])
            elif layer_stats is not None:
                stats.append(layer_stats)
        ready(self.cfg.n_layers)
        x = self.norm(x)
        if cache is not None:
            x = x[torch.arange(B, device=x.device), cache.end(L), None]
        logits = loss = None
        if targets_BL is None:
            logits = self.head(x)
        else:
            x_TD, targets_T = x.flatten(0, 1), targets_BL.flatten()
            loss = linear_cross_entropy(x_TD, self.head.weight, targets_T, self.cfg.loss_chunk, self.cfg.kernels)
        if not stats:
            zero, none = x.new_zeros((), dtype=torch.float32), x.new_zeros((0, self.cfg.n_experts), dtype=torch.float32)
            return Output(logits, loss, zero, zero, none.int(), none)
        *losses, experts = zip(*stats, strict=True)
        balance, z, counts, probs = map(torch.stack, losses)
        return Output(logits, loss, balance.sum(), z.sum(), counts, probs, experts)


@torch.no_grad()
def update_router_bias(model, counts_NE):
    """Loss-free balancing (arXiv 2408.15664): raise the bias of experts below the mean load, lower that of the others.

    counts_NE: of one optimiser step, over all micro-batches and ranks."""
    layers = [block.mlp for block in model.blocks if getattr(block.mlp, "bias_E", None) is not None]
    for moe, counts_E in zip(layers, counts_NE.float(), strict=bool(layers)):
        moe.bias_E += model.cfg.router_bias_rate * torch.sign(counts_E.mean() - counts_E)


def compute_dtype(cfg, device):
    """The torch.dtype in which a model computes on a device."""
    if cfg.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, cfg.dtype)
