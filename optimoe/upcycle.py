"""Start a mixture of experts from a dense checkpoint, so that step 0 computes exactly what the dense model computed.

A dense gated layer is a sum over hidden units. Its first n_shared_experts * F units become the shared experts, the
others G slices of width F. Expert e starts as slice e % G, so every G experts are a copy of the dense layer. They share
a router row, so top-k takes whole copies c, with gates g_c / G. W_out times G gives the dense output:

    y = sum over copies c of g_c * (1/G) * sum over slices s of G * slice_s(x) = dense(x),   sum of g_c = 1

    G = 1   experts as wide as the dense layer (arXiv 2212.05055); K times its FLOPs
    G = K   the same preset with `--dense`: equal FLOPs per token, one copy active (arXiv 2410.07524)

This is exact if G divides K and E and gates are normalised; all else is refused. Copies diverge because they get
different tokens.
"""

import dataclasses
from pathlib import Path

import torch

from data import files
from model import ModelConfig
from optimoe import checkpoint
from optimoe.config import complete, require

SAME = "vocab_size d_model n_layers n_heads n_kv_heads head_dim activation qk_norm qk_norm_joint tie_embeddings"
SAME += " rope_theta norm_eps"
RUNS = ("dense", "dtype", "impl", "loss_chunk", "recompute")  # fields of ModelConfig that a run chooses


def training_fields(path):
    """Defaults of train.TrainConfig: sizes and data of a dense run. path: its directory or a checkpoint in it."""
    directory = Path(path).parent if Path(path).is_file() else Path(path)
    if not (directory / "config.json").is_file():
        return {}
    dense = complete(ModelConfig, files.read_json(directory / "config.json"))
    own = {field.name for field in dataclasses.fields(ModelConfig)}.difference(RUNS)
    data = dense.get("data") or str(directory / "data")
    return {name: dense[name] for name in own} | {"data": data}


def slices_per_copy(dense, cfg):
    """G for the config dict of a dense checkpoint and the ModelConfig of the MoE. Raises ValueError for a misfit."""
    for name in SAME.split():
        value, kept = getattr(cfg, name), dense[name]
        require(value == kept, name, value, f"the dense checkpoint has {kept!r}; use the same")
    require(not cfg.dense, "dense", True, "a dense model is continued with --resume; upcycle_from starts a mixture")
    require(cfg.router_normalize, "router_normalize", False, "the dense output is only kept by gates that sum to 1")
    width = (dense["top_k"] + dense["n_shared_experts"]) * dense["d_expert"]
    slices, rest = divmod(width - cfg.n_shared_experts * cfg.d_expert, cfg.d_expert)
    remedy = f"slices of this width, {cfg.n_shared_experts} of them shared, do not make up the dense width {width}"
    require(slices > 0 and not rest, "d_expert", cfg.d_expert, remedy)
    for name, value in (("top_k", cfg.top_k), ("n_experts", cfg.n_experts)):
        require(value % slices == 0, name, value, f"one copy of the dense layer is {slices} experts: use a multiple")
    more = "" if cfg.n_experts > 1 else " and --n_experts=8"
    remedy = f"a single gate that sums to 1 trains no router; use --top_k=2{more}, for example"
    require(cfg.top_k > 1, "top_k", cfg.top_k, remedy)
    return slices


@torch.no_grad()
def upcycle(model, path):
    """Fill a fresh float32 GPT, whose router rows are used, from a dense run directory or checkpoint file.

    Raises ValueError if the shapes allow no exact start or the checkpoint is damaged; FileNotFoundError without one."""
    cfg, state = model.cfg, checkpoint.read(path)
    remedy = "a mixture of experts; give the run directory of a --dense model"
    require(state["config"]["dense"], "upcycle_from", str(path), remedy)
    slices, weights = slices_per_copy(state["config"], cfg), state["model"]
    shared, F, copies = cfg.n_shared_experts * cfg.d_expert, cfg.d_expert, cfg.n_experts // slices
    own = {name: value for name, value in weights.items() if ".mlp." not in name}
    missing, unexpected = model.load_state_dict(own, strict=False)
    fit = not unexpected and all(".mlp." in name for name in missing)
    require(fit, "upcycle_from", str(path), f"other weights: {missing} {unexpected}")
    for layer, block in enumerate(model.blocks):
        # float(): a run with --weights=bfloat16 has saved bfloat16.
        gate_WD, up_WD = weights[f"blocks.{layer}.mlp.gate_up.weight"].float().chunk(2)
        down_DW, moe = weights[f"blocks.{layer}.mlp.down.weight"].float(), block.mlp
        if shared:
            moe.shared.gate_up.weight.copy_(torch.cat([gate_WD[:shared], up_WD[:shared]]))
            moe.shared.down.weight.copy_(down_DW[:, :shared])
        cuts = range(shared, len(gate_WD), F)
        w_in = torch.stack([torch.cat([gate_WD[at : at + F], up_WD[at : at + F]]) for at in cuts])
        moe.w_in.copy_(w_in.repeat(copies, 1, 1))
        moe.w_out.copy_((torch.stack([down_DW[:, at : at + F] for at in cuts]) * slices).repeat(copies, 1, 1))
        # Equal logits: top-k takes all slices of a copy.
        moe.router.weight.copy_(moe.router.weight[:copies].repeat_interleave(slices, 0))
    for name, value in model.named_parameters():
        finite = bool(value.isfinite().all())
        require(finite, "upcycle_from", str(path), f"{name} is not finite; choose another checkpoint")
