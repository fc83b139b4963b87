"""Hugging Face checkpoints as model.GPT and back: Mixtral (the format of the paper's 65 models), Qwen3-MoE, OLMoE.

    model, tokens = load_model("Mixtral-8x7B-v0.1"), load_tokens("Mixtral-8x7B-v0.1")  # a local folder
    save_model(model, "out")  # transformers loads it

    python -m optimoe.hf runs/NAME out --dtype=bfloat16  # exports a run of train.py with its tokenizer

Expert weights are read as one tensor per expert and matrix, as released checkpoints have them, and as the stacked
tensors that transformers 5 holds in memory. Needs safetensors and tokenizers (the extra `hf`), not transformers.
"""

import dataclasses
import hashlib
import importlib
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch

from data import files, tokenizer
from data.tokenizer import Tokens
from model import GPT, UNTAUGHT, ModelConfig, rope_tables
from optimoe import checkpoint, config
from optimoe.config import make_directory, require, shown
from optimoe.run import require_memory
from optimoe.sizes import count_params

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
AGAIN = "download it again"
# Fields of ModelConfig that say how a model starts or runs, not what it computes.
FREE = ("init_std", "embed_init_std", "dtype", "impl", "loss_chunk")
NUMBERS = ("F64", "F32", "F16", "BF16")  # what safetensors calls the dtypes of weights that are plain numbers


class Family(NamedTuple):
    architecture: str  # class of transformers without "ForCausalLM"
    moe: str  # where a layer keeps its router and experts
    matrices: tuple[str, ...]  # an expert's gate, up and down matrix
    n_experts: str  # names of fields in config.json
    d_expert: str
    fixed: dict  # fields of ModelConfig that config.json does not say
    extra: dict  # members of config.json that transformers needs beside FIELDS


QWEN, DENSE = ("gate_proj", "up_proj", "down_proj"), {"decoder_sparse_step": 1, "mlp_only_layers": []}
MIXTRAL, OLMOE = {"router_normalize": True}, {"qk_norm": True, "qk_norm_joint": True}
FAMILIES = {
    "mixtral": Family(
        "Mixtral", "block_sparse_moe", ("w1", "w3", "w2"), "num_local_experts", "intermediate_size", MIXTRAL, {}
    ),
    "qwen3_moe": Family("Qwen3Moe", "mlp", QWEN, "num_experts", "moe_intermediate_size", {"qk_norm": True}, DENSE),
    "olmoe": Family("Olmoe", "mlp", QWEN, "num_experts", "intermediate_size", OLMOE, {}),
}
# Fields of ModelConfig and their names in config.json; n_experts and d_expert are named by the family.
FIELDS = """vocab_size=vocab_size seq_len=max_position_embeddings d_model=hidden_size n_layers=num_hidden_layers
    n_heads=num_attention_heads n_kv_heads=num_key_value_heads head_dim=head_dim top_k=num_experts_per_tok
    router_normalize=norm_topk_prob tie_embeddings=tie_word_embeddings norm_eps=rms_norm_eps rope_theta=rope_theta"""
FIELDS = dict(pair.split("=") for pair in FIELDS.split())
# Members of config.json and what they must be; the last value is what model.py computes.
ONLY = {
    "hidden_act": (None, "silu"),
    "attention_bias": (None, False),
    "clip_qkv": (None,),
    "mlp_only_layers": (None, []),
    "decoder_sparse_step": (None, 1),
    "quantization_config": (None,),
    "compression_config": (None,),
    "partial_rotary_factor": (None, 1),
    "rope_type": (None, "default"),
    "layer_types": ([], ["sliding_attention"], ["full_attention"]),
    "rope_parameters": ([],),
}
TOP = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
IN_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "attn.out.weight": "self_attn.o_proj.weight",
    "attn.q_norm.weight": "self_attn.q_norm.weight",
    "attn.k_norm.weight": "self_attn.k_norm.weight",
}


