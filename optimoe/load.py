"""What evaluation and post-training load: the device, a trained model with frozen weights, its tokenizer."""

import torch

from data import tokenizer
from data.tokenizer import Tokens, tiktoken_tokens
from model import compute_dtype
from moe_kernels.tiles import pick_impl
from optimoe.config import require


def pick_device(cfg, local_rank=0):
    """The torch.device of a program with the fields device, dtype and impl; ValueError naming one that is not there.

    auto is cuda where there is one, else cpu. mps (Apple's GPUs) is untested: it is used only when it is asked for."""
    name = cfg.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    require(name != "cuda" or torch.cuda.is_available(), "device", name, "no CUDA device is visible; use --device=cpu")
    require(
        name != "mps" or torch.backends.mps.is_available(), "device", name, "torch has no MPS here; use --device=cpu"
    )
    device = torch.device(name, local_rank) if name == "cuda" else torch.device(name)
    tensor = torch.empty(0, dtype=compute_dtype(cfg, device), device=device)
    try:
        pick_impl(None if cfg.impl == "auto" else cfg.impl, tensor)
    except RuntimeError as error:
        raise ValueError(f"{error}; or leave --impl=auto, which chooses") from None
    return device


def run_tokens(directory, model) -> Tokens:
    """The tokenizer of a data directory; ValueError where it has more tokens than the model."""
    tokens = tiktoken_tokens(tokenizer.load(directory))
    require(
        tokens.n_vocab <= model.cfg.vocab_size,
        "tokenizer",
        str(directory),
        f"it has {tokens.n_vocab:,} tokens and the model {model.cfg.vocab_size:,}: name the data directory that the model was trained on",
    )
    return tokens


def frozen(model):
    """The same model with its weights in the compute dtype: cast once and not at every use, as they no longer change."""
    for weight in model.parameters():
        weight.data = weight.data.to(model.dtype)
    return model
