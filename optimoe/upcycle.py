"""Start a mixture of experts from a dense checkpoint, so that step 0 computes exactly what the dense model computed.

The dense gated layer has hidden width W. A sum over hidden units may be cut anywhere: the first n_shared_experts * F
units become the shared expert, and the remaining G * F units become G slices of width F (G: slices per copy). Expert e
starts as slice e % G; experts 0 .. G-1 are one copy of the dense layer, G .. 2G-1 the next. The G experts of a copy
start with the same router row, so they get equal logits and top-k takes whole copies. Gates that sum to 1 over the K
chosen are then 1/G of the copy's weight each, and W_out times G restores the dense output:

    y = sum over copies c of g_c * (1/G) * sum over slices s of G * slice_s(x) = dense(x),   sum of g_c = 1

    G = 1   experts as wide as the dense layer (arXiv 2212.05055); K times its FLOPs
    G = K   W = K * F, the `--dense` twin of the same preset: equal FLOPs per token, one copy active (arXiv 2410.07524)

This is exact where G divides K and E, gates are normalised (router_normalize) and there is no selection bias yet.
Everything else is refused. So is K = 1, because a router with one normalised gate does not learn. Noise (a share of
each weight's standard deviation, on the routed experts) makes the copies differ at once; without it they separate by
their different tokens.
"""

import math

import torch

from optimoe import checkpoint
from optimoe.config import require

SAME = "vocab_size d_model n_layers n_heads n_kv_heads head_dim activation qk_norm qk_norm_joint tie_embeddings"
SAME += " rope_theta norm_eps"


def slices_per_copy(dense, cfg):
    """G for the config dict of a dense checkpoint and the ModelConfig of the MoE. ValueError for what does not fit."""
    for name in SAME.split():
        value, kept = getattr(cfg, name), dense[name]
        require(value == kept, name, value, f"the dense checkpoint has {kept!r}; use the same")
    require(not cfg.dense, "dense", True, "a dense model is continued with --resume; upcycle_from starts a mixture")
    single = (
        "upcycling needs gates that sum to 1, and with one of them the router does not learn; use --top_k=2 or more"
    )
    require(cfg.top_k > 1, "top_k", cfg.top_k, single)
    require(cfg.router_normalize, "router_normalize", False, "the dense output is only kept by gates that sum to 1")
    width = (dense["top_k"] + dense["n_shared_experts"]) * dense["d_expert"]
    routed = width - cfg.n_shared_experts * cfg.d_expert
    whole, shared = routed > 0 and routed % cfg.d_expert == 0, f"{cfg.n_shared_experts} of them shared"
    remedy = f"slices of this width, {shared}, do not make up the dense hidden width {width}"
    require(whole, "d_expert", cfg.d_expert, remedy)
    slices = routed // cfg.d_expert
    for name, value in (("top_k", cfg.top_k), ("n_experts", cfg.n_experts)):
        require(value % slices == 0, name, value, f"one copy of the dense layer is {slices} experts: use a multiple")
    return slices


@torch.no_grad()
def upcycle(model, path, noise=0.0, seed=0):
    """Fill a fresh GPT with float32 weights from a dense run directory or checkpoint file; its router rows are used.

    ValueError where the shapes allow no exact start, and for a damaged checkpoint; FileNotFoundError without one."""
    cfg, state = model.cfg, checkpoint.read(path)
    blame = lambda ok, why: require(ok, "upcycle_from", str(path), why)  # noqa: E731
    blame(state["config"]["dense"], "a mixture of experts; give the run directory of a --dense model")
    slices, weights = slices_per_copy(state["config"], cfg), state["model"]
    shared, F = cfg.n_shared_experts * cfg.d_expert, cfg.d_expert
    generator = torch.Generator().manual_seed(seed)
    own = {name: value for name, value in weights.items() if ".mlp." not in name}
    missing, unexpected = model.load_state_dict(own, strict=False)
    fit = not unexpected and all(".mlp." in name for name in missing)
    blame(fit, f"other weights: {missing} {unexpected}")
    for layer, block in enumerate(model.blocks):
        # A run with --weights=bfloat16 saves those.
        gate_WD, up_WD = weights[f"blocks.{layer}.mlp.gate_up.weight"].float().chunk(2)
        down_DW = weights[f"blocks.{layer}.mlp.down.weight"].float()
        moe = block.mlp
        if shared:
            moe.shared.gate_up.weight.copy_(torch.cat([gate_WD[:shared], up_WD[:shared]]))
            moe.shared.down.weight.copy_(down_DW[:, :shared])
        cuts = range(shared, len(gate_WD), F)
        w_in = torch.stack([torch.cat([gate_WD[at : at + F], up_WD[at : at + F]]) for at in cuts])
        w_out = torch.stack([down_DW[:, at : at + F] for at in cuts]) * slices
        for weight, start in ((moe.w_in, w_in), (moe.w_out, w_out)):
            copies = start.repeat(cfg.n_experts // slices, 1, 1)
            if noise:
                copies += noise * start.std() * torch.randn(copies.shape, generator=generator)
            weight.copy_(copies)
        rows_ED = moe.router.weight
        # One initial row per copy: equal logits have equal scores, so top-k takes all slices of a copy.
        rows_ED.copy_(rows_ED[: cfg.n_experts // slices].repeat_interleave(slices, 0))
    for name, value in model.named_parameters():
        blame(math.isfinite(value.abs().max()), f"{name} is not finite; choose another checkpoint")
