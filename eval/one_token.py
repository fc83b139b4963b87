"""One token of every sequence through the model on the kernels of moe_kernels.decode: what GPT.forward computes with a
cache and one new token each, up to rounding, in a third of the launches."""

import torch.nn.functional as F_

from moe_kernels import decode, moe_experts
from moe_kernels.tiles import pick_impl


def has_step(model):
    """Whether `step` knows this model and its kernels can run where its weights are."""
    cfg = model.cfg
    if cfg.dense or cfg.n_shared_experts or (cfg.qk_norm and cfg.qk_norm_joint) or cfg.impl not in ("auto", "triton"):
        return False
    one_gpu = model.before_layer is None and all(block.mlp.experts is moe_experts for block in model.blocks)
    return one_gpu and pick_impl(cfg.kernels, model.embed.weight) == "triton"


def step(model, tokens_B1, cache):
    """Logits (B, V) of the tokens after tokens_B1 (B, 1); the cache grows by one token of every row.

    The model's weights have one dtype (Decoder casts them)."""
    positions_B, cfg = cache.begin_step(), model.cfg
    x_TD = F_.embedding(tokens_B1[:, 0], model.embed.weight)
    for layer, block in enumerate(model.blocks):
        attn, moe = block.attn, block.mlp
        norms = (attn.q_norm.weight, attn.k_norm.weight) if cfg.qk_norm else (None, None)
        qkv = decode.linear(x_TD, attn.qkv.weight, block.attn_norm.weight, cfg.norm_eps)
        y = decode.attend(
            qkv.view(len(qkv), -1, cfg.head_dim), model.cos, model.sin, positions_B, cache.k[layer], cache.v[layer],
            cfg.n_heads, *norms, cfg.norm_eps,
        )  # fmt: skip
        x_TD = decode.linear(y, attn.out.weight, add=x_TD)
        normed, gates, experts = decode.route_few(
            x_TD, block.mlp_norm.weight, cfg.norm_eps, moe.router.weight, cfg.top_k, cfg.router_score == "sigmoid",
            cfg.router_normalize, moe.bias_E,
        )  # fmt: skip
        cache.record(layer, experts)
        x_TD = decode.experts(normed, moe.w_in, moe.w_out, gates, experts, x_TD, cfg.activation)
    positions_B += 1
    return decode.linear(x_TD, model.head.weight, model.norm.weight, cfg.norm_eps)
