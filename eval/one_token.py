"""One token of every sequence through the model on the kernels of moe_kernels.decode: what GPT.forward computes with a
cache and one new token each, up to rounding, in a third of the launches."""

from dataclasses import fields

import torch.nn.functional as F_

from model import ModelConfig
from moe_kernels import decode, moe_experts
from moe_kernels.tiles import pick_impl

# Fields of ModelConfig that `step` handles. A model in which any other is not the default uses GPT.forward.
OBEYED = """vocab_size seq_len d_model n_layers n_heads n_kv_heads head_dim n_experts top_k d_expert router_score
    router_normalize router_bias_rate activation qk_norm tie_embeddings rope_theta norm_eps init_std embed_init_std
    dtype impl loss_chunk recompute""".split()


def has_step(model):
    """Whether `step` computes this model and its kernels can run where its weights are."""
    cfg = model.cfg
    other = (field for field in fields(ModelConfig) if field.name not in OBEYED)
    if cfg.impl not in ("auto", "triton") or any(getattr(cfg, field.name) != field.default for field in other):
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
