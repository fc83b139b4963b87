"""Hugging Face checkpoints as model.GPT and back: Mixtral (the format of the paper's 65 models), Qwen3-MoE, OLMoE.

    python -m optimoe.hf runs/NAME out --dtype=bfloat16  # exports a run with its tokenizer

In these checkpoints each matrix of each expert is a tensor, as in released ones. Needs the extra `hf`.
"""

import dataclasses
import hashlib
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch

from data import chat, fast, files, tokenizer
from data.fast import package
from data.tokenizer import Tokens
from model import GPT, UNTAUGHT, ModelConfig, compute_dtype, rope_tables
from optimoe import checkpoint, config, hub
from optimoe.config import make_directory, require
from optimoe.sizes import count_params, require_memory

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
AGAIN = "download it again"
# Fields of ModelConfig that do not change what a trained model computes.
FREE = ("init_std", "embed_init_std", "dtype", "impl", "loss_chunk", "recompute")


class Family(NamedTuple):
    architecture: str  # class in transformers, without "ForCausalLM"
    moe: str  # module with a layer's router and experts
    matrices: tuple[str, ...]  # an expert's gate, up and down matrix
    n_experts: str  # name of this field in config.json
    d_expert: str  # likewise
    fixed: dict  # values of fields that config.json lacks
    extra: dict  # members of config.json that transformers needs besides FIELDS


QWEN, DENSE = ("gate_proj", "up_proj", "down_proj"), {"decoder_sparse_step": 1, "mlp_only_layers": []}
MIXTRAL, OLMOE = {"router_normalize": True}, {"qk_norm": True, "qk_norm_joint": True}
FAMILIES = {
    "mixtral": Family(
        "Mixtral", "block_sparse_moe", ("w1", "w3", "w2"), "num_local_experts", "intermediate_size", MIXTRAL, {}
    ),
    "qwen3_moe": Family("Qwen3Moe", "mlp", QWEN, "num_experts", "moe_intermediate_size", {"qk_norm": True}, DENSE),
    "olmoe": Family("Olmoe", "mlp", QWEN, "num_experts", "intermediate_size", OLMOE, {}),
}
# Fields of ModelConfig and their names in config.json. The family names n_experts and d_expert.
FIELDS = """vocab_size=vocab_size seq_len=max_position_embeddings d_model=hidden_size n_layers=num_hidden_layers
    n_heads=num_attention_heads n_kv_heads=num_key_value_heads head_dim=head_dim top_k=num_experts_per_tok
    router_normalize=norm_topk_prob tie_embeddings=tie_word_embeddings norm_eps=rms_norm_eps rope_theta=rope_theta"""
FIELDS = dict(pair.split("=") for pair in FIELDS.split())
# Members of config.json and the only value that model.py computes. They may also be missing or null.
ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_only_layers": [], "decoder_sparse_step": 1}
ONLY |= {"clip_qkv": None, "quantization_config": None, "compression_config": None}
ONLY |= {"partial_rotary_factor": 1, "rope_type": "default", "rope_parameters": {}, "layer_types": []}
TOP = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
IN_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "attn.out.weight": "self_attn.o_proj.weight",
    "attn.q_norm.weight": "self_attn.q_norm.weight",
    "attn.k_norm.weight": "self_attn.k_norm.weight",
}


def pieces(cfg, name, tensor, family):
    """Yield (name in the checkpoint, its part of `tensor` as a view) for the weight `name` of model.GPT."""
    if name in TOP:
        yield TOP[name], tensor
        return
    _, i, part = name.split(".", 2)
    layer = f"model.layers.{i}."
    experts, kind = f"{layer}{family.moe}.", part.removeprefix("mlp.")
    if part in IN_LAYER:
        yield layer + IN_LAYER[part], tensor
    elif part == "attn.qkv.weight":
        heads = cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads
        for proj, rows in zip("qkv", tensor.split([n * cfg.head_dim for n in heads]), strict=True):
            yield f"{layer}self_attn.{proj}_proj.weight", rows
    elif kind == "router.weight":
        yield f"{experts}gate.weight", tensor
    else:
        matrices = family.matrices[:2] if kind == "w_in" else family.matrices[2:]
        for e, expert in enumerate(tensor):
            for matrix, rows in zip(matrices, expert.chunk(len(matrices)), strict=True):
                yield f"{experts}experts.{e}.{matrix}.weight", rows