def pieces(cfg, name, tensor, family, stacked=False):
    """Yield (name in the checkpoint, its part of `tensor`) for the weight `name` of model.GPT. The parts are views."""
    if name in TOP:
        yield TOP[name], tensor
        return
    _, i, part = name.split(".", 2)
    layer = f"model.layers.{i}."
    experts, kind = f"{layer}{'mlp' if stacked else family.moe}.", part.removeprefix("mlp.")
    if part in IN_LAYER:
        yield layer + IN_LAYER[part], tensor
    elif part == "attn.qkv.weight":
        heads = cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads
        for proj, rows in zip("qkv", tensor.split([n * cfg.head_dim for n in heads]), strict=True):
            yield f"{layer}self_attn.{proj}_proj.weight", rows
    elif kind == "router.weight":
        yield f"{experts}gate.weight", tensor
    elif stacked:
        yield f"{experts}experts.{'gate_up_proj' if kind == 'w_in' else 'down_proj'}", tensor
    else:
        matrices = family.matrices[:2] if kind == "w_in" else family.matrices[2:]
        for e, expert in enumerate(tensor):
            for matrix, rows in zip(matrices, expert.chunk(len(matrices)), strict=True):
                yield f"{experts}experts.{e}.{matrix}.weight", rows


def load_model(directory, device="cpu", dtype="auto", impl="auto"):
    """A GPT in evaluation mode; its weights have the compute dtype ("auto": bfloat16 on CUDA, else float32).

    Raises FileNotFoundError or ValueError naming what is missing, damaged, or unknown to model.py."""
    directory, device = Path(directory), torch.device(device)
    raw, weights = files.read_json(directory / CONFIG, AGAIN), Weights(directory)
    cfg = dataclasses.replace(model_config(raw), dtype=dtype, impl=impl)
    last = f"model.layers.{cfg.n_layers - 1}.input_layernorm.weight"
    if last not in weights.files:
        raise ValueError(
            f"{directory}: {CONFIG} has num_hidden_layers={cfg.n_layers}, but the tensor {last} is missing"
        )
    head, embedding = TOP["head.weight"], TOP["embed.weight"]
    if cfg.tie_embeddings and head in weights.files:  # like transformers, keep a head that is not the embedding
        cfg = dataclasses.replace(cfg, tie_embeddings=torch.equal(weights.get(head), weights.get(embedding)))
    if not cfg.router_learns:
        print(f"warning: {directory}: top_k={cfg.top_k}: {UNTAUGHT} in training", file=sys.stderr)
    stacked = any(name.endswith(".experts.gate_up_proj") for name in weights.files)
    family = FAMILIES[raw["model_type"]]
    with torch.device("meta"):
        model = GPT(cfg)
    shapes = model.state_dict()
    if cfg.tie_embeddings:
        del shapes["head.weight"]
    expected = [piece for name, value in shapes.items() for piece in pieces(cfg, name, value, family, stacked)]
    weights.check(expected, ignored=(head,) if cfg.tie_embeddings else ())
    kind = getattr(torch, ("bfloat16" if device.type == "cuda" else "float32") if dtype == "auto" else dtype)
    total = count_params(cfg).total
    require_memory(f"the {total:,} weights", total * kind.itemsize, device, "use --dtype=bfloat16 or a larger machine")
    state = {name: torch.empty(value.shape, dtype=kind, device=device) for name, value in shapes.items()}
    for name, tensor in state.items():
        for piece, view in pieces(cfg, name, tensor, family, stacked):
            view.copy_(weights.get(piece))
    model.load_state_dict(state, assign=True, strict=False)
    if cfg.tie_embeddings:
        model.head.weight = model.embed.weight
    model.cos, model.sin = (table.to(device) for table in rope_tables(cfg))
    return model.eval().requires_grad_(False)


