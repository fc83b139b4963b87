"""Hugging Face checkpoints as model.GPT and back: Mixtral (the format of the paper's 65 models), Qwen3-MoE, OLMoE.

    model, tokens = load_model("Mixtral-8x7B-v0.1"), load_tokens("Mixtral-8x7B-v0.1")      # a local folder
    save_model(model, "out")                                                               # transformers loads it

    python -m optimoe.hf runs/NAME out --dtype bfloat16      # exports a run of train.py with its tokenizer

Both layouts of expert weights are read: one tensor per expert and matrix, as released checkpoints have it, and the stacked tensors
that transformers 5 holds in memory. Needs the packages safetensors and tokenizers (the extra `hf`), not transformers.
"""

import argparse
import dataclasses
import hashlib
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

from data import tokenizer
from data.tokenizer import Tokens
from model import GPT, ModelConfig, rope_tables
from optimoe import checkpoint
from optimoe.config import make_directory, require

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# By model_type: where a layer keeps its router and experts, and an expert's gate, up and down matrix.
LAYOUTS = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "olmoe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
TOP = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
IN_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "attn.out.weight": "self_attn.o_proj.weight",
    "attn.q_norm.weight": "self_attn.q_norm.weight",
    "attn.k_norm.weight": "self_attn.k_norm.weight",
}


def pieces(cfg, name, tensor, layout, stacked=False):
    """Yields (name in the checkpoint, its part of `tensor`) for the weight `name` of model.GPT; the parts are views."""
    if name in TOP:
        yield TOP[name], tensor
        return
    _, i, part = name.split(".", 2)
    layer, (moe, matrices) = f"model.layers.{i}.", layout
    if part in IN_LAYER:
        yield layer + IN_LAYER[part], tensor
    elif part == "attn.qkv.weight":
        for proj, rows in zip(
            "qkv", tensor.split([n * cfg.head_dim for n in (cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads)]), strict=True
        ):
            yield f"{layer}self_attn.{proj}_proj.weight", rows
    elif part == "mlp.router.weight":
        yield f"{layer}{moe}.gate.weight", tensor
    elif stacked:
        yield f"{layer}{moe}.experts.{'gate_up_proj' if part == 'mlp.w_in' else 'down_proj'}", tensor
    else:
        for e, expert in enumerate(tensor):
            parts = zip(matrices[:2], expert.chunk(2), strict=True) if part == "mlp.w_in" else [(matrices[2], expert)]
            for matrix, rows in parts:
                yield f"{layer}{moe}.experts.{e}.{matrix}.weight", rows


def load_model(directory, device="cpu", dtype="auto", impl="auto"):
    """A GPT in evaluation mode; its weights have the compute dtype ("auto": bfloat16 on CUDA, else float32).

    Raises FileNotFoundError or ValueError naming what is missing, damaged, or unknown to model.py."""
    directory = Path(directory)
    raw = read_json(directory / CONFIG)
    cfg = dataclasses.replace(model_config(raw), dtype=dtype, impl=impl)
    weights = Weights(directory)
    stacked = any(name.endswith(".experts.gate_up_proj") for name in weights.files)
    layout = ("mlp", ()) if stacked else LAYOUTS[raw["model_type"]]
    auto = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    with torch.device("meta"):
        model = GPT(cfg)
    state = {
        name: torch.empty(value.shape, dtype=getattr(torch, auto if dtype == "auto" else dtype), device=device)
        for name, value in model.state_dict().items()
        if not (cfg.tie_embeddings and name == "head.weight")
    }
    for name, tensor in state.items():
        for piece, view in pieces(cfg, name, tensor, layout, stacked):
            weights.read(piece, view)
    unknown = [
        name
        for name in weights.files
        if name not in weights.used
        and not name.endswith("rotary_emb.inv_freq")
        and not (cfg.tie_embeddings and name == TOP["head.weight"])
    ]
    if unknown:
        raise ValueError(
            f"{directory} holds tensors that a {raw['model_type']} model does not have, such as {unknown[0]} ({len(unknown)} in all): "
            "is model_type in config.json right?"
        )
    model.load_state_dict(state, assign=True, strict=False)
    if cfg.tie_embeddings:
        model.head.weight = model.embed.weight
    model.cos, model.sin = (table.to(device) for table in rope_tables(cfg))
    return model.eval().requires_grad_(False)