def model_pieces(model, family):
    """{name in the checkpoint: view} of all weights of a GPT. A tied head is left out."""
    state = model.state_dict()
    if model.cfg.tie_embeddings:
        del state["head.weight"]
    return {key: view for name, t in state.items() for key, view in pieces(model.cfg, name, t, family)}


def load_model(directory, device="cpu", dtype="auto", impl="auto"):
    """A GPT in evaluation mode, with weights of the compute dtype ("auto": bfloat16 on CUDA, else float32).

    Raises FileNotFoundError or ValueError for what is missing, damaged, or unknown to model.py."""
    directory, device = Path(directory), torch.device(device)
    raw, stored = files.read_json(directory / CONFIG, AGAIN), open_weights(directory)
    cfg = dataclasses.replace(model_config(raw), dtype=dtype, impl=impl)
    last = f"model.layers.{cfg.n_layers - 1}.input_layernorm.weight"
    require(last in stored, "num_hidden_layers", cfg.n_layers, f"{directory} has no tensor {last}")
    head, embedding = TOP["head.weight"], TOP["embed.weight"]
    if cfg.tie_embeddings and {head, embedding} <= stored.keys():  # a head that differs is kept
        cfg = dataclasses.replace(cfg, tie_embeddings=torch.equal(stored[head], stored[embedding]))
    if not cfg.router_learns:
        print(f"warning: {directory}: top_k={cfg.top_k}: {UNTAUGHT} in training", file=sys.stderr)
    family = FAMILIES[raw["model_type"]]
    with torch.device("meta"):
        model = GPT(cfg)
    check_weights(directory, stored, model_pieces(model, family), {head} if cfg.tie_embeddings else set())
    total, kind = count_params(cfg).total, compute_dtype(cfg, device)
    require_memory(f"the {total:,} weights", total * kind.itemsize, device, "use --dtype=bfloat16 or a larger machine")
    model.to(kind).to_empty(device=device)
    if cfg.tie_embeddings:
        model.head.weight = model.embed.weight
    for name, view in model_pieces(model, family).items():
        view.copy_(stored[name])
        require(math.isfinite(view.sum(dtype=torch.float32)), "hf", str(directory), f"{name} is not finite: {AGAIN}")
    model.cos, model.sin = (table.to(device) for table in rope_tables(cfg))
    return model.eval().requires_grad_(False)


