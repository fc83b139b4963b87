"""Sizes of models: presets, parameters, FLOPs and training memory, without making the model.

    python -m optimoe.sizes --preset=paper-d512-e8-k2 --tokens=125e9

Shape letters as in model.py.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from model import ModelConfig
from optimoe import config
from optimoe.config import check_range, require

PAPER_VOCAB = 99_584  # llm-jp-tokenizer v3, padded to a multiple of 128
# Found by trial (docs/LOG.md): learns lookup and arithmetic from two million tokens.
TINY = dict(seq_len=144, d_model=128, n_layers=3, n_heads=4, n_kv_heads=4, head_dim=32, n_experts=8, top_k=2)
TINY |= dict(d_expert=128, qk_norm=True, rope_theta=500.0, init_std=0.05, embed_init_std=0.5)
WIDTHS, EXPERTS, CHOSEN = (512, 1024, 2048), (8, 16, 32, 64, 128, 256), (2, 4, 8, 16)
GRID = [(d, e, k) for d in WIDTHS for e in EXPERTS for k in CHOSEN if k <= e and (d, e) != (2048, 256)]
PRESETS = ("tiny", *(f"paper-d{d}-e{e}-k{k}" for d, e, k in GRID))


def preset_fields(name):
    """The fields that a preset sets: "tiny", the default of train.py, or one of the paper's 65 models."""
    remedy = "use tiny or paper-dD-eE-kK, D in 512 1024 2048, E in 8 16 .. 256, K in 2 4 8 16"
    require(name in PRESETS, "preset", name, remedy)
    if name == "tiny":
        return dict(TINY)
    d, e, k = (int(part[1:]) for part in name.split("-")[1:])
    shape = dict(vocab_size=PAPER_VOCAB, seq_len=4096, d_model=d, n_layers=16, n_heads=d // 128, n_kv_heads=d // 128)
    return shape | dict(head_dim=128, n_experts=e, top_k=k, d_expert=2 * d)


def preset(name, **overrides):
    """The named ModelConfig with some fields replaced."""
    return ModelConfig(**{**preset_fields(name), **overrides})


class Params(NamedTuple):
    total: int  # everything, embeddings included
    active: int  # used by one token: like total, with K experts instead of E
    embedding: int  # input and output embeddings (counted once when tied)


def norm_params(cfg):
    qk_norm = cfg.qk_norm * cfg.head_dim * (cfg.n_heads + cfg.n_kv_heads if cfg.qk_norm_joint else 2)
    return cfg.d_model * (2 * cfg.n_layers + 1) + cfg.n_layers * qk_norm


def count_params(cfg):
    """The Params of GPT(cfg); a test compares them."""
    D, expert = cfg.d_model, 3 * cfg.d_model * cfg.d_expert
    attention = 2 * D * cfg.head_dim * (cfg.n_heads + cfg.n_kv_heads)
    always = attention + cfg.n_shared_experts * expert + (0 if cfg.dense else D * cfg.n_experts)
    embedding = cfg.vocab_size * D * (1 if cfg.tie_embeddings else 2)
    used = embedding + norm_params(cfg) + cfg.n_layers * (always + cfg.top_k * expert)
    unused = 0 if cfg.dense else cfg.n_layers * (cfg.n_experts - cfg.top_k) * expert
    return Params(used + unused, used, embedding)


def flops_per_token(cfg):
    """Training FLOPs per token of the active parts. A weight of a matrix product counts 6; the input embedding is none.
    The causal half of the attention scores counts 6 * n_layers * L * H * d (some reports count the square: 12)."""
    _, active, embedding = count_params(cfg)
    matmul = active - embedding - norm_params(cfg) + cfg.vocab_size * cfg.d_model
    return 6 * matmul + 6 * cfg.n_layers * cfg.seq_len * cfg.n_heads * cfg.head_dim


def training_memory(cfg, tokens, weights="float32"):
    """{part: bytes} when one GPU trains with AdamW in bfloat16 on `tokens` tokens at a time. weights: as in train.py.

    All but activations is exact for one micro-batch per step. With more, gradients of float32 weights in blocks
    take 2 bytes more each."""
    total, _, embedding = count_params(cfg)
    routers = 0 if cfg.dense else cfg.n_layers * cfg.d_model * cfg.n_experts
    rest = embedding + norm_params(cfg) + routers
    routed = (3 if cfg.dense else 2) * cfg.top_k * cfg.d_expert
    layer = 6 * cfg.d_model + 3 * (cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.head_dim + routed
    layer += 3 * cfg.n_shared_experts * cfg.d_expert
    # Recomputed activations exist for one layer at a time.
    without_experts = layer if cfg.dense else layer - routed
    kept = {"none": layer, "experts": without_experts, "blocks": cfg.d_model}[cfg.recompute]
    values = cfg.n_layers * kept + layer - kept
    logits = 2 * cfg.vocab_size * min(tokens, cfg.loss_chunk)
    wide = total if weights == "float32" else rest  # parameters that are float32, like their states
    return {
        "weights and AdamW states (float32)": 12 * wide,
        "weights and AdamW states (bfloat16)": 6 * (total - wide),
        "bfloat16 copies of float32 weights": 2 * wide,
        "gradients (bfloat16 in blocks)": 2 * (total - rest) + 4 * rest,
        "activations (estimate)": 2 * values * tokens + logits,
    }


def least_memory(cfg, tokens, world, group):
    """Bytes that a rank of train.py needs at least, for weights, gradients, states, block inputs and logits.

    group: how many ranks divide the experts (exchange.group_size)."""
    total, _, embedding = count_params(cfg)
    in_block = (12 if cfg.optimizer == "muon" else 16) if cfg.weights == "float32" else 8  # bytes a parameter
    held = (16 * embedding + in_block * (total - embedding)) // world
    if group < world:
        held += 2 * total // group  # what every rank or group holds whole
    return held + tokens * (16 + 2 * cfg.n_layers * cfg.d_model) + 2 * cfg.vocab_size * min(tokens, cfg.loss_chunk)


def require_memory(what, least, device, remedy):
    """Raises ValueError if `what` needs `least` bytes and the device, or the limit of this process, is smaller."""
    if device.type == "cuda":
        has = torch.cuda.get_device_properties(device).total_memory
    else:
        has, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), Path("/sys/fs/cgroup/memory.max")
        text = limit.read_text().strip() if limit.exists() else "max"
        has = min(has, int(text)) if text.isdigit() else has
    if least > has:
        sizes = f"{least / 2**30:,.0f} GiB of memory or more, and there are {has / 2**30:,.1f}"
        raise ValueError(f"{what} need {sizes}: {remedy}")


# Dense bfloat16 TFLOP/s. A key is a part of torch.cuda.get_device_name().
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "GH200": 989, "H20": 148, "H800": 989}
PEAKS |= {"B200": 2250, "A100": 312, "A800": 312, "A10G": 70, "A10": 125, "A30": 165, "A40": 150, "A6000": 155}
PEAKS |= {"L40S": 362, "L40": 181, "L4": 121, "RTX 3090": 71, "RTX 4090": 165, "RTX 5090": 209}