def model_config(raw):
    """The ModelConfig of a config.json; ValueError for what model.py does not compute."""
    kind = raw.get("model_type")
    require(kind in FAMILIES, "model_type", kind, f"{CONFIG} must name one of {', '.join(FAMILIES)}")
    family, types = FAMILIES[kind], {field.name: field.type for field in dataclasses.fields(ModelConfig)}

    def get(name, kind=int, default=None):
        value = default if raw.get(name) is None else raw[name]
        if value is None:
            raise ValueError(f"{CONFIG} lacks {name}")
        if type(value) not in ((int, float) if kind is float else (kind,)):
            raise ValueError(f"{CONFIG} has {name}={shown(value)}: {kind.__name__} is needed")
        return value

    rope = get("rope_parameters", dict, {}) or get("rope_scaling", dict, {})
    layers = sorted({str(layer) for layer in get("layer_types", list, [])})
    seen = {"rope_type": rope.get("rope_type", rope.get("type")), "layer_types": layers}
    seen["rope_parameters"] = [name for name, value in rope.items() if isinstance(value, dict)]
    seen["partial_rotary_factor"] = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    for name, known in ONLY.items():
        value = seen[name] if name in seen else raw.get(name)
        if value not in known:
            raise ValueError(f"{CONFIG} has {name}={shown(value)}: model.py computes {known[-1]!r} only")
    heads = get("num_attention_heads")
    default = {"n_kv_heads": heads, "head_dim": get("hidden_size") // max(1, heads), "router_normalize": False}
    default |= {"tie_embeddings": False, "rope_theta": 1e6 if kind == "mixtral" else 1e4}
    experts = next((name for name in ("num_local_experts", "num_experts") if raw.get(name)), family.n_experts)
    names = FIELDS | {"n_experts": experts, "d_expert": family.d_expert}
    found = {name: get(names[name], types[name], default.get(name)) for name in names if name not in family.fixed}
    found["rope_theta"] = float(rope.get("rope_theta") or found["rope_theta"])
    if kind == "mixtral" or raw.get("use_sliding_window") or "sliding_attention" in layers:
        found["seq_len"] = min(found["seq_len"], get("sliding_window", int, 2**30))  # there it hides nothing
    cfg = ModelConfig(**found, **family.fixed)
    full = kind != "olmoe" or cfg.n_heads * cfg.head_dim == cfg.d_model
    require(full, "head_dim", cfg.head_dim, "in OLMoE the heads together are as wide as the model")
    return cfg


class Weights:
    """The tensors of a folder of safetensors files, read one at a time."""

    def __init__(self, directory):
        self.directory, self.handles = directory, {}
        if (directory / INDEX).is_file():
            self.files = files.read_json(directory / INDEX, AGAIN).get("weight_map")
            names = self.files.values() if isinstance(self.files, dict) else [None]
            if not all(isinstance(name, str) and Path(name).name == name for name in names):
                raise ValueError(f"{directory / INDEX} is damaged (no weight_map of file names): {AGAIN}")
        elif (directory / SINGLE).is_file():
            self.files = dict.fromkeys(self.open(SINGLE).keys(), SINGLE)
        else:
            remedy = "name a folder with a checkpoint in safetensors format"
            raise FileNotFoundError(f"{directory} has neither {SINGLE} nor {INDEX}: {remedy}")
        for name, file in self.files.items():
            if not (directory / file).is_file():
                raise FileNotFoundError(f"{directory / file} is missing; it holds {name}: {AGAIN}")

    def open(self, file):
        if file not in self.handles:
            safetensors = package("safetensors")
            try:
                self.handles[file] = safetensors.safe_open(self.directory / file, framework="pt")
            except safetensors.SafetensorError as error:
                raise ValueError(f"{self.directory / file} is damaged ({error}): {AGAIN}") from None
        return self.handles[file]

    def check(self, expected, ignored=()):
        """ValueError unless the folder holds the tensors `expected`: pairs of a name and a tensor of its shape."""
        stored = {}  # file -> names of its tensors
        for name, like in expected:
            if name not in self.files:
                raise ValueError(f"{self.directory}: the tensor {name} is missing")
            path = self.directory / self.files[name]
            if self.files[name] not in stored:
                stored[self.files[name]] = set(self.open(self.files[name]).keys())
            if name not in stored[self.files[name]]:
                raise ValueError(f"{path}: the tensor {name} is missing, which {INDEX} promises there")
            header = self.open(self.files[name]).get_slice(name)
            shape, dtype = tuple(header.get_shape()), header.get_dtype()
            if shape != like.shape:
                raise ValueError(f"{self.directory}: {name} is {shape}, but {CONFIG} asks for {tuple(like.shape)}")
            if dtype not in NUMBERS:
                raise ValueError(f"{self.directory}: {name} is quantised ({dtype}): only {', '.join(NUMBERS)} are read")
        rest = self.files.keys() - {name for name, _ in expected} - set(ignored)
        unknown = sorted(name for name in rest if not name.endswith("rotary_emb.inv_freq"))
        if unknown:
            some = f"such as {unknown[0]} ({len(unknown)} in all): is model_type right?"
            raise ValueError(f"{self.directory} holds tensors that {CONFIG} does not describe, {some}")

    def get(self, name):
        if name not in self.files:
            raise ValueError(f"{self.directory}: the tensor {name} is missing")
        return self.open(self.files[name]).get_tensor(name)


def save_model(model, directory, dtype=None, max_shard_bytes=5_000_000_000, eos=None):
    """Write config.json and the weights, per expert and matrix, in files of at most max_shard_bytes.

    dtype: of the weights, None as they are; eos: token id that ends a text. Raises ValueError for a model that no known
    format describes, and for a folder that already holds weights."""
    save_file = package("safetensors.torch").save_file
    cfg, directory = model.cfg, Path(directory)
    kind, raw = hf_config(cfg)
    dtype = dtype or model.embed.weight.dtype
    directory.mkdir(parents=True, exist_ok=True)
    if list(directory.glob("*.safetensors")):
        raise ValueError(f"{directory} already holds safetensors files: write to another folder")
    shards, size = [[]], 0
    tied = {"head.weight"} if cfg.tie_embeddings else set()
    weights = [(name, tensor) for name, tensor in model.state_dict().items() if name not in tied]
    for piece, view in (pair for weight in weights for pair in pieces(cfg, *weight, FAMILIES[kind])):
        size += view.numel() * dtype.itemsize
        if shards[-1] and size > max_shard_bytes:
            shards.append([])
            size = view.numel() * dtype.itemsize
        shards[-1].append((piece, view))
    n = len(shards)
    names = [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)] if n > 1 else [SINGLE]
    for file, shard in zip(names, shards, strict=True):
        tmp = directory / (file + ".tmp")
        tmp.touch()
        mode = tmp.stat().st_mode  # safetensors would let nobody else read it
        save_file({name: view.to("cpu", dtype, copy=True) for name, view in shard}, tmp, metadata={"format": "pt"})
        tmp.chmod(mode)
        os.replace(tmp, directory / file)
    if n > 1:
        total = sum(view.numel() * dtype.itemsize for shard in shards for _, view in shard)
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name, _ in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files.write_json(directory / INDEX, index, signed=False)
    files.write_json(directory / CONFIG, raw | {"dtype": str(dtype)[6:], "eos_token_id": eos}, signed=False)