def model_config(raw):
    """The ModelConfig of a config.json. Raises ValueError for a model that model.py does not compute."""
    kind = raw.get("model_type")
    known = isinstance(kind, str) and kind in FAMILIES
    require(known, "model_type", kind, f"{CONFIG} must name one of {', '.join(FAMILIES)}")
    family, types = FAMILIES[kind], {field.name: field.type for field in dataclasses.fields(ModelConfig)}

    def get(name, kind=int, default=None):
        value = default if raw.get(name) is None else raw[name]
        fits = type(value) in ((int, float) if kind is float else (kind,))
        require(fits, name, value, f"{CONFIG} needs {kind.__name__} there")
        return value

    rope = get("rope_scaling", dict, {}) or get("rope_parameters", dict, {})  # in the order of transformers
    layers = {str(layer) for layer in get("layer_types", list, [])}
    seen = {"rope_type": rope.get("rope_type", rope.get("type"))}
    seen["layer_types"] = [] if layers in (set(), {"full_attention"}, {"sliding_attention"}) else sorted(layers)
    seen["rope_parameters"] = {name: value for name, value in rope.items() if isinstance(value, dict)}
    seen["partial_rotary_factor"] = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    for name, known in ONLY.items():
        value = seen[name] if name in seen else raw.get(name)
        require(value in (None, known), name, value, f"model.py computes {known!r} only ({CONFIG})")
    heads = get("num_attention_heads")
    default = {"n_kv_heads": heads, "head_dim": get("hidden_size") // max(1, heads), "router_normalize": False}
    default |= {"tie_embeddings": False, "rope_theta": 1e6 if kind == "mixtral" else 1e4}
    experts = next((name for name in ("num_local_experts", "num_experts") if raw.get(name)), family.n_experts)
    names = FIELDS | {"n_experts": experts, "d_expert": family.d_expert}
    found = {name: get(names[name], types[name], default.get(name)) for name in names if name not in family.fixed}
    theta = rope.get("rope_theta") or found["rope_theta"]
    require(type(theta) in (int, float), "rope_theta", theta, f"{CONFIG} needs float there")
    found["rope_theta"] = float(theta)
    if kind == "mixtral" or raw.get("use_sliding_window") or "sliding_attention" in layers:
        found["seq_len"] = min(found["seq_len"], get("sliding_window", int, 2**30))  # so the window hides nothing
    try:
        cfg = ModelConfig(**found, **family.fixed)
    except ValueError as error:
        ours, _, rest = str(error).partition("=")
        raise ValueError(f"{CONFIG}: {names.get(ours, ours)}={rest}") from None
    as_wide = kind != "olmoe" or cfg.n_heads * cfg.head_dim == cfg.d_model
    require(as_wide, "head_dim", cfg.head_dim, "in OLMoE the heads together are as wide as the model")
    return cfg


def open_weights(directory):
    """{name: mapped tensor} of a folder's safetensors files. Raises FileNotFoundError, or ValueError for damage."""
    library, index, listed, names = package("safetensors.torch"), directory / INDEX, None, [SINGLE]
    if index.is_file():
        listed = files.read_json(index, AGAIN).get("weight_map")
        names = list(listed.values()) if isinstance(listed, dict) else [None]
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError(f"{index} is damaged (no weight_map of file names): {AGAIN}")
    stored = {}
    for path in sorted({directory / name for name in names}):
        if not path.is_file():
            needed = f"{directory} has neither {SINGLE} nor {INDEX}" if listed is None else f"{path} is missing"
            raise FileNotFoundError(f"{needed}: {AGAIN}")
        try:
            stored |= library.load_file(path)
        except package("safetensors").SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): {AGAIN}") from None
    if listed is not None and listed.keys() != stored.keys():
        name = min(listed.keys() ^ stored.keys())
        raise ValueError(f"{index} and the files that it names differ: only one of them has {name}; {AGAIN}")
    return stored


def check_weights(directory, stored, expected, ignored):
    """Raises ValueError unless `stored` has just the names (but for `ignored`) and shapes of `expected`."""
    for name, like in expected.items():
        if name not in stored:
            raise ValueError(f"{directory}: the tensor {name} is missing: {AGAIN}")
        shape, kind = tuple(stored[name].shape), stored[name].dtype
        require(shape == like.shape, name, shape, f"{CONFIG} asks for {tuple(like.shape)}")
        require(kind.is_floating_point and kind.itemsize > 1, name, kind, "it is quantised, and would be misread")
    unknown = [name for name in stored.keys() - expected.keys() - ignored if not name.endswith("rotary_emb.inv_freq")]
    if unknown:
        raise ValueError(f"{directory} holds tensors that {CONFIG} does not describe, such as {min(unknown)}")