def peak_flops(device_name):
    """Dense bfloat16 FLOP/s of a GPU. None if it is not in the table: MFU is then unknown."""
    matches = [key for key in PEAKS if re.search(rf"\b{key}\b", device_name) and "Laptop" not in device_name]
    return PEAKS[max(matches, key=len)] * 1e12 if matches else None


@dataclass(frozen=True)
class SizeConfig(ModelConfig):
    RUN = {"out_dir", "d_model"}  # fields by which a config.json of train.py is known

    vocab_size: int = 512  # V, size of the vocabulary
    # Report
    preset: str = "tiny"  # tiny or paper-dD-eE-kK
    tokens: float = 0.0  # training tokens, to show tokens per parameter
    micro_batch: int = 8  # sequences per GPU at a time, for activations
    weights: Literal["float32", "bfloat16"] = "float32"  # as in train.py; for the memory

    preset_fields = staticmethod(preset_fields)

    def validate(self):
        super().validate()
        check_range(self, "vocab_size micro_batch", 1, 2**30)
        check_range(self, "tokens", 0, 1e30)


def main(argv=None):
    cfg = config.parse(SizeConfig, argv, __doc__)
    (total, active, embedding), flops = count_params(cfg), flops_per_token(cfg)
    rows = [("parameters, total", f"{total:,}"), ("parameters, active per token", f"{active:,}")]
    rows += [("of these, embeddings", f"{embedding:,}"), ("vocabulary", f"{cfg.vocab_size:,}")]
    rows += [("sparsity 1 - K/E", f"{0.0 if cfg.dense else 1 - cfg.top_k / cfg.n_experts:.4g}")]
    rows += [("training FLOPs per token", f"{flops:.4g}")]
    if cfg.tokens:
        rows += [("training tokens", f"{cfg.tokens:.4g}"), ("training FLOPs", f"{cfg.tokens * flops:.4g}")]
        rows += [("tokens per parameter (TPP)", f"{cfg.tokens / total:.4g}")]
    memory = training_memory(cfg, cfg.micro_batch * cfg.seq_len, cfg.weights)
    memory[f"training memory, {cfg.micro_batch} x {cfg.seq_len} tokens"] = sum(memory.values())
    rows += [(part, f"{size / 2**30:.3f} GiB") for part, size in memory.items() if size]
    for name, value in rows:
        print(f"{name:<44} {value:>20}")


if __name__ == "__main__":
    config.command_line(main)