def hf_config(cfg):
    """(model_type, config.json) of a ModelConfig. ValueError naming a field that the format cannot express: read back,
    config.json must give the same value of every field that changes what is computed, new fields too."""
    kind = "mixtral" if not cfg.qk_norm else "olmoe" if cfg.qk_norm_joint else "qwen3_moe"
    family = FAMILIES[kind]
    names = FIELDS | {"n_experts": family.n_experts, "d_expert": family.d_expert}
    raw = {
        "architectures": [family.architecture + "ForCausalLM"],
        "model_type": kind,
        "intermediate_size": cfg.d_expert,
        **{theirs: getattr(cfg, ours) for ours, theirs in names.items() if ours not in family.fixed},
        **family.extra,
        **{"hidden_act": "silu", "sliding_window": None, "attention_bias": False, "initializer_range": cfg.init_std},
        **{"bos_token_id": None, "pad_token_id": None},
    }
    back = model_config(raw)
    for field in dataclasses.fields(ModelConfig):
        value, kept = getattr(cfg, field.name), getattr(back, field.name)
        same = value == kept or field.name in FREE
        require(same, field.name, value, f"the format of {kind} has {kept!r} only; this model cannot be exported")
    return kind, raw


def load_tokens(directory) -> Tokens:
    """The tokenizer of a folder, from its tokenizer.json. ValueError if there is none, or one of another model.

    Prompts begin with what the tokenizer itself puts in front of a text (usually <s>, or nothing); generation ends at
    eos_token_id. Text that spells a special token is that token unless the folder says split_special_tokens, as an
    exported run does: in training such text is ordinary."""
    path = (directory := Path(directory)) / "tokenizer.json"
    if not path.is_file():
        remedy = "transformers writes it, AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        raise ValueError(f"{directory} has no tokenizer.json: {remedy}")
    try:
        fast = package("tokenizers").Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more precise
        raise ValueError(f"{path} is damaged ({error}): {AGAIN}") from None
    fast.no_truncation()  # some were saved with a limit of their training
    fast.no_padding()
    settings, raw, generation = (
        files.read_json(directory / name, AGAIN) if (directory / name).is_file() else {}
        for name in ("tokenizer_config.json", CONFIG, "generation_config.json")
    )
    fast.encode_special_tokens = bool(settings.get("split_special_tokens"))
    plain, dressed = (fast.encode("a", add_special_tokens=special).ids for special in (False, True))
    bos = dressed[: next(i for i in range(len(dressed)) if dressed[i : i + len(plain)] == plain)]
    if "add_bos_token" in settings:
        token = settings.get("bos_token")
        token = token["content"] if isinstance(token, dict) else token
        first = fast.token_to_id(token) if token and settings["add_bos_token"] else None
        bos = [] if first is None else [first]
    eos = generation.get("eos_token_id", raw.get("eos_token_id"))
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    rows = raw.get("vocab_size", 2**40)

    def encode(text):
        ids = fast.encode(text, add_special_tokens=False).ids
        if max(ids, default=0) >= rows:
            token = f"{fast.id_to_token(max(ids))!r} is token {max(ids)} in tokenizer.json"
            raise ValueError(f"{directory}: {token}, but {CONFIG} has vocab_size={rows}: they are of different models")
        return ids

    def decode(ids):  # behind other tokens: SentencePiece drops a space at the beginning of a text
        return fast.decode(plain + ids)[len(fast.decode(plain)) :]

    return Tokens(encode, decode, bos, eos, min(1 + max(fast.get_vocab().values()), rows))