def save_model(model, directory, dtype=None, max_shard_bytes=5_000_000_000, eos=None):
    """Write config.json and the weights, in files of at most max_shard_bytes. dtype: None changes none. eos: token id,
    or a list of them, which generation_config.json has too.

    Raises ValueError for a model that no known format describes, and for a folder that already holds weights."""
    serialise = package("safetensors.torch").save
    split_shards = package("huggingface_hub").split_state_dict_into_shards_factory
    (kind, raw), directory, dtype = hf_config(model.cfg), Path(directory), dtype or model.embed.weight.dtype
    directory.mkdir(parents=True, exist_ok=True)
    if list(directory.glob("*.safetensors")):
        raise ValueError(f"{directory} already holds safetensors files: write to another folder")
    weights, size = model_pieces(model, FAMILIES[kind]), lambda view: view.numel() * dtype.itemsize
    naming = dict(filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_bytes)
    split = split_shards(weights, get_storage_size=size, **naming)
    for file, names in split.filename_to_tensors.items():
        shard = {name: weights[name].to("cpu", dtype, copy=True) for name in names}
        files.replace(directory / file, serialise(shard, metadata={"format": "pt"}))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        files.write_json(directory / INDEX, index, signed=False)
    if isinstance(eos, list):
        files.write_json(directory / GENERATION, {"eos_token_id": eos}, signed=False)
    files.write_json(directory / CONFIG, raw | {"dtype": str(dtype)[6:], "eos_token_id": eos}, signed=False)


def hf_config(cfg):
    """(model_type, config.json) of a ModelConfig. Raises ValueError for a field that the format cannot express."""
    kind = "mixtral" if not cfg.qk_norm else "olmoe" if cfg.qk_norm_joint else "qwen3_moe"
    family = FAMILIES[kind]
    names = FIELDS | {"n_experts": family.n_experts, "d_expert": family.d_expert}
    raw = {"architectures": [family.architecture + "ForCausalLM"], "model_type": kind}
    raw |= {"intermediate_size": cfg.d_expert, "hidden_act": "silu", "initializer_range": cfg.init_std, **family.extra}
    raw |= {"sliding_window": None, "attention_bias": False, "bos_token_id": None, "pad_token_id": None}
    raw |= {theirs: getattr(cfg, ours) for ours, theirs in names.items() if ours not in family.fixed}
    for name, kept in dataclasses.asdict(model_config(raw)).items():
        value, remedy = getattr(cfg, name), f"the format of {kind} has {kept!r} only; this model cannot be exported"
        require(value == kept or name in FREE, name, value, remedy)
    return kind, raw


def load_tokens(directory) -> Tokens:
    """The tokenizer of a folder, from its tokenizer.json. Raises ValueError if it is missing or of another model.

    Text that spells a special token becomes that token, unless the folder sets split_special_tokens."""
    directory = Path(directory)
    remedy = f"there is no {TOKENIZER}; AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it"
    require((directory / TOKENIZER).is_file(), "hf", str(directory), remedy)
    enc = fast.from_folder(directory)
    settings, raw, generation = (
        files.read_json(directory / name, AGAIN) if (directory / name).is_file() else {}
        for name in (TOKENIZER_CONFIG, CONFIG, GENERATION)
    )
    ids_of = enc.encode_ordinary if settings.get("split_special_tokens") else enc.encode_control
    rows = raw.get("vocab_size", 2**40)
    for found in (raw, generation):
        if (named := found.get("eos_token_id")) is not None:
            listed = named if isinstance(named, list) else [named]
            fits = listed and all(type(token) is int and 0 <= token < rows for token in listed)
            require(fits, "eos_token_id", named, f"{directory} must name ids of tokens, below {rows}")

    def encode(text):
        ids = ids_of(text)
        most = max(ids, default=0)
        require(most < rows, "vocab_size", rows, f"{directory / TOKENIZER} has token {most}: it is of another model")
        return ids

    return Tokens(encode, enc.decode, enc.begin, [enc.eot_token, *enc.ends], min(enc.n_vocab, rows))


