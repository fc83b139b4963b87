"""A published model (Mixtral, Qwen3-MoE, OLMoE) as the start of training: `train.py --init_from`, `grpo.py --model`.

The weights become float32, and the optimiser starts without states. The model's config.json gives the sizes.
"""

import dataclasses
import shlex
from pathlib import Path

from data import files, tokenizer
from data.chat import chat_template
from data.tokenizer import Tokens, context_ids, tiktoken_tokens
from model import GPT
from optimoe import checkpoint, hf, hub
from optimoe.config import require

# Defaults of fine-tuning: small steps after a short warm-up, and no z-loss, because these models were trained without.
FINE_TUNING = dict(optimizer="adamw", lr=1e-5, warmup_steps=20, steps=200, beta2=0.95, weight_decay=0.0)
FINE_TUNING |= dict(balance_coef=1e-3, z_coef=0.0, log_every=10, val_every=100)
SEQ_LEN = 1024  # default, if the model reads so much; most read tens of thousands
RUNS = (*hf.FREE, "seq_len", "router_bias_rate")  # fields of ModelConfig that a run may choose
PROBE = "The 7 naïve café owners said: “x[i] += 12.50;”\n\n\tdef f(self):  # 東京 \U0001f600 ÅÄÖ don't\r\n"


def training_fields(name):
    """Defaults of train.TrainConfig for a run that starts from this model."""
    folder = hub.folder(name, "init_from", (hf.CONFIG,))  # enough for --help
    remedy = "this is no published model; python -m optimoe.hf RUN DIR makes one of a run"
    require(released(folder), "init_from", name, remedy)
    cfg = hf.model_config(files.read_json(folder / hf.CONFIG, hf.AGAIN))
    own = {field: value for field, value in dataclasses.asdict(cfg).items() if field not in hf.FREE}
    return {**own, "seq_len": min(cfg.seq_len, SEQ_LEN), **FINE_TUNING}


def load(name, field, cfg=None, **overrides):
    """A GPT on the CPU with the model's weights in float32, which require gradients.

    cfg: its ModelConfig. None: the model's own, with these overrides. Raises ValueError for a cfg of another model, and
    for what hub.folder (which blames `field`) and hf.load_model refuse."""
    released = hf.load_model(hub.folder(name, field), dtype="float32", impl="auto")
    cfg = cfg or dataclasses.replace(released.cfg, **overrides)
    for part, kept in dataclasses.asdict(released.cfg).items():
        value = getattr(cfg, part)
        require(value == kept or part in RUNS, part, value, f"{name} has {kept!r}; leave this flag out")
    remedy = f"{name} reads {released.cfg.seq_len} tokens at most"
    require(cfg.seq_len <= released.cfg.seq_len, "seq_len", cfg.seq_len, remedy)
    require(cfg.router_learns, "top_k", cfg.top_k, f"the router of {name} would not learn")
    model = GPT(cfg, draw=False)
    model.load_state_dict(released.state_dict(), assign=True, strict=not cfg.router_bias_rate)
    if cfg.tie_embeddings:
        model.head.weight = model.embed.weight
    return model


def check_tokenizer(name, enc, directory):
    """Raises ValueError if the token data in `directory`, with tokenizer enc, was made for another model."""
    _same(name, "init_from", tiktoken_tokens(enc), directory)


def tokens_of(name, field, model, directory=None):
    """The Tokens of a published model, or of token data that was made for it, with the same ends of an answer."""
    if not directory:
        return hf.load_tokens(hub.folder(name, field))
    tokens = checkpoint.run_tokens(directory, model)
    return tokens.ending(_same(name, field, tokens, directory))


def _same(name, field, tokens, directory):
    """The ids that end an answer of this model, if its folder has a tokenizer, which must be that of the data."""
    folder = hub.folder(name, field)
    if not (folder / hf.TOKENIZER).is_file():
        return []
    own = hf.load_tokens(folder)
    command = f"data.prepare --tokenizer={shlex.quote(name)}"
    remedy = f"its tokenizer is not that of {name}: prepare the text with `{command}`"
    require(own.encode(PROBE) == tokens.encode(PROBE), "data", str(directory), remedy)
    return own.eos


def released(name):
    """Whether `name` is a Hugging Face folder or a name on the hub, and not a run directory or a checkpoint file."""
    path = Path(name)
    if not path.is_dir():
        return not path.is_file() and hub.NAME.fullmatch(str(name)) is not None
    config = path / hf.CONFIG
    return not checkpoint.find(path) and config.is_file() and "model_type" in files.read_json(config, hf.AGAIN)


def load_any(name, device, **overrides):
    """The GPT of a run directory, checkpoint file or published model, on `device`. Its weights require gradients."""
    model = load(name, "model", **overrides) if released(name) else checkpoint.load_model(name, device, **overrides)
    return model.to(device).eval()


def chat_encoder(name, tokens: Tokens, data):
    """A function from chat messages to the ids of a prompt. None if the published model, or the one from which the run
    started, has no chat template. name: model, run directory or checkpoint file; data: the run's data."""
    run_dir = Path(name).parent if Path(name).is_file() else name
    folder = hub.folder(str(name), "model") if released(name) else hub.origin(run_dir)
    template = chat_template(folder) if folder else None
    if template is None:
        return None
    own = released(name) and data in (None, str(folder))
    encode = tokens.encode if own else tokenizer.load(data).encode_control
    return lambda messages: encode(template(messages, True))


def prompt_ids(name, tokens: Tokens, data=None):
    """A function from a question to the ids of its prompt. It uses chat_encoder, or without one the plain text."""
    encode = chat_encoder(name, tokens, data)

    def chat(text):
        question = text.removeprefix("Question: ").removesuffix("Answer:").rstrip()
        return encode([{"role": "user", "content": question}])

    return chat if encode else lambda text: context_ids(tokens, text)