def model_config(raw):
    """The ModelConfig of a config.json; ValueError for what model.py does not compute."""
    kind = raw.get("model_type")
    require(kind in LAYOUTS, "model_type", kind, f"{CONFIG} must name one of {', '.join(LAYOUTS)}")

    def get(*names, default=None):
        value = next((raw[name] for name in names if raw.get(name) is not None), default)
        if value is None:
            raise ValueError(f"{CONFIG} lacks {names[0]}")
        return value

    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    for name, value, known in (
        ("hidden_act", raw.get("hidden_act", "silu"), ("silu",)),
        ("attention_bias", raw.get("attention_bias"), (None, False)),
        ("clip_qkv", raw.get("clip_qkv"), (None,)),
        ("mlp_only_layers", raw.get("mlp_only_layers"), (None, [])),
        ("decoder_sparse_step", raw.get("decoder_sparse_step", 1), (1,)),
        ("rope_type", rope.get("rope_type", rope.get("type", "default")), ("default",)),
    ):
        if value not in known:
            raise ValueError(f"{CONFIG} has {name}={value!r}: model.py computes {known[-1]!r} only")
    window = raw.get("sliding_window") if kind == "mixtral" or raw.get("use_sliding_window") else None
    heads, width = get("num_attention_heads"), get("hidden_size")
    return ModelConfig(
        vocab_size=get("vocab_size"),
        seq_len=min(get("max_position_embeddings"), window or 2**40),  # a window is not needed within it
        d_model=width,
        n_layers=get("num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=get("num_key_value_heads", default=heads),
        head_dim=get("head_dim", default=width // heads),
        n_experts=get("num_local_experts", "num_experts"),
        top_k=get("num_experts_per_tok"),
        d_expert=get("moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size"),
        router_normalize=kind == "mixtral" or bool(raw.get("norm_topk_prob", False)),
        qk_norm=kind != "mixtral",
        qk_norm_joint=kind == "olmoe",
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        norm_eps=get("rms_norm_eps"),
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or (1e6 if kind == "mixtral" else 1e4)),
    )


class Weights:
    """The tensors of a folder of safetensors files, read one at a time."""

    def __init__(self, directory):
        self.directory, self.used, self.handles = directory, set(), {}
        if (directory / INDEX).is_file():
            self.files = read_json(directory / INDEX).get("weight_map")
            if not isinstance(self.files, dict):
                raise ValueError(f"{directory / INDEX} is damaged (no weight_map): download it again")
        elif (directory / SINGLE).is_file():
            self.files = dict.fromkeys(self.open(SINGLE)[1], SINGLE)
        else:
            raise FileNotFoundError(
                f"{directory} has neither {SINGLE} nor {INDEX}: name a folder with a downloaded checkpoint in safetensors format"
            )
        for name, file in self.files.items():
            if not (directory / file).is_file():
                raise FileNotFoundError(f"{directory / file} is missing; it holds {name}: download it again")

    def open(self, file):
        """(the open file, the names of its tensors)"""
        if file not in self.handles:
            safetensors = package("safetensors")
            try:
                handle = safetensors.safe_open(self.directory / file, framework="pt")
            except safetensors.SafetensorError as error:
                raise ValueError(f"{self.directory / file} is damaged ({error}): download it again") from None
            self.handles[file] = handle, set(handle.keys())
        return self.handles[file]

    def read(self, name, into):
        """Copy a tensor into one of the same shape."""
        if name not in self.files:
            raise ValueError(f"{self.directory}: the tensor {name} is missing")
        file, names = self.open(self.files[name])
        if name not in names:
            raise ValueError(
                f"{self.directory / self.files[name]}: the tensor {name} is missing, which {INDEX} promises there"
            )
        tensor = file.get_tensor(name)
        if tensor.shape != into.shape:
            raise ValueError(
                f"{self.directory}: {name} is {tuple(tensor.shape)}, but {CONFIG} asks for {tuple(into.shape)}"
            )
        into.copy_(tensor)
        self.used.add(name)


def save_model(model, directory, dtype=None, max_shard_bytes=5_000_000_000, eos=None):
    """Write config.json and the weights, per expert and matrix, in files of at most max_shard_bytes. dtype: of the weights, None as they are;
    eos: token id that ends a text. Raises ValueError for a model that no known format describes, and where weights lie already."""
    save_file = package("safetensors.torch").save_file
    cfg, directory = model.cfg, Path(directory)
    kind, raw = hf_config(cfg)
    dtype = dtype or model.embed.weight.dtype
    directory.mkdir(parents=True, exist_ok=True)
    if list(directory.glob("*.safetensors")):
        raise ValueError(f"{directory} already holds safetensors files: write to another folder")
    views = [
        piece
        for name, tensor in model.state_dict().items()
        if not (cfg.tie_embeddings and name == "head.weight")
        for piece in pieces(cfg, name, tensor, LAYOUTS[kind])
    ]
    shards, size = [[]], 0
    for name, view in views:
        nbytes = view.numel() * dtype.itemsize
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, view))
        size += nbytes
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for file, shard in zip(files, shards, strict=True):
        tmp = directory / (file + ".tmp")
        tmp.touch()
        mode = tmp.stat().st_mode  # safetensors would let nobody else read it
        save_file({name: view.to("cpu", dtype, copy=True) for name, view in shard}, tmp, metadata={"format": "pt"})
        tmp.chmod(mode)
        os.replace(tmp, directory / file)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(view.numel() * dtype.itemsize for _, view in views)},
            "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name, _ in shard},
        }
        checkpoint.replace_file(directory / INDEX, json.dumps(index, indent=2) + "\n")
    checkpoint.replace_file(
        directory / CONFIG, json.dumps(raw | {"dtype": str(dtype)[6:], "eos_token_id": eos}, indent=2) + "\n"
    )