def save_tokens(enc, directory, chat_template=None):
    """Write the tokenizer of a data directory as tokenizer.json. A text begins as in training.

    Text that spells a special token stays text, as in training. With a chat template, which spells them, it is one."""
    directory, settings = Path(directory), {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings["split_special_tokens"] = chat_template is None
    if chat_template is not None:
        files.replace(directory / chat.TEMPLATE, chat_template)
    if isinstance(enc, fast.Fast):
        library = package().Tokenizer.from_str(enc.definition)
        begin, end = enc.begin, library.id_to_token(enc.eot_token)
    else:
        library, begin, end = from_tiktoken(enc), [enc.eot_token], tokenizer.EOT
    settings |= {"eos_token": end, "add_bos_token": bool(begin)}
    if begin:
        settings["bos_token"] = library.id_to_token(begin[0])
    library.save(str(directory / TOKENIZER))
    files.write_json(directory / TOKENIZER_CONFIG, settings, signed=False)


def from_tiktoken(enc):
    """A tiktoken encoding as a tokenizer of the package `tokenizers`."""
    lib = package()
    letters = tokenizer.letters()
    ranks, special = enc._mergeable_ranks, enc._special_tokens
    words = {token: "".join(letters[byte] for byte in token) for token in ranks}
    # tiktoken joins the neighbours that make the token of lowest rank, so each pair that makes a token is a rule.
    splits = ((token[:i], token[i:]) for token in sorted(ranks, key=ranks.get) for i in range(1, len(token)))
    pairs = [(words[left], words[right]) for left, right in splits if left in ranks and right in ranks]
    vocab = {words[token]: rank for token, rank in ranks.items()} | special  # special tokens keep their ids
    made = lib.Tokenizer(lib.models.BPE(vocab, pairs, ignore_merges=True))
    split = lib.pre_tokenizers.Split(lib.Regex(enc._pat_str), "isolated")
    bytelevel = lib.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer, made.decoder = lib.pre_tokenizers.Sequence([split, bytelevel]), lib.decoders.ByteLevel()
    made.add_special_tokens(sorted(special, key=special.get))
    end = tokenizer.EOT
    made.post_processor = lib.processors.TemplateProcessing(f"{end} $A", special_tokens=[(end, enc.eot_token)])
    return made


def fingerprint(directory, *others, title=""):
    """A name for results: title or the folder's name, and a hash of its files and of the files `others`."""
    directory, digest = Path(directory).resolve(), hashlib.sha256()
    small = [directory / name for name in (CONFIG, INDEX, GENERATION, TOKENIZER, TOKENIZER_CONFIG)]
    for path in [*sorted(directory.glob("*.safetensors")), *filter(Path.is_file, small), *others]:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"{title or directory.name}-{digest.hexdigest()[:16]}"


@dataclass(frozen=True)
class ExportConfig:
    POSITIONAL: ClassVar = ("run", "out")
    run: str  # run directory or checkpoint file of train.py or grpo.py
    out: str  # new folder
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights; float32: as trained
    seq_len: int = 0  # max_position_embeddings in config.json; 0: as trained


def main(argv=None):
    cfg = config.parse(ExportConfig, argv, __doc__)
    path, out = Path(cfg.run), Path(os.path.abspath(cfg.out))
    for name in ("safetensors.torch", "tokenizers"):
        package(name)
    new = not out.exists() or out.is_dir() and not any(out.iterdir())
    require(new, "out", cfg.out, "it exists already; name a new folder")
    make_directory(out.parent, "out", cfg.out)
    model = checkpoint.load_model(path, **{"seq_len": cfg.seq_len} if cfg.seq_len else {})
    run_dir = path if path.is_dir() else path.parent
    data, started_from = checkpoint.training_data(run_dir), hub.origin(run_dir)
    enc, ends = tokenizer.load(data), checkpoint.run_tokens(data, model).eos
    template = chat.template_source(started_from)[0] if started_from else None
    with files.temporary(out, directory=True) as partial:
        save_model(model, partial, getattr(torch, cfg.dtype), eos=ends if len(ends) > 1 else ends[0])
        save_tokens(enc, partial, template)
        os.rename(partial, out)
    print(f"{cfg.out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


if __name__ == "__main__":
    config.command_line(main)
