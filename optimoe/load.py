"""What evaluation and post-training load: the device, a trained model and its tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from data import tokenizer
from data.tokenizer import Tokens
from model import GPT, compute_dtype
from moe_kernels.tiles import pick_impl
from optimoe import checkpoint, hub
from optimoe.config import require


@dataclass(frozen=True)
class ModelChoice:
    # Model
    run: str = ""  # run directory: its newest checkpoint
    checkpoint: str = ""  # or a checkpoint file of one
    hf: str = ""  # or a Hugging Face model (Mixtral, Qwen3-MoE, OLMoE): a folder, or ORG/NAME[@REVISION] on the hub
    data: str = ""  # token data directory, if it was moved; with --hf: use this directory's tokenizer
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda where there is one; mps is untested
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA, float32 on CPU
    impl: Literal["auto", "reference", "grouped_mm", "triton"] = "auto"  # of moe_kernels' ops; auto: by device

    def __post_init__(self):
        self.validate()

    def validate(self):
        given = [name for name in ("run", "checkpoint", "hf") if getattr(self, name)]
        if len(given) != 1:
            what = " and ".join(given) or "no model"
            raise ValueError(f"{what} given: give one of --run=DIR, --checkpoint=FILE, --hf=DIR and --hf=ORG/NAME")
        for name, exists, kind in (("run", Path.is_dir, "directory"), ("checkpoint", Path.is_file, "file")):
            value = getattr(self, name)
            require(not value or exists(Path(value)), name, value, f"no such {kind}")
        if self.hf:
            hub.check(self.hf, "hf")

    def data_directory(self) -> Path | None:
        """The token data directory of the chosen run; None for a Hugging Face checkpoint without --data."""
        if self.hf and not self.data:
            return None
        return checkpoint.training_data(self.run or Path(self.checkpoint).parent, self.data)


class Loaded(NamedTuple):
    model: GPT  # in evaluation mode, weights in the compute dtype
    tokens: Tokens
    name: str  # of the checkpoint, for results: changes with the weights and the tokenizer
    results: Path  # where evaluations of this checkpoint go by default; not made yet


def load(cfg: ModelChoice) -> Loaded:
    """The chosen model. Raises ValueError or OSError for what is missing, damaged or does not fit together."""
    device = pick_device(cfg)
    if cfg.hf:
        from optimoe import hf, start  # only --hf needs their packages

        folder, directory = hub.folder(cfg.hf, "hf"), cfg.data_directory()
        model = hf.load_model(folder, device, cfg.dtype, cfg.impl)
        tokens = start.tokens_of(cfg.hf, "hf", model, directory)
        name = hf.fingerprint(folder, *([directory / tokenizer.FILE] if directory else []), title=hub.title(cfg.hf))
        return Loaded(model, tokens, name, hub.home(cfg.hf) / "eval")
    path = checkpoint.newest(cfg.checkpoint or cfg.run)
    model = cast_once(checkpoint.load_model(path, device, dtype=cfg.dtype, impl=cfg.impl))
    results = path.parent / f"eval-{checkpoint.NAME.fullmatch(path.name)[1]}"
    return Loaded(model, checkpoint.run_tokens(cfg.data_directory(), model), path.name, results)


def pick_device(cfg, local_rank=0):
    """The torch.device of a cfg with the fields device, dtype and impl. A GPU becomes CUDA's current device.

    Raises ValueError, blaming the field that asks for what is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = cfg.device if cfg.device != "auto" else "cuda" if there["cuda"] else "cpu"
    require(there[name], "device", name, f"no {name.upper()} device is visible; use --device=cpu")
    device = torch.device(name)
    if name == "cuda":
        found = torch.cuda.device_count()
        require(local_rank < found, "LOCAL_RANK", local_rank, f"{found} GPUs are visible; use at most as many ranks")
        device = torch.device(name, local_rank)
        torch.cuda.set_device(device)  # kernels run on the current device
    tensor = torch.empty(0, dtype=compute_dtype(cfg, device), device=device)
    try:
        pick_impl(None if cfg.impl == "auto" else cfg.impl, tensor)
    except RuntimeError as error:
        raise ValueError(f"{error}; or leave --impl=auto, which chooses") from None
    return device


def cast_once(model):
    """The model, with its weights cast to the compute dtype once and not at every use."""
    for weight in model.parameters():
        weight.data = weight.data.to(model.dtype)
    return model