def hf_config(cfg):
    """(model_type, config.json) of a ModelConfig."""
    for name, only in (
        ("dense", False),
        ("activation", "swiglu"),
        ("n_shared_experts", 0),
        ("router_score", "softmax"),
        ("router_bias_rate", 0.0),
    ):
        value = getattr(cfg, name)
        require(
            value == only,
            name,
            value,
            f"Mixtral, Qwen3-MoE and OLMoE have {only!r}; this model cannot be written in their formats",
        )
    kind = "mixtral" if not cfg.qk_norm else "olmoe" if cfg.qk_norm_joint else "qwen3_moe"
    require(
        kind != "mixtral" or cfg.router_normalize,
        "router_normalize",
        False,
        "without qk_norm the format is Mixtral's, whose gates sum to 1",
    )
    require(
        kind != "olmoe" or cfg.n_heads * cfg.head_dim == cfg.d_model,
        "head_dim",
        cfg.head_dim,
        "in OLMoE the heads together are d_model wide",
    )
    experts = {
        "mixtral": {"num_local_experts": cfg.n_experts},
        "qwen3_moe": {
            "num_experts": cfg.n_experts,
            "moe_intermediate_size": cfg.d_expert,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        "olmoe": {"num_experts": cfg.n_experts},
    }[kind]
    architecture = {"mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "olmoe": "OlmoeForCausalLM"}[
        kind
    ]
    return kind, {
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_expert,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.head_dim,
        "num_experts_per_tok": cfg.top_k,
        **experts,
        **({} if kind == "mixtral" else {"norm_topk_prob": cfg.router_normalize}),
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "max_position_embeddings": cfg.seq_len,
        "tie_word_embeddings": cfg.tie_embeddings,
        "sliding_window": None,
        "attention_bias": False,
        "initializer_range": cfg.init_std,
        "bos_token_id": None,
        "pad_token_id": None,
    }


def load_tokens(directory) -> Tokens:
    """The tokenizer of a folder, from its tokenizer.json. ValueError where there is none, or one of another model.

    Prompts begin with what the tokenizer itself puts in front of a text (usually <s>, or nothing), generation ends at eos_token_id."""
    directory = Path(directory)
    if not (directory / "tokenizer.json").is_file():
        raise ValueError(
            f"{directory} has no tokenizer.json: transformers writes it, AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        fast = package("tokenizers").Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # tokenizers raises nothing more precise
        raise ValueError(f"{directory / 'tokenizer.json'} is damaged ({error}): download it again") from None
    fast.no_truncation()  # some were saved with a limit of their training
    fast.no_padding()
    settings, config, generation = (
        read_json(directory / name, {}) for name in ("tokenizer_config.json", CONFIG, "generation_config.json")
    )
    plain, dressed = (fast.encode("a", add_special_tokens=special).ids for special in (False, True))
    bos = dressed[: next(i for i in range(len(dressed)) if dressed[i : i + len(plain)] == plain)]
    if "add_bos_token" in settings:
        token = settings.get("bos_token")
        first = (
            fast.token_to_id(token["content"] if isinstance(token, dict) else token)
            if token and settings["add_bos_token"]
            else None
        )
        bos = [] if first is None else [first]
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    rows = config.get("vocab_size", 2**40)

    def encode(text):
        ids = fast.encode(text, add_special_tokens=False).ids
        if max(ids, default=0) >= rows:
            raise ValueError(
                f"{directory}: {fast.id_to_token(max(ids))!r} is token {max(ids)} in tokenizer.json, but {CONFIG} has vocab_size={rows}: "
                "they are of different models"
            )
        return ids

    def decode(
        ids,
    ):  # SentencePiece drops a space at the beginning of a text: of a continuation it would be the first of an indentation
        return fast.decode(plain + ids)[len(fast.decode(plain)) :]

    return Tokens(encode, decode, bos, eos, min(fast.get_vocab_size(), rows))


def save_tokens(enc, directory):
    """Write a tiktoken encoding as tokenizer.json, with end-of-text in front of every text, as in training."""
    tokenizers = package("tokenizers")
    # The byte-level alphabet of GPT-2: printable bytes stand for themselves, the others for characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    letters = {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}
    spell = lambda token: "".join(letters[byte] for byte in token)  # noqa: E731
    ranks = enc._mergeable_ranks
    # tiktoken joins whichever neighbours make the token of lowest rank; here every such pair is a rule of its own.
    pairs = [
        (token[:i], token[i:])
        for token in sorted(ranks, key=ranks.get)
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    vocab = {spell(token): rank for token, rank in ranks.items()}
    fast = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, [(spell(a), spell(b)) for a, b in pairs], ignore_merges=True)
    )
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(enc._pat_str), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = tokenizers.decoders.ByteLevel()
    fast.add_special_tokens([tokenizer.EOT])
    if fast.token_to_id(tokenizer.EOT) != enc.eot_token:
        raise ValueError(
            f"end-of-text is token {enc.eot_token} of {enc.n_vocab}: only encodings with it after all ordinary tokens can be written"
        )
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{tokenizer.EOT} $A", special_tokens=[(tokenizer.EOT, enc.eot_token)]
    )
    fast.save(str(Path(directory) / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokenizer.EOT, "eos_token": tokenizer.EOT}
    checkpoint.replace_file(Path(directory) / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


def package(name):
    """An imported package; ValueError saying how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"the package {name.partition('.')[0]} is not installed: pip install -e '.[hf]'") from None


def read_json(path, default=None):
    if default is not None and not path.is_file():
        return default
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: name the folder of a Hugging Face checkpoint") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): download it again") from None


def fingerprint(directory, *others):
    """A name for results: the folder's own, with a hash of all files that they depend on, among them other paths (a tokenizer from elsewhere)."""
    directory, digest = Path(directory).resolve(), hashlib.sha256()
    names = (CONFIG, INDEX, "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    for path in [
        *sorted(directory.glob("*.safetensors")),
        *filter(Path.is_file, (directory / name for name in names)),
        *others,
    ]:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"{directory.name}-{digest.hexdigest()[:16]}"


def main(argv=None):
    parser = argparse.ArgumentParser(description="Export a run of train.py as a Hugging Face checkpoint.")
    parser.add_argument("run", help="run directory or checkpoint file")
    parser.add_argument("out", help="new folder")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the weights (default: float32, as trained)",
    )
    args = parser.parse_args(argv)
    path, out = Path(args.run), Path(os.path.abspath(args.out))
    for name in ("safetensors.torch", "tokenizers"):
        package(name)
    require(
        not out.exists() or out.is_dir() and not any(out.iterdir()),
        "OUT",
        args.out,
        "it exists already; write to a new folder",
    )
    make_directory(out.parent, "OUT", args.out)
    model = checkpoint.load_model(path)
    data = checkpoint.training_data(path if path.is_dir() else path.parent)
    enc = tokenizer.load(data)
    with tempfile.TemporaryDirectory(
        prefix=f".{out.name}.", suffix=".partial", dir=out.parent
    ) as partial:  # a failure leaves nothing behind
        whole = Path(partial) / out.name
        save_model(model, whole, getattr(torch, args.dtype), eos=enc.eot_token)
        save_tokens(enc, whole)
        os.rename(whole, out)
    print(f"{args.out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