def save_tokens(enc, directory):
    """Write a tiktoken encoding as tokenizer.json, with end-of-text in front of every text, as in training."""
    tokenizers = package("tokenizers")
    # The byte-level alphabet of GPT-2: printable bytes stand for themselves, the others for characters from 256 on.
    printable, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, iter(range(256, 512))
    letters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    ranks, special = enc._mergeable_ranks, enc._special_tokens
    words = {token: "".join(letters[byte] for byte in token) for token in ranks}
    # tiktoken joins whichever neighbours make the token of lowest rank: each such pair becomes a rule of its own.
    splits = ((token[:i], token[i:]) for token in sorted(ranks, key=ranks.get) for i in range(1, len(token)))
    pairs = [(words[left], words[right]) for left, right in splits if left in ranks and right in ranks]
    vocab = {words[token]: rank for token, rank in ranks.items()} | special  # with the special tokens' own ids
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, pairs, ignore_merges=True))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(enc._pat_str), "isolated")
    letters_of_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, letters_of_bytes])
    fast.decoder = tokenizers.decoders.ByteLevel()
    fast.add_special_tokens(sorted(special, key=special.get))
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{tokenizer.EOT} $A", special_tokens=[(tokenizer.EOT, enc.eot_token)]
    )
    fast.save(str(Path(directory) / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokenizer.EOT, "eos_token": tokenizer.EOT}
    settings["split_special_tokens"] = True  # text that spells a special token is ordinary text, as in training
    files.write_json(Path(directory) / "tokenizer_config.json", settings, signed=False)


def package(name):
    """An imported package; ValueError saying how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"the package {name.partition('.')[0]} is not installed: pip install -e '.[hf]'") from None


def fingerprint(directory, *others, title=""):
    """A name for results: title, or the folder's, and a hash of its files and of the paths `others` they depend on."""
    directory, digest = Path(directory).resolve(), hashlib.sha256()
    names = (CONFIG, INDEX, "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    small = filter(Path.is_file, (directory / name for name in names))
    for path in [*sorted(directory.glob("*.safetensors")), *small, *others]:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"{title or directory.name}-{digest.hexdigest()[:16]}"


@dataclass(frozen=True)
class ExportConfig:
    POSITIONAL: ClassVar = ("run", "out")
    run: str  # run directory or checkpoint file of train.py or grpo.py
    out: str  # new folder
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights; float32: as trained


def main(argv=None):
    cfg = config.parse(ExportConfig, sys.argv[1:] if argv is None else argv, __doc__)
    path, out = Path(cfg.run), Path(os.path.abspath(cfg.out))
    for name in ("safetensors.torch", "tokenizers"):
        package(name)
    new = not out.exists() or out.is_dir() and not any(out.iterdir())
    require(new, "out", cfg.out, "it exists already; write to a new folder")
    make_directory(out.parent, "out", cfg.out)
    model = checkpoint.load_model(path)
    enc = tokenizer.load(checkpoint.training_data(path if path.is_dir() else path.parent))
    # Beside its place, and renamed at the end: a failure leaves nothing behind.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".partial", dir=out.parent) as partial:
        whole = Path(partial) / out.name
        save_model(model, whole, getattr(torch, cfg.dtype), eos=enc.eot_token)
        save_tokens(enc, whole)
        os.rename(whole, out)
    print(f"{cfg.out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


if __name__ == "__main__":
    config.command_line(main)
